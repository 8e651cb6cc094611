"""Requests from held-out trajectories: their prompts equal those of training; answers are scored."""

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


def make_call_turn(name: str, arguments: dict[str, Any], content: str = "", **more: Any) -> dict[str, Any]:
    call = {"type": "function", "id": "call_1", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call], **more}


def make_trajectory(*turns: dict[str, Any], id: str = "made", **more: Any) -> Trajectory:
    tools = [tool("weather", city={"type": "string"}), tool("sum", a={"type": "number"})]
    return parse_trajectory({"unique_trajectory_id": id, "tools": tools, "conversation": list(turns), **more})


USER = {"role": "user", "content": "Weather in Oslo?"}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "3 °C"}
SYSTEM = make_trajectory(
    {"role": "system", "content": "Be brief."},
    USER,
    make_call_turn("weather", {"city": "Oslo"}),
    RESULT,
    make_call_turn("sum", {"a": 1}),
    RESULT,
    {"role": "assistant", "content": "3 °C."},
    task_instruction="Help with the weather.",
)


@pytest.mark.parametrize(
    ("format", "name"),
    [("xlam", "quickstart"), ("xlam", "mistral:v1"), ("xlam_v1", "quickstart"), ("native", "mistral:v3")],
)
def test_prompts_equal_training_and_perfect_answers_score_all(samples: Samples, format: str, name: str):
    tokenizer = load_tokenizer(str(QUICKSTART / "tokenizer") if name == "quickstart" else name)
    trained: dict[tuple[str, int], tuple[list[int], list[int]]] = {}
    representable: Samples = []
    for source, trajectory in [*samples, ("made", SYSTEM)]:
        try:
            rendered = [sequence for _, sequence in sequences(trajectory, tokenizer, format)]
        except InvalidTrajectory:  # a thought next to calls, which Mistral's own format cannot represent
            continue
        representable.append((source, trajectory))
        for sequence in rendered:
            ids = sequence.input_ids.tolist()
            for turn in {span.turn for span in sequence.spans if span.weight}:
                spans = [span for span in sequence.spans if span.turn == turn and span.weight]
                trained[trajectory.id, turn] = ids[: spans[0].start], ids[spans[0].start : spans[-1].end]
    requests = list(next_call.requests(representable))
    assert {request.source for request in requests} == {source for source, _ in representable} >= {"hammer", "made"}
    prompted, dropped = next_call.prompts(requests, tokenizer, format, longest=10**6, count=10**6)
    assert [item.request for item in prompted] == requests
    assert not dropped
    for request, prompt in prompted:
        assert prompt == trained[request.id, request.turn][0], request.id
        assert prompt == render_prompt(request.messages, request.tools, tokenizer, format)
    recorded = [trained[request.id, request.turn][1] for request in requests]
    answers = next_call.answer(prompted, lambda _: recorded, tokenizer)
    assert {answer.score for answer in answers} == {Score(True, True, True, True)}
    assert {answer.completion.finish_reason for answer in answers} == {"tool_calls"}


def test_requests_depend_only_on_ids(samples: Samples):
    requests = list(next_call.requests(samples))
    assert [request.source for request in requests[:8]] == list(SOURCES) * 2
    assert Counter(request.source for request in requests)["webshop"] == 25
    shuffled = samples.copy()
    random.Random(0).shuffle(shuffled)
    again = list(next_call.requests(sorted(shuffled, key=lambda sample: SOURCES.index(sample[0]))))
    assert again == requests
    by_hash = [request.id for request in requests if request.source == "webshop"]
    assert by_hash != [trajectory.id for _, trajectory in samples[:25]]
    assert len({request.turn for request in requests if request.source == "webshop"}) > 3
    by_id = {trajectory.id: trajectory for _, trajectory in samples}
    for request in requests:
        assert request.expected == by_id[request.id].conversation[request.turn].tool_calls


def test_requested_turns():
    assert next_call.turns(SYSTEM) == [2, 4]
    without_loss = make_trajectory(
        USER, make_call_turn("weather", {"city": "Oslo"}, loss=False), RESULT, make_call_turn("sum", {"a": 1})
    )
    assert next_call.turns(without_loss) == [3]
    two_assistant_turns = make_trajectory(
        USER, {"role": "assistant", "content": "I look."}, make_call_turn("weather", {"city": "Oslo"})
    )
    assert next_call.turns(two_assistant_turns) == []  # the call does not follow a turn of the user or a tool
    assert list(next_call.requests([("made", two_assistant_turns), ("made", without_loss)])) == [
        next_call.request("made", without_loss, 3)
    ]
    first = next_call.request("made", SYSTEM, 2)
    assert first.messages == [
        {"role": "system", "content": "Help with the weather."},
        {"role": "system", "content": "Be brief."},
        USER,
    ]
    json.dumps(first.messages)


