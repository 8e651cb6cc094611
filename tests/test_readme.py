"""The README's commands: those that need no foreign weights are run as they stand there."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, Commands

from converters.trajectories.__main__ import convert

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")
}


def commands_of(page: str) -> list[str]:
    """Each command line of a page's plain code blocks, continuations joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    plain = [block.replace("\\\n", " ") for language, block in blocks if not language]
    return [line.strip() for block in plain for line in block.splitlines() if line.strip()]


TINY = ("train.steps=3", "train.warmup_steps=0", "model.overrides.num_hidden_layers=1", "data.sequence_length=512")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that stands in for a clone, with the data that a user would bring."""
    for entry in ("configs", "examples", "Makefile", "xlam_jax", "converters", "serving", "benchmarks"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    hammer = ROOT / "examples/quickstart/hammer.jsonl"
    convert("unified", [hammer], tmp_path / "chats.jsonl", to="openai")
    row = json.loads(hammer.read_text(encoding="utf-8").splitlines()[0])
    other = copy.deepcopy(row) | {"score": 0.0, "unique_trajectory_id": "other"}
    other["conversation"][-1] = {"role": "assistant", "content": "I do not know."}
    scored = [row | {"score": 1.0}, other]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(one) + "\n" for one in scored), encoding="utf-8")
    return tmp_path


def run_page(page: str, commands: Commands, folder: Path) -> int:
    """Runs a page's commands in order; returns how many."""
    ran = 0
    for line in commands_of(page):
        words = shlex.split(line.partition("#")[0])
        if words[:2] != ["python", "-m"]:
            assert words[0] in ("make", "vllm"), f"{line}: no test runs it"
            continue
        if "mixtral_8x7b_sft" in line:  # the real run, checked up to the devices
            words.append("--print-config")
        if "runs/mesh" in line:
            words += [*TINY, "train.steps=1"]
        result = subprocess.run(
            [sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, check=False,
            env={**commands.environment, "PYTHONPATH": os.pathsep.join([str(ROOT)])},
        )  # fmt: skip
        assert result.returncode == 0, f"{line}\n{result.stdout[-2000:]}{result.stderr}"
        ran += 1
    return ran


def test_commands_of_the_readme_run(commands: Commands, clone: Path):
    commands.run("xlam_jax.train", "--config", "configs/quickstart.yaml", f"output_dir={clone}/runs/quickstart", *TINY)
    weights = clone / "weights/Mixtral-8x7B-v0.1"
    commands.run("converters.orbax_to_hf", "--checkpoint", clone / "runs/quickstart", "--out", weights)
    assert run_page("README.md", commands, clone) >= 8


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"README.md"}))
def test_commands_of_the_pages_run(commands: Commands, clone: Path, page: str):
    assert run_page(page, commands, clone)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_config_is_in_the_table():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`configs/{path.name}`" in README
