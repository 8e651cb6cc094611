"""Formats, which write conversations as text and assign each segment of the text to a turn.

This module has the interface and shared functions; `xlam_jax.data.formats.registry` finds a format by its name.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, NamedTuple, Protocol

from xlam_jax.data.codec import Segment, to_json
from xlam_jax.data.control import NO_MARKS, Marks
from xlam_jax.data.trajectory import InvalidTrajectory, Message, ToolCall, Trajectory, turn_number
from xlam_jax.data.wire import Wire


@dataclass(frozen=True, slots=True)
class Variant:
    """A variant of a format's prompts. The default is the prompt that the format's template writes."""

    instruction: int = 0
    """Index of the wording of the format instruction, which explains to the model how to write calls."""
    sections: tuple[int, ...] = ()
    """The order of the prompt's sections, as a permutation; empty for that of the template."""


PLAIN = Variant()
DROP_REASONING = "train without it: data.reasoning: drop"
"""What to do about reasoning that a format cannot write."""


class Layout(NamedTuple):
    """The text of one token sequence. Assistant turns of `trajectory` with `loss` False are only context in it."""

    trajectory: Trajectory
    segments: list[Segment]


class Format(Protocol):
    """Writes conversations for one tokenizer."""

    template: str
    """A jinja template that writes the same text; it is saved with the tokenizer."""
    instructions: int
    """Number of wordings of the format instruction; 0 for a format without one."""
    sections: int
    """Number of sections of the prompt whose order can change."""
    marks: Marks
    """What no content of a prompt or an answer spells; `NO_MARKS` if the format writes content as it is."""

    @property
    def wire(self) -> Wire | None:
        """How calls and reasoning are written in an answer, None if no wire format fits a tokenizer's template."""
        ...

    def layouts(self, trajectory: Trajectory, variant: Variant = PLAIN) -> Iterator[Layout]:
        """Yields the layouts of a trajectory: one where a single sequence can train all of its turns.

        There are several where the format writes earlier turns differently in the prompt of a later turn: then each
        assistant turn without `loss: false` is trained in exactly one of them. Raises
        `InvalidTrajectory("not-representable", …)` for a trajectory that the format cannot write.
        """
        ...

    def prompt(self, system: str, tools: list[dict[str, Any]], messages: Sequence[Message]) -> list[Segment]:
        """Returns the prompt for the next assistant turn. Raises the errors of `layouts`."""
        ...


def read_template(name: str, marks: Marks = NO_MARKS, **variables: bool) -> str:
    """Returns a template of this package, after statements that set `variables`.

    A template that writes tool results first sorts them, because a server passes them in the order of the client. With
    `marks`, its content spells none of them.
    """
    header = "".join(
        f"{{%- set {variable} = {'true' if value else 'false'} -%}}\n" for variable, value in variables.items()
    )
    parts = [name] if name == "mistral_v1" else ["results_in_order", name]
    body = header + "".join(_read(part) for part in parts)
    return marks.template + _read("plain_text") + body if marks else _PLAIN.sub(r"\1", body)


def as_unguarded(template: str) -> str:
    """Returns a template as versions saved it that did not keep marks out of content; others are unchanged."""
    _, guard, body = template.partition(_GUARD_END)
    return _PLAIN.sub(r"\1", body) if guard else template


_GUARD_END = "{#- The conversation is written by what follows. -#}\n"
"""The last line of `templates/plain_text.jinja`, which also saved templates have: it must not change."""
_PLAIN = re.compile(r"plain_(?:text|json)\( (.*?) \)")
"""Content in a template, between spaces; group 1 is how versions wrote it that did not keep marks out of it."""


def _read(part: str) -> str:
    return (files("xlam_jax.data") / "templates" / f"{part}.jinja").read_text(encoding="utf-8")


def written_calls(
    calls: Iterable[ToolCall],
    turn: int,
    front: str = "",
    back: str = "",
    ids: bool = False,
    marks: Marks = NO_MARKS,
) -> Iterator[Segment]:
    """Yields the calls of a turn as a one-line JSON array, which servers parse, between `front` and `back`.

    With `ids`, the id of a call that has one follows its arguments. Names and arguments spell none of `marks`.
    """
    between = front + "["
    for call in calls:
        yield Segment(f'{between}{{"name": {marks.in_json(to_json(call.name))}, "arguments":', "tool_call", turn)
        yield Segment(" " + marks.in_json(to_json(call.arguments)), "arguments", turn)
        between = f', "id": {to_json(call.id)}}}, ' if ids and call.id else "}, "
    yield Segment(between.removesuffix(", ") + "]" + back, "tool_call", turn)


def not_representable(detail: str) -> InvalidTrajectory:
    """Returns the error for a trajectory that a format cannot write; `detail` says why."""
    return InvalidTrajectory("not-representable", detail)


def refuse_reasoning(turns: Sequence[Message], format: str) -> None:
    """Raises the error of a format that cannot write reasoning if a trained turn has reasoning."""
    for at, turn in enumerate(turns):
        if turn.reasoning and turn.loss is not False:
            raise not_representable(
                f"turn {turn_number(at, turn)} has reasoning, which {format} cannot write; use the format xlam, or "
                f"{DROP_REASONING}"
            )


def without_loss(turns: Sequence[Message], before: int) -> tuple[Message, ...]:
    """Returns the turns with `loss: false` in the assistant turns before an index."""
    return tuple(
        replace(turn, loss=False) if i < before and turn.role == "assistant" and turn.loss is not False else turn
        for i, turn in enumerate(turns)
    )
