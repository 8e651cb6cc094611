"""AgentOhana: homogeneous multi-turn rows, one episode of an agent per row.

Raw: {"user query", "model name", "score", "other information", "steps": [{"step_id", "input", "output",
"next observation"}, …]}; keys have spaces or underscores, the score is a text or a number. The first input is the task
with the format prompt; later inputs repeat it, and then "Action: …" and "Observation: …" of every earlier step.
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
    """The parts of a text action; `thought` is the text before it."""

    thought: str
    name: str
    argument: str


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts actions of WebShop and HotpotQA to calls of these converters' tools, with their thoughts as text.

    The user query becomes the user's turn: task instruction and tools replace the format prompt. In WebShop, steps that
    the environment answered with "Invalid" are dropped.

    In other environments, and where an action belongs to neither, outputs stay text, and the first input and the
    observations are user turns. The last observation, model name and other information are dropped.
    """
    return convert_rows(paths, convert_row)


def convert_row(row: dict[str, Any], name: str) -> Iterator[dict[str, Any] | StepDropped | Repaired]:
    """Converts one episode. Raises `InvalidTrajectory` where a later input has another task than the first."""
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
    unified: dict[str, Any] = {
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
        unified["source"] = environment.__name__.rpartition(".")[2] if unified["source"] is None else unified["source"]
        unified |= {"task_instruction": environment.INSTRUCTION, "tools": environment.TOOLS}
        for item in _call_turns(steps, environment):
            if isinstance(item, StepDropped):
                yield item
            else:
                turns.append(item)
    if len(turns) == 1:
        raise InvalidTrajectory("no-assistant-turn", "every step is invalid")
    yield unified | {"conversation": turns[:-1]}


def _call_turns(steps: Sequence[Step], environment: ModuleType) -> Iterator[dict[str, Any] | StepDropped]:
    """Yields the turns of a known environment, alternately calls and results."""
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
    """The environment that has every action; of several, that of the `hints`, or with an action of its own in `prompt`.

    None where there is not exactly one.
    """
    fitting = []
    for environment in ENVIRONMENTS:
        shop = environment is webshop
        names = [_name(step) for step in steps if not (shop and "Invalid" in step.observation)]
        actions = {*environment.PARAMETER, "think"} if shop else environment.PARAMETER.keys()
        if names and all(name in actions for name in names) and set(names) != {"think"}:
            fitting.append(environment)
    if len(fitting) > 1:
        named = [module for module in fitting if module.__name__.rpartition(".")[2] in hints]
        in_prompt = [
            module for module in fitting if any(f"{name}[" in prompt for name in module.PARAMETER.keys() - {"search"})
        ]
        fitting = named or in_prompt
    return fitting[0] if len(fitting) == 1 else None


def _name(step: Step) -> str | None:
    action = _action(step.output)
    return None if action is None else action.name


def _action(output: str) -> Action | None:
    """The action at the end of an output, None if there is none."""
    match, text = ACTION.search(output), output.rstrip()
    if not match or not text.endswith("]"):
        return None
    thought = output[: match.start()]
    label = THOUGHT.match(thought)
    return Action(thought[label.end() if label else 0 :].strip(), match[1].lower(), text[match.end() : -1])


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
    """The value of a key, which has spaces or underscores."""
    with_spaces, with_underscores = key.replace("_", " "), key.replace(" ", "_")
    return row[with_spaces] if row.get(with_spaces) is not None else row.get(with_underscores)


def _text(step: dict[str, Any], key: str) -> str | None:
    value = _value(step, key)
    if value is not None and not isinstance(value, str):
        raise InvalidTrajectory("missing-field", f"`{key}` of a step is a {type(value).__name__}, not text")
    return value


def _number(score: str) -> Any:
    try:
        return float(score)
    except ValueError:
        return score  # the parser reports it


def _check_inputs(steps: Sequence[Step], repairs: list[Repaired]) -> None:
    """Reports the first input that is not the first input followed by all earlier steps.

    Raises `InvalidTrajectory` for an input that does not contain the first one.
    """
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
    """Describes how an input, from `at` on, differs from the steps; empty if it does not."""
    for j, step in enumerate(steps):
        for what, part in (("output", step.output), ("observation", step.observation)):
            part = LABELS.sub("", part, count=1).strip()
            start = text.find(part, at)
            if start < 0:
                return f"lacks the {what} of step {j}: {part[:80]!r}"
            between = text[at:start]
            if not LABELS.fullmatch(between):
                return f"has text before the {what} of step {j}: {between.strip()[:80]!r}"
            at = start + len(part)
    rest = text[at:]
    return "" if LABELS.fullmatch(rest) else f"ends in {rest.strip()[:80]!r}"
