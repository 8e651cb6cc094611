"""The page: what stands on it, in which order, and how it looks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any, NamedTuple

import numpy as np

from xlam_jax import config as configs
from xlam_jax.data import html
from xlam_jax.report import plots, samples
from xlam_jax.report.plots import Line, color_class, exact
from xlam_jax.report.runs import Keys, Run, number

GENERATOR = "xlam_jax.report"
PARTS = 50
"""A bold curve is a mean over one part of so many of its run."""
SHARES_OVER = 20
"""Fewest steps over which the sources' shares are told: single steps hold few trajectories."""


class Quantity(NamedTuple):
    """What a curve shows: columns of a run's tables, times a factor."""

    label: str
    train: Keys | None = None
    heldout: Keys | None = None
    requests: Keys | None = None
    weight: Keys | None = None
    """The column of the training records that a mean over steps is weighted with."""
    factor: Callable[[Run], float | None] = lambda run: 1.0
    """None: not for this run."""
    smooth: bool = True
    """Steps pale and their mean bold, or the steps alone."""


def loss(*path: str, label: str = "", train: bool = True) -> Quantity:
    """A loss, per token that carries it (or per pair)."""
    tokens = (*path, "tokens") if path else ("trained_tokens",)
    return Quantity(label, (*path, "loss") if train else None, (*path, "loss"), weight=tokens)


