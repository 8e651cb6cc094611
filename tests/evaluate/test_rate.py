"""The rater: its prompt, the parsing of its answers, continued runs, and the agreement with known scores."""

import json
import math
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Semaphore
from typing import Any

import fake_server
import pytest
from support import Commands, wait_until

from xlam_jax.data.parse import parse_trajectory
from xlam_jax.errors import UserError
from xlam_jax.evaluate import rate
from xlam_jax.evaluate.endpoint import Model

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {}}}}}]


def row(number: int, score: float | None = None, source: str = "shop") -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": f"place {number}"}}}
    conversation = [
        {"role": "user", "content": f"Task {number}."},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "name": "look", "content": "x" * 3000 + "MIDDLE" + "y" * 3000},
        {"role": "assistant", "content": "Done."},
    ]
    scored = {} if score is None else {"score": score}
    return {
        "unique_trajectory_id": f"t{number}",
        "source": source,
        "tools": TOOLS,
        "conversation": conversation,
        **scored,
    }


def write_rows(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return path


def rater(scores: dict[int, Any], before: Callable[[], object] = lambda: None) -> Any:
    """A server that answers task N with `scores[N]`: a rating, or the text of an answer. Calls `before` first."""

    def reply(handler: Any, request: dict[str, Any]) -> None:
        before()
        number = int(re.search(r"Task (\d+)\.", request["messages"][-1]["content"])[1])  # type: ignore[index]
        answer = scores.get(number, 3)
        text = answer if isinstance(answer, str) else json.dumps({"reason": f"because {number}", "score": answer})
        fake_server.says(text)(handler, request)

    return fake_server.serve(reply)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ratings_become_scores(tmp_path: Path, commands: Commands) -> None:
    scores = {0: 5, 1: 4.5, 2: 0, 3: "I like it.", 4: '{"reason": "x"}', 5: 7, 6: 2}
    known_scores = {0: 1.0, 1: 1.0, 2: 0.0, 6: 1.0}
    rows: list[Any] = [row(number, known_scores.get(number)) for number in range(7)]
    source, out, report = write_rows(tmp_path, [*rows, {"no": "row"}]), tmp_path / "out.jsonl", tmp_path / "report.json"
    command = ["rate", source, "--out", out, "--model", "tiny", "--report", report]
    with rater(scores) as server:
        process = commands.call("xlam_jax.data", *command, "--base-url", server.url, code=1)
        assert len(server.requests) == 7
        request = next(body for body in server.requests if "Task 0." in body["messages"][-1]["content"])
    assert {line["unique_trajectory_id"]: line["score"] for line in lines(out)} == {
        "t0": 5,
        "t1": 4.5,
        "t2": 0,
        "t6": 2,
    }
    first = next(line for line in lines(out) if line["unique_trajectory_id"] == "t0")
    assert parse_trajectory(first) == replace(parse_trajectory(rows[0]), score=5.0)
    ratings = {line["id"]: line for line in lines(tmp_path / "out.jsonl.ratings.jsonl")}
    assert (ratings["t0"]["reason"], ratings["t0"]["known"]) == ("because 0", 1.0)
    result = json.loads(report.read_text())
    assert result["failed"] == {"no-json": 1, "no-score": 1, "out-of-range": 1}
    assert result["left_out"] == {"no-rating": 3, "no-conversation": 1}
    agreement = result["agreement"]["shop"]
    assert (agreement["trajectories"], agreement["good"], agreement["kept"]) == (4, 3, 2)
    assert agreement["accuracy"] == 0.75
    assert (agreement["precision"], agreement["recall"]) == (1.0, pytest.approx(2 / 3))
    assert agreement["rank_correlation"] == pytest.approx(0.7746, abs=1e-4)
    assert "4 of 8 trajectories rated" in process.stdout
    text = request["messages"][-1]["content"]
    assert '"arguments": {"at": "place 0"}' in text
    assert "MIDDLE" not in text  # long results are cut in the middle
    assert "[… 2006 characters …]" in text

    with rater({3: 5, 4: 5, 5: 5}) as server:  # --force rates all trajectories again
        commands.call("xlam_jax.data", *command, "--force", "--base-url", server.url, code=1)
        assert len(server.requests) == 7
    report.unlink()
    with rater({}) as server:
        commands.call("xlam_jax.data", *command, "--base-url", server.url, code=1)
        assert len(server.requests) == 0
    assert [line["score"] for line in lines(out)] == [3, 3, 3, 5, 5, 5, 3]


def test_a_killed_run_continues(tmp_path: Path, commands: Commands) -> None:
    source, out = write_rows(tmp_path, [row(number) for number in range(60)]), tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.ratings.jsonl"
    arguments = ["rate", source, "--out", out, "--model", "tiny", "--concurrency", 4]
    killed, answers = threading.Event(), Semaphore(20)
    with rater({}, before=lambda: answers.acquire(blocking=False) or killed.wait()) as server:
        process = commands.start("xlam_jax.data", *arguments, "--base-url", server.url)
        wait_until(lambda: journal.exists() and journal.read_text().count("\n") == 20)
        wait_until(lambda: len(server.requests) == 24)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed.set()
        before = journal.read_text()
        assert before.count("\n") == 20
        assert not out.exists()
        journal.write_text(before + '{"key": "cut o')
        server.requests.clear()
        commands.call("xlam_jax.data", *arguments, "--base-url", server.url)
        assert len(server.requests) == 60 - before.count("\n")
    assert len(lines(out)) == 60
    assert len({line["key"] for line in lines(journal)}) == len(lines(journal)) == 60


def test_errors(tmp_path: Path, commands: Commands) -> None:
    source, out = write_rows(tmp_path, [row(number) for number in range(3)]), tmp_path / "out.jsonl"
    arguments = ["rate", source, "--out", out, "--retries", 0, "--base-url", "http://127.0.0.1:9/v1"]
    assert "no ratings, but" in commands.call("xlam_jax.data", *arguments, "--model", "tiny", code=2).stderr
    with rater({}) as server:
        commands.call("xlam_jax.data", *arguments[:-1], server.url, "--model", "tiny")
        error = commands.call("xlam_jax.data", *arguments[:-1], server.url, "--model", "other", code=2).stderr
    assert "'model': 'tiny'" in error
    assert "'model': 'other'" in error
    (tmp_path / "out.jsonl.ratings.jsonl").unlink()
    assert "exists already" in commands.call("xlam_jax.data", *arguments, "--model", "tiny", code=2).stderr
    journal = tmp_path / "out.jsonl.ratings.jsonl"
    out.unlink()
    journal.write_text('{"key": "a", "score": "good", "reason": ""}\n')
    assert "ratings.jsonl:1: is not a rating" in commands.fails("xlam_jax.data", *arguments, "--model", "tiny")
    journal.unlink()
    with rate.Ratings(journal, "tiny"):
        error = commands.fails("xlam_jax.data", *arguments, "--model", "tiny")
        assert "another process is writing to it" in error
    (tmp_path / "empty.jsonl").touch()
    nothing = ["rate", tmp_path / "empty.jsonl", *arguments[2:], "--model", "tiny"]
    assert "no trajectory could be rated: the input is empty" in commands.fails("xlam_jax.data", *nothing)
    assert not out.exists()
    onto = ["rate", source, "--out", source, "--force", "--model", "tiny", "--base-url", "http://127.0.0.1:9/v1"]
    assert "is one of the files to rate" in commands.fails("xlam_jax.data", *onto)


def test_a_dead_server_ends_the_run(tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is down from the start, or after some ratings; the run ends without trying all other rows."""
    source, out = write_rows(tmp_path, [row(number) for number in range(30)]), tmp_path / "out.jsonl"
    dead = "http://127.0.0.1:9/v1"
    arguments = ["rate", source, "--out", out, "--model", "tiny", "--retries", 0, "--concurrency", 1, "--base-url"]
    few = ["--limit", 2]
    assert f"2 × refused ({dead}: cannot be reached" in commands.fails("xlam_jax.data", *arguments, dead, *few)
    with rater({}) as server:
        commands.call("xlam_jax.data", *arguments, server.url, *few)
    output = commands.call("xlam_jax.data", *arguments, dead, "--limit", 4, code=1).stdout
    assert f"2 answers without a rating (refused), the last: {dead}: cannot be reached" in output
    monkeypatch.setattr(rate, "FAILURES", 5)
    broken: list[Any] = []

    def chat_that_dies(self: Any, *arguments_: Any, **options: Any) -> Any:
        broken.append(arguments_)
        if len(broken) > 1:
            self._llm.config = replace(self._llm.config, base_url=dead)
            self._llm.__dict__.pop("_async_client", None)
        return real(self, *arguments_, **options)

    real = Model.chat
    monkeypatch.setattr(Model, "chat", chat_that_dies)
    with rater({}) as server:
        output = commands.fails("xlam_jax.data", *arguments, server.url)
    assert f"{dead}: cannot be reached" in output
    assert "5 requests in a row" in output
    assert len(broken) == 6


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ('{"reason": "ok", "score": 4}', (4.0, "ok")),
        ('Well: ```json\n{"score": "3.5", "reason": "a {b}"}\n``` that is it', (3.5, "a {b}")),
        ('{"score": 1} no, {"score": 2}', (2.0, "")),
        ('{well} {"score": 5, "by": [{"score": 1}]} {"a":', (5.0, "")),
        ('{"score": 0, "reason": {"why": 1}}', (0.0, "")),
    ],
)
def test_answers_are_parsed(text: str, rating: tuple[float, str]) -> None:
    assert rate.parse(text) == rating


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "no-json"),
        ("Score: 4", "no-json"),
        ("[4]", "no-json"),
        ('{"rating": 4}', "no-score"),
        ('{"score": true}', "no-score"),
        ('{"score": null}', "no-score"),
        ('{"score": "high"}', "no-score"),
        ('{"score": -1}', "out-of-range"),
        ('{"score": 5.1}', "out-of-range"),
        ('{"score": "nan"}', "out-of-range"),
        ('{"score": ' * 2000, "no-json"),
    ],
)
def test_bad_answers_have_a_kind(text: str, kind: str) -> None:
    with pytest.raises(rate.BadRating) as caught:
        rate.parse(text)
    assert caught.value.kind == kind


def test_rank_correlation() -> None:
    assert rate.rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert rate.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rate.rank_correlation([1, 1, 1], [3, 2, 1]) is None
    from scipy.stats import spearmanr

    a, b = [0.0, 1, 1, 0.5, 0.5, 0.2, 1], [0.0, 5, 4, 4, 2, 2, 3]
    expected: Any = spearmanr(a, b)
    assert rate.rank_correlation(a, b) == pytest.approx(expected.statistic)


def test_equal_trajectories_share_a_rating() -> None:
    first, second = parse_trajectory(row(1, 0.5)), parse_trajectory(row(1, 1.0))
    assert rate.key(first) == rate.key(second) != rate.key(parse_trajectory(row(2)))
    assert math.isfinite(rate.HIGHEST)
    with pytest.raises(UserError, match=r"no such file|cannot be read"):
        list(rate._trajectories([Path("/nowhere.jsonl")], None))
