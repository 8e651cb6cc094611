"""Plans a run for other machines: `python -m xlam_jax.plan --config C --topology v5p:4x4x4`.

Reports memory, FLOPs, communication and minimum time of the step that `xlam_jax.train` compiles. For a TPU slice, the
TPU compiler (libtpu) compiles it on this machine; for GPUs, the CUDA plugin does, or without it, the figures are
computed from the config; for CPUs the step is compiled for this machine.

Exit codes: 0 after a complete plan, also if the step does not fit; 2 for invalid input; 3 if the compilation failed for
another reason than the device's memory.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xlam_jax import cli
from xlam_jax import config as configs
from xlam_jax.config import Resolved
from xlam_jax.enums import MESH_AXES
from xlam_jax.errors import UserError
from xlam_jax.planning import gpu
from xlam_jax.planning.advice import Change, advise
from xlam_jax.planning.failures import (
    COMPILER_ERROR,
    KERNEL_MEMORY,
    classify,
    is_compiler_error,
    needed_memory,
)
from xlam_jax.planning.hardware import Topology, factorizations, parse
from xlam_jax.planning.summary import Plan, changes_lines, failure_line, format_plan, format_table, layout_line

if TYPE_CHECKING:
    from xlam_jax.planning.hlo import Collective
    from xlam_jax.training.setup import Layout

COMPILED = 3
"""Number of layouts that a search compiles successfully, the fastest by the estimate first."""
ATTEMPTS = 6
"""Maximum number of layouts that a search compiles, including failures."""
REFUSED = 3
"""Exit code if the compilation failed for another reason than the device's memory."""


def main() -> int:
    """The command line."""
    parser = cli.Parser(
        prog="python -m xlam_jax.plan",
        description="Report the memory, FLOPs and communication of a training run on machines that you don't have yet.",
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE.yaml", help="config of the run")
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="devices, such as v5p:4x4x4, v5e:2x4, gpu:h100:8 or cpu:8"
    )
    parser.add_argument(
        "--mesh", metavar="AXIS=N,…", help="number of devices along each axis, 1 for others (default: the config's)"
    )
    parser.add_argument(
        "--search", action="store_true", help="try meshes, remat and microbatches, and rank the layouts that fit"
    )
    parser.add_argument("--estimate", action="store_true", help="compute the figures from the config, compile nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="config fields to set")
    arguments = parser.parse_intermixed_args()
    topology = parse(arguments.topology)
    overrides = list(arguments.overrides) + _mesh_overrides(arguments.mesh)
    resolved = load(arguments.config, overrides)
    if not arguments.json:
        print(f"{arguments.config} on {topology.name}: {topology.count} devices", flush=True)
    if not arguments.estimate and not topology.has_compiler:
        print(f"note: to compile for GPUs: pip install 'xlam_jax[{gpu.EXTRA}]'", file=sys.stderr, flush=True)
    if arguments.search:
        plans = search(resolved, topology, _reporter(arguments.json), compiles=not arguments.estimate)
    else:
        plans = [plan(resolved, topology, make_layout(resolved, topology), compiles=not arguments.estimate)]
    if plans[0].fits is False:
        plans[0] = replace(plans[0], changes=changes(plans[0], arguments.config, overrides, topology))
    if arguments.json:
        objects = [as_json(ranked) for ranked in plans]
        print(json.dumps(objects if arguments.search else objects[0], indent=1))
    elif arguments.search:
        print(format_table(plans, topology))
        if plans[0].changes:
            print("no layout fits", *changes_lines(plans[0]), sep="\n")
    else:
        print(format_plan(plans[0], topology))
    return REFUSED if plans[0].outcome in (KERNEL_MEMORY, COMPILER_ERROR) else 0


def changes(unfit: Plan, config: Path, overrides: Sequence[str], topology: Topology) -> tuple[Change, ...]:
    """Returns changes of a run that does not fit, by the estimate.

    If the compiler needs more memory than the estimate, the estimates of the changes are scaled up by the same factor.
    """
    resolved = load(config, overrides)
    estimated = unfit.estimated_arguments + unfit.estimated_temporaries
    needed = needed_memory(unfit.cause or "") or unfit.peak or estimated

    def peak(place: Topology, changed: list[str]) -> float | None:
        try:
            other = load(config, [*overrides, *changed])
            layout = make_layout(other, place)
            return (plan(other, place, layout, compiles=False).peak or 0.0) * max(1.0, needed / estimated)
        except UserError:
            return None  # not divisible, or in conflict with another field

    return tuple(advise(resolved.config, unfit.mesh, topology, peak))


def load(config: Path, overrides: Sequence[str]) -> Resolved:
    """Loads a config. The tokenizer may not be on this machine, so it is assumed to have all tokens of the model's
    vocabulary: `data.added_tokens` then need the most memory."""
    resolved = configs.load(config, list(overrides))
    return configs.with_vocabulary(resolved, resolved.model.vocab_size)


def as_json(plan: Plan) -> dict[str, Any]:
    """Returns a plan's fields and derived figures as JSON values."""
    properties = ("compiled", "peak", "fits", "step_time")
    return asdict(plan) | {name: getattr(plan, name) for name in properties}


def _reporter(quiet: bool) -> Any:
    """Returns a function that prints a line on stderr, or does nothing."""
    return (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True))


