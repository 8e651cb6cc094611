"""The keys of a Hugging Face config.json: which of them count, how they are checked, and how they are overridden.

Each key of a family is in one of four groups, so that none is ignored without a word: `HONOURED` keys decide what the
decoder computes, `NEUTRAL` keys must have a value under which it computes that, `IN_TRAINING` keys change only what
transformers does while it trains, and `WITHOUT_EFFECT` keys change no logits. Keys outside these groups are reported.
"""

import json
from collections.abc import Iterable, Mapping, Set
from typing import Any

from xlam_jax.errors import UserError, nearest

FAMILIES = {
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "LlamaForCausalLM": "llama",
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_EVERY_FAMILY = _words(
    """architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings
    rope_theta rope_parameters rope_scaling original_max_position_embeddings dtype torch_dtype bos_token_id
    eos_token_id pad_token_id"""
)
HONOURED: dict[str, Set[str]] = {
    "mistral": _EVERY_FAMILY | {"sliding_window"},
    "mixtral": _EVERY_FAMILY | {"sliding_window", "num_local_experts", "num_experts", "num_experts_per_tok"},
    "llama": _EVERY_FAMILY,
}
"""Keys that are read."""

ALIASES = {"torch_dtype": "dtype", "num_experts": "num_local_experts"}
"""Second spellings of a key, and the first one."""

SILU = ("silu", "swish")
"""Names of x · sigmoid(x) in transformers; vLLM knows the first only."""

_UNUSED_HERE = (None, False, 0)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # biases
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "bias": (None, False),
    "use_bias": (None, False),
    "qkv_bias": (None, False),
    "attention_out_bias": (None, False),
    "lm_head_bias": (None, False),
    # positions
    "partial_rotary_factor": (None, 1.0),
    "rotary_pct": (None, 1.0),
    "rope_interleaved": (None, False),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": _UNUSED_HERE,
    "alibi": (None, False),
    "use_rope": (None, True),
    "attn_temperature_tuning": (None, False),
    "llama_4_scaling": (None,),
    # scores and norms
    "use_qk_norm": (None, False),
    "qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    # scales
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "logit_scale": (None, 1.0),
    "scale_emb": (None, 1.0),
    "scale_depth": (None,),
    "dim_model_base": (None,),
    # mixtures of experts of another kind
    "norm_topk_prob": (None, True),
    "scoring_func": (None, "softmax"),
    "routed_scaling_factor": (None, 1.0),
    "n_shared_experts": _UNUSED_HERE,
    "num_shared_experts": _UNUSED_HERE,
    "shared_expert_intermediate_size": _UNUSED_HERE,
    "moe_intermediate_size": (None,),
    "first_k_dense_replace": _UNUSED_HERE,
    "decoder_sparse_step": (None, 1),
    "moe_layer_freq": (None, 1),
    "mlp_only_layers": (None, []),
    # layers that differ
    "per_layer_config": (None, {}),
    "interleaved_sliding_window": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (None, False),
}
"""Keys that change what some decoders compute, with the values under which they do not."""

IN_TRAINING = _words(
    """attention_dropout router_jitter_noise hidden_dropout hidden_dropout_prob attention_probs_dropout_prob
    attn_pdrop embd_pdrop resid_pdrop embedding_dropout residual_dropout dropout"""
)
"""Noise that transformers adds while it trains, by keys of this and of other families. This project adds none of it."""

_GENERATION = _words(
    """max_length min_length max_new_tokens do_sample use_cache early_stopping num_beams temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens num_beam_groups
    diversity_penalty epsilon_cutoff eta_cutoff"""
)
WITHOUT_EFFECT = (
    _words(
        """transformers_version output_hidden_states output_attentions return_dict chunk_size_feed_forward id2label
        label2id num_labels problem_type pretraining_tp output_router_logits router_aux_loss_coef layer_types
        use_sliding_window _name_or_path name_or_path tokenizer_class task_specific_params finetuning_task prefix
        sep_token_id cls_token_id decoder_start_token_id torchscript use_bfloat16 tf_legacy_loss pruned_heads
        tie_encoder_decoder is_decoder cross_attention_hidden_size attn_implementation _attn_implementation
        _attn_implementation_autoset _flash_attn_2_enabled experts_implementation _experts_implementation
        quantization_config compression_config unsloth_version unsloth_fixed"""
    )
    | _GENERATION
)
"""Keys that change no logits, or are checked against the others (`layer_types`, `use_sliding_window`)."""

