"""The suite bfcl: right answers are scored as right, wrong ones as wrong, and all of them as by bfcl-eval itself."""
# pyright: reportMissingImports=false

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
from bfcl_truth import OracleModel
from fake_server import call, says, serve
from support import ROOT, Commands

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.errors import UserError
from xlam_jax.evaluate.bfcl import package, rows
from xlam_jax.evaluate.bfcl.calls import NoCalls, parse, system_prompt, to_source, tools
from xlam_jax.evaluate.endpoint import Answer
from xlam_jax.evaluate.suite import Options, Outcome, Task
from xlam_jax.evaluate.suites.bfcl import Bfcl

UNANSWERABLE = {
    # Java lists of any: the checker makes all elements strings, and expects numbers and flags among them
    *("simple_java_36", "simple_java_65"),
    # the possible values of a dictionary are a string, which is treated as a list of letters
    "simple_java_64",
    # there is no possible value, a required parameter is not in the answer, or the answer has an unknown parameter
    *("live_simple_106-63-0", "live_simple_112-68-0", "live_multiple_862-181-3", "live_multiple_964-207-0"),
}
"""Rows whose possible answers do not satisfy bfcl-eval's own checker."""
INDIFFERENT = {f"multi_turn_{name}_139" for name in ("base", "miss_param", "long_context")}
"""Rows whose only argument has no effect: the stock to watch does not exist."""


def make_suite(**extra: str) -> Bfcl:
    return Bfcl(Options(extra=extra))


def sample(tasks: Sequence[Task], one_in: int) -> list[Task]:
    """Returns every `one_in`-th task of each category."""
    indices: dict[str, int] = {}
    selected = []
    for task in tasks:
        indices[task.group] = indices.get(task.group, -1) + 1
        if indices[task.group] % one_in == 0:
            selected.append(task)
    return selected


def run_tasks(bfcl: Bfcl, tasks: Sequence[Task], model: Callable[[Task], Any]) -> list[tuple[Task, Outcome]]:
    async def all_of_them() -> list[tuple[Task, Outcome]]:
        return [(task, await bfcl.run(task, model(task), None)) for task in tasks]  # type: ignore[arg-type]

    return asyncio.run(all_of_them())


def check_truth(mode: str, one_in: int) -> None:
    bfcl = make_suite(mode=mode)
    tasks = sample(bfcl.tasks(), one_in)
    assert {task.group for task in tasks} == set(rows.CATEGORIES)
    right = run_tasks(bfcl, tasks, lambda task: OracleModel(task.data, mode))
    assert {task.id for task, outcome in right if outcome.scores["accuracy"] < 1} == UNANSWERABLE & {
        task.id for task in tasks
    }
    wrong = run_tasks(bfcl, tasks, lambda task: OracleModel(task.data, mode, wrong=True))
    assert {task.id for task, outcome in wrong if outcome.scores["accuracy"] > 0} == INDIFFERENT & {
        task.id for task in tasks
    }
    assert all(outcome.failure for _, outcome in wrong if outcome.scores["accuracy"] == 0)


@pytest.mark.parametrize("mode", package.MODES)
def test_true_answers_are_right_and_changed_ones_wrong(mode: str) -> None:
    check_truth(mode, one_in=20)


@pytest.mark.slow
@pytest.mark.parametrize("mode", package.MODES)
def test_true_answers_are_right_and_changed_ones_wrong_in_all_rows(mode: str) -> None:
    check_truth(mode, one_in=1)


class Mixed:
    """Gives right, wrong, empty and malformed answers, depending on the task."""

    def __init__(self, task: Task):
        self._kind = sum(task.id.encode()) % 6
        self._knowing = OracleModel(task.data, wrong=self._kind in (1, 2))

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
    bfcl = make_suite()
    outcomes = run_tasks(bfcl, sample(bfcl.tasks(), one_in), Mixed)
    recorded: dict[str, list[Any]] = {category: [] for category in rows.CATEGORIES}
    our_ids: dict[str, list[str]] = {category: [] for category in rows.CATEGORIES}
    for task, outcome in outcomes:
        recorded[task.group].append({"id": task.id, "result": outcome.details["result"]})
        if outcome.scores["accuracy"] == 0:
            our_ids[task.group].append(task.id)
    official_ids = official("scores", recorded, folder)
    for category in rows.CATEGORIES:
        assert sorted(our_ids[category]) == sorted(official_ids[category]), category
        if one_in == 1:
            assert 0 < len(our_ids[category]) < len(recorded[category]), category
    assert sum(map(len, our_ids.values())) > len(outcomes) / 5


