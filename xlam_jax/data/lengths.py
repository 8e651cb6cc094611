"""Trajectories longer than a row: left out, cut from the oldest turn on, or split between turns.

Turns are measured once; the few candidates that should fit are rendered, and what is given is what was rendered.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from xlam_jax.config import Data
from xlam_jax.data.codec import Codec, Segment
from xlam_jax.data.formats import Format, Layout
from xlam_jax.data.pair import Pair
from xlam_jax.data.render import Rendered, encode, known, with_flags
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Fitted(NamedTuple):
    """What a trajectory gives to train on."""

    rendered: list[Rendered]
    """Sequences of at most `sequence_length` + 1 ids, each with tokens that carry loss. Turns in spans are those of the
    trajectory."""
    reasons: list[str]
    """Why nothing is there: too-long, no-loss, not-representable; or what was done to make it fit: cut, split; or that
    the turns have reasoning, which no format writes yet: reasoning-not-rendered."""
    parts: list[Trajectory]
    """Parallel to `rendered`: what each sequence is rendered from, alone."""
    cut_turns: int = 0
    """Turns that cutting left out."""
    detail: str = ""
    """In words, why nothing is there."""


class _Part(NamedTuple):
    trajectory: Trajectory
    turns: list[int]
    """Which turn of the whole each of its turns is."""


def fit(trajectory: Trajectory, tokenizer: "PreTrainedTokenizerFast", data: Data) -> Fitted:
    """Renders a trajectory by `data.format` and `data.loss`, and makes it fit by `data.on_long`.

    `cut` keeps system text and tools, and of the conversation the newest turns that fit: the user turn that asks for
    them comes first. `split` gives several parts, and every turn that carries loss carries it in exactly one of them;
    from the second on at most half of a part is trained, and turns before it fill the other half. In both, a turn that
    answers a tool's result is trained only where the result stands before it.

    A trajectory that gives nothing raises nothing: see `Fitted.reasons`. Raises `UserError` when tokenizer and format
    do not go together.
    """
    codec, format_ = known(tokenizer, data.format)
    fitter = _Fitter(codec, format_, data)
    fitted = Fitted([], [], [])
    try:
        for layout in format_.layouts(with_flags(trajectory, data.loss)):
            one = fitter.fit(layout)
            if one.reasons == ["too-long"] and data.on_long != "cut":
                return one
            fitted = _together(fitted, one)
    except InvalidTrajectory as invalid:
        return Fitted([], [invalid.reason], [], detail=invalid.detail)
    if fitted.rendered:  # where some sequences fit, those that do not are turns that were cut
        reasons = ["cut" if reason == "too-long" else reason for reason in fitted.reasons]
        reasons += _unwritten(trajectory)
        return fitted._replace(reasons=list(dict.fromkeys(reasons)), detail="")
    if not fitted.reasons:
        return Fitted([], ["no-loss"], [], detail="no assistant turn carries loss")
    return fitted._replace(cut_turns=0)


def fit_pair(pair: Pair, tokenizer: "PreTrainedTokenizerFast", data: Data) -> Fitted:
    """Renders both sides of a pair: chosen, rejected, together at most `sequence_length` places; or nothing.

    Raises `UserError` when tokenizer and format do not go together.
    """
    codec, format_ = known(tokenizer, data.format)
    sides: list[Rendered] = []
    try:
        for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            layouts = list(format_.layouts(with_flags(side, data.loss)))
            if any(codec.too_long(layout.segments, data.sequence_length + 1) for layout in layouts):
                detail = f"{name} alone does not fit into a row of {data.sequence_length}"
                return Fitted([], ["too-long"], [], detail=detail)
            rendered = [one for layout in layouts if (one := encode(layout, codec, data.loss)).weights.any()]
            if not rendered:
                return Fitted([], ["no-loss"], [], detail=f"{name}: no turn that differs carries loss")
            if len(rendered) > 1:
                detail = f"{name}: the format {data.format} writes what differs as {len(rendered)} sequences; use xlam"
                return Fitted([], ["not-one-sequence"], [], detail=detail)
            sides += rendered
    except InvalidTrajectory as invalid:
        return Fitted([], [invalid.reason], [], detail=invalid.detail)
    places = sum(len(side.input_ids) - 1 for side in sides)
    if places > data.sequence_length:
        detail = f"both sides take {places} places, which do not fit into a row of {data.sequence_length}"
        return Fitted([], ["too-long"], [], detail=detail)
    reasons = list(dict.fromkeys([*_unwritten(pair.chosen), *_unwritten(pair.rejected)]))
    return Fitted(sides, reasons, [pair.chosen, pair.rejected])


def _unwritten(trajectory: Trajectory) -> list[str]:
    """What a trajectory has that no format writes."""
    return ["reasoning-not-rendered"] if any(turn.reasoning for turn in trajectory.conversation) else []


def _together(first: Fitted, second: Fitted) -> Fitted:
    return Fitted(
        first.rendered + second.rendered,
        list(dict.fromkeys(first.reasons + second.reasons)),
        first.parts + second.parts,
        first.cut_turns + second.cut_turns,
        first.detail or second.detail,
    )


class _Fitter:
    """Fits the layouts of one trajectory."""

    def __init__(self, codec: Codec, format_: Format, data: Data):
        self._codec, self._format, self._data = codec, format_, data
        self._limit = data.sequence_length + 1
        self._counts: dict[str, int] = {}

    def fit(self, layout: Layout) -> Fitted:
        """Fits one layout: nothing, one sequence, or the parts it is split into."""
        rendered = self._encoded(layout)
        if rendered is not None and not rendered.weights.any():
            return Fitted([], [], [])
        if rendered is not None and len(rendered.input_ids) <= self._limit:
            return Fitted([rendered], [], [layout.trajectory])
        size = "many" if rendered is None else len(rendered.input_ids)
        too_long = Fitted([], ["too-long"], [], detail=f"{size} tokens do not fit into {self._limit}")
        if self._data.on_long in ("error", "drop"):
            return too_long
        turns = layout.trajectory.conversation
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        while answers and turns[answers[-1]].loss is False:
            answers.pop()  # what comes after the last turn that carries loss changes nothing
        long = _Long(layout.trajectory, answers, self._measured(layout, len(turns)), self._limit, self._rendered)
        if self._data.on_long == "cut":
            return long.cut() or too_long._replace(cut_turns=1)
        return long.split() or too_long

    def _encoded(self, layout: Layout) -> Rendered | None:
        if self._codec.too_long(layout.segments, self._limit):
            return None
        return encode(layout, self._codec, self._data.loss)

    def _rendered(self, part: _Part) -> Rendered | None:
        """The part's sequence, if it is one that fits and trains something."""
        layouts = list(self._format.layouts(part.trajectory))
        rendered = self._encoded(layouts[0]) if len(layouts) == 1 else None
        if rendered is None or len(rendered.input_ids) > self._limit or not rendered.weights.any():
            return None
        spans = tuple(span._replace(turn=part.turns[span.turn]) if span.turn >= 0 else span for span in rendered.spans)
        return replace(rendered, spans=spans)

    def _measured(self, layout: Layout, turns: int) -> list[int]:
        """About how many tokens each turn takes; the last number is for what belongs to none."""
        sizes = [0] * (turns + 1)
        for segment in _joined(layout.segments):
            sizes[segment.turn] += self._count(segment)
        return sizes

    def _count(self, segment: Segment) -> int:
        text = segment.text
        if segment.control:
            return 1
        if text not in self._counts:
            long = self._codec.too_long([segment], self._limit)
            self._counts[text] = (
                self._limit if long else len(self._codec.plain.encode(text, add_special_tokens=False).ids)
            )
        return self._counts[text]


