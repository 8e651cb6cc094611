"""A model as rater: scores whole trajectories from 0 to 5, with reasons.

The method is that of AgentRater in AgentOhana (https://arxiv.org/abs/2402.15506), which keeps trajectories with a score
of at least 4, and of criticLAM in ActionStudio (https://arxiv.org/abs/2503.22673). The prompt is our own.

Each answer is appended to `<out>.ratings.jsonl` when it arrives, so that a killed run continues from there. In the end
the trajectories are written to `out`, with the rating as their `score`. Their earlier score is stored with the rating,
and the ratings are compared with it.
"""

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from xlam_jax import journal
from xlam_jax.config import Source
from xlam_jax.data import sources
from xlam_jax.data.trajectory import InvalidTrajectory, Message, Trajectory, to_dict
from xlam_jax.data.wire import objects_in
from xlam_jax.digest import hex_digest, json_digest
from xlam_jax.errors import UserError
from xlam_jax.outputs import new_file
from xlam_jax.progress import Throughput

if TYPE_CHECKING:
    from xlam_jax.evaluate.endpoint import EndpointFault, Model

HIGHEST = 5
FAILURES = 20
"""Number of answers after which a run ends if none of them contains a rating."""
LONGEST_RESULT = 4000
"""Maximum length of a tool's result in the prompt, in characters: half from its beginning, half from its end."""

PROMPT = """You rate how well an AI agent did its task. You are given the task, the tools that the agent had, and all
that happened: what the user said, what the agent thought, said and called, and what the tools returned.

Consider
- the outcome: does the agent reach what was asked for, completely, and is its last answer right and supported by what
  the tools returned?
- the calls: are they the right tools, with arguments that follow from the conversation and fit the tools' schemas?
- the way: no needless or repeated steps, errors noticed and fixed, nothing made up, questions asked where something
  is missing.

The scale: 0 nothing useful; 1 mostly wrong; 2 parts right, the task failed; 3 the task partly done, or done with
serious faults; 4 the task done with small faults; 5 the task done, each step right.

Answer with one JSON object and nothing else: {"reason": "two or three sentences", "score": a number from 0 to 5}"""


