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
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from xlam_jax import documents
from xlam_jax.errors import UserError, nearest
from xlam_jax.models import hf_keys
from xlam_jax.models.config import Lora, ModelConfig, read_hf_config

Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
HF_TARGETS = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "gate": "router",
    "embed_tokens": "embedding",
    "lm_head": "head",
}
"""Names that users of Hugging Face know the weights by."""
_ON_PAIRS = ("sigmoid", "hinge", "ipo", "kto_pair", "simpo", "orpo")
PAIRS = "pairs"
"""The format of a source that holds pairs."""
SCHEMA = 1
"""Number of this schema. It grows when a key is renamed or removed, or a value gets another meaning."""
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
    """Fields of that config.json to replace, such as `num_hidden_layers: 2`; only those that the family has."""
    init_from: str | None = None
    """Weights to start from: a folder in Hugging Face format or made by converters.hf_to_orbax. None: random."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the matrix products; parameters, optimizer and sums are f32 throughout."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients of weights are summed over mesh.fsdp; bfloat16 halves that traffic."""
    remat: Literal["none", "dots", "minimal", "full", "offload"] = Field(
        default="minimal", json_schema_extra=CHANGEABLE
    )
    """What a block keeps for its backward pass: everything, its products' results, only the attention's, nothing but
    its input, or its input and the attention's result in the host's memory."""
    attention: Literal["auto", "xla", "splash", "pallas"] = Field(default="auto", json_schema_extra=CHANGEABLE)
    """How attention is computed: by XLA, by the splash kernel (TPU) or by a Pallas kernel (GPU); auto takes the kernel
    of the devices where it has the model's head size and window, and says which."""
    experts: Literal["auto", "xla", "megablox", "triton"] = Field(default="auto", json_schema_extra=CHANGEABLE)
    """How a mixture's experts are computed: by XLA, or by a grouped matrix product (megablox on a TPU, triton on a
    GPU); auto takes the devices' own where mesh.expert is 1."""


class Filters(Section):
    """Which trajectories of a source are kept; what is left out is counted by reason."""

    min_score: float | None = None
    """Trajectories with a lower score, or with none, are left out."""
    min_turns: int = Field(default=0, ge=0)
    """Fewest turns."""
    max_turns: Count | None = None
    """Most turns."""
    min_calls: int = Field(default=0, ge=0)
    """Fewest tool calls."""
    tools: list[str] = []
    """Only trajectories that call one of these tools. Empty: any."""
    exclude: list[str] = []
    """Ids of trajectories to leave out, such as those of a benchmark's test set."""


class Source(Section):
    """One source of the mixture: exactly one of `files`, `dataset` and `tfds` says where it lies."""

    name: str
    """The name in reports."""
    files: list[str] = []
    """Files of trajectories: .jsonl (also .jsonl.gz, .jsonl.zst), .parquet, .array_record."""
    dataset: str | None = None
    """A dataset of the `datasets` library: a folder or a name on the Hugging Face hub."""
    subset: str | None = None
    """The dataset's configuration, where it has several."""
    streaming: bool = False
    """Read a hub dataset row by row instead of downloading it first; useful with `limit`."""
    tfds: str | None = None
    """A TFDS name such as unified_trajectories/webshop:1.0.0, as ArrayRecord."""
    split: str = "train"
    """The split of `dataset` or `tfds`."""
    format: str = "unified"
    """The rows' format: unified, or one that python -m converters.trajectories knows; or pairs, as
    python -m xlam_jax.data pairs writes them, for an objective on pairs."""
    weight: float | None = Field(default=None, gt=0)
    """Share in the mixture relative to the other weights. None: 1, or `size` × `epochs` if any source has `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over this source relative to the other sources: its weight is `size` × `epochs`."""
    size: Count | None = None
    """With `epochs`: the number that counts as the source's size. None: how many trajectories it has."""
    limit: Count | None = None
    """Only the first so many trajectories that pass the filters."""
    filters: Filters = Filters()
    """Which trajectories are kept."""


class Loss(Section):
    """Which tokens carry loss, and how much. A turn's own `loss: false` always takes its loss away."""

    turns: Literal["all", "last"] = "all"
    """Every assistant turn, or only the last one."""
    thought: float = Field(default=1.0, ge=0)
    """Weight of the text beside tool calls."""
    tool_call: float = Field(default=1.0, ge=0)
    """Weight of tool calls, and of the end token after them."""
    answer: float = Field(default=1.0, ge=0)
    """Weight of turns without calls, and of the end token after them."""


