"""The one schema of a run: YAML in, a frozen and checked `Config` out, with where each value came from.

    extends: base.yaml          # relative to this file; this file holds only what differs
    model:
      config: configs/models/mixtral_8x7b.json
    train:
      steps: 1000

Overrides on the command line name a field by its path: `train.steps=2000 mesh.fsdp=8`. Paths inside a config are
relative to the working directory. Nothing here imports JAX: a mistake is told before any device is touched.
"""

import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from xlam_jax.errors import UserError, nearest
from xlam_jax.models.config import ModelConfig, read_hf_config

Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
CHANGEABLE: dict[str, JsonValue] = {"changeable": True}
"""Marks a field that does not change what a run computes: a run may be continued with another value."""


class Section(BaseModel):
    """A frozen group of fields, each documented under itself; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Model(Section):
    """What is trained, and how it computes."""

    config: str
    """A Hugging Face config.json, or a folder that holds one."""
    overrides: dict[str, Any] = {}
    """Fields of that config.json to replace, such as `num_hidden_layers: 2`."""
    init_from: str | None = None
    """Weights to start from: a folder in Hugging Face format or made by converters.hf_to_orbax. None: random."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the matrix products; parameters, optimizer and sums are f32 throughout."""
    remat: Literal["none", "dots", "minimal", "full"] = "minimal"
    """What a block keeps for its backward pass: everything, its products' results, only the attention's, nothing."""


class Source(Section):
    """One source of the mixture."""

    name: str
    """The name in reports."""
    files: list[str] = Field(min_length=1)
    """JSONL files of unified trajectories."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this source's trajectories among those drawn, relative to the other weights."""


class Data(Section):
    """What is trained on."""

    sources: list[Source] = Field(min_length=1)
    """The mixture."""
    tokenizer: str
    """A Hugging Face tokenizer folder or hub name, or mistral:v1, mistral:v3 (from the mistral-common package)."""
    sequence_length: Count
    """Tokens of a packed row."""
    heldout: Share = 0.05
    """Share of the trajectories, chosen by a hash of their id, that is never trained on."""
    on_invalid: Literal["error", "drop"] = "error"
    """A trajectory that is not valid stops the run before it starts, or is left out and counted by reason."""
    on_long: Literal["error", "drop"] = "drop"
    """The same for a trajectory of more than `sequence_length` tokens."""
    streams: Count = 8
    """Independent streams that the data is dealt to; each packs on its own. Fixes the batches for any host count."""
    packing_bins: Count = 16
    """Rows that a stream fills at a time, best fit first. More pack tighter."""


class Train(Section):
    """The optimization."""

    steps: Count
    """Optimizer steps."""
    batch_size: Count
    """Packed rows of an optimizer step, over all devices."""
    microbatches: Count = 1
    """Parts that a batch is computed in, one after the other, to save memory. The gradient is that of the whole."""
    learning_rate: float = Field(gt=0)
    """At the end of the warm-up."""
    end_learning_rate: float = Field(default=0.0, ge=0)
    """At the last step; between, it follows a cosine."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear growth from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled (AdamW), on every parameter but the norms."""
    beta1: Share = 0.9
    """Decay of the gradient's mean."""
    beta2: Share = 0.95
    """Decay of the gradient's square."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the square."""
    clip_norm: float = Field(default=1.0, gt=0)
    """The gradient's greatest global norm."""
    router_aux_weight: float = Field(default=0.02, ge=0)
    """Weight of the load-balancing loss of a mixture of experts."""
    log_every: Count = Field(default=1, json_schema_extra=CHANGEABLE)
    """Steps between printed lines; every step is in metrics.jsonl."""


class Eval(Section):
    """The held-out loss."""

    every: Count = Field(default=100, json_schema_extra=CHANGEABLE)
    """Steps between evaluations; also before the first and after the last step."""
    batches: Count | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """At most so many batches. None: all held-out data."""


class Checkpoint(Section):
    """When the state is saved."""

    every: Count = Field(default=100, json_schema_extra=CHANGEABLE)
    """Steps between checkpoints; also after the last step and at SIGTERM."""
    keep: Count = Field(default=2, json_schema_extra=CHANGEABLE)
    """The newest so many are kept."""


class MeshShape(Section):
    """Devices along each axis of the mesh; -1 takes what the others leave, once."""

    data: int = 1
    """Copies of the model, each with its share of the batch."""
    fsdp: int = -1
    """Shares of the parameters and of the batch."""
    tensor: int = 1
    """Shares of heads, MLP width and vocabulary."""
    cpu_devices: Count = 1
    """Devices that a CPU is split into, to try a mesh without accelerators."""


