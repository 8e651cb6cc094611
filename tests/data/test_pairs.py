import json
import random
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlam_jax.data import pairs
from xlam_jax.data.converters import converter
from xlam_jax.data.converters.common import Converted
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.trajectory import to_dict
from xlam_jax.errors import UserError

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {}}}}}]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def calls(call_id: str | None, arguments: dict, text: str = "") -> dict:
    named = {} if call_id is None else {"id": call_id}
    call = {"type": "function", **named, "function": {"name": "look", "arguments": arguments}}
    return {"role": "assistant", "content": text, "tool_calls": [call]}


def result(call_id: str | None, text: str) -> dict:
    return {"role": "tool", "content": text} | ({} if call_id is None else {"tool_call_id": call_id})


def row(name: str, score: float | None, *turns: dict, instruction: str = "Do it.", tools: list | None = None) -> dict:
    scored = {} if score is None else {"score": score}
    front = {"unique_trajectory_id": name, "task_instruction": instruction, "tools": TOOLS if tools is None else tools}
    return front | scored | {"conversation": list(turns)}


def mined(tmp_path: Path, *rows: dict, **options) -> tuple[list[dict], dict]:
    """Returns the pairs and the report; without pairs, an empty list instead of an error."""
    source, out = tmp_path / "rows.jsonl", tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in rows))
    out.unlink(missing_ok=True)
    report = pairs.write([source], out, **options)
    return [json.loads(line) for line in out.read_text().splitlines()], report


def counts(report: dict, unit: str) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in report["dropped"][unit].items()}


def test_a_pair_shares_all_up_to_the_first_assistant_turn_that_differs(tmp_path):
    shared = [{"role": "system", "content": "S"}, user("go")]
    good = row("good", 1, *shared, calls("a", {"at": "x"}), result("a", "1"), says("yes"), user("more"), says("end"))
    bad = row("bad", 0.25, *shared, calls("b", {"at": "x"}), result("b", "1"), calls("c", {"at": "y"}))
    [pair], report = mined(tmp_path, bad, good)
    assert pair == {
        "unique_trajectory_id": "good > bad",
        "tools": TOOLS,
        "task_instruction": "Do it.",
        "conversation": good["conversation"][:4],
        "chosen": good["conversation"][4:],
        "rejected": bad["conversation"][4:],
        "chosen_score": 1.0,
        "rejected_score": 0.25,
    }
    assert report["turns_shared_after_the_context"] == {2: 1}
    for key in ("chosen", "rejected"):  # both are valid trajectories
        parse_trajectory(
            {"tools": pair["tools"], "conversation": pair["conversation"] + pair[key]},
            repaired=lambda reason, detail: pytest.fail(f"{reason}: {detail}"),
        )


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        ([says("a"), user("b"), says("c")], [says("a"), user("B"), says("d")], "first-differs-at-a-user-or-tool-turn"),
        (
            [calls("1", {}), result("1", "a"), says("x")],
            [calls("1", {}), result("1", "b"), says("y")],
            "first-differs-at-a-user-or-tool-turn",
        ),
        ([says("a"), user("b"), says("c")], [says("a"), says("c")], "first-differs-at-a-user-or-tool-turn"),
        ([says("a"), user("b"), says("c")], [says("a")], "one-is-the-others-beginning"),
        ([calls("1", {}), result("1", "a"), says("x")], [calls("2", {}), result("2", "a"), says("x")], "identical"),
        ([calls("1", {"a": 1, "b": 2})], [calls(None, {"b": 2, "a": 1})], "identical"),
        ([calls("1", {"a": 1})], [calls("1", {"a": 1.0})], None),
        ([calls("1", {"a": 1})], [calls("1", {"a": True})], None),
        ([calls("1", {}, "thought")], [calls("1", {}, "another")], None),
        ([calls("1", {})], [says("no call")], None),
    ],
)
def test_pairs_differ_first_at_an_assistant_turn_whatever_the_ids(tmp_path, one, other, reason):
    rows = [row("one", 1, user("go"), *one), row("other", 0, user("go"), *other)]
    if reason is None:
        [pair], _ = mined(tmp_path, *rows)
        assert (pair["chosen"][0], pair["rejected"][0]) == (one[0], other[0])
    else:
        with pytest.raises(UserError, match=rf"no pairs in 2 trajectories of 1 tasks:\n  1 \(pair, {reason}\)"):
            mined(tmp_path, *rows)
        assert not list(tmp_path.glob("*pairs*"))


