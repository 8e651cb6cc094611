"""Runs of several processes: the same losses however many there are, and each reads what the others saved."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT, Commands, same_arrays, train_losses

from xlam_jax import config as configs
from xlam_jax import launch, train
from xlam_jax.errors import UserError
from xlam_jax.parallel import distributed
from xlam_jax.training.progress import Progress

STEPS = 20
MESHES = {axis: {axis: 8} for axis in ("fsdp", "tensor", "expert", "context")}
DEVICES = [(1, 8), (2, 4), (4, 2)]
"""Processes × devices of each."""
OWN = ["model.overrides.num_hidden_layers=2", "train.batch_size=8", f"train.steps={STEPS}", f"checkpoint.every={STEPS}"]


def resolve(task: dict[str, Any], run: Path, mesh: dict[str, int]) -> configs.Resolved:
    axes = [f"mesh.{axis}={size}" for axis, size in ({"fsdp": 1} | mesh).items()]
    devices = f"mesh.cpu_devices={task['devices']}"
    return configs.load(Path(task["config"]), [*OWN, f"output_dir={run}", devices, *axes])


def work(task: dict[str, Any]) -> None:
    """One process of several: trains on each mesh, then saves again, on the next mesh, what other runs saved."""
    place = distributed.Place("test", "localhost", task["port"], task["processes"], task["process"])
    root, meshes = Path(task["root"]), task["meshes"]
    first = resolve(task, root, {})
    with (
        distributed.join(place if place.processes > 1 else None, 120, first) as hosts,
        Progress(quiet=not hosts.first) as progress,
    ):
        for name, mesh in meshes.items():
            train.train(resolve(task, root / name, mesh), root / name, progress, hosts)
        from xlam_jax.training import checkpoint
        from xlam_jax.training.setup import set_up

        for other in task["others"]:
            for name, mesh in zip(meshes, [*list(meshes.values())[1:], *meshes.values()], strict=False):
                made = set_up(resolve(task, root, mesh), progress)
                saved = checkpoint.Checkpoints(Path(other) / name, keep=1, metadata={})
                state, data = saved.restore(STEPS, train._items(made.state))
                saved.close()
                again = checkpoint.Checkpoints(root / "again" / Path(other).name / name, keep=1, metadata={})
                again.save(STEPS, state, data)
                again.wait()
                again.close()


def run(
    environment: dict[str, str], config: Path, root: Path, processes: int, devices: int, **task: Any
) -> None:
    """Runs `work` in so many processes with so many devices each."""
    task |= {"root": str(root), "config": str(config), "processes": processes, "devices": devices}
    task["port"] = launch.free_ports()
    env = environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__)), json.dumps(task | {"process": process})],
            cwd=ROOT,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    said = [process.communicate(timeout=900)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)


def arrays(run: Path) -> dict[str, Any]:
    """All that a checkpoint holds, on one device."""
    import jax
    from orbax.checkpoint import v1 as ocp

    path = str((run / "checkpoints" / str(STEPS)).absolute())
    items = ocp.checkpointables_metadata(path).metadata
    like = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), dict(items))
    return ocp.load_checkpointables(path, like)


@pytest.mark.slow
def test_any_number_of_processes_trains_alike(environment: dict[str, str], short_config: Path, tmp_path: Path):
    roots = [tmp_path / f"{processes}x{devices}" for processes, devices in DEVICES]
    for at, (processes, devices) in enumerate(DEVICES):
        others = [str(root) for root in roots[:at]]
        run(environment, short_config, roots[at], processes, devices, meshes=MESHES, others=others)
    alone, *several = roots
    for name in MESHES:
        expected = train_losses(alone / name)
        assert sorted(expected) == list(range(1, STEPS + 1))
        assert expected[STEPS] < expected[1] - 0.5
        for root in several:
            losses = train_losses(root / name)
            difference = max(abs(losses[step] - expected[step]) for step in expected)
            print(f"{root.name} {name}: {difference:.1e}")
            assert difference <= 1e-6, (root.name, name)
    for at, root in enumerate(roots):
        for other in roots[:at]:
            for name in MESHES:
                saved, again = arrays(other / name), arrays(root / "again" / other.name / name)
                assert saved.keys() == {"params", "opt", "data"}
                assert same_arrays(saved, again), (root.name, other.name, name)


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
