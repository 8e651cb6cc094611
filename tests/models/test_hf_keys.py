"""Every key and value of a config.json: read as transformers reads it, or refused by name, or reported."""

import dataclasses
import json
import re
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from test_parity import LINEAR, LLAMA3, THETA, assert_close, our_logits, positions
from tiny_models import MINISTRAL3, YARN

from converters.orbax_to_hf import write_hf
from xlam_jax.errors import UserError
from xlam_jax.models import hf_keys
from xlam_jax.models.attention import rope_frequencies
from xlam_jax.models.config import ModelConfig, read_hf_config
from xlam_jax.models.families import FAMILIES, family_named
from xlam_jax.outputs import ResumableFolder

ARCHITECTURES = {family.name: family.architecture for family in FAMILIES}
ODD: list[Any] = [
    None, True, False, 0, 1, 2, 3, 7, -1, -5, 10**30, 0.0, -0.0, 1.0, 0.5, -0.5, 4.0, 1e-5, 1e39, float("nan"),
    float("inf"), float("-inf"), "", "false", "4096", "linear", [], [1], ["full_attention"] * 2,
    ["sliding_attention"] * 2, {}, {"rope_theta": 5e5},
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def base(family: str) -> dict[str, Any]:
    return {"architectures": [ARCHITECTURES[family]], "model_type": family, **tiny_models.SIZES}


def ours(values: dict[str, Any]) -> ModelConfig | None:
    """Our reading; None where it is refused by a message that names the file and a key."""
    try:
        return ModelConfig.from_hf(values, "there/config.json")
    except UserError as error:
        message = str(error)
    assert re.match(r"there/config\.json: (\w+) is ", message), message
    return None


def frequencies(config: Any) -> np.ndarray:
    module = import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    name = "".join(part.capitalize() for part in config.model_type.split("_")) + "RotaryEmbedding"
    rotary = getattr(module, name)(config)
    return np.append(rotary.inv_freq.numpy(), np.float32(rotary.attention_scaling))


def assert_same_reading(values: dict[str, Any]) -> bool:
    """Where we read a config, transformers reads the same from it. Returns whether we do."""
    config = ours(values)
    if config is None:
        return False
    expected, own = tiny_models.CONFIGS[config.family](**deepcopy(values)), family_named(config.family).own_keys
    pairs = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "moe_intermediate_size" if "moe_intermediate_size" in own else "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
    }
    if "sliding_window" in own:
        windowed = "sliding_attention" in (getattr(expected, "layer_types", None) or ["sliding_attention"])
        assert config.sliding_window == (expected.sliding_window if windowed else None)
    if config.experts:
        pairs |= {"num_local_experts": config.experts, "num_experts_per_tok": config.experts_per_token}
        assert config.normalize_gates is (expected.norm_topk_prob if "norm_topk_prob" in own else True)
    assert {key: getattr(expected, key) for key in pairs} == pairs, values
    assert (
        getattr(expected, "head_dim", None) or expected.hidden_size // expected.num_attention_heads
    ) == config.head_dim
    scaling = config.rope_scaling
    read = np.append(rope_frequencies(config), scaling.attention_factor if scaling else 1.0)
    np.testing.assert_allclose(read, frequencies(expected), rtol=2e-6, err_msg=str(values))
    if config.family == "ministral3":
        assert scaling is not None
        assert scaling.query_scale == expected.rope_parameters["llama_4_scaling_beta"]
        assert scaling.original_max_positions == expected.rope_parameters["original_max_position_embeddings"]
    return True


@pytest.mark.parametrize("family", tiny_models.CONFIGS)
def test_each_key_with_odd_values(family: str):
    keys = family_named(family).keys | hf_keys.NEUTRAL.keys() | hf_keys.IN_TRAINING | {"max_window_layers"}
    read = sum(
        assert_same_reading({**base(family), key: value})
        for key in sorted(keys - {"architectures", "model_type"})
        for value in ODD
    )
    assert read > 2 * len(keys), "most keys have values that are read"
    for key in ("architectures", "model_type", *hf_keys.WITHOUT_EFFECT, "anything"):
        for value in ODD:
            ours({**base(family), key: value})


@pytest.mark.parametrize("family", ["mistral", "llama", "ministral3"])
def test_rotary_positions_with_odd_values(family: str):
    scalings = [MINISTRAL3] if family == "ministral3" else [LINEAR, LLAMA3, YARN]
    spelled = [{"rope_parameters": scaling} for scaling in (scalings if family == "ministral3" else [THETA, *scalings])]
    for scaling in scalings:
        old = {("type" if key == "rope_type" else key): value for key, value in scaling.items() if key != "rope_theta"}
        spelled.append({"rope_theta": scaling["rope_theta"], "rope_scaling": old})
    read = 0
    for rope in spelled:
        name = next(key for key in rope if key != "rope_theta")
        assert assert_same_reading({**base(family), **rope})
        for key in (*(LLAMA3 | MINISTRAL3), "type", "partial_rotary_factor", "attention_factor", "full_attention"):
            for value in ODD:
                read += assert_same_reading({**base(family), **rope, name: {**rope[name], key: value}})
            read += assert_same_reading(
                {**base(family), **rope, name: {k: v for k, v in rope[name].items() if k != key}}
            )
    assert read > 20


