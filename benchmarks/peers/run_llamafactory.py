"""LLaMA-Factory: the format sharegpt with its own templates `qwen` and `qwen3`, stage sft.

As its data page describes, a call is a turn of the role `function_call` with the call (or a list of calls) as JSON, a
result a turn of the role `observation`, and `tools` JSON text. Reasoning is in `<think>` marks in front of the text.
A thought in front of calls is spelled with `<tool_call>` marks, which its formatter reads, and two results are one turn
with the marks between them, as its converter for OpenAI's format writes them: the page names no other way. If only the
last turn is trained, `mask_history` is set.
"""
# pyright: reportMissingImports=false

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _peer import Tokens, from_labels, main
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer

TEMPLATES = {"qwen2_5": "qwen", "qwen3": "qwen3"}
BETWEEN_RESULTS = "\n</tool_response>\n<tool_response>\n"


def prepare(rows: Sequence[dict[str, Any]], job: Path, last_turn_only: bool) -> list[Tokens]:
    """Returns the sequences of LLaMA-Factory's tokenized dataset."""
    lines = [_sharegpt(row) for row in rows]
    folder = job / f"llamafactory-{hashlib.sha256(repr(lines).encode()).hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(lines, ensure_ascii=False), encoding="utf-8")
    columns = {"messages": "conversations", "system": "system", "tools": "tools"}
    info = {"rows": {"file_name": "rows.json", "formatting": "sharegpt", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    model, data, training, _, _ = get_train_args(
        {
            "stage": "sft", "do_train": True, "model_name_or_path": str(job / "tokenizer"), "dataset": "rows",
            "dataset_dir": str(folder), "template": TEMPLATES[job.name], "cutoff_len": 8192,
            "mask_history": last_turn_only, "output_dir": str(job / "out"), "report_to": "none",
            "finetuning_type": "full", "overwrite_cache": True, "use_cpu": True,
        }
    )  # fmt: skip
    tokenizer = load_tokenizer(model)["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data)
    dataset = get_dataset(template, model, data, training, stage="sft", tokenizer=tokenizer)["train_dataset"]
    return [from_labels(row["input_ids"], row["labels"]) for row in dataset]


def _sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    messages = list(row["messages"])
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    turns: list[dict[str, str]] = []
    for message in messages:
        content = message["content"] or ""
        if message["role"] == "tool":
            if turns[-1]["from"] == "observation":
                turns[-1]["value"] += BETWEEN_RESULTS + content
            else:
                turns.append({"from": "observation", "value": content})
        elif message["role"] == "user":
            turns.append({"from": "human", "value": content})
        else:
            reasoning = message.get("reasoning_content", "")
            before = f"<think>\n{reasoning}\n</think>\n\n" if reasoning else ""
            if calls := [call["function"] for call in message.get("tool_calls", [])]:
                text = json.dumps(calls if len(calls) > 1 else calls[0], ensure_ascii=False)
                content = f"{content}\n<tool_call>{text}</tool_call>" if content else text
            turns.append({"from": "function_call" if calls else "gpt", "value": before + content})
    tools = json.dumps(row["tools"], ensure_ascii=False) if row["tools"] else ""
    return {"conversations": turns, "system": system, "tools": tools}


if __name__ == "__main__":
    main(["llamafactory", "transformers", "datasets"], prepare)
