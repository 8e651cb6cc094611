"""NF4: the code book and the rounding, computed again from the paper; the size of a frozen model; its products."""
# pyright: reportMissingImports=false

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import norm
from support import ROOT, Commands

from xlam_jax.models import nf4
from xlam_jax.models.config import Lora, ModelConfig
from xlam_jax.models.linear import project
from xlam_jax.models.params import freeze, shapes, trainable


def code_book() -> np.ndarray:
    """The paper's construction (appendix E): evenly spaced quantiles of the normal distribution, eight of its negative
    half, nine of its positive one, zero in both, scaled to [-1, 1]."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, negative, [0.0]]))
    return values / np.abs(values).max()


def test_code_book_is_the_papers():
    np.testing.assert_allclose(nf4.CODEBOOK, code_book(), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 128), (2, 5, 64), (4, 96), (7, 16)])
def test_each_weight_is_the_nearest_code_times_its_blocks_largest(shape: tuple[int, ...]):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(np.float32)
    weight[0] = 0  # a block of zeros
    packed = nf4.quantize(jnp.asarray(weight))
    assert packed.shape == shape
    block = nf4.block_size(shape[-1])
    blocks = weight.reshape(-1, block)
    largest = np.abs(blocks).max(axis=1)
    nearest = np.abs(blocks[:, :, None] / np.where(largest, largest, 1)[:, None, None] - code_book()).argmin(axis=-1)
    codes = np.asarray(packed.codes).reshape(-1, block // 2)
    assert np.array_equal(np.concatenate([codes & 15, codes >> 4], axis=1), nearest)
    # the second quantization: roots of scales to 255ths of the row's largest, so off by at most half of one
    row = np.abs(weight).max(axis=-1)
    np.testing.assert_array_equal(packed.rows, row)
    scales = (np.asarray(packed.scales) / 255) ** 2 * row[..., None]
    assert np.abs(np.sqrt(scales.reshape(-1)) - np.sqrt(largest)).max() <= np.sqrt(row.max()) / 255 / 2 * (1 + 1e-5)
    dequantized = np.asarray(nf4.dequantize(packed, jnp.float32))
    np.testing.assert_allclose(
        dequantized.reshape(-1, block), code_book()[nearest] * scales.reshape(-1, 1), rtol=1e-6, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("outlier", [0.0, 0.6])
def test_bits_are_those_of_bitsandbytes(outlier: float):
    """The code book, every code and the scales before they are quantized; after that we are about as near. An outlier
    makes a row's other scales small next to its largest: thirty times here, as in some rows of real models."""
    import bitsandbytes.functional as functional  # of the extra `slow`

    assert np.array_equal(
        np.asarray(nf4.CODEBOOK, np.float32), functional.get_4bit_type("nf4", device="cpu").numpy().astype(np.float32)
    )
    rng = np.random.default_rng(0)
    weight = rng.normal(scale=0.02, size=(256, 4096)).astype(np.float32)
    weight[np.arange(256), rng.integers(0, 4096, 256)] += outlier
    ours = nf4.quantize(jnp.asarray(weight))
    packed_codes, state = functional.quantize_4bit(torch.from_numpy(weight), blocksize=nf4.BLOCK, quant_type="nf4")
    # they pack neighbours into a byte, we the halves of a block
    their_codes = np.stack([packed_codes.numpy() >> 4, packed_codes.numpy() & 15], axis=1).reshape(-1, nf4.BLOCK)
    codes = np.asarray(ours.codes).reshape(-1, nf4.BLOCK // 2)
    assert np.array_equal(np.concatenate([codes & 15, codes >> 4], axis=1), their_codes)
    assert np.array_equal(np.abs(weight.reshape(-1, nf4.BLOCK)).max(axis=1), state.absmax.numpy())

    def error(dequantized: np.ndarray) -> float:
        return float(np.sqrt(np.mean((dequantized - weight) ** 2)))

    twice = functional.quantize_4bit(
        torch.from_numpy(weight), blocksize=nf4.BLOCK, quant_type="nf4", compress_statistics=True
    )
    assert error(np.asarray(nf4.dequantize(ours, jnp.float32))) <= 1.01 * error(
        functional.dequantize_4bit(*twice).numpy()
    )


@pytest.mark.parametrize("name", ["mistral_7b_v0.3", "mixtral_8x7b", "deepseek_coder_6.7b"])
def test_a_frozen_model_takes_little(name: str):
    hf = json.loads((ROOT / f"configs/models/{name}.json").read_text(encoding="utf-8"))
    model = replace(ModelConfig.from_hf(hf), lora=Lora(targets=("q",), rank=8, alpha=8))
    base = trainable(model, shapes(model))[1]
    kept = jax.eval_shape(lambda tree: freeze(tree, jnp.bfloat16, quantized=True), base)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    assert size / sum(leaf.size for leaf in jax.tree.leaves(base)) <= 0.6


def test_products_and_their_gradients_are_those_of_the_dense_weight():
    rng = np.random.default_rng(0)
    packed = nf4.quantize(jnp.asarray(rng.normal(size=(24, 2, 64)), jnp.float32))
    dense = nf4.dequantize(packed, jnp.float32)
    x = jnp.asarray(rng.normal(size=(3, 5, 24)), jnp.float32)
    one, two = (
        jax.value_and_grad(lambda x, weight=weight: jnp.sum(jnp.sin(project("BTD,DNK->BTNK", x, weight, jnp.float32))))(
            x
        )
        for weight in (packed, dense)
    )
    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[1])


@pytest.mark.slow
def test_qlora_learns_as_lora_does(commands: Commands, tmp_path: Path):
    """A hundred steps of adapters in bf16 on the same trained weights, in sixteen bits and in four."""
    common = ("xlam_jax.train", "--config", ROOT / "configs/quickstart.yaml")
    commands.run(
        *common, f"output_dir={tmp_path / 'base'}", "train.steps=300", "eval.every=300", "checkpoint.every=300"
    )
    heldout, train = {}, {}
    for method in ("lora", "qlora"):
        run = tmp_path / method
        commands.run(
            *common, f"output_dir={run}", f"model.init_from={tmp_path / 'base'}", "model.compute_dtype=bfloat16",
            f"train.trainable={method}", "lora.targets=[q,k,v,o,w1,w2,w3]", "lora.rank=16", "lora.alpha=32",
            "train.steps=100", "train.learning_rate=1e-3", "train.warmup_steps=5", "eval.every=100",
            "checkpoint.every=100",
        )  # fmt: skip
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        heldout[method] = next(one["loss"] for one in records if one["kind"] == "heldout" and one["step"] == 100)
        last = [one for one in records if one["kind"] == "train" and one["step"] > 80]
        train[method] = np.average([one["loss"] for one in last], weights=[one["trained_tokens"] for one in last])
    assert heldout["qlora"] <= 1.02 * heldout["lora"]
    assert train["qlora"] <= 1.02 * train["lora"]