class BadRating(ValueError):  # noqa: N818 - a kind of answer, not an error in this code
    """An answer that is not a rating; `kind` is a short code: no-json, no-score, out-of-range."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


class Rating(NamedTuple):
    """The rating of a trajectory."""

    score: float
    """0 to 5."""
    reason: str


def messages(trajectory: Trajectory) -> list[dict[str, Any]]:
    """Returns the request to the rater, in OpenAI form."""
    tools = [json.dumps(tool["function"], ensure_ascii=False) for tool in trajectory.tools]
    parts = [f"Task instruction:\n{trajectory.task_instruction}"] if trajectory.task_instruction else []
    parts.append("Tools:\n" + ("\n".join(tools) or "none"))
    parts.append("Trajectory:\n" + "\n\n".join(map(_format_message, trajectory.conversation)))
    return [{"role": "system", "content": PROMPT}, {"role": "user", "content": "\n\n".join(parts)}]


def _format_message(message: Message) -> str:
    content = message.content
    if message.role == "tool":
        surplus = len(content) - LONGEST_RESULT
        if surplus > 0:
            half = LONGEST_RESULT // 2
            content = f"{content[:half]} [… {surplus} characters …] {content[-half:]}"
    calls = [
        f"calls {json.dumps({'name': call.name, 'arguments': call.arguments}, ensure_ascii=False)}"
        for call in message.tool_calls
    ]
    name = f" ({message.name})" if message.name else ""
    return f"[{message.role}{name}] " + "\n".join([*filter(None, [content]), *calls])


def parse(text: str) -> Rating:
    """Parses an answer: the last JSON object in it with a score. Raises `BadRating`."""
    last: dict[str, Any] | None = None
    for candidate in objects_in(text):
        if last is None or "score" in candidate:
            last = candidate
    if last is None:
        raise BadRating("no-json", f"{text[:200]!r}")
    score = last.get("score")
    if isinstance(score, str):
        try:
            score = float(score)
        except ValueError:
            score = None
    if not isinstance(score, int | float) or isinstance(score, bool):
        raise BadRating("no-score", f"{text[:200]!r}")
    if not 0 <= score <= HIGHEST:
        raise BadRating("out-of-range", f"a score of {str(score)[:50]}, not from 0 to {HIGHEST}")
    reason = last.get("reason")
    return Rating(float(score), reason if isinstance(reason, str) else "")


class Ratings:
    """The ratings so far, in a journal that stays readable when a run is killed; a context manager."""

    def __init__(self, path: Path, model: str):
        """Opens or creates the journal. Raises `UserError` if it contains ratings of another model or prompt, or is in
        use by another process."""
        self.path = path
        self._made_by = {"model": model, "prompt": hex_digest(PROMPT, length=12)}
        self._journal = journal.Journal(path, "wait for it, or give another --out")
        try:
            self.of = self._read()
            """Key of a trajectory → its rating."""
        except BaseException:
            self._journal.close()
            raise

    def _read(self) -> dict[str, Rating]:
        problem = "is not a rating; remove the line, and the trajectory is rated again"
        ratings: dict[str, Rating] = {}
        for number, (name, rating, rater) in enumerate(journal.read(self.path, self._parse, problem), 1):
            if rater != self._made_by:
                raise UserError(
                    f"{self.path}:{number}: was rated by {rater}, not {self._made_by}; "
                    "give another --out, or --force to start over"
                )
            if rating:
                ratings[name] = rating
        return ratings

    def _parse(self, row: Any) -> tuple[str, Rating | None, dict[str, Any]]:
        rating = Rating(float(row["score"]), str(row["reason"])) if "score" in row else None
        return row["key"], rating, {key: row.get(key) for key in self._made_by}

    def write(self, key: str, row: dict[str, Any], rating: Rating | None) -> None:
        """Appends a line; None is the rating of a failed attempt."""
        self._journal.append({"key": key, **row, **self._made_by, **(rating._asdict() if rating else {})})
        if rating:
            self.of[key] = rating

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()


def key(trajectory: Trajectory) -> str:
    """Returns a fingerprint that is equal for equal trajectories, regardless of their file and score."""
    row = to_dict(replace(trajectory, score=None))
    return json_digest(row, length=24, sort_keys=False, ensure_ascii=False)


def rate(
    files: Sequence[Path],
    out: Path,
    model: "Model",
    *,
    concurrency: int = 16,
    limit: int | None = None,
    good: float | None = None,
    keep: float = 4.0,
    force: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Rates the trajectories of `files` and writes them to `out`; returns the report.

    `limit`: number of trajectories to read. `good`: minimum known score of a good trajectory (default: the highest of
    its source). `keep`: minimum rating of a kept trajectory. Trajectories without a rating are skipped and counted by
    reason; the next run rates only them. Raises `UserError`.
    """
    journal_path = out.with_name(f"{out.name}.ratings.jsonl")
    if out.resolve() in [Path(file).resolve() for file in files]:
        raise UserError(f"{out}: is one of the files to rate; give another --out")
    if force:
        journal_path.unlink(missing_ok=True)
    elif out.exists() and not journal_path.exists():
        raise UserError(f"{out}: exists already, without {journal_path.name}; give another name, or --force")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder '{out.parent}' does not exist; create it first")
    with Ratings(journal_path, model.name) as ratings:
        before = len(ratings.of)
        failures = asyncio.run(_ask_all(files, limit, ratings, model, concurrency, progress))
        if failures.counts and not ratings.of:
            raise UserError(f"{journal_path}: no ratings, but {failures}")
        result = _write(files, limit, out, ratings, failures)
    compared = result.pop("compared")
    return {
        "inputs": [str(path) for path in files],
        **result,
        "asked": len(ratings.of) - before + failures.counts.total(),
        "ratings": dict(sorted(Counter(f"{rated:g}" for _, _, rated in compared.rows).items())),
        "kept": sum(rated >= keep for _, _, rated in compared.rows),
        "keep": keep,
        "agreement": agreement(compared.rows, good, keep),
    }


