"""Outcome and cause of failed compilations, from messages of libtpu 0.0.52 and of XLA for CPUs."""

import jax
import jax.numpy as jnp
import pytest

from xlam_jax.planning.failures import classify, is_compiler_error
from xlam_jax.planning.hardware import parse

V4 = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space vmem. Used 32.46M of 16.00M vmem. Exceeded vmem capacity by 16.46M.

Program vmem requirement 32.46M:
    scoped           32.46M

  Largest program allocations in vmem:

  1. Size: 16.00M
     Operator: op_name="jit(<lambda>)/jit(gmm)/pallas_call"
     Shape: u8[16777216]{0}
     XLA label: gmm.1 = custom-call(get-tuple-element.112, pad_add_fusion.1, dynamic_slice.2, ...(+3)), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[], s32[3]{0}, s32[5]{0}, s32[5]{0}, s32[1]{0}, bf16[2048,4096]{1,0}, bf16[2,4096,4096]{2,1,0}}, frontend_attr
     Allocation type: scoped
"""  # noqa: E501
V5 = """RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:
Ran out of memory in memory space vmem while allocating on stack for %gmm.1 = bf16[16384,14336]{1,0:T(8,128)(2,1)} custom-call(%get-tuple-element.122, %x.1, %w.1), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[], s32[9]{0}, s32[1]{0}, bf16[16384,4096]{1,0}, bf16[8,4096,14336]{2,1,0}}, frontend_attributes={kernel_metadata={}}. Scoped allocation with size 17.00M and limit 16.00M exceeded scoped vmem limit by 1.00M. It should not be possible to run out of scoped vmem -
See https://openxla.org/xla/errors/error_1001 for more details."""  # noqa: E501
HBM = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.10G of 15.75G hbm. Exceeded hbm capacity by 4.35G.

Total hbm usage >= 20.35G:
"""  # noqa: E501
CPU = "INTERNAL: Unsupported element type for DotThunk::Execute: BF16 x BF16 = F32\nmore"


@pytest.mark.parametrize(
    ("message", "outcome", "cause"),
    [
        (
            V4,
            "kernel-memory",
            "the kernel gmm.1 (bf16[2048,4096], bf16[2,4096,4096]) needs 32.46M of VMEM, whose limit is 16.00M",
        ),
        (
            V5,
            "kernel-memory",
            "the kernel gmm.1 (bf16[16384,4096], bf16[8,4096,14336] → bf16[16384,14336]) needs 17.00M of VMEM, "
            "whose limit is 16.00M",
        ),
        (
            HBM,
            "device-memory",
            "Ran out of memory in memory space hbm. Used 20.10G of 15.75G hbm. Exceeded hbm capacity by 4.35G.",
        ),
        (CPU, "compiler-error", "INTERNAL: Unsupported element type for DotThunk::Execute: BF16 x BF16 = F32"),
        ("", "compiler-error", "RuntimeError"),
    ],
)
def test_a_message_has_a_cause(message: str, outcome: str, cause: str):
    assert classify(RuntimeError(message)) == (outcome, cause)


@pytest.mark.usefixtures("offline_compiler")
def test_the_compiler_reports_too_little_device_memory():
    chip = jax.sharding.SingleDeviceSharding(parse("v5e:1x1").devices()[0])
    long = jax.ShapeDtypeStruct((2**17,), jnp.float32, sharding=chip)
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(lambda x: jnp.sort(jnp.outer(x, x), axis=1)).lower(long).compile()
    assert is_compiler_error(refused.value)
    outcome, cause = classify(refused.value)
    assert outcome == "device-memory"
    assert cause.startswith("Ran out of memory on HBM, the total memory required for HLO")
    assert cause.endswith("exceeds available HBM (15.75G). HLO module: jit__lambda.")


def test_a_bug_of_this_project_is_not_a_compiler_error():
    assert not is_compiler_error(TypeError("no such argument"))
