"""The TPU library on machines without a TPU: only `plan` loads it."""

import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support import ROOT

from xlam_jax import tpu_library

pytestmark = pytest.mark.skipif(
    tpu_library.has_tpu() or not any(importlib.metadata.distributions(name="libtpu")),
    reason="needs libtpu, and a machine without a TPU",
)
LOADED = """
import atexit, sys
from pathlib import Path

def check():
    if "libtpu.so" in Path("/proc/self/maps").read_text():
        print("libtpu was loaded", file=sys.stderr, flush=True)

atexit.register(check)
"""


@pytest.fixture
def unset(environment: dict[str, str]) -> dict[str, str]:
    """The environment of a user who has set no variables: JAX chooses the platform."""
    return {
        name: value
        for name, value in environment.items()
        if name not in ("JAX_PLATFORMS", tpu_library.PATH) and "TPU_" not in name
    } | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("accel0", True),
        ("accel/accel0", True),
        ("vfio/0", True),
        ("vfio/vfio", False),  # there wherever its module is loaded
        ("null", False),
    ],
)
def test_a_tpu_is_known_by_its_device_files(tmp_path: Path, file: str, expected: bool):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    assert tpu_library.has_tpu(tmp_path) == expected


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package in the state just after JAX imported it, without a choice of platforms."""
    package = ModuleType("libtpu")
    monkeypatch.setitem(sys.modules, "libtpu", package)
    monkeypatch.setattr(tpu_library, "_hidden", {})
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv(tpu_library.PATH, "/somewhere")
    return package


@pytest.mark.parametrize("variable", ["JAX_PLATFORMS", "JAX_FORCE_TPU_INIT"])
def test_what_the_user_says_is_left_alone(installed: ModuleType, monkeypatch: pytest.MonkeyPatch, variable: str):
    monkeypatch.setenv(variable, "tpu")
    tpu_library.hide()
    assert sys.modules["libtpu"] is installed
    assert os.environ[tpu_library.PATH] == "/somewhere"


def test_a_tpu_is_left_alone(installed: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tpu_library, "has_tpu", lambda: True)
    tpu_library.hide()
    assert sys.modules["libtpu"] is installed


@pytest.mark.usefixtures("installed")
def test_what_is_hidden_is_shown_again():
    tpu_library.hide()
    with pytest.raises(ImportError):
        importlib.import_module("libtpu")
    assert tpu_library.PATH not in os.environ
    tpu_library.show()
    assert "libtpu" not in sys.modules
    assert os.environ[tpu_library.PATH] == "/somewhere"


def test_jax_starts_without_it(unset: dict[str, str]):
    program = f"{LOADED}\nimport converters, jax, xlam_jax\nprint(jax.default_backend())"
    done = subprocess.run(
        [sys.executable, "-c", program], env=unset, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


@pytest.mark.slow
def test_no_command_loads_it(unset: dict[str, str], tiny_config: Path, tmp_path: Path):
    run, hf = tmp_path / "run", tmp_path / "hf"
    request = ROOT / "examples/quickstart/request.json"
    for module, *arguments in (
        ("xlam_jax.train", "--config", tiny_config, f"output_dir={run}", "train.steps=4", "--profile", "2:3"),
        ("converters.orbax_to_hf", "--checkpoint", run, "--out", hf),
        ("converters.hf_to_orbax", "--hf", hf, "--out", tmp_path / "orbax"),
        ("xlam_jax.generate", "--model", hf, "--messages", request, "--max-new-tokens", "2"),
        ("xlam_jax.report", run, "--out", tmp_path / "report.html"),
        ("xlam_jax.data", "stats", "--config", tiny_config, "--out", tmp_path / "stats.html"),
        ("xlam_jax.plan", "--config", tiny_config, "--topology", "gpu:h100:1", "train.batch_size=4"),
    ):
        program = f"{LOADED}\nimport runpy\nsys.argv = sys.argv[1:]\nrunpy.run_module(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-c", program, module, *map(str, arguments)]
        done = subprocess.run(command, env=unset, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{module}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        for complaint in ("libtpu", "Failed to find host bounds", "TPU_"):
            assert complaint not in done.stdout + done.stderr, f"{module}\n{done.stderr}"
    assert list((run / "profile").rglob("*.xplane.pb"))
