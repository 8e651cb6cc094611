"""Requests from held-out trajectories: asked with the tokens of training, answered, and scored."""

import json
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from support import ROOT

from xlam_jax.data.parse import parse_trajectory, read_jsonl
from xlam_jax.data.render import render_prompt, sequences
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.data.trajectory import InvalidTrajectory, ToolCall, Trajectory
from xlam_jax.evaluate import next_call
from xlam_jax.evaluate.next_call import Request, Score

QUICKSTART = ROOT / "examples/quickstart"
SOURCES = ("webshop", "hotpotqa", "seal_tools", "hammer")
Samples = list[tuple[str, Trajectory]]


@pytest.fixture(scope="module")
def samples() -> Samples:
    """A part of each bundled source."""
    rows = [(name, row) for name in SOURCES for _, row in list(read_jsonl(QUICKSTART / f"{name}.jsonl"))[:25]]
    return rows  # type: ignore[return-value]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def calling(name: str, arguments: dict[str, Any], content: str = "", **more: Any) -> dict[str, Any]:
    call = {"type": "function", "id": "call_1", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call], **more}


def made(*turns: dict[str, Any], id: str = "made", **more: Any) -> Trajectory:
    tools = [tool("weather", city={"type": "string"}), tool("sum", a={"type": "number"})]
    return parse_trajectory({"unique_trajectory_id": id, "tools": tools, "conversation": list(turns), **more})


USER = {"role": "user", "content": "Weather in Oslo?"}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "3 °C"}
SYSTEM = made(
    {"role": "system", "content": "Be brief."},
    USER,
    calling("weather", {"city": "Oslo"}),
    RESULT,
    calling("sum", {"a": 1}),
    RESULT,
    {"role": "assistant", "content": "3 °C."},
    task_instruction="Help with the weather.",
)


@pytest.mark.parametrize(
    ("format", "name"),
    [("xlam", "quickstart"), ("xlam", "mistral:v1"), ("xlam_v1", "quickstart"), ("native", "mistral:v3")],
)
def test_prompts_are_what_training_reads_and_a_perfect_answer_scores_all(samples: Samples, format: str, name: str):
    tokenizer = load_tokenizer(str(QUICKSTART / "tokenizer") if name == "quickstart" else name)
    trained: dict[tuple[str, int], tuple[list[int], list[int]]] = {}
    known: Samples = []
    for source, trajectory in [*samples, ("made", SYSTEM)]:
        try:
            rendered = [one for _, one in sequences(trajectory, tokenizer, format)]
        except InvalidTrajectory:  # a thought beside calls, which Mistral's own format cannot write
            continue
        known.append((source, trajectory))
        for one in rendered:
            ids = one.input_ids.tolist()
            for turn in {span.turn for span in one.spans if span.weight}:
                mine = [span for span in one.spans if span.turn == turn and span.weight]
                trained[trajectory.id, turn] = ids[: mine[0].start], ids[mine[0].start : mine[-1].end]
    requests = list(next_call.requests(known))
    assert {one.source for one in requests} == {source for source, _ in known} >= {"hammer", "made"}
    asked, left_out = next_call.prompts(requests, tokenizer, format, longest=10**6, count=10**6)
    assert [one.request for one in asked] == requests
    assert not left_out
    for request, prompt in asked:
        assert prompt == trained[request.id, request.turn][0], request.id
        assert prompt == render_prompt(request.messages, request.tools, tokenizer, format)
    recorded = [trained[request.id, request.turn][1] for request in requests]
    answers = next_call.answer(asked, lambda _: recorded, tokenizer)
    assert {one.score for one in answers} == {Score(True, True, True, True)}
    assert {one.completion.finish_reason for one in answers} == {"tool_calls"}


def test_requests_follow_from_ids_alone(samples: Samples):
    requests = list(next_call.requests(samples))
    assert [one.source for one in requests[:8]] == list(SOURCES) * 2
    assert Counter(one.source for one in requests)["webshop"] == 25
    shuffled = samples.copy()
    random.Random(0).shuffle(shuffled)
    again = list(next_call.requests(sorted(shuffled, key=lambda one: SOURCES.index(one[0]))))
    assert again == requests
    assert [one.id for one in requests if one.source == "webshop"] != [one.id for _, one in samples[:25]]
    assert len({one.turn for one in requests if one.source == "webshop"}) > 3
    by_id = {trajectory.id: trajectory for _, trajectory in samples}
    for one in requests:
        assert one.expected == by_id[one.id].conversation[one.turn].tool_calls


def test_turns_that_are_asked_for():
    assert next_call.turns(SYSTEM) == [2, 4]
    unlearned = made(USER, calling("weather", {"city": "Oslo"}, loss=False), RESULT, calling("sum", {"a": 1}))
    assert next_call.turns(unlearned) == [3]
    spoken = made(USER, {"role": "assistant", "content": "I look."}, calling("weather", {"city": "Oslo"}))
    assert next_call.turns(spoken) == []  # nobody waits for an answer there
    assert list(next_call.requests([("made", spoken), ("made", unlearned)])) == [
        next_call.request("made", unlearned, 3)
    ]
    first = next_call.request("made", SYSTEM, 2)
    assert first.messages == [
        {"role": "system", "content": "Help with the weather."},
        {"role": "system", "content": "Be brief."},
        USER,
    ]
    json.dumps(first.messages)