def _mesh_overrides(text: str | None) -> list[str]:
    if text is None:
        return []
    sizes = dict.fromkeys(MESH_AXES, "1")
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.lstrip("-").isdigit():
            raise UserError(
                f"--mesh: {part!r} is not AXIS=N; axes are {', '.join(MESH_AXES)}, N is a number, or -1 for one axis"
            )
        sizes[axis] = size
    return [f"mesh.{axis}={size}" for axis, size in sizes.items()]


def make_layout(resolved: Resolved, topology: Topology) -> "Layout":
    """Lays out the step's arrays on a topology. Raises `UserError` for a mesh that does not divide their dimensions."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from xlam_jax.parallel.mesh import make_mesh
    from xlam_jax.training.setup import lay_out

    return lay_out(resolved, make_mesh(resolved.config.mesh.sizes, topology.devices() or _Gpu.all_of(topology)))


def plan(resolved: Resolved, topology: Topology, layout: "Layout", *, compiles: bool = True) -> Plan:
    """Plans one layout: compiled if `compiles` and a compiler for the topology is available, otherwise computed."""
    from xlam_jax.planning.estimate import estimate
    from xlam_jax.training import cost
    from xlam_jax.training.setup import abstract_batch

    config, model, mesh = resolved.config, resolved.model, layout.mesh
    reference = configs.reference(config) == "precomputed"
    batch = abstract_batch(layout, config.train.batch_size, config.data.sequence_length, reference=reference)
    estimated = estimate(resolved, layout, batch)
    trained = sum(cost.trainable_sizes(model).values())
    tokens = config.train.batch_size * config.data.sequence_length
    base = Plan(
        mesh=dict(mesh.shape),
        remat=config.model.remat,
        microbatches=config.train.microbatches,
        batch_size=config.train.batch_size,
        sequence_length=config.data.sequence_length,
        kernels=layout.kernels_line,
        parameters=model.parameters() + (trained if model.lora else 0),
        trainable=trained,
        model_flops=cost.flops_per_token(model, config.data.sequence_length) * tokens / mesh.size,
        flops=estimated.flops,
        arguments=estimated.arguments,
        temporaries=estimated.temporaries,
        device_memory=topology.chip.memory if topology.chip else None,
        memory=topology.memory,
        exchanges={},
        exchange_counts={},
        compute_time=None,
        memory_time=None,
        network_time=None,
        compile_seconds=None,
        estimated_arguments=estimated.arguments,
        estimated_temporaries=estimated.temporaries,
        estimated_flops=estimated.flops,
    )
    computed = _add_times(base, topology, layout, estimated.collectives, estimated.bytes)
    if not compiles or not topology.has_compiler:
        return computed
    return _compile(computed, resolved, topology, layout, batch)


def _compile(computed: Plan, resolved: Resolved, topology: Topology, layout: "Layout", batch: Any) -> Plan:
    """Compiles the step. Returns the plan with the figures of the compiled module, or with the cause of the failure."""
    from functools import partial

    from xlam_jax.planning.estimate import kernel_flops
    from xlam_jax.planning.hlo import Module
    from xlam_jax.training import compiler_options, cost
    from xlam_jax.training.setup import lower_step

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="xlam-plan-") as dump:
        # jaxlib can't always read back modules that libtpu writes, so its text dump is parsed instead
        dumping = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        options = {**layout.compiler_options, **topology.compiler_options, **dumping}
        try:
            lowered = lower_step(layout, layout.state, layout.frozen, batch)
            with _no_compilation_cache():
                compiled = lowered.compile(compiler_options=options)
        except Exception as error:
            refused = compiler_options.refusal(error, resolved.config.model.compiler_options)
            if refused or not is_compiler_error(error):
                raise (refused or error) from None
            outcome, cause = classify(error)
            return replace(computed, outcome=outcome, cause=cause, compile_seconds=time.monotonic() - start)
        seconds = time.monotonic() - start
        texts = sorted(Path(dump).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        module = Module(texts[-1].read_text(encoding="utf-8"))
        totals = module.totals(dict(layout.mesh.shape), partial(kernel_flops, resolved, layout))
        compiled_kernels = topology.kernels(Path(dump), totals.kernels)
    memory = cost.memory(compiled)
    measured = replace(
        computed,
        flops=totals.flops,
        arguments=memory.arguments,
        temporaries=memory.temporaries + memory.outputs,
        outcome="compiled",
        compile_seconds=seconds,
        unknown_loops=totals.unknown_loops,
        compiled_kernels=compiled_kernels,
    )
    return _add_times(measured, topology, layout, totals.collectives, totals.bytes)


@contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """Compiles also what JAX has in its cache on disk: a module from there is not dumped, and needs its devices."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    name = "jax_enable_compilation_cache"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    compilation_cache.reset_cache()  # JAX remembers whether it is enabled
    try:
        yield
    finally:
        jax.config.update(name, before)
        compilation_cache.reset_cache()


