"""Rotary positions in a Hugging Face config.json: their base and scaling, in the old and the new spelling.

transformers 5 writes `rope_parameters`; older files have `rope_theta` and `rope_scaling`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xlam_jax.errors import nearest
from xlam_jax.models.hf_values import Values, is_number, is_same

SCALING_KEYS = ("rope_parameters", "rope_scaling")
OVERRIDE_KEYS = ("rope_theta", *SCALING_KEYS)
"""Keys whose overrides `override_rope` applies."""
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Types of rotary positions that are implemented → the keys that each of them needs."""
_YARN_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
OPTIONAL_KEYS = {"yarn": (*_YARN_NUMBERS, "truncate")}
"""Type → the keys that it may have."""
QUERY_SCALE = "llama_4_scaling_beta"
"""The key of the queries' scale, in families that have one (`RopeScaling.query_scale`)."""
_NEUTRAL = {"partial_rotary_factor": (1.0,), "factor": (None, 1.0), "attention_factor": (None, 1.0)}
_WITHOUT_EFFECT = ("rope_type", "type", "rope_theta", "original_max_position_embeddings", "finetuned")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary positions. `linear` divides every frequency by `factor` (Chen et al., 2306.15595); `llama3`
    divides the low ones only and blends in between (Llama 3.1, 2407.21783); so does `yarn`, with other bounds, and it
    multiplies queries and keys by `attention_factor` (Peng et al., 2309.00071)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    """yarn: frequencies with more turns than this within `original_max_positions` are not divided."""
    beta_slow: float = 1.0
    """yarn: frequencies with fewer turns than this are divided by the whole `factor`."""
    truncate: bool = True
    """yarn: round the bounds to whole frequencies."""
    attention_factor: float = 1.0
    query_scale: float = 0.0
    """β: a query is multiplied by 1 + β·ln(1 + ⌊position / original_max_positions⌋), as in Llama 4 and Ministral 3."""


def read_rope(
    values: Values, default_theta: float, max_positions: int, *, scales_queries: bool = False
) -> tuple[float, RopeScaling | None]:
    """Returns the base of the rotary positions, and their scaling.

    `scales_queries`: the family scales queries by their position, which needs the key `QUERY_SCALE`. A file with
    several spellings is accepted if they mean the same. Raises `UserError` if they differ, and for what is not
    implemented.
    """
    if "rope_theta" in values and not (is_number(values.get("rope_theta")) and values.get("rope_theta") > 0):
        raise values.error("rope_theta", expected="a number above 0 is needed")
    theta = float(values.get("rope_theta") or default_theta)
    meanings: dict[str, tuple[float, RopeScaling | None]] = {}
    for key in SCALING_KEYS:
        if values.get(key) not in (None, {}):
            meanings[key] = _read_object(values, key, theta, max_positions, scales_queries)
    for key, (inner, _) in meanings.items():
        if "rope_theta" in values and inner != theta:
            raise values.error("rope_theta", key, expected="they name different rope_theta; remove one of them")
    if len(meanings) == 2 and meanings["rope_parameters"] != meanings["rope_scaling"]:
        lacking = [key for key in meanings if "rope_theta" not in values.get(key) and "rope_theta" not in values]
        hint = f" ({lacking[0]} without rope_theta means {default_theta:g})" if lacking else ""
        raise values.error(*SCALING_KEYS, expected=f"they differ{hint}; remove the one that is not meant")
    if scales_queries and not meanings:
        raise values.error("rope_parameters", expected=f"this family needs rope_type 'yarn' and {QUERY_SCALE} in it")
    return next(iter(meanings.values()), (theta, None))


def _read_object(
    values: Values, key: str, theta: float, max_positions: int, scales_queries: bool
) -> tuple[float, RopeScaling | None]:
    described = values.get(key)
    if not isinstance(described, dict):
        raise values.error(key, expected="an object such as {'rope_type': 'linear', 'factor': 4.0}, or null, is needed")
    kind = described.get("rope_type", described.get("type", "default"))
    if "type" in described and described["type"] != kind:
        raise values.error(key, expected="its rope_type and type differ; remove one of them")
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise values.error(
            key, expected=f"rope type {kind!r} is not implemented; known are {', '.join(map(repr, ROPE_KEYS))}"
        )
    own = (QUERY_SCALE, "max_position_embeddings") if scales_queries else ()  # the second has no effect
    names = (*ROPE_KEYS[kind], *OPTIONAL_KEYS.get(kind, ()), *own)
    for name, value in described.items():
        neutral = name in _NEUTRAL and any(is_same(value, other) for other in _NEUTRAL[name])
        if not neutral and name not in (*names, *_WITHOUT_EFFECT):
            raise values.error(key, expected=f"{name} has no meaning for rope type {kind!r}{nearest(name, names)}")
    inner = described.get("rope_theta", theta)
    if not is_number(inner) or inner <= 0:
        raise values.error(key, expected="rope_theta must be a number above 0")
    numbers = dict(described)
    if kind in ("llama3", "yarn"):
        _fill_original_positions(values, key, numbers, max_positions)
    _check_numbers(values, key, kind, numbers)
    if kind == "yarn":
        _check_yarn(values, key, numbers, inner)
    if scales_queries and (kind != "yarn" or not is_number(numbers.get(QUERY_SCALE))):
        raise values.error(
            key, expected=f"this family needs rope_type 'yarn' and {QUERY_SCALE}, a number of at least 0"
        )
    return float(inner), _scaling(kind, numbers)


