"""Trajectories that do not fit are dropped, cut from the oldest turn on, or split so that each turn is trained once."""

import dataclasses
from functools import cache
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import broken

from xlam_jax.config import Data, Loss
from xlam_jax.data import lengths
from xlam_jax.data.lengths import Fitted, fit
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.render import Rendered, render_all
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory

ENCODE = lengths.encode
SETTINGS = settings(deadline=None, derandomize=True, max_examples=40)
TOKENIZERS = {
    "xlam": str(Path(__file__).parents[2] / "examples" / "quickstart" / "tokenizer"),
    "xlam_v1": "mistral:v1",
    "native": "mistral:v3",
}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}


def config(format: str, on_long: str, sequence_length: int, **more) -> Data:
    source = {"name": "a", "files": ["x"]}
    values = {"sources": [source], "tokenizer": "t", "sequence_length": sequence_length, "format": format, **more}
    return Data.model_validate({**values, "on_long": on_long})


@cache
def tokenizer_of(format: str):
    return load_tokenizer(TOKENIZERS[format])


words = st.integers(0, 40).map(lambda count: "word " * count + "é")
flags = st.sampled_from([None, None, None, True, False])


@st.composite
def trajectories(draw) -> Trajectory:
    """Exchanges of tool calls with results and answers, some turns long, some without loss."""
    turns: list[dict] = [{"role": "system", "content": "s"}] * draw(st.integers(0, 1))
    for exchange in range(draw(st.integers(1, 4))):
        turns += [{"role": "user", "content": draw(words)} for _ in range(draw(st.sampled_from([1, 1, 2])))]
        for step in range(draw(st.integers(0, 3))):
            ids = [f"call{exchange}{step}{call:03}" for call in range(draw(st.integers(1, 2)))]
            calls = [{"id": id_, "function": {"name": "f", "arguments": {"a": draw(words)}}} for id_ in ids]
            turns.append({"role": "assistant", "tool_calls": calls, "loss": draw(flags)})
            turns += [{"role": "tool", "tool_call_id": id_, "content": draw(words)} for id_ in ids]
        if draw(st.booleans()) or turns[-1]["role"] == "user":
            turns.append({"role": "assistant", "content": draw(words), "loss": draw(flags)})
    if draw(st.booleans()):
        turns.append({"role": "user", "content": draw(words)})
    row = {"task_instruction": draw(words), "tools": [TOOL], "conversation": turns}
    return parse_trajectory(row)


def trained_turns(rendered: Rendered) -> list[int]:
    return sorted({span.turn for span in rendered.spans if span.weight})


def check(fitted: Fitted, trajectory: Trajectory, tokenizer, data: Data) -> None:
    """Checks the properties of every result."""
    assert len(fitted.rendered) == len(fitted.parts)
    turns = trajectory.conversation
    for one, part in zip(fitted.rendered, fitted.parts, strict=True):
        assert len(one.input_ids) <= data.sequence_length + 1
        (again,) = render_all(part, tokenizer, data.format, data.loss)
        assert again.input_ids.tolist() == one.input_ids.tolist()
        assert again.weights.tolist() == one.weights.tolist()
        assert (part.task_instruction, part.tools) == (trajectory.task_instruction, trajectory.tools)
        kept = [turn for turn in part.conversation if turn.role != "system"]
        assert kept[0].role == "user"
        for before, turn in pairwise(kept):
            assert turn.role != "tool" or before.role == "tool" or before.tool_calls
        for span in one.spans:  # turns are indices into the whole
            if span.weight:
                assert turns[span.turn].role == "assistant"
                assert turns[span.turn].loss is not False
        for at, turn in zip(sorted(own_turns(part)), trained_turns(one), strict=True):
            same = dataclasses.replace(part.conversation[at], loss=turns[turn].loss)
            assert same == turns[turn]
            assert (
                part.conversation[at - 1].content == turns[turn - 1].content
            )  # the turn that it answers is in the part
            assert part.conversation[at - 1].role == turns[turn - 1].role


def own_turns(part: Trajectory) -> list[int]:
    return [i for i, turn in enumerate(part.conversation) if turn.role == "assistant" and turn.loss is not False]


