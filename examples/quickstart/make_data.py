"""Creates the quickstart's trajectories from the raw sources: `python make_data.py RAW_FOLDER`.

RAW_FOLDER contains one folder per source, with the raw files listed below and a LICENSE_NOTE.txt. The same raw files
give the same bytes.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from jsonschema import Draft202012Validator

from xlam_jax.cli import positive, run
from xlam_jax.data.converters import CONVERTERS
from xlam_jax.data.converters.common import Converted
from xlam_jax.data.trajectory import Trajectory, to_dict
from xlam_jax.errors import UserError

FILES = {
    "webshop": ["webshop_react.jsonl"],
    "hotpotqa": ["fireact_hotpotqa.jsonl"],
    "seal_tools": ["dev.jsonl", "tool.jsonl"],
    "hammer": ["apibank_l1.json", "toolalpaca.json"],
}
COUNTS = {"webshop": 30, "hotpotqa": 230, "seal_tools": 70, "hammer": 180}
PARALLEL = 10
LONGEST = 3400  # characters; about 1000 tokens of the quickstart's tokenizer


def main(arguments: list[str] | None = None) -> None:
    """Selects short, successful trajectories whose arguments match the tool schemas, and writes them with licences."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("raw", type=Path, help="folder that contains the raw sources")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="output folder (default: the script's)")
    parser.add_argument("--only", choices=FILES, help="the only source to write")
    parser.add_argument("--count", type=positive, help="number of its trajectories (default: that of the quickstart)")
    parser.add_argument(
        "--parallel",
        type=positive,
        default=PARALLEL,
        help=f"Seal-Tools rows with several calls, in addition to those with one (default: {PARALLEL})",
    )
    options = parser.parse_args(arguments)
    if options.count and not options.only:
        raise UserError("--count is the number of trajectories of one source; name it with --only")
    sources = {options.only: FILES[options.only]} if options.only else FILES
    for source, names in sources.items():
        paths = [options.raw / source / name for name in names]
        for path in (*paths, options.raw / source / "LICENSE_NOTE.txt"):
            if not path.is_file():
                raise UserError(
                    f"{path}: not found; the raw folder must contain {source}/ with {', '.join(names)} and a licence"
                )
        converted = [item.trajectory for item in CONVERTERS[source](paths) if isinstance(item, Converted)]
        chosen = choose(converted, source, options.count or COUNTS[source], options.parallel)
        with (options.out / f"{source}.jsonl").open("w", encoding="utf-8", newline="\n") as lines:
            for trajectory in chosen:
                lines.write(json.dumps(to_dict(trajectory), ensure_ascii=False) + "\n")
        note = (options.raw / source / "LICENSE_NOTE.txt").read_text(encoding="utf-8")
        (options.out / f"LICENSE-{source}.txt").write_text(license_text(note, source), encoding="utf-8", newline="\n")
        print(f"{source}: {len(chosen)} of {len(converted)} trajectories")


def choose(trajectories: Iterable[Trajectory], source: str, count: int, parallel: int) -> list[Trajectory]:
    """Returns the shortest fitting trajectories, one for each first user turn, in the order of the source."""
    fitting: dict[str, Trajectory] = {}
    order: dict[str, int] = {}
    for i, trajectory in enumerate(trajectories):
        if trajectory.score not in (None, 1.0) or length(trajectory) > LONGEST or not arguments_fit(trajectory):
            continue
        order[trajectory.id] = i
        question = trajectory.conversation[0].content
        if question not in fitting or length(trajectory) < length(fitting[question]):
            fitting[question] = trajectory
    ranked = sorted(fitting.values(), key=lambda trajectory: (length(trajectory), order[trajectory.id]))
    if source == "seal_tools":
        single = [trajectory for trajectory in ranked if len(trajectory.conversation[1].tool_calls) == 1]
        several = [trajectory for trajectory in ranked if len(trajectory.conversation[1].tool_calls) > 1]
        chosen = single[:count] + several[:parallel]
    else:
        chosen = ranked[:count]
    return sorted(chosen, key=lambda trajectory: order[trajectory.id])


def length(trajectory: Trajectory) -> int:
    """Estimates the number of characters of the rendered trajectory."""
    return (
        len(trajectory.task_instruction)
        + len(json.dumps(trajectory.tools))
        + sum(
            len(turn.content) + len(json.dumps([c.arguments for c in turn.tool_calls]))
            for turn in trajectory.conversation
        )
    )


def arguments_fit(trajectory: Trajectory) -> bool:
    """Returns whether each call has only declared arguments that match the JSON Schema of its tool."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in trajectory.tools}
    return all(
        call.arguments.keys() <= schemas[call.name]["properties"].keys()
        and Draft202012Validator(schemas[call.name]).is_valid(call.arguments)
        for turn in trajectory.conversation
        for call in turn.tool_calls
    )


def license_text(note: str, source: str) -> str:
    """Returns the licence of a source, with a header that describes the selection in this folder."""
    head, line, licence = note.partition("-" * 70)
    kept = [entry for entry in head.splitlines() if entry.startswith(("Source:", "License:"))]
    kept.append(f"{source}.jsonl holds trajectories converted and selected from it ({', '.join(FILES[source])}).")
    return "\n".join(kept) + "\n\n" + line + licence


if __name__ == "__main__":
    run(main)
