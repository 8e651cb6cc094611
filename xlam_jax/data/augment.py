"""Data augmentation: variants of a trajectory that have the same answer to a prompt in another form.

Tools, their fields and the prompt's sections are shuffled, and the instruction has other wordings (xLAM,
arXiv:2409.03215). Relevance negatives (APIGen, arXiv:2406.18518) remove the called tool; the answer becomes a refusal.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from xlam_jax.config import Data
from xlam_jax.data.formats import PLAIN, Variant
from xlam_jax.data.render import Rendered, codec_and_format, sequences
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
_VALUES = ("default", "enum", "const", "examples", "example")  # keys of data, not of schemas


def augmented(
    trajectory: Trajectory, rng: np.random.Generator, tokenizer: "PreTrainedTokenizerFast", data: Data
) -> Rendered:
    """Renders a random variant by the settings of `data.augment`; it depends on `rng` alone.

    A variant of more than `sequence_length` + 1 ids is replaced by the plain rendering. Of a trajectory that the format
    writes as several sequences, one is drawn; the parts from `lengths.fit` are one sequence each. Raises
    `InvalidTrajectory` for a trajectory that the format cannot write, and `ValueError` for one without trained tokens.
    """
    augment, limit = data.augment, data.sequence_length + 1
    _, format_ = codec_and_format(tokenizer, data.format)
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
    rendered = _draw(varied, variant, rng, tokenizer, data)
    if rendered is None or len(rendered.input_ids) > limit:
        rendered = _draw(trajectory, PLAIN, rng, tokenizer, data)
    if rendered is None:
        raise ValueError(f"trajectory '{trajectory.id}' has no trained tokens")
    return rendered


def _draw(
    trajectory: Trajectory, variant: Variant, rng: np.random.Generator, tokenizer: Any, data: Data
) -> Rendered | None:
    """Renders one of the sequences that train a trajectory; None where none has trained tokens."""
    rendered = [sequence for _, sequence in sequences(trajectory, tokenizer, data.format, data.loss, variant)]
    trained = [sequence for sequence in rendered if sequence.weights.any()]
    if len(trained) < 2:
        return trained[0] if trained else None
    return trained[int(rng.integers(len(trained)))]


def negative(trajectory: Trajectory, rng: np.random.Generator) -> Trajectory | None:
    """Removes the tool of a trajectory's only call, and equivalent tools, and replaces the call by a refusal.

    Returns None where there is not exactly one call, its turn has `loss: false`, or no tool would be left.
    """
    turns = trajectory.conversation
    calls = [(i, call) for i, turn in enumerate(turns) for call in turn.tool_calls]
    if len(calls) != 1 or turns[calls[0][0]].loss is False:
        return None
    at, call = calls[0]
    others = _without_called(trajectory.tools, call)
    if not others:
        return None
    refusal = Message("assistant", REFUSALS[int(rng.integers(len(REFUSALS)))], loss=turns[at].loss)
    return replace(trajectory, tools=others, conversation=(*turns[:at], refusal))


def shuffled(schema: Any, rng: np.random.Generator) -> Any:
    """Returns the schema with the keys of its objects in random order; values such as defaults stay as they are."""
    if isinstance(schema, list):
        return [shuffled(item, rng) for item in schema]
    if not isinstance(schema, dict):
        return schema
    keys = list(schema)
    order = [keys[i] for i in rng.permutation(len(keys))]
    return {key: schema[key] if key in _VALUES else shuffled(schema[key], rng) for key in order}


def _without_called(tools: Sequence[dict[str, Any]], call: ToolCall) -> list[dict[str, Any]]:
    """The tools except the called one and those with the same words in their name or description."""
    called = next(tool["function"] for tool in tools if tool["function"]["name"] == call.name)
    name, description = _words(called["name"]), _words(called.get("description"))

    def equivalent(function: dict[str, Any]) -> bool:
        described = _words(function.get("description"))
        return _words(function["name"]) == name or (bool(description) and described == description)

    return [tool for tool in tools if not equivalent(tool["function"])]


def _words(text: object) -> frozenset[str]:
    """The words of a text or a name, without order and case: equal for getWeather, weather.get and get_weather."""
    if not isinstance(text, str):
        return frozenset()
    return frozenset(word.casefold() for word in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![a-z])|\d+", text))
