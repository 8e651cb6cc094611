"""The importers of ToolBench's answer trees and of APIBench, and the Python literals that both read."""

import contextlib
import copy
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conversions import run, turns
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from xlam_jax.data import literals, pairs
from xlam_jax.data.converters import apibench, row_converter, toolbench
from xlam_jax.data.converters.common import Repaired, StepDropped
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.trajectory import InvalidTrajectory, to_dict
from xlam_jax.data.validate import check_row
from xlam_jax.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
ANSWERS = FIXTURES / "toolbench" / "G1_answer"
WON, LOST = (ANSWERS / f"{query}_ChatGPT_DFS_woFilter_w2.json" for query in (57, 69))
QUERIES = FIXTURES / "toolbench" / "instruction" / "G1_query.json"
APIBENCH = FIXTURES / "apibench.json"
SETTINGS = settings(max_examples=80, deadline=None, derandomize=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def node(kind: str, text: str, *children: dict, **keys: Any) -> dict:
    return {"node_type": kind, "description": text, "children": list(children), **keys}


def step(name: str, arguments: str, *children: dict, **keys: Any) -> dict:
    """An action and its input; the result names the call."""
    return node(
        "Action",
        name,
        node("Action Input", arguments, *children, observation=f"{name}({arguments})", **keys),
    )


def tree(*children: dict, functions: list | None = None, **answer: Any) -> dict:
    """A row: an answer tree over the function `look`, which takes a number `n` and a text `q`."""
    properties = {"n": {"type": "integer"}, "q": {"type": "string"}}
    look = {"name": "look", "parameters": {"type": "object", "properties": properties, "required": []}}
    answer = {"query": " Look! ", "function": [look] if functions is None else functions, **answer}
    return {"tree": {"tree": node("Action Input", "", *children)}, "answer_generation": answer}


def convert(row: dict) -> list:
    return list(toolbench.convert_row(row, "t"))


def test_toolbench():
    kept, dropped, repaired = run("toolbench", WON, LOST, QUERIES)
    assert [(t.id.removeprefix("toolbench_"), t.score) for t in kept] == [
        *[("G1_57_3", 1.0), ("G1_57_0", 0.0), ("G1_57_1", 0.0), ("G1_57_2", 0.0)],
        *[(f"G1_69_{leaf}", 0.0) for leaf in (0, 3, 4, 5, 6, 7)],
    ]
    assert Counter(dropped) == {
        ("step", 1, "undeclared-tool"): 12,
        ("trajectory", 1, "undeclared-tool"): 3,
        ("trajectory", 1, "no-answer-tree"): 1,
    }
    assert not repaired
    won = kept[0]
    assert won.task_instruction.startswith("You are AutoGPT,")
    assert kept[4].task_instruction == toolbench.INSTRUCTION
    recorded = json.loads(WON.read_text())["answer_generation"]["function"]
    assert [tool["function"] for tool in won.tools] == recorded
    assert recorded[-1]["name"] == "Finish"
    user, products, _, news, error, search, _, finish = turns(won)
    assert user[0] == "user"
    assert user[1].startswith("I'm interested in learning more")
    assert user[1].endswith("related to the iPhone 14. Thank you!")
    assert products == ("assistant", "", ("products_for_seo_api", {"query": "latest iPhone 14"}))
    assert news == ("assistant", "", ("news_for_seo_api", {"query": "iPhone 14"}))
    assert error[:1] == ("tool",)
    assert error[1].startswith('{"error": "Message error..."')
    assert search[1].startswith("Based on the current state, the previous action")
    assert search[2] == ("search_b_for_seo_api", {"query": "iPhone 14 news"})
    assert finish[1].startswith("I apologize, but it seems")
    assert finish[2][0] == "Finish"
    assert finish[2][1]["return_type"] == "give_answer"
    assert turns(kept[1])[-1][2:] == (("Finish", {"return_type": "give_up_and_restart"}),)


def test_paths_of_a_task_make_pairs(tmp_path):
    kept, _, _ = run("toolbench", WON)
    contexts = {json.dumps([t.task_instruction, t.tools, turns(t)[0]]) for t in kept}
    assert len(contexts) == 1
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(to_dict(trajectory)) + "\n" for trajectory in kept))
    report = pairs.write([rows], tmp_path / "pairs.jsonl")
    assert (report["pairs"], report["tasks"]) == (3, 1)
    # after news_for_seo_api failed: search_b_for_seo_api won, search_for_seo_api did not
    assert report["turns_shared_after_the_context"] == {4: 3}