class Config(Section):
    """A run."""

    output_dir: str
    """The run folder: checkpoints, metrics, the resolved config. Running again continues what it holds."""
    seed: int = 0
    """Of initial weights and of the order of the data."""
    model: Model
    """What is trained."""
    data: Data
    """On what."""
    train: Train
    """How."""
    eval: Eval = Eval()
    """Held-out loss."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving."""
    mesh: MeshShape = MeshShape()
    """On which devices."""


class _Yaml(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everyone who writes a learning rate means it."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Yaml)


class Resolved(typing.NamedTuple):
    """A checked config with what it refers to."""

    config: Config
    origins: dict[str, str]
    """Path of a field → the file or override that set it; a field that is not named has its default."""
    hf_config: dict[str, Any]
    """The model's config.json with `model.overrides` applied."""
    model: ModelConfig


def load(path: Path, overrides: list[str] | None = None) -> Resolved:
    """Reads a config file, applies overrides, and checks everything that can be checked without a device.

    Raises `UserError` that names the key, its origin, the offending values and what would do.
    """
    values, origins = _read(path, ())
    for override in overrides or []:
        _override(values, origins, override)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError("\n  ".join(_explain(problem, origins, str(path)) for problem in error.errors())) from None
    hf_path = Path(config.model.config)
    hf_path = hf_path / "config.json" if hf_path.is_dir() else hf_path
    hf_config = read_hf_config(hf_path) | config.model.overrides
    model = ModelConfig.from_hf(hf_config, str(hf_path))
    _check(config, model)
    return Resolved(config, origins, hf_config, model)


def _read(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself, by way of {' → '.join(str(one) for one in seen)}")
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a YAML config is expected" + _alike(path)) from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; a YAML config is expected") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}; a mapping of sections is expected")
    base = values.pop("extends", None)
    if base is None:
        merged, origins = {}, {}
    else:
        merged, origins = _read(path.parent / base, (*seen, path.resolve()))
    _merge(merged, origins, values, str(path), "")
    return merged, origins


def _alike(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    return nearest(path.name, siblings)


def _merge(into: dict[str, Any], origins: dict[str, str], values: dict[str, Any], origin: str, prefix: str) -> None:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(into.get(key, {}), dict):
            _merge(into.setdefault(key, {}), origins, value, origin, f"{name}.")
        else:
            into[key] = value
            origins[name] = origin


def _override(values: dict[str, Any], origins: dict[str, str], text: str) -> None:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"override {text!r}: expected section.key=value, such as train.steps=100")
    keys = name.split(".")
    node = values
    for depth, key in enumerate(keys[:-1]):
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise UserError(f"override {text!r}: {'.'.join(keys[: depth + 1])} is a value, not a section")
    try:
        node[keys[-1]] = _parse_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: {value!r} is not a YAML value: {' '.join(str(error).split())}") from None
    origins[name] = "command line"


def _explain(problem: Any, origins: dict[str, str], path: str) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    inside = [key for key in origins if key.startswith(f"{name}.")]
    origin = next((origins[key] for key in (name, *inside, *_parents(name)) if key in origins), path)
    if problem["type"] == "extra_forbidden":
        section = _section(problem["loc"][:-1])
        known = list(section.model_fields) if section else []
        return f"{origin}: unknown key {name}{nearest(str(problem['loc'][-1]), known)} (known: {', '.join(known)})"
    if problem["type"] == "missing":
        return f"{origin}: {name} is missing; it has no default"
    return f"{origin}: {name} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _section(location: tuple[Any, ...]) -> type[Section] | None:
    section: Any = Config
    for key in location:
        if isinstance(key, int):
            continue
        annotation = section.model_fields[key].annotation
        section = next(iter(typing.get_args(annotation)), annotation)
    return section if isinstance(section, type) and issubclass(section, Section) else None