def official(command: str, data: Any, folder: Path) -> Any:
    """Returns the results of bfcl-eval's own code, in a separate process, because it replaces modules."""
    input_path, out = folder / "input.json", folder / "out.json"
    input_path.write_text(json.dumps(data))
    arguments = [
        sys.executable,
        str(Path(__file__).with_name("bfcl_official.py")),
        command,
        str(input_path),
        str(out),
    ]
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    process = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert process.returncode == 0, process.stderr
    return json.loads(out.read_text())


def test_scores_are_those_of_the_official_evaluator(tmp_path: Path) -> None:
    check_against_official(20, tmp_path)


@pytest.mark.slow
def test_scores_are_those_of_the_official_evaluator_in_all_rows(tmp_path: Path) -> None:
    check_against_official(1, tmp_path)


def check_prompts(categories: Sequence[str], folder: Path) -> None:
    official_prompts = official("prompts", categories, folder)
    our_prompts = {}
    for category in categories:
        for row in rows.read_rows(package.data_folder(), category):
            functions = rows.describe(row.functions, row.language)
            held_back = [function for functions_ in row.held_back.values() for function in functions_]
            first = [dict(message) for message in row.turns[0]]
            if first[0]["role"] == "system":
                first[0]["content"] = f"{system_prompt(functions)}\n\n{first[0]['content']}"
            else:
                first.insert(0, {"role": "system", "content": system_prompt(functions)})
            our_prompts[row.id] = [tools(functions), tools(held_back), first]
    assert our_prompts.keys() == official_prompts.keys()
    assert not [id for id in our_prompts if our_prompts[id] != official_prompts[id]]


def test_prompts_are_those_of_the_official_generator(tmp_path: Path) -> None:
    check_prompts(("simple_java", "simple_javascript", "live_parallel_multiple", "multi_turn_miss_func"), tmp_path)


@pytest.mark.slow
def test_prompts_are_those_of_the_official_generator_in_all_rows(tmp_path: Path) -> None:
    check_prompts(rows.CATEGORIES, tmp_path)


def test_over_http(tmp_path: Path, commands: Commands) -> None:
    """All requests and answers pass through client and server."""
    categories = "simple_python,simple_java,live_multiple,irrelevance,multi_turn_base,multi_turn_miss_func"
    bfcl = make_suite(categories=categories)
    answers: dict[str, Answer] = {}

    def key(messages: Sequence[dict[str, Any]], tools: Any) -> str:
        texts = [message["content"] for message in messages if message["role"] in ("user", "system")]
        answer_count = sum(message["role"] == "assistant" for message in messages)
        return json.dumps([texts, answer_count, [tool["function"]["name"] for tool in tools]])

    class Noted:
        def __init__(self, task: Task):
            self._knowing = OracleModel(task.data)

        async def chat(self, messages: Sequence[dict[str, Any]], tools: Any = None, **options: Any) -> Answer:
            answer = await self._knowing.chat(messages, tools)
            answers[key(messages, tools)] = answer
            return answer

    def reply(handler: Any, request: dict[str, Any]) -> None:
        answer = answers[key(request["messages"], request["tools"])]
        calls = [call(call_.name, call_.arguments, call_.id or "") for call_ in answer.calls]
        says(answer.content, calls or None)(handler, request)

    run_tasks(bfcl, bfcl.tasks()[:60], Noted)
    with serve(reply) as server:
        command = ["--suite", "bfcl", "--base-url", server.url, "--model", "tiny", "--out", tmp_path, "--limit", 60]
        commands.call("xlam_jax.evaluate", *command, "--set", f"categories={categories}")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["scores"] == {"accuracy": 1.0}
    assert summary["scored"] == 60
    assert set(summary["groups"]) == set(categories.split(","))


def test_unparsable_calls_are_counted_in_irrelevance(tmp_path: Path, commands: Commands) -> None:
    """They count as no call, as in bfcl-eval, and the page shows their number. The overall row is 'mean of rows'."""
    with serve(says('[TOOL_CALLS][{"name": "f", "arguments": {'), says("I cannot."), says("[]")) as server:
        command = ["--suite", "bfcl", "--base-url", server.url, "--model", "tiny", "--out", tmp_path, "--report"]
        output = commands.call(
            "xlam_jax.evaluate", *command, "--limit", 6, "--concurrency", 1, "--set", "categories=relevance"
        ).stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    counts = {
        name: (group["unreadable_calls"], group["scores"]["accuracy"]) for name, group in summary["groups"].items()
    }
    assert counts == {"irrelevance": (1, 1.0), "live_irrelevance": (0, 1.0), "live_relevance": (0, 0.0)}
    page = (tmp_path / "report.html").read_text()
    for text in (output, page):
        assert "irrelevance: 1 of 2 answers were meant as calls but cannot be parsed" in html.unescape(text)
        assert "is not the leaderboard's overall number" in html.unescape(text)
    assert output.splitlines()[5].startswith("mean of rows")
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
    bfcl = make_suite(categories="irrelevance", mode="prompt")

    class Says:
        async def chat(self, messages: Any, tools: Any = None, **options: Any) -> Answer:
            return Answer(list(messages), text, (), "stop")

    ((_, outcome),) = run_tasks(bfcl, bfcl.tasks()[:1], lambda _: Says())
    assert outcome.details["unreadable_calls"] == meant


