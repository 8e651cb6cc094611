"""Adapters and PEFT folders: adapter_config.json and adapter_model.safetensors, as `peft` and vLLM load them.

PEFT keeps a factor A as [rank, inputs] and B as [outputs, rank], for each layer; ours are stacked over layers, with the
heads unflattened, inputs first. Adapters of experts and of the router have no place there that both `peft` and vLLM
read, and are refused: merge those.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from xlam_jax import documents
from xlam_jax.errors import UserError
from xlam_jax.models.config import Lora, ModelConfig
from xlam_jax.weights.shards import DTYPES, Shard
from xlam_jax.weights.transfer import check_finite

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
    "embedding": "model.embed_tokens",
    "head": "lm_head",
}
UNSTACKED = ("embedding", "head")
"""Weights that are there once, not in each layer."""

# ---- the fields of adapter_config.json ------------------------------------------------------------------------------

HONOURED = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
)
"""Fields that change the result, and that reading takes into account."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # other values change the base weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) or the forward pass (MiCA)
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layers_pattern": (None, [], "", "layers", ["layers"]),
}
"""Fields with the values that change nothing; any other is refused. A field that is not named in this file is refused
unless it is null, false or empty."""
OFF = (None, False, [], {}, "")
"""Values of a switch or setting that is off."""
VARIANTS = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "lora_bias",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
    "megatron_config",
    "alora_invocation_tokens",
    "ensure_weight_tying",
)
"""Fields of what is not plain LoRA; refused unless they are off."""
IRRELEVANT = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",  # only acts in training, where lora.dropout says it
    "runtime_config",
    "megatron_core",  # only with megatron_config
    "qalora_group_size",  # only with use_qalora
    "loftq_config",  # these only act with the init_lora_weights of their name
    "eva_config",
    "corda_config",
    "lora_ga_config",
)
"""Fields that do not change what trained adapters compute."""
MERGE = "merge it into its base with peft (merge_and_unload), and use the merged model"


