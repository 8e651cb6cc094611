"""Converting a model there and back against copying its files: time as a ratio, and the memory held at most.

Makes a folder of random bf16 weights in the shape of a config.json, then in turn: `cp`, Hugging Face → Orbax, Orbax →
Hugging Face; compares every tensor. Of a 7B model it takes 60 GB of disk.
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
from xlam_jax.weights.shards import Place, header_of

ROOT = Path(__file__).parents[1]
FILES = 3
DTYPE = np.dtype(ml_dtypes.bfloat16)
FINITE = 0xBFFF
"""Bits of a bf16 number that may be set at random: without the highest of its exponent it is never infinite."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time conversions against cp.")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/models/mistral_7b_v0.3.json", metavar="FILE")
    parser.add_argument("--layers", type=int, metavar="N", help="instead of the config's")
    parser.add_argument("--folder", type=Path, required=True, help="where to work; made, and removed at the end")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    try:
        compare(arguments.config, arguments.layers, arguments.folder)
    finally:
        shutil.rmtree(arguments.folder)


def compare(config: Path, layers: int | None, folder: Path) -> None:
    """Makes the model, and times each way."""
    hf_config = read_hf_config(config) | ({} if layers is None else {"num_hidden_layers": layers})
    made = make(folder / "hf", hf_config)
    print(f"{ModelConfig.from_hf(hf_config).parameters():,} parameters in bf16, {made / 1e9:.2f} GB", flush=True)
    copying, _ = timed(["cp", "-r", folder / "hf", folder / "copy"])
    print(f"cp                 {copying:7.1f} s", flush=True)
    shutil.rmtree(folder / "copy")
    for what, module, source, out in (
        ("Hugging Face → Orbax", "converters.hf_to_orbax", ["--hf", folder / "hf"], folder / "orbax"),
        ("Orbax → Hugging Face", "converters.orbax_to_hf", ["--checkpoint", folder / "orbax"], folder / "back"),
    ):
        seconds, peak = timed([sys.executable, "-m", module, *source, "--out", out])
        print(f"{what} {seconds:5.1f} s, {seconds / copying:.2f} × cp, {peak / 1e9:.2f} GB held at most", flush=True)
    print(f"{same(folder / 'hf', folder / 'back'):,} tensors are identical")


def make(folder: Path, hf_config: dict[str, Any]) -> int:
    """Writes random weights; returns their bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config), encoding="utf-8")
    wanted = list(tensors(ModelConfig.from_hf(hf_config)))
    random, where = np.random.default_rng(0), {}
    for number in range(FILES):
        name = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        group = wanted[number * len(wanted) // FILES : (number + 1) * len(wanted) // FILES]
        places = [Place(tensor.key, DTYPE, tensor.shape) for tensor in group]
        with (folder / name).open("wb") as file:
            file.write(header_of(places))
            for place in places:
                file.write((random.integers(0, 2**16, place.bytes // 2, dtype=np.uint16) & np.uint16(FINITE)).tobytes())
                where[place.key] = name
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def timed(command: list[object]) -> tuple[float, int]:
    """Runs a command; returns its seconds, and the bytes of memory that it held at most."""
    began, peak = time.monotonic(), 0
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            found = re.search(r"VmHWM:\s*(\d+)", status)
            peak = max(peak, int(found[1]) * 1024 if found else 0)
        except OSError:
            pass
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    return time.monotonic() - began, peak


def same(one: Path, other: Path) -> int:
    """Compares all tensors bit for bit; returns how many there are."""

    first, second = ({tensor.key: where for tensor, where in HFWeights(folder).sources} for folder in (one, other))
    assert first.keys() == second.keys()
    for key, where in first.items():
        a, b = where.read(), second[key].read()
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes(), key
    return len(first)


if __name__ == "__main__":
    main()