def window(run: Run) -> int:
    """Steps that a bold curve is a mean over."""
    return max(1, len(run.train.steps) // PARTS)


def curves(run: Run, quantity: Quantity, train: tuple[str, int], heldout: tuple[str, int]) -> list[Line]:
    """The curves of a quantity in a run, with names and colours; none where the run does not have it."""
    factor = quantity.factor(run)
    if factor is None:
        return []
    lines = []
    if quantity.train:
        table = run.train
        every = Line(train[0], table.steps, factor * table.get(*quantity.train), train[1], "line", table.breaks)
        weights = table.get(*quantity.weight) if quantity.weight else np.ones(len(table.steps))
        known = np.isfinite(every.values)
        every, weights = every.at(known), np.nan_to_num(weights[known], nan=1.0)
        if quantity.smooth and window(run) > 1 and len(every.steps):
            lines.append(every._replace(look="faint"))
            every = every._replace(values=plots.smooth(every.values, weights, window(run)))
        lines.append(every)
    for path, table in ((quantity.heldout, run.heldout), (quantity.requests, run.requests)):
        if path:
            points = Line(heldout[0], table.steps, factor * table.get(*path), heldout[1], "points")
            lines.append(points.at(np.isfinite(points.values)))
    return lines


class Report:
    """Runs to be shown on one page."""

    def __init__(self, runs: Sequence[Run], answers: Sequence[samples.Samples]):
        self.runs, self.answers = runs, answers
        self.single = len(runs) == 1
        steps = np.concatenate([table.steps for run in runs for table in (run.train, run.heldout, run.requests)])
        self.span = int(steps.min()), int(steps.max())

    def plot(self, title: str, unit: str, *quantities: Quantity, runs: Sequence[Run] | None = None, **how: Any) -> str:
        """One figure: of one run, all quantities; of several, the one quantity in each of them."""
        names = [run.name for run in self.runs]
        lines = []
        for run in self.runs if runs is None else runs:
            for at, quantity in enumerate(quantities):
                if self.single and len(quantities) == 1:
                    name, color, beside, other = quantity.label or "train", 0, "held-out", 1
                elif self.single:
                    name, color = quantity.label, at + 2  # 0 is train, 1 held-out
                    beside, other = f"{name}, held-out", color
                else:
                    name, color = run.name, names.index(run.name)
                    beside, other = f"{name}, held-out", color
                alone = quantity.train is None
                lines += curves(run, quantity, (name, color), (name, color) if alone else (beside, other))
        return plots.plot(title, unit, lines, self.span, **how)

    def together(self, title: str, unit: str, *quantities: Quantity, **how: Any) -> str:
        """Quantities that belong together: in one figure for one run, in one figure each for several."""
        if self.single:
            return self.plot(title, unit, *quantities, **how)
        return "".join(self.plot(f"{title}: {one.label}", unit, one, **how) for one in quantities)


def parts(report: Report) -> Iterator[str]:
    """Yields the page."""
    names = ", ".join(run.name for run in report.runs)
    title = f"Run {names}" if report.single else f"{len(report.runs)} runs: {names}"
    style = plots.STYLE + samples.STYLE + STYLE
    yield from html.page(title, _body(report), style, plots.SCRIPT + SCRIPT, generator=GENERATOR)


def _body(report: Report) -> Iterator[str]:
    sections = [
        ("Losses", _losses(report)),
        ("Preferences", _preferences(report)),
        ("Losses by source", _by_source(report)),
        ("Held-out losses by kind of span", _by_kind(report)),
        ("Answers to held-out requests", _requests(report)),
        ("Mixture", _mixture(report)),
        ("Optimization", _optimization(report)),
        ("Speed and memory", _speed(report)),
        ("Samples", _samples(report)),
        ("Configuration", _configuration(report)),
    ]
    drawn = [(title, text) for title, body in sections if (text := "".join(body))]
    links = " ".join(f'<a href="#{_anchor(title)}">{title}</a>' for title, _ in drawn)
    yield f'<p class="quiet">Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p>\n<nav>{links}</nav>\n'
    if warnings := all_warnings(report):
        yield '<ul class="warnings">' + "".join(f"<li>{escape(one)}</li>" for one in warnings) + "</ul>\n"
    yield f'<div class="runs{" single" if report.single else ""}">\n'
    for at, run in enumerate(report.runs):
        yield _card(report, run, at)
    yield "</div>\n"
    for title, text in drawn:
        yield f'<section><h2 id="{_anchor(title)}">{title}</h2>\n{text}</section>\n'
    yield from _notes(report)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def all_warnings(report: Report) -> list[str]:
    """What a reader of the page must know before they trust it."""
    warnings = [warning for run in report.runs for warning in run.warnings]
    kinds = _by_objective(report.runs)
    if len(kinds) > 1:
        told = "; ".join(f"{kind}: {', '.join(run.name for run in runs)}" for kind, runs in kinds.items())
        warnings.append(f"the runs minimize different losses, which can't be compared and are drawn apart ({told})")
    return warnings


def _by_objective(runs: Iterable[Run]) -> dict[str, list[Run]]:
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        kinds.setdefault(run.objective, []).append(run)
    return kinds


# ---- the runs at a glance -------------------------------------------------------------------------------------------


def _card(report: Report, run: Run, at: int) -> str:
    from xlam_jax.progress import duration

    done = int(run.train.steps[-1]) if len(run.train.steps) else 0
    planned = run.planned or done
    finished = run.planned is not None and done >= run.planned
    state = "finished" if finished else f"unfinished; last record {run.written:%Y-%m-%d %H:%M} UTC"
    facts = [("steps", f"{done:,} of {run.planned:,}" if run.planned else f"{done:,}"), ("state", state)]
    rate = run.train.get("tokens_per_second")
    seconds = np.nansum(run.train.get("tokens") / np.where(rate > 0, rate, np.nan))
    if seconds:
        facts.append(("time in steps", f"about {duration(float(seconds))}"))
    started = run.about.get("started")
    if isinstance(started, list) and started:
        times = [str(one).replace("T", " ").removesuffix("+00:00") for one in started]
        facts.append(("started", f"{times[0]} UTC"))
        if times[1:]:
            facts.append((f"continued {_times(len(times) - 1)}", ", ".join(times[1:])))
    total, trains = run.number("parameters"), run.number("trainable_parameters")
    if total:
        share = "" if trains is None else f", of which {_amount(trains)} ({trains / total:.2%}) train"
        facts.append(("parameters", _amount(total) + (", all train" if trains == total else share)))
    if run.config:
        facts.append(("training", _training(run.config)))
    if run.number("devices"):
        facts.append(("devices", f"{run.number('devices'):.0f} × {run.about.get('device_kind', 'unknown')}"))
    trained, real = (float(np.nansum(run.train.get(name))) for name in ("trained_tokens", "tokens"))
    if real:
        facts.append(("tokens seen", f"{_amount(real)}, of which {_amount(trained)} carry loss"))
    values = []
    for line in curves(run, loss(), ("train", 0), ("held-out", 0)):
        if line.look in ("line", "points") and len(line.values):
            unit = f"mean of the last {window(run) // 2 + 1:,} steps" if line.look == "line" and window(run) > 1 else ""
            if line.look == "points":
                best = int(line.values.argmin())
                unit = f"lowest {exact(float(line.values[best]))}, step {line.steps[best]:,}"
            values.append((f"{line.name} loss", exact(float(line.values[-1])), unit))
    for what, column in (
        ("held-out accuracy", run.heldout.get("accuracy")),
        ("exact calls", run.requests.get("exact")),
    ):
        if (known := column[np.isfinite(column)]).size:
            values.append((what, exact(float(known[-1]), percent=True), ""))
    name = "" if report.single else f'<h3><i class="dot {color_class(at)}"></i>{escape(run.name)}</h3>\n'
    big = "".join(
        f"<div><b>{value}</b>{escape(what)}<br><span>{escape(unit)}</span></div>" for what, value, unit in values
    )
    told = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(text)}</dd></div>" for what, text in facts)
    share = min(1.0, done / planned) if planned else 0.0
    return (
        f'<div class="run">{name}<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>\n'
        f'<div class="values">{big}</div>\n<dl>{told}</dl></div>\n'
    )


