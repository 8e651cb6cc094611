"""The identity of a run's data: a digest of the rendered examples of each source, and one of the tokenizer.

A run stores the identity in every checkpoint, so that a resumed run detects an edited file or another tokenizer. The
digest of a source covers all that training reads: the tokens, labels, weights and kinds of each example, their ids and
their order. Rows that filters, `limit` or `on_invalid` drop do not affect it.
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
    """Returns the identity of the data that a run trains on. `name` is the tokenizer's name in the config."""
    return {
        "data": {source.source.name: source_identity(source) for source in loaded},
        "tokenizer": {"name": name, "tokens": len(tokenizer), "digest": tokenizer_digest(tokenizer)},
    }


def source_identity(source: Loaded) -> Identity:
    """Returns, for `train` and `heldout`, the number of examples, the number of trained tokens, and their digest.

    A dataset of a hub also has `dataset`: its revision and the number of rows that were read.
    """
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
    """Computes the digests of `train` and `heldout`. Reads every example."""
    ids = {"train": list(source.ids), "heldout": [sample.id for sample in source.samples]}
    trajectories = map(_trajectory_text, source.trajectories or ())  # augmentation renders them in every epoch
    return {
        "train": examples_digest(source.train, _columns, [*ids["train"], *trajectories]),
        "heldout": examples_digest(source.heldout, _columns, ids["heldout"]),
    }


def examples_digest(
    examples: Sequence[Example], columns: Callable[[Example], Iterable[np.ndarray]], texts: Iterable[str] = ()
) -> str:
    """Returns a digest of some columns of every example, in order, and of further texts; 16 hexadecimal digits."""

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
    """Returns the names of the sources whose examples differ between the `data` of two identities."""
    return [
        name
        for name in sorted(was.keys() | now.keys())
        if [was.get(name, {}).get(part) for part in PARTS] != [now.get(name, {}).get(part) for part in PARTS]
    ]


def describe_source(identity: Mapping[str, Any] | None) -> str:
    """Describes the identity of a source for messages."""
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
    """Describes the identity of a tokenizer for messages."""
    return f"{identity['name']} with {identity['tokens']:,} tokens, digest {identity['digest']}"
