"""Conversions stream weights a few tensors at a time: bounded memory, and resumable after a kill."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_models
import torch
from safetensors.numpy import load_file, save_file
from support import ROOT, Commands, same_arrays, wait_until

from converters import orbax_to_hf
from xlam_jax.errors import UserError
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.params import shapes
from xlam_jax.outputs import resumable_folder
from xlam_jax.parallel import mesh as meshes
from xlam_jax.parallel.placement import place
from xlam_jax.weights import checkpoint, shards
from xlam_jax.weights.hf import HFWeights, load_hf
from xlam_jax.weights.hf_map import tensors
from xlam_jax.weights.logits import compare_logits

TO_ORBAX, TO_HF = "converters.hf_to_orbax", "converters.orbax_to_hf"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded Mixtral in bfloat16."""
    folder = tmp_path_factory.mktemp("weights") / "hf"
    model = tiny_models.hf_model("mixtral", num_local_experts=4).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="module")
def converted(mixtral: Path, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Mixtral as an Orbax checkpoint."""
    folder = tmp_path_factory.mktemp("orbax") / "model"
    output = commands.call(TO_ORBAX, "--hf", mixtral, "--out", folder, "--verify").stdout
    assert "verified: 41 tensors equal the source's, bit for bit" in output
    assert "verified: the logits of 32 tokens are those of transformers" in output
    return folder


def test_orbax_reads_what_was_written_layer_by_layer(mixtral: Path, converted: Path):
    step = checkpoint.resolve(converted)
    assert same_arrays(checkpoint.load_params(step), load_hf(mixtral)[1])


@pytest.mark.parametrize("start", ["hf", "orbax"])
def test_weights_are_placed_from_their_files(mixtral: Path, converted: Path, start: str):
    opened = HFWeights(mixtral)
    params = opened.params() if start == "hf" else checkpoint.open_params(checkpoint.resolve(converted))
    mesh = meshes.make_mesh({}, jax.devices()[:1])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=jax.NamedSharding(mesh, jax.P())),
        shapes(opened.config),
    )
    expected = jax.tree.map(lambda array: array.astype(np.float32), load_hf(mixtral)[1])
    assert same_arrays(place(params, like), expected)


def test_a_host_reads_only_what_its_devices_hold(mixtral: Path, eight_devices: dict[str, str]):
    """Shards weights over eight devices of one process along all weight axes: each shard equals its slice."""
    script = """
import sys, jax, numpy as np
from xlam_jax.weights.hf import HFWeights, load_hf
from xlam_jax.models.params import logical_axes
from xlam_jax.parallel.mesh import make_mesh, spec
opened = HFWeights(sys.argv[1])
mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
is_leaf = lambda node: isinstance(node, tuple)
def check(axes, parameter, whole):
    axes = [axis.replace("vocab", "norm") for axis in axes]  # 97 tokens are not divisible
    placed = parameter.placed(jax.NamedSharding(mesh, spec(axes, mesh)))
    assert placed.addressable_shards[0].data.shape != whole.shape or "norm" in axes
    np.testing.assert_array_equal(np.asarray(placed), whole)
jax.tree.map(check, logical_axes(opened.config), opened.params(), load_hf(sys.argv[1])[1], is_leaf=is_leaf)
"""
    command = [sys.executable, "-c", script, mixtral]
    process = subprocess.run(command, env=eight_devices, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("direction", ["to-orbax", "to-hf"])
def test_a_killed_conversion_is_resumed(
    mixtral: Path, converted: Path, tmp_path: Path, commands: Commands, direction: str
):
    out = tmp_path / "out"
    command = (
        [TO_ORBAX, "--hf", mixtral, "--out", out, "--workers", 1]
        if direction == "to-orbax"
        else [TO_HF, "--checkpoint", converted, "--out", out, "--max-shard-size", "40KB", "--workers", 1]
    )
    slow = (
        "import runpy, sys, time\n"
        "from xlam_jax.outputs import ResumableFolder\n"
        "finish = ResumableFolder.finish\n"
        "parts = []\n"
        "def slow(work, part):\n"
        "    finish(work, part)\n"
        "    parts.append(part)\n"
        "    time.sleep(600 * (len(parts) == 3))\n"
        "ResumableFolder.finish = slow\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_module(sys.argv[0], run_name='__main__')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, *map(str, command)], env=commands.environment, cwd=ROOT)
    journal = tmp_path / ".out.part" / ".done"
    wait_until(lambda: journal.exists() and len(journal.read_text().splitlines()) == 3, within=120)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    finished = journal.read_text().splitlines()
    assert 3 == len(finished) < len(HFWeights(mixtral).sources)

    output = commands.call(*command)
    assert "MB are there already" in output.stderr
    assert not (tmp_path / ".out.part").exists()
    assert not [path for path in out.rglob(".*") if path.is_file()]
    if direction == "to-orbax":
        assert same_arrays(checkpoint.load_params(checkpoint.resolve(out)), load_hf(mixtral)[1])
    else:
        assert same_arrays(load_hf(out)[1], load_hf(mixtral)[1])


def test_an_unfinished_output_of_another_source_is_kept(tmp_path: Path):
    out = tmp_path / "out"

    def interrupted() -> None:
        with resumable_folder(out, {"hf": "one"}) as work:
            (work.folder / "precious").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(UserError, match="hf was 'one' and is 'other'"), resumable_folder(out, {"hf": "other"}):
        pass
    with resumable_folder(out, {"hf": "one"}) as work:
        assert (work.folder / "precious").exists()
        with pytest.raises(UserError, match="another process"), resumable_folder(out, {"hf": "one"}):
            pass
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_memory_is_bounded_by_a_few_tensors(tmp_path: Path, commands: Commands):
    """The peak memory does not grow with the number of layers."""
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 512, "intermediate_size": 4096,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 512, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "sliding_window": None, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    peaks = []
    for layers in (2, 40):
        folder, orbax = tmp_path / f"hf{layers}", tmp_path / f"orbax{layers}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        values = {
            tensor.key: np.full(tensor.shape, 0.5, ml_dtypes.bfloat16)
            for tensor in tensors(ModelConfig.from_hf(config | {"num_hidden_layers": layers}))
        }
        save_file(values, folder / "model.safetensors")
        peaks.append(
            [
                peak_of(commands, TO_ORBAX, "--hf", folder, "--out", orbax),
                peak_of(
                    commands, TO_HF, "--checkpoint", tmp_path / f"orbax{layers}", "--out", tmp_path / f"back{layers}"
                ),
            ]
        )
        size = (folder / "model.safetensors").stat().st_size
    for few, many in zip(*peaks, strict=True):
        assert many - few < 0.35 * size, f"{many - few} of {size}"


def peak_of(commands: Commands, module: str, *arguments: object) -> int:
    """Returns the peak resident memory of a command in bytes."""
    script = (
        "import runpy, sys, re\nsys.argv = sys.argv[1:]\n"
        "try:\n runpy.run_module(sys.argv[0], run_name='__main__')\n"
        "finally:\n print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    command = [sys.executable, "-c", script, module, *map(str, arguments)]
    process = subprocess.run(command, env=commands.environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(process.stdout.splitlines()[-1]) * 1024


def test_fused_experts_are_read(mixtral: Path, tmp_path: Path):
    folder = tmp_path / "fused"
    folder.mkdir()
    values: dict[str, np.ndarray] = {}
    for file in mixtral.glob("*.safetensors"):
        values |= load_file(file)
    for layer in range(2):
        block = f"model.layers.{layer}."
        experts = [
            {name: values.pop(f"{block}block_sparse_moe.experts.{e}.{name}.weight") for name in ("w1", "w2", "w3")}
            for e in range(4)
        ]
        values[f"{block}mlp.gate.weight"] = values.pop(f"{block}block_sparse_moe.gate.weight")
        values[f"{block}mlp.experts.gate_up_proj"] = np.stack([np.concatenate([e["w1"], e["w3"]]) for e in experts])
        values[f"{block}mlp.experts.down_proj"] = np.stack([e["w2"] for e in experts])
    save_file(values, folder / "model.safetensors")
    (folder / "config.json").write_text((mixtral / "config.json").read_text())
    assert same_arrays(load_hf(folder)[1], load_hf(mixtral)[1])


def test_values_that_are_not_finite_are_refused(mixtral: Path, tmp_path: Path, commands: Commands):
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in mixtral.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    file = next(path for path in folder.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    values = load_file(file)
    values["model.norm.weight"][3:5] = np.nan, -np.inf
    save_file(values, file)
    output = commands.fails(TO_ORBAX, "--hf", folder, "--out", tmp_path / "out")
    assert "model.norm.weight contains 2 of 32 values that are infinite or NaN" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_truncated_checkpoint_is_refused(converted: Path, tmp_path: Path, commands: Commands):
    broken = tmp_path / "model"
    shutil.copytree(converted, broken)
    chunk = next(
        path for path in (broken / "checkpoints/0/params/blocks.w1").rglob("*") if path.is_file() and path.name == "0"
    )
    chunk.write_bytes(chunk.read_bytes()[:-7])
    output = commands.fails(TO_HF, "--checkpoint", broken, "--out", tmp_path / "out")
    assert "blocks.w1" in output
    assert not (tmp_path / "out").exists()


def test_different_logits_are_refused(mixtral: Path, converted: Path, monkeypatch: pytest.MonkeyPatch):
    """The weights are equal bit for bit, and config.json describes a different computation."""
    step = checkpoint.resolve(converted)
    params, hf_config = checkpoint.open_params(step), checkpoint.load_hf_config(step)
    for with_torch in (True, False):
        if not with_torch:
            monkeypatch.setattr("xlam_jax.weights.logits.find_spec", lambda name: None)
        compare_logits(mixtral, hf_config, params, step)
        with pytest.raises(UserError, match=r"the logits that .* computes differ from those of"):
            compare_logits(mixtral, hf_config | {"num_experts_per_tok": 1}, params, step)


def test_a_remote_folder(mixtral: Path, converted: Path, tmp_path: Path, commands: Commands):
    """An fsspec URL is written, not overwritten, read, and inspected."""
    address = "memory://models/tiny"
    export = [TO_HF, "--checkpoint", converted, "--out", address, "--max-shard-size", "40KB"]
    commands.call(*export, "--verify")
    assert "exists already" in commands.fails(*export)
    files = fsspec.filesystem("memory").ls("/models/tiny", detail=False)
    assert not [name for name in files if "source" in name]
    assert same_arrays(load_hf(address)[1], load_hf(mixtral)[1])
    commands.call(TO_ORBAX, "--hf", address, "--out", tmp_path / "again")
    assert same_arrays(checkpoint.load_params(checkpoint.resolve(tmp_path / "again")), load_hf(mixtral)[1])
    assert "MixtralForCausalLM" in commands.call("converters.inspect", address).stdout


def test_an_interrupted_export_to_a_remote_folder_is_resumed(
    mixtral: Path, converted: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
):
    """The file that was being written counts as unfinished, although closing it created it."""
    address = f"file://{tmp_path}/there"
    export = [TO_HF, "--checkpoint", converted, "--out", address, "--max-shard-size", "40KB", "--workers", 1]
    check, calls = orbax_to_hf.check_finite, []

    def breaks(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 30:
            raise OSError("the line is down")
        check(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(orbax_to_hf, "check_finite", breaks)
        assert "run again to continue" in commands.fails(*export)
    commands.call(*export)
    assert same_arrays(load_hf(tmp_path / "there")[1], load_hf(mixtral)[1])
    assert not list((tmp_path / "there").glob("*.part"))


def test_another_source_of_the_same_sizes_is_refused(
    mixtral: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
):
    source, out = tmp_path / "hf", tmp_path / "out"
    shutil.copytree(mixtral, source)
    command = [TO_ORBAX, "--hf", source, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr("converters.hf_to_orbax._convert", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        commands.call(*command, code=130)
    file = next(source.glob("*.safetensors"))
    file.write_bytes(file.read_bytes())
    assert "holds an unfinished output of something else" in commands.fails(*command)


def test_a_missing_file_of_a_checkpoint_is_not_read_as_zeros(converted: Path, tmp_path: Path, commands: Commands):
    lost = tmp_path / "lost"
    shutil.copytree(converted, lost)
    (checkpoint.resolve(lost) / "params/blocks.q/c/0/0/0/0/0").unlink()
    assert "blocks.q" in commands.fails(TO_HF, "--checkpoint", lost, "--out", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_weights_of_zeros_are_converted(mixtral: Path, tmp_path: Path, commands: Commands):
    source = tmp_path / "zeros"
    shutil.copytree(mixtral, source)
    for file in source.glob("*.safetensors"):
        save_file({key: np.zeros_like(value) for key, value in load_file(file).items()}, file)
    commands.call(TO_ORBAX, "--hf", source, "--out", tmp_path / "orbax")
    commands.call(TO_HF, "--checkpoint", tmp_path / "orbax", "--out", tmp_path / "back")
    assert same_arrays(load_hf(tmp_path / "back")[1], load_hf(source)[1])


def test_weights_of_another_config_are_refused(converted: Path, tmp_path: Path, commands: Commands):
    other = tmp_path / "other"
    shutil.copytree(converted, other)
    path = next(other.rglob("config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    message = "num_hidden_layers is 1 there and 2 in the checkpoint"
    assert message in commands.fails("converters.inspect", other)
    export = [TO_HF, "--checkpoint", other, "--out", tmp_path / "hf"]
    assert message in commands.fails(*export)


def test_values_beyond_the_range_of_the_dtype_are_refused(mixtral: Path, tmp_path: Path, commands: Commands):
    source = tmp_path / "large"
    shutil.copytree(mixtral, source)
    for file in source.glob("*.safetensors"):
        save_file({key: np.full_like(value, 1e5) for key, value in load_file(file).items()}, file)
    commands.call(TO_ORBAX, "--hf", source, "--out", tmp_path / "orbax")
    export = [TO_HF, "--checkpoint", tmp_path / "orbax", "--out", tmp_path / "hf", "--dtype", "float16"]
    assert "inf" in commands.fails(*export)


def test_inspect(mixtral: Path, converted: Path, trained: tuple[Path, str], commands: Commands):
    output = commands.call("converters.inspect", mixtral).stdout
    assert "MixtralForCausalLM, 49,632 parameters" in output
    assert "bfloat16 (49,632 values)" in output
    assert "config     none: a converted model" in commands.call("converters.inspect", converted).stdout
    output = commands.call("converters.inspect", trained[0]).stdout
    assert "items data, opt, params" in output
    assert "step       10; other steps: " in output
    assert "config     sft, full, from random weights, 10 steps of 4 rows" in output
    assert "no such folder" in commands.fails("converters.inspect", "nowhere")


def test_a_name_on_the_hub(mixtral: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch):
    """Reads from the cache of the hub's client. Without network, a missing model is one error message."""
    revision = "a" * 40
    repository = tmp_path / "models--acme--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(revision)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / revision).symlink_to(mixtral)
    script = "import sys; from converters.inspect import *; run(main)"
    env = commands.environment | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    cached, missing = (
        subprocess.run([sys.executable, "-c", script, name], env=env, capture_output=True, text=True, check=False)
        for name in ("acme/tiny", "acme/other")
    )
    assert "MixtralForCausalLM" in cached.stdout, cached.stderr
    assert missing.returncode == 2
    assert "acme/other: no such folder, and it cannot be loaded from the Hugging Face hub" in missing.stderr


def test_headers(tmp_path: Path):
    spec = shards.TensorSpec("x", np.dtype(np.float32), (2, 3))
    whole = shards.make_header([spec]) + np.arange(6, dtype=np.float32).tobytes()
    (tmp_path / "one.safetensors").write_bytes(whole)
    np.testing.assert_array_equal(load_file(tmp_path / "one.safetensors")["x"], [[0, 1, 2], [3, 4, 5]])
    shard = shards.Shard(str(tmp_path / "one.safetensors"))
    np.testing.assert_array_equal(shard.read("x"), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(shard.read("x", (2, (3,))), [2, 3, 4])
    for cut in (whole[:-1], whole[:5], whole + b"x", b"\xff" * 50):
        (tmp_path / "cut.safetensors").write_bytes(cut)
        with pytest.raises(UserError, match=r"cut\.safetensors: truncated or damaged"):
            shards.Shard(str(tmp_path / "cut.safetensors"))