def _times(count: int) -> str:
    return "once" if count == 1 else "twice" if count == 2 else f"{count} times"


def _amount(value: float) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {suffix}"
    return f"{value:.0f}"


def _training(config: configs.Config) -> str:
    objective = "SFT" if config.objective.kind == "sft" else f"{config.objective.kind}, β {config.objective.beta:g}"
    what = {"full": "all parameters", "lora": "LoRA", "qlora": "QLoRA"}[config.train.trainable]
    if config.train.trainable != "full":
        what += f" rank {config.lora.rank} on {', '.join(config.lora.targets)}"
    return f"{objective}, {what}, {config.train.optimizer}"


# ---- sections -------------------------------------------------------------------------------------------------------


def _grid(*figures: str) -> str:
    text = "".join(figures)
    return f'<div class="plots">\n{text}</div>\n' if text else ""


def _unit(kind: str) -> str:
    return "nats per trained token" if kind == "sft" else "per pair"


def _losses(report: Report) -> Iterator[str]:
    kinds = _by_objective(report.runs)
    titles = {kind: "Loss" if len(kinds) == 1 else f"Loss, {kind}" for kind in kinds}
    yield _grid(
        *(
            report.plot(titles[kind], _unit(kind), loss(), runs=runs, log=True, columns=500, wide=True)
            for kind, runs in kinds.items()
        )
    )


def _preferences(report: Report) -> Iterator[str]:
    def on_both(key: str, label: str) -> Quantity:
        return Quantity(label, (key,), (key,))

    yield _grid(
        report.together(
            "Rewards", "β × log ratio", on_both("rewards_chosen", "chosen"), on_both("rewards_rejected", "rejected")
        ),
        report.plot("Margin", "chosen − rejected reward", on_both("margin", "")),
        report.plot("Accuracy", "pairs with a positive margin", on_both("accuracy", ""), percent=True, bounds=(0, 1)),
        report.together(
            "Log-probability", "nats", on_both("log_p_chosen", "chosen"), on_both("log_p_rejected", "rejected")
        ),
        report.plot("KL to the reference", "nats", on_both("kl", "")),
    )


def _by_source(report: Report) -> Iterator[str]:
    kinds = _by_objective(report.runs)
    for kind, runs in kinds.items():
        names = dict.fromkeys(name for run in runs for name in run.sources())
        figures = [report.plot(name, _unit(kind), loss("sources", name), runs=runs, log=True) for name in names]
        if len(kinds) > 1 and any(figures):
            yield f"<h3>{escape(kind)}</h3>\n"
        yield _grid(*figures)


def _by_kind(report: Report) -> Iterator[str]:
    runs = [run for run in report.runs if run.heldout.names("kinds")]
    kinds = dict.fromkeys(kind for run in runs for kind in run.heldout.names("kinds"))
    yield _grid(
        *(
            report.plot(
                _spoken(kind), _unit("sft"), loss("kinds", kind, label="held-out", train=False), runs=runs, log=True
            )
            for kind in kinds
        )
    )
    if tables := "".join(_kinds_of_sources(report, run, list(kinds)) for run in runs):
        yield f'<div class="split">\n{tables}</div>\n'


def _spoken(kind: str) -> str:
    return {"eos": "end of the turn", "tool_call": "tool call"}.get(kind, kind)


