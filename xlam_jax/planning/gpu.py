"""NVIDIA GPUs that XLA compiles for on a machine without one, by the CUDA plugin of JAX (extra `plan-gpu`).

Matrix products become calls of cuBLAS, and attention may become calls of cuDNN: libraries that choose their kernels on
the device. Everything else, Triton kernels included, is compiled down to machine code.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlam_jax.errors import UserError

EXTRA = "plan-gpu"
"""The extra that installs the compiler."""

OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_autotune_level": 0,
}
"""Compiler options without a device. Kernels can't be timed then, and XLA would replace products by Triton kernels with
tiles that no one chose; cuBLAS chooses its own on the device."""


@dataclass(frozen=True)
class Target:
    """What the compiler knows of a GPU: figures of NVIDIA's data sheets, and what the CUDA driver reports."""

    name: str
    capability: tuple[int, int]
    """Compute capability, major and minor."""
    has_variant: bool
    """Whether code may use the instructions of this generation alone (sm_90a, sm_100a)."""
    processors: int
    """Streaming multiprocessors."""
    lanes: int
    """float32 lanes of each."""
    clock: float
    """GHz."""
    memory: int
    """Bytes."""
    bandwidth: int
    """Bytes per second of the main memory."""
    cache: int
    """Bytes of the L2 cache."""
    shared: int
    """Bytes of shared memory of a multiprocessor."""
    block_shared: int
    """Bytes of it that a block may have."""
    threads: int = 2048
    """Maximum number of threads on a multiprocessor."""

    @property
    def architecture(self) -> str:
        """The name that ptxas knows."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' * self.has_variant}"


REGISTERS = 65536
"""Registers of a multiprocessor."""

TARGETS = {
    "a100": Target(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        has_variant=False,
        processors=108,
        lanes=64,
        clock=1.41,
        memory=85_100_068_864,
        bandwidth=2_039_040_000_000,
        cache=40 << 20,
        shared=164 << 10,
        block_shared=163 << 10,
    ),
    "l40s": Target(
        name="NVIDIA L40S",
        capability=(8, 9),
        has_variant=False,
        processors=142,
        lanes=128,
        clock=2.52,
        memory=47_810_000_000,
        bandwidth=864_000_000_000,
        cache=96 << 20,
        shared=100 << 10,
        block_shared=99 << 10,
        threads=1536,
    ),
    "h100": Target(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        has_variant=True,
        processors=132,
        lanes=128,
        clock=1.98,
        memory=84_942_979_072,
        bandwidth=3_352_320_000_000,
        cache=50 << 20,
        shared=228 << 10,
        block_shared=227 << 10,
    ),
    "h200": Target(
        name="NVIDIA H200",
        capability=(9, 0),
        has_variant=True,
        processors=132,
        lanes=128,
        clock=1.98,
        memory=151_397_597_184,
        bandwidth=4_800_000_000_000,
        cache=50 << 20,
        shared=228 << 10,
        block_shared=227 << 10,
    ),
    "b200": Target(
        name="NVIDIA B200",
        capability=(10, 0),
        has_variant=True,
        processors=148,
        lanes=128,
        clock=1.965,
        memory=191_514_411_008,
        bandwidth=7_672_320_000_000,
        cache=132_644_864,
        shared=228 << 10,
        block_shared=227 << 10,
    ),
}
"""Name in a topology → GPU."""


@dataclass(frozen=True)
class Kernel:
    """What a kernel uses of a multiprocessor."""

    name: str
    threads: int
    """Threads of a block."""
    registers: int
    """Registers of a thread."""
    spilled: int
    """Bytes per thread that are stored to and loaded from main memory, because registers are missing."""
    shared: int
    """Bytes of shared memory of a block."""
    blocks: int
    """Blocks that a multiprocessor executes at the same time."""


def kernels(dump: Path, names: Iterable[str], kind: str) -> tuple[Kernel, ...]:
    """Returns what custom kernels use, one for each shape that was compiled.

    `dump`: the compiler's folder of one module. `names`: of kernels, as in `hlo.Totals`.
    """
    target = TARGETS[kind]
    launches: dict[str, tuple[int, int]] = {}
    for thunks in dump.glob("*.thunk_sequence.txt"):
        for line in thunks.read_text(encoding="utf-8").splitlines():
            if match := LAUNCH.search(line):
                launches[match[1]] = (int(match[2]), int(match[3]))
    wanted = set(names)
    distinct: dict[Kernel, None] = {}
    for ptx in sorted(dump.glob("*.ptx")):
        entry = re.search(r"\.entry (\w+)", ptx.read_text(encoding="utf-8"))
        name = re.sub(r"_*\d*$", "", entry[1]) if entry else ""
        if entry and name in wanted and entry[1] in launches:
            distinct[_assembled(name, ptx, *launches[entry[1]], target)] = None
    return tuple(sorted(distinct, key=lambda kernel: kernel.name))


LAUNCH = re.compile(r"kCustomKernel .*\] (\w+) grid: .* threads: \[(\d+), 1, 1\]\s+shared_memory: (\d+) bytes")


def _assembled(name: str, ptx: Path, threads: int, shared: int, target: Target) -> Kernel:
    command = [_ptxas(), "-v", "-arch", target.architecture, str(ptx), "-o", os.devnull]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"NVIDIA's assembler does not read a kernel ({error}); reinstall it with pip install 'xlam_jax[{EXTRA}]', "
            "or plan with --estimate"
        ) from None
    registers = int(_number(r"Used (\d+) registers", done.stderr))
    spilled = _number(r"(\d+) bytes spill stores", done.stderr) + _number(r"(\d+) bytes spill loads", done.stderr)
    of_a_warp = -(-registers * 32 // 256) * 256  # the unit in which registers are allocated
    blocks = min(
        REGISTERS // of_a_warp // -(-threads // 32),
        target.threads // threads,
        target.shared // (shared + 1024),  # 1 kB of a block is the system's
    )
    return Kernel(name, threads, registers, spilled, shared, blocks)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def _ptxas() -> str:
    """Returns the path of NVIDIA's assembler, which the extra installs."""
    packages = importlib.util.find_spec("nvidia")  # a namespace of several packages
    folders = packages.submodule_search_locations if packages else None
    paths = (path for folder in folders or () for path in Path(folder).glob("*/bin/ptxas"))
    return str(next(paths, None) or shutil.which("ptxas") or "ptxas")