@dataclass(frozen=True)
class AdapterConfig:
    """A checked adapter_config.json of plain LoRA. Modules go by their names in the base model."""

    where: str
    rank: int
    alpha: float
    rank_stabilized: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module's adapter."""
        return _by_pattern(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """What B·A of a module is multiplied with."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rank_stabilized else rank)

    def ignores(self, module: str) -> str | None:
        """The field because of which peft makes no adapter for a module, with its value; None where it makes one."""
        everything = self.targets == "all-linear" and module not in (MODULES["embedding"], MODULES["head"])
        if not everything and not _matches(self.targets, module):
            return f"target_modules {_shown(self.targets)}"
        if _matches(self.excluded, module):
            return f"exclude_modules {_shown(self.excluded)}"
        layer = re.search(r"\.layers\.(\d+)\.", f".{module}")
        if self.layers is not None and (layer is None or int(layer[1]) not in self.layers):
            return f"layers_to_transform {list(self.layers)}"
        return None

    def refuse_patterns(self) -> None:
        """Raises `UserError` where modules differ in rank or alpha: vLLM scales all of them by one alpha and rank."""
        for key, common, pattern in (
            ("rank_pattern", self.rank, self.rank_pattern),
            ("alpha_pattern", self.alpha, self.alpha_pattern),
        ):
            if any(value != common for value in pattern.values()):
                raise UserError(
                    f"{self.where}: {key} is {dict(pattern)!r}, which vLLM ignores: it scales every adapter by "
                    f"lora_alpha {self.alpha:g} and r {self.rank}; {MERGE}"
                )


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """peft's rule: the first key that matches the end of the name, from a dot or the start on, as a regular
    expression."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    """peft's rule: a text is a regular expression of the whole name, a list holds names or their ends."""
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _shown(names: str | tuple[str, ...]) -> str:
    return repr(names if isinstance(names, str) else list(names))


def read_config(folder: Path) -> AdapterConfig:
    """Reads and checks a folder's adapter_config.json.

    Raises one `UserError` where it can't be read, a value is invalid, or it says that the adapters are not plain LoRA:
    no field that changes the result is ignored.
    """
    where = folder / CONFIG
    described = documents.read_object(where, f"a PEFT adapter with {CONFIG} and {WEIGHTS} is expected")
    if described.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {described.get('peft_type')!r}; only LORA is read: {MERGE}")
    neutral = NEUTRAL | dict.fromkeys(VARIANTS, OFF)
    refused = [
        f"{key} is {value!r}"
        for key, value in described.items()
        if key not in HONOURED and key not in IRRELEVANT and value not in neutral.get(key, OFF)
    ]
    if refused:
        raise UserError(
            f"{where}: {', '.join(refused)}; only plain LoRA beside unchanged base weights is read: {MERGE}"
        )
    return _Fields(str(where), described).config()


class _Fields:
    """The fields of an adapter_config.json, each checked as it is read."""

    def __init__(self, where: str, described: Mapping[str, Any]):
        self._where, self._described = where, described

    def config(self) -> AdapterConfig:
        return AdapterConfig(
            self._where,
            rank=self._checked("r", 8, _is_rank, "a positive whole number"),
            alpha=self._checked("lora_alpha", 8, _is_number, "a finite number"),
            rank_stabilized=self._checked("use_rslora", False, lambda value: type(value) is bool, "true or false"),
            rank_pattern=self._pattern("rank_pattern", _is_rank, "positive whole numbers"),
            alpha_pattern=self._pattern("alpha_pattern", _is_number, "finite numbers"),
            targets=self._names("target_modules", required=True),
            excluded=self._names("exclude_modules", required=False),
            layers=self._layers(),
        )

    def _checked(self, key: str, default: Any, holds: Any, expected: str) -> Any:
        """The value, or the default of peft where there is none."""
        value = self._described.get(key)
        value = default if value is None else value
        if not holds(value):
            self._refuse(key, expected)
        return value

    def _pattern(self, key: str, holds: Any, expected: str) -> dict[str, Any]:
        expected = f"an object of module names (or regular expressions) and {expected}"
        is_pattern = lambda value: isinstance(value, dict) and all(map(holds, value.values()))  # noqa: E731
        pattern = self._checked(key, {}, is_pattern, expected)
        for name in pattern:
            self._check_expression(key, name)
        return pattern

    def _names(self, key: str, required: bool) -> str | tuple[str, ...]:
        value = self._described.get(key)
        if value is None and not required:
            return ()
        if isinstance(value, str):
            self._check_expression(key, value)
            return value
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self._refuse(key, "a list of module names, or a regular expression,")
        return tuple(value)

    def _layers(self) -> tuple[int, ...] | None:
        value = self._described.get("layers_to_transform")
        if value is None or value == []:
            return None
        value = value if isinstance(value, list) else [value]
        if not all(type(layer) is int for layer in value):
            self._refuse("layers_to_transform", "a layer's index, or a list of them,")
        return tuple(value)

    def _check_expression(self, key: str, expression: str) -> None:
        try:
            re.compile(expression)
        except re.error as error:
            raise UserError(f"{self._where}: {key}: {expression!r} is not a regular expression ({error})") from None

    def _refuse(self, key: str, expected: str) -> NoReturn:
        raise UserError(f"{self._where}: {key} is {self._described.get(key)!r}; {expected} is expected")


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # pyright: ignore[reportArgumentType]


# ---- reading and writing --------------------------------------------------------------------------------------------


def write_peft(
    folder: Path, config: ModelConfig, adapters: "Params", base: str | None, of: str = "the adapters"
) -> None:
    """Writes the adapters of a model into a new folder.

    Raises `UserError` for adapters that PEFT has no place for, and, naming `of`, for values that are not finite.
    """
    from safetensors.numpy import save_file

    lora = _lora(config)
    homeless = [target for target in lora.targets if target not in _writable(config)]
    if homeless:
        raise UserError(
            f"adapters on {', '.join(homeless)} have no layout that both peft and vLLM load; "
            "export the whole model with --lora merge"
        )
    tensors: dict[str, np.ndarray] = {}
    for target in lora.targets:
        for layer, a, b in _factors(adapters, target):
            key = PREFIX + _module(target, layer)
            tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, lora.rank).T)
            tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(b.reshape(lora.rank, -1).T)
    for key, value in tensors.items():
        check_finite(of, key, value)
    folder.mkdir(parents=True)
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


