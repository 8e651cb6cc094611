"""Shows what training sees: the tokens of packed rows in order, trained ones marked by the kind of their span."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from xlam_jax import config as configs
from xlam_jax.data import corpus, examples, pipeline
from xlam_jax.data.kind_styles import COLORS, TERMINAL_COLORS, label
from xlam_jax.data.pair import Pair
from xlam_jax.data.tokenizer import open_tokenizer
from xlam_jax.enums import SPAN_KINDS
from xlam_jax.errors import UserError, nearest
from xlam_jax.pages import document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Token(NamedTuple):
    """A token of a trajectory. The first is only an input, the last only a label."""

    text: str
    special: bool
    id: int
    position: int
    """Counted from the start of the trajectory."""
    weight: float
    """Of its loss; 0 if it is not trained."""
    kind: str
    turn: int


class Segment(NamedTuple):
    """A trajectory, a part of one, or one side of a pair in a packed row: n places and n+1 tokens.

    `at` is the index of its first place.
    """

    source: str
    id: str
    at: int
    places: int
    roles: tuple[str, ...]
    tokens: list[Token]

    @property
    def trained(self) -> int:
        """Number of trained tokens."""
        return sum(token.weight > 0 for token in self.tokens)


class Row(NamedTuple):
    """A packed row. `hidden` is the number of trajectories of other sources, which are not shown."""

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
    """Yields the first `count` packed rows of a run; with `source`, the first that contain trajectories of it.

    Raises `UserError` as training does, and if the config has no such source.
    """
    resolved = configs.load(config, list(overrides)).config
    data = resolved.data
    names = [entry.name for entry in data.sources]
    if source is not None and source not in names:
        raise UserError(f"--source {source}: the config has {', '.join(names)}{nearest(source, names)}")
    tokenizer = open_tokenizer(data)
    loaded = corpus.load(data, tokenizer, progress, annotate=True)
    packed = pipeline.packed_rows(
        loaded, data, batch_size=resolved.train.batch_size, seed=resolved.seed, tokenizer=tokenizer
    )
    text = texts(tokenizer)
    every = (_row(number, row, loaded, text, source) for number, row in enumerate(packed, start=1))
    yield from islice((row for row in every if row.segments), count)


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
                tokens.append(_token(text, token, at + 1, float(weight), SPAN_KINDS[kind], int(turn)))
            roles = tuple(message.role for message in trajectory.conversation)
            name = whole.id + side
            segments.append(Segment(source.source.name, name, int(places[0]), len(places), roles, tokens))
    return Row(number, len(owners), int((owners == 0).sum()), hidden, segments)


def _token(
    text: Callable[[int], tuple[str, bool]], token: int, position: int, weight: float, kind: str, turn: int
) -> Token:
    return Token(*text(token), token, position, weight, kind, turn)


def texts(tokenizer: "PreTrainedTokenizerFast") -> Callable[[int], tuple[str, bool]]:
    """Returns a function from a token id to its exact text and whether it is a special token.

    A byte that is only part of a character is written as ⟨f0⟩.
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
    """Decodes UTF-8, incomplete characters byte by byte."""
    return "".join(
        f"⟨{ord(char) - 0xDC00:02x}⟩" if 0xDC80 <= ord(char) <= 0xDCFF else char
        for char in raw.decode("utf-8", "surrogateescape")
    )


def _byte_alphabet() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary stands for (Radford et al., 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


@lru_cache(maxsize=1 << 16)  # most tokens occur many times
def _visible(text: str) -> str:
    """Returns the text with invisible characters made visible; line ends stay line ends, too."""
    return "".join(
        {"\n": "⏎\n", "\t": "⇥"}.get(char) or (char if char.isprintable() else char.encode("unicode_escape").decode())
        for char in text
    )


def _header(row: Row) -> str:
    trained = sum(segment.trained for segment in row.segments)
    hidden = f" (and {row.hidden} of other sources, not shown)" if row.hidden else ""
    return (
        f"row {row.number}: {len(row.segments)} sequences with {trained} trained tokens{hidden}; "
        f"{row.padding} of {row.length} places are padding"
    )


def _title(segment: Segment) -> str:
    return (
        f"{segment.source}: {segment.id} (places {segment.at} to {segment.at + segment.places - 1}, "
        f"{segment.trained} trained tokens)"
    )


def _turns(segment: Segment) -> Iterator[tuple[str, list[Token]]]:
    """Yields each turn's name and tokens."""
    for turn, tokens in groupby(segment.tokens, key=lambda token: token.turn):
        role = segment.roles[turn] if 0 <= turn < len(segment.roles) else ""
        yield (f"turn {turn} {role}".rstrip() if turn >= 0 else "before the first turn"), list(tokens)


def _spans(tokens: Iterable[Token]) -> Iterator[tuple[str, float, list[Token]]]:
    """Groups tokens by kind and weight; the kind is empty for tokens that are not trained."""
    for (kind, weight), span in groupby(
        tokens, key=lambda token: (token.kind if token.weight > 0 else "", token.weight)
    ):
        yield kind, weight, list(span)


def _weighted(kind: str, weight: float) -> str:
    return label(kind) + (f" ×{weight:g}" if weight != 1 else "")


def terminal(rows: Iterable[Row], color: bool) -> Iterator[str]:
    """Yields the rows as text: trained spans in color or as «kind| … », special tokens in ⟦ ⟧."""
    kinds = [kind for kind in SPAN_KINDS if kind != "prompt"]
    legend = " ".join(_marked(kind, 1.0, label(kind), color) for kind in kinds)
    yield f"trained: {legend if color else '«kind| … »'}; special tokens: ⟦ ⟧"
    for row in rows:
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
    paint = f"\x1b[30;48;5;{TERMINAL_COLORS[kind]}m"
    painted = (
        paint + text.replace("\n", f"\x1b[0m\n{paint}") + "\x1b[0m"
    )  # else some terminals paint the rest of a line
    return painted + (f"\x1b[2m×{weight:g}\x1b[0m" if weight != 1 else "")


def write_page(rows: Iterable[Row], path: Path) -> None:
    """Writes the rows as one page; pointing at a token shows its id, position and weight."""
    document.write(
        path,
        "preview.html.jinja",
        title="What training sees",
        generator="",
        kinds=[(kind, COLORS[kind], label(kind)) for kind in SPAN_KINDS if kind != "prompt"],
        rows=((_header(row), [_page_segment(segment) for segment in row.segments]) for row in rows),
    )


PageToken = tuple[bool, str, str, str, str]
"""special, trained kind or "", opacity or "", description, text. A plain tuple: a page can have millions of them."""


def _page_segment(segment: Segment) -> tuple[str, list[tuple[str, list[PageToken]]]]:
    return _title(segment), [(name, [_page_token(token) for token in tokens]) for name, tokens in _turns(segment)]


def _page_token(token: Token) -> PageToken:
    kind = token.kind if token.weight > 0 else ""
    description = f"id {token.id}, position {token.position}, weight {token.weight:g}"
    if kind:
        description += f", {label(kind)}"
    opacity = f"{0.4 + 0.6 * min(1.0, token.weight):.2g}" if kind and token.weight < 1 else ""
    return token.special, kind, opacity, description, token.text if token.special else _visible(token.text)