@pytest.mark.parametrize(("name", "paths"), [("toolbench", [WON, LOST]), ("apibench", [APIBENCH])])
def test_calls_fit_their_tools(name, paths):
    kept, _, _ = run(name, *paths)
    assert len({trajectory.id for trajectory in kept}) == len(kept)
    for trajectory in kept:
        assert (trajectory.source, trajectory.conversation[-1].role) == (name, "assistant")
        assert parse_trajectory(to_dict(trajectory)) == trajectory
        assert list(check_row(to_dict(trajectory))) == []
        for tool in trajectory.tools:
            Draft202012Validator.check_schema(tool["function"]["parameters"])


def test_thoughts_results_and_finish():
    thoughts = node("Thought", " a ", node("Thought", "b", step("look", "{}", step("Finish", "{}", finished=True))))
    (row,) = convert(tree(thoughts))
    assert row["conversation"] == [
        {"role": "user", "content": "Look!"},
        {"role": "assistant", "content": "a\n\nb", "tool_calls": [toolbench.call(1, "look", {})]},
        {"role": "tool", "tool_call_id": "call_1", "name": "look", "content": "look({})"},
        {"role": "assistant", "content": "", "tool_calls": [toolbench.call(2, "Finish", {})]},
    ]
    assert (row["score"], row["unique_trajectory_id"]) == (1.0, "toolbench_t_0")
    assert row["tools"][-1] == toolbench.FINISH
    (row,) = convert(tree(step("look", "{}", node("Thought", "I give up."))))
    assert row["conversation"][-1] == {"role": "assistant", "content": "I give up."}
    assert row["score"] == 0.0


@pytest.mark.parametrize(
    ("text", "arguments", "reasons"),
    [
        ('{"n": 1}', {"n": 1}, []),
        ("", {}, ["missing-arguments"]),
        ('{"n": 1} I hope so.', {"n": 1}, ["trailing-text-after-json"]),
        ('{"q": "a\nb\tc\\"\x01"}', {"q": 'a\nb\tc"\x01'}, ["raw-control-character"]),
        ('{"q": "a\nb"} So.', {"q": "a\nb"}, ["trailing-text-after-json", "raw-control-character"]),
        ("{'n': -1, 'q': \"it's\",}", {"n": -1, "q": "it's"}, ["python-literal"]),
        ("{'a': [True, None, 1.5, (2,)], 'b': {'c': true}}", {"a": [True, None, 1.5, [2]], "b": {"c": True}}, ["python-literal"]),  # noqa: E501
        ('{"n": "12", "q": "12"}', {"n": 12, "q": "12"}, ["text-for-declared-type"]),
    ],
)  # fmt: skip
def test_arguments(text, arguments, reasons):
    *notes, row = convert(tree(step("look", text)))
    assert row["conversation"][-1]["tool_calls"][0]["function"]["arguments"] == arguments
    assert all(isinstance(note, Repaired) for note in notes)
    assert [note.reason for note in notes] == reasons


@pytest.mark.parametrize(
    "text",
    [
        '{"n": 1',
        '{"n": 1} {"n": 2}',
        "[1]",
        "{'n': 1, 'n': 2}",
        '{"n": NaN}',
        "{'n': n}",
        "{'n': 1e999}",
        "{'n': 1j}",
        "{1: 2}",
        "{**a}",
        "look(1)",
        '{"q": "' + '\\"' * 200_000,
        "{'n': 0x" + "f" * 6000 + "}",
        "{'n': -" + "9" * 4200 + "}",
        "-" * 90_000 + "1",
        "[" * 90_000,
    ],
)
def test_arguments_that_can_not_be_read(text):
    (invalid,) = convert(tree(step("look", text)))
    assert isinstance(invalid, InvalidTrajectory)
    assert invalid.reason == "bad-arguments"
    thought = node("Thought", "lost", step("look", text, step("look", '{"n": 2}')))
    dropped, row = convert(tree(thought))
    assert isinstance(dropped, StepDropped)
    assert dropped.reason == "bad-arguments"
    assert len(row["conversation"]) == 2
    assert row["conversation"][1]["content"] == ""


