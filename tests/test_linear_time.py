"""Whatever a model writes is parsed in linear time, so that no answer can stall a server or a run.

With quadratic time, most of these texts would take minutes.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from support import cpu_limit

from serving.fastchat_worker import Worker
from serving.tools import as_tool, call_tool
from xlam_jax.client.answers import AnswerStream, read_response
from xlam_jax.data.row_json import parse_json
from xlam_jax.data.trajectory import InvalidTrajectory, ToolCall
from xlam_jax.data.wire import ANY, REASONINGS, WIRE_FORMATS, CompletionStream, Wire, objects_in, parse_completion
from xlam_jax.evaluate import rate
from xlam_jax.evaluate.agents import _actions, bolaa
from xlam_jax.evaluate.bfcl.calls import NoCalls
from xlam_jax.evaluate.bfcl.calls import parse as parse_bfcl
from xlam_jax.evaluate.corpus import Local
from xlam_jax.evaluate.suites import hotpotqa, mint, tool_query, webshop

CALLS = '[{"name": "f", "arguments": {}}]'
REPEATED = [
    *(" ", "\n", " \n", "a ", "_", "-", "1", "1,", "(", ")", "[", "]", "{", '"', "'", "\\", '\\"', "<", ">", "a<"),
    *("= ", '{"', '{"a', '{"a":', '{"a":"', '{"a\n', '{"a":[1,', "{} ", '{"a": 1} ', '[{"', '[{"name":', '{"a": {} x'),
    *(CALLS, f"{CALLS} ", f"{CALLS} and ", "[TOOL_CALLS]", f"[TOOL_CALLS]{CALLS}", "```json\n", "```", "<tool_call>"),
    *(
        f"```json\n{CALLS}\n```\n",
        '"arguments" ',
        "Action:\n",
        "Action: ",
        "Action: f[",
        "# action: x\n",
        "Thought: x\n",
    ),
    *(
        "agent:",
        "agent: f[",
        "agent ",
        "<solution>",
        "<solution>1</solution>",
        "```python",
        "True ",
        "f(",
        "f(a=",
        "new ",
    ),
    *("a\u2028", "é", "\ud800", "\x00", "\u2003"),
    *("<tool_call>{", "<tool_call>\n", "<tool_call>f\n", "</tool_call>", "<function=f>", "<function=f>\n<parameter=a>"),
    *("</parameter>", "</parameter>\n<parameter=a>", "<arg_key>a</arg_key>", "</arg_value>", "[TOOL_CALLS]f[ARGS]{}"),
    *("[TOOL_CALLS]f", '{"name": "f", "parameters": {}}\n', '{"name":\n', "{\n", "[f(a=1)]\n", "[f(a=1)](\n", "[f(\n"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>", "<|tool_call_start|>["),
    *("<think>", "</think>", "<thi", "[THINK]", "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
]
ENDINGS = [
    *(
        ('{"score": 4}', " ", ""),
        ('{"score": 4, "reason": "', " ", '"}'),
        ('{"score": "', "1", '"}'),
        ("[1", "1", ".5]"),
    ),
    *(
        ("agent: f[", " ", "x"),
        ("Action: f[", " ", "x"),
        ("Action", " ", ":x"),
        ("f(a=1)", " ", "x"),
        ("f(a=", "[", ")"),
    ),
    *(
        ("f(", "a=1,", ")"),
        ("f(a=1", "+1", ")"),
        ("f(a='", "\\", "')"),
        ("f(x<", "a", ")"),
        ("<solution>", "1,", "</solution>"),
    ),
    *(
        (CALLS, " ", "]"),
        (CALLS, "\n", "x"),
        ("[TOOL_CALLS]", " ", CALLS),
        ("", "[", "]"),
        ("", '"', "]"),
        ("", "\\", '"]'),
    ),
    *(
        ("<tool_call><function=f><parameter=a>", "</parameter>\n<", "</parameter></function></tool_call>"),
        ("<tool_call>f<arg_key>a</arg_key><arg_value>", "</arg_value> ", "</arg_value></tool_call>"),
        ('[TOOL_CALLS]f[ARGS]{"a": ', "[" * 200 + "]" * 200 + ",", "1}"),
        ("[f(a=", "[1,", "])]"),
        ("<think>", "\n", "</think>"),
        ("</think>", "\n", "x"),
        ("<|channel|>analysis<|message|>", "<", "<|end|>"),
    ),
    *(('[{"name": "f", "arguments": {"a": "', "\\\\", '"}}]'), ('{"thought": "', "x", '", "tool_calls": []}')),
    *(('[{"name": "f", "arguments": {"a": ', "[" * 200 + "]" * 200 + ",", "1}}]"), ('{"a":', '{"a":', "}")),
]
THINKING = [
    Wire(WIRE_FORMATS["hermes"], REASONINGS["think"], opened=True),
    Wire(WIRE_FORMATS["pythonic"], REASONINGS["think"]),
    Wire(WIRE_FORMATS["mistral"], REASONINGS["mistral"], opened=False),
]
TOOLS = {tool["function"]["name"]: tool["function"] for tool in hotpotqa.TOOLS}
PAGE = '<body><a href="/x">Back</a><form action="/s"><input name="search_query"></form></body>'


def pieces(text: str, size: int = 8) -> Iterator[str]:
    return (text[at : at + size] for at in range(0, len(text), size))


def stream(text: str) -> None:
    reader = CompletionStream()
    for piece in pieces(text):
        reader.feed(piece)
    reader.finish()


def wires(text: str) -> None:
    """Reads a text in every wire format, with and without reasoning in front."""
    for wire in (*map(Wire, WIRE_FORMATS.values()), *THINKING, ANY):
        wire.parse(text)


def streamed_wires(text: str) -> None:
    """Streams a text with reasoning in front, and with the beginnings of calls of all formats."""
    for wire in (*THINKING, ANY):
        reader = CompletionStream(wire)
        for piece in pieces(text):
            reader.feed(piece)
        reader.finish()


def client(text: str) -> None:
    for format in ("tools", "xlam_v1"):
        call = {"id": "0", "function": {"name": "f", "arguments": text}}
        said = {"message": {"content": text}, "finish_reason": "stop"}
        called = {"message": {"content": None, "tool_calls": [call]}, "finish_reason": "length"}
        read_response({"choices": [said, called]}, format, tools=())


def streamed_by_client(text: str) -> None:
    answer, calls, many = (AnswerStream("tools", tools=()) for _ in range(3))
    for at, piece in enumerate(pieces(text)):
        answer.add({"choices": [{"delta": {"content": piece}}]})
        function = {"name": "f", "arguments": piece}
        calls.add({"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "0", "function": function}]}}]})
        many.add({"choices": [{"delta": {"tool_calls": [{"index": 0, "id": str(at), "function": function}]}}]})
    for one in (answer, calls, many):
        one.add({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        one.finish()


def fastchat(text: str) -> None:
    """Asked without a stream; FastChat's streams repeat the text with every piece."""
    choices = [SimpleNamespace(delta=SimpleNamespace(content=piece), finish_reason=None) for piece in pieces(text)]
    choices[-1].finish_reason = "stop"
    chunks = [SimpleNamespace(usage=None, choices=[choice]) for choice in choices]
    worker: Any = Worker.__new__(Worker)
    worker._count_active = contextlib.nullcontext
    worker._stream = lambda params: contextlib.nullcontext(chunks)
    [answer] = worker.generate({}, stream=False)
    assert answer["text"] == text


