"""vLLM tool parser for models that xlam_jax trains: a plugin, and the only module that needs vLLM.

    vllm serve DIR --enable-auto-tool-choice --tool-parser-plugin serving.tool_parser --tool-call-parser xlam_jax

Calls are parsed by `xlam_jax.data.wire`, with the same result whole or streamed in pieces of any size. The parser
`xlam_jax` detects the wire format from the tokenizer's chat template; `xlam_jax_hermes` and so on parse one format, for
servers that are started with another template. With `tool_choice` "required" or a named function, the output is
constrained to calls of these tools in the trained format, in chat completions and in the Responses API. Malformed or
truncated calls are returned as content, and so is every answer to a request without tools or with `tool_choice` "none".
"""
# pyright: reportMissingImports=false

import json
import logging
import uuid
from collections.abc import Sequence
from typing import Any, ClassVar

from openai.types.responses import ToolChoiceCustom, ToolChoiceFunction
from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionNamedToolChoiceParam, ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.tokenizers import TokenizerLike
from vllm.tool_parsers.abstract_tool_parser import Tool, ToolParser, ToolParserManager
from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

from serving.constraint import calls_schema, calls_tag
from xlam_jax.data.render import codec_and_format
from xlam_jax.data.wire import ANY, WIRE_FORMATS, CompletionStream, Tools, Wire, arguments_json, may_call
from xlam_jax.errors import UserError

try:
    from vllm.tool_parsers.utils import get_function_tools
except ImportError:  # before vLLM 0.32, no other kind of tool was turned into functions

    def get_function_tools(tools: Sequence[Tool]) -> list[Any]:
        """Returns the tools that are functions."""
        return [tool for tool in tools if tool.type == "function"]


logger = logging.getLogger("vllm.xlam_jax")


class XlamJaxToolParser(ToolParser):
    """Parses one answer; each answer has its own instance, because of the state of the stream."""

    # vLLM's own constraint is an array of {"name", "parameters"}, which is not the trained format
    supports_required_and_named = False
    # makes vLLM call finish_streaming
    engine_based_streaming = True
    wire: ClassVar[Wire | None] = None
    """None: that of the tokenizer's chat template."""

    def __init__(self, tokenizer: TokenizerLike, tools: list[Tool] | None = None):
        super().__init__(tokenizer, tools)
        # without its reasoning: vLLM's reasoning parser has removed it, or the user wants it in the content
        self._wire = Wire((self.wire or detect_wire(tokenizer)).format)
        self._schemas = _schemas(tools or ())
        self._stream = CompletionStream(self._wire, self._schemas)

    def adjust_request(
        self, request: ChatCompletionRequest | ResponsesRequest
    ) -> ChatCompletionRequest | ResponsesRequest:
        """Keeps [TOOL_CALLS] in the text, and constrains the output to calls if the request requires them.

        Raises `VLLMValidationError` (the server answers with status 400) for tools that a grammar cannot enforce.
        """
        if not may_call(request.tools, request.tool_choice):
            return request
        request.skip_special_tokens = False
        choice = request.tool_choice
        if choice in (None, "auto"):
            return request
        try:
            name = _required_name(choice)
            tools = [tool for tool in _functions(request.tools) if name in (None, tool["function"]["name"])]
            if not tools:
                raise ValueError(f"tool_choice names '{name}', which is not one of the tools")
            at_most = 1 if name or request.parallel_tool_calls is False else None
            request.structured_outputs = _constraint(self._wire, tools, at_most)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="tools") from None
        if isinstance(request, ResponsesRequest):
            request.text = None
        else:
            request.response_format = None
        return request

    def extract_tool_calls(self, model_output: str, request: ChatCompletionRequest) -> ExtractedToolCallInformation:
        """Splits a whole answer into content and calls."""
        # vLLM also calls this for requests that allow no calls
        allowed = may_call(request.tools, request.tool_choice)
        _, content, calls = self._wire.parse(model_output, self._schemas) if allowed else ("", model_output, None)
        return ExtractedToolCallInformation(
            tools_called=bool(calls),
            tool_calls=[
                ToolCall(
                    id=_id(call.id),
                    function=FunctionCall(name=call.name, arguments=arguments_json(call)),
                )
                for call in calls or ()
            ],
            content=content or None,
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: ChatCompletionRequest,
    ) -> DeltaMessage | None:
        """Returns the new content that cannot become part of a call."""
        allowed = may_call(request.tools, request.tool_choice)
        content = self._stream.feed(delta_text) if allowed else delta_text
        return DeltaMessage(content=content) if content else None

    def finish_streaming(self) -> DeltaMessage | None:
        """Returns the rest of the answer: its calls, or text that looked like calls."""
        _, content, calls = self._stream.finish()
        self._stream = CompletionStream(self._wire, self._schemas)
        if not content and not calls:
            return None
        return DeltaMessage(
            content=content or None,
            tool_calls=[
                DeltaToolCall(
                    index=index,
                    id=_id(call.id),
                    type="function",
                    function=DeltaFunctionCall(name=call.name, arguments=arguments_json(call)),
                )
                for index, call in enumerate(calls or ())
            ],
        )