class Augment(Section):
    """Variants of the prompt, drawn anew each time a trajectory is seen. The draw depends on the seed alone."""

    tools: bool = False
    """Shuffle the order of the tools."""
    fields: bool = False
    """Shuffle the order of the fields inside each tool's schema."""
    sections: bool = False
    """Shuffle the order of the prompt's sections, where the format has sections."""
    instructions: bool = False
    """Word the format instruction in one of several ways, where the format has one."""
    negatives: Share = 0.0
    """Share of single-call trajectories whose called tool is taken away and whose answer becomes a refusal in words."""

    @property
    def active(self) -> bool:
        """Whether any variant is asked for."""
        return self != Augment()


class Data(Section):
    """What is trained on."""

    sources: list[Source] = Field(min_length=1)
    """The mixture."""
    share: Literal["examples", "tokens"] = "examples"
    """What the weights divide among the sources: trajectories or tokens that carry loss."""
    tokenizer: str
    """A Hugging Face tokenizer folder or hub name, or mistral:v1, mistral:v3 (from the mistral-common package)."""
    format: Literal["xlam", "native", "xlam_v1"] = "xlam"
    """How a trajectory becomes text: the project's own template, the tokenizer's own, or xLAM v1's single prompt."""
    loss: Loss = Loss()
    """Which tokens carry loss."""
    augment: Augment = Augment()
    """Variants of the prompt; all off by default."""
    sequence_length: Count
    """Tokens of a packed row."""
    heldout: Share = 0.05
    """Share of the trajectories, chosen by a hash of their id, that is never trained on."""
    on_invalid: Literal["error", "drop"] = "error"
    """A trajectory that is not valid stops the run before it starts, or is left out and counted by reason."""
    on_long: Literal["error", "drop", "cut", "split"] = "drop"
    """The same for a trajectory of more than `sequence_length` tokens; or whole turns are cut from the oldest on
    (system and tools stay); or it is split between turns, each part with as many turns before it as fit."""
    cache: str | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """A folder made by python -m xlam_jax.data prepare, read in place of the sources; a stale one is refused."""
    on_change: Literal["error", "warn"] = Field(default="error", json_schema_extra=CHANGEABLE)
    """When a run is resumed and a source or the tokenizer is not what it was at the checkpoint: refuse, or report what
    changed and where the data continue."""
    streams: Count = 8
    """Independent streams that the data is dealt to; each packs on its own. Fixes the batches for any host count."""
    packing_bins: Count = 16
    """Rows that a stream fills at a time, best fit first. More pack tighter."""
    max_pairs: Count = 8
    """Pairs that a row holds at most, where the sources hold pairs. Both sides of a pair lie in one row."""

    @property
    def pairs(self) -> bool:
        """Whether the sources hold pairs."""
        return self.sources[0].format == PAIRS


class ObjectiveSection(Section):
    """What is minimized."""

    kind: Literal["sft", "sigmoid", "hinge", "ipo", "kto_pair", "simpo", "orpo"] = "sft"
    """sft: cross-entropy. The others are losses on pairs of a chosen and a rejected answer (sigmoid: DPO), and every
    source has the format pairs."""
    beta: float = Field(default=0.1, gt=0)
    """Scale of a pair's rewards. For simpo 2 to 10, for orpo the weight λ of the odds ratio's term."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """sigmoid: share of pairs taken to be labelled the wrong way round."""
    margin: float = Field(default=0.0, ge=0)
    """simpo: by how much the chosen side's reward should lead, γ."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy a token of the chosen side; orpo has it with weight 1."""
    reference: Literal["auto", "adapters_off", "precomputed", "none"] = "auto"
    """The policy that the rewards are relative to: the model without its adapters, computed beside it; the weights that
    the run starts from, computed once and kept in a folder; or none. auto: the first with adapters, the second
    without, none for simpo and orpo."""
    reference_cache: str | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """Where a precomputed reference is kept; another run with the same data and weights may use it too. None:
    reference/ in output_dir."""


