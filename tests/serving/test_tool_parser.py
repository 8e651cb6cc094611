"""The tool parser inside vLLM: answers whole and streamed in pieces of any size, as its server would send them."""
# pyright: reportMissingImports=false

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from argument_schemas import REFUSED, SUPPORTED, properties, tool
from support import ROOT

from serving.constraint import WRITTEN
from xlam_jax.data.wire import REASONINGS, WIRE_FORMATS, Wire, arguments_json, parse_completion

pytestmark = [pytest.mark.serve, pytest.mark.filterwarnings("ignore")]

WIRE = (
    '[{"name": "f", "arguments": {"a": [{"b": "]}\\n"}], "name": "Bo"}}, {"name": "g", "arguments": {}}, '
    '{"name": "h", "arguments": {"text": "}{ \\" [TOOL_CALLS] é"}}]'
)
TEXTS = [
    "It is 3 °C.",
    "",
    WIRE,
    f"[TOOL_CALLS]{WIRE}",
    f"I look.\n{WIRE}",
    f"I look.[TOOL_CALLS]{WIRE}",
    f"I look.\n```json\n{WIRE}\n```",
    f"I look.<tool_call>{WIRE}</tool_call>",
    f"<think>I look.</think>{WIRE}",
    json.dumps({"thought": "I look.", "tool_calls": json.loads(WIRE)}),
    '{"thought": "Hello.", "tool_calls": []}',
    json.dumps(json.loads(WIRE), indent=2),
    WIRE[:-1],
    WIRE[:40],
    f"{WIRE} Done.",
    '[{"name": "f"}]',
    "[]",
    "[1, 2] [TOOL_CALLS]",
    f"I look.[TOOL_CALLS]{WIRE}\n[TOOL_CALLS]{WIRE}",
    f"{WIRE} and {WIRE}",
    f"[TOOL_CALLS]{WIRE[:-1]}[TOOL_CALLS]{WIRE}",
    '{"a": 1}',
]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fgh"]