def _check(config: Config, model: ModelConfig) -> None:
    """Combinations that no field rules out by itself."""
    train, mesh, data = config.train, config.mesh, config.data
    sizes = {"mesh.data": mesh.data, "mesh.fsdp": mesh.fsdp, "mesh.tensor": mesh.tensor}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"{name} is {size}; a positive number of devices, or -1 for what is left, is needed")
    if list(sizes.values()).count(-1) > 1:
        raise UserError("mesh: " + " and ".join(name for name, size in sizes.items() if size == -1) + " are both -1; "
                        "only one axis can take what the others leave")  # fmt: skip
    if train.warmup_steps >= train.steps:
        raise UserError(
            f"train.warmup_steps is {train.warmup_steps}, not less than train.steps, {train.steps}; "
            "the learning rate would never reach its full value"
        )
    if train.end_learning_rate > train.learning_rate:
        raise UserError(
            f"train.end_learning_rate is {train.end_learning_rate}, more than train.learning_rate, "
            f"{train.learning_rate}"
        )
    if data.sequence_length > model.max_positions:
        raise UserError(
            f"data.sequence_length is {data.sequence_length}, more than the model's max_position_embeddings, "
            f"{model.max_positions}; shorten the rows or choose another model"
        )
    if train.batch_size % data.streams:
        raise UserError(
            f"train.batch_size is {train.batch_size} and data.streams is {data.streams}; "
            "each stream gives the same number of rows to a batch, so the first must be a multiple of the second"
        )
    if len({source.name for source in data.sources}) < len(data.sources):
        raise UserError("data.sources: two sources have the same name; reports could not tell them apart")
    check_divisible(config, model, {axis: max(1, size) for axis, size in sizes.items()})


def check_divisible(config: Config, model: ModelConfig, sizes: dict[str, int]) -> None:
    """Every size that an axis of the mesh splits must be a multiple of it. Called again once -1 is known."""
    rows = sizes["mesh.data"] * sizes["mesh.fsdp"] * config.train.microbatches
    split = [
        ("train.batch_size", config.train.batch_size, "mesh.data × mesh.fsdp × train.microbatches", rows),
        ("the model's hidden_size", model.hidden_size, "mesh.fsdp", sizes["mesh.fsdp"]),
        ("the model's num_key_value_heads", model.kv_heads, "mesh.tensor", sizes["mesh.tensor"]),
        ("the model's intermediate_size", model.mlp_size, "mesh.tensor", sizes["mesh.tensor"]),
        ("the model's vocab_size", model.vocab_size, "mesh.tensor", sizes["mesh.tensor"]),
    ]
    for what, size, axis, parts in split:
        if size % parts:
            raise UserError(f"{what} is {size}, which {axis}, {parts}, does not divide")


def to_yaml(config: Config) -> str:
    """The resolved config as YAML; reading it back gives the same config."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def describe(resolved: Resolved) -> str:
    """The resolved config, a line a field: name, value, and where the value came from."""
    lines = []
    for name, value in flatten(resolved.config):
        origin = next((resolved.origins[key] for key in (name, *_parents(name)) if key in resolved.origins), "default")
        lines.append((f"{name}: {value!r}" if isinstance(value, str) else f"{name}: {value}", origin))
    width = min(72, max(len(left) for left, _ in lines))
    return "\n".join(f"{left:{width}}  # {origin}" for left, origin in lines)


def flatten(section: BaseModel, prefix: str = "") -> list[tuple[str, Any]]:
    """Every field of a config as (path, value)."""
    fields = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            fields += flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for at, item in enumerate(value):
                fields += flatten(item, f"{prefix}{name}.{at}.")
        else:
            fields.append((prefix + name, value))
    return fields


def differences(old: Config, new: Config) -> list[str]:
    """The fields that make `new` another run than `old`: those that change what is computed."""
    before, after = dict(flatten(old)), dict(flatten(new))
    return [
        f"{name}: {before.get(name)!r} in the run, {after.get(name)!r} now"
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name) and name != "output_dir" and not _changeable(name)
    ]


def _changeable(name: str) -> bool:
    section = _section(tuple(part for part in name.split(".")[:-1] if not part.isdigit()))
    field = section.model_fields.get(name.split(".")[-1]) if section else None
    return bool(field and isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("changeable"))


def field_help() -> str:
    """Every field with its type, default and meaning, for `--help`."""
    return "\n".join(_help(Config, ""))


def _help(section: type[BaseModel], prefix: str) -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            repeated = typing.get_origin(field.annotation) is list
            lines += _help(inner, f"{prefix}{name}.{'N.' if repeated else ''}")
            continue
        default = "required" if field.is_required() else f"default {field.default!r}"
        lines.append(f"  {prefix}{name} ({_type_name(field.annotation)}, {default})")
        lines.append(f"      {field.description}")
    return lines


def _section_of(annotation: Any) -> type[Section] | None:
    candidates = (annotation, *typing.get_args(annotation))
    return next((one for one in candidates if isinstance(one, type) and issubclass(one, Section)), None)


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " | ".join(_type_name(one) for one in typing.get_args(annotation))
    return "none" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
