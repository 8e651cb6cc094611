"""Metadata of a step, and the files of its run folder that an export reads: read only if they match their digests."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xlam_jax.digest import file_digest, json_digest
from xlam_jax.errors import UserError
from xlam_jax.models.generation_config import GENERATION_CONFIG, read_generation_config
from xlam_jax.weights.checkpoint.layout import HF_CONFIG, METADATA, TOKENIZER, DamagedError

ARRAYS, FILES, DIGEST, METRICS = "arrays", "files", "digest", "metrics"
"""Keys of a step's metadata: shape, dtype and checksums of each item's arrays; digests of files of the run folder; a
digest of the metadata; and, written by earlier versions, the metrics that the best checkpoint is chosen by."""


def load_metadata(step_dir: Path) -> dict[str, Any]:
    """Reads what was saved with a step: the run's `config`, the `model`'s, the fingerprint of its `base`, checksums.

    Raises `DamagedError` when it is missing, can't be parsed, or does not match its digest. A step of an earlier
    version has neither digest nor checksums.
    """
    return read_metadata(step_dir)[1]


def read_metadata(step_dir: Path) -> tuple[list[str], dict[str, Any]]:
    """Returns the names of a step's items and its metadata. Raises `DamagedError`, as `load_metadata` does."""
    try:
        content = json.loads((step_dir / METADATA).read_bytes())
        items, custom = list(content["item_handlers"]), content["custom_metadata"] or {}
        signed = {ARRAYS, FILES, DIGEST, METRICS} & custom.keys()
        matches = not signed or custom[DIGEST] == metadata_digest(custom)
    except PermissionError:
        raise
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise DamagedError(
            step_dir, f"{METADATA} {'is missing' if missing else f'can not be read ({error})'}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(step_dir, f"{METADATA} can't be parsed ({type(error).__name__}: {error})"[:300]) from None
    if not matches:
        raise DamagedError(step_dir, f"the contents of {METADATA} do not match their digest")
    return items, custom


def metadata_digest(metadata: dict[str, Any]) -> str:
    """A digest of metadata that does not depend on how they are spelled in JSON; the entry `DIGEST` is not counted."""
    rest = {key: value for key, value in metadata.items() if key != DIGEST}
    return json_digest(rest, length=32)


def file_digests(run: Path) -> dict[str, str]:
    """Digests of the files next to the steps that an export reads, by their paths in the run folder. config.json is
    skipped: its contents are in the metadata."""
    files = [*sorted((run / TOKENIZER).iterdir())] if (run / TOKENIZER).is_dir() else []
    return {
        str(path.relative_to(run)): file_digest(path, length=32)
        for path in [*files, run / GENERATION_CONFIG]
        if path.is_file()
    }


def check_files(step_dir: Path) -> None:
    """Raises `UserError` when a file next to a step differs from the one it was saved with. More files are allowed."""
    run = step_dir.parent.parent
    now = file_digests(run)
    files = load_metadata(step_dir).get(FILES, {})
    if not isinstance(files, dict):
        raise DamagedError(step_dir, f"{FILES} in {METADATA} is a {type(files).__name__}, not an object")
    for name, digest in files.items():
        if now.get(name) != digest:
            advice = f" (a run that is continued without {run / TOKENIZER} writes it again)"
            raise UserError(
                f"{run / name}: missing, damaged or changed since {step_dir} was saved; restore the file"
                + ("" if name == GENERATION_CONFIG else advice)
            )


def load_hf_config(step_dir: Path) -> dict[str, Any]:
    """Reads the Hugging Face config of the model in a step folder.

    Raises `UserError` when it differs from the one that the step was saved with.
    """
    from xlam_jax.models.config import read_hf_config

    path = step_dir.parent.parent / HF_CONFIG
    hf_config = read_hf_config(path)
    saved = load_metadata(step_dir).get("model") or hf_config
    if not isinstance(saved, dict):
        raise DamagedError(step_dir, f"model in {METADATA} is a {type(saved).__name__}, not an object")
    different = [
        f"{key} is {hf_config.get(key)!r} there and {saved.get(key)!r} in the checkpoint"
        for key in sorted(saved.keys() | hf_config.keys())
        if saved.get(key) != hf_config.get(key)
    ]
    if different:
        raise UserError(
            f"{path}: not the config that {step_dir} was saved with: {'; '.join(different[:5])}; restore the file"
        )
    return hf_config


def load_generation_config(step_dir: Path) -> dict[str, Any] | None:
    """Reads the generation config that the weights came with, next to a step folder; None where they had none.

    Raises `UserError` when it has changed since the step was saved.
    """
    check_files(step_dir)
    return read_generation_config(step_dir.parent.parent / GENERATION_CONFIG)


def tokenizer_dir(step_dir: Path) -> Path | None:
    """The tokenizer folder next to a step folder, if there is one.

    Raises `UserError` when one of its
    files, or generation_config.json, is missing or has changed since the step was saved.
    """
    folder = step_dir.parent.parent / TOKENIZER
    check_files(step_dir)
    return folder if folder.is_dir() else None


class UnverifiedWarning:
    """Warns of checkpoints without checksums: once in a process."""

    def __init__(self) -> None:
        self.printed = False

    def __call__(self, step_dir: Path, report: Callable[[str], None] | None = None) -> None:
        """Prints the warning, by `report` or on stderr."""
        if self.printed:
            return
        self.printed = True
        text = f"warning: {step_dir}: saved by an earlier version, without checksums: damage can't be detected"
        if report:
            report(text)
        else:
            print(text, file=sys.stderr)


warn_unverified = UnverifiedWarning()
