"""Tokenizes rendered conversations: only marked pieces become control tokens; content that spells one stays text."""

import copy
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from xlam_jax.data.wire import REASONINGS, TOOL_CALLS
from xlam_jax.enums import SpanKind as Kind
from xlam_jax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

CONTROL_TOKENS = (
    "[INST]",
    "[/INST]",
    TOOL_CALLS,
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
"""Mistral's control tokens, since its v2 tokenizer."""
THINK_TOKENS = (REASONINGS["mistral"].opening, REASONINGS["mistral"].closing)
"""Mistral's control tokens around reasoning, in the tokenizers of its reasoning models."""


class Segment(NamedTuple):
    """A piece of a rendered conversation: plain text or one control token, and the turn that it belongs to."""

    text: str
    kind: Kind
    turn: int
    control: bool = False


class Codec:
    """Encodes segments with one tokenizer. Has its own copies of the backend, so threads may share the tokenizer.

    Raises `UserError` for a tokenizer without an end-of-sequence token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        if not tokenizer.eos_token:
            raise UserError(f"tokenizer '{tokenizer.name_or_path}' has no end-of-sequence token; set its eos_token")
        self.bos: str = str(tokenizer.bos_token or "")
        self.eos: str = str(tokenizer.eos_token)
        self.whole: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self.whole.no_padding()
        self.whole.no_truncation()
        added = self.whole.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self.special_ids = np.array(sorted(self.special.values()), dtype=np.int32)
        self.control_tokens = all(token in self.special for token in CONTROL_TOKENS)
        self.tool_calls_token = TOOL_CALLS in self.special
        self.think_tokens = all(token in self.special for token in THINK_TOKENS)

    @cached_property
    def plain(self) -> "Tokenizer":
        """A tokenizer that encodes the spellings of control tokens as plain text."""
        tokenizer = copy.deepcopy(self.whole)
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def starts_runs_alike(self) -> bool:
        """Whether text after a control token is encoded like text at the start."""
        after = self.whole.encode(self.eos + "a b", add_special_tokens=False).ids[1:]
        return after == self.plain.encode("a b", add_special_tokens=False).ids

    @cached_property
    def longest(self) -> int:
        """Maximum number of characters of a token."""
        return max(map(len, self.whole.get_vocab(with_added_tokens=True)))

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches a control token, the longest one first; it is the pattern's only group."""
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def encode(self, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids, int32 [N], and the index of the character at which each token starts, int64 [N]."""
        encoding = self.whole.encode("".join([segment.text for segment in segments]), add_special_tokens=False)
        ids, starts = np.array(encoding.ids, dtype=np.int32), _starts(encoding.offsets)
        position, expected = 0, []
        for segment in segments:
            if segment.control:
                expected.append((self.special.get(segment.text, -1), position))
            position += len(segment.text)
        special = np.isin(ids, self.special_ids)
        if list(zip(ids[special].tolist(), starts[special].tolist(), strict=True)) == expected:
            return ids, starts
        return self._encode_runs(segments)

    def too_long(self, segments: Sequence[Segment], limit: int) -> bool:
        """Whether the text certainly has more than `limit` tokens, by its length alone: cheap, unlike counting them."""
        size = sum(len(segment.text) for segment in segments)
        return size > 4 * limit and size > self.longest * limit

    def _encode_runs(self, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes each run of text between control tokens separately, for content that spells out control tokens."""
        ids: list[int] = []
        starts: list[int] = []
        position, run = 0, ""
        for segment in (*segments, None):
            if segment is not None and not segment.control:
                run += segment.text
                continue
            if run:
                run_ids, run_starts = self._encode_run(run, at_start=position == 0)
                ids += run_ids
                starts += [position + start for start in run_starts]
                position, run = position + len(run), ""
            if segment is not None:
                ids.append(self.special[segment.text])
                starts.append(position)
                position += len(segment.text)
        return np.array(ids, dtype=np.int32), np.array(starts, dtype=np.int64)

    def _encode_run(self, run: str, at_start: bool) -> tuple[list[int], list[int]]:
        if not at_start and not self.starts_runs_alike:
            for anchor in "\n.a":  # receives the prefix of the text's start; must not merge with the run
                encoding = self.plain.encode(anchor + run, add_special_tokens=False)
                starts = _starts(encoding.offsets).tolist()
                if 1 in starts:
                    cut = starts.index(1)
                    return encoding.ids[cut:], [start - 1 for start in starts[cut:]]
        encoding = self.plain.encode(run, add_special_tokens=False)
        return encoding.ids, _starts(encoding.offsets).tolist()


_encoder = json.JSONEncoder(ensure_ascii=False)


def to_json(value: object) -> str:
    """Returns JSON in one line, with the keys in their order and without escapes of non-ASCII letters.

    This is what transformers' `tojson` writes.
    """
    return _encoder.encode(value)


def _starts(offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.array([start for start, _ in offsets], dtype=np.int64)
