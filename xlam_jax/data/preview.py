"""What training sees: the tokens of its packed rows in order, those with loss marked by the kind of their span."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from html import escape
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from xlam_jax import config as configs
from xlam_jax.data import corpus, examples, html, pipeline
from xlam_jax.data.pair import Pair
from xlam_jax.data.render import KINDS
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BACKGROUNDS = {
    "thought": 222,
    "tool_call": 153,
    "arguments": 117,
    "answer": 157,
    "eos": 218,
    "loss": 229,
}
"""xterm's colours of the kinds; "loss" where the kind is not known."""
NAMES = {"eos": "end"}
"""What a kind is called where people read it."""
STYLE = """
.t { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.t b { font-weight: normal; border: 1px solid #bbb; border-radius: 3px; }
.t span:hover, .t b:hover { outline: 1px solid #000; }
.turn { color: #666; font-size: 12px; margin-top: .5rem; }
.part { border-left: 3px solid #ddd; padding-left: .8rem; margin: 1rem 0; }
""" + "".join(f".{kind} {{ background: {color}55; }}\n" for kind, color in html.KIND_COLORS.items() if kind != "prompt")


class Token(NamedTuple):
    """A token as it is shown. `position` counts from its trajectory's start; the last one is only predicted."""

    text: str
    special: bool
    id: int
    position: int
    weight: float
    kind: str
    turn: int


class Segment(NamedTuple):
    """One trajectory, or a part of one, or a side of a pair, in a packed row: n places, n+1 tokens. `at` is its first
    place."""

    source: str
    id: str
    at: int
    places: int
    roles: tuple[str, ...]
    tokens: list[Token]

    @property
    def trained(self) -> int:
        """Tokens that carry loss."""
        return sum(token.weight > 0 for token in self.tokens)


class Row(NamedTuple):
    """A packed row; `hidden` counts the trajectories of other sources that are not shown."""

    number: int
    length: int
    padding: int
    hidden: int
    segments: list[Segment]


