"""The schema of a run: its sections, and the checks of their values. Those of data are in `data_sections`, and checks
that depend on the model in `checks`. This package does not import JAX: mistakes are reported before a device is used.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from xlam_jax.config.base import CHANGEABLE, ConflictError, Count, Section, Share, derived
from xlam_jax.config.data_sections import Data
from xlam_jax.config.migrations import SCHEMA
from xlam_jax.enums import (
    MESH_AXES,
    PAIR_LOSSES,
    PAIR_METRICS,
    PAIRS,
    REQUEST_MARKS,
    SPAN_KINDS,
    UNREFERENCED,
    Objective,
)
from xlam_jax.errors import nearest


class Model(Section):
    """The model and the precision, memory use and kernels of its computation."""

    config: str = Field(json_schema_extra=derived("the one next to the weights of init_from"))
    """A Hugging Face config.json, or a folder that contains one."""
    overrides: dict[str, Any] = Field(default={})
    """Fields of that config.json to replace, such as `num_hidden_layers: 2`; only those that the family has."""
    init_from: str | None = None
    """Weights to start from: a folder in Hugging Face format or made by converters.hf_to_orbax. None: random."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the matrix products (mixed precision); parameters, optimizer and sums are f32 throughout."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients of weights are summed over mesh.fsdp; bfloat16 halves that traffic."""
    remat: Literal["none", "dots", "minimal", "full", "offload"] = Field(
        default="minimal", json_schema_extra=CHANGEABLE
    )
    """Activation (gradient) checkpointing: what a block keeps for its backward pass. none: keep all; dots: keep matmul
    outputs; minimal: keep attention outputs; full: keep the block's input and recompute everything; offload: keep its
    input and the attention outputs in host memory."""
    attention: Literal["auto", "xla", "splash", "pallas"] = Field(default="auto", json_schema_extra=CHANGEABLE)
    """Attention kernel: XLA, splash (TPU) or Pallas (GPU). auto selects the kernel of the device if it supports the
    model's head size and window, and logs its choice."""
    experts: Literal["auto", "xla", "megablox", "triton"] = Field(default="auto", json_schema_extra=CHANGEABLE)
    """Kernel of the experts of a mixture: XLA, or a grouped matrix product (megablox on TPU, triton on GPU). auto
    selects the kernel of the device if mesh.expert is 1."""
    compiler_options: dict[str, bool | int | float | str] = Field(default={}, json_schema_extra=CHANGEABLE)
    """Options of XLA's compiler for the step, such as `xla_gpu_autotune_level: 0`; they replace the defaults that the
    log shows. Those of another platform are not used; the log warns of them."""


