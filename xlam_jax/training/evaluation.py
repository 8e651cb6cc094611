"""What is looked at while training: losses told apart by source and kind, and answers to held-out requests."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from xlam_jax.config import Resolved
from xlam_jax.data.render import end_tokens
from xlam_jax.enums import SPAN_KINDS as KINDS
from xlam_jax.errors import UserError
from xlam_jax.evaluate import next_call
from xlam_jax.models.generation import Generate
from xlam_jax.models.params import Params
from xlam_jax.training.setup import Setup
from xlam_jax.training.step import Groups, Sums, means


def told_apart(groups: Groups, sources: Sequence[str], *, kinds: bool) -> dict[str, Any]:
    """The loss of each source, and with `kinds` also of each kind of span; what has no token (or pair) is left out."""
    shape = (len(sources), -1)
    loss_SK, weight_SK, count_SK = (np.asarray(sums, np.float64).reshape(shape) for sums in groups)

    def told(loss: Any, weight: Any, count: Any) -> dict[str, Any]:
        return {"loss": float(loss.sum() / weight.sum()), "tokens": round(float(count.sum()))}

    def of_kinds(loss_K: Any, weight_K: Any, count_K: Any) -> dict[str, Any]:
        each = zip(KINDS, loss_K, weight_K, count_K, strict=True)
        return {"kinds": {kind: told(*sums) for kind, *sums in each if sums[1]}} if kinds else {}

    each = zip(sources, loss_SK, weight_SK, count_SK, strict=True)
    by_source = {name: told(*sums) | of_kinds(*sums) for name, *sums in each if sums[1].sum()}
    return {"sources": by_source} | of_kinds(*(sums_SK.sum(axis=0) for sums_SK in (loss_SK, weight_SK, count_SK)))


def record(values: dict[str, Any], sources: Sequence[str], *, kinds: bool) -> dict[str, Any]:
    """A step's metrics as numbers, ready to be written."""
    values = dict(jax.device_get(values))
    groups = values.pop("groups")
    return {name: float(value) for name, value in values.items()} | told_apart(groups, sources, kinds=kinds)


def heldout(batches: Iterable[Sums], sources: Sequence[str], *, kinds: bool) -> dict[str, Any] | None:
    """The held-out record of evaluated batches; None where there is none."""
    sums = list(batches)
    if not sums:
        return None
    return record(means(jax.tree.map(lambda *parts: sum(parts), *sums)), sources, kinds=kinds)


class Requests:
    """Held-out requests, rendered once, that the model answers again and again."""

    def __init__(self, resolved: Resolved, made: Setup):
        data, limit = resolved.config.data, resolved.config.eval.max_new_tokens
        samples = ((one.source.name, sample) for one in made.loaded for sample in one.samples)
        longest = max(1, resolved.model.max_positions - limit)
        asked, left_out = next_call.prompts(
            next_call.requests(samples),
            made.tokenizer,
            data.format,
            longest=longest,
            count=resolved.config.eval.requests,
        )
        if not asked:
            why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none calls a tool"
            raise UserError(
                f"eval.requests is {resolved.config.eval.requests}, and nothing held out can be asked for ({why}); "
                "hold more out (data.heldout), or set eval.requests to 0"
            )
        self._asked, self._tokenizer = asked, made.tokenizer
        generate = Generate(resolved.model, made.mesh, dtype=made.dtype, quantized=made.quantized)
        rows = resolved.config.train.batch_size // resolved.config.train.microbatches
        self._stops = end_tokens(made.tokenizer, data.format)
        self._generate = partial(generate, rows=rows, max_new_tokens=limit, eos_id=self._stops)

    def answer(self, params: Params, frozen: Params) -> list[next_call.Answer]:
        """What the model answers now, always the likeliest token."""
        generate = partial(self._generate, params, frozen)
        return next_call.answer(self._asked, generate, self._tokenizer, self._stops)

    @staticmethod
    def summary(answers: Sequence[next_call.Answer]) -> dict[str, float]:
        """The requests record."""
        return next_call.summarize([answer.score for answer in answers])
