"""This project's side of the training-step benchmark: the same step as `xlam_jax.train` compiles."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from _worker import BATCH, CLIP_NORM, LEARNING_RATE, MODEL, WEIGHT_DECAY, batches

from xlam_jax.config import Train
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.params import initialize
from xlam_jax.parallel.mesh import make_mesh
from xlam_jax.training import step as steps
from xlam_jax.training.optimizer import optimizer


class Worker:
    """One compiled step and its state."""

    versions = {"jax": jax.__version__}  # noqa: RUF012

    def __init__(self, precision: str) -> None:
        model = ModelConfig.from_hf({**MODEL, "architectures": ["MixtralForCausalLM"]})
        train = Train(
            steps=1_000_000,
            batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            beta2=0.999,
            clip_norm=CLIP_NORM,
        )
        tx, mesh = optimizer(train, model), make_mesh({})
        self._state = steps.init_state(steps.abstract_state(model, tx, mesh), tx, lambda: initialize(model, 0))
        train_step = steps.make_train_step(
            model,
            tx,
            mesh,
            steps.StepOptions(
                compute_dtype=jnp.float32 if precision == "f32" else jnp.bfloat16,
                remat="none",
                microbatches=1,
                router_aux_weight=float(MODEL["router_aux_loss_coef"]),
            ),
        )
        self._batches = (self._batch(np.asarray(tokens), np.asarray(labels)) for tokens, labels in batches())
        self._step = jax.jit(train_step, donate_argnums=0).lower(self._state, {}, next(self._batches)).compile()
        self.loss = float("nan")
        self.steps(1)

    @staticmethod
    def _batch(tokens_BT: np.ndarray, labels_BT: np.ndarray) -> steps.Batch:
        rows, length = tokens_BT.shape
        positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
        return steps.Batch(
            tokens_BT.astype(np.int32),
            labels_BT.astype(np.int32),
            np.ones((rows, length), np.float32),
            np.ascontiguousarray(positions_BT),
            np.ones((rows, length), np.int32),
        )

    def steps(self, count: int) -> list[float]:
        """Runs `count` steps. Returns the seconds of each, from a ready batch to the loss and the new parameters."""
        seconds = []
        for _ in range(count):
            batch = next(self._batches)
            start = time.perf_counter()
            self._state, metrics = self._step(self._state, {}, batch)
            jax.block_until_ready(self._state)
            self.loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - start)
        return seconds
