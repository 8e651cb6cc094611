"""`model.init_from`: weights whose own config.json describes another computation are refused."""

import json
import shutil
from pathlib import Path

import pytest

from xlam_jax import config as configs
from xlam_jax.errors import UserError
from xlam_jax.weights import run as weights


def test_weights_of_another_config(tiny_config: Path, exported: Path, trained: tuple[Path, str], tmp_path: Path):
    start = shutil.copytree(exported, tmp_path / "start")
    hf = json.loads((start / "config.json").read_text())

    def resolve(*overrides: str) -> configs.Resolved:
        return configs.load(tiny_config, [f"model.init_from={start}", *overrides])

    assert weights.read_base(resolve()) is not None
    (start / "config.json").write_text(json.dumps(hf | {"rope_theta": 5e6, "sliding_window": 64}))
    with pytest.raises(UserError) as error:
        weights.read_base(resolve())
    assert weights.read_base(resolve(), exporting=True) is not None
    assert f"rope_theta is 10000.0 in configs/models/tiny_mixtral.json and 5000000.0 in {start}/config.json" in str(
        error.value
    )
    assert f"sliding_window is None in configs/models/tiny_mixtral.json and 64 in {start}/config.json" in str(
        error.value
    )
    assert f"set model.config to {start}" in str(error.value)
    assert (
        weights.read_base(resolve("model.overrides.rope_theta=2e4", "model.overrides.sliding_window=null")) is not None
    )

    run = [f"model.init_from={trained[0]}"]
    assert weights.read_base(configs.load(tiny_config, run)) is not None
    wider = tmp_path / "tiny.json"
    wider.write_text(
        json.dumps(json.loads(Path("configs/models/tiny_mixtral.json").read_text()) | {"rms_norm_eps": 1e-6})
    )
    with pytest.raises(UserError, match=r"norm_eps is 1e-06 in .* and 1e-05 in"):
        weights.read_base(configs.load(tiny_config, [*run, f"model.config={wider}"]))