@pytest.mark.parametrize("format", TOKENIZERS)
@SETTINGS
@given(
    trajectory=trajectories(),
    share=st.floats(0.2, 1.1),
    on_long=st.sampled_from(["error", "drop", "cut", "split"]),
    loss=st.sampled_from([{}, {}, {"turns": "last"}, {"answer": 0.0, "thought": 0.5}, {"tool_call": 0.0}]),
)
def test_what_fits_is_rendered_and_the_rest_is_reported(format, trajectory, share, on_long, loss):
    tokenizer = tokenizer_of(format)
    whole = render_all(trajectory, tokenizer, format, Loss.model_validate(loss))
    longest = max((len(one.input_ids) for one in whole), default=1000)
    data = config(format, on_long, max(1, int(longest * share)), loss=loss)
    fitted = fit(trajectory, tokenizer, data)
    check(fitted, trajectory, tokenizer, data)
    assert fitted.detail or fitted.rendered
    if not whole:
        assert fitted.reasons == ["no-loss"]
    elif longest <= data.sequence_length + 1:
        assert fitted.reasons == []
        assert [one.spans for one in fitted.rendered] == [one.spans for one in whole]
        assert [one.input_ids.tolist() for one in fitted.rendered] == [one.input_ids.tolist() for one in whole]
    elif on_long in ("error", "drop"):
        assert fitted == ([], ["too-long"], [], 0, fitted.detail)
    else:
        assert fitted.reasons == ([on_long] if fitted.rendered else ["too-long"])
        assert (fitted.cut_turns > 0) == (on_long == "cut" and bool(fitted.rendered))
    if fitted.rendered and on_long == "split":
        trained = [turn for one in fitted.rendered for turn in trained_turns(one)]
        assert sorted(trained) == sorted(turn for one in whole for turn in trained_turns(one))  # each once, and all
        if format != "native":  # there the parts of a conversation may overlap in text only
            ids_of_parts = np.concatenate([one.input_ids[one.loss_mask] for one in fitted.rendered])
            assert ids_of_parts.tolist() == np.concatenate([one.input_ids[one.loss_mask] for one in whole]).tolist()


@SETTINGS
@given(trajectory=trajectories(), share=st.floats(0.3, 0.95))
def test_cutting_keeps_as_much_as_fits(trajectory, share):
    """Keeps the end of the conversation after the user turns that it answers; one more turn would not fit."""
    tokenizer = tokenizer_of("xlam")
    assume(own_turns(trajectory))
    (whole,) = render_all(trajectory, tokenizer)
    data = config("xlam", "cut", int(len(whole.input_ids) * share))
    fitted = fit(trajectory, tokenizer, data)
    if not fitted.rendered:
        return
    (part,) = fitted.parts
    turns = trajectory.conversation[: own_turns(trajectory)[-1] + 1]
    system = sum(turn.role == "system" for turn in turns)
    kept = part.conversation[system:]
    steps = next(i for i, turn in enumerate(kept) if turn.role == "assistant")
    start = len(turns) - (len(kept) - steps)
    assert [turn.content for turn in kept[steps:]] == [turn.content for turn in turns[start:]]
    request_end = start
    while turns[request_end - 1].role != "user":
        request_end -= 1
    assert [turn.content for turn in kept[:steps]] == [
        turn.content for turn in turns[request_end - steps : request_end]
    ]  # all the user turns together
    assert request_end == steps + system or turns[request_end - steps - 1].role != "user"
    assert fitted.cut_turns == len(trajectory.conversation) - len(part.conversation)
    earlier = [i for i in range(start) if turns[i].role == "assistant"]
    if earlier:
        again = earlier[-1]
        request_end = again
        while turns[request_end - 1].role != "user":
            request_end -= 1
        first = request_end
        while first > system and turns[first - 1].role == "user":
            first -= 1
        longer = (*turns[:system], *turns[first:request_end], *turns[again:])
        (one,) = render_all(
            dataclasses.replace(trajectory, conversation=tuple(dataclasses.replace(t, loss=None) for t in longer)),
            tokenizer,
        )
        assert len(one.input_ids) > data.sequence_length + 1


def long_row(steps: int, words: int = 30) -> Trajectory:
    turns: list[dict] = [{"role": "user", "content": "Find it."}]
    for step in range(steps):
        call = {"id": f"call{step:05}", "function": {"name": "f", "arguments": {"n": step}}}
        turns.append({"role": "assistant", "tool_calls": [call]})
        turns.append({"role": "tool", "tool_call_id": f"call{step:05}", "content": "result " * words})
    turns.append({"role": "assistant", "content": "Found."})
    return parse_trajectory({"tools": [TOOL], "conversation": turns})


def test_a_long_trajectory_in_parts():
    data = config("xlam", "split", 1024)
    fitted = fit(long_row(100), tokenizer_of("xlam"), data)
    trained = [trained_turns(one) for one in fitted.rendered]
    assert list(chain(*trained)) == list(range(1, 202, 2))
    for one, own in zip(fitted.rendered[1:], trained[1:], strict=True):
        context = [span for span in one.spans if 1 <= span.turn < own[0]]
        before = sum(span.end - span.start for span in context)
        assert before / len(one.input_ids) > 0.35  # half of it, except the turn that does not fit
    assert min(len(one.input_ids) for one in fitted.rendered[:-1]) > 900
    cut = fit(long_row(100), tokenizer_of("xlam"), config("xlam", "cut", 1024))
    assert trained_turns(cut.rendered[0])[-1] == 201
    assert len(cut.rendered[0].input_ids) > 950
    assert cut.cut_turns == 202 - len(cut.parts[0].conversation)
    for one in (fitted, cut):
        check(one, long_row(100), tokenizer_of("xlam"), data)
    # the first kept turn is the user's, the second answers a result that was cut off
    assert trained_turns(cut.rendered[0])[0] == 202 - len(cut.parts[0].conversation) + 3


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.2, 3])
def test_measures_that_are_off_change_nothing(factor, monkeypatch):
    """Counts select candidates; rendering decides what fits."""
    data = config("xlam", "cut", 1024)
    expected = fit(long_row(60), tokenizer_of("xlam"), data)
    measured = lengths._Fitter._count
    monkeypatch.setattr(lengths._Fitter, "_count", lambda *args: int(measured(*args) * factor))
    fitted = fit(long_row(60), tokenizer_of("xlam"), data)
    assert fitted.rendered[0].input_ids.tolist() == expected.rendered[0].input_ids.tolist()


