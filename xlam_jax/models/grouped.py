"""Mixture of experts by a grouped matrix product: megablox, which comes with JAX, on a TPU; `triton` on a GPU.

Assignments (token, expert) are sorted by expert, and one kernel multiplies each expert's rows with its weights, for any
number of rows: no token is dropped, and none is computed twice. The sum over a token's experts is an ordered gather. It
is part of the function here so that the gradient of the gates follows from values that the backward pass computes
anyway, dy·(h W) = (dy Wᵀ)·h, and the experts' outputs are not computed again.

Axes: S tokens, K experts per token, A rows (S × K, in whole tiles), E experts, D model width, F expert width, I inputs,
O outputs, r rank.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from xlam_jax.models import tiles, triton
from xlam_jax.models.linear import Adapter
from xlam_jax.models.moe import Linear, as_inputs, ready, swiglu
from xlam_jax.parallel import mesh, opaque


class KernelOptions(NamedTuple):
    """The static options of the products."""

    kernel: str
    """megablox or triton."""
    dtype: Any
    """The dtype of the operands."""
    frozen: bool
    """Only adapters have gradients; those of the weights are not computed."""
    interpret: bool
    """Run by the interpreter of Pallas, on any machine: for tests."""
    on_chip: int = tiles.SCOPED_VMEM
    """Bytes of on-chip memory that a kernel may use: VMEM of a TPU's core, shared memory of a GPU's block."""


class Groups(NamedTuple):
    """The layout of the rows. Integers only: they have no gradient."""

    assignment_A: jax.Array
    """The assignment of each row; the number of assignments in padding rows."""
    rows_E: jax.Array
    """The number of rows of each expert; experts follow each other."""
    row_SK: jax.Array
    """The row of each assignment; -1 for assignments to no expert."""
    expert_X: jax.Array | None = None
    """The expert of each tile of rows, for triton; the number of experts for a tile without one."""


def group(expert_SK: jax.Array, experts: int, kernel: str) -> Groups:
    """Lays the assignments out in rows, sorted by expert, then by token, and padded to whole tiles.

    `expert_SK`: the expert of each assignment, integers; `experts` means none (padding tokens). `kernel`: megablox or
    triton.

    For triton, padding rows fill each expert's last tile, so that a tile has only one expert.
    """
    expert_A = expert_SK.reshape(-1)
    count = expert_A.size
    rows_E = jnp.sum(expert_A[None, :] == jnp.arange(experts)[:, None], axis=1, dtype=jnp.int32)
    expert_X = None
    if kernel == "triton":
        tile = triton.row_tile(count, experts)
        size_E = -(-rows_E // tile) * tile
        number = jnp.arange(-(-count // tile) + experts)
        expert_X = jnp.sum(number[:, None] >= jnp.cumsum(size_E) // tile, axis=1, dtype=jnp.int32)
        rows = len(number) * tile
    else:
        tile, size_E = tiles.row_tile(count, experts), rows_E
        rows = -(-count // tile) * tile
    order_A = jnp.argsort(expert_A, stable=True).astype(jnp.int32)
    sorted_A = expert_A[order_A]
    # The padding rows of earlier experts shift an expert's rows relative to the order of its assignments.
    shift_E = jnp.cumsum(size_E - rows_E) - (size_E - rows_E)
    place_A = jnp.arange(count, dtype=jnp.int32) + shift_E.at[sorted_A].get(mode="fill", fill_value=0)
    place_A = jnp.where(sorted_A < experts, place_A, rows)
    assignment_A = jnp.full((rows,), count, jnp.int32).at[place_A].set(order_A, mode="drop")
    row_A = jnp.zeros_like(order_A).at[order_A].set(place_A.astype(jnp.int32), unique_indices=True)
    row_SK = jnp.where(expert_SK < experts, row_A.reshape(expert_SK.shape), -1)
    return Groups(assignment_A, size_E, row_SK, expert_X)


def experts_sum(
    x_SD: jax.Array,
    gate_SK: jax.Array,
    w1_EDF: Linear,
    w3_EDF: Linear,
    w2_EFD: Linear,
    where: Groups,
    options: KernelOptions,
) -> jax.Array:
    """Sum over a token's experts of gate × `w2(silu(w1 x) * w3 x)`, [S, D] in f32. w1, w3 and w2 are gate_proj, up_proj
    and down_proj."""
    return _experts_sum(options, *mesh.alike(x_SD, gate_SK, w1_EDF, w3_EDF, w2_EFD), where)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts_sum(options: KernelOptions, x_SD, gate_SK, w1_EDF, w3_EDF, w2_EFD, where: Groups) -> jax.Array:
    return _forward(options, x_SD, gate_SK, w1_EDF, w3_EDF, w2_EFD, where)[0]


def _forward(options: KernelOptions, x_SD, gate_SK, w1_EDF, w3_EDF, w2_EFD, where: Groups):
    x_SD = x_SD.astype(options.dtype)
    w1, w3, w2 = ready(options.dtype, w1_EDF, w3_EDF, w2_EFD)
    x_AD = _rows(x_SD, where.assignment_A // gate_SK.shape[1])
    gate_AF = checkpoint_name(_apply(options, x_AD, w1, where), "hidden")
    up_AF = checkpoint_name(_apply(options, x_AD, w3, where), "hidden")
    y_AD = _apply(options, swiglu(gate_AF, up_AF, options.dtype), w2, where)
    y_SD = jnp.einsum("SKD,SK->SD", _rows(y_AD, where.row_SK).astype(jnp.float32), gate_SK.astype(jnp.float32))
    return y_SD, (x_SD, gate_SK, w1_EDF, w3_EDF, w2_EFD, where, gate_AF, up_AF)


def _backward(options: KernelOptions, saved, dy_SD: jax.Array):
    x_SD, gate_SK, w1_EDF, w3_EDF, w2_EFD, where, gate_AF, up_AF = saved
    w1, w3, w2 = ready(options.dtype, w1_EDF, w3_EDF, w2_EFD)
    token_A = where.assignment_A // gate_SK.shape[1]
    x_AD, dy_AD = _rows(x_SD, token_A), _rows(dy_SD.astype(options.dtype), token_A)
    weight_A1 = _rows(gate_SK.reshape(-1, 1), where.assignment_A).astype(jnp.float32)

    gate, up = gate_AF.astype(jnp.float32), up_AF.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    hidden = silu * up
    # The gradient of the hidden state before the gate; its product with the hidden state is the gate's gradient.
    dhidden = _apply_transposed(options, dy_AD, w2, where)
    dgate_A1 = jnp.sum(dhidden * hidden, axis=1, keepdims=True)
    dgate_SK = _rows(dgate_A1, where.row_SK)[..., 0]
    dhidden *= weight_A1
    dw2 = _weight_gradients(options, (hidden * weight_A1).astype(options.dtype), dy_AD, w2, where)
    dgate_AF = (dhidden * up * (sigmoid + silu * (1 - sigmoid))).astype(options.dtype)
    dup_AF = (dhidden * silu).astype(options.dtype)
    dx_AD = (_apply_transposed(options, dgate_AF, w1, where) + _apply_transposed(options, dup_AF, w3, where)).astype(
        options.dtype
    )
    dx_SD = jnp.sum(_rows(dx_AD, where.row_SK).astype(jnp.float32), axis=1)
    dw1 = _weight_gradients(options, x_AD, dgate_AF, w1, where)
    dw3 = _weight_gradients(options, x_AD, dup_AF, w3, where)
    dws = as_inputs(options.frozen, (dw1, dw3, dw2), (w1_EDF, w3_EDF, w2_EFD))
    return dx_SD.astype(x_SD.dtype), dgate_SK.astype(gate_SK.dtype), *dws, None


_experts_sum.defvjp(_forward, _backward)


def _rows(rows: jax.Array, at: jax.Array) -> jax.Array:
    """Rows by their index; zeros for an index out of range."""
    return rows.at[at].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _apply(options: KernelOptions, x_AI: jax.Array, linear: Linear, where: Groups) -> jax.Array:
    """Each row times the weight of its expert, [A, O]. Padding rows are undefined."""
    if linear.adapter is None:
        return _product(options, x_AI, linear.weight, where, options.dtype)
    rank_Ar = _product(options, x_AI, linear.adapter.a, where, options.dtype)
    y_AO = _product(options, x_AI, linear.weight, where, jnp.float32)
    return (y_AO + _product(options, rank_Ar, linear.adapter.b, where, jnp.float32)).astype(options.dtype)


def _apply_transposed(options: KernelOptions, dy_AO: jax.Array, linear: Linear, where: Groups) -> jax.Array:
    """The gradient of `_apply`'s input, [A, I] in f32."""
    dx_AI = _product(options, dy_AO, linear.weight, where, jnp.float32, transposed=True)
    if linear.adapter is None:
        return dx_AI
    drank_Ar = _product(options, dy_AO, linear.adapter.b, where, options.dtype, transposed=True)
    return dx_AI + _product(options, drank_Ar, linear.adapter.a, where, jnp.float32, transposed=True)


