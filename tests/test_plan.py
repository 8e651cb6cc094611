"""`python -m xlam_jax.plan`: figures from modules of the TPU compiler, compared with lower bounds and estimates."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support import COMPILER, ROOT, Commands

from xlam_jax import config as configs
from xlam_jax import plan as plans
from xlam_jax.planning.hardware import parse
from xlam_jax.training import cost

PLAN = "xlam_jax.plan"
LAYERS = 5  # more than are unrolled
SMALL = (
    f"model.overrides={{hidden_size: 512, head_dim: 128, intermediate_size: 512, num_hidden_layers: {LAYERS}}}",
    "model.remat=full",
    "model.compute_dtype=bfloat16",
    "data.sequence_length=512",
    "train.batch_size=8",
    "train.microbatches=1",
)
QUICKSTART = ("--config", "configs/quickstart.yaml")
ROWS_OF_4096 = ("data.sequence_length=4096", "train.microbatches=1")


def planned(commands: Commands, *arguments: object) -> dict[str, Any]:
    """Returns a plan as JSON."""
    return json.loads(commands.run(PLAN, *arguments, "--json", limit=1800, **COMPILER).stdout)


def check(plan: dict[str, Any], config: Path, overrides: Sequence[str], *, remat_overhead: float) -> None:
    """Checks properties of every layout whose only axis is fsdp."""
    assert plan["compiled"]
    assert plan["fits"]
    assert plan["unknown_loops"] == 0
    # computed from the config alone, and read from the module
    assert plan["estimated_arguments"] == pytest.approx(plan["arguments"], rel=0.05)
    assert plan["estimated_flops"] == pytest.approx(plan["flops"], rel=0.05)
    # only remat recomputes: a replicated activation would be computed more often
    assert plan["model_flops"] <= plan["flops"] <= remat_overhead * plan["model_flops"]
    # weights are gathered forward and backward, gradients are scattered once, and nothing else is exchanged
    resolved = configs.load(config, list(overrides))
    trained = sum(cost.trainable_sizes(resolved.model).values())
    shared = (plan["mesh"]["fsdp"] - 1) / plan["mesh"]["fsdp"]
    gathered, scattered = (plan["exchanges"].get(f"{kind} fsdp", 0.0) for kind in ("all-gather", "reduce-scatter"))
    reduced = sum(size for name, size in plan["exchanges"].items() if name.startswith("all-reduce"))
    assert set(plan["exchanges"]) <= {"all-gather fsdp", "reduce-scatter fsdp", "all-reduce fsdp"}
    assert gathered + scattered + reduced <= 1.1 * shared * (2 * 2 * plan["parameters"] + 4 * trained)
    # no large part is lost when the module is read
    assert gathered >= 0.9 * shared * 2 * plan["parameters"]
    assert scattered + reduced >= 0.9 * shared * 4 * trained


def test_a_small_step_compiled_for_a_tpu(commands: Commands):
    mesh = ("--topology", "v5e:2x2", "--mesh", "fsdp=4")
    plan = planned(commands, *QUICKSTART, *mesh, *SMALL)
    check(plan, ROOT / "configs/quickstart.yaml", SMALL, remat_overhead=1.45)
    assert plan["kernels"] == "attention: splash; experts: megablox"


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, offline_compiler: None) -> list[int]:
    """The first plan compiles a product whose tile is too large for a kernel on a v5e instead of the whole step, so
    that the real compiler refuses it; further plans compile something small. The list's number counts down."""
    left = [1]

    def lower(layout: Any, *arrays: Any) -> Any:
        from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

        left[0] -= 1
        chip = jax.sharding.SingleDeviceSharding(layout.mesh.devices.flat[0])
        sizes = ((16384, 4096), (8, 4096, 14336))
        x, weight = (jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=chip) for size in sizes)
        rows_E = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=chip)
        if left[0] < 0:
            return jax.jit(lambda rows: rows - left[0]).lower(rows_E)
        return jax.jit(partial(gmm, preferred_element_type=jnp.bfloat16, tiling=(512, 4096, 512))).lower(
            x, weight, rows_E
        )

    monkeypatch.setattr("xlam_jax.training.setup.lower_step", lower)
    return left


