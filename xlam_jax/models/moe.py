"""Dropless mixture of experts: every token reaches its top-k experts, whatever the balance (Mixtral, 2401.04088).

Assignments (token, expert) are sorted by expert. The first `capacity` of each expert run as one batched product, sized
so that a balanced batch fits; what is left over runs in tiles, in a loop that is as long as the imbalance needs. No
token is dropped and no expert computes a token that was not sent to it. The combine is an ordered gather, never a
scatter-add, so that it is the same bits each time on every backend.

Axes: S tokens, A assignments (S × k), E experts, C capacity, R rows of a tile, D model, F expert width.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlam_jax.models.linear import Adapter, dot
from xlam_jax.models.nf4 import dense
from xlam_jax.parallel import mesh

TILE = 128
"""Rows of an overflow tile at most."""


class Route(NamedTuple):
    """Where each assignment goes. Integers only: no gradient flows here."""

    token_EC: jax.Array
    """Token in each slot of the batched product; the token count itself in an unused slot."""
    tile_token_AR: jax.Array
    """Token of each row of each overflow tile; the token count in an unused row. Only `tiles` of them are real."""
    tile_expert_A: jax.Array
    tiles: jax.Array
    """Number of overflow tiles."""
    row_SK: jax.Array
    """Row of the slots, then tiles, laid end to end, that holds each assignment's result; -1 for no result."""


