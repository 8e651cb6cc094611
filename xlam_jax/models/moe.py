"""Dropless mixture of experts: every token reaches its top-k experts, for any imbalance (Jiang et al., 2401.04088).

Assignments (token, expert) are sorted by expert. The first `capacity` of each expert are computed as one batched
product, sized so that a balanced batch fits; the others are computed in tiles, in a loop that is as long as the
imbalance needs. No token is dropped, and no expert computes a token that was not assigned to it. The results are
combined by an ordered gather, not a scatter-add, so that they are deterministic on every backend.

With experts on several devices the slots of the batched product are exchanged: each device sends the same number of
them to every expert, so that the exchange has a fixed shape. The others are sent in further, smaller rounds, as many as
the expert with the most assignments needs.

Axes: S tokens, K experts per token, A assignments (S × K), E experts, C capacity, R rows of a tile, D model width,
F expert width, I inputs, O outputs, r rank.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlam_jax.models.linear import Adapter, dot
from xlam_jax.models.nf4 import dense
from xlam_jax.parallel import mesh

TILE = 128
"""Maximum rows of an overflow tile."""
ROUNDS = 8
"""Size of the first exchange, relative to that of each further one."""


class Route(NamedTuple):
    """The layout of the assignments. Integers only: they have no gradient."""

    token_EC: jax.Array
    """Token in each slot of the batched product; the number of tokens in an unused slot."""
    tile_token_AR: jax.Array
    """Token of each row of each overflow tile; the number of tokens in an unused row. The first `tiles` are used."""
    tile_expert_A: jax.Array
    tiles: jax.Array
    """Number of overflow tiles."""
    row_SK: jax.Array
    """Row of each assignment's result, in the slots followed by the tiles; -1 for no result."""


class _Sorted(NamedTuple):
    """Assignments sorted by expert, then by token."""

    order_A: jax.Array
    """The assignment at each position."""
    start_E: jax.Array
    """The position of each expert's first assignment."""
    count_E: jax.Array
    rank_A: jax.Array
    """The rank of each assignment among those of its expert."""
    expert_A: jax.Array
    """The expert of each assignment; `experts` for none."""

    def at(self, expert: jax.Array, rank: jax.Array) -> jax.Array:
        """An expert's assignment of this rank; the number of assignments if there is none."""
        last = self.order_A.size - 1
        place = jnp.minimum(self.start_E[expert] + rank, last)
        return jnp.where(rank < self.count_E[expert], self.order_A[place], last + 1)


def _sort(expert_SK: jax.Array, experts: int) -> _Sorted:
    expert_A = expert_SK.reshape(-1)
    order_A = jnp.argsort(expert_A, stable=True)
    count_E = jnp.sum(expert_A[None, :] == jnp.arange(experts)[:, None], axis=1)
    start_E = jnp.cumsum(count_E) - count_E
    # The inverse of the sort gives each assignment's rank among those of its expert.
    place_A = (
        jnp.zeros_like(order_A).at[order_A].set(jnp.arange(order_A.size, dtype=order_A.dtype), unique_indices=True)
    )
    rank_A = place_A - start_E[jnp.minimum(expert_A, experts - 1)]
    return _Sorted(order_A, start_E, count_E, rank_A, expert_A)


