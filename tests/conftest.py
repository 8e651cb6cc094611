"""Fixtures of all tests: a tiny run, and a way to start commands like a user."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import HASTILY, ROOT, Commands

COMPILED = "JAX_COMPILATION_CACHE_DIR"
Once = Callable[[str, Callable[[Path], str]], tuple[Path, str]]


def pytest_configure(config: pytest.Config) -> None:
    """Shares compiled programs among all tests of a session, its workers, and the commands that they start."""
    if hasattr(config, "workerinput"):
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    compiled = tempfile.mkdtemp(prefix="compiled-")
    # also Python bytecode: on machines that do not store it, each start compiles 1,700 modules in 10 s
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ |= {
        "PYTHONPYCACHEPREFIX": f"{compiled}/bytecode",
        COMPILED: compiled,
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(10**10),  # with a limit, processes lock the folder when they write to it
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        **({} if os.environ.get("XLA_OPTIMIZED") else HASTILY),
        "HF_HUB_OFFLINE": "1",
    }


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[COMPILED], ignore_errors=True)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Returns `once(name, make)`, which has a folder created by the first worker that needs it, and returns the folder
    and the result of `make`."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name: str, make: Callable[[Path], str]) -> tuple[Path, str]:
        folder, said = shared / name, shared / f"{name}.json"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not said.exists():
                said.write_text(json.dumps(make(folder)), encoding="utf-8")
        return folder, json.loads(said.read_text(encoding="utf-8"))

    return once


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of commands that tests start: without torch, whose import takes longer than all others."""
    path = os.pathsep.join(map(str, (ROOT / "tests/core_only", ROOT, ROOT / "tests")))
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}


@pytest.fixture(scope="session")
def eight_devices(environment: dict[str, str]) -> dict[str, str]:
    """The same, with the CPU split into 8 devices like by `parallel.mesh.split_cpu`."""
    return environment | {"JAX_NUM_CPU_DEVICES": "8", "PJRT_NPROC": "34"}


@pytest.fixture(scope="session")
def commands(environment: dict[str, str]) -> Commands:
    return Commands(environment)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config that trains a 180,000-parameter Mixtral on two bundled sources, in seconds."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(
        f"""
extends: {ROOT}/configs/quickstart.yaml
model:
  overrides: {{hidden_size: 32, num_attention_heads: 2, head_dim: 16, intermediate_size: 64}}
  compute_dtype: float32
data:
  sequence_length: 512
  sources:
    - {{name: hammer, files: [examples/quickstart/hammer.jsonl], weight: 2}}
    - {{name: seal_tools, files: [examples/quickstart/seal_tools.jsonl]}}
  streams: 4
train: {{steps: 10, batch_size: 4, learning_rate: 5.0e-3, warmup_steps: 2, log_every: 1}}
eval: {{every: 5, batches: 1}}
checkpoint: {{every: 3}}
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def trained(commands: Commands, tiny_config: Path, once: Once) -> tuple[Path, str]:
    """The folder of a finished run of the tiny config, and the output of the command. Read-only."""
    return once(
        "trained",
        lambda run: (
            commands.run("xlam_jax.train", "--config", tiny_config, f"output_dir={run}", JAX_LOG_COMPILES="1").stderr
        ),
    )


@pytest.fixture(scope="session")
def exported(commands: Commands, trained: tuple[Path, str], once: Once) -> Path:
    """The finished run as a Hugging Face folder. Read-only."""
    return once(
        "exported",
        lambda folder: commands.run("converters.orbax_to_hf", "--checkpoint", trained[0], "--out", folder).stderr,
    )[0]


@pytest.fixture
def offline_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler for devices that are not here, in this process: without a cache, because what it compiles cannot be
    loaded without the devices."""
    import jax
    import jax.numpy as jnp

    jax.block_until_ready(jnp.zeros(1) + 1)  # XLA has read its own flags now
    monkeypatch.setenv("XLA_FLAGS", "")  # libtpu ends a process whose flags it does not know
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)
