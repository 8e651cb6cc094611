"""Counts what the data of a config contains, how well it packs, and the share of each source."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xlam_jax import config as configs
from xlam_jax.config import Config
from xlam_jax.data import corpus, examples, pipeline
from xlam_jax.data.epochs import resolve_epochs
from xlam_jax.data.examples import Loaded
from xlam_jax.data.kind_styles import COLORS, label
from xlam_jax.data.mixture import shares
from xlam_jax.data.pair import Pair
from xlam_jax.data.tokenizer import open_tokenizer
from xlam_jax.enums import SPAN_KINDS
from xlam_jax.pages import document, figures

MOST_ROWS = 20_000
"""Packed rows that are counted by default; an epoch may have more."""
BINS = 24
"""Bars of a histogram in the terminal; a plot has twice as many."""
_BARS = " ▁▂▃▄▅▆▇█"


class SourceStats(NamedTuple):
    """One source: its training data, what was dropped, and its share of the counted rows."""

    name: str
    trajectories: int
    heldout: int
    """Number of held-out examples."""
    dropped: Counter[str]
    repaired: Counter[str]
    changed: Counter[str]
    turns: int
    calls: int
    reasoning: int
    """Number of turns with reasoning."""
    lengths: np.ndarray
    """Tokens per example, int64 [examples]."""
    trained: int
    """Number of trained tokens."""
    weighted: float
    """Sum of their loss weights."""
    kinds: np.ndarray
    """Tokens per kind, in the order of `enums.SPAN_KINDS`, int64 [kinds]."""
    target: float
    """Share of the drawn examples, according to the config."""
    target_trained: float
    """Expected share of the trained tokens."""
    drawn: np.ndarray
    """Examples per packed row, int64 [rows]."""
    drawn_trained: np.ndarray
    """Trained tokens per packed row, int64 [rows]."""

    @property
    def tokens(self) -> int:
        """Number of tokens to train on."""
        return int(self.lengths.sum())


class Stats(NamedTuple):
    """All sources, and the packed rows that were counted."""

    config: str
    run: Config
    sources: list[SourceStats]
    filled: np.ndarray
    """Places without padding per packed row, int64 [rows]."""

    @property
    def rows(self) -> int:
        """Number of packed rows that were counted."""
        return len(self.filled)

    @property
    def efficiency(self) -> float:
        """Fraction of their places without padding."""
        return float(self.filled.mean() / self.run.data.sequence_length)

    def realised(self, column: str) -> np.ndarray:
        """Returns the share of each source in `drawn` or `drawn_trained`, float64 [sources]."""
        sums = np.array([getattr(source, column).sum() for source in self.sources], np.float64)
        return sums / max(sums.sum(), 1.0)


def collect(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    rows: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Stats:
    """Reads the data of a config as training does, and counts the first packed rows.

    rows: how many to count; by default as many as one epoch fills, at most MOST_ROWS.

    Keeps the trajectories in memory. Raises `UserError` as training does.
    """
    resolved = configs.load(config, list(overrides))
    data = resolved.config.data
    tokenizer = open_tokenizer(data)
    loaded = corpus.load(data, tokenizer, progress, annotate=True)
    run = resolve_epochs(resolved, loaded, progress).config
    targets = [float(share) for share in shares(loaded, data)]
    lengths = [examples.lengths(source.train) for source in loaded]
    trained = [int(examples.trained(source.train).sum()) for source in loaded]
    per_example = [
        share * total / len(source.train) for share, total, source in zip(targets, trained, loaded, strict=True)
    ]
    count = rows or min(MOST_ROWS, -(-sum(int(column.sum()) for column in lengths) // data.sequence_length))
    progress(f"packing {count:,} rows")
    packed = pipeline.packed_rows(loaded, data, batch_size=run.train.batch_size, seed=run.seed, tokenizer=tokenizer)
    counts = [_count_row(row, len(loaded)) for row in islice(packed, count)]
    filled, drawn, drawn_trained = (np.stack(column) for column in zip(*counts, strict=True))
    sources = [
        SourceStats(
            source.source.name,
            *_count_source(source, parts=data.augment.active),
            lengths[at],
            trained[at],
            *_count_kinds(source),
            targets[at],
            per_example[at] / sum(per_example),
            drawn[:, at],
            drawn_trained[:, at],
        )
        for at, source in enumerate(loaded)
    ]
    return Stats(str(config), run, sources, filled)


def _count_row(row: dict[str, np.ndarray], sources: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the filled places [], and the examples and trained tokens of each source [sources] in a packed row."""
    owners = row["tokens_segment_ids"]
    drawn = np.array([source for source, _ in pipeline.origins(row)], np.int64)
    trained = row["weights"] > 0
    return (
        np.array((owners > 0).sum()),
        np.bincount(drawn, minlength=sources),
        np.bincount(drawn[owners[trained] - 1], minlength=sources),
    )


