"""What the peers' scripts share: they read the rows of a job and write the sequences that the peer makes of them.

A job is a folder with `tokenizer/` and `rows.json`. All rows are prepared together, as in one file of training data, so
that what a peer does to a row because of other rows is seen. If that fails, each row is prepared alone; those that fail
alone have their error, and the others are prepared together again.
"""

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

IGNORED = -100
"""The label of tokens that PyTorch's loss ignores."""
Tokens = tuple[list[int], list[bool]]
"""Token ids, and whether each is trained."""


class Unsupported(Exception):  # noqa: N818 - the peer makes no error
    """The peer has no way to do what a row asks for."""


Prepare = Callable[[Sequence[dict[str, Any]], Path, bool], list[Tokens]]
"""Takes rows, the job's folder and whether only the last turn is trained; returns one sequence per row, in order."""


def main(packages: Sequence[str], prepare: Prepare) -> None:
    """Writes the versions of packages and the sequences of each row into the folder of each job of the command line."""
    name = Path(sys.argv[0]).stem.removeprefix("run_")
    for job in map(Path, sys.argv[1:]):
        rows = json.loads((job / "rows.json").read_text(encoding="utf-8"))
        answer: dict[str, Any] = {}
        for last_turn_only in (False, True):
            chosen = [row for row in rows if row["last_turn_only"] == last_turn_only]
            answer |= _prepare_all(chosen, job, last_turn_only, prepare)
        result = {"versions": {package: version(package) for package in packages}, "rows": answer}
        (job / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")


def _prepare_all(rows: list[dict[str, Any]], job: Path, last_turn_only: bool, prepare: Prepare) -> dict[str, Any]:
    sequences, error = _attempt(rows, job, last_turn_only, prepare)
    if not error:
        return _named(rows, sequences)
    alone = {row["name"]: _attempt([row], job, last_turn_only, prepare) for row in rows}
    failed = {name: {"error": error} for name, (_, error) in alone.items() if error}
    rest = [row for row in rows if row["name"] not in failed]
    sequences, error = _attempt(rest, job, last_turn_only, prepare) if rest else ([], "")
    if error:  # only together: the rows are as they are alone, and the error is reported with the first
        print(f"the rows cannot be prepared together: {error}", file=sys.stderr)
        return failed | {
            name: {"sequences": actual, "together": error} for name, (actual, fails) in alone.items() if not fails
        }
    return failed | _named(rest, sequences)


def _named(rows: list[dict[str, Any]], sequences: list[Tokens]) -> dict[str, Any]:
    return {row["name"]: {"sequences": [sequence]} for row, sequence in zip(rows, sequences, strict=True)}


def _attempt(
    rows: Sequence[dict[str, Any]], job: Path, last_turn_only: bool, prepare: Prepare
) -> tuple[list[Tokens], str]:
    """Returns (sequences, error); one of them is empty."""
    try:
        sequences = prepare(rows, job, last_turn_only)
    except BaseException as error:  # whatever a peer raises, also SystemExit
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        return [], f"{type(error).__name__}: {lines[-1]}"[:500]
    if len(sequences) != len(rows):
        return [], f"drops {len(rows) - len(sequences)} of {len(rows)} rows"
    return sequences, ""


def from_labels(ids: Sequence[int], labels: Sequence[int]) -> Tokens:
    """Returns a sequence from token ids and the labels at the same places."""
    return list(map(int, ids)), [int(label) != IGNORED for label in labels]


def write_lines(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Writes rows as JSON lines. Returns the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages in OpenAI's form, in which the arguments of calls are JSON text."""
    changed = json.loads(json.dumps(messages))
    for message in changed:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return changed
