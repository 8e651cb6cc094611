"""The keys of a Hugging Face config.json: which of them count, how they are checked, and how they are overridden.

Each key of a family is in one of four groups, so that none is ignored silently: its own `keys` decide what the decoder
computes; the other `NEUTRAL` keys must have a value under which it computes that; `IN_TRAINING` keys change only what
transformers does while it trains; the other `WITHOUT_EFFECT` keys change no logits. Keys outside these groups are
reported.
"""

import json
from collections.abc import Mapping, Set
from typing import Any

from xlam_jax.errors import UserError, nearest
from xlam_jax.models.families import family_named, family_of
from xlam_jax.models.families.base import Family
from xlam_jax.models.hf_rope import OVERRIDE_KEYS, override_rope
from xlam_jax.models.hf_values import LARGEST, Values, is_number, is_same, words

ALIASES = {"torch_dtype": "dtype"}
"""Second spelling of a key → its first spelling, in every family."""

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
    "use_mrope": (None, False),
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

IN_TRAINING = words(
    """attention_dropout router_jitter_noise hidden_dropout hidden_dropout_prob attention_probs_dropout_prob
    attn_pdrop embd_pdrop resid_pdrop embedding_dropout residual_dropout dropout"""
)
"""Noise that transformers adds while it trains, by keys of this and of other families. This project adds none of it."""
NOT_NULL = frozenset({"attention_dropout", "router_jitter_noise"})
"""Those of `IN_TRAINING` for which transformers refuses null, but for a family's `nullable_noise`."""

_GENERATION = words(
    """max_length min_length max_new_tokens do_sample use_cache early_stopping num_beams temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens num_beam_groups
    diversity_penalty epsilon_cutoff eta_cutoff"""
)
WITHOUT_EFFECT = (
    words(
        """transformers_version output_hidden_states output_attentions return_dict chunk_size_feed_forward id2label
        label2id num_labels problem_type pretraining_tp output_router_logits router_aux_loss_coef layer_types
        use_sliding_window max_window_layers _name_or_path name_or_path tokenizer_class task_specific_params
        finetuning_task prefix
        sep_token_id cls_token_id decoder_start_token_id torchscript use_bfloat16 tf_legacy_loss pruned_heads
        tie_encoder_decoder is_decoder cross_attention_hidden_size attn_implementation _attn_implementation
        _attn_implementation_autoset _flash_attn_2_enabled experts_implementation _experts_implementation
        quantization_config compression_config unsloth_version unsloth_fixed"""
    )
    | _GENERATION
)
"""Keys that change no logits, or are checked against the others (`layer_types`, `use_sliding_window`). A family may
read some of them."""

QUANTIZATION = ("quantization_config", "compression_config")
DTYPES = ("bfloat16", "float16", "float32", "float64")


def known_keys(family: Family) -> Set[str]:
    """The keys that `model.overrides` may set for a family."""
    refused = {*QUANTIZATION, "original_max_position_embeddings"}  # the second belongs into the scaling's own object
    return (family.keys | NEUTRAL.keys() | family.noise | WITHOUT_EFFECT) - refused


