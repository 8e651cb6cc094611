"""`python -m xlam_jax.plan --config C --topology v5p:4x4x4`: what a run would need of machines that are not here.

The training step is the one that `xlam_jax.train` compiles. For a TPU slice its compiler, libtpu, runs on this machine;
for GPUs no compiler is at hand, and the figures are computed; for CPUs it is compiled for this one.

Exit codes: 0 after a complete plan, also of a step that does not fit; 2 for invalid input; 3 if the compiler refused
the step for another reason than the device's memory.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xlam_jax import cli
from xlam_jax import config as configs
from xlam_jax.config import Resolved
from xlam_jax.enums import MESH_AXES as AXES
from xlam_jax.errors import UserError
from xlam_jax.planning.advice import Change, advise
from xlam_jax.planning.failures import COMPILER_ERROR, DEVICE_MEMORY, KERNEL_MEMORY, failure, needed_memory, of_compiler
from xlam_jax.planning.hardware import FRACTIONS, Topology, factorizations, parse

if TYPE_CHECKING:
    from xlam_jax.planning.hlo import Collective
    from xlam_jax.training.setup import Layout

COMPILED = 3
"""Layouts that a search compiles, the most promising first."""
ATTEMPTS = 6
"""Layouts that a search compiles at most, those that fail included."""
REFUSED = 3
"""Exit code if the compiler refused the step for another reason than memory."""
FAILURES = (DEVICE_MEMORY, KERNEL_MEMORY, COMPILER_ERROR)


@dataclass(frozen=True)
class Plan:
    """What a step needs. Bytes and FLOPs are of one device and one step, times in seconds."""

    mesh: dict[str, int]
    remat: str
    microbatches: int
    batch_size: int
    sequence_length: int
    kernels: str
    parameters: int
    trainable: int
    model_flops: float
    flops: float
    arguments: float
    temporaries: float | None
    device_memory: float | None
    """Of a device; None where it is not known."""
    memory: float | None
    """The part of it that JAX's allocator may use."""
    exchanges: dict[str, float]
    """Bytes that a device receives, by kind and axes of the mesh."""
    exchange_counts: dict[str, int]
    compute_time: float | None
    memory_time: float | None
    network_time: float | None
    compile_seconds: float | None
    estimated_arguments: float
    estimated_temporaries: float
    estimated_flops: float
    unknown_loops: int = 0
    outcome: str = "computed"
    """compiled: the figures are read from the compiled module. Otherwise they are computed: because no compiler was
    asked (computed), or because it failed (device-memory, kernel-memory or compiler-error)."""
    cause: str | None = None
    """Why compiling failed, in one line."""
    changes: tuple[Change, ...] = ()
    """If it does not fit: what to change."""

    @property
    def compiled(self) -> bool:
        """Read from the compiled module, not computed."""
        return self.outcome == "compiled"

    @property
    def failed(self) -> bool:
        """Whether it was to be compiled, and was not."""
        return self.outcome in FAILURES

    @property
    def peak(self) -> float | None:
        """Bytes of a device while a step runs."""
        return None if self.temporaries is None else self.arguments + self.temporaries

    @property
    def fits(self) -> bool | None:
        """Whether JAX may use that much of a device; None where its memory is not known, or compiling failed for other
        reasons."""
        if self.failed:
            return False if self.outcome == DEVICE_MEMORY else None
        return None if self.memory is None or self.peak is None else self.peak <= self.memory

    @property
    def step_time(self) -> float | None:
        """The least that a step can take: its slowest part, the others hidden behind it."""
        times = (self.compute_time, self.memory_time, self.network_time)
        return None if self.compute_time is None else max(one for one in times if one is not None)

    def utilization(self, peak_flops: float) -> float | None:
        """Model FLOPs utilization that this allows."""
        return self.model_flops / peak_flops / self.step_time if self.step_time else None