def test_two_spellings_of_rotary_positions_agree_or_are_refused():
    dicts = [None, {}, THETA, LINEAR, {"type": "linear", "factor": 4.0}, {"rope_theta": 5e5}, {"type": "default"}]
    read = 0
    for new in dicts:
        for old in dicts:
            for outer in ({}, {"rope_theta": 1e5}, {"rope_theta": 5e5}):
                read += assert_same_reading({**base("mistral"), "rope_parameters": new, "rope_scaling": old, **outer})
    assert 20 < read < 80
    both = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    with pytest.raises(UserError, match=r"rope_parameters is {.*500000.*} and rope_scaling is {.*linear.*4\.0}"):
        ModelConfig.from_hf({**base("mistral"), **both})


@pytest.mark.parametrize(("family", "rope"), [("llama", LLAMA3), ("mistral", YARN), ("ministral3", MINISTRAL3)])
def test_both_spellings_of_the_original_length(family: str, rope: dict[str, Any]):
    outer = {"original_max_position_embeddings": 32}
    for refused in (outer, dict.fromkeys(outer)):
        assert ours({**base(family), "rope_parameters": rope, **refused}) is None
    inner = {key: value for key, value in rope.items() if key not in outer}
    for more in (outer, {}):  # transformers falls back to max_position_embeddings
        assert assert_same_reading({**base(family), "rope_parameters": inner, **more})


