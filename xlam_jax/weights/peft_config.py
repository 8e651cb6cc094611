"""adapter_config.json of a PEFT folder: which adapters it describes, as `peft` reads it."""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from xlam_jax import documents
from xlam_jax.errors import UserError
from xlam_jax.models.hf_values import is_number
from xlam_jax.models.weights_table import EMBEDDING, HEAD

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

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
"""Fields that change the result and are read."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # other values change the base weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) or the forward pass (MiCA)
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layers_pattern": (None, [], "", "layers", ["layers"]),
}
"""Field → values that change nothing; others are refused. A field that is not in this module is refused unless it is
null, false or empty."""
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
"""Fields of variants of LoRA; refused unless they are off."""
IRRELEVANT = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",  # only acts in training, where lora.dropout decides
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
    """A checked adapter_config.json of plain LoRA. Modules have their names in the base model."""

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
        return by_pattern(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module's adapter."""
        return by_pattern(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """The factor of B·A of a module."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rank_stabilized else rank)

    def ignores(self, module: str) -> str | None:
        """Returns the field that excludes a module from the adapters, with its value; None if peft adapts it."""
        is_linear = self.targets == "all-linear" and module not in (EMBEDDING.module, HEAD.module)
        if not is_linear and not _matches(self.targets, module):
            return f"target_modules {_shown(self.targets)}"
        if _matches(self.excluded, module):
            return f"exclude_modules {_shown(self.excluded)}"
        layer = re.search(r"\.layers\.(\d+)\.", f".{module}")
        if self.layers is not None and (layer is None or int(layer[1]) not in self.layers):
            return f"layers_to_transform {list(self.layers)}"
        return None

    def refuse_patterns(self) -> None:
        """Raises `UserError` if modules differ in rank or alpha: vLLM scales all of them by the same alpha and rank."""
        for key, common, pattern in (
            ("rank_pattern", self.rank, self.rank_pattern),
            ("alpha_pattern", self.alpha, self.alpha_pattern),
        ):
            if any(value != common for value in pattern.values()):
                raise UserError(
                    f"{self.where}: {key} is {dict(pattern)!r}, which vLLM ignores: it scales every adapter by "
                    f"lora_alpha {self.alpha:g} and r {self.rank}; {MERGE}"
                )


def by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """peft's rule: keys are regular expressions, and the first that matches the end of the name, after a dot, or all of
    it, decides."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    """peft's rule: a text is a regular expression of the whole name, a list contains names or their ends."""
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _shown(names: str | tuple[str, ...]) -> str:
    return repr(names if isinstance(names, str) else list(names))


def read_config(folder: Path) -> AdapterConfig:
    """Reads and checks a folder's adapter_config.json.

    Raises one `UserError` if it can't be read, a value is invalid, or the adapters are not plain LoRA: no field that
    changes the result is ignored.
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
        raise UserError(f"{where}: {', '.join(refused)}; only plain LoRA on unchanged base weights is read: {MERGE}")
    return check_config(str(where), described)


def check_config(where: str, described: Mapping[str, Any]) -> AdapterConfig:
    """Checks each field that is read. Raises `UserError`, naming `where`, for an invalid value."""
    return _Fields(where, described).config()


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
        """The value, or the default of peft if there is none."""
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
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # Python may read it as another expression later
                re.compile(expression)
        except (re.error, FutureWarning) as error:
            raise UserError(f"{self._where}: {key}: {expression!r} is not a regular expression ({error})") from None

    def _refuse(self, key: str, expected: str) -> NoReturn:
        raise UserError(f"{self._where}: {key} is {self._described.get(key)!r}; {expected} is expected")


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_number(value: object) -> bool:
    return is_number(value, least=-3.4e38)
