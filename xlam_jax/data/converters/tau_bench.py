"""τ-bench: an agent serves a simulated user under a policy (Yao et al. 2024, arXiv:2406.12045), one trial per row.

Raw: a JSON list of {"task_id", "trial", "reward", "traj": […]}, where "traj" is a list of chat messages with tool calls
that starts with the policy. The tools are in <domain>_tools.json, a JSON list of tool schemas.
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
    """Converts trials: the policy becomes the task instruction, the reward the score.

    Turns after the agent's last turn (results, and the user's ###STOP###) are dropped. Trials of a task have ids that
    differ in the last number: tau_bench_<domain>_<task>_<trial>. The tools of a file are in the <domain>_tools.json
    whose domain is in the file's name; it is one of `paths` or in the same folder. If `paths` has exactly one file of
    tools, it belongs to every file. Raises `UserError` without tools.
    """
    tool_files = [path for path in paths if stem(path).endswith(TOOLS)]
    rows = [path for path in paths if path not in tool_files]
    for path in rows:
        candidates = tool_files or sorted(path.parent.glob(f"*{TOOLS}.json*"))
        yield from _convert(path, candidates, alone=len(tool_files) == 1)


def _convert(path: Path, candidates: list[Path], alone: bool) -> Iterator[Converted | Dropped]:
    fitting = candidates if alone else [candidate for candidate in candidates if _domain(candidate) in path.name]
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
