"""BOLAA (arXiv 2308.05960): a controller chooses for each step one of several labour agents, each with actions of its
own, and tells it what to do; the labour agent acts.

All of them are the same model under different prompts. Who acts sees the task, all that was done, and the controller's
message; nobody sees another's prompt, so each request is one user turn.
"""

import re
from typing import TYPE_CHECKING, Any

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.evaluate.agents import Agent
from xlam_jax.evaluate.agents._actions import described, read, written
from xlam_jax.evaluate.agents._words import MISUNDERSTOOD, STOP, history
from xlam_jax.evaluate.episode import Episode

if TYPE_CHECKING:
    from xlam_jax.evaluate.endpoint import Model

CONTROLLER = "You control a team of agents that solve a task. You choose who acts next, and tell them what to do."
CHOOSE = "Answer with one line and nothing else:\nAgent: name[what the agent is to do]"
LABOUR = "You are the agent {name} of a team that solves a task together. You take one action, and the team goes on."
DO = "Answer with two lines:\nThought: …\nAction: name[argument]"
_CHOICE = re.compile(r"agent[\s*_`]*:[\s*_`]*([\w-]+)[\s*_`]*(?:\[(.*))?", re.IGNORECASE)


class Bolaa(Agent):
    about = "a controller that chooses among agents with actions of their own (arXiv 2308.05960)"

    async def lead(self, model: "Model", episode: Episode) -> None:
        """Acts until the episode is over. Where the controller names nobody, the one whose turn it was acts again."""
        steps: list[tuple[str, ToolCall, str]] = []
        told = ""
        name = next(iter(episode.labour))
        while not episode.over:
            message = ""
            if len(episode.labour) > 1:
                content = await _ask(model, episode, "controller", _controller(episode, steps, told))
                name, message = _chosen(content, episode, name)
            content = await _ask(model, episode, name, _labour(episode, name, message, steps, told))
            action = read(content, {tool: episode.tools[tool] for tool in episode.labour[name]})
            if action is None:
                episode.misunderstood()
                told = MISUNDERSTOOD
            else:
                steps.append(("", action, await episode.act(action)))
                told = ""
        if steps:
            episode.messages.append({"role": "user", "content": f"Observation: {steps[-1][2]}"})


async def _ask(model: "Model", episode: Episode, who: str, prompt: str) -> str:
    message = {"role": "user", "content": prompt}
    answer = await model.chat([message], stop=list(STOP))
    episode.messages += [message, answer.message | {"name": who}]
    if answer.calls and not answer.content:
        return f"Action: {written(answer.calls[0])}"
    return answer.content


def _controller(episode: Episode, steps: list[tuple[str, ToolCall, str]], told: str) -> str:
    agents = "\n".join(f"- {name}: can {', '.join(tools)}" for name, tools in episode.labour.items())
    actions = f"The agents:\n{agents}\n\nTheir actions:\n{described(episode.tools.values())}"
    return _prompt([CONTROLLER, actions, CHOOSE], episode, steps, told)


def _labour(episode: Episode, name: str, message: str, steps: list[tuple[str, ToolCall, str]], told: str) -> str:
    actions = described(episode.tools[tool] for tool in episode.labour[name])
    parts = [LABOUR.format(name=name), f"Your actions:\n{actions}", DO]
    return _prompt(
        parts, episode, steps, "\n".join(filter(None, (told, message and f"The controller says: {message}")))
    )


def _prompt(parts: list[str], episode: Episode, steps: list[tuple[str, ToolCall, str]], told: str) -> str:
    done: list[Any] = [f"Done so far:\n{chr(10).join(history(steps, thoughts=False))}"] if steps else []
    return "\n\n".join([*parts, f"The task:\n\n{episode.task}", *done, *filter(None, [told])])


def _chosen(text: str, episode: Episode, before: str) -> tuple[str, str]:
    """Who is to act, and the message to them."""
    known = {name.lower(): name for name in episode.labour}
    for found in _CHOICE.finditer(text):
        if found[1].lower() in known:
            return known[found[1].lower()], (found[2] or "").rstrip().removesuffix("]").strip()
    return before, text.strip()
