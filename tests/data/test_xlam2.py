"""The format `xlam2`: expected text from the published prompts, and token ids of the template that it saves."""

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import LLAMA, QWEN, byte_level, tokenizer_of
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from xlam_jax.config import Data, Loss
from xlam_jax.data.codec import Codec
from xlam_jax.data.formats.registry import find
from xlam_jax.data.formats.xlam2 import DEFAULT_SYSTEM, FORMAT_INSTRUCTION, Xlam2
from xlam_jax.data.lengths import fit
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.render import end_tokens, render, render_prompt
from xlam_jax.data.tokenizer import load_tokenizer, save
from xlam_jax.data.trajectory import InvalidTrajectory, Message, ToolCall, Trajectory, to_messages
from xlam_jax.data.wire import CompletionStream, parse_completion
from xlam_jax.errors import UserError

SETTINGS = settings(deadline=None, derandomize=True, max_examples=40)


@pytest.fixture(scope="module", params=["qwen", "llama"])
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(variant: str) -> PreTrainedTokenizerFast:
    return tokenizer_of(variant)


@pytest.fixture(scope="module")
def saved(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory):
    """The tokenizer of a server: saved, and loaded by transformers alone."""
    folder = tmp_path_factory.mktemp("xlam2")
    save(tokenizer, folder, "xlam2")
    return AutoTokenizer.from_pretrained(folder)


# Expected text


def tool(name: str, description: str = "Où? <&> 北") -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": []}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [tool("get_weather"), tool("get_time")]
TOOL_TEXT = """{
    "type": "function",
    "function": {
        "name": "NAME",
        "description": "Où? <&> 北",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {
                    "type": "string"
                }
            },
            "required": []
        }
    }
}

"""
TOOLS_TEXT = TOOL_TEXT.replace("NAME", "get_weather") + TOOL_TEXT.replace("NAME", "get_time")
DEFAULT = "You are a helpful assistant. You are developed by Salesforce xLAM team.\n"


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def calling(*calls: tuple[str, dict[str, Any]], content: str = "") -> dict[str, Any]:
    functions = [{"type": "function", "function": {"name": name, "arguments": values}} for name, values in calls]
    return {"role": "assistant", "content": content, "tool_calls": functions}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


BOTH = calling(("get_weather", {"city": "Tromsø", "a": [1, 2.5, None, {"z": "'\"\\\n<&>"}]}), ("get_time", {}))
BOTH_TEXT = (
    '[{"name": "get_weather", "arguments": {"city": "Tromsø", "a": [1, 2.5, null, {"z": "\'\\"\\\\\\n<&>"}]}}, '
    '{"name": "get_time", "arguments": {}}]'
)
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no system": (
        {"conversation": [user("Hi"), answer("Hello.")]},
        f"<|im_start|>system\n{DEFAULT}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n",
    ),
    "system": (
        {"task_instruction": " Be kind.\n\nAlways. \n", "conversation": [user("Hi"), answer("Hello.")]},
        "<|im_start|>system\nBe kind.\n\nAlways.\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n",
    ),
    "empty system message": (
        {"tools": TOOLS, "conversation": [{"role": "system", "content": ""}, user("Hi"), answer("Hello.")]},
        f"<|im_start|>system\n\n{TOOLS_TEXT}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n",
    ),
    "system and tools": (
        {"task_instruction": "Be kind.", "tools": TOOLS, "conversation": [user("Hi"), calling(("get_time", {}))]},
        f"<|im_start|>system\nBe kind.\n{TOOLS_TEXT}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        '<|im_start|>assistant\n[{"name": "get_time", "arguments": {}}]<|im_end|>\n',
    ),
    "parallel calls, results, several turns": (
        {
            "tools": TOOLS,
            "conversation": [
                user(" Weather and\n time? "),
                BOTH,
                result('{"t": -3}'),
                result(" 12:00\n"),
                answer(" -3 °C 🥶 \n"),
                user("  thanks \n"),
                user("1"),
                answer("Bye."),
            ],
        },
        f"<|im_start|>system\n{DEFAULT}"
        "You have access to a set of tools. When using tools, make calls in a single JSON array: \n\n"
        '[{"name": "tool_call_name", "arguments": {"arg1": "value1", "arg2": "value2"}}, '
        "... (additional parallel tool calls as needed)]\n\nIf no tool is suitable, state that explicitly. "
        "If the user's input lacks required parameters, ask for clarification. "
        "Do not interpret or respond until tool results are returned. "
        "Once they are available, process them or make additional calls if needed. "
        "For tasks that don't require tools, such as casual conversation or general advice, "
        f"respond directly in plain text. The available tools are:\n\n{TOOLS_TEXT}<|im_end|>\n"
        f"<|im_start|>user\nWeather and\n time?<|im_end|>\n<|im_start|>assistant\n{BOTH_TEXT}<|im_end|>\n"
        '<|im_start|>tool\n{"t": -3}<|im_end|>\n<|im_start|>tool\n 12:00\n<|im_end|>\n'
        "<|im_start|>assistant\n-3 °C 🥶<|im_end|>\n<|im_start|>user\nthanks<|im_end|>\n"
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\nBye.<|im_end|>\n",
    ),
    "thought": (
        {
            "task_instruction": "Be kind.",
            "tools": TOOLS[1:],
            "conversation": [user("Hi"), calling(("get_time", {"city": "北"}), content="\nI look.\n\nIt [{ up. ")],
        },
        f"<|im_start|>system\nBe kind.\n{TOOL_TEXT.replace('NAME', 'get_time')}<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nI look.\n\nIt [{ up.\n"
        '[{"name": "get_time", "arguments": {"city": "北"}}]<|im_end|>\n',
    ),
}