def scored(*calls: tuple[str, dict[str, Any]], expected: tuple[tuple[str, dict[str, Any]], ...]) -> str:
    """The shares that are met, by their first letters."""
    request = next_call.request("made", SYSTEM, 2)
    request = request._replace(expected=tuple(ToolCall("1", *call) for call in expected))
    score = next_call.score(request, tuple(ToolCall(None, *call) for call in calls))
    return "".join(name[0] for name, met in score._asdict().items() if met)


OSLO, ROME = ("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})


def test_scores():
    assert scored(OSLO, expected=(OSLO,)) == "psre"
    assert scored(ROME, expected=(OSLO,)) == "psr"
    assert scored(("weather", {"city": 1}), expected=(OSLO,)) == "pr"
    assert scored(("weather", {"city": "Oslo", "unit": "C"}), expected=(OSLO,)) == "pr"
    assert scored(("weather", {}), expected=(OSLO,)) == "pr"
    assert scored(("forecast", {"city": "Oslo"}), expected=(OSLO,)) == "p"
    assert scored(("sum", {"a": 1}), expected=(OSLO,)) == "ps"
    assert scored(expected=(OSLO,)) == ""
    assert next_call.score(next_call.request("made", SYSTEM, 2), None) == Score(False, False, False, False)


def test_numbers_are_compared_as_json():
    one = ("sum", {"a": 1})
    assert scored(("sum", {"a": 1.0}), expected=(one,)) == "psre"
    assert scored(("sum", {"a": True}), expected=(one,)) == "pr"
    assert scored(("sum", {"a": "1"}), expected=(one,)) == "pr"
    assert scored(("sum", {"a": [0, {"b": False}]}), expected=(("sum", {"a": [False, {"b": 0}]}),)) == "pr"


def test_parallel_calls_come_in_any_order_and_each_counts():
    assert scored(ROME, OSLO, expected=(OSLO, ROME)) == "psre"
    assert scored(OSLO, OSLO, expected=(OSLO, ROME)) == "psr"
    assert scored(OSLO, expected=(OSLO, ROME)) == "ps"
    assert scored(OSLO, ROME, OSLO, expected=(OSLO, ROME)) == "ps"
    assert scored(OSLO, ("forecast", {}), expected=(OSLO, ROME)) == "p"


def test_arguments_without_end_are_scored_too():
    deep: dict[str, Any] = {}
    for _ in range(195):
        deep = {"a": [deep]}
    assert scored(("sum", deep), expected=(OSLO,)) == "p"
    assert scored(("sum", deep), expected=(("sum", deep),)).endswith("re")


def test_answers_become_records():
    tokenizer = load_tokenizer(str(QUICKSTART / "tokenizer"))
    eos: Any = tokenizer.eos_token_id
    long = made(USER | {"content": "word " * 300}, calling("weather", {"city": "Oslo"}), id="long")
    texts = ['I look. [TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]', "It is warm."]
    short = [made(USER, calling("weather", {"city": "Oslo"}), id=f"short{at}") for at in range(3)]
    asked, left_out = next_call.prompts(
        next_call.requests([("first", long), ("second", short[0]), ("second", short[1]), ("second", short[2])]),
        tokenizer, "xlam", longest=200, count=2,
    )  # fmt: skip
    assert [one.request.source for one in asked] == ["second", "second"]
    assert left_out == {"too-long": 1}
    seen = []

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        seen.extend(prompts)
        whole = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [whole[0] + [eos], whole[1]]

    answers = next_call.answer(asked, generate, tokenizer)
    assert seen == [one.prompt for one in asked]
    record = answers[0].record(7)
    assert json.loads(json.dumps(record)) == record
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    assert record == {
        "step": 7,
        "source": "second",
        "id": asked[0].request.id,
        "turn": 1,
        "messages": [USER],
        "expected": [call],
        "content": "I look.",
        "calls": [call | {"arguments": {"city": "Rome"}}],
        "text": texts[0],
        "finish_reason": "tool_calls",
        "parsable": True,
        "schema_valid": True,
        "right_function": True,
        "exact": False,
    }
    other = answers[1].record(7)
    assert (other["calls"], other["content"], other["finish_reason"]) == ([], "It is warm.", "length")
    summary = next_call.summarize([one.score for one in answers])
    assert summary == {"requests": 2, "parsable": 0.5, "schema_valid": 0.5, "right_function": 0.5, "exact": 0.0}
    assert next_call.summarize([]) == {"requests": 0}


def test_what_a_format_cannot_write_is_left_out_and_counted():
    thoughtful = made(
        USER, calling("weather", {"city": "Oslo"}, "I look."), RESULT, calling("sum", {"a": 1}, loss=None)
    )
    request = next_call.request("made", thoughtful, 3)
    found = next_call.prompts([request], load_tokenizer("mistral:v3"), "native", longest=10**6, count=1)
    assert found == ([], {"not-representable": 1})


def test_a_tool_without_parameters_takes_no_arguments():
    bare = replace(SYSTEM, tools=[{"type": "function", "function": {"name": "now"}}])
    request = Request("made", "id", 2, [USER], bare.tools, (ToolCall(None, "now", {}),))
    assert next_call.score(request, (ToolCall(None, "now", {}),)) == Score(True, True, True, True)
    assert not next_call.score(request, (ToolCall(None, "now", {"at": 1}),)).schema_valid
