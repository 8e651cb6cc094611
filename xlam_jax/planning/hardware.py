"""Chips, by their makers' data sheets, and how they are joined; a topology from its name."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from xlam_jax import tpu_library
from xlam_jax.errors import UserError, nearest
from xlam_jax.training.cost import PEAK_FLOPS


@dataclass(frozen=True)
class Chip:
    """One device. Bytes and seconds."""

    kind: str
    """As it stands in `PEAK_FLOPS`."""
    memory: float
    bandwidth: float
    """Of its memory."""
    link: float
    """Of one link to a neighbour, in one direction (TPU), or of all links inside a node (GPU)."""
    libtpu: str = ""
    """The compiler's name of the generation."""
    dimensions: int = 0
    """Of the torus or mesh that its links make."""

    @property
    def flops(self) -> float:
        """bf16 operations a second."""
        return PEAK_FLOPS[self.kind]


GIB = 2**30
CHIPS = {
    "v4": Chip("TPU v4", 32 * GIB, 1228e9, 45e9, "v4", 3),
    "v5p": Chip("TPU v5p", 95 * GIB, 2765e9, 90e9, "v5", 3),
    "v5e": Chip("TPU v5e", 16 * GIB, 819e9, 45e9, "v5e", 2),
    "v6e": Chip("TPU v6e", 32 * GIB, 1640e9, 90e9, "v6e", 2),
    "a100": Chip("A100", 80e9, 2039e9, 300e9),
    "h100": Chip("H100", 80e9, 3350e9, 450e9),
    "h200": Chip("H200", 141e9, 4800e9, 450e9),
    "b200": Chip("B200", 180e9, 8000e9, 900e9),
}
TPU_SHAPES = {
    "v4": ["2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"],
    "v5p": ["2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"],
    "v5e": ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"],
    "v6e": ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"],
}
"""Slices that can be rented."""
NODE = 8
"""GPUs that fast links join."""
BETWEEN_NODES = 50e9
"""Bytes a second of each GPU to other nodes: one 400 Gb/s adapter each."""

FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Variables that set which part of a GPU's memory JAX's allocator may use; the second is the older name."""
FRACTION = 0.75
"""What it may use otherwise."""

OFFLINE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used: several plans may be made at once
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
"""Variables of libtpu for a machine that is no TPU's: it would ask the cloud which one it is. What is compiled depends
on none of them."""


@dataclass(frozen=True)
class Topology:
    """Devices of one kind and how they are laid out."""

    name: str
    platform: str
    """tpu, gpu or cpu."""
    count: int
    chip: Chip | None
    """None for a CPU: a machine's own speed is not in a table."""
    shape: tuple[int, ...] = ()
    """Of a TPU slice."""

    @property
    def fraction(self) -> float:
        """The part of a device's memory that JAX's allocator may use. Raises `UserError` for an invalid variable."""
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
        """Bytes of a device that a run can use; None for a CPU."""
        return self.chip.memory * self.fraction if self.chip else None

    @property
    def larger(self) -> list["Topology"]:
        """Topologies of the same chips with more devices, the smallest first: for GPUs up to 16 times as many."""
        if self.platform == "tpu":
            kind = self.name.partition(":")[0]
            slices = [parse(f"{kind}:{shape}") for shape in TPU_SHAPES[kind]]
            return [other for other in slices if other.count > self.count]
        prefix = self.name.rpartition(":")[0]
        return [parse(f"{prefix}:{times * self.count}") for times in (2, 4, 8, 16)]

    @property
    def wrapped(self) -> tuple[bool, ...]:
        """Which dimensions of a TPU slice are closed to a ring: in three dimensions all of them where each is a
        multiple of 4, in two those of 16 chips."""
        if len(self.shape) == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return tuple(size == 16 for size in self.shape)

    def devices(self) -> Sequence[Any]:
        """JAX devices to compile for; no such machine need be here. Empty for a GPU, which no compiler here targets.

        Raises `UserError` where libtpu is missing.
        """
        import jax

        if self.platform == "gpu":
            return []
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
            described = topologies.get_topology_desc(
                f"{self.chip.libtpu}:{'x'.join(map(str, self.shape))}",
                platform="tpu",
                **({"wrap": list(self.wrapped)} if len(self.shape) == 3 else {}),
            )
        except RuntimeError as error:
            if "not installed" not in str(error):
                raise
            raise UserError(
                f"--topology {self.name}: the TPU compiler, libtpu, is not installed; "
                "pip install 'xlam_jax[plan]' brings it (no TPU is needed)"
            ) from None
        return described.devices

    def bandwidth(self, devices: Sequence[Any], extent: int) -> float | None:
        """Bytes a second that each of these devices, a group of a collective, can receive from the others; None where
        it is not known. `extent` is how far apart the group's first and last stand in the order of all devices."""
        if not self.chip:
            return None
        if self.platform == "gpu":
            return self.chip.link if extent <= NODE else BETWEEN_NODES
        coords = list(zip(*(device.coords for device in devices), strict=True))
        lines = [len(set(places)) for places in coords]
        ways = [
            (2 if closed and size > 2 else 1) for size, closed in zip(lines, self.wrapped or (False,) * 3, strict=False)
        ]
        return self.chip.link * sum(way for way, size in zip(ways, lines, strict=False) if size > 1)


def parse(name: str) -> Topology:
    """A topology from `v5p:4x4x4`, `gpu:h100:8` or `cpu:8`. Raises `UserError` that lists what is known."""
    kind, _, rest = name.partition(":")
    if kind in TPU_SHAPES:
        if rest not in TPU_SHAPES[kind]:
            raise UserError(f"--topology {name}: {kind} has no slice '{rest}'; known are {', '.join(TPU_SHAPES[kind])}")
        shape = tuple(int(size) for size in rest.split("x"))
        return Topology(name, "tpu", prod(shape), CHIPS[kind], shape)
    if kind == "cpu" and rest.isdigit() and int(rest) > 0:
        return Topology(name, "cpu", int(rest), None)
    if found := re.fullmatch(r"gpu:(\w+):([1-9]\d*)", name):
        gpus = [chip for chip in CHIPS if chip not in TPU_SHAPES]
        if found[1] not in gpus:
            raise UserError(f"--topology {name}: the GPU '{found[1]}' is not known; known are {', '.join(gpus)}")
        return Topology(name, "gpu", int(found[2]), CHIPS[found[1]])
    known = [f"{chip}:{shape}" for chip, shapes in TPU_SHAPES.items() for shape in shapes]
    known += [f"gpu:{chip}:N" for chip in CHIPS if chip not in TPU_SHAPES] + ["cpu:N"]
    raise UserError(f"--topology {name}: not known{nearest(name, known)}; known are {', '.join(known)}")


def factorizations(count: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write a number as a product of so many factors, in order."""
    if parts == 1:
        return [(count,)]
    return [
        (first, *rest)
        for first in range(1, count + 1)
        if count % first == 0
        for rest in factorizations(count // first, parts - 1)
    ]