@pytest.mark.parametrize("format", TOKENIZERS)
def test_calls_are_measured_in_one_piece(format, row, monkeypatch):
    """Parts do not depend on how the text of a call is divided into kinds."""
    texts, measured = [], lengths._Fitter._count
    monkeypatch.setattr(lengths._Fitter, "_count", lambda self, one: texts.append(one.text) or measured(self, one))
    row["conversation"][1]["content"] = ""
    del row["conversation"][4:]
    row["conversation"] += [{"role": "assistant", "content": "word " * 300}] if format == "xlam" else []
    fit(parse_trajectory(row), tokenizer_of(format), config(format, "cut", 32))
    assert sum('[{"name": "get_weather", "arguments": {"city": "Troms' in text for text in texts) == 1
    assert sum('{"name": "get_time", "arguments": {}' in text for text in texts) == 1


@pytest.mark.parametrize("on_long", ["cut", "split"])
@pytest.mark.parametrize("format", ["xlam", "native"])
def test_turns_are_measured_once(format, on_long, monkeypatch):
    """Renders a few candidates per part, for trajectories of any length."""
    calls = []
    monkeypatch.setattr(lengths, "encode", lambda *args: calls.append(1) or ENCODE(*args))
    fitted = fit(long_row(600), tokenizer_of(format), config(format, on_long, 1024))
    assert len(fitted.rendered) >= 1
    assert len(calls) <= 4 * len(fitted.rendered) + 2


@pytest.mark.parametrize("format", TOKENIZERS)
@pytest.mark.parametrize("on_long", ["drop", "cut", "split"])
def test_ten_megabytes_are_not_tokenized(format, on_long, monkeypatch):
    sizes = []

    def measured(layout, *rest):
        sizes.append(sum(len(segment.text) for segment in layout.segments))
        return ENCODE(layout, *rest)

    monkeypatch.setattr(lengths, "encode", measured)
    trajectory = long_row(8)
    huge = [dataclasses.replace(turn, content=turn.content * 50_000) for turn in trajectory.conversation[:3]]
    huge[0] = trajectory.conversation[0]
    huge[1] = trajectory.conversation[1]
    trajectory = dataclasses.replace(trajectory, conversation=(*huge, *trajectory.conversation[3:]))
    fitted = fit(trajectory, tokenizer_of(format), config(format, on_long, 1024))
    assert max(sizes, default=0) < 200_000
    if on_long == "drop":
        assert fitted.reasons == ["too-long"]
    else:  # the turn that answers the huge result cannot be trained, and splitting reports it
        assert fitted.reasons == (["cut"] if on_long == "cut" else ["too-long"])


def test_reasons_why_nothing_can_be_trained(row):
    data = config("xlam", "drop", 4096)
    for turn in row["conversation"]:
        if turn["role"] == "assistant":
            turn["loss"] = False
    assert fit(parse_trajectory(row), tokenizer_of("xlam"), data)[:2] == ([], ["no-loss"])
    row["conversation"][-1]["loss"] = True
    weightless = config("xlam", "drop", 4096, loss={"tool_call": 0})
    assert fit(parse_trajectory(row), tokenizer_of("xlam"), weightless)[:2] == ([], ["no-loss"])
    last = config("xlam", "drop", 4096, loss={"turns": "last"})
    assert trained_turns(fit(parse_trajectory(row), tokenizer_of("xlam"), last).rendered[0]) == [7]
    native = fit(parse_trajectory(row), tokenizer_of("native"), config("native", "drop", 4096))
    assert native[:2] == ([], ["not-representable"])
    assert "text and tool calls" in native.detail


WHOLE = {
    "task_instruction": "s",
    "tools": [TOOL],
    "conversation": [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "t", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "tool_call_id": "c", "content": "{}"},
        {"role": "assistant", "content": "a", "loss": True},
    ],
}


@settings(SETTINGS, max_examples=150)
@given(data=st.data(), on_long=st.sampled_from(["drop", "cut", "split"]))
def test_any_trajectory_is_rendered_or_reported(data, on_long):
    """Rows with parts replaced by anything: a reason or a rendering, never a crash."""
    try:
        trajectory = parse_trajectory(data.draw(broken(WHOLE)))
    except InvalidTrajectory:
        return
    for format in TOKENIZERS:
        fitted = fit(trajectory, tokenizer_of(format), config(format, on_long, 150))
        assert bool(fitted.rendered) != bool(fitted.detail)
        assert all(len(one.input_ids) <= 151 for one in fitted.rendered)
