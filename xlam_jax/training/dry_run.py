"""`--dry-run`: reports what a run would cost; writes nothing."""

import time
from collections.abc import Callable
from typing import Any

from xlam_jax import config as configs
from xlam_jax.config import Resolved
from xlam_jax.progress import Progress, duration
from xlam_jax.training.setup import Setup, compile_step, set_up


def dry_run(resolved: Resolved, *, quiet: bool = False) -> int:
    """Does everything up to the first steps, with random weights in place of those that a run would read.

    `quiet`: print nothing, for all hosts except one. Returns the exit code.
    """
    progress = Progress(quiet=quiet)
    write = (lambda _: None) if quiet else print
    for line in resolved.warnings:
        progress.line(f"warning: {line}")
    from xlam_jax.training import cost
    from xlam_jax.weights import run as weights

    weights.read_base(resolved)
    setup = set_up(resolved, progress)
    resolved = setup.resolved  # with train.steps computed from train.epochs
    train, length = resolved.config.train, resolved.config.data.sequence_length
    rows, batch = _first_batch(resolved, setup)
    compiled = compile_step(setup, setup.state, setup.frozen, batch, progress.line)
    places = train.batch_size * length
    flops = cost.flops_per_token(setup.model, length) * places
    fits = _write_sizes(setup, compiled, write)
    real, trained = int((rows.segments > 0).sum()), int((rows.weights != 0).sum())
    write(
        f"tokens per step    {places:,} places; the first batch fills {real / rows.segments.size:.1%} of them, "
        f"and {trained / rows.segments.size:.1%} are trained"
    )
    write(f"model FLOPs        {flops:.3g} per step")
    if not fits:
        write("time               not measured: the step does not fit the device's memory")
        return 0
    seconds = _time_step(resolved, setup, compiled, batch)
    write(
        f"time               {seconds:.3f} s per step (median of 3, after one warm-up step; random weights): "
        f"{places / seconds:,.0f} tokens/s, {flops / seconds / 1e12:.3g} TFLOP/s"
    )
    write(f"the whole run      {duration(seconds * train.steps)} for {train.steps} steps, without evaluations")
    write("nothing was written")
    return 0


def _first_batch(resolved: Resolved, setup: Setup) -> tuple[Any, Any]:
    """Returns this host's rows of the first batch, and the batch on the devices."""
    import numpy as np

    from xlam_jax.data import pipeline

    config = resolved.config
    loader = pipeline.Loader(
        setup.loaded,
        config.data,
        batch_size=config.train.batch_size,
        seed=config.seed,
        tokenizer=setup.tokenizer,
        rows=setup.rows(config.train.batch_size),
    )
    rows = next(loader)
    if configs.reference(config) == "precomputed":
        rows = rows._replace(reference=np.zeros_like(rows.weights))
    return rows, setup.batch(rows, config.train.batch_size)


def _write_sizes(setup: Setup, compiled: Any, write: Callable[[str], None]) -> bool:
    """Writes the number of parameters and the memory per device; returns whether the step fits there."""
    import jax

    from xlam_jax.training import cost

    needs = cost.memory(compiled)
    trained = sum(cost.trainable_sizes(setup.model).values())
    total = setup.model.parameters() + (trained if setup.model.lora else 0)
    available = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    write(f"parameters         {total:,}, of which {trained:,} ({trained / total:.2%}) train")
    write(
        f"memory per device  {needs.peak / 1e9:.2f} GB: {needs.arguments / 1e9:.2f} state, weights and batch, "
        f"{needs.temporaries / 1e9:.2f} temporaries"
        + (f"; the device has {available / 1e9:.2f} GB" if available else "")
    )
    return not available or needs.peak <= available


def _time_step(resolved: Resolved, setup: Setup, compiled: Any, batch: Any) -> float:
    """Returns the median time of three steps with random weights, in seconds, after one warm-up step."""
    import jax

    from xlam_jax.training.step import init_state
    from xlam_jax.weights import run as weights

    state = init_state(setup.state, setup.tx, weights.fresh(resolved, None, setup.state.params))
    frozen = weights.frozen(resolved, None, setup.frozen, setup.dtype)
    seconds = []
    for _ in range(4):
        began = time.monotonic()
        state, values = compiled(state, frozen, batch)
        jax.block_until_ready(values)
        seconds.append(time.monotonic() - began)
    return sorted(seconds[1:])[1]
