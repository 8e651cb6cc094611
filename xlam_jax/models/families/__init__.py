"""The model families that this project trains: one file and one row of `FAMILIES` each.

`WRAPPERS` are models whose text model belongs to one of them.

To add a family, write a module with a `Family` (how its config.json is read, and its weight table) and add it to
`FAMILIES`. In `xlam_jax`, nothing else names a family.
"""

from collections.abc import Mapping
from typing import Any

from xlam_jax.models.families import llama, ministral3, mistral, mistral3, mixtral, qwen2, qwen3, qwen3_moe
from xlam_jax.models.families.base import Family, Wrapper
from xlam_jax.models.weights_table import Weight

FAMILIES: tuple[Family, ...] = (
    mistral.FAMILY,
    mixtral.FAMILY,
    llama.FAMILY,
    ministral3.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
)
WRAPPERS: tuple[Wrapper, ...] = (mistral3.WRAPPER,)


def family_of(hf: Mapping[str, Any]) -> Family | None:
    """The family of the single architecture that a config.json names; None for others, and if it is not a list."""
    match hf.get("architectures"):
        case [str(architecture)]:
            return next((family for family in FAMILIES if family.architecture == architecture), None)
    return None


def wrapper_of(hf: Mapping[str, Any]) -> Wrapper | None:
    """The wrapper that a config.json describes; None for others."""
    return next((wrapper for wrapper in WRAPPERS if hf.get("architectures") == [wrapper.architecture]), None)


def family_named(name: str) -> Family:
    """The family of this name. Raises `KeyError` if there is none."""
    return {family.name: family for family in FAMILIES}[name]


def rows_named(name: str) -> list[Weight]:
    """The rows of this name in the tables of all families."""
    return [weight for family in FAMILIES for weight in family.weights if weight.name == name]


def frozen_storage(name: str) -> str:
    """How a frozen weight is stored (`Weight.frozen`), which is the same in all families that have it."""
    rows = rows_named(name)
    return rows[0].frozen if rows else "compute"


def is_vector(name: str) -> bool:
    """Whether the parameter of this name is a norm's scale or a bias, which are not decayed."""
    return any(not row.is_matrix for row in rows_named(name))


def stacked_axes(name: str, ndim: int) -> int:
    """The number of leading axes of a block's parameter that index its layers (and experts): 1 or 2.

    `name`: the last part of its path. An array with another number of axes than the weight of that name, and the
    factors of adapters, are indexed by layers only.
    """
    return max((len(row.stacked) for row in rows_named(name) if len(row.axes) == ndim), default=1)