class ObjectiveSection(Section):
    """What is minimized."""

    kind: Objective = "sft"
    """sft: cross-entropy. The others are losses on pairs of a chosen and a rejected answer (sigmoid: DPO), and every
    source has the format pairs."""
    beta: float = Field(default=0.1, gt=0)
    """Scale of a pair's rewards. For simpo 2 to 10, for orpo the weight λ of the odds ratio's term."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """sigmoid: share of pairs assumed to have swapped labels."""
    margin: float = Field(default=0.0, ge=0)
    """simpo: target margin between the rewards of the two sides, γ."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy per token of the chosen side; orpo includes it with weight 1."""
    reference: Literal["auto", "adapters_off", "precomputed", "none"] = "auto"
    """The policy that the rewards are relative to: the model without its adapters, computed in the same step; the
    weights that the run starts from, scored once and stored in a folder; or none. auto: the first with adapters, the
    second without, none for simpo and orpo."""
    reference_cache: str | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """Where a precomputed reference is stored; other runs with the same data and weights may share it. None:
    reference/ in output_dir."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, only in (("label_smoothing", "sigmoid"), ("margin", "simpo")):
            if getattr(self, name) and self.kind != only:
                raise ConflictError(
                    f"objective.{name} is {getattr(self, name)} and objective.kind is {self.kind}; it is for {only}",
                    name,
                    "kind",
                )
        referenced = self.reference not in ("auto", "none")
        if self.kind == "sft" and (self.sft_weight or referenced):
            name = "sft_weight" if self.sft_weight else "reference"
            raise ConflictError(
                f"objective.{name} is {getattr(self, name)} and objective.kind is sft; it is for losses on pairs",
                name,
                "kind",
            )
        if self.kind in UNREFERENCED and referenced:
            raise ConflictError(
                f"objective.reference is {self.reference}, and {self.kind} has none; set it to auto",
                "reference",
                "kind",
            )
        return self


class LoraSection(Section):
    """Low-rank adapters, used if `train.trainable` is lora or qlora."""

    targets: list[str] = Field(default=["q", "k", "v", "o"], min_length=1)
    """Weights with an adapter, of q, k, v, o, w1 (gate_proj), w3 (up_proj), w2 (down_proj), router, embedding, head. In
    a mixture of experts w1, w3 and w2 have one for each expert."""
    rank: Count = 32
    """Columns of A and rows of B; peers call it r."""
    alpha: float = Field(default=64.0, gt=0)
    """The adapter's product is scaled by alpha / rank."""
    rank_stabilized: bool = False
    """Scale by alpha / √rank instead (rsLoRA)."""
    dropout: Share = 0.0
    """Dropout on the adapter's input, in training; for q, k, v, o and a dense MLP."""
    zero: Literal["A", "B"] = "B"
    """The factor that starts at zero; the other starts with random values."""
    train_tokens: bool = False
    """Train the rows of data.added_tokens in embedding and head next to the adapters, although these are frozen."""
    init_from: str | None = None
    """Adapters to start from: a PEFT folder."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.targets)) < len(self.targets):
            raise ConflictError(f"lora.targets names a weight twice: {', '.join(self.targets)}", "targets")
        return self


class Train(Section):
    """The optimization."""

    trainable: Literal["full", "lora", "qlora"] = "full"
    """Every parameter; adapters next to frozen weights; adapters next to frozen weights in four bits (NF4)."""
    steps: Count = Field(default=0, json_schema_extra=derived("from `epochs`, once the data are read"))
    """Optimizer steps (peers: max_steps). Give this or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training data (peers: num_train_epochs), in place of `steps`; 1 if neither is given. An epoch
    draws as many examples as all sources contain together, divided by their weights; if the sources set `epochs`, an
    epoch passes over each of them that many times. The number of steps follows from the number of examples per packed
    row."""
    batch_size: Count
    """Packed rows per optimizer step, over all devices and microbatches (the global batch size)."""
    microbatches: Count = 1
    """Gradient accumulation: parts that a batch is computed in, one after the other, to save memory. The gradient is
    that of the whole batch."""
    optimizer: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    """The update rule. muon: for the matrices of the blocks, with AdamW for the rest."""
    moments: Literal["float32", "bfloat16", "8bit"] = "float32"
    """Precision in which the moments of the gradient are stored between steps; 8bit is only for adamw."""
    learning_rate: float = Field(
        gt=0,
        json_schema_extra=derived(
            "sft: 5e-6 full, 5e-5 lora and qlora, 3e-4 from random weights; pairs: 5e-7 full, 1e-5 lora and qlora; "
            "a fifth of it with lion"
        ),
    )
    """Peak learning rate: that of step `warmup_steps`, or of the first step without warm-up."""
    end_learning_rate: float = Field(default=0.0, ge=0)
    """Learning rate of the last step; constant does not use it."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up: from learning_rate / warmup_steps in the first step to learning_rate in the last."""
    warmup_ratio: Share | None = None
    """Warm-up as a share of the steps, rounded up, in place of `warmup_steps`."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Schedule after the warm-up: cosine or linear decay to `end_learning_rate`, constant, or (wsd) constant followed
    by linear decay over `decay_steps`."""
    decay_steps: int = Field(default=0, ge=0)
    """wsd: number of steps of the final decay to `end_learning_rate`; with 1, only the last step has it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of all parameters except norms."""
    beta1: Share = 0.9
    """Decay of the mean of the gradient."""
    beta2: Share = 0.95
    """Decay of the mean of its square."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean square."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Maximum global norm of the gradient (peers: max_grad_norm)."""
    router_aux_weight: float = Field(
        default=0.02, ge=0, json_schema_extra=derived("the router_aux_loss_coef of a mixture's config.json")
    )
    """Weight of the load-balancing loss of a mixture of experts; a dense model has none."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log of the softmax's normalizer, per token (PaLM, 2204.02311)."""
    neftune: float = Field(default=0.0, ge=0)
    """Noise on the embeddings in training, α of NEFTune (2310.05914); 5 to 15 in the paper."""
    ema: Share = 0.0
    """Decay per step of an exponential moving average of the trainable parameters: 0.999 averages over about 1000
    steps. 0: none. If it is set, the average is evaluated and exported in place of the last weights."""
    log_every: Count = Field(default=1, json_schema_extra=CHANGEABLE)
    """Steps between printed lines; every step is in metrics.jsonl."""

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.steps and self.epochs is not None:
            raise ConflictError(
                f"train.steps is {self.steps} and train.epochs is {self.epochs}; give one of them (train.steps=null "
                "removes the first)",
                "steps",
                "epochs",
            )
        if self.warmup_steps and self.warmup_ratio is not None:
            raise ConflictError(
                f"train.warmup_steps is {self.warmup_steps} and train.warmup_ratio is {self.warmup_ratio}; give one of "
                "them (train.warmup_steps=0 removes the first)",
                "warmup_steps",
                "warmup_ratio",
            )
        if self.steps and self.warmup_steps >= self.steps:
            raise ConflictError(
                f"train.warmup_steps is {self.warmup_steps}, not less than train.steps, {self.steps}; "
                "the learning rate would never reach its peak",
                "warmup_steps",
                "steps",
            )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        most = self.steps - self.warmup_steps if self.steps else self.decay_steps
        if self.schedule == "wsd" and not 0 < self.decay_steps <= most:
            raise ConflictError(
                f"train.schedule is wsd with decay_steps {self.decay_steps}; 1 to {most or 'train.steps'} "
                f"are possible with {self.steps or 'the'} steps of which {self.warmup_steps} warm up",
                "schedule",
                "decay_steps",
            )
        if self.decay_steps and self.schedule != "wsd":
            raise ConflictError(
                f"train.decay_steps is {self.decay_steps} and train.schedule {self.schedule}; it is for wsd",
                "decay_steps",
                "schedule",
            )
        if self.end_learning_rate > self.learning_rate:
            raise ConflictError(
                f"train.end_learning_rate is {self.end_learning_rate}, more than train.learning_rate, "
                f"{self.learning_rate}",
                "end_learning_rate",
                "learning_rate",
            )
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> Self:
        if self.moments == "8bit" and self.optimizer != "adamw":
            raise ConflictError(
                f"train.moments is 8bit and train.optimizer is {self.optimizer}; 8bit is for adamw",
                "moments",
                "optimizer",
            )
        return self


