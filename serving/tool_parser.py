"""vLLM's tool parser for what xlam_jax trains; a plugin, and the only module that needs vLLM.

    vllm serve DIR --enable-auto-tool-choice --tool-parser-plugin serving.tool_parser --tool-call-parser xlam_jax

Streaming or not, in pieces of any size, the calls are those that `xlam_jax.data.wire` reads. `tool_choice` "required"
or a named function makes the model write calls of these tools in the format that it was trained on. Calls that are
malformed or cut off come back as content.
"""
# pyright: reportMissingImports=false

import uuid
from collections.abc import Sequence

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.tokenizers import TokenizerLike
from vllm.tool_parsers.abstract_tool_parser import Tool, ToolParser, ToolParserManager

from xlam_jax.data.wire import CompletionStream, arguments_json, calls_schema, parse_completion


class XlamJaxToolParser(ToolParser):
    """One for each answer: the stream's state is its own."""

    # vLLM's own way for these is an array of {"name", "parameters"}, which is not what the model was trained on
    supports_required_and_named = False
    # without it nothing tells the end of a stream
    engine_based_streaming = True

    def __init__(self, tokenizer: TokenizerLike, tools: list[Tool] | None = None):
        super().__init__(tokenizer, tools)
        self._stream = CompletionStream()

    def adjust_request(
        self, request: ChatCompletionRequest | ResponsesRequest
    ) -> ChatCompletionRequest | ResponsesRequest:
        """Keeps [TOOL_CALLS] in the text, and has the model write calls where the request wants them."""
        if not request.tools or request.tool_choice == "none":
            return request
        request.skip_special_tokens = False
        if isinstance(request, ChatCompletionRequest):
            wanted = None if isinstance(request.tool_choice, str | None) else request.tool_choice.function.name
            tools = [tool.model_dump() for tool in request.tools if wanted in (None, tool.function.name)]
            if wanted and not tools:
                raise ValueError(f"tool_choice names '{wanted}', which is none of the tools")
            if wanted or request.tool_choice == "required":
                at_most = 1 if wanted or request.parallel_tool_calls is False else None
                request.structured_outputs = StructuredOutputsParams(json=calls_schema(tools, at_most))
                request.response_format = None
        return request

    def extract_tool_calls(self, model_output: str, request: ChatCompletionRequest) -> ExtractedToolCallInformation:
        """Splits a whole answer."""
        content, calls = parse_completion(model_output)
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
        """Gives out content that is certain to be no part of calls."""
        content = self._stream.feed(delta_text)
        return DeltaMessage(content=content) if content else None

    def finish_streaming(self) -> DeltaMessage | None:
        """Gives out the rest: calls, or what looked like them."""
        content, calls = self._stream.finish()
        self._stream = CompletionStream()
        if not content and not calls:
            return None
        return DeltaMessage(
            content=content or None,
            tool_calls=[
                DeltaToolCall(
                    index=at,
                    id=_id(call.id),
                    type="function",
                    function=DeltaFunctionCall(name=call.name, arguments=arguments_json(call)),
                )
                for at, call in enumerate(calls or ())
            ],
        )


def _id(own: str | None) -> str:
    """The id that the model gave a call, or a new one in vLLM's form."""
    return own or f"chatcmpl-tool-{uuid.uuid4().hex}"


ToolParserManager.register_module("xlam_jax", module=XlamJaxToolParser)