def first_spellings(hf: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Adds the first spelling of the family's keys that are spelled otherwise."""
    return {key: hf[alias] for alias, key in family.aliases.items() if alias in hf} | {**hf}


def check_family(values: Values, family: Family) -> None:
    """Raises `UserError` for a key with different values in two spellings, for the name of another family, and for an
    activation that is not implemented."""
    for alias, key in (ALIASES | {**family.aliases}).items():
        both = values.get(alias) is not None and values.get(key) is not None
        if both and values.get(alias) != values.get(key):
            raise values.error(alias, key, expected="they mean the same; remove one of them")
    if values.get("model_type", family.name) != family.name:
        raise values.error("model_type", "architectures", expected=f"{family.name!r} belongs to that architecture")
    if values.get("hidden_act", "silu") not in SILU:
        raise values.error("hidden_act", expected="only 'silu' is implemented")


def check_keys(values: Values, family: Family, layers: int, window: int | None) -> None:
    """Raises `UserError` for values under which transformers or vLLM would compute something else than our decoder.

    `layers` and `window` (in tokens) are those of the model.
    """
    for key, neutral in NEUTRAL.items():
        if (
            key in values
            and key not in family.own_keys
            and not any(is_same(values.get(key), value) for value in neutral)
        ):
            shown = " or ".join(json.dumps(value) for value in neutral)
            raise values.error(key, expected=f"only {shown} is implemented")
    for key in sorted(IN_TRAINING):
        if key in values and values.get(key) is not None and not is_number(values.get(key)):
            raise values.error(key, expected="a number of at least 0 is needed")
    for key in sorted(NOT_NULL - family.nullable_noise):
        if key in values and values.get(key) is None:
            raise values.error(key, expected="a number of at least 0 is needed; 0.0 means none")
    for key in ("dtype", "torch_dtype"):
        if values.get(key) is not None and values.get(key) not in DTYPES:
            raise values.error(key, expected=f"one of {', '.join(DTYPES)} is needed")
    _check_tokens(values)
    _check_window(values, family, layers, window)


def _check_tokens(values: Values) -> None:
    """The ids of special tokens are integers, and padding is in the vocabulary."""
    for key in ("bos_token_id", "pad_token_id", "eos_token_id"):
        value = values.get(key)
        ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
        if value is not None and not all(type(token) is int for token in ids):
            raise values.error(key, expected="a token's number is needed")
    padding = values.get("pad_token_id")
    if type(padding) is int and not -LARGEST < padding < values.size("vocab_size"):
        raise values.error("pad_token_id", "vocab_size", expected="the first must be less than the second")


def _check_window(values: Values, family: Family, layers: int, window: int | None) -> None:
    """`sliding_window` decides in transformers; vLLM reads the other two keys as well."""
    kinds = values.get("layer_types")
    kind = "full_attention" if window is None else "sliding_attention"
    if kinds is not None and kinds != [kind] * layers:
        raise values.error(
            "layer_types",
            "sliding_window",
            expected=f"in a {family.name} all {layers} layers are alike, which means {kind} here; remove layer_types",
        )
    uses = values.get("use_sliding_window")
    if "use_sliding_window" not in family.own_keys and uses is not None and uses is not (window is not None):
        raise values.error(
            "use_sliding_window",
            "sliding_window",
            expected="remove the first, or set the second to null for attention without a window",
        )


def with_overrides(hf: Mapping[str, Any], overrides: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Replaces fields of a config.json, in the spelling that the file uses, so that every reader sees the new value.

    Rotary positions: `override_rope`. Raises `UserError` for keys that the family does not have.
    """
    family = family_of({**hf, **overrides})
    if family is not None:
        known_names = known_keys(family)
        for key in overrides:
            if key not in known_names:
                raise UserError(
                    f"model.overrides.{key}: config.json of a {family.name} has no such key{nearest(key, known_names)}"
                )
    for key, value in overrides.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise UserError(f"model.overrides.{key} is {value!r}; a JSON value is needed ({error})") from None
    replaced = {**hf, **{key: value for key, value in overrides.items() if key not in OVERRIDE_KEYS}}
    for pair in (ALIASES | {**(family.aliases if family else {})}).items():
        if sum(key in overrides for key in pair) == 1:
            replaced = {key: value for key, value in replaced.items() if key in overrides or key not in pair}
    return override_rope(replaced, overrides, origin)


def without_quantization(hf: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], list[str]]:
    """Removes the description of quantized weights from a config.json; returns a warning for each removed key."""
    dropped = [key for key in QUANTIZATION if hf.get(key) is not None]
    kept = {key: value for key, value in hf.items() if key not in QUANTIZATION}
    return kept, [f"{origin}: {key} ({_method(hf[key])}) is dropped; the weights are not quantized" for key in dropped]


def _method(quantization: Any) -> str:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return str(method or "without a quant_method")


def quantization_method(hf: Mapping[str, Any]) -> str | None:
    """The quantization method that a config.json names; None if it names none."""
    return next((_method(hf[key]) for key in QUANTIZATION if hf.get(key) is not None), None)


def warnings_of(hf: Mapping[str, Any], family_name: str, origin: str) -> list[str]:
    """Returns what a config.json asks for and this project does not do, one line each. `check_keys` has accepted its
    values."""
    family = family_named(family_name)
    keys = known_keys(family)
    lines = [
        f"{origin}: {key} is {hf[key]}, which transformers applies in training and this project does not"
        if key in keys
        else f"{origin}: {key} is {hf[key]}; this project trains without dropout"
        for key in sorted(IN_TRAINING)
        if hf.get(key)
    ]
    if hf.get("auto_map"):
        lines.append(
            f"{origin}: auto_map names code of its own, which is not run; the model is trained as a {family_name}"
        )
    others = sorted(hf.keys() - keys - family.keys - IN_TRAINING - {*QUANTIZATION, "auto_map"})
    if others:
        lines.append(f"{origin}: keys without a meaning for a {family_name} are ignored: {', '.join(others)}")
    return lines
