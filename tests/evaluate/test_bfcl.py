"""The suite bfcl: it scores right answers as right, wrong ones as wrong, and all of them as bfcl-eval does itself."""

import asyncio
import html
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from bfcl_truth import Knowing
from fake_server import call, says, serve
from support import ROOT, Commands

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.errors import UserError
from xlam_jax.evaluate.bfcl import package, rows
from xlam_jax.evaluate.bfcl.calls import NoCalls, parse, source, system_prompt, tools
from xlam_jax.evaluate.endpoint import Answer
from xlam_jax.evaluate.suite import Options, Outcome, Task
from xlam_jax.evaluate.suites.bfcl import Bfcl

UNANSWERABLE = {
    # Java lists of any: the checker makes all elements strings, and expects numbers and flags among them
    *("simple_java_36", "simple_java_65"),
    # a dictionary's possible values are a text, taken as its letters
    "simple_java_64",
    # no possible value is given; or a required parameter is not among the answers, or an answer no parameter
    *("live_simple_106-63-0", "live_simple_112-68-0", "live_multiple_862-181-3", "live_multiple_964-207-0"),
}
"""Rows of which the possible answers do not satisfy bfcl-eval's own checker."""
INDIFFERENT = {f"multi_turn_{name}_139" for name in ("base", "miss_param", "long_context")}
"""Rows whose only argument makes no difference: the stock that is to be watched does not exist."""


def suite(**extra: str) -> Bfcl:
    return Bfcl(Options(extra=extra))


def sample(tasks: Sequence[Task], one_in: int) -> list[Task]:
    """Some of each category."""
    seen: dict[str, int] = {}
    kept = []
    for task in tasks:
        seen[task.group] = seen.get(task.group, -1) + 1
        if seen[task.group] % one_in == 0:
            kept.append(task)
    return kept


def answered(of: Bfcl, tasks: Sequence[Task], model: Callable[[Task], Any]) -> list[tuple[Task, Outcome]]:
    async def all_of_them() -> list[tuple[Task, Outcome]]:
        return [(task, await of.run(task, model(task), None)) for task in tasks]  # type: ignore[arg-type]

    return asyncio.run(all_of_them())


def check_truth(mode: str, one_in: int) -> None:
    of = suite(mode=mode)
    tasks = sample(of.tasks(), one_in)
    assert {task.group for task in tasks} == set(rows.CATEGORIES)
    right = answered(of, tasks, lambda task: Knowing(task.data, mode))
    assert {task.id for task, outcome in right if outcome.scores["accuracy"] < 1} == UNANSWERABLE & {
        task.id for task in tasks
    }
    wrong = answered(of, tasks, lambda task: Knowing(task.data, mode, wrong=True))
    assert {task.id for task, outcome in wrong if outcome.scores["accuracy"] > 0} == INDIFFERENT & {
        task.id for task in tasks
    }
    assert all(outcome.failure for _, outcome in wrong if outcome.scores["accuracy"] == 0)


@pytest.mark.parametrize("mode", package.MODES)
def test_the_truth_is_right_and_one_other_argument_wrong(mode: str) -> None:
    check_truth(mode, one_in=20)


@pytest.mark.slow
@pytest.mark.parametrize("mode", package.MODES)
def test_the_truth_is_right_and_one_other_argument_wrong_in_all_rows(mode: str) -> None:
    check_truth(mode, one_in=1)


class Mixed:
    """Right, wrong, silent and badly formed answers in turn."""

    def __init__(self, task: Task):
        self._kind = sum(task.id.encode()) % 6
        self._knowing = Knowing(task.data, wrong=self._kind in (1, 2))

    async def chat(self, messages: Sequence[dict[str, Any]], tools: Any = None, **options: Any) -> Answer:
        answer = await self._knowing.chat(messages, tools)
        if self._kind == 3:
            return answer._replace(calls=(), content="I would rather not.")
        if self._kind == 4 and answer.calls:
            first, *others = answer.calls
            strange = ToolCall(first.id, first.name, {**first.arguments, "more": [{"a": [None, 1.5]}, "ü"]})
            return answer._replace(calls=(strange, *others))
        if self._kind == 5 and answer.calls:
            return answer._replace(calls=(*answer.calls, ToolCall("call_x", "no_such_function", {"a": "b"})))
        return answer