QUANTIZATION = ("quantization_config", "compression_config")
DTYPES = ("bfloat16", "float16", "float32", "float64")
LARGEST = 2**31 - 1
MOST_LAYERS = 1024
"""Also the most experts of a layer: each of their tensors is listed before a weight is read."""
_ROPE_DICTS = ("rope_parameters", "rope_scaling")
_ROPE = ("rope_theta", *_ROPE_DICTS)
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Types of rotary positions that are implemented, and the keys that each of them has."""
_ROPE_UNUSED = {"partial_rotary_factor": (1.0,), "factor": (None, 1.0), "attention_factor": (None, 1.0)}
_ROPE_WITHOUT_EFFECT = ("rope_type", "type", "rope_theta", "original_max_position_embeddings", "finetuned")


def family_of(hf: Mapping[str, Any]) -> str | None:
    """The family of the one architecture that a config.json names; None for others, and for what is not a list."""
    match hf.get("architectures"):
        case [str(named)]:
            return FAMILIES.get(named)
    return None


def known_keys(family: str) -> Set[str]:
    """The keys that `model.overrides` may set for a family."""
    training = {"attention_dropout"} | ({"router_jitter_noise"} if family == "mixtral" else set())
    refused = {*QUANTIZATION, "original_max_position_embeddings"}  # the second belongs into the scaling's own object
    return (HONOURED[family] | NEUTRAL.keys() | training | WITHOUT_EFFECT) - refused


class Values:
    """Typed access to the values of a config.json; every wrong value raises a `UserError` with its key and file."""

    def __init__(self, values: Mapping[str, Any], origin: str, overridden: Iterable[str] = ()):
        """`origin` names the file; keys in `overridden` were set by `model.overrides` instead."""
        self._values, self._origin, self._overridden = values, origin, frozenset(overridden)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        """The raw value; None where it is missing."""
        return self._values.get(key)

    def error(self, *keys: str, expected: str) -> UserError:
        """The error that names keys with their values, where they were set, and what is expected instead."""
        given = " and ".join(f"{key} is {self._values.get(key)!r}" for key in keys)
        by_override = any(key in self._overridden for key in keys)
        return UserError(f"{self._origin}{' with model.overrides' if by_override else ''}: {given}; {expected}")

    def size(self, key: str, default: int | None = None, *, most: int = LARGEST, nullable: bool = False) -> int:
        """A positive integer. A missing key has the default, and null too where it is `nullable`."""
        value = self._values.get(key, default)
        value = default if value is None and nullable else value
        if type(value) is not int or not 0 < value <= most:
            raise self.error(key, expected=f"a positive whole number up to {most:,} is needed")
        return value

    def decimal(self, key: str, default: float, *, most: float) -> float:
        """A positive floating-point number; as for transformers, 1 is not one and 1.0 is."""
        value = self._values.get(key, default)
        if type(value) is not float or not 0 < value <= most:
            raise self.error(key, expected=f"a decimal number above 0 and up to {most:g} is needed, such as {default}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._values.get(key, default)
        if type(value) is not bool:
            raise self.error(key, expected="true or false is needed")
        return value


def is_number(value: Any, least: float = 0.0) -> bool:
    """Whether a value is a finite number of at least `least` that int64 or float32 can hold; true and false are not."""
    return (type(value) is int and least <= value < 2**63) or (type(value) is float and least <= value <= 3.4e38)


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def check_keys(values: Values, family: str, layers: int, window: int | None) -> None:
    """Raises `UserError` for values under which transformers or vLLM would compute something else than our decoder."""
    for key, neutral in NEUTRAL.items():
        if key in values and not any(_same(values.get(key), one) for one in neutral):
            shown = " or ".join(json.dumps(one) for one in neutral)
            raise values.error(key, expected=f"only {shown} is implemented")
    for key in sorted(IN_TRAINING):
        if key in values and values.get(key) is not None and not is_number(values.get(key)):
            raise values.error(key, expected="a number of at least 0 is needed")
    for key in ("attention_dropout", "router_jitter_noise"):
        nullable = key == "attention_dropout" and family == "llama"
        if key in values and values.get(key) is None and not nullable:
            raise values.error(key, expected="a number of at least 0 is needed; 0.0 means none")
    if type(values.get("router_jitter_noise")) is int and family == "mixtral":
        raise values.error("router_jitter_noise", expected="a decimal number is needed, such as 0.0")
    for key in ("dtype", "torch_dtype"):
        if values.get(key) is not None and values.get(key) not in DTYPES:
            raise values.error(key, expected=f"one of {', '.join(DTYPES)} is needed")
    for key in ("bos_token_id", "pad_token_id", "eos_token_id"):
        value = values.get(key)
        ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
        if value is not None and not all(type(token) is int for token in ids):
            raise values.error(key, expected="a token's number is needed")
    if type(values.get("pad_token_id")) is int and not -LARGEST < values.get("pad_token_id") < values.size(
        "vocab_size"
    ):
        raise values.error("pad_token_id", "vocab_size", expected="the first must be less than the second")
    _check_window(values, family, layers, window)


def _check_window(values: Values, family: str, layers: int, window: int | None) -> None:
    """`sliding_window` decides in transformers; vLLM reads the other two keys as well."""
    kinds = values.get("layer_types")
    kind = "full_attention" if window is None else "sliding_attention"
    if kinds is not None and kinds != [kind] * layers:
        raise values.error(
            "layer_types",
            "sliding_window",
            expected=f"in a {family} all {layers} layers are alike, which means {kind} here; remove layer_types",
        )
    uses = values.get("use_sliding_window")
    if uses is not None and uses is not (window is not None):
        raise values.error(
            "use_sliding_window",
            "sliding_window",
            expected="remove the first, or set the second to null for attention without a window",
        )


def check_aliases(values: Values, family: str) -> None:
    """Raises `UserError` for a key that is given in two spellings with different values."""
    for other, key in ALIASES.items():
        both = other in HONOURED[family] and values.get(other) is not None and values.get(key) is not None
        if both and values.get(other) != values.get(key):
            raise values.error(other, key, expected="they mean the same; remove one of them")


def rope(values: Values, default_theta: float, max_positions: int) -> tuple[float, dict[str, Any]]:
    """The base of the rotary positions, and their scaling: a type of `ROPE_KEYS` as `rope_type`, and its numbers.

    transformers 5 writes `rope_parameters`; older files have `rope_theta` and `rope_scaling`. A file with several of
    them is read where they mean the same. Raises `UserError` where they differ, and for what is not implemented.
    """
    if "rope_theta" in values and not (is_number(values.get("rope_theta")) and values.get("rope_theta") > 0):
        raise values.error("rope_theta", expected="a number above 0 is needed")
    theta = float(values.get("rope_theta") or default_theta)
    meanings: dict[str, tuple[float, dict[str, Any]]] = {}
    for key in _ROPE_DICTS:
        if values.get(key) not in (None, {}):
            meanings[key] = _rope_of(values, key, theta, max_positions)
    for key, (inner, _) in meanings.items():
        if "rope_theta" in values and inner != theta:
            raise values.error("rope_theta", key, expected="they name different rope_theta; remove one of them")
    if len(meanings) == 2 and meanings["rope_parameters"] != meanings["rope_scaling"]:
        lacking = [key for key in meanings if "rope_theta" not in values.get(key) and "rope_theta" not in values]
        hint = f" ({lacking[0]} without rope_theta means {default_theta:g})" if lacking else ""
        raise values.error(*_ROPE_DICTS, expected=f"they differ{hint}; remove the one that is not meant")
    return next(iter(meanings.values()), (theta, {"rope_type": "default"}))


def _rope_of(values: Values, key: str, theta: float, max_positions: int) -> tuple[float, dict[str, Any]]:
    given = values.get(key)
    if not isinstance(given, dict):
        raise values.error(key, expected="an object such as {'rope_type': 'linear', 'factor': 4.0}, or null, is needed")
    kind = given.get("rope_type", given.get("type", "default"))
    if "type" in given and given["type"] != kind:
        raise values.error(key, expected="its rope_type and type differ; remove one of them")
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise values.error(
            key, expected=f"rope type {kind!r} is not implemented; known are {', '.join(map(repr, ROPE_KEYS))}"
        )
    for name, value in given.items():
        neutral = name in _ROPE_UNUSED and any(_same(value, one) for one in _ROPE_UNUSED[name])
        if not neutral and name not in (*ROPE_KEYS[kind], *_ROPE_WITHOUT_EFFECT):
            raise values.error(
                key, expected=f"{name} has no meaning for rope type {kind!r}{nearest(name, ROPE_KEYS[kind])}"
            )
    inner = given.get("rope_theta", theta)
    if not is_number(inner) or inner <= 0:
        raise values.error(key, expected="rope_theta must be a number above 0")
    numbers = dict(given)
    if kind == "llama3":
        _original_positions(values, key, numbers, max_positions)
    for name in ROPE_KEYS[kind]:
        if name not in numbers:
            raise values.error(key, expected=f"rope type {kind!r} needs {name}")
        if not is_number(numbers[name]) or numbers[name] <= 0:
            raise values.error(key, expected=f"{name} must be a number above 0")
    if numbers.get("factor") is not None and numbers["factor"] < 1:
        raise values.error(key, expected="factor must be at least 1")
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise values.error(key, expected="high_freq_factor must be more than low_freq_factor")
    return float(inner), {"rope_type": kind} | {name: numbers[name] for name in ROPE_KEYS[kind]}


def _original_positions(values: Values, key: str, numbers: dict[str, Any], max_positions: int) -> None:
    """Fills in `original_max_position_embeddings` as transformers does, and checks it."""
    name = "original_max_position_embeddings"
    outer = values.get(name)
    if outer is not None and numbers.get(name, outer) != outer:
        raise values.error(name, key, expected=f"they name different {name}; remove one of them")
    numbers.setdefault(name, max_positions if outer is None else outer)
    if type(numbers[name]) is not int:
        raise values.error(key, expected=f"{name} must be a whole number")


def with_overrides(hf: Mapping[str, Any], overrides: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A config.json with fields replaced, in the spelling that it has them in, so that every reader sees the new value.

    Of `rope_parameters` and `rope_scaling`, an override that names a type replaces the scaling and keeps the base
    (rope_theta); one without a type changes single numbers. Raises `UserError` for keys that the family does not have.
    """
    family = family_of({**hf, **overrides})
    if family is not None:
        known = known_keys(family)
        for key in overrides:
            if key not in known:
                raise UserError(
                    f"model.overrides.{key}: config.json of a {family} has no such key{nearest(key, known)}"
                )
    for key, value in overrides.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise UserError(f"model.overrides.{key} is {value!r}; a JSON value is needed ({error})") from None
    replaced = {**hf, **{key: value for key, value in overrides.items() if key not in _ROPE}}
    for pair in ALIASES.items():
        if sum(key in overrides for key in pair) == 1:
            replaced = {key: value for key, value in replaced.items() if key in overrides or key not in pair}
    return _with_rope(replaced, {key: overrides[key] for key in _ROPE if key in overrides}, origin)


