"""Matrix products: operands in the compute dtype, sums in f32, in the forward and the backward pass.

The backward pass rounds the cotangent to the compute dtype too, so that all three products of a layer run on the fast
path of the hardware. The weight's gradient is returned in f32 and is not rounded on the way to the optimizer.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from xlam_jax.models.nf4 import NF4, dense
from xlam_jax.parallel import mesh


def project(equation: str, x: jax.Array, weight: jax.Array | NF4, dtype: Any, out: Any = None) -> jax.Array:
    """`einsum(equation, x, weight)` with both cast to `dtype`, summed in f32, returned as `out` (default `dtype`).

    A quantized weight is saved in four bits for the backward pass, and has no gradient.
    """
    return _project(equation, dtype, out or dtype, *mesh.alike(x, weight))


class Adapter(NamedTuple):
    """A low-rank addition to a weight, A·B (Hu et al., 2106.09685): `a` maps the weight's input axes to the rank, `b`
    the rank to its output axes. `b` includes the scale."""

    a: jax.Array
    b: jax.Array


def adapted(
    equation: str,
    x: jax.Array,
    weight: jax.Array | NF4,
    adapter: Adapter | None,
    dtype: Any,
    x_a: jax.Array | None,
    out: Any = None,
) -> jax.Array:
    """`project` with the adapter's product added. `x_a`: the adapter's input after dropout; None if it is `x`."""
    if adapter is None:
        return project(equation, x, weight, dtype, out)
    to_rank, from_rank = low_rank(equation)
    rank = project(to_rank, x if x_a is None else x_a, adapter.a, dtype)
    added = project(from_rank, rank, adapter.b, dtype, out=jnp.float32)
    return (project(equation, x, weight, dtype, out=jnp.float32) + added).astype(out or dtype)


def low_rank(equation: str) -> tuple[str, str]:
    """Returns the two equations of an adapter: for "BTD,DNK->BTNK", "BTD,Dr->BTr" and "BTr,rNK->BTNK"."""
    operands, result = equation.split("->")
    of_x, of_weight = operands.split(",")
    summed = "".join(axis for axis in of_weight if axis in of_x and axis not in result)
    outputs = "".join(axis for axis in of_weight if axis not in summed)
    batch = "".join(axis for axis in result if axis not in outputs)
    return f"{of_x},{summed}r->{batch}r", f"{batch}r,r{outputs}->{result}"


def dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`einsum` of two arrays, summed and returned in f32."""
    einsum = partial(jnp.einsum, equation, preferred_element_type=jnp.float32)
    if x.dtype == jnp.float32:
        return einsum(x, y)
    if _bf16_instructions():
        return jax.lax.platform_dependent(x, y, cpu=partial(_row_major_dot, equation), default=einsum)
    # A CPU without bf16 products converts anyway, and slower. The result is the same: products of two bf16 numbers are
    # exact in f32.
    return jax.lax.platform_dependent(
        x, y, cpu=lambda x, y: einsum(x.astype(jnp.float32), y.astype(jnp.float32)), default=einsum
    )


def _row_major_dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`dot` as [batch, M, K] × [batch, K, N] → [batch, M, N], the only form in which XLA's CPU library (YNNPACK)
    multiplies bf16 numbers.

    XLA keeps the operands of a product in bf16 when the library takes it, and only later merges the transposes around
    it into the product. Then the library no longer takes it, and nothing else can compute it: the run ends with
    "Unsupported element type for DotThunk::Execute: BF16 x BF16 = F32". The layout constraints and the barrier keep
    XLA from merging the transposes, and from converting a transposed operand to f32 first.
    """
    operands, result = equation.split("->")
    of_x, of_y = operands.split(",")
    free = [axis for axis in result if (axis in of_x) != (axis in of_y)]
    if free and free[0] in of_y:  # so that the result needs no transpose
        x, y, of_x, of_y = y, x, of_y, of_x
    batch = [axis for axis in of_x if axis in of_y and axis in result]
    summed = [axis for axis in of_x if axis in of_y and axis not in result]
    rows, columns = ([axis for axis in free if axis in of_operand] for of_operand in (of_x, of_y))
    x = _row_major(x.transpose([of_x.index(axis) for axis in batch + rows + summed]))
    y = _row_major(y.transpose([of_y.index(axis) for axis in batch + summed + columns]))
    n = len(batch)
    x_summed, y_summed = range(n + len(rows), x.ndim), range(n, n + len(summed))
    out = jax.lax.dot_general(x, y, ((x_summed, y_summed), (range(n), range(n))), preferred_element_type=jnp.float32)
    out = jax.lax.optimization_barrier(out)
    return out.transpose([(batch + rows + columns).index(axis) for axis in result])


def _row_major(array: jax.Array) -> jax.Array:
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))


@cache
def _bf16_instructions() -> bool:
    """Whether this machine's CPU has instructions for products of bf16 numbers."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _project(equation: str, dtype: Any, out: Any, x: jax.Array, weight: jax.Array | NF4) -> jax.Array:
    return dot(equation, x.astype(dtype), dense(weight, dtype)).astype(out)


def _forward(equation: str, dtype: Any, out: Any, x: jax.Array, weight: jax.Array | NF4):
    return _project(equation, dtype, out, x, weight), (x, weight)


def _backward(equation: str, dtype: Any, _: Any, saved: tuple[jax.Array, jax.Array | NF4], dy: jax.Array):
    x, weight = saved
    operands, result = equation.split("->")
    of_x, of_weight = operands.split(",")
    dy = _compute_once(dy.astype(dtype))
    dx = dot(f"{result},{of_weight}->{of_x}", dy, dense(weight, dtype)).astype(x.dtype)
    if isinstance(weight, NF4):
        return dx, None
    dw = dot(f"{of_x},{result}->{of_weight}", x.astype(dtype), dy).astype(weight.dtype)
    return dx, dw


def _compute_once(array: jax.Array) -> jax.Array:
    """On a CPU, keeps XLA from fusing a copy of an operand into each of two products, which would compute it twice."""
    return jax.lax.platform_dependent(array, cpu=jax.lax.optimization_barrier, default=lambda same: same)


_project.defvjp(_forward, _backward)