def main() -> int:
    parser = cli.Parser(
        prog="python -m xlam_jax.plan",
        description="Tell what a training run needs of machines that need not be here: memory, operations, exchanges.",
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE.yaml")
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="such as v5p:4x4x4, v5e:2x4, gpu:h100:8 or cpu:8"
    )
    parser.add_argument("--mesh", metavar="AXIS=N,…", help="devices along each axis, others 1; default: the config's")
    parser.add_argument("--search", action="store_true", help="try meshes, remat and microbatches; rank those that fit")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields to set")
    arguments = parser.parse_intermixed_args()
    topology = parse(arguments.topology)
    overrides = list(arguments.overrides) + _mesh_overrides(arguments.mesh)
    resolved = configs.load(arguments.config, overrides)
    if not arguments.json:
        print(f"{arguments.config} on {topology.name}: {topology.count} devices", flush=True)
    if arguments.search:
        plans = search(resolved, topology, _say(arguments.json))
    else:
        plans = [plan(resolved, topology, laid_out(resolved, topology))]
    if plans[0].fits is False:
        plans[0] = replace(plans[0], changes=changes(plans[0], arguments.config, overrides, topology))
    if arguments.json:
        objects = [_as_json(one) for one in plans]
        print(json.dumps(objects if arguments.search else objects[0], indent=1))
    elif arguments.search:
        print(_table(plans, topology))
        if plans[0].changes:
            print("no layout fits", *_changes_lines(plans[0]), sep="\n")
    else:
        print(_text(plans[0], topology))
    return REFUSED if plans[0].outcome in (KERNEL_MEMORY, COMPILER_ERROR) else 0


def changes(unfit: Plan, config: Path, overrides: Sequence[str], topology: Topology) -> tuple[Change, ...]:
    """What to change in a run that does not fit, by the estimate. Where the compiler needs more than the estimate, what
    a change needs is scaled up by as much."""
    resolved = configs.load(config, list(overrides))
    own = unfit.estimated_arguments + unfit.estimated_temporaries
    needed = needed_memory(unfit.cause or "") or unfit.peak or own

    def peak(place: Topology, changed: list[str]) -> float | None:
        try:
            other = configs.load(config, [*overrides, *changed])
            return (plan(other, place, laid_out(other, place), compiles=False).peak or 0.0) * max(1.0, needed / own)
        except UserError:
            return None  # it does not divide, or contradicts another field

    return tuple(advise(resolved.config, unfit.mesh, topology, peak))


def _as_json(plan: Plan) -> dict[str, Any]:
    computed = ("compiled", "peak", "fits", "step_time")
    return asdict(plan) | {name: getattr(plan, name) for name in computed}


def _say(quiet: bool) -> Any:
    return (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True))


def _mesh_overrides(text: str | None) -> list[str]:
    if text is None:
        return []
    sizes = dict.fromkeys(AXES, "1")
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.lstrip("-").isdigit():
            raise UserError(f"--mesh: {part!r} is not AXIS=N; axes are {', '.join(AXES)}, N a number, -1 once")
        sizes[axis] = size
    return [f"mesh.{axis}={size}" for axis, size in sizes.items()]


