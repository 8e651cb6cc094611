"""The data benchmark: the other side matches its description, and the command's figures match the batches."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from support import ROOT

QUICKSTART = ROOT / "examples/quickstart"


@pytest.fixture(scope="module")
def peer():
    """`benchmarks/_actionstudio.py`; imported late, as torch takes seconds."""
    from benchmarks import _actionstudio

    return _actionstudio


@pytest.fixture(scope="module")
def tokenizer(peer):
    return peer.load_tokenizer(QUICKSTART / "tokenizer")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The shortest two hotpotqa trajectories, and one with an empty turn."""
    lines = sorted((QUICKSTART / "hotpotqa.jsonl").read_text(encoding="utf-8").splitlines(), key=len)[:2]
    silent = json.loads(lines[0]) | {
        "unique_trajectory_id": "silent",
        "conversation": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": " "},
            {"role": "user", "content": "Are you there?"},
            {"role": "assistant", "content": "Yes."},
        ],
    }
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join([*lines, json.dumps(silent)]) + "\n", encoding="utf-8")
    return path


def assistant_turns(file: Path) -> list[dict]:
    """Returns the non-empty assistant turns of a file."""
    turns = [turn for line in file.read_text("utf-8").splitlines() for turn in json.loads(line)["conversation"]]
    return [turn for turn in turns if turn["role"] == "assistant" and (turn["content"].strip() or "tool_calls" in turn)]


def expected_answer(turn: dict, thoughts: bool) -> str:
    """Returns the text that the other side trains for a turn."""
    if "tool_calls" not in turn:
        return turn["content"]
    calls = json.dumps([call["function"] for call in turn["tool_calls"]])
    return (turn["content"] if thoughts else "") + "[TOOL_CALLS]" + calls


@pytest.mark.parametrize("thoughts", [False, True])
def test_peer_prepares_a_row_a_turn_with_the_whole_context(peer, file: Path, tmp_path: Path, thoughts: bool):
    sources = peer.prepare({"some": [file]}, tmp_path, keep_thoughts=thoughts, prefix="[TOOL_CALLS]")
    rows = json.loads(sources.files["some"].read_text(encoding="utf-8"))
    assert sources.rows == {"some": len(rows)}
    assert [row["chosen"] for row in rows] == [expected_answer(turn, thoughts) for turn in assistant_turns(file)]
    for row in rows:
        conversation = next(
            one["conversation"]
            for one in map(json.loads, file.read_text(encoding="utf-8").splitlines())
            if row["id"].startswith(one["unique_trajectory_id"] + "---")
        )
        system, *context = row["messages"]
        assert system["content"].endswith(peer.FORMAT_INSTRUCTION)
        assert context == conversation[: len(context)]
        assert row["output_message"] == conversation[len(context)]


def test_peer_pads_each_row_and_trains_its_answer_alone(
    peer, tokenizer, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sources = peer.prepare({"some": [file]}, tmp_path, keep_thoughts=True, prefix="[TOOL_CALLS]")
    rows = peer.PaddedRows(sources, tokenizer, length=1024, seed=0)
    answers = sorted(expected_answer(turn, True) + tokenizer.eos_token for turn in assistant_turns(file))
    monkeypatch.setattr(peer, "FORMATTED_AT_ONCE", len(answers))  # otherwise the first rows come from several passes
    seen = []
    for batch in islice(peer.batches(rows, 1), len(answers)):
        ids, labels, attended = (column[0] for column in batch)
        assert len(ids) == len(labels) == len(attended) == 1024
        used = int(attended.sum())
        assert attended.tolist() == [1] * used + [0] * (1024 - used)
        trained = (labels != peer.IGNORED).nonzero().flatten().tolist()
        assert trained == list(range(trained[0], used))
        assert (labels[trained] == ids[trained]).all()
        assert tokenizer.decode(ids[: trained[0]]).count(tokenizer.bos_token) == 1
        seen.append(tokenizer.decode(ids[trained]))
    assert sorted(seen) == answers
    assert rows.skipped == 0


def test_peer_skips_what_does_not_fit(peer, tokenizer, file: Path, tmp_path: Path):
    sources = peer.prepare({"some": [file]}, tmp_path, keep_thoughts=True, prefix="[TOOL_CALLS]")
    whole = list(islice(peer.PaddedRows(sources, tokenizer, length=1024, seed=0), sources.rows["some"]))
    lengths = sorted(int(row.attention_mask.sum()) for row in whole)
    rows = peer.PaddedRows(sources, tokenizer, length=lengths[-1], seed=0)  # one token too few for the longest
    seen = list(islice(rows, 3 * len(lengths)))
    assert rows.skipped
    assert max(int(row.attention_mask.sum()) for row in seen) == lengths[-2]


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the benchmark from the repository's root."""
    command = [sys.executable, "benchmarks/data.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_benchmark_compares_the_same_tokens(tmp_path: Path):
    """For a source without `loss: false`, both sides train the same tokens in a pass; ours in far fewer rows."""
    lines = (QUICKSTART / "webshop.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:6]
    (tmp_path / "shop.jsonl").write_text("".join(lines), encoding="utf-8")
    result = benchmark(
        "--files", tmp_path / "shop.jsonl", "--only", "shop", "--rounds", 1, "--passes", 1, 2, "--lengths", 1024,
        "--sides", "ours", "with-thoughts", "--resume", 10, "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    ours, ours_2, peers, peers_2 = sorted(record["lines"], key=lambda line: (line["side"], line["trained"]))
    assert [ours["side"], peers["side"]] == ["ours", "with-thoughts"]
    assert ours["trained"] / ours["passes"] == pytest.approx(peers["trained"] / peers["passes"], rel=0.1)
    assert ours_2["passes"] >= 2
    assert peers_2["passes"] >= 2
    assert ours["density"] > 3 * peers["density"]
    assert all(speed > 0 for line in record["lines"] for speed in line["speeds"])
    assert "shop, 1024 tokens per row" in result.stdout
    assert record["resume"][0]["trajectories"] >= 10


def test_benchmark_names_what_it_cannot_compare(tmp_path: Path):
    (tmp_path / "rows.parquet").touch()
    result = benchmark("--files", tmp_path / "rows.parquet")
    assert result.returncode == 2
    assert result.stderr.startswith("error: source rows: ")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_conversion_benchmark_compares_every_tensor(tmp_path: Path):
    config = ROOT / "configs/models/tiny_mixtral.json"
    command = ["benchmarks/convert.py", "--config", config, "--layers", "2", "--folder", tmp_path / "work"]
    out = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    layers = 2 * (3 + 4 + 3 * json.loads(config.read_text("utf-8"))["num_local_experts"])
    assert f"{layers + 3} tensors are identical" in out
    assert [line for line in out.splitlines() if line.startswith("Orbax → Hugging Face") and "× cp" in line]
    assert not (tmp_path / "work").exists()