def test_parallel_results_are_distinguished_by_the_call_they_answer(tmp_path):
    def parallel(ids: str, first: str, second: str, answer: str) -> list[dict]:
        both = calls(ids[0], {"at": 1})
        both["tool_calls"] += calls(ids[1], {"at": 2})["tool_calls"]
        return [user("go"), both, result(ids[int(first)], "r"), result(ids[int(second)], "s"), says(answer)]

    same = [row("x", 1, *parallel("ab", "0", "1", "good")), row("y", 0, *parallel("cd", "0", "1", "bad"))]
    assert mined(tmp_path, *same)[1]["turns_shared_after_the_context"] == {3: 1}
    with pytest.raises(UserError, match="first-differs-at-a-user-or-tool-turn"):
        mined(tmp_path, same[0], row("y", 0, *parallel("cd", "1", "0", "bad")))


def test_tasks_are_distinguished_by_everything_before_the_first_answer(tmp_path):
    other_tools = json.loads(json.dumps(TOOLS).replace("look", "peek"))
    reordered = [{"function": TOOLS[0]["function"], "type": "function"}]  # the prompt would be another
    rows = [
        row("a", 1, user("go"), says("x")),
        row("b", 0, user("go "), says("y")),
        row("c", 0, user("go"), says("y"), instruction="Do that."),
        row("d", 0, user("go"), says("y"), tools=other_tools),
        row("e", 0, user("go"), says("y"), tools=reordered),
        row("f", 0, {"role": "system", "content": ""}, user("go"), says("y")),
        row("g", 0, user("go"), user("on"), says("y")),
    ]
    with pytest.raises(UserError, match=r"7 trajectories of 7 tasks:\n  7 \(trajectory, alone-in-its-task\), first a"):
        mined(tmp_path, *rows)


def test_everything_dropped_is_counted_by_reason(tmp_path):
    rows = [
        row("a", 1, user("go"), says("x")),
        row("b", 1, user("go"), says("y")),
        row("b2", 1, user("go"), says("y")),
        row("c", 0.5, user("go"), says("z")),
        row("d", 0, user("go"), says("w")),
        row("no score", None, user("go"), says("v")),
        row("other", 1, user("stop"), says("v")),
        {"conversation": []},
    ]
    kept, report = mined(tmp_path, *rows, min_gap=0.5, per_task=3, report_path=tmp_path / "r.json", force=True)
    assert [one["unique_trajectory_id"] for one in kept] == ["a > d", "b > d", "a > c"]
    assert counts(report, "trajectory") == {
        "repeated": 1, "no-score": 1, "alone-in-its-task": 1, "no-conversation": 1
    }  # fmt: skip
    assert counts(report, "pair") == {"over-the-cap-of-its-task": 2, "gap-too-small": 1}
    assert report["dropped"]["trajectory"]["no-conversation"]["rows"] == [f"{tmp_path}/rows.jsonl:8"]
    assert report["trajectories"] == 8
    assert (report["tasks"], report["tasks_with_pairs"], report["pairs"]) == (2, 1, 3)
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["dropped"] == report["dropped"]
    assert "dropped 2 (pair, over-the-cap-of-its-task)" in pairs.summary(tmp_path / "pairs.jsonl", report)


def test_outputs_are_complete_or_absent_and_overwritten_only_with_force(tmp_path):
    rows = [row("a", 1, user("go"), says("x")), row("b", 0, user("go"), says("y"))]
    mined(tmp_path, *rows)
    out = tmp_path / "pairs.jsonl"
    kept = out.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        pairs.write([tmp_path / "rows.jsonl"], out)
    with pytest.raises(UserError, match="exists already"):
        pairs.write([tmp_path / "rows.jsonl"], tmp_path / "new.jsonl", report_path=out)
    with pytest.raises(UserError, match="no pairs"):
        pairs.write([tmp_path / "rows.jsonl"], out, min_gap=2, force=True)
    with pytest.raises(UserError, match="does not exist"):
        pairs.write([tmp_path / "rows.jsonl"], tmp_path / "none" / "x.jsonl")
    assert out.read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "rows.jsonl"]


def test_scored_logs_of_one_model_and_its_rivals_make_pairs(tmp_path):
    """Real questions, answered by two models; the second is the first with its last turn replaced."""
    log = Path(__file__).parent / "fixtures" / "hotpotqa_scored.json"
    real = [item.trajectory for item in converter("hotpotqa")([log]) if isinstance(item, Converted)]
    rows = []
    for one in map(to_dict, real):
        rival = json.loads(json.dumps(one))
        rival["unique_trajectory_id"] += "_rival"
        rival["score"] = one["score"] - 1
        last = max(at for at, turn in enumerate(one["conversation"]) if turn["role"] == "assistant")
        rival["conversation"][last:] = [says("I do not know.")]
        rows += [one, rival]
    pairs_by_id = {pair["unique_trajectory_id"]: pair for pair in mined(tmp_path, *rows)[0]}
    assert real
    for one in map(to_dict, real):
        name = one["unique_trajectory_id"]
        pair = pairs_by_id[f"{name} > {name}_rival"]
        assert pair["conversation"] + pair["chosen"] == one["conversation"]
        assert pair["rejected"] == [says("I do not know.")]


