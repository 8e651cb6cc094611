"""What a suite is: tasks, how a model is led through one of them, and how outcomes become scores.

    class Riddles(Suite):
        name, about = "riddles", "questions with one word as their answer"

        def tasks(self):
            return [Task(row["id"], row) for row in read_rows(self.options.data)]

        async def run(self, task, model, agent):
            answer = await model.chat([{"role": "user", "content": task.data["question"]}])
            return Outcome({"accuracy": answer.content == task.data["answer"]}, [*answer.asked, answer.message])

A suite in which a model acts gives an `Environment` for each task, and leaves `run` to the agents' one loop
(`AgentSuite`). What goes wrong on the way to the model is `EndpointFault`: it ends the task, is recorded as an error,
and never becomes a score.
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
    """What a suite is given; what it does not use it ignores, what it misses it asks for by name."""

    data: Path | None = None
    """The user's copy of the suite's data."""
    seed: int = 0
    extra: Mapping[str, str] = field(default_factory=dict)
    """`--set key=value`: a suite's own settings, by the names in its `settings`."""


class Outcome(NamedTuple):
    """How a task ended, other than by an `EndpointFault`."""

    scores: Mapping[str, float]
    """Name → 0 to 1; every outcome of a suite has the same names."""
    messages: Sequence[dict[str, Any]]
    """The conversation in OpenAI form, the model's last words with it."""
    failure: str = ""
    """In a word or two why it is no full score, one kind for many tasks (wrong-arguments, no-answer, steps-used-up)."""
    details: Mapping[str, Any] = {}
    """JSON: what the score was made of (answer, expected, the checker's words)."""


class Suite(ABC):
    """A benchmark. Made once a run; `run` is called for many tasks at once, so it keeps nothing on the suite."""

    name: ClassVar[str]
    about: ClassVar[str]
    """One line for `--help`."""
    settings: ClassVar[Mapping[str, str]] = {}
    """Own settings: name → what it is."""
    main_score: ClassVar[str] = "accuracy"
    """The score that is told first."""
    overall: ClassVar[str] = "all"
    """The name of the row of all examples, whose scores are the means over them."""
    agent: ClassVar[str] = "native"
    """The agent that it runs with unless another is asked for."""
    agents: ClassVar[Sequence[str] | None] = ("native",)
    """The agents that it can run with; None: all."""

    def __init__(self, options: Options):
        """Raises `UserError` where data are missing or malformed, before any request is made."""
        self.options = options

    @abstractmethod
    def tasks(self) -> list[Task]:
        """All tasks, in an order that is the same in every run: `--limit N` takes the first."""

    @abstractmethod
    async def run(self, task: Task, model: "Model", agent: Agent) -> Outcome:
        """Leads the model through a task. Raises `EndpointFault`, which the runner records."""

    def notes(self, summary: Mapping[str, Any]) -> list[str]:
        """What a reader of the scores must know, a sentence each; `summary` is that of `summary.json`."""
        return []

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Ends what the suite has open."""


class AgentSuite(Suite):
    """A suite in which a model acts: it gives an `Environment` for each task, and any agent can lead."""

    agent: ClassVar[str] = "react"
    agents: ClassVar[Sequence[str] | None] = None
    settings: ClassVar[Mapping[str, str]] = {"max_steps": "actions that a task may take"}
    max_steps: ClassVar[int] = 15
    """Unless `--set max_steps=N` says otherwise."""
    examples: ClassVar[Sequence[Demonstration]] = ()
    labour: ClassVar[Mapping[str, Sequence[str]] | None] = None
    """See `Episode`."""

    def __init__(self, options: Options):
        super().__init__(options)
        self.steps = setting(options, "max_steps", int, self.max_steps)
        if self.steps < 1:
            raise UserError(f"--set max_steps={self.steps}: a task takes at least one action")

    @abstractmethod
    def environment(self, task: Task) -> Environment:
        """A new world for a task."""

    async def run(self, task: Task, model: "Model", agent: Agent) -> Outcome:
        """Lets the agent act until the task is done or its steps are used up."""
        environment = self.environment(task)
        episode: Episode | None = None
        try:
            observation, tools = await environment.reset(task)
            episode = Episode(environment, observation, tools, self.steps, self.examples, self.labour)
            await agent.lead(model, episode)
            scores, failure, details = environment.outcome()
        except EndpointFault as fault:  # of the environment: it does not know what was said
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
    """A suite's own setting, read with `kind` (int, float, str, …). Raises `UserError` for what is none."""
    if name not in options.extra:
        return default
    try:
        return kind(options.extra[name])
    except ValueError:
        what = getattr(kind, "__name__", "value")
        raise UserError(f"--set {name}={options.extra[name]}: is no {what}; the default is {default}") from None


def text_tool(name: str, description: str, argument: str) -> dict[str, Any]:
    """A tool of one argument, a text, in OpenAI form."""
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