class LoraSection(Section):
    """Low-rank adapters, where `train.trainable` is lora or qlora."""

    targets: list[str] = Field(default=["q", "k", "v", "o"], min_length=1)
    """Weights with an adapter, of q, k, v, o, w1 (gate), w3 (up), w2 (down), router, embedding, head. In a mixture of
    experts w1, w3 and w2 have one for each expert."""
    rank: Count = 32
    """Columns of A and rows of B."""
    alpha: float = Field(default=64.0, gt=0)
    """The adapter's product is scaled by alpha / rank."""
    rank_stabilized: bool = False
    """Scale by alpha / √rank instead."""
    dropout: Share = 0.0
    """Of what an adapter sees, in training; for q, k, v, o and a dense MLP."""
    zero: Literal["A", "B"] = "B"
    """The factor that starts at zero; the other is drawn."""
    init_from: str | None = None
    """Adapters to start from: a PEFT folder."""


class Train(Section):
    """The optimization."""

    trainable: Literal["full", "lora", "qlora"] = "full"
    """Every parameter; adapters beside frozen weights; adapters beside frozen weights in four bits (NF4)."""
    steps: Count
    """Optimizer steps."""
    batch_size: Count
    """Packed rows of an optimizer step, over all devices."""
    microbatches: Count = 1
    """Parts that a batch is computed in, one after the other, to save memory. The gradient is that of the whole."""
    optimizer: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    """The rule. muon: for the matrices of the blocks, with AdamW for the rest."""
    moments: Literal["float32", "bfloat16", "8bit"] = "float32"
    """How the gradient's moments are kept between steps: 8bit for adamw alone."""
    learning_rate: float = Field(gt=0)
    """At step `warmup_steps`; without a warm-up at the first step."""
    end_learning_rate: float = Field(default=0.0, ge=0)
    """At the last step; constant does not use it."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear growth: the first takes learning_rate / warmup_steps, the last learning_rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warm-up: a cosine or a line down to `end_learning_rate`, constant, or constant and then the line over
    `decay_steps`."""
    decay_steps: int = Field(default=0, ge=0)
    """wsd: the number of steps at the end that fall to `end_learning_rate`; with 1, the last step alone takes it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled, on every parameter but the norms."""
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
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log of the softmax's normalizer, a token (PaLM, 2204.02311)."""
    neftune: float = Field(default=0.0, ge=0)
    """Noise on the embeddings in training, α of NEFTune (2310.05914); 5 to 15 in the paper."""
    ema: Share = 0.0
    """Decay of a moving average of what trains, a step: 0.999 averages over about 1000 steps. 0: none. Where there is
    one, it is what is evaluated and exported."""
    log_every: Count = Field(default=1, json_schema_extra=CHANGEABLE)
    """Steps between printed lines; every step is in metrics.jsonl."""


class Eval(Section):
    """Held-out loss, and answers to held-out requests."""

    every: Count = Field(default=100, json_schema_extra=CHANGEABLE)
    """Steps between evaluations; also before the first and after the last step."""
    batches: Count | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """At most so many batches. None: all held-out data."""
    requests: int = Field(default=0, ge=0, json_schema_extra=CHANGEABLE)
    """Held-out requests that the model answers: which share of the calls can be parsed, fits the tools' schemas, calls
    the right function, and is exactly the recorded one."""
    requests_every: Count | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """Steps between those. None: at every evaluation."""
    max_new_tokens: Count = Field(default=256, json_schema_extra=CHANGEABLE)
    """Longest answer to a request."""


class Checkpoint(Section):
    """When the state is saved."""

    every: Count = Field(default=100, json_schema_extra=CHANGEABLE)
    """Steps between checkpoints; also after the last step, and when a signal such as SIGTERM stops the run."""
    keep: Count = Field(default=2, json_schema_extra=CHANGEABLE)
    """The newest so many are kept."""
    best: str | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """A metric of the evaluations, such as heldout.loss, heldout.kinds.arguments.loss, heldout.accuracy (pairs) or
    requests.exact: the best checkpoint by it is kept as well."""
    on_damage: Literal["fallback", "error"] = Field(default="fallback", json_schema_extra=CHANGEABLE)
    """When the newest checkpoint is damaged: report it, rename it to STEP.damaged and continue from the newest intact
    one; or stop. Where none is intact the run stops in any case."""


class Track(Section):
    """Where metrics go besides metrics.jsonl. A tracker that fails is reported, and never stops the run."""

    to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default=["tensorboard"], json_schema_extra=CHANGEABLE
    )
    """Each but tensorboard needs the package of its name, and is set up as that package is, by its own environment
    variables."""
    project: str = Field(default="xlam_jax", json_schema_extra=CHANGEABLE)
    """The project (wandb, trackio) or experiment (mlflow) that the run belongs to."""
    name: str | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """The run's name there. None: that of output_dir."""


