"""Loads a config file with overrides into a checked config, together with the model that it refers to."""

import math
import typing
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from xlam_jax.config.base import ConflictError, Section
from xlam_jax.config.checks import check_model, model_of
from xlam_jax.config.defaults import fill_defaults, fill_from_model, fill_placeholders, router_warnings
from xlam_jax.config.files import Draft, read_draft
from xlam_jax.config.schema import Config
from xlam_jax.errors import UserError, nearest
from xlam_jax.models import hf_keys
from xlam_jax.models.config import AddedTokens, ModelConfig, read_model_config
from xlam_jax.models.hf_wrapper import text_model_line

LONGEST = 200
"""Maximum length of a value in a message, in characters."""


class Resolved(typing.NamedTuple):
    """A checked config with the model that it refers to."""

    config: Config
    origins: dict[str, str]
    """Path of a field → the file or override that set it; fields that are not listed have their default."""
    hf_config: dict[str, Any]
    """The model's config.json with `model.overrides` applied."""
    model: ModelConfig
    warnings: tuple[str, ...] = ()
    """One line for each setting of the model's config.json that this project ignores."""


def load(path: Path, overrides: list[str] | None = None) -> Resolved:
    """Reads a config file, applies overrides, fills in defaults, and checks everything that needs no device.

    If the config sets `train.epochs`, `train.steps` is 0 until `with_steps`. Raises `UserError` that names the key,
    its origin, the offending values and what to do.
    """
    draft = read_draft(path, overrides or [])
    fill_defaults(draft, path)
    absent = fill_placeholders(draft)
    config = validate(draft, str(path))
    source = read_model_config(Path(config.model.config))
    origin = str(source.path)
    hf_config = hf_keys.with_overrides(source.values, config.model.overrides, origin)
    hf_config, dropped = hf_keys.without_quantization(hf_config, origin)
    model = model_of(config, hf_config, origin)
    if absent:
        fill_from_model(draft, absent, hf_config, model)
        config = validate(draft, str(path))
    warnings = [*dropped, *hf_keys.warnings_of(hf_config, model.family, origin)]
    warnings += [text_model_line(source.wrapper, model.family, origin)] if source.wrapper else []
    warnings += router_warnings(config, hf_config, model, origin)
    check_model(config, model)
    resolved = Resolved(config, draft.origins, hf_config, model, tuple(warnings))
    if config.train.steps and config.train.warmup_ratio is not None:
        return with_steps(resolved, config.train.steps)
    return resolved


def with_steps(resolved: Resolved, steps: int) -> Resolved:
    """Returns the same run with a known number of steps: `train.steps` and `train.warmup_steps` replace `train.epochs`
    and `train.warmup_ratio`, which depend on that number.

    The warm-up takes ⌈ratio × steps⌉ steps, but at most `steps` - 1, so that the peak is reached. Raises `UserError` if
    the number of steps contradicts another field.
    """
    train, draft = resolved.config.train, Draft()
    draft.values, draft.origins = resolved.config.model_dump(), dict(resolved.origins)
    section = draft.values["train"]
    for old, new, value in (("epochs", "steps", train.epochs), ("warmup_ratio", "warmup_steps", train.warmup_ratio)):
        if value is not None:
            draft.origins[f"train.{new}"] = f"{draft.origins.pop(f'train.{old}', 'train')} ({old} {value})"
            section[old] = None
    section["steps"] = steps
    if train.warmup_ratio is not None:
        section["warmup_steps"] = min(math.ceil(round(train.warmup_ratio * steps, 6)), steps - 1)
    return resolved._replace(config=validate(draft, "train"), origins=draft.origins)


def with_vocabulary(resolved: Resolved, first: int) -> Resolved:
    """Returns the same run with a vocabulary that contains `data.added_tokens`, in model and config.json. `first`: the
    id of the first of them, which is the tokenizer's number of tokens without them."""
    if not resolved.config.data.added_tokens:
        return resolved
    added = AddedTokens(first, len(resolved.config.data.added_tokens))
    size = added.vocab_size(resolved.model.vocab_size)
    model = replace(resolved.model, vocab_size=size, added=added)
    return resolved._replace(model=model, hf_config=resolved.hf_config | {"vocab_size": size})


def validate(draft: Draft, path: str) -> Config:
    """Returns the values of a draft as a config. Raises one `UserError` that explains every invalid value; `path` names
    the file of those without an origin."""
    try:
        return Config.model_validate(draft.values)
    except ValidationError as error:
        problems = (_explain(problem, draft, path) for problem in error.errors())
        raise UserError("\n  ".join(problems)) from None


def _explain(problem: Any, draft: Draft, path: str) -> str:
    """Formats a problem reported by pydantic as one line that starts with the origin of the value."""
    location = problem["loc"]
    if isinstance(conflict := problem.get("ctx", {}).get("error"), ConflictError):
        return _explain_conflict(conflict, location, draft.origins, path)
    name = ".".join(map(str, location))
    inside = [key for key in draft.origins if key.startswith(f"{name}.")]
    origin = _origin(draft.origins, (name, *inside, *parents(name)), path)
    if problem["type"] == "extra_forbidden":
        section = section_at(location[:-1])
        keys = [field.alias or key for key, field in section.model_fields.items()] if section else []
        return f"{origin}: unknown key {name}{nearest(str(location[-1]), keys)} (known: {', '.join(keys)})"
    if problem["type"] == "missing":
        return f"{origin}: {name} is missing; {draft.missing.get(name, 'it has no default')}"
    return f"{origin}: {name} is {shorten(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _explain_conflict(conflict: ConflictError, location: tuple[Any, ...], origins: Mapping[str, str], path: str) -> str:
    """Formats a conflict with the origins of its values; names the section if it is an element of a list."""
    prefix = "".join(f"{part}." for part in location)
    text = f"{prefix[:-1]}: {conflict}" if any(isinstance(part, int) for part in location) else str(conflict)
    names = [prefix + field for field in conflict.fields]
    where = {name: _origin(origins, (name, *parents(name)), "") for name in names}
    set_by = [f"{name}: {origin}" for name, origin in where.items() if origin]
    return f"{path}: {text}" + (f" ({'; '.join(set_by)})" if set_by else "")


def _origin(origins: Mapping[str, str], names: tuple[str, ...], otherwise: str) -> str:
    return next((origins[name] for name in names if name in origins), otherwise)


def shorten(value: Any) -> str:
    """Returns the representation of a value, truncated to `LONGEST` characters."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def parents(name: str) -> list[str]:
    """Returns the paths of the sections that a field is in, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def section_at(location: tuple[Any, ...]) -> type[Section] | None:
    """Returns the section at a path of keys and list indices; None if there is none."""
    section: Any = Config
    for key in location:
        if isinstance(key, int):
            continue
        annotation = section.model_fields[key].annotation
        section = next(iter(typing.get_args(annotation)), annotation)
    return section if isinstance(section, type) and issubclass(section, Section) else None