def _capacity(assignments: int, experts: int) -> int:
    """Slots per expert: as many as a balanced batch fills, rounded up to a multiple of 8."""
    return -(-assignments // experts // 8) * 8


def route(expert_SK: jax.Array, experts: int) -> Route:
    """Lays out the assignments; `expert_SK` equal to `experts` means no expert (padding tokens)."""
    tokens, per_token = expert_SK.shape
    assignments = tokens * per_token
    capacity = _capacity(assignments, experts)
    rows = min(TILE, capacity)
    tile_slots = assignments // rows + experts  # the maximum for any imbalance
    by_expert = _sort(expert_SK, experts)

    def token_at(expert: jax.Array, rank: jax.Array) -> jax.Array:
        return by_expert.at(expert, rank) // per_token  # the number of tokens if there is none

    token_EC = token_at(jnp.arange(experts)[:, None], jnp.arange(capacity)[None, :])
    over_E = jnp.maximum(by_expert.count_E - capacity, 0)
    tiles_E = -(-over_E // rows)
    tile_end_E = jnp.cumsum(tiles_E)
    tile_A = jnp.arange(tile_slots)
    tile_expert_A = jnp.minimum(jnp.searchsorted(tile_end_E, tile_A, side="right"), experts - 1)
    tile_rank_A = capacity + (tile_A - (tile_end_E - tiles_E)[tile_expert_A]) * rows
    tile_token_AR = token_at(tile_expert_A[:, None], tile_rank_A[:, None] + jnp.arange(rows)[None, :])
    tile_token_AR = jnp.where((tile_A < tile_end_E[-1])[:, None], tile_token_AR, tokens)

    clipped_A, rank_A = jnp.minimum(by_expert.expert_A, experts - 1), by_expert.rank_A
    first_tile_row = experts * capacity + (tile_end_E - tiles_E)[clipped_A] * rows
    row_A = jnp.where(rank_A < capacity, clipped_A * capacity + rank_A, first_tile_row + rank_A - capacity)
    row_A = jnp.where(by_expert.expert_A < experts, row_A, -1)
    return Route(token_EC, tile_token_AR, tile_expert_A, tile_end_E[-1], row_A.reshape(tokens, per_token))


class Rounds(NamedTuple):
    """The layout of the assignments if the experts are on several devices. Integers only."""

    assignment_EC: jax.Array
    """The assignment in each slot of the first exchange; the number of assignments in an unused slot."""
    sorted: _Sorted
    rounds: jax.Array
    """The number of further exchanges, the same on all devices that share the experts."""
    row_SK: jax.Array
    """The slot of each assignment in the first exchange; -1 for none."""

    @property
    def height(self) -> int:
        """Slots per expert in a further exchange."""
        return -(-self.assignment_EC.shape[1] // ROUNDS // 8) * 8

    def later(self, turn: jax.Array) -> jax.Array:
        """The assignments of a further exchange, [E, C']."""
        experts, capacity = self.assignment_EC.shape
        rank_C = capacity + turn * self.height + jnp.arange(self.height)
        return self.sorted.at(jnp.arange(experts)[:, None], rank_C[None, :])


def route_rounds(expert_SK: jax.Array, experts: int) -> Rounds:
    """`route` for experts on several devices."""
    tokens, per_token = expert_SK.shape
    capacity = _capacity(tokens * per_token, experts)
    by_expert = _sort(expert_SK, experts)
    assignment_EC = by_expert.at(jnp.arange(experts)[:, None], jnp.arange(capacity)[None, :])
    row_A = jnp.where(by_expert.rank_A < capacity, by_expert.expert_A * capacity + by_expert.rank_A, -1)
    row_A = jnp.where(by_expert.expert_A < experts, row_A, -1)
    layout = Rounds(assignment_EC, by_expert, jnp.zeros((), jnp.int32), row_A.reshape(tokens, per_token))
    over = jnp.max(jnp.maximum(by_expert.count_E - capacity, 0))
    return layout._replace(rounds=mesh.pmax(-(-over // layout.height), "expert"))


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
    where: Route | Rounds,
    dtype: jnp.dtype,
    *,
    frozen: bool = False,
) -> jax.Array:
    """Each assignment's `w2(silu(w1 x) * w3 x)`, shape [S, k, D]; zeros where an assignment goes nowhere.

    With `frozen` weights only adapters have gradients: those of the weights are never made.
    """
    x_SD, w1_EDF, w3_EDF, w2_EFD = mesh.alike(x_SD, w1_EDF, w3_EDF, w2_EFD)
    if isinstance(where, Rounds):
        return _exchanged_mlp(dtype, frozen, x_SD, w1_EDF, w3_EDF, w2_EFD, where)
    return _experts_mlp(dtype, frozen, x_SD, w1_EDF, w3_EDF, w2_EFD, where)


def ready(dtype: jnp.dtype, *linears: Linear) -> tuple[Linear, ...]:
    """Converts weights and adapters to the compute dtype; quantized weights become dense."""
    return tuple(
        Linear(dense(one.weight, dtype), jax.tree.map(lambda factor: factor.astype(dtype), one.adapter))
        for one in linears
    )


def _apply(x: jax.Array, linear: Linear, e: str) -> jax.Array:
    """Computes [C, O] in f32 from x [C, I]; `e` is "E" for the batched product and "" for a tile."""
    y = dot(f"{e}CI,{e}IO->{e}CO", x, linear.weight)
    if linear.adapter is not None:
        rank = dot(f"{e}CI,{e}Ir->{e}Cr", x, linear.adapter.a).astype(x.dtype)
        y += dot(f"{e}Cr,{e}rO->{e}CO", rank, linear.adapter.b)
    return y


def _apply_backward(x: jax.Array, dy: jax.Array, linear: Linear, frozen: bool, e: str) -> tuple[jax.Array, Linear]:
    """Gradients of x and of the trainable arrays, in f32."""
    dx = dot(f"{e}CO,{e}IO->{e}CI", dy, linear.weight)
    dweight = None if frozen else dot(f"{e}CI,{e}CO->{e}IO", x, dy)
    if linear.adapter is None:
        return dx, Linear(dweight)
    a, b = linear.adapter
    drank = dot(f"{e}CO,{e}rO->{e}Cr", dy, b).astype(x.dtype)
    rank = dot(f"{e}CI,{e}Ir->{e}Cr", x, a).astype(x.dtype)
    dx += dot(f"{e}Cr,{e}Ir->{e}CI", drank, a)
    return dx, Linear(dweight, Adapter(dot(f"{e}CI,{e}Cr->{e}Ir", x, drank), dot(f"{e}Cr,{e}CO->{e}rO", rank, dy)))


def swiglu(gate: jax.Array, up: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """silu(gate) × up, in `dtype` (Shazeer, 2002.05202)."""
    # In f32 for any compute dtype: one rounding, and faster on a CPU than bf16 arithmetic.
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(dtype)


def _rows(x_SD: jax.Array, token: jax.Array) -> jax.Array:
    return x_SD.at[token].get(mode="fill", fill_value=0)


def _tile(x_SD: jax.Array, where: Route, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
    token_R = jax.lax.dynamic_index_in_dim(where.tile_token_AR, tile, keepdims=False)
    return _rows(x_SD, token_R), where.tile_expert_A[tile]


def _loop(tiles: jax.Array, body, init):
    """A loop over the used tiles only; its carry varies along the mesh axes along which its inputs vary."""
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
    w1, w3, w2 = ready(dtype, w1_EDF, w3_EDF, w2_EFD)
    x_ECD = _rows(x_SD, where.token_EC)
    gate_ECF = _apply(x_ECD, w1, "E").astype(dtype)
    up_ECF = _apply(x_ECD, w3, "E").astype(dtype)
    y_ECD = _apply(swiglu(gate_ECF, up_ECF, dtype), w2, "E").astype(dtype)

    def overflow(tile, y_AD):
        x_RD, expert = _tile(x_SD, where, tile)
        v1, v3, v2 = _of(expert, w1, w3, w2)
        hidden = swiglu(_apply(x_RD, v1, ""), _apply(x_RD, v3, ""), dtype)
        y_RD = _apply(hidden, v2, "").astype(dtype)
        return jax.lax.dynamic_update_slice(y_AD, y_RD, (slots + tile * x_RD.shape[0], 0))

    experts, capacity, width = y_ECD.shape
    slots = experts * capacity
    y_AD = jnp.concatenate([y_ECD.reshape(slots, width), jnp.zeros((where.tile_token_AR.size, width), dtype)])
    y_AD = _loop(where.tiles, overflow, y_AD)
    y_SKD = y_AD.at[where.row_SK].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return y_SKD, (x_SD, w1_EDF, w3_EDF, w2_EFD, where, gate_ECF, up_ECF)


def _slot_gradients(dtype, frozen, x, dy, gate, up, w1, w3, w2, e: str):
    """Gradients of one product through the gated MLP: of x in the compute dtype, and of the three weights in f32."""
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
    w1, w3, w2 = ready(dtype, w1_EDF, w3_EDF, w2_EFD)
    tokens, per_token = where.row_SK.shape
    experts, capacity = where.token_EC.shape
    slots, width = experts * capacity, x_SD.shape[1]

    # The assignment of each row: the inverse of row_SK.
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
    return dx_SD.astype(x_SD.dtype), *as_inputs(frozen, dws, (w1_EDF, w3_EDF, w2_EFD)), None


def as_inputs(frozen: bool, dws: Sequence[Linear], linears: Sequence[Linear]) -> tuple[Linear, ...]:
    """Converts gradients to the dtypes of the arrays that they belong to; None for frozen ones."""
    return tuple(
        Linear(
            None if frozen else dw.weight.astype(linear.weight.dtype),
            jax.tree.map(lambda total, like: total.astype(like.dtype), dw.adapter, linear.adapter),
        )
        for dw, linear in zip(dws, linears, strict=True)
    )


_experts_mlp.defvjp(_experts_forward, _experts_backward)


# ---- experts on several devices -------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchanged_mlp(dtype, frozen, x_SD, w1_EDF, w3_EDF, w2_EFD, where: Rounds) -> jax.Array:
    return _exchanged_forward(dtype, frozen, x_SD, w1_EDF, w3_EDF, w2_EFD, where)[0]


def _sent(rows_AD: jax.Array, assignment_EC: jax.Array, per_row: int) -> jax.Array:
    """Sends the rows of these assignments to the devices that have their experts; `per_row` assignments share a row."""
    return mesh.exchange(_rows(rows_AD, assignment_EC // per_row))


def _hidden(x_ECD: jax.Array, w1: Linear, w3: Linear, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    return _apply(x_ECD, w1, "E").astype(dtype), _apply(x_ECD, w3, "E").astype(dtype)


def _put(rows_AD: jax.Array, assignment_EC: jax.Array, slots_ECD: jax.Array) -> jax.Array:
    """Writes each slot to the row of its assignment; no two slots have the same assignment."""
    flat = slots_ECD.reshape(-1, slots_ECD.shape[-1])
    return rows_AD.at[assignment_EC.reshape(-1)].set(flat, mode="drop")


def _exchanged_forward(dtype, frozen, x_SD, w1_EDF, w3_EDF, w2_EFD, where: Rounds):
    x_SD = x_SD.astype(dtype)
    w1, w3, w2 = ready(dtype, w1_EDF, w3_EDF, w2_EFD)
    tokens, per_token = where.row_SK.shape

    def result(hidden: tuple[jax.Array, jax.Array]) -> jax.Array:
        return mesh.exchange(_apply(swiglu(*hidden, dtype), w2, "E").astype(dtype), back=True)

    hidden = _hidden(_sent(x_SD, where.assignment_EC, per_token), w1, w3, dtype)
    y_SKD = _rows_or_nothing(result(hidden), where.row_SK)

    def further(turn: jax.Array, y_AD: jax.Array) -> jax.Array:
        assignment_EC = where.later(turn)
        return _put(y_AD, assignment_EC, result(_hidden(_sent(x_SD, assignment_EC, per_token), w1, w3, dtype)))

    y_AD = _loop(where.rounds, further, y_SKD.reshape(tokens * per_token, -1))
    return y_AD.reshape(y_SKD.shape), (x_SD, w1_EDF, w3_EDF, w2_EFD, where, hidden)


def _rows_or_nothing(slots_ECD: jax.Array, row_SK: jax.Array) -> jax.Array:
    flat = slots_ECD.reshape(-1, slots_ECD.shape[-1])
    return flat.at[row_SK].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _exchanged_backward(dtype, frozen, saved, dy_SKD: jax.Array):
    x_SD, w1_EDF, w3_EDF, w2_EFD, where, hidden = saved
    w1, w3, w2 = ready(dtype, w1_EDF, w3_EDF, w2_EFD)
    tokens, per_token = where.row_SK.shape
    dy_AD = dy_SKD.astype(dtype).reshape(tokens * per_token, -1)

    def gradients(assignment_EC: jax.Array, hidden: tuple[jax.Array, jax.Array] | None) -> tuple[jax.Array, Any]:
        x_ECD, dy_ECD = _sent(x_SD, assignment_EC, per_token), _sent(dy_AD, assignment_EC, 1)
        gate, up = hidden or _hidden(x_ECD, w1, w3, dtype)
        dx_ECD, dws = _slot_gradients(dtype, frozen, x_ECD, dy_ECD, gate, up, w1, w3, w2, "E")
        return mesh.exchange(dx_ECD, back=True), dws

    dx_ECD, dws = gradients(where.assignment_EC, hidden)
    dx_SKD = _rows_or_nothing(dx_ECD, where.row_SK)

    def further(turn: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        dx_AD, dws = carry
        assignment_EC = where.later(turn)
        dx_ECD, more = gradients(assignment_EC, None)
        return _put(dx_AD, assignment_EC, dx_ECD), jax.tree.map(jnp.add, dws, more)

    dx_AD, dws = _loop(where.rounds, further, (dx_SKD.reshape(tokens * per_token, -1), dws))
    dx_SD = jnp.sum(dx_AD.reshape(dx_SKD.shape).astype(jnp.float32), axis=1)
    return dx_SD.astype(x_SD.dtype), *as_inputs(frozen, dws, (w1_EDF, w3_EDF, w2_EFD)), None


_exchanged_mlp.defvjp(_exchanged_forward, _exchanged_backward)
