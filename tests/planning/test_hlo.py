"""Figures parsed from compiled modules: of this machine's compiler, and from text in the format of the TPU compiler."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from xlam_jax.planning.hlo import Module, Totals

ALONE = {"data": 1, "fsdp": 1, "tensor": 1}


def totals_of(function: Callable[..., Any], *arguments: Any) -> Totals:
    compiled = jax.jit(function).lower(*arguments).compile()
    text = compiled.as_text()
    assert text
    return Module(text).totals(ALONE, lambda *_: None)


def ones(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def test_products():
    assert totals_of(lambda a, b: a @ b, ones(6, 5), ones(5, 7)).flops == 2 * 6 * 5 * 7


def test_nested_loops_are_multiplied_by_their_trip_counts():
    def inner(x, w):
        return x @ w, None

    def outer(x, ws):
        return lax.scan(inner, x, ws)[0], None

    totals = totals_of(lambda x, w: lax.scan(outer, x, w)[0], ones(8, 8), ones(3, 20, 8, 8))
    assert totals.flops == 3 * 20 * 2 * 8**3
    assert totals.unknown_loops == 0


def test_a_loop_of_unknown_length_is_counted_once_and_reported():
    def function(x, n):
        return lax.while_loop(lambda carry: carry[1] < n, lambda carry: (carry[0] @ x, carry[1] + 1), (x, 0))[0]

    totals = totals_of(function, ones(8, 8), jnp.int32(5))
    assert (totals.flops, totals.unknown_loops) == (2 * 8**3, 1)


def test_the_most_expensive_side_of_a_branch_counts():
    def function(x, index):
        return lax.switch(index, [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x], x)

    assert totals_of(function, ones(8, 8), jnp.int32(0)).flops == 2 * 2 * 8**3


@pytest.mark.parametrize(
    ("stride", "padding", "spread", "pairs"),
    [(1, (0, 0), 1, 8 * 3), (2, (0, 0), 1, 4 * 3), (1, (1, 1), 1, 8 * 3 + 2 * 2), (1, (0, 0), 2, 9 * 2 + 8)],
)
def test_convolutions_do_not_count_padding(stride: int, padding: tuple[int, int], spread: int, pairs: int):
    source, kernel = ones(2, 10, 4), ones(3, 4, 5)  # b0f, 0io

    def function(x, w):
        return lax.conv_general_dilated(
            x, w, (stride,), [padding], lhs_dilation=(spread,), dimension_numbers=("NWC", "WIO", "NWC")
        )

    assert totals_of(function, source, kernel).flops == 2 * 2 * 4 * 5 * pairs


def test_bytes_of_a_fusion_are_its_operands_and_results():
    totals = totals_of(lambda x: jnp.sin(x) * 2 + 1, ones(1000))
    assert totals.bytes == 2 * 4000


def test_bytes_of_a_loop_that_reads_slices():
    """Each iteration reads the weights of its layer, not those of all layers."""
    totals = totals_of(lambda x, ws: lax.scan(lambda x, w: (x + w, None), x, ws)[0], ones(1000), ones(64, 1000))
    assert 64 * 3 * 4000 <= totals.bytes <= 64 * 8 * 4000


TPU = """HloModule jit_step

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %all-gather-start.1 = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%x), channel_id=1, \
replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true
  %all-gather-done.1 = bf16[32,16]{1,0} all-gather-done(%all-gather-start.1)
  %reduce-scatter.2 = bf16[8,16]{1,0} reduce-scatter(%all-gather-done.1), channel_id=2, \
replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, to_apply=%sum
  %send = bf16[8,16]{1,0} collective-permute(%x), channel_id=3, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  ROOT %both = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%next, %send)
}

%condition (p.1: (s32[], bf16[8,16])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: bf16[8,16]) -> bf16[8,16] {
  %x.1 = bf16[8,16]{1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%zero, %x.1)
  %while.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body
  %last = bf16[8,16]{1,0} get-tuple-element(%while.1), index=1
  %all-reduce.3 = bf16[8,16]{1,0} all-reduce(%last), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  %gmm.7 = bf16[8,32]{1,0} custom-call(%all-reduce.3), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"1024","bytes_accessed":"99999"}}}
  %splash_mha_fwd.1 = bf16[8,16]{1,0} custom-call(%last), custom_call_target="tpu_custom_call", backend_config={}
  ROOT %done = bf16[8,16]{1,0} add(%splash_mha_fwd.1, %last)
}
"""


def test_collectives_by_kind_and_axis():
    mesh = {"data": 2, "fsdp": 4, "tensor": 1}
    totals = Module(TPU).totals(mesh, lambda kernel, _: 500.0 if kernel.name.startswith("splash") else None)
    assert {(item.kind, item.axes): (item.bytes, item.times) for item in totals.collectives} == {
        ("all-gather", ("fsdp",)): (32 * 16 * 2 * 3 // 4, 12),
        ("reduce-scatter", ("data",)): (32 * 16 * 2 // 2, 12),
        ("collective-permute", ("fsdp",)): (8 * 16 * 2, 12),
        ("all-reduce", ("data", "fsdp")): (8 * 16 * 2 * 2 * 7 // 8, 1),
    }
    assert totals.flops == 1024 + 500
    assert totals.kernels == {"gmm": 1, "splash_mha_fwd": 1}
    assert totals.unknown_loops == 0


GPU = r"""
HloModule step

ENTRY %main (x: bf16[64,32]) -> f32[64,16] {
  %x = bf16[64,32]{1,0} parameter(0)
  %w = bf16[16,32]{1,0} parameter(1)
  %rows = s32[4]{0} parameter(2)
  %experts = bf16[4,32,48]{2,1,0} parameter(3)
  %gemm.1 = (f32[64,16]{1,0}, s8[33554432]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %pallas_call.7 = f32[64,48]{1,0} custom-call(%rows, %x, %experts), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(step)/jvp()/grouped_product/pallas_call"}, backend_config={ir = "ML\EF(\22) -> (%x"}
  ROOT %out = f32[64,16]{1,0} get-tuple-element(%gemm.1), index=0
}
"""


def test_products_and_kernels_of_a_gpu():
    seen = []
    totals = Module(GPU).totals({"data": 1}, lambda kernel, operands: seen.append((kernel.kernel, operands)))
    assert totals.flops == 2 * 64 * 16 * 32
    assert totals.kernels == {"grouped_product": 1}
    assert [shape.sizes for shape in dict(seen)["grouped_product"]] == [(4,), (64, 32), (4, 32, 48)]


LOOP = """
HloModule step

%less (i: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %limit = s32[] constant(5)
  ROOT %compare = pred[] compare(%i, %limit), direction=LT
}

%condition (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p), index=0
  ROOT %loop_compare_fusion = pred[] fusion(%i.1), kind=kLoop, calls=%less
}

%body (p.1: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.1), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%p.1), index=1
  %square = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %both = (s32[], f32[8,16]{1,0}) tuple(%i.2, %x)
}

ENTRY %main (x.1: f32[8,16]) -> f32[8,16] {
  %x.1 = f32[8,16]{1,0} parameter(0)
  %first = s32[] constant(2)
  %copy = s32[] copy(%first)
  %start = (s32[], f32[8,16]{1,0}) tuple(%copy, %x.1)
  %while.1 = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,16]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_a_loop_with_a_fused_condition_and_another_first_value():
    totals = Module(LOOP).totals({"data": 1}, lambda *_: None)
    assert totals.unknown_loops == 0
    assert totals.flops == (5 - 2) * 2 * 8 * 8 * 16
