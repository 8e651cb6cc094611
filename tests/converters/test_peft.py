"""Adapters in PEFT folders: `peft` and this project compute the same logits from folders that either has written."""

import dataclasses
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from xlam_jax.errors import UserError
from xlam_jax.models.config import Lora, ModelConfig
from xlam_jax.models.params import Params, binder, join, shapes, trainable
from xlam_jax.weights import peft_config
from xlam_jax.weights.hf_map import parameter, tensors
from xlam_jax.weights.merge import merge
from xlam_jax.weights.peft import read_peft, write_peft
from xlam_jax.weights.peft_config import read_config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's
    # peft adds patterns for stacked experts, and looks for what they match among modules only
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match any:RuntimeWarning"),
]

DENSE = ("q", "k", "v", "o", "w1", "w3", "w2")


def logits(config: ModelConfig, params: Params, tokens_BT: np.ndarray) -> np.ndarray:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    bind = binder(config, dtype=jnp.float32)

    @jax.jit
    def of(params: Params) -> jax.Array:
        model = bind(params)
        return model.logits(model(jnp.asarray(tokens_BT), positions_BT, jnp.ones_like(tokens_BT))[0])

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
    [
        ("mistral", (*DENSE, "head"), False),
        ("llama", ("q", "w2"), True),
        ("mixtral", ("q", "k", "v", "o"), False),
        ("qwen2", DENSE, False),
        pytest.param("qwen3", DENSE, False, marks=pytest.mark.slow),
        ("mixtral", ("q", "w1", "w3", "w2"), False),
        ("qwen3_moe", ("w1", "w3", "w2"), False),
        pytest.param("qwen3_moe", ("q", "k", "v", "o"), False, marks=pytest.mark.slow),
    ],
)
def test_peft_loads_what_we_write(tmp_path: Path, family: str, targets: tuple[str, ...], stabilized: bool):
    model, config, base, adapters = tiny(family, targets, stabilized)
    tokens_BT = tiny_models.tokens(2, 20)
    ours = logits(config, join(base, adapters), tokens_BT)
    assert not np.allclose(ours, peft_logits(model, tokens_BT), atol=1e-2)
    write_peft(tmp_path / "adapter", config, adapters, base="tiny")
    expected = peft_logits(peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")), tokens_BT)
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
    again = read_peft(tmp_path / "adapter", config)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_we_load_what_peft_writes(tmp_path: Path):
    model, config, base, _ = tiny("mistral", ("q", "v", "w1"))
    settings = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "gate_proj"], init_lora_weights=False
    )
    peft_model = peft.get_peft_model(model, settings)
    peft_model.save_pretrained(str(tmp_path))
    tokens_BT = tiny_models.tokens(2, 20)
    expected = peft_logits(peft_model, tokens_BT)
    np.testing.assert_allclose(
        logits(config, join(base, read_peft(tmp_path, config)), tokens_BT),
        expected,
        atol=1e-4 * np.abs(expected).max(),
    )


def test_scales_of_rank_stabilized_experts_are_those_that_peft_computes(tmp_path: Path):
    """peft gives stacked experts twice the rank and twice the alpha, which a rank-stabilized scale does not cancel."""
    model, config, base, adapters = tiny("mixtral", ("w1", "w3", "w2"), stabilized=True)
    assert config.lora
    write_peft(tmp_path / "adapter", config, adapters, base="tiny")
    tokens_BT = tiny_models.tokens(2, 20)
    expected = peft_logits(peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")), tokens_BT)
    np.testing.assert_allclose(
        logits(config, join(base, adapters), tokens_BT), expected, atol=1e-4 * np.abs(expected).max()
    )
    plain = replace(config, lora=replace(config.lora, alpha=config.lora.alpha * 2, rank_stabilized=False))
    jax.tree.map(np.testing.assert_array_equal, read_peft(tmp_path / "adapter", plain), adapters)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q", "w1", "w3", "w2", "router"), r"adapters on router have no layout .* --lora merge"),
        (("q", "w1", "w3"), r"only if all their matrices have one, and w2 has none; export .* --lora merge"),
        (("w2",), "and w1, w3 have none"),
    ],
)
def test_adapters_without_a_layout_are_refused(tmp_path: Path, family: str, targets: tuple[str, ...], message: str):
    _, config, _, adapters = tiny(family, targets)
    with pytest.raises(UserError, match=message):
        write_peft(tmp_path / "adapter", config, adapters, base=None)
    assert not (tmp_path / "adapter").exists()


