"""The suite mint: its turns, its judges, and the execution of code, which needs a sandbox."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from xlam_jax.errors import UserError
from xlam_jax.evaluate import sandbox
from xlam_jax.evaluate.endpoint import Answer
from xlam_jax.evaluate.sandbox import Sandbox
from xlam_jax.evaluate.suite import Options, Outcome
from xlam_jax.evaluate.suites import mint
from xlam_jax.evaluate.suites.mint import Mint

needs_namespaces = pytest.mark.skipif(bool(sandbox.find_problem()), reason=f"no sandbox here: {sandbox.find_problem()}")

ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"id": 7, "prompt": "Six times seven?", "reference": "42"}],
    "hotpotqa": [{"id": "h", "prompt": "Who?", "reference": "Ada Lovelace"}],
    "math": [{"id": 1, "prompt": "Half?", "reference": "0.5"}, {"id": 2, "prompt": "x?", "reference": "2x"}],
    "mmlu": [{"id": 1, "prompt": "Which? Options: ['A) red', 'B) dark red', 'C) blue']", "reference": "B"}],
    "theoremqa": [{"id": 1, "prompt": "List?", "reference": [1, 2], "answer_type": "list of integer"}],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, rows in ROWS.items():
        folder = tmp_path / "data" / "processed" / name
        folder.mkdir(parents=True)
        (folder / "test_prompts.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


class ScriptedModel:
    def __init__(self, *answers: str):
        self.answers = list(answers)
        self.prompts: list[str] = []

    async def chat(self, messages: Sequence[dict[str, Any]], tools: Any = None, **options: Any) -> Answer:
        self.prompts.append(messages[-1]["content"])
        return Answer(list(messages), self.answers[len(self.prompts) - 1], (), "stop")


def run_task(suite: Mint, id: str, *answers: str) -> tuple[Outcome, ScriptedModel]:
    model = ScriptedModel(*answers)
    task = next(task for task in suite.tasks() if task.id == id)
    return asyncio.run(suite.run(task, model, None)), model  # type: ignore[arg-type]


def test_each_number_of_turns_is_a_task(data: Path) -> None:
    tasks = Mint(Options(data=data)).tasks()
    assert len(tasks) == 6 * 5
    assert [task.id for task in tasks[:6]] == [*(f"gsm8k/7@{k}" for k in range(1, 6)), "hotpotqa/h@1"]
    assert {task.group for task in tasks} == {f"{k}-step" for k in range(1, 6)}
    few = Mint(Options(data=data / "data" / "processed", extra={"k": "2", "sets": "math"})).tasks()
    assert [task.id for task in few] == ["math/1@2", "math/2@2"]


def test_a_task_has_k_turns_and_two_solutions(data: Path) -> None:
    suite = Mint(Options(data=data))
    outcome, model = run_task(suite, "gsm8k/7@1", "<thought>.</thought> <solution> 42 </solution>")
    assert outcome.scores == {"success": 1.0}
    assert "You have 1 turn(s) in all, and may propose a solution 1 time(s)." in model.prompts[0]
    outcome, model = run_task(suite, "gsm8k/7@1", "<solution>7</solution>")
    assert (outcome.scores["success"], outcome.failure, len(model.prompts)) == (0, "wrong-answer", 1)
    outcome, model = run_task(suite, "gsm8k/7@5", "<solution>7</solution>", "Hm.", "<solution>42</solution>")
    assert (outcome.scores["success"], outcome.details["solved_at"]) == (1, 3)
    assert model.prompts[1].startswith(f"Observation:\n{mint.WRONG}")
    assert "4 turn(s) and 1 solution(s) are left" in model.prompts[1]
    assert mint.NOT_UNDERSTOOD in model.prompts[2]
    outcome, model = run_task(suite, "gsm8k/7@5", *["<solution>7</solution>"] * 2)
    assert (outcome.scores["success"], len(model.prompts)) == (0, 2)
    outcome, model = run_task(suite, "gsm8k/7@3", *["What?"] * 3)
    assert (outcome.failure, len(model.prompts)) == ("no-answer", 3)


def test_code_is_not_run_by_default(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, model = run_task(Mint(Options(data=data)), "gsm8k/7@2", "```python\n6*7\n```", "<solution>42</solution>")
    assert mint.NOT_EXECUTED in model.prompts[1]
    assert outcome.details["code_run"] == 0
    monkeypatch.setattr(mint, "find_problem", lambda: "no namespaces")
    with pytest.raises(UserError, match=r"no namespaces\), so no code is executed"):
        Mint(Options(data=data, extra={"execute": "yes"}))
    monkeypatch.setattr(sandbox, "find_problem", lambda: "no namespaces")
    with pytest.raises(UserError, match="no namespaces"):
        Sandbox()


@needs_namespaces
def test_code_is_run_in_one_session(data: Path) -> None:
    answers = ["```python\na = 6\n```", "```python\nprint(a)\na * 7\n```", "<solution> 42 </solution>"]
    outcome, model = run_task(Mint(Options(data=data, extra={"execute": "yes"})), "gsm8k/7@5", *answers)
    assert model.prompts[1].startswith("Observation:\n[Executed Successfully with No Output]")
    assert model.prompts[2].startswith("Observation:\n6\n42\n")
    assert (outcome.scores["success"], outcome.details["code_run"]) == (1, 2)


def run_code(*codes: str, seconds: float = 20, memory_mb: int = 1024) -> list[str]:
    async def run() -> list[str]:
        async with Sandbox(seconds=seconds, memory_mb=memory_mb) as session:
            return [await session.run(code) for code in codes]

    return asyncio.run(run())


@needs_namespaces
def test_the_sandbox_isolates_code(tmp_path: Path) -> None:
    (secret := tmp_path / "secret").write_text("x")
    outputs = run_code(
        f"import os; os.path.exists({str(secret)!r}), 'XLAM_KEY' in os.environ, os.path.exists('/proc/1')",
        "import socket; socket.create_connection(('127.0.0.1', 80), 2)",
        "open('/usr/x', 'w')",
        "bytearray(3 << 30)",
        "import subprocess; subprocess.run(['ls'])",
        "import os; os.fork()",
        "import sys; sys.exit(3)",
        "print('z' * 5000)",
        "import os; n = os.write(1, b'junk'); open('/tmp/a', 'w').write('ab')",
        "1 / 0",
        "'\\ud800'",
    )
    assert outputs[0] == "(False, False, False)\n"
    for at, word in ((1, "unreachable"), (2, "Read-only"), (3, "MemoryError"), (4, "processes"), (5, "processes")):
        assert word in outputs[at]
    assert outputs[6] == "SystemExit: 3 (line 1)\n"
    assert outputs[7].endswith("...\n[Output Truncated]")
    assert outputs[8] == "2\n"
    assert outputs[9] == "ZeroDivisionError: division by zero (line 1)\n"
    assert outputs[10] == "'\\ud800'\n"


@needs_namespaces
def test_the_sandbox_limits_time() -> None:
    outputs = run_code("a = 1", "while True: pass", "a", "import os; os._exit(1)", "1 + 1", seconds=1.5)
    assert outputs[1] == "Timed out after 1.5 seconds; all variables are gone."
    assert outputs[2].startswith("NameError")
    assert outputs[3].startswith("The process ended")
    assert outputs[4] == "2\n"


@pytest.mark.parametrize(
    ("reference", "proposal", "verdict"),
    [
        ("42", "42.0", True),
        ("42", "44", True),
        ("42", "45", False),
        ("42", "about 42 apples", True),
        ("-3", "3", False),
        ("Ada Lovelace", "It was ada lovelace.", True),
        ("Ada Lovelace", "Ada", False),
        ("2x", "f(x) = 2x", True),
    ],
)
def test_reasoning(reference: str, proposal: str, verdict: bool) -> None:
    assert mint.reasoning(reference, proposal) is verdict


@pytest.mark.parametrize(
    ("proposal", "verdict"),
    [
        ("B", True),
        ("(b)", True),
        ("B) dark red", True),
        ("The answer is B ).", True),
        ("dark red", True),
        ("red", False),
        ("C) blue", False),
        ("probably C", False),
        ("A) or B)", False),
        ("blue", False),
    ],
)
def test_multiple_choice(proposal: str, verdict: bool) -> None:
    assert mint.multiple_choice(ROWS["mmlu"][0]["prompt"], "B", proposal) is verdict


@pytest.mark.parametrize(
    ("reference", "kind", "proposal", "verdict"),
    [
        (False, "bool", "False", True),
        (False, "bool", "no", True),
        (True, "bool", "The statement is True", True),
        (True, "bool", "1", False),
        ("d", "option", "(d)", True),
        ("d", "option", "d ) 0.5", True),
        ("d", "option", "a", False),
        (25, "integer", "n = 25", True),
        (25, "integer", "25 vertices", True),
        (25, "integer", "24.7", True),
        (25, "integer", "26", False),
        (12600, "integer", "12,600", True),
        (1.12, "float", "1.13 m/s", True),
        (1.12, "float", "1.2", False),
        (463000000.0, "float", "4.63 x 10^8", True),
        (463000000.0, "float", "4.63e8", True),
        (1.28e-06, "float", "$1.28 \\times 10^{-6}$", True),
        (-1.5, "float", "-3/2", True),
        ([1, 6], "list of integer", "[6, 1]", True),
        ([1, 6], "list of integer", "(1, 6)", True),
        ([1, 6], "list of integer", "[1, 6, 7]", False),
        ([1, 6], "list of integer", "1", False),
        (1, "integer", "__import__('os')", False),
        (1, "integer", "9**9**9", False),
    ],
)
def test_theoremqa(reference: Any, kind: str, proposal: str, verdict: bool) -> None:
    assert mint.theoremqa(reference, kind, proposal) is verdict


def test_very_long_answers_are_wrong() -> None:
    for proposal in ("9" * 400, "-" * 50_000 + "1", "1," * 20_000, f"[{'1,' * 20_000}1]"):
        for reference, kind in ((3.5, "float"), (3, "integer"), ([3.5], "list of float")):
            assert mint.theoremqa(reference, kind, proposal) is False


def test_errors(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --data"):
        Mint(Options())
    with pytest.raises(UserError, match=r"contains no gsm8k/test_prompts\.json"):
        Mint(Options(data=tmp_path / "data"))
    with pytest.raises(UserError, match="k: '6'"):
        Mint(Options(data=data, extra={"k": "6"}))
    with pytest.raises(UserError, match=r"no 'gsm'; .*did you mean 'gsm8k'"):
        Mint(Options(data=data, extra={"sets": "gsm"}))
    with pytest.raises(UserError, match="neither yes nor no"):
        Mint(Options(data=data, extra={"execute": "true"}))
    (data / "data/processed/math/test_prompts.json").write_text('{"id": 1, "prompt": "x"}\n')
    with pytest.raises(UserError, match=r"test_prompts\.json:1: has no 'reference'"):
        Mint(Options(data=data)).tasks()
