import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_page
import yaml
from fake_runs import KINDS, SHARES, SOURCES, TRAINED, heldout_record, train_record, write_run
from report_page import Curve, Page

from xlam_jax import enums
from xlam_jax.errors import UserError
from xlam_jax.report import runs, samples
from xlam_jax.report.__main__ import main

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;\u202e\ud800"


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """A run on four sources, killed twice and still unfinished."""
    return write_run(tmp_path_factory.mktemp("runs") / "single", steps=320, done=300, started=3)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "pairs", steps=120, pairs=True, seed=3, every=30)


def report(*arguments: object) -> None:
    """Runs the command."""
    assert main([str(one) for one in arguments]) == 0


def page_of(tmp_path: Path, *paths: Path) -> Page:
    """Returns the parsed page about runs."""
    out = tmp_path / "page.html"
    report(*paths, "--out", out)
    return report_page.read(out)


@pytest.fixture(scope="module")
def page(single, tmp_path_factory) -> Page:
    return page_of(tmp_path_factory.mktemp("page"), single)


@pytest.fixture(scope="module")
def pairs_page(pairs, tmp_path_factory) -> Page:
    return page_of(tmp_path_factory.mktemp("page"), pairs)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def write_records(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")


def check(curve: Curve, expected: list[tuple[int, float]]) -> None:
    """Checks the points of a curve: steps exactly, values within the precision of the drawing."""
    assert curve.steps == [step for step, _ in expected]
    for drawn, (step, value) in zip(curve.values, expected, strict=True):
        assert abs(drawn - value) <= curve.resolution, f"step {step}: {drawn} drawn, {value} recorded"


def mean_around(points: list[tuple[int, float, float]], window: int) -> list[tuple[int, float]]:
    """Returns the weighted mean of a window of (step, value, weight), by definition."""
    means = []
    for at, (step, _, _) in enumerate(points):
        near = points[max(0, at - (window - 1) // 2) : at + window // 2 + 1]
        means.append((step, sum(value * weight for _, value, weight in near) / sum(weight for _, _, weight in near)))
    return means


# ---- the plots show the metrics -------------------------------------------------------------------------------------


def test_losses_are_the_recorded_ones(single, page):
    figure = page.figures["Loss nats per trained token"]
    train = [(one["step"], one["loss"], one["trained_tokens"]) for one in records(single, "train")]
    (faint,) = figure.unnamed["faint"]
    check(faint, [(step, loss) for step, loss, _ in train])
    check(figure.curves["train"], mean_around(train, len(train) // 50))
    check(figure.curves["held-out"], [(one["step"], one["loss"]) for one in records(single, "heldout")])
    assert faint.starts == figure.curves["train"].starts == 1
    assert f"held-out {records(single, 'heldout')[-1]['loss']:.4g}" in figure.legend


@pytest.mark.parametrize("source", SOURCES)
def test_losses_of_a_source(single, page, source):
    """Only steps in which the source occurs, and their mean weighted by its tokens."""
    figure = page.figures[f"{source} nats per trained token"]
    points = [(one["step"], one["sources"][source]) for one in records(single, "train") if source in one["sources"]]
    check(figure.unnamed["faint"][0], [(step, one["loss"]) for step, one in points])
    check(figure.curves["train"], mean_around([(step, one["loss"], one["tokens"]) for step, one in points], 6))
    held = [(one["step"], one["sources"][source]["loss"]) for one in records(single, "heldout")]
    check(figure.curves["held-out"], held)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_a_kind(single, page, kind):
    name = {"eos": "end of the turn", "tool_call": "tool call"}.get(kind, kind)
    figure = page.figures[f"{name} nats per trained token"]
    check(figure.curves["held-out"], [(one["step"], one["kinds"][kind]["loss"]) for one in records(single, "heldout")])


def test_last_losses_of_kinds_by_source(single, page):
    last = records(single, "heldout")[-1]
    assert f"step {last['step']:,}: held-out loss" in page.text
    for source in SOURCES:
        values = [f"{last['sources'][source]['kinds'][kind]['loss']:.4g}" for kind in KINDS]
        assert f"{source} {last['sources'][source]['loss']:.4g} {' '.join(values)}" in page.text


def test_requests_of_a_run_stand_in_one_figure(single, page):
    figure = page.figures["Requests share"]
    for mark in enums.REQUEST_MARKS:
        expected = [(one["step"], one[mark]) for one in records(single, "requests")]
        check(figure.curves[mark.replace("_", " ")], expected)


@pytest.mark.parametrize(
    ("caption", "key", "factor"),
    [
        ("Gradient norm before clipping", "grad_norm", 1.0),
        ("Throughput tokens per second", "tokens_per_second", 1.0),
        ("Model-FLOPs utilisation of peak", "tokens_per_second", 4.4e10 / (8 * 989e12)),
        ("Trained tokens of a batch", "trained_share", 1.0),
    ],
)
def test_other_quantities(single, page, caption, key, factor):
    figure = page.figures[caption]
    values = [(one["step"], factor * one[key], 1.0) for one in records(single, "train")]
    check(figure.unnamed["faint"][0], [(step, value) for step, value, _ in values])
    (bold,) = figure.curves.values()
    check(bold, mean_around(values, 6))


@pytest.mark.parametrize(
    ("caption", "key", "factor"),
    [("Learning rate", "learning_rate", 1), ("Memory GB per device, peak", "memory", 1e-9)],
)
def test_quantities_without_a_mean(single, page, caption, key, factor):
    (curve,) = page.figures[caption].curves.values()
    check(curve, [(one["step"], factor * one[key]) for one in records(single, "train")])


def test_unknown_peak_shows_achieved_flops(tmp_path):
    run = write_run(tmp_path / "cpu", steps=20, peak=None, requests=0)
    page = page_of(tmp_path, run)
    assert not [caption for caption in page.figures if "utilisation" in caption]
    (curve,) = page.figures["Achieved TFLOP/s per device; peak unknown"].curves.values()
    check(curve, [(one["step"], one["tokens_per_second"] * 4.4e10 / 8e12) for one in records(run, "train")])


def test_mixture_of_tokens(single, page):
    """Actual shares are sums of tokens; target shares of examples are converted with the mean lengths."""
    train = records(single, "train")
    sums = [sum(one["sources"].get(name, {"tokens": 0})["tokens"] for one in train) for name in SOURCES]
    wanted = [share * tokens for share, tokens in zip(SHARES, TRAINED, strict=True)]
    for at, name in enumerate(SOURCES):
        target, realised = wanted[at] / sum(wanted), sums[at] / sum(sums)
        passes = sums[at] / (1000 * TRAINED[at])
        assert f"{name} {sums[at]:,} {target:.1%} {realised:.1%} {passes:.2f}" in page.text
    figure = page.figures["Realised share of the trained tokens in 20 steps; dotted: target"]
    for at, name in enumerate(SOURCES):
        expected = []
        for end in range(len(train)):
            near = train[max(0, end - 9) : end + 11]
            tokens = [sum(one["sources"].get(each, {"tokens": 0})["tokens"] for one in near) for each in SOURCES]
            expected.append((train[end]["step"], tokens[at] / sum(tokens)))
        check(figure.curves[name], expected)
        check(figure.unnamed["target"][at], [(step, wanted[at] / sum(wanted)) for step in (1, 300)])


def test_mixture_of_pairs(pairs, pairs_page):
    """Pairs are counted, and the target share applies to examples directly."""
    train = records(pairs, "train")
    sums = [sum(one["sources"].get(name, {"tokens": 0})["tokens"] for one in train) for name in SOURCES]
    for at, name in enumerate(SOURCES):
        row = f"{name} {sums[at]:,} {SHARES[at]:.1%} {sums[at] / sum(sums):.1%} {sums[at] / 1000:.2f}"
        assert row in pairs_page.text


def test_preferences(pairs, pairs_page):
    train, held = records(pairs, "train"), records(pairs, "heldout")
    figures = {
        "Margin chosen − rejected reward": "margin",
        "Accuracy pairs with a positive margin": "accuracy",
        "KL to the reference nats": "kl",
    }
    for caption, key in figures.items():
        figure = pairs_page.figures[caption]
        check(figure.unnamed["faint"][0], [(one["step"], one[key]) for one in train])
        check(figure.curves["held-out"], [(one["step"], one[key]) for one in held])
    rewards = pairs_page.figures["Rewards β × log ratio"]
    for side in ("chosen", "rejected"):
        check(rewards.curves[f"{side}, held-out"], [(one["step"], one[f"rewards_{side}"]) for one in held])
        check(rewards.curves[side], mean_around([(one["step"], one[f"rewards_{side}"], 1.0) for one in train], 2))
    assert "Loss per pair" in pairs_page.figures
    assert f"{held[-1]['accuracy']:.1%} held-out accuracy" in pairs_page.text


def test_header_tells_the_run(single, page):
    for fragment in ("steps 300 of 320", "state unfinished; last record", "7.25 B, of which 41.9 M (0.58%) train",
                 "8 × NVIDIA H100 80GB HBM3", "SFT, LoRA rank 32 on q, k, v, o, adamw"):  # fmt: skip
        assert fragment in page.text
    seconds = sum(one["tokens"] / one["tokens_per_second"] for one in records(single, "train"))
    assert f"about {int(seconds // 60)}:{round(seconds % 60):02}" in page.text


def test_spikes_do_not_press_the_rest_flat(tmp_path):
    """A step far outside is drawn at the edge and reported."""
    run = write_run(tmp_path / "run", steps=250, requests=0)
    lines = records(run, "train")
    lines[200]["grad_norm"] = 5000.0
    write_records(run, lines)
    figures = page_of(tmp_path, run).figures
    (caption,) = [caption for caption in figures if caption.startswith("Gradient norm")]
    assert re.search(r"; [12] pale steps? (is|are) beyond the axis, up to 5,000$", caption)
    faint = figures[caption].unnamed["faint"][0]
    assert faint.values[200] == max(faint.values) < 1100  # the mean of five steps includes it
    for drawn, one in zip(faint.values, lines, strict=True):
        if one["grad_norm"] < 500:
            assert drawn == pytest.approx(one["grad_norm"], rel=faint.resolution)


# ---- long runs ------------------------------------------------------------------------------------------------------


def test_a_page_does_not_grow_with_the_run(tmp_path):
    rng = np.random.default_rng(0)
    run = write_run(tmp_path / "run", steps=10, requests=0)
    sizes = []
    for steps in (2_000, 8_000):
        write_records(
            run,
            [train_record(rng, step, steps, False, SOURCES) for step in range(1, steps + 1)]
            + [heldout_record(rng, step, steps, False, SOURCES) for step in range(0, steps + 1, 4)],
        )
        report(run)
        sizes.append((run / "report.html").stat().st_size)
    assert sizes[1] < 1.2 * sizes[0] < 300_000  # four times as long


# ---- several runs ---------------------------------------------------------------------------------------------------


def test_several_runs_share_figures_and_show_what_differs(single, tmp_path, capsys):
    other = write_run(
        tmp_path / "b" / "single", steps=300, seed=1, changes={"train.learning_rate": 1e-4, "train.optimizer": "lion"}
    )
    page = page_of(tmp_path, single, other)
    assert capsys.readouterr().err == ""
    names = [f"{run.parent.name}/single" for run in (single, other)]
    loss = page.figures["Loss nats per trained token"]
    assert set(loss.curves) == {*names, *(f"{name}, held-out" for name in names)}
    for name, run in zip(names, (single, other), strict=True):
        check(loss.curves[f"{name}, held-out"], [(one["step"], one["loss"]) for one in records(run, "heldout")])
        exact = page.figures["Requests: exact share"].curves[name]
        check(exact, [(one["step"], one["exact"]) for one in records(run, "requests")])
    table = page.source[page.source.index('id="configuration"') :]
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", table)
    assert rows == [
        ("train.steps", "320", "300"),
        ("train.optimizer", "adamw", "lion"),
        ("train.learning_rate", "5e-05", "0.0001"),
    ]


def test_runs_that_minimize_different_losses_are_drawn_apart(single, pairs, tmp_path, capsys):
    page = page_of(tmp_path, single, pairs)
    message = (
        "the runs minimize different losses, which can't be compared and are drawn apart (sft: single; sigmoid: pairs)"
    )
    assert f"warning: {message}\n" in capsys.readouterr().err
    assert message in page.text
    assert set(page.figures["Loss, sft nats per trained token"].curves) == {"single", "single, held-out"}
    assert set(page.figures["Loss, sigmoid per pair"].curves) == {"pairs", "pairs, held-out"}
    assert set(page.figures["webshop nats per trained token"].curves) == {"single", "single, held-out"}
    assert set(page.figures["Throughput tokens per second"].curves) == {"single", "pairs"}


def test_configs_that_are_the_same(tmp_path):
    paths = [write_run(tmp_path / name, steps=10, requests=0) for name in "ab"]
    assert "The configs are the same but for output_dir." in page_of(tmp_path, *paths).text


# ---- steps that are missing or doubled ------------------------------------------------------------------------------


def test_a_resumed_run_has_no_gap_and_no_double_point(single, page, tmp_path, capsys):
    page_of(tmp_path, single)
    assert capsys.readouterr().err == ""
    assert "continued twice 2026-11-21 08:00:00, 2026-11-22 08:00:00" in page.text
    assert not [attributes for tag, attributes in page.tags if attributes.get("class") == "warnings"]
    for figure in page.figures.values():
        for curve in [*figure.curves.values(), *figure.unnamed.get("faint", [])]:
            assert len(set(curve.steps)) == len(curve.steps)


def test_missing_and_doubled_steps_are_told(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=150, requests=0)
    train, held = records(run, "train"), records(run, "heldout")
    again = [one | {"loss": 9.0} for one in train[9:12]]  # written by a run that resumed after step 9
    kept = [one for one in train if one["step"] not in (40, 41, 42, 60)]
    write_records(run, [*kept[:12], *again, *kept[12:], *held, held[-1]])
    page = page_of(tmp_path, run)
    warnings = capsys.readouterr().err
    expected = [
        f"{run}/metrics.jsonl: steps 10 to 12: more than one train record; the last is shown",
        f"{run}/metrics.jsonl: steps 40 to 42, step 60: no train record; the curves have a gap there",
        f"{run}/metrics.jsonl: step 150: more than one heldout record; the last is shown",
    ]
    assert warnings.splitlines() == [f"warning: {one}" for one in expected]
    assert all(one in page.text for one in expected)
    figure = page.figures["Loss nats per trained token"]
    (faint,) = figure.unnamed["faint"]
    check(faint, [(one["step"], 9.0 if one["step"] in (10, 11, 12) else one["loss"]) for one in kept])
    assert faint.starts == figure.curves["train"].starts == 3  # one stroke, and one more after each of two gaps
    assert figure.curves["held-out"].steps == [0, 50, 100, 150]


def test_a_run_whose_first_steps_are_missing(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=30, requests=0)
    write_records(run, records(run, "train")[20:])
    report(run)
    assert "steps 1 to 20: no train record" in capsys.readouterr().err


# ---- files that are damaged or not there ----------------------------------------------------------------------------


def test_damaged_lines_are_told_and_a_cut_last_line_is_not(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=20, requests=2)
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (run / name).read_text(encoding="utf-8").splitlines()
        lines[2:2] = ["{oops", "[1, 2]", '{"step": 3, "kind": "later", "x": 1}', '{"step": true, "kind": "train"}']
        if name == "metrics.jsonl":
            lines[2:2] = ['{"step": 99, "kind": "requests", "exact": NaN, "parsable": "all"}']
        (run / name).write_text("\n".join(lines) + '\n{"step": 21, "kin', encoding="utf-8")
    page = page_of(tmp_path, run)
    metrics, answers = capsys.readouterr().err.splitlines()
    assert metrics == (
        f"warning: {run}/metrics.jsonl: line 3, exact, parsable: not a finite number; line 4 is not valid JSON; "
        "line 5 is not a record with step and kind; line 6 has the unknown kind 'later'; "
        "line 7 is not a record with step and kind: skipped"
    )
    assert answers == (
        f"warning: {run}/samples.jsonl: line 3 is not valid JSON; line 4 is not a sample with a step; "
        "line 6 is not a sample with a step: skipped"
    )
    assert page.figures["Loss nats per trained token"].curves["train"].steps == list(range(1, 21))
    assert page.figures["Requests share"].curves["exact"].steps == [0, 20]


def test_many_damaged_lines_are_counted(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=5, requests=0)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("x\n" * 1234)
    report(run)
    assert capsys.readouterr().err.endswith("and 1,229 more like this: skipped\n")


def test_numbers_that_are_not_finite_are_told(tmp_path, capsys):
    """As written by a run: null, with the value as a string."""
    run = write_run(tmp_path / "run", steps=20, requests=0)
    lines = records(run, "train")
    lines[-1] |= {"loss": None, "grad_norm": None, "not_finite": {"loss": "nan", "grad_norm": "inf"}}
    write_records(run, lines)
    page = page_of(tmp_path, run)
    expected = f"{run}/metrics.jsonl: step 20, train: loss is nan, grad_norm is inf: not drawn"
    assert capsys.readouterr().err == f"warning: {expected}\n"
    assert expected in page.text
    assert page.figures["Loss nats per trained token"].curves["train"].steps == list(range(1, 20))
    assert page.figures["Learning rate"].curves["rate"].steps == list(range(1, 21))


@pytest.mark.parametrize("content", [None, "nonsense", "[]"])
def test_a_run_without_run_json(tmp_path, capsys, content):
    run = write_run(tmp_path / "run", steps=10, requests=0)
    if content is None:
        (run / "run.json").unlink()
    else:
        (run / "run.json").write_text(content, encoding="utf-8")
    page = page_of(tmp_path, run)
    what = {
        None: ": no such file; a JSON object is expected here",
        "nonsense": ", line 1, column 1: not valid JSON: Expecting value; correct the file, or get it again",
        "[]": ": contains a list; a JSON object is expected",
    }[content]
    assert f"{run}/run.json{what}; sizes, devices, target shares and utilization are unknown" in page.text
    assert "Loss nats per trained token" in page.figures
    assert "warning: " in capsys.readouterr().err


def test_a_run_json_of_unexpected_values(tmp_path):
    run = write_run(tmp_path / "run", steps=10, requests=0)
    odd = {"parameters": "many", "devices": True, "flops_per_token": [], "sources": {"webshop": 3}, "started": "now"}
    (run / "run.json").write_text(json.dumps(odd), encoding="utf-8")
    assert "Loss nats per trained token" in page_of(tmp_path, run).figures


@pytest.mark.parametrize("change", ["train: {lr: 1}\n", "a: [\n"])
def test_a_config_of_another_version_is_shown_and_not_compared(single, tmp_path, capsys, change):
    run = write_run(tmp_path / "old", steps=10, requests=0)
    (run / "config.yaml").write_text(change, encoding="utf-8")
    page = page_of(tmp_path, single, run)
    assert f"{run}/config.yaml: does not fit this version's schema" in capsys.readouterr().err
    assert change.strip() in page.text


def test_a_run_that_has_only_evaluated_yet(tmp_path):
    run = write_run(tmp_path / "run", steps=10, done=0)
    page = page_of(tmp_path, run)
    assert page.figures["Loss nats per trained token"].curves["held-out"].steps == [0]
    assert "steps 0 of 10" in page.text


def test_a_single_step(tmp_path):
    run = write_run(tmp_path / "run", steps=10, done=1)
    page = page_of(tmp_path, run)
    assert page.figures["Loss nats per trained token"].curves["train"].steps == [1]


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    run = write_run(tmp_path / "run", steps=5, requests=0)
    for path, message in (
        (tmp_path / "nothing", "nothing: no such folder"),
        (tmp_path / "file", "file: is a file; the folder of the run is expected"),
        (
            tmp_path / "folder",
            "folder: not a run folder: it has no config.yaml; use the output_dir of a python -m xlam_jax.train",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            report(run, path, "--out", tmp_path / "page.html")
    with pytest.raises(UserError, match="is named twice"):
        report(run, run.parent / "run", "--out", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_run_without_metrics_is_refused(tmp_path):
    run = write_run(tmp_path / "run", steps=5, requests=0)
    for content, message in (("", "no record yet"), ('{"st', "no record yet"), (None, "does not exist yet")):
        if content is None:
            (run / "metrics.jsonl").unlink()
        else:
            (run / "metrics.jsonl").write_text(content)
        with pytest.raises(UserError, match=f"metrics.jsonl: {message}; a run writes it after its first step"):
            report(run)
    assert not (run / "report.html").exists()


# ---- where the page goes --------------------------------------------------------------------------------------------


def test_where_the_page_goes(tmp_path, capsys, monkeypatch):
    run, other = (write_run(tmp_path / name, steps=5, requests=0) for name in ("a", "b"))
    monkeypatch.chdir(tmp_path)
    report(run)
    report(run, other)
    assert (run / "report.html").exists()
    assert (tmp_path / "report.html").exists()
    assert re.search(r"report: report.html \(0\.\d MB\)", capsys.readouterr().out)
    report(run)  # a page of this command is overwritten
    assert not list(tmp_path.glob("**/*.partial"))


def test_what_is_there_is_kept(tmp_path):
    run = write_run(tmp_path / "run", steps=5, requests=0)
    own_page = tmp_path / "mine.html"
    own_page.write_text("<p>my notes on xlam_jax.report", encoding="utf-8")
    with pytest.raises(UserError, match="exists and is not a page of this command"):
        report(run, "--out", own_page)
    assert own_page.read_text(encoding="utf-8").startswith("<p>my notes")
    report(run, "--out", own_page, "--force")
    assert "Loss nats per trained token" in report_page.read(own_page).figures
    with pytest.raises(UserError, match="is a folder; name a file"):
        report(run, "--out", tmp_path)
    with pytest.raises(UserError, match="does not exist; make it first"):
        report(run, "--out", tmp_path / "no" / "page.html", "--force")


def test_the_command(commands, tmp_path, single):
    assert "has no config.yaml" in commands.fails("xlam_jax.report", tmp_path)


def test_help_is_quick():
    """No slow import happens before the arguments are parsed."""
    code = "import sys, xlam_jax.report.__main__; print({'numpy', 'pydantic', 'jax', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# ---- samples --------------------------------------------------------------------------------------------------------


def test_calls_are_paired():
    def call(name: str, **arguments: Any) -> dict[str, Any]:
        return {"name": name, "arguments": arguments}

    a, b, c, d = call("f", x=1), call("f", x=2), call("g", x=1), call("h")
    assert samples.pair([a, b], [b, a]) == [(a, a), (b, b)]
    assert samples.pair([a, c], [b]) == [(a, b), (c, None)]
    assert samples.pair([c], [d, b]) == [(c, d), (None, b)]
    assert samples.pair([], [a]) == [(None, a)]
    assert samples.pair([a, c], [c, d]) == [(a, d), (c, c)]
    assert samples.same({"x": 1, "y": [2]}, {"y": [2], "x": 1})
    assert samples.same(1, 1.0)
    assert not samples.same(True, 1)


def _sample(step: int, expected: list[Any], calls: list[Any], **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "aha"}]
    return {
        "step": step, "source": "s", "id": "t1", "turn": 2,
        "messages": [*messages, {"role": "user", "content": "last question"}],
        "expected": expected, "content": "", "calls": calls, "text": "as it came", "finish_reason": "stop",
        "parsable": True, "schema_valid": True, "right_function": True, "exact": False,
    } | changes  # fmt: skip


def _with_samples(folder: Path, lines: list[dict[str, Any]]) -> Path:
    run = write_run(folder, steps=5, requests=0)
    (run / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return run


def test_differences_of_calls_are_marked(tmp_path):
    expected = [
        {"name": "f", "arguments": {"kept": 1, "changed": "a", "gone": [1]}},
        {"name": "missing", "arguments": {}},
    ]
    got = [{"name": "f", "arguments": {"kept": 1, "changed": "b", "new": None}}]
    page = page_of(tmp_path, _with_samples(tmp_path / "run", [_sample(5, expected, got)])).source
    answer = page[page.index("<h4><b>step 5</b>") :]
    for fragment in (
        "<code>kept</code>: <code>1</code>",
        "<code>changed</code>: <del><code>&#34;a&#34;</code></del> <ins><code>&#34;b&#34;</code></ins>",
        "<del><code>gone: [1]</code></del> <em>missing</em>",
        "<ins><code>new: null</code></ins> <em>not expected</em>",
        "<del><code>missing</code></del> <em>not called</em>",
        '<span class="bad">✗ exact</span>',
        '<span class="good">✓ right function</span>',
    ):
        assert answer.count(fragment) == 1, fragment
    assert '<blockquote class="text">last question</blockquote>' in page
    assert "as it came" not in page  # it could be parsed


def test_answers_by_step(tmp_path):
    """The last step is open, earlier ones are folded; unparsable answers are shown unchanged."""
    lines = [_sample(step, [], [], content=f"said after {step}.") for step in range(0, 1300, 100)]
    lines[-1] |= {"parsable": False, "finish_reason": "length"}
    page = page_of(tmp_path, _with_samples(tmp_path / "run", lines))
    shown = re.findall(r"said after (\d+)\.", page.text)
    assert shown[0] == "1200"
    assert shown[-1] == "0"
    assert len(shown) == samples.ANSWERS
    assert "after earlier steps: 9 answers, 3 not shown" in page.text
    assert page.text.index("said after 1200.") < page.text.index("after earlier steps")
    assert "as it came" in page.text
    assert "cut at eval.max_new_tokens" in page.text


def test_a_doubled_answer_is_told(tmp_path, capsys):
    report(_with_samples(tmp_path / "run", [_sample(5, [], []), _sample(5, [], [])]))
    assert "samples.jsonl: line 2 repeats the answer to a request after step 5: skipped" in capsys.readouterr().err


def test_long_texts_and_many_requests_are_cut_and_counted(tmp_path):
    lines = [_sample(5, [], [], id=f"t{at}", content="x" * 10_000) for at in range(samples.REQUESTS + 7)]
    lines[0]["messages"] += [{"role": "user", "content": "y" * 5_000}] * 20
    page = page_of(tmp_path, _with_samples(tmp_path / "run", lines))
    assert f"The first {samples.REQUESTS} requests are shown, not the rest (run 7)." in page.text
    assert page.text.count("… (8,000 more characters)") == samples.REQUESTS
    assert "… and 17 more messages" in page.text
    assert len(page.source) < 300_000


# ---- nothing from a run is taken for HTML, and nothing is loaded ----------------------------------------------------


def test_hostile_text_stays_text(tmp_path):
    name = HOSTILE.replace("/", "").replace("\ud800", "")
    call = [{"name": HOSTILE, "arguments": {HOSTILE: HOSTILE}}]
    everywhere = dict.fromkeys(("source", "id", "turn", "content", "text"), HOSTILE)
    sample = _sample(5, call, [], **everywhere, parsable=False)
    sample["messages"] = [{"role": HOSTILE, "content": HOSTILE}, {"role": "user", "content": [HOSTILE]}, HOSTILE]
    run = _with_samples(tmp_path / name, [sample, sample | {"step": 4, "calls": call * 2}])
    lines = records(run, "train") + records(run, "heldout")
    for one in lines:
        one["sources"] = {HOSTILE: next(iter(one["sources"].values())) | {HOSTILE: 1.0}}
        one[HOSTILE] = 3.0
    for one in lines[-2:]:
        one["kinds"] = {f"kind {HOSTILE}": {"loss": 1.0, "tokens": 5}}
    lines.append({"step": 1, "kind": HOSTILE})
    write_records(run, lines)
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    target = {"target_share": 1.0, "trajectories": 5, "trained_tokens": 50}
    about |= {"device_kind": HOSTILE, "started": [HOSTILE, HOSTILE], "sources": {HOSTILE: target}}
    (run / "run.json").write_text(json.dumps(about), encoding="utf-8")
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    config["data"]["sources"][0]["name"] = config["data"]["tokenizer"] = HOSTILE.replace("\ud800", "")
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    other, third = (write_run(tmp_path / one, steps=5) for one in ("other", "third"))
    for paths in ([run], [run, other]):
        page, plain = page_of(tmp_path, *paths), page_of(tmp_path, *paths[1:], third)
        assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags} | {"ul", "li", "del", "ins", "em"}
        assert not [key for _, attributes in page.tags for key in attributes if key.startswith(("on", "src"))]
        assert page.scripts == plain.scripts
        assert len(page.scripts) == 1
        assert page.text.count("<img src=x onerror=alert(2)>") > 15
        assert "\\ud800" in page.text


@pytest.mark.parametrize("which", ["page", "pairs_page"])
def test_the_page_loads_nothing(request, which):
    page = request.getfixturevalue(which)
    (policy,) = [
        attributes["content"]
        for tag, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = [attributes["href"] for _, attributes in page.tags if "href" in attributes]
    assert links
    assert all(link.startswith("#") for link in links)
    anchors = {attributes.get("id") for _, attributes in page.tags}
    assert {link[1:] for link in links} <= anchors
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert "://" not in page.source
    assert not {"link", "img", "iframe", "object", "use", "image"} & {tag for tag, _ in page.tags}


def test_reading_keeps_what_records_lack_apart(tmp_path):
    """A column is NaN if its record has no value, at any position."""
    run = write_run(tmp_path / "run", steps=4, requests=0)
    lines = [{"step": at, "kind": "train", "loss": float(at)} for at in (1, 2, 3, 4)]
    write_records(run, [lines[0], lines[1] | {"x": 2}, lines[2] | {"x": 3.0}, lines[3]])
    table = runs.read(run, "run").train
    np.testing.assert_array_equal(table.get("x"), [np.nan, 2, 3, np.nan])
    np.testing.assert_array_equal(table.get("loss"), [1, 2, 3, 4])
    np.testing.assert_array_equal(table.get("never"), [np.nan] * 4)
