"""What to change in a run that does not fit its devices: each change planned by the estimate."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from xlam_jax.config import Config
from xlam_jax.planning.hardware import FRACTIONS, Topology

RAISED = 0.9
"""Part of a GPU's memory that a run may safely be given; the rest is for CUDA and NCCL."""
SHOWN = 4
"""Changes to name if none is enough."""
SHORTEST = 1024
"""Tokens of a row that is not halved any further."""

Peak = Callable[[Topology, list[str]], float | None]
"""Bytes of a device at the peak of a step, on a topology with these overrides; None for a layout that is invalid."""


class Change(NamedTuple):
    """A change of a run, and what it comes to."""

    text: str
    """As it is typed: overrides, a topology, or a variable of the environment."""
    peak: float
    """Bytes of a device."""
    fits: bool


class _Try(NamedTuple):
    overrides: list[str]
    topology: Topology
    fraction: float


def advise(config: Config, mesh: dict[str, int], topology: Topology, peak: Peak) -> list[Change]:
    """The first change of each kind that is enough alone, or if there is none those that help most.

    First come changes that leave the results alone, then more devices, then changes of what is trained.
    """
    enough: list[Change] = []
    others: list[Change] = []

    def consider(kinds: Iterable[list[_Try]]) -> None:
        for kind in kinds:
            for attempt in kind:
                needed = peak(attempt.topology, attempt.overrides)
                if needed is None:
                    continue
                assert attempt.topology.chip
                fits = needed <= attempt.topology.chip.memory * attempt.fraction
                (enough if fits else others).append(Change(_typed(attempt, topology), needed, fits))
                if fits:
                    break

    alike = _alike(config, mesh, topology)
    consider(alike)
    if not enough and alike:
        overrides = [override for kind in alike for override in kind[0].overrides]
        consider([[_Try(overrides, topology, max(kind[0].fraction for kind in alike))]])
    consider(_different(config, topology))
    return enough or sorted(others, key=lambda change: change.peak)[:SHOWN]


def _alike(config: Config, mesh: dict[str, int], topology: Topology) -> list[list[_Try]]:
    """Changes that leave devices, mesh and results alone, by kind; of each kind the smallest first."""
    here = topology.fraction
    rows = config.train.batch_size // (mesh["data"] * mesh["fsdp"] * mesh["expert"])
    saving = ["full", "offload"]
    remats = saving[saving.index(config.model.remat) + 1 :] if config.model.remat in saving else saving
    kinds = [
        [_Try([], topology, RAISED)] if topology.platform == "gpu" and here < RAISED else [],
        [_Try([f"model.remat={name}"], topology, here) for name in remats],
        [_Try([f"train.microbatches={rows}"], topology, here)] if rows > config.train.microbatches else [],
    ]
    return [kind for kind in kinds if kind]


def _different(config: Config, topology: Topology) -> Iterator[list[_Try]]:
    """Changes of the mesh, then of the devices, then of what is trained."""
    here = topology.fraction
    yield [_Try(split, topology, here) for split in _splits(config, topology.count)]
    yield [
        _Try(split, other, here)
        for other in topology.larger
        for split in ([f"mesh.fsdp={other.count}", *_ones(config)], *_splits(config, other.count))
    ]
    if config.train.trainable == "full" and config.train.optimizer == "adamw":
        kinds = ["float32", "bfloat16", "8bit"]
        smaller = kinds[kinds.index(config.train.moments) + 1 :]
        yield [_Try([f"train.moments={moments}"], topology, here) for moments in smaller]
    lengths = [config.data.sequence_length >> by for by in range(1, 8)]
    yield [_Try([f"data.sequence_length={length}"], topology, here) for length in lengths if length >= SHORTEST]
    trainable = {"full": ["lora", "qlora"], "lora": ["qlora"]}.get(config.train.trainable, [])
    yield [_Try([f"train.trainable={name}"], topology, here) for name in trainable]


def _splits(config: Config, count: int) -> Iterator[list[str]]:
    """Meshes of fsdp and of one axis that splits what a row needs."""
    for axis in ("tensor", "context"):
        for size in (2, 4, 8):
            if count % size == 0 and size < count:
                yield [f"mesh.fsdp={count // size}", f"mesh.{axis}={size}", *_ones(config, axis)]


def _ones(config: Config, but: str = "") -> list[str]:
    """Sets the other axes of a mesh to 1 where the config has more."""
    sizes = config.mesh.sizes
    return [f"mesh.{axis}=1" for axis, size in sizes.items() if size != 1 and axis not in ("fsdp", but)]


def _typed(attempt: _Try, topology: Topology) -> str:
    variable = [f"{FRACTIONS[0]}={attempt.fraction:g}"] if attempt.fraction != topology.fraction else []
    place = [f"--topology {attempt.topology.name}"] if attempt.topology.name != topology.name else []
    return " ".join([*variable, *place, *attempt.overrides])