def _joined(segments: Iterable[Segment]) -> list[Segment]:
    """The segments with the text of calls in one piece, as it is tokenized."""
    joined: list[Segment] = []
    after = False
    for segment in segments:
        joins = segment.kind == "arguments" or (after and segment.kind == "tool_call")
        if joins and not segment.control and not joined[-1].control:
            joined[-1] = joined[-1]._replace(text=joined[-1].text + segment.text)
        else:
            joined.append(segment)
        after = segment.kind == "arguments"
    return joined


class _Long:
    """A conversation that is too long, as steps: each is an assistant turn and what follows it up to the next.

    Parts are runs of steps, `first` to `last`, behind the system turns and the user turns that asked for the first.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        answers: list[int],
        sizes: list[int],
        limit: int,
        render: Callable[[_Part], Rendered | None],
    ):
        self._trajectory, self._answers, self._limit, self._render = trajectory, answers, limit, render
        self._turns = trajectory.conversation
        self._system = [i for i, turn in enumerate(self._turns) if turn.role == "system"]
        self._front = sizes[-1]
        self._before = [0, *accumulate(sizes[:-1])]  # tokens before a turn
        self._asked: list[list[int]] = []  # for each step, the user turns that opened its exchange
        asked: list[int] = []
        for start, end in zip([len(self._system), *(at + 1 for at in answers)], answers, strict=False):
            users = [i for i in range(start, end) if self._turns[i].role == "user"]
            asked = users or asked
            self._asked.append(asked)

    def cut(self) -> Fitted | None:
        """The longest part that ends with the last step."""
        last = len(self._answers) - 1
        found = self._longest_back(last, last, own=0)
        if not found:
            return None
        part, rendered = found
        return Fitted([rendered], ["cut"], [part.trajectory], len(self._turns) - len(part.turns))

    def split(self) -> Fitted | None:
        """Parts that train every step once, or None if a step fits into none."""
        found: list[tuple[_Part, Rendered]] = []
        own, last = 0, len(self._answers) - 1
        while (own := self._next_trained(own)) <= last:
            end, one = self._longest_start(own) if not found else (own, None)
            if one is None:
                end, one = self._with_context(own)
            if one is None:
                return None
            found.append(one)
            own = end + 1
        return Fitted([one for _, one in found], ["split"], [part.trajectory for part, _ in found])

    def _longest_start(self, own: int) -> tuple[int, tuple[_Part, Rendered] | None]:
        """The longest part from the beginning on that reaches a step, and its last step."""
        end, last = own, len(self._answers) - 1
        while end < last and self._size(0, end + 1) <= self._limit:
            end += 1
        while not (found := self._part(0, end, own=0)) and end > own:
            end -= 1
        while found and end < last and (longer := self._part(0, end + 1, own=0)):
            found, end = longer, end + 1
        return end, found

    def _with_context(self, own: int) -> tuple[int, tuple[_Part, Rendered] | None]:
        """A part that trains from a step on, half of it at most, with the steps before that fit; and its last step."""
        end, last = own, len(self._answers) - 1
        latest = own if self._opens(own) else own - 1
        while end < last and self._size(own, end + 1) - self._size(own, own - 1) <= self._limit // 2:
            end += 1
        while not (found := self._longest_back(latest, end, own)) and end > own:
            end -= 1
        return end, found

    def _longest_back(self, latest: int, last: int, own: int) -> tuple[_Part, Rendered] | None:
        """The longest part that starts with `latest` or a step before it."""
        first = latest
        while first > 0 and self._size(first - 1, last) <= self._limit:
            first -= 1
        while not (found := self._part(first, last, own)) and first < latest:
            first += 1
        while found and first > 0 and (longer := self._part(first - 1, last, own)):
            found, first = longer, first - 1
        return found

    def _part(self, first: int, last: int, own: int) -> tuple[_Part, Rendered] | None:
        """Steps `first` to `last`, of which those from `own` on are trained; None if they do not fit."""
        if not self._opens(first):
            own = max(own, first + 1)  # what the first step answers is gone
        start, stop = self._answers[first], self._answers[last] + 1
        context = self._answers[own] if own <= last else stop
        turns = [*self._system, *(i for i in self._asked[first] if i < start), *range(start, stop)]
        conversation = [
            replace(turn, loss=False) if turn.role == "assistant" and i < context else turn
            for i, turn in ((i, self._turns[i]) for i in turns)
        ]
        part = _Part(replace(self._trajectory, conversation=tuple(conversation)), turns)
        rendered = self._render(part)
        return None if rendered is None else (part, rendered)

    def _size(self, first: int, last: int) -> int:
        """About how many tokens a part has."""
        asked = sum(self._before[i + 1] - self._before[i] for i in self._asked[first])
        steps = self._before[self._answers[last] + 1] - self._before[self._answers[first]] if last >= first else 0
        return self._front + asked + steps

    def _opens(self, step: int) -> bool:
        """Whether a step answers the user at once."""
        return self._turns[self._answers[step] - 1].role == "user"

    def _next_trained(self, step: int) -> int:
        """The next step that carries loss, from `step` on."""
        return next(
            (at for at in range(step, len(self._answers)) if self._turns[self._answers[at]].loss is not False),
            len(self._answers),
        )
