"""Facts that must be the same on all hosts of a run before data are read: config, code and versions."""

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from xlam_jax.config import Resolved, flatten
from xlam_jax.digest import hex_digest

MAY_DIFFER = re.compile(r"track\.|train\.log_every$|data\.cache$")
"""Fields of a config that may differ between hosts: only host 0 reads them, or they name a local copy."""
ROOT = Path(__file__).parents[2]
PACKAGES = ("xlam_jax", "jax", "jaxlib", "orbax-checkpoint")


def facts_of_run(resolved: Resolved) -> dict[str, Any]:
    """Returns the facts that `distributed.join` compares, by their name in messages."""
    fields = {name: value for name, value in flatten(resolved.config) if not MAY_DIFFER.match(name)}
    return {
        **fields,
        "the model's config.json": hex_digest(json.dumps(resolved.hf_config, sort_keys=True, default=str), length=16),
        "the code of xlam_jax and converters": code_digest(),
        **{f"the version of {name}": _version(name) for name in PACKAGES},
    }


def code_digest(root: Path = ROOT) -> str:
    """Returns a digest of the Python files of xlam_jax and converters below `root`, with their paths."""
    files = sorted(path for name in ("xlam_jax", "converters") for path in (root / name).rglob("*.py"))
    return hex_digest(
        "".join(f"{path.relative_to(root)}\n{path.read_text(encoding='utf-8')}" for path in files), length=16
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
