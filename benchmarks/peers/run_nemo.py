"""NeMo AutoModel: `ChatDataset`, which reads OpenAI's messages and tools, with its defaults.

If only the last turn is trained, `mask_history` is set. Its labels are those of the next token; they are shifted back.
"""
# pyright: reportMissingImports=false

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _peer import IGNORED, Tokens, main, with_text_arguments, write_lines
from nemo_automodel.components.datasets.llm.chat_dataset import ChatDataset
from transformers import AutoTokenizer


def prepare(rows: Sequence[dict[str, Any]], job: Path, last_turn_only: bool) -> list[Tokens]:
    """Returns the sequences of the dataset."""
    tokenizer = AutoTokenizer.from_pretrained(job / "tokenizer")
    lines = [{"messages": with_text_arguments(row["messages"]), "tools": row["tools"]} for row in rows]
    name = hashlib.sha256(repr(lines).encode()).hexdigest()[:16]
    path = write_lines(lines, job / f"nemo-{name}.jsonl")
    dataset = ChatDataset(str(path), tokenizer, mask_history=last_turn_only)
    return [_shifted_back(dataset[at]) for at in range(len(dataset))]


def _shifted_back(sample: dict[str, Any]) -> Tokens:
    ids, labels = list(sample["input_ids"]), list(sample["labels"])
    trained = [False, *(label != IGNORED for label in labels)]
    if trained[-1]:
        return [*ids, labels[-1]], trained
    return ids, trained[:-1]


if __name__ == "__main__":
    main(["nemo-automodel", "transformers", "datasets"], prepare)
