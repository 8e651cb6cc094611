"""Tasks, the environments in which an agent acts, and the state of a running episode."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from xlam_jax.data.trajectory import ToolCall


class Task(NamedTuple):
    """One example of a suite."""

    id: str
    """Unique in the suite and the same in every run, because a rerun uses it to continue."""
    data: Any
    group: str = ""
    """Category or difficulty; scores are also reported per group."""


class Step(NamedTuple):
    """The result of an action."""

    observation: str
    reward: float = 0.0
    done: bool = False


class Environment(Protocol):
    """The environment of one task. Environments share only read-only data.

    An environment with connections also defines `async def aclose(self)`, which is called at the end. When its own
    server fails, it raises `EndpointFault("environment", …)`.
    """

    async def reset(self, task: Task) -> tuple[str, list[dict[str, Any]]]:
        """Returns the first observation (the description of the task), and the tools in OpenAI form."""
        ...

    async def step(self, action: ToolCall) -> Step:
        """Executes an action. The observation describes an invalid action; nothing is raised."""
        ...

    def outcome(self) -> tuple[Mapping[str, float], str, Mapping[str, Any]]:
        """Returns scores, failure and details as in `Outcome`, for all actions since `reset`."""
        ...


class Demonstration(NamedTuple):
    """A solved task, for the prompts of few-shot agents."""

    task: str
    """The first observation."""
    plan: str
    steps: Sequence[tuple[str, ToolCall, str]]
    """Thought, action and observation of each step; the last observation is empty."""


class Episode:
    """A running task: what the agent observes, the steps that it took, and the conversation."""

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
        """For multi-agent systems: labour agent → its tools."""
        self.messages: list[dict[str, Any]] = []
        """The conversation in OpenAI form; the agent appends to it."""
        self.steps = 0
        """Number of actions, including invalid ones."""
        self.unreadable = 0
        """Number of answers without an action."""
        self.done = False

    @property
    def over(self) -> bool:
        """Whether the task is done or its steps are used up."""
        return self.done or self.steps >= self.max_steps

    async def act(self, action: ToolCall) -> str:
        """Takes a step; returns the observation. Calls that do not match the tools do not reach the environment."""
        self.steps += 1
        if action.name not in self.tools:
            return f"There is no action {action.name}; the actions are: {', '.join(self.tools)}."
        if problem := self._problem(action):
            return f"{action.name} cannot be called like this: {problem}."
        step = await self._environment.step(action)
        self.done = step.done
        return step.observation

    def count_unreadable(self) -> None:
        """Counts an answer without an action, which is a step too."""
        self.steps += 1
        self.unreadable += 1

    def _problem(self, action: ToolCall) -> str:
        from xlam_jax.data.codec import to_json  # imports NumPy, and the next one jsonschema: too slow for `--help`
        from xlam_jax.data.schemas import compiled

        parameters = compiled(to_json(self.tools[action.name].get("parameters")))
        return next((problem.detail for problem in parameters.check(action.arguments)), "")
