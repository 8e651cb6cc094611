"""What a run needs before its first weight is read: data, devices, objective, and the compiled step."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from xlam_jax import config as configs
from xlam_jax.config import Resolved
from xlam_jax.errors import UserError

if TYPE_CHECKING:
    import optax
    from jax.sharding import Mesh

    from xlam_jax.data.examples import Loaded
    from xlam_jax.data.pipeline import Row
    from xlam_jax.models.kernels import Kernels
    from xlam_jax.training.progress import Progress
    from xlam_jax.training.step import Batch, Objective, State

RUN = "run.json"


@dataclass(frozen=True)
class Layout:
    """What is computed on which devices."""

    mesh: "Mesh"
    tx: "optax.GradientTransformation"
    objective: "Objective"
    state: "State"
    """Abstract: shapes, dtypes, shardings."""
    frozen: Any
    """Abstract too."""
    dtype: Any
    quantized: bool
    kernels: "Kernels"
    kernels_line: str
    """Which kernels these are, for the log."""


@dataclass(frozen=True)
class Setup(Layout):
    """What stands before any weight is read."""

    tokenizer: Any
    loaded: "list[Loaded]"

    def rows(self, count: int) -> list[int]:
        """Which rows of a batch of so many this host needs."""
        from xlam_jax.parallel.mesh import rows_here

        return rows_here(self.mesh, count)

    def batch(self, mine: "Row", count: int) -> "Batch":
        """This host's `rows` of a batch of `count`, as its part of the batch on the devices."""
        from xlam_jax.parallel.mesh import put_rows
        from xlam_jax.training.step import Batch

        return Batch(*(None if one is None else put_rows(self.mesh, one, count) for one in mine))


def set_up(resolved: Resolved, progress: "Progress") -> Setup:
    """Reads the data, then lays out the devices. Nothing is written, no weight is read."""
    config = resolved.config

    # ---- data: before any device is touched, so that a bad row costs seconds ------------------------------------
    from xlam_jax.data import corpus
    from xlam_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.data.tokenizer)
    if len(tokenizer) > resolved.model.vocab_size:
        raise UserError(
            f"data.tokenizer: {config.data.tokenizer} has {len(tokenizer)} tokens, more than the model's vocab_size, "
            f"{resolved.model.vocab_size}; use the model's own tokenizer, or a model with a larger vocabulary"
        )
    loaded = corpus.load(config.data, tokenizer, progress.line)

    # ---- devices --------------------------------------------------------------------------------------------------
    import jax

    from xlam_jax.parallel.mesh import make_mesh, split_cpu
    from xlam_jax.training.cost import trainable_sizes

    if config.mesh.cpu_devices > 1:
        split_cpu(config.mesh.cpu_devices)
    layout = lay_out(resolved, make_mesh(config.mesh.sizes))
    trained = sum(trainable_sizes(resolved.model).values())
    progress.line(
        f"{resolved.model.parameters():,} parameters"
        + (f" and {trained:,} of adapters, which train," if resolved.model.lora else "")
        + f" on {len(jax.devices())} {jax.default_backend()} device(s): "
        + ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items())
    )
    progress.line(layout.kernels_line)
    return Setup(**vars(layout), tokenizer=tokenizer, loaded=loaded)


