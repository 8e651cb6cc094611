"""The weight table: one row per weight of a decoder, read by everything that handles weights.

A row names the weight, its axes, its tensor in a Hugging Face file, how it is stored when it is frozen, and where its
adapter may be saved. The decoder creates its parameters from the table. The converters, PEFT folders, quantization, the
cost of a step and `plan` read the same rows. This module has the rows that every family shares; a family's file
(`xlam_jax.models.families`) puts its table together from them and from its own.

Axes: L layers, E experts, R router outputs (one per expert), D model width, M model width of a scale that every device
keeps whole, N key/value heads, G queries per key/value head, K head size, F MLP width, V vocabulary, S tokens that a
run adds to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

LOGICAL_AXES = {
    "L": "layers",
    "E": "experts",
    "R": "routes",
    "D": "embed",
    "M": "norm",
    "N": "kv_heads",
    "G": "q_group",
    "K": "head_dim",
    "F": "mlp",
    "V": "vocab",
    "S": "added_tokens",
}
"""Letter of an axis → logical axis, which `xlam_jax.parallel.mesh.RULES` maps to an axis of the mesh."""

BLOCKS = "blocks"
"""The branch of the parameter tree that contains the weights of all layers, stacked."""

BLOCK = "model.layers.{L}."
"""Prefix of the Hugging Face names of a layer's weights."""


class Stored(NamedTuple):
    """Another place where a Hugging Face file may contain a weight."""

    key: str
    """Pattern of the tensor's name. Without "{E}", a weight of experts has all of them stacked in this tensor."""
    part: int = 0
    """Which of `parts` equal parts of each matrix is the weight, along the first axis."""
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A row of the table. Axes are letters, as in the legend of this module."""

    name: str
    """The parameter's name, the last one of its path in the parameter tree."""
    stacked: str = "L"
    """Leading axes, along which there is one tensor each in Hugging Face files."""
    inputs: str = ""
    """Axes that the product with this matrix sums over; empty for vectors (norms, biases)."""
    outputs: str
    """Axes of the product's result."""
    outputs_first: bool = False
    """The parameter has its output axes before its input axes."""
    key: str
    """Pattern of the tensor's name in Hugging Face files, with {L} and {E} for the layer and the expert."""
    hf_axes: str
    """Axes of that tensor; letters without a space between them are flattened into one axis."""
    other_places: tuple[Stored, ...] = ()
    """Where else files may contain it, tried in this order if there is no tensor of the name `key`."""
    start: float = 1.0
    """The initial value of a vector; matrices start at random."""
    frozen: Literal["nf4", "compute", "float32"]
    """Its storage when it does not train. nf4: four bits in QLoRA, else the compute dtype; compute: the compute dtype;
    float32: always f32, also in the computation."""
    dropout_id: int | None = None
    """Folded into the random key of the dropout in front of its adapter, so it must never change; None: its adapter
    takes no dropout."""
    peft: bool = False
    """PEFT folders have a place for its adapter."""
    vllm: bool = False
    """vLLM loads its adapter from a PEFT folder."""
    aliases: tuple[str, ...] = ()
    """Further names that users may know it by, for hints in messages."""

    @property
    def in_block(self) -> bool:
        """Whether each layer has its own."""
        return "L" in self.stacked

    @property
    def path(self) -> tuple[str, ...]:
        """Its place in the parameter tree."""
        return (BLOCKS, self.name) if self.in_block else (self.name,)

    @property
    def axes(self) -> str:
        """All axes of the parameter, in order."""
        return self.stacked + (self.outputs + self.inputs if self.outputs_first else self.inputs + self.outputs)

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies activations; each matrix may have an adapter."""
        return bool(self.inputs)

    @property
    def has_token_rows(self) -> bool:
        """Whether it has one row per token of the vocabulary."""
        return "V" in self.axes

    @property
    def per_expert(self) -> bool:
        """Whether each expert has its own."""
        return "E" in self.stacked

    @property
    def module(self) -> str:
        """The name of its module in the Hugging Face model, such as "self_attn.q_proj" in a block or "lm_head"."""
        return self.key.removeprefix(BLOCK).removesuffix(".weight")

    @property
    def short_module(self) -> str:
        """The last part of the module's name, such as "q_proj"."""
        return self.module.rpartition(".")[2]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The parameter's shape. `sizes`: the size of each axis (`ModelConfig.axis_sizes`)."""
        return tuple(sizes[axis] for axis in self.axes)

    def elements(self, sizes: Mapping[str, int]) -> int:
        """The number of elements."""
        return prod(self.shape(sizes))


