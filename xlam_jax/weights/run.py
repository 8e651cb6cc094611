"""The weights a run starts from: what trains, and what stays frozen beside it."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlam_jax.config import Resolved, from_saved, model_of
from xlam_jax.digest import stream_digest
from xlam_jax.errors import UserError
from xlam_jax.models import hf_keys
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.nf4 import NF4, dense
from xlam_jax.models.params import Params, freeze, initialize, shapes, trainable
from xlam_jax.parallel.placement import place
from xlam_jax.weights import checkpoint


def read_base(resolved: Resolved, *, exporting: bool = False) -> Params | None:
    """The weights that `model.init_from` names, a whole model without adapters, none of them read yet: `place` reads
    what each host's devices hold. None for random ones.

    Raises `UserError` when they are those of another model, or of another config.json: the second not when `exporting`,
    for a run that has been trained is exported as it was trained.
    """
    from xlam_jax.weights.hf import HFWeights

    named = resolved.config.model.init_from
    if named is None:
        return None
    like = shapes(replace(resolved.model, lora=None))
    if checkpoint.is_checkpoint(Path(named)):
        step = checkpoint.resolve(Path(named))
        checkpoint.check_params(step, like)
        if not exporting:
            check_same_config(resolved, checkpoint.load_hf_config(step))
        return checkpoint.open_params(step)
    opened = HFWeights(named)
    params = opened.params()
    checkpoint.check_shapes(named, params, like)
    if not exporting:
        check_same_config(resolved, opened.hf_config)
    return params


def check_same_config(resolved: Resolved, stored: dict[str, Any]) -> None:
    """Raises `UserError` where the config.json next to `model.init_from`'s weights describes another computation than
    `model.config`, such as another rope_theta or window, unless `model.overrides` asks for it."""
    section = resolved.config.model
    named = f"{section.init_from}/config.json"
    theirs = asdict(ModelConfig.from_hf(hf_keys.with_overrides(stored, section.overrides, named), named))
    ours = asdict(resolved.model)
    different = [
        f"{key} is {ours[key]} in {section.config} and {theirs[key]} in {named}"
        for key in ("rope_theta", "rope_scaling", "sliding_window", "norm_eps", "experts_per_token", "tie_embeddings")
        if ours[key] != theirs[key]
    ]
    if different:
        raise UserError(
            f"model.init_from: {'; '.join(different)}; set model.config to {section.init_from}, and name what is meant "
            "to differ in model.overrides"
        )


def source_folder(resolved: Resolved) -> Path | None:
    """The folder with the files next to the weights that `model.init_from` names; None for random weights."""
    from xlam_jax.weights.hf import small_files

    named = resolved.config.model.init_from
    if named is None:
        return None
    if checkpoint.is_checkpoint(Path(named)):
        return checkpoint.resolve(Path(named)).parent.parent
    return small_files(named)


def read_adapters(resolved: Resolved, base: Params | None) -> Params | None:
    """The adapters that `lora.init_from` names, to be used beside `base`; None for new ones.

    Raises `UserError` when they do not fit.
    """
    from xlam_jax.weights.peft import read_peft

    start = resolved.config.lora.init_from
    return None if start is None or resolved.model.lora is None else read_peft(Path(start), resolved.model, base)


def read_initial(resolved: Resolved, base: Params | None) -> Params | None:
    """What `fresh` starts from, not read yet: the adapters that `lora.init_from` names, to be used with `base`, or in
    full training the weights that `model.init_from` names; None for random ones.

    Raises `UserError` when it does not fit.
    """
    return read_adapters(resolved, base) if resolved.model.lora else read_base(resolved)


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
    config = from_saved(saved, f"{step_dir}: its config") if saved else None
    if config is None or config.train.trainable == "full":
        return None
    hf_config = checkpoint.load_hf_config(step_dir)
    return Resolved(config, {}, hf_config, model_of(config, hf_config))


class Kept:
    """A frozen weight as a run keeps it (`freeze`), by its layers (and experts) when they are asked for."""

    def __init__(self, name: str, weight: Any, lead: int, dtype: Any, quantized: bool):
        """`weight`: an array, or what is indexed like one. `lead`: how many leading axes index its layers."""
        self._weight, self.lead, self._dtype = weight, lead, dtype
        self._freeze = jax.jit(lambda layer: freeze({name: layer}, dtype, quantized=quantized)[name])
        self.kept = jax.eval_shape(self._freeze, jax.ShapeDtypeStruct(weight.shape, weight.dtype))
        self.shape, self.size, self.ndim = tuple(weight.shape), weight.size, weight.ndim
        self.dtype = np.dtype(dtype if isinstance(self.kept, NF4) else self.kept.dtype)

    def part(self, at: tuple[int, ...]) -> Any:
        """The slice at an index along the leading axes: an array or `NF4`."""
        return self._freeze(np.asarray(self._weight[at]))

    def __getitem__(self, at: tuple[int, ...]) -> np.ndarray:
        """The same, dense."""
        return np.asarray(dense(self.part(at), self.dtype))


def load_whole(step_dir: Path) -> Params:
    """`open_whole`, read: numpy arrays."""
    if saved_run(step_dir) is None:
        return checkpoint.load_params(step_dir)
    return read_layers(ModelConfig.from_hf(checkpoint.load_hf_config(step_dir)), open_whole(step_dir))


def read_layers(config: ModelConfig, params: Params) -> Params:
    """Numpy arrays of a whole model's parameters that are indexed by their layers."""
    leads = _leads(config)

    def read(path: tuple[str, ...], node: Any) -> Any:
        if isinstance(node, dict):
            return {name: read((*path, name), value) for name, value in node.items()}
        whole = np.empty(node.shape, node.dtype)
        for at in np.ndindex(*node.shape[: leads[path]]):
            whole[at] = node[at]
        return whole

    return read((), params)