def devices(kind: str, count: int) -> Sequence[Any]:
    """Returns JAX devices to compile for, which this machine need not have, in nodes of equal size, at most 8.
    JAX must not have initialized its devices yet. Raises `UserError` if the plugin does not start.
    """
    import jax
    from jax.experimental import topologies

    # With other platforms the plugin looks for CUDA's libraries, which compiling does not need.
    jax.config.update("jax_platforms", "cpu")
    of_a_node = next(size for size in range(min(count, 8), 0, -1) if count % size == 0)
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            target_config=_config(TARGETS[kind]),
            topology=f"1x{count // of_a_node}x{of_a_node}",
        )
    except NotImplementedError as error:
        raise UserError(
            f"--topology gpu:{kind}:{count}: JAX's CUDA plugin does not start ({error}); reinstall it with "
            f"pip install 'xlam_jax[{EXTRA}]', or plan with --estimate"
        ) from None
    return description.devices


def _config(target: Target) -> str:
    """Returns XLA's description of a GPU (the text form of its GpuTargetConfigProto)."""
    major, minor = target.capability
    limits = "".join(
        f"{kind}_dim_limit_{axis}: {size}\n"
        for kind, sizes in (("block", (2**31 - 1, 65535, 65535)), ("thread", (1024, 1024, 64)))
        for axis, size in zip("xyz", sizes, strict=True)
    )
    return f"""
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{target.name}"
gpu_device_info {{
cuda_compute_capability {{
major: {major}
minor: {minor}
feature_extension: {"ACCELERATED_FEATURES" if target.has_variant else "NONE"}
}}
threads_per_warp: 32
threads_per_block_limit: 1024
threads_per_core_limit: {target.threads}
core_count: {target.processors}
fpus_per_core: {target.lanes}
registers_per_core_limit: {REGISTERS}
registers_per_block_limit: {REGISTERS}
shared_memory_per_block: 49152
shared_memory_per_block_optin: {target.block_shared}
shared_memory_per_core: {target.shared}
l2_cache_size: {target.cache}
memory_bandwidth: {target.bandwidth}
device_memory_size: {target.memory}
clock_rate_ghz: {target.clock}
{limits}}}
"""
