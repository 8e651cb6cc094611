"""What identifies the data of a run: a digest of the rendered examples of each source, and one of the tokenizer.

A run stores its identity in every checkpoint, so that a resumed run notices that a file was edited or the tokenizer
replaced. The digest covers what training reads: tokens, labels, weights and kinds of each example, the ids, and the
order of all of them. A row that filters, `limit` or `on_invalid` leave out has no part in it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from xlam_jax.data.examples import Example, Loaded, trained
from xlam_jax.data.pair import Pair
from xlam_jax.data.tokenizer import tokenizer_digest
from xlam_jax.data.trajectory import Trajectory, to_dict
from xlam_jax.digest import stream_digest

PARTS: tuple[Literal["train", "heldout"], ...] = ("train", "heldout")
Identity = dict[str, Any]
"""JSON: `data`, by the name of each source (see `source_identity`), and `tokenizer`: its name, tokens and digest."""


def identify(loaded: Sequence[Loaded], tokenizer: Any, name: str) -> Identity:
    """The identity of the data that a run trains on. `name` is the tokenizer's in the config."""
    return {
        "data": {source.source.name: source_identity(source) for source in loaded},
        "tokenizer": {"name": name, "tokens": len(tokenizer), "digest": tokenizer_digest(tokenizer)},
    }


def source_identity(source: Loaded) -> Identity:
    """For `train` and `heldout`: the number of examples and of trained tokens, and the digest of all of them. A dataset
    of a hub also has `dataset`: its revision and the rows that were read."""
    digests = source.digests or source_digests(source)
    identity: Identity = {
        part: {
            "examples": len(getattr(source, part)),
            "trained_tokens": int(trained(getattr(source, part)).sum()),
            "digest": digests[part],
        }
        for part in PARTS
    }
    return identity | ({"dataset": source.dataset} if source.dataset else {})


def source_digests(source: Loaded) -> dict[str, str]:
    """The digests of `train` and `heldout`. Reads every example."""
    ids = {"train": list(source.ids), "heldout": [sample.id for sample in source.samples]}
    drawn_from = map(_trajectory_text, source.trajectories or ())  # augmentation renders them again each time
    return {
        "train": examples_digest(source.train, _columns, [*ids["train"], *drawn_from]),
        "heldout": examples_digest(source.heldout, _columns, ids["heldout"]),
    }


def examples_digest(
    examples: Sequence[Example], columns: Callable[[Example], Iterable[np.ndarray]], texts: Iterable[str] = ()
) -> str:
    """A digest of some columns of every example, in order, and of texts that belong to them; 16 hexadecimal digits."""

    def parts() -> Iterator[bytes]:
        for at in range(len(examples)):
            example = examples[at]
            yield len(example["tokens"]).to_bytes(8, "big")
            yield from (column.tobytes() for column in columns(example))
        for text in texts:
            encoded = text.encode("utf-8", "surrogatepass")
            yield len(encoded).to_bytes(8, "big") + encoded

    return stream_digest(parts(), length=16)


def _columns(example: Example) -> list[np.ndarray]:
    columns = [example["tokens"], example["labels"], example["weights"], example["kinds"]]
    return [*columns, example["sides"]] if "sides" in example else columns


def _trajectory_text(trajectory: Trajectory | Pair) -> str:
    sides = (trajectory.chosen, trajectory.rejected) if isinstance(trajectory, Pair) else (trajectory,)
    return json.dumps([to_dict(side) for side in sides])


def changed_sources(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of the sources whose examples differ between two identities' `data`."""
    return [
        name
        for name in sorted(was.keys() | now.keys())
        if [was.get(name, {}).get(part) for part in PARTS] != [now.get(name, {}).get(part) for part in PARTS]
    ]


def describe_source(identity: Mapping[str, Any] | None) -> str:
    """The identity of a source in words."""
    if identity is None:
        return "missing"
    train, heldout = (
        f"{part['examples']:,} {name} ({part['trained_tokens']:,} trained tokens, digest {part['digest']})"
        for name, part in (("examples to train on", identity["train"]), ("held out", identity["heldout"]))
    )
    dataset = identity.get("dataset")
    return f"{train}, {heldout}" + (
        f", of {dataset['rows']:,} rows of revision {dataset['revision'] or 'unknown'}" if dataset else ""
    )


def describe_tokenizer(identity: Mapping[str, Any]) -> str:
    """The identity of a tokenizer in words."""
    return f"{identity['name']} with {identity['tokens']:,} tokens, digest {identity['digest']}"