NEEDS = "(bf16[16384,4096], bf16[8,4096,14336] → bf16[16384,14336]) needs 17.00M of VMEM, whose limit is 16.00M"


@pytest.mark.usefixtures("refused")
def test_a_kernel_that_does_not_compile_is_named(commands: Commands):
    text = commands.call(PLAN, *QUICKSTART, "--topology", "v5e:2x2", "--mesh", "fsdp=4", *SMALL, code=3).stdout
    lines = {line[:16].strip(): line[16:] for line in text.splitlines()[1:] if line[0] != " "}
    assert lines["figures"].startswith("computed: compilation failed after ")
    assert re.fullmatch(rf"the kernel gmm[.\d]* {re.escape(NEEDS)}; set model.experts or .*", lines["not compiled"])
    assert {
        "layout",
        "kernels",
        "batch",
        "parameters",
        "memory",
        "FLOPs",
        "minimum time",
        "utilization",
    } <= lines.keys()
    assert "does not fit" not in text


@pytest.mark.slow
@pytest.mark.usefixtures("refused")
def test_the_outcome_of_a_failed_compilation_as_json(commands: Commands):
    arguments = (*QUICKSTART, "--topology", "v5e:2x2", "--mesh", "fsdp=4", "--json", *SMALL)
    plan = json.loads(commands.call(PLAN, *arguments, code=3).stdout)
    assert (plan["outcome"], plan["compiled"], plan["fits"]) == ("kernel-memory", False, None)
    assert NEEDS in plan["cause"]
    assert plan["step_time"] > 0


@pytest.mark.slow
def test_a_search_skips_layouts_that_do_not_compile(commands: Commands, refused: list[int]):
    result = commands.call(PLAN, *QUICKSTART, "--topology", "v5e:2x2", "--search", *SMALL)
    skipped = [line for line in result.stderr.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 1
    assert NEEDS in skipped[0]
    assert refused == [1 - 4]
    rows = result.stdout.splitlines()
    assert sum(row.endswith("  compiled") for row in rows) == 3
    assert "kernel-memory" not in result.stdout


@pytest.mark.slow
def test_a_step_larger_than_the_device_does_not_fit(commands: Commands):
    rows = [*SMALL[:-2], "train.batch_size=65536", "train.microbatches=1"]
    plan = planned(commands, *QUICKSTART, "--topology", "v5e:1x1", *rows)
    assert (plan["outcome"], plan["compiled"], plan["fits"]) == ("device-memory", False, False)
    assert "(15.75G)" in plan["cause"]


@pytest.mark.parametrize(
    ("outcome", "cause", "fits", "line"),
    [
        (
            "kernel-memory",
            "the kernel gmm.1 needs 17.00M of VMEM",
            None,
            "not compiled    the kernel gmm.1 needs 17.00M",
        ),
        ("compiler-error", "INTERNAL: broken", None, "not compiled    the compiler failed: INTERNAL: broken"),
        ("device-memory", "Used 20G of 15.75G hbm", False, "                does not fit: Used 20G of 15.75G hbm"),
    ],
)
def test_a_failed_compilation_is_reported_in_full(
    monkeypatch: pytest.MonkeyPatch, outcome: str, cause: str, fits: bool | None, line: str
):
    monkeypatch.chdir(ROOT)
    resolved = configs.load(ROOT / QUICKSTART[1], ["train.batch_size=8", *SMALL[:4], "train.microbatches=1"])
    chip = parse("gpu:h100:1")
    computed = plans.plan(resolved, chip, plans.make_layout(resolved, chip))
    failed = replace(computed, outcome=outcome, cause=cause, compile_seconds=2.0)
    text = plans.format_plan(failed, chip).splitlines()
    assert any(each.startswith(line) for each in text)
    for name in ("figures", "FLOPs", "minimum time", "utilization"):
        assert any(each.startswith(name) for each in text)
    said = plans.as_json(failed)
    assert (said["outcome"], said["cause"], said["fits"], said["compiled"]) == (outcome, cause, fits, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "topology", "chips", "overrides", "remat_overhead"),
    [
        # 4/3 is the minimum of full remat if all pairs of attention are computed; splash skips half of them.
        ("mixtral_8x7b_sft", "v5p:4x4x4", 64, ["model.remat=full"], 1.36),
        ("mixtral_8x7b_sft", "v5p:4x4x4", 64, ["model.remat=dots"], 1.15),
        ("mixtral_8x22b_sft", "v5p:4x8x8", 256, [], 1.36),
        ("mixtral_8x7b_lora", "v5e:4x4", 16, [], 1.5),
        ("mixtral_8x7b_lora", "v6e:4x4", 16, [], 1.5),
        ("mistral_7b_lora", "v5e:2x4", 8, ["data.streams=8"], 1.5),
        ("mistral_7b_sft", "v5e:4x4", 16, ["model.remat=full"], 1.36),
    ],
)
def test_presets_compiled_for_slices(
    commands: Commands, preset: str, topology: str, chips: int, overrides: list[str], remat_overhead: float
):
    config = ROOT / f"configs/{preset}.yaml"
    changed = [*overrides, *ROWS_OF_4096, f"train.batch_size={chips}"]
    plan = planned(commands, "--config", config, "--topology", topology, "--mesh", f"fsdp={chips}", *changed)
    check(plan, config, changed, remat_overhead=remat_overhead)