def laid_out(resolved: Resolved, topology: Topology) -> "Layout":
    """The step's parts on a topology. Raises `UserError` where the mesh does not divide what it splits."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from xlam_jax.parallel.mesh import make_mesh
    from xlam_jax.training.setup import lay_out

    return lay_out(resolved, make_mesh(resolved.config.mesh.sizes, topology.devices() or _Gpu.some(topology)))


def plan(resolved: Resolved, topology: Topology, layout: "Layout", *, compiles: bool = True) -> Plan:
    """Plans one layout: compiled where a compiler for the topology is here and `compiles`, computed otherwise."""
    from xlam_jax.planning.estimate import estimate
    from xlam_jax.training import cost
    from xlam_jax.training.setup import abstract_batch

    config, model, mesh = resolved.config, resolved.model, layout.mesh
    reference = configs.reference(config) == "precomputed"
    batch = abstract_batch(layout, config.train.batch_size, config.data.sequence_length, reference=reference)
    guess = estimate(resolved, layout, batch)
    trained = sum(cost.trainable_sizes(model).values())
    places = config.train.batch_size * config.data.sequence_length
    base = Plan(
        mesh=dict(mesh.shape),
        remat=config.model.remat,
        microbatches=config.train.microbatches,
        batch_size=config.train.batch_size,
        sequence_length=config.data.sequence_length,
        kernels=layout.kernels_line,
        parameters=model.parameters() + (trained if model.lora else 0),
        trainable=trained,
        model_flops=cost.flops_per_token(model, config.data.sequence_length) * places / mesh.size,
        flops=guess.flops,
        arguments=guess.arguments,
        temporaries=guess.temporaries,
        device_memory=topology.chip.memory if topology.chip else None,
        memory=topology.memory,
        exchanges={},
        exchange_counts={},
        compute_time=None,
        memory_time=None,
        network_time=None,
        compile_seconds=None,
        estimated_arguments=guess.arguments,
        estimated_temporaries=guess.temporaries,
        estimated_flops=guess.flops,
    )
    computed = _timed(base, topology, layout, guess.collectives, guess.bytes)
    if not compiles or topology.platform == "gpu":
        return computed
    return _compiled(computed, resolved, topology, layout, batch)


def _compiled(computed: Plan, resolved: Resolved, topology: Topology, layout: "Layout", batch: Any) -> Plan:
    """The same with figures of the compiled module, or with the cause of the failure to compile it."""
    from functools import partial

    from xlam_jax.planning.estimate import kernel_flops
    from xlam_jax.planning.hlo import Module
    from xlam_jax.training import cost
    from xlam_jax.training.setup import lower_step

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="xlam-plan-") as dump:
        # libtpu writes modules that the loaded jaxlib can't always read back: its own text is read instead.
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        try:
            lowered = lower_step(layout, layout.state, layout.frozen, batch)
            compiled = lowered.compile(compiler_options=options)
        except Exception as error:
            if not of_compiler(error):
                raise
            outcome, cause = failure(error)
            return replace(computed, outcome=outcome, cause=cause, compile_seconds=time.monotonic() - began)
        seconds = time.monotonic() - began
        texts = sorted(Path(dump).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        module = Module(texts[-1].read_text(encoding="utf-8"))
    totals = module.totals(dict(layout.mesh.shape), partial(kernel_flops, resolved, layout))
    needs = cost.memory(compiled)
    read = replace(
        computed,
        flops=totals.flops,
        arguments=needs.arguments,
        temporaries=needs.temporaries + needs.outputs,
        outcome="compiled",
        compile_seconds=seconds,
        unknown_loops=totals.unknown_loops,
    )
    return _timed(read, topology, layout, totals.collectives, totals.bytes)


def _timed(base: Plan, topology: Topology, layout: "Layout", exchanged: "list[Collective]", traffic: float) -> Plan:
    """With its exchanges, and the times that the topology allows."""
    moved: dict[str, float] = {}
    counts: dict[str, int] = {}
    network: float | None = 0.0
    for one in exchanged:
        key = f"{one.kind} {'+'.join(one.axes) or '-'}"
        moved[key] = moved.get(key, 0.0) + one.bytes * one.times
        counts[key] = counts.get(key, 0) + one.times
        speed = topology.bandwidth(*_group(layout.mesh.devices, one.axes)) if one.axes else None
        network = None if network is None or (one.axes and not speed) else network
        if network is not None and speed:
            network += one.bytes * one.times / speed
    chip = topology.chip
    return replace(
        base,
        exchanges=moved,
        exchange_counts=counts,
        compute_time=base.flops / chip.flops if chip else None,
        memory_time=traffic / chip.bandwidth if chip else None,
        network_time=network if chip else None,
    )


def _group(devices: np.ndarray, axes: Sequence[str]) -> tuple[list[Any], int]:
    """The first group of devices along these axes of the mesh, and how far its ends stand apart."""
    picked = tuple(slice(None) if axis in axes else 0 for axis in AXES)
    places = np.arange(devices.size).reshape(devices.shape)[picked]
    return list(devices[picked].flat), int(places.max() - places.min()) + 1


class _Gpu:
    """Stands for a GPU where shapes are laid out; nothing is compiled for it."""

    platform, device_kind = "gpu", "GPU"

    def __init__(self, number: int):
        self.id, self.process_index = number, number // 8

    @classmethod
    def some(cls, topology: Topology) -> list["_Gpu"]:
        return [cls(number) for number in range(topology.count)]


# ---- search ---------------------------------------------------------------------------------------------------------


def search(resolved: Resolved, topology: Topology, say: Any) -> list[Plan]:
    """Layouts that fit, the fastest first. All are computed; of a TPU's the most promising are compiled too."""
    tried: list[tuple[Plan, Resolved]] = []
    refused = 0
    layouts: dict[str, Layout] = {}
    for one in candidates(resolved, topology.count):
        sizes = {f"mesh.{axis}": size for axis, size in one.config.mesh.sizes.items()}
        try:
            configs.check_divisible(one.config, one.model, sizes)
        except UserError:
            refused += 1
            continue
        mesh = str(sizes)
        if mesh not in layouts:
            layouts = {mesh: laid_out(one, topology)}  # those of a mesh come one after the other
        tried.append((plan(one, topology, layouts[mesh], compiles=False), one))
    if not tried:
        raise UserError(
            f"--search: no mesh of {topology.count} devices divides the model, train.batch_size "
            f"{resolved.config.train.batch_size} and data.sequence_length {resolved.config.data.sequence_length}; "
            "change the batch size or the topology"
        )
    tried.sort(key=lambda pair: (pair[0].fits is False, pair[0].step_time or pair[0].flops))
    fitting = [pair for pair in tried if pair[0].fits is not False]
    say(f"{len(tried)} layouts computed, {refused} do not divide; {len(fitting)} should fit")
    if topology.platform == "gpu":
        return [one for one, _ in fitting or tried[:1]]
    return _compile_best(fitting or tried, topology, say) + [guess for guess, _ in fitting[ATTEMPTS:]]