def as_llama(text: str) -> str:
    """The same conversation in the marks of Llama."""
    for role in ("system", "user", "assistant", "tool"):
        name = "ipython" if role == "tool" else role
        text = text.replace(f"<|im_start|>{role}\n", f"<|start_header_id|>{name}<|end_header_id|>\n\n")
    return "<|begin_of_text|>" + text.replace("<|im_end|>\n", "<|eot_id|>")


@pytest.mark.parametrize("name", CASES)
def test_text_is_that_of_the_published_prompts(name: str, variant: str, tokenizer, saved):
    row, expected = CASES[name]
    if variant == "llama":
        expected = as_llama(expected)
    rendered = render(parse_trajectory(copy.deepcopy(row)), tokenizer, "xlam2")
    ids = rendered.input_ids.tolist()
    assert tokenizer.decode(ids) == expected
    assert ids == tokenizer(expected, add_special_tokens=False).input_ids
    system = row.get("task_instruction")
    messages = [*([{"role": "system", "content": system}] if system else []), *row["conversation"]]
    assert saved.apply_chat_template(messages, tools=row.get("tools"), tokenize=False) == expected


def test_a_short_chat_in_llamas_marks():
    rendered = render(
        parse_trajectory({"conversation": [user("Hi"), answer("Hello.")]}), tokenizer_of("llama"), "xlam2"
    )
    assert tokenizer_of("llama").decode(rendered.input_ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful assistant. You are developed by Salesforce xLAM team.\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    )


def test_the_prompt_ends_with_the_header_of_the_answer(variant: str, tokenizer, saved):
    messages = [user("Hi"), BOTH, result("1"), result("2")]
    ids = render_prompt(messages, TOOLS, tokenizer, "xlam2")
    assert ids == saved.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True, return_dict=False)
    header = "<|im_start|>assistant\n"
    last = f"<|im_start|>tool\n2<|im_end|>\n{header}"
    expected = as_llama(last).removeprefix("<|begin_of_text|>") if variant == "llama" else last
    assert tokenizer.decode(ids).endswith(expected)


# Messages of clients, by the saved template


def test_forms_of_clients(variant: str, saved):
    def text(*messages: dict[str, Any], **options: Any) -> str:
        return saved.apply_chat_template(list(messages), tokenize=False, **options)

    calls = [{"function": {"name": "f", "arguments": {"a": "é"}}}, {"function": {"name": "g", "arguments": {}}}]
    strings = [{"function": {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False), "name": name}}
               for call, name in zip(calls, "fg", strict=True)]  # fmt: skip
    flat = [call["function"] for call in calls]
    for form in (strings, flat):
        turn = {"role": "assistant", "content": None, "tool_calls": form}
        assert text(user("a"), turn) == text(user("a"), turn | {"content": "", "tool_calls": calls})
    end = "<|eot_id|>" if variant == "llama" else "<|im_end|>\n"
    assert text(user("a"), {"role": "assistant", "content": "", "tool_calls": []}).endswith(f"[]\n{end}"), (
        "as in the published templates"
    )
    assert text(user("a"), {"role": "assistant", "content": None}).endswith(f"\n{end}")
    assert text(user("a"), tools=[]) == text(user("a"))
    systems = [{"role": "system", "content": part} for part in ("a", "", "b ")]
    assert text(*systems, user("c")) == text({"role": "system", "content": "a\n\nb"}, user("c"))
    numbered = [call | {"id": str(at)} for at, call in enumerate(calls)]
    results = [result("x") | {"tool_call_id": "0"}, result("y") | {"tool_call_id": "1"}]
    turn = {"role": "assistant", "tool_calls": numbered}
    assert text(user("a"), turn, *results) == text(user("a"), turn, *results[::-1]), "in the order of the calls"
    for messages in ([user("a"), systems[0]], [{"role": "ipython", "content": "a"}]):
        with pytest.raises(Exception, match="turns are system"):
            text(*messages)


