"""Suggests changes for a run that does not fit its devices. The estimate plans each change."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from xlam_jax.config import Config
from xlam_jax.planning.hardware import FRACTIONS, Topology

RAISED = 0.9
"""Maximum safe fraction of a GPU's memory for JAX; the rest is for CUDA and NCCL."""
SHOWN = 4
"""Number of changes to suggest if none is enough alone."""
SHORTEST = 1024
"""Minimum row length to suggest, in tokens."""

Peak = Callable[[Topology, list[str]], float | None]
"""(topology, overrides) → peak memory of a step in bytes per device; None for an invalid layout."""


class Change(NamedTuple):
    """A change of a run, and its effect."""

    text: str
    """The change as the user types it: overrides, a topology, or an environment variable."""
    peak: float
    """Peak memory in bytes per device."""
    fits: bool


class _Attempt(NamedTuple):
    overrides: list[str]
    topology: Topology
    fraction: float


def advise(config: Config, mesh: dict[str, int], topology: Topology, peak: Peak) -> list[Change]:
    """Returns the smallest sufficient change of each kind, or, if there is none, the SHOWN changes that help most.

    Changes that don't affect the results come first, then more devices, then shorter rows and fewer trained parameters.
    """
    enough: list[Change] = []
    others: list[Change] = []

    def consider(kinds: Iterable[list[_Attempt]]) -> None:
        for kind in kinds:
            for attempt in kind:
                needed = peak(attempt.topology, attempt.overrides)
                if needed is None:
                    continue
                assert attempt.topology.chip
                fits = needed <= attempt.topology.chip.memory * attempt.fraction
                (enough if fits else others).append(Change(_command_text(attempt, topology), needed, fits))
                if fits:
                    break

    equivalent = _equivalent_changes(config, mesh, topology)
    consider(equivalent)
    if not enough and equivalent:
        overrides = [override for kind in equivalent for override in kind[0].overrides]
        consider([[_Attempt(overrides, topology, max(kind[0].fraction for kind in equivalent))]])
    consider(_other_changes(config, topology))
    return enough or sorted(others, key=lambda change: change.peak)[:SHOWN]


def _equivalent_changes(config: Config, mesh: dict[str, int], topology: Topology) -> list[list[_Attempt]]:
    """Returns changes that keep devices, mesh and results, by kind; within a kind the smallest first."""
    fraction = topology.fraction
    rows = config.train.batch_size // (mesh["data"] * mesh["fsdp"] * mesh["expert"])
    saving = ["full", "offload"]
    remats = saving[saving.index(config.model.remat) + 1 :] if config.model.remat in saving else saving
    kinds = [
        [_Attempt([], topology, RAISED)] if topology.platform == "gpu" and fraction < RAISED else [],
        [_Attempt([f"model.remat={name}"], topology, fraction) for name in remats],
        [_Attempt([f"train.microbatches={rows}"], topology, fraction)] if rows > config.train.microbatches else [],
    ]
    return [kind for kind in kinds if kind]


def _other_changes(config: Config, topology: Topology) -> Iterator[list[_Attempt]]:
    """Yields changes of the mesh, then of the devices, then of the optimizer, row length and trained parameters."""
    fraction = topology.fraction
    yield [_Attempt(split, topology, fraction) for split in _splits(config, topology.count)]
    yield [
        _Attempt(split, other, fraction)
        for other in topology.larger
        for split in ([f"mesh.fsdp={other.count}", *_reset_axes(config)], *_splits(config, other.count))
    ]
    if config.train.trainable == "full" and config.train.optimizer == "adamw":
        kinds = ["float32", "bfloat16", "8bit"]
        smaller = kinds[kinds.index(config.train.moments) + 1 :]
        yield [_Attempt([f"train.moments={moments}"], topology, fraction) for moments in smaller]
    lengths = [config.data.sequence_length >> halvings for halvings in range(1, 8)]
    yield [_Attempt([f"data.sequence_length={length}"], topology, fraction) for length in lengths if length >= SHORTEST]
    trainable = {"full": ["lora", "qlora"], "lora": ["qlora"]}.get(config.train.trainable, [])
    yield [_Attempt([f"train.trainable={name}"], topology, fraction) for name in trainable]


def _splits(config: Config, count: int) -> Iterator[list[str]]:
    """Yields meshes of fsdp and one axis that shards the activations of a row."""
    for axis in ("tensor", "context"):
        for size in (2, 4, 8):
            if count % size == 0 and size < count:
                yield [f"mesh.fsdp={count // size}", f"mesh.{axis}={size}", *_reset_axes(config, axis)]


def _reset_axes(config: Config, but: str = "") -> list[str]:
    """Returns overrides that set all mesh axes except fsdp and `but` to 1, if the config has another size."""
    sizes = config.mesh.sizes
    return [f"mesh.{axis}=1" for axis, size in sizes.items() if size != 1 and axis not in ("fsdp", but)]


def _command_text(attempt: _Attempt, topology: Topology) -> str:
    variable = [f"{FRACTIONS[0]}={attempt.fraction:g}"] if attempt.fraction != topology.fraction else []
    place = [f"--topology {attempt.topology.name}"] if attempt.topology.name != topology.name else []
    return " ".join([*variable, *place, *attempt.overrides])