def _linear(name: str, inputs: str, outputs: str, module: str, dropout_id: int) -> Weight:
    """A matrix of a block in the layout of `torch.nn.Linear`: one output axis, one input axis."""
    return Weight(
        name=name,
        inputs=inputs,
        outputs=outputs,
        key=f"{BLOCK}{module}.weight",
        hf_axes=f"{outputs} {inputs}",
        frozen="nf4",
        dropout_id=dropout_id,
        peft=True,
        vllm=True,
    )


def norm(name: str, key: str, *, stacked: str = "L") -> Weight:
    """The scale of an RMS norm over the model's width."""
    return Weight(name=name, stacked=stacked, outputs="M", key=key, hf_axes="M", frozen="float32")


def head_bias(name: str, axes: str, module: str) -> Weight:
    """A bias of queries, keys or values: `name` is that of the matrix followed by "_bias", `axes` its output axes."""
    key = f"{BLOCK}{module}.bias"
    return Weight(name=name, outputs=axes, key=key, hf_axes=axes, start=0.0, frozen="compute")


def head_norm(name: str, module: str) -> Weight:
    """The scale of an RMS norm over each head of queries or keys: `name` is that of the matrix followed by "_norm"."""
    return Weight(name=name, outputs="K", key=f"{BLOCK}{module}.weight", hf_axes="K", frozen="float32")


EMBEDDING = Weight(
    name="embedding",
    stacked="",
    inputs="V",
    outputs="D",
    key="model.embed_tokens.weight",
    hf_axes="V D",
    frozen="compute",
    peft=True,
)

ATTENTION_NORM = norm("attention_norm", BLOCK + "input_layernorm.weight")
ATTENTION = (
    _linear("q", "D", "NGK", "self_attn.q_proj", 0),
    _linear("k", "D", "NK", "self_attn.k_proj", 1),
    _linear("v", "D", "NK", "self_attn.v_proj", 2),
    _linear("o", "NGK", "D", "self_attn.o_proj", 3),
)
MLP_NORM = norm("mlp_norm", BLOCK + "post_attention_layernorm.weight")
MLP = (
    _linear("w1", "D", "F", "mlp.gate_proj", 5),
    _linear("w3", "D", "F", "mlp.up_proj", 6),
    _linear("w2", "F", "D", "mlp.down_proj", 7),
)
"""gate_proj (w1), up_proj (w3) and down_proj (w2) of a dense MLP, w2(silu(w1 x) * w3 x)."""


def mixture(block: str, names: tuple[str, str, str], fused_in: tuple[str, ...]) -> tuple[Weight, ...]:
    """The router, and gate_proj (w1), up_proj (w3) and down_proj (w2) of the experts.

    `block`: the name of a layer's mixture. `names`: those of the three matrices of an expert. `fused_in`: the names of
    the mixture in files that store all experts of a layer in two tensors, as transformers 5 has them in memory:
    gate_up_proj [experts, 2 × F, D] and down_proj [experts, D, F].
    """

    def matrix(name: str, inputs: str, outputs: str, module: str, alias: str, stored: Stored) -> Weight:
        return Weight(
            name=name,
            stacked="LE",
            inputs=inputs,
            outputs=outputs,
            key=f"{BLOCK}{block}.experts.{{E}}.{module}.weight",
            hf_axes=f"{outputs} {inputs}",
            other_places=tuple(stored._replace(key=f"{BLOCK}{place}.experts.{stored.key}") for place in fused_in),
            frozen="nf4",
            peft=True,
            vllm=True,
            aliases=(alias,),
        )

    router = Weight(
        name="router",
        inputs="D",
        outputs="R",
        key=f"{BLOCK}{block}.gate.weight",
        hf_axes="R D",
        other_places=tuple(Stored(f"{BLOCK}{place}.gate.weight") for place in fused_in if place != block),
        frozen="float32",
    )
    gate, up, down = names
    return (
        router,
        matrix("w1", "D", "F", gate, "gate_proj", Stored("gate_up_proj", 0, 2)),
        matrix("w3", "D", "F", up, "up_proj", Stored("gate_up_proj", 1, 2)),
        matrix("w2", "F", "D", down, "down_proj", Stored("down_proj")),
    )


FINAL_NORM = norm("final_norm", "model.norm.weight", stacked="")
HEAD = Weight(
    name="head",
    stacked="",
    inputs="D",
    outputs="V",
    outputs_first=True,
    key="lm_head.weight",
    hf_axes="V D",
    frozen="compute",
    peft=True,
    vllm=True,
)
"""Models whose `tie_embeddings` is true have no head; the embedding takes its place."""


def decoder_table(*, attention: tuple[Weight, ...] = ATTENTION, mlp: tuple[Weight, ...] = MLP) -> tuple[Weight, ...]:
    """The table of a decoder with these weights in each block.

    The order is that in which random weights are drawn, so it must never change for a family that exists.
    """
    return EMBEDDING, ATTENTION_NORM, *attention, MLP_NORM, *mlp, FINAL_NORM, HEAD