def test_failing_paths_are_few_and_distinct():
    near = [step("look", json.dumps({"n": n})) for n in range(3)]
    far = [step("look", json.dumps({"n": n})) for n in range(100, 100 + toolbench.FAILING)]
    win = step("Finish", "{}", finished=True)
    items = convert(tree(*far, step("look", '{"q": "w"}', *near, copy.deepcopy(near[0]), win, copy.deepcopy(win))))
    rows = [item for item in items if isinstance(item, dict)]
    first = toolbench.FAILING
    assert [int(row["unique_trajectory_id"].split("_")[-1]) for row in rows] == [
        first + 4,  # the winner
        *range(first, first + 3),  # what shares its first call
        *range(toolbench.FAILING - 3),
    ]
    assert Counter(item.reason for item in items if isinstance(item, InvalidTrajectory)) == {
        "same-path": 2,
        "too-many-failing-paths": 3,
    }
    assert [row["score"] for row in rows] == [1.0] + [0.0] * toolbench.FAILING


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "missing-field"),
        ({"query": "a", "api_list": []}, "no-answer-tree"),
        ({"tree": {"tree": {"children": 1}}}, "bad-tree"),
        (tree(), "bad-tree"),
        (tree(step("look", "{}"), functions=[{}]), "missing-field"),
        (tree(step("look", "{}"), functions=[{"name": "a"}, {"name": "a"}]), "duplicate-tool"),
        (tree(step("look", "{}"), functions=[{"name": "a", "parameters": 1}]), "bad-tools"),
        (tree(step("look", "{}"), functions=[{"name": "a", "parameters": {"properties": []}}]), "bad-tools"),
    ],
)
def test_rows_that_can_not_be_converted(row, reason):
    with pytest.raises(InvalidTrajectory) as error:
        convert(row)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        (node("Action", "look"), "call-without-input"),
        (node("Action", "look", node("Thought", "a")), "bad-tree"),
        (node("Action Input", "{}"), "bad-tree"),
        (node("Plan", "a"), "bad-tree"),
        (step("other", "{}"), "undeclared-tool"),
    ],
)
def test_a_bad_path_leaves_the_others(child, reason):
    invalid, row = convert(tree(child, step("look", "{}")))
    assert isinstance(invalid, InvalidTrajectory)
    assert invalid.reason == reason
    assert row["unique_trajectory_id"] == "toolbench_t_1"


def test_files(tmp_path):
    row = tree(step("look", "{}"))
    lines = tmp_path / "answers.jsonl.gz"
    lines.write_bytes(gzip.compress(f"{json.dumps(row)}\n{json.dumps(row)}\n".encode()))
    named = tmp_path / "G2" / "7_x.json"
    named.parent.mkdir()
    named.write_text("\ufeff " + json.dumps(row))
    broken, other = tmp_path / "1_cut.json", tmp_path / "number.json"
    broken.write_text(json.dumps(row)[:-5])
    other.write_text("3")
    kept, dropped, _ = run("toolbench", lines, named, broken, other)
    assert [t.id for t in kept] == [f"toolbench_{name}_0" for name in ("answers_1", "answers_2", "G2_7")]
    assert dropped == [("trajectory", 1, "malformed-json"), ("trajectory", 1, "not-an-object")]
    with pytest.raises(UserError, match="cannot be read"):
        run("toolbench", tmp_path / "none.json")


