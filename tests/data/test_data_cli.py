import json
import subprocess
import sys
from pathlib import Path

import pytest

from xlam_jax import cli
from xlam_jax.data.__main__ import main

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
GOOD = QUICKSTART / "webshop.jsonl"


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"extends: {ROOT}/configs/quickstart.yaml\n"
        f"model: {{config: {ROOT}/configs/models/tiny_mixtral.json}}\n"
        f"data: {{tokenizer: {QUICKSTART}/tokenizer, sources: [{{name: webshop, files: [{GOOD}]}}]}}\n"
        "train: {steps: 10, warmup_steps: 1}\n",
        encoding="utf-8",
    )
    return path


def run(*arguments: object) -> int:
    """The exit code of a command, as the shell would see it."""
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: main([str(argument) for argument in arguments]))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one message of a command that must end with code 2."""
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1, err
    return err[err.index("error: ") :]


@pytest.fixture
def bad(tmp_path) -> Path:
    rows = [json.loads(line) for line in GOOD.read_text(encoding="utf-8").splitlines()[:5]]
    rows[1]["conversation"][1]["tool_calls"][0]["function"]["arguments"] = {"qery": 1}
    rows[3]["unique_trajectory_id"] = rows[0]["unique_trajectory_id"]
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_validate_has_three_exit_codes(bad, capsys):
    assert run("validate", GOOD) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "30 rows, no finding\n"
    assert run("validate", bad, GOOD) == 1
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        [f"{bad}:2", "missing-argument"],
        [f"{bad}:2", "extra-argument"],
        [f"{bad}:4", "duplicate-trajectory-id"],
    ]
    assert said.err.splitlines()[0] == "35 rows, 2 with 3 findings"
    assert "missing-argument" in said.err
    assert run("validate", "--json", bad, "--max-errors", "2") == 1
    said = capsys.readouterr()
    assert [json.loads(line)["reason"] for line in said.out.splitlines()] == ["missing-argument", "extra-argument"]


def test_mistakes_of_the_user_are_one_message(bad, config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.txt").touch()
    (tmp_path / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08")
    assert "bda.jsonl: no such file; did you mean 'bad.jsonl'?" in fails(capsys, "validate", tmp_path / "bda.jsonl")
    assert "is a folder" in fails(capsys, "validate", bad, tmp_path)
    assert "has no rows" in fails(capsys, "validate", tmp_path / "empty.jsonl")
    assert "its suffix must be one of" in fails(capsys, "validate", tmp_path / "rows.txt")
    assert "cut.jsonl.gz" in fails(capsys, "validate", tmp_path / "cut.jsonl.gz")
    assert "no such file; a YAML config" in fails(capsys, "validate", bad, "--config", tmp_path / "none.yaml")
    assert "no such file" in fails(capsys, "pairs", tmp_path / "x.jsonl", "--out", tmp_path / "p.jsonl")
    assert "no pairs" in fails(capsys, "pairs", GOOD, "--out", tmp_path / "p.jsonl")
    assert "exists already" in fails(capsys, "pairs", GOOD, "--out", bad)
    assert "does not exist" in fails(capsys, "pairs", GOOD, "--out", tmp_path / "none" / "p.jsonl")
    assert "unknown key data.stream" in fails(capsys, "stats", "--config", config, "data.stream=2")
    assert "did you mean 'webshop'" in fails(capsys, "preview", "--config", config, "--source", "webshp")
    for command in ("stats", "preview --html"):
        name, *option = command.split()
        page = tmp_path / "page.html"
        page.write_text("mine")
        assert "exists already" in fails(capsys, name, "--config", config, *(option or ["--out"]), page)
        assert page.read_text() == "mine"
    (tmp_path / "stats.html").touch()
    assert "exists already" in fails(capsys, "stats", "--config", config)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["validate"],
        ["validate", "x.jsonl", "--max-errors", "0"],
        ["pairs", "x.jsonl"],
        ["pairs", "x.jsonl", "--out", "p.jsonl", "--min-gap", "nan"],
        ["preview", "-n", "-1", "--config", "c.yaml"],
        ["stats"],
    ],
)
def test_a_wrong_command_line_is_explained(arguments, capsys):
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: python -m xlam_jax.data")
    assert "Traceback" not in said


def test_stats_preview_and_prepare_run_from_a_config(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # overrides may be anywhere
    assert run("stats", "data.sequence_length=900", "--config", config, "data.streams=1", "--rows", 20) == 0
    said = capsys.readouterr()
    assert "rows have 900" in said.out
    assert "shares in the first 20 packed rows" in said.out
    assert (tmp_path / "stats.html").stat().st_size > 10_000
    assert run("stats", "--config", config, "--rows", 20, "--force") == 0

    capsys.readouterr()
    assert run("preview", "--config", config, "-n", 2, "--source", "webshop") == 0
    said = capsys.readouterr().out
    assert said.count("\nrow ") == 2
    assert "«tool_call| ⟦[TOOL_CALLS]⟧[{" in said
    assert "\x1b" not in said
    assert run("preview", "--config", config, "--color", "always") == 0
    assert "\x1b[30;48" in capsys.readouterr().out
    assert run("preview", "--config", config, "--html", "p.html") == 0
    assert "</html>" in (tmp_path / "p.html").read_text(encoding="utf-8")

    capsys.readouterr()
    assert run("prepare", "--config", config, "--out", "cache") == 0
    assert "data.cache: cache in the config" in capsys.readouterr().err
    assert run("preview", "--config", config, "data.cache=cache") == 0
    cached = capsys.readouterr().out
    assert cached == said[: len(cached)]  # the first of the two rows shown above
    assert "exists" in fails(capsys, "prepare", "--config", config, "--out", "cache")


def test_pairs_of_a_file(tmp_path, capsys):
    rows = [
        {"unique_trajectory_id": name, "score": score, "conversation": [{"role": "user", "content": "go"}, said]}
        for name, score in (("a", 1), ("b", 0))
        for said in [{"role": "assistant", "content": name}]
    ]
    source, out, report = (tmp_path / name for name in ("rows.jsonl", "pairs.jsonl", "report.json"))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("pairs", source, "--out", out, "--report", report, "--min-gap", "0.5", "--per-task", "1") == 0
    assert capsys.readouterr().out == f"{out}: 1 pairs from 1 of 1 tasks, 2 trajectories read\n"
    assert json.loads(out.read_text())["chosen"] == [{"role": "assistant", "content": "a"}]
    assert json.loads(report.read_text())["pairs"] == 1


HELP = """
import atexit, runpy, sys
heavy = {"jax", "torch", "grain", "transformers", "numpy", "jsonschema"}
atexit.register(lambda: print(sorted(heavy & set(sys.modules))))
sys.argv[1:] = ["stats", "--help"]
runpy.run_module("xlam_jax.data", run_name="__main__")
"""


def test_help_loads_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--rows N" in done.stdout
    assert done.stdout.rstrip().endswith("[]")


def test_findings_go_down_a_pipe(commands, bad):
    assert commands.run("xlam_jax.data", "validate", bad, code=1).stdout.count("\n") == 3
