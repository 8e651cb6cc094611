"""Finds text in conversations that spells a mark of the format: a control token, or the tag of a call or of reasoning.

The renderer keeps spelled special tokens as text. Two cases remain. Tags that are not special tokens, such as Qwen's
`<tool_call>`, have the same ids in a text. And a server renders the prompt as text before it tokenizes it, so that a
special token spelled in a request becomes the token. A format cannot prevent either, so runs report such data.
"""

import re
from functools import lru_cache

from xlam_jax.data.codec import CONTROL_TOKENS, Codec
from xlam_jax.data.trajectory import Trajectory, turn_number
from xlam_jax.data.wire import REASONINGS


@lru_cache(maxsize=8)
def mark_pattern(codec: Codec, format: str) -> re.Pattern[str]:
    """Returns a pattern of the marks of a format with a tokenizer: its added tokens, and tags that are plain text."""
    marks = {token.content for token in codec.whole.get_added_tokens_decoder().values()}
    if format in ("xlam", "xlam_v1"):
        marks |= {*CONTROL_TOKENS, *(mark for row in REASONINGS.values() for mark in (row.opening, row.closing))}
    longest_first = sorted(filter(None, marks), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def spelled_mark(trajectory: Trajectory, marks: re.Pattern[str]) -> str | None:
    """Describes the first mark that a text of a conversation spells, None if there is none."""
    if match := marks.search(trajectory.task_instruction):
        return f"{match[0]!r} in the task instruction"
    for index, turn in enumerate(trajectory.conversation):
        if match := marks.search(turn.content) or marks.search(turn.reasoning):
            return f"{match[0]!r} in turn {turn_number(index, turn)}"
    return None
