"""The description of a model, read from a Hugging Face `config.json`."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from xlam_jax import documents
from xlam_jax.errors import UserError, nearest
from xlam_jax.gguf_config import read_gguf_config
from xlam_jax.gguf_file import find_gguf
from xlam_jax.models import hf_keys
from xlam_jax.models.families import FAMILIES, family_named, family_of, wrapper_of
from xlam_jax.models.families.base import Wrapper
from xlam_jax.models.hf_rope import RopeScaling
from xlam_jax.models.hf_values import Values
from xlam_jax.models.hf_wrapper import text_model
from xlam_jax.models.weights_table import HEAD, Weight

VOCAB_MULTIPLE = 64
"""An enlarged vocabulary has a multiple of this number of rows, the same for every mesh, so that a checkpoint can be
continued on another one. All usual sizes of mesh.tensor divide it."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (Hu et al., 2106.09685) on the named weights: W + scale · A·B, with W frozen."""

    targets: tuple[str, ...]
    rank: int
    alpha: float
    rank_stabilized: bool = False
    """Divide by the rank's square root, not the rank (Kalajdzievski, 2312.03732)."""
    dropout: float = 0.0
    """Dropout rate of an adapter's input, in training."""
    zero: str = "B"
    """The factor that starts at zero."""
    train_tokens: bool = False
    """Whether the rows of the tokens that the run adds are trained next to the adapters."""

    @property
    def scale(self) -> float:
        """The factor of A·B."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


class AddedTokens(NamedTuple):
    """Tokens that a run adds to the vocabulary of its base: `number` ids from `first` on."""

    first: int
    number: int

    def vocab_size(self, base: int) -> int:
        """Returns the number of rows of embedding and head, from that of the base: the same if it has unused rows for
        these tokens, else the next multiple of `VOCAB_MULTIPLE`."""
        end = self.first + self.number
        return base if end <= base else -(-end // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder. Sizes are counts; `experts` is 0 for a dense MLP."""

    family: str
    """Name of its family in `xlam_jax.models.families`."""
    vocab_size: int
    hidden_size: int
    mlp_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0
    experts_per_token: int = 0
    normalize_gates: bool = True
    """The router's probabilities of a token's experts are divided by their sum."""
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    """A token attends to itself and the `sliding_window - 1` tokens before it; None: to all tokens before it."""
    max_positions: int = 4096
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    lora: Lora | None = None
    """Adapters next to the weights; not part of a config.json."""
    added: AddedTokens | None = None
    """The tokens of `vocab_size` that the base does not have; not part of a config.json."""

    @classmethod
    def from_hf(cls, hf: dict[str, Any], origin: str = "config.json", overridden: Iterable[str] = ()) -> "ModelConfig":
        """Reads the fields of a Hugging Face config, as transformers reads them.

        `overridden`: the keys that `model.overrides` set, for messages. Raises `UserError` for values of another type
        or out of range, for two spellings that contradict each other, and for what this decoder does not compute.
        """
        family = family_of(hf)
        if family is None:
            raise _unknown_architecture(hf.get("architectures") or [], origin)
        values = Values(hf_keys.first_spellings(hf, family), origin, overridden)
        hf_keys.check_family(values, family)
        config = cls(family=family.name, **family.read(values))
        hf_keys.check_keys(values, family, config.layers, config.sliding_window)
        return config

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The rows of the weight table that this model has, in the order in which random weights are drawn."""
        return tuple(
            weight
            for weight in family_named(self.family).weights
            if weight.name != HEAD.name or not self.tie_embeddings
        )

    @property
    def trained_tokens(self) -> AddedTokens | None:
        """The added tokens whose rows of embedding and head are trained next to adapters; None if none are."""
        return self.added if self.lora is not None and self.lora.train_tokens else None

    def weight(self, name: str) -> Weight:
        """The row of a weight, or of the weight that a parameter next to it belongs to (`params.is_adapter`). Raises
        `KeyError` if absent."""
        names = (name, name.removesuffix("_a"), name.removesuffix("_b"), name.removesuffix("_rows"))
        for weight in self.weights:
            if weight.name in names:
                return weight
        raise KeyError(name)

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The size of each axis of the weight table, by its letter."""
        return {
            "L": self.layers,
            "E": self.experts,
            "R": self.experts,
            "D": self.hidden_size,
            "M": self.hidden_size,
            "N": self.kv_heads,
            "G": self.heads // self.kv_heads,
            "K": self.head_dim,
            "F": self.mlp_size,
            "V": self.vocab_size,
            "S": self.added.number if self.added else 0,
        }

    def parameters(self) -> int:
        """The number of parameters, without adapters."""
        sizes = self.axis_sizes
        return sum(weight.elements(sizes) for weight in self.weights)


def _unknown_architecture(architectures: Any, origin: str) -> UserError:
    supported = [family.architecture for family in FAMILIES]
    hint = nearest(str(architectures[0]), supported) if isinstance(architectures, list) and architectures else ""
    return UserError(f"{origin}: architectures is {architectures!r}; this project trains {', '.join(supported)}{hint}")


EXPECTED = "a Hugging Face config.json is expected here"


class ModelFile(NamedTuple):
    """The config.json of a model, as it was read."""

    values: dict[str, Any]
    """For a model of text and images (`families.WRAPPERS`), those of its text model."""
    path: Path
    """The file that was read."""
    wrapper: Wrapper | None
    """The model of text and images; None for others."""


def read_model_config(source: Path) -> ModelFile:
    """Reads a model's config. `source`: a config.json, a folder with one, or a GGUF file.

    Raises `UserError` as `read_hf_config` and `gguf_config.read_gguf_config`.
    """
    gguf = find_gguf(source)
    if gguf is not None:
        return ModelFile(read_gguf_config(gguf), gguf, None)
    path = source / "config.json" if source.is_dir() else source
    values = documents.read_object(path, EXPECTED)
    return ModelFile(text_model(values, str(path)), path, wrapper_of(values))


def read_hf_config(path: Path) -> dict[str, Any]:
    """Reads a `config.json`, or another JSON object of a Hugging Face folder. Returns that of the text model for a
    model of text and images (`families.WRAPPERS`).

    Raises `UserError` if the file is missing, is not a JSON object, or has a key twice.
    """
    return text_model(documents.read_object(path, EXPECTED), str(path))
