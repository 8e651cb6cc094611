"""MaxText: the Hugging Face input pipeline with `use_sft`, the column `messages` and completions trained.

Its pipeline takes the roles system, user and assistant; it has no column for tools. It has no option to train only the
last turn of a conversation.
"""
# pyright: reportMissingImports=false

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from _peer import Tokens, Unsupported, main, write_lines
from datasets import load_dataset
from maxtext.input_pipeline import hf_data_processing
from transformers import AutoTokenizer

LENGTH = 2048


def prepare(rows: Sequence[dict[str, Any]], job: Path, last_turn_only: bool) -> list[Tokens]:
    """Returns the sequences of the pipeline's batches of one row."""
    if last_turn_only:
        raise Unsupported("no option to train only the last turn")
    name = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    path = write_lines([{"messages": row["messages"]} for row in rows], job / f"maxtext-{name}.jsonl")
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(job / "cache"))
    batches = hf_data_processing.preprocessing_pipeline(
        dataloading_host_index=0, dataloading_host_count=1,
        global_mesh=jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)), dataset=dataset,
        config=SimpleNamespace(elastic_enabled=False, training_objective="causal_lm"),
        data_column_names=["messages"], tokenize=True, tokenizer_path=str(job / "tokenizer"), hf_access_token=None,
        global_batch_size=1, max_target_length=LENGTH, shuffle=False, data_shuffle_seed=0, packing=False, shift=False,
        use_sft=True, grain_worker_count=0,
    )  # fmt: skip
    pad = AutoTokenizer.from_pretrained(job / "tokenizer").pad_token_id
    sequences: list[Tokens] = []
    for batch in batches:
        ids = np.asarray(batch["inputs"])[0]
        targets = np.asarray(batch["targets"])[0]
        length = int((np.asarray(batch["inputs_segmentation"])[0] != 0).sum())
        sequences.append((ids[:length].tolist(), (targets[:length] != pad).tolist()))
        if len(sequences) == len(rows):
            break
    return sequences


if __name__ == "__main__":
    main(["maxtext", "jax", "transformers"], prepare)