def _add_times(
    base: Plan, topology: Topology, layout: "Layout", collectives: "list[Collective]", traffic: float
) -> Plan:
    """Adds the exchanged bytes, and the minimum times by the topology's data sheet.

    `traffic`: bytes of main memory that a device reads and writes per step.
    """
    received: dict[str, float] = {}
    counts: dict[str, int] = {}
    network: float | None = 0.0
    for collective in collectives:
        key = f"{collective.kind} {'+'.join(collective.axes) or '-'}"
        total = collective.bytes * collective.times
        received[key] = received.get(key, 0.0) + total
        counts[key] = counts.get(key, 0) + collective.times
        axes = collective.axes
        bandwidth = topology.bandwidth(*_group(layout.mesh.devices, axes)) if axes else None
        network = None if network is None or (axes and not bandwidth) else network
        if network is not None and bandwidth:
            network += total / bandwidth
    chip = topology.chip
    return replace(
        base,
        exchanges=received,
        exchange_counts=counts,
        compute_time=base.flops / chip.flops if chip else None,
        memory_time=traffic / chip.bandwidth if chip else None,
        network_time=network if chip else None,
    )


def _group(devices: np.ndarray, axes: Sequence[str]) -> tuple[list[Any], int]:
    """Returns the first group of devices along mesh axes, and the extent of its indices in the order of all devices."""
    index = tuple(slice(None) if axis in axes else 0 for axis in MESH_AXES)
    positions = np.arange(devices.size).reshape(devices.shape)[index]
    return list(devices[index].flat), int(positions.max() - positions.min()) + 1


