"""Damaged checkpoints are refused by name, or an older one is used; wrong values are never read."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import KINDS, bits, copy, damage, files_of, flip, outcome, read_for_export, resumed
from support import ROOT, Commands, same_arrays, train_losses

from xlam_jax import config as configs
from xlam_jax.enums import STEPS_FOLDER
from xlam_jax.errors import UserError
from xlam_jax.parallel.link import Hosts
from xlam_jax.progress import Progress
from xlam_jax.training.metrics import Metrics, read
from xlam_jax.training.restore import Restored, restore, restore_newest
from xlam_jax.training.save import Checkpoints
from xlam_jax.weights import checkpoint
from xlam_jax.weights import run as weights
from xlam_jax.weights.checkpoint import DamagedError, load_params, open_params

TRAIN, EXPORT = "xlam_jax.train", "converters.orbax_to_hf"
ITEMS: dict[str, Any] = {
    "params": {"blocks": {"q": jnp.arange(4096.0).reshape(2, 64, 32)}, "norm": jnp.ones(32)},
    "opt": {
        "count": jnp.int32(3),
        "mu": jnp.ones((64, 8), jnp.bfloat16),
        "nu": jnp.full((64,), 0.5, jnp.float8_e4m3fn),
    },
    "ema": {"blocks": {"q": jnp.arange(4096.0).reshape(2, 64, 32) / 7}, "norm": jnp.ones(32)},
}


def small_run(run: Path, steps: tuple[int, ...] = (1, 2), keep: int = 5) -> Path:
    saves = Checkpoints(run, keep=keep, metadata={"config": None, "base": "a base"})
    for step in steps:
        saves.save(step, jax.tree.map(lambda leaf, step=step: leaf * step, ITEMS), {"stream": step})
        saves.wait()
    saves.close()
    return run


def newest(run: Path, on_damage: Any = "fallback", at: int = 99) -> tuple[Restored, list[str]]:
    said: list[str] = []
    return restore_newest(run, at, ITEMS, on_damage=on_damage, hosts=Hosts(), report=said.append), said


def data_file(step_dir: Path, item: str) -> Path:
    """Returns the file that contains most of an item's values."""
    return max((path for path in (step_dir / item).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_what_was_saved_is_what_is_restored(tmp_path: Path):
    run = small_run(tmp_path)
    restored = restore(run / "checkpoints/2", ITEMS)
    assert same_arrays(restored.items, jax.tree.map(lambda leaf: leaf * 2, ITEMS))
    assert (restored.step, restored.data) == (2, {"stream": 2})
    assert same_arrays(load_params(run / "checkpoints/2"), jax.tree.map(lambda leaf: leaf * 2, ITEMS["ema"]))


@pytest.mark.parametrize("item", ["params", "opt", "ema", "data"])
def test_flips_in_every_item_are_detected(tmp_path: Path, item: str):
    run = small_run(tmp_path)
    step, messages = run / "checkpoints/2", []
    files = [path for path in sorted((step / item).rglob("*")) if path.is_file()]

    def read_step() -> Any:
        try:
            restored = restore(step, ITEMS)
        except DamagedError as error:
            messages.append(str(error))
            raise
        return bits(restored.items), restored.data

    intact = read_step()
    for file in files:
        content = file.read_bytes()
        for at in {len(content) // 3, len(content) // 2}:
            flip(file, at, at % 8)
            assert outcome(read_step, {"harmless": intact}) in ("harmless", "refused")
            file.write_bytes(content)
    assert messages
    for message in messages:
        assert message.startswith(f"{step} is damaged: ")
        assert message.endswith("give another step of this run (1), which is verified in turn")


def values_with_a_flip(step_dir: Path, item: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flips a bit of one value after it is read, so that no file format can detect it."""
    read_values = checkpoint.StoredParameter._raw

    def flipped(self: Any, at: Any) -> np.ndarray:
        values = read_values(self, at).copy()
        if self._item == item and self._step_dir == step_dir and values.size:
            values.reshape(-1).view(np.uint8)[-1] ^= 1
        return values

    monkeypatch.setattr(checkpoint.StoredParameter, "_raw", flipped)


@pytest.mark.parametrize("item", ["params", "opt", "ema"])
def test_a_value_that_differs_by_a_bit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, item: str):
    run = small_run(tmp_path)
    values_with_a_flip(run / "checkpoints/2", item, monkeypatch)
    with pytest.raises(DamagedError, match=f"the values of {item}/.* differ from the checksums of what was saved"):
        restore(run / "checkpoints/2", ITEMS)
    restored, said = newest(run)
    assert (restored.step, restored.data) == (1, {"stream": 1})
    assert f"{run}/checkpoints/2 is damaged: the values of {item}/" in said[0]
    assert said[0].endswith("it is kept as 2.damaged")
    assert said[1] == f"continuing from {run}/checkpoints/1, the newest intact checkpoint"


def test_every_way_of_reading_parameters_verifies_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step = small_run(tmp_path) / "checkpoints/2"
    q, norm = (open_params(step)[name] for name in ("blocks", "norm"))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert np.array_equal(q["q"][1], 2 * np.asarray(ITEMS["ema"]["blocks"]["q"][1]))
    assert np.array_equal(q["q"][0:2, 3], 2 * np.asarray(ITEMS["ema"]["blocks"]["q"][:, 3]))
    assert q["q"].astype(jnp.bfloat16).placed(place).dtype == jnp.bfloat16
    values_with_a_flip(step, "ema", monkeypatch)
    for read_some in (
        lambda: q["q"][1],
        lambda: q["q"][0:2, 3],
        lambda: np.asarray(norm),
        lambda: q["q"].placed(place),
        lambda: q["q"].astype(jnp.bfloat16).placed(place),
        lambda: load_params(step),
    ):
        with pytest.raises(DamagedError, match=r"checkpoints/2 is damaged: the values of ema/\S+ differ"):
            read_some()


@pytest.mark.parametrize("kind", ["delete", "cut in half", "empty", "zeros", "a digit", "the digest's name", "a list"])
def test_damaged_metadata_are_never_taken_for_none(tmp_path: Path, kind: str):
    run = small_run(tmp_path)
    note = run / "checkpoints/2/_CHECKPOINT_METADATA"
    text = note.read_text()
    if kind == "a digit":
        note.write_text(text.replace('"a base"', '"b base"'))
    elif kind == "the digest's name":
        note.write_text(text.replace('"digest"', '"dIgest"'))
    elif kind == "a list":
        note.write_text("[1]")
    else:
        damage(note, kind, "")
    for read_step in (checkpoint.load_metadata, load_params, weights.saved_run, lambda step: restore(step, ITEMS)):
        with pytest.raises(DamagedError, match=r"checkpoints/2 is damaged: .*_CHECKPOINT_METADATA"):
            read_step(run / "checkpoints/2")
    restored, said = newest(run)
    assert restored.metadata["base"] == "a base"
    assert (restored.step, len(said)) == (1, 2)
    small_run(run, (2,))  # its number is saved again
    assert newest(run)[0].step == 2
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == ["1", "2", "2.damaged"]


def test_error_stops_and_nothing_intact_stops(tmp_path: Path):
    run = small_run(tmp_path)
    (run / "checkpoints/2/_CHECKPOINT_METADATA").unlink()
    with pytest.raises(UserError, match=r"2 is damaged: .* is missing; set checkpoint.on_damage=fallback"):
        newest(run, "error")
    shutil.rmtree(run / "checkpoints/1/opt")
    with pytest.raises(UserError, match="no checkpoint is intact") as refusal:
        newest(run)
    for part in ("2 is damaged: _CHECKPOINT_METADATA is missing", "1 is damaged: opt/_METADATA can't be read"):
        assert part in str(refusal.value)
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == ["1", "2"]


def test_foreign_entries_are_ignored(tmp_path: Path):
    run = small_run(tmp_path, (1, 2, 3), keep=2)
    folder = run / "checkpoints"
    (folder / "notes.txt").write_text("a note")
    (folder / "99").mkdir()
    (folder / "77").write_text("a note")
    shutil.copytree(folder / "3", folder / "007")
    shutil.copytree(folder / "3", folder / "9.damaged")
    (folder / "٣").mkdir()
    (folder / "11.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.whole_steps(run) == [2, 3]
    assert checkpoint.resolve(run).name == "3"
    assert newest(run)[0].step == 3
    small_run(run, (4,), keep=2)
    assert checkpoint.whole_steps(run) == [3, 4]
    assert {"notes.txt", "99", "77", "007", "9.damaged", "٣"} <= {entry.name for entry in folder.iterdir()}
    checkpoint.check_names(run, range(5, 50))
    for name in ("77", "99"):
        with pytest.raises(UserError, match=f"checkpoints/{name}: not a checkpoint, but it has the name of one"):
            checkpoint.check_names(run, range(5, 100) if name == "99" else range(5, 80))


def without_checksums(step_dir: Path) -> None:
    """Removes the checksums, as in checkpoints of an earlier version."""
    note = step_dir / "_CHECKPOINT_METADATA"
    content = json.loads(note.read_text())
    for key in (checkpoint.ARRAYS, checkpoint.FILES, checkpoint.DIGEST, checkpoint.METRICS):
        content["custom_metadata"].pop(key, None)
    note.write_text(json.dumps(content))


def test_older_checkpoints_open_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = small_run(tmp_path)
    monkeypatch.setattr(checkpoint.warn_unverified, "printed", False)
    for step in (1, 2):
        without_checksums(run / "checkpoints" / str(step))
    restored, said = newest(run)
    assert same_arrays(restored.items, jax.tree.map(lambda leaf: leaf * 2, ITEMS))
    warning = f"{run}/checkpoints/2: saved by an earlier version, without checksums: damage can't be detected"
    assert said == [f"warning: {warning}"]
    assert newest(run)[1] == []
    assert same_arrays(load_params(run / "checkpoints/2"), restored.items["ema"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(checkpoint.warn_unverified, "printed", False)
    load_params(run / "checkpoints/2")
    load_params(run / "checkpoints/1")
    assert capsys.readouterr().err == f"warning: {warning}\n"


def test_a_run_falls_back_and_ends_with_the_same_bits(
    commands: Commands, tiny_config: Path, trained: tuple[Path, str], tmp_path: Path
):
    run = copy(trained[0], tmp_path / "run")
    file = data_file(run / "checkpoints/10", "opt")
    flip(file, file.stat().st_size // 2)
    shutil.rmtree(run / "tokenizer")  # a run loads the config's tokenizer, and writes it again
    common = ("--config", tiny_config, f"output_dir={run}")
    refusal = commands.fails(TRAIN, *common, "checkpoint.on_damage=error")
    assert re.search(rf"{run}/checkpoints/10 is damaged: .*opt/", refusal)
    said = commands.call(TRAIN, *common).stderr
    assert re.search(rf"{run}/checkpoints/10 is damaged: .*opt/", said)
    assert f"continuing from {run}/checkpoints/9, the newest intact checkpoint" in said
    assert f"continuing {run} after step 9" in said
    assert train_losses(run) == train_losses(trained[0])
    actual, expected = (load_params(checkpoint.resolve(folder)) for folder in (run, trained[0]))
    assert same_arrays(actual, expected)
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == ["10", "10.damaged", "9"]
    for step in ("9", "10"):
        checkpoint.check_files(run / "checkpoints" / step)
    # a finished run keeps the files: another version might write files that its checkpoints do not name
    file = run / "tokenizer/tokenizer_config.json"
    content = file.read_bytes()
    file.write_bytes(content + b"\n")
    assert "written again" not in commands.call(TRAIN, *common).stderr
    assert file.read_bytes() == content + b"\n"
    shutil.rmtree(run / "tokenizer")
    assert "is finished" in commands.call(TRAIN, *common).stderr
    assert file.read_bytes() == content


def test_files_beside_the_steps_are_verified(tmp_path: Path):
    (tmp_path / "tokenizer").mkdir()
    files = [tmp_path / "tokenizer/tokenizer.json", tmp_path / "generation_config.json"]
    for file in files:
        file.write_text('{"eos_token_id": 2}')
    step = small_run(tmp_path) / "checkpoints/2"
    assert checkpoint.load_generation_config(step) == {"eos_token_id": 2}
    for file in files:
        file.write_text('{"eos_token_id": 3}')
        for read_file in (checkpoint.load_generation_config, checkpoint.tokenizer_dir):
            with pytest.raises(UserError, match=f"{file}: missing, damaged or changed since {step} was saved"):
                read_file(step)
        assert newest(tmp_path)[0].step == 2  # neither is used in training
        file.write_text('{"eos_token_id": 2}')
    checkpoint.check_files(step)


def test_an_export_of_damaged_files_is_refused(commands: Commands, trained: tuple[Path, str], tmp_path: Path):
    run, out = copy(trained[0], tmp_path / "run"), tmp_path / "out"
    file = data_file(run / "checkpoints/10", "params")
    content = file.read_bytes()
    flip(file, len(content) // 2)
    for folder in (run, run / "checkpoints/10"):
        refusal = commands.fails(EXPORT, "--checkpoint", folder, "--out", out)
        assert re.search(rf"{run}/checkpoints/10 is damaged: .*params/", refusal)
        assert "give another step of this run (9), which is verified in turn" in refusal
    file.write_bytes(content)
    for name, old, new, expected in (
        ("config.json", b"32", b"36", f"{run}/config.json: not the config that {run}/checkpoints/10 was saved with"),
        ("tokenizer/tokenizer.json", b"a", b"e", f"{run}/tokenizer/tokenizer.json: missing, damaged or changed since"),
    ):
        kept = (run / name).read_bytes()
        (run / name).write_bytes(kept.replace(old, new, 1))
        assert expected in commands.fails(EXPORT, "--checkpoint", run, "--out", out)
        (run / name).write_bytes(kept)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]  # neither an output nor a partial one
    damage(run / "config.yaml", "zeros", "")
    refusal = commands.fails(TRAIN, "--config", ROOT / "configs/quickstart.yaml", f"output_dir={run}")
    assert f"{run}/config.yaml: not valid YAML: " in refusal


def test_a_corrupt_line_of_metrics_keeps_the_lines_after_it(tmp_path: Path):
    lines = [json.dumps({"step": step, "kind": "train", "loss": step / 8}) for step in range(1, 9)]
    lines[2] = '{"step": 3, "kind": "tr\0in", "lo'
    lines[4] = '{"step": "5"}'
    lines[5] = "\udcff".join(lines[5])
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "ki', errors="surrogateescape")
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 4, 7, 8]

    class Lines(Progress):
        said: list[str]

        def line(self, text: str) -> None:
            self.said.append(text)

    progress = Lines(quiet=True)
    progress.said = []
    Metrics(tmp_path, start=7, steps=9, places=1, progress=progress, log_every=1).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 4, 7]
    assert progress.said == [
        f"warning: {tmp_path}/metrics.jsonl: line 3 is not valid JSON; line 5 is not a record with a step; "
        "line 6 is not valid JSON: removed; the other lines are kept"
    ]


# ---- every kind of damage to every file ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(commands: Commands, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    commands.call("converters.hf_to_orbax", "--hf", exported, "--out", out)
    return out


def test_damage_to_a_converted_model_is_refused(converted: Path, tmp_path: Path):
    for name, kind in (
        ("config.json", "zeros"),
        ("checkpoints/0/_CHECKPOINT_METADATA", "flip"),
        ("checkpoints/0/params/blocks.q/c/1/0/0/0/0", "flip"),
        ("checkpoints/0/params/blocks.q/zarr.json", "cut in half"),
        ("checkpoints/0/params/head/c/0/0", "delete"),
    ):
        run = copy(converted, tmp_path / "copy")
        damage(run / name, kind, name)
        with pytest.raises(UserError, match=str(tmp_path)):
            read_for_export(run)
    run = copy(converted, tmp_path / "copy")
    hf_config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(hf_config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(UserError, match=r"rms_norm_eps is 0.001 there and 1e-05 in the checkpoint; restore the file"):
        read_for_export(run)


def after_damage(
    run: Path, file: Path, kind: str, resumes: dict[str, Any], exports: dict[str, Any], items: Any = None
) -> str:
    """Returns the outcomes of an export and a resume of a run with a damaged file, and restores the file."""
    content = (run / file).read_bytes()
    damage(run / file, kind, str(file))
    result = outcome(lambda: read_for_export(run), exports)
    if items is not None:
        result += f", {outcome(lambda: resumed(run, items), resumes)}"
    for aside in (run / STEPS_FOLDER).glob("*.damaged"):
        aside.rename(aside.with_suffix(""))
    (run / file).write_bytes(content)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_no_damage_restores_different_values(
    commands: Commands, tiny_config: Path, trained: tuple[Path, str], exported: Path, tmp_path: Path, trainable: str
):
    from xlam_jax.training.setup import set_up

    run, overrides = trained[0], []
    if trainable == "lora":
        run = tmp_path / "lora"
        overrides = ["train.trainable=lora", "train.moments=8bit", "train.ema=0.5", "train.steps=4", "eval.every=100"]
        overrides.append(f"model.init_from={exported}")
        commands.call(TRAIN, "--config", tiny_config, f"output_dir={run}", *overrides)
    setup = set_up(configs.load(tiny_config, [f"output_dir={run}", *overrides]), Progress(quiet=True))
    items = setup.state.trees()
    older, last = checkpoint.whole_steps(run)[-2:]
    run = copy(run, tmp_path / "copy")
    resumes = {"harmless": resumed(run, items)}
    (run / f"checkpoints/{last}").rename(tmp_path / "newest")
    resumes["falls back"] = resumed(run, items)
    (tmp_path / "newest").rename(run / f"checkpoints/{last}")
    assert [result[0] for result in resumes.values()] == [last, older]
    exports = {"harmless": read_for_export(run)}
    tally: Counter[tuple[str, str]] = Counter()
    others = []
    for file in files_of(run, str(last)):
        for kind in KINDS:
            result = after_damage(run, file, kind, resumes, exports, items)
            tally[kind, result] += 1
            if "OTHER" in result:
                others.append((str(file), kind, result))
    for (kind, result), count in sorted(tally.items()):
        print(f"{trainable:5} {kind:15} {result:24} {count}")
    assert not others
    assert tally.total() >= 120


@pytest.mark.slow
def test_no_damage_of_a_converted_model_reads_different_values(converted: Path, tmp_path: Path):
    exports = {"harmless": read_for_export(converted)}
    tally: Counter[tuple[str, str]] = Counter()
    run = copy(converted, tmp_path / "copy")
    for file in files_of(run, "0"):
        if file.parts[0] != checkpoint.TOKENIZER:  # a user may change the one of a converted model
            for kind in KINDS:
                tally[kind, after_damage(run, file, kind, {}, exports)] += 1
    for (kind, result), count in sorted(tally.items()):
        print(f"converted {kind:15} {result:10} {count}")
    assert {result for _, result in tally} <= {"harmless", "refused"}
