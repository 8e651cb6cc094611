"""An evaluation from the command line: killed, continued, refused, summarized."""

import json
import os
import signal
import socket
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_server import Handler, Running, refuses, says, serve
from support import Commands, deadline, wait_until

from xlam_jax.evaluate.__main__ import main
from xlam_jax.evaluate.records import Records, read
from xlam_jax.evaluate.summary import summarize, table

SUITE = '''
"""Sums."""
from xlam_jax.evaluate.suite import Outcome, Suite, Task

class Sums(Suite):
    name, about = "sums", "sums of two numbers"
    settings = {"count": "how many"}

    def tasks(self):
        return [Task(f"t{at}", at, "even" if at % 2 == 0 else "odd") for at in range(int(self.options.extra["count"]))]

    async def run(self, task, model, agent):
        answer = await model.chat([{"role": "user", "content": f"{task.data} + 1 ="}])
        right = answer.content == str(task.data + 1)
        return Outcome({"accuracy": right}, [*answer.prompt, answer.message], "" if right else "wrong")
'''


def number(request: dict[str, Any]) -> int:
    return int(request["messages"][0]["content"].split()[0])


def adds(handler: Handler, request: dict[str, Any]) -> None:
    says(str(number(request) + 1))(handler, request)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "sums.py"
    path.write_text(SUITE, encoding="utf-8")
    return path


def arguments(suite: Path, server: Running | str, out: Path, count: int = 12, *more: object) -> list[object]:
    url = server if isinstance(server, str) else server.url
    return ["--suite", suite, "--base-url", url, "--model", "tiny", "--out", out, "--set", f"count={count}", *more]


def run(commands: Commands, *command: object, **options: Any) -> Any:
    return commands.call("xlam_jax.evaluate", *command, **options)


def test_a_user_defined_suite(commands: Commands, suite: Path, tmp_path: Path):
    out = tmp_path / "out"

    def nearly(handler: Handler, request: dict[str, Any]) -> None:
        says("7")(handler, request) if number(request) == 3 else adds(handler, request)

    with serve(nearly) as server:
        result = run(commands, *arguments(suite, server, out, 12, "--concurrency", 5))
        assert len(server.requests) == 12
        again = run(commands, *arguments(suite, server, out, 12, "--concurrency", 5))
        more = run(commands, *arguments(suite, server, out, 12, "--limit", 4))
        assert len(server.requests) == 12
    assert [line.split() for line in result.stdout.splitlines()[2:5]] == [
        ["even", "6/6", "1.0000"], ["odd", "6/6", "0.8333"], ["all", "12/12", "0.9167"]
    ]  # fmt: skip
    assert "failures: wrong 1" in result.stdout
    assert "12 of 12 examples are scored already" in again.stderr
    assert again.stdout == result.stdout
    assert more.stdout.splitlines()[4].split() == ["all", "4/4", "0.7500"]
    record = read(out)["t3"]
    assert record["messages"][-1] == {"role": "assistant", "content": "7"}
    assert (record["scores"], record["failure"], record["group"], record["calls"]) == (
        {"accuracy": 0},
        "wrong",
        "odd",
        [],
    )
    run_json = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert (run_json["suite"], run_json["model"], run_json["settings"]) == ("sums", "tiny", {"count": "12"})


def test_errors_are_not_scored_and_run_again(commands: Commands, suite: Path, tmp_path: Path):
    out = tmp_path / "out"

    def fails(handler: Handler, request: dict[str, Any]) -> None:
        at = number(request)
        (refuses(500, "broken") if at < 2 else refuses(400, "context length") if at < 3 else adds)(handler, request)

    with serve(fails) as server:
        result = run(commands, *arguments(suite, server, out, 8, "--retries", 0), code=1)
        assert "3 of 8 examples ended in an error and are not scored (server-error 2, over-length 1)" in result.stdout
        assert result.stderr.count("server-error:") == 1
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["scores"] == {"accuracy": 1.0}
    assert (summary["examples"], summary["scored"], summary["errors"]) == (8, 5, {"server-error": 2, "over-length": 1})
    assert read(out)["t0"]["error"]["kind"] == "server-error"
    assert "scores" not in read(out)["t0"]
    with serve(adds) as server:
        result = run(commands, *arguments(suite, server, out, 8))
        assert sorted(number(request) for request in server.requests) == [0, 1, 2]
    assert "5 of 8 examples are scored already; 3 that ended in an error are evaluated again" in result.stderr
    assert result.stdout.splitlines()[4].split() == ["all", "8/8", "1.0000"]
    assert "error" not in result.stdout


def test_a_suite_that_fails_on_an_answer_continues(commands: Commands, suite: Path, tmp_path: Path):
    suite.write_text(SUITE.replace("right = ", "right = 1 / task.data and "), encoding="utf-8")
    with serve(adds) as server:
        result = run(commands, *arguments(suite, server, tmp_path / "out", 4), code=1)
    error = read(tmp_path / "out")["t0"]["error"]
    assert error["kind"] == "suite"
    assert error["message"] == f"ZeroDivisionError: division by zero ({suite}:14)"
    assert "1 of 4 examples ended in an error and are not scored (suite 1)" in result.stdout


