"""Answers and the templates that write them, for tests of wire formats."""

import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from chat_templates import published

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.data.wire import REASONINGS, Parsed, Wire, wire_format

WORDS = [
    "Oslo",
    "is",
    "3 °C",
    "東京",
    "naïve",
    "𝄞",
    "a=1",
    "(see",
    "x)",
    "[1]",
    '"quoted"',
    "don't",
    "\\n",
    "C:\\d",
    ";",
]
MARKS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<think>", "</think>", "[THINK]", "[/THINK]", "```", "</parameter>",
    "<function=f>", "</arg_value>", "<parameter=a>", "{", "}", "[", "]", "f(a=1)", "[f(a=1)]", '{"name": "f"',
    "<|end|>", "<|python_tag|>", "[ARGS]", "<｜tool▁calls▁begin｜>", "<|tool_call_start|>", "<|channel|>",
    '"arguments": {}', "</parameter>\n</function>", "</arg_value>\n</tool_call>",
]  # fmt: skip
NAMES = ["f", "get_weather", "search-flights", "a.b", "Überblick", "name"]
KEYS = ["a", "city", "unit_of", "name", "arguments", "b2", "größe", "two words", "x-y", "9", "q'", "<k>"]


class Answer(NamedTuple):
    """What a model says, and the tools of the request."""

    expected: Parsed
    tools: list[dict[str, Any]]


def some_text(random_: random.Random, most: int = 4) -> str:
    """A few words, at times with marks, other white space, or white space at the ends."""
    words = [random_.choice(WORDS if random_.random() < 0.9 else MARKS) for _ in range(random_.randint(1, most))]
    text = random_.choice([" ", " ", " ", "\n", "\n\n", ""]).join(words)
    return text if random_.random() < 0.9 else random_.choice([f" {text}", f"{text}\n", f"\n{text}", f"{text} "])


def _number(random_: random.Random) -> float:
    return random_.choice([0.5, -0.0, 1.0, 1e300, 1e-7, 3.14, 2**0.5, 1e16, -12.25])


def _value(random_: random.Random, kind: str, depth: int = 0) -> Any:
    match kind:
        case "string":
            choices = ["", "5", "true", "null", "None", "[1]", '{"a": 1}', "1e5", "é\u2028\x7f"]
            return random_.choice(choices) if random_.random() < 0.2 else some_text(random_, 3)
        case "integer":
            return random_.choice([0, -1, 7, 2**64, -(10**30)])
        case "number":
            return _number(random_)
        case "boolean":
            return random_.random() < 0.5
        case "null":
            return None
    most = 0 if depth > 2 else random_.randint(0, 3)
    kinds = ["string", "integer", "number", "boolean", "null", "array", "object"]
    values = [_value(random_, random_.choice(kinds), depth + 1) for _ in range(most)]
    return values if kind == "array" else dict(zip(random_.sample(KEYS, most), values, strict=True))


def _argument(random_: random.Random) -> tuple[dict[str, Any], Any]:
    """The schema of a parameter, and a value that fits it."""
    kinds = ["string", "string", "string", "integer", "number", "boolean", "array", "object"]
    kind = random_.choice(kinds)
    value = _value(random_, kind)
    match random_.randint(0, 9):
        case 0:
            return {"type": [kind, "null"]}, random_.choice([value, None])
        case 1:
            other = random_.choice(kinds)
            return {"anyOf": [{"type": kind}, {"type": other}]}, value
        case 2:
            return {"description": "anything"}, value
        case 3 if kind in ("string", "integer"):
            return {"enum": [value, "x"]}, value
    return {"type": kind}, value


def some_answer(random_: random.Random) -> Answer:
    """An answer of one of the kinds that are tested: with or without reasoning, thought, and calls."""
    reasoning = some_text(random_, 6) if random_.random() < 0.4 else ""
    calls, tools = [], []
    names = random_.sample(NAMES, random_.choice([0, 1, 1, 1, 2, 3]))
    for name in names:
        keys = random_.sample(KEYS[:7] if random_.random() < 0.9 else KEYS, random_.randint(0, 3))
        parameters = {key: _argument(random_) for key in keys}
        calls.append(ToolCall(None, name, {key: value for key, (_, value) in parameters.items()}))
        schema = {"type": "object", "properties": {key: schema for key, (schema, _) in parameters.items()}}
        tools.append({"type": "function", "function": {"name": name, "description": "d", "parameters": schema}})
    content = some_text(random_, 6) if not calls or random_.random() < 0.5 else ""
    return Answer(Parsed(reasoning, content, tuple(calls) or None), tools)


# Why an answer cannot be written so that it is read back


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in _strings(part)]
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []


def _holds(text: str, *marks: str) -> bool:
    return any(mark in text for mark in marks)


def thought_and_calls(answer: Answer) -> bool:
    return bool(answer.expected.content and answer.expected.calls)


def parallel_calls(answer: Answer) -> bool:
    return len(answer.expected.calls or ()) > 1


def any_calls(answer: Answer) -> bool:
    return answer.expected.calls is not None


def any_reasoning(answer: Answer) -> bool:
    return bool(answer.expected.reasoning)


def spaces_at_the_ends(answer: Answer) -> bool:
    return any(text != text.strip() for text in answer.expected[:2])


def spaces_before_calls(answer: Answer) -> bool:
    return any_calls(answer) and answer.expected.content != answer.expected.content.rstrip()


def lines_at_the_ends(answer: Answer) -> bool:
    """Line breaks around the reasoning, or in front of the content: templates mark reasoning that is empty, too."""
    reasoning, content, _ = answer.expected
    return reasoning != reasoning.strip("\n") or content != content.lstrip("\n")


def marks_of_reasoning(answer: Answer) -> bool:
    return any(_holds(text, "<think>", "</think>", "[THINK]", "[/THINK]") for text in answer.expected[:2])


def marks_of_calls(answer: Answer) -> bool:
    """The text holds marks that begin calls, so that it may look like a call."""
    return _holds(
        answer.expected.content,
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<function=", '{"name"', '"arguments"', "[f(", "<|", "<｜"),
    )


def marks_of_messages(answer: Answer) -> bool:
    return any(_holds(text, "<|end|>", "<|channel|>") for text in answer.expected[:2])


def marks_in_values(answer: Answer) -> bool:
    """A string holds the mark that ends a value."""
    return any(
        _holds(text, "</parameter>", "</arg_value>")
        for call in answer.expected.calls or ()
        for text in _strings(call.arguments)
    )


def values_without_types(answer: Answer) -> bool:
    """A value of a parameter whose schema does not name its type, or names several types that the text may have."""
    for tool, call in zip(answer.tools, answer.expected.calls or (), strict=True):
        properties = tool["function"]["parameters"]["properties"]
        for key, value in call.arguments.items():
            types = properties[key].get("type")
            if types is None or (isinstance(types, list) and (isinstance(value, str) or value is None)):
                return True
    return False


def quotes_in_strings(answer: Answer) -> bool:
    """A string that is written in quotes without escapes."""
    return any(
        _holds(text, "'", "\\", "\n", "\r") for call in answer.expected.calls or () for text in _strings(call.arguments)
    )


def names_of_arguments(answer: Answer) -> bool:
    """Names that are not identifiers, where they are written without quotes."""
    return any(not key.isidentifier() for call in answer.expected.calls or () for key in call.arguments)


# Templates


class Template(NamedTuple):
    """A public template: how it renders an answer, which wire format reads it, and which answers it cannot write."""

    name: str
    wire: Wire
    render: Callable[[Answer], str]
    """Returns the completion without its end token; raises where the template refuses the answer."""
    refusals: tuple[Callable[[Answer], bool], ...]


class Refused(Exception):  # noqa: N818
    """A template refuses an answer."""


def _messages(answer: Answer, reasoning_key: str) -> list[dict[str, Any]]:
    reasoning, content, calls = answer.expected
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message[reasoning_key] = reasoning
    if calls:
        message["tool_calls"] = [
            {"type": "function", "id": "123456789", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return [{"role": "user", "content": "What now?"}, message]


def by_template(name: str, header: str, ends: tuple[str, ...], reasoning_key: str) -> Callable[[Answer], str]:
    """Renders with a template of TRL's package, and cuts off the prompt and the end."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(answer: Answer) -> str:
        tools: Any = answer.tools or None
        try:
            [text], _ = render_jinja_template(
                [_messages(answer, reasoning_key)],
                tools=tools,
                chat_template=published(name),
                bos_token="<s>",
                eos_token="</s>",
            )
        except TemplateError as error:
            raise Refused(str(error)) from None
        text = text[text.index(header, text.index("What now?")) + len(header) :]
        return text[: max(text.rfind(end) for end in ends)] if ends else text

    return render


CHATML = ("<|im_start|>assistant\n", ("<|im_end|>",))
LLAMA = ("<|start_header_id|>assistant<|end_header_id|>\n\n", ("<|eot_id|>",))
DEEPSEEK = ("<｜Assistant｜>", ("<｜end▁of▁sentence｜>",))
GLM = ("<|assistant|>", ())
HARMONY = ("<|start|>assistant", ("<|call|>", "<|return|>"))


@cache
def _tekken(version: str) -> Any:
    """mistral-common's encoder of a version, with bytes as its vocabulary."""
    import base64

    from mistral_common.tokens.tokenizers import instruct
    from mistral_common.tokens.tokenizers.base import SpecialTokens, TokenizerVersion
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    special: list[Any] = [
        {"rank": i, "token_str": token.value, "is_control": True} for i, token in enumerate(SpecialTokens)
    ]
    vocabulary: list[Any] = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)
    ]
    tokenizer = Tekkenizer(
        vocabulary, special, "(?s).", 256 + len(special), len(special), TokenizerVersion(version)
    )  # fmt: skip
    return getattr(instruct, f"InstructTokenizer{version.upper()}")(tokenizer)


def by_mistral_common(version: str) -> Callable[[Answer], str]:
    """Renders with mistral-common."""
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.protocol.instruct.chunk import TextChunk, ThinkChunk
    from mistral_common.protocol.instruct.messages import AssistantMessage
    from mistral_common.protocol.instruct.tool_calls import FunctionCall
    from mistral_common.protocol.instruct.tool_calls import ToolCall as Call
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

    def render(answer: Answer) -> str:
        encoder = _tekken(version)
        reasoning, content, calls = answer.expected
        chunks: Any = content or None
        if reasoning:
            chunks = [ThinkChunk(thinking=reasoning), *([TextChunk(text=content)] if content else [])]
        message = AssistantMessage(
            content=chunks,
            tool_calls=[
                Call(id="123456789", function=FunctionCall(name=call.name, arguments=json.dumps(call.arguments)))
                for call in calls or ()
            ]
            or None,
        )
        try:
            ids = encoder.encode_assistant_message(message, False)
        except (MistralCommonException, ValueError, AssertionError) as error:
            raise Refused(str(error)) from None
        return encoder.tokenizer.decode(ids[:-1], special_token_policy=SpecialTokenPolicy.KEEP)

    return render


def _wire(name: str, reasoning: str = "", opened: bool | None = None) -> Wire:
    return Wire(wire_format(name), REASONINGS[reasoning] if reasoning else None, opened)


def _template(
    name: str,
    wire: Wire,
    layout: tuple[str, tuple[str, ...]],
    refusals: tuple[Callable[[Answer], bool], ...],
    key: str = "reasoning_content",
) -> Template:
    return Template(name, wire, by_template(name, *layout, key), refusals)


HERMES = (spaces_before_calls, marks_of_calls)
MISTRAL = (any_reasoning, *HERMES, spaces_at_the_ends)
THINK = (marks_of_reasoning, lines_at_the_ends)
XML = (values_without_types, marks_in_values, names_of_arguments)


def templates() -> list[Template]:
    """The public templates that tests render with."""
    return [
        _template("qwen2_5", _wire("hermes"), CHATML, (any_reasoning, *HERMES)),
        _template("qwen3", _wire("hermes", "think"), CHATML, (*HERMES, *THINK)),
        _template("qwen3_instruct_2507", _wire("hermes"), CHATML, (any_reasoning, *HERMES)),
        _template("qwen3_5_think", _wire("qwen3_coder", "think"), CHATML, (*HERMES, *THINK, *XML, spaces_at_the_ends)),
        _template(
            "qwen3_5_nothink", _wire("qwen3_coder", "think"), CHATML, (*HERMES, *THINK, *XML, spaces_at_the_ends)
        ),
        _template("qwen3_6", _wire("qwen3_coder", "think"), CHATML, (*HERMES, *THINK, *XML, spaces_at_the_ends)),
        _template("qwen3_8", _wire("qwen3_coder", "think"), CHATML, (*HERMES, *THINK, *XML, spaces_at_the_ends)),
        _template(
            "nemotron_3_nano", _wire("qwen3_coder", "think"), CHATML, (*HERMES, *THINK, *XML, spaces_at_the_ends)
        ),
        _template(
            "nemotron_3_super", _wire("qwen3_coder", "think"), CHATML, (*HERMES, *THINK, *XML, spaces_at_the_ends)
        ),
        _template(
            "llama3_1",
            _wire("llama3_json"),
            LLAMA,
            (any_reasoning, thought_and_calls, parallel_calls, spaces_at_the_ends),
        ),
        _template(
            "llama3_2",
            _wire("llama3_json"),
            LLAMA,
            (any_reasoning, thought_and_calls, parallel_calls, spaces_at_the_ends),
        ),
        _template("deepseekv3_training", _wire("deepseek_v3"), DEEPSEEK, (any_reasoning, *HERMES, marks_of_reasoning)),
        _template("glm4moe", _wire("glm", "think"), GLM, (*HERMES, *THINK, *XML, spaces_at_the_ends)),
        _template(
            "gptoss", _wire("harmony"), HARMONY, (thought_and_calls, parallel_calls, marks_of_messages), "thinking"
        ),
        _template("lfm2_v2", _wire("pythonic"), CHATML, (any_reasoning, *HERMES, names_of_arguments)),
        _template(
            "lfm2_2_5",
            _wire("pythonic", "think", opened=False),
            CHATML,
            (*HERMES, *THINK, names_of_arguments, quotes_in_strings),
            "thinking",
        ),
        *(
            Template(
                f"mistral {version}",
                _wire("array"),
                by_mistral_common(version),
                (any_reasoning, thought_and_calls, marks_of_calls, spaces_at_the_ends),
            )
            for version in ("v2", "v3")
        ),
        Template("mistral v7", _wire("array"), by_mistral_common("v7"), MISTRAL),
        Template("mistral v11", _wire("mistral"), by_mistral_common("v11"), MISTRAL),
        Template(
            "mistral v13",
            _wire("mistral", "mistral", opened=False),
            by_mistral_common("v13"),
            (*HERMES, *THINK, spaces_at_the_ends),
        ),
    ]
