"""The expected tokens, trained tokens and calls of the conformance benchmark, from transformers alone.

Nothing of xlam_jax is used. The prompt of an assistant turn is the template's text of the turns before it with the
generation prompt; the answer is what the template adds when the turn is there, up to and including the end token. Where
the template writes earlier turns differently in a later prompt, a new sequence starts with that prompt.

Two points go beyond the template. Control tokens that are spelled in a message stay text, as a message must not be able
to end its own turn. And results come in the order of their calls, because these templates write no ids.
"""

import copy
import re
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from _conformance_rows import END, START, Row
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
TEMPLATES = ("qwen2_5", "qwen3")
"""Names of the templates in the package trl."""
PAD = "<|endoftext|>"
CONTROL = (START, END, PAD)
_PLAIN = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""Tokens that Qwen's tokenizers have but do not count as special."""
_HIDDEN = 0xE000
"""The first of the private characters that stand for control tokens in messages while a template renders them."""


class Sequence(NamedTuple):
    """Token ids, and whether each is trained."""

    ids: list[int]
    trained: list[bool]


class Expected(NamedTuple):
    """What is right for a row."""

    sequences: list[Sequence]
    answers: list[str]
    """The text of each trained turn, without its end token."""
    turns: list[dict[str, Any]]
    """The messages of the trained turns."""


def save_tokenizer(template: str, folder: Path) -> Any:
    """Writes the quickstart's tokenizer with a template and its control tokens into a folder; returns it."""
    from tokenizers import AddedToken

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/quickstart/tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL)})
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _PLAIN])
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token = END, PAD, None
    tokenizer.chat_template = (files("trl") / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def expect(row: Row, tokenizer: Any) -> Expected:
    """Returns what is right for a row."""
    messages = _results_in_order(writable(row, tokenizer.chat_template).messages)
    answering = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    trained = answering[-1:] if row.last_turn_only else answering
    sequences: list[Sequence] = []
    answers: list[str] = []
    text, spans = "", list[tuple[int, int]]()
    for turn in trained:
        prompt = _text(tokenizer, messages[:turn], row.tools, prompt=True)
        longer = _text(tokenizer, messages[: turn + 1], row.tools)
        if not longer.startswith(prompt):
            raise ValueError(f"{row.name}: the text of turn {turn} does not begin with its prompt")
        end = longer.rindex(END) + len(END)
        if spans and not longer.startswith(text[: spans[-1][1]]):
            sequences.append(_encode(tokenizer, text, spans))
            spans = []
        text = longer
        spans.append((len(prompt), end))
        answers.append(_shown(longer[len(prompt) : end - len(END)]))
    sequences.append(_encode(tokenizer, text, spans))
    return Expected(sequences, answers, [messages[turn] for turn in trained])


def writable(row: Row, template: str) -> Row:
    """Returns the row without the reasoning of its turns if the template has no place for reasoning."""
    if "reasoning_content" in template:
        return row
    keys = [{key: value for key, value in turn.items() if key != "reasoning_content"} for turn in row.messages]
    return row._replace(messages=keys)


def _results_in_order(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages with the results after a turn in the order of its calls."""
    ordered: list[dict[str, Any]] = []
    places: dict[str, int] = {}
    for message in messages:
        if message["role"] != "tool":
            places = {call["id"]: place for place, call in enumerate(message.get("tool_calls", []))}
        ordered.append(message)
        at = len(ordered) - 1
        while at and message["role"] == ordered[at - 1]["role"] == "tool":
            if places[ordered[at - 1]["tool_call_id"]] < places[message["tool_call_id"]]:
                break
            ordered[at - 1 : at + 1] = [ordered[at], ordered[at - 1]]
            at -= 1
    return ordered


def _text(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]], prompt: bool = False) -> str:
    """Renders messages, in which private characters stand for spelled control tokens."""
    hidden = copy.deepcopy(messages)
    for message in hidden:
        for key in ("content", "reasoning_content"):
            if message.get(key):
                message[key] = _hide(message[key])
    text = tokenizer.apply_chat_template(hidden, tools=tools or None, tokenize=False, add_generation_prompt=prompt)
    if hidden == messages:
        whole = tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=True, return_dict=False, add_generation_prompt=prompt
        )
        if whole != _encode(tokenizer, text, []).ids:
            raise ValueError(f"tokens in pieces are not those of apply_chat_template: {text!r}")
    return text


def _hide(text: str) -> str:
    for number, token in enumerate(CONTROL):
        text = text.replace(token, chr(_HIDDEN + number))
    return text


def _shown(text: str) -> str:
    for number, token in enumerate(CONTROL):
        text = text.replace(chr(_HIDDEN + number), token)
    return text


def _encode(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> Sequence:
    """Encodes a text between its control tokens; a token is trained if it starts in one of the spans."""
    ids: list[int] = []
    trained: list[bool] = []
    position = 0

    def add(piece_ids: list[int], starts: list[int]) -> None:
        ids.extend(piece_ids)
        trained.extend(any(start <= position + at < end for start, end in spans) for at in starts)

    for piece in re.split(f"({'|'.join(map(re.escape, CONTROL))})", text):
        if piece in CONTROL:
            add([tokenizer.convert_tokens_to_ids(piece)], [0])
        elif piece:
            encoding = tokenizer(
                _shown(piece), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
            # spelled control tokens are longer than the characters that stand for them; no trained piece has one
            add(encoding["input_ids"], [min(start, len(piece) - 1) for start, _ in encoding["offset_mapping"]])
        position += len(piece)
    return Sequence(ids, trained)
