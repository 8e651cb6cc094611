"""PEFT folders: adapter_config.json and adapter_model.safetensors, as `peft` and vLLM load them.

PEFT stores a factor A as [rank, inputs] and B as [outputs, rank], for each layer, and for each expert of a layer. Ours
are stacked over layers and experts, with the heads unflattened, inputs first. `Weight.peft` and `Weight.vllm` say which
adapters each of them can load; others (of routers) are refused: merge those.

Adapters of experts have the names that experts had before transformers 5 stacked them, such as
"block_sparse_moe.experts.0.w1": peft stacks them as it loads them, and so does vLLM. Both need those of all three
matrices of an expert, and peft multiplies the scale of stacked ones by √2 if it is rank-stabilized, so it is written as
a plain one.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xlam_jax.errors import UserError
from xlam_jax.models.config import Lora, ModelConfig
from xlam_jax.models.params import Params, shapes, trainable
from xlam_jax.models.weights_table import BLOCK, BLOCKS, EMBEDDING, HEAD, Weight
from xlam_jax.weights.peft_config import CONFIG, MERGE, WEIGHTS, AdapterConfig, read_config
from xlam_jax.weights.shards import DTYPES, Shard
from xlam_jax.weights.transfer import check_finite

PREFIX = "base_model.model."
_LINEAR = re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_EMBEDDING = re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_embedding_([AB])(?:\.[^.]+)?")
_BASE = re.compile(
    rf"(?:{re.escape(PREFIX)})?({re.escape(HEAD.module)}|{re.escape(EMBEDDING.module)})(?:\.base_layer)?\.weight"
)
"""Copies of the base's embeddings, which peft saves along with adapters on them."""


class _Module(NamedTuple):
    """A module of the Hugging Face model that has an adapter."""

    weight: Weight
    at: tuple[int, ...]
    """Its layer and its expert; empty for weights that are not in a block."""

    @property
    def name(self) -> str:
        """Its name in the Hugging Face model."""
        prefix = BLOCK if self.weight.in_block else ""
        return (prefix + self.weight.module).format(**dict(zip(self.weight.stacked, self.at, strict=True)))


def _modules(config: ModelConfig, weights: list[Weight]) -> Iterator[_Module]:
    sizes = config.axis_sizes
    for weight in weights:
        for at in np.ndindex(*(sizes[axis] for axis in weight.stacked)):
            yield _Module(weight, at)


def _lora(config: ModelConfig) -> Lora:
    if config.lora is None:
        raise ValueError("the model has no adapters")
    return config.lora


