"""Native tool calling: requests contain the tools, answers contain calls (one or more per turn), and results are tool
turns."""

from typing import TYPE_CHECKING

from xlam_jax.evaluate.agents import Agent
from xlam_jax.evaluate.episode import Episode

if TYPE_CHECKING:
    from xlam_jax.evaluate.endpoint import Model

NO_CALL = "You called no tool. Continue by calling one of the tools."


class Native(Agent):
    about = "the server's tool calling: several calls in a turn, results as tool turns"

    async def lead(self, model: "Model", episode: Episode) -> None:
        """Acts until the episode is over. An answer without a call counts as a step, and the model is reminded."""
        messages = episode.messages
        tools = [{"type": "function", "function": tool} for tool in episode.tools.values()]
        messages.append({"role": "user", "content": episode.task})
        while not episode.over:
            answer = await model.chat(messages, tools)
            messages.append(answer.message)
            if not answer.calls:
                episode.count_unreadable()
                messages.append({"role": "user", "content": NO_CALL})
            for call in answer.calls:
                observation = "The task is over." if episode.over else await episode.act(call)
                messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": observation})
