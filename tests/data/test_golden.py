"""Rendered examples are those of `RENDER_VERSION`: text, token ids and loss weights are compared with a file."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_every_format import FILES, FIXTURES

from xlam_jax.config import Loss
from xlam_jax.data.converters import converter
from xlam_jax.data.converters.common import Converted
from xlam_jax.data.parse import parse_trajectory, read_jsonl
from xlam_jax.data.render import RENDER_VERSION, render_all
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.data.trajectory import Trajectory, to_dict

GOLDEN = FIXTURES / "golden.json"
FORMATS = ("xlam", "native", "xlam_v1")
LOSSES = {
    "all": Loss(),
    "last": Loss(turns="last"),
    "weighted": Loss(thought=0.5, tool_call=2.0, answer=0.25),
    "calls of the last turn": Loss(turns="last", thought=0.0, answer=0.0),
}
CHANGED = (
    "{} changed. If that is meant, raise RENDER_VERSION in xlam_jax/data/render.py (prepared caches of the old version "
    "are then refused), and write the file again: UPDATE_GOLDEN=1 python -m pytest tests/data/test_golden.py"
)


def trajectories(row: dict[str, Any], quickstart: Path) -> Iterator[Trajectory]:
    """A made-up row with every kind of turn, and the first of each bundled source."""
    yield parse_trajectory(row)
    for name in ("webshop", "hotpotqa", "seal_tools", "hammer"):
        _, trajectory = next(read_jsonl(quickstart / f"{name}.jsonl"))
        assert isinstance(trajectory, Trajectory)
        yield trajectory


def render(row: dict[str, Any], quickstart: Path) -> dict[str, Any]:
    """For each trajectory and format text and ids of each sequence, and per loss option runs of equal weights."""
    tokenizer = load_tokenizer(str(quickstart / "tokenizer"))
    examples = {}
    for trajectory in trajectories(row, quickstart):
        for format in FORMATS:
            sequences = render_all(trajectory, tokenizer, format)
            example: dict[str, Any] = {
                "ids": [sequence.input_ids.tolist() for sequence in sequences],
                "text": [tokenizer.decode(sequence.input_ids) for sequence in sequences],
            }
            for name, loss in LOSSES.items():
                weighted = render_all(trajectory, tokenizer, format, loss)
                example[name] = [runs(sequence.weights.tolist()) for sequence in weighted]
            examples[f"{trajectory.id} {format}"] = example
    return examples


def runs(values: list[float]) -> list[list[float]]:
    """[count, value] of each run of equal values."""
    counts: list[list[float]] = []
    for value in values:
        if counts and counts[-1][1] == value:
            counts[-1][0] += 1
        else:
            counts.append([1, value])
    return counts


def convert_fixtures() -> dict[str, str]:
    """For each source's format a digest of the trajectories that its fixtures become."""
    digests = {}
    for name, files in FILES.items():
        digest = hashlib.sha256()
        for item in converter(name)([FIXTURES / file for file in files]):
            digest.update(json.dumps(to_dict(item.trajectory) if isinstance(item, Converted) else item.reason).encode())
        digests[name] = digest.hexdigest()
    return digests


@pytest.fixture(scope="module")
def golden(quickstart: Path) -> dict[str, Any]:
    """The golden file; with UPDATE_GOLDEN in the environment it is written first."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    if "UPDATE_GOLDEN" in os.environ:
        new = {
            "render_version": RENDER_VERSION,
            "row": golden["row"],
            "converted": convert_fixtures(),
            "rendered": render(golden["row"], quickstart),
        }
        if new != golden and golden["render_version"] == RENDER_VERSION:
            pytest.fail(f"raise RENDER_VERSION first: the file is of version {RENDER_VERSION}, and would change")
        GOLDEN.write_text(json.dumps(new, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
        golden = new
    return golden


def test_rendered_examples_are_those_of_the_render_version(golden, quickstart):
    examples = json.loads(json.dumps(render(golden["row"], quickstart)))
    assert examples.keys() == golden["rendered"].keys()
    for name, example in examples.items():
        for part, value in example.items():
            assert value == golden["rendered"][name][part], CHANGED.format(f"{part!r} of {name}")
    assert golden["render_version"] == RENDER_VERSION, CHANGED.format("RENDER_VERSION")


def test_converted_trajectories_are_those_of_the_render_version(golden):
    for name, digest in convert_fixtures().items():
        assert digest == golden["converted"][name], CHANGED.format(f"the result of converting {name}")