def _count_source(
    source: Loaded, parts: bool
) -> tuple[int, int, Counter[str], Counter[str], Counter[str], int, int, int]:
    """Returns the number of training and held-out rows; what was dropped, repaired, changed; turns, calls, reasoning.

    A trajectory with several examples is listed once per example. parts: it is listed as its parts, for augmentation,
    which share its id; the complete one comes last.
    """
    kept = {whole.id if parts else id(whole): whole for whole in source.trajectories or ()}
    sides = [
        side
        for whole in kept.values()
        for side in ([whole.chosen, whole.rejected] if isinstance(whole, Pair) else [whole])
    ]
    turns = [turn for trajectory in sides for turn in trajectory.conversation]
    calls, reasoning = sum(len(turn.tool_calls) for turn in turns), sum(bool(turn.reasoning) for turn in turns)
    changes = (source.dropped, source.repaired, source.changed)
    return len(kept), len(source.heldout), *changes, len(turns), calls, reasoning


def _count_kinds(source: Loaded) -> tuple[float, np.ndarray]:
    """Returns the sum of the loss weights, and the tokens of each kind [kinds]."""
    weighted, kinds = 0.0, np.zeros(len(SPAN_KINDS), np.int64)
    for example in source.train:
        weighted += float(example["weights"].sum(dtype=np.float64))
        kinds += np.bincount(example["kinds"], minlength=len(SPAN_KINDS))
    return weighted, kinds


