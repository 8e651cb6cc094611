"""The sections of a config that describe the data."""

from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from xlam_jax.config.base import CHANGEABLE, ConflictError, Count, Section, Share, derived
from xlam_jax.enums import PAIRS


class Filters(Section):
    """Conditions on the trajectories of a source; those that are filtered out are counted by reason."""

    min_score: float | None = None
    """Trajectories with a lower score, or with none, are dropped."""
    min_turns: int = Field(default=0, ge=0)
    """Minimum number of turns."""
    max_turns: Count | None = None
    """Maximum number of turns."""
    min_calls: int = Field(default=0, ge=0)
    """Minimum number of tool calls."""
    tools: list[str] = Field(default=[])
    """Only trajectories that call one of these tools. Empty: any."""
    exclude: list[str] = Field(default=[])
    """Ids of trajectories to drop, such as those of a benchmark's test set."""


class Source(Section):
    """One source of the mixture, stored in exactly one of `files`, `dataset` and `tfds`."""

    name: str = Field(default="", min_length=1, json_schema_extra=derived("from the file's or dataset's name"))
    """The name in reports. It is also part of the seed of the source's order."""
    files: list[str] = Field(default=[])
    """Files of trajectories: .jsonl (also .jsonl.gz, .jsonl.zst), .parquet, .array_record."""
    dataset: str | None = None
    """A dataset of the `datasets` library: a folder or a name on the Hugging Face hub."""
    subset: str | None = None
    """Configuration of the dataset, if it has several."""
    streaming: bool = False
    """Read a hub dataset row by row instead of downloading it first; useful with `limit`."""
    tfds: str | None = None
    """A TFDS name such as unified_trajectories/webshop:1.0.0, as ArrayRecord."""
    split: str = "train"
    """The split of `dataset` or `tfds`."""
    format: str = "unified"
    """Format of the rows: unified, or a format of python -m converters.trajectories; or pairs, as written by
    python -m xlam_jax.data pairs, for an objective on pairs."""
    weight: float | None = Field(default=None, gt=0)
    """Share in the mixture relative to the other weights. None: 1, or `size` × `epochs` if any source has `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over this source relative to the other sources: its weight is `size` × `epochs`."""
    size: Count | None = None
    """With `epochs`: the size of the source in the formula. None: its number of trajectories."""
    limit: Count | None = None
    """Maximum number of trajectories, after the filters; the first ones are used."""
    filters: Filters = Filters()
    """Conditions on the trajectories to keep."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """Names a source after its file or dataset."""
        if not isinstance(values, dict) or values.get("name") is not None:
            return values
        files = values.get("files")
        place = files[0] if isinstance(files, list) and files else values.get("dataset") or values.get("tfds")
        if not isinstance(place, str):
            return values
        name = PurePath(place).name
        return values | {"name": name.partition(".")[0] if files else name.partition(":")[0]}

    @model_validator(mode="after")
    def _check(self) -> Self:
        places = {"files": self.files, "dataset": self.dataset, "tfds": self.tfds}
        present = [key for key, value in places.items() if value]
        here = f"source {self.name or '(without a name)'}"
        if len(present) != 1:
            raise ConflictError(
                f"{here} gives {' and '.join(present) or 'no place'}; give one of files, dataset and tfds", *present
            )
        if self.dataset is None and (self.subset is not None or self.streaming):
            key = "streaming" if self.subset is None else "subset"
            raise ConflictError(f"{here}: {key} is for a dataset, and the source is {present[0]}; remove it", key)
        if self.weight is not None and self.epochs is not None:
            raise ConflictError(
                f"{here} gives weight {self.weight} and epochs {self.epochs}; give one of them", "weight", "epochs"
            )
        if self.size is not None and self.epochs is None:
            raise ConflictError(f"{here} gives size {self.size} without epochs; give both, or a weight", "size")
        return self


class AddedToken(Section):
    """A token that a run adds to its tokenizer; in a config, a text alone is one with the other fields' defaults."""

    text: str = Field(min_length=1)
    """Its text, such as "<think>", which becomes this token wherever the chat template writes it."""
    special: bool = True
    """A special token: content that spells it stays text, and decoding can skip it. false: content that spells it
    becomes the token too."""

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, values: Any) -> Any:
        return {"text": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.text != self.text.strip():
            raise ConflictError(f"the added token {self.text!r} begins or ends with white space; remove it", "text")
        return self


class Loss(Section):
    """Loss weights of turns and kinds of tokens. A turn with `loss: false` is always masked."""

    turns: Literal["all", "last"] = "all"
    """Every assistant turn, or only the last one."""
    thought: float = Field(default=1.0, ge=0)
    """Weight of the text next to tool calls."""
    tool_call: float = Field(default=1.0, ge=0)
    """Weight of tool calls, and of the end token after them."""
    answer: float = Field(default=1.0, ge=0)
    """Weight of turns without calls, and of the end token after them."""
    reasoning: float = Field(default=1.0, ge=0)
    """Weight of the reasoning in front of an answer or a call, with its marks."""


class Augment(Section):
    """Variants of the prompt, drawn anew each time a trajectory is seen. The draw depends on the seed alone."""

    tools: bool = False
    """Shuffle the order of the tools."""
    fields: bool = False
    """Shuffle the order of the fields inside each tool's schema."""
    sections: bool = False
    """Shuffle the order of the prompt's sections, where the format has sections."""
    instructions: bool = False
    """Choose one of several wordings of the format instruction, where the format has one."""
    negatives: Share = 0.0
    """Share of single-call trajectories whose called tool is removed and whose answer becomes a refusal in words."""

    @property
    def active(self) -> bool:
        """Whether any variant is enabled."""
        return self != Augment()


class Data(Section):
    """The training data."""

    sources: list[Source] = Field(min_length=1)
    """The mixture."""
    share: Literal["examples", "tokens"] = "examples"
    """What the weights divide among the sources: trajectories or trained tokens."""
    tokenizer: str = Field(json_schema_extra=derived("the one next to the weights of model.init_from"))
    """A Hugging Face tokenizer folder or hub name, or mistral:v1, mistral:v3 (from the mistral-common package)."""
    format: Literal["xlam", "native", "xlam2", "xlam_v1"] = "xlam"
    """Chat format: this project's template, the tokenizer's own template, xLAM-2's prompts for tokenizers of Qwen and
    Llama, or the single prompt of xLAM v1."""
    chat_template: str | None = None
    """A jinja file used in place of the tokenizer's own template, with the format native; it is saved with the
    tokenizer."""
    added_tokens: list[AddedToken] = Field(default=[])
    """Tokens to add to the tokenizer. Their rows in embedding and head start as the mean of the others; see
    lora.train_tokens."""
    reasoning: Literal["keep", "drop"] = "keep"
    """The reasoning of assistant turns: write it where the format does, or drop it before rendering. A format that
    cannot write it refuses the trajectory."""
    loss: Loss = Loss()
    """Loss weights of turns and kinds of tokens."""
    augment: Augment = Augment()
    """Variants of the prompt; all off by default."""
    sequence_length: Count = Field(json_schema_extra=derived("4096, or the model's max_position_embeddings if less"))
    """Tokens of a packed sequence (a row); peers call it max_length or max_seq_length."""
    heldout: Share = 0.05
    """Share of the trajectories, chosen by a hash of their id, that is never trained on."""
    on_invalid: Literal["error", "drop"] = "error"
    """An invalid trajectory stops the run before it starts, or is dropped and counted by reason."""
    unreadable_calls: Literal["error", "allow"] = "error"
    """A call that a server would parse differently from what is trained stops the run before it starts, or is trained
    and counted."""
    on_long: Literal["error", "drop", "cut", "split"] = "drop"
    """The same for a trajectory of more than `sequence_length` tokens; cut removes the oldest turns (system and tools
    stay); split divides it between turns and repeats as many earlier turns before each part as fit."""
    cache: str | None = Field(default=None, json_schema_extra=CHANGEABLE)
    """A folder written by python -m xlam_jax.data prepare, read in place of the sources; a stale one is refused."""
    on_change: Literal["error", "warn"] = Field(default="error", json_schema_extra=CHANGEABLE)
    """When a run is resumed and a source or the tokenizer differs from the checkpoint's: refuse, or report what
    changed and where the data continue."""
    streams: Count = Field(default=8, json_schema_extra=derived("the largest divisor of train.batch_size up to 8"))
    """Independent streams into which the data are divided; each packs separately. Batches are then the same on any
    number of hosts."""
    packing_bins: Count = 16
    """Rows that a stream fills at the same time (best-fit packing). More bins leave less padding."""
    max_pairs: Count = 8
    """Maximum number of pairs per row, for sources of pairs. Both sides of a pair are in the same row."""

    @property
    def pairs(self) -> bool:
        """Whether the sources contain pairs."""
        return self.sources[0].format == PAIRS

    @model_validator(mode="after")
    def _check_mixture(self) -> Self:
        if len({source.name for source in self.sources}) < len(self.sources):
            raise ConflictError("data.sources: two sources have the same name; reports need different names", "sources")
        by_epochs = [source.name for source in self.sources if source.epochs is not None]
        if by_epochs and len(by_epochs) < len(self.sources):
            other = next(source.name for source in self.sources if source.epochs is None)
            raise ConflictError(
                f"data.sources: {by_epochs[0]} gives epochs and {other} does not; all sources or none do", "sources"
            )
        if by_epochs and self.share == "tokens":
            raise ConflictError(
                "data.share is tokens, and the sources give epochs, which count trajectories; give weights", "share"
            )
        return self

    @model_validator(mode="after")
    def _check_tokenizer(self) -> Self:
        if self.chat_template is not None and self.format != "native":
            raise ConflictError(
                f"data.chat_template is {self.chat_template} and data.format is {self.format}, which has its own "
                "template; set data.format to native, or remove the file",
                "chat_template",
                "format",
            )
        texts = [token.text for token in self.added_tokens]
        if twice := sorted({text for text in texts if texts.count(text) > 1}):
            raise ConflictError(
                f"data.added_tokens has {', '.join(map(repr, twice))} twice; remove one", "added_tokens"
            )
        return self

    @model_validator(mode="after")
    def _check_augment(self) -> Self:
        if self.augment.active and self.cache is not None:
            raise ConflictError(
                f"data.cache is {self.cache}, which contains finished tokens, and data.augment draws its variants "
                "from the trajectories; remove one of them",
                "cache",
                "augment",
            )
        if self.augment.active and self.on_long in ("cut", "split"):
            raise ConflictError(
                f"data.on_long is {self.on_long} and data.augment is on; set data.on_long to drop or error",
                "on_long",
                "augment",
            )
        return self
