"""The training step of every preset compiles for every TPU at ordinary batch sizes."""

from pathlib import Path

import pytest
from support import ROOT

from xlam_jax import config as configs
from xlam_jax import plan as plans
from xlam_jax.planning.hardware import parse

PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith("quickstart"))
CHIPS = {"v5e:2x4": 8, "v5p:2x2x2": 8, "v6e:2x4": 8}
ONE_LAYER = "model.overrides.num_hidden_layers=1"
"""All layers are alike, and the shapes of kernels don't depend on their number."""


@pytest.mark.slow
@pytest.mark.usefixtures("offline_compiler")
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("topology", CHIPS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_step_compiles(preset: str, topology: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    """The step compiles, or exceeds the device's memory; it never exceeds the memory of a kernel."""
    monkeypatch.chdir(ROOT)
    count = CHIPS[topology]
    overrides = [f"train.batch_size={rows * count}", f"data.streams={count}", "train.microbatches=1", ONE_LAYER]
    overrides += [f"mesh.{axis}=1" for axis in ("data", "expert", "tensor", "context")] + ["mesh.fsdp=-1"]
    resolved = configs.load(Path(f"configs/{preset}.yaml"), overrides)
    place = parse(topology)
    plan = plans.plan(resolved, place, plans.make_layout(resolved, place))
    print(f"{preset} {topology} {rows}: {plan.outcome} {plan.cause or ''} {plan.compile_seconds:.0f} s")
    assert plan.outcome in ("compiled", "device-memory"), plan.cause