def _tables(stats: Stats) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yields the counts as tables: title, header, rows."""
    sources = stats.sources
    unit = "pairs" if stats.run.data.pairs else "trajectories"
    yield (
        "to train on",
        ["source", unit, "held out", "turns", "calls", "reasoning", "tokens", "trained", "share", "weighted"],
        [
            [
                source.name,
                *(
                    f"{count:,}"
                    for count in (
                        source.trajectories,
                        source.heldout,
                        source.turns,
                        source.calls,
                        source.reasoning,
                        source.tokens,
                    )
                ),
                f"{source.trained:,}",
                f"{source.trained / max(source.tokens, 1):.1%}",
                f"{source.weighted:,.0f}",
            ]
            for source in (*sources, _sum(sources))
        ],
    )
    yield (
        f"tokens of an example (rows have {stats.run.data.sequence_length:,})",
        ["source", "examples", "minimum", "median", "95 %", "maximum"],
        [
            [source.name, f"{len(source.lengths):,}"]
            + [f"{value:,.0f}" for value in np.quantile(source.lengths, [0, 0.5, 0.95, 1])]
            for source in sources
        ],
    )
    rows = stats.run.train.steps * stats.run.train.batch_size
    examples, trained = stats.realised("drawn"), stats.realised("drawn_trained")
    yield (
        f"shares in the first {stats.rows:,} packed rows",
        ["source", "examples: target", "realised", "trained tokens: target", "realised", "passes in the run"],
        [
            [
                source.name,
                f"{source.target:.2%}",
                f"{examples[at]:.2%}",
                f"{source.target_trained:.2%}",
                f"{trained[at]:.2%}",
                f"{source.drawn.sum() / stats.rows * rows / len(source.lengths):.2f}",
            ]
            for at, source in enumerate(sources)
        ],
    )


def _sum(sources: Sequence[SourceStats]) -> SourceStats:
    first = sources[0]
    return first._replace(
        name="all",
        lengths=np.concatenate([source.lengths for source in sources]),
        **{
            key: sum(getattr(source, key) for source in sources)
            for key in ("trajectories", "heldout", "turns", "calls", "reasoning", "trained", "weighted")
        },
    )


def _notes(stats: Stats) -> Iterator[str]:
    """Yields what was dropped, repaired and changed, and how well the rows are packed."""
    for source in stats.sources:
        for verb, counts in (("dropped", source.dropped), ("repaired", source.repaired), ("changed", source.changed)):
            if counts:
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
                yield f"{source.name}: {verb} {reasons}"
    segments = sum(int(source.drawn.sum()) for source in stats.sources)
    yield (
        f"packing: {stats.efficiency:.2%} of the places in {stats.rows:,} rows contain tokens, "
        f"{segments / stats.rows:.1f} examples per row"
    )


def table(stats: Stats) -> str:
    """Returns the counts as text for a terminal."""
    parts = []
    for title, header, lines in _tables(stats):
        if header[1] == "examples":
            longest = stats.run.data.sequence_length
            header = [*header, f"0 to {longest:,}"]
            lines = [[*line, _bars(source.lengths, longest)] for line, source in zip(lines, stats.sources, strict=True)]
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        text = [
            "  ".join(
                f"{cell:{'<' if at == 0 else '>'}{width}}"
                for at, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in (header, *lines)
        ]
        parts.append("\n".join([title, *(f"  {line}" for line in text)]))
    parts.append("\n".join(_notes(stats)))
    return "\n\n".join(parts)


def _bars(lengths: np.ndarray, longest: int) -> str:
    """Returns a histogram in one line."""
    counts, _ = np.histogram(lengths, BINS, (0, longest))
    return "".join(_BARS[-(-int(count) * (len(_BARS) - 1) // max(1, int(counts.max())))] for count in counts)


def write_page(stats: Stats, path: Path) -> None:
    """Writes the figures, with plots, as one page."""
    narrow = 1.5 + 0.35 * len(stats.sources)
    plots = [(_plot_kinds, narrow), (_plot_lengths, 4.0), (_plot_shares, narrow)]
    document.write(
        path,
        "stats.html.jinja",
        title=f"Data of {stats.config}",
        generator="",
        sections=(
            (title[0].upper() + title[1:], header, rows, _svg(plot, stats, height))
            for (title, header, rows), (plot, height) in zip(_tables(stats), plots, strict=True)
        ),
        course=_svg(_plot_course, stats, 4.0),
        notes=_notes(stats),
    )


def _svg(plot: Callable[[Stats, Any], None], stats: Stats, height: float) -> str:
    return figures.draw_svg(lambda axes: plot(stats, axes), height=height, name=plot.__name__)


def _plot_kinds(stats: Stats, axes: Any) -> None:
    names = [source.name for source in stats.sources]
    left = np.zeros(len(names))
    for at, kind in enumerate(SPAN_KINDS):
        share = np.array([source.kinds[at] / max(source.kinds.sum(), 1) for source in stats.sources])
        axes.barh(names, share, left=left, color=COLORS[kind], label=label(kind))
        left += share
    axes.invert_yaxis()
    axes.set(xlabel="share of the tokens", xlim=(0, 1))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _plot_lengths(stats: Stats, axes: Any) -> None:
    longest = stats.run.data.sequence_length
    axes.hist(
        [source.lengths for source in stats.sources],
        bins=np.linspace(0, longest, 2 * BINS + 1),
        stacked=True,
        label=[source.name for source in stats.sources],
    )
    axes.set(xlabel="tokens of an example", ylabel="examples", xlim=(0, longest))
    axes.legend()


def _plot_shares(stats: Stats, axes: Any) -> None:
    at = np.arange(len(stats.sources))
    for offset, column, target, unit in (
        (-0.2, "drawn", "target", "examples"),
        (0.2, "drawn_trained", "target_trained", "trained tokens"),
    ):
        axes.barh(at + offset, stats.realised(column), height=0.35, label=unit)
        axes.plot([getattr(source, target) for source in stats.sources], at + offset, "k|", markersize=12)
    axes.set_yticks(at, [source.name for source in stats.sources])
    axes.invert_yaxis()
    axes.set(xlabel="share; the black mark is the target")
    axes.legend()


def _plot_course(stats: Stats, axes: Any) -> None:
    drawn = np.stack([source.drawn for source in stats.sources]).cumsum(axis=1)
    for source, line in zip(stats.sources, drawn / np.maximum(drawn.sum(axis=0), 1), strict=True):
        (drawn_line,) = axes.plot(np.arange(1, stats.rows + 1), line, label=source.name)
        axes.axhline(source.target, color=drawn_line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="packed rows so far", ylabel="share of the examples; dotted: target", ylim=(0, None))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
