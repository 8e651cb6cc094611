"""Configs of earlier and later versions, and strings that YAML would read as other types."""

from pathlib import Path

import pytest
import yaml
from support import ROOT

from xlam_jax import config as configs
from xlam_jax.config.migrations import MIGRATIONS, Migration, apply
from xlam_jax.errors import UserError


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def saved() -> dict:
    return yaml.safe_load(configs.to_yaml(configs.load(Path("configs/quickstart.yaml")).config))


def test_a_saved_config_has_the_number_of_its_schema(saved: dict):
    assert saved["schema"] == configs.SCHEMA
    assert configs.from_saved(saved, "run").train.steps == saved["train"]["steps"]


def test_there_is_a_migration_from_every_earlier_schema():
    assert sorted(MIGRATIONS) == list(range(configs.SCHEMA))


def test_a_config_of_schema_0_is_migrated(saved: dict):
    del saved["schema"]
    saved["train"]["ema"] = None
    assert configs.from_saved(saved, "run").train.ema == 0.0


def test_a_config_of_schema_1_is_migrated():
    """tests/saved/schema_1.yaml is the config.yaml of a run of the version before schema 2."""
    path = ROOT / "tests/saved/schema_1.yaml"
    old = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert old.pop("schema_version") == 1
    config = configs.read_saved(path)
    assert config.schema_number == configs.SCHEMA
    values = configs.to_values(config)
    added = {
        "schema", "export", "epochs", "warmup_ratio", "chat_template", "added_tokens", "train_tokens", "reasoning",
        "unreadable_calls",
        "compiler_options",
    }  # fmt: skip
    for section in (values, values["model"], values["train"], values["data"], values["data"]["loss"], values["lora"]):
        for name in added & section.keys():
            section.pop(name)
    assert values == old
    overrides = ["train.steps=4", "train.warmup_steps=1", "train.batch_size=2", "data.streams=2",
                 "data.sequence_length=512", "model.overrides.num_hidden_layers=1"]  # fmt: skip
    assert configs.differences(config, configs.load(Path("configs/quickstart.yaml"), overrides).config) == []


def test_files_of_earlier_schemas_are_migrated_and_extended(tmp_path: Path):
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: {ROOT}/tests/saved/schema_1.yaml\ntrain: {{steps: 9}}\n", encoding="utf-8")
    resolved = configs.load(child)
    assert (resolved.config.train.steps, resolved.config.schema_number) == (9, configs.SCHEMA)
    child.write_text("extends: other.yaml\n", encoding="utf-8")
    (tmp_path / "other.yaml").write_text("schema: 99\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"other\.yaml: schema is 99, and this version of xlam_jax reads schemas up to"):
        configs.load(child)


def test_a_migration_renames_and_replaces_values_in_sections():
    migration = Migration(renamed={"a.b": "c.d.e", "gone": "here"}, replaced={"c.d.e": {1: "one"}})
    assert apply(migration, {"a": {"b": 1, "x": 2}}) == {"a": {"x": 2}, "c": {"d": {"e": "one"}}}
    assert apply(migration, {"a": 3, "gone": [1]}) == {"a": 3, "here": [1]}
    assert apply(migration, {"c": {"d": {"e": [1]}}}) == {"c": {"d": {"e": [1]}}}


def test_an_unknown_key_of_a_saved_config_is_one_message(saved: dict):
    saved["train"]["momentum_of_old"] = 1
    with pytest.raises(UserError, match=r"(?s)run: unknown key train\.momentum_of_old .*another version of xlam_jax"):
        configs.from_saved(saved, "run")
    with pytest.raises(UserError, match="schema is 99, and this version of xlam_jax reads schemas up to"):
        configs.from_saved(saved | {"schema": 99}, "run")
    with pytest.raises(UserError, match="schema_version is 99, and this version of xlam_jax reads schemas up to"):
        configs.from_saved({name: saved[name] for name in saved if name != "schema"} | {"schema_version": 99}, "run")


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
    with pytest.raises(UserError, match="aliases expand to more than"):
        configs.load(tmp_path / "config.yaml")


def test_dates_and_numbers_in_names_stay_texts():
    overrides = ["output_dir=2026-01-31", "track.name='1e5'"]
    config = configs.load(Path("configs/quickstart.yaml"), overrides).config
    assert (config.output_dir, config.track.name) == ("2026-01-31", "1e5")
    assert configs.from_saved(yaml.safe_load(configs.to_yaml(config)), "run") == config