@pytest.mark.parametrize("family", tiny_models.CONFIGS)
def test_every_field_of_transformers_is_in_one_group(family: str):
    fields = set(tiny_models.CONFIGS[family]().to_dict()) | {
        field.name for field in dataclasses.fields(tiny_models.CONFIGS[family])
    }
    own = family_named(family).own_keys
    others = (hf_keys.NEUTRAL.keys() - own, hf_keys.IN_TRAINING, hf_keys.WITHOUT_EFFECT - own)
    groups = (family_named(family).keys, *others)
    assert {field: sum(field in group for group in groups) for field in fields} == dict.fromkeys(fields, 1)
    assert fields - hf_keys.known_keys(family_named(family)) == set(), "and may be overridden"
    saved = json.loads(tiny_models.CONFIGS[family](architectures=[ARCHITECTURES[family]]).to_json_string(False))
    assert hf_keys.warnings_of(saved, family, "here") == []


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("mistral", {"rope_theta": None}, "rope_theta is None; a number above 0"),
        ("mistral", {"rope_scaling": "linear"}, "rope_scaling is 'linear'; an object"),
        ("mistral", {"rms_norm_eps": None}, "rms_norm_eps is None; a decimal number above 0"),
        ("mistral", {"sliding_window": "4096"}, "sliding_window is '4096'; a positive whole number"),
        ("mistral", {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; true or false"),
        ("mistral", {"vocab_size": True}, "vocab_size is True; a positive whole number"),
        ("mistral", {"head_dim": 9}, "head_dim is 9; heads of 9; rotary positions need an even number"),
        (
            "mistral",
            {"sliding_window": 8, "use_sliding_window": False},
            "use_sliding_window is False and sliding_window is 8",
        ),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is ['full_attention', 'sl"),
        (
            "mistral",
            {"model_type": "ministral"},
            "model_type is 'ministral' and architectures is ['MistralForCausalLM']",
        ),
        ("mistral", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; only null is implemented"),
        (
            "mistral",
            {"dtype": "bfloat16", "torch_dtype": "float32"},
            "torch_dtype is 'float32' and dtype is 'bfloat16'",
        ),
        (
            "mixtral",
            {"num_experts": 4, "num_local_experts": 8},
            "num_experts is 4 and num_local_experts is 8; they mean",
        ),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9 and num_local_experts is"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob is False; only null or true is implemented"),
        ("llama", {"attention_bias": True}, "attention_bias is True; only false is implemented"),
        ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 1}}, "high_freq_factor must be more than low_freq"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be at least 1"),
        ("llama", {"rope_parameters": LLAMA3 | {"rope_type": "longrope"}}, "rope type 'longrope' is not implemented"),
        ("mistral", {"rope_parameters": YARN | {"beta_slow": 64}}, "beta_fast (32 if absent) must be at least"),
        ("mistral", {"rope_parameters": YARN | {"truncate": None}}, "truncate must be true or false"),
        ("mistral", {"rope_parameters": MINISTRAL3}, "llama_4_scaling_beta has no meaning for rope type 'yarn'"),
        ("ministral3", {"rope_parameters": YARN}, "needs rope_type 'yarn' and llama_4_scaling_beta"),
        ("ministral3", {"rope_parameters": {}}, "needs rope_type 'yarn' and llama_4_scaling_beta"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factr": 4.0}},
            "factr has no meaning for rope type 'linear'; did",
        ),
        (
            "llama",
            {"rope_parameters": {"full_attention": LINEAR}},
            "full_attention has no meaning for rope type 'default'",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "max_window_layers is 1 and layer_types is None and use_sliding_window is True; all 2 layers must have the",
        ),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "which means full_attention here; remove layer_types"),
        ("qwen3", {"head_dim": None}, "head_dim is None; a positive whole number"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True; only false is implemented"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; only 1, a mixture in each layer,"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers is [0]; only null or [] is implemented"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size is 8; only null or"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window is 1; true or false is needed"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'; this project trains"),
    ],
)
def test_messages(family: str, values: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        ModelConfig.from_hf({**base(family), **values}, "a/config.json")
    assert str(error.value).startswith("a/config.json: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_number_of_experts_in_the_other_spelling():
    values = base("mixtral") | {"num_experts": 4}
    assert assert_same_reading(values)
    assert ModelConfig.from_hf(values).experts == 4


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({"sliding_window": 32_768, "use_sliding_window": False, "max_window_layers": 1}, None),  # as published
        ({"sliding_window": 32_768}, None),
        ({"layer_types": ["full_attention"] * 2}, None),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8),
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
        ({"sliding_window": 8, "use_sliding_window": True}, None),  # from layer 28 on
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, None),
        ({"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, None),
        ({"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 8),
        ({"sliding_window": 8, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_that_is_turned_on(family: str, values: dict[str, Any], window: int | None):
    whole = base(family) | values
    assert assert_same_reading(whole)
    assert ModelConfig.from_hf(whole).sliding_window == window


def test_a_window_of_all_layers():
    published = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1, "num_experts": 8}
    for values, window in ((published, None), (published | {"use_sliding_window": True}, 4096)):
        assert assert_same_reading(base("qwen3_moe") | values)
        assert ModelConfig.from_hf(base("qwen3_moe") | values).sliding_window == window
    assert hf_keys.warnings_of(base("qwen3_moe") | published, "qwen3_moe", "here") == []


def test_what_is_reported():
    values = base("mixtral") | {
        "router_jitter_noise": 0.1,
        "attention_dropout": 0.2,
        "resid_pdrop": 0.3,
        "sliding_windw": 8,
        "auto_map": {"AutoModel": "x--y"},
    }
    ModelConfig.from_hf(values)
    lines = hf_keys.warnings_of(values, "mixtral", "a/config.json")
    assert len(lines) == 5
    for part in (
        "router_jitter_noise is 0.1, which transformers applies in training and this project does not",
        "attention_dropout is 0.2, which transformers",
        "resid_pdrop is 0.3; this project trains without dropout",
        "auto_map names code of its own",
        "keys without a meaning for a mixtral are ignored: sliding_windw",
    ):
        assert any(line.startswith("a/config.json: ") and part in line for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ("[" * 200_000, "not valid JSON"),
        ("[]", "contains a list"),
        ("\xff", "not UTF-8 text"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        read_hf_config(tmp_path / "config.json")


NEW = {"rope_parameters": LINEAR}
OLD = {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}}


@pytest.mark.parametrize(
    ("file", "overrides", "theta", "scaling"),
    [
        ({"rope_parameters": THETA}, {"rope_theta": 5e6}, 5e6, None),
        ({"rope_theta": 1e4}, {"rope_theta": 5e6}, 5e6, None),
        ({"rope_parameters": {"rope_type": "default"}}, {"rope_theta": 5e6}, 5e6, None),
        (NEW, {"rope_theta": 5e6}, 5e6, ("linear", 4.0)),
        (OLD, {"rope_theta": 5e6}, 5e6, ("linear", 4.0)),
        (NEW | {"rope_theta": 1e5}, {"rope_theta": 5e6}, 5e6, ("linear", 4.0)),
        (NEW | OLD, {"rope_theta": 5e6}, 5e6, ("linear", 4.0)),
        (NEW, {"rope_parameters": {"rope_theta": 5e6}}, 5e6, ("linear", 4.0)),
        (OLD, {"rope_parameters": {"rope_theta": 5e6}}, 5e6, ("linear", 4.0)),
        (NEW, {"rope_scaling": {"factor": 2.0}}, 1e5, ("linear", 2.0)),
        (OLD, {"rope_scaling": {"factor": 2.0}}, 1e5, ("linear", 2.0)),
        (NEW, {"rope_scaling": None}, 1e5, None),
        (OLD, {"rope_scaling": None}, 1e5, None),
        (OLD, {"rope_parameters": None, "rope_theta": 2e5}, 2e5, None),
        ({"rope_parameters": THETA}, {"rope_scaling": {"type": "linear", "factor": 8.0}}, 1e6, ("linear", 8.0)),
        ({}, {"rope_scaling": {"type": "linear", "factor": 8.0}}, 1e4, ("linear", 8.0)),
        ({}, {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e5}}, 3e5, ("linear", 8.0)),
        (NEW, {"rope_scaling": {"rope_type": "llama3", **{k: v for k, v in LLAMA3.items() if k != "rope_theta"}}},
         1e5, ("llama3", 8.0)),
    ],
)  # fmt: skip
def test_an_override_takes_effect_in_every_spelling(file: Any, overrides: Any, theta: float, scaling: Any):
    values = hf_keys.with_overrides(base("llama") | file, overrides, "there/config.json")
    assert assert_same_reading(values)
    config = ModelConfig.from_hf(values)
    assert config.rope_theta == theta
    read = config.rope_scaling and (config.rope_scaling.kind, config.rope_scaling.factor)
    assert read == scaling


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"num_hiden_layers": 1},
            "model.overrides.num_hiden_layers: config.json of a mixtral has no such key; did you mean 'num_hid",
        ),
        ({"mlp_biass": 1}, "did you mean 'mlp_bias'?"),
        ({"rope_theta": -5}, "with model.overrides: rope_theta is -5; a number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"vocab_size": None}, "with model.overrides: vocab_size is None"),
        ({"rope_parameters": {"rope_theta": 1.0}, "rope_scaling": {"factor": 2.0}}, "give one of them"),
        ({"rope_parameters": {"rope_theta": 1.0}, "rope_theta": 2.0}, "they name different rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; an object"),
        ({"sliding_window": 8, "layer_types": ["full_attention"] * 2}, "layer_types is"),
        ({"tokenizer_class": {1, 2}}, "a JSON value is needed"),
        ({"num_experts": 4, "num_local_experts": 2}, "num_experts is 4 and num_local_experts is 2"),
        ({"quantization_config": {}}, "model.overrides.quantization_config: config.json of a mixtral has no such key"),
    ],
)
def test_overrides_that_are_refused(overrides: dict[str, Any], message: str):
    def read() -> ModelConfig:
        values = hf_keys.with_overrides(base("mixtral"), overrides, "there/config.json")
        return ModelConfig.from_hf(values, "there/config.json", overrides)

    with pytest.raises(UserError) as error:
        read()
    assert message in str(error.value)


def test_an_override_of_an_alias_replaces_the_other_spelling():
    file = base("mixtral") | {"num_local_experts": 4, "torch_dtype": "float32"}
    values = hf_keys.with_overrides(file, {"num_experts": 2, "dtype": "bfloat16"}, "x")
    assert ModelConfig.from_hf(values).experts == 2
    assert assert_same_reading(values)
    assert "torch_dtype" not in values


@pytest.mark.parametrize("file", [NEW, OLD], ids=["new", "old"])
def test_an_override_is_exported(tmp_path: Path, file: dict[str, Any]):
    model = tiny_models.hf_model("llama")
    saved = base("llama") | file | {"quantization_config": {"quant_method": "gptq"}}
    values = hf_keys.with_overrides(saved, {"rope_theta": 5e5, "max_position_embeddings": 256}, "x")
    work = ResumableFolder(tmp_path)
    write_hf(work, values, tiny_models.params_of(model), generation={}, of="x")
    work.close()
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert exported.config.max_position_embeddings == 256
    assert not hasattr(exported.config, "quantization_config")
    tokens = tiny_models.tokens(1, 40)
    mask = np.ones_like(tokens)
    logits, _ = our_logits(exported, tokens, positions(mask), mask)
    with torch.no_grad():
        expected = exported(torch.from_numpy(tokens).long()).logits.numpy()
    assert_close(logits, expected, "logits of the export")
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert config == ModelConfig.from_hf(values) == tiny_models.model_config(exported)
    assert (config.rope_theta, config.rope_scaling.factor if config.rope_scaling else None) == (5e5, 4.0)


@pytest.mark.parametrize("value", [False, 0, "", []])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_an_override_of_the_scaling_is_an_object_or_null(key: str, value: Any):
    with pytest.raises(UserError, match=f"with model.overrides: {key} is .*; an object such as"):
        hf_keys.with_overrides({**base("mistral"), **NEW}, {key: value}, "config.json")