def check_against_official(one_in: int, folder: Path) -> None:
    of = suite()
    outcomes = answered(of, sample(of.tasks(), one_in), Mixed)
    recorded: dict[str, list[Any]] = {category: [] for category in rows.CATEGORIES}
    ours: dict[str, list[str]] = {category: [] for category in rows.CATEGORIES}
    for task, outcome in outcomes:
        recorded[task.group].append({"id": task.id, "result": outcome.details["result"]})
        if outcome.scores["accuracy"] == 0:
            ours[task.group].append(task.id)
    theirs = official("scores", recorded, folder)
    for category in rows.CATEGORIES:
        assert sorted(ours[category]) == sorted(theirs[category]), category
        if one_in == 1:
            assert 0 < len(ours[category]) < len(recorded[category]), category
    assert sum(map(len, ours.values())) > len(outcomes) / 5


def official(what: str, given: Any, folder: Path) -> Any:
    """What bfcl-eval's own code says; in a process of its own, in which modules are replaced under their names."""
    sent, out = folder / "sent.json", folder / "out.json"
    sent.write_text(json.dumps(given))
    command = [sys.executable, str(Path(__file__).with_name("bfcl_official.py")), what, str(sent), str(out)]
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_scores_are_those_of_the_official_evaluator(tmp_path: Path) -> None:
    check_against_official(20, tmp_path)


@pytest.mark.slow
def test_scores_are_those_of_the_official_evaluator_in_all_rows(tmp_path: Path) -> None:
    check_against_official(1, tmp_path)


def check_asked(categories: Sequence[str], folder: Path) -> None:
    theirs = official("asked", categories, folder)
    ours = {}
    for category in categories:
        for row in rows.read(package.data_folder(), category):
            functions = rows.described(row.functions, row.language)
            held_back = [one for of in row.held_back.values() for one in of]
            first = [dict(message) for message in row.turns[0]]
            if first[0]["role"] == "system":
                first[0]["content"] = f"{system_prompt(functions)}\n\n{first[0]['content']}"
            else:
                first.insert(0, {"role": "system", "content": system_prompt(functions)})
            ours[row.id] = [tools(functions), tools(held_back), first]
    assert ours.keys() == theirs.keys()
    assert not [id for id in ours if ours[id] != theirs[id]]


def test_models_are_asked_as_by_the_official_generator(tmp_path: Path) -> None:
    check_asked(("simple_java", "simple_javascript", "live_parallel_multiple", "multi_turn_miss_func"), tmp_path)


@pytest.mark.slow
def test_models_are_asked_as_by_the_official_generator_in_all_rows(tmp_path: Path) -> None:
    check_asked(rows.CATEGORIES, tmp_path)


def test_over_http(tmp_path: Path, commands: Commands) -> None:
    """The client and the server's side of it take all that is sent."""
    categories = "simple_python,simple_java,live_multiple,irrelevance,multi_turn_base,multi_turn_miss_func"
    of = suite(categories=categories)
    known: dict[str, Answer] = {}

    def key(messages: Sequence[dict[str, Any]], given: Any) -> str:
        said = [message["content"] for message in messages if message["role"] in ("user", "system")]
        done = sum(message["role"] == "assistant" for message in messages)
        return json.dumps([said, done, [tool["function"]["name"] for tool in given]])

    class Noted:
        def __init__(self, task: Task):
            self._knowing = Knowing(task.data)

        async def chat(self, messages: Sequence[dict[str, Any]], tools: Any = None, **options: Any) -> Answer:
            answer = await self._knowing.chat(messages, tools)
            known[key(messages, tools)] = answer
            return answer

    def reply(handler: Any, request: dict[str, Any]) -> None:
        answer = known[key(request["messages"], request["tools"])]
        made = [call(one.name, one.arguments, one.id or "") for one in answer.calls]
        says(answer.content, made or None)(handler, request)

    answered(of, of.tasks()[:60], Noted)
    with serve(reply) as server:
        command = ["--suite", "bfcl", "--base-url", server.url, "--model", "tiny", "--out", tmp_path, "--limit", 60]
        commands.call("xlam_jax.evaluate", *command, "--set", f"categories={categories}")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["scores"] == {"accuracy": 1.0}
    assert summary["scored"] == 60
    assert set(summary["groups"]) == set(categories.split(","))


