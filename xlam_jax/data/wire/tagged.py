"""Reads calls whose arguments are between tags, without types: Qwen3-Coder and GLM-4.5.

Strings are written as they are: one that contains the closing tag, followed by what may follow that tag, is cut off.
"""

import re
from typing import Any

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.data.wire.base import Tools
from xlam_jax.data.wire.fronts import Fronts, literal
from xlam_jax.data.wire.marked import NAME, TOOL_CALL, Read, UnreadableError, end_of, read_attempts
from xlam_jax.data.wire.typed import parameters_of, typed_value

_CUT = r"<?+/?+[a-z_]*+\Z"
"""The beginning of a tag at the end of a text that was cut off."""

_FUNCTION = r"<function=([^<>\n]{1,128}+)>\s*+"
_QWEN3_CODER = re.compile(
    rf"{TOOL_CALL}|<function=[^<>\n]{{1,128}}+>\s*+(?:<parameter=|</function>|{_CUT})|</function>\s*+</tool_call>"
)
_FUNCTION_START = re.compile(rf"(<tool_call>)?+\s*+{_FUNCTION}")
_PARAMETER = re.compile(r"<parameter=([^<>\n]{1,256}+)>\n?+")
_PARAMETER_END = re.compile(r"\n?</parameter>\s*+(?=<parameter=|</function>)")
_FUNCTION_END = re.compile(r"</function>")
_TOOL_CALL_END = re.compile(r"\s*+</tool_call>")
QWEN3_CODER_FRONTS = Fronts((literal("<tool_call>"), literal("<function=")))


def read_qwen3_coder(text: str, tools: Tools = (), alone: bool = False) -> Read:
    """Reads `<tool_call><function=f><parameter=a>1</parameter></function></tool_call>`.

    One line break after the opening tag of a value and one in front of its closing tag belong to the tags.
    """

    def read(text: str, front: re.Match[str]) -> tuple[list[ToolCall], int]:
        function = _FUNCTION_START.match(text, front.start())
        if function is None:
            raise UnreadableError("no function")
        arguments: dict[str, Any] = {}
        parameters, at = parameters_of(tools, function[2]), function.end()
        while (parameter := _PARAMETER.match(text, at)) is not None:
            end = _PARAMETER_END.search(text, parameter.end())
            if end is None or parameter[1] in arguments:
                raise UnreadableError("a value does not end, or a parameter occurs twice")
            value = text[parameter.end() : end.start()]
            arguments[parameter[1]] = typed_value(value, parameters, parameter[1])
            at = end.end()
        at = end_of(_FUNCTION_END, text, at)
        return [ToolCall(None, function[2], arguments)], end_of(_TOOL_CALL_END, text, at) if function[1] else at

    return read_attempts(text, _QWEN3_CODER, read, alone)


_GLM = re.compile(
    rf"{TOOL_CALL}|<tool_call>\s*+{NAME}\s*+(?:<arg_key>|</tool_call>|{_CUT})|</arg_value>\s*+</tool_call>"
)
_GLM_START = re.compile(rf"<tool_call>\s*+({NAME})\s*+")
_KEY = re.compile(r"<arg_key>([^<>\n]{1,256}+)</arg_key>\s*+<arg_value>")
_VALUE_END = re.compile(r"</arg_value>\s*+(?=<arg_key>|</tool_call>)")
_CALL_END = re.compile(r"</tool_call>")
GLM_FRONTS = Fronts((literal("<tool_call>"),))


def read_glm(text: str, tools: Tools = (), alone: bool = False) -> Read:
    """Reads `<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>`."""

    def read(text: str, front: re.Match[str]) -> tuple[list[ToolCall], int]:
        function = _GLM_START.match(text, front.start())
        if function is None:
            raise UnreadableError("no function")
        arguments: dict[str, Any] = {}
        parameters, at = parameters_of(tools, function[1]), function.end()
        while (key := _KEY.match(text, at)) is not None:
            end = _VALUE_END.search(text, key.end())
            if end is None or key[1] in arguments:
                raise UnreadableError("a value does not end, or a key occurs twice")
            arguments[key[1]] = typed_value(text[key.end() : end.start()], parameters, key[1])
            at = end.end()
        return [ToolCall(None, function[1], arguments)], end_of(_CALL_END, text, at)

    return read_attempts(text, _GLM, read, alone)


TAGGED_ATTEMPTS = (_QWEN3_CODER, _GLM)
