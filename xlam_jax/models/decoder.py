"""The decoder: attention and a gated MLP, or a mixture of experts, in each block. Its parameters are the rows of the
model's weight table (`ModelConfig.weights`).

Axes: B rows, T tokens, D model width, N key/value heads, G queries per key/value head, K head size, F MLP width,
E experts, V vocabulary, S added tokens, L layers, r rank of an adapter. Blocks are stacked along L and scanned, so that
compile time does not grow with depth. Inside a `shard_map`, sizes are those of one device's shard.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from xlam_jax.models import grouped
from xlam_jax.models.attention import Places, attend, attend_cached, rope_factors, rope_frequencies, rotate
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.kernels import XLA, Kernels
from xlam_jax.models.linear import Adapter, adapted, dot, project
from xlam_jax.models.moe import Linear, experts_mlp, route, route_rounds
from xlam_jax.models.weights_table import EMBEDDING, FINAL_NORM, HEAD, LOGICAL_AXES, Weight
from xlam_jax.parallel import mesh

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names("qkv", "attention", "hidden", "output"),
    "minimal": jax.checkpoint_policies.save_only_these_names("attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["input", "attention"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""Activation checkpointing: which values of a block are kept for its backward pass. none: all; dots: outputs of matrix
products; minimal: the attention's output; full: only the block's input; offload: the block's input and the attention's
output, in host memory."""

UNROLLED = 4
"""Models of at most this many layers are compiled without a loop."""


class Cache(NamedTuple):
    """Keys and values of the previous tokens, for generation; a slot with segment 0 is empty."""

    k_LBNKS: jax.Array
    v_LBNSK: jax.Array
    positions_BS: jax.Array
    segments_BS: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, slots: int, dtype: Any) -> "Cache":
        """A cache of `slots` tokens per row."""
        heads = (config.layers, rows, config.kv_heads)
        return cls(
            jnp.zeros((*heads, config.head_dim, slots), dtype),
            jnp.zeros((*heads, slots, config.head_dim), dtype),
            jnp.zeros((rows, slots), jnp.int32),
            jnp.zeros((rows, slots), jnp.int32),
        )

    def with_tokens(
        self, new: "KeysValues", positions_BT: jax.Array, segments_BT: jax.Array, row: Any, slot: Any
    ) -> "Cache":
        """The cache with tokens of some rows, from index `row`, in the slots from `slot`."""

        def put(old: jax.Array, new: jax.Array, *at: Any) -> jax.Array:
            return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)

        return Cache(
            put(self.k_LBNKS, new.k_LBNKT, 0, row, 0, 0, slot),
            put(self.v_LBNSK, new.v_LBNTK, 0, row, 0, slot, 0),
            put(self.positions_BS, positions_BT, row, slot),
            put(self.segments_BS, segments_BT, row, slot),
        )


class KeysValues(NamedTuple):
    """The keys and values of new tokens, of all layers; of one layer inside the scan."""

    k_LBNKT: jax.Array
    v_LBNTK: jax.Array


class RouterSums(NamedTuple):
    """Sums over this shard's tokens, from which the load-balancing loss is computed."""

    assigned_E: jax.Array
    """Assignments to each expert."""
    probability_E: jax.Array
    """Router probability of each expert."""