def _weight_gradients(
    options: KernelOptions, x_AI: jax.Array, dy_AO: jax.Array, linear: Linear, where: Groups
) -> Linear:
    """The gradients of the trainable arrays, in f32."""
    dweight = None if options.frozen else _outer(options, x_AI, dy_AO, where)
    if linear.adapter is None:
        return Linear(dweight)
    a, b = linear.adapter
    drank_Ar = _product(options, dy_AO, b, where, options.dtype, transposed=True)
    rank_Ar = _product(options, x_AI, a, where, options.dtype)
    return Linear(dweight, Adapter(_outer(options, x_AI, drank_Ar, where), _outer(options, rank_Ar, dy_AO, where)))


def _product(options: KernelOptions, x_AI, weight, where: Groups, out: Any, *, transposed: bool = False) -> jax.Array:
    """x [A, I] times weight [E, I, O], or [E, O, I] when transposed."""

    if options.kernel == "triton":
        assert where.expert_X is not None
        of_tiles = partial(
            triton.product, out=out, transposed=transposed, shared=options.on_chip, interpret=options.interpret
        )
        return opaque.call(of_tiles, x_AI, weight, where.expert_X)

    def product(x_AI, weight, rows_E):
        from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

        outputs = weight.shape[1 if transposed else 2]
        (rows, inner), width = x_AI.shape, x_AI.dtype.itemsize
        shape = tiles.Shape(rows, inner, outputs, len(rows_E), width, jnp.dtype(out).itemsize)
        tiling = tiles.product_tile(shape, options.on_chip)
        return gmm(x_AI, weight, rows_E, out, tiling, transpose_rhs=transposed, interpret=options.interpret)

    return opaque.call(product, x_AI, weight, where.rows_E)


def _outer(options: KernelOptions, x_AI, dy_AO, where: Groups) -> jax.Array:
    """xᵀ dy over each expert's rows, [E, I, O] in f32; zeros for an expert without rows."""

    def outer(x_AI, dy_AO, rows_E):
        if options.kernel == "triton":
            return triton.outer(x_AI, dy_AO, rows_E, shared=options.on_chip, interpret=options.interpret)
        from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

        (rows, inner), width = x_AI.shape, x_AI.dtype.itemsize
        shape = tiles.Shape(rows, inner, dy_AO.shape[1], len(rows_E), width, 4)
        tiling = tiles.outer_tile(shape, options.on_chip)
        return tgmm(x_AI.T, dy_AO, rows_E, jnp.float32, tiling, interpret=options.interpret)

    return opaque.call(outer, x_AI, dy_AO, where.rows_E)
