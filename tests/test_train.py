"""The training command from a user's view: start, kill, resume, other meshes, invalid input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, Commands, assert_same_run, same_arrays, train_losses

from xlam_jax import config as configs
from xlam_jax.outputs import locked
from xlam_jax.weights import checkpoint
from xlam_jax.weights import run as weights

TRAIN = "xlam_jax.train"


def final_state(run: Path) -> object:
    """Returns the parameters of the last checkpoint."""
    return checkpoint.load_params(checkpoint.resolve(run))


def terminate(number: signal.Signals = signal.SIGTERM) -> None:
    """Sends a signal to the run in this process."""
    signal.raise_signal(number)


def interrupt() -> None:
    """Ends the run in this process like an error in the middle of it."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("dtype", "kills"),
    # Before the first checkpoint (3), and in the middle of a later interval.
    [("float32", [2, 7]), pytest.param("bfloat16", [2, 4, 8], marks=pytest.mark.slow)],
)
def test_killed_runs_end_with_the_same_bits(
    commands: Commands, tiny_config: Path, trained: tuple[Path, str], tmp_path: Path, dtype: str, kills: list[int]
):
    whole, killed = trained[0], tmp_path / "killed"
    common = ("--config", tiny_config, f"model.compute_dtype={dtype}")
    if dtype != "float32":  # the dtype of the tiny run
        whole = tmp_path / "whole"
        commands.run(TRAIN, *common, f"output_dir={whole}")
    for step in kills:
        commands.kill(TRAIN, *common, f"output_dir={killed}", at=f"step {step}/10  loss")
    result = commands.run(TRAIN, *common, f"output_dir={killed}")
    assert re.search(r"continuing \S+ after step [369]\n", result.stderr)
    assert_same_run(whole, killed)
    assert list(train_losses(whole)) == list(range(1, 11))