def lay_out(resolved: Resolved, mesh: "Mesh") -> Layout:
    """The step's parts on a mesh, whose devices need not be here. Nothing is computed.

    Raises `UserError` where the mesh does not divide what it splits.
    """
    import jax.numpy as jnp

    from xlam_jax.data.codec import KINDS
    from xlam_jax.models.kernels import choose
    from xlam_jax.training import step as steps
    from xlam_jax.training.optimizer import optimizer
    from xlam_jax.training.preference import Preference

    config = resolved.config
    configs.check_divisible(config, resolved.model, {f"mesh.{axis}": size for axis, size in mesh.shape.items()})
    kernels, line = choose(config.model, mesh, resolved.model, config.data.sequence_length)
    aim, dtype, quantized = config.objective, jnp.dtype(config.model.compute_dtype), config.train.trainable == "qlora"
    objective = steps.Objective(groups=len(config.data.sources) * len(KINDS))
    if aim.kind != "sft":
        objective = objective._replace(
            preference=Preference(aim.kind, aim.beta, aim.label_smoothing, aim.margin, aim.sft_weight),
            pairs=config.data.max_pairs,
            adapters_off=configs.reference(config) == "adapters_off",
        )
    tx = optimizer(config.train, resolved.model)
    return Layout(
        mesh,
        tx,
        objective,
        steps.abstract_state(resolved.model, tx, mesh, averaged=config.train.ema > 0),
        steps.abstract_frozen(resolved.model, mesh, dtype=dtype, quantized=quantized),
        dtype,
        quantized,
        kernels,
        line,
    )


def abstract_batch(resolved: Resolved, layout: Layout) -> "Batch":
    """Shapes, dtypes and shardings of a batch."""
    import jax
    import jax.numpy as jnp

    from xlam_jax.parallel.mesh import batch_spec
    from xlam_jax.training.step import Batch

    config = resolved.config
    sharding = jax.sharding.NamedSharding(layout.mesh, batch_spec(layout.mesh))
    shape = (config.train.batch_size, config.data.sequence_length)
    whole, real = (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in (jnp.int32, jnp.float32))
    reference = real if configs.reference(config) == "precomputed" else None
    return Batch(whole, whole, real, whole, whole, whole, reference)


def lowered_step(resolved: Resolved, layout: Layout, state: Any, frozen: Any, batch: Any) -> Any:
    """The training step, traced for these shapes."""
    import jax

    from xlam_jax.training.step import make_train_step

    config = resolved.config
    train_step = make_train_step(
        resolved.model,
        layout.tx,
        layout.mesh,
        compute_dtype=layout.dtype,
        remat=config.model.remat,
        microbatches=config.train.microbatches,
        router_aux_weight=config.train.router_aux_weight,
        z_loss=config.train.z_loss,
        neftune=config.train.neftune,
        objective=layout.objective,
        quantized=layout.quantized,
        kernels=layout.kernels,
        ema=config.train.ema,
        seed=config.seed,
    )
    return jax.jit(train_step, donate_argnums=0).lower(state, frozen, batch)


def compiled_step(resolved: Resolved, layout: Layout, state: Any, frozen: Any, batch: Any, progress: "Progress") -> Any:
    """The training step, compiled for these shapes: once in a run."""
    began = time.monotonic()
    compiled = lowered_step(resolved, layout, state, frozen, batch).compile()
    progress.line(f"compiled the step in {time.monotonic() - began:.1f} s")
    return compiled


def about(resolved: Resolved, made: Setup, before: dict[str, Any]) -> dict[str, Any]:
    """What a report needs to know of a run besides its metrics; `before` is what an earlier start wrote, to whose
    `started` this start is added."""
    import jax

    from xlam_jax.data import examples
    from xlam_jax.data.mixture import shares
    from xlam_jax.training import cost

    config, device = resolved.config, jax.devices()[0]
    trained = sum(cost.trainable_sizes(resolved.model).values())
    return {
        "parameters": resolved.model.parameters() + (trained if resolved.model.lora else 0),
        "trainable_parameters": trained,
        "devices": len(jax.devices()),
        "device_kind": device.device_kind,
        "flops_per_token": cost.flops_per_token(resolved.model, config.data.sequence_length),
        "peak_flops_per_device": cost.peak_flops(device.device_kind),
        "batch_places": config.train.batch_size * config.data.sequence_length,
        "sources": {
            one.source.name: {
                "target_share": float(share),
                "trajectories": len(one.train),
                "trained_tokens": int(examples.trained(one.train).sum()),
            }
            for one, share in zip(made.loaded, shares(made.loaded, config.data), strict=True)
        },
        "started": [*before.get("started", []), datetime.now(UTC).isoformat(timespec="seconds")],
    }