class Eval(Section):
    """Held-out loss, and answers to held-out requests."""

    every: int = Field(default=100, ge=0, json_schema_extra=CHANGEABLE)
    """Steps between evaluations; also before the first and after the last step. 0: no evaluation at all."""
    batches: Count | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """Maximum number of batches. None: all held-out data."""
    requests: int = Field(default=0, ge=0, json_schema_extra=CHANGEABLE)
    """Held-out requests that the model answers: reports the fraction whose calls parse, match the tools' schemas, name
    the right functions, and equal the recording."""
    requests_every: Count | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """Steps between answers to requests. None: at every evaluation."""
    max_new_tokens: Count = Field(default=256, json_schema_extra=CHANGEABLE)
    """Maximum number of tokens of an answer."""

    def is_due(self, step: int, *, last: bool = False) -> bool:
        """Returns whether an evaluation follows `step`; step 0 is the start of the run."""
        return self.every > 0 and (last or step % self.every == 0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.requests and not self.every:
            raise ConflictError(
                f"eval.requests is {self.requests} and eval.every is 0, which disables evaluation; set one of them",
                "requests",
                "every",
            )
        return self


class Checkpoint(Section):
    """When the state is saved."""

    every: Count = Field(default=100, json_schema_extra=CHANGEABLE)
    """Steps between checkpoints; also after the last step, and when a signal such as SIGTERM stops the run."""
    keep: Count = Field(default=2, json_schema_extra=CHANGEABLE)
    """Number of checkpoints to keep, the newest ones (peers: save_total_limit)."""
    best: str | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """A metric of the evaluations, such as heldout.loss, heldout.kinds.arguments.loss, heldout.accuracy (pairs) or
    requests.exact: the best checkpoint by it is kept as well."""
    on_damage: Literal["fallback", "error"] = Field(default="fallback", json_schema_extra=CHANGEABLE)
    """When the newest checkpoint is damaged: report it, rename it to STEP.damaged and continue from the newest intact
    one; or stop. If none is intact, the run stops in any case."""


class Track(Section):
    """Where metrics go besides metrics.jsonl. A tracker that fails is reported, and never stops the run."""

    to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default=["tensorboard"], json_schema_extra=CHANGEABLE
    )
    """Trackers. Each except tensorboard needs the package of its name, and is configured by the environment variables
    of that package."""
    project: str = Field(default="xlam_jax", json_schema_extra=CHANGEABLE)
    """The project (wandb, trackio) or experiment (mlflow) that the run belongs to."""
    name: str | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """Name of the run in the trackers. None: the name of output_dir."""


