"""Devices and their links, by the makers' data sheets, and topologies parsed from their names."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from xlam_jax import cuda_plugin, tpu_library
from xlam_jax.errors import UserError, nearest
from xlam_jax.planning import gpu
from xlam_jax.training.cost import PEAK_FLOPS


@dataclass(frozen=True)
class Chip:
    """Figures of a device's data sheet."""

    kind: str
    """Key of `PEAK_FLOPS`."""
    memory: float
    """Size of the main memory in bytes."""
    bandwidth: float
    """Bandwidth of the main memory in bytes per second."""
    link: float
    """Bytes per second of one link to a neighbour in one direction (TPU), or of all links within a node (GPU)."""
    libtpu: str = ""
    """The TPU compiler's name of the generation."""
    dimensions: int = 0
    """Number of dimensions of the torus or mesh that TPU links form."""
    between_slices: float = 0.0
    """Bytes per second of a TPU device to those of other slices, over the data center's network."""
    cores: int = 1
    """Devices of JAX in a TPU chip. The other figures are those of one device."""
    named_by_cores: bool = False
    """Whether the console's names count TensorCores, such as v5p-8 for 4 chips, or chips, such as v6e-4."""

    @property
    def flops(self) -> float:
        """Peak bfloat16 FLOP/s."""
        return PEAK_FLOPS[self.kind]


GIB = 2**30
CHIPS = {
    "v4": Chip("TPU v4", 32 * GIB, 1228e9, 45e9, "v4", 3, 3.125e9, named_by_cores=True),
    "v5p": Chip("TPU v5p", 95 * GIB, 2765e9, 90e9, "v5", 3, 6.25e9, named_by_cores=True),
    "v5e": Chip("TPU v5e", 16 * GIB, 819e9, 45e9, "v5e", 2, 3.125e9),
    "v6e": Chip("TPU v6e", 32 * GIB, 1640e9, 90e9, "v6e", 2, 12.5e9),
    "tpu7x": Chip("TPU7x", 96 * GIB, 3690e9, 50e9, "tpu7x", 3, 6.25e9, cores=2, named_by_cores=True),
    "a100": Chip("A100", 80e9, 2039e9, 300e9),
    "l40s": Chip("L40S", 48e9, 864e9, 32e9),
    "h100": Chip("H100", 80e9, 3350e9, 450e9),
    "h200": Chip("H200", 141e9, 4800e9, 450e9),
    "b200": Chip("B200", 180e9, 8000e9, 900e9),
}
TPU_SHAPES = {
    "v4": ["2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"],
    "v5p": ["2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"],
    "v5e": ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"],
    "v6e": ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"],
    "tpu7x": ["2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"],
}
"""Slice shapes that clouds offer, in chips."""
CONSOLE = {"v5litepod": "v5e"}
"""Names of generations in the cloud's console that differ."""
NODE = 8
"""Number of GPUs in a node, which are connected by NVLink (L40S: by PCIe)."""
WITHIN_CHIP = 6
"""Bandwidth between the two dies of a chip, in links to neighbours."""
BETWEEN_NODES = 50e9
"""Bytes per second of a GPU to other nodes: one 400 Gb/s adapter per GPU."""

FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Environment variables with the fraction of a GPU's memory that JAX's allocator may use; the second is the older
name."""
FRACTION = 0.75
"""JAX's default fraction."""

OFFLINE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so several plans may run at once
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
"""Environment variables of libtpu for a machine without a TPU, where it would query the cloud's metadata server. They
don't affect the compiled code."""


