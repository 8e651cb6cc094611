"""Adapters, and trained rows of added tokens, merged into the weights that they were trained on, one layer (or expert)
at a time."""

from typing import TYPE_CHECKING, Any

import numpy as np

from xlam_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from xlam_jax.models.params import Params


class Merged:
    """A weight with its adapter's product and its trained rows added in f32, then rounded to the weight's dtype. Each
    layer (and expert) is computed when it is indexed."""

    def __init__(self, config: ModelConfig, name: str, weight: Any, adapters: "Params"):
        """`name`: the weight's. `adapters`: those of its branch of the parameter tree."""
        self._config, self._weight = config, weight
        self._transposed = config.weight(name).outputs_first
        self._factors = [adapters[f"{name}_{factor}"] for factor in "ab" if f"{name}_{factor}" in adapters]
        self._rows = adapters.get(f"{name}_rows")
        self.shape, self.dtype, self.size, self.ndim = weight.shape, weight.dtype, weight.size, weight.ndim

    def __getitem__(self, at: tuple[int, ...]) -> np.ndarray:
        """The slice at an index along the leading axes."""
        weight = np.asarray(self._weight[at])
        merged = weight.astype(np.float32)
        if self._factors:
            assert self._config.lora is not None
            a, b = (np.asarray(factor[at], np.float32) for factor in self._factors)
            rank = a.shape[-1]
            product = a.reshape(-1, rank) @ b.reshape(rank, -1)
            product = product.T if self._transposed else product
            merged = merged + self._config.lora.scale * product.reshape(weight.shape)
        if self._rows is not None:
            assert self._config.added is not None
            first, count = self._config.added
            merged[first : first + count] += np.asarray(self._rows, np.float32)
        return merged.astype(weight.dtype)


def merge(config: ModelConfig, base: "Params", adapters: "Params") -> "Params":
    """Returns the base's parameters, of which those with adapters are `Merged`; none is computed yet."""
    return {
        name: merge(config, value, adapters.get(name, {}))
        if isinstance(value, dict)
        else Merged(config, name, value, adapters)
        if f"{name}_a" in adapters or f"{name}_rows" in adapters
        else value
        for name, value in base.items()
    }
