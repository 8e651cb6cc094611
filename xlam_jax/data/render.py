"""Renders trajectories as token ids and loss weights; `xlam_jax.data.wire` is the inverse.

This is the only renderer. The format (`xlam_jax.data.formats`) determines the text. The loss weight of a token follows
from the segment of the text in which the token starts, never from a search in the text.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xlam_jax.config import Loss
from xlam_jax.data.codec import CONTROL_TOKENS, Codec, Kind, Segment
from xlam_jax.data.formats import PLAIN, Format, Layout, Variant
from xlam_jax.data.formats.registry import find
from xlam_jax.data.messages import parse_request
from xlam_jax.data.parse import parse_tools
from xlam_jax.data.trajectory import InvalidTrajectory, Message, ToolCall, Trajectory, system_text
from xlam_jax.data.wire import ANY, Wire
from xlam_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "CONTROL_TOKENS",
    "RENDER_VERSION",
    "Kind",
    "Rendered",
    "Span",
    "chat_template",
    "end_tokens",
    "render",
    "render_all",
    "render_prompt",
    "wire_of",
]


RENDER_VERSION = 3
"""Raise it with every change of the parser, a converter or the renderer after which the same rows give other token ids,
loss weights or text. Prepared caches of another version are refused. tests/data/test_golden.py fails until it is
raised."""


class Span(NamedTuple):
    """Tokens `start` to `end` (exclusive) of one kind. `turn` indexes the conversation, -1 before its first turn."""

    kind: Kind
    turn: int
    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """A sequence of N tokens: ids int32 [N], loss weights float32 [N], and spans that cover the tokens in order."""

    input_ids: np.ndarray
    weights: np.ndarray
    spans: tuple[Span, ...]

    @property
    def loss_mask(self) -> np.ndarray:
        """Whether each token is trained, bool [N]."""
        return self.weights > 0


def render(
    trajectory: Trajectory, tokenizer: "PreTrainedTokenizerFast", format: str = "xlam", loss: Loss | None = None
) -> Rendered:
    """Renders a conversation as one sequence.

    Text, tool calls and end tokens of assistant turns have the weights of `loss` (default: 1 for all), except in turns
    with `loss: false`. Control tokens spelled out in content stay text. Raises `InvalidTrajectory` for a trajectory
    that the format cannot write, or does not write as exactly one sequence (see `render_all`), and `UserError` when
    tokenizer and format are incompatible.
    """
    rendered = [sequence for _, sequence in sequences(trajectory, tokenizer, format, loss)]
    if len(rendered) != 1:
        raise InvalidTrajectory(
            "not-one-sequence", f"the format {format} writes this conversation as {len(rendered)} sequences"
        )
    return rendered[0]


def render_all(
    trajectory: Trajectory, tokenizer: "PreTrainedTokenizerFast", format: str = "xlam", loss: Loss | None = None
) -> list[Rendered]:
    """Renders a conversation as the sequences that train it, without those that have no trained tokens.

    Where the format never rewrites a turn, as `xlam`, one sequence trains all turns. Elsewhere each turn is trained
    once, in a sequence with the prompt that a server would give: `xlam_v1` has a sequence per assistant turn, `native`
    starts a new one whenever the template rewrites earlier turns. Raises the errors of `render`.
    """
    return [rendered for _, rendered in sequences(trajectory, tokenizer, format, loss) if rendered.weights.any()]


def sequences(
    trajectory: Trajectory,
    tokenizer: "PreTrainedTokenizerFast",
    format: str = "xlam",
    loss: Loss | None = None,
    variant: Variant = PLAIN,
) -> Iterator[tuple[Trajectory, Rendered]]:
    """Yields the sequences, each with the trajectory that is rendered as this one sequence.

    That is the conversation up to the last turn that the sequence trains; turns that other sequences train have
    `loss: false` in it. Raises the errors of `render`.
    """
    loss = loss or Loss()
    codec, format_ = codec_and_format(tokenizer, format)
    for layout in format_.layouts(with_flags(trajectory, loss), variant):
        yield layout.trajectory, encode(layout, codec, loss)


def encode(layout: Layout, codec: Codec, loss: Loss) -> Rendered:
    """Tokenizes a layout. Each token belongs to the segment in which its characters start."""
    segments = layout.segments
    ids, starts = codec.encode(segments)
    weights = [_weight(segment, layout.trajectory.conversation, loss) for segment in segments]
    ends = np.cumsum([len(segment.text) for segment in segments])
    owner = np.searchsorted(ends, starts, side="right")
    spans: list[Span] = []
    cuts = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(owner)]
    for start, end in pairwise(cuts):
        at = int(owner[start])
        kind, turn, weight = segments[at].kind, segments[at].turn, weights[at]
        if spans and (spans[-1].kind, spans[-1].turn, spans[-1].weight) == (kind, turn, weight):
            start = spans.pop().start
        spans.append(Span(kind, turn, start, end, weight))
    return Rendered(ids, np.array(weights, dtype=np.float32)[owner], tuple(spans))


def _weight(segment: Segment, turns: Sequence[Message], loss: Loss) -> float:
    if segment.kind == "prompt" or turns[segment.turn].loss is False:
        return 0.0
    if segment.kind == "thought":
        return loss.thought
    if segment.kind == "reasoning":
        return loss.reasoning
    return loss.tool_call if turns[segment.turn].tool_calls else loss.answer


def with_flags(trajectory: Trajectory, loss: Loss) -> Trajectory:
    """Returns the trajectory with `loss: false` in every assistant turn that `loss` does not train.

    With `loss.turns` "last", earlier assistant turns are trained only if they have `loss: true`. A turn whose kinds all
    have weight 0 is never trained.
    """
    if loss.turns == "all" and min(loss.thought, loss.tool_call, loss.answer) > 0:
        return trajectory
    turns = trajectory.conversation
    last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")

    def trains(i: int, turn: Message) -> bool:
        if loss.turns == "last" and turn.loss is None and i < last:
            return False
        if turn.reasoning and loss.reasoning > 0:
            return True
        if not turn.tool_calls:
            return loss.answer > 0
        return loss.tool_call > 0 or (loss.thought > 0 and bool(turn.content))

    flagged = tuple(
        replace(turn, loss=False) if turn.role == "assistant" and not trains(i, turn) else turn
        for i, turn in enumerate(turns)
    )
    return replace(trajectory, conversation=flagged)


def render_prompt(
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    tokenizer: "PreTrainedTokenizerFast",
    format: str | None = None,
) -> list[int]:
    """Renders chat messages (OpenAI form) as the prompt of the assistant's next turn, by the same rules as `render`.

    The default `format` is `native`, or `xlam` if the tokenizer has no chat template. Raises `UserError` when messages
    or tools are malformed, the last turn is not the user's or a tool's, or the format cannot write them.
    """
    codec, format_ = codec_and_format(tokenizer, format or ("native" if tokenizer.chat_template else "xlam"))
    try:
        turns, tools = parse_request(messages), parse_tools(tools)
        if turns[-1].role not in ("user", "tool"):
            raise UserError(f"the last turn is by the {turns[-1].role}; end the messages with a user or a tool turn")
        segments = format_.prompt(system_text("", turns), tools, turns)
    except InvalidTrajectory as invalid:
        raise UserError(f"the request cannot be rendered: {invalid.detail}") from None
    return codec.encode(segments)[0].tolist()


def chat_template(tokenizer: "PreTrainedTokenizerFast", format: str = "xlam") -> str:
    """Returns the jinja template that renders the same text as `render` with this tokenizer.

    Raises `UserError` for `native` with a tokenizer that has no template.
    """
    return codec_and_format(tokenizer, format)[1].template


_QUESTION = Message("user", "a")
_PROBES = (
    Trajectory("", None, None, "", [], (_QUESTION, Message("assistant", "b"))),
    Trajectory(
        "",
        None,
        None,
        "",
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
        (_QUESTION, Message("assistant", "", tool_calls=(ToolCall(id="call00000", name="f", arguments={}),))),
    ),
)
"""A turn of text and a turn that calls a tool: templates may end them with different tokens."""


def end_tokens(tokenizer: "PreTrainedTokenizerFast", format: str | None = None) -> tuple[int, ...]:
    """Returns the ids of the tokens that end assistant turns in a format: generation must stop at each of them.

    They are taken from rendered turns, because a template may end turns with another token than the tokenizer's
    end-of-sequence token. The latter is returned where the format renders no turn. The default `format` is that of
    `render_prompt`.
    """
    name = format or ("native" if tokenizer.chat_template else "xlam")
    ends: dict[int, None] = {}
    for probe in _PROBES:
        try:
            codec, format_ = codec_and_format(tokenizer, name)
            rendered = [encode(layout, codec, Loss()) for layout in format_.layouts(probe)]
        except (InvalidTrajectory, UserError):  # the format cannot write such a turn
            continue
        for sequence in rendered:
            for span in sequence.spans:
                tokens = sequence.input_ids[span.start : span.end] if span.kind == "eos" else []
                special = [int(token) for token in tokens if token in codec.special_ids]
                ends |= dict.fromkeys(special[:1])
    if not ends and tokenizer.eos_token_id is not None:
        return (int(tokenizer.eos_token_id),)  # pyright: ignore[reportArgumentType]
    return tuple(ends)


def wire_of(tokenizer: "PreTrainedTokenizerFast", format: str | None = None) -> Wire:
    """Returns the wire format of a format: how calls and reasoning are parsed in a model's answer.

    The default `format` is that of `render_prompt`. `ANY`, which recognizes every wire format by its marks, is returned
    for a chat template whose wire format cannot be detected.
    """
    name = format or ("native" if tokenizer.chat_template else "xlam")
    return codec_and_format(tokenizer, name)[1].wire or ANY


@dataclass
class _Entry:
    """A tokenizer's codec and formats, which are replaced when tokens or a chat template are added to it."""

    state: tuple[int, object]
    codec: Codec
    formats: dict[str, Format] = field(default_factory=dict)


_entries: "weakref.WeakKeyDictionary[PreTrainedTokenizerFast, _Entry]" = weakref.WeakKeyDictionary()


def codec_and_format(tokenizer: "PreTrainedTokenizerFast", format: str) -> tuple[Codec, Format]:
    """Returns the codec of a tokenizer and the format for it, both cached.

    Raises `UserError` when tokenizer and format are incompatible.
    """
    state = (len(tokenizer), tokenizer.chat_template)
    entry = _entries.get(tokenizer)
    if entry is None or entry.state != state:
        entry = _entries[tokenizer] = _Entry(state, Codec(tokenizer))
    if format not in entry.formats:
        entry.formats[format] = find(format, tokenizer, entry.codec)
    return entry.codec, entry.formats[format]