def _kinds_of_sources(report: Report, run: Run, kinds: list[str]) -> str:
    """The last held-out losses as a table: sources down, kinds across."""
    last = len(run.heldout.steps) - 1
    rows = []
    for source in run.heldout.names("sources"):
        values = [run.heldout.get("sources", source, "kinds", kind, "loss")[last] for kind in kinds]
        rows.append((source, [run.heldout.get("sources", source, "loss")[last], *values]))
    if not any(np.isfinite(values[1:]).any() for _, values in rows):
        return ""
    largest = max(value for _, values in rows for value in values if np.isfinite(value)) or 1.0
    lines = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(
            f'<td class="heat" style="--heat:{40 * value / largest:.0f}%">{exact(float(value))}</td>'
            if np.isfinite(value)
            else "<td>–</td>"
            for value in values
        )
        + "</tr>"
        for name, values in rows
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in ("source", "all", *map(_spoken, kinds)))
    whose = "" if report.single else f"{escape(run.name)}, "
    return (
        f'<div><p class="quiet">{whose}step {run.heldout.steps[last]:,}: held-out loss, nats per trained token</p>\n'
        f'<div class="scroll"><table><tr>{head}</tr>{lines}</table></div></div>\n'
    )


def _requests(report: Report) -> Iterator[str]:
    shares = [Quantity(mark.replace("_", " "), requests=(mark,)) for mark in samples.MARKS]
    yield _grid(report.together("Requests", "share", *shares, percent=True, bounds=(0, 1)))
    counts = [
        f"{asked[-1]:,.0f}" if report.single else f"{escape(run.name)} {asked[-1]:,.0f}"
        for run in report.runs
        if len(asked := run.requests.get("requests")) and np.isfinite(asked[-1])
    ]
    if counts:
        yield f'<p class="quiet">Requests asked at the last evaluation: {", ".join(counts)}.</p>\n'


def _optimization(report: Report) -> Iterator[str]:
    aux = any(np.nan_to_num(run.train.get("aux_loss")).any() for run in report.runs)
    router = Quantity("", ("aux_loss",), ("aux_loss",))
    yield _grid(
        report.plot("Learning rate", "", Quantity("rate", ("learning_rate",), smooth=False)),
        report.plot("Gradient norm", "before clipping", Quantity("norm", ("grad_norm",)), log=True),
        report.plot("Router’s load balance", "top-k is even", router) if aux else "",
    )


def _speed(report: Report) -> Iterator[str]:
    def achieved(run: Run) -> float | None:
        """FLOP/s of a device, a token/s of the run."""
        flops, devices = run.number("flops_per_token"), run.number("devices")
        return flops / devices if flops and devices else None

    def utilisation(run: Run) -> float | None:
        peak, flops = run.number("peak_flops_per_device"), achieved(run)
        return flops / peak if peak and flops else None

    def tera(run: Run) -> float | None:
        flops = achieved(run)
        return flops * 1e-12 if flops and utilisation(run) is None else None

    def giga(run: Run) -> float:
        return 1e-9

    rate = ("tokens_per_second",)
    yield _grid(
        report.plot("Throughput", "tokens per second", Quantity("tokens/s", rate)),
        report.plot("Model-FLOPs utilisation", "of peak", Quantity("MFU", rate, factor=utilisation), percent=True),
        report.plot("Achieved", "TFLOP/s per device; peak unknown", Quantity("achieved", rate, factor=tera)),
        report.plot("Memory", "GB per device, peak", Quantity("peak", ("memory",), factor=giga, smooth=False)),
        report.plot("Places that carry loss", "of a batch", Quantity("trained", ("trained_share",)), percent=True),
    )


# ---- mixture --------------------------------------------------------------------------------------------------------


def targets(run: Run) -> dict[str, float]:
    """Each source's target share of what its metrics count: trained tokens, or pairs; empty where it is not known.

    run.json tells the share of trajectories drawn. With the mean number of trained tokens of a source's trajectories
    it becomes the share of tokens.
    """
    told = run.about.get("sources")
    shares: dict[str, float] = {}
    for name, source in told.items() if isinstance(told, dict) else ():
        one = source if isinstance(source, dict) else {}
        share, trajectories, tokens = (
            number(one.get(key)) for key in ("target_share", "trajectories", "trained_tokens")
        )
        if share is None or not trajectories or tokens is None:
            return {}
        shares[name] = share * (tokens / trajectories if run.objective == "sft" else 1.0)
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()} if total else {}


