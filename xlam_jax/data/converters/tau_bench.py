"""τ-bench: an agent serves a simulated user under a policy (Yao et al. 2024, arXiv:2406.12045), one trial a row.

Raw: a JSON list of {"task_id", "trial", "reward", "traj": […]}, where "traj" holds chat messages with tool calls, the
policy first. The tools are in <domain>_tools.json, a JSON list of tool schemas.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlam_jax.data.converters.common import Converted, Dropped, convert_rows, field, stem
from xlam_jax.data.parse import parse_tools
from xlam_jax.data.rows import place, read_rows
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError

TOOLS = "_tools"


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """The policy becomes the task instruction, the reward the score; what follows the agent's last turn (results,
    and the user's ###STOP###) is left out.

    Trials of a task have ids that differ in the last number: tau_bench_<domain>_<task>_<trial>. A file's tools are read
    from the <domain>_tools.json whose domain its name holds, given in `paths` or beside it; one that is given alone
    goes with every file. Raises `UserError` without them.
    """
    given = [path for path in paths if stem(path).endswith(TOOLS)]
    rows = [path for path in paths if path not in given]
    for path in rows:
        yield from _convert(path, given or sorted(path.parent.glob(f"*{TOOLS}.json*")), alone=len(given) == 1)


def _convert(path: Path, candidates: list[Path], alone: bool) -> Iterator[Converted | Dropped]:
    fitting = candidates if alone else [one for one in candidates if _domain(one) in path.name]
    if len(fitting) != 1:
        raise UserError(
            f"{path}: its tools are in a file <domain>{TOOLS}.json whose domain is in its name, found: "
            f"{', '.join(map(str, fitting or candidates)) or 'none'}; give that file too"
        )
    domain, tools = _domain(fitting[0]), _read_tools(fitting[0])
    yield from convert_rows([path], lambda row, name: _convert_row(row, name, domain, tools))


def _domain(path: Path) -> str:
    return stem(path).removesuffix(TOOLS)


def _read_tools(path: Path) -> list[dict[str, Any]]:
    tools: list[Any] = []
    for read in read_rows(path):
        try:
            tools += parse_tools([read.row])
        except InvalidTrajectory as invalid:
            raise UserError(
                f"{place(path, read.number, read.line)}: invalid tool: {invalid.reason}: {invalid.detail}; correct it"
            ) from None
    return tools


def _convert_row(row: dict[str, Any], name: str, domain: str, tools: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    messages = field(row, "traj", list)
    task, trial = row.get("task_id"), row.get("trial", 0)
    instruction = ""
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        instruction, messages = field(messages[0], "content", str), messages[1:]
    last = max((i for i, message in enumerate(messages) if field(message, "role", str) == "assistant"), default=-1)
    if last < 0:
        raise InvalidTrajectory("no-assistant-turn", f"none of the {len(messages)} messages is by the assistant")
    yield {
        "unique_trajectory_id": f"tau_bench_{domain}_{name if task is None else f'{task}_{trial}'}",
        "source": "tau_bench",
        "score": row.get("reward"),
        "task_instruction": instruction,
        "tools": tools,
        "conversation": messages[: last + 1],
    }
