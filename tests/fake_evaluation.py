"""An evaluation's folder as the runner leaves it, without asking anybody."""

import json
from pathlib import Path
from typing import Any

from xlam_jax.evaluate.records import RUN, SUMMARY, Records
from xlam_jax.evaluate.summary import summarize

EVIL = '</script><script>document.title = "broken in"</script><img src="https://example.com/x.png">'


def write_evaluation(folder: Path, *, suite: str = "hotpotqa", agent: str = "react", examples: int = 120) -> Path:
    """Every third example is right, every tenth an error; one holds markup, one a message longer than is shown."""
    about = {
        "suite": suite, "model": "tiny <b>", "agent": agent, "seed": 0, "data": "/data/questions.jsonl",
        "settings": {"corpus": "pages.jsonl"}, "main_score": "f1", "base_url": "http://localhost:8000/v1",
        "started": "2026-01-02T03:04:05+00:00", "temperature": 0.0, "max_tokens": None,
    }  # fmt: skip
    with Records(folder, about) as records:
        for at in range(examples):
            records.add(_record(at))
        summary = summarize(about, records.examples.values(), examples + 5)
    (folder / SUMMARY).write_text(json.dumps(summary), encoding="utf-8")
    assert json.loads((folder / RUN).read_text(encoding="utf-8"))["agent"] == agent
    return folder


def _record(at: int) -> dict[str, Any]:
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "search", "arguments": json.dumps({"entity": f"E{at}"})},
    }
    messages = [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": EVIL if at == 1 else f"Question {at}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "search", "content": "long " * 10_000 if at == 2 else "found"},
        {"role": "assistant", "content": f"needle{at}"},
    ]
    record: dict[str, Any] = {"id": f"q{at}", "group": ("easy", "medium", "hard")[at % 3], "seconds": 0.1, "calls": []}
    if at % 10 == 9:
        record |= {"error": {"kind": "timeout", "message": "no answer within 3 seconds"}, "messages": messages[:2]}
    else:
        right = at % 3 == 0
        record |= {
            "scores": {"f1": 1.0 if right else 0.25, "em": float(right), "accuracy": float(right)},
            "failure": "" if right else "wrong-answer",
            "details": {"answer": "a", "expected": "b"},
            "messages": messages,
        }
    return record
