"""The export at the end of a run, and a run without evaluation whose length is given in epochs."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT, Commands

from xlam_jax import config as configs
from xlam_jax import export
from xlam_jax.errors import UserError
from xlam_jax.export import check_export, export_after
from xlam_jax.parallel.link import Hosts


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


def load(run: Path, *overrides: str) -> configs.Config:
    return configs.load(Path("configs/quickstart.yaml"), [f"output_dir={run}", *overrides]).config


def test_a_run_does_not_begin_with_a_folder_in_the_way(tmp_path: Path):
    run, folder = tmp_path / "run", tmp_path / "hf"
    config = load(run, f"export={folder}", "train.steps=30")
    check_export(config, run / "config.yaml")
    folder.mkdir()
    for step in (None, 20):  # not started, and interrupted
        if step:
            (run / f"checkpoints/{step}").mkdir(parents=True)
            (run / "config.yaml").write_text(configs.to_yaml(config), encoding="utf-8")
        with pytest.raises(UserError, match="exists already, and the run is not finished"):
            check_export(config, run / "config.yaml")
    (run / "checkpoints/30").mkdir()
    check_export(config, run / "config.yaml")


def test_the_first_host_exports_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    commands: list[Any] = []

    def record(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(export.subprocess, "run", record)
    assert export_after(load(tmp_path), tmp_path, Hosts()) == 0
    assert not commands
    assert export_after(load(tmp_path, "export=true"), tmp_path, Hosts()) == 2
    flags = ["converters.orbax_to_hf", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "hf")]
    assert commands == [flags]
    assert f"export: failed; the run itself is finished. Export it with: -m {' '.join(flags)}" in capfd.readouterr().err
    (tmp_path / "hf").mkdir()
    assert export_after(load(tmp_path, "export=true"), tmp_path, Hosts()) == 0
    assert "exists already; not written again" in capfd.readouterr().out


@pytest.mark.slow
def test_a_run_of_epochs_without_evaluation_is_exported(commands: Commands, tiny_config: Path, tmp_path: Path):
    run = tmp_path / "run"
    flags = ("--config", tiny_config, f"output_dir={run}", "train.steps=null", "train.epochs=0.15", "eval.every=0",
             "train.warmup_steps=0", "train.warmup_ratio=0.5", "export=true")  # fmt: skip
    output = commands.run("xlam_jax.train", *flags).stderr
    saved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    steps = saved["train"]["steps"]
    assert f"train.epochs 0.15: {steps} steps" in output
    assert saved["train"]["epochs"] is None
    assert saved["train"]["warmup_steps"] == -(-steps // 2)
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kinds == ["train"] * steps
    assert (run / "hf/model.safetensors").is_file()
    again = commands.run("xlam_jax.train", *flags)
    assert "is finished" in again.stderr
    assert "exists already; not written again" in again.stdout
    other = commands.fails("xlam_jax.train", *flags, "train.epochs=0.4")
    assert "train.steps:" in other
