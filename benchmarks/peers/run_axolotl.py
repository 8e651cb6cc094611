"""axolotl: the dataset type `chat_template` with the tokenizer's template and the defaults for what is trained.

Its page on conversations asks for `messages` and `tools`, and for arguments as JSON text where they differ between
rows. A turn that is not trained has `train: false`, the field that `message_field_training` names.
"""
# pyright: reportMissingImports=false

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _peer import Tokens, from_labels, main, with_text_arguments, write_lines
from axolotl.datasets import TokenizedPromptDataset
from axolotl.prompt_strategies.chat_template import StrategyLoader
from axolotl.utils.dict import DictDefault
from datasets import load_dataset
from transformers import AutoTokenizer


def prepare(rows: Sequence[dict[str, Any]], job: Path, last_turn_only: bool) -> list[Tokens]:
    """Returns the sequences of axolotl's tokenized dataset."""
    tokenizer = AutoTokenizer.from_pretrained(job / "tokenizer")
    lines = []
    for row in rows:
        messages = with_text_arguments(row["messages"])
        if last_turn_only:
            for message in messages[:-1]:
                message["train"] = False
        lines.append({"messages": messages, "tools": row["tools"]} if row["tools"] else {"messages": messages})
    name = hashlib.sha256(repr(lines).encode()).hexdigest()[:16]
    path = write_lines(lines, job / f"axolotl-{name}.jsonl")
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(job / "cache"))
    config = DictDefault({"train_on_inputs": False, "sequence_len": 8192, "chat_template": "tokenizer_default"})
    chosen = {"type": "chat_template", "message_field_training": "train"}
    strategy = StrategyLoader()(tokenizer, config, chosen)
    prepared = TokenizedPromptDataset(strategy, dataset, process_count=1)
    return [from_labels(row["input_ids"], row["labels"]) for row in prepared]


if __name__ == "__main__":
    main(["axolotl", "transformers", "datasets"], prepare)
