"""Fixtures of all tests: a tiny run, and a way to start the commands as a user does."""

import os
from pathlib import Path

import pytest
from support import ROOT, Commands


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of commands that tests start: compiled programs are shared between them."""
    cache = tmp_path_factory.mktemp("compiled")
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture(scope="session")
def commands(environment: dict[str, str]) -> Commands:
    return Commands(environment)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config that trains a 200,000-parameter Mixtral on two bundled sources, in seconds."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(
        f"""
extends: {ROOT}/configs/quickstart.yaml
model:
  overrides: {{hidden_size: 64, head_dim: 16, intermediate_size: 64, num_hidden_layers: 2, num_local_experts: 4}}
  compute_dtype: float32
data:
  sequence_length: 512
  sources:
    - {{name: hammer, files: [examples/quickstart/hammer.jsonl], weight: 2}}
    - {{name: seal_tools, files: [examples/quickstart/seal_tools.jsonl]}}
  streams: 8
train: {{steps: 10, batch_size: 8, learning_rate: 5.0e-3, warmup_steps: 2, log_every: 1}}
eval: {{every: 5, batches: 1}}
checkpoint: {{every: 3}}
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def trained(commands: Commands, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run of the tiny config, and what the command said. To read, not to write."""
    run = tmp_path_factory.mktemp("trained") / "run"
    return run, commands.run("xlam_jax.train", "--config", tiny_config, f"output_dir={run}").stderr


@pytest.fixture(autouse=True)
def quick_compilation(request: pytest.FixtureRequest):
    """Tiny models compile for seconds and run for milliseconds: compile them without the expensive passes."""
    if request.path.parent.name not in ("models", "training", "converters"):
        yield
        return
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
