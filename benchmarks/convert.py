"""Compares the conversion of a model to Orbax and back with copying its files: time ratio, and peak memory.

Writes random bfloat16 weights for a config.json, then runs `cp`, Hugging Face → Orbax, and Orbax → Hugging Face, and
compares every tensor. A 7B model needs 60 GB of disk.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from xlam_jax.models.config import ModelConfig, read_hf_config
from xlam_jax.weights.hf import HFWeights
from xlam_jax.weights.hf_map import tensors
from xlam_jax.weights.locate import INDEX
from xlam_jax.weights.shards import TensorSpec, make_header

ROOT = Path(__file__).parents[1]
FILES = 3
DTYPE = np.dtype(ml_dtypes.bfloat16)
FINITE = 0xBFFF
"""Bits of a bfloat16 number that may be random: without the highest exponent bit, it is always finite."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time conversions against cp.")
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "configs/models/mistral_7b_v0.3.json",
        metavar="FILE",
        help="config.json of the model (default: that of Mistral 7B v0.3)",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="number of layers (default: the config's)")
    parser.add_argument("--folder", type=Path, required=True, help="working folder, created and removed")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    try:
        compare(arguments.config, arguments.layers, arguments.folder)
    finally:
        shutil.rmtree(arguments.folder)


def compare(config: Path, layers: int | None, folder: Path) -> None:
    """Writes the model, and times each conversion."""
    hf_config = read_hf_config(config) | ({} if layers is None else {"num_hidden_layers": layers})
    size = write_weights(folder / "hf", hf_config)
    print(f"{ModelConfig.from_hf(hf_config).parameters():,} parameters in bf16, {size / 1e9:.2f} GB", flush=True)
    copying, _ = run_timed(["cp", "-r", folder / "hf", folder / "copy"])
    print(f"cp                   {copying:5.1f} s", flush=True)
    shutil.rmtree(folder / "copy")
    for direction, module, source, out in (
        ("Hugging Face → Orbax", "converters.hf_to_orbax", ["--hf", folder / "hf"], folder / "orbax"),
        ("Orbax → Hugging Face", "converters.orbax_to_hf", ["--checkpoint", folder / "orbax"], folder / "back"),
    ):
        seconds, peak = run_timed([sys.executable, "-m", module, *source, "--out", out])
        print(
            f"{direction} {seconds:5.1f} s, {seconds / copying:.2f} × cp, peak memory {peak / 1e9:.2f} GB", flush=True
        )
    print(f"{compare_tensors(folder / 'hf', folder / 'back'):,} tensors are identical")


def write_weights(folder: Path, hf_config: dict[str, Any]) -> int:
    """Writes random weights in FILES safetensors files. Returns their size in bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config), encoding="utf-8")
    table = list(tensors(ModelConfig.from_hf(hf_config)))
    random, weight_map = np.random.default_rng(0), {}
    for number in range(FILES):
        name = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        group = table[number * len(table) // FILES : (number + 1) * len(table) // FILES]
        specs = [TensorSpec(tensor.key, DTYPE, tensor.shape) for tensor in group]
        with (folder / name).open("wb") as file:
            file.write(make_header(specs))
            for spec in specs:
                file.write((random.integers(0, 2**16, spec.bytes // 2, dtype=np.uint16) & np.uint16(FINITE)).tobytes())
                weight_map[spec.key] = name
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def run_timed(command: list[object]) -> tuple[float, int]:
    """Runs a command. Returns its time in seconds, and its peak resident memory in bytes."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            match = re.search(r"VmHWM:\s*(\d+)", status)
            peak = max(peak, int(match[1]) * 1024 if match else 0)
        except OSError:
            pass
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    return time.monotonic() - start, peak


def compare_tensors(left: Path, right: Path) -> int:
    """Asserts that all tensors of two folders are equal bit for bit. Returns their number."""
    first, second = ({tensor.key: source for tensor, source in HFWeights(folder).sources} for folder in (left, right))
    assert first.keys() == second.keys()
    for key, source in first.items():
        a, b = source.read(), second[key].read()
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes(), key
    return len(first)


if __name__ == "__main__":
    main()
