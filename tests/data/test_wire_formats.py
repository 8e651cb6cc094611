"""Public templates write answers, and the wire formats read them back: parse(render(x)) == x, or a named refusal.

The templates come from TRL's package and the encoders from mistral-common; `wire_cases` has them with their refusals.
"""

import random
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
from wire_cases import Answer, Refused, Template, some_answer, templates

from xlam_jax.data.wire import ANY, CompletionStream, Parsed, Tools, Wire

NAMES = [
    *("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8"),
    *("nemotron_3_nano", "nemotron_3_super", "llama3_1", "llama3_2", "deepseekv3_training", "glm4moe", "gptoss"),
    *("lfm2_v2", "lfm2_2_5", "mistral v2", "mistral v3", "mistral v7", "mistral v11", "mistral v13"),
]


@cache
def by_name() -> dict[str, Template]:
    return {template.name: template for template in templates()}


def comparable(parsed: Parsed) -> object:
    """Reasoning, content, and calls without ids; 1, 1.0 and True differ."""
    return (
        parsed.reasoning,
        parsed.content,
        None if parsed.calls is None else [(call.name, repr(call.arguments)) for call in parsed.calls],
    )


def streamed(wire: Wire, text: str, tools: Tools, random_: random.Random) -> Parsed:
    stream, content, at = CompletionStream(wire, tools), "", 0
    most = random_.choice([1, 4, 30, 200])
    while at < len(text):
        size = random_.randint(1, most)
        content += stream.feed(text[at : at + size])
        at += size
    parsed = stream.finish()
    return parsed._replace(content=content + parsed.content)


def check_answer(template: Template, answer: Answer, random_: random.Random) -> str:
    """Writes an answer and reads it back. Returns why it cannot be, "" where it is read back exactly."""
    refusal = next((refuses.__name__ for refuses in template.refusals if refuses(answer)), "")
    try:
        text = template.render(answer)
    except Refused:
        assert refusal
        return refusal
    parsed = template.wire.parse(text, answer.tools)
    part = random_.choice([text, text[: random_.randint(0, len(text))]])
    for wire in (template.wire, ANY):
        assert streamed(wire, part, answer.tools, random_) == wire.parse(part, answer.tools)
    if comparable(parsed) != comparable(answer.expected):
        assert refusal, (answer.expected, text, parsed)
        return refusal
    reasoning = template.wire.reasoning
    if reasoning and text.lstrip().startswith(reasoning.opening):  # prompts may end with the opening mark
        rest = text.lstrip().removeprefix(reasoning.opening)
        if not rest.lstrip().startswith(reasoning.opening):
            assert replace(template.wire, opened=True).parse(rest, answer.tools) == parsed
    any_calls = ANY.parse(text, answer.tools).calls
    assert any_calls is None or comparable(parsed._replace(calls=any_calls)) == comparable(parsed)
    return "" if any_calls == parsed.calls else "(any)"


def check_template(name: str, count: int) -> Counter[str]:
    template, random_ = by_name()[name], random.Random(name)
    return Counter(check_answer(template, some_answer(random_), random_) for _ in range(count))


def test_every_template_is_tested():
    assert list(by_name()) == NAMES
    assert len(NAMES) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_read_back_or_refused(name: str):
    outcomes = check_template(name, 100)
    assert outcomes[""] >= 10
    assert outcomes["(any)"] <= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_answers_are_read_back_or_refused(name: str):
    outcomes = check_template(name, 10_000)
    refusals = {refuses.__name__ for refuses in by_name()[name].refusals}
    assert outcomes.keys() - {"", "(any)"} == refusals
    print(name, dict(outcomes))
