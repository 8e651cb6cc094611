"""The commands in docs/benchmarks.md, against an endpoint with one fixed answer."""

import json
import re
import shlex
from pathlib import Path

import pytest
from fake_server import says, serve
from support import ROOT, Commands
from test_tool_query import data as graphs  # noqa: F401 - a fixture

from xlam_jax.data.parse import read_jsonl

PAGE = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python -m (.*)$", PAGE, re.MULTILINE)


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 6


def mint(folder: Path) -> Path:
    for name in ("gsm8k", "hotpotqa", "math", "mmlu", "theoremqa"):
        (path := folder / "data/processed" / name).mkdir(parents=True)
        row = {"id": 1, "prompt": "What? Options: A ) 1 , B ) 2", "reference": "1", "answer_type": "integer"}
        (path / "test_prompts.json").write_text(json.dumps(row) + "\n")
    return folder


def queries(folder: Path) -> Path:
    (path := folder / "solvable_queries/test_instruction").mkdir(parents=True)
    (path / "G1_tool.json").write_text(json.dumps([{"query": "?", "api_list": [], "query_id": 1}]))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("graphs", [5], indirect=True)
def test_commands_run(command: str, commands: Commands, tmp_path: Path, graphs: Path) -> None:  # noqa: F811
    module, *arguments = shlex.split(command)
    rated = tmp_path / "scored.jsonl"
    rated.write_text((ROOT / "examples/quickstart/hammer.jsonl").read_text().splitlines()[0] + "\n")
    paths = {"agentboard/data": graphs, "scored.jsonl": rated, "rated.jsonl": tmp_path / "rated.jsonl"}
    if "mint-bench" in arguments:
        paths["mint-bench"] = mint(tmp_path / "mint")
        at = arguments.index("execute=yes")  # not every machine allows it; test_mint tests it
        del arguments[at - 1 : at + 1]
    if "StableToolBench" in arguments:
        paths["StableToolBench"] = queries(tmp_path / "stable")
    with serve(says('{"reason": "x", "score": 4, "status": "Solved"}')) as server:
        replaced = [str(paths.get(word, word)) for word in arguments]
        replaced = [re.sub(r"http://localhost:\d+/v1", server.url, word) for word in replaced]
        replaced = [str(tmp_path / word) if word.startswith("runs/") else word for word in replaced]
        commands.call(f"{module}.__main__", *replaced, *([] if "rate" in replaced else ["--limit", "2"]))
    if "rate" in replaced:
        assert [trajectory.score for _, trajectory in read_jsonl(tmp_path / "rated.jsonl")] == [4.0]  # type: ignore[union-attr]
    else:
        out = Path(replaced[replaced.index("--out") + 1])
        assert json.loads((out / "summary.json").read_text())["scored"] > 0