class _Parameters:
    """Creates a module's parameters; each has its logical axes as metadata, from which its sharding follows."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config, self.rngs, self.sizes = config, rngs, config.axis_sizes

    def add(self, module: nnx.Module, weight: Weight) -> None:
        """Adds a weight to a module, and if it has them, the two factors of its adapter and the trained rows of added
        tokens, which are added to the weight's and start at zero."""
        shape = weight.shape(self.sizes)
        if weight.is_matrix:
            value = self.config.initializer_range * jax.random.normal(self.rngs.params(), shape, jnp.float32)
        else:
            value = jnp.full(shape, weight.start, jnp.float32)
        matrix = _matrix_axes(weight.axes, weight.inputs, weight.outputs) if weight.is_matrix else None
        setattr(module, weight.name, nnx.Param(value, logical=_logical(weight.axes), matrix=matrix))
        if weight.has_token_rows and self.config.trained_tokens:
            axes = weight.axes.replace("V", "S")
            rows = jnp.zeros(tuple(self.sizes[axis] for axis in axes), jnp.float32)
            setattr(module, f"{weight.name}_rows", nnx.LoRAParam(rows, logical=_logical(axes), matrix=None))
        lora = self.config.lora
        if lora is None or weight.name not in lora.targets:
            return
        self._add_factor(module, weight, "A", weight.inputs, "r")
        self._add_factor(module, weight, "B", "r", weight.outputs)

    def _add_factor(self, module: nnx.Module, weight: Weight, factor: str, inputs: str, outputs: str) -> None:
        """Adds a factor of an adapter, uniform in ±1/√(inputs), or zero."""
        lora = self.config.lora
        assert lora is not None
        axes, sizes = weight.stacked + inputs + outputs, self.sizes | {"r": lora.rank}
        bound = math.prod(sizes[axis] for axis in inputs) ** -0.5
        shape = tuple(sizes[axis] for axis in axes)
        value = jax.random.uniform(self.rngs.lora(), shape, jnp.float32, -bound, bound)
        value = jnp.zeros_like(value) if factor == lora.zero else value
        matrix = _matrix_axes(axes, inputs, outputs)
        setattr(module, f"{weight.name}_{factor.lower()}", nnx.LoRAParam(value, logical=_logical(axes), matrix=matrix))


def _logical(axes: str) -> tuple[str, ...]:
    return tuple("rank" if axis == "r" else LOGICAL_AXES[axis] for axis in axes)


