"""What a suite is: tasks, how a model is led through one of them, and how outcomes become scores.

    class Riddles(Suite):
        name, about = "riddles", "questions with one word as their answer"

        def tasks(self):
            return [Task(row["id"], row) for row in read_rows(self.options.data)]

        async def run(self, task, model, agent):
            answer = await model.chat([{"role": "user", "content": task.data["question"]}])
            return Outcome({"accuracy": answer.content == task.data["answer"]}, [*answer.asked, answer.message])

A suite in which a model acts gives an `Environment` for each task, and leaves `run` to the agents' one loop
(`AgentSuite`). What goes wrong on the way to the model is `EndpointFault`: it ends the task, is recorded as an error, and
never becomes a score.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from xlam_jax.data.trajectory import ToolCall

if TYPE_CHECKING:
    from xlam_jax.evaluate.agents import Agent
    from xlam_jax.evaluate.endpoint import Model


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a suite is given; what it does not use it ignores, what it misses it asks for by name."""

    data: Path | None = None
    """The user's copy of the suite's data."""
    seed: int = 0
    extra: Mapping[str, str] = field(default_factory=dict)
    """`--set key=value`: a suite's own settings, by the names in its `settings`."""


class Task(NamedTuple):
    """One example of a suite."""

    id: str
    """Unique in the suite, and the same in every run: a rerun continues by it."""
    data: Any
    group: str = ""
    """By which scores are also told: a category, a difficulty."""


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
    agent: ClassVar[str] = "native"
    """The agent that it runs with unless another is asked for."""

    def __init__(self, options: Options):
        """Raises `UserError` where data are missing or malformed, before any request is made."""
        self.options = options

    @abstractmethod
    def tasks(self) -> list[Task]:
        """All tasks, in an order that is the same in every run: `--limit N` takes the first."""

    @abstractmethod
    async def run(self, task: Task, model: "Model", agent: "Agent") -> Outcome:
        """Leads the model through a task. Raises `EndpointFault`, which the runner records."""

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Ends what the suite has open."""


class Step(NamedTuple):
    """What an action led to."""

    observation: str
    reward: float = 0.0
    done: bool = False


class Environment(Protocol):
    """A world for one task. Each task has its own; nothing is shared but what is only read."""

    async def reset(self, task: Task) -> tuple[str, list[dict[str, Any]]]:
        """The first observation (the task in words), and the tools in OpenAI form."""
        ...

    async def step(self, action: ToolCall) -> Step:
        """Does what is asked. An action that makes no sense is told in the observation, and raises nothing."""
        ...

    def outcome(self) -> tuple[Mapping[str, float], str, Mapping[str, Any]]:
        """Scores, failure and details as in `Outcome`, of what was done since `reset`."""
        ...