def detect_wire(tokenizer: TokenizerLike) -> Wire:
    """Returns the wire format of a tokenizer's chat template; `ANY` if none can be detected."""
    template = getattr(tokenizer, "chat_template", None)
    key = template if isinstance(template, str) else None
    if key not in _detected:
        try:
            _detected[key] = codec_and_format(tokenizer, "native")[1].wire or ANY  # pyright: ignore
        except (UserError, AttributeError, TypeError) as error:  # no template, or a tokenizer of another kind
            logger.warning("xlam_jax parses calls in any wire format: %s", error)
            _detected[key] = ANY
    return _detected[key]


_detected: dict[str | None, Wire] = {}
"""Chat template → its wire format: each answer has a parser of its own."""


def _schemas(tools: Sequence[Any]) -> Tools:
    """Converts a request's functions to OpenAI's format, without other tools, which are never called in the text."""
    return [schema for tool in tools if get_function_tools([tool]) for schema in _functions([tool])]


def _required_name(choice: Any) -> str | None:
    """Returns the function that a `tool_choice` other than auto requires, None for any. Raises `ValueError`."""
    if choice == "required":
        return None
    if isinstance(choice, ChatCompletionNamedToolChoiceParam):
        return choice.function.name
    if isinstance(choice, ToolChoiceFunction | ToolChoiceCustom):
        return choice.name
    kind = choice if isinstance(choice, str) else getattr(choice, "type", choice)
    raise ValueError(f"tool_choice '{kind}' cannot be enforced; use auto, none, required or a named function")


def _functions(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Converts a request's tools to OpenAI's format. Raises `ValueError` for a tool that is not a function."""
    converted = []
    for tool in tools:
        functions = get_function_tools([tool])
        if not functions:
            raise ValueError(f"tool of type '{tool.type}' cannot be enforced; only functions can")
        for function in functions:
            definition = getattr(function, "function", function)
            converted.append({"function": {"name": definition.name, "parameters": definition.parameters}})
    return converted


def _constraint(wire: Wire, tools: Sequence[dict[str, Any]], at_most: int | None) -> StructuredOutputsParams:
    """Returns the output constraint for calls of tools.

    Raises `ValueError` with the name of an unsupported tool, and for a wire format that no grammar can express.
    """

    def constrain(tools: Sequence[dict[str, Any]]) -> StructuredOutputsParams:
        if wire.format in (WIRE_FORMATS["array"], ANY.format):
            return StructuredOutputsParams(json=calls_schema(tools, at_most))
        return StructuredOutputsParams(structural_tag=json.dumps(calls_tag(wire.format.name, tools, at_most)))

    constraint = constrain(tools)
    if _refusal(constraint):
        for tool in tools:
            if refusal := _refusal(constrain([tool])):
                raise ValueError(f"tool '{tool['function']['name']}' cannot be enforced by a grammar: {refusal}")
    return constraint


def _refusal(constraint: StructuredOutputsParams) -> str:
    """Returns why xgrammar, the backend that `serving.serve` selects, refuses a constraint; empty if it accepts it."""
    try:
        validate_xgrammar_grammar(SamplingParams(structured_outputs=constraint))
    except (ValueError, TypeError, VLLMValidationError) as error:
        return str(error)
    return ""


def _id(written_id: str | None) -> str:
    """Returns the id that the model wrote for a call, or a new one in vLLM's format."""
    return written_id or f"chatcmpl-tool-{uuid.uuid4().hex}"


ToolParserManager.register_module("xlam_jax", module=XlamJaxToolParser)
for _format in (*WIRE_FORMATS.values(), ANY.format):
    _parser = type(f"XlamJax_{_format.name}", (XlamJaxToolParser,), {"wire": Wire(_format)})
    ToolParserManager.register_module(f"xlam_jax_{_format.name}", module=_parser)
