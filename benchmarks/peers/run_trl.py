"""TRL: SFTTrainer's preparation of a conversational dataset with `assistant_only_loss=True`.

The rows are in the form of its page on dataset formats: `messages` and `tools` with objects, read with
`load_dataset("json")`. If only the last turn is trained, they are `prompt` and `completion`, of which SFTTrainer trains
the completion. SFTTrainer chooses its own training variant of a template that it knows.
"""
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _peer import Tokens, from_labels, main, write_lines
from datasets import load_dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer


def prepare(rows: Sequence[dict[str, Any]], job: Path, last_turn_only: bool) -> list[Tokens]:
    """Returns the sequences of SFTTrainer's training dataset."""
    tokenizer = AutoTokenizer.from_pretrained(job / "tokenizer")
    lines = [_split(row) if last_turn_only else {"messages": row["messages"], "tools": row["tools"]} for row in rows]
    name = hashlib.sha256(repr(lines).encode()).hexdigest()[:16]
    path = write_lines(lines, job / f"trl-{name}.jsonl")
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(job / "cache"))
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1,
        )
    )  # fmt: skip
    arguments = SFTConfig(
        output_dir=str(job / "out"), assistant_only_loss=not last_turn_only, max_length=None, report_to="none",
        use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    prepared: Any = trainer.train_dataset
    return [from_labels(row["input_ids"], row["labels"]) for row in prepared]


def _split(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:], "tools": row["tools"]}


if __name__ == "__main__":
    main(["trl", "transformers", "datasets"], prepare)