def test_a_step_compiled_for_cpus_as_a_person_reads_it(commands: Commands):
    mesh = ("--topology", "cpu:2", "--mesh", "tensor=2")
    said = commands.run(PLAN, *QUICKSTART, *mesh, *SMALL, "train.trainable=lora").stdout
    assert "layout          tensor 2, remat full, 1 microbatch\n" in said
    assert "figures         compiled in" in said
    assert "batch           8 rows of 512 tokens per step\n" in said
    assert "exchange        all-reduce tensor" in said
    assert "times           unknown" in said


def test_gpus_are_computed_and_it_says_so(commands: Commands):
    said = commands.call(PLAN, *QUICKSTART, "--estimate", "--topology", "gpu:h100:16", "--mesh", "data=2,fsdp=8",
                         *SMALL[:-2], "train.batch_size=16", "train.microbatches=1").stdout  # fmt: skip
    assert "computed, not compiled" in said
    assert "all-reduce data" in said
    assert "all-gather fsdp" in said
    assert "of 60.00 GB (75% of 80.00 GB, by JAX's XLA_CLIENT_MEM_FRACTION): fits" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fsdp=2"], "attention: pallas; experts: triton"),
        (["fsdp=2", "model.attention=xla", "model.experts=xla"], "attention: xla; experts: xla"),
        (["expert=2"], "experts: xla (triton is not used: mesh.expert is 2: it needs all experts on each device"),
        (["context=2"], "attention: pallas; experts: triton"),
        (["context=2", "model.overrides.sliding_window=100"], "attention: pallas; experts: triton"),
        (
            ["context=2", "data.sequence_length=640"],
            "attention: xla (pallas is not used: data.sequence_length 640 /",
        ),
        (
            ["fsdp=2", "model.compute_dtype=float32"],
            "attention: xla (pallas is not used: model.compute_dtype is",
        ),
        (["fsdp=2", "model.overrides.head_dim=24"], "attention: xla (pallas is not used: the model's head size is 24"),
        (["fsdp=2", "data.sequence_length=500"], "attention: xla (pallas is not used: data.sequence_length 500 is"),
    ],
)
def test_kernels_are_chosen_and_named(commands: Commands, arguments: list[str], expected: str):
    small = (*QUICKSTART, "--estimate", "--topology", "gpu:h100:2", "train.batch_size=8", "train.microbatches=1")
    said = commands.call(PLAN, *small, "model.compute_dtype=bfloat16", "--mesh", *arguments).stdout
    assert expected in next(line for line in said.splitlines() if line.startswith("kernels "))