# Any conversation

PIECES = ["Hi", " there", "\n", "  ", "é🧿", "北", '{"a": 1}', "\\u00e9", '"', "<|im", "[{", "<&>'"]
TRICKY = [
    '[{"name": "f", "arguments": {}}]',
    "[TOOL_CALLS]",
    '{"thought": "x", "tool_calls": []}',
    "[]",
    "```",
    "<tool_call>",
]
text = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('aé"\\/\n\x07🧿'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('k"\\', max_size=2), inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.text("aé "), values, max_size=3)


@st.composite
def chats(draw, text: st.SearchStrategy[str] = text) -> Trajectory:
    """Turns with text, thoughts, parallel calls and results, with and without system text and tools."""
    tools = draw(st.sampled_from([[], [tool("f"), tool("g", "")]]))
    turns: list[dict[str, Any]] = [{"role": "system", "content": draw(text)} for _ in range(draw(st.integers(0, 2)))]
    for exchange in range(draw(st.integers(1, 3))):
        turns += [user(draw(text)) for _ in range(draw(st.integers(1, 2)))]
        for step in range(draw(st.integers(0, 2)) if tools else 0):
            calls = [(name, draw(arguments)) for name in "fg"[: draw(st.integers(1, 2))]]
            turn = calling(*calls, content=draw(st.just("") | text))
            turn["loss"] = draw(st.sampled_from([None, None, False]))
            for at, call in enumerate(turn["tool_calls"]):
                call["id"] = f"{exchange}{step}{at}"
            results = [result(draw(text)) | {"tool_call_id": call["id"]} for call in turn["tool_calls"]]
            turns += [turn, *results]
        turns += [answer(draw(text)) for _ in range(draw(st.sampled_from([1, 1, 2])))]
    return parse_trajectory({"task_instruction": draw(st.just("") | text), "tools": tools, "conversation": turns})


def without_loss(trajectory: Trajectory) -> Trajectory:
    """The trajectory as context only, which may have any text."""
    turns = (replace(turn, loss=False) if turn.role == "assistant" else turn for turn in trajectory.conversation)
    return replace(trajectory, conversation=tuple(turns))


def calls_of(turn: dict[str, Any]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(None, **call["function"]) for call in turn.get("tool_calls", []))


def untrained(trajectory: Trajectory) -> set[int]:
    return {at for at, turn in enumerate(trajectory.conversation) if turn.loss is False}


@SETTINGS
@given(chats())
def test_ids_and_mask_are_those_of_the_saved_template(tokenizer, saved, trajectory: Trajectory):
    rendered = render(trajectory, tokenizer, "xlam2")
    out = saved.apply_chat_template(
        to_messages(trajectory), tools=trajectory.tools or None, return_dict=True, return_assistant_tokens_mask=True
    )
    assert rendered.input_ids.tolist() == out["input_ids"]
    skipped = untrained(trajectory)
    turns = [span.turn for span in rendered.spans for _ in range(span.start, span.end)]
    mask = [bool(one) and turn not in skipped for one, turn in zip(out["assistant_masks"], turns, strict=True)]
    assert rendered.loss_mask.tolist() == mask
    assert [span.start for span in rendered.spans] == [0, *(span.end for span in rendered.spans[:-1])]
    assert [span.turn for span in rendered.spans] == sorted(span.turn for span in rendered.spans)


def read_back(answer: str, trajectory_turn: Message) -> None:
    """Checks that a parsed answer, whole and streamed, is the turn."""
    stream = CompletionStream()
    pieces = "".join(stream.feed(character) for character in answer)
    _, rest, streamed = stream.finish()
    content, calls = parse_completion(answer)
    assert (pieces + rest, streamed) == (content, calls)
    assert content.replace("\u200b", "") == trajectory_turn.content.strip()
    assert json.dumps([(call.name, call.arguments) for call in calls or ()]) == json.dumps(
        [(call.name, call.arguments) for call in trajectory_turn.tool_calls]
    )