def test_rows_that_a_suite_cannot_parse(commands: Commands, suite: Path, tmp_path: Path):
    command = arguments(suite, "http://127.0.0.1:9/v1", tmp_path / "out", 0)
    assert "has no examples" in commands.fails("xlam_jax.evaluate", *command)
    command = arguments(suite, "http://127.0.0.1:9/v1", tmp_path / "out", 1)
    suite.write_text(SUITE.replace("at % 2 ==", "at / 0 =="), encoding="utf-8")
    error = commands.fails("xlam_jax.evaluate", *command)
    assert f"its data are not as expected: ZeroDivisionError: division by zero ({suite}:10)" in error


def test_a_killed_evaluation_continues(commands: Commands, suite: Path, tmp_path: Path):
    """After kill -9 no record is lost, no recorded example runs again, and all examples run."""
    out, count, answered, concurrency = tmp_path / "out", 60, 20, 4
    request_counts: Counter[int] = Counter()
    lock, killed = threading.Lock(), threading.Event()

    def counts(handler: Handler, request: dict[str, Any]) -> None:
        with lock:
            request_counts[number(request)] += 1
            waits = request_counts.total() > answered
        if waits:  # these requests have no answer when the process is killed
            killed.wait()
        adds(handler, request)

    with serve(counts) as server:
        process = commands.start(
            "xlam_jax.evaluate", *arguments(suite, server, out, count, "--concurrency", concurrency)
        )
        wait_until(lambda: request_counts.total() == answered + concurrency and len(read(out)) == answered)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        killed.set()
        written = read(out)
        assert len(written) == answered
        before = Counter(request_counts)
        with (out / "examples.jsonl").open("ab") as file:
            file.write(b'{"id": "t59", "scores": {"accu')  # like an interrupted write
        result = run(commands, *arguments(suite, server, out, count, "--concurrency", concurrency))
    assert "the last line of examples.jsonl was cut off" in result.stderr
    after = read(out)
    assert sorted(after) == sorted(f"t{at}" for at in range(count))
    assert {name: after[name] for name in written} == written
    assert all(request_counts[int(name[1:])] == before[int(name[1:])] == 1 for name in written)
    assert sum((request_counts - before).values()) == count - len(written)
    assert (out / "examples.jsonl").read_bytes().count(b"\n") == count


def test_concurrency(commands: Commands, suite: Path, tmp_path: Path):
    """The server answers only once 64 requests are waiting."""
    together = threading.Barrier(64)

    def waits(handler: Handler, request: dict[str, Any]) -> None:
        together.wait(timeout=deadline(60))
        adds(handler, request)

    with serve(waits) as server:
        run(commands, *arguments(suite, server, tmp_path / "out", 128, "--concurrency", 64))
    assert all(record["scores"]["accuracy"] == 1 for record in read(tmp_path / "out").values())


def test_the_folder_of_another_evaluation_is_refused(commands: Commands, suite: Path, tmp_path: Path):
    out = tmp_path / "out"
    with serve(adds) as server:
        run(commands, *arguments(suite, server, out, 2))
        error = commands.fails("xlam_jax.evaluate", *arguments(suite, server, out, 2, "--model", "other"))
        assert 'model: "tiny" there, "other" now' in error
        error = commands.fails("xlam_jax.evaluate", *arguments(suite, server, out, 2, "--seed", 7))
        assert "seed: 0 there, 7 now" in error
        suite.write_text(SUITE.replace('f"t{at}"', 'f"s{at}"'), encoding="utf-8")
        error = commands.fails("xlam_jax.evaluate", *arguments(suite, server, out, 2))
        assert "examples: " in error
        assert "code: " in error
        suite.write_text(SUITE.replace('f"t{at}", at,', 'f"t{at}", at + 5,'), encoding="utf-8")  # the ids are the same
        assert "examples: " in commands.fails("xlam_jax.evaluate", *arguments(suite, server, out, 2))
        suite.write_text(SUITE, encoding="utf-8")
        error = commands.fails("xlam_jax.evaluate", *arguments(suite, server, out, 3))
        assert 'settings: {"count": "2"} there, {"count": "3"} now' in error
        with Records(out, json.loads((out / "run.json").read_text(encoding="utf-8"))):
            error = commands.fails("xlam_jax.evaluate", *arguments(suite, server, out, 2))
            assert "another process" in error
        error = commands.fails("xlam_jax.evaluate", *arguments(suite, server, tmp_path, 2))
        assert "contains files, but no run.json" in error
        (out / "examples.jsonl").write_text('{"id": "t0"}\n', encoding="utf-8")
        error = commands.fails("xlam_jax.evaluate", *arguments(suite, server, out, 2))
        assert "examples.jsonl:1: is not the record of an example" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--suite", "hotpotq"], "did you mean 'hotpotqa'?"),
        (["--suite", "nowhere.py"], "nowhere.py: can't be read (No such file or directory); a suite is expected"),
        (["--agent", "react"], "sums runs with native"),
        (["--suite", "webshop", "--agent", "reakt"], "did you mean 'react'?"),
        (["--set", "cuont=3"], "did you mean 'count'?"),
        (["--set", "count"], "KEY=VALUE"),
        (["--limit", "0"], "argument --limit: '0' is not a whole number of 1 or more"),
        (["--temperature", "nan"], "argument --temperature: 'nan' is not a finite number of 0 or more"),
        (["--timeout", "0"], "argument --timeout: '0' is not a finite number above 0"),
        (["--out", f"{__file__}/out"], f"{__file__}/out: Not a directory"),
        (["--base-url", "localhost:8000/v1"], "base_url localhost:8000/v1: is not a web address"),
        (["--suite", "hotpotqa"], "hotpotqa has no such setting"),
    ],
)
def test_mistakes(commands: Commands, suite: Path, tmp_path: Path, changes: list[str], message: str):
    command = arguments(suite, "http://127.0.0.1:9/v1", tmp_path / "out", 2, *changes)
    assert message in commands.fails("xlam_jax.evaluate", *command)
    assert not (tmp_path / "out").exists()


