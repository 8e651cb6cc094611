"""The folder of an evaluation: its settings (run.json), the result of each example (examples.jsonl), its scores
(summary.json)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from xlam_jax import documents, journal
from xlam_jax.errors import UserError
from xlam_jax.outputs import PART, write_json

RUN, EXAMPLES, SUMMARY = "run.json", "examples.jsonl", "summary.json"
FREE = ("base_url", "started", "limit")
"""Settings that may change when an evaluation is continued."""


class Records:
    """The records of one evaluation, open in one process only; a context manager.

    The last record of an id counts. An example whose record was truncated counts as not run.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]):
        """Creates the folder, or continues in it. `about` contains the settings of the evaluation (run.json).

        Raises `UserError` if the folder belongs to another evaluation, contains other files, or is in use.
        """
        self.folder = folder
        _check(folder, about)
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = journal.Journal(folder / EXAMPLES, "wait for it, or name another --out")
        self.torn = self._journal.torn
        """Whether a truncated last line was removed."""
        try:
            if not (folder / RUN).exists():
                write_json(folder / RUN, about)
            self.examples = read(folder)
            """The last record of each example, by its id."""
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def add(self, record: dict[str, Any]) -> None:
        """Appends a record."""
        self.examples[record["id"]] = record
        self._journal.append(record, default=str)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the last record of each example by id, in order of completion. Raises `UserError`."""
    examples: dict[str, dict[str, Any]] = {}
    problem = "is not the record of an example; remove the line, and its example is evaluated again"
    for record in journal.read(folder / EXAMPLES, _check_record, problem):
        examples.pop(record["id"], None)
        examples[record["id"]] = record
    return examples


def _check_record(record: Any) -> dict[str, Any]:
    scores = record["scores"].values() if "error" not in record else ()
    if not isinstance(record["id"], str) or not all(isinstance(score, int | float) for score in scores):
        raise ValueError
    return record


def about(folder: Path) -> dict[str, Any]:
    """Returns the settings of an evaluation, from run.json. Raises `UserError`."""
    path = folder / RUN
    if not path.exists():
        raise UserError(f"{folder}: contains no {RUN}, so it is not the folder of an evaluation; check the path")
    return documents.read_object(path, "the record of an evaluation is expected; name another --out")


def _check(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises `UserError` unless the folder is new, or belongs to an evaluation with the same settings."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; name a folder")
    if not (folder / RUN).exists():
        if folder.is_dir() and not _is_leftover(list(folder.iterdir())):
            raise UserError(
                f"--out {folder}: contains files, but no {RUN}; name a new folder, or the folder of an evaluation"
            )
        return
    before = about(folder)
    keys = [key for key in {**before, **settings} if key not in FREE and before.get(key) != settings.get(key)]
    if keys:
        differences = "; ".join(
            f"{key}: {_to_json(before.get(key))} there, {_to_json(settings.get(key))} now" for key in keys
        )
        raise UserError(
            f"--out {folder}: belongs to another evaluation ({differences}); name another folder, or use the settings "
            "of that one"
        )


def _is_leftover(entries: Sequence[Path]) -> bool:
    """Whether these files are the remains of a first start that was killed before it wrote run.json."""
    return all(entry.name == EXAMPLES or (RUN in entry.name and entry.suffix == PART) for entry in entries)


def _to_json(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