def mint_answers(text: str) -> None:
    for content in (text, f"<solution>{text}</solution>"):
        proposal = mint.between(content, "<solution>", "</solution>")
        mint.between(content, "```python", "```")
        for set_, reference, kind in (
            ("gsm8k", "42", ""),
            ("mmlu", "B", ""),
            ("theoremqa", 1.5, "float"),
            ("theoremqa", [1, 2], "list of integer"),
            ("theoremqa", True, "bool"),
            ("theoremqa", "(a)", "option"),
        ):
            question = mint.Question(set_, "Which? Options: ['A) red', 'B) blue']", reference, kind, 1)
            mint.is_right(question, proposal)
            mint.is_right(question, text)


def hotpotqa_answers(text: str) -> None:
    text = text.encode(errors="replace").decode()  # as returned by the endpoint

    async def act() -> None:
        corpus = Local.of([("Oslo", "Oslo is a city. It is in Norway.")])
        try:
            reading = hotpotqa.Reading(corpus)
            reading._gold = "Oslo"
            for action in (("search", text), ("search", "Oslo"), ("lookup", text), ("finish", text)):
                await reading.step(ToolCall(None, action[0], {"query": action[1]}))
            reading.outcome()
        finally:
            corpus.close()

    asyncio.run(act())


def webshop_answers(text: str) -> None:
    shopping = webshop.Shopping("http://localhost")
    shopping._page = webshop.Page(PAGE)
    asyncio.run(shopping.step(ToolCall(None, "click", {"element": text})))


