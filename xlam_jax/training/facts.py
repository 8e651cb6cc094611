"""Facts that must be the same on all hosts of a run: config, code, versions and data."""

import json
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlam_jax.config import Resolved, flatten
from xlam_jax.digest import hex_digest

if TYPE_CHECKING:
    from xlam_jax.data.identity import Identity

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


def facts_of_data(identity: "Identity") -> dict[str, Any]:
    """Returns facts that must be the same on all hosts: the tokenizer and the examples of each source."""
    from xlam_jax.data.identity import describe_source, describe_tokenizer

    sources = {
        name: {part: about for part, about in source.items() if part != "dataset"}
        for name, source in identity["data"].items()
    }
    return {"the tokenizer": describe_tokenizer(identity["tokenizer"])} | {
        f"the data of {name}": describe_source(source) for name, source in sources.items()
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
