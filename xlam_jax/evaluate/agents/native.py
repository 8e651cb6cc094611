"""Native tool calling: the tools go with the request, calls come back as calls, several in one turn where the model
makes several, and each result as a tool turn."""

from typing import TYPE_CHECKING

from xlam_jax.evaluate.agents import Agent
from xlam_jax.evaluate.episode import Episode

if TYPE_CHECKING:
    from xlam_jax.evaluate.endpoint import Model

NO_CALL = "You called no tool. Go on by calling one of the tools."


class Native(Agent):
    about = "the server's tool calling: several calls in a turn, results as tool turns"

    async def lead(self, model: "Model", episode: Episode) -> None:
        """Acts until the episode is over. An answer without a call is told so, and is a step."""
        messages = episode.messages
        tools = [{"type": "function", "function": tool} for tool in episode.tools.values()]
        messages.append({"role": "user", "content": episode.task})
        while not episode.over:
            answer = await model.chat(messages, tools)
            messages.append(answer.message)
            if not answer.calls:
                episode.misunderstood()
                messages.append({"role": "user", "content": NO_CALL})
            for call in answer.calls:
                observed = "The task is over." if episode.over else await episode.act(call)
                messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": observed})
