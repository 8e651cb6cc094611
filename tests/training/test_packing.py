"""Packed training equals training on each trajectory separately: the loss of each, and the gradient of all."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from support import ROOT

from xlam_jax.config import Data
from xlam_jax.data import corpus, examples, pipeline
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.params import binder, initialize
from xlam_jax.training.objectives import token_log_probabilities

QUICKSTART = ROOT / "examples/quickstart"
LENGTH = 1024


def test_packed_and_alone_have_the_same_loss_and_gradient():
    hf = json.loads((ROOT / "configs/models/tiny_mixtral.json").read_text(encoding="utf-8"))
    hf |= {"hidden_size": 32, "head_dim": 8, "intermediate_size": 48, "num_hidden_layers": 2}
    config = ModelConfig.from_hf(hf)
    params = jax.jit(lambda: initialize(config, 0))()
    bind = binder(config, dtype=jnp.float32)
    data = Data.model_validate(
        {
            "sources": [
                {"name": name, "files": [str(QUICKSTART / f"{name}.jsonl")], "limit": 6}
                for name in ("webshop", "hotpotqa", "hammer")
            ],
            "tokenizer": str(QUICKSTART / "tokenizer"),
            "sequence_length": LENGTH,
            "heldout": 0.0,
            "streams": 1,
            "packing_bins": 3,
        }
    )
    loaded = corpus.load(data, load_tokenizer(data.tokenizer))

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(params, row: pipeline.Row, places):
        model = bind(params)
        tokens, labels, weights, positions, segments = (jnp.asarray(column)[None] for column in row[:5])
        hidden_BTD, *_ = model(tokens, positions, segments)
        log_p_BT, _ = token_log_probabilities(hidden_BTD, model.head_VD(), labels, weights != 0)
        return -jnp.sum(log_p_BT * weights * places)

    def alone(example: examples.Example) -> pipeline.Row:
        """Pads a trajectory on the right to the length of a packed row, so that one compilation suffices."""
        count = len(example["tokens"])
        end = (0, LENGTH - count)
        return pipeline.Row(
            tokens=np.pad(example["tokens"], end),
            labels=np.pad(example["labels"], end),
            weights=np.pad(example["weights"], end),
            positions=np.pad(np.arange(count, dtype=np.int32), end),
            segments=np.pad(np.ones(count, np.int32), end),
            groups=np.zeros(LENGTH, np.int32),
        )

    rows = pipeline.packed_rows(loaded, data, batch_size=1, seed=0)
    checked = 0
    for _ in range(5):
        packed = next(rows)
        row = pipeline._row(packed)
        gradients = None
        for segment, (source, at) in enumerate(pipeline.origins(packed), start=1):
            in_segment = row.segments == segment
            together, _ = loss_and_gradient(params, row, in_segment.astype(np.float32))
            by_itself, gradient = loss_and_gradient(params, alone(loaded[source].train[at]), np.float32(1))
            np.testing.assert_allclose(float(together), float(by_itself), rtol=1e-5)
            gradients = gradient if gradients is None else jax.tree.map(jnp.add, gradients, gradient)
            checked += 1
        _, whole = loss_and_gradient(params, row, np.float32(1))
        for actual, expected in zip(jax.tree.leaves(whole), jax.tree.leaves(gradients), strict=True):
            np.testing.assert_allclose(actual, expected, atol=1e-5 * float(np.abs(expected).max()) + 1e-7)
    assert checked >= 5