@dataclass(frozen=True)
class Topology:
    """A number of devices of one kind, and their arrangement."""

    name: str
    platform: str
    """tpu, gpu or cpu."""
    count: int
    chip: Chip | None
    """None for a CPU, whose figures are unknown."""
    shape: tuple[int, ...] = ()
    """Shape of a TPU slice, in chips."""
    slices: int = 1
    """Number of TPU slices of this shape."""

    @property
    def fraction(self) -> float:
        """Fraction of a device's memory that JAX's allocator may use. Raises `UserError` for an invalid variable."""
        name = next((name for name in FRACTIONS if os.environ.get(name)), None)
        if self.platform != "gpu" or name is None:
            return FRACTION if self.platform == "gpu" else 1.0
        try:
            value = float(os.environ[name])
        except ValueError:
            value = 0.0
        if not 0 < value <= 1:
            raise UserError(f"the variable {name} is {os.environ[name]!r}; set it to a number above 0, at most 1")
        return value

    @property
    def memory(self) -> float | None:
        """Bytes of a device's memory that a run can use; None for a CPU."""
        return self.chip.memory * self.fraction if self.chip else None

    @property
    def has_compiler(self) -> bool:
        """Whether this machine can compile for the devices; for a TPU, `devices` says what is missing."""
        return self.platform != "gpu" or cuda_plugin.is_installed()

    @property
    def compiler_options(self) -> Mapping[str, Any]:
        """Options to compile for devices that are not here."""
        return gpu.OPTIONS if self.platform == "gpu" else {}

    def kernels(self, dump: Path, names: Iterable[str]) -> tuple[gpu.Kernel, ...]:
        """Returns what custom kernels use of a GPU's multiprocessor, from the compiler's `dump`; () for others."""
        return gpu.kernels(dump, names, self.kind) if self.platform == "gpu" else ()

    @property
    def kind(self) -> str:
        """The chip's key in `CHIPS`; cpu for a CPU."""
        kind, _, rest = self.name.partition(":")
        return rest.partition(":")[0] if kind == "gpu" else kind

    @property
    def larger(self) -> list["Topology"]:
        """Topologies with more of the same devices, the smallest first; up to 16 times as many GPUs."""
        if self.platform == "tpu":
            slices = [_slices(self.kind, shape, self.slices) for shape in TPU_SHAPES[self.kind]]
            return [other for other in slices if other.count > self.count]
        prefix = self.name.rpartition(":")[0]
        return [parse(f"{prefix}:{times * self.count}") for times in (2, 4, 8, 16)]

    @property
    def wrapped(self) -> tuple[bool, ...]:
        """Whether each dimension of a TPU slice is a ring (torus). In 3D slices all are if each size is a multiple of
        4; in 2D slices those of size 16 are."""
        if len(self.shape) == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return tuple(size == 16 for size in self.shape)

    def devices(self) -> Sequence[Any]:
        """Returns the JAX devices to compile for, which this machine need not have. Empty for GPUs without their
        compiler.

        Raises `UserError` if libtpu is not installed.
        """
        import jax

        if self.platform == "gpu":
            return gpu.devices(self.kind, self.count) if self.has_compiler else []
        if self.platform == "cpu":
            from xlam_jax.parallel.mesh import split_cpu

            if self.count > 1:
                split_cpu(self.count)
            return jax.devices("cpu")
        from jax.experimental import topologies

        assert self.chip
        tpu_library.show()
        for name, value in OFFLINE.items():
            os.environ.setdefault(name, value)
        try:
            description = topologies.get_topology_desc(
                f"{self.chip.libtpu}:{'x'.join(map(str, self.shape))}",
                platform="tpu",
                **({"wrap": list(self.wrapped)} if len(self.shape) == 3 else {}),
                **({"num_slices": self.slices} if self.slices > 1 else {}),
            )
        except RuntimeError as error:
            if "not installed" not in str(error):
                raise
            raise UserError(
                f"--topology {self.name}: the TPU compiler, libtpu, is not installed; "
                "install it with pip install 'xlam_jax[plan]' (no TPU is needed)"
            ) from None
        return description.devices

    def bandwidth(self, devices: Sequence[Any], extent: int) -> float | None:
        """Returns the bytes per second that each device of a collective's group can receive; None if unknown.

        `extent`: number of devices from the group's first to its last in the order of all devices.
        """
        if not self.chip:
            return None
        if self.platform == "gpu":
            return self.chip.link if extent <= NODE else BETWEEN_NODES
        if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
            return self.chip.between_slices
        coords = list(zip(*(device.coords for device in devices), strict=True))
        if all(len(set(positions)) == 1 for positions in coords):  # the devices of one chip
            return WITHIN_CHIP * self.chip.link
        lengths = [len(set(positions)) for positions in coords]
        directions = [
            (2 if ring and size > 2 else 1) for size, ring in zip(lengths, self.wrapped or (False,) * 3, strict=False)
        ]
        return self.chip.link * sum(ways for ways, size in zip(directions, lengths, strict=False) if size > 1)


