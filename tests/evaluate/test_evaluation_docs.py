"""The commands and the suite in docs/evaluation.md run unchanged, against a scripted server and our shop."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from scripted import Action, scripted
from support import ROOT, Commands

from xlam_jax.evaluate import shop
from xlam_jax.evaluate.suites.webshop import WebShop

PAGE = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    matches = re.findall(rf"^ *```{language}\n(.*?)^ *```$", PAGE, re.DOTALL | re.MULTILINE)
    return [block.replace("\\\n", " ") for block in matches]


COMMANDS = [" ".join(line.split()) for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a user's data, and the suite in the documentation."""
    question = {"_id": "a", "question": "Of which country is Oslo the capital?", "answer": "Norway", "level": "easy"}
    page = {"title": "Oslo", "text": "Oslo is the capital of Norway."}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    (tmp_path / "pages.jsonl").write_text(json.dumps(page) + "\n", encoding="utf-8")
    lines = (ROOT / "examples/quickstart/hammer.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    code = next(block for block in blocks("python") if block.startswith("# riddles.py"))
    (tmp_path / "riddles.py").write_text(code, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_commands_run(commands: Commands, folder: Path, command: str):
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"]
    if words[2] == "xlam_jax.evaluate.shop":  # does not end; tests/evaluate/test_webshop.py starts it
        return
    actions: dict[str, list[Action]] = {
        "Of which country is Oslo the capital?": [("search", "Oslo"), ("finish", "Norway")],
        "What has keys": [("hint", "1"), ("answer", "piano")],
        "What gets wetter": [("answer", "sponge")],
        "": [("search", "nothing")],
    }
    with shop.serve() as url, scripted(actions, WebShop.labour) as server:
        addresses = {"http://localhost:8000/v1": server.url, "http://localhost:3000": url}
        replaced = [
            re.sub(r"http://localhost:\d+(/v1)?", lambda match: addresses[match[0]], word) for word in words[3:]
        ]
        commands.call(words[2], *replaced, folder=folder)
    if "--out" not in words or "evaluations" not in command:
        return
    out = folder / words[words.index("--out") + 1]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["scored"] == summary["examples"] > 0
    assert ("--report" in words) == (out / "report.html").exists()
    if "riddles.py" in words:
        assert (summary["scores"], summary["failures"]) == ({"accuracy": 0.5}, {"wrong-word": 1})
    if "hotpotqa" in words:
        assert summary["scores"]["em"] == 1
    shutil.rmtree(out)


def test_there_are_commands():
    assert len(COMMANDS) >= 6
