"""Rows of added tokens in the embedding and the head of a base: the mean of its rows.

The logits of a new token are then about the average of the others, so that the base's distribution hardly changes
(Hewitt, 2021, "Initializing New Word Embeddings for Pretrained Language Models").
"""

from math import prod
from typing import Any

import jax
import numpy as np

from xlam_jax.models.config import AddedTokens, ModelConfig
from xlam_jax.models.params import Params, shapes


class ExtendedRows:
    """A lazy embedding or head with rows for added tokens; all of it is read when a part is."""

    def __init__(self, weight: Any, tokens: AddedTokens, vocab_size: int, dtype: Any = None):
        """`weight`: the base's, an array or a lazy one, [V, D]. `vocab_size`: number of rows of the result. `dtype`:
        dtype to convert to; None: that of `weight`."""
        self._weight, self._tokens = weight, tokens
        self.shape = (vocab_size, *weight.shape[1:])
        self.dtype = np.dtype(dtype or weight.dtype)
        self.size, self.ndim = prod(self.shape), len(self.shape)

    def astype(self, dtype: Any) -> "ExtendedRows":
        """Returns the same weight, converted when it is read."""
        return ExtendedRows(self._weight, self._tokens, self.shape[0], dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads all of it. The mean is computed in f32, and rounded to the base's dtype."""
        base = np.asarray(self._weight)
        whole = np.empty(self.shape, base.dtype)
        whole[: len(base)] = base
        new = mean_row(base[: self._tokens.first])
        whole[self._tokens.first : self._tokens.first + self._tokens.number] = new
        whole[len(base) :] = new
        return whole.astype(self.dtype, copy=False).astype(dtype or self.dtype, copy=False)

    def __getitem__(self, at: Any) -> np.ndarray:
        """Returns a part of it."""
        return np.asarray(self)[at]

    def placed(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """Returns it as a sharded array. Each host reads all of the base's weight, which the mean depends on."""
        whole = np.asarray(self)
        return jax.make_array_from_callback(self.shape, sharding, lambda index: whole[index])


def mean_row(rows: np.ndarray) -> np.ndarray:
    """Returns the mean of rows [V, D], computed in f32 in a fixed order, in the dtype of the rows."""
    return np.mean(rows, axis=0, dtype=np.float32).astype(rows.dtype)


def extend(base: Params, model: ModelConfig) -> Params:
    """Returns a base's parameters with rows for the tokens that a run adds to its vocabulary; none is read yet.

    `model`: the run's, with those tokens. A weight with too few or too many rows is returned unchanged, for the
    comparison of shapes to refuse it.
    """
    if model.added is None:
        return base
    extended = dict(base)
    for name in (weight.name for weight in model.weights if weight.has_token_rows and weight.name in base):
        rows = base[name].shape[0]
        if model.added.first <= rows and model.added.vocab_size(rows) == model.vocab_size:
            extended[name] = ExtendedRows(base[name], model.added, model.vocab_size)
    return extended


def new_rows(model: ModelConfig) -> Params:
    """Returns what is trained of the rows of added tokens, before the first step: zeros. {} if they are not trained."""
    abstract = shapes(model)
    names = [f"{weight.name}_rows" for weight in model.weights]
    return {name: np.zeros(abstract[name].shape, np.float32) for name in names if name in abstract}
