"""AgentOhana: homogeneous multi-turn rows, one episode of an agent a row.

Raw: {"user query", "model name", "score", "other information", "steps": [{"step_id", "input", "output",
"next observation"}, …]}; keys with spaces or underscores, the score a text or a number. The first input is the task
with the format prompt; a later one repeats it, then "Action: …" and "Observation: …" of every step before.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from xlam_jax.data.converters import hotpotqa, webshop
from xlam_jax.data.converters.common import Converted, Dropped, Repaired, StepDropped, call, convert_rows, field
from xlam_jax.data.trajectory import InvalidTrajectory

ENVIRONMENTS: tuple[ModuleType, ...] = (webshop, hotpotqa)
"""Environments whose text actions become calls of their converters' tools."""
ACTION = re.compile(r"(?:\A\s*|\bAction(?: \d+)?:[ \t]*)(\w+)\[")
THOUGHT = re.compile(r"\s*Thought(?: \d+)?:[ \t]*")
LABELS = re.compile(r"(?:\s|\b(?:Action|Observation|Thought)(?: \d+)?:)*+")


class Step(NamedTuple):
    """One step; `input` is None where the row has none."""

    input: str | None
    output: str
    observation: str


class Action(NamedTuple):
    """A text action, taken apart: `thought` stands before it."""

    thought: str
    name: str
    argument: str


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Actions of WebShop and HotpotQA become calls of these converters' tools, and the user query the user's turn: the
    task instruction and the tools stand in for the format prompt. Thoughts stand beside the calls. In WebShop, steps
    answered with "Invalid" are dropped.

    Elsewhere, and where an action is of neither kind, outputs stay text, the first input is the user's turn and
    observations are the user's as well. The last observation is left out, as are model name and other information.
    """
    return convert_rows(paths, convert_row)


def convert_row(row: dict[str, Any], name: str) -> Iterator[dict[str, Any] | StepDropped | Repaired]:
    """Converts one episode. Raises `InvalidTrajectory` where a later input is of another task than the first."""
    repairs: list[Repaired] = []
    steps = _steps(row, repairs)
    if not steps:
        raise InvalidTrajectory("no-assistant-turn", "`steps` is empty")
    query = _value(row, "user query")
    if query is not None and not isinstance(query, str):
        raise InvalidTrajectory("missing-field", f"`user query` is a {type(query).__name__}")
    prompt = steps[0].input or query
    if not prompt:
        raise InvalidTrajectory("missing-field", "neither `user query` nor the first `input` has the task")
    _check_inputs(steps, repairs)
    yield from repairs
    hints = " ".join(str(hint) for hint in (name, row.get("source"), row.get("id")) if isinstance(hint, str))
    environment = _environment(steps, hints.lower(), prompt)
    score = row.get("score")
    identity = row.get("id")
    made: dict[str, Any] = {
        "unique_trajectory_id": name if identity is None else identity,
        "source": row.get("source"),
        "score": _number(score) if isinstance(score, str) else score,
    }
    turns: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    if environment is None:
        if query and query.strip() not in prompt:
            yield Repaired("query-not-in-input", f"the first input, which is kept, does not have {query[:80]!r}")
        for i, step in enumerate(steps):
            if "webshop" in hints.lower() and "Invalid" in step.observation:
                yield StepDropped("invalid-action", f"step {i}: {step.output}")
                continue
            turns.append({"role": "assistant", "content": step.output})
            turns.append({"role": "user", "content": step.observation})
    else:
        turns[0]["content"] = query or prompt
        made["source"] = environment.__name__.rpartition(".")[2] if made["source"] is None else made["source"]
        made |= {"task_instruction": environment.INSTRUCTION, "tools": environment.TOOLS}
        for item in _call_turns(steps, environment):
            if isinstance(item, StepDropped):
                yield item
            else:
                turns.append(item)
    if len(turns) == 1:
        raise InvalidTrajectory("no-assistant-turn", "every step is invalid")
    yield made | {"conversation": turns[:-1]}


def _call_turns(steps: Sequence[Step], environment: ModuleType) -> Iterator[dict[str, Any] | StepDropped]:
    """The turns of a known environment, calls and results by turns."""
    thoughts: list[str] = []
    number = 0
    for i, step in enumerate(steps):
        action = _action(step.output)
        if environment is webshop and "Invalid" in step.observation:
            thoughts = []
            yield StepDropped("invalid-action", f"step {i}: {step.output}")
            continue
        assert action is not None, "the environment was chosen by its actions"
        if action.name == "think":
            thoughts.append(action.argument.strip())
            continue
        number += 1
        thought = "\n".join(text for text in (*thoughts, action.thought) if text)
        thoughts = []
        calls = [call(number, action.name, {environment.PARAMETER[action.name]: action.argument})]
        observation = step.observation.removeprefix("Observation:").strip()
        yield {"role": "assistant", "content": thought, "tool_calls": calls}
        yield {"role": "tool", "tool_call_id": f"call_{number}", "name": action.name, "content": observation}
    if thoughts:
        yield StepDropped("thought-without-action", thoughts[0])


def _environment(steps: Sequence[Step], hints: str, prompt: str) -> ModuleType | None:
    """The environment that has every action; of several, the one that is named, or whose own action the prompt has."""
    fitting = []
    for environment in ENVIRONMENTS:
        shop = environment is webshop
        names = [_name(step) for step in steps if not (shop and "Invalid" in step.observation)]
        known = {*environment.PARAMETER, "think"} if shop else environment.PARAMETER.keys()
        if names and all(name in known for name in names) and set(names) != {"think"}:
            fitting.append(environment)
    if len(fitting) > 1:
        named = [each for each in fitting if each.__name__.rpartition(".")[2] in hints]
        own = [each for each in fitting if any(f"{name}[" in prompt for name in each.PARAMETER.keys() - {"search"})]
        fitting = named or own
    return fitting[0] if len(fitting) == 1 else None


def _name(step: Step) -> str | None:
    action = _action(step.output)
    return None if action is None else action.name


def _action(output: str) -> Action | None:
    """The action that an output ends with, None if it does not."""
    found, text = ACTION.search(output), output.rstrip()
    if not found or not text.endswith("]"):
        return None
    thought = output[: found.start()]
    label = THOUGHT.match(thought)
    return Action(thought[label.end() if label else 0 :].strip(), found[1].lower(), text[found.end() : -1])


def _steps(row: dict[str, Any], repairs: list[Repaired]) -> list[Step]:
    raw = field(row, "steps", list)
    for i, step in enumerate(raw):
        if not isinstance(step, dict):
            raise InvalidTrajectory("missing-field", f"step {i} is a {type(step).__name__}, not an object")
    numbers = [_value(step, "step_id") for step in raw]
    if all(type(number) is int for number in numbers) and numbers != sorted(numbers):
        repairs.append(Repaired("steps-out-of-order", f"step ids {numbers}"))
        raw = sorted(raw, key=lambda step: _value(step, "step_id"))
    return [
        Step(_text(step, "input"), field(step, "output", str), _text(step, "next observation") or "") for step in raw
    ]


def _value(row: dict[str, Any], key: str) -> Any:
    """The value of a key that has spaces or underscores."""
    spaced, scored = key.replace("_", " "), key.replace(" ", "_")
    return row[spaced] if row.get(spaced) is not None else row.get(scored)


def _text(step: dict[str, Any], key: str) -> str | None:
    value = _value(step, key)
    if value is not None and not isinstance(value, str):
        raise InvalidTrajectory("missing-field", f"`{key}` of a step is a {type(value).__name__}, not text")
    return value


def _number(score: str) -> Any:
    try:
        return float(score)
    except ValueError:
        return score  # the reader tells what is wrong with it


def _check_inputs(steps: Sequence[Step], repairs: list[Repaired]) -> None:
    """Notes the first way in which an input is not the first one and all that happened since."""
    first = (steps[0].input or "").strip()
    for i, step in enumerate(steps[1:], start=1):
        if step.input is None or not first:
            continue
        at = step.input.find(first)
        if at < 0:
            raise InvalidTrajectory("inconsistent-input", f"the input of step {i} does not repeat the first one")
        difference = _difference(step.input, at + len(first), steps[:i])
        if difference:
            repairs.append(Repaired("history-differs", f"the input of step {i} {difference}; the steps are kept"))
            return


def _difference(text: str, at: int, steps: Sequence[Step]) -> str:
    """How an input differs, from `at` on, from what the steps say; empty if it does not."""
    for j, step in enumerate(steps):
        for what, part in (("output", step.output), ("observation", step.observation)):
            part = LABELS.sub("", part, count=1).strip()
            found = text.find(part, at)
            if found < 0:
                return f"lacks the {what} of step {j}: {part[:80]!r}"
            between = text[at:found]
            if not LABELS.fullmatch(between):
                return f"has before the {what} of step {j}: {between.strip()[:80]!r}"
            at = found + len(part)
    rest = text[at:]
    return "" if LABELS.fullmatch(rest) else f"ends in {rest.strip()[:80]!r}"