def _with_rope(hf: dict[str, Any], overrides: dict[str, Any], origin: str) -> dict[str, Any]:
    if not overrides:
        return hf
    values = Values({**hf, **overrides}, origin, overrides)
    named = [key for key in _ROPE_DICTS if key in overrides]
    if len(named) == 2:
        raise values.error(*named, expected="they mean the same; give one of them")
    present = {key: hf[key] for key in _ROPE_DICTS if isinstance(hf.get(key), dict) and hf[key]}
    if not named:  # the base alone: in each spelling that has it
        inside = {key: value | overrides for key, value in present.items() if "rope_theta" in value}
        return hf | inside | ({} if inside and "rope_theta" not in hf else overrides)
    change = overrides[named[0]]
    change = {"rope_type": "default"} if change is None or change == {} else change
    if not isinstance(change, dict):
        raise values.error(named[0], expected="an object such as {'rope_type': 'linear', 'factor': 4.0} is needed")
    if "rope_theta" in overrides:
        if change.get("rope_theta", overrides["rope_theta"]) != overrides["rope_theta"]:
            raise values.error("rope_theta", named[0], expected="they name different rope_theta; give one of them")
        change = change | {"rope_theta": overrides["rope_theta"]}
    current = next(iter(present.values()), {})
    theta = {key: value for key, value in [("rope_theta", current.get("rope_theta", hf.get("rope_theta")))] if value}
    replaces = "rope_type" in change or "type" in change
    effective = (theta if replaces else current | theta) | change
    kept = {key: value for key, value in hf.items() if key not in _ROPE}
    if "rope_parameters" in present:
        return kept | {"rope_parameters": effective}
    scaling = {key: value for key, value in effective.items() if key != "rope_theta"}
    outer = {"rope_theta": effective["rope_theta"]} if "rope_theta" in effective else {}
    return kept | outer | {"rope_scaling": None if scaling == {"rope_type": "default"} else scaling}


