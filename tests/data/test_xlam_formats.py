"""AgentOhana, and what it shares with train-ready rows and xlam-function-calling-60k: any row, the command line."""

import json
from pathlib import Path

import pytest
from conversions import export
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import JSON, broken
from xlam_formats import FIXTURES, rows_of

from converters.trajectories.__main__ import main
from xlam_jax.data.converters import converter, row_converter
from xlam_jax.data.converters import webshop as shop
from xlam_jax.data.converters.common import Converted, convert_one
from xlam_jax.data.rows import Row
from xlam_jax.data.trajectory import Message, ToolCall


def test_agentohana_fixture(convert):
    kept, dropped, repairs = convert("agentohana", *rows_of("agentohana"))
    bought, answered, text = kept
    assert dropped == [(1, "step", "invalid-action")]
    assert repairs == []
    assert [each.score for each in kept] == [1.0, 4.5, 0.0]
    assert [each.source for each in kept] == ["webshop", "hotpotqa", None]
    assert (bought.tools, bought.task_instruction) == (shop.TOOLS, shop.INSTRUCTION)
    assert bought.conversation == (
        Message("user", "perfume under $40"),
        Message("assistant", "", (ToolCall("call_1", "search", {"query": "perfume"}),)),
        Message("tool", "[Back to Search] [B08X] Rose 30 ml [B09Y] Oud 50 ml", (), "call_1", "search"),
        Message("assistant", "The rose one is cheap.", (ToolCall("call_2", "click", {"element": "B08X"}),)),
        Message("tool", "Rose 30 ml, $19.00 [Buy Now]", (), "call_2", "click"),
        Message("assistant", "", (ToolCall("call_3", "click", {"element": "Buy Now"}),)),
    )
    assert answered.conversation[1::2] == (
        Message("assistant", "I search the city.", (ToolCall("call_1", "search", {"query": "Graz"}),)),
        Message("assistant", "That is it.", (ToolCall("call_2", "finish", {"answer": "Mur"}),)),
    )
    assert text.tools == []
    assert [(turn.role, turn.content) for turn in text.conversation] == [
        ("user", "Put a clean mug on the desk."),
        ("assistant", "go to desk 1"),
        ("user", "On the desk 1, you see a mug 2."),
        ("assistant", "take mug 2 from desk 1"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Action: search[perfume]\n", "Action: search[soap]\n", "lacks the output of step 0: 'search[perfume]'"),
        ("Oud 50 ml", "Oud 60 ml", "lacks the observation of step 0"),
        (
            "\nAction: search[perfume]\n",
            "\nHurry! Action: search[perfume]\n",
            "has text before the output of step 0: 'Hurry!",
        ),
        ("Oud 50 ml", "Oud 50 ml Well?", "ends in 'Well?'"),
    ],
)
def test_inputs_that_differ_are_named(old, new, message):
    row = rows_of("agentohana")[0]
    convert_row = row_converter("agentohana")
    assert convert_row
    row["steps"][1]["input"] = row["steps"][1]["input"].replace(old, new)
    *_, item = convert_one(Path("x.jsonl"), 1, row, convert_row)
    assert isinstance(item, Converted)
    (repair,) = item.repairs
    assert repair.reason == "history-differs"
    assert repair.detail.startswith(f"the input of step 1 {message}")