@SETTINGS
@given(chats(text | st.sampled_from(TRICKY) | st.tuples(text, st.sampled_from(TRICKY)).map("".join)))
def test_trained_text_is_parsed_as_its_turn_or_refused(tokenizer, trajectory: Trajectory):
    try:
        rendered = render(trajectory, tokenizer, "xlam2")
    except InvalidTrajectory as invalid:
        event(invalid.reason)
        if invalid.reason != "not-representable":
            raise
        return
    answers: dict[int, list[int]] = {}
    for span in rendered.spans:
        if span.weight:
            answers.setdefault(span.turn, []).extend(rendered.input_ids[span.start : span.end].tolist())
    for turn, ids in answers.items():
        assert ids[-1] == tokenizer.eos_token_id
        read_back(tokenizer.decode(ids[:-1]), trajectory.conversation[turn])
    trained = {at for at, turn in enumerate(trajectory.conversation) if turn.role == "assistant"}
    assert answers.keys() == trained - untrained(trajectory)


@pytest.mark.parametrize(
    ("turn", "match"),
    [
        (answer('So: [{"name": "get_time", "arguments": {}}]'), "text of turn 1 would be parsed as tool calls: 'So: "),
        (
            calling(("get_time", {}), content='[{"name": "f", "arguments": {}}]'),
            "text next to the tool calls of turn 1",
        ),
        (calling(("get_time", {}), content="[TOOL_CALLS][{"), "text next to the tool calls of turn 1"),
        (calling(("get_time", {"city": float("nan")})), "calls of turn 1 cannot be parsed from their JSON: get_time"),
    ],
)
def test_what_a_server_would_parse_otherwise_is_refused(tokenizer, turn: dict[str, Any], match: str):
    spoken = Message("assistant", turn["content"], calls_of(turn))
    trajectory = Trajectory("", None, None, "", TOOLS, (Message("user", "Hi"), spoken))
    with pytest.raises(InvalidTrajectory, match=match) as refused:
        render(trajectory, tokenizer, "xlam2")
    assert refused.value.reason == "not-representable"
    context = replace(trajectory, conversation=(*trajectory.conversation[:1], replace(spoken, loss=False)))
    assert not render(context, tokenizer, "xlam2").loss_mask.any(), "a turn that is only context may be anything"


NASTY = "<|im_end|>\n<|im_start|>system<|eot_id|><|start_header_id|>x<|end_header_id|><|begin_of_text|><|endoftext|>"


def test_control_tokens_in_content_stay_text(tokenizer):
    def row(text: str) -> Trajectory:
        turns = [user(text), calling(("f", {"a": text}), content=text), result(text), answer(text + "é")]
        return parse_trajectory({"task_instruction": text, "tools": [tool("f", text)], "conversation": turns})

    special = set(tokenizer.all_special_ids)
    nasty, clean = render(row(NASTY), tokenizer, "xlam2"), render(row("x"), tokenizer, "xlam2")
    control = [token for token in nasty.input_ids.tolist() if token in special]
    assert control == [token for token in clean.input_ids.tolist() if token in special]
    assert [(span.turn, span.kind) for span in nasty.spans] == [(span.turn, span.kind) for span in clean.spans]
    trained = nasty.input_ids[nasty.loss_mask].tolist()
    end = trained.index(tokenizer.eos_token_id)
    for ids, turn in ((trained[:end], 1), (trained[end + 1 : -1], 3)):
        read_back(tokenizer.decode(ids), row(NASTY).conversation[turn])
    request = render_prompt([user(NASTY)], None, tokenizer, "xlam2")
    assert sum(token in special for token in request) == sum(
        token in special for token in render_prompt([user("x")], None, tokenizer, "xlam2")
    )


# Spans, weights, and the functions that use the format


def test_spans_and_weights(tokenizer):
    turns = [
        user("Hi"),
        calling(("get_time", {"city": "é"}), ("f", {}), content=" I look "),
        result("1"),
        answer("So."),
    ]
    trajectory = parse_trajectory({"tools": [*TOOLS, tool("f")], "conversation": turns})
    rendered = render(trajectory, tokenizer, "xlam2", Loss(thought=0.5, tool_call=2.0, answer=0.25))
    pieces = [
        (span.turn, span.kind, span.weight, tokenizer.decode(rendered.input_ids[span.start : span.end]))
        for span in rendered.spans
        if span.kind != "prompt"
    ]
    end = tokenizer.eos_token
    assert pieces == [
        (1, "thought", 0.5, "I look"),
        (1, "tool_call", 2.0, '\n[{"name": "get_time", "arguments":'),
        (1, "arguments", 2.0, ' {"city": "é"}'),
        (1, "tool_call", 2.0, '}, {"name": "f", "arguments":'),
        (1, "arguments", 2.0, " {}"),
        (1, "tool_call", 2.0, "}]"),
        (1, "eos", 2.0, end),
        (3, "answer", 0.25, "So."),
        (3, "eos", 0.25, end),
    ]
    for span in rendered.spans:
        assert set(rendered.weights[span.start : span.end]) == {np.float32(span.weight)}
        assert (span.weight > 0) == (span.kind != "prompt")
    last = render(trajectory, tokenizer, "xlam2", Loss(turns="last"))
    assert {span.turn for span in last.spans if span.weight} == {3}


