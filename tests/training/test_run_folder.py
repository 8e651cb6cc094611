"""The run folder: what is refused, and what an earlier start has left."""

import json
from pathlib import Path

import pytest

from xlam_jax import config as configs
from xlam_jax.errors import UserError
from xlam_jax.parallel.link import Hosts
from xlam_jax.training.run_folder import check_run_folder, newest_step, read_run


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[1]", '{"started": 3}', "\x00\xff"),
        *('{"cpu_threads": 8}', '{"cpu_threads": ["8"]}', '{"cpu_threads": [0]}', '{"data_changes": {}}'),
    ],
)
def test_an_unreadable_run_json_is_reported_and_stops_nothing(tmp_path: Path, content: str):
    said: list[str] = []
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    assert read_run(tmp_path / "run.json", said.append) == {}
    assert len(said) == 1
    assert "run.json: can't be read" in said[0]
    assert read_run(tmp_path / "none.json", said.append) == {}
    assert len(said) == 1
    good = {"started": ["2026-01-01"], "cpu_threads": [2]}
    (tmp_path / "run.json").write_text(json.dumps(good), encoding="utf-8")
    assert read_run(tmp_path / "run.json", said.append) == good


def test_a_folder_of_anything_else_is_refused(tiny_config: Path, tmp_path: Path):
    resolved = configs.load(tiny_config, [f"output_dir={tmp_path}"])
    for leftover in ("config.yaml.part", ".lock"):  # a run that was killed before it wrote its config
        (tmp_path / leftover).touch()
    check_run_folder(tmp_path, resolved)
    check_run_folder(tmp_path / "new", resolved)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=f"output_dir: {tmp_path} exists and is not a run of this program"):
        check_run_folder(tmp_path, resolved)
    with pytest.raises(UserError, match=r"notes\.txt exists and is not a run"):
        check_run_folder(tmp_path / "notes.txt", resolved)


def test_a_run_of_another_config_is_refused(tiny_config: Path, tmp_path: Path):
    resolved = configs.load(tiny_config, [f"output_dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(configs.to_yaml(resolved.config), encoding="utf-8")
    check_run_folder(tmp_path, resolved)  # killed before it wrote config.json
    check_run_folder(tmp_path, configs.load(tiny_config, [f"output_dir={tmp_path}", "eval.every=7"]))
    with pytest.raises(UserError, match="seed: 0 in the run, 1 now"):
        check_run_folder(tmp_path, configs.load(tiny_config, [f"output_dir={tmp_path}", "seed=1"]))
    other = resolved._replace(hf_config=resolved.hf_config | {"rope_theta": 5.0})
    (tmp_path / "config.json").write_text(json.dumps(resolved.hf_config), encoding="utf-8")
    check_run_folder(tmp_path, resolved)
    with pytest.raises(UserError, match=r"rope_theta is \S+ in the run, 5.0 now"):
        check_run_folder(tmp_path, other)


def test_the_newest_complete_step_is_found(tmp_path: Path):
    said: list[str] = []
    assert newest_step(tmp_path, Hosts(), said.append) == 0
    for step in (3, 12):
        (tmp_path / "checkpoints" / str(step) / "params").mkdir(parents=True)
    (tmp_path / "checkpoints/20").mkdir()
    assert newest_step(tmp_path, Hosts(), said.append) == 12
    assert not said
