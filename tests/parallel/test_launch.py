"""Runs of several processes: the losses do not depend on their number, and each reads checkpoints of the others."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT, Commands, deadline, same_arrays, train_losses

from xlam_jax import config as configs
from xlam_jax import launch, train
from xlam_jax.errors import UserError
from xlam_jax.parallel import distributed
from xlam_jax.progress import Progress
from xlam_jax.signals import Stop
from xlam_jax.training.facts import facts_of_run

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
    """One process of several: trains on each mesh, then loads checkpoints of other runs and saves them on the next
    mesh."""
    place = distributed.Place("test", "localhost", task["port"], task["processes"], task["process"])
    root, meshes = Path(task["root"]), task["meshes"]
    first = resolve(task, root, {})
    with (
        distributed.join(place if place.processes > 1 else None, 120, facts_of_run(first)) as hosts,
        Progress(quiet=not hosts.first) as progress,
        Stop() as stop,
    ):
        for name, mesh in meshes.items():
            train.train(resolve(task, root / name, mesh), root / name, progress, hosts, stop)
        from xlam_jax.training.restore import restore_newest
        from xlam_jax.training.save import Checkpoints
        from xlam_jax.training.setup import set_up

        for other in task["others"]:
            for name, mesh in zip(meshes, [*list(meshes.values())[1:], *meshes.values()], strict=False):
                target = set_up(resolve(task, root, mesh), progress)
                saved = restore_newest(
                    Path(other) / name,
                    STEPS,
                    target.state.trees(),
                    on_damage="error",
                    hosts=hosts,
                    report=progress.line,
                )
                again = Checkpoints(root / "again" / Path(other).name / name, keep=1, metadata={})
                again.save(STEPS, saved.items, saved.data)
                again.wait()
                again.close()


def run(environment: dict[str, str], config: Path, root: Path, processes: int, devices: int, **task: Any) -> None:
    """Runs `work` in `processes` processes with `devices` devices each."""
    task |= {"root": str(root), "config": str(config), "processes": processes, "devices": devices}
    task["port"] = launch.free_ports()
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__)), json.dumps(task | {"process": process})],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    said = [process.communicate(timeout=deadline(900))[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)


def arrays(run: Path) -> dict[str, Any]:
    """Returns all arrays of a checkpoint, on one device."""
    import jax
    from orbax.checkpoint import v1 as ocp

    path = str((run / "checkpoints" / str(STEPS)).absolute())
    items = ocp.checkpointables_metadata(path).metadata
    like = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), dict(items))
    return ocp.load_checkpointables(path, like)


@pytest.mark.parametrize(
    ("visible", "processes", "share", "expected"),
    [
        ("0,1,2,3", 2, None, ["0,1", "2,3"]),
        ("0,1,2,3", 2, 1, ["0", "1"]),
        ("5,2,7", 3, None, ["5", "2", "7"]),
        ("0,1,2", 2, None, ["0", "1"]),
        ("", 2, None, None),
        ("-1", 2, None, None),
    ],
)
def test_gpus_are_dealt(visible: str, processes: int, share: int | None, expected: list[str] | None):
    gpus = launch.visible_gpus({"CUDA_VISIBLE_DEVICES": visible})
    assert (launch.divide_gpus(gpus, processes, share) if gpus else None) == expected


def test_gpus_that_may_not_be_used():
    assert launch.visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": "cpu"}) == []


@pytest.mark.parametrize(("processes", "share", "needed"), [(3, None, 3), (1, 3, 3), (2, 2, 4)])
def test_too_few_gpus(processes: int, share: int | None, needed: int):
    with pytest.raises(UserError, match=f"need {needed}, and 2 are visible"):
        launch.divide_gpus(["0", "1"], processes, share)


CALLED = ["--processes", 2, "--"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --processes"),
        (["--processes", 2], "-- is missing; the arguments of python -m xlam_jax.train must follow it"),
        (["--processes", 2, "--config", "x"], "-- is missing"),
        (["--processes", 0, "--", "--config", "x"], "argument --processes: '0' is not a whole number of 1 or more"),
        (["--processes", 2, "--devices-per-process", "two", "--"], "'two' is not a whole number of 1 or more"),
        ([*CALLED, "--confi"], "usage: python -m xlam_jax.train"),
        ([*CALLED, "--config", "nowhere.yaml"], "error: nowhere.yaml: no such file"),
        ([*CALLED, "--config", "CONFIG", "mesh.fsd=2"], "unknown key mesh.fsd; did you mean 'fsdp'?"),
        ([*CALLED, "--config", "CONFIG", "--process-id", 0], "--process-id are set by this command; remove them"),
        ([*CALLED, "--config", "CONFIG", "output_dir=tests"], "tests exists and is not a run of this program"),
    ],
)
def test_wrong_input(commands: Commands, short_config: Path, arguments: list[object], message: str):
    words = [short_config if word == "CONFIG" else word for word in arguments]
    said = commands.call("xlam_jax.launch", *words, code=2).stderr
    assert said.count("error: ") == 1, said
    assert message in said


def test_the_config_is_shown_once(commands: Commands, short_config: Path):
    said = commands.call("xlam_jax.launch", *CALLED, "--config", short_config, "--print-config").stdout
    assert said.count("train.batch_size") == 1


CHILD = """
import sys, time
from pathlib import Path
process, case = int(sys.argv[1]), sys.argv[2]
print("[Gloo] Rank 0 is connected to 1 peer ranks.", flush=True)
print(f"hello from {process}", flush=True)
if case == "reported by 0":
    time.sleep(0.5 * (process == 0))  # the other one fails first
    print(f"error: {process} says why\\nin two lines", file=sys.stderr)
    sys.exit(2)