def _mixture(report: Report) -> Iterator[str]:
    for run in report.runs:
        names = [name for name in run.sources() if np.isfinite(run.train.get("sources", name, "tokens")).any()]
        if not names:
            continue
        tokens_SN = np.stack([np.nan_to_num(run.train.get("sources", name, "tokens")) for name in names])
        realised = tokens_SN.sum(axis=1) / max(tokens_SN.sum(), 1.0)
        wanted = targets(run)
        if not report.single:
            yield f"<h3>{escape(run.name)}</h3>\n"
        over = max(window(run), min(SHARES_OVER, len(run.train.steps)))
        weights = np.ones(tokens_SN.shape[1])
        total = np.maximum(plots.smooth(tokens_SN.sum(axis=0), weights, over), 1e-300)
        ends = run.train.steps[[0, -1]]
        lines = []
        for at, name in enumerate(names):
            share = plots.smooth(tokens_SN[at], weights, over) / total
            lines.append(Line(name, run.train.steps, share, at, "line", run.train.breaks))
            if name in wanted and len(run.train.steps) > 1:
                lines.append(Line(f"{name}, target", ends, np.repeat(wanted[name], 2), at, "target"))
        what = "trained tokens" if run.objective == "sft" else "pairs"
        unit = f"of the {what} in {over:,} steps; dotted: target"
        table = _shares(run, names, tokens_SN.sum(axis=1), realised, wanted)
        title = "Realised share" if report.single else f"Realised share, {run.name}"
        figure = plots.plot(title, unit, lines, report.span, percent=True)
        yield f'<div class="split">\n{table}{figure}</div>\n'


def _shares(run: Run, names: list[str], tokens: np.ndarray, realised: np.ndarray, wanted: dict[str, float]) -> str:
    what = "trained tokens" if run.objective == "sft" else "pairs"
    told = run.about.get("sources", {})
    rows = []
    for at, name in enumerate(names):
        has = (
            number(told.get(name, {}).get("trained_tokens" if run.objective == "sft" else "trajectories"))
            if wanted
            else None
        )
        target = wanted.get(name)
        mark = f'<u style="left:{100 * target:.2f}%"></u>' if target is not None else ""
        cells = [
            escape(name),
            f"{tokens[at]:,.0f}",
            "–" if target is None else f"{target:.1%}",
            f"{realised[at]:.1%}",
            f'<div class="share"><i class="{color_class(at)}" style="width:{100 * realised[at]:.2f}%"></i>{mark}</div>',
            f"{tokens[at] / has:.2f}" if has else "–",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("source", what, "target", "realised", "", "passes"))
    return f'<div class="scroll"><table class="mixture"><tr>{head}</tr>{"".join(rows)}</table></div>\n'


# ---- samples, configuration, notes ----------------------------------------------------------------------------------


def _samples(report: Report) -> Iterator[str]:
    if not any(one.requests for one in report.answers):
        return
    shown = [(run.name, one) for run, one in zip(report.runs, report.answers, strict=True)]
    hidden = [f"{escape(name)} {one.hidden:,}" for name, one in shown if one.hidden]
    more = f" The first {samples.REQUESTS} requests are shown, not the rest ({', '.join(hidden)})." if hidden else ""
    yield (
        '<p class="quiet" id="about-samples">The last answer of each run; <del>struck out</del>: recorded, not said; '
        f"<ins>underlined</ins>: said, not recorded.{more}</p>\n"
    )
    yield from samples.cards(shown)


def _configuration(report: Report) -> Iterator[str]:
    compared = [run for run in report.runs if run.config]
    if len(compared) > 1:
        fields = [dict(configs.flatten(run.config)) for run in compared if run.config]
        names = dict.fromkeys(name for one in fields for name in one)
        rows = [
            [name, *(_value(one, name) for one in fields)]
            for name in names
            if name != "output_dir" and len({_value(one, name) for one in fields}) > 1
        ]
        if rows:
            head = ["field", *(run.name for run in compared)]
            yield f'<div class="scroll fields">{html.table(head, rows)}</div>\n'
        else:
            yield '<p class="quiet">The configs are the same but for output_dir.</p>\n'
    for run in report.runs:
        name, text = escape(run.name), escape(run.config_text)
        yield f"<details><summary>{name}: config.yaml</summary><pre>{text}</pre></details>\n"


def _value(fields: dict[str, Any], name: str) -> str:
    return str(fields[name]) if name in fields else "–"


