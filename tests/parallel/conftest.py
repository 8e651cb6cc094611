"""Fixtures for tests of several processes: a config with short rows, and hosts that only count steps."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from host_processes import Group
from support import ROOT


@pytest.fixture(scope="session")
def short_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config that trains a tiny Mixtral on rows of 256 tokens, without evaluation and other extras."""
    path = tmp_path_factory.mktemp("config") / "short.yaml"
    path.write_text(
        f"""
extends: {ROOT}/configs/quickstart.yaml
model:
  overrides:
    hidden_size: 48
    intermediate_size: 48
    num_hidden_layers: 1
    num_attention_heads: 8
    num_key_value_heads: 8
    head_dim: 8
    num_local_experts: 8
  compute_dtype: float32
data:
  sequence_length: 256
  sources: [{{name: hammer, files: [examples/quickstart/hammer.jsonl]}}]
  heldout: 0
  streams: 4
train: {{steps: 20, batch_size: 4, learning_rate: 5.0e-3, warmup_steps: 2, log_every: 1}}
track: {{to: []}}
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def group(environment: dict[str, str]) -> Iterator[Group]:
    """Hosts that only count steps; they are killed after the test."""
    hosts = Group(environment)
    yield hosts
    for process in hosts.started:
        process.kill()
        process.communicate()