class _Failures:
    """Answers without a rating: their number by kind, and the last error message of each kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.details: dict[str, str] = {}
        self.refused = 0
        """Number of consecutive requests that did not reach the server."""

    def add(self, error: "BadRating | EndpointFault") -> None:
        """Counts an answer without a rating."""
        self.counts[error.kind] += 1
        self.details[error.kind] = str(error).removeprefix(f"{error.kind}: ")
        self.refused = self.refused + 1 if error.kind == "refused" else 0

    def __str__(self) -> str:
        return "; ".join(f"{count} × {kind} ({self.details[kind]})" for kind, count in self.counts.items())


class _Compared(NamedTuple):
    rows: list[tuple[str, float | None, float]]
    """(source, known score, rating) of each rated trajectory."""


def _trajectories(files: Sequence[Path], limit: int | None) -> Iterator[tuple[str, Trajectory | str]]:
    """Yields (place of a row, its trajectory, or the reason why it is not a trajectory)."""
    items = sources.read(Source(name="rate", files=[str(path) for path in files]))
    for number, item in enumerate(items):
        if number == limit:
            return
        trajectory = item.trajectory
        if isinstance(trajectory, Trajectory):
            yield item.where, trajectory
        else:
            yield item.where, trajectory.reason if isinstance(trajectory, InvalidTrajectory) else "a-pair"


async def _ask_all(
    files: Sequence[Path],
    limit: int | None,
    ratings: Ratings,
    model: "Model",
    concurrency: int,
    progress: Callable[[str], None],
) -> _Failures:
    """Requests all missing ratings; returns the failures. Raises `UserError` if all further requests would fail too."""
    from xlam_jax.evaluate.endpoint import EndpointFault

    failures = _Failures()
    requested: set[str] = set(ratings.of)
    rows = _trajectories(files, limit)
    answers = Throughput("rating", unit="answers", out=progress)

    async def work() -> None:
        for where, trajectory in rows:  # the iterator is shared: each worker takes the next row
            if isinstance(trajectory, str):
                continue
            name = key(trajectory)
            if name in requested:
                continue
            requested.add(name)
            row: dict[str, Any] = {"where": where, "id": trajectory.id, "known": trajectory.score}
            rating = None
            try:
                rating = parse((await model.chat(messages(trajectory))).content)
                failures.refused = 0
            except (BadRating, EndpointFault) as error:
                failures.add(error)
                row |= {"failed": error.kind, "detail": str(error)}
            ratings.write(name, row, rating)
            answers.add(unrated=f"{failures.counts.total():,}")
            enough = max(FAILURES, 2 * concurrency)
            if answers.done == failures.counts.total() >= enough:
                raise UserError(f"no ratings in {answers.done} answers: {failures}")
            if failures.refused >= enough:
                raise UserError(f"{row['detail']} ({failures.refused} requests in a row); the same command continues")

    async with model:  # its connections belong to this loop
        await asyncio.gather(*(work() for _ in range(concurrency)))
    return failures


def _write(
    files: Sequence[Path], limit: int | None, out: Path, ratings: Ratings, failures: _Failures
) -> dict[str, Any]:
    """Writes the rated trajectories, and counts the others."""
    skipped: Counter[str] = Counter()
    compared = _Compared([])
    read = 0
    with new_file(out) as lines:
        for _, trajectory in _trajectories(files, limit):
            read += 1
            if isinstance(trajectory, str):
                skipped[trajectory] += 1
                continue
            rating = ratings.of.get(key(trajectory))
            if rating is None:
                skipped["no-rating"] += 1
                continue
            compared.rows.append((trajectory.source or "", trajectory.score, rating.score))
            lines.write(json.dumps(to_dict(replace(trajectory, score=rating.score)), ensure_ascii=False) + "\n")
        if not compared.rows:
            reasons = ", ".join(f"{count} × {reason}" for reason, count in skipped.items()) or "the input is empty"
            raise UserError(f"{', '.join(map(str, files))}: no trajectory could be rated: {reasons}")
    return {
        "trajectories": read,
        "rated": len(compared.rows),
        "left_out": dict(skipped.most_common()),
        "failed": dict(failures.counts.most_common()),
        "failures": failures.details,
        "compared": compared,
    }


def agreement(
    rated: Sequence[tuple[str, float | None, float]], good: float | None, keep: float
) -> dict[str, dict[str, Any]]:
    """Returns the agreement of ratings with known scores, by source and for all; sources without scores are missing.

    `rated` is a list of (source, known score, rating). rank_correlation is Spearman's (None if one side is constant).
    A trajectory is good if its known score is at least `good` (None: the highest score of its source), and kept if its
    rating is at least `keep`. accuracy is the fraction on which both agree, precision the fraction of kept trajectories
    that are good, recall the fraction of good trajectories that are kept.
    """
    pairs = [(source, score, rating) for source, score, rating in rated if score is not None and math.isfinite(score)]
    groups: dict[str, list[tuple[float, float, float]]] = {}
    for source, score, rating in pairs:
        groups.setdefault(source, []).append((score, rating, 0.0))
    for name, group in groups.items():
        bar = max(score for score, _, _ in group) if good is None else good
        groups[name] = [(score, rating, bar) for score, rating, _ in group]
    if len(groups) > 1:
        groups["all"] = [item for group in groups.values() for item in group]
    return {name or "all": _agreement(group, keep) for name, group in groups.items()}


def _agreement(group: Sequence[tuple[float, float, float]], keep: float) -> dict[str, Any]:
    is_good = [score >= bar for score, _, bar in group]
    is_kept = [rating >= keep for _, rating, _ in group]
    both = sum(map(min, is_good, is_kept))
    return {
        "trajectories": len(group),
        "good_from": min(bar for _, _, bar in group),
        "good": sum(is_good),
        "kept": sum(is_kept),
        "rank_correlation": rank_correlation([score for score, _, _ in group], [rating for _, rating, _ in group]),
        "accuracy": sum(a == b for a, b in zip(is_good, is_kept, strict=True)) / len(group),
        "precision": both / sum(is_kept) if any(is_kept) else None,
        "recall": both / sum(is_good) if any(is_good) else None,
    }


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Returns Spearman's rank correlation, -1 to 1; equal values share their mean rank. None if one is constant."""
    ranks = [_ranks(values) for values in (a, b)]
    means = [sum(rank) / len(rank) for rank in ranks]
    deviations = [[value - mean for value in rank] for rank, mean in zip(ranks, means, strict=True)]
    spread = math.prod(sum(value * value for value in row) for row in deviations)
    shared = sum(x * y for x, y in zip(*deviations, strict=True))
    return shared / math.sqrt(spread) if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    at = 0
    while at < len(order):
        end = at
        while end < len(order) and values[order[end]] == values[order[at]]:
            end += 1
        for index in order[at:end]:
            ranks[index] = (at + end - 1) / 2
        at = end
    return ranks


def summary(out: Path, report: dict[str, Any]) -> str:
    """Returns the report as text."""
    ratings = ", ".join(f"{count} × {score}" for score, count in report["ratings"].items())
    lines = [f"{out}: {report['rated']} of {report['trajectories']} trajectories rated ({ratings or 'none'})"]
    lines.append(f"  {report['kept']} with {report['keep']:g} or more; {report['asked']} requested in this run")
    lines += [f"  skipped {count} ({reason})" for reason, count in report["left_out"].items()]
    lines += [
        f"  {count} answers without a rating ({kind}), the last: {report['failures'][kind]}"
        for kind, count in report["failed"].items()
    ]
    for name, figures in report["agreement"].items():
        shares = ", ".join(
            f"{label} {'–' if figures[key] is None else f'{figures[key]:.2f}'}"
            for label, key in (
                ("rank correlation", "rank_correlation"),
                ("accuracy", "accuracy"),
                ("precision", "precision"),
                ("recall", "recall"),
            )
        )
        lines.append(
            f"  known scores, {name}: {figures['trajectories']} "
            f"({figures['good']} good, from {figures['good_from']:g}): {shares}"
        )
    if not report["agreement"]:
        lines.append("  no known scores for a comparison")
    return "\n".join(lines)