def test_calls_that_cannot_be_read_are_counted_in_irrelevance(tmp_path: Path, commands: Commands) -> None:
    """They count as no call, as in bfcl-eval, and the page says how many. The mean of rows is not called the score."""
    with serve(says('[TOOL_CALLS][{"name": "f", "arguments": {'), says("I cannot."), says("[]")) as server:
        command = ["--suite", "bfcl", "--base-url", server.url, "--model", "tiny", "--out", tmp_path, "--report"]
        said = commands.call(
            "xlam_jax.evaluate", *command, "--limit", 6, "--concurrency", 1, "--set", "categories=relevance"
        ).stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    counts = {name: (one["unreadable_calls"], one["scores"]["accuracy"]) for name, one in summary["groups"].items()}
    assert counts == {"irrelevance": (1, 1.0), "live_irrelevance": (0, 1.0), "live_relevance": (0, 0.0)}
    page = (tmp_path / "report.html").read_text()
    for text in (said, page):
        assert "irrelevance: 1 of 2 answers were meant as calls and cannot be read" in html.unescape(text)
        assert "is not the leaderboard's overall number" in html.unescape(text)
    assert said.splitlines()[5].startswith("mean of rows")
    assert "<th>unreadable calls</th>" in page
    assert "<td>mean of rows</td>" in page
    assert "<td>all</td>" not in page


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("[f(a=", True),
        ("```python\n[f(a=[x for x in y])]\n```", True),
        ("f(1", True),
        ("I cannot do that (sorry).", False),
        ("[f(a=1)]", False),
        ("[]", False),
    ],
)
def test_answers_in_words_are_no_unreadable_calls(text: str, meant: bool) -> None:
    of = suite(categories="irrelevance", mode="prompt")

    class Says:
        async def chat(self, messages: Any, tools: Any = None, **options: Any) -> Answer:
            return Answer(list(messages), text, (), "stop")

    ((_, outcome),) = answered(of, of.tasks()[:1], lambda _: Says())
    assert outcome.details["unreadable_calls"] == meant


def test_a_turn_without_end_is_broken_off() -> None:
    of = suite(categories="multi_turn_base")
    task = of.tasks()[1]  # its first turn asks for ls

    class Restless:
        asked = 0

        async def chat(self, messages: Any, tools: Any = None, **options: Any) -> Answer:
            self.asked += 1
            return Answer(list(messages), "", (ToolCall("1", "ls", {}),), "tool_calls")

    restless = Restless()
    ((_, outcome),) = answered(of, [task], lambda _: restless)
    assert (outcome.scores["accuracy"], outcome.failure) == (0, "steps-used-up")
    assert restless.asked == package.prompts().MAXIMUM_STEP_LIMIT + 1


def test_results_are_fed_back_and_the_world_is_forgotten() -> None:
    of = suite(categories="multi_turn_miss_func")
    task = of.tasks()[0]
    knowing = Knowing(task.data)
    ((_, first),) = answered(of, [task], lambda _: knowing)
    told = [message for message in first.messages if message["role"] == "tool"]
    assert json.loads(told[0]["content"])["current_working_directory"] == "document"
    assert told[0]["tool_call_id"] == "call_0"
    before, after = knowing.requests[0][1], knowing.requests[-1][1]
    held_back = task.data.raw["missed_function"]["3"]
    names = [[tool["function"]["name"] for tool in given] for given in (before, after)]
    assert [name for name in names[1] if name not in names[0]] == held_back
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils

    assert not [name for name in vars(multi_turn_utils) if name.startswith("world")]
    ((_, again),) = answered(of, [task], lambda task: Knowing(task.data))
    assert again.details == first.details


