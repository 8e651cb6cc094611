"""Formats: how a conversation becomes text. Each says which pieces of the text belong to which turn.

This module has what they share; `xlam_jax.data.formats.registry` finds a format by its name.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, NamedTuple, Protocol

from xlam_jax.data.codec import Segment, to_json
from xlam_jax.data.trajectory import InvalidTrajectory, Message, ToolCall, Trajectory


@dataclass(frozen=True, slots=True)
class Variant:
    """Another way to put the same prompt. The default is what the format's template writes."""

    instruction: int = 0
    """Which of the format's `instructions` tells the model how to write calls."""
    sections: tuple[int, ...] = ()
    """The order of the prompt's sections, a permutation; empty: as in the template."""


PLAIN = Variant()


class Layout(NamedTuple):
    """What one token sequence is made of. Assistant turns of `trajectory` with `loss` False are only context in it."""

    trajectory: Trajectory
    segments: list[Segment]


class Format(Protocol):
    """How conversations are written for one tokenizer."""

    template: str
    """The jinja text that writes the same; saved with the tokenizer."""
    instructions: int
    """How many wordings of the format instruction there are; 0: the format has none."""
    sections: int
    """How many sections of the prompt can change places."""

    def layouts(self, trajectory: Trajectory, variant: Variant = PLAIN) -> Iterator[Layout]:
        """Lays a trajectory out, once where one pass can train all of its turns.

        It is laid out several times where the prompt of a later turn is written in another way than the turns before
        it: then each assistant turn without `loss: false` is in exactly one sequence that trains it. Raises
        `InvalidTrajectory("not-representable", …)` for what the format cannot write.
        """
        ...

    def prompt(self, system: str, tools: list[dict[str, Any]], messages: Sequence[Message]) -> list[Segment]:
        """Lays a conversation out up to where the assistant answers. Raises as `layouts` does."""
        ...


def read_template(name: str, **variables: bool) -> str:
    """Returns a shipped template with variables set in front of it.

    One that writes tool results sorts them first: a server hands over what a client sends, in whatever order.
    """
    header = "".join(
        f"{{%- set {variable} = {'true' if value else 'false'} -%}}\n" for variable, value in variables.items()
    )
    parts = [name] if name == "mistral_v1" else ["results_in_order", name]
    return header + "".join(
        (files("xlam_jax.data") / "templates" / f"{part}.jinja").read_text(encoding="utf-8") for part in parts
    )


def written_calls(
    calls: Iterable[ToolCall], turn: int, front: str = "", back: str = "", ids: bool = False
) -> Iterator[Segment]:
    """The calls of a turn as the array that servers parse, between `front` and `back`; its text is one-line JSON.

    With `ids`, those of the calls that have one stand behind the arguments.
    """
    between = front + "["
    for call in calls:
        yield Segment(f'{between}{{"name": {to_json(call.name)}, "arguments":', "tool_call", turn)
        yield Segment(" " + to_json(call.arguments), "arguments", turn)
        between = f', "id": {to_json(call.id)}}}, ' if ids and call.id else "}, "
    yield Segment(between.removesuffix(", ") + "]" + back, "tool_call", turn)


def not_representable(detail: str) -> InvalidTrajectory:
    """The error that says why a format cannot write a trajectory."""
    return InvalidTrajectory("not-representable", detail)


def without_loss(turns: Sequence[Message], before: int) -> tuple[Message, ...]:
    """Takes the loss from the assistant turns before an index."""
    return tuple(
        replace(turn, loss=False) if i < before and turn.role == "assistant" and turn.loss is not False else turn
        for i, turn in enumerate(turns)
    )