def _matrix_axes(axes: str, inputs: str, outputs: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The indices of a matrix's input and output axes."""
    return tuple(map(axes.index, inputs)), tuple(map(axes.index, outputs))


def _adapter(module: nnx.Module, name: str, config: ModelConfig, stacked: int, dtype: Any) -> Adapter | None:
    """The factors of a weight's adapter, gathered along fsdp. Their first `stacked` axes were removed by the scan."""
    if config.lora is None or name not in config.lora.targets:
        return None
    factors = (getattr(module, f"{name}_{factor}") for factor in "ab")
    whole_a, whole_b = (mesh.gather(factor[...], factor.logical[stacked:], dtype) for factor in factors)
    return Adapter(whole_a, whole_b * config.lora.scale)


def _dropped(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Dropout (Srivastava et al., 2014)."""
    kept = jax.random.bernoulli(_of_shard(key), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def _of_shard(key: jax.Array) -> jax.Array:
    """A different key on each shard of the batch; the same along the other axes of the mesh."""
    for axis in mesh.TOKEN_AXES:
        key = jax.random.fold_in(key, mesh.index(axis))
    return key


class Block(nnx.Module):
    """A transformer block, or a stack of them: the parameters have a leading layer axis, which the scan removes."""

    router: nnx.Param

    def __init__(self, config: ModelConfig, dtype: Any, kernels: Kernels, rngs: nnx.Rngs):
        self.config, self.dtype, self.kernels = config, dtype, kernels
        new = _Parameters(config, rngs)
        for weight in config.weights:
            if weight.in_block:
                new.add(self, weight)

    def _weight(self, name: str) -> Any:
        param = getattr(self, name)
        return mesh.gather(param.get_value(), param.logical[1:], self.dtype, self.kernels.wire)

    def _linear(
        self, name: str, equation: str, x: jax.Array, key: jax.Array | None, bias: nnx.Param | None = None
    ) -> jax.Array:
        """The product with a weight and its adapter, plus the bias, in the compute dtype."""
        adapter = _adapter(self, name, self.config, 1, self.dtype)
        x_a = None
        if adapter is not None and key is not None and self.config.lora and self.config.lora.dropout:
            dropout_id = self.config.weight(name).dropout_id
            assert dropout_id is not None  # the config refuses dropout on other weights
            x_a = _dropped(x, self.config.lora.dropout, jax.random.fold_in(key, dropout_id))
        if bias is None:
            return adapted(equation, x, self._weight(name), adapter, self.dtype, x_a)
        product = adapted(equation, x, self._weight(name), adapter, self.dtype, x_a, out=jnp.float32)
        return (product + bias[...].astype(jnp.float32)).astype(self.dtype)  # rounded once

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        cache: Cache | None = None,
        key: jax.Array | None = None,
        keep: bool = False,
    ) -> tuple[jax.Array, tuple[RouterSums | None, KeysValues | None]]:
        """Returns the block's output, its router sums (experts only), and its new keys and values if `keep`.

        `cache`: this layer's; only with `keep`. `key`: of the dropout's random masks; None for no dropout.
        """
        x_BTD = checkpoint_name(x_BTD, "input")
        normed_BTD = self._norm("attention_norm", x_BTD)
        attention, kv = self._attention(normed_BTD, positions_BT, segments_BT, cache, key, keep)
        x_BTD = x_BTD + checkpoint_name(attention, "output")
        y_BTD = self._norm("mlp_norm", x_BTD)
        if self.config.experts:
            y_BTD, sums = self._experts(y_BTD, segments_BT)
        else:
            y_BTD, sums = self._mlp(y_BTD, key), None
        return x_BTD + checkpoint_name(y_BTD, "output"), (sums, kv)

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return rms_norm(x, getattr(self, name)[...], self.config.norm_eps)

    def _attention(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        cache: Cache | None,
        key: jax.Array | None,
        keep: bool,
    ) -> tuple[jax.Array, KeysValues | None]:
        q_BTNGK = self._heads("q", "BTD,DNGK->BTNGK", x_BTD, key)
        k_BTNK = self._heads("k", "BTD,DNK->BTNK", x_BTD, key)
        v_BTNK = self._heads("v", "BTD,DNK->BTNK", x_BTD, key)
        frequency, (q_factor, k_factor) = rope_frequencies(self.config), rope_factors(self.config, positions_BT)
        q_BTNGK = self._kept("q", rotate(q_BTNGK, positions_BT, frequency, q_factor))
        k_BTNK = self._kept("k", rotate(k_BTNK[:, :, :, None], positions_BT, frequency, k_factor)[:, :, :, 0])
        v_BTNK = checkpoint_name(v_BTNK, "qkv")
        window = self.config.sliding_window
        if keep:  # in generation, each context shard has all tokens of its rows
            kv = KeysValues(k_BTNK.transpose(0, 2, 3, 1), v_BTNK.swapaxes(1, 2))
            own = Places(positions_BT, segments_BT, positions_BT, segments_BT)
            if cache is None:
                out_BTNGK = attend(q_BTNGK, k_BTNK, v_BTNK, own, window=window)
            else:
                cached = own._replace(k_positions_BS=cache.positions_BS, k_segments_BS=cache.segments_BS)
                parts = ((cache.k_LBNKS, cache.v_LBNSK, cached), (kv.k_LBNKT, kv.v_LBNTK, own))
                out_BTNGK = attend_cached(q_BTNGK, parts, window=window)
        else:
            kv = None
            k_BSNK, v_BSNK = mesh.gather_tokens(k_BTNK), mesh.gather_tokens(v_BTNK)
            places = Places(
                positions_BT, segments_BT, mesh.gather_tokens(positions_BT), mesh.gather_tokens(segments_BT)
            )
            out_BTNGK = attend(q_BTNGK, k_BSNK, v_BSNK, places, window=window, kernels=self.kernels)
        y_BTD = mesh.psum(self._linear("o", "BTNGK,NGKD->BTD", out_BTNGK, key), "tensor")
        return y_BTD, kv

    def _heads(self, name: str, equation: str, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        """Queries, keys or values [B, T, N, …, K]; with a bias, and a norm over each head, if the weight table has
        them."""
        heads = self._linear(name, equation, x_BTD, key, getattr(self, f"{name}_bias", None))
        if hasattr(self, f"{name}_norm"):
            return self._norm(f"{name}_norm", checkpoint_name(heads, "qkv"))
        return heads

    def _kept(self, name: str, rotated: jax.Array) -> jax.Array:
        """Rotated queries or keys, named for remat. A norm over heads needs its input in the backward pass, from which
        these are computed again without a product; a rotation does not need its own."""
        return rotated if hasattr(self, f"{name}_norm") else checkpoint_name(rotated, "qkv")

    def _mlp(self, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        gate_BTF = checkpoint_name(self._linear("w1", "BTD,DF->BTF", x_BTD, key), "hidden")
        up_BTF = checkpoint_name(self._linear("w3", "BTD,DF->BTF", x_BTD, key), "hidden")
        hidden_BTF = (jax.nn.silu(gate_BTF.astype(jnp.float32)) * up_BTF.astype(jnp.float32)).astype(self.dtype)
        return mesh.psum(self._linear("w2", "BTF,FD->BTD", hidden_BTF, key), "tensor")

    def _experts(self, x_BTD: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, RouterSums]:
        experts = self.config.experts
        x_SD, real_S = x_BTD.reshape(-1, x_BTD.shape[-1]), segments_BT.reshape(-1) > 0
        # The router computes in f32: a rounded tie would send a token to another expert.
        router_DE = mesh.gather(self.router[...], self.router.logical[1:], jnp.float32, self.kernels.wire)
        adapter = _adapter(self, "router", self.config, 1, jnp.float32)
        logits_SE = adapted("SD,DE->SE", x_SD.astype(jnp.float32), router_DE, adapter, jnp.float32, None)
        probability_SE = jax.nn.softmax(logits_SE, axis=-1)
        gate_SK, expert_SK = jax.lax.top_k(probability_SE, self.config.experts_per_token)
        if self.config.normalize_gates:
            gate_SK /= jnp.sum(gate_SK, axis=-1, keepdims=True)
        expert_SK = jnp.where(real_S[:, None], expert_SK, experts)  # padding goes to no expert
        w1, w3, w2 = (
            Linear(self._weight(name), _adapter(self, name, self.config, 1, self.dtype)) for name in ("w1", "w3", "w2")
        )
        frozen = self.config.lora is not None
        if self.kernels.experts != "xla" and not mesh.splits("expert"):
            options = grouped.KernelOptions(
                self.kernels.experts, self.dtype, frozen, self.kernels.interpret, on_chip=self.kernels.on_chip
            )
            y_SD = grouped.experts_sum(
                x_SD, gate_SK, w1, w3, w2, grouped.group(expert_SK, experts, options.kernel), options
            )
        else:
            where = (route_rounds if mesh.splits("expert") else route)(expert_SK, experts)
            y_SKD = experts_mlp(x_SD, w1, w3, w2, where, self.dtype, frozen=frozen)
            y_SD = jnp.einsum("SKD,SK->SD", y_SKD.astype(jnp.float32), gate_SK)
        y_SD = mesh.psum(y_SD, "tensor")
        sums = RouterSums(
            jnp.sum(expert_SK.reshape(-1)[:, None] == jnp.arange(experts), axis=0).astype(jnp.float32),
            jnp.sum(jnp.where(real_S[:, None], probability_SE, 0.0), axis=0),
        )
        return y_SD.astype(self.dtype).reshape(x_BTD.shape), sums


class Decoder(nnx.Module):
    """From token ids to final hidden states; `logits` and the losses apply the head."""

    embedding: nnx.Param
    final_norm: nnx.Param

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: Any = jnp.float32,
        remat: str = "none",
        neftune: float = 0.0,
        kernels: Kernels = XLA,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype, self.remat, self.neftune, self.kernels = config, dtype, remat, neftune, kernels
        new = _Parameters(config, rngs)
        new.add(self, EMBEDDING)
        self.blocks = Block(config, dtype, kernels, rngs)
        new.add(self, FINAL_NORM)
        if not config.tie_embeddings:
            new.add(self, HEAD)

    def head_VD(self) -> jax.Array:
        """The output embedding of this device's share of the vocabulary, with its adapter and the trained rows of added
        tokens, in f32 if it has either."""
        name = EMBEDDING.name if self.config.tie_embeddings else HEAD.name
        head = getattr(self, name)
        head_VD = mesh.gather(head[...], head.logical, self.dtype, self.kernels.wire)
        adapter = _adapter(self, name, self.config, 0, self.dtype)
        if adapter is not None:
            product = "Vr,rD->VD" if self.config.tie_embeddings else "Dr,rV->VD"
            head_VD = head_VD.astype(jnp.float32) + project(product, adapter.a, adapter.b, self.dtype, out=jnp.float32)
        if (rows := self._token_rows(name, head_VD.shape[0])) is not None:
            added_SD, places_S = rows
            head_VD = head_VD.astype(jnp.float32).at[places_S].add(added_SD, mode="drop")
        return head_VD

    def _token_rows(self, name: str, local: int) -> tuple[jax.Array, jax.Array] | None:
        """What is added to the rows of added tokens, f32 [S, D], and their indices in this device's share of the
        vocabulary, of size `local`; `local` for those of other devices. None if these rows are not trained."""
        tokens = self.config.trained_tokens
        if tokens is None:
            return None
        rows = getattr(self, f"{name}_rows")
        added_SD = mesh.gather(rows[...], rows.logical, jnp.float32)
        places_S = tokens.first + jnp.arange(tokens.number) - mesh.index("tensor") * local
        return added_SD, jnp.where((places_S >= 0) & (places_S < local), places_S, local)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        cache: Cache | None = None,
        key: jax.Array | None = None,
        keep: bool = False,
    ) -> tuple[jax.Array, RouterSums | None, KeysValues | None]:
        """Returns hidden states after the final norm [B, T, D], router sums over all layers, and the tokens' keys and
        values if `keep`, or with a cache.

        `cache`: previous tokens of the rows, which the new ones follow. `key`: of the random dropout of adapters and
        the noise on embeddings; None for neither.
        """
        x_BTD = self._embed(tokens_BT)
        if self.neftune and key is not None:
            key, drawn = jax.random.split(key)
            x_BTD += _noise(self.neftune, x_BTD, segments_BT, drawn)
        graphdef, stacked = nnx.split(self.blocks)
        keep = keep or cache is not None

        def block(x_BTD, layer):
            state, kv, key = layer
            of_layer = None if cache is None else cache._replace(k_LBNKS=kv[0], v_LBNSK=kv[1])
            return nnx.merge(graphdef, state)(x_BTD, positions_BT, segments_BT, of_layer, key, keep)

        if self.remat != "none":
            block = jax.checkpoint(block, policy=REMAT[self.remat], prevent_cse=False)
        cached = None if cache is None else (cache.k_LBNKS, cache.v_LBNSK)
        # A loop copies each layer's weights, residuals and gradients in and out, which a few layers are not worth.
        unroll = self.config.layers <= UNROLLED
        keys = None if key is None else jax.random.split(key, self.config.layers)
        x_BTD, (sums, kv) = jax.lax.scan(block, x_BTD, (stacked, cached, keys), unroll=unroll)
        sums = None if sums is None else jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums)
        return rms_norm(x_BTD, self.final_norm[...], self.config.norm_eps), sums, kv

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        table_VD = mesh.gather(self.embedding[...], self.embedding.logical, self.dtype, self.kernels.wire).astype(
            self.dtype
        )
        local_BT = tokens_BT - mesh.index("tensor") * table_VD.shape[0]

        # Each device looks up the tokens of its share of the vocabulary; the others are filled with zero.
        def look_up(table: jax.Array) -> jax.Array:
            return table.at[local_BT].get(mode="fill", fill_value=0, wrap_negative_indices=False)

        x_BTD = look_up(table_VD)
        adapter = _adapter(self, "embedding", self.config, 0, self.dtype)
        if adapter is not None:
            x_BTD = x_BTD + project("BTr,rD->BTD", look_up(adapter.a), adapter.b, self.dtype)
        if (rows := self._token_rows(EMBEDDING.name, table_VD.shape[0])) is not None:
            added_SD, places_S = rows
            is_added_BTS = ((local_BT[..., None] == places_S) & (places_S < table_VD.shape[0])).astype(jnp.float32)
            # a product, since the gradient of a look-up is a sum whose order is not deterministic on a GPU
            added_BTD = jnp.einsum("BTS,SD->BTD", is_added_BTS, added_SD, precision=jax.lax.Precision.HIGHEST)
            x_BTD = (x_BTD.astype(jnp.float32) + added_BTD).astype(self.dtype)
        return mesh.psum(x_BTD, "tensor")

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits in f32, [B, T, V]; for generation and tests: losses never compute them for a whole batch at once."""
        return dot("BTD,VD->BTV", hidden_BTD, self.head_VD().astype(self.dtype))


def _noise(alpha: float, x_BTD: jax.Array, segments_BT: jax.Array, key: jax.Array) -> jax.Array:
    """NEFTune (Jain et al., 2310.05914): uniform noise, scaled by 1/√(sequence length × D); none on padding."""
    length_BT = jnp.sum(segments_BT[:, :, None] == mesh.gather_tokens(segments_BT)[:, None, :], axis=-1)
    size_BT = jnp.where(segments_BT > 0, alpha * jax.lax.rsqrt((length_BT * x_BTD.shape[-1]).astype(jnp.float32)), 0.0)
    noise_BTD = jax.random.uniform(_of_shard(key), x_BTD.shape, jnp.float32, -1.0, 1.0)
    return (noise_BTD * size_BT[:, :, None]).astype(x_BTD.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in f32 (Zhang & Sennrich, 1910.07467)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (scale * normed).astype(x.dtype)