def rows(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    count: int,
    source: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[Row]:
    """Yields the first `count` packed rows of a run, of those that hold trajectories of `source` where it is given.

    Raises `UserError` as training does, and for a source that the config does not have.
    """
    resolved = configs.load(config, list(overrides)).config
    data = resolved.data
    names = [one.name for one in data.sources]
    if source is not None and source not in names:
        raise UserError(f"--source {source}: the config has {', '.join(names)}{nearest(source, names)}")
    tokenizer = load_tokenizer(data.tokenizer)
    loaded = corpus.load(data, tokenizer, progress, annotate=True)
    packed = pipeline.packed_rows(
        loaded, data, batch_size=resolved.train.batch_size, seed=resolved.seed, tokenizer=tokenizer
    )
    text = texts(tokenizer)
    shown = (_row(number, row, loaded, text, source) for number, row in enumerate(packed, start=1))
    yield from islice((row for row in shown if row.segments), count)


def _row(
    number: int,
    packed: dict[str, np.ndarray],
    loaded: Sequence[examples.Loaded],
    text: Callable[[int], tuple[str, bool]],
    only: str | None,
) -> Row:
    owners = packed["tokens_segment_ids"]
    segments, hidden = [], 0
    for owner, (at_source, at_row) in enumerate(pipeline.origins(packed), start=1):
        source = loaded[at_source]
        if only is not None and source.source.name != only:
            hidden += 1
            continue
        whole = (source.trajectories or [])[at_row]
        sides = (
            ((whole.chosen, ", chosen"), (whole.rejected, ", rejected")) if isinstance(whole, Pair) else ((whole, ""),)
        )
        for which, (trajectory, side) in enumerate(sides, start=1):
            places = np.flatnonzero((owners == owner) & (packed.get("sides", which) == which))
            column = {key: packed[key][places] for key in ("tokens", "labels", "weights", "kinds", "turns")}
            tokens = [_token(text, int(column["tokens"][0]), 0, 0.0, "prompt", -1)]
            for at, token in enumerate(column["labels"].tolist()):
                weight, kind, turn = (column[key][at] for key in ("weights", "kinds", "turns"))
                tokens.append(_token(text, token, at + 1, float(weight), KINDS[kind], int(turn)))
            roles = tuple(message.role for message in trajectory.conversation)
            name = whole.id + side
            segments.append(Segment(source.source.name, name, int(places[0]), len(places), roles, tokens))
    return Row(number, len(owners), int((owners == 0).sum()), hidden, segments)


def _token(
    text: Callable[[int], tuple[str, bool]], token: int, position: int, weight: float, kind: str, turn: int
) -> Token:
    return Token(*text(token), token, position, weight, kind, turn)


def texts(tokenizer: "PreTrainedTokenizerFast") -> Callable[[int], tuple[str, bool]]:
    """Returns what gives a token's exact text, and whether it is a special token.

    A byte that is only part of a character is written ⟨f0⟩.
    """
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    by_bytes = "ByteLevel" in repr(backend.decoder)
    bytes_of = _byte_alphabet()

    @cache
    def text(token: int) -> tuple[str, bool]:
        if token in added:
            return added[token].content, added[token].special
        piece = backend.id_to_token(token)
        if piece is None:
            return f"⟨no token {token}⟩", True
        if by_bytes and all(char in bytes_of for char in piece):
            return _decoded(bytes(bytes_of[char] for char in piece)), False
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return _decoded(bytes([int(piece[3:5], 16)])), False
        return piece.replace("▁", " "), False

    return text


def _decoded(raw: bytes) -> str:
    """UTF-8 as text, incomplete characters byte by byte."""
    return "".join(
        f"⟨{ord(char) - 0xDC00:02x}⟩" if 0xDC80 <= ord(char) <= 0xDCFF else char
        for char in raw.decode("utf-8", "surrogateescape")
    )


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes (Radford et al., 2019): printable ones as they are."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


def _visible(text: str) -> str:
    """The text with what can't be seen made visible, and a line end where it has one."""
    return "".join(
        {"\n": "⏎\n", "\t": "⇥"}.get(char) or (char if char.isprintable() else char.encode("unicode_escape").decode())
        for char in text
    )


def _header(row: Row) -> str:
    trained = sum(segment.trained for segment in row.segments)
    hidden = f" (and {row.hidden} of other sources, not shown)" if row.hidden else ""
    return (
        f"row {row.number}: {len(row.segments)} sequences with {trained} tokens that carry loss{hidden}; "
        f"{row.padding} of {row.length} places are padding"
    )


def _title(segment: Segment) -> str:
    return (
        f"{segment.source}: {segment.id} (places {segment.at} to {segment.at + segment.places - 1}, "
        f"{segment.trained} tokens carry loss)"
    )


def _turns(segment: Segment) -> Iterator[tuple[str, list[Token]]]:
    """The segment's tokens by turn, with each turn's name."""
    for turn, tokens in groupby(segment.tokens, key=lambda token: token.turn):
        role = segment.roles[turn] if 0 <= turn < len(segment.roles) else ""
        yield (f"turn {turn} {role}".rstrip() if turn >= 0 else "before the first turn"), list(tokens)


def _spans(tokens: Iterable[Token]) -> Iterator[tuple[str, float, list[Token]]]:
    """Tokens by kind and weight; the kind is empty where there is no loss."""
    for (kind, weight), span in groupby(
        tokens, key=lambda token: (token.kind if token.weight > 0 else "", token.weight)
    ):
        yield kind, weight, list(span)


def _weighted(kind: str, weight: float) -> str:
    return NAMES.get(kind, kind) + (f" ×{weight:g}" if weight != 1 else "")


def terminal(shown: Iterable[Row], color: bool) -> Iterator[str]:
    """Yields the rows as text: spans that carry loss are coloured, or stand in «kind| … »; special tokens in ⟦ ⟧."""
    kinds = [kind for kind in KINDS if kind != "prompt"]
    legend = " ".join(_marked(kind, 1.0, NAMES.get(kind, kind), color) for kind in kinds)
    yield f"carry loss: {legend if color else '«kind| … »'}; special tokens: ⟦ ⟧"
    for row in shown:
        yield f"\n{_bold(_header(row), color)}"
        for segment in row.segments:
            yield f"\n{_bold(_title(segment), color)}"
            for name, tokens in _turns(segment):
                text = "".join(
                    _marked(kind, weight, "".join(map(_shown, span)), color) for kind, weight, span in _spans(tokens)
                )
                yield f"  {name}\n{text}"


def _shown(token: Token) -> str:
    return f"⟦{token.text}⟧" if token.special else _visible(token.text)


def _bold(text: str, color: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if color else text


def _marked(kind: str, weight: float, text: str, color: bool) -> str:
    if not kind:
        return text
    if not color:
        return f"«{_weighted(kind, weight)}| {text}»"
    paint = f"\x1b[30;48;5;{BACKGROUNDS[kind]}m"
    painted = paint + text.replace("\n", f"\x1b[0m\n{paint}") + "\x1b[0m"  # no terminal paints the rest of a line then
    return painted + (f"\x1b[2m×{weight:g}\x1b[0m" if weight != 1 else "")


def write_page(shown: Iterable[Row], path: Path) -> None:
    """Writes the rows as one page; a token tells its id, position and weight when pointed at."""
    html.write(path, html.page("What training sees", _page(shown), STYLE))


def _page(shown: Iterable[Row]) -> Iterator[str]:
    kinds = " ".join(f'<span class="{kind}">{NAMES.get(kind, kind)}</span>' for kind in KINDS if kind != "prompt")
    yield f'<p class="t">Carry loss: {kinds}. Framed: special tokens. Point at a token for its id.</p>\n'
    for row in shown:
        yield f"<h2>{escape(_header(row))}</h2>\n"
        for segment in row.segments:
            yield f'<div class="part"><strong>{escape(_title(segment))}</strong>\n'
            for name, tokens in _turns(segment):
                text = "".join(_html(token) for token in tokens)
                yield f'<div class="turn">{escape(name)}</div><div class="t">{text}</div>\n'
            yield "</div>\n"


def _html(token: Token) -> str:
    tag = "b" if token.special else "span"
    kind = token.kind if token.weight > 0 else ""
    told = f"id {token.id}, position {token.position}, weight {token.weight:g}"
    if kind:
        told += f", {NAMES.get(kind, kind)}"
    style = f' style="opacity: {0.4 + 0.6 * min(1.0, token.weight):.2g}"' if kind and token.weight < 1 else ""
    mark = f' class="{kind}"' if kind else ""
    text = token.text if token.special else _visible(token.text)
    return f'<{tag}{mark}{style} title="{told}">{escape(text)}</{tag}>'