class MeshShape(Section):
    """Devices along each axis of the mesh; -1 takes what the others leave, once."""

    data: int = Field(default=1, json_schema_extra=CHANGEABLE)
    """Copies of the model, each with its share of the batch."""
    fsdp: int = Field(default=-1, json_schema_extra=CHANGEABLE)
    """Shares of the parameters and of the batch."""
    expert: int = Field(default=1, json_schema_extra=CHANGEABLE)
    """Shares of the experts, and of the batch."""
    context: int = Field(default=1, json_schema_extra=CHANGEABLE)
    """Shares of each row's tokens, for long rows."""
    tensor: int = Field(default=1, json_schema_extra=CHANGEABLE)
    """Shares of heads, MLP width and vocabulary."""
    cpu_devices: Count = Field(default=1, json_schema_extra=CHANGEABLE)
    """Devices that a CPU is split into, to try a mesh without accelerators."""

    @property
    def sizes(self) -> dict[str, int]:
        """The devices along each axis."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "cpu_devices"}


class Config(Section):
    """A run."""

    output_dir: str
    """The run folder: checkpoints, metrics, the resolved config. Running again continues what it holds."""
    schema_version: int = Field(default=SCHEMA, json_schema_extra=CHANGEABLE)
    """The schema that this config was written for, stored with each run; configs of earlier ones are migrated."""
    seed: int = 0
    """Of initial weights and of the order of the data."""
    model: Model
    """What is trained."""
    data: Data
    """On what."""
    train: Train
    """How."""
    objective: ObjectiveSection = ObjectiveSection()
    """Towards what."""
    lora: LoraSection = LoraSection()
    """Adapters."""
    eval: Eval = Eval()
    """Evaluation while training."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving."""
    track: Track = Track()
    """Where metrics go."""
    mesh: MeshShape = MeshShape()
    """On which devices."""


