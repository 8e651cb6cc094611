"""What a model is: read from a Hugging Face `config.json`, the one description every tool of the field shares."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlam_jax import documents
from xlam_jax.errors import UserError, nearest
from xlam_jax.models import hf_keys
from xlam_jax.models.hf_keys import FAMILIES, Values

# What a config.json that leaves a key out means by it: the defaults of transformers.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "rope_theta": 10_000.0,
    },
    "mixtral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1_000_000.0,
    },
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Stretching of the rotary positions. `linear` divides every frequency by `factor` (Chen et al., 2306.15595);
    `llama3` divides the low ones only and blends in between (Llama 3.1)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (Hu et al., 2106.09685) on the named matrices: W + scale · A·B, with W frozen."""

    targets: tuple[str, ...]
    rank: int
    alpha: float
    rank_stabilized: bool = False
    """Divide by the rank's square root, not the rank (Kalajdzievski, 2312.03732)."""
    dropout: float = 0.0
    """Of what an adapter sees, in training."""
    zero: str = "B"
    """The factor that starts at zero."""

    @property
    def scale(self) -> float:
        """What A·B is multiplied with."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one decoder. Sizes are counts; `experts` is 0 for a dense MLP."""

    family: str
    vocab_size: int
    hidden_size: int
    mlp_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0
    experts_per_token: int = 0
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    """A token sees itself and the `sliding_window - 1` tokens before it (Mistral v0.1)."""
    max_positions: int = 4096
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    lora: Lora | None = None
    """Adapters beside the weights; no part of a config.json."""

    @classmethod
    def from_hf(cls, hf: dict[str, Any], origin: str = "config.json", overridden: Iterable[str] = ()) -> "ModelConfig":
        """Reads the fields of a Hugging Face config, as transformers reads them.

        `overridden`: the keys that `model.overrides` set, for messages. Raises `UserError` for values of another type
        or out of range, for two spellings that contradict each other, and for what this decoder does not compute.
        """
        architectures = hf.get("architectures") or []
        family = hf_keys.family_of(hf)
        if family is None:
            raise UserError(
                f"{origin}: architectures is {architectures!r}; this project trains {', '.join(FAMILIES)}"
                + (
                    nearest(str(architectures[0]), FAMILIES)
                    if isinstance(architectures, list) and architectures
                    else ""
                )
            )
        default = DEFAULTS[family]
        hf_keys.check_aliases(Values(hf, origin, overridden), family)
        if family == "mixtral" and "num_experts" in hf:
            hf = {"num_local_experts": hf["num_experts"]} | hf
        values = Values(hf, origin, overridden)
        if hf.get("model_type", family) != family:
            raise values.error("model_type", "architectures", expected=f"{family!r} belongs to that architecture")
        if hf.get("hidden_act", "silu") not in hf_keys.SILU:
            raise values.error("hidden_act", expected="only 'silu' is implemented")
        heads = values.size("num_attention_heads")
        kv_heads = values.size(
            "num_key_value_heads", default.get("num_key_value_heads", heads), nullable=family == "llama"
        )
        if heads % kv_heads:
            raise values.error(
                "num_attention_heads", "num_key_value_heads", expected="the first must be a multiple of the second"
            )
        hidden_size = values.size("hidden_size")
        if hidden_size % heads and (family == "llama" or hf.get("head_dim") is None):
            raise values.error(
                "hidden_size", "num_attention_heads", expected="the first must be a multiple of the second"
            )
        head_dim = values.size("head_dim", hidden_size // heads, nullable=True)
        if head_dim % 2:
            raise values.error("head_dim", expected=f"heads of {head_dim}; rotary positions need an even number")
        layers = values.size("num_hidden_layers", most=hf_keys.MOST_LAYERS)
        experts, experts_per_token = 0, 0
        if family == "mixtral":
            experts = values.size("num_local_experts", default["num_local_experts"], most=hf_keys.MOST_LAYERS)
            experts_per_token = values.size("num_experts_per_tok", default["num_experts_per_tok"])
            if experts_per_token > experts:
                raise values.error(
                    "num_experts_per_tok", "num_local_experts", expected="the first must not be more than the second"
                )
        window = None
        if family != "llama" and hf.get("sliding_window", default.get("sliding_window")) is not None:
            window = values.size("sliding_window", default.get("sliding_window"))
        hf_keys.check_keys(values, family, layers, window)
        max_positions = values.size("max_position_embeddings", default["max_position_embeddings"])
        theta, scaling = hf_keys.rope(values, default["rope_theta"], max_positions)
        return cls(
            family=family,
            vocab_size=values.size("vocab_size"),
            hidden_size=hidden_size,
            mlp_size=values.size("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            experts=experts,
            experts_per_token=experts_per_token,
            rope_theta=theta,
            rope_scaling=_scaling(scaling),
            sliding_window=window,
            max_positions=max_positions,
            norm_eps=values.decimal("rms_norm_eps", default["rms_norm_eps"], most=1.0),
            tie_embeddings=values.flag("tie_word_embeddings", False),
            initializer_range=values.decimal("initializer_range", 0.02, most=1.0),
        )

    def parameters(self) -> int:
        """The number of parameters."""
        mlp = 3 * self.hidden_size * self.mlp_size
        attention = 2 * self.hidden_size * self.head_dim * (self.heads + self.kv_heads)
        routed = self.experts * mlp + self.experts * self.hidden_size if self.experts else mlp
        block = attention + routed + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.layers * block + embeddings + self.hidden_size


def _scaling(numbers: dict[str, Any]) -> RopeScaling | None:
    kind = numbers["rope_type"]
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind=kind, factor=float(numbers["factor"]))
    return RopeScaling(
        kind=kind,
        factor=float(numbers["factor"]),
        low_freq_factor=float(numbers["low_freq_factor"]),
        high_freq_factor=float(numbers["high_freq_factor"]),
        original_max_positions=numbers["original_max_position_embeddings"],
    )


def read_hf_config(path: Path) -> dict[str, Any]:
    """Reads a `config.json`, or another JSON object of a Hugging Face folder.

    Raises `UserError` where the file is missing, not a JSON object, or has a key twice.
    """
    return documents.read_object(path, "a Hugging Face config.json is expected here")