def _leads(config: ModelConfig) -> dict[tuple[str, ...], int]:
    """How many leading axes of each parameter index its layers (and experts)."""
    from xlam_jax.weights.hf_map import tensors

    return {tensor.path: len(tensor.at) for tensor in tensors(config)}


def open_whole(step_dir: Path) -> Params:
    """The whole model of a step, to be read by layers: adapters are added to the weights that they were trained beside.

    The weights of a QLoRA run are those that its four-bit codes stand for. Raises `UserError` when the base is no
    longer what it was: all of it is read once for that.
    """
    from xlam_jax.weights.merge import merge

    resolved = saved_run(step_dir)
    if resolved is None:
        checkpoint.check_params(step_dir, shapes(ModelConfig.from_hf(checkpoint.load_hf_config(step_dir))))
        return checkpoint.open_params(step_dir)
    base = read_base(resolved, exporting=True)
    if base is None:
        base = jax.device_get(
            jax.jit(lambda: trainable(resolved.model, initialize(resolved.model, resolved.config.seed))[1])()
        )
    dtype = jnp.dtype(resolved.config.model.compute_dtype)
    leads = _leads(resolved.model)

    def kept(path: tuple[str, ...], node: Any) -> Any:
        if isinstance(node, dict):
            return {name: kept((*path, name), value) for name, value in node.items()}
        return Kept(path[-1], node, leads[path], dtype, resolved.config.train.trainable == "qlora")

    frozen = kept((), base)
    saved = checkpoint.load_metadata(step_dir).get("base")
    if saved is not None:
        check_base(step_dir, saved, _fingerprint_by_layers(frozen), resolved.config.model.init_from)
    return merge(resolved.model, frozen, checkpoint.load_params(step_dir))


def fingerprint(params: Params) -> str:
    """Tells weights apart by their bits, however they are sharded: every word counts, with its place."""
    return _digest(params, [int(_checksum(leaf, ())) for leaf in jax.tree.leaves(params)])


def _fingerprint_by_layers(params: Params) -> str:
    """`fingerprint` of what `Kept` weights are kept as."""
    from xlam_jax.progress import BYTES, Throughput
    from xlam_jax.weights.shards import ahead
    from xlam_jax.weights.transfer import WORKERS

    is_kept = lambda node: isinstance(node, Kept)  # noqa: E731
    sums: list[int] = []
    leaves: list[Kept] = jax.tree.leaves(params, is_leaf=is_kept)
    with Throughput("checking the base", sum(one.size * one.dtype.itemsize for one in leaves), unit=BYTES) as progress:
        for one in leaves:
            each = [0] * len(jax.tree.leaves(one.kept))
            indices = list(np.ndindex(*one.shape[: one.lead]))
            for at, part in ahead(one.part, indices, WORKERS):
                index = tuple(np.uint32(i) for i in at)
                each = [
                    total + int(_checksum(leaf, index)) for total, leaf in zip(each, jax.tree.leaves(part), strict=True)
                ]
                progress.add(one.size * one.dtype.itemsize // len(indices))
            sums += [total % 2**32 for total in each]
    return _digest(jax.tree.map(lambda one: one.kept, params, is_leaf=is_kept), sums)


@jax.jit
def _checksum(part: jax.Array, at: tuple[Any, ...]) -> jax.Array:
    """The sum over an array's words, each times what its place makes of it; `at`: where the part lies along the leading
    axes that it lacks. Sums of parts add up to that of the whole."""
    words = jax.lax.bitcast_convert_type(part, jnp.dtype(f"uint{8 * part.dtype.itemsize}")).astype(jnp.uint32)
    indices = [*at, *(jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) for axis in range(words.ndim))]
    for axis, index in enumerate(indices):
        place = 2 * index + 1
        words = words * place + place * (axis + 1)
    return jnp.sum(words, dtype=jnp.uint32)


def _digest(like: Params, sums: Sequence[int]) -> str:
    lines = (
        f"{jax.tree_util.keystr(path, simple=True, separator='.')} {leaf.shape} {leaf.dtype} {total}\n"
        for (path, leaf), total in zip(jax.tree_util.tree_leaves_with_path(like), sums, strict=True)
    )
    return stream_digest(lines, length=16)


def check_base(run: Path, saved: str | None, now: str, init_from: str | None) -> None:
    """Raises `UserError` when the adapters of a run were trained beside other weights than those read now."""
    if saved is not None and saved != now:
        raise UserError(
            f"{run}: its adapters were trained beside weights of fingerprint {saved}, and "
            f"{init_from or 'the random weights of this seed'} now gives {now}; "
            "restore the base, or train into another output_dir"
        )


def check_policy(resolved: Resolved, saved: str, now: str) -> None:
    """Raises `UserError` when the weights that a run starts from are not those that its reference policy had."""
    config = resolved.config
    named = (
        ("lora.init_from", config.lora.init_from)
        if resolved.model.lora
        else ("model.init_from", config.model.init_from)
    )
    key, folder = named
    if saved != now:
        raise UserError(
            f"{config.output_dir}: its reference policy has weights of fingerprint {saved}, and "
            f"{f'{key}, {folder},' if folder else 'the random weights of this seed'} now gives {now}; restore these "
            "weights, or the folder with the reference that was computed from them (objective.reference_cache; None: "
            "reference/ in output_dir)"
        )
