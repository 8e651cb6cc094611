"""Log-probabilities of every pair under the reference policy, which is the weights that a run starts from. They are
computed once and stored in a folder:

    reference.json      the inputs: digests of the pairs and of the weights, the model, the precision; and digests of
                        the other files
    <n>.train.npy       for the n-th source, f32 [pairs, 2]: the sums over the chosen and over the rejected side
    <n>.heldout.npy

The scores are valid for these weights and tokens only. With others, the rewards would silently be wrong, so a folder
with other inputs is refused.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xlam_jax.config import Data, Resolved
from xlam_jax.data import pipeline
from xlam_jax.data.examples import Example, Loaded, Referenced
from xlam_jax.data.identity import PARTS, examples_digest
from xlam_jax.digest import file_digest, hex_digest, json_digest
from xlam_jax.errors import UserError
from xlam_jax.models.params import Params
from xlam_jax.outputs import new_folder
from xlam_jax.parallel.link import Hosts
from xlam_jax.progress import Progress, Throughput
from xlam_jax.training.setup import Setup

META = "reference.json"

Scores = list[dict[str, np.ndarray]]
"""Per source and part, f32 [pairs, 2]."""


def load_or_compute(
    resolved: Resolved,
    run: Path,
    setup: Setup,
    initial: Params | None,
    frozen: Params,
    fingerprints: tuple[str | None, str],
    hosts: Hosts,
    progress: Progress,
) -> tuple[list[Loaded], str]:
    """Returns the data with the scores of the reference policy, and the fingerprint of its weights.

    `initial`: the weights that the run starts from; None to read them again, for a resumed run. `fingerprints`: that of
    `initial`, if known, and that of `frozen` ("" without frozen weights). Raises `UserError` if the weights are not
    those that the run started from, or the scores in the folder have other inputs.
    """
    from xlam_jax.weights import run as weights

    config, (saved, of_frozen) = resolved.config, fingerprints

    def policy() -> Params:
        if initial is not None:
            return initial
        base = weights.read_base(resolved) if resolved.model.lora else None
        return weights.fresh(resolved, weights.read_initial(resolved, base), setup.state.params)

    fingerprint = saved or weights.fingerprint(policy())

    def score() -> Scores:
        params = policy()
        weights.check_policy(resolved, fingerprint, weights.fingerprint(params))
        rows = config.train.batch_size // config.train.microbatches
        return compute(setup, config.data, params, frozen, progress, rows=rows)

    loaded, is_read = attach(
        Path(config.objective.reference_cache or run / "reference"),
        setup.loaded,
        identity(
            setup.loaded,
            weights=f"{fingerprint} {of_frozen}".strip(),
            model=resolved.hf_config,
            dtype=config.model.compute_dtype,
        ),
        score,
        progress.line,
        writes=hosts.first,
    )
    progress.line("reference policy: " + ("read" if is_read else "computed and stored"))
    return loaded, fingerprint


def identity(loaded: Sequence[Loaded], *, weights: str, model: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the inputs of the scores, as stored in reference.json. `weights`: the fingerprint of the weights."""
    return {
        "weights": weights,
        "precision": dtype,
        "model": json_digest(model, length=16),
        "sources": {
            source.source.name: {
                part: {"pairs": len(getattr(source, part)), "digest": examples_digest(getattr(source, part), columns)}
                for part in PARTS
            }
            for source in loaded
        },
    }


def columns(pair: Example) -> list[np.ndarray]:
    """Returns the arrays that determine the log-probabilities of a pair. Of the weights, only zero or not matters."""
    return [pair["tokens"], pair["labels"], pair.get("sides", np.zeros(0, np.int8)), pair["weights"] != 0]


def attach(
    folder: Path,
    loaded: list[Loaded],
    origin: dict[str, Any],
    compute: Callable[[], Scores],
    report: Callable[[str], None],
    *,
    writes: bool = True,
) -> tuple[list[Loaded], bool]:
    """Returns the data with the scores of each pair, and whether they were read rather than computed.

    `origin`: the inputs of the scores, from `identity`; `compute` must score with the weights of its fingerprint. All
    hosts compute together, and the host that `writes` stores the scores. Raises `UserError` if the folder contains the
    scores of other pairs, weights, model or precision, or a damaged file.
    """
    is_read = folder.exists()
    if is_read:
        scores = _read(folder, loaded, origin, report)
    else:
        scores = compute()
        if writes:
            _write(folder, scores, origin)
    with_reference = [
        source._replace(**{part: Referenced(getattr(source, part), of_source[part]) for part in PARTS})
        for source, of_source in zip(loaded, scores, strict=True)
    ]
    return with_reference, is_read


