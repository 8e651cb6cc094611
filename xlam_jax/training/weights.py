"""The weights a run starts from: what trains, and what stays frozen beside it."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from xlam_jax.config import Config, Resolved, model_of
from xlam_jax.errors import UserError
from xlam_jax.models.nf4 import NF4, dense
from xlam_jax.models.params import Params, freeze, initialize, shapes, trainable
from xlam_jax.parallel.mesh import make_mesh
from xlam_jax.training import checkpoint
from xlam_jax.training.step import abstract_frozen, place


def read_base(resolved: Resolved) -> Params | None:
    """The weights that `model.init_from` names, a whole model without adapters, none of them read yet: `place` reads
    what each host's devices hold. None for random ones.

    Raises `UserError` when they are those of another model.
    """
    from converters.hf_to_orbax import HFWeights

    named = resolved.config.model.init_from
    if named is None:
        return None
    like = shapes(replace(resolved.model, lora=None))
    if checkpoint.is_checkpoint(Path(named)):
        step = checkpoint.resolve(Path(named))
        checkpoint.check_params(step, like)
        return checkpoint.open_params(step)
    params = HFWeights(named).params()
    checkpoint.same_shapes(named, params, like)
    return params


def read_adapters(resolved: Resolved) -> Params | None:
    """The adapters that `lora.init_from` names; None for new ones. Raises `UserError` when they do not fit."""
    from converters.peft import read_peft

    start = resolved.config.lora.init_from
    return None if start is None or resolved.model.lora is None else read_peft(Path(start), resolved.model)


def fresh(resolved: Resolved, given: Params | None, abstract: Params) -> Params:
    """What trains, before the first step: what was read, or random weights, or adapters that change nothing yet."""
    model, seed = resolved.model, resolved.config.seed
    return (
        place(lambda: trainable(model, initialize(model, seed))[0], abstract)
        if given is None
        else place(given, abstract)
    )


def frozen(resolved: Resolved, base: Params | None, abstract: Params, dtype: Any) -> Params:
    """What does not train, as it is kept: {} in full training."""
    model, seed = resolved.model, resolved.config.seed
    quantized = resolved.config.train.trainable == "qlora"
    if not abstract:
        return {}
    if base is None:
        return place(lambda: freeze(trainable(model, initialize(model, seed))[1], dtype, quantized=quantized), abstract)

    def kept(tree: Params, like: Params) -> Params:
        """One parameter after the other: the whole is never on the devices unquantized."""
        return {name: one(name, value, like[name]) for name, value in tree.items()}

    def one(name: str, value: Any, like: Any) -> Any:
        if isinstance(value, dict):
            return kept(value, like)
        if not isinstance(like, NF4):
            return place(value, like)
        return place(lambda: freeze({name: jnp.asarray(value)}, dtype, quantized=True), {name: like})[name]

    return kept(base, abstract)


def saved_run(step_dir: Path) -> Resolved | None:
    """The run that a step belongs to, if it trained adapters; None for a step that holds a whole model."""
    saved = checkpoint.load_metadata(step_dir).get("config")
    config = Config.model_validate(saved) if saved else None
    if config is None or config.train.trainable == "full":
        return None
    hf_config = checkpoint.load_hf_config(step_dir)
    return Resolved(config, {}, hf_config, model_of(config, hf_config))


def load_whole(step_dir: Path) -> Params:
    """The whole model of a step, as numpy arrays: adapters are added to the weights that they were trained beside.

    The weights of a QLoRA run are those that its four-bit codes stand for. Raises `UserError` when the base is no
    longer what it was.
    """
    from converters.peft import merge

    resolved = saved_run(step_dir)
    if resolved is None:
        return checkpoint.load_params(step_dir)
    return merge(resolved.model, jax.device_get(load_base(step_dir, resolved)), checkpoint.load_params(step_dir))


def load_base(step_dir: Path, resolved: Resolved) -> Params:
    """The frozen weights of a run with adapters, dense. Raises `UserError` when they are not those of the run."""
    quantized = resolved.config.train.trainable == "qlora"
    dtype = jnp.dtype(resolved.config.model.compute_dtype)
    mesh = make_mesh({}, jax.devices()[:1])
    abstract = abstract_frozen(resolved.model, mesh, dtype=dtype, quantized=quantized)
    kept = frozen(resolved, read_base(resolved), abstract, dtype)
    saved = checkpoint.load_metadata(step_dir).get("base")
    check_base(step_dir, saved, fingerprint(kept), resolved.config.model.init_from)
    return jax.tree.map(
        lambda leaf: dense(leaf, dtype) if isinstance(leaf, NF4) else leaf,
        kept,
        is_leaf=lambda node: isinstance(node, NF4),
    )


def fingerprint(params: Params) -> str:
    """Tells weights apart by their bits, however they are sharded: every word counts, with its place."""

    @jax.jit
    def checksum(leaf: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
        for axis in range(words.ndim):
            place = 2 * jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) + 1
            words = words * place + place * (axis + 1)
        return jnp.sum(words, dtype=jnp.uint32)

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        digest.update(f"{name} {leaf.shape} {leaf.dtype} {int(checksum(leaf))}\n".encode())
    return digest.hexdigest()[:16]


def check_base(run: Path, saved: str | None, now: str, init_from: str | None) -> None:
    """Raises `UserError` when the adapters of a run were trained beside other weights than those read now."""
    if saved is not None and saved != now:
        raise UserError(
            f"{run}: its adapters were trained beside weights of fingerprint {saved}, and "
            f"{init_from or 'the random weights of this seed'} now gives {now}; "
            "restore the base, or train into another output_dir"
        )
