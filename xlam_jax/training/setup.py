"""Set-up of a run before its weights are read: data, devices, objective, and the compiled step."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xlam_jax import config as configs
from xlam_jax.config import Data, Resolved
from xlam_jax.errors import UserError
from xlam_jax.training import compiler_options

if TYPE_CHECKING:
    import optax
    from jax.sharding import Mesh

    from xlam_jax.data.examples import Loaded
    from xlam_jax.data.pipeline import Row
    from xlam_jax.models.config import ModelConfig
    from xlam_jax.models.kernels import Kernels
    from xlam_jax.progress import Progress
    from xlam_jax.training.step import Batch, Objective, State, StepOptions


@dataclass(frozen=True)
class Layout:
    """A training step on a mesh: its computation, and the shardings of its arrays."""

    model: "ModelConfig"
    mesh: "Mesh"
    tx: "optax.GradientTransformation"
    options: "StepOptions"
    state: "State"
    """Abstract: shapes, dtypes, shardings."""
    frozen: Any
    """The frozen parameters, abstract too; {} if none."""
    kernels_line: str
    """A line about the kernels, for the log."""
    compiler_options: dict[str, Any]
    """Options of the compiler."""

    @property
    def dtype(self) -> Any:
        """The NumPy dtype of the computation."""
        return self.options.compute_dtype

    @property
    def kernels(self) -> "Kernels":
        """The kernels of attention and experts."""
        return self.options.kernels

    @property
    def objective(self) -> "Objective":
        """The loss."""
        return self.options.objective


@dataclass(frozen=True)
class Setup(Layout):
    """A layout with the data that it trains on."""

    resolved: Resolved
    """The run, with its number of steps known: `train.epochs` needs the data."""
    tokenizer: Any
    loaded: "list[Loaded]"

    def rows(self, count: int) -> list[int]:
        """Returns the indices of the rows of a batch of `count` rows that this host's devices need."""
        from xlam_jax.parallel.mesh import rows_here

        return rows_here(self.mesh, count)

    def batch(self, local_rows: "Row", count: int) -> "Batch":
        """Puts this host's `rows` of a batch of `count` rows onto its devices, as its part of the batch."""
        from xlam_jax.parallel.mesh import put_rows
        from xlam_jax.training.step import Batch

        return Batch(*(None if array is None else put_rows(self.mesh, array, count) for array in local_rows))


def set_up(resolved: Resolved, progress: "Progress") -> Setup:
    """Loads the data, then lays out the step on the devices. Writes nothing and reads no weights.

    Raises `UserError` for invalid data, and if model, tokenizer and mesh do not match.
    """
    from xlam_jax.data.epochs import resolve_epochs

    assert bool(resolved.model.added) == bool(resolved.config.data.added_tokens)  # with_added_tokens came first

    tokenizer, loaded = _load_data(resolved.config.data, resolved.model.vocab_size, progress.line)
    resolved = resolve_epochs(resolved, loaded, progress.line)

    import jax

    from xlam_jax.parallel.mesh import make_mesh, split_cpu
    from xlam_jax.training.cost import trainable_sizes

    mesh, model = resolved.config.mesh, resolved.model
    if mesh.cpu_devices > 1:
        split_cpu(mesh.cpu_devices)
    layout = lay_out(resolved, make_mesh(mesh.sizes))
    trained = sum(trainable_sizes(model).values())
    progress.line(
        f"{model.parameters():,} parameters"
        + (f" and {trained:,} of adapters, which train," if model.lora else "")
        + f" on {len(jax.devices())} {jax.default_backend()} device(s): "
        + ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items())
    )
    if model.added:
        progress.line(
            f"added tokens: ids {model.added.first} to {model.added.first + model.added.number - 1} of "
            f"{model.vocab_size:,} in the vocabulary"
        )
    progress.line(layout.kernels_line)
    for line in compiler_options.lines(layout.compiler_options, resolved.config.model.compiler_options):
        progress.line(line)
    return Setup(**vars(layout), resolved=resolved, tokenizer=tokenizer, loaded=loaded)