def test_what_a_model_says_is_never_executed() -> None:
    methods = {"cd", "echo"}
    assert source(("cd", {"folder": "a'b\"(c)"}), methods) == "cd(folder='a\\'b\"(c)')"
    assert source(("ls", {}), methods) == "ls()"  # that it does not exist is told to the model
    assert source(("power", {"base": 9, "exponent": 3_000_000_000}), {"power"}) == "too_large()"
    assert source(("power", {"base": 9, "exponent": {"power": {"base": 9, "exponent": 9}}}), {"power"}) == "too_large()"
    assert source(("power", {"base": -2, "exponent": 10}), {"power"}) == "power(base=-2,exponent=10)"
    for name in ("open", "__import__", "exec", "importlib", "inspect.os.system", "cd(__import__('os'))", "", "x;y"):
        assert source((name, {"a": 1}), methods) == "unknown_function()"
    for key in ("folder=open('x')", "a b", "", "lambda"):
        assert source(("cd", {key: 1}), methods) == "unknown_argument()"
    texts = ("[f(a=2**10**10)]", "[f(a=__import__('os').system('x') + 1)]", "[f(a=[x for x in y])]")
    for text in (*texts, "a", "f(", "I don't know.", "[1]", "[f(a=f'{x}')]"):
        with pytest.raises(NoCalls):
            parse(text, "python")


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[f(a=1, b='x')]", [("f", {"a": 1, "b": "x"})]),
        (
            "```\n[a.b(x=[1, (2, 3)], y={'k': True}), g()]\n```",
            [("a.b", {"x": [1, (2, 3)], "y": {"k": True}}), ("g", {})],
        ),
        ("f(a=-1.5, b=3*4/2, c=name, d=None)", [("f", {"a": -1.5, "b": 6.0, "c": "name", "d": None})]),
        ("[f(1, a=g(x=2), b=g(3), c=d[0])]", [("f", {"a": {"g": {"x": 2}}, "b": "g(3)", "c": "d[0]"})]),
        ("[]", []),
    ],
)
def test_answers_in_python(text: str, calls: Any) -> None:
    assert parse(text, "python") == calls


@pytest.mark.parametrize(
    ("language", "text", "arguments"),
    [
        ("java", 'A.f(x="a, b", y=5L, z=true)', {"x": "a, b", "y": "5L", "z": "true"}),
        (
            "java",
            'A.f(m=new HashMap<String, Object>() {{ put("a", 1); }})',
            {"m": 'new HashMap<String, Object>() {{ put("a", 1); }}'},
        ),
        (
            "javascript",
            "[A.f(a=[1, 'x'], b={k: \"v, w\"}, c='it\\'s')]",
            {"a": "[1, 'x']", "b": '{k: "v, w"}', "c": "it\\'s"},
        ),
    ],
)
def test_answers_in_other_languages(language: str, text: str, arguments: dict[str, str]) -> None:
    assert parse(text, language) == [("A.f", arguments)]


def test_tools_are_in_json_schema() -> None:
    for category in rows.CATEGORIES:
        for row in rows.read(package.data_folder(), category)[:40]:
            for tool in tools(rows.described(row.functions, row.language)):
                assert "." not in tool["function"]["name"]
                check_types(tool["function"]["parameters"])


def check_types(schema: Any) -> None:
    assert schema["type"] in ("object", "array", "string", "integer", "number", "boolean")
    for one in schema.get("properties", {}).values():
        check_types(one)
    if "items" in schema:
        check_types(schema["items"])


def test_a_limit_takes_of_each_category() -> None:
    tasks = suite(categories="simple_python,live,multi_turn_base").tasks()
    assert len({task.group for task in tasks[:8]}) == 8
    assert len({task.id for task in tasks}) == len(tasks)


def test_what_is_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no 'simple_pyton'.*did you mean 'simple_python'"):
        suite(categories="simple_pyton")
    with pytest.raises(UserError, match="'memory_kv' needs services"):
        suite(categories="memory_kv")
    with pytest.raises(UserError, match=r"mode: 'promt'.*did you mean 'prompt'"):
        suite(mode="promt")
    with pytest.raises(UserError, match=r"holds no BFCL_v4_simple_python\.json"):
        Bfcl(Options(data=tmp_path))
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bfcl-eval, which is not installed; run `make eval`"):
        suite()


def test_others_find_the_package_as_it_is() -> None:
    suite()
    package.check_calls([], [], [], "simple_python", "python", "fc")
    assert "bfcl_eval.constants.model_config" not in sys.modules
    assert "bfcl_eval.eval_checker.ast_eval.ast_checker" not in sys.modules
    assert "bfcl_eval.constants.eval_config" not in sys.modules  # it makes folders when it is imported