def compute(setup: Setup, data: Data, params: Params, frozen: Params, progress: Progress, *, rows: int) -> Scores:
    """Scores every pair with these weights, packed as in training in batches of `rows`. All hosts call it together."""
    import jax
    from jax.experimental import multihost_utils

    from xlam_jax.training.step import make_reference_step

    loaded = setup.loaded
    score = jax.jit(make_reference_step(setup.model, setup.mesh, setup.options))
    local_rows = setup.rows(rows)
    scores = [{part: np.zeros((len(getattr(source, part)), 2), np.float32) for part in PARTS} for source in loaded]
    pairs = sum(len(source.train) + len(source.heldout) for source in loaded)
    scored = Throughput("reference policy", pairs, unit="pairs", out=progress.line)
    for part in PARTS:
        for batch, origins in pipeline.ordered(loaded, part, data, rows=rows):
            sides = score(params, frozen, setup.batch(pipeline.stack([batch[row] for row in local_rows]), rows))
            sides_BP2 = np.stack(multihost_utils.process_allgather(tuple(sides), tiled=True), axis=-1)
            for row_P2, packed in zip(sides_BP2, origins, strict=True):
                for (source, row), log_p_2 in zip(packed, row_P2, strict=False):
                    scores[source][part][row] = log_p_2
                scored.add(len(packed))
    return scores


def _write(folder: Path, scores: Scores, origin: dict[str, Any]) -> None:
    with new_folder(folder) as part:
        part.mkdir()
        digests = {}
        for at, of_source in enumerate(scores):
            for name, values in of_source.items():
                file = part / f"{at}.{name}.npy"
                np.save(file, values)
                digests[file.name] = file_digest(file)
        (part / META).write_text(json.dumps(origin | {"files": digests}, indent=1) + "\n", encoding="utf-8")


def _read(folder: Path, loaded: Sequence[Loaded], origin: dict[str, Any], report: Callable[[str], None]) -> Scores:
    advice = "name another folder in objective.reference_cache, or remove this one to compute it anew"
    try:
        stored = json.loads((folder / META).read_text(encoding="utf-8"))
        different = list(_differences(stored, origin))
        if different:
            raise UserError(f"{folder}: the reference of other inputs:\n  " + "\n  ".join(different) + f"\n{advice}")
        digests = stored.get("files")
        scores = [
            {part: _load(folder / f"{at}.{part}.npy", len(getattr(source, part)), digests) for part in PARTS}
            for at, source in enumerate(loaded)
        ]
    except FileNotFoundError as error:
        if not (folder / META).exists():
            raise UserError(f"{folder}: not a reference, it has no {META}; {advice}") from None
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
    """Reads f32 [pairs, 2]. Raises `ValueError` when the file differs from what was written."""
    content = file.read_bytes()
    if digests is not None and hex_digest(content) != digests[file.name]:
        raise ValueError(f"{file.name} is damaged: its content is not what was written")
    values = np.load(io.BytesIO(content))
    if values.shape != (pairs, 2) or values.dtype != np.float32:
        raise ValueError(f"{file.name} has {values.dtype} {values.shape}, and float32 {(pairs, 2)} is expected")
    return values


def _differences(stored: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Describes each difference between two origins."""
    for key in ("weights", "model", "precision"):
        if stored[key] != now[key]:
            yield f"{key}: {stored[key]} there, {now[key]} now"
    if list(stored["sources"]) != list(now["sources"]):
        yield f"sources: {', '.join(stored['sources'])} there, {', '.join(now['sources'])} now"
        return
    for name, parts in now["sources"].items():
        for part, about in parts.items():
            before = stored["sources"][name][part]
            if before != about:
                counts = f"{before['pairs']} pairs of digest {before['digest']} there, {about['pairs']} of "
                yield f"{name}, {part}: {counts}{about['digest']} now"