def make_request(kind: str, **request: Any) -> Any:
    """Makes a request for chat completions or the Responses API."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    if kind == "chat":
        return ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], **request)
    if "tools" in request:
        request["tools"] = [{"type": "function", **tool["function"]} for tool in request["tools"]]
    if isinstance(choice := request.get("tool_choice"), dict):
        request["tool_choice"] = {"type": "function", **choice["function"]}
    return ResponsesRequest(input="x", **request)


@pytest.fixture(scope="module")
def answers() -> Any:
    """The function of `server_parser` for the template of the quickstart."""
    return server_parser("xlam_jax")


def server_parser(name: str) -> Any:
    """Returns a function that parses a text as the server does with a tool parser, whole or in pieces.

    It returns content and [(name, arguments)].
    """
    from transformers import AutoTokenizer
    from vllm.parser.abstract_parser import DelegatingParser
    from vllm.tool_parsers.abstract_tool_parser import ToolParserManager
    from vllm.utils.import_utils import import_plugin

    import_plugin("serving.tool_parser")

    class Parser(DelegatingParser):
        tool_parser_cls = ToolParserManager.get_tool_parser(name)

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/quickstart/tokenizer")
    auto = make_request("chat", tools=TOOLS, tool_choice="auto")

    def parse(pieces: list[str] | None, text: str, request: Any = auto) -> tuple[str, list[tuple[str, str]]]:
        parser = Parser(tokenizer, request.tools)
        # vLLM does not adjust a request with tool_choice none
        request = request if request.tool_choice == "none" else parser.adjust_request(request)
        if pieces is None:
            _, content, calls = parser.parse(text, request, enable_auto_tools=True)
            return content or "", [(call.name, call.arguments) for call in calls or ()]
        content, streamed = "", {}
        for index, piece in enumerate(pieces):
            delta = parser.parse_delta(piece, [5], request, [1], finished=index == len(pieces) - 1)
            if delta is None:
                continue
            content += delta.content or ""
            for call in delta.tool_calls:
                name, arguments = streamed.get(call.index, ("", ""))
                streamed[call.index] = (name + (call.function.name or ""), arguments + (call.function.arguments or ""))
                assert call.id
        return content, [streamed[index] for index in sorted(streamed)]

    return parse


def cuts(text: str) -> Iterator[list[str]]:
    for size in (1, 2, 3, 8, 1000):
        yield [text[start : start + size] for start in range(0, len(text), size)] or [""]
    for seed in range(20):
        random_ = random.Random(seed)
        at = sorted(random_.sample(range(len(text) + 1), min(4, len(text))))
        yield [text[start:end] for start, end in zip([0, *at], [*at, len(text)], strict=True)]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_pieces_of_any_size_give_the_result_of_the_whole_text(answers: Any, text: str):
    content, calls = parse_completion(text)
    expected = (content, [(call.name, arguments_json(call)) for call in calls or ()])
    assert answers(None, text) == expected
    for pieces in cuts(text):
        assert answers(pieces, text) == expected, pieces


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
INTEGER = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]


@pytest.mark.parametrize("name", WIRE_FORMATS)
def test_every_wire_format_has_a_parser(name: str):
    example = WIRE_FORMATS[name].example
    parse = server_parser(f"xlam_jax_{name}")
    request = make_request("chat", tools=INTEGER, tool_choice="auto")
    for text, content in ((example, ""), (f"I look.\n{example}", "I look.")):
        _, _, calls = Wire(WIRE_FORMATS[name]).parse(text, INTEGER)
        if not calls:  # harmony and Llama's calls have no text in front
            assert content
            continue
        assert parse(None, text, request) == (content, [("f", '{"a": 1}')])
        for pieces in cuts(text):
            assert parse(pieces, text, request) == (content, [("f", '{"a": 1}')]), pieces
    for text in ("Plain text.", example[:-1]):
        whole = parse(None, text, request)
        assert all(parse(pieces, text, request) == whole for pieces in cuts(text))


def test_vllm_has_the_parsers_that_the_table_names():
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers.abstract_tool_parser import ToolParserManager

    for row in WIRE_FORMATS.values():
        assert ToolParserManager.get_tool_parser(row.vllm)
    for row in REASONINGS.values():
        assert ReasoningParserManager.get_reasoning_parser(row.vllm)


@pytest.mark.parametrize("name", [name for name in WIRE_FORMATS if name != "array"])
def test_required_calls_are_written_in_the_wire_format(name: str):
    import xgrammar
    from transformers import AutoTokenizer
    from vllm.exceptions import VLLMValidationError
    from vllm.tool_parsers.abstract_tool_parser import ToolParserManager
    from vllm.utils.import_utils import import_plugin
    from xgrammar.testing import _is_grammar_accept_string

    import_plugin("serving.tool_parser")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/quickstart/tokenizer")
    request = make_request("chat", tools=INTEGER, tool_choice="required")
    parser = ToolParserManager.get_tool_parser(f"xlam_jax_{name}")(tokenizer, request.tools)
    if name not in WRITTEN:
        with pytest.raises(VLLMValidationError, match=f"calls in the wire format {name} cannot be enforced"):
            parser.adjust_request(request)
        return
    tag = parser.adjust_request(request).to_sampling_params(100, {}).structured_outputs.structural_tag
    grammar = xgrammar.Grammar.from_structural_tag(tag)
    accepted = [text for text in REQUIRED[name] if _is_grammar_accept_string(grammar, text)]
    assert accepted == REQUIRED[name]
    for text in accepted:
        _, content, calls = Wire(WIRE_FORMATS[name]).parse(text, INTEGER)
        assert (content, {call.name for call in calls or ()}) == ("", {"f"})
    for text in ("", "text", REQUIRED[name][0].replace("1", "1.5"), REQUIRED[name][0].replace("f", "g")):
        assert not _is_grammar_accept_string(grammar, text)


REQUIRED = {
    "hermes": [
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
        "\n".join(['<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'] * 2),
    ],
    "mistral": ['[TOOL_CALLS]f[ARGS]{"a": 1}', '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f[ARGS]{}'],
    "llama3_json": [
        '{"name": "f", "parameters": {"a": 1}}',
        '{"name": "f", "parameters": {}}; {"name": "f", "parameters": {}}',
    ],
    "qwen3_coder": ["<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"],
    "deepseek_v31": [
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ],
}


@pytest.mark.parametrize("kind", ["chat", "responses"])
@pytest.mark.parametrize("request_", [{}, {"tools": TOOLS, "tool_choice": "none"}], ids=["no tools", "none"])
def test_without_tools_every_text_is_content(answers: Any, kind: str, request_: dict[str, Any]):
    request = make_request(kind, **request_)
    for text in (*TEXTS, f" \n{WIRE}\n ", " \t"):
        assert answers(None, text, request) == (text, [])
        for pieces in cuts(text):
            assert answers(pieces, text, request) == (text, []), pieces
    assert request.skip_special_tokens


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_required_and_named_calls_are_written_in_the_trained_format(kind: str):
    from transformers import AutoTokenizer

    from serving.tool_parser import XlamJaxToolParser

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/quickstart/tokenizer")

    def schema(choice: Any, **more: Any) -> Any:
        request = make_request(kind, tools=TOOLS, tool_choice=choice, **more)
        adjusted = XlamJaxToolParser(tokenizer, request.tools).adjust_request(request)
        assert adjusted.skip_special_tokens is (choice == "none")
        sent = adjusted.to_sampling_params(100, {}).structured_outputs
        return sent and sent.json

    names = [choice["properties"]["name"]["enum"] for choice in schema("required")["items"]["anyOf"]]
    assert names == [["f"], ["g"], ["h"]]
    assert "maxItems" not in schema("required")
    assert schema("required", parallel_tool_calls=False)["maxItems"] == 1
    named = schema({"type": "function", "function": {"name": "g"}})
    assert named["maxItems"] == 1
    assert [choice["properties"]["name"]["enum"] for choice in named["items"]["anyOf"]] == [["g"]]
    assert schema("auto") is None
    assert schema("none") is None
    wanted = {"type": "object", "properties": {"x": {"type": "string"}}}
    form = {"type": "json_schema", "name": "x", "schema": wanted}
    other = (
        {"text": {"format": form}}
        if kind == "responses"
        else {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": wanted}}}
    )
    assert schema("required", **other)["type"] == "array"
    assert schema("auto", **other) == wanted


def adjusted(kind: str, **request: Any) -> Any:
    from transformers import AutoTokenizer

    from serving.tool_parser import XlamJaxToolParser

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/quickstart/tokenizer")
    vllm_request = make_request(kind, **request)
    return XlamJaxToolParser(tokenizer, vllm_request.tools).adjust_request(vllm_request)


@pytest.mark.parametrize(("parameters", "good", "bad"), SUPPORTED)
def test_the_grammar_enforces_supported_schemas(parameters: Any, good: list[Any], bad: list[Any]):
    import xgrammar
    from xgrammar.testing import _is_grammar_accept_string

    request = adjusted("chat", tools=[TOOLS[0], tool(parameters, "get")], tool_choice="required")
    written = json.dumps(request.structured_outputs.json)
    grammar = xgrammar.Grammar.from_json_schema(written)

    def accepts(arguments: Any) -> bool:
        return _is_grammar_accept_string(grammar, json.dumps([{"name": "get", "arguments": arguments}]))

    assert [accepts(arguments) for arguments in good] == [True] * len(good)
    assert [accepts(arguments) for arguments in bad] == [False] * len(bad)


@pytest.mark.parametrize("kind", ["chat", "responses"])
@pytest.mark.parametrize("parameters", [parameters for parameters, _ in REFUSED if isinstance(parameters, dict)])
def test_a_tool_with_an_unsupported_schema_is_refused_by_name(kind: str, parameters: Any):
    from vllm.exceptions import VLLMValidationError

    tools = [TOOLS[0], tool(parameters, "get")]
    with pytest.raises(VLLMValidationError, match=r"tool 'get' cannot be enforced.*parameter=tools"):
        adjusted(kind, tools=tools, tool_choice="required")
    adjusted(kind, tools=tools, tool_choice="auto")
    adjusted(kind, tools=tools, tool_choice={"type": "function", "function": {"name": "f"}})


def test_a_schema_that_xgrammar_refuses_is_refused_by_name():
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=r"tool 'get' cannot be enforced by a grammar: Failed"):
        adjusted(
            "chat",
            tools=[TOOLS[0], tool(properties(a={"type": "string", "pattern": "(("}), "get")],
            tool_choice="required",
        )


def test_tools_of_the_responses_api_that_are_not_functions():
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.exceptions import VLLMValidationError
    from vllm.tool_parsers import utils

    from serving.tool_parser import XlamJaxToolParser

    search = {"type": "web_search_preview"}
    for choice, words in (
        ("required", "tool of type 'web_search_preview'"),
        (search, "tool_choice 'web_search_preview'"),
    ):
        request = ResponsesRequest(input="x", tools=[{"type": "function", "name": "f"}, search], tool_choice=choice)
        with pytest.raises(VLLMValidationError, match=words):
            XlamJaxToolParser(None, request.tools).adjust_request(request)
    custom = ResponsesRequest(input="x", tools=[{"type": "custom", "name": "shell"}], tool_choice="required")
    if not hasattr(utils, "get_function_tools"):  # before vLLM 0.32
        with pytest.raises(VLLMValidationError, match="tool of type 'custom'"):
            XlamJaxToolParser(None, custom.tools).adjust_request(custom)
        return
    XlamJaxToolParser(None, custom.tools).adjust_request(custom)
    [choice] = custom.structured_outputs.json["items"]["anyOf"]
    assert choice["properties"]["name"]["enum"] == ["shell"]
    assert choice["properties"]["arguments"]["required"] == ["input"]