WORDS = st.sampled_from("xy")


@st.composite
def tasks(draw: st.DrawFn) -> list[dict]:
    """Scored trajectories of up to three tasks whose turns are few enough to agree often."""
    rows = []
    for at in range(draw(st.integers(2, 9))):
        turns = [user(draw(st.sampled_from("pq")))]
        for _ in range(draw(st.integers(1, 3))):
            match draw(st.sampled_from(["says", "calls", "asks"])):
                case "says":
                    turns.append(says(draw(WORDS)))
                case "calls":
                    call_id = draw(st.sampled_from(["1", "2", "3"]))
                    turns += [calls(call_id, {"at": draw(WORDS)}), result(call_id, draw(WORDS))]
                case "asks":
                    turns += [user(draw(WORDS))]
        if not any(turn["role"] == "assistant" for turn in turns):
            turns.append(says("x"))
        rows.append(row(f"t{at}", draw(st.sampled_from([0, 0.5, 1, 2])), *turns))
    return rows


def plain(turn: dict) -> dict:
    """A turn without ids."""
    shown = {key: turn[key] for key in ("role", "content")}
    return shown | {"calls": [call["function"] for call in turn.get("tool_calls", ())]}


def expected(rows: list[dict], min_gap: float, per_task: int) -> list[str]:
    """Reference implementation: compares all pairs of a task turn by turn, sorts them, and takes the first."""
    by_task: dict[str, list[dict]] = {}
    for one in rows:
        start = next(at for at, turn in enumerate(one["conversation"]) if turn["role"] == "assistant")
        by_task.setdefault(json.dumps(one["conversation"][:start]), []).append(one)
    names = []
    for task in by_task.values():
        kept: list[dict] = []
        for one in task:
            if not any([*map(plain, one["conversation"])] == [*map(plain, other["conversation"])]
                       and one["score"] == other["score"] for other in kept):  # fmt: skip
                kept.append(one)
        of_task = []
        for one, other in combinations(kept, 2):
            chosen, rejected = sorted((one, other), key=lambda scored: -scored["score"])
            gap = chosen["score"] - rejected["score"]
            turns = zip(map(plain, chosen["conversation"]), map(plain, rejected["conversation"]), strict=False)
            differing = next(((a, b) for a, b in turns if a != b), None)
            if gap > 0 and gap >= min_gap and differing and all(turn["role"] == "assistant" for turn in differing):
                of_task.append((-gap, chosen["unique_trajectory_id"], rejected["unique_trajectory_id"]))
        names += [f"{chosen} > {rejected}" for _, chosen, rejected in sorted(of_task)[:per_task]]
    return names


@settings(deadline=None, max_examples=150, derandomize=True)
@given(tasks(), st.sampled_from([0, 0.5, 1, 1.5]), st.integers(1, 4), st.randoms(use_true_random=False))
def test_agrees_with_the_definition_and_counts_add_up(tmp_path_factory, rows, min_gap, per_task, rng: random.Random):
    folder = tmp_path_factory.mktemp("pairs")
    wanted = expected(rows, min_gap, per_task)
    if not wanted:
        with pytest.raises(UserError, match="no pairs"):
            mined(folder, *rows, min_gap=min_gap, per_task=per_task)
        return
    kept, report = mined(folder, *rows, min_gap=min_gap, per_task=per_task)
    assert [pair["unique_trajectory_id"] for pair in kept] == wanted
    dropped = counts(report, "trajectory")
    left = len(rows) - dropped.get("alone-in-its-task", 0) - dropped.get("repeated", 0)
    all_pairs = len(kept) + sum(counts(report, "pair").values())
    assert all_pairs <= left * (left - 1) // 2
    if report["tasks"] - dropped.get("alone-in-its-task", 0) == 1:
        assert all_pairs == left * (left - 1) // 2
    shuffled = rows[:]
    rng.shuffle(shuffled)
    again = {pair["unique_trajectory_id"] for pair in mined(folder, *shuffled, min_gap=min_gap, per_task=per_task)[0]}
    assert again == set(wanted)  # the order of the rows affects only the order of the tasks
