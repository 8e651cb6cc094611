"""Which checkpoints are kept."""

import errno
import math
import os
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from xlam_jax.errors import UserError
from xlam_jax.training.restore import restore
from xlam_jax.training.save import Checkpoints, better, is_evaluated
from xlam_jax.weights.checkpoint import load_params, open_params


def steps_of(run: Path) -> list[int]:
    return sorted(int(entry.name) for entry in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(("metric", "best"), [("heldout.loss", 2), ("requests.exact", 4)])
def test_the_best_is_kept_beside_the_newest(tmp_path: Path, metric: str, best: int):
    values = {1: 0.5, 2: 0.1, 3: None, 4: 0.9, 5: 0.5, 6: 0.6}

    def opened() -> Checkpoints:
        return Checkpoints(tmp_path, keep=1, metadata={}, best=metric)

    saves = opened()
    for step, value in values.items():
        if step == 4:  # a resumed run remembers the best step
            saves.close()
            saves = opened()
        saves.save(step, {"params": {"w": jnp.full(3, step)}}, {})
        if value is not None:
            saves.record(step, {metric: value, "other": math.nan})
            assert len(saves.steps()) <= 2
        saves.wait()
    assert saves.best() == (best, values[best])
    assert saves.steps()[-1] == 6
    saves.close()
    assert steps_of(tmp_path) == [best, 6]


def test_losses_are_to_be_low_and_shares_high():
    assert better("heldout.sources.webshop.loss", 1.0, 2.0)
    assert better("heldout.kl", 1.0, 2.0)
    assert better("requests.exact", 0.5, 0.4)
    assert not better("heldout.loss", 1.0, 1.0)


def test_an_average_is_what_is_loaded(tmp_path: Path):
    saves = Checkpoints(tmp_path, keep=1, metadata={})
    saves.save(1, {"params": {"w": jnp.zeros(2)}, "ema": {"w": jnp.ones(2)}}, {"s": "place"})
    saves.wait()
    saves.close()
    restored = restore(tmp_path / "checkpoints" / "1", {"params": {"w": jnp.zeros(2)}, "ema": {"w": jnp.zeros(2)}})
    assert restored.data == {"s": "place"}
    assert restored.items["params"]["w"].tolist() == [0, 0]
    assert load_params(tmp_path / "checkpoints" / "1")["w"].tolist() == [1, 1]


def test_large_parameters_are_stored_by_layers(tmp_path: Path):
    """On a mesh, each device stores its part of a layer: an export reads no more than it needs."""
    blocks = {
        "w1": jnp.arange(3 * 2 * 1024 * 1024, dtype=jnp.float32).reshape(3, 2, 1024, 1024),
        "q": jnp.zeros((4, 1024, 2, 1, 1024)),
        "mlp_norm": jnp.ones((4, 8)),
    }
    saves = Checkpoints(tmp_path, keep=1, metadata={})
    saves.save(1, {"params": {"blocks": blocks, "head": jnp.zeros((2048, 2048))}}, {})
    saves.close()
    stored = open_params(tmp_path / "checkpoints" / "1")
    chunks = {name: one._store.chunk_layout.read_chunk.shape for name, one in stored["blocks"].items()}
    assert chunks == {"w1": (1, 1, 1024, 1024), "q": (1, 1024, 2, 1, 1024), "mlp_norm": (4, 8)}
    assert stored["head"]._store.chunk_layout.read_chunk.shape == (2048, 2048)
    assert np.array_equal(stored["blocks"]["w1"][2, 1], blocks["w1"][2, 1])


def test_a_save_leaves_no_file_and_no_thread_open(tmp_path: Path):
    saves = Checkpoints(tmp_path, keep=1, metadata={})
    counts = set()
    for step in range(1, 9):
        saves.save(step, {"params": {"w": jnp.full(3, step)}}, {})
        saves.wait()
        counts.add((len(os.listdir("/proc/self/fd")), threading.active_count()))
    saves.close()
    assert len(counts) == 1 or max(counts)[0] - min(counts)[0] <= 2, counts  # not three files for each save


OUT_OF_MEMORY = ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"the disk is full \(\d+\.\d MB free\), the checkpoint could not be written; step 1 is whole"),
        (errno.EDQUOT, "the disk quota is used up, the checkpoint could not be written; step 1 is whole"),
        (errno.EFBIG, "a file is larger than allowed here, the"),
        (errno.EMFILE, r"too many open files, the .* Raise the limit \(ulimit -n\)"),
    ],
)
@pytest.mark.parametrize("by", ["system", "tensorstore"])
def test_what_keeps_a_checkpoint_from_being_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str, by: str
):
    saves = Checkpoints(tmp_path, keep=1, metadata={})
    saves.save(1, {"params": {"w": jnp.zeros(3)}}, {})
    saves.wait()
    fault = OSError(number, os.strerror(number))
    if by == "tensorstore":
        fault = ValueError(f"RESOURCE_EXHAUSTED: Failed writing: {os.strerror(number)} [os_error_code='{number}']")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the save failed") from fault

    monkeypatch.setattr(saves._orbax, "save_checkpointables_async", fail)
    with pytest.raises(UserError, match=message):
        saves.save(2, {"params": {"w": jnp.zeros(3)}}, {})
    fault = OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match="the save failed"):
        saves.save(2, {"params": {"w": jnp.zeros(3)}}, {})
    saves.close()


def test_a_damaged_record_of_an_evaluation_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saves = Checkpoints(tmp_path, keep=1, metadata={}, best="heldout.loss")
    saves.save(1, {"params": {"w": jnp.zeros(3)}}, {})
    saves.wait()
    assert not is_evaluated(tmp_path / "checkpoints/1")
    saves.record(1, {"heldout.loss": 0.5})
    saves.close()
    assert is_evaluated(tmp_path / "checkpoints/1")
    file = tmp_path / "checkpoints/1/evaluation.json"
    file.write_text(file.read_text().replace("0.5", "0.4"))
    saves = Checkpoints(tmp_path, keep=1, metadata={}, best="heldout.loss")
    assert saves.best() is None
    saves.close()
    assert not is_evaluated(tmp_path / "checkpoints/1")
    assert f"warning: {file}: damaged" in capsys.readouterr().err