def _load_data(data: Data, vocab_size: int, report: Callable[[str], None]) -> "tuple[Any, list[Loaded]]":
    """Loads the tokenizer and the examples, before any device is used, so that a bad row is reported within seconds."""
    from xlam_jax.data import corpus
    from xlam_jax.data.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(data)
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"data.tokenizer: {data.tokenizer} has {len(tokenizer)} tokens, more than the model's vocab_size, "
            f"{vocab_size}; use the model's own tokenizer, or a model with a larger vocabulary"
        )
    return tokenizer, corpus.load(data, tokenizer, report)


def lay_out(resolved: Resolved, mesh: "Mesh") -> Layout:
    """Lays a step out on a mesh, whose devices need not be on this machine. Computes nothing.

    Raises `UserError` if a size is not a multiple of the mesh axis that splits it.
    """
    import jax.numpy as jnp

    from xlam_jax.models.kernels import choose
    from xlam_jax.training import step as steps
    from xlam_jax.training.optimizer import optimizer

    config, model, train = resolved.config, resolved.model, resolved.config.train
    configs.check_divisible(config, model, {f"mesh.{axis}": size for axis, size in mesh.shape.items()})
    kernels, kernels_line = choose(
        mesh,
        model,
        config.data.sequence_length,
        attention=config.model.attention,
        experts=config.model.experts,
        compute_dtype=config.model.compute_dtype,
        reduce_dtype=config.model.reduce_dtype,
    )
    options = steps.StepOptions(
        compute_dtype=jnp.dtype(config.model.compute_dtype),
        objective=_objective(resolved),
        quantized=train.trainable == "qlora",
        kernels=kernels,
        remat=config.model.remat,
        microbatches=train.microbatches,
        router_aux_weight=train.router_aux_weight,
        z_loss=train.z_loss,
        neftune=train.neftune,
        ema=train.ema,
        seed=config.seed,
    )
    tx = optimizer(train, model)
    state = steps.abstract_state(model, tx, mesh, averaged=train.ema > 0)
    frozen = steps.abstract_frozen(model, mesh, dtype=options.compute_dtype, quantized=options.quantized)
    chosen = compiler_options.options(mesh.devices.flat[0].platform, config.model.compiler_options)
    return Layout(model, mesh, tx, options, state, frozen, kernels_line, chosen)


def _objective(resolved: Resolved) -> "Objective":
    """Returns the loss of a run."""
    from xlam_jax.enums import SPAN_KINDS
    from xlam_jax.training.preference import Preference
    from xlam_jax.training.step import Objective

    section, data = resolved.config.objective, resolved.config.data
    groups = len(data.sources) * len(SPAN_KINDS)
    if section.kind == "sft":
        return Objective(groups=groups)
    return Objective(
        preference=Preference(section.kind, section.beta, section.label_smoothing, section.margin, section.sft_weight),
        pairs=data.max_pairs,
        adapters_off=configs.reference(resolved.config) == "adapters_off",
        groups=groups,
    )


def abstract_batch(layout: Layout, rows: int, length: int, *, reference: bool) -> "Batch":
    """Returns shapes, dtypes and shardings of a batch of `rows` rows of `length` tokens. `reference`: whether it
    contains log p under the reference policy."""
    import jax
    import jax.numpy as jnp

    from xlam_jax.parallel.mesh import batch_spec
    from xlam_jax.training.step import Batch

    sharding = jax.sharding.NamedSharding(layout.mesh, batch_spec(layout.mesh))
    whole, real = (jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding) for dtype in (jnp.int32, jnp.float32))
    return Batch(whole, whole, real, whole, whole, whole, real if reference else None)


def lower_step(layout: Layout, state: Any, frozen: Any, batch: Any) -> Any:
    """Traces the training step for the shapes of these arrays."""
    import jax

    from xlam_jax.training.step import make_train_step

    train_step = make_train_step(layout.model, layout.tx, layout.mesh, layout.options)
    return jax.jit(train_step, donate_argnums=0).lower(state, frozen, batch)


def compile_step(setup: Setup, state: Any, frozen: Any, batch: Any, report: Callable[[str], None]) -> Any:
    """Compiles the training step for the shapes of these arrays: once per run.

    Raises `UserError` if XLA refuses an option of the config.
    """
    import jax

    began = time.monotonic()
    lowered = lower_step(setup, state, frozen, batch)
    try:
        compiled = lowered.compile(compiler_options=setup.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        raise compiler_options.refusal(error, setup.resolved.config.model.compiler_options) or error from None
    report(f"compiled the step in {time.monotonic() - began:.1f} s")
    return compiled