def test_agentohana_variants(convert):
    row = rows_of("agentohana")[0]
    steps = row["steps"]
    expected = convert("agentohana", row)[0][0].conversation
    kept, _, repairs = convert("agentohana", row | {"steps": steps[::-1]})
    assert (kept[0].conversation, repairs) == (expected, ["steps-out-of-order"])
    underscored = json.loads(json.dumps(row).replace("next observation", "next_observation"))
    assert convert("agentohana", underscored)[0][0].conversation == expected
    # another task in a later input
    other = [steps[0], steps[1] | {"input": "Another task."}]
    assert convert("agentohana", row | {"steps": other})[1] == [(1, "trajectory", "inconsistent-input")]
    # an action of an unknown environment: everything stays text, also without inputs
    bare = [{"output": "Action: search[a]", "next observation": "x"}, {"output": "Action: fly[b]"}]
    (kept,), dropped, _ = convert("agentohana", {"user query": "q", "steps": bare, "score": None})
    assert [turn.content for turn in kept.conversation] == ["q", "Action: search[a]", "x", "Action: fly[b]"]
    assert (kept.tools, dropped) == ([], [])
    # searches alone fit two environments; the prompt or the source decides
    alone = {"user query": "q", "steps": [{"output": "search[a]"}]}
    assert convert("agentohana", alone)[0][0].tools == []
    assert convert("agentohana", alone | {"source": "hotpotqa"})[0][0].conversation[1].tool_calls
    alone["steps"][0]["input"] = "q; use search[x] or click[x]"
    assert convert("agentohana", alone)[0][0].source == "webshop"
    # thoughts as steps of their own
    thinking = [{"output": "Action: think[Soap.]", "next observation": "OK."}, {"output": "Action: click[a]"}]
    (kept,), _, _ = convert("agentohana", {"user query": "q", "steps": [*thinking, thinking[0]]})
    assert kept.conversation[1].content == "Soap."
    for change, reason in (
        ({"steps": []}, "no-assistant-turn"),
        ({"steps": [3]}, "missing-field"),
        ({"steps": [{"output": 3}]}, "missing-field"),
        ({"user query": 3}, "missing-field"),
        ({"user query": None, "steps": [{"output": "a"}]}, "missing-field"),
        ({"score": "good"}, "bad-score"),
    ):
        assert convert("agentohana", row | change)[1][-1] == (1, "trajectory", reason), change
    # a source that is named after the shop, with steps that are not actions
    shop_row = {
        "user query": "q",
        "source": "webshop",
        "steps": [{"output": "buy", "next observation": "Invalid action!"}],
    }
    assert [reason for *_, reason in convert("agentohana", shop_row)[1]] == ["no-assistant-turn"]
    shop_row["steps"].append({"input": "p", "output": "look around"})
    (kept,), dropped, _ = convert("agentohana", shop_row)
    assert [turn.content for turn in kept.conversation] == ["q", "look around"]
    assert dropped == [(1, "step", "invalid-action")]
    assert convert("agentohana", {"user query": "q", "steps": [{"input": "p", "output": "a"}]})[2] == [
        "query-not-in-input"
    ]


def test_long_turns_take_linear_time():
    agent = row_converter("agentohana")
    assert agent
    for text in (" " * 2_000_000, "Thought:" * 200_000, "Action: search[" * 200_000, "Action " * 300_000):
        steps = [{"input": text + "q", "output": text + "x", "next observation": text}] * 2
        assert list(convert_one(Path("x.jsonl"), 1, {"user query": "q", "steps": steps}, agent))


# All of them


FORMATS = ("agentohana", "train_ready", "xlam60k")


@pytest.mark.parametrize("name", FORMATS)
def test_whatever_the_row_nothing_else_is_raised(name, monkeypatch):
    start = rows_of(name)[0]

    def rows(candidates):
        return (Row(number, number, row) for number, row in enumerate(candidates, start=1))

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.nested_given])
    @given(st.lists(broken(start) | st.dictionaries(st.sampled_from(sorted(start)), JSON), min_size=1, max_size=2))
    def check(candidates):
        monkeypatch.setattr("xlam_jax.data.converters.train_ready.read_rows", lambda path: rows(candidates))
        monkeypatch.setattr("xlam_jax.data.converters.common.read_rows", lambda path: rows(candidates))
        items = list(converter(name)([Path("rows.jsonl")]))
        assert {item.row for item in items} == set(range(1, len(candidates) + 1))
        for item in items:
            if isinstance(item, Converted):
                for target in ("train_ready", "xlam60k"):
                    export(target, item.trajectory)

    check()


@pytest.mark.parametrize("target", ["unified", "openai", "sharegpt", "train_ready", "xlam60k"])
@pytest.mark.parametrize("name", FORMATS)
def test_command_line(name, target, tmp_path, capsys):
    source, out = FIXTURES / f"{name}.jsonl", tmp_path / "out.jsonl"
    main(["--format", name, "--to", target, "--in", str(source), "--out", str(out)])
    assert out.read_text(encoding="utf-8").endswith("}\n")
    assert f"{len(rows_of(name))} rows read" in capsys.readouterr().out
