"""Wire formats: how calls and reasoning are written in a model's text, and how they are read, whole or streamed.

Needs only the standard library, so that a server reads completions exactly as training and evaluation do.
"""

from xlam_jax.data.wire.array import TOOL_CALLS, parse_completion
from xlam_jax.data.wire.base import Parsed, Tools, Wire, WireFormat, arguments_json, may_call
from xlam_jax.data.wire.objects import objects_in
from xlam_jax.data.wire.reasoning import REASONINGS, Reasoning
from xlam_jax.data.wire.stream import CompletionStream
from xlam_jax.data.wire.table import ANY, ARRAY, WIRE_FORMATS, wire_format

__all__ = [
    "ANY",
    "ARRAY",
    "REASONINGS",
    "TOOL_CALLS",
    "WIRE_FORMATS",
    "CompletionStream",
    "Parsed",
    "Reasoning",
    "Tools",
    "Wire",
    "WireFormat",
    "arguments_json",
    "may_call",
    "objects_in",
    "parse_completion",
    "wire_format",
]
