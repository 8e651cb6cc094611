"""Options of XLA's compiler: defaults by platform, those of the config, and what XLA refuses."""

from pathlib import Path

import pytest
from support import Commands

from xlam_jax.training import compiler_options as options


def test_options_of_a_platform():
    chosen = {"xla_gpu_autotune_level": 0, "xla_cpu_enable_fast_min_max": True}
    on_gpu = options.options("cuda", chosen)
    assert on_gpu == {**options.DEFAULTS["gpu"], "xla_gpu_autotune_level": 0}
    assert options.options("cpu", chosen) == {"xla_cpu_enable_fast_min_max": True}
    first, *others = options.lines(on_gpu, chosen)
    assert "xla_gpu_enable_latency_hiding_scheduler=true" in first
    assert others == [
        "warning: model.compiler_options.xla_cpu_enable_fast_min_max is not used: it is not an option of this platform"
    ]
    assert options.lines({}, {}) == []
    replaced = options.options("gpu", {"xla_gpu_exclude_nondeterministic_ops": False})
    assert replaced["xla_gpu_exclude_nondeterministic_ops"] is False


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("xla_nosuch", "true", "model.compiler_options.xla_nosuch: XLA refuses it: No such compile option"),
        ("xla_cpu_enable_fast_min_max", "3", "'3' is not a valid bool value"),
    ],
)
def test_xla_refuses_an_option(commands: Commands, tiny_config: Path, tmp_path: Path, option: str, value: str,
                               message: str):  # fmt: skip
    run = f"output_dir={tmp_path / 'run'}"
    said = commands.fails("xlam_jax.train", "--config", tiny_config, run, f"model.compiler_options.{option}={value}")
    assert message in said


def test_an_option_is_used_and_shown(commands: Commands, tiny_config: Path, tmp_path: Path):
    arguments = (f"output_dir={tmp_path / 'run'}", "model.compiler_options.xla_cpu_enable_fast_min_max=false")
    said = commands.call("xlam_jax.train", "--config", tiny_config, "--dry-run", *arguments)
    assert "compiler options: xla_cpu_enable_fast_min_max=false" in said.stdout + said.stderr
