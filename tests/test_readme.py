"""The README's commands: those that need no foreign weights are run as they stand there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from support import ROOT, Commands

README = (ROOT / "README.md").read_text(encoding="utf-8")


def readme_commands() -> list[str]:
    """Each command line of the README's plain code blocks, continuations joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    plain = [block.replace("\\\n", " ") for language, block in blocks if not language]
    return [line.strip() for block in plain for line in block.splitlines() if line.strip()]


def test_commands_run(commands: Commands, tmp_path: Path):
    """A copy of the folder stands in for the clone; weights and data that a user would bring are made."""
    for entry in ("configs", "examples", "Makefile", "xlam_jax", "converters", "serving"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    tiny = ["train.steps=3", "train.warmup_steps=0", "model.overrides.num_hidden_layers=1", "data.sequence_length=512"]
    commands.run(
        "xlam_jax.train", "--config", "configs/quickstart.yaml", f"output_dir={tmp_path}/runs/quickstart", *tiny
    )
    weights = tmp_path / "weights/Mixtral-8x7B-v0.1"
    commands.run("converters.orbax_to_hf", "--checkpoint", tmp_path / "runs/quickstart", "--out", weights)
    (tmp_path / "mine.jsonl").write_bytes((ROOT / "examples/quickstart/hammer.jsonl").read_bytes())

    ran = 0
    for line in readme_commands():
        words = shlex.split(line.partition("#")[0])
        if words[:2] != ["python", "-m"]:
            assert words[0] in ("make", "vllm"), f"{line}: no test runs it"
            continue
        if "mixtral_8x7b_sft" in line:  # the real run, checked up to the devices
            words.append("--print-config")
        if "runs/mesh" in line:
            words += [*tiny, "train.steps=1"]
        result = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={**commands.environment, "PYTHONPATH": os.pathsep.join([str(ROOT)])},
        )  # fmt: skip
        assert result.returncode == 0, f"{line}\n{result.stderr}"
        ran += 1
    assert ran >= 5


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_config_is_in_the_table():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`configs/{path.name}`" in README