def test_sigterm_saves_and_the_run_continues(commands: Commands, tiny_config: Path, tmp_path: Path):
    run = tmp_path / "run"
    common = ("--config", tiny_config, f"output_dir={run}", "checkpoint.every=1000")
    stopped = 0
    for step in (2, 6):
        err = commands.call(TRAIN, *common, at={f"step {step}/10  loss": terminate}, code=75).stderr
        assert not stopped or f"continuing {run} after step {stopped}" in err
        stopped = int(re.findall(r"stopped by SIGTERM after step (\d+), saved", err)[0])
        assert step < stopped < 10
        assert checkpoint.resolve(run).name == str(stopped)
    assert list(train_losses(run)) == list(range(1, stopped + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_save_as_sigterm_does(
    commands: Commands, tiny_config: Path, tmp_path: Path, number: signal.Signals
):
    run = tmp_path / "run"
    common = ("--config", tiny_config, f"output_dir={run}", "checkpoint.every=1000")
    before = signal.signal(number, signal.SIG_DFL)  # it is ignored if the tests run in the background
    try:
        err = commands.call(TRAIN, *common, at={"step 2/10  loss": lambda: terminate(number)}, code=75).stderr
    finally:
        signal.signal(number, before)
    stopped = re.findall(rf"stopped by {number.name} after step (\d+), saved", err)
    assert checkpoint.resolve(run).name == stopped[0]


def test_a_step_is_saved_before_its_evaluation(
    commands: Commands, tiny_config: Path, trained: tuple[Path, str], tmp_path: Path
):
    """A run that ends during the evaluation repeats only that: no record is duplicated or missing."""
    run = tmp_path / "run"
    common = ("--config", tiny_config, f"output_dir={run}")
    commands.call(TRAIN, *common, at={"step 10/10  held-out": interrupt}, code=130)
    again = commands.call(TRAIN, *common).stderr
    assert f"continuing {run} after step 10\n" in again
    assert_same_run(trained[0], run)
    evaluation = json.loads((run / "checkpoints/10/evaluation.json").read_text(encoding="utf-8"))
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert evaluation["metrics"]["heldout.loss"] == last["loss"]
    assert "is finished: 10 of 10 steps" in commands.call(TRAIN, *common).stderr


def test_what_can_be_checked_is_checked_before_the_data(commands: Commands, tiny_config: Path, tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text("{broken\n")
    bad = ("--config", tiny_config, f"data.sources=[{{name: bad, files: [{tmp_path}/bad.jsonl]}}]")
    message = commands.fails(TRAIN, *bad, f"output_dir={tmp_path}/run", "model.init_from=nowhere")
    assert "nowhere" in message
    assert "bad.jsonl" not in message
    message = commands.fails(TRAIN, *bad, f"output_dir={tmp_path}/bad.jsonl/run")
    assert f"output_dir: {tmp_path}/bad.jsonl/run can't be written (Not a directory)" in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_second_run_in_one_folder_is_refused(commands: Commands, tiny_config: Path, tmp_path: Path):
    with locked(tmp_path / "run", "output_dir", print):
        message = commands.fails(TRAIN, "--config", tiny_config, f"output_dir={tmp_path}/run")
    assert f"output_dir: {tmp_path}/run is in use by process {os.getpid()} on " in message


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 4}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
    ],
    ids=lambda axes: "-".join(f"{axis}{size}" for axis, size in axes.items()),
)
def test_meshes_agree(
    commands: Commands, tiny_config: Path, trained: tuple[Path, str], tmp_path: Path, axes: dict[str, int]
):
    on_mesh, whole = tmp_path / "on_mesh", trained[0]
    common = ("--config", tiny_config, "checkpoint.every=100", "eval.every=100")
    if axes.get("data", 1) * axes["fsdp"] > 4:  # more than the tiny run's batch has rows
        whole, common = tmp_path / "whole", (*common, "train.batch_size=8", "data.streams=8")
        commands.run(TRAIN, *common, f"output_dir={whole}")
    sizes = [f"mesh.{axis}={size}" for axis, size in axes.items()]
    commands.run(TRAIN, *common, f"output_dir={on_mesh}", "mesh.cpu_devices=8", *sizes)
    actual, expected = train_losses(on_mesh), train_losses(whole)
    assert actual.keys() == expected.keys()
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=1e-5)
    # its weights can be loaded on any other devices
    other = configs.load(tiny_config, [f"model.init_from={on_mesh}"])
    assert same_arrays(weights.read_base(other), final_state(on_mesh))


def test_one_compilation_of_the_step(trained: tuple[Path, str]):
    assert len(re.findall(r"Compiling jit\(step\)", trained[1])) == 1


def test_a_run_is_told_and_recorded(commands: Commands, tiny_config: Path, trained: tuple[Path, str], tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, said = trained
    assert re.search(
        r"step 7/10  loss [\d.]+  [\d,]+ tok/s  trained \d+%  lr [\d.e-]+  grad norm [\d.]+  left \d+:\d\d",
        said,
    )
    assert "\x1b" not in said  # plain lines without a terminal
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("train/loss")] == list(range(1, 11))
    assert [point.step for point in events.Scalars("heldout/loss")] == [0, 5, 10]
    kept = sorted(int(step.name) for step in (run / "checkpoints").iterdir())
    assert kept == [9, 10]
    shutil.copytree(run, tmp_path / "run")
    again = commands.call(TRAIN, "--config", tiny_config, f"output_dir={tmp_path / 'run'}")
    assert "is finished: 10 of 10 steps" in again.stderr


def test_another_config_in_the_folder_is_refused(
    commands: Commands, tiny_config: Path, tmp_path: Path, trained: tuple[Path, str]
):
    common = ("--config", tiny_config, f"output_dir={trained[0]}")
    message = commands.fails(TRAIN, *common, "train.learning_rate=1e-4", "eval.every=7")
    assert "train.learning_rate: 0.005 in the run, 0.0001 now" in message
    assert "eval.every" not in message
    message = commands.fails(TRAIN, *common, "model.overrides.num_hidden_layers=1")
    assert "num_hidden_layers" in message
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    assert "not a run" in commands.fails(TRAIN, "--config", tiny_config, f"output_dir={tmp_path / 'other'}")