class _Yaml(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everyone who writes a learning rate means it, and 2026-01-31 is a text."""


class _Dumper(yaml.SafeDumper):
    """Quotes texts that `_Yaml` would read as numbers."""


for _class in (_Yaml, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
_Yaml.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for first, pairs in _Yaml.yaml_implicit_resolvers.items()
}


class Resolved(typing.NamedTuple):
    """A checked config with what it refers to."""

    config: Config
    origins: dict[str, str]
    """Path of a field → the file or override that set it; a field that is not named has its default."""
    hf_config: dict[str, Any]
    """The model's config.json with `model.overrides` applied."""
    model: ModelConfig
    warnings: tuple[str, ...] = ()
    """What the model's config.json asks for and this project does not do, a line each."""


def load(path: Path, overrides: list[str] | None = None) -> Resolved:
    """Reads a config file, applies overrides, and checks everything that can be checked without a device.

    Raises `UserError` that names the key, its origin, the offending values and what would do.
    """
    values, origins = _read(path, ())
    for override in overrides or []:
        _override(values, origins, override)
    config = _validated(values, origins, str(path))
    hf_path = Path(config.model.config)
    hf_path = hf_path / "config.json" if hf_path.is_dir() else hf_path
    hf_config = hf_keys.with_overrides(read_hf_config(hf_path), config.model.overrides, str(hf_path))
    hf_config, dropped = hf_keys.without_quantization(hf_config, str(hf_path))
    model = model_of(config, hf_config, str(hf_path))
    warnings = [*dropped, *hf_keys.warnings_of(hf_config, model.family, str(hf_path))]
    used = config.train.router_aux_weight
    if model.experts and (unused := hf_config.get("router_aux_loss_coef", used)) != used:
        warnings.append(f"{hf_path}: router_aux_loss_coef is {unused}; train.router_aux_weight, {used}, is used")
    _check(config, model)
    return Resolved(config, origins, hf_config, model, tuple(warnings))


def _validated(values: dict[str, Any], origins: dict[str, str], path: str) -> Config:
    try:
        return Config.model_validate(_migrated(values, path))
    except ValidationError as error:
        raise UserError("\n  ".join(_explain(problem, origins, path) for problem in error.errors())) from None


def _migrated(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """The values of a config in today's schema. Raises `UserError` for a later schema's."""
    version = values.get("schema_version", SCHEMA)
    if type(version) is not int or version < 0:
        raise UserError(f"{origin}: schema_version is {version!r}; a number up to {SCHEMA} is expected")
    if version > SCHEMA:
        raise UserError(
            f"{origin}: schema_version is {version}, and this version of xlam_jax reads schemas up to {SCHEMA}; "
            "use the version that wrote it, or a later one"
        )
    for migrate in MIGRATIONS[version:]:
        values = migrate(values)
    return values | {"schema_version": SCHEMA}


def _from_0(values: dict[str, Any]) -> dict[str, Any]:
    """Schema 0 is that of runs saved before schemas had numbers; for some of them no moving average was null."""
    train = values.get("train")
    if isinstance(train, dict) and train.get("ema", 0.0) is None:
        return values | {"train": train | {"ema": 0.0}}
    return values


MIGRATIONS = (_from_0,)
"""At each number, what makes values of that schema values of the next one."""


def from_saved(values: Any, origin: str) -> Config:
    """The config of a run, as it was saved with the run by this or an earlier version.

    Raises `UserError` naming `origin` and the keys that this version does not have or reads differently.
    """
    if not isinstance(values, dict):
        raise UserError(f"{origin}: contains {_shown(values)}; the config of a run is expected; restore the file")
    try:
        return _validated({"schema_version": 0, **values}, {}, origin)
    except UserError as error:
        raise UserError(
            f"{error}\n  The run was saved by another version of xlam_jax, or its config was changed; use that "
            "version, or restore the config"
        ) from None


def read_saved(path: Path) -> Config:
    """Reads the config.yaml of a run folder, as `from_saved`."""
    return from_saved(documents.read_yaml(path, "the config of a run is expected here"), str(path))


def model_of(config: Config, hf_config: dict[str, Any], origin: str = "config.json") -> ModelConfig:
    """The model that a run trains, with its adapters."""
    model = ModelConfig.from_hf(hf_config, origin, config.model.overrides)
    return model if config.train.trainable == "full" else replace(model, lora=_lora(config, model))


def _lora(config: Config, model: ModelConfig) -> Lora:
    """The adapters, checked against the model."""
    section = config.lora
    known = ["q", "k", "v", "o", "w1", "w2", "w3", "embedding"]
    known += ["router"] if model.experts else []
    known += [] if model.tie_embeddings else ["head"]
    for at, target in enumerate(section.targets):
        if target not in known:
            meant = HF_TARGETS.get(target)
            hint = f"; this project's name for it is {meant}" if meant in known else nearest(target, known)
            raise UserError(f"lora.targets.{at}: the model has no weight '{target}'{hint} (known: {', '.join(known)})")
    if len(set(section.targets)) < len(section.targets):
        raise UserError(f"lora.targets names a weight twice: {', '.join(section.targets)}")
    plain = ("q", "k", "v", "o") + (() if model.experts else ("w1", "w2", "w3"))
    without = [target for target in section.targets if target not in plain]
    if section.dropout and without:
        raise UserError(
            f"lora.dropout is {section.dropout}, and adapters on {', '.join(without)} take none; "
            f"set it to 0, or lora.targets to some of {', '.join(plain)}"
        )
    return Lora(
        targets=tuple(section.targets),
        rank=section.rank,
        alpha=section.alpha,
        rank_stabilized=section.rank_stabilized,
        dropout=section.dropout,
        zero=section.zero,
    )


def _read(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself, by way of {' → '.join(str(one) for one in seen)}")
    hint = "" if path.exists() else _alike(path)
    values = documents.read_yaml(path, f"a YAML config is expected{hint}", _Yaml)
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}; a mapping of sections is expected")
    base = values.pop("extends", None)
    if base is None:
        merged, origins = {}, {}
    elif not isinstance(base, str):
        raise UserError(f"{path}: extends is {base!r}; the path of a YAML config, relative to this file, is expected")
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
    node[keys[-1]] = documents.parse_yaml(value, f"override {text!r}", _Yaml)
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
    return f"{origin}: {name} is {_shown(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


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
    sizes = {f"mesh.{axis}": size for axis, size in mesh.sizes.items()}
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
    if train.moments == "8bit" and train.optimizer != "adamw":
        raise UserError(f"train.moments is 8bit and train.optimizer is {train.optimizer}; 8bit is for adamw")
    if train.schedule == "wsd" and not 0 < train.decay_steps <= train.steps - train.warmup_steps:
        raise UserError(
            f"train.schedule is wsd with decay_steps {train.decay_steps}; 1 to {train.steps - train.warmup_steps} "
            f"are possible with {train.steps} steps of which {train.warmup_steps} warm up"
        )
    if train.decay_steps and train.schedule != "wsd":
        raise UserError(f"train.decay_steps is {train.decay_steps} and train.schedule {train.schedule}; it is for wsd")
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
    _check_sources(data)
    _check_objective(config)
    best = config.checkpoint.best
    if best is not None and best not in (known := evaluated(config)):
        shown = ", ".join(name for name in known if ".sources." not in name)
        raise UserError(
            f"checkpoint.best is {best}, which no evaluation of this run gives{nearest(best, known)} (known: {shown}; "
            "heldout.sources.NAME.… of each source)"
        )
    check_divisible(config, model, {axis: max(1, size) for axis, size in sizes.items()})


def _check_sources(data: Data) -> None:
    if len({source.name for source in data.sources}) < len(data.sources):
        raise UserError("data.sources: two sources have the same name; reports could not tell them apart")
    for at, source in enumerate(data.sources):
        here = f"data.sources.{at} ({source.name})"
        places = {"files": source.files, "dataset": source.dataset, "tfds": source.tfds}
        given = [key for key, value in places.items() if value]
        if len(given) != 1:
            raise UserError(f"{here} gives {' and '.join(given) or 'no place'}; give one of files, dataset and tfds")
        if source.dataset is None and (source.subset is not None or source.streaming):
            key = "streaming" if source.subset is None else "subset"
            raise UserError(f"{here}: {key} is for a dataset, and the source is {given[0]}; remove it")
        if source.weight is not None and source.epochs is not None:
            raise UserError(f"{here} gives weight {source.weight} and epochs {source.epochs}; give one of them")
        if source.size is not None and source.epochs is None:
            raise UserError(f"{here} gives size {source.size} without epochs; give both, or a weight")
    by_epochs = [source.name for source in data.sources if source.epochs is not None]
    if by_epochs and len(by_epochs) < len(data.sources):
        other = next(source.name for source in data.sources if source.epochs is None)
        raise UserError(f"data.sources: {by_epochs[0]} gives epochs and {other} does not; all sources or none do")
    if by_epochs and data.share == "tokens":
        raise UserError("data.share is tokens, and the sources give epochs, which count trajectories; give weights")
    if data.augment.active and data.cache is not None:
        raise UserError(
            f"data.cache is {data.cache}, which holds finished tokens, and data.augment draws its variants "
            "from the trajectories; drop one of them"
        )
    if data.augment.active and data.on_long in ("cut", "split"):
        raise UserError(f"data.on_long is {data.on_long} and data.augment is on; set data.on_long to drop or error")


def evaluated(config: Config) -> list[str]:
    """The names of the metrics that evaluations give, for `checkpoint.best`."""
    from xlam_jax.data.codec import KINDS

    sources = [f"heldout.sources.{source.name}" for source in config.data.sources]
    names = ["heldout.loss", *(f"{source}.loss" for source in sources)]
    if config.objective.kind == "sft":
        kinds = [f"kinds.{kind}.loss" for kind in KINDS if kind != "prompt"]
        names += [f"{prefix}.{kind}" for prefix in ("heldout", *sources) for kind in kinds]
    else:
        watched = ("accuracy", "margin", "kl", "rewards_chosen", "rewards_rejected", "log_p_chosen", "log_p_rejected")
        names += [f"heldout.{name}" for name in watched]
    if config.eval.requests:
        names += [f"requests.{name}" for name in ("parsable", "schema_valid", "right_function", "exact")]
    return names


def reference(config: Config) -> Literal["adapters_off", "precomputed", "none"]:
    """What `objective.reference` means in this run."""
    chosen, kind = config.objective.reference, config.objective.kind
    if chosen != "auto":
        return chosen
    if kind in ("sft", "simpo", "orpo"):
        return "none"
    return "precomputed" if config.train.trainable == "full" else "adapters_off"


def _check_objective(config: Config) -> None:
    objective, data = config.objective, config.data
    kind = objective.kind
    for at, source in enumerate(data.sources):
        if (source.format == PAIRS) != (kind != "sft"):
            needs = f"learns from whole trajectories; make objective.kind one on pairs ({', '.join(_ON_PAIRS)})"
            if kind != "sft":
                needs = "learns from pairs; make them with python -m xlam_jax.data pairs and set format to pairs"
            raise UserError(
                f"data.sources.{at} ({source.name}): format is {source.format}, and objective.kind {kind} {needs}"
            )
    for name, only in (("label_smoothing", "sigmoid"), ("margin", "simpo")):
        if getattr(objective, name) and kind != only:
            raise UserError(
                f"objective.{name} is {getattr(objective, name)} and objective.kind is {kind}; it is for {only}"
            )
    if kind == "sft":
        if objective.sft_weight or objective.reference not in ("auto", "none"):
            name = "sft_weight" if objective.sft_weight else "reference"
            raise UserError(
                f"objective.{name} is {getattr(objective, name)} and objective.kind is sft; it is for losses on pairs"
            )
        return
    if kind in ("simpo", "orpo") and objective.reference not in ("auto", "none"):
        raise UserError(f"objective.reference is {objective.reference}, and {kind} has none; set it to auto")
    if objective.reference == "adapters_off" and config.train.trainable == "full":
        raise UserError(
            "objective.reference is adapters_off and train.trainable is full, which has no adapters; set the first to "
            "precomputed, or the second to lora"
        )
    if config.lora.init_from is not None and objective.reference == "auto" and reference(config) == "adapters_off":
        raise UserError(
            f"lora.init_from is {config.lora.init_from}, and without the adapters the model is not what the run starts "
            "from; set objective.reference to precomputed, or to adapters_off if the base is meant"
        )
    if data.augment.active:
        raise UserError(f"data.augment is on, and objective.kind is {kind}; variants are drawn for sft alone")
    if data.on_long in ("cut", "split"):
        raise UserError(f"data.on_long is {data.on_long}, and a pair stays whole; set it to drop or error")
    for name in ("thought", "tool_call", "answer"):
        if getattr(data.loss, name) not in (0.0, 1.0):
            raise UserError(
                f"data.loss.{name} is {getattr(data.loss, name)}, and in a loss on pairs a token counts or does not; "
                "set it to 0 or 1"
            )


def check_divisible(config: Config, model: ModelConfig, sizes: dict[str, int]) -> None:
    """Every size that an axis of the mesh splits must be a multiple of it. Called again once -1 is known."""
    rows = sizes["mesh.data"] * sizes["mesh.fsdp"] * sizes["mesh.expert"] * config.train.microbatches
    by_rows = "mesh.data × mesh.fsdp × mesh.expert × train.microbatches"
    if sizes["mesh.expert"] > 1 and not model.experts:
        raise UserError(f"mesh.expert is {sizes['mesh.expert']}, and the model has no experts; set it to 1")
    pieces = 2 * sizes["mesh.context"] if sizes["mesh.context"] > 1 else 1
    split = [
        ("train.batch_size", config.train.batch_size, by_rows, rows),
        ("data.sequence_length", config.data.sequence_length, "2 × mesh.context", pieces),
        ("the model's num_local_experts", model.experts, "mesh.expert", sizes["mesh.expert"]),
        ("the model's hidden_size", model.hidden_size, "mesh.fsdp", sizes["mesh.fsdp"]),
        ("the model's num_key_value_heads", model.kv_heads, "mesh.tensor", sizes["mesh.tensor"]),
        ("the model's intermediate_size", model.mlp_size, "mesh.tensor", sizes["mesh.tensor"]),
        ("the model's vocab_size", model.vocab_size, "mesh.tensor", sizes["mesh.tensor"]),
    ]
    for what, size, axis, parts in split:
        if size % parts:
            raise UserError(f"{what} is {size}, which {axis}, {parts}, does not divide")
    if config.train.trainable != "qlora":
        return
    from xlam_jax.models.nf4 import block_size

    for what, size, axis in (
        ("hidden_size", model.hidden_size, "fsdp"),
        ("intermediate_size", model.mlp_size, "tensor"),
    ):
        block = block_size(size)
        if size // block % sizes[f"mesh.{axis}"]:
            raise UserError(
                f"the model's {what} is {size}, {size // block} blocks of {block} four-bit weights, which mesh.{axis}, "
                f"{sizes[f'mesh.{axis}']}, does not divide; choose a divisor of {size // block}"
            )


def to_yaml(config: Config) -> str:
    """The resolved config as YAML; reading it back gives the same config."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


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
