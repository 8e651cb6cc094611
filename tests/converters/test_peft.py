"""Adapters as PEFT folders: `peft` computes our logits from what we write, and we compute its from what it writes."""

import warnings
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import torch

from converters.peft import read_peft, write_peft
from xlam_jax.errors import UserError
from xlam_jax.models.config import Lora, ModelConfig
from xlam_jax.models.params import Params, binder, join, shapes, trainable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's

DENSE = ("q", "k", "v", "o", "w1", "w3", "w2")


def logits(config: ModelConfig, params: Params, tokens_BT: np.ndarray) -> np.ndarray:
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    bind = binder(config, dtype=jnp.float32)

    @jax.jit
    def of(params: Params) -> jax.Array:
        model = bind(params)
        return model.logits(model(tokens_BT, positions_BT, np.ones_like(tokens_BT))[0])

    return np.asarray(of(params))


def peft_logits(model, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT).long(), use_cache=False).logits.numpy()


def tiny(family: str, targets: tuple[str, ...], stabilized: bool = False):
    model = tiny_models.hf_model(family)
    lora = Lora(targets=targets, rank=4, alpha=12.0, rank_stabilized=stabilized)
    config = replace(tiny_models.model_config(model), lora=lora)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32), trainable(config, shapes(config))[0]
    )
    return model, config, tiny_models.params_of(model), adapters


@pytest.mark.parametrize(
    ("family", "targets", "stabilized"),
    [("mistral", (*DENSE, "head"), False), ("llama", ("q", "w2"), True), ("mixtral", ("q", "k", "v", "o"), False)],
)
def test_peft_loads_what_we_write(tmp_path: Path, family: str, targets: tuple[str, ...], stabilized: bool):
    model, config, base, adapters = tiny(family, targets, stabilized)
    tokens_BT = tiny_models.tokens(2, 20)
    ours = logits(config, join(base, adapters), tokens_BT)
    assert not np.allclose(ours, peft_logits(model, tokens_BT), atol=1e-2)
    write_peft(tmp_path / "adapter", config, adapters, base="tiny")
    theirs = peft_logits(peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")), tokens_BT)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    again = read_peft(tmp_path / "adapter", config)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_we_load_what_peft_writes(tmp_path: Path):
    model, config, base, _ = tiny("mistral", ("q", "v", "w1"))
    settings = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "gate_proj"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(model, settings)
    theirs.save_pretrained(str(tmp_path))
    tokens_BT = tiny_models.tokens(2, 20)
    expected = peft_logits(theirs, tokens_BT)
    np.testing.assert_allclose(
        logits(config, join(base, read_peft(tmp_path, config)), tokens_BT),
        expected,
        atol=1e-4 * np.abs(expected).max(),
    )


def test_experts_are_refused(tmp_path: Path):
    _, config, _, adapters = tiny("mixtral", ("q", "w1", "router"))
    with pytest.raises(UserError, match=r"w1, router have no layout .* --lora merge"):
        write_peft(tmp_path / "adapter", config, adapters, base=None)
    assert not (tmp_path / "adapter").exists()


def test_other_adapters_are_told(tmp_path: Path):
    _, config, _, adapters = tiny("mistral", ("q", "v"))
    write_peft(tmp_path / "adapter", config, adapters, base=None)
    for change, told in (
        ({"rank": 8}, "the rank is 4 there and 8"),
        ({"alpha": 1.0}, r"alpha is 12\.0 there and 1\.0"),
        ({"targets": ("q",)}, r"not of lora\.targets: .*v_proj"),
        ({"targets": ("q", "v", "o")}, "missing: .*o_proj"),
    ):
        with pytest.raises(UserError, match=told):
            read_peft(tmp_path / "adapter", replace(config, lora=replace(config.lora, **change)))
    other = replace(config, hidden_size=16, head_dim=4)
    with pytest.raises(UserError, match="the adapter of another base model"):
        read_peft(tmp_path / "adapter", other)
    (tmp_path / "adapter/adapter_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"adapter_config\.json: holds a list; a JSON object is expected"):
        read_peft(tmp_path / "adapter", config)