def test_no_server(commands: Commands, suite: Path, tmp_path: Path):
    """The run ends after a few errors, not after hundreds of equal ones."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    error = commands.fails("xlam_jax.evaluate", *arguments(suite, url, tmp_path / "out", 500, "--retries", 0))
    assert "cannot be reached" in error
    assert "the same command continues" in error
    assert len(read(tmp_path / "out")) < 50
    with serve(adds) as server:
        run(commands, *arguments(suite, server, tmp_path / "out", 500, "--limit", 20))
    assert all("scores" in record for record in list(read(tmp_path / "out").values())[-20:])


def test_a_wrong_model_ends_the_run_at_once(commands: Commands, suite: Path, tmp_path: Path):
    with serve(refuses(404, "The model `tiny` does not exist.")) as server:
        error = commands.fails("xlam_jax.evaluate", *arguments(suite, server, tmp_path / "out", 50))
        assert len(server.requests) <= 16
    assert "does not exist" in error


def test_held_out_trajectories(commands: Commands, tmp_path: Path):
    """An endpoint that replays the recorded calls scores 1; one that changes an argument scores 0."""
    from xlam_jax.evaluate.suite import Options
    from xlam_jax.evaluate.suites.trajectories import Trajectories

    data = Path("examples/quickstart/hammer.jsonl").resolve()
    tasks = Trajectories(Options(data=data)).tasks()
    expected = {task.data.messages[-1]["content"]: task.data.expected for task in tasks}

    def answers(changed: bool) -> Any:
        def reply(handler: Handler, request: dict[str, Any]) -> None:
            calls = [
                {"name": call.name, "arguments": dict(call.arguments)}
                for call in expected[request["messages"][-1]["content"]]
            ]
            for call in calls if changed else ():
                call["arguments"]["city"] = "elsewhere, and not where it was"
            says(json.dumps(calls))(handler, request)

        return reply

    for changed in (False, True):
        with serve(answers(changed)) as server:
            run(
                commands, "--suite", "trajectories", "--base-url", server.url, "--model", "tiny", "--data", data,
                "--limit", 20, "--out", tmp_path / f"{changed}",
            )  # fmt: skip
        summary = json.loads((tmp_path / f"{changed}/summary.json").read_text(encoding="utf-8"))
        assert summary["scores"]["exact"] == (not changed)
        assert summary["scores"]["right_function"] == 1
        assert summary["failures"] == ({"invalid-arguments": 20} if changed else {})


def test_a_summary_counts():
    records = [
        {"id": "a", "group": "x", "scores": {"f1": 0.5, "em": 0.0}, "failure": "wrong"},
        {"id": "b", "group": "x", "scores": {"f1": 1.0, "em": 1.0}, "failure": ""},
        {"id": "c", "group": "y", "error": {"kind": "timeout", "message": "…"}},
    ]
    summary = summarize({"suite": "s", "model": "m", "main_score": "f1"}, records, 5)
    assert summary["scores"] == {"f1": 0.75, "em": 0.5}
    assert summary["groups"]["y"] == {"examples": 1, "scored": 0, "scores": {}}
    assert table(summary).splitlines()[2].split() == ["y", "0/1", "–", "–"]


def test_help_is_quick_and_lists_everything(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    result = capsys.readouterr().out
    for name in ("hotpotqa", "webshop", "trajectories", "bolaa", "native"):
        assert f"  {name}" in result


def test_help_imports_nothing_heavy(commands: Commands):
    result = commands.start("xlam_jax.evaluate", "--help", PYTHONPROFILEIMPORTTIME="1").communicate()[1]
    imported = {line.rsplit("|", 1)[1].strip() for line in result.splitlines() if "|" in line}
    assert "xlam_jax.evaluate.corpus" in imported  # a suite needs it
    assert imported.isdisjoint({"jax", "openai", "numpy", "transformers", "rich", "jsonschema"})