def test_adapters_of_another_config_are_refused(tmp_path: Path):
    _, config, _, adapters = tiny("mistral", ("q", "v"))
    assert config.lora
    write_peft(tmp_path / "adapter", config, adapters, base=None)
    for change, message in (
        ({"rank": 8}, "the rank is 4 there and 8"),
        ({"alpha": 1.0}, r"alpha is 12\.0 there and 1\.0"),
        ({"targets": ("q",)}, r"not of lora\.targets: .*v_proj"),
        ({"targets": ("q", "v", "o")}, "missing: .*o_proj"),
    ):
        with pytest.raises(UserError, match=message):
            read_peft(tmp_path / "adapter", replace(config, lora=replace(config.lora, **change)))
    other = replace(config, hidden_size=16, head_dim=4)
    with pytest.raises(UserError, match="the adapter of another base model"):
        read_peft(tmp_path / "adapter", other)
    (tmp_path / "adapter/adapter_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"adapter_config\.json: contains a list; a JSON object is expected"):
        read_peft(tmp_path / "adapter", config)


# ---- adapter_config.json: honoured or refused ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to copy, as peft saves it: random adapters on q and v, rank 4 and alpha 12."""
    folder = tmp_path_factory.mktemp("plain")
    save_with_peft(folder)
    return folder


def save_with_peft(folder: Path, model: Any = None, **settings: Any) -> Any:
    """Saves random adapters with peft. Returns peft's model."""
    plain = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    torch.manual_seed(1)
    model = tiny_models.hf_model("mistral") if model is None else model
    peft_model = peft.get_peft_model(model, peft.LoraConfig(**(plain | settings)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns that it also saves embeddings
        peft_model.save_pretrained(str(folder))
    return peft_model


def changed(
    plain: Path, folder: Path, config: dict[str, Any] | None = None, tensors: Any = lambda values: values
) -> Path:
    """Copies a folder, and changes fields of its config and its tensors."""
    folder.mkdir(exist_ok=True)
    described = json.loads((plain / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(described | (config or {})), encoding="utf-8")
    save_file(tensors(load_file(plain / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return folder


def lora_of(**changes: Any) -> ModelConfig:
    config = tiny_models.model_config(tiny_models.hf_model("mistral"))
    return replace(config, lora=Lora(**({"targets": ("q", "v"), "rank": 4, "alpha": 12.0} | changes)))


def assert_merges_as_in_peft(folder: Path, peft_model: Any, config: ModelConfig, model: Any) -> None:
    """Checks that merging the adapters of a folder gives the weights of peft's merged model."""
    base = tiny_models.params_of(model)
    ours = merge(config, base, read_peft(folder, config, base))
    merged = tiny_models.file_tensors(dict(peft_model.merge_and_unload().named_parameters()), config.family)
    for tensor in tensors(config):
        np.testing.assert_allclose(
            tensor.to_hf(parameter(ours, tensor.path)), merged[tensor.key], rtol=1e-5, atol=1e-6, err_msg=tensor.key
        )


@pytest.mark.parametrize(
    "family", ["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "qwen3_moe"))]
)
def test_a_merge_changes_no_bias_and_no_norm(tmp_path: Path, family: str):
    model = tiny_models.hf_model(family)
    peft_model = save_with_peft(tmp_path, model)
    config = replace(tiny_models.model_config(model), lora=Lora(targets=("q", "v"), rank=4, alpha=12.0))
    assert_merges_as_in_peft(tmp_path, peft_model, config, tiny_models.hf_model(family))


def test_every_field_of_peft_is_classified():
    """Fails if a new version of peft adds a field: decide how it affects the result."""
    classes = [peft_config.HONOURED, tuple(peft_config.NEUTRAL), peft_config.VARIANTS, peft_config.IRRELEVANT]
    named = [field for fields in classes for field in fields]
    assert len(named) == len(set(named))
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == set(named)


def test_the_defaults_of_peft_are_read(tmp_path: Path):
    save_with_peft(tmp_path)
    described = read_config(tmp_path)
    assert (described.rank, described.alpha, described.rank_stabilized) == (4, 12, False)
    minimal = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(minimal))
    described = read_config(tmp_path)
    defaults = peft.LoraConfig()
    assert (described.rank, described.alpha) == (defaults.r, defaults.lora_alpha)


@pytest.mark.parametrize(
    ("settings", "lora"),
    [
        ({"alpha_pattern": {"q_proj": 32}}, {}),
        ({"alpha_pattern": {"q_proj": 32}}, {"alpha": 32.0}),
        ({"alpha_pattern": {"q_proj": 32, "v_proj": 32}}, {"alpha": 32.0}),
        ({"rank_pattern": {"v_proj": 2}}, {}),
        ({"r": 2, "rank_pattern": {"layers.1.self_attn.q_proj": 5, "^model.layers.0.+": 3}}, {"rank": 5}),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 7.5}, "use_rslora": True},
         {"rank_stabilized": True}),
        ({"target_modules": r".*(q|v)_proj", "exclude_modules": ["o_proj"]}, {}),
        ({"layers_to_transform": [0, 1], "layers_pattern": "layers"}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_patterns_are_honoured(tmp_path: Path, settings: dict[str, Any], lora: dict[str, Any]):
    peft_model = save_with_peft(tmp_path, **settings)
    assert_merges_as_in_peft(tmp_path, peft_model, lora_of(**lora), tiny_models.hf_model("mistral"))


def test_adapters_on_embedding_and_head_are_read(tmp_path: Path):
    """peft also saves the base's embeddings, which must equal those of the base."""
    peft_model = save_with_peft(tmp_path / "peft", target_modules=["q_proj", "embed_tokens", "lm_head"])
    model, config = tiny_models.hf_model("mistral"), lora_of(targets=("q", "embedding", "head"))
    copies = {key for key in load_file(tmp_path / "peft/adapter_model.safetensors") if ".lora_" not in key}
    assert copies, "peft saves copies"
    expected = peft_logits(peft_model, tiny_models.tokens(2, 20))
    base = tiny_models.params_of(model)
    ours = logits(config, join(base, read_peft(tmp_path / "peft", config, base)), tiny_models.tokens(2, 20))
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
    assert_merges_as_in_peft(tmp_path / "peft", peft_model, config, model)
    with pytest.raises(UserError, match=r"weights of its base; name the base in model\.init_from"):
        read_peft(tmp_path / "peft", config)
    with pytest.raises(UserError, match="differs from that of the base"):
        read_peft(tmp_path / "peft", config, base | {"head": base["head"] + 0.01, "embedding": base["embedding"] + 1})
    halved = changed(
        tmp_path / "peft", tmp_path / "half", tensors=lambda values: {
            key: value.astype(ml_dtypes.bfloat16) if key in copies else value for key, value in values.items()
        }
    )  # fmt: skip
    read_peft(halved, config, base)
    tied = replace(lora_of(targets=("q", "embedding")), tie_embeddings=True)
    with pytest.raises(UserError, match="embedding is tied to its head"):
        read_peft(tmp_path / "peft", tied, base)


@pytest.mark.parametrize(
    "kind",
    [
        "gaussian",
        "orthogonal",
        "eva",
        True,
        False,
        "pissa",
        "pissa_niter_2",
        "olora",
        "corda",
        "loftq",
        "lora_ga",
        "mica",
    ],
)
def test_initializations_are_neutral_or_refused(tmp_path: Path, plain: Path, kind: Any):
    """Initializations that change the base weights when peft loads the adapters must not be used with the original."""
    changed(plain, tmp_path, {"init_lora_weights": kind})
    config, model = lora_of(), tiny_models.hf_model("mistral")
    if kind in peft_config.NEUTRAL["init_lora_weights"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft_model = peft.PeftModel.from_pretrained(tiny_models.hf_model("mistral"), str(tmp_path))
        assert_merges_as_in_peft(tmp_path, peft_model, config, model)
        return
    with pytest.raises(UserError, match=f"init_lora_weights is '{kind}'; only plain LoRA .*merge_and_unload"):
        read_peft(tmp_path, config)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'; only LORA is read"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all", "use_dora": True}, "bias is 'all'.*use_dora is True|use_dora is True.*bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .'lm_head'."),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is"),
        ({"a_field_of_tomorrow": {"on": 1}}, "a_field_of_tomorrow is {'on': 1}"),
        ({"layers_to_transform": [0]}, r"excludes model\.layers\.1\.self_attn\.q_proj \(layers_to_transform \[0\]\)"),
        ({"exclude_modules": ["v_proj"]}, r"v_proj \(exclude_modules \['v_proj'\]\)"),
        ({"target_modules": ["q_proj"]}, r"v_proj \(target_modules \['q_proj'\]\)"),
        ({"target_modules": None}, "target_modules is None; a list of module names"),
        ({"r": 0}, "r is 0; a positive whole number"),
        ({"r": 4.0}, r"r is 4\.0; a positive whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; a finite number"),
        ({"use_rslora": "no"}, "use_rslora is 'no'; true or false"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern is {'q_proj': '8'}; an object of module names"),
        ({"rank_pattern": [8]}, r"rank_pattern is \[8\]; an object"),
        ({"rank_pattern": {"(": 8}}, r"rank_pattern: '\(' is not a regular expression"),
        ({"rank_pattern": {"q_proj": 8}}, "the rank is 8, 4 there and 4 in this config"),
        ({"rank_pattern": {"q_proj": 3}}, r"q_proj\.lora_A\.weight is \[4, 32\], .* \[3, 32\] is expected"),
        ({"lora_alpha": 8, "alpha_pattern": {"q_proj": 32}}, "alpha is 32, 8 there and 12.0 in this config"),
        ({"use_rslora": True}, "rank_stabilized is True there and False in this config"),
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_change_the_result_are_refused_by_name(
    tmp_path: Path, plain: Path, change: dict[str, Any], expected: str
):
    changed(plain, tmp_path, change)
    with pytest.raises(UserError, match=f"{tmp_path}.*(?:{expected})"):
        read_peft(tmp_path, lora_of())


@pytest.mark.parametrize(
    "change", [{"a_field_of_tomorrow": None}, {"another": {}}, {"merge_weights": False}, {"bias": None}]
)
def test_disabled_fields_are_accepted(tmp_path: Path, plain: Path, change: dict[str, Any]):
    read_peft(changed(plain, tmp_path, change), lora_of())


@pytest.mark.parametrize("text", ["", "{", "[1]", '"LORA"', "{}", "\xff"])
def test_a_malformed_config_is_one_message(tmp_path: Path, plain: Path, text: str):
    changed(plain, tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"adapter_config\.json(: |, line 1, column [12]: )"):
        read_peft(tmp_path, lora_of())


# ---- the tensors -----------------------------------------------------------------------------------------------------

KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, plain: Path, value: float, dtype: Any):
    def spoil(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = {key: array.astype(dtype) for key, array in values.items()}
        values[KEY][3, 1] = value
        return values

    with pytest.raises(UserError, match=rf"{KEY} contains 1 of 64 values that are infinite or NaN"):
        read_peft(changed(plain, tmp_path, tensors=spoil), lora_of())


def test_other_names_of_the_same_tensors(tmp_path: Path, plain: Path):
    expected = read_peft(plain, lora_of())
    for rename in (
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace(".weight", ".default.weight"),
    ):
        renamed = changed(
            plain, tmp_path, tensors=lambda values, to=rename: {to(key): value for key, value in values.items()}
        )
        jax.tree.map(np.testing.assert_array_equal, read_peft(renamed, lora_of()), expected)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({KEY.replace(".weight", ".other.weight"): np.zeros((16, 4), np.float32)}, "are both there"),
        ({"base_model.model.lm_head.lora_A.weight": np.zeros((4, 32), np.float32)}, r"not of lora\.targets: .*lm_head"),
        ({"base_model.model.score.weight": np.zeros((4, 32), np.float32)}, r"not of lora\.targets: .*score\.weight"),
        ({KEY.replace("lora_B.weight", "lora_magnitude_vector.weight"): np.zeros(16, np.float32)}, "magnitude_vector"),
        ({KEY: np.zeros((4, 16), np.float32)}, r"is \[4, 16\], the adapter of another base model.* \[16, 4\]"),
        ({KEY: np.zeros((16, 4), np.int8)}, "is I8; adapters are read as"),
    ],
    ids=["twice", "head", "unknown", "dora", "transposed", "integers"],
)
def test_tensors_that_are_not_expected_are_refused(tmp_path: Path, plain: Path, change: Any, expected: str):
    with pytest.raises(UserError, match=expected):
        read_peft(changed(plain, tmp_path, tensors=lambda values: values | change), lora_of())


def test_adapters_that_are_not_finite_are_not_written(tmp_path: Path):
    _, config, _, adapters = tiny("mistral", ("q",))
    adapters["blocks"]["q_a"][1] = np.nan
    with pytest.raises(UserError, match=r"step 7: .*layers\.1\.self_attn\.q_proj\.lora_A\.weight contains 128 of 128"):
        write_peft(tmp_path / "adapter", config, adapters, base=None, of="step 7")
    assert not (tmp_path / "adapter").exists()


# ---- peft's rules ----------------------------------------------------------------------------------------------------

MODULES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (1, 11) for name in "qv"] + ["lm_head"]
NAMES = st.sampled_from(
    [
        "q_proj",
        "q",
        "proj",
        "layers.1.self_attn.q_proj",
        r"layers\.1\..*",
        ".*v_proj",
        "^model.+",
        "lm_head",
        "1.*q_proj",
    ]
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.dictionaries(NAMES, st.integers(1, 9), max_size=3), st.sampled_from(MODULES))
def test_patterns_match_as_in_peft(pattern: dict[str, int], module: str):
    from peft.utils.other import get_pattern_key

    assert peft_config.by_pattern(pattern, module, 0) == pattern.get(get_pattern_key(list(pattern), module), 0)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.lists(NAMES, min_size=1, max_size=2) | NAMES,
    st.lists(NAMES, max_size=1) | st.none(),
    st.sampled_from([None, [], 1, [1], [1, 11]]),
    st.sampled_from(MODULES),
)
def test_modules_are_targeted_as_in_peft(targets: Any, excluded: Any, layers: Any, module: str):
    from peft.tuners.tuners_utils import check_target_module_exists

    if isinstance(targets, str) or module in targets:
        layers = None  # not possible together in peft, or ignored
    config = peft.LoraConfig(target_modules=targets, exclude_modules=excluded, layers_to_transform=layers)
    described = {"target_modules": targets, "exclude_modules": excluded, "layers_to_transform": layers}
    ours = peft_config.check_config("there", described)
    assert (ours.ignores(module) is None) == bool(check_target_module_exists(config, module))