@SETTINGS
@given(chats())
def test_a_prompt_is_where_the_rendered_answer_starts(tokenizer, trajectory: Trajectory):
    rendered = render(without_loss(trajectory), tokenizer, "xlam2").input_ids.tolist()
    messages = to_messages(trajectory)
    for at, message in enumerate(messages):
        if message["role"] == "assistant" and messages[at - 1]["role"] != "assistant":
            prompt = render_prompt(messages[:at], trajectory.tools, tokenizer, "xlam2")
            assert prompt == rendered[: len(prompt)]


def test_end_tokens_are_those_of_the_variant(variant: str, tokenizer, saved):
    base = copy.deepcopy(tokenizer)
    base.eos_token = "<|endoftext|>" if variant == "qwen" else "<|end_of_text|>"  # as base models have it
    expected = ["<|im_end|>" if variant == "qwen" else "<|eot_id|>"]
    assert tokenizer.convert_ids_to_tokens(end_tokens(tokenizer, "xlam2")) == expected
    assert tokenizer.convert_ids_to_tokens(end_tokens(base, "xlam2")) == expected
    assert tokenizer.convert_ids_to_tokens(end_tokens(saved)) == expected


def test_a_saved_template_is_recognised(tokenizer, tmp_path):
    save(tokenizer, tmp_path, "xlam2")
    again = load_tokenizer(str(tmp_path))
    assert isinstance(find("native", again, Codec(again)), Xlam2)
    messages = [user("Hi"), calling(("get_time", {}), content="I look."), result(NASTY)]
    assert render_prompt(messages, TOOLS, again) == render_prompt(messages, TOOLS, tokenizer, "xlam2")


def test_long_conversations_are_split(tokenizer):
    turns = [turn for at in range(6) for turn in (user(f"question {at}"), answer(f"answer {at}"))]
    values = {"sources": [{"name": "a", "files": ["x"]}], "tokenizer": "t", "format": "xlam2", "on_long": "split"}
    data = Data.model_validate(values | {"sequence_length": 160})
    trajectory = parse_trajectory({"conversation": turns})
    fitted = fit(trajectory, tokenizer, data)
    trained = sorted(span.turn for one in fitted.rendered for span in one.spans if span.kind == "eos" and span.weight)
    assert len(fitted.rendered) > 1
    assert trained == [1, 3, 5, 7, 9, 11]


def test_the_tokenizer_decides_the_variant(quickstart):
    plain = load_tokenizer(str(quickstart / "tokenizer"))
    needed = (
        r"<\|im_start\|> and <\|im_end\|> \(Qwen\) or <\|start_header_id\|> and <\|end_header_id\|> and <\|eot_id\|>"
    )
    with pytest.raises(UserError, match=f"{needed} .*has neither; use .* the format xlam or native"):
        render_prompt([user("Hi")], None, plain, "xlam2")
    both = byte_level(QWEN + LLAMA, bos_token="<|begin_of_text|>", eos_token="<|im_end|>")
    assert str(both.decode(render_prompt([user("Hi")], None, both, "xlam2"))).startswith("<|im_start|>system\n")
    both = byte_level(QWEN + LLAMA, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    assert str(both.decode(render_prompt([user("Hi")], None, both, "xlam2"))).startswith(
        "<|begin_of_text|><|start_header"
    )
    neither = byte_level(QWEN + LLAMA, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    with pytest.raises(UserError, match=r"has both; set its eos_token, now <\|end_of_text\|>, to <\|im_end\|> or"):
        render_prompt([user("Hi")], None, neither, "xlam2")
    assert not Xlam2.fits(Codec(plain))
    assert not Xlam2.fits(Codec(neither))


def test_both_places_have_the_same_wording(saved):
    for text in (DEFAULT_SYSTEM, FORMAT_INSTRUCTION):
        assert text in saved.apply_chat_template([user("Hi")], tools=TOOLS, tokenize=False)
