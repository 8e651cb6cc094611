"""What a model family defines, and the reading of the config.json keys that all families share."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from xlam_jax.models.hf_rope import read_rope
from xlam_jax.models.hf_values import MOST_LAYERS, Values, words
from xlam_jax.models.weights_table import Weight

COMMON_KEYS = words(
    """architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings
    rope_theta rope_parameters rope_scaling original_max_position_embeddings dtype torch_dtype bos_token_id
    eos_token_id pad_token_id"""
)
"""Keys of a config.json that are read for every family."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: how its config.json is read, and its weights."""

    name: str
    """The `model_type` of its config.json."""
    architecture: str
    """The element of `architectures` in its config.json."""
    read: Callable[[Values], dict[str, Any]]
    """Returns the fields of `ModelConfig`. Raises `UserError` for invalid values."""
    weights: tuple[Weight, ...]
    """Its weight table; the head is dropped for models with tied embeddings."""
    own_keys: frozenset[str] = frozenset()
    """Keys that are read in addition to `COMMON_KEYS`."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Second spelling of a key → its first spelling."""
    noise: frozenset[str] = frozenset({"attention_dropout"})
    """Its keys of noise that transformers adds in training; this project adds none."""
    nullable_noise: frozenset[str] = frozenset()
    """Those of `noise` that may be null."""

    @property
    def keys(self) -> frozenset[str]:
        """All keys that decide what the decoder computes."""
        return COMMON_KEYS | self.own_keys


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A model of text and images whose text model belongs to a family. Only the text model is trained and exported."""

    architecture: str
    """The element of `architectures` in its config.json, which has the text model's keys under `text_config`."""
    default_text: str
    """The `model_type` of a `text_config` that has none."""
    texts: frozenset[str]
    """The families of its text models."""
    prefixes: Mapping[str, str]
    """Prefix of a tensor's name in its files → prefix in the text model's own files; the first that fits counts."""
    others: tuple[str, ...]
    """Prefixes of the tensors that are not part of the text model."""


def read_common(
    values: Values, defaults: Mapping[str, Any], *, nullable: Container[str] = (), scales_queries: bool = False
) -> dict[str, Any]:
    """Returns the fields of `ModelConfig` that every family has.

    `defaults`: what transformers takes for missing keys. Without `num_key_value_heads` in it, each attention head has
    its own keys and values; without `head_dim`, the heads divide the hidden size. `nullable`: those of the two that may
    be null although they have a default; null then means the same as no default. `scales_queries`: as for `read_rope`.
    Raises `UserError` for invalid values.
    """
    heads = values.size("num_attention_heads")
    kv_heads = _size_or_derived(values, "num_key_value_heads", defaults, heads, nullable)
    values.check_multiple("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    hidden_size = values.size("hidden_size")
    if values.get("head_dim", defaults.get("head_dim")) is None:
        values.check_multiple("hidden_size", hidden_size, "num_attention_heads", heads)
    head_dim = _size_or_derived(values, "head_dim", defaults, hidden_size // heads, nullable)
    if head_dim % 2:
        raise values.error("head_dim", expected=f"heads of {head_dim}; rotary positions need an even number")
    max_positions = values.size("max_position_embeddings", defaults["max_position_embeddings"])
    theta, scaling = read_rope(values, defaults["rope_theta"], max_positions, scales_queries=scales_queries)
    return {
        "vocab_size": values.size("vocab_size"),
        "hidden_size": hidden_size,
        "mlp_size": values.size("intermediate_size"),
        "layers": values.size("num_hidden_layers", most=MOST_LAYERS),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_positions": max_positions,
        "norm_eps": values.decimal("rms_norm_eps", defaults["rms_norm_eps"], most=1.0),
        "tie_embeddings": values.flag("tie_word_embeddings", False),
        "initializer_range": values.decimal("initializer_range", 0.02, most=1.0),
    }


def _size_or_derived(
    values: Values, key: str, defaults: Mapping[str, Any], derived: int, nullable: Container[str]
) -> int:
    """A size that follows from others if it is null, or missing without a default."""
    if values.get(key, defaults.get(key)) is None and (key in nullable or key not in defaults):
        return derived
    return values.size(key, defaults.get(key))


def read_experts(values: Values, experts: int, per_token: int) -> dict[str, Any]:
    """Returns the fields of `ModelConfig` that count experts. `experts` and `per_token`: what transformers takes for
    the missing keys num_local_experts and num_experts_per_tok."""
    count = values.size("num_local_experts", experts, most=MOST_LAYERS)
    active = values.size("num_experts_per_tok", per_token)
    if active > count:
        raise values.error(
            "num_experts_per_tok", "num_local_experts", expected="the first must not be more than the second"
        )
    return {"experts": count, "experts_per_token": active}


def read_window(values: Values, default: int | None) -> int | None:
    """Returns the attention window in tokens; None for attention without a window."""
    if values.get("sliding_window", default) is None:
        return None
    return values.size("sliding_window", default)


def read_optional_window(values: Values, default: int) -> int | None:
    """Returns the window of a family that has it only if `use_sliding_window` is true; it is false by default."""
    window = read_window(values, default)  # checked even if it is not used
    return window if values.flag("use_sliding_window", False) else None


def read_window_of_last_layers(values: Values, default: int, full_layers: int) -> int | None:
    """`read_optional_window` of a family whose first `max_window_layers` layers (`full_layers` if the key is missing)
    have no window, unless `layer_types` names those that have one. Raises `UserError` if only some layers have it."""
    window, layers = read_optional_window(values, default), values.size("num_hidden_layers", most=MOST_LAYERS)
    full = values.get("max_window_layers", full_layers)
    if type(full) is not int or full < 0:
        raise values.error("max_window_layers", expected="a whole number of at least 0 is needed")
    if window is None:
        return None
    kinds = values.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if layer < full else "sliding_attention" for layer in range(layers)]
    if kinds in (["full_attention"] * layers, ["sliding_attention"] * layers):
        return window if kinds[0] == "sliding_attention" else None
    raise values.error(
        *("max_window_layers", "layer_types", "use_sliding_window"),
        expected=f"all {layers} layers must have the window, or none: set max_window_layers to 0 or {layers}, without "
        "layer_types",
    )