def tool_query_answers(text: str) -> None:
    academia = tool_query.Academia(None)  # type: ignore[arg-type]
    academia._subgoals = ["Oslo"]
    asyncio.run(academia.step(ToolCall(None, "finish", {"answer": text})))
    academia.outcome()


def tool_calls(text: str) -> None:
    def look(at: str) -> str:
        return ""

    tool = as_tool(look)
    call_tool([tool], text, {})
    call_tool([tool], "look", {"at": text})
    call_tool([tool], "look", {text: text})


def bfcl_answers(text: str) -> None:
    for language in ("python", "java"):
        for one in (text, f"[f({text})]", f"[f(a={text})]"):
            with contextlib.suppress(NoCalls):
                parse_bfcl(one, language)


def ratings(text: str) -> None:
    with contextlib.suppress(rate.BadRating):
        rate.parse(text)


def json_(text: str) -> None:
    with contextlib.suppress(InvalidTrajectory):
        parse_json(text)


def controller(text: str) -> None:
    bolaa._parse_choice(text, SimpleNamespace(labour={"f": []}), "f")  # type: ignore[arg-type]


READERS: dict[str, Callable[[str], object]] = {
    "parse_completion": parse_completion,
    "CompletionStream": stream,
    "wires": wires,
    "streamed wires": streamed_wires,
    "objects_in": lambda text: list(objects_in(text)),
    "parse_json": json_,
    "ratings": ratings,
    "actions": lambda text: _actions.parse_action(text, TOOLS),
    "controller": controller,
    "bfcl": bfcl_answers,
    "mint": mint_answers,
    "hotpotqa": hotpotqa_answers,
    "webshop": webshop_answers,
    "tool_query": tool_query_answers,
    "tool calls": tool_calls,
    "client": client,
    "streamed by the client": streamed_by_client,
    "fastchat": fastchat,
}
"""All that read what a model wrote; ToolBench's judge is read by `objects_in`, and chats show what the client read."""
SLOW = ("wires", "streamed wires", "bfcl", "streamed by the client", "fastchat")
"""Readers that do more for each character."""


WORST = [
    *(" ", "[", '"', '{"a":', '{"a":"', "a<", "<solution>", "# action: x\n", "Action: f[", f"[TOOL_CALLS]{CALLS}"),
    *(('{"score": 4}', " ", ""), ("agent: f[", " ", "x"), ("f(a=1)", " ", "x")),
]


def check(reader: str, patterns: Iterable[str | tuple[str, str, str]], length: int, seconds: float) -> None:
    READERS[reader]("x")  # excludes the time of imports
    for pattern in patterns:
        begin, piece, end = ("", pattern, "") if isinstance(pattern, str) else pattern
        text = begin + piece * (length // len(piece)) + end
        with cpu_limit(seconds):
            READERS[reader](text)


@pytest.mark.parametrize("reader", READERS)
def test_hostile_answers_are_read_in_linear_time(reader: str):
    check(reader, WORST, 60_000 if reader in SLOW else 200_000, 10)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_any_hostile_answers_are_read_in_linear_time(reader: str):
    check(reader, [*REPEATED, *ENDINGS], 250_000, 30)
