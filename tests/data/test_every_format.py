"""Properties of every format: rows add up, the report lists what `validate` finds, no input breaks it."""

import json
import shutil
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import JSON, broken
from support import ROOT

from converters.trajectories.__main__ import convert
from xlam_jax.data.converters import EXPORTERS, FORMATS, converter
from xlam_jax.data.converters.common import Converted, Dropped
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.trajectory import to_dict
from xlam_jax.data.validate import check_row
from xlam_jax.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
QUICKSTART = ROOT / "examples/quickstart"
FILES = {
    "webshop": ["webshop.jsonl"],
    "hotpotqa": ["hotpotqa.jsonl", "hotpotqa_scored.json"],
    "alfworld": ["alfworld/mint_gpt-4-0613.jsonl", "alfworld/mint_Mixtral-8x7B-Instruct-v0.1.jsonl"],
    "intercode": ["intercode/ic_bash.json", "intercode/ic_sql.json"],
    "tau_bench": ["tau_bench/gpt-4o-airline.json"],
    "toolalpaca": ["toolalpaca/eval_simulated.json"],
    "api_bank": ["api_bank/dialogues.jsonl"],
    "toolbench": ["toolbench/G1_answer/57_ChatGPT_DFS_woFilter_w2.json"],
    "seal_tools": ["seal_tools/dev.jsonl"],
    "hammer": ["hammer.json"],
    "apibench": ["apibench.json"],
    "agentohana": ["agentohana.jsonl"],
    "train_ready": ["train_ready.jsonl"],
    "xlam60k": ["xlam60k.jsonl"],
}
SIDE = {"tau_bench": "airline_tools.json", "seal_tools": "tool.jsonl", "api_bank": "apis.json"}
ALPACA = {"instruction": "Say hi.", "input": "In French.", "output": "Salut.", "history": [["a", "b"]], "system": "s"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, list[Path]]:
    """Files of each format: real ones, and for chat formats the bundled trajectories written in them."""
    folder = tmp_path_factory.mktemp("formats")
    paths = {name: [FIXTURES / file for file in names] for name, names in FILES.items()}
    paths["unified"] = [folder / "unified.jsonl"]
    lines = [
        line
        for source in ("webshop", "hotpotqa", "seal_tools", "hammer")
        for line in (QUICKSTART / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    ]
    paths["unified"][0].write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in ("openai", "sharegpt"):
        paths[name] = [folder / f"{name}.jsonl"]
        convert("unified", paths["unified"], paths[name][0], to=name)
    paths["alpaca"] = [folder / "alpaca.jsonl"]
    paths["alpaca"][0].write_text(json.dumps(ALPACA) + "\n", encoding="utf-8")
    assert set(paths) == set(FORMATS)
    return paths


@pytest.mark.parametrize("name", FORMATS)
def test_rows_add_up_and_validate_finds_what_was_announced(files, tmp_path: Path, name: str):
    out = tmp_path / "out.jsonl"
    report = convert(name, files[name], out, report=tmp_path / "report.json")
    rows, trajectories = report["rows"], report["trajectories"]
    assert rows["read"] == rows["converted"] + rows["dropped"] > 0
    written = out.read_text(encoding="utf-8").splitlines()
    assert len(written) == trajectories["written"] > 0
    assert trajectories["dropped"] == sum(entry["count"] for entry in report["dropped"]["trajectory"].values())
    reasons = Counter(finding.reason for line in written for finding in _findings(json.loads(line)))
    assert reasons == {reason: entry["count"] for reason, entry in report["left"].items()}
    for line in written:
        row = json.loads(line)
        repaired = Mock()
        assert to_dict(parse_trajectory(row, repaired=repaired)) == row
        repaired.assert_not_called()


def _findings(row: dict) -> list:
    return list(check_row(row))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("to", EXPORTERS)
def test_every_format_becomes_every_other(files, tmp_path: Path, name: str, to: str):
    """And is read back: losses of the export are reported, everything else is unchanged."""
    out, back = tmp_path / "out.jsonl", tmp_path / "back.jsonl"
    try:
        report = convert(name, files[name], out, to=to)
    except UserError as error:  # a format for single-turn rows may hold none of another's
        assert (to, "not one trajectory" in str(error)) == ("xlam60k", True)  # noqa: PT017
        return
    again = convert(to, [out], back)
    assert again["trajectories"]["dropped"] == 0
    assert again["trajectories"]["written"] == report["trajectories"]["written"]


@pytest.mark.parametrize("name", FORMATS)
def test_broken_rows_are_reported_never_lost(files, tmp_path: Path, name: str):
    raw = _rows(files[name][0])
    if name in SIDE:
        shutil.copy(files[name][0].with_name(SIDE[name]), tmp_path)
    path = tmp_path / files[name][0].name

    @settings(
        deadline=None, derandomize=True, max_examples=40, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )  # fmt: skip
    @given(st.data())
    def holds(data: st.DataObject):
        rows = [data.draw(broken(row) | JSON if row == raw[0] else broken(row)) for row in raw[:2]]
        try:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            path.write_text(lines if _is_lines(files[name][0]) else json.dumps(rows), encoding="utf-8")
        except (TypeError, UnicodeEncodeError):  # no JSON at all
            return
        try:
            items = list(converter(name)([path]))
        except UserError as error:  # of a file that is none of this format's at all
            assert str(path) in str(error)  # noqa: PT017
            return
        assert all(isinstance(item, Converted | Dropped) for item in items)
        assert {item.row for item in items} == {1, 2}

    holds()


def _is_lines(path: Path) -> bool:
    return path.suffix == ".jsonl" or path.name == "apibench.json"  # its name is upstream's


def _rows(path: Path) -> list:
    """Two rows of a file: of its lines, of the items of its document, or the document itself."""
    text = path.read_text(encoding="utf-8")
    document = [json.loads(line) for line in text.splitlines()] if _is_lines(path) else json.loads(text)
    if isinstance(document, dict):
        document = [document] if "answer_generation" in document else list(document.values())
    return (document * 2)[:2]
