"""What a config's data holds, how well it packs, and what share each source has: counted, not estimated."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xlam_jax import config as configs
from xlam_jax.config import Config
from xlam_jax.data import corpus, examples, html, pipeline
from xlam_jax.data.epochs import resolve_epochs
from xlam_jax.data.examples import Loaded
from xlam_jax.data.mixture import shares
from xlam_jax.data.pair import Pair
from xlam_jax.data.render import KINDS
from xlam_jax.data.tokenizer import load_tokenizer

MOST_ROWS = 20_000
"""Packed rows looked at unless told otherwise; an epoch may have more."""
BINS = 24
_BARS = " ▁▂▃▄▅▆▇█"


class SourceStats(NamedTuple):
    """One source: what it has to train on, what was left out, and its share of the packed rows that were looked at."""

    name: str
    trajectories: int
    heldout: int
    """Examples."""
    dropped: Counter[str]
    repaired: Counter[str]
    changed: Counter[str]
    turns: int
    calls: int
    lengths: np.ndarray
    """Tokens of each example, int64 (examples,)."""
    trained: int
    """Tokens that carry loss."""
    weighted: float
    """The sum of their weights."""
    kinds: np.ndarray
    """Tokens of each of `render.KINDS`, int64 (len(KINDS),)."""
    target: float
    """Share of the drawn examples that the config asks for."""
    target_trained: float
    """Share of the trained tokens that follows from it."""
    drawn: np.ndarray
    """Examples in each packed row, int64 (rows,)."""
    drawn_trained: np.ndarray
    """Tokens that carry loss in each packed row, int64 (rows,)."""

    @property
    def tokens(self) -> int:
        """Tokens to train on."""
        return int(self.lengths.sum())


class Stats(NamedTuple):
    """All sources, and the packed rows that were looked at."""

    config: str
    run: Config
    sources: list[SourceStats]
    filled: np.ndarray
    """Places of each packed row that are no padding, int64 (rows,)."""

    @property
    def rows(self) -> int:
        """Packed rows that were looked at."""
        return len(self.filled)

    @property
    def efficiency(self) -> float:
        """Share of their places that are no padding."""
        return float(self.filled.mean() / self.run.data.sequence_length)

    def realised(self, column: str) -> np.ndarray:
        """Share of each source in `drawn` or `drawn_trained`, float64 (sources,)."""
        sums = np.array([getattr(source, column).sum() for source in self.sources], np.float64)
        return sums / max(sums.sum(), 1.0)


def collect(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    rows: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Stats:
    """Reads a config's data as training does and looks at the first packed rows, as many as one epoch fills.

    Holds the trajectories in memory. Raises `UserError` as training does.
    """
    resolved = configs.load(config, list(overrides))
    data = resolved.config.data
    tokenizer = load_tokenizer(data.tokenizer)
    loaded = corpus.load(data, tokenizer, progress, annotate=True)
    run = resolve_epochs(resolved, loaded, progress).config
    targets = [float(share) for share in shares(loaded, data)]
    lengths = [examples.lengths(one.train) for one in loaded]
    trained = [int(examples.trained(one.train).sum()) for one in loaded]
    per_example = [share * total / len(one.train) for share, total, one in zip(targets, trained, loaded, strict=True)]
    count = rows or min(MOST_ROWS, -(-sum(int(one.sum()) for one in lengths) // data.sequence_length))
    progress(f"packing {count:,} rows")
    packed = pipeline.packed_rows(loaded, data, batch_size=run.train.batch_size, seed=run.seed, tokenizer=tokenizer)
    looked = [_look(row, len(loaded)) for row in islice(packed, count)]
    filled, drawn, drawn_trained = (np.stack(column) for column in zip(*looked, strict=True))
    sources = [
        SourceStats(
            one.source.name,
            *_held(one, parts=data.augment.active),
            lengths[at],
            trained[at],
            *_by_kind(one),
            targets[at],
            per_example[at] / sum(per_example),
            drawn[:, at],
            drawn_trained[:, at],
        )
        for at, one in enumerate(loaded)
    ]
    return Stats(str(config), run, sources, filled)


def _look(row: dict[str, np.ndarray], sources: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a packed row holds: places filled (), examples and trained tokens of each source (sources,)."""
    owners = row["tokens_segment_ids"]
    drawn = np.array([source for source, _ in pipeline.origins(row)], np.int64)
    carries = row["weights"] > 0
    return (
        np.array((owners > 0).sum()),
        np.bincount(drawn, minlength=sources),
        np.bincount(drawn[owners[carries] - 1], minlength=sources),
    )


