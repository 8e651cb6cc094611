"""From Hugging Face tensors to our parameters and back, by the weight table.

Our parameters stack the layers (and experts) along leading axes; Hugging Face has one tensor each, with the heads
flattened into one axis, query head h = n × G + g. A row of the weight table names the axes on both sides, so reading
and writing are the same permutation, and no value is changed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from xlam_jax.models.config import ModelConfig
from xlam_jax.models.weights_table import Stored, Weight


class Part(NamedTuple):
    """A larger tensor that contains a `Tensor`, in files that stack the experts of a layer."""

    key: str
    shape: tuple[int, ...]
    """Of the larger tensor."""
    offset: int
    """Elements in front of the part."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face file, and its place in our tree."""

    key: str
    """Its name in the file, `model.layers.3.self_attn.q_proj.weight`."""
    shape: tuple[int, ...]
    """Its shape in the file."""
    path: tuple[str, ...]
    """The path of the parameter that contains it, `("blocks", "q")`."""
    stacked_shape: tuple[int, ...]
    """The whole parameter's shape."""
    at: tuple[int, ...]
    """Its index along the parameter's leading axes: layer, then expert."""
    order: tuple[int, ...]
    """For each axis of the file, heads unflattened: its index in the parameter's slice."""
    other_keys: tuple[str, ...] = ()
    """Other names that it may have in the file."""
    parts: tuple[Part, ...] = ()
    """Larger tensors that may contain it instead."""

    def to_hf(self, parameter: Any) -> np.ndarray:
        """Returns the file's tensor, contiguous, from the whole parameter, which is indexed once: it need not be in
        memory."""
        return transposed(parameter[self.at], self.order).reshape(self.shape)

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """Returns the parameter's slice at `at`, contiguous, from the file's tensor."""
        sizes = self.stacked_shape[len(self.at) :]
        unflattened = tensor.reshape([sizes[axis] for axis in self.order])
        return transposed(unflattened, tuple(int(axis) for axis in np.argsort(self.order)))


def parameter(params: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Returns the parameter at a path."""
    for name in path:
        params = params[name]
    return params


def transposed(array: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Transposes and makes the result contiguous. XLA does it many times faster than NumPy."""
    import jax

    if order == tuple(range(len(order))):
        return np.ascontiguousarray(array)
    words = array.view(f"uint{8 * array.dtype.itemsize}").transpose(order)
    with jax.enable_x64(True):  # for f64
        return np.asarray(jax.device_put(words, jax.local_devices(backend="cpu")[0])).view(array.dtype)


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Yields every tensor of a model's Hugging Face files, layer by layer."""
    table = config.weights
    in_block = [at for at, weight in enumerate(table) if weight.in_block]
    first, last = in_block[0], in_block[-1] + 1
    yield from _of_rows(config, table[:first], {})
    for layer in range(config.layers):
        yield from _of_rows(config, table[first:last], {"L": layer})
    yield from _of_rows(config, table[last:], {})


def _of_rows(config: ModelConfig, rows: tuple[Weight, ...], layer: dict[str, int]) -> Iterator[Tensor]:
    sizes = config.axis_sizes
    for weight in rows:
        for expert in [{"E": at} for at in range(config.experts)] if weight.per_expert else [{}]:
            index = layer | expert
            shape = tuple(prod(sizes[axis] for axis in group) for group in weight.hf_axes.split())
            yield Tensor(
                key=weight.key.format(**index),
                shape=shape,
                path=weight.path,
                stacked_shape=weight.shape(sizes),
                at=tuple(index.values()),
                order=tuple(weight.axes[len(index) :].index(axis) for axis in weight.hf_axes.replace(" ", "")),
                other_keys=tuple(
                    place.key.format(**index) for place in weight.other_places if not _is_stacked(weight, place)
                ),
                parts=tuple(
                    _part(place, index, shape, config.experts)
                    for place in weight.other_places
                    if _is_stacked(weight, place)
                ),
            )


def _is_stacked(weight: Weight, place: Stored) -> bool:
    """Whether a tensor contains the weights of all experts."""
    return weight.per_expert and "{E}" not in place.key


def _part(place: Stored, index: Mapping[str, int], shape: tuple[int, ...], experts: int) -> Part:
    rows, *columns = shape
    offset = (index["E"] * place.parts + place.part) * prod(shape)
    return Part(place.key.format(**index), (experts, place.parts * rows, *columns), offset)
