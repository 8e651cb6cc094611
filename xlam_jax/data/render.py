"""From trajectory to token ids and loss mask, and from a completion back to text and tool calls.

This is the only renderer; `serving/templates/xlam.jinja` writes the same text for servers. With Mistral's control
tokens a conversation is

    <s>[AVAILABLE_TOOLS]…[/AVAILABLE_TOOLS][INST]system\\n\\nuser[/INST]
    thought[TOOL_CALLS][{"name": …, "arguments": {…}}, …]</s>
    [TOOL_RESULTS]…[/TOOL_RESULTS]answer</s>[INST]…

in one line. Tokenizers without those tokens get the tags as plain text and the bare JSON array as calls.
"""

import copy
import json
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from xlam_jax.data.trajectory import (
    InvalidTrajectory,
    Message,
    ToolCall,
    Trajectory,
    parse_json,
    parse_messages,
    parse_tools,
    system_text,
)
from xlam_jax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TOOL_CALLS = "[TOOL_CALLS]"
CONTROL_TOKENS = (
    "[INST]",
    "[/INST]",
    TOOL_CALLS,
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
# where no token marks a call, the model is told in words; the template says the same
FORMAT_INSTRUCTION = 'To call tools, end with one line: [{"name": ..., "arguments": {...}}, ...]'

Kind = Literal["prompt", "thought", "tool_call", "answer", "eos"]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` to `end` (exclusive) of one kind. `turn` indexes the conversation, -1 before its first turn."""

    kind: Kind
    turn: int
    start: int
    end: int
    trained: bool


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """A rendered trajectory: ids int32 (N,), loss mask bool (N,), and spans that cover the N tokens in order."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    spans: tuple[Span, ...]


def render(trajectory: Trajectory, tokenizer: "PreTrainedTokenizerFast") -> Rendered:
    """Renders a whole conversation.

    Text, tool calls and end token of assistant turns carry loss, unless the turn says `loss: false`. Control tokens
    written out in content stay text. Raises `UserError` when the tokenizer has no end-of-sequence token.
    """
    codec = _codec(tokenizer)
    system = system_text(trajectory.task_instruction, trajectory.conversation)
    segments = codec.layout(system, trajectory.tools, trajectory.conversation)
    ids, starts = codec.encode(segments)
    return Rendered(ids, *_spans(segments, starts))


def render_prompt(
    messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None, tokenizer: "PreTrainedTokenizerFast"
) -> list[int]:
    """Renders chat messages (OpenAI form) up to where the assistant answers, by the same rules as `render`.

    Raises `UserError` when messages or tools are malformed or the last turn is not the user's or a tool's.
    """
    try:
        turns, tools = parse_messages(messages), parse_tools(tools)
    except InvalidTrajectory as invalid:
        raise UserError(f"the request cannot be rendered: {invalid.detail}") from None
    if turns[-1].role not in ("user", "tool"):
        raise UserError(f"the last turn is by the {turns[-1].role}; end the messages with a user or a tool turn")
    codec = _codec(tokenizer)
    ids, _ = codec.encode(codec.layout(system_text("", turns), tools, turns))
    return ids.tolist()


def parse_completion(text: str) -> tuple[str, tuple[ToolCall, ...] | None]:
    """Splits what a model wrote (without its end token) into content and tool calls; the inverse of the wire format.

    Calls are a JSON array up to the end of the text, alone or after a thought, with or without `[TOOL_CALLS]`. Text
    whose calls are malformed comes back whole as content, with None; nothing raises.
    """
    for opening in re.finditer(r"\[\s*\{", text):
        calls = _parse_calls(text[opening.start() :])
        if calls is not None:
            content = text[: opening.start()]
            bare = content.rstrip()
            if bare.endswith(TOOL_CALLS):
                return bare.removesuffix(TOOL_CALLS), calls
            return (content[:-1] if content.endswith(("\n", " ")) else content), calls
    return text, None


def chat_template(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Returns the jinja text that renders like `render` with this tokenizer (but for `loss: false`)."""
    codec = _codec(tokenizer)
    header = "".join(
        f"{{%- set {name} = {'true' if value else 'false'} -%}}\n"
        for name, value in (("control_tokens", codec.control_tokens), ("tool_calls_token", codec.tool_calls_token))
    )
    return header + (files("serving") / "templates" / "xlam.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Segment:
    """A piece of the text, either one control token or plain text."""

    text: str
    kind: Kind
    turn: int
    trained: bool = False
    control: bool = False


class _Codec:
    """What rendering needs to know of one tokenizer. Owns copies of its backend, so threads may share the tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        if not tokenizer.eos_token:
            raise UserError(f"tokenizer '{tokenizer.name_or_path}' has no end-of-sequence token; set its eos_token")
        self.bos: str = str(tokenizer.bos_token or "")
        self.eos: str = str(tokenizer.eos_token)
        self.whole: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self.whole.no_padding()
        self.whole.no_truncation()
        added = self.whole.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self.special_ids = np.array(sorted(self.special.values()), dtype=np.int32)
        self.control_tokens = all(token in self.special for token in CONTROL_TOKENS)
        self.tool_calls_token = TOOL_CALLS in self.special

    @cached_property
    def plain(self) -> "Tokenizer":
        """Encodes control tokens as the text they are written with."""
        tokenizer = copy.deepcopy(self.whole)
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def starts_runs_alike(self) -> bool:
        """Whether text after a control token is encoded like text at the start."""
        after = self.whole.encode(self.eos + "a b", add_special_tokens=False).ids[1:]
        return after == self.plain.encode("a b", add_special_tokens=False).ids

    def layout(self, system: str, tools: list[dict[str, Any]], messages: Sequence[Message]) -> list[_Segment]:
        """Returns the conversation as segments in reading order."""
        space = "" if self.control_tokens else " "
        front = system + "\n\n" if system else ""
        segments: list[_Segment] = []

        def add(text: str, kind: Kind, turn: int, trained: bool = False, control: bool = False) -> None:
            if text:
                segments.append(_Segment(text, kind, turn, trained, control))

        def tagged(tag: str, text: str, turn: int) -> None:
            add(f"[{tag}]", "prompt", turn, control=self.control_tokens)
            add(space + text + space, "prompt", turn)
            add(f"[/{tag}]", "prompt", turn, control=self.control_tokens)

        add(self.bos, "prompt", -1, control=True)
        if tools and self.control_tokens:
            tagged("AVAILABLE_TOOLS", _json(tools), -1)
        elif tools:
            front += f"Tools: {_json(tools)}\n{FORMAT_INSTRUCTION}\n\n"
        previous = ""
        for turn, message in enumerate(messages):
            if message.role == "assistant":
                trained = message.loss is not False
                calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
                if message.content:
                    add(space + message.content, "thought" if calls else "answer", turn, trained)
                if calls and self.tool_calls_token:
                    add(TOOL_CALLS, "tool_call", turn, trained, control=True)
                    add(_json(calls), "tool_call", turn, trained)
                elif calls:
                    add(("\n" if message.content else " ") + _json(calls), "tool_call", turn, trained)
                add(self.eos, "eos", turn, trained, control=True)
            elif message.role in ("user", "tool"):
                if previous in ("user", "tool"):
                    add(space, "prompt", turn)
                tagged("INST" if message.role == "user" else "TOOL_RESULTS", front + message.content, turn)
                front = ""
            previous = message.role
        return segments

    def encode(self, segments: Sequence[_Segment]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids int32 (N,) and the character at which each token starts, int64 (N,)."""
        encoding = self.whole.encode("".join(segment.text for segment in segments), add_special_tokens=False)
        ids, starts = np.array(encoding.ids, dtype=np.int32), _starts(encoding.offsets)
        position, expected = 0, []
        for segment in segments:
            if segment.control:
                expected.append((self.special.get(segment.text, -1), position))
            position += len(segment.text)
        special = np.isin(ids, self.special_ids)
        if list(zip(ids[special].tolist(), starts[special].tolist(), strict=True)) == expected:
            return ids, starts
        return self._encode_runs(segments)

    def _encode_runs(self, segments: Sequence[_Segment]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes the text between control tokens run by run: the content holds control tokens written out."""
        ids: list[int] = []
        starts: list[int] = []
        position, run = 0, ""
        for segment in (*segments, None):
            if segment is not None and not segment.control:
                run += segment.text
                continue
            if run:
                run_ids, run_starts = self._encode_run(run, at_start=position == 0)
                ids += run_ids
                starts += [position + start for start in run_starts]
                position, run = position + len(run), ""
            if segment is not None:
                ids.append(self.special[segment.text])
                starts.append(position)
                position += len(segment.text)
        return np.array(ids, dtype=np.int32), np.array(starts, dtype=np.int64)

    def _encode_run(self, run: str, at_start: bool) -> tuple[list[int], list[int]]:
        if not at_start and not self.starts_runs_alike:
            for anchor in "\n.a":  # takes the prefix of the text's start upon itself; must not merge with the run
                encoding = self.plain.encode(anchor + run, add_special_tokens=False)
                starts = _starts(encoding.offsets).tolist()
                if 1 in starts:
                    cut = starts.index(1)
                    return encoding.ids[cut:], [start - 1 for start in starts[cut:]]
        encoding = self.plain.encode(run, add_special_tokens=False)
        return encoding.ids, _starts(encoding.offsets).tolist()


_codecs: "weakref.WeakKeyDictionary[PreTrainedTokenizerFast, tuple[int, _Codec]]" = weakref.WeakKeyDictionary()


def _codec(tokenizer: "PreTrainedTokenizerFast") -> _Codec:
    size = len(tokenizer)  # tokens may be added later
    cached = _codecs.get(tokenizer)
    if cached is None or cached[0] != size:
        cached = _codecs[tokenizer] = (size, _Codec(tokenizer))
    return cached[1]


def _spans(segments: Sequence[_Segment], starts: np.ndarray) -> tuple[np.ndarray, tuple[Span, ...]]:
    """Gives each token the segment in which its characters start; returns the loss mask and the spans."""
    ends = np.cumsum([len(segment.text) for segment in segments])
    owner = np.searchsorted(ends, starts, side="right")
    loss_mask = np.array([segment.trained for segment in segments], dtype=np.bool_)[owner]
    spans: list[Span] = []
    cuts = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(owner)]
    for start, end in pairwise(cuts):
        segment = segments[int(owner[start])]
        if spans and (spans[-1].kind, spans[-1].turn) == (segment.kind, segment.turn):
            start = spans.pop().start
        spans.append(Span(segment.kind, segment.turn, start, end, segment.trained))
    return loss_mask, tuple(spans)


def _starts(offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.array([start for start, _ in offsets], dtype=np.int64)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _parse_calls(text: str) -> tuple[ToolCall, ...] | None:
    try:
        calls = parse_json(text)
    except InvalidTrajectory:
        return None
    parsed = []
    for call in calls:
        match call:
            case {"name": str(name), "arguments": dict(arguments), **rest} if rest.keys() <= {"id"}:
                parsed.append(ToolCall(str(rest["id"]) if "id" in rest else None, name, arguments))
            case _:
                return None
    return tuple(parsed)
