"""The table of wire formats."""

from typing import Any

from xlam_jax.data.wire.array import CLOSING, TOOL_CALLS, parse_completion
from xlam_jax.data.wire.bare import BARE_ATTEMPTS, LLAMA3_FRONTS, PYTHONIC_FRONTS, read_llama3_json, read_pythonic
from xlam_jax.data.wire.base import Tools, Wire, WireFormat
from xlam_jax.data.wire.fronts import SPACES, Fronts, literal
from xlam_jax.data.wire.harmony import HARMONY_FRONTS, read_harmony, read_harmony_reasoning
from xlam_jax.data.wire.marked import (
    DEEPSEEK_FRONTS,
    HERMES_FRONTS,
    MARKED_ATTEMPTS,
    MISTRAL_FRONTS,
    Read,
    read_deepseek_v3,
    read_deepseek_v31,
    read_hermes,
    read_mistral,
)
from xlam_jax.data.wire.reasoning import REASONINGS
from xlam_jax.data.wire.tagged import (
    GLM_FRONTS,
    QWEN3_CODER_FRONTS,
    TAGGED_ATTEMPTS,
    read_glm,
    read_qwen3_coder,
)
from xlam_jax.errors import UserError, nearest


def _read_array(text: str, tools: Tools = ()) -> Read:
    return parse_completion(text)


def _array_fronts() -> Fronts:
    """Returns the beginnings of `[TOOL_CALLS] ```json [{"`, with each of the marks or none, and of the object."""
    marks = {mark: (*literal(mark), SPACES) if mark else () for mark in ("", *CLOSING)}
    fronts = [(*token, *mark) for token in ((), (*literal(TOOL_CALLS), SPACES)) for mark in marks.values()]
    array = (r"\[", SPACES, r"\{", SPACES, '"')
    return Fronts(tuple((*front, *array) for front in fronts), tuple((*mark, r"\{") for mark in marks.values()))


_UNTYPED = "values are written without their types, so the schema of each parameter must name its type, and only one"


WIRE_FORMATS = {
    row.name: row
    for row in (
        WireFormat(
            "array",
            '[{"name": "f", "arguments": {"a": 1}}]',
            vllm="xlam",
            sglang="",
            fronts=_array_fronts(),
            read_calls=_read_array,
        ),
        WireFormat(
            "mistral",
            '[TOOL_CALLS]f[ARGS]{"a": 1}',
            vllm="mistral",
            sglang="mistral",
            fronts=MISTRAL_FRONTS,
            read_calls=read_mistral,
        ),
        WireFormat(
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>',
            vllm="hermes",
            sglang="hermes",
            fronts=HERMES_FRONTS,
            read_calls=read_hermes,
        ),
        WireFormat(
            "qwen3_coder",
            "<tool_call><function=f><parameter=a>1</parameter></function></tool_call>",
            vllm="qwen3_coder",
            sglang="qwen3_coder",
            fronts=QWEN3_CODER_FRONTS,
            read_calls=read_qwen3_coder,
            lossy=_UNTYPED,
        ),
        WireFormat(
            "glm",
            "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>",
            vllm="glm45",
            sglang="glm45",
            fronts=GLM_FRONTS,
            read_calls=read_glm,
            lossy=_UNTYPED,
        ),
        WireFormat(
            "llama3_json",
            '{"name": "f", "parameters": {"a": 1}}',
            vllm="llama3_json",
            sglang="llama3",
            fronts=LLAMA3_FRONTS,
            read_calls=read_llama3_json,
        ),
        WireFormat(
            "pythonic",
            "[f(a=1)]",
            vllm="pythonic",
            sglang="pythonic",
            fronts=PYTHONIC_FRONTS,
            read_calls=read_pythonic,
        ),
        WireFormat(
            "deepseek_v3",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f"
            ' ```json {"a": 1} ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            vllm="deepseek_v3",
            sglang="deepseekv3",
            fronts=DEEPSEEK_FRONTS,
            read_calls=read_deepseek_v3,
        ),
        WireFormat(
            "deepseek_v31",
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            vllm="deepseek_v31",
            sglang="deepseekv31",
            fronts=DEEPSEEK_FRONTS,
            read_calls=read_deepseek_v31,
        ),
        WireFormat(
            "harmony",
            ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>',
            vllm="openai",
            sglang="gpt-oss",
            fronts=HARMONY_FRONTS,
            read_calls=read_harmony,
            read_reasoning=read_harmony_reasoning,
        ),
    )
}
"""How calls are written in a model's text, by name. The names of parsers are those of vLLM 0.32 and of SGLang."""

ARRAY = Wire(WIRE_FORMATS["array"])
"""The format of xlam, xlam_v1 and xLAM-2, and of Mistral's tokenizers before v11."""


def wire_format(name: str) -> WireFormat:
    """Returns the wire format of a name. Raises `UserError` for other names, with the nearest one."""
    if name not in WIRE_FORMATS:
        raise UserError(
            f"'{name}' is not a wire format; choose one of {', '.join(WIRE_FORMATS)}{nearest(name, WIRE_FORMATS)}"
        )
    return WIRE_FORMATS[name]


_ATTEMPTS = (*MARKED_ATTEMPTS, *TAGGED_ATTEMPTS, *BARE_ATTEMPTS)
_MARKED = (read_mistral, read_hermes, read_qwen3_coder, read_deepseek_v3, read_deepseek_v31)
_MISTAKABLE = (read_glm, read_llama3_json, read_pythonic)
"""Readers of formats whose calls look like prose or like an answer in JSON."""


def _read_any(text: str, tools: Tools = ()) -> Read:
    """Reads the calls with which a text ends, in whichever format they are.

    Prose may show calls, so other text after or between calls makes the whole text content, as do calls in another
    format in front of them. Formats that can be mistaken need the names of the tools.
    """
    if (harmony := read_harmony(text)) != (text, None):
        return harmony
    names = {function.get("name") for tool in tools if isinstance(function := tool.get("function", tool), dict)}
    content, calls = _first_calls(text, tools, names)
    if calls and any(attempt.search(content) for attempt in _ATTEMPTS):
        return text, None
    return content, calls


def _first_calls(text: str, tools: Tools, names: set[Any]) -> Read:
    """Returns the calls of the first format that reads some."""
    for read in _MARKED:
        content, calls = read(text, tools, alone=True)
        if calls:
            return content, calls
    content, calls = parse_completion(text)
    if calls or content != text:
        return content, calls
    for read in _MISTAKABLE:
        content, calls = read(text, tools, alone=True)
        if calls and all(call.name in names for call in calls):
            return content, calls
    return text, None


def _any_fronts() -> Fronts:
    fronts = Fronts(())
    for row in WIRE_FORMATS.values():
        fronts |= row.fronts
    return fronts


ANY = Wire(
    WireFormat(
        "any",
        "any of the other formats",
        vllm="",
        sglang="",
        fronts=_any_fronts(),
        read_calls=_read_any,
        read_reasoning=read_harmony_reasoning,
    ),
    REASONINGS["think"],
    opened=False,
)
"""Reads every format, for clients that do not know which one a model writes: less of the text is certain in a stream,
and text after calls makes them content."""
