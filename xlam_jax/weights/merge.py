"""Adapters merged into the weights that they were trained on, one layer (or expert) at a time."""

from typing import TYPE_CHECKING, Any

import numpy as np

from xlam_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from xlam_jax.models.params import Params


class Merged:
    """A weight with its adapter's product added in f32, then rounded to the weight's dtype. Each layer (and expert) is
    computed when it is indexed."""

    def __init__(self, weight: Any, a: np.ndarray, b: np.ndarray, scale: float, transposed: bool):
        """`transposed`: the weight has its output axes first."""
        self._weight, self._a, self._b, self._scale, self._transposed = weight, a, b, scale, transposed
        self.shape, self.dtype, self.size, self.ndim = weight.shape, weight.dtype, weight.size, weight.ndim

    def __getitem__(self, at: tuple[int, ...]) -> np.ndarray:
        """The slice at an index along the leading axes."""
        weight = np.asarray(self._weight[at])
        a, b = (np.asarray(factor[at], np.float32) for factor in (self._a, self._b))
        rank = a.shape[-1]
        product = a.reshape(-1, rank) @ b.reshape(rank, -1)
        if self._transposed:
            product = product.T
        return (weight.astype(np.float32) + self._scale * product.reshape(weight.shape)).astype(weight.dtype)


def merge(config: ModelConfig, base: "Params", adapters: "Params") -> "Params":
    """Returns the base's parameters, of which those with adapters are `Merged`; none is computed yet."""
    assert config.lora is not None
    scale = config.lora.scale
    return {
        name: merge(config, value, adapters.get(name, {}))
        if isinstance(value, dict)
        else Merged(value, adapters[f"{name}_a"], adapters[f"{name}_b"], scale, config.weight(name).outputs_first)
        if f"{name}_a" in adapters
        else value
        for name, value in base.items()
    }
