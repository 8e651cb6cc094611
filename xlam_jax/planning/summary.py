"""The plan of a training step, and its report as text."""

from dataclasses import dataclass

from xlam_jax.planning.advice import Change
from xlam_jax.planning.failures import COMPILER_ERROR, DEVICE_MEMORY, KERNEL_MEMORY
from xlam_jax.planning.gpu import Kernel
from xlam_jax.planning.hardware import FRACTIONS, Topology

FAILURES = (DEVICE_MEMORY, KERNEL_MEMORY, COMPILER_ERROR)
"""Outcomes of a failed compilation."""
SHOWN = 20
"""Maximum number of layouts in a table."""


@dataclass(frozen=True)
class Plan:
    """The resources that a training step needs. Bytes and FLOPs are per device and step, times in seconds."""

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
    """Bytes of a device's memory; None if unknown."""
    memory: float | None
    """Bytes of it that JAX's allocator may use."""
    exchanges: dict[str, float]
    """"Kind axes" of a collective, such as "all-gather fsdp" → bytes that a device receives."""
    exchange_counts: dict[str, int]
    """"Kind axes" of a collective → number of collectives."""
    compute_time: float | None
    memory_time: float | None
    network_time: float | None
    compile_seconds: float | None
    estimated_arguments: float
    estimated_temporaries: float
    estimated_flops: float
    unknown_loops: int = 0
    outcome: str = "computed"
    """compiled: the figures are read from the compiled module. Otherwise they are computed from the config, because no
    compiler was used (computed), or because it failed (device-memory, kernel-memory or compiler-error)."""
    cause: str | None = None
    """Why the compilation failed, in one line."""
    compiled_kernels: tuple[Kernel, ...] = ()
    """Custom kernels of a GPU."""
    changes: tuple[Change, ...] = ()
    """Suggested changes if the step does not fit."""

    @property
    def compiled(self) -> bool:
        """Whether the figures are read from the compiled module."""
        return self.outcome == "compiled"

    @property
    def failed(self) -> bool:
        """Whether the compilation failed."""
        return self.outcome in FAILURES

    @property
    def peak(self) -> float | None:
        """Peak memory of a step in bytes."""
        return None if self.temporaries is None else self.arguments + self.temporaries

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the memory that JAX may use; None if that is unknown, or if the compilation failed
        for another reason than the device's memory."""
        if self.failed:
            return False if self.outcome == DEVICE_MEMORY else None
        return None if self.memory is None or self.peak is None else self.peak <= self.memory

    @property
    def step_time(self) -> float | None:
        """Lower bound of the time of a step: its slowest part, if it hides the others."""
        times = (self.compute_time, self.memory_time, self.network_time)
        return None if self.compute_time is None else max(time for time in times if time is not None)

    def utilization(self, peak_flops: float) -> float | None:
        """Upper bound of the model FLOPs utilization (MFU), as a fraction; None if the times are unknown."""
        return self.model_flops / peak_flops / self.step_time if self.step_time else None


def layout_line(plan: Plan) -> str:
    """Returns mesh, remat and microbatches in one line."""
    mesh = " ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    return f"{mesh}, remat {plan.remat}, {plan.microbatches} microbatch{'es' if plan.microbatches > 1 else ''}"


def _gb(size: float) -> str:
    unit, name = next(pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "B")) if size >= pair[0] / 10)
    return f"{size / (unit or 1):.2f} {name}"


def _available_memory(plan: Plan) -> str:
    """Returns the memory that a run may use of a device."""
    memory, whole = plan.memory or 0.0, plan.device_memory or 0.0
    if memory == whole:
        return _gb(whole)
    return f"{_gb(memory)} ({memory / whole:.0%} of {_gb(whole)}, by JAX's {FRACTIONS[0]})"


def changes_lines(plan: Plan) -> list[str]:
    """Returns lines with the changes that make a run fit, none if it fits."""
    if not plan.changes:
        return []
    enough = plan.changes[0].fits
    head = "each of these is enough" if enough else "none of these is enough alone; combine them, or use more devices"
    return [f"to make it fit  {head} (by the estimate):"] + [
        f"                {_gb(change.peak):>9}  {change.text}" for change in plan.changes
    ]


def _seconds(time: float | None) -> str:
    return "unknown" if time is None else f"{time:.3f} s" if time >= 0.1 else f"{1000 * time:.2f} ms"


