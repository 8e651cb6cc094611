"""From trajectory to token ids and loss weights; `xlam_jax.data.wire` is the way back.

This is the only renderer. What the text looks like is a matter of the format (`xlam_jax.data.formats`); which tokens
carry loss follows from the piece of the text that each token starts in, never from a search for what the text says.
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
from xlam_jax.enums import SPAN_KINDS as KINDS
from xlam_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "CONTROL_TOKENS",
    "KINDS",
    "RENDER_VERSION",
    "Kind",
    "Rendered",
    "Span",
    "chat_template",
    "end_tokens",
    "render",
    "render_all",
    "render_prompt",
]


RENDER_VERSION = 1
"""Raise it whenever the same rows give other token ids, loss weights or text: by a change of the parser, a converter or
the renderer. Prepared caches of another version are refused. tests/data/test_golden.py fails until it is raised."""


class Span(NamedTuple):
    """Tokens `start` to `end` (exclusive) of one kind. `turn` indexes the conversation, -1 before its first turn."""

    kind: Kind
    turn: int
    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True, eq=False)
class Rendered:
    """A token sequence: ids int32 (N,), loss weights float32 (N,), and spans that cover the N tokens in order."""

    input_ids: np.ndarray
    weights: np.ndarray
    spans: tuple[Span, ...]

    @property
    def loss_mask(self) -> np.ndarray:
        """Which tokens carry loss, bool (N,)."""
        return self.weights > 0


def render(
    trajectory: Trajectory, tokenizer: "PreTrainedTokenizerFast", format: str = "xlam", loss: Loss | None = None
) -> Rendered:
    """Renders a conversation as one sequence.

    Text, tool calls and end token of assistant turns carry loss as `loss` says (all of them, with weight 1), unless the
    turn says `loss: false`. Control tokens written out in content stay text. Raises `InvalidTrajectory` for what the
    format cannot write, and also where it takes more or less than one sequence (`render_all` gives them); `UserError`
    when tokenizer and format do not go together.
    """
    rendered = [one for _, one in sequences(trajectory, tokenizer, format, loss)]
    if len(rendered) != 1:
        raise InvalidTrajectory(
            "not-one-sequence", f"the format {format} writes this conversation as {len(rendered)} sequences"
        )
    return rendered[0]


def render_all(
    trajectory: Trajectory, tokenizer: "PreTrainedTokenizerFast", format: str = "xlam", loss: Loss | None = None
) -> list[Rendered]:
    """Renders a conversation as the sequences that train it, those without a token that carries loss left out.

    One sequence trains all turns where the format writes each turn once and for all: `xlam` always. Elsewhere each turn
    is trained once, in a sequence that gives it the prompt that a server gives it: `xlam_v1` has a sequence for every
    assistant turn, `native` as many as the template rewrites what it wrote. Raises as `render` does.
    """
    return [one for _, one in sequences(trajectory, tokenizer, format, loss) if one.weights.any()]


def sequences(
    trajectory: Trajectory,
    tokenizer: "PreTrainedTokenizerFast",
    format: str = "xlam",
    loss: Loss | None = None,
    variant: Variant = PLAIN,
) -> Iterator[tuple[Trajectory, Rendered]]:
    """Gives the sequences one by one, each with the trajectory that is rendered as this sequence alone.

    That is the conversation up to the last turn that the sequence trains; in it the turns that others train have
    `loss: false`. Raises as `render` does.
    """
    loss = loss or Loss()
    codec, format_ = known(tokenizer, format)
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
    return loss.tool_call if turns[segment.turn].tool_calls else loss.answer


def with_flags(trajectory: Trajectory, loss: Loss) -> Trajectory:
    """Writes into the turns which of them carry no loss, so that their `loss` flags say it all.

    With `turns` "last" the earlier assistant turns train only if they say `loss: true`; a turn whose kinds all weigh
    nothing never does.
    """
    if loss.turns == "all" and min(loss.thought, loss.tool_call, loss.answer) > 0:
        return trajectory
    turns = trajectory.conversation
    last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")

    def trains(i: int, turn: Message) -> bool:
        if loss.turns == "last" and turn.loss is None and i < last:
            return False
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
    """Renders chat messages (OpenAI form) up to where the assistant answers, by the same rules as `render`.

    Without a `format` it is that of the tokenizer's chat template, and `xlam` if it has none. Raises `UserError` when
    messages or tools are malformed or the last turn is not the user's or a tool's, or the format cannot write them.
    """
    codec, format_ = known(tokenizer, format or ("native" if tokenizer.chat_template else "xlam"))
    try:
        turns, tools = parse_request(messages), parse_tools(tools)
        if turns[-1].role not in ("user", "tool"):
            raise UserError(f"the last turn is by the {turns[-1].role}; end the messages with a user or a tool turn")
        segments = format_.prompt(system_text("", turns), tools, turns)
    except InvalidTrajectory as invalid:
        raise UserError(f"the request cannot be rendered: {invalid.detail}") from None
    return codec.encode(segments)[0].tolist()


def chat_template(tokenizer: "PreTrainedTokenizerFast", format: str = "xlam") -> str:
    """Returns the jinja text that renders like `render` with this tokenizer (but for `loss: false`).

    Raises `UserError` for `native` with a tokenizer that has no template.
    """
    return known(tokenizer, format)[1].template


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
    """Returns the tokens that end assistant turns in a format: generation must stop at each of them.

    They are read from rendered turns, so that a template that ends turns with another token than the tokenizer's
    end-of-sequence token is understood. Where it renders none, it is the latter. Without a `format` it is that of the
    tokenizer's chat template, as in `render_prompt`.
    """
    name = format or ("native" if tokenizer.chat_template else "xlam")
    ends: dict[int, None] = {}
    for probe in _PROBES:
        try:
            codec, format_ = known(tokenizer, name)
            rendered = [encode(layout, codec, Loss()) for layout in format_.layouts(probe)]
        except (InvalidTrajectory, UserError):  # the format writes no such turn
            continue
        for sequence in rendered:
            for span in sequence.spans:
                tokens = sequence.input_ids[span.start : span.end] if span.kind == "eos" else []
                special = [int(token) for token in tokens if token in codec.special_ids]
                ends |= dict.fromkeys(special[:1])
    if not ends and tokenizer.eos_token_id is not None:
        return (int(tokenizer.eos_token_id),)  # pyright: ignore[reportArgumentType]
    return tuple(ends)


@dataclass
class _Known:
    """What is made once for each tokenizer; made anew when tokens or a chat template are added."""

    state: tuple[int, object]
    codec: Codec
    formats: dict[str, Format] = field(default_factory=dict)


_tokenizers: "weakref.WeakKeyDictionary[PreTrainedTokenizerFast, _Known]" = weakref.WeakKeyDictionary()


def known(tokenizer: "PreTrainedTokenizerFast", format: str) -> tuple[Codec, Format]:
    """Returns what rendering needs of a tokenizer and a format. Raises `UserError` when they do not go together."""
    state = (len(tokenizer), tokenizer.chat_template)
    entry = _tokenizers.get(tokenizer)
    if entry is None or entry.state != state:
        entry = _tokenizers[tokenizer] = _Known(state, Codec(tokenizer))
    if format not in entry.formats:
        entry.formats[format] = find(format, tokenizer, entry.codec)
    return entry.codec, entry.formats[format]
