"""Which checkpoints are kept."""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from xlam_jax.training.checkpoint import Checkpoints, better, load_params, open_params, restore


def steps_of(run: Path) -> list[int]:
    return sorted(int(entry.name) for entry in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(("metric", "best"), [("heldout.loss", 2), ("requests.exact", 4)])
def test_the_best_is_kept_beside_the_newest(tmp_path: Path, metric: str, best: int):
    values = {1: 0.5, 2: 0.1, 3: None, 4: 0.9, 5: 0.5, 6: 0.6}

    def opened() -> Checkpoints:
        return Checkpoints(tmp_path, keep=1, metadata={}, best=metric)

    saves = opened()
    for step, value in values.items():
        if step == 4:  # a run that is continued still knows the best
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
    """And on a mesh each device's part of a layer: an export reads no more than it asks for."""
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
