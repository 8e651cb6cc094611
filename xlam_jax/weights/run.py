"""The weights that a run starts from: its trainable parameters, and its frozen ones."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlam_jax.config import Resolved, from_saved, model_of, with_vocabulary
from xlam_jax.digest import stream_digest
from xlam_jax.errors import UserError
from xlam_jax.gguf_file import find_gguf
from xlam_jax.models import hf_keys
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.nf4 import NF4, dense
from xlam_jax.models.params import Params, freeze, initialize, shapes, trainable
from xlam_jax.parallel.placement import place
from xlam_jax.weights import checkpoint
from xlam_jax.weights.added_tokens import extend, new_rows

COMPUTED = (
    *("rope_theta", "rope_scaling", "sliding_window", "norm_eps", "experts_per_token", "normalize_gates"),
    "tie_embeddings",
)
"""Fields of `ModelConfig` that change what is computed and not the shapes of the weights."""


def read_base(resolved: Resolved, *, exporting: bool = False) -> Params | None:
    """Opens the weights that `model.init_from` names, a whole model without adapters. Returns None for random weights.

    The parameters are lazy: `place` reads only the part that belongs to a host's devices. The rows of tokens that the
    run adds are included. Raises `UserError` for weights of another model, and, unless `exporting`, of another
    config.json: a finished run is exported with the config it was trained with.
    """
    from xlam_jax.weights.hf import HFWeights

    init_from = resolved.config.model.init_from
    if init_from is None:
        return None
    like = shapes(replace(resolved.model, lora=None))
    if checkpoint.is_checkpoint(Path(init_from)):
        step = checkpoint.resolve(Path(init_from))
        params = extend(checkpoint.open_params(step), resolved.model)
        checkpoint.check_shapes(step, params, like)
        if not exporting:
            check_same_config(resolved, checkpoint.load_hf_config(step))
        return params
    opened = HFWeights(init_from)
    params = extend(opened.params(), resolved.model)
    checkpoint.check_shapes(init_from, params, like)
    if not exporting:
        check_same_config(resolved, opened.hf_config)
    return params


def check_same_config(resolved: Resolved, stored: dict[str, Any]) -> None:
    """Raises `UserError` if `model.config` and the config.json of `model.init_from` describe different computations.

    Examples are a different rope_theta or window. `stored`: that config.json, to which `model.overrides` are applied.
    """
    section = resolved.config.model
    path = str(find_gguf(section.init_from or "") or f"{section.init_from}/config.json")
    source = asdict(ModelConfig.from_hf(hf_keys.with_overrides(stored, section.overrides, path), path))
    ours = asdict(resolved.model)
    different = [
        f"{key} is {ours[key]} in {section.config} and {source[key]} in {path}"
        for key in COMPUTED
        if ours[key] != source[key]
    ]
    if different:
        raise UserError(
            f"model.init_from: {'; '.join(different)}; set model.config to {section.init_from}, and put intended "
            "differences in model.overrides"
        )


def source_folder(resolved: Resolved) -> Path | None:
    """Returns the folder with the tokenizer and config files of `model.init_from`; None for random weights, and for a
    GGUF file, which has no such files."""
    from xlam_jax.weights.hf import small_files

    init_from = resolved.config.model.init_from
    if init_from is None or find_gguf(init_from):
        return None
    if checkpoint.is_checkpoint(Path(init_from)):
        return checkpoint.resolve(Path(init_from)).parent.parent
    return small_files(init_from)


def read_adapters(resolved: Resolved, base: Params | None) -> Params | None:
    """Reads the adapters that `lora.init_from` names, for use with `base`.

    Returns None for new adapters, and for a model without adapters. The rows of added tokens start anew. Raises
    `UserError` if the adapters do not fit the model or the base.
    """
    from xlam_jax.weights.peft import read_peft

    start = resolved.config.lora.init_from
    if start is None or resolved.model.lora is None:
        return None
    return read_peft(Path(start), resolved.model, base) | new_rows(resolved.model)


def read_initial(resolved: Resolved, base: Params | None) -> Params | None:
    """Opens the initial values of the trainable parameters, for `fresh`. Returns None for random ones.

    These are the adapters that `lora.init_from` names, or in full training the weights that `model.init_from` names.
    Raises `UserError` if they do not fit.
    """
    return read_adapters(resolved, base) if resolved.model.lora else read_base(resolved)


def fresh(resolved: Resolved, initial: Params | None, abstract: Params) -> Params:
    """Places the trainable parameters before the first step on the devices.

    `initial`: from `read_initial`; None: random weights, or adapters whose product is zero. `abstract`: shapes, dtypes
    and shardings.
    """
    model, seed = resolved.model, resolved.config.seed
    return (
        place(lambda: trainable(model, initialize(model, seed))[0], abstract)
        if initial is None
        else place(initial, abstract)
    )


def frozen(resolved: Resolved, base: Params | None, abstract: Params, dtype: Any) -> Params:
    """Places the frozen parameters on the devices: cast to `dtype`, or quantized in a QLoRA run; {} in full training.

    `base`: from `read_base`; None: random weights. `abstract`: shapes, dtypes and shardings.
    """
    model, seed = resolved.model, resolved.config.seed
    quantized = resolved.config.train.trainable == "qlora"
    if not abstract:
        return {}
    if base is None:
        return place(lambda: freeze(trainable(model, initialize(model, seed))[1], dtype, quantized=quantized), abstract)

    def freeze_tree(tree: Params, like: Params) -> Params:
        """Freezes one parameter after the other: the unquantized model is never on the devices as a whole."""
        return {name: freeze_node(name, value, like[name]) for name, value in tree.items()}

    def freeze_node(name: str, value: Any, like: Any) -> Any:
        if isinstance(value, dict):
            return freeze_tree(value, like)
        if not isinstance(like, NF4):
            return place(value, like)
        whole = np.asarray(value)  # read before tracing, as reading a file transposes with JAX
        return place(lambda: freeze({name: jnp.asarray(whole)}, dtype, quantized=True), {name: like})[name]

    return freeze_tree(base, abstract)


def saved_run(step_dir: Path) -> Resolved | None:
    """Returns the run of a step that contains adapters, None for a step that contains a whole model."""
    metadata = checkpoint.load_metadata(step_dir)
    saved = metadata.get("config")
    config = from_saved(saved, f"{step_dir}: its config") if saved else None
    if config is None or config.train.trainable == "full":
        return None
    hf_config = checkpoint.load_hf_config(step_dir)
    resolved = Resolved(config, {}, hf_config, model_of(config, hf_config))
    count = len(config.data.added_tokens)
    return with_vocabulary(resolved, metadata["tokenizer"]["tokens"] - count) if count else resolved


class FrozenWeight:
    """A lazy frozen weight, cast or quantized as in the run (`freeze`), indexed by layer (and expert)."""

    def __init__(self, name: str, weight: Any, lead: int, dtype: Any, quantized: bool):
        """`weight`: an array, or a lazy one. `lead`: number of leading axes that index its layers and experts."""
        self._weight, self.lead, self._dtype = weight, lead, dtype
        self._freeze = jax.jit(lambda layer: freeze({name: layer}, dtype, quantized=quantized)[name])
        self.stored = jax.eval_shape(self._freeze, jax.ShapeDtypeStruct(weight.shape, weight.dtype))
        """Shapes and dtypes of the frozen weight; an `NF4` if it is quantized."""
        self.shape, self.size, self.ndim = tuple(weight.shape), weight.size, weight.ndim
        self.dtype = np.dtype(dtype if isinstance(self.stored, NF4) else self.stored.dtype)

    def part(self, index: tuple[int, ...]) -> Any:
        """Returns the slice at an index of the leading axes, an array or `NF4`."""
        return self._freeze(np.asarray(self._weight[index]))

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        """Returns the slice at an index of the leading axes, dequantized."""
        return np.asarray(dense(self.part(index), self.dtype))


def load_whole(step_dir: Path) -> Params:
    """Reads the whole model of a step as numpy arrays, adapters merged. Raises `UserError` as `open_whole`."""
    if saved_run(step_dir) is None:
        return checkpoint.load_params(step_dir)
    return read_layers(ModelConfig.from_hf(checkpoint.load_hf_config(step_dir)), open_whole(step_dir))


def read_layers(config: ModelConfig, params: Params) -> Params:
    """Reads a whole model's lazy parameters, which are indexed by layer, as numpy arrays."""
    leads = _leads(config)

    def read(path: tuple[str, ...], node: Any) -> Any:
        if isinstance(node, dict):
            return {name: read((*path, name), value) for name, value in node.items()}
        whole = np.empty(node.shape, node.dtype)
        for index in np.ndindex(*node.shape[: leads[path]]):
            whole[index] = node[index]
        return whole

    return read((), params)


