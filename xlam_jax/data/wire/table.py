"""The table of wire formats."""

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.data.wire.array import CLOSING, TOOL_CALLS, parse_completion
from xlam_jax.data.wire.base import Tools, Wire, WireFormat
from xlam_jax.data.wire.fronts import SPACES, Fronts, literal
from xlam_jax.errors import UserError, nearest


def _read_array(text: str, tools: Tools) -> tuple[str, tuple[ToolCall, ...] | None]:
    return parse_completion(text)


def _array_fronts() -> Fronts:
    """Returns the beginnings of `[TOOL_CALLS] ```json [{"`, with each of the marks or none, and of the object."""
    marks = {mark: (*literal(mark), SPACES) if mark else () for mark in ("", *CLOSING)}
    fronts = [(*token, *mark) for token in ((), (*literal(TOOL_CALLS), SPACES)) for mark in marks.values()]
    array = (r"\[", SPACES, r"\{", SPACES, '"')
    return Fronts(tuple((*front, *array) for front in fronts), tuple((*mark, r"\{") for mark in marks.values()))


_TODO = Fronts(())

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
        WireFormat("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}', "mistral", "mistral", _TODO, _read_array),
        WireFormat(
            "hermes",
            '<tool_call>\\n{"name": "f", "arguments": {"a": 1}}\\n</tool_call>',
            "hermes",
            "hermes",
            _TODO,
            _read_array,
        ),
    )
}
"""How calls are written in a model's text, by name."""

ARRAY = Wire(WIRE_FORMATS["array"])
ANY = Wire(WIRE_FORMATS["array"])


def wire_format(name: str) -> WireFormat:
    """Returns the wire format of a name. Raises `UserError` for other names, with the nearest one."""
    if name not in WIRE_FORMATS:
        raise UserError(
            f"'{name}' is not a wire format; choose one of {', '.join(WIRE_FORMATS)}{nearest(name, WIRE_FORMATS)}"
        )
    return WIRE_FORMATS[name]