def without_quantization(hf: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], list[str]]:
    """A config.json of unquantized weights, and a warning where it described quantized ones."""
    dropped = [key for key in QUANTIZATION if hf.get(key) is not None]
    kept = {key: value for key, value in hf.items() if key not in QUANTIZATION}
    return kept, [f"{origin}: {key} ({_method(hf[key])}) is dropped; the weights are not quantized" for key in dropped]


def _method(quantization: Any) -> str:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return str(method or "without a quant_method")


def quantization_method(hf: Mapping[str, Any]) -> str | None:
    """The method that a config.json names for quantized weights; None without one."""
    return next((_method(hf[key]) for key in QUANTIZATION if hf.get(key) is not None), None)


def warnings_of(hf: Mapping[str, Any], family: str, origin: str) -> list[str]:
    """What a config.json asks for and this project does not do, a line each; values were checked by `check_keys`."""
    lines = [
        f"{origin}: {key} is {hf[key]}, which transformers applies in training and this project does not"
        if key in known_keys(family)
        else f"{origin}: {key} is {hf[key]}; this project trains without dropout"
        for key in sorted(IN_TRAINING)
        if hf.get(key)
    ]
    if hf.get("auto_map"):
        lines.append(f"{origin}: auto_map names code of its own, which is not run; the model is trained as a {family}")
    others = sorted(hf.keys() - known_keys(family) - HONOURED[family] - IN_TRAINING - {*QUANTIZATION, "auto_map"})
    if others:
        lines.append(f"{origin}: keys without a meaning for a {family} are ignored: {', '.join(others)}")
    return lines