class _Gpu:
    """Placeholder of a GPU for laying out shapes; nothing is compiled for it."""

    platform, device_kind = "gpu", "GPU"

    def __init__(self, number: int, kind: str):
        self.id, self.process_index = number, number // 8
        self.compute_capability = ".".join(map(str, gpu.TARGETS[kind].capability))
        self.shared_memory_per_block_optin = gpu.TARGETS[kind].block_shared

    @classmethod
    def all_of(cls, topology: Topology) -> list["_Gpu"]:
        """Returns a placeholder for each device of a topology."""
        return [cls(number, topology.kind) for number in range(topology.count)]


# ---- search ---------------------------------------------------------------------------------------------------------


def search(resolved: Resolved, topology: Topology, report: Any, *, compiles: bool = True) -> list[Plan]:
    """Returns the plans of layouts that fit, the fastest first.

    All are computed; if `compiles` and there is a compiler, the fastest are also compiled. `report` is called with each
    progress line. Raises `UserError` if no mesh divides the model and the batch.
    """
    tried: list[tuple[Plan, Resolved]] = []
    refused = 0
    layouts: dict[str, Layout] = {}
    for candidate in candidates(resolved, topology.count):
        sizes = {f"mesh.{axis}": size for axis, size in candidate.config.mesh.sizes.items()}
        try:
            configs.check_divisible(candidate.config, candidate.model, sizes)
        except UserError:
            refused += 1
            continue
        mesh = str(sizes)
        if mesh not in layouts:
            layouts = {mesh: make_layout(candidate, topology)}  # candidates are grouped by mesh
        tried.append((plan(candidate, topology, layouts[mesh], compiles=False), candidate))
    if not tried:
        raise UserError(
            f"--search: no mesh of {topology.count} devices divides the model, train.batch_size "
            f"{resolved.config.train.batch_size} and data.sequence_length {resolved.config.data.sequence_length}; "
            "change the batch size or the topology"
        )
    tried.sort(key=lambda pair: (pair[0].fits is False, pair[0].step_time or pair[0].flops))
    fitting = [pair for pair in tried if pair[0].fits is not False]
    report(f"{len(tried)} layouts computed, {refused} not divisible; {len(fitting)} fit by the estimate")
    if not compiles or not topology.has_compiler:
        return [computed for computed, _ in fitting or tried[:1]]
    return _compile_best(fitting or tried, topology, report) + [computed for computed, _ in fitting[ATTEMPTS:]]


def _compile_best(tried: list[tuple[Plan, Resolved]], topology: Topology, report: Any) -> list[Plan]:
    """Compiles layouts until `COMPILED` of them fit, or `ATTEMPTS` were tried.

    Returns the compiled plans, the fastest first, then the remaining computed ones of the first `ATTEMPTS`. Failed
    layouts are skipped, and their cause is reported; they are returned if all fail.
    """
    compiled: list[Plan] = []
    skipped: list[Plan] = []
    rest = tried[:ATTEMPTS]
    while rest and len(compiled) < COMPILED:
        computed, resolved = rest.pop(0)
        report(f"compiling {len(compiled) + 1} of {min(COMPILED, len(tried))}: {layout_line(computed)}")
        result = plan(resolved, topology, make_layout(resolved, topology))
        if result.fits is False or result.failed:
            skipped.append(result)
            report(f"skipped: {layout_line(result)}: {failure_line(result)}")
        else:
            compiled.append(result)
    if not compiled:
        return skipped
    ranked = sorted(compiled, key=lambda result: result.step_time or result.flops)
    return ranked + [computed for computed, _ in rest]


def candidates(resolved: Resolved, devices: int) -> list[Resolved]:
    """Returns the layouts that a search tries, grouped by mesh: each mesh with each remat and microbatch count."""
    config = resolved.config
    layouts = []
    for data, fsdp, expert, context, tensor in factorizations(devices, len(MESH_AXES)):
        if data > 1 and fsdp > 1 and config.train.trainable == "full":
            continue  # sharding alone needs less memory than replicas of shards, and no more communication
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
                layouts.append(resolved._replace(config=changed))
    return layouts


if __name__ == "__main__":
    cli.run(main)
