"""The loop of agents that speak in words; what differs between them is their prompts.

The prompt is one user turn; then the model's turns and what is observed alternate, as every chat template allows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.evaluate.agents import Agent
from xlam_jax.evaluate.agents._actions import described, read, written
from xlam_jax.evaluate.episode import Demonstration, Episode

if TYPE_CHECKING:
    from xlam_jax.evaluate.endpoint import Answer, Model

STOP = ("\nObservation", "\nobservation:")
"""Where an answer ends: what is observed is the environment's to say."""
MISUNDERSTOOD = "There is no action in this. End with one line of this form: Action: name[argument]"


class WordsAgent(Agent):
    """An agent made of prompts."""

    role: ClassVar[str] = "You solve a task step by step, by actions. After each action you are told what is observed."
    format: ClassVar[str]
    """How to answer, in words."""
    shows_examples: ClassVar[bool] = True
    thinks: ClassVar[bool] = False
    """Its examples hold thoughts."""
    plans: ClassVar[bool] = False
    """Asks for a plan before the first action."""

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
        """The first turn: what can be done, how it is said, examples, and the task."""
        parts = [self.role, f"The actions:\n{described(episode.tools.values())}"]
        if not self.plans:
            parts.append(self.format)
        if self.shows_examples:
            parts += [f"An example:\n\n{self.example(one)}" for one in episode.examples]
        return "\n\n".join([*parts, f"Your task:\n\n{episode.task}"])

    def example(self, one: Demonstration) -> str:
        """A demonstration as this agent would do it."""
        lines = [one.task]
        if self.plans:
            lines.append(f"Plan: {one.plan}")
        return "\n".join([*lines, *history(one.steps, thoughts=self.thinks)])


def history(steps: Sequence[tuple[str, ToolCall, str]], *, thoughts: bool) -> list[str]:
    """Steps as lines: thought, action, observation."""
    lines = []
    for thought, action, observation in steps:
        if thoughts and thought:
            lines.append(f"Thought: {thought}")
        lines.append(f"Action: {written(action)}")
        if observation:
            lines.append(f"Observation: {observation}")
    return lines


async def act(answer: "Answer", episode: Episode) -> str:
    """Does what an answer says; returns what is observed."""
    action = answer.calls[0] if answer.calls else read(answer.content, episode.tools)
    if action is None:
        episode.misunderstood()
        return MISUNDERSTOOD
    return await episode.act(action)
