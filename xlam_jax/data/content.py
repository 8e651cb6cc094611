"""The text of a message, and the reasoning in it, from the forms that chat APIs write."""

from collections.abc import Iterator
from typing import Any

from xlam_jax.data.problems import Report, type_name
from xlam_jax.data.row_json import encode
from xlam_jax.data.trajectory import REASONING_KEYS, InvalidTrajectory

_REASONING_MARKS = {"<think>": "</think>", "[THINK]": "[/THINK]"}
"""Opening → closing mark of reasoning at the start of an assistant's text."""
_REASONING_PARTS = ("thinking", "reasoning", "summary_text", "reasoning_text")
"""Types of content parts with reasoning."""


def read_content(role: str, content: object, where: str, repaired: Report) -> tuple[str, list[str]]:
    """Returns the text of a message's content, and the texts of an assistant's parts with reasoning.

    A tool's other values become JSON text. Raises `InvalidTrajectory("bad-content", …)`.
    """
    if isinstance(content, str):
        return content, []
    if content is None:
        repaired("null-content", f"{where} has no content")
        return "", []
    if isinstance(content, list) and content:
        thoughts = [_part(part, *_REASONING_PARTS) if role == "assistant" else None for part in content]
        spoken = [part for part, thought in zip(content, thoughts, strict=True) if thought is None]
        texts = [text for part in spoken if (text := _part(part, "text")) is not None]
        if len(texts) == len(spoken):
            if texts:
                repaired("text-parts", f"{where} has its text in {len(texts)} parts")
            return "\n".join(texts), [thought for thought in thoughts if thought]
    if role != "tool":
        raise InvalidTrajectory("bad-content", f"{where} has content that is {type_name(content)}, not text")
    repaired("structured-content", f"{where} has content that is {type_name(content)}")
    return encode(content), []


def take_reasoning(message: dict[str, Any]) -> Iterator[str]:
    """Removes the texts under the keys of `REASONING_KEYS` from an assistant's message, and yields them.

    Other values of these keys stay.
    """
    for key in REASONING_KEYS:
        value = message.get(key)
        texts = [value] if isinstance(value, str) else _texts(value)
        if texts is not None:
            del message[key]
            yield from filter(None, texts)


def split_reasoning(text: str) -> tuple[str, str] | None:
    """Returns (reasoning, text after it) of a text that begins with `<think>…</think>` or `[THINK]…[/THINK]`.

    Both are without the white space between them and the marks; each may be empty. None for any other text.
    """
    start = text.lstrip()
    for opening, closing in _REASONING_MARKS.items():
        if start.startswith(opening) and closing in start:
            reasoning, _, rest = start.removeprefix(opening).partition(closing)
            return reasoning.strip(), rest.lstrip()
    return None


def is_refusal(content: object) -> bool:
    """Whether all parts of a content are refusals."""
    parts = content if isinstance(content, list) else []
    return bool(parts) and all(isinstance(part, dict) and part.get("type") == "refusal" for part in parts)


def _texts(parts: object) -> list[str] | None:
    """The texts of a list of parts, some of which may be plain texts; None for any other value."""
    if not isinstance(parts, list) or not parts:
        return None
    texts = [part if isinstance(part, str) else _part(part, "text", *_REASONING_PARTS) for part in parts]
    return None if None in texts else [text for text in texts if text is not None]


def _part(part: object, *kinds: str) -> str | None:
    """The text of a content part of these types, None for any other."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in kinds:
        return None
    text = next((part[key] for key in ("text", *REASONING_KEYS, "summary") if part.get(key) is not None), None)
    if isinstance(text, list) and kind != "text":
        text = "\n".join(texts) if (texts := _texts(text)) is not None else None
    return text if isinstance(text, str) else None
