"""The loop of text-based agents, which differ only in their prompts.

The prompt is one user turn. Then answers and observations alternate, so that every chat template accepts them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.evaluate.agents import Agent
from xlam_jax.evaluate.agents._actions import describe_tools, format_action, parse_action
from xlam_jax.evaluate.episode import Demonstration, Episode

if TYPE_CHECKING:
    from xlam_jax.evaluate.endpoint import Answer, Model

STOP = ("\nObservation", "\nobservation:")
"""Stop strings: the environment writes the observations, not the model."""
NO_ACTION = "There is no action in this. End with one line of this form: Action: name[argument]"


class TextAgent(Agent):
    """An agent that is defined by its prompts."""

    role: ClassVar[str] = "You solve a task step by step, by actions. After each action you see what is observed."
    format: ClassVar[str]
    """Instructions for the form of an answer."""
    shows_examples: ClassVar[bool] = True
    thinks: ClassVar[bool] = False
    """Whether its examples contain thoughts."""
    plans: ClassVar[bool] = False
    """Whether it asks for a plan before the first action."""

    async def lead(self, model: "Model", episode: Episode) -> None:
        """Acts until the episode is over."""
        messages = episode.messages
        messages.append({"role": "user", "content": self.prompt(episode)})
        if self.plans:
            messages[-1]["content"] += "\n\nBefore you act, write a short plan: one line that begins with `Plan:`."
            answer = await model.chat(messages, stop=["\nAction", *STOP])
            messages += [answer.message, {"role": "user", "content": self.format}]
        while not episode.over:
            answer = await model.chat(messages, stop=list(STOP))
            messages.append(answer.message)
            messages.append({"role": "user", "content": f"Observation: {await act(answer, episode)}"})

    def prompt(self, episode: Episode) -> str:
        """Returns the first turn: the actions, the form of an answer, examples, and the task."""
        parts = [self.role, f"The actions:\n{describe_tools(episode.tools.values())}"]
        if not self.plans:
            parts.append(self.format)
        if self.shows_examples:
            parts += [f"An example:\n\n{self.example(demonstration)}" for demonstration in episode.examples]
        return "\n\n".join([*parts, f"Your task:\n\n{episode.task}"])

    def example(self, demonstration: Demonstration) -> str:
        """Returns a demonstration in the form that this agent expects."""
        lines = [demonstration.task]
        if self.plans:
            lines.append(f"Plan: {demonstration.plan}")
        return "\n".join([*lines, *history(demonstration.steps, thoughts=self.thinks)])


def history(steps: Sequence[tuple[str, ToolCall, str]], *, thoughts: bool) -> list[str]:
    """Returns the lines of steps: thought, action, observation."""
    lines = []
    for thought, action, observation in steps:
        if thoughts and thought:
            lines.append(f"Thought: {thought}")
        lines.append(f"Action: {format_action(action)}")
        if observation:
            lines.append(f"Observation: {observation}")
    return lines


async def act(answer: "Answer", episode: Episode) -> str:
    """Executes the action of an answer; returns the observation."""
    action = answer.calls[0] if answer.calls else parse_action(answer.content, episode.tools)
    if action is None:
        episode.count_unreadable()
        return NO_ACTION
    return await episode.act(action)
