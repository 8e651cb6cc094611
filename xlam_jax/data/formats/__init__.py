"""Formats: how a conversation becomes text. Each says which pieces of the text belong to which turn."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from xlam_jax.data.codec import Codec, Segment, to_json
from xlam_jax.data.trajectory import InvalidTrajectory, Message, ToolCall, Trajectory
from xlam_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAMES = ("xlam", "native", "xlam_v1")


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


def find(name: str, tokenizer: "PreTrainedTokenizerFast", codec: Codec) -> Format:
    """Returns a format for a tokenizer; `native` is that of the tokenizer's own chat template.

    Raises `UserError` for a name that is none of `NAMES`, and for `native` without a chat template.
    """
    from xlam_jax.data.formats.mistral import MistralV1, MistralV3
    from xlam_jax.data.formats.template import Template
    from xlam_jax.data.formats.xlam import Xlam
    from xlam_jax.data.formats.xlam_v1 import XlamV1

    if name == "xlam":
        return Xlam(codec)
    if name == "xlam_v1":
        return XlamV1(codec)
    if name != "native":
        raise UserError(f"format '{name}': known are {', '.join(NAMES)}{nearest(name, NAMES)}")
    if not tokenizer.chat_template:
        raise UserError(
            f"tokenizer '{tokenizer.name_or_path}' has no chat template, which the format native needs; "
            "use the format xlam, or a tokenizer that brings its template"
        )
    for known in (Xlam, XlamV1, MistralV1, MistralV3):
        if known.fits(codec) and tokenizer.chat_template == (format_ := known(codec)).template:
            return format_
    return Template(tokenizer, codec)


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
