"""The import contract holds, its diagram is the documented one, and the checker finds each kind of violation."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import layers


def test_the_contract_holds():
    assert layers.violations() == []


def test_architecture_shows_the_layers():
    done = subprocess.run(
        [sys.executable, "tools/layers.py", "--diagram"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "text", "rule"),
    [
        ("xlam_jax/data/a.py", "from xlam_jax.training import b\n", "upward import"),
        ("xlam_jax/data/a.py", "def f():\n    import xlam_jax.training.b\n", "upward import"),
        ("xlam_jax/data/a.py", "import xlam_jax.weights.b\n", "upward import"),
        ("xlam_jax/training/a.py", "from xlam_jax.training import b\n", "cycle"),
        ("xlam_jax/training/a.py", "from xlam_jax.data.b import _name\n", "private name"),
        ("xlam_jax/training/a.py", "from xlam_jax.data import b\nb._name()\n", "private name"),
        ("xlam_jax/data/a.py", "SIZE = 1\nSIZE = 2\n", "redefined constant"),
        ("xlam_jax/data/a.py", "_SIZE: int = 1\n_SIZE = 2\n", "redefined constant"),
        ("xlam_jax/data/__main__.py", "from xlam_jax.training import b\n", None),
        ("xlam_jax/training/a.py", "import xlam_jax.data.b\n", None),
    ],
)
def test_each_kind_of_violation_is_found(tmp_path: Path, file: str, text: str, rule: str | None):
    for package in ("xlam_jax/data", "xlam_jax/training", "xlam_jax/weights"):
        (tmp_path / package).mkdir(parents=True)
        for name in ("__init__", "b"):
            (tmp_path / package / f"{name}.py").write_text("")
    (tmp_path / "xlam_jax/__init__.py").write_text("")
    (tmp_path / "xlam_jax/training/b.py").write_text("import xlam_jax.training.a\n" if rule == "cycle" else "")
    (tmp_path / file).write_text(text)
    assert [violation.rule for violation in layers.violations(tmp_path)] == [rule] * (rule is not None)


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "README.md", "CONTRIBUTING.md"])
def test_named_files_exist(page: str):
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|\w+\.(?:py|md))`", (ROOT / page).read_text(encoding="utf-8"))
    paths = [name for name in named if "NAME" not in name and not name.startswith(("runs/", "hf/", "tensorboard/"))]
    assert [name for name in paths if not any((ROOT / top / name).exists() for top in ("", "xlam_jax"))] == []