def _slices(kind: str, shape: str, slices: int) -> Topology:
    sizes, chip = tuple(int(size) for size in shape.split("x")), CHIPS[kind]
    name = f"{kind}:{shape}" + (f":{slices}" if slices > 1 else "")
    return Topology(name, "tpu", slices * prod(sizes) * chip.cores, chip, sizes, slices)


def _from_console(name: str) -> tuple[str, str]:
    """Returns a slice's kind and shape by its name in the cloud's console; ("", "") for other names."""
    match = re.fullmatch(r"(\w+)-(\d+)", name)
    kind = CONSOLE.get(match[1], match[1]) if match else ""
    if not match or kind not in TPU_SHAPES:
        return "", ""
    chips = int(match[2]) / (2 if CHIPS[kind].named_by_cores else 1)
    shapes = (shape for shape in TPU_SHAPES[kind] if prod(int(size) for size in shape.split("x")) == chips)
    shape = next(shapes, None)
    if shape is None:
        raise UserError(
            f"--topology {name}: no known slice has {chips:g} chips; known are {', '.join(TPU_SHAPES[kind])}"
        )
    return kind, shape


def parse(name: str) -> Topology:
    """Parses a name such as `v5p:4x4x4`, `v5p-128` (the same slice), `v5p:4x4x4:2` (two slices), `gpu:h100:8` or
    `cpu:8`. Raises `UserError` that lists the valid names."""
    kind, _, rest = name.partition(":")
    if "-" in kind:
        (kind, shape), slices = _from_console(kind), rest
    else:
        shape, _, slices = rest.partition(":")
    if kind in TPU_SHAPES:
        if shape not in TPU_SHAPES[kind]:
            raise UserError(
                f"--topology {name}: {kind} has no slice '{shape}'; known are {', '.join(TPU_SHAPES[kind])}"
            )
        if slices and not re.fullmatch(r"[1-9]\d*", slices):
            raise UserError(f"--topology {name}: '{slices}' is not a number of slices; write {kind}:{shape}:2 for two")
        return _slices(kind, shape, int(slices or 1))
    if kind == "cpu" and rest.isdigit() and int(rest) > 0:
        return Topology(name, "cpu", int(rest), None)
    if match := re.fullmatch(r"gpu:(\w+):([1-9]\d*)", name):
        gpus = [chip for chip in CHIPS if chip not in TPU_SHAPES]
        if match[1] not in gpus:
            raise UserError(f"--topology {name}: the GPU '{match[1]}' is not known; known are {', '.join(gpus)}")
        return Topology(name, "gpu", int(match[2]), CHIPS[match[1]])
    names = [f"{chip}:{shape}" for chip, shapes in TPU_SHAPES.items() for shape in shapes]
    names += [f"gpu:{chip}:N" for chip in CHIPS if chip not in TPU_SHAPES] + ["cpu:N"]
    raise UserError(f"--topology {name}: not known{nearest(name, names)}; known are {', '.join(names)}")


def factorizations(count: int, parts: int) -> list[tuple[int, ...]]:
    """Returns all ordered factorizations of `count` into `parts` factors."""
    if parts == 1:
        return [(count,)]
    return [
        (first, *rest)
        for first in range(1, count + 1)
        if count % first == 0
        for rest in factorizations(count // first, parts - 1)
    ]
