"""What a model is: read from a Hugging Face `config.json`, the one description every tool of the field shares."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlam_jax.errors import UserError, nearest

FAMILIES = {
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "LlamaForCausalLM": "llama",
}

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
    def from_hf(cls, hf: dict[str, Any], origin: str = "config.json") -> "ModelConfig":
        """Reads the fields of a Hugging Face config. Raises `UserError` for what this decoder does not compute."""
        architectures = hf.get("architectures") or []
        family = FAMILIES.get(architectures[0]) if architectures else None
        if family is None:
            raise UserError(
                f"{origin}: architectures is {architectures!r}; this project trains {', '.join(FAMILIES)}"
                + (nearest(str(architectures[0]), FAMILIES) if architectures else "")
            )
        hf = DEFAULTS[family] | hf
        for key, only in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
            if hf.get(key, only) != only:
                raise UserError(f"{origin}: {key} is {hf[key]!r}, and only {only!r} is implemented")

        def size(key: str, default: int | None = None) -> int:
            value = hf.get(key)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise UserError(f"{origin}: {key} is {value!r}; a positive whole number is needed")
            return value

        heads = size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise UserError(
                f"{origin}: num_attention_heads is {heads} and num_key_value_heads is {kv_heads}; "
                "the first must be a multiple of the second"
            )
        head_dim = size("head_dim", size("hidden_size") // heads)
        if head_dim % 2:
            raise UserError(f"{origin}: head_dim is {head_dim}; rotary positions need an even number")
        experts = size("num_local_experts") if family == "mixtral" else 0
        experts_per_token = size("num_experts_per_tok") if family == "mixtral" else 0
        if experts_per_token > experts:
            raise UserError(
                f"{origin}: num_experts_per_tok is {experts_per_token}, more than num_local_experts, {experts}"
            )
        theta, scaling = _rope(hf, origin)
        return cls(
            family=family,
            vocab_size=size("vocab_size"),
            hidden_size=size("hidden_size"),
            mlp_size=size("intermediate_size"),
            layers=size("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            experts=experts,
            experts_per_token=experts_per_token,
            rope_theta=theta,
            rope_scaling=scaling,
            sliding_window=None if family == "llama" else hf.get("sliding_window"),
            max_positions=size("max_position_embeddings"),
            norm_eps=float(hf["rms_norm_eps"]),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            initializer_range=float(hf.get("initializer_range", 0.02)),
        )

    def parameters(self) -> int:
        """The number of parameters."""
        mlp = 3 * self.hidden_size * self.mlp_size
        attention = 2 * self.hidden_size * self.head_dim * (self.heads + self.kv_heads)
        routed = self.experts * mlp + self.experts * self.hidden_size if self.experts else mlp
        block = attention + routed + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.layers * block + embeddings + self.hidden_size


def _rope(hf: dict[str, Any], origin: str) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes rope_parameters; older files hold rope_theta beside rope_scaling.
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta", hf["rope_theta"]))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    try:
        if kind == "linear":
            return theta, RopeScaling(kind=kind, factor=float(rope["factor"]))
        if kind == "llama3":
            return theta, RopeScaling(
                kind=kind,
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_max_positions=int(rope["original_max_position_embeddings"]),
            )
    except KeyError as error:
        raise UserError(f"{origin}: rope type {kind!r} needs {error}, and only {', '.join(rope)} are given") from None
    raise UserError(f"{origin}: rope type {kind!r} is not implemented; known are 'default', 'linear' and 'llama3'")


def read_hf_config(path: Path) -> dict[str, Any]:
    """Reads a `config.json`. Raises `UserError` where the file is missing or not a JSON object."""
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a Hugging Face config.json is expected here") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(hf, dict):
        raise UserError(f"{path}: holds a {type(hf).__name__}; a JSON object is expected")
    return hf
