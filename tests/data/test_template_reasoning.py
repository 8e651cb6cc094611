"""Reasoning in published chat templates: each turn is trained once, after the prompt that a server gives."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from chat_templates import published
from hypothesis import given, settings
from hypothesis import strategies as st

from xlam_jax.config import Loss
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.render import Rendered, render_prompt, sequences
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory, to_messages, without_reasoning

TOOL = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "The tide at a harbour.",
        "parameters": {"type": "object", "properties": {"harbour": {"type": "string", "description": "Its name."}}},
    },
}
SPECIAL = ["<|im_start|>", "<|im_end|>"]


class Policy(NamedTuple):
    """What a template does with reasoning, and with the conversation `LONG`."""

    layouts: int
    """Number of sequences that train `LONG`: a new one starts where the template rewrites earlier turns."""
    prompt: str
    """The end of its generation prompt."""
    opening: str
    """What it writes between this prompt and reasoning."""
    closing: str
    """What it writes between reasoning and content."""


USER, THINK = "<|im_start|>assistant\n", "<think>\n"
POLICIES = {
    "qwen3": Policy(4, USER, THINK, "\n</think>\n\n"),
    "qwen3_5_think": Policy(3, USER + THINK, "", "\n</think>\n\n"),
    "nemotron_3_nano": Policy(4, USER + THINK, "", "\n</think>\n"),
    # these have generation marks
    "lfm2_2_5": Policy(3, USER, "<think>", "</think>"),
    "qwen3_training": Policy(1, USER, THINK, "\n</think>\n\n"),
    "qwen3_5_think_training": Policy(1, USER + THINK, "", "\n</think>\n\n"),
}
REWRITING = [name for name, policy in POLICIES.items() if policy.layouts > 1]


@pytest.fixture(scope="module")
def templated(quickstart):
    """Makes a tokenizer with a published template."""
    tokenizer = load_tokenizer(str(quickstart / "tokenizer"))
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIAL})

    def with_template(name: str):
        tokenizer.chat_template = published(name)
        return tokenizer

    return with_template


def user(text: str = "Tide?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, reasoning: str = "", **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"reasoning": reasoning} if reasoning else {}), **others}


def call(number: int, text: str = "", reasoning: str = "") -> list[dict[str, Any]]:
    """A turn that calls, and its result."""
    function = {"name": "tide", "arguments": {"harbour": "Bodø"}}
    calls = [{"type": "function", "id": f"call_{number}", "function": function}]
    result = {"role": "tool", "tool_call_id": f"call_{number}", "name": "tide", "content": f"{number} m"}
    return [answer(text, reasoning, tool_calls=calls), result]


def trajectory(*turns: dict[str, Any], system: str = "Be brief.") -> Trajectory:
    return parse_trajectory({"task_instruction": system, "tools": [TOOL], "conversation": list(turns)})


LONG = trajectory(
    user(),
    *call(1, reasoning="First the tide."),
    *call(2, "And again.", reasoning="It may be wrong: </td>.\n\n* once more\n  * and again."),
    answer("2 m", "Two of three agree."),
    user("Sure?"),
    answer("Yes.", "They insist."),
    user("And now?"),
    *call(3, reasoning="It has changed."),
    *call(4),
    answer("4 m"),
)
"""Several user turns, calls with and without a thought, turns with and without reasoning."""


def trained(rendered: Rendered) -> list[int]:
    return sorted({span.turn for span in rendered.spans if span.weight})


def check(whole: Trajectory, tokenizer: Any) -> Iterator[tuple[Rendered, int, dict[str, str]]]:
    """Fails unless every trained turn comes after the prompt that transformers gives, and is trained once.

    Yields (sequence, turn, its text by kind) of each turn.
    """
    messages = to_messages(whole)
    front = len(messages) - len(whole.conversation)
    counts: Counter[int] = Counter()
    for part, rendered in sequences(whole, tokenizer, "native"):
        assert {turn for turn in trained(rendered)} == {
            at for at, turn in enumerate(part.conversation) if turn.role == "assistant" and turn.loss is not False
        }
        for turn in trained(rendered):
            counts[turn] += 1
            spans = [span for span in rendered.spans if span.turn == turn and span.weight]
            before = messages[: front + turn]
            prompt = tokenizer.apply_chat_template(before, tools=[TOOL], add_generation_prompt=True, return_dict=False)
            assert rendered.input_ids[: spans[0].start].tolist() == prompt
            if before[-1]["role"] != "assistant":
                assert render_prompt(before, [TOOL], tokenizer, "native") == prompt
            texts: dict[str, str] = {}
            for span in spans:
                text = tokenizer.decode(rendered.input_ids[span.start : span.end])
                texts[span.kind] = texts.get(span.kind, "") + text
            yield rendered, turn, texts
    assert counts == {
        at: 1 for at, turn in enumerate(whole.conversation) if turn.role == "assistant" and turn.loss is not False
    }


@pytest.mark.parametrize("name", POLICIES)
def test_reasoning_is_trained_once_after_the_prompt_of_a_server(name, templated):
    tokenizer, policy = templated(name), POLICIES[name]
    written = list(check(LONG, tokenizer))
    for rendered, turn, texts in written:
        message = LONG.conversation[turn]
        reasoned = f"{policy.opening}{message.reasoning}{policy.closing}" if message.reasoning else ""
        assert texts.get("reasoning", "") == reasoned
        if message.content:
            assert texts["thought" if message.tool_calls else "answer"].endswith(message.content)
        assert tokenizer.decode(rendered.input_ids[: first(rendered, turn)]).endswith(policy.prompt)
    assert len({id(rendered) for rendered, *_ in written}) == policy.layouts
    if name in REWRITING:  # the reasoning before the last user turn is not in its prompt
        (last,) = [rendered for rendered, turn, _ in written if turn == 9]
        assert "They insist." not in tokenizer.decode(last.input_ids)


def first(rendered: Rendered, turn: int) -> int:
    """The first trained token of a turn."""
    return next(span.start for span in rendered.spans if span.turn == turn and span.weight)


def test_weights_of_reasoning(templated):
    tokenizer = templated("qwen3")
    for loss in (Loss(reasoning=0.25), Loss(reasoning=0.0), Loss(thought=0, tool_call=0, answer=0)):
        spans = [span for _, one in sequences(LONG, tokenizer, "native", loss) for span in one.spans if span.weight]
        weights = {(span.kind, span.weight) for span in spans}
        others = {(kind, 1.0) for kind in ("thought", "tool_call", "arguments", "answer", "eos")}
        assert weights == ({("reasoning", 0.25)} if loss.reasoning == 0.25 else set()) | (
            others if loss.answer else {("reasoning", 1.0)}
        )


TEXTS = st.sampled_from(
    ["a", "tide", "Bodø 🌊", "one\ntwo", "think", '{"name": 1}', "think\n\nthen", "</b>", "[/THINK]"]
)
NONE = st.just("")


@st.composite
def conversations(draw) -> Trajectory:
    """1 to 3 exchanges of up to 3 calls each."""
    turns: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(user(draw(TEXTS)))
        for _ in range(draw(st.integers(0, 3))):
            turns += call(len(turns), draw(NONE | TEXTS), draw(NONE | TEXTS))
        turns.append(answer(draw(TEXTS), draw(NONE | TEXTS)))
        if draw(st.integers(0, 5)) == 0:
            turns[-1]["loss"] = False
    return trajectory(*turns, system=draw(st.sampled_from(["", "Be brief."])))


@pytest.mark.parametrize("examples", [8, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", REWRITING)
def test_any_conversation(name, examples, templated):
    tokenizer = templated(name)

    @settings(deadline=None, derandomize=True, max_examples=examples)
    @given(conversations())
    def holds(whole: Trajectory) -> None:
        for _, turn, texts in check(whole, tokenizer):
            reasoning = whole.conversation[turn].reasoning
            assert ("reasoning" in texts) == bool(reasoning)
            assert reasoning in texts.get("reasoning", "")

    holds()


def test_control_tokens_in_reasoning_stay_text(templated):
    tokenizer = templated("qwen3")
    special = set(tokenizer.all_special_ids)
    clean, spelled = (
        [
            [token for token in one.input_ids.tolist() if token in special]
            for _, one in sequences(trajectory(user(), answer("b", text)), tokenizer, "native")
        ]
        for text in ("a", "a<|im_end|>\n<|im_start|>user")
    )
    assert clean == spelled


@pytest.mark.parametrize(
    ("name", "turn", "why"),
    [
        ("qwen2_5", answer("b", "r"), "omits or changes the reasoning of turn 1; .* data.reasoning: drop"),
        ("qwen3_5_nothink", answer("b", "r"), "writes a prompt for turn 1 that is not .* data.reasoning: drop"),
        ("qwen3", answer("b", "a</think>b"), "the reasoning of turn 1 contains </think>, .* data.reasoning: drop"),
    ],
)
def test_what_a_template_cannot_write_is_refused_by_name(name, turn, why, templated):
    tokenizer = templated(name)
    whole = trajectory(user(), turn)
    with pytest.raises(InvalidTrajectory, match=f"not-representable: .*{why}"):
        list(sequences(whole, tokenizer, "native"))
    assert list(sequences(without_reasoning(whole), tokenizer, "native"))
    context = replace(whole.conversation[1], loss=False)  # a prompt is what the template makes of it
    later = replace(whole, conversation=(whole.conversation[0], context, *trajectory(user(), answer("c")).conversation))
    ((_, rendered),) = sequences(later, tokenizer, "native")
    assert trained(rendered) == [3]


PLACES = {
    "reasoning_content": "m.reasoning_content",
    "reasoning": "m.reasoning",
    "thinking": "m.thinking",
    "parts": "(m.content | first).thinking if m.content is not string and (m.content | first).thinking else ''",
}


@pytest.mark.parametrize("place", PLACES)
def test_every_place_where_templates_read_reasoning(place, templated, monkeypatch):
    """Also where transformers does not copy it from one key to the others."""
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "_alias_reasoning_fields", lambda chat: chat, raising=False)
    tokenizer = templated("qwen3")
    tokenizer.chat_template = (
        "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
        "{%- set reasoning = " + PLACES[place] + " -%}"
        "{%- if reasoning -%}{{- '[THINK]' + reasoning + '[/THINK]' -}}{%- endif -%}"
        "{{- m.content if m.content is string else (m.content | last).text -}}{{- '<|im_end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    )
    whole = replace(trajectory(user(), answer("b", "r"), user(), answer("c")), tools=[])
    ((_, rendered),) = sequences(whole, tokenizer, "native")
    spans = [(span.kind, tokenizer.decode(rendered.input_ids[span.start : span.end])) for span in rendered.spans]
    assert [span for span in spans if span[0] in ("reasoning", "answer")] == [
        ("reasoning", "[THINK]r[/THINK]"),
        ("answer", "b"),
        ("answer", "c"),
    ]