def test_an_endless_turn_is_ended() -> None:
    bfcl = make_suite(categories="multi_turn_base")
    task = bfcl.tasks()[1]  # its first turn asks for ls

    class EndlessModel:
        request_count = 0

        async def chat(self, messages: Any, tools: Any = None, **options: Any) -> Answer:
            self.request_count += 1
            return Answer(list(messages), "", (ToolCall("1", "ls", {}),), "tool_calls")

    model = EndlessModel()
    ((_, outcome),) = run_tasks(bfcl, [task], lambda _: model)
    assert (outcome.scores["accuracy"], outcome.failure) == (0, "steps-used-up")
    assert model.request_count == package.prompts().MAXIMUM_STEP_LIMIT + 1


def test_results_are_returned_and_the_world_is_deleted() -> None:
    bfcl = make_suite(categories="multi_turn_miss_func")
    task = bfcl.tasks()[0]
    oracle = OracleModel(task.data)
    ((_, first),) = run_tasks(bfcl, [task], lambda _: oracle)
    results = [message for message in first.messages if message["role"] == "tool"]
    assert json.loads(results[0]["content"])["current_working_directory"] == "document"
    assert results[0]["tool_call_id"] == "call_0"
    before, after = oracle.requests[0][1], oracle.requests[-1][1]
    held_back = task.data.raw["missed_function"]["3"]
    names = [[tool["function"]["name"] for tool in offered] for offered in (before, after)]
    assert [name for name in names[1] if name not in names[0]] == held_back
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils

    assert not [name for name in vars(multi_turn_utils) if name.startswith("world")]
    ((_, again),) = run_tasks(bfcl, [task], lambda task: OracleModel(task.data))
    assert again.details == first.details


def test_answers_are_never_executed() -> None:
    methods = {"cd", "echo"}
    assert to_source(("cd", {"folder": "a'b\"(c)"}), methods) == "cd(folder='a\\'b\"(c)')"
    assert to_source(("ls", {}), methods) == "ls()"  # the model receives the error that it does not exist
    assert to_source(("power", {"base": 9, "exponent": 3_000_000_000}), {"power"}) == "too_large()"
    assert (
        to_source(("power", {"base": 9, "exponent": {"power": {"base": 9, "exponent": 9}}}), {"power"}) == "too_large()"
    )
    assert to_source(("power", {"base": -2, "exponent": 10}), {"power"}) == "power(base=-2,exponent=10)"
    for name in ("open", "__import__", "exec", "importlib", "inspect.os.system", "cd(__import__('os'))", "", "x;y"):
        assert to_source((name, {"a": 1}), methods) == "unknown_function()"
    for key in ("folder=open('x')", "a b", "", "lambda"):
        assert to_source(("cd", {key: 1}), methods) == "unknown_argument()"
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
        for row in rows.read_rows(package.data_folder(), category)[:40]:
            for tool in tools(rows.describe(row.functions, row.language)):
                assert "." not in tool["function"]["name"]
                check_types(tool["function"]["parameters"])


def check_types(schema: Any) -> None:
    assert schema["type"] in ("object", "array", "string", "integer", "number", "boolean")
    for nested in schema.get("properties", {}).values():
        check_types(nested)
    if "items" in schema:
        check_types(schema["items"])


def test_a_limit_covers_all_categories() -> None:
    tasks = make_suite(categories="simple_python,live,multi_turn_base").tasks()
    assert len({task.group for task in tasks[:8]}) == 8
    assert len({task.id for task in tasks}) == len(tasks)


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no 'simple_pyton'.*did you mean 'simple_python'"):
        make_suite(categories="simple_pyton")
    with pytest.raises(UserError, match="'memory_kv' needs external services"):
        make_suite(categories="memory_kv")
    with pytest.raises(UserError, match=r"mode: there is no 'promt'.*did you mean 'prompt'"):
        make_suite(mode="promt")
    with pytest.raises(UserError, match=r"contains no BFCL_v4_simple_python\.json"):
        Bfcl(Options(data=tmp_path))
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bfcl-eval, which is not installed; run `make eval`"):
        make_suite()


def test_other_users_import_the_original_package() -> None:
    make_suite()
    package.check_calls([], [], [], "simple_python", "python", "fc")
    assert "bfcl_eval.constants.model_config" not in sys.modules
    assert "bfcl_eval.eval_checker.ast_eval.ast_checker" not in sys.modules
    assert "bfcl_eval.constants.eval_config" not in sys.modules  # importing it creates folders
