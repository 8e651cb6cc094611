"""Folders of evaluations like those of the command, with texts that contain HTML."""

import json
from pathlib import Path
from typing import Any

from xlam_jax.evaluate.records import Records
from xlam_jax.evaluate.summary import summarize

EVIL = "</script><script>document.title = 'taken'</script><img src=http://127.0.0.1:9/a.png onerror=alert(1)>"


def example(at: int) -> dict[str, Any]:
    """Returns a record: one of three is right, one wrong, and some are errors."""
    group = ("easy", "medium", "hard")[at % 3]
    messages = [
        {"role": "user", "content": f"Question: number {at}? {EVIL}"},
        {"role": "assistant", "content": f"Thought: I look.\nAction: search[{at}]", "name": "controller"},
        {"role": "user", "content": f"Observation: sentence {at}"},
        {
            "role": "assistant", "content": "",
            "tool_calls": [
                {"type": "function", "id": "c", "function": {"name": "finish", "arguments": '{"answer": "Oslo"}'}}
            ],
        },
    ]  # fmt: skip
    record: dict[str, Any] = {"id": f"q{at}", "group": group, "seconds": 0.5, "calls": [], "messages": messages}
    if at % 10 == 9:
        return record | {"error": {"kind": "timeout", "message": "no answer within 120 seconds"}}
    right = at % 2 == 0
    return record | {
        "scores": {"f1": 1.0 if right else 0.25, "em": float(right), "accuracy": float(right)},
        "failure": "" if right else "wrong-answer",
        "details": {"answer": "Oslo", "expected": "Oslo" if right else EVIL},
    }


def write_evaluation(folder: Path, agent: str = "react", count: int = 40, suite: str = "hotpotqa") -> Path:
    """A folder with run.json, examples.jsonl and summary.json."""
    about = {
        "suite": suite, "model": "tiny <b>model</b>", "agent": agent, "seed": 0, "data": "/data/questions.jsonl",
        "settings": {"corpus": "pages.sqlite"}, "temperature": 0.0, "max_tokens": None, "main_score": "f1",
        "base_url": "http://localhost:8000/v1", "started": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    with Records(folder, about) as records:
        for at in range(count):
            records.add(example(at))
        summary = summarize(about, records.examples.values(), count)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder
