"""Variants of a trajectory: the same answer to a prompt that is put in another way.

Tools and their fields are shuffled, sections change places, and the instruction is worded otherwise (xLAM,
arXiv:2409.03215). Relevance negatives (APIGen, arXiv:2406.18518) take the tool away that was called; the answer becomes
a refusal.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from xlam_jax.config import Data
from xlam_jax.data.formats import PLAIN, Variant
from xlam_jax.data.render import Rendered, known, sequences
from xlam_jax.data.trajectory import Message, ToolCall, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REFUSALS = (
    "None of the available tools can do this.",
    "I can't do this with the tools that I have.",
    "There is no tool among those I can use that would answer this.",
    "The tools I have been given do not cover this request.",
    "I have no tool for this.",
)
_VALUES = ("default", "enum", "const", "examples", "example")  # hold data, not schemas


def augmented(
    trajectory: Trajectory, rng: np.random.Generator, tokenizer: "PreTrainedTokenizerFast", data: Data
) -> Rendered:
    """Renders a variant as `data.augment` asks for; the draw depends on `rng` alone.

    A variant of more than `sequence_length` + 1 ids gives way to the plain rendering. Of a trajectory that the format
    writes as several sequences one is drawn; `lengths.fit` gives its parts, which are one sequence each. Raises
    `InvalidTrajectory` for what the format cannot write.
    """
    augment, limit = data.augment, data.sequence_length + 1
    _, format_ = known(tokenizer, data.format)
    varied = trajectory
    if augment.negatives and rng.random() < augment.negatives:
        varied = negative(varied, rng) or varied
    if augment.tools:
        varied = replace(varied, tools=[varied.tools[i] for i in rng.permutation(len(varied.tools))])
    if augment.fields:
        varied = replace(varied, tools=[{**tool, "function": shuffled(tool["function"], rng)} for tool in varied.tools])
    variant = Variant(
        instruction=int(rng.integers(format_.instructions)) if augment.instructions and format_.instructions else 0,
        sections=tuple(rng.permutation(format_.sections).tolist()) if augment.sections and format_.sections else (),
    )
    one = _drawn(varied, variant, rng, tokenizer, data)
    if one is None or len(one.input_ids) > limit:
        one = _drawn(trajectory, PLAIN, rng, tokenizer, data)
    if one is None:
        raise ValueError(f"trajectory '{trajectory.id}' has no token that carries loss")
    return one


def _drawn(
    trajectory: Trajectory, variant: Variant, rng: np.random.Generator, tokenizer: Any, data: Data
) -> Rendered | None:
    found = [one for _, one in sequences(trajectory, tokenizer, data.format, data.loss, variant) if one.weights.any()]
    if len(found) < 2:
        return found[0] if found else None
    return found[int(rng.integers(len(found)))]


def negative(trajectory: Trajectory, rng: np.random.Generator) -> Trajectory | None:
    """Takes away the tool of a trajectory's only call, and what is equivalent to it, and ends with a refusal in words.

    None where there is not exactly one call, where its turn carries no loss, and where no tool would be left.
    """
    turns = trajectory.conversation
    calls = [(i, call) for i, turn in enumerate(turns) for call in turn.tool_calls]
    if len(calls) != 1 or turns[calls[0][0]].loss is False:
        return None
    at, call = calls[0]
    left = _without(trajectory.tools, call)
    if not left:
        return None
    refusal = Message("assistant", REFUSALS[int(rng.integers(len(REFUSALS)))], loss=turns[at].loss)
    return replace(trajectory, tools=left, conversation=(*turns[:at], refusal))


def shuffled(schema: Any, rng: np.random.Generator) -> Any:
    """The same schema with the keys of its objects in another order; values such as defaults stay as they are."""
    if isinstance(schema, list):
        return [shuffled(item, rng) for item in schema]
    if not isinstance(schema, dict):
        return schema
    keys = list(schema)
    order = [keys[i] for i in rng.permutation(len(keys))]
    return {key: schema[key] if key in _VALUES else shuffled(schema[key], rng) for key in order}


def _without(tools: Sequence[dict[str, Any]], call: ToolCall) -> list[dict[str, Any]]:
    """The tools but for the called one and those with the same words in their name or the same description."""
    called = next(tool["function"] for tool in tools if tool["function"]["name"] == call.name)
    name, description = _words(called["name"]), _words(called.get("description"))

    def equivalent(function: dict[str, Any]) -> bool:
        described = _words(function.get("description"))
        return _words(function["name"]) == name or (bool(description) and described == description)

    return [tool for tool in tools if not equivalent(tool["function"])]


def _words(text: object) -> frozenset[str]:
    """The words of a text or a name, whatever their order and case: getWeather, weather.get, get_weather."""
    if not isinstance(text, str):
        return frozenset()
    return frozenset(word.casefold() for word in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![a-z])|\d+", text))