class MeshShape(Section):
    """Number of devices along each axis of the mesh; one axis may be -1 and takes the remaining devices."""

    data: int = Field(default=1, json_schema_extra=CHANGEABLE)
    """Data-parallel replicas of the model, each with a part of the batch."""
    fsdp: int = Field(default=-1, json_schema_extra=CHANGEABLE)
    """Shards of the parameters and of the batch (fully sharded data parallelism)."""
    expert: int = Field(default=1, json_schema_extra=CHANGEABLE)
    """Shards of the experts, and of the batch (expert parallelism)."""
    context: int = Field(default=1, json_schema_extra=CHANGEABLE)
    """Shards of each row's tokens, for long rows (context parallelism)."""
    tensor: int = Field(default=1, json_schema_extra=CHANGEABLE)
    """Shards of heads, MLP width and vocabulary (tensor parallelism)."""
    cpu_devices: Count = Field(default=1, json_schema_extra=CHANGEABLE)
    """Number of devices into which a CPU is split, to try a mesh without accelerators."""

    @property
    def sizes(self) -> dict[str, int]:
        """Number of devices along each axis."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for axis, size in self.sizes.items():
            if size < 1 and size != -1:
                raise ConflictError(
                    f"mesh.{axis} is {size}; a positive number of devices, or -1 for what is left, is needed", axis
                )
        rest = [axis for axis, size in self.sizes.items() if size == -1]
        if len(rest) > 1:
            names = " and ".join(f"mesh.{axis}" for axis in rest)
            raise ConflictError(f"{names} are both -1; only one axis can take what the others leave", *rest)
        return self


class Config(Section):
    """A run."""

    output_dir: str = Field(json_schema_extra=derived("runs/NAME, with the name of the config's file", nullable=False))
    """The run folder: checkpoints, metrics, the resolved config. Running again continues what it contains."""
    schema_number: int = Field(default=SCHEMA, alias="schema", ge=SCHEMA, le=SCHEMA, json_schema_extra=CHANGEABLE)
    """Version of the schema, stored with each run; configs of earlier versions are migrated."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    export: bool | str = Field(default=False, json_schema_extra=CHANGEABLE)
    """After the last step, write the model as a Hugging Face folder (adapters merged): true for hf/ in output_dir, or
    the name of a folder that does not exist yet."""
    model: Model
    """What is trained."""
    data: Data
    """The training data."""
    train: Train
    """The optimization."""
    objective: ObjectiveSection = ObjectiveSection()
    """What is minimized."""
    lora: LoraSection = LoraSection()
    """Adapters."""
    eval: Eval = Eval()
    """Evaluation while training."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving."""
    track: Track = Track()
    """Where metrics go."""
    mesh: MeshShape = MeshShape()
    """Which devices compute it."""

    @property
    def export_folder(self) -> Path | None:
        """The folder into which the model is exported after the last step; None if it is not."""
        if self.export is True:
            return Path(self.output_dir) / "hf"
        return Path(self.export) if self.export else None

    @field_validator("export", mode="before")
    @classmethod
    def _check_export(cls, value: Any) -> Any:
        if not isinstance(value, bool | str):
            raise ConflictError(f"export is {value!r}; true, false or the name of a folder is expected")
        return value

    @model_validator(mode="after")
    def _check_streams(self) -> Self:
        rows, streams = self.train.batch_size, self.data.streams
        if rows % streams:
            raise ConflictError(
                f"train.batch_size is {rows} and data.streams is {streams}; "
                "each stream gives the same number of rows to a batch, so the first must be a multiple of the second",
                "train.batch_size",
                "data.streams",
            )
        return self

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        kind, data = self.objective.kind, self.data
        for at, source in enumerate(data.sources):
            if (source.format == PAIRS) != (kind != "sft"):
                needs = f"learns from whole trajectories; make objective.kind one on pairs ({', '.join(PAIR_LOSSES)})"
                if kind != "sft":
                    needs = "learns from pairs; make them with python -m xlam_jax.data pairs and set format to pairs"
                raise ConflictError(
                    f"data.sources.{at} ({source.name}): format is {source.format}, and objective.kind {kind} {needs}",
                    "data.sources",
                    "objective.kind",
                )
        if kind == "sft":
            return self
        if data.augment.active:
            raise ConflictError(f"data.augment is on, and objective.kind is {kind}; variants are drawn for sft alone")
        if data.on_long in ("cut", "split"):
            raise ConflictError(f"data.on_long is {data.on_long}, and a pair stays whole; set it to drop or error")
        for name in ("thought", "tool_call", "answer", "reasoning"):
            if getattr(data.loss, name) not in (0.0, 1.0):
                raise ConflictError(
                    f"data.loss.{name} is {getattr(data.loss, name)}, and in a loss on pairs a token counts or does "
                    "not; set it to 0 or 1"
                )
        return self

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        if self.lora.train_tokens and not self.data.added_tokens:
            raise ConflictError(
                "lora.train_tokens is true and data.added_tokens is empty; it trains the rows of added tokens: add "
                "some, or remove it",
                "lora.train_tokens",
                "data.added_tokens",
            )
        return self

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        objective = self.objective
        if objective.reference == "adapters_off" and self.train.trainable == "full":
            raise ConflictError(
                "objective.reference is adapters_off and train.trainable is full, which has no adapters; set the first "
                "to precomputed, or the second to lora"
            )
        if self.lora.init_from is not None and objective.reference == "auto" and reference(self) == "adapters_off":
            raise ConflictError(
                f"lora.init_from is {self.lora.init_from}, and without the adapters the model is not what the run "
                "starts from; set objective.reference to precomputed, or to adapters_off if the base is meant"
            )
        return self

    @model_validator(mode="after")
    def _check_best(self) -> Self:
        best = self.checkpoint.best
        if best is None:
            return self
        if not self.eval.every:
            raise ConflictError(
                f"checkpoint.best is {best} and eval.every is 0, which disables evaluation; set one of them"
            )
        metrics = evaluation_metrics(self)
        if best not in metrics:
            listed = ", ".join(name for name in metrics if ".sources." not in name)
            raise ConflictError(
                f"checkpoint.best is {best}, which no evaluation of this run gives{nearest(best, metrics)} (known: "
                f"{listed}; heldout.sources.NAME.… of each source)",
                "checkpoint.best",
            )
        return self


def evaluation_metrics(config: Config) -> list[str]:
    """Returns the names of the metrics of evaluations, for `checkpoint.best`."""
    sources = [f"heldout.sources.{source.name}" for source in config.data.sources]
    names = ["heldout.loss", *(f"{source}.loss" for source in sources)]
    if config.objective.kind == "sft":
        kinds = [f"kinds.{kind}.loss" for kind in SPAN_KINDS if kind != "prompt"]
        names += [f"{prefix}.{kind}" for prefix in ("heldout", *sources) for kind in kinds]
    else:
        names += [f"heldout.{name}" for name in PAIR_METRICS]
    if config.eval.requests:
        names += [f"requests.{mark}" for mark in REQUEST_MARKS]
    return names


def reference(config: Config) -> Literal["adapters_off", "precomputed", "none"]:
    """Returns the reference policy of this run, with `auto` of `objective.reference` resolved."""
    chosen, kind = config.objective.reference, config.objective.kind
    if chosen != "auto":
        return chosen
    if kind == "sft" or kind in UNREFERENCED:
        return "none"
    return "precomputed" if config.train.trainable == "full" else "adapters_off"
