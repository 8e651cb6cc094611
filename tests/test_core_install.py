"""The core works with what it declares and nothing else: no torch, no vllm, no test tools."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from support import ROOT, Commands, train_losses


def core_distributions() -> set[str]:
    """Returns the names of the distributions that `pip install xlam_jax` installs, from the requirements of the
    installed ones."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert declared
    waiting = [Requirement(one) for one in re.findall(r'"([^"]+)"', declared[1])]
    required: set[str] = set()
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        required.add(requirement.name)
        for text in metadata.requires(requirement.name) or []:
            needed = Requirement(text)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return required


def linked(distributions: set[str], folder: Path) -> None:
    """Fills `folder` with links to the files of these distributions, as a site-packages folder with nothing else."""
    for name in distributions:
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            link = folder / top
            source = Path(str(distribution.locate_file(top)))
            if link.is_symlink() or not source.exists():
                continue
            link.symlink_to(source)


def test_core_trains_exports_and_answers_without_torch_and_vllm(commands: Commands, tiny_config: Path, tmp_path: Path):
    site = tmp_path / "site"
    site.mkdir()
    distributions = core_distributions()
    assert not {name.lower() for name in distributions} & {"torch", "vllm", "pytest", "tensorboard"}
    linked(distributions, site)
    environment = {**commands.environment, "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)])}

    def run(*arguments: object) -> str:
        # -S disables the real site-packages, so that only the links are visible.
        command = [sys.executable, "-S", *map(str, arguments)]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    absent = "import importlib.util as u; print([n for n in ('torch', 'vllm', 'pytest') if u.find_spec(n)])"
    assert run("-c", absent).strip() == "[]"
    for folder in ("configs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    run("-m", "xlam_jax.train", "--config", tiny_config, "output_dir=run")
    assert list(train_losses(tmp_path / "run")) == list(range(1, 11))
    run("-m", "converters.orbax_to_hf", "--checkpoint", "run", "--out", "hf")
    request = ROOT / "examples/quickstart/request.json"
    assert '"content"' in run("-m", "xlam_jax.generate", "--model", "hf", "--messages", request, "--max-new-tokens", 4)