@pytest.mark.slow  # training/test_accumulation.py has the same of the step itself
def test_microbatches_give_the_gradient_of_the_whole(commands: Commands, tiny_config: Path, tmp_path: Path):
    losses = {}
    for parts in (1, 4):
        run = tmp_path / str(parts)
        commands.run(
            TRAIN, "--config", tiny_config, f"output_dir={run}", f"train.microbatches={parts}",
            "train.router_aux_weight=0", "checkpoint.every=100", "eval.every=100",
        )  # fmt: skip
        losses[parts] = list(train_losses(run).values())
    np.testing.assert_allclose(losses[4], losses[1], rtol=1e-5)


GOOD = json.loads(min((ROOT / "examples/quickstart/hammer.jsonl").read_text(encoding="utf-8").splitlines(), key=len))
NO_ANSWER = {**GOOD, "conversation": [{"role": "user", "content": "Hello?"}]}
UNDECLARED = json.loads(json.dumps(GOOD))
for turn in UNDECLARED["conversation"]:
    for call in turn.get("tool_calls", []):
        call["function"]["name"] += "s"


BAD = [
    ("{broken", "malformed-json"),
    (json.dumps(NO_ANSWER), "no-assistant-turn"),
    (json.dumps(UNDECLARED), "undeclared-tool"),
]


def good_rows() -> list[str]:
    return [json.dumps({**GOOD, "unique_trajectory_id": str(at)}) for at in range(30)]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_bad_rows(commands: Commands, tiny_config: Path, tmp_path: Path, line: str, reason: str):
    rows, file = good_rows(), tmp_path / "rows.jsonl"
    file.write_text("\n".join([*rows[:2], line, *rows[2:]]) + "\n", encoding="utf-8")
    message = commands.fails(
        TRAIN, "--config", tiny_config, f"output_dir={tmp_path / 'run'}",
        f"data.sources=[{{name: mine, files: [{file}]}}]",
    )  # fmt: skip
    assert f"{file}:3: {reason}: " in message
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_dropped_on_request(commands: Commands, tiny_config: Path, tmp_path: Path):
    rows, file = good_rows(), tmp_path / "rows.jsonl"
    file.write_text("\n".join([*rows[:2], *(line for line, _ in BAD), *rows[2:]]) + "\n", encoding="utf-8")
    # two sources, as in the tiny config: the step is compiled already
    sources = (
        f"[{{name: mine, files: [{file}], weight: 2}}, {{name: more, files: [examples/quickstart/seal_tools.jsonl]}}]"
    )
    said = commands.call(
        TRAIN, "--config", tiny_config, f"output_dir={tmp_path / 'run'}", f"data.sources={sources}",
        "data.on_invalid=drop", at={"step 1/10  loss": terminate}, code=75,
    ).stderr  # fmt: skip
    dropped = re.search(r"mine: .* dropped: (.*)", said)
    assert dropped
    assert set(dropped[1].split(", ")) == {f"1 {reason}" for _, reason in BAD}


def test_wrong_input(commands: Commands, tiny_config: Path, tmp_path: Path):
    common = ("--config", tiny_config, f"output_dir={tmp_path / 'run'}")
    assert "no such file" in commands.fails(TRAIN, "--config", "configs/quickstrat.yaml")
    missing = commands.fails(TRAIN, *common, "data.sources=[{name: a, files: [nowhere.jsonl]}]")
    assert "nowhere.jsonl" in missing
    assert "no such folder" in commands.fails(TRAIN, *common, "model.init_from=nowhere")
    mesh = commands.fails(TRAIN, *common, "mesh.fsdp=2", "mesh.data=2")
    assert "data 2 × fsdp 2 × expert 1 × context 1 × tensor 1 does not fit the 1 cpu device(s)" in mesh
    tokens = commands.fails(TRAIN, *common, "model.overrides.vocab_size=100")
    assert "2048 tokens, more than the model's vocab_size, 100" in tokens
    assert not (tmp_path / "run").exists()


