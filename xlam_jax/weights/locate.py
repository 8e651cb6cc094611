"""Where the tensors of a model are stored in its Hugging Face folder: other names, fused experts, quantized weights."""

import re
from collections.abc import Iterable, Mapping, Set
from math import prod
from typing import Any, NamedTuple

import numpy as np

from xlam_jax.errors import UserError
from xlam_jax.models import hf_keys
from xlam_jax.models.families.base import Wrapper
from xlam_jax.models.weights_table import EMBEDDING, HEAD
from xlam_jax.weights.hf_map import Tensor
from xlam_jax.weights.shards import DTYPES, TensorFile

INDEX = "model.safetensors.index.json"


class Source(NamedTuple):
    """Where a tensor is stored."""

    shard: TensorFile
    key: str
    part: tuple[int, tuple[int, ...]] | None = None
    """The tensor is only this part of the stored one: (elements in front of it, shape)."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype in the file."""
        return DTYPES[self.shard.tensors[self.key].dtype]

    def read(self) -> np.ndarray:
        """Reads the values, in the shape and dtype of the file."""
        return self.shard.read(self.key, self.part)


QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_packed|weight_scale(_inv|_2)?|weight_zero_point|(input|output|[qkv])_scale"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)|SCB|W_q|codes|codebooks)$"
)
"""Tensors that only quantized weights have: of GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes, HQQ and AQLM."""


def quantized_tensor(shards: Mapping[str, TensorFile]) -> str | None:
    """Returns name and dtype of a tensor that only quantized weights have; None if there is none."""
    for shard in shards.values():
        for key, stored in shard.tensors.items():
            if QUANTIZED.search(key) or (stored.dtype not in DTYPES and not key.endswith(BUFFER)):
                return f"{key} is {stored.dtype}"
    return None


def refuse_quantized(folder: str, shards: Mapping[str, TensorFile], hf_config: Mapping[str, Any]) -> None:
    """Raises `UserError` for quantized weights."""
    tensor, method = quantized_tensor(shards), hf_keys.quantization_method(hf_config)
    if tensor:
        named = f" (config.json: quantization {method})" if method else ""
        raise UserError(
            f"{folder}: {tensor}; quantized weights are not read{named}. Use the model's unquantized weights, in "
            "bfloat16, float16 or float32; train.trainable: qlora quantizes them itself"
        )


WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing insert into the names of the modules that they wrap."""
PREFIXES = ("base_model.model.", "module.", "model.")
"""Prefixes that PEFT, data parallelism and training frameworks add to every name."""
ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|lora_magnitude_vector)\b")


def keep_text_model(
    folder: str, shards: Mapping[str, TensorFile], wrapper: Wrapper
) -> tuple[dict[str, str], list[str]]:
    """Renames the tensors of a model of text and images as its text model's files name them, and drops the others.

    Returns stored name → new name of the text model's tensors, and the names of those that were dropped. Raises
    `UserError` if two would have the same name.
    """
    names: dict[str, str] = {}
    skipped: list[str] = []
    for shard in shards.values():
        kept = {key: tensor for key, tensor in shard.tensors.items() if not key.startswith(wrapper.others)}
        skipped += shard.tensors.keys() - kept.keys()
        for key in kept:
            prefix = next((prefix for prefix in wrapper.prefixes if key.startswith(prefix)), None)
            names[key] = key if prefix is None else wrapper.prefixes[prefix] + key.removeprefix(prefix)
        shard.tensors = {names[key]: tensor for key, tensor in kept.items()}
        if len(shard.tensors) < len(kept):
            raise UserError(f"{folder}: {shard.url} contains a tensor under two names; remove one of them")
    return names, skipped


def remove_wrappers(folder: str, shards: Mapping[str, TensorFile]) -> dict[str, str]:
    """Renames tensors that were saved from a wrapped model as transformers names them. Returns stored name → new name
    of those that were renamed. Raises `UserError` if two would have the same name, and for unmerged adapters."""
    stored = [key for shard in shards.values() for key in shard.tensors]
    if adapter := next((key for key in stored if ADAPTER.search(key)), None):
        raise UserError(
            f"{folder}: {adapter} belongs to an adapter that is not merged into the weights; save the model with "
            "peft's merge_and_unload, or give the base's folder as model.init_from and the adapter's as lora.init_from"
        )
    names = {key: WRAPPERS.sub("", key) for key in stored}
    while EMBEDDING_KEY not in names.values():
        candidates = (
            prefix
            for prefix in PREFIXES
            if f"{prefix}{EMBEDDING_KEY}" in names.values() or _is_below(prefix, names.values())
        )
        prefix = next(
            (prefix for prefix in candidates if all(name.startswith(prefix) for name in names.values())), None
        )
        if prefix is None:
            break
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    renamed = {key: name for key, name in names.items() if key != name}
    origins: dict[str, str] = {}
    for key, name in names.items():
        if name in origins and renamed:
            raise UserError(
                f"{folder}: {origins[name]} and {key} are both {name} without the names of wrappers; remove one of them"
            )
        origins[name] = key
    for shard in shards.values() if renamed else ():
        shard.tensors = {names[key]: tensor for key, tensor in shard.tensors.items()}
    return renamed


def _is_below(prefix: str, names: Iterable[str]) -> bool:
    """Whether the embedding is stored under this prefix and further ones."""
    return any(name.startswith(prefix) and name.endswith(f".{EMBEDDING_KEY}") for name in names)


HEAD_KEY, EMBEDDING_KEY = HEAD.key, EMBEDDING.key
BUFFER = "rotary_emb.inv_freq"
"""A buffer that transformers before 4.32 saved."""
ROWS = 2**24
"""Values of the head and the embedding that are compared at a time."""


def locate(
    folder: str, files: "dict[str, TensorFile]", wanted: list[Tensor], index: Mapping[str, str]
) -> list[tuple[Tensor, Source]]:
    """Finds where each tensor is stored.

    `files`: by name; `index`: tensor → name of its file, empty if the folder has no index. Raises one `UserError` with
    everything that is missing, unexpected, stored twice, or of another shape.
    """
    stored: dict[str, list[str]] = {}
    for name, file in files.items():
        for key in file.tensors:
            if not key.endswith(BUFFER):
                stored.setdefault(key, []).append(name)
    if HEAD_KEY in stored and EMBEDDING_KEY in stored and all(tensor.key != HEAD_KEY for tensor in wanted):
        if not _is_copy_of_embedding(files, stored):
            raise UserError(
                f"{folder}: tie_word_embeddings is true in config.json, and {HEAD_KEY} in {stored[HEAD_KEY][0]} is not "
                f"equal to {EMBEDDING_KEY}; set tie_word_embeddings to false to read both, or remove the first"
            )
        del stored[HEAD_KEY]
    shapes = {key: files[names[0]].tensors[key].shape for key, names in stored.items()}
    places = {tensor.key: _place_of(tensor, shapes) for tensor in wanted}
    used = {key for key, _ in places.values()}
    wrong = _wrong_names(stored, used) + _wrong_in_index(files, stored, used, index)
    for tensor in wanted:
        key, part = places[tensor.key]
        if part is None and key in shapes and shapes[key] != tensor.shape:
            wrong.append(f"{key} has shape {shapes[key]}, config.json means {tensor.shape}")
    if wrong:
        shown = "\n  ".join(wrong[:20]) + (f"\n  … and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise UserError(
            f"{folder}: the weights do not fit config.json, {len(wrong)} tensor(s) differ:\n  {shown}\n"
            "config.json and the safetensors files must come from the same model; download the folder again"
        )
    return [
        (tensor, Source(files[stored[key][0]], key, part)) for tensor in wanted for key, part in [places[tensor.key]]
    ]


def _is_copy_of_embedding(shards: Mapping[str, TensorFile], stored: Mapping[str, list[str]]) -> bool:
    """Whether the head of a tied model, which some tools save too, equals the embedding value by value."""
    (head_file, *_), (embedding_file, *_) = stored[HEAD_KEY], stored[EMBEDDING_KEY]
    head, embedding = shards[head_file].tensors[HEAD_KEY], shards[embedding_file].tensors[EMBEDDING_KEY]
    if head.shape != embedding.shape:
        return False
    size = prod(head.shape)
    for first in range(0, size, ROWS):
        part = first, (min(ROWS, size - first),)
        if not np.array_equal(
            shards[head_file].read(HEAD_KEY, part), shards[embedding_file].read(EMBEDDING_KEY, part), equal_nan=False
        ):
            return False
    return True


def _place_of(tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Any]:
    """The name under which a tensor is stored, and which part of that tensor it is (`Source.part`). The name of
    transformers if it is not stored at all."""
    for key in (tensor.key, *tensor.other_keys):
        if key in shapes:
            return key, None
    for part in tensor.parts:
        if shapes.get(part.key) == part.shape:
            return part.key, (part.offset, tensor.shape)
    return tensor.key, None


def _wrong_names(stored: Mapping[str, list[str]], used: Set[str]) -> list[str]:
    """One line per tensor that is missing, is not part of the model, or is in several files."""
    wrong = [f"{key} is missing" for key in sorted(used - stored.keys())]
    wrong += [f"{key} in {stored[key][0]} is not part of this model" for key in sorted(stored.keys() - used)]
    wrong += [f"{key} is in {' and in '.join(names)}" for key, names in sorted(stored.items()) if len(names) > 1]
    return wrong


def _wrong_in_index(
    files: Mapping[str, TensorFile], stored: Mapping[str, list[str]], used: Set[str], index: Mapping[str, str]
) -> list[str]:
    """One line per tensor that the index does not name, or names for another file than the one that contains it."""
    wrong = []
    for key in sorted(used & stored.keys()) if index else ():
        if len(stored[key]) == 1 and index.get(key) != stored[key][0]:
            wrong.append(f"{key} is in {stored[key][0]}, and {INDEX} names {index.get(key, 'no file')} for it")
    absent = index.keys() - used - {key for file in files.values() for key in file.tensors}
    wrong += [f"{key} is not in {index[key]}, which {INDEX} names for it" for key in sorted(absent)]
    return wrong
