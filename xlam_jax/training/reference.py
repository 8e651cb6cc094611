"""log p of every pair under the weights that a run starts from, computed once and kept in a folder:

    reference.json      what it was made of: digests of the pairs and of the weights, the model, the precision; and
                        digests of the other files
    <n>.train.npy       of the n-th source, f32 [pairs, 2]: the sums over the chosen and over the rejected side
    <n>.heldout.npy

The numbers are of these weights on these tokens; with any others the rewards would be wrong and nothing would show it.
So a folder that was made of anything else is refused.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.folders import new_folder
from xlam_jax.config import Resolved
from xlam_jax.data import pipeline
from xlam_jax.data.examples import Example, Loaded, Referenced
from xlam_jax.data.identity import PARTS, examples_digest
from xlam_jax.errors import UserError
from xlam_jax.models.params import Params
from xlam_jax.training.progress import Progress
from xlam_jax.training.setup import Setup

META = "reference.json"
QUIET = 10.0  # seconds between two lines

Scores = list[dict[str, np.ndarray]]
"""Of each source and part, f32 [pairs, 2]."""


def identity(loaded: Sequence[Loaded], *, weights: str, model: dict[str, Any], dtype: str) -> dict[str, Any]:
    """What a reference depends on. `weights` is the fingerprint of the weights."""
    return {
        "weights": weights,
        "precision": dtype,
        "model": hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()[:16],
        "sources": {
            one.source.name: {
                part: {"pairs": len(getattr(one, part)), "digest": examples_digest(getattr(one, part), _columns)}
                for part in PARTS
            }
            for one in loaded
        },
    }


def _columns(pair: Example) -> list[np.ndarray]:
    """What the log-probabilities of a pair depend on; a token counts or does not, whatever its weight."""
    return [pair["tokens"], pair["labels"], pair.get("sides", np.zeros(0, np.int8)), pair["weights"] != 0]


def attach(
    folder: Path,
    loaded: list[Loaded],
    made_of: dict[str, Any],
    compute: Callable[[], Scores],
    report: Callable[[str], None],
    *,
    writes: bool = True,
) -> tuple[list[Loaded], bool]:
    """Returns the data with the reference beside each pair, and whether it was found rather than computed.

    All hosts compute it together, and the one that `writes` keeps it. Raises `UserError` when the folder holds the
    reference of other pairs, weights, model or precision, or a damaged file. `compute` must score with the weights
    whose fingerprint `made_of` has.
    """
    found = folder.exists()
    if found:
        scores = _read(folder, loaded, made_of, report)
    else:
        scores = compute()
        if writes:
            _write(folder, scores, made_of)
    with_reference = [
        one._replace(**{part: Referenced(getattr(one, part), of_source[part]) for part in PARTS})
        for one, of_source in zip(loaded, scores, strict=True)
    ]
    return with_reference, found


def compute(resolved: Resolved, made: Setup, params: Params, frozen: Params, progress: Progress) -> Scores:
    """Scores every pair with these weights, packed like a batch of training. All hosts call it together."""
    import jax
    from jax.experimental import multihost_utils

    from xlam_jax.training.step import make_reference_step

    config, loaded = resolved.config, made.loaded
    score = jax.jit(
        make_reference_step(
            resolved.model,
            made.mesh,
            compute_dtype=made.dtype,
            pairs=config.data.max_pairs,
            quantized=made.quantized,
            kernels=made.kernels,
        )
    )
    rows = config.train.batch_size // config.train.microbatches
    mine = made.rows(rows)
    scores = [{part: np.zeros((len(getattr(one, part)), 2), np.float32) for part in PARTS} for one in loaded]
    pairs, done = sum(len(one.train) + len(one.heldout) for one in loaded), 0
    began = told = time.monotonic()
    for part in PARTS:
        for batch, origins in pipeline.ordered(loaded, part, config.data, rows=rows):
            sides = score(params, frozen, made.batch(pipeline.stack([batch[row] for row in mine]), rows))
            sides_BP2 = np.stack(multihost_utils.process_allgather(tuple(sides), tiled=True), axis=-1)
            for row_P2, held in zip(sides_BP2, origins, strict=True):
                for (source, row), log_p_2 in zip(held, row_P2, strict=False):
                    scores[source][part][row] = log_p_2
                done += len(held)
            if (now := time.monotonic()) - told > QUIET:
                progress.line(f"reference policy: {done:,} of {pairs:,} pairs, {done / (now - began):,.0f} a second")
                told = now
    return scores


def _write(folder: Path, scores: Scores, made_of: dict[str, Any]) -> None:
    with new_folder(folder) as part:
        part.mkdir()
        digests = {}
        for at, of_source in enumerate(scores):
            for name, values in of_source.items():
                file = part / f"{at}.{name}.npy"
                np.save(file, values)
                digests[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        (part / META).write_text(json.dumps(made_of | {"files": digests}, indent=1) + "\n", encoding="utf-8")


def _read(folder: Path, loaded: Sequence[Loaded], made_of: dict[str, Any], report: Callable[[str], None]) -> Scores:
    advice = "name another folder in objective.reference_cache, or remove this one to compute it anew"
    try:
        was = json.loads((folder / META).read_text(encoding="utf-8"))
        different = list(_differences(was, made_of))
        if different:
            raise UserError(f"{folder}: the reference of something else:\n  " + "\n  ".join(different) + f"\n{advice}")
        digests = was.get("files")
        scores = [
            {part: _load(folder / f"{at}.{part}.npy", len(getattr(one, part)), digests) for part in PARTS}
            for at, one in enumerate(loaded)
        ]
    except FileNotFoundError as error:
        if not (folder / META).exists():
            raise UserError(f"{folder}: is no reference, it has no {META}; {advice}") from None
        raise UserError(f"{folder}: {Path(str(error.filename)).name} is missing; {advice}") from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: can't be read ({error}); {advice}") from None
    if digests is None:
        report(
            f"warning: {folder}: written by a version that stored no digests of its files, and that could score "
            "trained weights where a run was resumed without its reference; remove the folder to compute it again"
        )
    return scores


def _load(file: Path, pairs: int, digests: dict[str, str] | None) -> np.ndarray:
    """f32 [pairs, 2]. Raises `ValueError` when the file is not what was written."""
    content = file.read_bytes()
    if digests is not None and hashlib.sha256(content).hexdigest() != digests[file.name]:
        raise ValueError(f"{file.name} is damaged: its content is not what was written")
    values = np.load(io.BytesIO(content))
    if values.shape != (pairs, 2) or values.dtype != np.float32:
        raise ValueError(f"{file.name} has {values.dtype} {values.shape}, and float32 {(pairs, 2)} is expected")
    return values


def _differences(was: dict[str, Any], now: dict[str, Any]) -> Any:
    for key in ("weights", "model", "precision"):
        if was[key] != now[key]:
            yield f"{key}: {was[key]} there, {now[key]} now"
    if list(was["sources"]) != list(now["sources"]):
        yield f"sources: {', '.join(was['sources'])} there, {', '.join(now['sources'])} now"
        return
    for name, parts in now["sources"].items():
        for part, about in parts.items():
            before = was["sources"][name][part]
            if before != about:
                counts = f"{before['pairs']} pairs of digest {before['digest']} there, {about['pairs']} of "
                yield f"{name}, {part}: {counts}{about['digest']} now"