def _compile_best(tried: list[tuple[Plan, Resolved]], topology: Topology, say: Any) -> list[Plan]:
    """The first `COMPILED` layouts that compile and fit, the fastest first, then those of `ATTEMPTS` that were
    not tried. Layouts that fail are skipped, and the cause is reported; they are returned if all fail."""
    compiled: list[Plan] = []
    skipped: list[Plan] = []
    rest = tried[:ATTEMPTS]
    while rest and len(compiled) < COMPILED:
        guess, resolved = rest.pop(0)
        say(f"compiling {len(compiled) + 1} of {min(COMPILED, len(tried))}: {_layout(guess)}")
        result = plan(resolved, topology, laid_out(resolved, topology))
        if result.fits is False or result.failed:
            skipped.append(result)
            say(f"skipped: {_layout(result)}: {_reason(result)}")
        else:
            compiled.append(result)
    if not compiled:
        return skipped
    return sorted(compiled, key=lambda one: one.step_time or one.flops) + [guess for guess, _ in rest]


def candidates(resolved: Resolved, devices: int) -> list[Resolved]:
    """Layouts to try: every mesh with its rows on data × fsdp × expert, every remat, microbatches that divide."""
    config = resolved.config
    found = []
    for data, fsdp, expert, context, tensor in factorizations(devices, len(AXES)):
        if data > 1 and fsdp > 1 and config.train.trainable == "full":
            continue  # copies beside shards: the shards alone need less memory and move no more
        if tensor > 8 or context > 16:
            continue
        for remat in ("none", "dots", "minimal", "full"):
            for microbatches in (1, 2, 4, 8):
                mesh = config.mesh.model_copy(
                    update={"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
                )
                changed = config.model_copy(
                    update={
                        "mesh": mesh,
                        "model": config.model.model_copy(update={"remat": remat}),
                        "train": config.train.model_copy(update={"microbatches": microbatches}),
                    }
                )
                found.append(resolved._replace(config=changed))
    return found


# ---- what a person reads --------------------------------------------------------------------------------------------


def _layout(one: Plan) -> str:
    mesh = " ".join(f"{axis} {size}" for axis, size in one.mesh.items() if size > 1) or "one device"
    return f"{mesh}, remat {one.remat}, {one.microbatches} microbatch{'es' if one.microbatches > 1 else ''}"


def _gb(size: float) -> str:
    unit, name = next(pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "B")) if size >= pair[0] / 10)
    return f"{size / (unit or 1):.2f} {name}"


def _available(one: Plan) -> str:
    """The memory that a run may use of a device."""
    memory, whole = one.memory or 0.0, one.device_memory or 0.0
    if memory == whole:
        return _gb(whole)
    return f"{_gb(memory)} ({memory / whole:.0%} of {_gb(whole)}, by JAX's {FRACTIONS[0]})"