def test_a_document_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(toolbench, "LONGEST_ROW", 1 << 20)
    path = tmp_path / "1_x.json"
    path.write_text('{"tree": "' + "a" * (1 << 20) + '"}')
    with pytest.raises(UserError, match="more than 1 MiB in one object"):
        run("toolbench", path)


def test_apibench():
    kept, dropped, repaired = run("apibench", APIBENCH)
    assert dropped == [
        ("trajectory", 2, "placeholder-argument"),
        ("step", 3, "explanation-of-another-call"),
        ("trajectory", 4, "missing-argument"),
        ("trajectory", 8, "no-answer"),
    ]
    assert repaired == {"nameless-after-named": 1}
    assert [t.id for t in kept] == [f"apibench_apibench_{row}" for row in (1, 3, 5, 6, 7)]
    assert all(t.tools == [apibench.TOOL] for t in kept)
    depth, mobile, fashion, birds, speech = map(turns, kept)
    assert depth == [
        (
            "user",
            "I need an API that can estimate the relative depth of objects from a single image. The output should be "
            "an inverse depth map.",
        ),
        (
            "assistant",
            "Load the pretrained MiDaS model for estimating relative depth from a single image, which outputs an "
            "inverse depth map.",
            ("torch_hub_load", {"repo_or_dir": "intel-isl/MiDaS", "model": "DPT_Hybrid", "pretrained": True}),
        ),
    ]
    assert mobile[1][1] == ""
    assert mobile[1][2][1]["model"] == "proxylessnas_cpu"
    assert list(fashion[1][2][1].items()) == [
        ("repo_or_dir", "szq0214/MEAL-V2"),
        ("model", "meal_v2"),
        ("args", ["mealv2_resnest50"]),
        ("pretrained", True),
    ]
    assert birds[1][2][1] == {
        "repo_or_dir": "nicolalandro/ntsnet-cub200",
        "model": "ntsnet",
        "pretrained": True,
        "topN": 6,
        "device": "cpu",
        "num_classes": 200,
    }
    assert speech[0][1].splitlines() == [
        'How can we convert spoken text "The weather is nice today. Should we go for a walk?" into speech using a deep '
        "learning model?",
        "The weather is nice today. Should we go for a walk?",
    ]


CODE = (
    "{'Instruction': 'It\\'s me.', 'Output': {'api_call': \"torch.hub.load('a/b', 'c')\", 'explanation': \"It's c.\"}}"
)


def test_apibench_quotes_and_a_missing_input():
    row = {"code": CODE, "api_call": "torch.hub.load('a/b', 'c')"}
    (unified,) = apibench.convert_row(row, "t")
    assert isinstance(unified, dict)
    user, assistant = unified["conversation"]
    assert (user["content"], assistant["content"]) == ("It's me.", "It's c.")
    row["code"] = CODE.replace(", 'Output'", ", 'Input': '<noinput>', 'Output'")
    (unified,) = apibench.convert_row(row, "t")
    assert isinstance(unified, dict)
    assert unified["conversation"] == [user, assistant]


HEADINGS = (
    "###Instruction: It's me.\n{}###Output: {{'domain': 'x', 'api_call': 'm = torch.hub.load('a/b', 'c')', "
    "'api_provider': 'PyTorch', 'explanation': 'It is c.', 'code': 'import torch'}}\n"
)


@pytest.mark.parametrize(("input_text", "expected"), [("", "It's me."), ("###Input: A photo.\n", "It's me.\nA photo.")])
def test_apibench_with_headings(input_text, expected):
    """The layout of the evaluation file."""
    row = {"code": HEADINGS.format(input_text), "api_call": "torch.hub.load(repo_or_dir='a/b', model='c')"}
    (unified,) = apibench.convert_row(row, "t")
    assert isinstance(unified, dict)
    user, assistant = unified["conversation"]
    assert (user["content"], assistant["content"]) == (expected, "It is c.")
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"repo_or_dir": "a/b", "model": "c"}


