"""Configs of earlier and later versions, and texts that YAML takes for something else."""

from pathlib import Path

import pytest
import yaml
from support import ROOT

from xlam_jax import config as configs
from xlam_jax.errors import UserError


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def saved() -> dict:
    return yaml.safe_load(configs.to_yaml(configs.load(Path("configs/quickstart.yaml")).config))


def test_a_saved_config_has_the_number_of_its_schema(saved: dict):
    assert saved["schema_version"] == configs.SCHEMA
    assert configs.from_saved(saved, "run").train.steps == saved["train"]["steps"]


def test_a_config_of_schema_0_is_migrated(saved: dict):
    del saved["schema_version"]
    saved["train"]["ema"] = None
    assert configs.from_saved(saved, "run").train.ema == 0.0


def test_an_unknown_key_of_a_saved_config_is_one_message(saved: dict):
    saved["train"]["momentum_of_old"] = 1
    with pytest.raises(UserError, match=r"(?s)run: unknown key train\.momentum_of_old .*another version of xlam_jax"):
        configs.from_saved(saved, "run")
    with pytest.raises(UserError, match="schema_version is 99, and this version of xlam_jax reads schemas up to"):
        configs.from_saved(saved | {"schema_version": 99}, "run")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: 7", "extends is 7; the path of a YAML config"),
        ("extends: [a.yaml]", "extends is .'a.yaml'.; the path of a YAML config"),
        ('output_dir: "a\\0b"', "contains a NUL character"),
        ("output_dir: a\0b", "not valid YAML"),
        ("train: " + "[" * 3000, "nested too deeply"),
        ("a: &a [x]\n" + "\n".join(f"b{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'}, *a]" for i in range(99)), "deep"),
        ("seed: 9" + "9" * 5000, "not valid YAML"),
        ("seed: !!timestamp 2026-99-99", "not valid YAML"),
    ],
    ids=range(8),
)
def test_malformed_configs_are_one_message(text: str, expected: str, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=expected):
        configs.load(tmp_path / "config.yaml")


def test_aliases_that_stand_for_billions_are_refused(tmp_path: Path):
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "config.yaml").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(UserError, match="aliases stand for more than"):
        configs.load(tmp_path / "config.yaml")


def test_dates_and_numbers_in_names_stay_texts():
    overrides = ["output_dir=2026-01-31", "track.name='1e5'"]
    config = configs.load(Path("configs/quickstart.yaml"), overrides).config
    assert (config.output_dir, config.track.name) == ("2026-01-31", "1e5")
    assert configs.from_saved(yaml.safe_load(configs.to_yaml(config)), "run") == config
