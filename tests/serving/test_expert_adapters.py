"""Adapters of experts, as vLLM's loader reads and packs them: the products are those of the merged weights.

vLLM's kernels for them need a GPU, so no model is run here.
"""
# pyright: reportMissingImports=false

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models

from xlam_jax.models.config import Lora
from xlam_jax.models.params import shapes, trainable
from xlam_jax.weights.merge import merge
from xlam_jax.weights.peft import write_peft

pytestmark = [pytest.mark.serve, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    ("family", "block", "names"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w2", "w3")),
        ("qwen3_moe", "mlp", ("gate_proj", "down_proj", "up_proj")),
    ],
)
@pytest.mark.parametrize("stabilized", [False, True])
def test_vllm_packs_adapters_of_experts(
    tmp_path: Path, family: str, block: str, names: tuple[str, str, str], stabilized: bool
):
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.model_executor.layers.fused_moe import fused_moe_make_expert_params_mapping

    model = tiny_models.hf_model(family)
    lora = Lora(targets=("q", "w1", "w3", "w2"), rank=4, alpha=12.0, rank_stabilized=stabilized)
    config = replace(tiny_models.model_config(model), lora=lora)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32), trainable(config, shapes(config))[0]
    )
    write_peft(tmp_path / "adapter", config, adapters, base=None)
    # gate, down and up of each expert, in the order in which vLLM's model manager packs them
    mapping = fused_moe_make_expert_params_mapping(model, *names, num_experts=config.experts)
    experts = [name.rstrip(".") for _, name, _, _ in mapping]
    loaded = LoRAModel.from_local_checkpoint(
        str(tmp_path / "adapter"),
        {"q_proj", "experts", *experts},
        PEFTHelper.from_local_dir(str(tmp_path / "adapter"), None),
        lora_model_id=1,
        device="cpu",
    )
    base = tiny_models.params_of(model)["blocks"]
    merged = merge(config, base, adapters["blocks"])
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}.{block}"
        loras = [loaded.get_lora(f"{prefix}.{expert}") for expert in experts]
        assert None not in loras
        packed = PackedLoRALayerWeights.pack_moe(loras, f"{prefix}.experts").optimize()
        for at, name in enumerate(("w1", "w2", "w3")):
            products = np.einsum("eor,eri->eio", packed.lora_b[at].numpy(), packed.lora_a[at].numpy())
            for expert in range(config.experts):
                ours = np.asarray(merged[name][layer, expert]) - np.asarray(base[name][layer, expert])
                np.testing.assert_allclose(products[expert], ours, atol=1e-5)