_LINEAR = re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_EMBEDDING = re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_embedding_([AB])(?:\.[^.]+)?")
_BASE = re.compile(rf"(?:{re.escape(PREFIX)})?(lm_head|model\.embed_tokens)(?:\.base_layer)?\.weight")
"""Copies of the base's embeddings, which peft saves along with adapters on them."""


def read_peft(folder: Path, config: ModelConfig, base: "Params | None" = None) -> "Params":
    """Reads a PEFT folder as the adapters of a model.

    Where alpha_pattern or rank_pattern give modules another scale than `config.lora`, it is multiplied into B; a lower
    rank is filled up with zeros, which stay zero in training. `base`: the weights that the adapters are used beside, to
    compare with the copies of embeddings that peft saves. Raises `UserError` when the adapters are others than
    `config.lora`, are damaged, or are not plain LoRA.
    """
    lora, described = _lora(config), read_config(folder)
    file = _open_weights(folder)
    present: dict[tuple[str, str], list[str]] = {}
    copies, unknown = {}, []
    for key in file.tensors:
        if copy := _BASE.fullmatch(key):
            copies[key] = copy[1]
        elif match := _LINEAR.fullmatch(key) or _EMBEDDING.fullmatch(key):
            present.setdefault((match[1], match[2]), []).append(key)
        else:
            unknown.append(key)
    wanted = {
        _module(target, layer): (target, layer)
        for target in lora.targets
        if target in _readable(config)
        for layer in ([None] if target in UNSTACKED else range(config.layers))
    }
    _check_adapters(folder, config, described, wanted, present, unknown)
    for key, module in copies.items():
        _check_copy(folder, file.read(key), key, module, config, base)
    shapes = _shapes(config)
    adapters: Params = {}
    for module, (target, layer) in wanted.items():
        factor = described.scale_of(module) / lora.scale
        for name in "AB":
            [key] = present[module, name]
            shape = shapes[f"{target}_{name.lower()}"]
            shape = shape if layer is None else shape[1:]
            stored = (file.tensors[key].dtype, file.tensors[key].shape)
            expected = (described.rank_of(module), math.prod(shape[:-1] if name == "A" else shape[1:]))
            if stored[1] != (expected if name == "A" else expected[::-1]):
                raise UserError(
                    f"{folder}: {key} is {list(stored[1])}, the adapter of another base model, or of another rank than "
                    f"{CONFIG} says ({expected[0]}); {list(expected if name == 'A' else expected[::-1])} is expected"
                )
            if stored[0] not in DTYPES:
                raise UserError(f"{folder}: {key} is {stored[0]}; adapters are read as {', '.join(DTYPES)}")
            with np.errstate(over="ignore"):  # reported below
                value = file.read(key).astype(np.float32)
                value = value * np.float32(factor) if name == "B" and factor != 1 else value
            check_finite(f"{folder}/{WEIGHTS}", key, value)
            missing = lora.rank - expected[0]
            value = np.pad(value, ((0, missing), (0, 0)) if name == "A" else ((0, 0), (0, missing))).T.reshape(shape)
            tree = adapters if layer is None else adapters.setdefault("blocks", {})
            whole = f"{target}_{name.lower()}"
            if layer is None:
                tree[whole] = value
            else:
                tree.setdefault(whole, np.empty(shapes[whole], np.float32))[layer] = value
    return adapters


