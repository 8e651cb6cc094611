"""Evaluation during training: held-out losses by source and kind, and answers to held-out requests.

Axes: S sources, K kinds of spans.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from xlam_jax.config import Data, Eval
from xlam_jax.data import pipeline
from xlam_jax.data.corpus import Loaded
from xlam_jax.data.render import end_tokens
from xlam_jax.enums import SPAN_KINDS
from xlam_jax.errors import UserError
from xlam_jax.evaluate import next_call
from xlam_jax.models.generation import Generate
from xlam_jax.models.params import Params
from xlam_jax.training.setup import Setup
from xlam_jax.training.step import Groups, Sums, make_eval_step, means


def losses_by_group(groups: Groups, sources: Sequence[str], *, kinds: bool) -> dict[str, Any]:
    """Returns the loss of each source and, with `kinds`, of each kind of span. Skips groups without tokens (or
    pairs)."""
    shape = (len(sources), -1)
    loss_SK, weight_SK, count_SK = (np.asarray(sums, np.float64).reshape(shape) for sums in groups)

    def mean(loss: Any, weight: Any, count: Any) -> dict[str, Any]:
        return {"loss": float(loss.sum() / weight.sum()), "tokens": round(float(count.sum()))}

    def by_kind(loss_K: Any, weight_K: Any, count_K: Any) -> dict[str, Any]:
        each = zip(SPAN_KINDS, loss_K, weight_K, count_K, strict=True)
        return {"kinds": {kind: mean(*sums) for kind, *sums in each if sums[1]}} if kinds else {}

    each = zip(sources, loss_SK, weight_SK, count_SK, strict=True)
    by_source = {name: mean(*sums) | by_kind(*sums) for name, *sums in each if sums[1].sum()}
    return {"sources": by_source} | by_kind(*(sums_SK.sum(axis=0) for sums_SK in (loss_SK, weight_SK, count_SK)))


def to_record(values: dict[str, Any], sources: Sequence[str], *, kinds: bool) -> dict[str, Any]:
    """Converts a step's metrics on devices to the numbers of a record. `kinds`: as in `losses_by_group`."""
    values = dict(jax.device_get(values))
    groups = values.pop("groups")
    return {name: float(value) for name, value in values.items()} | losses_by_group(groups, sources, kinds=kinds)


def heldout_record(batches: Iterable[Sums], sources: Sequence[str], *, kinds: bool) -> dict[str, Any] | None:
    """Returns the held-out record of evaluated batches; None if there are none."""
    sums = list(batches)
    if not sums:
        return None
    return to_record(means(jax.tree.map(lambda *parts: sum(parts), *sums)), sources, kinds=kinds)


class Evaluator:
    """Computes the held-out losses of parameters."""

    def __init__(self, setup: Setup, loaded: list[Loaded], data: Data, *, rows: int, batches: int | None):
        """`rows`: number of rows of an evaluated batch. `batches`: maximum number of batches; None for all."""
        self._setup, self._loaded, self._data = setup, loaded, data
        self._rows, self._limit = rows, batches
        self._kinds = setup.objective.preference is None
        self._sources = [source.name for source in data.sources]
        self._step = jax.jit(make_eval_step(setup.model, setup.mesh, setup.options))

    def heldout(self, params: Params, frozen: Params) -> dict[str, Any] | None:
        """Returns the held-out record: losses by source, and for SFT by kind of span. None if nothing is held out."""
        batches = pipeline.heldout_batches(
            self._loaded, self._data, rows=self._rows, limit=self._limit, host_rows=self._setup.rows(self._rows)
        )
        sums = (self._step(params, frozen, self._setup.batch(local_rows, self._rows)) for local_rows in batches)
        return heldout_record(sums, self._sources, kinds=self._kinds)


class Requests:
    """Held-out requests, rendered once, that the model answers at each evaluation."""

    def __init__(self, setup: Setup, data: Data, section: Eval, *, rows: int):
        """`rows`: number of requests answered at the same time. Raises `UserError` if no held-out request is usable."""
        samples = ((loaded.source.name, sample) for loaded in setup.loaded for sample in loaded.samples)
        self._prompts, skipped = next_call.prompts(
            next_call.requests(samples),
            setup.tokenizer,
            data.format,
            longest=max(1, setup.model.max_positions - section.max_new_tokens),
            count=section.requests,
        )
        if not self._prompts:
            reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "none calls a tool"
            raise UserError(
                f"eval.requests is {section.requests}, and no held-out trajectory can be used ({reasons}); "
                "increase data.heldout, or set eval.requests to 0"
            )
        self._tokenizer, self._format = setup.tokenizer, data.format
        stops = end_tokens(setup.tokenizer, data.format)
        generate = Generate(setup.model, setup.mesh, dtype=setup.dtype, quantized=setup.options.quantized)
        self._generate = partial(generate, rows=rows, max_new_tokens=section.max_new_tokens, eos_id=stops)

    def answer(self, params: Params, frozen: Params) -> list[next_call.ScoredAnswer]:
        """Returns the answers of the model with these parameters, decoded greedily."""
        generate = partial(self._generate, params, frozen)
        return next_call.answer(self._prompts, generate, self._tokenizer, self._format)

    @staticmethod
    def summary(answers: Sequence[next_call.ScoredAnswer]) -> dict[str, float]:
        """Returns the requests record: the means of the marks of all answers."""
        return next_call.summarize([answer.score for answer in answers])