def route(expert_SK: jax.Array, experts: int) -> Route:
    """Lays assignments out; `expert_SK` equal to `experts` means that the token goes nowhere (padding)."""
    tokens, per_token = expert_SK.shape
    assignments = tokens * per_token
    capacity = -(-assignments // experts // 8) * 8
    rows = min(TILE, capacity)
    tile_slots = assignments // rows + experts  # the most that any imbalance can need

    expert_A = expert_SK.reshape(-1)
    order_A = jnp.argsort(expert_A, stable=True)
    count_E = jnp.sum(expert_A[None, :] == jnp.arange(experts)[:, None], axis=1)
    start_E = jnp.cumsum(count_E) - count_E
    sorted_token_A = order_A // per_token

    def token_at(expert: jax.Array, rank: jax.Array) -> jax.Array:
        place = jnp.minimum(start_E[expert] + rank, assignments - 1)
        return jnp.where(rank < count_E[expert], sorted_token_A[place], tokens)

    token_EC = token_at(jnp.arange(experts)[:, None], jnp.arange(capacity)[None, :])
    over_E = jnp.maximum(count_E - capacity, 0)
    tiles_E = -(-over_E // rows)
    tile_end_E = jnp.cumsum(tiles_E)
    tile_A = jnp.arange(tile_slots)
    tile_expert_A = jnp.minimum(jnp.searchsorted(tile_end_E, tile_A, side="right"), experts - 1)
    tile_rank_A = capacity + (tile_A - (tile_end_E - tiles_E)[tile_expert_A]) * rows
    tile_token_AR = token_at(tile_expert_A[:, None], tile_rank_A[:, None] + jnp.arange(rows)[None, :])
    tile_token_AR = jnp.where((tile_A < tile_end_E[-1])[:, None], tile_token_AR, tokens)

    # The inverse of the sort gives each assignment's rank among those of its expert.
    rank_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(assignments, dtype=order_A.dtype), unique_indices=True)
    known_A = jnp.minimum(expert_A, experts - 1)
    rank_A = rank_A - start_E[known_A]
    over_A = rank_A - capacity
    first_tile_row = experts * capacity + (tile_end_E - tiles_E)[known_A] * rows
    row_A = jnp.where(rank_A < capacity, known_A * capacity + rank_A, first_tile_row + over_A)
    row_A = jnp.where(expert_A < experts, row_A, -1)
    return Route(token_EC, tile_token_AR, tile_expert_A, tile_end_E[-1], row_A.reshape(tokens, per_token))


class Linear(NamedTuple):
    """An expert weight [E, I, O] and its adapter, a [E, I, r] and b [E, r, O]."""

    weight: Any
    """An array, or NF4."""
    adapter: Adapter | None = None


def experts_mlp(
    x_SD: jax.Array,
    w1_EDF: Linear,
    w3_EDF: Linear,
    w2_EFD: Linear,
    where: Route,
    dtype: jnp.dtype,
    *,
    frozen: bool = False,
) -> jax.Array:
    """Each assignment's `w2(silu(w1 x) * w3 x)`, shape [S, k, D]; zeros where an assignment goes nowhere.

    With `frozen` weights only adapters have gradients: those of the weights are never made.
    """
    x_SD, w1_EDF, w3_EDF, w2_EFD = mesh.alike(x_SD, w1_EDF, w3_EDF, w2_EFD)
    return _experts_mlp(dtype, frozen, x_SD, w1_EDF, w3_EDF, w2_EFD, where)


def _ready(dtype: jnp.dtype, *linears: Linear) -> tuple[Linear, ...]:
    """The same in the compute dtype."""
    return tuple(
        Linear(dense(one.weight, dtype), jax.tree.map(lambda factor: factor.astype(dtype), one.adapter))
        for one in linears
    )


def _apply(x: jax.Array, linear: Linear, e: str) -> jax.Array:
    """x [C, I] → [C, O] in f32; `e` is "E" for the batched product and "" for a tile."""
    y = dot(f"{e}CI,{e}IO->{e}CO", x, linear.weight)
    if linear.adapter is not None:
        rank = dot(f"{e}CI,{e}Ir->{e}Cr", x, linear.adapter.a).astype(x.dtype)
        y += dot(f"{e}Cr,{e}rO->{e}CO", rank, linear.adapter.b)
    return y


def _apply_backward(x: jax.Array, dy: jax.Array, linear: Linear, frozen: bool, e: str) -> tuple[jax.Array, Linear]:
    """Gradients of x and of what trains, in f32."""
    dx = dot(f"{e}CO,{e}IO->{e}CI", dy, linear.weight)
    dweight = None if frozen else dot(f"{e}CI,{e}CO->{e}IO", x, dy)
    if linear.adapter is None:
        return dx, Linear(dweight)
    a, b = linear.adapter
    drank = dot(f"{e}CO,{e}rO->{e}Cr", dy, b).astype(x.dtype)
    rank = dot(f"{e}CI,{e}Ir->{e}Cr", x, a).astype(x.dtype)
    dx += dot(f"{e}Cr,{e}Ir->{e}CI", drank, a)
    return dx, Linear(dweight, Adapter(dot(f"{e}CI,{e}Cr->{e}Ir", x, drank), dot(f"{e}Cr,{e}CO->{e}rO", rank, dy)))


def _swiglu(gate: jax.Array, up: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # f32 inside whatever the compute dtype: one rounding, and faster on a CPU than bf16 arithmetic.
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(dtype)


def _rows(x_SD: jax.Array, token: jax.Array) -> jax.Array:
    return x_SD.at[token].get(mode="fill", fill_value=0)


def _tile(x_SD: jax.Array, where: Route, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
    token_R = jax.lax.dynamic_index_in_dim(where.tile_token_AR, tile, keepdims=False)
    return _rows(x_SD, token_R), where.tile_expert_A[tile]


def _loop(tiles: jax.Array, body, init):
    """A loop over the real tiles only; its carry is marked as varying wherever its inputs are."""
    axes = frozenset().union(*(mesh.varying(leaf) for leaf in jax.tree.leaves((init, tiles))))
    init = jax.tree.map(lambda leaf: mesh.vary(leaf, axes), init)
    return jax.lax.fori_loop(jnp.zeros_like(tiles), tiles, body, init)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts_mlp(dtype, frozen, x_SD, w1_EDF, w3_EDF, w2_EFD, where: Route) -> jax.Array:
    return _experts_forward(dtype, frozen, x_SD, w1_EDF, w3_EDF, w2_EFD, where)[0]


def _of(expert: jax.Array, *linears: Linear) -> tuple[Linear, ...]:
    return jax.tree.map(lambda leaf: leaf[expert], linears)


def _experts_forward(dtype, frozen, x_SD, w1_EDF, w3_EDF, w2_EFD, where: Route):
    x_SD = x_SD.astype(dtype)
    w1, w3, w2 = _ready(dtype, w1_EDF, w3_EDF, w2_EFD)
    x_ECD = _rows(x_SD, where.token_EC)
    gate_ECF = _apply(x_ECD, w1, "E").astype(dtype)
    up_ECF = _apply(x_ECD, w3, "E").astype(dtype)
    y_ECD = _apply(_swiglu(gate_ECF, up_ECF, dtype), w2, "E").astype(dtype)

    def overflow(tile, y_AD):
        x_RD, expert = _tile(x_SD, where, tile)
        v1, v3, v2 = _of(expert, w1, w3, w2)
        hidden = _swiglu(_apply(x_RD, v1, ""), _apply(x_RD, v3, ""), dtype)
        y_RD = _apply(hidden, v2, "").astype(dtype)
        return jax.lax.dynamic_update_slice(y_AD, y_RD, (slots + tile * x_RD.shape[0], 0))

    experts, capacity, width = y_ECD.shape
    slots = experts * capacity
    y_AD = jnp.concatenate([y_ECD.reshape(slots, width), jnp.zeros((where.tile_token_AR.size, width), dtype)])
    y_AD = _loop(where.tiles, overflow, y_AD)
    y_SKD = y_AD.at[where.row_SK].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return y_SKD, (x_SD, w1_EDF, w3_EDF, w2_EFD, where, gate_ECF, up_ECF)


def _slot_gradients(dtype, frozen, x, dy, gate, up, w1, w3, w2, e: str):
    """Gradients of one product through the gated MLP: of x, in the compute dtype, and of the three weights, in f32."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    dh, dw2 = _apply_backward((silu * up).astype(dtype), dy, w2, frozen, e)
    dgate = (dh * up * (sigmoid + silu * (1 - sigmoid))).astype(dtype)
    dup = (dh * silu).astype(dtype)
    dx_gate, dw1 = _apply_backward(x, dgate, w1, frozen, e)
    dx_up, dw3 = _apply_backward(x, dup, w3, frozen, e)
    return (dx_gate + dx_up).astype(dtype), (dw1, dw3, dw2)


def _experts_backward(dtype, frozen, saved, dy_SKD: jax.Array):
    x_SD, w1_EDF, w3_EDF, w2_EFD, where, gate_ECF, up_ECF = saved
    w1, w3, w2 = _ready(dtype, w1_EDF, w3_EDF, w2_EFD)
    tokens, per_token = where.row_SK.shape
    experts, capacity = where.token_EC.shape
    slots, width = experts * capacity, x_SD.shape[1]

    # Which assignment each row holds: the inverse of row_SK.
    row_A = where.row_SK.reshape(-1)
    rows = slots + where.tile_token_AR.size
    assignment_A = jnp.full((rows,), tokens * per_token, row_A.dtype)
    assignment_A = assignment_A.at[jnp.where(row_A < 0, rows, row_A)].set(
        jnp.arange(tokens * per_token, dtype=row_A.dtype), mode="drop", unique_indices=True
    )
    dy_AD = dy_SKD.astype(dtype).reshape(tokens * per_token, width)

    x_ECD = _rows(x_SD, where.token_EC)
    dy_ECD = _rows(dy_AD, assignment_A[:slots].reshape(experts, capacity))
    dx_ECD, dws = _slot_gradients(dtype, frozen, x_ECD, dy_ECD, gate_ECF, up_ECF, w1, w3, w2, "E")

    def overflow(tile, carry):
        dx_AD, dws = carry
        x_RD, expert = _tile(x_SD, where, tile)
        v1, v3, v2 = _of(expert, w1, w3, w2)
        height = x_RD.shape[0]
        dy_RD = _rows(dy_AD, jax.lax.dynamic_slice(assignment_A, (slots + tile * height,), (height,)))
        gate, up = _apply(x_RD, v1, "").astype(dtype), _apply(x_RD, v3, "").astype(dtype)
        dx, of_tile = _slot_gradients(dtype, frozen, x_RD, dy_RD, gate, up, v1, v3, v2, "")
        dx_AD = jax.lax.dynamic_update_slice(dx_AD, dx, (slots + tile * height, 0))
        return dx_AD, jax.tree.map(lambda total, one: total.at[expert].add(one), dws, of_tile)

    dx_AD = jnp.concatenate([dx_ECD.reshape(slots, width), jnp.zeros((where.tile_token_AR.size, width), dtype)])
    dx_AD, dws = _loop(where.tiles, overflow, (dx_AD, dws))
    dx_SKD = dx_AD.at[where.row_SK].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    dx_SD = jnp.sum(dx_SKD.astype(jnp.float32), axis=1)
    # None where nothing trains; what trains is f32 or the dtype that it came in.
    of_weights = tuple(
        Linear(
            None if frozen else dw.weight.astype(linear.weight.dtype),
            jax.tree.map(lambda total, like: total.astype(like.dtype), dw.adapter, linear.adapter),
        )
        for dw, linear in zip(dws, (w1_EDF, w3_EDF, w2_EFD), strict=True)
    )
    return dx_SD.astype(x_SD.dtype), *of_weights, None


_experts_mlp.defvjp(_experts_forward, _experts_backward)
