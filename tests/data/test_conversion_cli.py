"""`python -m converters.trajectories`: its output, report, errors and memory."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from converters.trajectories import __main__
from converters.trajectories.__main__ import convert, main
from xlam_jax.data.converters import CONVERTERS, EXPORTERS, FORMATS, converter, exporter, row_converter
from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.trajectory import Trajectory
from xlam_jax.data.validate import validate
from xlam_jax.errors import UserError
from xlam_jax.progress import BYTES, Throughput

FIXTURES = Path(__file__).parent / "fixtures"
HAMMER = FIXTURES / "hammer.json"


def test_output_report_and_lines(tmp_path, capsys):
    out, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    main(["--format", "hammer", "--in", str(HAMMER), "--out", str(out), "--report", str(report)])
    assert [type(item) for _, item in read_jsonl(out)] == [Trajectory] * 5
    counts = json.loads(report.read_text(encoding="utf-8"))
    assert counts["rows"] == {"read": 6, "converted": 5, "dropped": 1}
    assert counts["trajectories"] == {"written": 5, "dropped": 1}
    undeclared = counts["dropped"]["trajectory"]["undeclared-tool"]
    assert (undeclared["count"], undeclared["rows"], undeclared["more"]) == (1, [f"{HAMMER}:419 (item 6)"], 0)
    assert counts["repaired"].keys() == {"missing-call-id", "text-for-declared-type"}
    assert counts["lost"] == {}
    printed = capsys.readouterr().out
    assert f"{out}: 5 trajectories written, 1 dropped; 6 rows read = 5 converted + 1 dropped\n" in printed
    assert f"dropped trajectories: 1 undeclared-tool: {HAMMER}:419 (item 6) (" in printed
    assert "repaired: 1 text-for-declared-type: " in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "report.json"]


def test_remaining_problems_are_those_that_validate_finds(tmp_path, capsys, quickstart):
    rows = [json.loads(line) for line in (quickstart / "hammer.jsonl").read_text(encoding="utf-8").splitlines()[:4]]
    calls = [call for turn in rows[1]["conversation"] for call in turn.get("tool_calls", ())]
    calls[0]["function"]["arguments"] = {"unheard": "of"}
    rows[2]["conversation"][0]["content"] = " "
    rows[3]["unique_trajectory_id"] = rows[0]["unique_trajectory_id"]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    left = convert("unified", [source], out)["left"]
    assert left["extra-argument"]["rows"] == [f"{source}:2"]
    assert left["empty-turn"]["rows"] == [f"{source}:3"]
    assert left["duplicate-trajectory-id"]["rows"] == [f"{source}:4"]
    all_findings = [finding for findings in validate(out) for finding in findings]
    assert Counter(finding.reason for finding in all_findings) == {
        reason: entry["count"] for reason, entry in left.items()
    }
    main(["--format", "unified", "--in", str(source), "--out", str(out), "--force"])
    assert f"left as is: 1 empty-turn: {source}:3 (turn 0 (user) has no text)" in capsys.readouterr().out


def test_every_row_is_counted_once_and_listed(tmp_path, write_jsonl, monkeypatch, row):
    monkeypatch.setattr(__main__, "LISTED", 3)
    row["conversation"][1]["tool_calls"][0]["function"]["arguments"] = "{}"
    row["conversation"][1]["tool_calls"][1]["function"]["arguments"] = "{}"
    source = write_jsonl(row, {"conversation": []}, b"", row, b"{", *[{"conversation": []}] * 5)
    report = convert("unified", [source], tmp_path / "out.jsonl")
    assert report["rows"] == {"read": 9, "converted": 2, "dropped": 7}
    assert report["trajectories"] == {"written": 2, "dropped": 7}
    dropped = report["dropped"]["trajectory"]
    assert list(dropped) == ["no-conversation", "malformed-json"]  # most frequent first
    assert dropped["no-conversation"] == {
        "count": 6,
        "rows": [f"{source}:{line}" for line in (2, 6, 7)],
        "more": 3,
        "detail": "a conversation is a non-empty list of turns, got a list",
    }
    repaired = report["repaired"]["string-arguments"]
    assert (repaired["count"], repaired["rows"], repaired["more"]) == (4, [f"{source}:1", f"{source}:4"], 0)


def test_writing_other_formats_reports_losses(tmp_path, quickstart, capsys):
    for name in ("openai", "sharegpt"):
        out, back = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.back.jsonl"
        source = str(quickstart / "webshop.jsonl")
        main(["--format", "unified", "--in", source, "--out", str(out), "--to", name])
        printed = capsys.readouterr().out
        assert f"30 rows read = 30 converted + 0 dropped; 30 lines of format {name}" in printed
        assert f"lost: 30 score-not-held: {source}:1, {source}:2, {source}:3 and 27 more (score 1.0 " in printed
        assert ("id-not-held" in printed) == (name == "openai")
        main(["--format", name, "--in", str(out), "--out", str(back)])
        assert "repaired" not in capsys.readouterr().out
        pairs = zip(read_jsonl(quickstart / "webshop.jsonl"), read_jsonl(back), strict=True)
        assert all(a.conversation == b.conversation and a.tools == b.tools for (_, a), (_, b) in pairs)  # pyright: ignore


def test_a_trajectory_that_the_output_cannot_hold_is_dropped(tmp_path, quickstart, monkeypatch):
    from xlam_jax.data.converters.common import Lost
    from xlam_jax.data.trajectory import InvalidTrajectory, to_dict

    def export(trajectory):
        match trajectory.id[-1]:
            case "1":
                yield Lost("too-many-turns", "4")
            case "2":
                raise InvalidTrajectory("bad", "so")
            case "3":
                yield to_dict(trajectory)
                yield to_dict(trajectory)
                yield Lost("score-not-held", "1.0")
            case _:
                yield to_dict(trajectory)

    monkeypatch.setattr(__main__, "exporter", lambda name: export)
    source = tmp_path / "in.jsonl"
    ids = [f"x{i}" for i in range(6)]
    line = json.loads((quickstart / "webshop.jsonl").read_text(encoding="utf-8").splitlines()[0])
    source.write_text("".join(json.dumps({**line, "unique_trajectory_id": i}) + "\n" for i in ids), encoding="utf-8")
    report = convert("unified", [source], tmp_path / "out.jsonl", to="xlam60k")
    assert report["rows"] == {"read": 6, "converted": 4, "dropped": 2}
    assert (report["trajectories"], report["lines"]) == ({"written": 4, "dropped": 2}, 5)
    assert {reason: entry["rows"] for reason, entry in report["dropped"]["trajectory"].items()} == {
        "too-many-turns": [f"{source}:2"],
        "bad": [f"{source}:3"],
    }
    assert {reason: entry["rows"] for reason, entry in report["lost"].items()} == {"score-not-held": [f"{source}:4"]}
    assert len(list(read_jsonl(tmp_path / "out.jsonl"))) == 5


def test_documents_and_packed_files_give_the_same(tmp_path, quickstart):
    lines = (quickstart / "seal_tools.jsonl").read_bytes()
    rows = [json.loads(line) for line in lines.splitlines()]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    (tmp_path / "object.json").write_text(json.dumps({str(i): row for i, row in enumerate(rows)}), encoding="utf-8")
    (tmp_path / "rows.json.zst").write_bytes(zstandard.compress(json.dumps(rows).encode()))
    for name in ("rows.jsonl.gz", "rows.jsonl.zst", "rows.json", "object.json", "rows.json.zst"):
        out = tmp_path / "out.jsonl"
        convert("unified", [tmp_path / name], out, force=True)
        assert out.read_bytes() == lines, name


def test_bad_items_of_a_document_do_not_stop_it(tmp_path, quickstart):
    line = (quickstart / "hammer.jsonl").read_bytes().splitlines()[0]
    source = tmp_path / "rows.json"
    bad = [b'{"a": NaN}', b'{"a": 1, "a": 2}', b'"\xff"', b"7", b'{"a": 1e999}', b"[" * 500 + b"]" * 500, b"{,}", b""]
    source.write_bytes(b"[" + b",\n".join([line, *bad, line]) + b"]")
    report = convert("unified", [source], tmp_path / "out.jsonl")
    assert report["rows"] == {"read": 10, "converted": 2, "dropped": 8}
    assert {reason: entry["rows"] for reason, entry in report["dropped"]["trajectory"].items()} == {
        "malformed-json": [f"{source}:{number}" for number in (2, 3, 4, 6, 7, 8, 9)],
        "not-an-object": [f"{source}:5"],
    }


def test_mistakes_are_user_errors_and_leave_nothing(tmp_path, write_jsonl):
    out = tmp_path / "out.jsonl"
    bad = write_jsonl({"query": "q"})
    for arguments, message in (
        (("hamer", [HAMMER], out), r"format 'hamer' is not known.*did you mean 'hammer'"),
        (("hammer", [tmp_path / "none.json"], out), r"none\.json: no such file"),
        (("hammer", [tmp_path], out), "no such file"),
        (("hammer", [HAMMER], tmp_path / "no" / "out.jsonl"), "does not exist; create it"),
        (("hammer", [HAMMER], tmp_path), "exists already"),
        (("hammer", [HAMMER], tmp_path / "out.jsonl.gz"), r"remove \.gz from its name"),
        (("hammer", [bad], bad), "is an input as well"),
        (("hammer", [bad], out), r"not one trajectory of format 'hammer'.*rows\.jsonl:1: missing-field"),
    ):
        with pytest.raises(UserError, match=message):
            convert(*arguments)
    with pytest.raises(UserError, match=r"'shargpt' is not known.*did you mean 'sharegpt'"):
        convert("hammer", [HAMMER], out, to="shargpt")
    with pytest.raises(UserError, match="'webshop' is not known; known are openai"):
        convert("hammer", [HAMMER], out, to="webshop")
    with pytest.raises(UserError, match="as --out and as --report"):
        convert("hammer", [HAMMER], out, report=out)
    broken = tmp_path / "broken.json"
    broken.write_bytes(HAMMER.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"broken\.json: the item that begins at byte \d+ never ends"):
        convert("hammer", [broken], out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json", "rows.jsonl"]


def test_files_that_exist_are_kept_unless_forced(tmp_path):
    out, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    report.write_text("kept", encoding="utf-8")
    with pytest.raises(UserError, match=r"report\.json: exists already"):
        convert("hammer", [HAMMER], out, report=report)
    assert not out.exists()
    out.write_text("kept", encoding="utf-8")
    with pytest.raises(UserError, match=r"out\.jsonl: exists already; give another name, or --force"):
        convert("hammer", [HAMMER], out)
    assert (out.read_text(encoding="utf-8"), report.read_text(encoding="utf-8")) == ("kept", "kept")
    assert convert("hammer", [HAMMER], out, report=report, force=True)["trajectories"]["written"] == 5
    assert json.loads(report.read_text(encoding="utf-8"))["trajectories"]["written"] == 5


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(__main__, "_export", full)
    with pytest.raises(UserError, match=r"out\.jsonl: can't be written .No space left on device"):
        convert("hammer", [HAMMER], tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_progress_shows_rows_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("xlam_jax.progress.EVERY", 0.0)
    lines: list[str] = []
    progress = Throughput("converting", HAMMER.stat().st_size, unit=BYTES, out=lines.append)
    convert("hammer", [HAMMER], tmp_path / "out.jsonl", progress=progress)
    assert len(lines) == 6
    assert lines[-1].startswith("converting: 0.0 MB of 0.0 MB  ")
    assert "  left 0:00  rows 6 (" in lines[-1]


def test_every_format_is_there():
    assert set(EXPORTERS) < set(FORMATS) == set(CONVERTERS)
    for name in FORMATS:
        assert converter(name) is CONVERTERS[name]
        assert row_converter(name) is None or callable(row_converter(name))
    for name in EXPORTERS:
        assert callable(exporter(name))


MEASURE = """
import sys
from collections import Counter
from pathlib import Path
from converters.trajectories.__main__ import convert
report = convert("unified", [Path(sys.argv[1])], Path(sys.argv[2]))
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(report["rows"]["read"], int(peak) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_conversions_stream(tmp_path, quickstart):
    """A document of 100 MB, and dropped rows by the hundred thousand, in less memory than the document has bytes."""
    row = json.loads((quickstart / "webshop.jsonl").read_text(encoding="utf-8").splitlines()[0])
    text = json.dumps(row | {"task_instruction": "x" * 50_000})
    count = 100_000_000 // len(text)
    source = tmp_path / "rows.json"
    with source.open("w", encoding="utf-8") as file:
        file.write("[" + "0,\n" * 100_000)
        for _ in range(count):
            file.write(text + ",\n")
        file.write("0]")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out.jsonl")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows, peak = map(int, done.stdout.split())
    assert rows == count + 100_001
    assert peak < 70, f"{peak} MB for {source.stat().st_size >> 20} MB"
    assert (tmp_path / "out.jsonl").stat().st_size > 90_000_000