def failure_line(plan: Plan) -> str:
    """Returns why a step can't run, for a plan that failed or does not fit."""
    if plan.outcome == KERNEL_MEMORY:
        return f"{plan.cause}; set model.experts or model.attention to xla to compute without the kernel"
    if plan.outcome == COMPILER_ERROR:
        return f"the compiler failed: {plan.cause}"
    if plan.outcome == DEVICE_MEMORY:
        return f"does not fit: {plan.cause}"
    return f"does not fit, {_gb((plan.peak or 0) - (plan.memory or 0))} too much"


def format_plan(plan: Plan, topology: Topology) -> str:
    """Returns the report of one plan, in lines of a label (16 characters) and figures."""
    origin = (
        f"compiled in {plan.compile_seconds:.0f} s"
        if plan.compiled
        else f"computed: compilation failed after {plan.compile_seconds:.0f} s; temporaries are a rough estimate"
        if plan.failed
        else "computed, not compiled; temporaries are a rough estimate"
    )
    lines = [f"layout          {layout_line(plan)}", f"kernels         {plan.kernels}", f"figures         {origin}"]
    lines.append(f"batch           {plan.batch_size:,} rows of {plan.sequence_length:,} tokens per step")
    share = "all trainable" if plan.trainable == plan.parameters else f"{plan.trainable:,} trainable"
    lines.append(f"parameters      {plan.parameters:,}, {share}")
    used = f"{_gb(plan.arguments)} state, weights and batch, {_gb(plan.temporaries or 0)} temporaries"
    lines.append(f"memory          {_gb(plan.peak or 0)} per device: {used}")
    if plan.outcome == DEVICE_MEMORY:
        lines.append(f"                {failure_line(plan)}")
    elif plan.memory is not None and plan.peak is not None:
        left = plan.memory - plan.peak
        verdict = f"fits, {_gb(left)} left" if left >= 0 else f"does not fit, {_gb(-left)} too much"
        lines.append(f"                of {_available_memory(plan)}: {verdict}")
    lines += changes_lines(plan)
    lines.append(
        f"FLOPs           {plan.flops:.4g} per device and step, {plan.flops / plan.model_flops:.3f} × the model's "
        f"{plan.model_flops:.4g}"
    )
    if plan.unknown_loops:
        lines.append(f"                {plan.unknown_loops} loops with an unknown trip count are counted once")
    for key, size in sorted(plan.exchanges.items(), key=lambda item: -item[1]):
        lines.append(f"exchange        {key:28} {_gb(size):>12} in {plan.exchange_counts[key]}")
    lines += [
        f"kernel          {kernel.name}: {kernel.registers} registers, {kernel.spilled} B spilled, "
        f"{kernel.shared / 1024:.0f} KiB shared memory, {kernel.threads} threads, "
        f"blocks per multiprocessor: {kernel.blocks}"
        for kernel in plan.compiled_kernels
    ]
    if topology.chip:
        lines.append(
            f"minimum time    compute {_seconds(plan.compute_time)}, memory {_seconds(plan.memory_time)}, "
            f"network {_seconds(plan.network_time)} per step"
        )
        allowed = plan.utilization(topology.chip.flops)
        if allowed is not None:
            lines.append(
                f"utilization     at most {allowed:.1%} of the chip's peak, if the slowest of these hides the others"
            )
    else:
        lines.append(
            "times           unknown: this machine has no data sheet here; measure with xlam_jax.train --dry-run"
        )
    if plan.outcome in (KERNEL_MEMORY, COMPILER_ERROR):
        lines.append(f"not compiled    {failure_line(plan)}")
    return "\n".join(lines)


def format_table(plans: list[Plan], topology: Topology) -> str:
    """Returns a table of the first SHOWN plans."""
    rows = [("layout", "memory", "FLOPs / model", "step", "utilization", "figures")]
    for plan in plans[:SHOWN]:
        allowed = plan.utilization(topology.chip.flops) if topology.chip else None
        memory = _gb(plan.peak or 0) if plan.fits is not False else f"{_gb(plan.peak or 0)}, too much"
        rows.append(
            (
                layout_line(plan),
                memory,
                f"{plan.flops / plan.model_flops:.2f}",
                _seconds(plan.step_time),
                "" if allowed is None else f"{allowed:.1%}",
                f"computed; {plan.outcome}" if plan.failed else plan.outcome,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + ([f"and {len(plans) - SHOWN} more"] if len(plans) > SHOWN else []))