def _leads(config: ModelConfig) -> dict[tuple[str, ...], int]:
    """Returns path → number of leading axes of the parameter that index its layers and experts."""
    from xlam_jax.weights.hf_map import tensors

    return {tensor.path: len(tensor.at) for tensor in tensors(config)}


def open_whole(step_dir: Path) -> Params:
    """Opens the whole model of a step as lazy parameters that are read by layer. Adapters are merged into their base.

    The base of a QLoRA run is dequantized from its four-bit codes. Raises `UserError` if the base has changed since the
    training; checking that reads the base once.
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

    def freeze_node(path: tuple[str, ...], node: Any) -> Any:
        if isinstance(node, dict):
            return {name: freeze_node((*path, name), value) for name, value in node.items()}
        return FrozenWeight(path[-1], node, leads[path], dtype, resolved.config.train.trainable == "qlora")

    frozen = freeze_node((), base)
    saved = checkpoint.load_metadata(step_dir).get("base")
    if saved is not None:
        check_base(step_dir, saved, _fingerprint_by_layers(frozen), resolved.config.model.init_from)
    return merge(resolved.model, frozen, checkpoint.load_params(step_dir))


def fingerprint(params: Params) -> str:
    """Returns a fingerprint of all bits of the weights and their positions. It does not depend on the sharding."""
    return _digest(params, [int(_checksum(leaf, ())) for leaf in jax.tree.leaves(params)])


def _fingerprint_by_layers(params: Params) -> str:
    """Returns the `fingerprint` of lazy `FrozenWeight`s, computed layer by layer."""
    from xlam_jax.progress import BYTES, Throughput
    from xlam_jax.weights.shards import map_ordered
    from xlam_jax.weights.transfer import WORKERS

    is_frozen = lambda node: isinstance(node, FrozenWeight)  # noqa: E731
    sums: list[int] = []
    weights: list[FrozenWeight] = jax.tree.leaves(params, is_leaf=is_frozen)
    total_bytes = sum(weight.size * weight.dtype.itemsize for weight in weights)
    with Throughput("checking the base", total_bytes, unit=BYTES) as progress:
        for weight in weights:
            totals = [0] * len(jax.tree.leaves(weight.stored))
            indices = list(np.ndindex(*weight.shape[: weight.lead]))
            for index, part in map_ordered(weight.part, indices, WORKERS):
                position = tuple(np.uint32(i) for i in index)
                totals = [
                    total + int(_checksum(leaf, position))
                    for total, leaf in zip(totals, jax.tree.leaves(part), strict=True)
                ]
                progress.add(weight.size * weight.dtype.itemsize // len(indices))
            sums += [total % 2**32 for total in totals]
    return _digest(jax.tree.map(lambda weight: weight.stored, params, is_leaf=is_frozen), sums)


@jax.jit
def _checksum(part: jax.Array, position: tuple[Any, ...]) -> jax.Array:
    """Returns the sum of an array's words modulo 2³², each weighted by its position, as a uint32 scalar.

    `position`: index of the part along the leading axes of the whole array. The sums of all parts add up to the sum of
    the whole.
    """
    words = jax.lax.bitcast_convert_type(part, jnp.dtype(f"uint{8 * part.dtype.itemsize}")).astype(jnp.uint32)
    indices = [*position, *(jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) for axis in range(words.ndim))]
    for axis, index in enumerate(indices):
        factor = 2 * index + 1
        words = words * factor + factor * (axis + 1)
    return jnp.sum(words, dtype=jnp.uint32)


def _digest(like: Params, sums: Sequence[int]) -> str:
    lines = (
        f"{jax.tree_util.keystr(path, simple=True, separator='.')} {leaf.shape} {leaf.dtype} {total}\n"
        for (path, leaf), total in zip(jax.tree_util.tree_leaves_with_path(like), sums, strict=True)
    )
    return stream_digest(lines, length=16)


def check_base(run: Path, saved: str | None, now: str, init_from: str | None) -> None:
    """Raises `UserError` if the adapters of a run were trained with a different base.

    `saved`, `now`: fingerprints of the base when the run started (None: not recorded), and of the one read now.
    """
    if saved is not None and saved != now:
        raise UserError(
            f"{run}: its adapters were trained with base weights of fingerprint {saved}, and "
            f"{init_from or 'the random weights of this seed'} now has {now}; "
            "restore the base, or train into another output_dir"
        )


def check_policy(resolved: Resolved, saved: str, now: str) -> None:
    """Raises `UserError` if the weights that a run starts from differ from those of its reference policy.

    `saved`, `now`: fingerprints of the reference policy's weights, and of those read now.
    """
    config = resolved.config
    key, folder = (
        ("lora.init_from", config.lora.init_from)
        if resolved.model.lora
        else ("model.init_from", config.model.init_from)
    )
    if saved != now:
        raise UserError(
            f"{config.output_dir}: its reference policy has weights of fingerprint {saved}, and "
            f"{f'{key}, {folder},' if folder else 'the random weights of this seed'} now has {now}; restore these "
            "weights, or the folder with the reference computed from them (objective.reference_cache; None: "
            "reference/ in output_dir)"
        )
