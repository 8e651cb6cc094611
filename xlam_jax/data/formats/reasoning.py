"""Finds where a chat template reads the reasoning of a turn, and the mark that it writes after it."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from xlam_jax.data.formats import not_representable

KEY = "reasoning_content"
"""Key of an assistant message with its reasoning, in the form of `xlam_jax.data.trajectory.to_messages`."""
_KEYS = (KEY, "reasoning", "thinking", "parts", "text")
"""Where templates read reasoning: under a key of the message, in a part of the content (as Mistral's templates), or in
its text, which begins with `<think>…</think>`."""
_MARK = re.compile(r"\s*(?:<[^<>\s]{1,60}>|\[[^][\s]{1,60}\])\s*")
_REASONING, _CONTENT = "Reasoning0", "Content0"


class Spelling(NamedTuple):
    """How a template reads and writes reasoning."""

    key: str
    """One of `_KEYS`."""
    closing: str
    """The mark after the reasoning, with the white space around it."""

    def spell(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns a message with its reasoning where the template reads it."""
        if KEY not in message or self.key == KEY:
            return message
        rest = {key: value for key, value in message.items() if key != KEY}
        if self.key == "text":
            return rest | {"content": f"<think>\n{message[KEY]}\n</think>\n\n{rest['content']}"}
        if self.key == "parts":
            text = [{"type": "text", "text": rest["content"]}] if rest["content"] else []
            return rest | {"content": [{"type": "thinking", "thinking": message[KEY], "closed": True}, *text]}
        return rest | {self.key: message[KEY]}

    def end(self, text: str, reasoning: str, start: int, stop: int) -> int:
        """Returns where a turn's reasoning with its closing mark ends in `text[start:stop]`; -1 if it is not there."""
        at = text.find(reasoning, start, stop)
        while at >= 0:
            for closing in (self.closing, self.closing.rstrip()):  # calls may follow in another line than content
                end = at + len(reasoning) + len(closing)
                if text.startswith(closing, at + len(reasoning), stop):
                    return end
            at = text.find(reasoning, at + 1, stop)
        return -1

    def check(self, reasoning: str, where: str, hint: str) -> None:
        """Raises `InvalidTrajectory` if the reasoning contains its closing mark: a parser would end it there."""
        mark = self.closing.strip()
        if mark and mark in reasoning:
            raise not_representable(f"the reasoning of {where} contains {mark}, which ends reasoning; {hint}")


def find_spelling(render: Callable[[list[dict[str, Any]]], str]) -> Spelling | None:
    """Returns how a template spells reasoning, None if it never writes it.

    A template that writes all text of the content unchanged has no reasoning; one that strips `<think>…</think>` from
    earlier turns does. `render` returns the text of messages, or "" where the template refuses them.
    """
    user = {"role": "user", "content": "a"}
    for key in _KEYS:
        message = Spelling(key, "").spell({"role": "assistant", "content": _CONTENT, KEY: _REASONING})
        before, reasoning, after = render([user, message]).partition(_REASONING)
        between, content, _ = after.partition(_CONTENT)
        if not reasoning or not content or "'thinking'" in before:  # the last: it writes the list of parts as text
            continue
        if key == "text" and _REASONING in render([user, message, user]):
            continue
        mark = _MARK.match(between)
        return Spelling(key, mark[0] if mark else between)
    return None