if case == "killed":
    if process == 0:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    print("error: host 0 closed its connection without a message\\nreally", file=sys.stderr)
    sys.exit(3)
if case in ("an error of 2", "stopped"):
    time.sleep(0.3 * process)  # the others end first
    sys.exit({"an error of 2": [3, 75, 1], "stopped": [3, 75, 75]}[case][process])
if case == "stays":
    Path(str(process)).touch()
    while not all(Path(str(other)).exists() for other in range(3)):  # all have said hello
        time.sleep(0.01)
    time.sleep(600 * process)
    sys.exit(1)
"""


@pytest.mark.parametrize(
    ("case", "code", "out", "err"),
    [
        ("well", 0, "hello from 0\n", ["[1] hello from 1", "[2] hello from 2"]),
        (
            "reported by 0",
            2,
            "hello from 0\n",
            ["[1] hello from 1", "[2] hello from 2", "error: 0 says why", "in two lines"],
        ),
        (
            "killed",
            137,
            "hello from 0\n",
            [
                "[1] hello from 1",
                "[2] hello from 2",
                "[1] error: host 0 closed its connection without a message",
                "really",
            ],
        ),
        ("an error of 2", 1, "hello from 0\n", ["[1] hello from 1", "[2] hello from 2"]),
        ("stopped", 75, "hello from 0\n", ["[1] hello from 1", "[2] hello from 2"]),
        (
            "stays",
            1,
            "hello from 0\n",
            ["[1] hello from 1", "[2] hello from 2", "launch: process 1, 2 did not end within 1 s, killed"],
        ),
    ],
)
def test_what_processes_say_and_how_they_end(
    environment: dict[str, str], tmp_path: Path, case: str, code: int, out: str, err: list[str]
):
    """`launch` with fake training commands."""
    (tmp_path / "child.py").write_text(CHILD)
    program = (
        f"import sys; from xlam_jax import launch; launch.GRACE = {1.0 if case == 'stays' else deadline(5)}\n"
        f"commands = [[sys.executable, {str(tmp_path / 'child.py')!r}, str(at), {case!r}] for at in range(3)]\n"
        "sys.exit(launch.Processes(commands, [None] * 3).wait())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, out), done.stderr
    assert sorted(done.stderr.replace("[2] error", "[1] error").splitlines()) == sorted(err)


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
