"""Configs that are saved with runs, of this and of earlier versions."""

from pathlib import Path
from typing import Any

import yaml

from xlam_jax import documents
from xlam_jax.config.files import Draft, Dumper
from xlam_jax.config.load import shorten, validate
from xlam_jax.config.migrations import migrate
from xlam_jax.config.schema import Config
from xlam_jax.errors import UserError


def to_yaml(config: Config) -> str:
    """Returns a resolved config as YAML, with the number of its schema; reading it back gives the same config."""
    return yaml.dump(to_values(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def to_values(config: Config) -> dict[str, Any]:
    """Returns a resolved config as JSON values, with the number of its schema, to be stored with a checkpoint."""
    return config.model_dump(mode="json")


def from_saved(values: Any, origin: str) -> Config:
    """Returns the config of a run from the values that this or an earlier version saved with it.

    Raises `UserError` that names `origin` and the keys that this version does not have or reads differently.
    """
    if not isinstance(values, dict):
        raise UserError(f"{origin}: contains {shorten(values)}; the config of a run is expected; restore the file")
    draft = Draft()
    draft.values = migrate(values, origin, unnumbered=0)
    try:
        return validate(draft, origin)
    except UserError as error:
        raise UserError(
            f"{error}\n  The run was saved by another version of xlam_jax, or its config was changed; use that "
            "version, or restore the config"
        ) from None


def read_saved(path: Path) -> Config:
    """Reads the config.yaml of a run folder, as `from_saved`."""
    return from_saved(documents.read_yaml(path, "the config of a run is expected here"), str(path))