def _open_weights(folder: Path) -> Shard:
    if not (folder / WEIGHTS).is_file():
        others = sorted(path.name for path in folder.glob("adapter_model*"))
        hint = f", only {', '.join(others)}; load and save the adapter with peft" if others else ""
        raise UserError(f"{folder}: no PEFT adapter can be read there, as it has no {WEIGHTS}{hint}")
    return Shard(str(folder / WEIGHTS))


def _check_adapters(
    folder: Path,
    config: ModelConfig,
    described: AdapterConfig,
    wanted: Mapping[str, Any],
    present: Mapping[tuple[str, str], list[str]],
    unknown: list[str],
) -> None:
    """Raises one `UserError` with everything in which the adapters of a folder are others than `config.lora`."""
    lora = _lora(config)
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
    if len({target for target, _ in wanted.values()}) < len(lora.targets):
        differs.append(f"lora.targets {', '.join(lora.targets)} are more than a PEFT folder holds")
    lacking = [f"{PREFIX}{module}.lora_{name}" for module in wanted for name in "AB" if (module, name) not in present]
    foreign = [key for (module, _), keys in present.items() if module not in wanted for key in keys] + unknown
    for title, keys in (("missing", lacking), ("not of lora.targets", foreign)):
        if keys:
            differs.append(f"{title}: {', '.join(sorted(keys)[:3])}{', …' if len(keys) > 3 else ''}")
    twice = [f"{' and '.join(keys)} are both there" for keys in present.values() if len(keys) > 1]
    ignored = {
        f"{CONFIG} leaves {module} out ({field}), and {WEIGHTS} holds an adapter for it"
        for module in wanted
        if (module, "A") in present and (field := described.ignores(module))
    }
    differs += twice[:3] + sorted(ignored)[:3]
    if config.tie_embeddings and MODULES["embedding"] in wanted:
        differs.append("the model's embedding is tied to its head, where peft adds an adapter to the embedding alone")
    if differs:
        raise UserError(f"{folder}: other adapters than lora says: {'; '.join(differs)}")


def _values(of_modules: Mapping[str, Any]) -> str:
    return ", ".join(repr(value) for value in dict.fromkeys(of_modules.values()))


def _check_copy(
    folder: Path, copy: np.ndarray, key: str, module: str, config: ModelConfig, base: "Params | None"
) -> None:
    """Raises `UserError` where an adapter folder holds other embeddings than the base."""
    if base is None:
        raise UserError(f"{folder}: holds {key}, weights of its base; name the base in model.init_from")
    head = module == MODULES["head"] and not config.tie_embeddings
    ours = np.asarray(base["head" if head else "embedding"])
    if ours.shape != copy.shape or not np.array_equal(ours.astype(copy.dtype), copy):
        raise UserError(
            f"{folder}: {key} {list(copy.shape)} differs from that of the base {list(ours.shape)}: the adapters were "
            f"trained beside other weights; name that base in model.init_from, or {MERGE}"
        )


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


def _readable(config: ModelConfig) -> list[str]:
    return [target for target in MODULES if not (config.experts and target in ("w1", "w2", "w3"))]


def _writable(config: ModelConfig) -> list[str]:
    """Those that vLLM reads too."""
    return [target for target in _readable(config) if target != "embedding"]


def _module(target: str, layer: int | None) -> str:
    return MODULES[target] if layer is None else f"model.layers.{layer}.{MODULES[target]}"


def _factors(adapters: "Params", target: str) -> list[tuple[int | None, np.ndarray, np.ndarray]]:
    if target in UNSTACKED:
        return [(None, np.asarray(adapters[f"{target}_a"]), np.asarray(adapters[f"{target}_b"]))]
    a, b = (np.asarray(adapters["blocks"][f"{target}_{factor}"]) for factor in "ab")
    return [(layer, a[layer], b[layer]) for layer in range(len(a))]


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    from xlam_jax.models.params import shapes, trainable

    tree = trainable(config, shapes(config))[0]
    return {
        name: leaf.shape for part in (tree, tree.get("blocks", {})) for name, leaf in part.items() if name != "blocks"
    }
