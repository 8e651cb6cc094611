"""One task under way: the environment that an agent acts in, and what was done and said."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from xlam_jax.data.trajectory import ToolCall


class Task(NamedTuple):
    """One example of a suite."""

    id: str
    """Unique in the suite, and the same in every run: a rerun continues by it."""
    data: Any
    group: str = ""
    """By which scores are also told: a category, a difficulty."""


class Step(NamedTuple):
    """What an action led to."""

    observation: str
    reward: float = 0.0
    done: bool = False


class Environment(Protocol):
    """A world for one task. Each task has its own; nothing is shared but what is only read.

    One with connections has besides `async def aclose(self)`, which is called at the end. Where its own server fails it
    raises `EndpointFault("environment", …)`.
    """

    async def reset(self, task: Task) -> tuple[str, list[dict[str, Any]]]:
        """The first observation (the task in words), and the tools in OpenAI form."""
        ...

    async def step(self, action: ToolCall) -> Step:
        """Does what is asked. An action that makes no sense is told in the observation, and raises nothing."""
        ...

    def outcome(self) -> tuple[Mapping[str, float], str, Mapping[str, Any]]:
        """Scores, failure and details as in `Outcome`, of what was done since `reset`."""
        ...


class Demonstration(NamedTuple):
    """A task done well, for the prompts of the agents that learn from an example."""

    task: str
    """The first observation."""
    plan: str
    steps: Sequence[tuple[str, ToolCall, str]]
    """Thought, action, and what was observed; after the last, nothing."""


class Episode:
    """A task under way: what an agent sees of the world, what it did, and what was said."""

    def __init__(
        self,
        environment: Environment,
        task: str,
        tools: Sequence[dict[str, Any]],
        max_steps: int,
        examples: Sequence[Demonstration] = (),
        labour: Mapping[str, Sequence[str]] | None = None,
    ):
        self._environment = environment
        self.task = task
        """The first observation."""
        self.tools = {tool["function"]["name"]: tool["function"] for tool in tools}
        self.max_steps = max_steps
        self.examples = examples
        names = list(self.tools)
        self.labour = labour or {name: [name] for name in names}
        """For agents of several models: each one's name, and the tools that are its."""
        self.messages: list[dict[str, Any]] = []
        """What was said, in OpenAI form; the agent adds to it."""
        self.steps = 0
        """Actions, those that made no sense with them."""
        self.unreadable = 0
        """Answers that held no action."""
        self.done = False

    @property
    def over(self) -> bool:
        """Whether nothing more is to be done."""
        return self.done or self.steps >= self.max_steps

    async def act(self, action: ToolCall) -> str:
        """Takes a step; returns what is observed. A call that does not fit the tools goes no further."""
        self.steps += 1
        if action.name not in self.tools:
            return f"There is no action {action.name}; the actions are: {', '.join(self.tools)}."
        if problem := self._problem(action):
            return f"{action.name} cannot be done so: {problem}."
        step = await self._environment.step(action)
        self.done = step.done
        return step.observation

    def misunderstood(self) -> None:
        """Counts an answer in which there was no action; it is a step too."""
        self.steps += 1
        self.unreadable += 1

    def _problem(self, action: ToolCall) -> str:
        from xlam_jax.data.codec import to_json  # imports NumPy, which --help should not wait for
        from xlam_jax.data.schemas import compiled

        parameters = compiled(to_json(self.tools[action.name].get("parameters")))
        return next((problem.detail for problem in parameters.check(action.arguments)), "")