def _notes(report: Report) -> Iterator[str]:
    spans = ", ".join(f"{escape(run.name)}: {window(run):,}" for run in report.runs)
    yield (
        '<section class="quiet"><h2>How to read this page</h2>\n<p>'
        "Pale: each step. Bold: the mean of the steps around it, weighted by trained tokens where it is a loss; number "
        f"of steps: {spans}. Dots: held-out. Of a curve with more points than a figure shows, the lowest and the "
        "highest of each stretch are drawn, where they are: spikes stay. Time in steps, throughput and FLOPs count "
        "real tokens, without padding; evaluations, compilation and saving are left out. Model FLOPs are forward and "
        "backward, without recomputation. Target shares of tokens follow from each source’s share of trajectories and "
        "its mean trained tokens.</p></section>\n"
    )


STYLE = """
:root { color-scheme: light dark; --shade: #f5f5f3; --good: #00704f; --bad: #b3401a; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e3; --paper: #16181a; --line: #34383c; --quiet: #a0a4a8; --shade: #1f2225; --good: #4cc79b;
    --bad: #f0885c; --c0: #4ba3e0; --c1: #ef7d3c; --c2: #33b58c; --c3: #d98abb; --c4: #e3b04b; --c5: #8cc8f0;
    --c6: #a993de; --c7: #b8a383; }
}
body { line-height: 1.55; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h1 + p { margin: .1rem 0 .6rem; font-size: 13px; }
h2 { font-size: 1.15rem; margin: 2.8rem 0 1rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .6rem; overflow-wrap: anywhere; }
a { color: inherit; text-decoration-color: var(--line); text-underline-offset: 3px; }
nav { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; font-size: 13px; margin-bottom: 1.2rem; }
.quiet { color: var(--quiet); font-size: 13px; }
.warnings { margin: 0 0 1.4rem; padding: .6rem 1rem .6rem 2rem; background: var(--shade);
  border-left: 3px solid var(--bad); font-size: 13px; overflow-wrap: anywhere; }
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.2rem 2rem; }
.run { min-width: 0; } .run h3 { margin: 0 0 .4rem; }
.bar { height: 4px; background: var(--line); border-radius: 2px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--c0); }
.values { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: .9rem 0; font-size: 13px; }
.values b { display: block; font-size: 1.5rem; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums; }
.values span { color: var(--quiet); }
dl { margin: 0; font-size: 13px; } dl div { display: grid; grid-template-columns: 7rem 1fr; gap: 1rem; }
dt { color: var(--quiet); } dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
.single dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .1rem 2rem; }
.scroll { overflow-x: auto; margin: .6rem 0 1.4rem; } table { font-size: 13px; }
th { font-weight: 400; color: var(--quiet); } th:first-child, td:first-child { padding-left: 0; }
.fields th, .fields td { max-width: 24rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.heat { background: color-mix(in srgb, var(--c0) var(--heat), transparent); }
.split { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 0 2rem; }
.split > * { min-width: 0; }
.mixture { width: 100%; } .mixture td:nth-child(5) { width: 35%; min-width: 4rem; }
@media (max-width: 30rem) { th, td { padding: .2rem .35rem; }
  .mixture td:nth-child(5), .mixture th:nth-child(5) { display: none; } }
.share { position: relative; height: 10px; } .share i { display: block; height: 100%; background: var(--c); }
.share u { position: absolute; top: -3px; bottom: -3px; border-left: 2px solid var(--ink); }
details { margin: .4rem 0; } summary { cursor: pointer; font-size: 13px; color: var(--quiet); }
pre { font: 12.5px/1.5 ui-monospace, monospace; overflow-x: auto; padding: .8rem 1rem; background: var(--shade); }
.filter { margin-left: 1rem; font-size: 13px; }
@media print { body { max-width: none; margin: 0; } nav, .filter { display: none; } }
"""

SCRIPT = """
// Lets the samples be narrowed down to those whose calls are not the recorded ones.
const about = document.getElementById("about-samples");
if (about) {
  const label = about.appendChild(document.createElement("label"));
  const box = label.appendChild(document.createElement("input"));
  label.className = "filter";
  box.type = "checkbox";
  label.append(" only those that are not exact");
  box.addEventListener("change", () => {
    for (const card of document.querySelectorAll(".sample[data-exact=yes]")) card.hidden = box.checked;
  });
}
"""
