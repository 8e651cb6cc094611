"""The commands of the README and the docs run as written, unless they need foreign weights or a server."""

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, Commands

from converters.trajectories.__main__ import convert
from xlam_jax import config as configs

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")
}


def commands_of(page: str) -> list[str]:
    """Returns the command lines of a page's plain code blocks, with continuations joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    plain = [block.replace("\\\n", " ") for language, block in blocks if not language]
    return [line.strip() for block in plain for line in block.splitlines() if line.strip()]


TINY = ("train.steps=3", "train.warmup_steps=0", "model.overrides.num_hidden_layers=1", "data.sequence_length=512")


@pytest.fixture(scope="module")
def quickstart(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of `make quickstart`, but smaller."""
    run = tmp_path_factory.mktemp("quickstart") / "run"
    commands.call("xlam_jax.train", "--config", "configs/quickstart.yaml", f"output_dir={run}", *TINY)
    commands.call("converters.orbax_to_hf", "--checkpoint", run, "--out", run / "hf")
    return run


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a clone, with the data that a user would provide."""
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
    """Runs the commands of a page in order; returns their number."""
    ran = 0
    for line in commands_of(page):
        words = shlex.split(line.partition("#")[0])
        if words[:2] != ["python", "-m"]:
            assert words[0] in ("make", "vllm"), f"{line}: no test runs it"
            continue
        if words[2] == "xlam_jax.plan":
            if "v5p:4x4x4" in words:  # compiled in tests/test_plan.py
                words[words.index("v5p:4x4x4")] = "gpu:h100:64"
            words += ["--estimate"] * any(word.startswith("gpu:") for word in words)
        elif "mixtral_8x7b_sft" in line or words[2] == "xlam_jax.launch":  # checked up to the devices
            words.append("--print-config")
        elif "quickstart_dpo" in line:  # the shorter of its two sources
            pairs = "[{name: hotpotqa, files: [examples/dpo/hotpotqa.jsonl], format: pairs}]"
            words += ["train.steps=3", "data.sequence_length=1024", f"data.sources={pairs}"]
        elif "xlam_jax.train" in line and "--print-config" not in line:
            words += TINY
        if any(word.startswith("mesh.cpu_devices") for word in words):  # set before JAX starts
            command = [sys.executable, *words[1:]]
            done = subprocess.run(command, cwd=folder, env=commands.environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr}"
        else:
            commands.call(*words[2:], folder=folder)
        ran += 1
    return ran


def test_commands_of_the_readme_run(commands: Commands, clone: Path, quickstart: Path):
    shutil.copytree(quickstart, clone / "runs/quickstart")
    shutil.copytree(quickstart / "hf", clone / "weights/Mixtral-8x7B-v0.1")
    assert run_page("README.md", commands, clone) >= 8


ELSEWHERE = {"docs/benchmarks.md", "docs/conformance.md", "docs/demo.md"}
"""Pages whose commands need a server, other tools or a download; separate tests run them without."""


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"README.md"} - ELSEWHERE))
def test_commands_of_the_pages_run(commands: Commands, clone: Path, quickstart: Path, page: str):
    shutil.copytree(quickstart, clone / "runs/quickstart")
    assert run_page(page, commands, clone)


def test_snippets_of_the_training_page_are_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each resolves on top of a preset."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```yaml\n(.*?)^```$", PAGES["docs/training.md"], re.DOTALL | re.MULTILINE)
    for at, block in enumerate(blocks):
        path = tmp_path / f"{at}.yaml"
        path.write_text(f"extends: {ROOT}/configs/mistral_7b_sft.yaml\n{block}", encoding="utf-8")
        configs.load(path)
    assert len(blocks) >= 3


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_config_is_in_a_table():
    tables = "".join(line for page in PAGES.values() for line in page.splitlines() if line.startswith("|"))
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`configs/{path.name}`" in tables
