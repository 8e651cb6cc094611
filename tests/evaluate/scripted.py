"""An endpoint that knows the actions of each task, and answers in the form that the prompt asks for: as calls, as text,
as a plan, or as BOLAA's controller."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fake_server import Handler, Running, call, says, serve

Action = tuple[str, str]
"""A tool, and its one argument."""
ARGUMENT = {
    "search": "query",
    "lookup": "words",
    "finish": "answer",
    "click": "element",
    "hint": "place",
    "answer": "word",
}


def reply_from(actions_of: Callable[[str], Sequence[Action]], labour: Mapping[str, Sequence[str]]) -> Any:
    """Returns a reply for the fake server. `actions_of` returns the actions of the task in a prompt."""

    def reply(handler: Handler, request: dict[str, Any]) -> None:
        messages = request["messages"]
        actions = actions_of(messages[0]["content"])
        text = messages[-1]["content"] or ""
        done = sum(len(message.get("tool_calls") or ()) for message in messages)
        done += sum("\nAction: " in f"\n{message['content']}" for message in messages if message["role"] == "assistant")
        if "Done so far:" in text:  # BOLAA: one turn contains all earlier steps
            done = len(re.findall("^Action: ", text.partition("Done so far:")[2], re.MULTILINE))
        name, argument = actions[min(done, len(actions) - 1)]
        if "tools" in request:
            answer = says(None, [call(name, {ARGUMENT[name]: argument})], "tool_calls")
        elif text.endswith("one line that begins with `Plan:`."):
            answer = says("Plan: first one thing, then the other.")
        elif "Agent: name[" in text:
            whose = next(agent for agent, tools in labour.items() if name in tools)
            answer = says(f"Agent: {whose}[please {name} {argument}]")
        elif "Thought" in text or "Thought" in messages[0]["content"]:
            answer = says(f"Thought: I {name}.\nAction: {name}[{argument}]")
        else:
            answer = says(f"Action: {name}[{argument}]")
        answer(handler, request)

    return reply


@contextmanager
def scripted(actions: Mapping[str, Sequence[Action]], labour: Mapping[str, Sequence[str]] | None) -> Iterator[Running]:
    """Serves a script: text of a task → its actions; the key "" matches all other tasks. `labour`: the suite's."""
    assert labour

    def actions_of(prompt: str) -> Sequence[Action]:
        return actions[max((text for text in actions if text and text in prompt), key=prompt.rindex, default="")]

    with serve(reply_from(actions_of, labour)) as server:
        yield server
