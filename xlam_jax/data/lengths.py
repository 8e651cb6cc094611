"""Fits trajectories that are longer than a row: drops them, cuts off their oldest turns, or splits them between turns.

The tokens of each turn are counted once; then the few candidates that should fit are rendered and checked.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from xlam_jax.config import Data
from xlam_jax.data.codec import Codec, Segment
from xlam_jax.data.formats import Format, Layout
from xlam_jax.data.pair import Pair, drop_reasoning
from xlam_jax.data.render import Rendered, codec_and_format, encode, with_flags
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory, without_reasoning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Fitted(NamedTuple):
    """A trajectory, rendered as sequences that fit into rows."""

    rendered: list[Rendered]
    """Sequences of at most `sequence_length` + 1 ids, each with trained tokens. `turn` in their spans is an index into
    the whole trajectory."""
    reasons: list[str]
    """Why `rendered` is empty: too-long, no-loss, not-representable; or how the trajectory was changed: cut, split,
    reasoning-dropped."""
    parts: list[Trajectory]
    """Parallel to `rendered`: the trajectory that each sequence is the rendering of."""
    cut_turns: int = 0
    """Number of turns that were cut off."""
    detail: str = ""
    """Why `rendered` is empty, as a sentence."""


class _Part(NamedTuple):
    trajectory: Trajectory
    turns: list[int]
    """For each turn of the part, its index in the whole trajectory."""


def fit(trajectory: Trajectory, tokenizer: "PreTrainedTokenizerFast", data: Data) -> Fitted:
    """Renders a trajectory with `data.format` and `data.loss`, and makes it fit by `data.on_long`.

    With `data.reasoning` drop, the reasoning of its turns is dropped first.

    `cut` keeps system text, tools and the newest turns that fit, after the user turn that asks for them. `split` gives
    several parts; every trained turn is trained in exactly one of them. From the second part on, at most half of a part
    is trained, and earlier turns fill the other half as context. Both train a turn that answers a tool's result only
    after this result.

    A trajectory that does not fit raises no error, see `Fitted.reasons`. Raises `UserError` when tokenizer and format
    are incompatible.
    """
    codec, format_ = codec_and_format(tokenizer, data.format)
    fitter = _Fitter(codec, format_, data)
    kept = without_reasoning(trajectory) if data.reasoning == "drop" else trajectory
    fitted = Fitted([], [], [])
    try:
        for layout in format_.layouts(with_flags(kept, data.loss)):
            next_fitted = fitter.fit(layout)
            if next_fitted.reasons == ["too-long"] and data.on_long != "cut":
                return next_fitted
            fitted = _concatenate(fitted, next_fitted)
    except InvalidTrajectory as invalid:
        return Fitted([], [invalid.reason], [], detail=invalid.detail)
    if fitted.rendered:  # where some sequences fit, the turns of the others count as cut
        reasons = ["cut" if reason == "too-long" else reason for reason in fitted.reasons]
        reasons += ["reasoning-dropped"] if kept is not trajectory else []
        return fitted._replace(reasons=list(dict.fromkeys(reasons)), detail="")
    if not fitted.reasons:
        return Fitted([], ["no-loss"], [], detail="no assistant turn is trained")
    return fitted._replace(cut_turns=0)


def fit_pair(pair: Pair, tokenizer: "PreTrainedTokenizerFast", data: Data) -> Fitted:
    """Renders both sides of a pair, chosen and rejected, if together they have at most `sequence_length` positions.

    Raises `UserError` when tokenizer and format are incompatible.
    """
    codec, format_ = codec_and_format(tokenizer, data.format)
    kept = drop_reasoning(pair) if data.reasoning == "drop" else pair
    if isinstance(kept, InvalidTrajectory):
        return Fitted([], [kept.reason], [], detail=f"without reasoning: {kept.detail}")
    sides: list[Rendered] = []
    try:
        for name, side in (("chosen", kept.chosen), ("rejected", kept.rejected)):
            layouts = list(format_.layouts(with_flags(side, data.loss)))
            if any(codec.too_long(layout.segments, data.sequence_length + 1) for layout in layouts):
                detail = f"{name} alone does not fit into a row of {data.sequence_length}"
                return Fitted([], ["too-long"], [], detail=detail)
            encoded = [encode(layout, codec, data.loss) for layout in layouts]
            rendered = [sequence for sequence in encoded if sequence.weights.any()]
            if not rendered:
                return Fitted([], ["no-loss"], [], detail=f"{name}: no turn that differs is trained")
            if len(rendered) > 1:
                detail = (
                    f"{name}: the format {data.format} writes the turns that differ as {len(rendered)} sequences; "
                    "use xlam"
                )
                return Fitted([], ["not-one-sequence"], [], detail=detail)
            sides += rendered
    except InvalidTrajectory as invalid:
        return Fitted([], [invalid.reason], [], detail=invalid.detail)
    places = sum(len(side.input_ids) - 1 for side in sides)
    if places > data.sequence_length:
        detail = f"both sides have {places} positions, which do not fit into a row of {data.sequence_length}"
        return Fitted([], ["too-long"], [], detail=detail)
    return Fitted(sides, ["reasoning-dropped"] if kept is not pair else [], [kept.chosen, kept.rejected])


def _concatenate(first: Fitted, second: Fitted) -> Fitted:
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
        """Fits one layout: returns no sequence, one sequence, or the sequences of its parts."""
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
            answers.pop()  # turns after the last trained turn have no effect
        long = _Long(layout.trajectory, answers, self._measured(layout, len(turns)), self._limit, self._rendered)
        if self._data.on_long == "cut":
            return long.cut() or too_long._replace(cut_turns=1)
        return long.split() or too_long

    def _encoded(self, layout: Layout) -> Rendered | None:
        if self._codec.too_long(layout.segments, self._limit):
            return None
        return encode(layout, self._codec, self._data.loss)

    def _rendered(self, part: _Part) -> Rendered | None:
        """Renders a part; None unless it is one sequence that fits and has trained tokens."""
        layouts = list(self._format.layouts(part.trajectory))
        rendered = self._encoded(layouts[0]) if len(layouts) == 1 else None
        if rendered is None or len(rendered.input_ids) > self._limit or not rendered.weights.any():
            return None
        spans = tuple(span._replace(turn=part.turns[span.turn]) if span.turn >= 0 else span for span in rendered.spans)
        return replace(rendered, spans=spans)

    def _measured(self, layout: Layout, turns: int) -> list[int]:
        """Approximate number of tokens of each turn; the last number is that of text outside of turns."""
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
    """Joins the segments of a turn's calls into one, because they are tokenized together."""
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
    """A conversation that is too long, as steps: each is an assistant turn and the turns up to the next one.

    A part is a range of steps, `first` to `last`, after the system turns and the user turns that asked for the first.
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
        self._requests: list[list[int]] = []  # for each step, the user turns before it that it works on
        request: list[int] = []
        for start, end in zip([len(self._system), *(at + 1 for at in answers)], answers, strict=False):
            users = [i for i in range(start, end) if self._turns[i].role == "user"]
            request = users or request
            self._requests.append(request)

    def cut(self) -> Fitted | None:
        """The longest part that ends with the last step."""
        last = len(self._answers) - 1
        longest = self._longest_back(last, last, own=0)
        if not longest:
            return None
        part, rendered = longest
        return Fitted([rendered], ["cut"], [part.trajectory], len(self._turns) - len(part.turns))

    def split(self) -> Fitted | None:
        """Parts that train every step once, or None if a step does not fit into any part."""
        parts: list[tuple[_Part, Rendered]] = []
        own, last = 0, len(self._answers) - 1
        while (own := self._next_trained(own)) <= last:
            end, part = self._longest_start(own) if not parts else (own, None)
            if part is None:
                end, part = self._with_context(own)
            if part is None:
                return None
            parts.append(part)
            own = end + 1
        return Fitted([rendered for _, rendered in parts], ["split"], [part.trajectory for part, _ in parts])

    def _longest_start(self, own: int) -> tuple[int, tuple[_Part, Rendered] | None]:
        """Returns (last step, part): the longest part from the first step that includes step `own`."""
        end, last = own, len(self._answers) - 1
        while end < last and self._size(0, end + 1) <= self._limit:
            end += 1
        while not (part := self._part(0, end, own=0)) and end > own:
            end -= 1
        while part and end < last and (longer := self._part(0, end + 1, own=0)):
            part, end = longer, end + 1
        return end, part

    def _with_context(self, own: int) -> tuple[int, tuple[_Part, Rendered] | None]:
        """Returns (last step, part): at most half of the part trains steps from `own` on, earlier steps fill it."""
        end, last = own, len(self._answers) - 1
        latest = own if self._answers_user(own) else own - 1
        while end < last and self._size(own, end + 1) - self._size(own, own - 1) <= self._limit // 2:
            end += 1
        while not (part := self._longest_back(latest, end, own)) and end > own:
            end -= 1
        return end, part

    def _longest_back(self, latest: int, last: int, own: int) -> tuple[_Part, Rendered] | None:
        """The longest part up to step `last` that starts with step `latest` or an earlier one."""
        first = latest
        while first > 0 and self._size(first - 1, last) <= self._limit:
            first -= 1
        while not (part := self._part(first, last, own)) and first < latest:
            first += 1
        while part and first > 0 and (longer := self._part(first - 1, last, own)):
            part, first = longer, first - 1
        return part

    def _part(self, first: int, last: int, own: int) -> tuple[_Part, Rendered] | None:
        """Steps `first` to `last`, trained from step `own` on; None if they do not fit."""
        if not self._answers_user(first):
            own = max(own, first + 1)  # the tool result that the first step answers is not in the part
        start, stop = self._answers[first], self._answers[last] + 1
        context = self._answers[own] if own <= last else stop
        turns = [*self._system, *(i for i in self._requests[first] if i < start), *range(start, stop)]
        conversation = [
            replace(turn, loss=False) if turn.role == "assistant" and i < context else turn
            for i, turn in ((i, self._turns[i]) for i in turns)
        ]
        part = _Part(replace(self._trajectory, conversation=tuple(conversation)), turns)
        rendered = self._render(part)
        return None if rendered is None else (part, rendered)

    def _size(self, first: int, last: int) -> int:
        """Approximate number of tokens of the part from step `first` to `last`."""
        request = sum(self._before[i + 1] - self._before[i] for i in self._requests[first])
        steps = self._before[self._answers[last] + 1] - self._before[self._answers[first]] if last >= first else 0
        return self._front + request + steps

    def _answers_user(self, step: int) -> bool:
        """Whether a step follows a user turn directly."""
        return self._turns[self._answers[step] - 1].role == "user"

    def _next_trained(self, step: int) -> int:
        """The first trained step from `step` on."""
        return next(
            (at for at in range(step, len(self._answers)) if self._turns[self._answers[at]].loss is not False),
            len(self._answers),
        )