def _changes_lines(one: Plan) -> list[str]:
    """What to change in a run that does not fit."""
    if not one.changes:
        return []
    enough = one.changes[0].fits
    head = "each of these is enough" if enough else "none of these is enough alone; combine them, or take more devices"
    return [f"to make it fit  {head} (by the estimate):"] + [
        f"                {_gb(change.peak):>9}  {change.text}" for change in one.changes
    ]


def _seconds(time: float | None) -> str:
    return "not known" if time is None else f"{time:.3f} s" if time >= 0.1 else f"{1000 * time:.2f} ms"


def _reason(one: Plan) -> str:
    """Why a step can't run, for a plan that failed or does not fit."""
    if one.outcome == KERNEL_MEMORY:
        return f"{one.cause}; model.experts or model.attention set to xla computes without the kernel"
    if one.outcome == COMPILER_ERROR:
        return f"the compiler failed: {one.cause}"
    if one.outcome == DEVICE_MEMORY:
        return f"does not fit: {one.cause}"
    return f"does not fit, {_gb((one.peak or 0) - (one.memory or 0))} too much"


def _text(one: Plan, topology: Topology) -> str:
    how = (
        f"compiled in {one.compile_seconds:.0f} s"
        if one.compiled
        else f"computed: compiling failed after {one.compile_seconds:.0f} s; temporaries are a rough guess"
        if one.failed
        else "computed, not compiled: no compiler for GPUs is at hand; temporaries are a rough guess"
    )
    lines = [f"layout          {_layout(one)}", f"kernels         {one.kernels}", f"figures         {how}"]
    lines.append(f"batch           {one.batch_size:,} rows of {one.sequence_length:,} tokens a step")
    share = "all of which train" if one.trainable == one.parameters else f"{one.trainable:,} of which train"
    lines.append(f"parameters      {one.parameters:,}, {share}")
    used = f"{_gb(one.arguments)} state, weights and batch, {_gb(one.temporaries or 0)} temporaries"
    lines.append(f"memory          {_gb(one.peak or 0)} a device: {used}")
    if one.outcome == DEVICE_MEMORY:
        lines.append(f"                {_reason(one)}")
    elif one.memory is not None and one.peak is not None:
        left = one.memory - one.peak
        verdict = f"fits, {_gb(left)} left" if left >= 0 else f"does not fit, {_gb(-left)} too much"
        lines.append(f"                of {_available(one)}: {verdict}")
    lines += _changes_lines(one)
    lines.append(
        f"FLOPs           {one.flops:.4g} a device and step, {one.flops / one.model_flops:.3f} × the model's "
        f"{one.model_flops:.4g}"
    )
    if one.unknown_loops:
        lines.append(f"                {one.unknown_loops} loops whose length only a run knows are counted once")
    for key, size in sorted(one.exchanges.items(), key=lambda item: -item[1]):
        lines.append(f"exchange        {key:28} {_gb(size):>12} in {one.exchange_counts[key]}")
    if topology.chip:
        lines.append(
            f"at the least    compute {_seconds(one.compute_time)}, memory {_seconds(one.memory_time)}, "
            f"network {_seconds(one.network_time)} a step"
        )
        allowed = one.utilization(topology.chip.flops)
        if allowed is not None:
            lines.append(
                f"utilization     {allowed:.1%} of the chip's peak at most, all but the slowest of these hidden"
            )
    else:
        lines.append(
            "times           not known: this machine's speed is in no table; xlam_jax.train --dry-run measures"
        )
    if one.outcome in (KERNEL_MEMORY, COMPILER_ERROR):
        lines.append(f"not compiled    {_reason(one)}")
    return "\n".join(lines)


def _table(plans: list[Plan], topology: Topology) -> str:
    rows = [("layout", "memory", "FLOPs / model", "step", "utilization", "figures")]
    for one in plans[:20]:
        allowed = one.utilization(topology.chip.flops) if topology.chip else None
        memory = _gb(one.peak or 0) if one.fits is not False else f"{_gb(one.peak or 0)}, too much"
        rows.append(
            (
                _layout(one),
                memory,
                f"{one.flops / one.model_flops:.2f}",
                _seconds(one.step_time),
                "" if allowed is None else f"{allowed:.1%}",
                f"computed; {one.outcome}" if one.failed else one.outcome,
            )
        )
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + ([f"and {len(plans) - 20} more"] if len(plans) > 20 else []))


if __name__ == "__main__":
    cli.run(main)