def write_peft(folder: Path, config: ModelConfig, adapters: Params, base: str | None, of: str = "the adapters") -> None:
    """Writes the adapters of a model into a new folder. `base`: the name of the base model, for adapter_config.json.

    Raises `UserError` for adapters that vLLM does not load from there, and for values that are not
    finite, naming `of`.
    """
    from safetensors.numpy import save_file

    lora = _lora(config)
    if config.added is not None:
        raise UserError(
            f"the run adds {config.added.number} tokens to the vocabulary of its base (data.added_tokens), and vLLM "
            "does not read their rows from a PEFT folder (neither trainable_token_indices nor modules_to_save); "
            "export the whole model with --lora merge"
        )
    targets = [config.weight(name) for name in lora.targets]
    _check_loadable(config, targets)
    tensors: dict[str, np.ndarray] = {}
    for weight in targets:
        tree = adapters[BLOCKS] if weight.in_block else adapters
        stacked_a, stacked_b = (np.asarray(tree[f"{weight.name}_{factor}"]) for factor in "ab")
        for module in _modules(config, [weight]):
            a, b = stacked_a[module.at], stacked_b[module.at]
            tensors[f"{PREFIX}{module.name}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, lora.rank).T)
            tensors[f"{PREFIX}{module.name}.lora_B.weight"] = np.ascontiguousarray(b.reshape(lora.rank, -1).T)
    for key, value in tensors.items():
        check_finite(of, key, value)
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    on_experts = any(weight.per_expert for weight in targets)
    made_plain = on_experts and lora.rank_stabilized
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank if made_plain else lora.alpha,
        # it acts in training only; peft refuses to load any with adapters of experts
        "lora_dropout": 0.0 if on_experts else lora.dropout,
        "use_rslora": lora.rank_stabilized and not made_plain,
        "target_modules": sorted(weight.short_module for weight in targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_loadable(config: ModelConfig, targets: list[Weight]) -> None:
    """Raises `UserError` for adapters that have no place in a PEFT folder."""
    if homeless := [weight.name for weight in targets if not weight.vllm]:
        raise UserError(
            f"adapters on {', '.join(homeless)} have no layout that both peft and vLLM load; "
            "export the whole model with --lora merge"
        )
    experts = [weight for weight in config.weights if weight.per_expert]
    if any(weight in experts for weight in targets) and not set(experts) <= set(targets):
        missing = ", ".join(weight.name for weight in experts if weight not in targets)
        raise UserError(
            f"peft and vLLM load adapters of experts only if all their matrices have one, and {missing} "
            f"{'has' if ',' not in missing else 'have'} none; export the whole model with --lora merge"
        )


def read_peft(folder: Path, config: ModelConfig, base: Params | None = None) -> Params:
    """Reads a PEFT folder as the adapters of a model.

    Where alpha_pattern or rank_pattern give modules another scale than `config.lora`, B is multiplied by their ratio; a
    lower rank is padded with zeros, which stay zero in training. `base`: the weights that the adapters are used with,
    to compare with the copies of embeddings that peft saves. Raises `UserError` if the adapters differ from
    `config.lora`, are damaged, or are not plain LoRA.
    """
    lora, described = _lora(config), read_config(folder)
    file = _AdapterFile(folder)
    factors = file.factors
    targets = [config.weight(name) for name in lora.targets]
    wanted = {module.name: module for module in _modules(config, [weight for weight in targets if weight.peft])}
    _check_adapters(file, config, described, wanted)
    for key, module in file.copies.items():
        _check_copy(file, key, module, config, base)
    abstract = trainable(config, shapes(config))[0]
    adapters: Params = {}
    for module in wanted.values():
        like = abstract[BLOCKS] if module.weight.in_block else abstract
        tree = adapters.setdefault(BLOCKS, {}) if module.weight.in_block else adapters
        for factor in "AB":
            name = f"{module.weight.name}_{factor.lower()}"
            [key] = factors[module.name, factor]
            shape = like[name].shape
            value = file.factor(key, factor, shape[len(module.at) :], described, module.name, lora)
            tree.setdefault(name, np.empty(shape, np.float32))[module.at] = value
    return adapters


class _AdapterFile:
    """The tensors of a folder's adapter_model.safetensors."""

    def __init__(self, folder: Path):
        """Raises `UserError` if the folder has no such file."""
        if not (folder / WEIGHTS).is_file():
            others = sorted(path.name for path in folder.glob("adapter_model*"))
            hint = f", only {', '.join(others)}; load and save the adapter with peft" if others else ""
            raise UserError(f"{folder}: no PEFT adapter can be read there, as it has no {WEIGHTS}{hint}")
        self.folder, self.shard = folder, Shard(str(folder / WEIGHTS))
        self.factors: dict[tuple[str, str], list[str]] = {}
        """(module, "A" or "B") → the tensors of that factor: one, unless the file is wrong."""
        self.copies: dict[str, str] = {}
        """Tensor → module whose weight in the base it is."""
        self.unknown: list[str] = []
        for key in self.shard.tensors:
            if copy := _BASE.fullmatch(key):
                self.copies[key] = copy[1]
            elif match := _LINEAR.fullmatch(key) or _EMBEDDING.fullmatch(key):
                self.factors.setdefault((match[1], match[2]), []).append(key)
            else:
                self.unknown.append(key)

    def factor(
        self, key: str, factor: str, shape: tuple[int, ...], described: AdapterConfig, module: str, lora: Lora
    ) -> np.ndarray:
        """Reads a factor of a module's adapter in our `shape` and f32, padded to `lora.rank`, scaled to `lora.scale`.

        Raises `UserError` if it has another shape in the file, or values that are not finite.
        """
        stored = self.shard.tensors[key]
        rank, size = described.rank_of(module), math.prod(shape[:-1] if factor == "A" else shape[1:])
        expected = (rank, size) if factor == "A" else (size, rank)
        if stored.shape != expected:
            raise UserError(
                f"{self.folder}: {key} is {list(stored.shape)}, the adapter of another base model, or of another rank "
                f"than {CONFIG} says ({rank}); {list(expected)} is expected"
            )
        if stored.dtype not in DTYPES:
            raise UserError(f"{self.folder}: {key} is {stored.dtype}; adapters are read as {', '.join(DTYPES)}")
        ratio = described.scale_of(module) / lora.scale
        with np.errstate(over="ignore"):  # reported below
            value = self.shard.read(key).astype(np.float32)
            value = value * np.float32(ratio) if factor == "B" and ratio != 1 else value
        check_finite(f"{self.folder}/{WEIGHTS}", key, value)
        missing = lora.rank - rank
        padded = np.pad(value, ((0, missing), (0, 0)) if factor == "A" else ((0, 0), (0, missing)))
        return padded.T.reshape(shape)


def _check_adapters(
    file: _AdapterFile, config: ModelConfig, described: AdapterConfig, wanted: Mapping[str, _Module]
) -> None:
    """Raises one `UserError` with every difference between the adapters of a folder and `config.lora`.

    `wanted`: the modules that have an adapter, by name.
    """
    lora, present = _lora(config), file.factors
    ranks = {module: described.rank_of(module) for module in wanted}
    alphas = {module: described.alpha_of(module) for module in wanted}
    differs = []
    if max(ranks.values(), default=lora.rank) != lora.rank:
        differs.append(f"the rank is {_values(ranks)} there and {lora.rank} in this config")
    if alphas and lora.alpha not in alphas.values():
        differs.append(f"alpha is {_values(alphas)} there and {lora.alpha!r} in this config")
    if described.rank_stabilized != lora.rank_stabilized:
        differs.append(
            f"rank_stabilized is {described.rank_stabilized} there and {lora.rank_stabilized} in this config"
        )
    if len({module.weight.name for module in wanted.values()}) < len(lora.targets):
        differs.append(f"lora.targets {', '.join(lora.targets)} are more than a PEFT folder can contain")
    lacking = [f"{PREFIX}{module}.lora_{name}" for module in wanted for name in "AB" if (module, name) not in present]
    foreign = [key for (module, _), keys in present.items() if module not in wanted for key in keys] + file.unknown
    for title, keys in (("missing", lacking), ("not of lora.targets", foreign)):
        if keys:
            differs.append(f"{title}: {', '.join(sorted(keys)[:3])}{', …' if len(keys) > 3 else ''}")
    twice = [f"{' and '.join(keys)} are both there" for keys in present.values() if len(keys) > 1]
    ignored = {
        f"{CONFIG} excludes {module} ({field}), and {WEIGHTS} contains an adapter for it"
        for module in wanted
        if (module, "A") in present and (field := described.ignores(module))
    }
    differs += twice[:3] + sorted(ignored)[:3]
    if config.tie_embeddings and EMBEDDING.module in wanted:
        differs.append("the model's embedding is tied to its head, where peft adds an adapter to the embedding alone")
    if differs:
        raise UserError(f"{file.folder}: other adapters than lora says: {'; '.join(differs)}")


def _values(of_modules: Mapping[str, Any]) -> str:
    return ", ".join(repr(value) for value in dict.fromkeys(of_modules.values()))


def _check_copy(file: _AdapterFile, key: str, module: str, config: ModelConfig, base: Params | None) -> None:
    """Raises `UserError` if an adapter folder contains other embeddings than the base."""
    if base is None:
        raise UserError(f"{file.folder}: contains {key}, weights of its base; name the base in model.init_from")
    copy = file.shard.read(key)
    is_head = module == HEAD.module and not config.tie_embeddings
    ours = np.asarray(base[HEAD.name if is_head else EMBEDDING.name])
    if ours.shape != copy.shape or not np.array_equal(ours.astype(copy.dtype), copy):
        raise UserError(
            f"{file.folder}: {key} {list(copy.shape)} differs from that of the base {list(ours.shape)}: the adapters "
            f"were trained with other weights; name that base in model.init_from, or {MERGE}"
        )
