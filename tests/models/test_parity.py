"""The model equals transformers': logits and every parameter's gradient, for each family, in f32."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import MINISTRAL3, YARN

from xlam_jax.models.attention import QUERY_CHUNK
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.families import family_named
from xlam_jax.models.params import Params, binder
from xlam_jax.weights.hf_map import tensors

TOLERANCE = 1e-4

THETA = {"rope_type": "default", "rope_theta": 1_000_000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 4.0}  # deepseek-coder
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-v0.1-window-group-4": ("mistral", {"sliding_window": 7, "num_key_value_heads": 1}),
    "mistral-head-dim-theta": (
        "mistral",
        {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 24, "rope_parameters": THETA},
    ),
    "mistral-tied-group-1": ("mistral", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mixtral-8-top-2": ("mixtral", {}),
    "mixtral-skewed": ("mixtral", {}),
    "mixtral-4-top-1-window": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "tie_word_embeddings": True, "sliding_window": 7},
    ),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "mistral-yarn": ("mistral", {"rope_parameters": YARN, "head_dim": 24}),
    "ministral3": ("ministral3", {}),
    "ministral3-tied-window": (
        "ministral3",
        {
            "rope_parameters": MINISTRAL3 | {"attention_factor": 1.5},
            "tie_word_embeddings": True,
            "sliding_window": 7,
        },
    ),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": THETA, "sliding_window": 7}),
    "qwen2-window-head-dim": (
        "qwen2",
        {
            **{"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20, "max_window_layers": 0},
            **{"sliding_window": 7, "use_sliding_window": True},
        },
    ),
    "qwen3-head-dim-group-3": (
        "qwen3",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20, "rope_parameters": THETA},
    ),
    "qwen3-tied-window": (
        "qwen3",
        {"tie_word_embeddings": True, "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0},
    ),
    "qwen3-moe-128-top-8": (
        "qwen3_moe",
        {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 8, "norm_topk_prob": True},
    ),
    "qwen3-moe-tied-window": (
        "qwen3_moe",
        {"tie_word_embeddings": True, "sliding_window": 7, "use_sliding_window": True, "rope_parameters": THETA},
    ),
    "qwen3-moe-skewed": ("qwen3_moe", {"head_dim": 20, "num_attention_heads": 6, "norm_topk_prob": True}),
}
SLOW = ("qwen2-window-head-dim", "qwen3-tied-window", "qwen3-moe-skewed")


def positions(mask: np.ndarray) -> np.ndarray:
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)


def hf_side(model: Any, tokens: np.ndarray, mask: np.ndarray, weight: np.ndarray):
    """Logits, and by file key the gradients of sum(weight × logits)."""
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions(mask)}
    logits = model(**{name: torch.from_numpy(value).long() for name, value in inputs.items()}, use_cache=False).logits
    model.zero_grad()
    (logits * torch.from_numpy(weight)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach().numpy(), tiny_models.file_tensors(gradients, model.config.model_type)


@cache
def compiled(config: ModelConfig, remat: str, gradients: bool):
    """A function of parameters, tokens, positions, segments and weight; cases of one shape share its compilation."""
    bind = binder(config, dtype=jnp.float32, remat=remat)

    def loss(params, tokens, positions, segments, weight):
        model = bind(params)
        hidden, sums, _ = model(tokens, positions, segments)
        logits = model.logits(hidden)
        return jnp.sum(logits * weight), (logits, sums)

    return jax.jit(jax.value_and_grad(loss, has_aux=True) if gradients else loss)


def our_logits(model: Any, tokens: np.ndarray, place: np.ndarray, segments: np.ndarray):
    """Logits and router sums."""
    run = compiled(tiny_models.model_config(model), "none", False)
    _, (logits, sums) = run(tiny_models.params_of(model), tokens, place, segments, 0.0)
    return np.asarray(logits), sums


def our_side(model: Any, tokens: np.ndarray, mask: np.ndarray, weight: np.ndarray, remat: str = "none"):
    """Logits, by file key the gradients of sum(weight × logits), and the router sums."""
    config = tiny_models.model_config(model)
    run = compiled(config, remat, True)
    (_, (logits, sums)), gradients = run(tiny_models.params_of(model), tokens, positions(mask), mask, weight)
    return np.asarray(logits), by_key(config, jax.device_get(gradients)), sums


def by_key(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    out = {}
    for tensor in tensors(config):
        leaf = params
        for name in tensor.path:
            leaf = leaf[name]
        out[tensor.key] = tensor.to_hf(leaf)
    return out


def assert_close(ours: np.ndarray, expected: np.ndarray, what: str, floor: float = 0.0) -> None:
    """Their difference is within the tolerance relative to the scale of `expected`, or to a larger `floor`."""
    scale = max(float(np.abs(expected).max()), floor)
    error = float(np.abs(ours - expected).max())
    assert error <= TOLERANCE * scale, f"{what}: off by {error:.3g} at a scale of {scale:.3g}"


def assert_parity(model: Any, tokens: np.ndarray, mask: np.ndarray) -> Any:
    """Logits of the real tokens and all gradients agree. Returns the router sums."""
    config = tiny_models.model_config(model)
    weight = np.random.default_rng(1).normal(size=(*tokens.shape, config.vocab_size)).astype(np.float32)
    weight *= mask[:, :, None]
    expected, their_gradients = hf_side(model, tokens, mask, weight)
    ours, our_gradients, sums = our_side(model, tokens, mask, weight)
    real = mask > 0
    assert_close(ours[real], expected[real], "logits")
    assert our_gradients.keys() == their_gradients.keys()
    largest = max(float(np.abs(value).max()) for value in their_gradients.values())
    for key, value in their_gradients.items():
        # With one expert a token the gate is p/p: the router's gradient is zero, and rounding on both sides.
        constant = key.endswith(".gate.weight") and config.experts_per_token == 1
        assert_close(our_gradients[key], value, f"gradient of {key}", floor=1e-2 * largest if constant else 0.0)
    return sums


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]
)
def test_logits_and_gradients(case: str):
    family, overrides = CASES[case]
    model = tiny_models.hf_model(family, **overrides)
    if case.endswith("-skewed"):
        tiny_models.skew_routing(model)
    tokens = tiny_models.tokens(2, 40)
    sums = assert_parity(model, tokens, np.ones_like(tokens))
    if case.endswith("-skewed"):
        config = tiny_models.model_config(model)
        balanced = config.layers * tokens.size * config.experts_per_token / config.experts
        most = config.experts / config.experts_per_token  # if each token reaches the same experts
        assert float(sums.assigned_E.max()) > 0.75 * most * balanced, "the overflow loop has work to do"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["mistral-v0.1-window-group-4", "mixtral-8-top-2"])
def test_padding(case: str, side: str):
    family, overrides = CASES[case]
    tokens = tiny_models.tokens(2, 40)
    lengths, place = np.array([27, 5])[:, None], np.arange(40)[None, :]
    mask = (place >= 40 - lengths if side == "left" else place < lengths).astype(np.int32)
    assert_parity(tiny_models.hf_model(family, **overrides), tokens, mask)


@pytest.mark.parametrize("window", [None, 37])
def test_longer_than_a_query_chunk(window: int | None):
    length = QUERY_CHUNK + 61
    tokens = tiny_models.tokens(2, length)
    mask = np.ones_like(tokens)
    mask[1, :50] = 0
    assert_parity(tiny_models.hf_model("mistral", sliding_window=window), tokens, mask)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mistral", {"sliding_window": 7}),
        ("mixtral", {}),
        ("llama", {"rope_parameters": LINEAR}),
        ("ministral3", {}),
        ("qwen2", {}),
        pytest.param("qwen3", {}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", {}, marks=pytest.mark.slow),
    ],
)
def test_packed_segments_equal_sequences_alone(family: str, overrides: dict[str, Any]):
    model = tiny_models.hf_model(family, **overrides)
    lengths, total = [11, 23, 1, 9], 48
    rows = [tiny_models.tokens(1, length, seed=length) for length in lengths]
    pad = np.zeros((1, total - sum(lengths)), np.int32)
    packed = np.concatenate([*rows, pad], axis=1)
    place = np.concatenate([*(np.arange(length)[None] for length in lengths), pad], axis=1, dtype=np.int32)
    segment = np.concatenate([*(np.full((1, n), i, np.int32) for i, n in enumerate(lengths, 1)), pad], axis=1)
    together, _ = our_logits(model, packed, place, segment)

    start = 0
    for row in rows:
        alone = np.zeros_like(packed)
        alone[:, : row.shape[1]] = row
        real = (np.arange(total)[None] < row.shape[1]).astype(np.int32)
        ours, _ = our_logits(model, alone, positions(real), real)
        with torch.no_grad():
            expected = model(torch.from_numpy(row).long()).logits.numpy()
        segment_of_row = together[:, start : start + row.shape[1]]
        assert_close(segment_of_row, ours[:, : row.shape[1]], "packed against alone")
        assert_close(segment_of_row, expected, "packed against transformers")
        start += row.shape[1]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_load_balancing_loss(family: str):
    model = tiny_models.hf_model(family)
    config = tiny_models.model_config(model)
    tokens = tiny_models.tokens(3, 20)
    mask = np.ones_like(tokens)
    mask[1, 12:] = 0
    mask[2, :7] = 0
    with torch.no_grad():
        expected = model(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions(mask)).long(),
            output_router_logits=True,
        ).aux_loss.item()
    _, sums = our_logits(model, tokens, positions(mask), mask)
    rows = config.layers * mask.sum()
    assert float(sums.assigned_E.sum()) == rows * config.experts_per_token
    ours = config.experts * float(jnp.sum(sums.assigned_E / rows * sums.probability_E / rows))
    assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("case", "remat"),
    [
        ("mistral-v0.1-window-group-4", "dots"),
        ("mistral-v0.1-window-group-4", "minimal"),
        ("mistral-v0.1-window-group-4", "full"),
        ("mixtral-8-top-2", "full"),
        pytest.param("qwen2-tied", "minimal", marks=pytest.mark.slow),
        pytest.param("qwen3-tied-window", "dots", marks=pytest.mark.slow),
        pytest.param("qwen3-moe-tied-window", "full", marks=pytest.mark.slow),
    ],
)
def test_remat_changes_no_gradient(case: str, remat: str):
    family, overrides = CASES[case]
    model, tokens = tiny_models.hf_model(family, **overrides), tiny_models.tokens(2, 40)
    weight = np.random.default_rng(1).normal(size=(*tokens.shape, tiny_models.VOCAB)).astype(np.float32)
    _, kept, _ = our_side(model, tokens, np.ones_like(tokens), weight)
    _, again, _ = our_side(model, tokens, np.ones_like(tokens), weight, remat)
    for key, value in kept.items():
        assert_close(again[key], value, f"gradient of {key}")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_remat_of_dots_computes_no_product_again(family: str):
    model, tokens = tiny_models.hf_model(family), tiny_models.tokens(2, 40)
    ones = np.ones_like(tokens)
    weight = np.ones((*tokens.shape, tiny_models.VOCAB), np.float32)

    def products(remat: str) -> int:
        run = compiled(tiny_models.model_config(model), remat, True)
        traced = jax.make_jaxpr(run)(tiny_models.params_of(model), tokens, positions(ones), ones, weight)
        return str(traced).count("= dot_general[")

    assert products("dots") == products("none")
    assert products("full") > products("none")


def test_a_key_left_out_means_the_default_of_transformers():
    for family, make in tiny_models.CONFIGS.items():
        whole = make().to_dict() | {"architectures": [family_named(family).architecture]}
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        bare = {key: whole[key] for key in (*needed, "architectures")}
        assert ModelConfig.from_hf(bare) == ModelConfig.from_hf(whole)
