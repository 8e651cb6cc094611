"""BOLAA (arXiv 2308.05960): for each step a controller chooses one of several labour agents, which have separate
actions, and sends it a message; the labour agent acts.

All of them are the same model with different prompts. A labour agent sees the task, all earlier steps, and the
controller's message. Agents do not see each other's prompts, so each request is one user turn.
"""

import re
from typing import TYPE_CHECKING, Any

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.evaluate.agents import Agent
from xlam_jax.evaluate.agents._actions import describe_tools, format_action, parse_action
from xlam_jax.evaluate.agents._text import NO_ACTION, STOP, history
from xlam_jax.evaluate.episode import Episode

if TYPE_CHECKING:
    from xlam_jax.evaluate.endpoint import Model

CONTROLLER = "You control a team of agents that solve a task. You choose who acts next, and instruct them."
CHOOSE = "Answer with one line and nothing else:\nAgent: name[what the agent is to do]"
LABOUR = "You are the agent {name} of a team that solves a task together. You take one action, and the team continues."
DO = "Answer with two lines:\nThought: …\nAction: name[argument]"
_CHOICE = re.compile(r"agent[\s*_`]*:[\s*_`]*([\w-]+)[\s*_`]*(?:\[(.*))?", re.IGNORECASE)


class Bolaa(Agent):
    about = "a controller that chooses among agents with separate actions (arXiv 2308.05960)"

    async def lead(self, model: "Model", episode: Episode) -> None:
        """Acts until the episode is over. If the controller names no agent, the previous one acts again."""
        steps: list[tuple[str, ToolCall, str]] = []
        note = ""
        name = next(iter(episode.labour))
        while not episode.over:
            message = ""
            if len(episode.labour) > 1:
                content = await _ask(model, episode, "controller", _controller(episode, steps, note))
                name, message = _parse_choice(content, episode, name)
            content = await _ask(model, episode, name, _labour(episode, name, message, steps, note))
            action = parse_action(content, {tool: episode.tools[tool] for tool in episode.labour[name]})
            if action is None:
                episode.count_unreadable()
                note = NO_ACTION
            else:
                steps.append(("", action, await episode.act(action)))
                note = ""
        if steps:
            episode.messages.append({"role": "user", "content": f"Observation: {steps[-1][2]}"})


async def _ask(model: "Model", episode: Episode, name: str, prompt: str) -> str:
    message = {"role": "user", "content": prompt}
    answer = await model.chat([message], stop=list(STOP))
    episode.messages += [message, answer.message | {"name": name}]
    if answer.calls and not answer.content:
        return f"Action: {format_action(answer.calls[0])}"
    return answer.content


def _controller(episode: Episode, steps: list[tuple[str, ToolCall, str]], note: str) -> str:
    agents = "\n".join(f"- {name}: can {', '.join(tools)}" for name, tools in episode.labour.items())
    actions = f"The agents:\n{agents}\n\nTheir actions:\n{describe_tools(episode.tools.values())}"
    return _prompt([CONTROLLER, actions, CHOOSE], episode, steps, note)


def _labour(episode: Episode, name: str, message: str, steps: list[tuple[str, ToolCall, str]], note: str) -> str:
    actions = describe_tools(episode.tools[tool] for tool in episode.labour[name])
    parts = [LABOUR.format(name=name), f"Your actions:\n{actions}", DO]
    return _prompt(
        parts, episode, steps, "\n".join(filter(None, (note, message and f"The controller says: {message}")))
    )


def _prompt(parts: list[str], episode: Episode, steps: list[tuple[str, ToolCall, str]], note: str) -> str:
    steps_so_far: list[Any] = [f"Done so far:\n{chr(10).join(history(steps, thoughts=False))}"] if steps else []
    return "\n\n".join([*parts, f"The task:\n\n{episode.task}", *steps_so_far, *filter(None, [note])])


def _parse_choice(text: str, episode: Episode, previous: str) -> tuple[str, str]:
    """Returns the name of the chosen agent, and the message to it."""
    names = {name.lower(): name for name in episode.labour}
    for match in _CHOICE.finditer(text):
        if match[1].lower() in names:
            return names[match[1].lower()], (match[2] or "").rstrip().removesuffix("]").strip()
    return previous, text.strip()
