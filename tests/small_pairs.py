"""Pairs whose sides call different functions, and a config that trains a tiny dense model on them."""

import json
from pathlib import Path
from typing import Any

from support import ROOT

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("look", "take", "leave")
]
MODEL = {
    "architectures": ["MistralForCausalLM"], "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None,
    "max_position_embeddings": 512,
}  # fmt: skip


def row(number: int) -> dict[str, Any]:
    """Returns a pair whose chosen side takes the thing; the rejected side leaves it and looks again."""

    def call(name: str) -> dict[str, Any]:
        function = {"name": name, "arguments": {"thing": number}}
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "c", "function": function}],
        }

    return {
        "unique_trajectory_id": f"pair {number}",
        "tools": TOOLS,
        "conversation": [{"role": "user", "content": f"Take thing {number}."}],
        "chosen": [call("take")],
        "rejected": [call("leave"), {"role": "tool", "tool_call_id": "c", "content": "gone"}, call("look")],
    }


def write_pairs(file: Path, count: int = 60) -> Path:
    """Writes so many pairs; returns the file."""
    file.write_text("".join(json.dumps(row(number)) + "\n" for number in range(count)), encoding="utf-8")
    return file


def write_config(folder: Path, pairs: Path) -> Path:
    """Writes a training config, and the model's, into the folder; returns the first."""
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    path = folder / "dpo.yaml"
    path.write_text(
        f"""
output_dir: {folder}/unused
model: {{config: {folder}/config.json, compute_dtype: float32, remat: none}}
data:
  tokenizer: {ROOT}/examples/quickstart/tokenizer
  sequence_length: 384
  sources: [{{name: things, files: ["{pairs}"], format: pairs}}]
  heldout: 0.2
  streams: 2
  max_pairs: 2
objective: {{kind: sigmoid}}
train: {{steps: 8, batch_size: 4, learning_rate: 3.0e-3}}
eval: {{every: 4}}
checkpoint: {{every: 3}}
""",
        encoding="utf-8",
    )
    return path