def _held(one: Loaded, parts: bool) -> tuple[int, int, Counter[str], Counter[str], Counter[str], int, int]:
    """Trajectories or pairs to train on and held out, what was dropped, repaired and changed, turns and calls.

    One that gives several examples stands there once for each; or its `parts` do, for augmentation, the whole last.
    """
    kept = {whole.id if parts else id(whole): whole for whole in one.trajectories or ()}
    sides = [
        side
        for whole in kept.values()
        for side in ([whole.chosen, whole.rejected] if isinstance(whole, Pair) else [whole])
    ]
    turns = sum(len(trajectory.conversation) for trajectory in sides)
    calls = sum(len(turn.tool_calls) for trajectory in sides for turn in trajectory.conversation)
    return len(kept), len(one.heldout), one.dropped, one.repaired, one.changed, turns, calls


def _by_kind(one: Loaded) -> tuple[float, np.ndarray]:
    """The sum of the weights, and the tokens of each kind."""
    weighted, kinds = 0.0, np.zeros(len(KINDS), np.int64)
    for example in one.train:
        weighted += float(example["weights"].sum(dtype=np.float64))
        kinds += np.bincount(example["kinds"], minlength=len(KINDS))
    return weighted, kinds


def _tables(stats: Stats) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """The figures, as titled tables of texts."""
    sources = stats.sources
    what = "pairs" if stats.run.data.pairs else "trajectories"
    yield (
        "to train on",
        ["source", what, "held out", "turns", "calls", "tokens", "trained", "share", "weighted"],
        [
            [
                one.name,
                *(f"{count:,}" for count in (one.trajectories, one.heldout, one.turns, one.calls, one.tokens)),
                f"{one.trained:,}",
                f"{one.trained / max(one.tokens, 1):.1%}",
                f"{one.weighted:,.0f}",
            ]
            for one in (*sources, _sum(sources))
        ],
    )
    yield (
        f"tokens of an example (rows have {stats.run.data.sequence_length:,})",
        ["source", "examples", "least", "median", "95 %", "most"],
        [
            [one.name, f"{len(one.lengths):,}"]
            + [f"{value:,.0f}" for value in np.quantile(one.lengths, [0, 0.5, 0.95, 1])]
            for one in sources
        ],
    )
    rows = stats.run.train.steps * stats.run.train.batch_size
    examples, trained = stats.realised("drawn"), stats.realised("drawn_trained")
    yield (
        f"shares in the first {stats.rows:,} packed rows",
        ["source", "examples: target", "realised", "trained tokens: target", "realised", "passes in the run"],
        [
            [
                one.name,
                f"{one.target:.2%}",
                f"{examples[at]:.2%}",
                f"{one.target_trained:.2%}",
                f"{trained[at]:.2%}",
                f"{one.drawn.sum() / stats.rows * rows / len(one.lengths):.2f}",
            ]
            for at, one in enumerate(sources)
        ],
    )


def _sum(sources: Sequence[SourceStats]) -> SourceStats:
    first = sources[0]
    return first._replace(
        name="all",
        lengths=np.concatenate([one.lengths for one in sources]),
        **{
            key: sum(getattr(one, key) for one in sources)
            for key in ("trajectories", "heldout", "turns", "calls", "trained", "weighted")
        },
    )