def test_search_ranks_layouts(commands: Commands):
    said = commands.call(PLAN, *QUICKSTART, "--estimate", "--topology", "gpu:h100:4", "--search", *SMALL[:-1])
    head, *rows = said.stdout.splitlines()[1:]
    assert head.split() == ["layout", "memory", "FLOPs", "/", "model", "step", "utilization", "figures"]
    assert len(rows) == 21
    assert rows[-1].startswith("and ")
    plans = json.loads(
        commands.call(
            PLAN, *QUICKSTART, "--estimate", "--topology", "gpu:h100:4", "--search", "--json", *SMALL[:-1]
        ).stdout
    )
    times = [plan["step_time"] for plan in plans]
    assert times == sorted(times)
    assert all(plan["fits"] for plan in plans)
    meshes = {tuple(size for size in plan["mesh"].values() if size > 1) for plan in plans}
    assert meshes == {(4,), (2, 2)}
    assert {plan["remat"] for plan in plans} == {"none", "dots", "minimal", "full"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5p:4x4"], "--topology v5p:4x4: v5p has no slice '4x4'; known are 2x2x1"),
        (["--topology", "cpu:2", "--mesh", "fdsp=2"], "--mesh: 'fdsp=2' is not AXIS=N; axes are data, fsdp"),
        (
            ["--topology", "gpu:h100:2", "--mesh", "fsdp=4", "train.batch_size=4"],
            "mesh: data 1 × fsdp 4 × expert 1 × context 1 × tensor 1 does not fit the 2 gpu device(s)",
        ),
        (["--topology", "cpu:8", "--mesh", "tensor=8"], "num_key_value_heads (2) must be a multiple of"),
        (["--topology", "cpu:8", "--mesh", "expert=8", "train.batch_size=8"], "number of experts (4) must be"),
        (["--topology", "cpu:2", "--mesh", "fsdp=2", "train.batch_size=3"], "train.batch_size (3) must be"),
        (["--topology", "cpu:3", "--mesh", "context=3"], "data.sequence_length"),
        (["--topology", "gpu:h100:1", "model.attention=splash"], "model.attention is splash, and it runs on"),
        (["--topology", "cpu:1", "model.experts=triton"], "model.experts is triton, and it runs on"),
        (["--topology", "gpu:h100:64", "--search", "train.batch_size=1"], "--search: no mesh of 64 devices divides"),
    ],
)
def test_wrong_input(commands: Commands, arguments: list[str], message: str):
    assert message in commands.fails(PLAN, *QUICKSTART, *arguments, "train.microbatches=1")


def test_without_libtpu_it_says_what_to_install(commands: Commands, tmp_path: Path):
    (tmp_path / "libtpu.py").write_text("raise ImportError('No module named libtpu')\n", encoding="utf-8")
    hidden = os.pathsep.join([str(tmp_path), str(ROOT)])
    arguments = (*QUICKSTART, "--topology", "v5e:2x2", "--mesh", "fsdp=4", *SMALL)
    nowhere: dict[str, Any] = {"TPU_LIBRARY_PATH": str(tmp_path / "none"), "XLA_FLAGS": ""}
    said = commands.run(PLAN, *arguments, code=2, PYTHONPATH=hidden, **nowhere).stderr
    assert "the TPU compiler, libtpu, is not installed; install it with pip install 'xlam_jax[plan]'" in said