def _check_numbers(values: Values, key: str, kind: str, numbers: Mapping[str, Any]) -> None:
    for name in ROPE_KEYS[kind]:
        if name not in numbers:
            raise values.error(key, expected=f"rope type {kind!r} needs {name}")
        if not is_number(numbers[name]) or numbers[name] <= 0:
            raise values.error(key, expected=f"{name} must be a number above 0")
    if numbers.get("factor") is not None and numbers["factor"] < 1:
        raise values.error(key, expected="factor must be at least 1")
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise values.error(key, expected="high_freq_factor must be more than low_freq_factor")


def _check_yarn(values: Values, key: str, numbers: Mapping[str, Any], theta: float) -> None:
    for name in _YARN_NUMBERS:
        if numbers.get(name) is not None and not is_number(numbers[name]):
            raise values.error(key, expected=f"{name} must be a number of at least 0, or null")
    if numbers.get("attention_factor") == 0:
        raise values.error(key, expected="attention_factor must be above 0")
    if (numbers.get("beta_fast") or 32) < (numbers.get("beta_slow") or 1):
        raise values.error(key, expected="beta_fast (32 if absent) must be at least beta_slow (1 if absent)")
    if type(numbers.get("truncate", True)) is not bool:
        raise values.error(key, expected="truncate must be true or false")
    if theta <= 1:
        raise values.error(key, expected="rope type 'yarn' needs a rope_theta above 1")


def _fill_original_positions(values: Values, key: str, numbers: dict[str, Any], max_positions: int) -> None:
    """Fills in `original_max_position_embeddings` as transformers does, and checks it."""
    name = "original_max_position_embeddings"
    outer = values.get(name)
    if outer is None and name in values:
        raise values.error(name, expected=f"a whole number is needed, or no such key next to {key}")
    if outer is not None and numbers.get(name, outer) != outer:
        raise values.error(name, key, expected=f"they name different {name}; remove one of them")
    numbers.setdefault(name, max_positions if outer is None else outer)
    if type(numbers[name]) is not int:
        raise values.error(key, expected=f"{name} must be a whole number")


def _scaling(kind: str, numbers: Mapping[str, Any]) -> RopeScaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind=kind, factor=float(numbers["factor"]))
    if kind == "yarn":
        return _yarn(numbers)
    return RopeScaling(
        kind=kind,
        factor=float(numbers["factor"]),
        low_freq_factor=float(numbers["low_freq_factor"]),
        high_freq_factor=float(numbers["high_freq_factor"]),
        original_max_positions=numbers["original_max_position_embeddings"],
    )


def _yarn(numbers: Mapping[str, Any]) -> RopeScaling:
    """As transformers reads it: null or 0 means the default, and mscale counts only together with mscale_all_dim."""
    factor, attention_factor = float(numbers["factor"]), numbers.get("attention_factor")
    if attention_factor is None:
        growth = 0.1 * math.log(factor)
        mscale, all_dim = numbers.get("mscale"), numbers.get("mscale_all_dim")
        attention_factor = (growth * mscale + 1) / (growth * all_dim + 1) if mscale and all_dim else growth + 1
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=numbers["original_max_position_embeddings"],
        beta_fast=float(numbers.get("beta_fast") or 32),
        beta_slow=float(numbers.get("beta_slow") or 1),
        truncate=numbers.get("truncate", True),
        attention_factor=float(attention_factor),
        query_scale=float(numbers.get(QUERY_SCALE, 0)),
    )


def override_rope(hf: dict[str, Any], overrides: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Applies the overrides of `OVERRIDE_KEYS`, in the spelling that the file uses.

    An override that names a type replaces the scaling and keeps the base (rope_theta); one without a type changes
    single numbers. Raises `UserError` for overrides that contradict each other.
    """
    overrides = {key: overrides[key] for key in OVERRIDE_KEYS if key in overrides}
    if not overrides:
        return hf
    values = Values({**hf, **overrides}, origin, overrides)
    named = [key for key in SCALING_KEYS if key in overrides]
    if len(named) == 2:
        raise values.error(*named, expected="they mean the same; give one of them")
    present = {key: hf[key] for key in SCALING_KEYS if isinstance(hf.get(key), dict) and hf[key]}
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
    kept = {key: value for key, value in hf.items() if key not in OVERRIDE_KEYS}
    if "rope_parameters" in present:
        return kept | {"rope_parameters": effective}
    scaling = {key: value for key, value in effective.items() if key != "rope_theta"}
    outer = {"rope_theta": effective["rope_theta"]} if "rope_theta" in effective else {}
    return kept | outer | {"rope_scaling": None if scaling == {"rope_type": "default"} else scaling}
