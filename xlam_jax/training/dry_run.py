"""`--dry-run`: what a run would cost, told before anything is written."""

import time

from xlam_jax import config as configs
from xlam_jax.config import Resolved
from xlam_jax.progress import Progress, duration
from xlam_jax.training.setup import compiled_step, set_up


def dry_run(resolved: Resolved, *, quiet: bool = False) -> int:
    """Everything up to the first steps, with random weights in place of those that a run would read; writes nothing.

    `quiet` tells nothing, for all hosts but one.
    """
    config, progress = resolved.config, Progress(quiet=quiet)
    tell = (lambda _: None) if quiet else print
    for line in resolved.warnings:
        progress.line(f"warning: {line}")
    from xlam_jax.training import weights

    weights.read_base(resolved)
    made = set_up(resolved, progress)

    import jax
    import numpy as np

    from xlam_jax.data import pipeline
    from xlam_jax.training import cost
    from xlam_jax.training import step as steps

    loader = pipeline.Loader(
        made.loaded,
        config.data,
        batch_size=config.train.batch_size,
        seed=config.seed,
        tokenizer=made.tokenizer,
        rows=made.rows(config.train.batch_size),
    )
    rows = next(loader)
    if configs.reference(config) == "precomputed":
        rows = rows._replace(reference=np.zeros_like(rows.weights))
    batch = made.batch(rows, config.train.batch_size)
    compiled = compiled_step(resolved, made, made.state, made.frozen, batch, progress)
    needs, model = cost.memory(compiled), resolved.model
    places = config.train.batch_size * config.data.sequence_length
    flops = cost.flops_per_token(model, config.data.sequence_length) * places
    trained = sum(cost.trainable_sizes(model).values())
    total = model.parameters() + (trained if model.lora else 0)
    device = jax.local_devices()[0]
    available = (device.memory_stats() or {}).get("bytes_limit")
    tell(f"parameters         {total:,}, of which {trained:,} ({trained / total:.2%}) train")
    tell(
        f"memory a device    {needs.peak / 1e9:.2f} GB: {needs.arguments / 1e9:.2f} state, weights and batch, "
        f"{needs.temporaries / 1e9:.2f} temporaries"
        + (f"; the device has {available / 1e9:.2f} GB" if available else "")
    )
    real, carries = int((rows.segments > 0).sum()), int((rows.weights != 0).sum())
    tell(
        f"tokens a step      {places:,} places; the first batch fills {real / rows.segments.size:.1%} of them, "
        f"and {carries / rows.segments.size:.1%} carry loss"
    )
    tell(f"model FLOPs        {flops:.3g} a step")
    if available and needs.peak > available:
        tell("time               not measured: the step does not fit the device's memory")
        return 0
    drawn = weights.fresh(resolved, None, made.state.params)
    state = steps.init_state(made.state, made.tx, drawn)
    frozen = weights.frozen(resolved, None, made.frozen, made.dtype)
    took = []
    for _ in range(4):
        began = time.monotonic()
        state, values = compiled(state, frozen, batch)
        jax.block_until_ready(values)
        took.append(time.monotonic() - began)
    step = sorted(took[1:])[1]
    tell(
        f"time               {step:.3f} s a step (the middle one of 3, after one to warm up; random weights): "
        f"{places / step:,.0f} tokens/s, {flops / step / 1e12:.3g} TFLOP/s"
    )
    tell(
        f"the whole run      {duration(step * config.train.steps)} for {config.train.steps} steps, without evaluations"
    )
    tell("nothing was written")
    return 0