def test_weights_of_another_model_are_refused(
    commands: Commands, tiny_config: Path, tmp_path: Path, trained: tuple[Path, str]
):
    message = commands.fails(
        TRAIN, "--config", tiny_config, f"output_dir={tmp_path / 'other'}", f"model.init_from={trained[0]}",
        "model.overrides.intermediate_size=32",
    )  # fmt: skip
    assert "checkpoint of another model" in message
    assert "blocks.w1 is (2, 4, 32, 64) in the checkpoint and (2, 4, 32, 32) in the model" in message


@pytest.mark.parametrize("kind", ["orbax", "hf"])
def test_init_from_starts_with_those_weights(
    commands: Commands, tiny_config: Path, tmp_path: Path, trained: tuple[Path, str], exported: Path, kind: str
):
    source, again = {"orbax": trained[0], "hf": exported}[kind], tmp_path / "again"
    common = ("--config", tiny_config, f"output_dir={again}", f"model.init_from={source}")
    commands.call(TRAIN, *common, at={"step 0/10": terminate}, code=75)
    last = json.loads((trained[0] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    first = json.loads((again / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert (first["step"], first["kind"], last["kind"]) == (0, "heldout", "heldout")
    assert first["loss"] == pytest.approx(last["loss"], rel=1e-6)


def test_the_trained_export_is_the_trained_model(trained: tuple[Path, str], exported: Path):
    import jax
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from xlam_jax.generate import find_model

    tokenizer = AutoTokenizer.from_pretrained(exported)
    request = json.loads((ROOT / "examples/quickstart/request.json").read_text(encoding="utf-8"))
    tools = json.loads((ROOT / "examples/quickstart/tools.json").read_text(encoding="utf-8"))
    prompt = tokenizer.apply_chat_template(request["messages"], tools=tools, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        hf_logits = AutoModelForCausalLM.from_pretrained(exported).eval()(**prompt).logits.numpy()
    tokens_BT = prompt["input_ids"].numpy()
    model = find_model(trained[0]).load()
    positions_BT = np.arange(tokens_BT.shape[1])[None]
    ours = jax.jit(lambda: model.logits(model(tokens_BT, positions_BT, np.ones_like(tokens_BT))[0]))()
    np.testing.assert_allclose(ours, hf_logits, atol=1e-4 * np.abs(hf_logits).max())


def test_full_disk_keeps_the_previous_checkpoint(commands: Commands, tiny_config: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # The test runs in a separate mount namespace, with a small disk that disappears with it.
    script = f"""
        mount -t tmpfs -o size=4m tmpfs {disk} || exit 90
        {sys.executable} -m {TRAIN} --config {tiny_config} output_dir={disk}/run checkpoint.every=2 checkpoint.keep=9
        echo "train ended with $?"
        {sys.executable} -c "
from pathlib import Path
from xlam_jax import config as configs
from xlam_jax.weights import checkpoint
from xlam_jax.weights import run as weights
step = checkpoint.resolve(Path('{disk}/run'))
checkpoint.load_params(step)
print('loadable step', step.name)"
    """
    result = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script],
        cwd=ROOT, env=commands.environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "train ended with 2" in result.stdout, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert re.search(r"error: .*the disk is full .* step (\d+) is whole and stays", result.stderr)
    assert re.search(r"loadable step \d+", result.stdout)


def test_config_errors_and_help_answer_at_once(commands: Commands, tiny_config: Path):
    for arguments in (
        ("--help",),
        ("--config", tiny_config, "train.stepz=3"),
        ("--config", tiny_config, "--print-config"),
    ):
        before = os.times()
        subprocess.run([sys.executable, "-m", TRAIN, *map(str, arguments)], cwd=ROOT, capture_output=True, check=False)
        now = os.times()  # CPU time, because the machine may be busy
        took = now.children_user + now.children_system - before.children_user - before.children_system
        assert took < 2, (arguments, took)
