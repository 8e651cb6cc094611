"""Adapters and PEFT folders: adapter_config.json and adapter_model.safetensors, as `peft` and vLLM load them.

PEFT keeps a factor A as [rank, inputs] and B as [outputs, rank], for each layer; ours are stacked over layers, with the
heads unflattened, inputs first. Adapters of experts and of the router have no place there that both `peft` and vLLM
read, and are refused: merge those.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.shards import read_tensors
from xlam_jax.errors import UserError
from xlam_jax.models.config import Lora, ModelConfig

if TYPE_CHECKING:
    from xlam_jax.models.params import Params

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "w1": "mlp.gate_proj",
    "w3": "mlp.up_proj",
    "w2": "mlp.down_proj",
    "head": "lm_head",
}


def write_peft(folder: Path, config: ModelConfig, adapters: "Params", base: str | None) -> None:
    """Writes the adapters of a model into a new folder. Raises `UserError` for those that PEFT has no place for."""
    from safetensors.numpy import save_file

    lora = _lora(config)
    homeless = [target for target in lora.targets if target not in _writable(config)]
    if homeless:
        raise UserError(
            f"adapters on {', '.join(homeless)} have no layout that both peft and vLLM load; "
            "export the whole model with --lora merge"
        )
    folder.mkdir(parents=True)
    tensors = {}
    for target in lora.targets:
        for layer, a, b in _factors(adapters, target):
            key = PREFIX + _module(target, layer)
            tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, lora.rank).T)
            tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(b.reshape(lora.rank, -1).T)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "target_modules": sorted(MODULES[target].rpartition(".")[2] for target in lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_peft(folder: Path, config: ModelConfig) -> "Params":
    """Reads a PEFT folder as the adapters of a model. Raises `UserError` when they are others than `config.lora`."""
    lora = _lora(config)
    try:
        described = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        tensors = read_tensors(str(folder / WEIGHTS))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder}: no PEFT adapter can be read there ({error}); {CONFIG} and {WEIGHTS} are expected"
        ) from None
    differs = [
        f"{name} is {described.get(key)!r} there and {ours!r} in this config"
        for name, key, ours in (
            ("the rank", "r", lora.rank),
            ("alpha", "lora_alpha", lora.alpha),
            ("rank_stabilized", "use_rslora", lora.rank_stabilized),
        )
        if described.get(key, False) != ours
    ]
    wanted = {
        f"{PREFIX}{_module(target, layer)}.lora_{factor}.weight": (target, layer, factor)
        for target in lora.targets
        for layer in ([None] if target == "head" else range(config.layers))
        for factor in "AB"
        if target in _writable(config)
    }
    if len(wanted) < 2 * len(lora.targets):
        differs.append(f"lora.targets {', '.join(lora.targets)} are more than a PEFT folder holds")
    for title, keys in (("missing", wanted.keys() - tensors.keys()), ("not of lora.targets", tensors.keys() - wanted)):
        if keys:
            differs.append(f"{title}: {', '.join(sorted(keys)[:3])}{', …' if len(keys) > 3 else ''}")
    if differs:
        raise UserError(f"{folder}: other adapters than lora says: {'; '.join(differs)}")
    shapes = _shapes(config)
    adapters: Params = {}
    for key, (target, layer, factor) in wanted.items():
        shape = shapes[f"{target}_{factor.lower()}"]
        value = tensors[key].T
        if value.size != np.prod(shape[0 if layer is None else 1 :]):
            raise UserError(f"{folder}: {key} is {tensors[key].shape}, the adapter of another base model")
        tree = adapters if layer is None else adapters.setdefault("blocks", {})
        name = f"{target}_{factor.lower()}"
        if layer is None:
            tree[name] = value.reshape(shape).astype(np.float32)
        else:
            tree.setdefault(name, np.empty(shape, np.float32))[layer] = value.reshape(shape[1:])
    return adapters


class Merged:
    """A weight with its adapter's product added, in f32 and then in the weight's dtype: layer by layer (and expert by
    expert) as they are asked for."""

    def __init__(self, weight: Any, a: np.ndarray, b: np.ndarray, scale: float, transposed: bool):
        """`transposed`: the weight is kept outputs first."""
        self._weight, self._a, self._b, self._scale, self._transposed = weight, a, b, scale, transposed
        self.shape, self.dtype, self.size, self.ndim = weight.shape, weight.dtype, weight.size, weight.ndim

    def __getitem__(self, at: tuple[int, ...]) -> np.ndarray:
        """The slice at an index along the leading axes."""
        weight = np.asarray(self._weight[at])
        a, b = (np.asarray(factor[at], np.float32) for factor in (self._a, self._b))
        rank = a.shape[-1]
        product = a.reshape(-1, rank) @ b.reshape(rank, -1)
        if self._transposed:
            product = product.T
        return (weight.astype(np.float32) + self._scale * product.reshape(weight.shape)).astype(weight.dtype)


def merge(config: ModelConfig, base: "Params", adapters: "Params") -> "Params":
    """The base's parameters, of which those with adapters are `Merged`; none of them is computed yet."""
    scale = _lora(config).scale
    return {
        name: merge(config, value, adapters.get(name, {}))
        if isinstance(value, dict)
        else Merged(value, adapters[f"{name}_a"], adapters[f"{name}_b"], scale, transposed=name == "head")
        if f"{name}_a" in adapters
        else value
        for name, value in base.items()
    }


def _lora(config: ModelConfig) -> Lora:
    if config.lora is None:
        raise ValueError("the model has no adapters")
    return config.lora


def _writable(config: ModelConfig) -> list[str]:
    return [target for target in MODULES if not (config.experts and target in ("w1", "w2", "w3"))]


def _module(target: str, layer: int | None) -> str:
    return MODULES[target] if layer is None else f"model.layers.{layer}.{MODULES[target]}"


def _factors(adapters: "Params", target: str) -> list[tuple[int | None, np.ndarray, np.ndarray]]:
    if target == "head":
        return [(None, np.asarray(adapters["head_a"]), np.asarray(adapters["head_b"]))]
    a, b = (np.asarray(adapters["blocks"][f"{target}_{factor}"]) for factor in "ab")
    return [(layer, a[layer], b[layer]) for layer in range(len(a))]


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    from xlam_jax.models.params import shapes, trainable

    tree = trainable(config, shapes(config))[0]
    return {
        name: leaf.shape for part in (tree, tree.get("blocks", {})) for name, leaf in part.items() if name != "blocks"
    }