def met_fields(*calls: tuple[str, dict[str, Any]], expected: tuple[tuple[str, dict[str, Any]], ...]) -> str:
    """Returns the first letters of the fields of `Score` that are true."""
    request = next_call.request("made", SYSTEM, 2)
    request = request._replace(expected=tuple(ToolCall("1", *call) for call in expected))
    score = next_call.score(request, tuple(ToolCall(None, *call) for call in calls))
    return "".join(field[0] for field, met in score._asdict().items() if met)


OSLO, ROME = ("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})


def test_scores():
    assert met_fields(OSLO, expected=(OSLO,)) == "psre"
    assert met_fields(ROME, expected=(OSLO,)) == "psr"
    assert met_fields(("weather", {"city": 1}), expected=(OSLO,)) == "pr"
    assert met_fields(("weather", {"city": "Oslo", "unit": "C"}), expected=(OSLO,)) == "pr"
    assert met_fields(("weather", {}), expected=(OSLO,)) == "pr"
    assert met_fields(("forecast", {"city": "Oslo"}), expected=(OSLO,)) == "p"
    assert met_fields(("sum", {"a": 1}), expected=(OSLO,)) == "ps"
    assert met_fields(expected=(OSLO,)) == ""
    assert next_call.score(next_call.request("made", SYSTEM, 2), None) == Score(False, False, False, False)


def test_numbers_are_compared_as_json():
    expected_call = ("sum", {"a": 1})
    assert met_fields(("sum", {"a": 1.0}), expected=(expected_call,)) == "psre"
    assert met_fields(("sum", {"a": True}), expected=(expected_call,)) == "pr"
    assert met_fields(("sum", {"a": "1"}), expected=(expected_call,)) == "pr"
    assert met_fields(("sum", {"a": [0, {"b": False}]}), expected=(("sum", {"a": [False, {"b": 0}]}),)) == "pr"


def test_parallel_calls_match_in_any_order():
    assert met_fields(ROME, OSLO, expected=(OSLO, ROME)) == "psre"
    assert met_fields(OSLO, OSLO, expected=(OSLO, ROME)) == "psr"
    assert met_fields(OSLO, expected=(OSLO, ROME)) == "ps"
    assert met_fields(OSLO, ROME, OSLO, expected=(OSLO, ROME)) == "ps"
    assert met_fields(OSLO, ("forecast", {}), expected=(OSLO, ROME)) == "p"


def test_deeply_nested_arguments_are_scored():
    deep: dict[str, Any] = {}
    for _ in range(195):
        deep = {"a": [deep]}
    assert met_fields(("sum", deep), expected=(OSLO,)) == "p"
    assert met_fields(("sum", deep), expected=(("sum", deep),)).endswith("re")


def test_answers_become_records():
    tokenizer = load_tokenizer(str(QUICKSTART / "tokenizer"))
    eos: Any = tokenizer.eos_token_id
    long = make_trajectory(USER | {"content": "word " * 300}, make_call_turn("weather", {"city": "Oslo"}), id="long")
    texts = ['I look. [TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]', "It is warm."]
    short = [make_trajectory(USER, make_call_turn("weather", {"city": "Oslo"}), id=f"short{at}") for at in range(3)]
    prompted, dropped = next_call.prompts(
        next_call.requests([("first", long), ("second", short[0]), ("second", short[1]), ("second", short[2])]),
        tokenizer, "xlam", longest=200, count=2,
    )  # fmt: skip
    assert [item.request.source for item in prompted] == ["second", "second"]
    assert dropped == {"too-long": 1}
    seen = []

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        seen.extend(prompts)
        token_ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [token_ids[0] + [eos], token_ids[1]]

    answers = next_call.answer(prompted, generate, tokenizer)
    assert seen == [item.prompt for item in prompted]
    record = answers[0].record(7)
    assert json.loads(json.dumps(record)) == record
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    assert record == {
        "step": 7,
        "source": "second",
        "id": prompted[0].request.id,
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
    summary = next_call.summarize([answer.score for answer in answers])
    assert summary == {"requests": 2, "parsable": 0.5, "schema_valid": 0.5, "right_function": 0.5, "exact": 0.0}
    assert next_call.summarize([]) == {"requests": 0}


def test_unrepresentable_requests_are_dropped_and_counted():
    with_thought = make_trajectory(
        USER, make_call_turn("weather", {"city": "Oslo"}, "I look."), RESULT, make_call_turn("sum", {"a": 1}, loss=None)
    )
    request = next_call.request("made", with_thought, 3)
    prompts = next_call.prompts([request], load_tokenizer("mistral:v3"), "native", longest=10**6, count=1)
    assert prompts == ([], {"not-representable": 1})


def test_a_tool_without_parameters_takes_no_arguments():
    bare = replace(SYSTEM, tools=[{"type": "function", "function": {"name": "now"}}])
    request = Request("made", "id", 2, [USER], bare.tools, (ToolCall(None, "now", {}),))
    assert next_call.score(request, (ToolCall(None, "now", {}),)) == Score(True, True, True, True)
    assert not next_call.score(request, (ToolCall(None, "now", {"at": 1}),)).schema_valid
