"""The base classes of suites. A suite provides tasks, runs a model on a task, and scores the outcome.

    class Riddles(Suite):
        name, about = "riddles", "questions with one word as their answer"

        def tasks(self):
            return [Task(row["id"], row) for row in read_rows(self.options.data)]

        async def run(self, task, model, agent):
            answer = await model.chat([{"role": "user", "content": task.data["question"]}])
            return Outcome({"accuracy": answer.content == task.data["answer"]}, [*answer.prompt, answer.message])

A suite in which a model acts provides an `Environment` for each task; its base class `AgentSuite` implements `run`.
A request that fails raises `EndpointFault`, which ends the task: it is recorded as an error, and never scored.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from xlam_jax.errors import UserError
from xlam_jax.evaluate.agents import Agent
from xlam_jax.evaluate.endpoint import EndpointFault
from xlam_jax.evaluate.episode import Demonstration, Environment, Episode, Step, Task

if TYPE_CHECKING:
    from xlam_jax.evaluate.endpoint import Model

__all__ = [
    "AgentSuite",
    "Demonstration",
    "Environment",
    "Episode",
    "Options",
    "Outcome",
    "Step",
    "Suite",
    "Task",
    "setting",
    "text_tool",
]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a suite. It raises `UserError` if one that it needs is missing."""

    data: Path | None = None
    """The user's copy of the suite's data."""
    seed: int = 0
    extra: Mapping[str, str] = field(default_factory=dict)
    """`--set key=value`: settings of this suite; `Suite.settings` lists their names."""


class Outcome(NamedTuple):
    """The result of a task that did not end in an `EndpointFault`."""

    scores: Mapping[str, float]
    """Name → 0 to 1; all outcomes of a suite have the same names."""
    messages: Sequence[dict[str, Any]]
    """The conversation in OpenAI form, including the model's last answer."""
    failure: str = ""
    """Short code of the reason for a lower score (wrong-arguments, no-answer, steps-used-up), or empty."""
    details: Mapping[str, Any] = {}
    """JSON: what the score is based on (answer, expected, the checker's message)."""


class Suite(ABC):
    """A benchmark. Created once per evaluation. `run` must not store state on the suite: its calls are concurrent."""

    name: ClassVar[str]
    about: ClassVar[str]
    """One line for `--help`."""
    settings: ClassVar[Mapping[str, str]] = {}
    """Settings of this suite: name → description."""
    main_score: ClassVar[str] = "accuracy"
    """The score that is shown first."""
    overall: ClassVar[str] = "all"
    """Name of the row with the means over all examples."""
    agent: ClassVar[str] = "native"
    """The default agent."""
    agents: ClassVar[Sequence[str] | None] = ("native",)
    """The supported agents; None: all."""

    def __init__(self, options: Options):
        """Raises `UserError` if data are missing or malformed, before any request is sent."""
        self.options = options

    @abstractmethod
    def tasks(self) -> list[Task]:
        """Returns all tasks, in the same order in every run: `--limit N` selects the first N."""

    @abstractmethod
    async def run(self, task: Task, model: "Model", agent: Agent) -> Outcome:
        """Runs the model on a task. Raises `EndpointFault`, which the runner records."""

    def notes(self, summary: Mapping[str, Any]) -> list[str]:
        """Returns notes to show with the scores, one sentence each; `summary` is the content of `summary.json`."""
        return []

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Closes the suite's files and connections."""


class AgentSuite(Suite):
    """A suite in which a model acts in an `Environment` per task. All agents can run it."""

    agent: ClassVar[str] = "react"
    agents: ClassVar[Sequence[str] | None] = None
    settings: ClassVar[Mapping[str, str]] = {"max_steps": "maximum number of actions per task"}
    max_steps: ClassVar[int] = 15
    """Default of `--set max_steps=N`."""
    examples: ClassVar[Sequence[Demonstration]] = ()
    labour: ClassVar[Mapping[str, Sequence[str]] | None] = None
    """See `Episode`."""

    def __init__(self, options: Options):
        super().__init__(options)
        self.steps = setting(options, "max_steps", int, self.max_steps)
        if self.steps < 1:
            raise UserError(f"--set max_steps={self.steps}: must be at least 1")

    @abstractmethod
    def environment(self, task: Task) -> Environment:
        """Returns a new environment for a task."""

    async def run(self, task: Task, model: "Model", agent: Agent) -> Outcome:
        """Runs the agent until the task is done or its steps are used up."""
        environment = self.environment(task)
        episode: Episode | None = None
        try:
            observation, tools = await environment.reset(task)
            episode = Episode(environment, observation, tools, self.steps, self.examples, self.labour)
            await agent.lead(model, episode)
            scores, failure, details = environment.outcome()
        except EndpointFault as fault:  # a fault of the environment does not contain the conversation
            fault.messages = fault.messages or (episode.messages if episode else [])
            raise
        finally:
            if (close := getattr(environment, "aclose", None)) is not None:
                await close()
        if failure and not episode.done:
            failure = "no-action" if episode.unreadable == episode.steps else "steps-used-up"
        counts = {"steps": episode.steps, "unreadable": episode.unreadable}
        return Outcome(scores, episode.messages, failure, {**details, **counts})


def setting(options: Options, name: str, kind: Callable[[str], T], default: T) -> T:
    """Returns a setting of a suite, parsed by `kind` (int, float, str, …). Raises `UserError` for an invalid value."""
    if name not in options.extra:
        return default
    try:
        return kind(options.extra[name])
    except ValueError:
        expected = getattr(kind, "__name__", "value")
        raise UserError(
            f"--set {name}={options.extra[name]}: is not a valid {expected}; the default is {default}"
        ) from None


def text_tool(name: str, description: str, argument: str) -> dict[str, Any]:
    """Returns a tool with one string argument, in OpenAI form."""
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
