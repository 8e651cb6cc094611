"""The hardware figures in the README, the docs and the launch files equal those of `plan`."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support import ROOT, Commands

from xlam_jax import config as configs
from xlam_jax import plan as plans
from xlam_jax.config import Resolved
from xlam_jax.planning.hardware import parse
from xlam_jax.planning.summary import Plan

README, PLAN, TRAINING = (
    (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/plan.md", "docs/training.md")
)
CONFIG = re.compile(r"`configs/(\w+)\.yaml`")
FIGURE = re.compile(r"`(?P<command>(?:gpu|v\w+):[^`]+)`: (?P<size>[\d.]+) GB(?P<unfit>, too much)?")
LAUNCH = ROOT / "configs/launch"


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for variable in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(variable, raising=False)


def load(config: str, *overrides: str) -> Resolved:
    return configs.load(Path(f"configs/{config}.yaml"), list(overrides))


def estimated(config: str, topology: str, *overrides: str) -> Plan:
    """Returns the plan of a config from the estimate only; a TPU slice is planned as the same number of GPUs, with the
    same layout."""
    place, resolved = parse(topology), load(config, *overrides)
    if place.platform == "tpu":
        assert place.chip
        plan = estimated(config, f"gpu:h200:{place.count}", *overrides)
        return plans.replace(plan, memory=place.memory, device_memory=place.chip.memory)
    return plans.plan(resolved, place, plans.make_layout(resolved, place), compiles=False)


def rows(page: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each table row about one of our configs: its name and cells."""
    for line in page.splitlines():
        if line.startswith("|") and (config := CONFIG.search(line)):
            yield config[1], [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(("config", "cells"), list(rows(README)))
def test_the_table_of_the_readme(config: str, cells: list[str]):
    _, model, needs = cells
    assert f", {load(config).model.parameters():,}" in model
    figures = list(FIGURE.finditer(needs))
    if not figures:
        limit = re.fullmatch(r"a CPU with two cores, (\d+) GB", needs)
        assert limit
        assert (estimated(config, "cpu:1").peak or 0) < float(limit[1]) * 1e9
    for figure in figures:
        plan = estimated(config, *figure["command"].split())
        assert plan.peak
        assert (f"{plan.peak / 1e9:.1f}", plan.fits) == (figure["size"], not figure["unfit"]), figure[0]
    assert needs.count("GB") == max(1, len(figures))


def test_what_the_readme_says_of_the_allocator():
    said = re.search(
        r"JAX uses (\d+) %.*?(\d+) GB of\nan H100's (\d+) and (\d+) GB of an H200's (\d+)\.", README, re.DOTALL
    )
    assert said
    h100, h200 = parse("gpu:h100:1"), parse("gpu:h200:1")
    sizes = [
        f"{size / 1e9:.0f}"
        for place in (h100, h200)
        for size in (place.memory or 0, (place.chip and place.chip.memory) or 0)
    ]
    assert list(said.groups()) == [f"{100 * h100.fraction:.0f}", *sizes]


def test_the_memory_of_presets():
    """Memory of weights, gradients and optimizer, on all devices together."""
    seen = set()
    for _, cells in rows(TRAINING):
        names = CONFIG.findall(cells[0])
        for name, figure in zip(names, re.findall(r"[\d.]+", cells[-1]), strict=True):
            plan = estimated(name, "gpu:h100:1", "train.microbatches=1")
            gradients = 4 * plan.trainable
            size = (plan.arguments + gradients) / (1e12 if "TB" in cells[-1] else 1e9)
            assert size == pytest.approx(float(figure), abs=0.5 * 10 ** -len(figure.partition(".")[2])), (name, size)
            seen.add(name)
    names = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert seen == {name for name in names if not name.startswith(("quickstart", "demo"))}


def test_the_plan_that_the_page_shows(commands: Commands):
    block = re.search(r"--topology gpu:h100:16 --estimate\n```\n\n```text\n(.*?)```", PLAN, re.DOTALL)
    assert block
    arguments = ("--config", "configs/mixtral_8x7b_sft.yaml", "--topology", "gpu:h100:16", "--estimate")
    assert commands.call("xlam_jax.plan", *arguments).stdout == block[1]


SLICES = re.findall(r"^\| `(\w+)` \| (v\w+:\w+) \((\d+)\) \| (\w+) \| (.*) \|$", PLAN, re.MULTILINE)


@pytest.mark.parametrize(("config", "topology", "chips", "remat", "figures"), SLICES)
def test_the_compiled_slices_that_the_page_shows(config: str, topology: str, chips: str, remat: str, figures: str):
    """Compares FLOPs and their time with the estimate, which is within 5 % of the compiler's; test_plan compares the
    other figures with compiled modules."""
    memory, ratio, compute, *_ = figures.split(" | ")
    place = parse(topology)
    assert place.count == int(chips)
    assert place.chip
    assert f"of {place.chip.memory / 1e9:.0f} GB" in memory
    overrides = (
        f"model.remat={remat}",
        "data.sequence_length=4096",
        "train.microbatches=1",
        f"train.batch_size={chips}",
    )
    plan = estimated(config, topology, *overrides)
    assert plan.flops / plan.model_flops == pytest.approx(float(ratio), rel=0.06)
    assert plan.flops / place.chip.flops == pytest.approx(float(compute.removesuffix(" s")), rel=0.06)


def launched(name: str) -> tuple[str, list[str]]:
    """Returns the devices of a launch file, and the words of its training command."""
    text = (LAUNCH / name).read_text(encoding="utf-8")
    if name == "skypilot.yaml":
        task = yaml.safe_load(text)
        kind, count = task["resources"]["accelerators"].lower().split(":")
        return f"gpu:{kind}:{int(count) * task['num_nodes']}", shlex.split(task["run"])
    if name == "slurm.sbatch":
        command_line = re.search(r"sbatch --nodes=(\d+) (.*?[^\\])\n#\n", text.replace("\\\n#", ""), re.DOTALL)
        assert command_line
        nodes, command = command_line.groups()
        gpus = re.search(r"#SBATCH --gpus-per-node=(\d+)", text)
        assert gpus
        return f"gpu:h100:{int(nodes) * int(gpus[1])}", shlex.split(command)
    job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    kind, shape = (job["nodeSelector"][f"cloud.google.com/gke-tpu-{key}"] for key in ("accelerator", "topology"))
    return f"{kind.split('-')[1]}:{shape}", job["containers"][0]["command"]


@pytest.mark.parametrize("name", ["skypilot.yaml", "slurm.sbatch", "jobset.yaml"])
def test_the_run_of_a_launch_file_fits_its_devices(name: str):
    topology, words = launched(name)
    config = Path(words[words.index("--config") + 1]).stem
    overrides = [word for word in words if re.fullmatch(r"(model|data|train|mesh)\.[\w.]+=\S+", word)]
    assert estimated(config, topology, *overrides).fits


# ---- advice of plan for a run that does not fit ---------------------------------------------------------------------


def advised(config: str, topology: str, *overrides: str) -> list[tuple[str, bool]]:
    place, resolved = parse(topology), load(config, *overrides)
    plan = plans.plan(resolved, place, plans.make_layout(resolved, place), compiles=False)
    assert plan.fits is False
    changes = plans.changes(plan, Path(f"configs/{config}.yaml"), list(overrides), place)
    return [(change.text, change.fits) for change in changes]


@pytest.mark.parametrize(
    ("config", "topology"), [("mistral_7b_sft", "gpu:h100:4"), ("mixtral_8x7b_sft", "gpu:h100:16")]
)
def test_each_change_that_is_enough_makes_the_run_fit(
    config: str, topology: str, commands: Commands, monkeypatch: pytest.MonkeyPatch
):
    """Applies the changes like a user would."""
    changes = advised(config, topology)
    assert len(changes) >= 2
    for text, fits in changes:
        words = text.split()
        place = words[words.index("--topology") + 1] if "--topology" in words else topology
        with monkeypatch.context() as environment:
            for name, _, value in (word.partition("=") for word in words if word.isupper() or word.startswith("XLA_")):
                environment.setenv(name, value)
            overrides = [word for word in words if re.match(r"[a-z]+\.", word)]
            assert fits == estimated(config, place, *overrides).fits, text


def test_changes_that_leave_the_results_alone_come_first():
    kinds = [text.partition("=")[0].split()[0] for text, _ in advised("mistral_7b_sft", "gpu:h100:4")]
    assert kinds[:3] == ["XLA_CLIENT_MEM_FRACTION", "model.remat", "train.microbatches"]
    assert kinds[-1] == "train.trainable"


def test_if_no_change_is_enough_those_that_help_most_are_named():
    changes = advised("mixtral_8x22b_sft", "gpu:h100:1")
    assert changes
    assert not any(fits for _, fits in changes)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, 60e9),
        ({"XLA_CLIENT_MEM_FRACTION": "0.9"}, 72e9),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, 40e9),
    ],
)
def test_the_memory_that_jax_takes(values: dict[str, str], expected: float, monkeypatch: pytest.MonkeyPatch):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert parse("gpu:h100:8").memory == pytest.approx(expected)
    assert parse("v5p:2x2x1").memory == 95 * 2**30
    assert parse("cpu:1").memory is None


@pytest.mark.parametrize("value", ["most", "0", "-1", "1.5", "nan"])
def test_an_invalid_fraction(value: str, commands: Commands, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", value)
    arguments = ("--config", "configs/quickstart.yaml", "--estimate", "--topology", "gpu:h100:1")
    said = commands.fails("xlam_jax.plan", *arguments)
    assert f"XLA_CLIENT_MEM_FRACTION is '{value}'" in said
