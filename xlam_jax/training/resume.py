"""Compares a resumed run with its checkpoint: the data, the tokenizer, the number of CPU threads."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xlam_jax.config import Data
from xlam_jax.data import pipeline
from xlam_jax.data.identity import Identity, changed_sources, describe_source, describe_tokenizer
from xlam_jax.data.mixture import shares_of_sizes
from xlam_jax.errors import UserError
from xlam_jax.parallel.mesh import THREADS

Report = Callable[[str], None]


def check_data(
    run: Path,
    step: int,
    saved: Mapping[str, Any],
    identity: Identity,
    data: Data,
    state: dict[str, Any],
    report: Report,
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Compares the identity of the data with the one in a checkpoint's metadata, `saved`.

    Returns a record of the changes for run.json (None without changes), and the position at which the data continue:
    `state`, or if sources changed, the start of the rows that were being packed (`pipeline.packed_again`). Raises
    `UserError` with both identities if something changed and `data.on_change` is error.
    """
    if "data" not in saved:
        report(
            f"warning: {run}: step {step} was saved by a version that stored no digests of its data; whether the "
            "sources and the tokenizer are still the same is not checked"
        )
        return None, state
    sources = changed_sources(saved["data"], identity["data"])
    lines = [
        f"data.sources, {name}: {describe_source(saved['data'].get(name))} at step {step}; "
        f"{describe_source(identity['data'].get(name))} now"
        for name in sources
    ]
    other_tokenizer = saved["tokenizer"]["digest"] != identity["tokenizer"]["digest"]
    if other_tokenizer:
        described = [describe_tokenizer(either["tokenizer"]) for either in (saved, identity)]
        lines.append(
            f"data.tokenizer: {described[0]} at step {step}; {described[1]} now (the digest is of its vocabulary and "
            "chat template)"
        )
    if not lines:
        return None, state
    changed = "\n  ".join([f"{run}: the data are not those that the run was trained on:", *lines])
    if data.on_change == "error":
        raise UserError(
            f"{changed}\nrestore them, choose another output_dir, or continue with what is there now: "
            "data.on_change=warn"
        )
    report(f"warning: {changed}")
    record: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, "sources": {}}
    if other_tokenizer:
        record["tokenizer"] = {"before": saved["tokenizer"], "now": identity["tokenizer"]}
    for name in sources:
        record["sources"][name] = {"before": saved["data"].get(name), "now": identity["data"].get(name)}
    if sources:
        state = pipeline.packed_again(state)
        for name, before, now in _positions(saved["data"], identity["data"], data, state):
            if name in sources or before != now:
                record["sources"].setdefault(name, {})["continues"] = {"before": before, "now": now}
                report(f"{name}: continues with {_describe(now)}; without the change: {_describe(before)}")
        report(
            "examples come in another order after such a change, so in their current epoch some may come twice and "
            f"others not at all; each stream packs its current {data.packing_bins} rows again"
        )
    return record, state


def _positions(
    before: Mapping[str, Any], now: Mapping[str, Any], data: Data, state: Mapping[str, Any]
) -> list[tuple[str, dict[str, int], dict[str, int]]]:
    """Returns per source its name, its position without the change, and the position from which it continues."""
    both = []
    for identity in (before, now):
        parts = [identity[source.name]["train"] for source in data.sources]
        sizes = [part["examples"] for part in parts]
        tokens = [part["trained_tokens"] for part in parts] if data.share == "tokens" else None
        counts = pipeline.draws(state, shares_of_sizes(data.sources, sizes, tokens), data.streams)
        both.append([_position(drawn, size) for drawn, size in zip(counts, sizes, strict=True)])
    return [(source.name, *positions) for source, *positions in zip(data.sources, *both, strict=True)]  # pyright: ignore


def _position(drawn: int, size: int) -> dict[str, int]:
    return {"drawn": drawn, "epoch": drawn // size + 1, "example": drawn % size + 1, "examples": size}


def _describe(position: Mapping[str, int]) -> str:
    return (
        f"example {position['example']:,} of {position['examples']:,} in epoch {position['epoch']:,} "
        f"({position['drawn']:,} drawn before)"
    )


def check_threads(step: int, saved: Sequence[int] | None, now: Sequence[int] | None, report: Report) -> None:
    """Warns when the number of XLA's CPU threads (per host; None: not on CPUs) has changed since a step was saved."""
    if saved and now and list(saved) != list(now):
        before, current = (", ".join(map(str, threads)) for threads in (saved, now))
        report(
            f"warning: XLA has {current} CPU threads, and had {before} when step {step} was saved. It splits sums "
            "among them, so the results will differ in their last bits from those of an uninterrupted run; "
            f"to prevent that, continue with {THREADS}={saved[0]} and the same mesh and hosts"
        )
