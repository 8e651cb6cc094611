"""Variants change the prompt and keep the answer, except negatives, which never call a tool."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlam_jax.config import Data
from xlam_jax.data.augment import REFUSALS, augmented, negative, shuffled
from xlam_jax.data.formats import xlam, xlam_v1
from xlam_jax.data.lengths import fit
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.render import render, render_all
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.data.trajectory import Trajectory
from xlam_jax.data.wire import parse_completion

FORMATS = ("xlam", "xlam_v1")
ALL = {"tools": True, "fields": True, "sections": True, "instructions": True}


@cache
def tokenizer_of(name: str):
    quickstart = Path(__file__).parents[2] / "examples" / "quickstart" / "tokenizer"
    return load_tokenizer(str(quickstart) if name == "quickstart" else name)


def config(augment: dict, format: str = "xlam", sequence_length: int = 4096) -> Data:
    source = {"name": "a", "files": ["x"]}
    values = {"sources": [source], "tokenizer": "t", "sequence_length": sequence_length, "format": format}
    return Data.model_validate({**values, "augment": augment})


def draws(trajectory: Trajectory, tokenizer, data: Data, count: int = 20) -> list[str]:
    rendered = (augmented(trajectory, np.random.default_rng(seed), tokenizer, data) for seed in range(count))
    return [tokenizer.decode(one.input_ids) for one in rendered]


def answers(rendered, tokenizer) -> list[tuple]:
    """(content, calls) of each trained turn."""
    trained, parsed = rendered.input_ids[rendered.loss_mask].tolist(), []
    while trained:
        end = trained.index(tokenizer.eos_token_id)
        content, calls = parse_completion(tokenizer.decode(trained[:end]))
        parsed.append((content, [(call.name, call.arguments) for call in calls or ()]))
        trained = trained[end + 1 :]
    return parsed


def recorded(trajectory: Trajectory) -> list[tuple]:
    return [
        (turn.content, [(call.name, call.arguments) for call in turn.tool_calls])
        for turn in trajectory.conversation
        if turn.role == "assistant" and turn.loss is not False
    ]


@pytest.mark.parametrize("name", ["mistral:v1", "quickstart"])
@pytest.mark.parametrize("format", FORMATS)
def test_off_is_the_plain_rendering(format, name, bundled, row):
    tokenizer = tokenizer_of(name)
    data = config({}, format)
    for trajectory in (parse_trajectory(row), *bundled[::25]):
        for part, plain in zip(
            fit(trajectory, tokenizer, data).parts, render_all(trajectory, tokenizer, format), strict=True
        ):
            one = augmented(part, np.random.default_rng(0), tokenizer, data)
            assert one.input_ids.tolist() == plain.input_ids.tolist()
            assert one.weights.tolist() == plain.weights.tolist()


@pytest.mark.parametrize("name", ["mistral:v1", "quickstart"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_answers_stay_and_the_draw_is_the_seeds(format, name, bundled, row):
    tokenizer = tokenizer_of(name)
    data = config(ALL, format)
    for seed, trajectory in enumerate((parse_trajectory(row), *bundled[::12])):
        for part in fit(trajectory, tokenizer, data).parts:
            one = augmented(part, np.random.default_rng(seed), tokenizer, data)
            same = augmented(part, np.random.default_rng(seed), tokenizer, data)
            assert one.input_ids.tolist() == same.input_ids.tolist()
            assert answers(one, tokenizer) == recorded(part)


@pytest.mark.parametrize(
    ("format", "name", "instructions", "orders"),
    [("xlam", "mistral:v1", xlam.INSTRUCTIONS, 2), ("xlam_v1", "mistral:v3", xlam_v1.INSTRUCTIONS, 24)],
)
def test_instructions_and_sections_vary(format, name, instructions, orders, row):
    tokenizer = tokenizer_of(name)
    trajectory = fit(parse_trajectory(row), tokenizer, config({}, format)).parts[0]
    worded = draws(trajectory, tokenizer, config({"instructions": True}, format), 60)
    assert {sum(one in text for one in instructions) for text in worded} == {1}
    assert all(any(one in text for text in worded) for one in instructions)
    ordered = set(draws(trajectory, tokenizer, config({"sections": True}, format), 200))
    assert orders * 0.8 <= len(ordered) <= orders
    assert len({"".join(sorted(text)) for text in ordered}) == 1
    assert len({text[text.index("I look up") :] for text in ordered}) == 1


def test_formats_without_sections_and_instructions_stay(row):
    tokenizer = tokenizer_of("mistral:v3")
    plain = tokenizer.decode(render(parse_trajectory(row), tokenizer).input_ids)
    assert isinstance(plain, str)
    data = config({"instructions": True, "sections": True})
    assert set(draws(parse_trajectory(row), tokenizer, data)) == {plain}


def test_tools_and_fields_change_places(row):
    tokenizer = tokenizer_of("mistral:v3")
    trajectory = parse_trajectory(row)

    def tools(text: str) -> list:
        return json.loads(text.partition("[AVAILABLE_TOOLS]")[2].partition("[/AVAILABLE_TOOLS]")[0])

    ordered = [tools(text) for text in draws(trajectory, tokenizer, config({"tools": True}))]
    assert {tuple(tool["function"]["name"] for tool in one) for one in ordered} == {
        ("get_weather", "get_time"),
        ("get_time", "get_weather"),
    }
    assert {json.dumps(tool) for one in ordered for tool in one} == {json.dumps(tool) for tool in row["tools"]}
    fields = [tools(text) for text in draws(trajectory, tokenizer, config({"fields": True}))]
    assert all(one == row["tools"] for one in fields)  # equal, whatever the order
    assert len({json.dumps(one) for one in fields}) > 10


json_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "properties", "default", "enum", "a", "b"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(schema=json_values, seed=st.integers(0, 100))
def test_a_shuffled_schema_is_equal(schema, seed):
    before = json.dumps(schema)
    result = shuffled(schema, np.random.default_rng(seed))
    assert result == schema
    assert json.dumps(schema) == before

    def values(value: object) -> list[str]:
        if isinstance(value, dict):
            own = [json.dumps(value[key]) for key in ("default", "enum") if key in value]
            return own + [one for key in sorted(value) if key not in ("default", "enum") for one in values(value[key])]
        return [one for item in value for one in values(item)] if isinstance(value, list) else []

    assert values(result) == values(schema)


def test_shuffling_gives_every_order():
    orders = {tuple(shuffled({"a": 1, "b": 2, "c": 3}, np.random.default_rng(seed))) for seed in range(100)}
    assert len(orders) == 6


@pytest.fixture
def single(row) -> dict:
    """One call, then its result and the answer."""
    row["conversation"] = row["conversation"][:5]
    calls = row["conversation"][1]["tool_calls"]
    row["conversation"][1]["tool_calls"] = calls[:1]
    del row["conversation"][3]
    row["tools"][1]["function"]["description"] = "Another."
    return row


@pytest.mark.parametrize("format", FORMATS)
def test_negatives_refuse_in_words(format, single):
    tokenizer = tokenizer_of("mistral:v3")
    always = config({"negatives": 0.999}, format)
    part = fit(parse_trajectory(single), tokenizer, config({}, format)).parts[0]
    seen = set()
    for seed in range(40):
        one = augmented(part, np.random.default_rng(seed), tokenizer, always)
        ((content, calls),) = answers(one, tokenizer)
        assert calls == []
        seen.add(content)
        text = tokenizer.decode(one.input_ids)
        assert "get_weather" not in text
        assert "get_time" in text
        assert "Weather and time in Tromsø?" in text
        assert "I look up both" not in text
    assert seen == set(REFUSALS)


def test_the_share_of_negatives_is_that_of_the_config(bundled):
    rng = np.random.default_rng(0)
    singles = [one for one in bundled if negative(one, rng)]
    assert len(singles) > 100
    data = config({"negatives": 0.3})
    tokenizer = tokenizer_of("quickstart")
    refused = sum(
        not any(calls for _, calls in answers(augmented(one, rng, tokenizer, data), tokenizer)) for one in singles
    )
    assert 0.2 < refused / len(singles) < 0.4


def test_no_equivalent_tool_is_left(bundled):
    rng = np.random.default_rng(0)
    count = 0
    for trajectory in bundled:
        refusal = negative(trajectory, rng)
        if refusal is None:
            continue
        count += 1
        (call,) = [call for turn in trajectory.conversation for call in turn.tool_calls]
        described = {tool["function"]["name"]: tool["function"].get("description") for tool in trajectory.tools}
        left = {tool["function"]["name"]: tool["function"].get("description") for tool in refusal.tools}
        assert left
        assert call.name not in left
        assert described[call.name] not in left.values()
        assert not any(turn.tool_calls for turn in refusal.conversation)
        assert refusal.conversation[-1].content in REFUSALS
    assert count > 100


@pytest.mark.parametrize("name", ["getWeather", "weather.get", "GET_WEATHER", "get-weather"])
def test_the_same_words_are_the_same_tool(name, single):
    rng = np.random.default_rng(0)
    assert negative(parse_trajectory(single), rng)
    single["tools"][1]["function"]["name"] = name
    assert negative(parse_trajectory(single), rng) is None  # no tool would remain


def test_what_cannot_become_a_negative(single):
    rng = np.random.default_rng(0)
    assert negative(parse_trajectory(single), rng)
    twice = {**single, "conversation": single["conversation"] + single["conversation"][:2]}
    assert negative(parse_trajectory(twice), rng) is None
    alone = {**single, "tools": single["tools"][:1]}
    assert negative(parse_trajectory(alone), rng) is None
    single["conversation"][1]["loss"] = False
    assert negative(parse_trajectory(single), rng) is None


def test_a_variant_that_is_too_long_gives_way(row):
    tokenizer = tokenizer_of("mistral:v1")
    trajectory = parse_trajectory(row)
    plain = render(trajectory, tokenizer).input_ids.tolist()
    data = config({"instructions": True}, sequence_length=len(plain) - 1)
    lengths = set()
    for seed in range(30):
        one = augmented(trajectory, np.random.default_rng(seed), tokenizer, data)
        assert len(one.input_ids) <= len(plain)
        lengths.add(tuple(one.input_ids.tolist()))
    assert tuple(plain) in lengths