@pytest.mark.parametrize(
    "rest", [" " * 1_000_000, "}" * 1_000_000, ("'" + " " * 1000) * 1000, "'explanation': '" * 50_000]
)
def test_apibench_explanations_take_linear_time(rest):
    row = {
        "code": f"{{'Instruction': q, 'Output': 'torch.hub.load('a/b', 'c')', 'explanation': 'e'{rest}x",
        "api_call": "torch.hub.load('a/b', 'c')",
    }
    (unified,) = apibench.convert_row(row, "t")
    assert isinstance(unified, dict)
    assert unified["conversation"][1]["content"] == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("torch.hub.load('a/b', 'c'", "bad-call"),
        ("torch.hub.load", "unknown-function"),
        ("torch.hub.list('a/b')", "unknown-function"),
        ("torch.hub.load('a/b', 'c')('d')", "unknown-function"),
        ("torch.hub.load('a/b', 'c', model='d')", "bad-call"),
        ("torch.hub.load('a/b', 'c', **{'model': 'd'})", "bad-call"),
        ("torch.hub.load('a/b', 'c', **[1])", "placeholder-argument"),
        ("torch.hub.load('a/b', c)", "placeholder-argument"),
        ("torch.hub.load(*'ab')", "placeholder-argument"),
        ("torch.hub.load('a/b', 1)", "missing-argument"),
        ("a." * 40_000 + "b", "bad-call"),
    ],
)
def test_apibench_calls_that_can_not_be_read(text, reason):
    with pytest.raises(InvalidTrajectory) as error:
        list(apibench.convert_row({"code": CODE, "api_call": text}, "t"))
    assert error.value.reason == reason


def test_apibench_rows_that_can_not_be_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"code": "x", "api_call": "torch.hub.load()"}\n\n[]\n{"code": 1}\n{\n')
    assert run("apibench", path)[1] == [
        ("trajectory", row, reason)
        for row, reason in [(1, "no-instruction"), (3, "not-an-object"), (4, "missing-field"), (5, "malformed-json")]
    ]


@given(JSON)
@SETTINGS
def test_python_s_notation_of_json_is_read(value):
    assert literals.value(literals.expression(repr(value))) == value


@given(st.text(max_size=40) | st.text("[]{}()'\":,-1ae.*\\\n", max_size=40))
@example("'\\d'")
@example("\x00")
@example("0x" + "f" * 6000)
@example("-" + "9" * 400)
@example("[1e999, -1e999]")
@SETTINGS
def test_any_text_is_a_literal_or_none(text):
    try:
        value = literals.value(literals.expression(text))
    except ValueError:
        return
    json.dumps(value, allow_nan=False)


def places(value: object, at: tuple = ()) -> list[tuple]:
    """Returns the path to everything in a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in [(*at, key), *places(inner, (*at, key))]]


ROWS = {
    "toolbench": [
        tree(node("Thought", "a", step("look", '{"n": "1"}', step("Finish", "{}", finished=True)), step("no", "{}"))),
        tree(step("look", "{'n': 1}"), step("look", '{"q": "\n"}', node("Thought", "b"))),
    ],
    "apibench": [json.loads(line) for line in APIBENCH.read_text().splitlines()],
}


@pytest.mark.parametrize("name", ROWS)
@given(data=st.data())
@SETTINGS
def test_any_row_is_converted_or_named(name, data):
    row = copy.deepcopy(data.draw(st.sampled_from(ROWS[name])))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places(row)))
        holder = row
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = data.draw(JSON)
    check(name, row)


@pytest.mark.parametrize("name", ROWS)
@given(
    row=st.dictionaries(st.sampled_from(["tree", "answer_generation", "query", "code", "api_call"]) | st.text(), JSON)
)
@SETTINGS
def test_any_object_is_converted_or_named(name, row):
    check(name, row)


def check(name: str, row: dict) -> None:
    """Nothing but `InvalidTrajectory` is raised, and what is made of the row can be read or not for a reason."""
    convert_row = row_converter(name)
    assert convert_row is not None
    with contextlib.suppress(InvalidTrajectory):
        items = list(convert_row(row, "t"))
        assert any(isinstance(item, dict | InvalidTrajectory) for item in items)
        for item in items:
            if isinstance(item, dict):
                parse_trajectory(item)