def _notes(stats: Stats) -> Iterator[str]:
    """What was left out, mended and changed, and how well it packs."""
    for one in stats.sources:
        for verb, counts in (("dropped", one.dropped), ("repaired", one.repaired), ("changed", one.changed)):
            if counts:
                told = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
                yield f"{one.name}: {verb} {told}"
    segments = sum(int(one.drawn.sum()) for one in stats.sources)
    yield (
        f"packing: {stats.efficiency:.2%} of the places in {stats.rows:,} rows hold tokens, "
        f"{segments / stats.rows:.1f} examples a row"
    )


def table(stats: Stats) -> str:
    """Returns the figures for a terminal."""
    parts = []
    for title, header, lines in _tables(stats):
        if header[1] == "examples":
            longest = stats.run.data.sequence_length
            header = [*header, f"0 to {longest:,}"]
            lines = [[*line, _bars(one.lengths, longest)] for line, one in zip(lines, stats.sources, strict=True)]
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
    """A histogram in one line."""
    counts, _ = np.histogram(lengths, BINS, (0, longest))
    return "".join(_BARS[-(-int(count) * (len(_BARS) - 1) // max(1, int(counts.max())))] for count in counts)


def write_page(stats: Stats, path: Path) -> None:
    """Writes the figures with plots as one page."""
    html.write(path, html.page(f"Data of {stats.config}", _page(stats)))


def _page(stats: Stats) -> Iterator[str]:
    tables = {title: html.table(header, rows) for title, header, rows in _tables(stats)}
    plots = [_plot_kinds, _plot_lengths, _plot_shares]
    for (title, text), plot in zip(tables.items(), plots, strict=True):
        yield f"<h2>{escape(title[0].upper() + title[1:])}</h2>\n{text}"
        height = 4.0 if plot is _plot_lengths else 1.5 + 0.35 * len(stats.sources)
        yield html.figure(lambda axes, plot=plot: plot(stats, axes), height=height, name=plot.__name__)
    yield html.figure(lambda axes: _plot_course(stats, axes), name="course")
    yield "<h2>Left out, mended, packed</h2>\n<ul>"
    yield from (f"<li>{escape(note)}</li>" for note in _notes(stats))
    yield "</ul>\n"


def _plot_kinds(stats: Stats, axes: Any) -> None:
    names = [one.name for one in stats.sources]
    left = np.zeros(len(names))
    for at, kind in enumerate(KINDS):
        share = np.array([one.kinds[at] / max(one.kinds.sum(), 1) for one in stats.sources])
        axes.barh(names, share, left=left, color=html.KIND_COLORS[kind], label="end" if kind == "eos" else kind)
        left += share
    axes.invert_yaxis()
    axes.set(xlabel="share of the tokens", xlim=(0, 1))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _plot_lengths(stats: Stats, axes: Any) -> None:
    longest = stats.run.data.sequence_length
    axes.hist(
        [one.lengths for one in stats.sources],
        bins=np.linspace(0, longest, 2 * BINS + 1),
        stacked=True,
        label=[one.name for one in stats.sources],
    )
    axes.set(xlabel="tokens of an example", ylabel="examples", xlim=(0, longest))
    axes.legend()


def _plot_shares(stats: Stats, axes: Any) -> None:
    at = np.arange(len(stats.sources))
    for offset, column, target, label in (
        (-0.2, "drawn", "target", "examples"),
        (0.2, "drawn_trained", "target_trained", "trained tokens"),
    ):
        axes.barh(at + offset, stats.realised(column), height=0.35, label=label)
        axes.plot([getattr(one, target) for one in stats.sources], at + offset, "k|", markersize=12)
    axes.set_yticks(at, [one.name for one in stats.sources])
    axes.invert_yaxis()
    axes.set(xlabel="share; the black mark is the target")
    axes.legend()


def _plot_course(stats: Stats, axes: Any) -> None:
    drawn = np.stack([one.drawn for one in stats.sources]).cumsum(axis=1)
    for one, line in zip(stats.sources, drawn / np.maximum(drawn.sum(axis=0), 1), strict=True):
        (drawn_line,) = axes.plot(np.arange(1, stats.rows + 1), line, label=one.name)
        axes.axhline(one.target, color=drawn_line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="packed rows so far", ylabel="share of the examples; dotted: target", ylim=(0, None))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
