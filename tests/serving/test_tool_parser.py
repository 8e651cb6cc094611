"""The plugin inside vLLM: what its server would answer, whole and streamed in pieces of any size."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from support import ROOT

from xlam_jax.data.wire import arguments_json, parse_completion

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
    '{"a": 1}',
]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fgh"]


@pytest.fixture(scope="module")
def answers() -> Any:
    """Parses a text as the server does: whole, or in pieces; returns content and [(name, arguments)]."""
    from transformers import AutoTokenizer
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser.abstract_parser import DelegatingParser
    from vllm.tool_parsers.abstract_tool_parser import ToolParserManager
    from vllm.utils.import_utils import import_plugin

    import_plugin("serving.tool_parser")

    class Both(DelegatingParser):
        tool_parser_cls = ToolParserManager.get_tool_parser("xlam_jax")

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/quickstart/tokenizer")
    asked = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], tools=TOOLS, tool_choice="auto")

    def parse(pieces: list[str] | None, text: str) -> tuple[str, list[tuple[str, str]]]:
        parser = Both(tokenizer, asked.tools)
        request = parser.adjust_request(asked)
        if pieces is None:
            _, content, calls = parser.parse(text, request, enable_auto_tools=True)
            return content or "", [(call.name, call.arguments) for call in calls or ()]
        content, found = "", {}
        for at, piece in enumerate(pieces):
            delta = parser.parse_delta(piece, [5], request, [1], finished=at == len(pieces) - 1)
            if delta is None:
                continue
            content += delta.content or ""
            for call in delta.tool_calls:
                name, arguments = found.get(call.index, ("", ""))
                found[call.index] = (name + (call.function.name or ""), arguments + (call.function.arguments or ""))
                assert call.id
        return content, [found[at] for at in sorted(found)]

    return parse


def cuts(text: str) -> Iterator[list[str]]:
    for size in (1, 2, 3, 8, 1000):
        yield [text[at : at + size] for at in range(0, len(text), size)] or [""]
    for seed in range(20):
        random_ = random.Random(seed)
        at = sorted(random_.sample(range(len(text) + 1), min(4, len(text))))
        yield [text[start:end] for start, end in zip([0, *at], [*at, len(text)], strict=True)]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_pieces_give_what_the_whole_gives(answers: Any, text: str):
    content, calls = parse_completion(text)
    expected = (content, [(call.name, arguments_json(call)) for call in calls or ()])
    assert answers(None, text) == expected
    for pieces in cuts(text):
        assert answers(pieces, text) == expected, pieces


def test_required_and_named_calls_are_written_in_the_trained_format():
    from transformers import AutoTokenizer
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    from serving.tool_parser import XlamJaxToolParser

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/quickstart/tokenizer")

    def schema(choice: Any, **more: Any) -> Any:
        request = ChatCompletionRequest(
            messages=[{"role": "user", "content": "x"}], tools=TOOLS, tool_choice=choice, **more
        )
        adjusted = XlamJaxToolParser(tokenizer, request.tools).adjust_request(request)
        assert adjusted.skip_special_tokens is (choice == "none")
        return adjusted.structured_outputs and adjusted.structured_outputs.json

    names = [one["properties"]["name"]["enum"] for one in schema("required")["items"]["anyOf"]]
    assert names == [["f"], ["g"], ["h"]]
    assert "maxItems" not in schema("required")
    assert schema("required", parallel_tool_calls=False)["maxItems"] == 1
    named = schema({"type": "function", "function": {"name": "g"}})
    assert named["maxItems"] == 1
    assert [one["properties"]["name"]["enum"] for one in named["items"]["anyOf"]] == [["g"]]
    assert schema("auto") is None
    assert schema("none") is None
