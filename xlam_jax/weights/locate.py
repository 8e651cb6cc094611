"""Where the tensors of a model are stored in its Hugging Face folder: other names, fused experts, quantized weights."""

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from xlam_jax.errors import UserError
from xlam_jax.models import hf_keys
from xlam_jax.weights.hf_map import EMBEDDING, HEAD, Tensor
from xlam_jax.weights.shards import DTYPES, Shard

INDEX = "model.safetensors.index.json"


class Source(NamedTuple):
    """Where a tensor stands."""

    shard: Shard
    key: str
    part: tuple[int, tuple[int, ...]] | None = None
    """Of that tensor only these elements, (how many stand before, shape)."""

    @property
    def dtype(self) -> np.dtype:
        """As it is stored."""
        return DTYPES[self.shard.tensors[self.key].dtype]

    def read(self) -> np.ndarray:
        """The values, as they stand there."""
        return self.shard.read(self.key, self.part)


QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_packed|weight_scale(_inv|_2)?|weight_zero_point|(input|output|[qkv])_scale"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)|SCB|W_q|codes|codebooks)$"
)
"""Tensors that only quantized weights have: of GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes, HQQ and AQLM."""


def quantized_tensor(shards: Mapping[str, Shard]) -> str | None:
    """The name and dtype of a tensor by which weights are known to be quantized; None for plain ones."""
    for shard in shards.values():
        for key, stored in shard.tensors.items():
            if QUANTIZED.search(key) or (stored.dtype not in DTYPES and not key.endswith(BUFFER)):
                return f"{key} is {stored.dtype}"
    return None


def refuse_quantized(folder: str, shards: Mapping[str, Shard], hf_config: Mapping[str, Any]) -> None:
    """Raises `UserError` for quantized weights."""
    tensor, method = quantized_tensor(shards), hf_keys.quantization_method(hf_config)
    if tensor:
        named = f" (config.json: quantization {method})" if method else ""
        raise UserError(
            f"{folder}: {tensor}; quantized weights are not read{named}. Use the model's unquantized weights, in "
            "bfloat16, float16 or float32; train.trainable: qlora quantizes them itself"
        )


WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing add to the names of the modules that they wrap."""
PREFIXES = ("base_model.model.", "module.", "model.")
"""What PEFT, data parallelism and training frameworks put before every name."""
ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|lora_magnitude_vector)\b")


def remove_wrappers(folder: str, shards: Mapping[str, Shard]) -> dict[str, str]:
    """Gives tensors that were saved from a wrapped model the names of transformers; returns stored name → name of the
    tensors that were renamed. Raises `UserError` where two would have one name, and for unmerged adapters."""
    stored = [key for shard in shards.values() for key in shard.tensors]
    if adapter := next((key for key in stored if ADAPTER.search(key)), None):
        raise UserError(
            f"{folder}: {adapter} belongs to an adapter that is not merged into the weights; save the model with "
            "peft's merge_and_unload, or give the base's folder as model.init_from and the adapter's as lora.init_from"
        )
    names = {key: WRAPPERS.sub("", key) for key in stored}
    while EMBEDDING_KEY not in names.values():
        shared = (
            one for one in PREFIXES if f"{one}{EMBEDDING_KEY}" in names.values() or _is_below(one, names.values())
        )
        prefix = next((one for one in shared if all(name.startswith(one) for name in names.values())), None)
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


FUSED = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
"""Where all experts of a layer are kept in two tensors, [expert, gate then up, model] and [expert, model, MLP]: which
holds a weight, and in which half."""


def _fused(tensor: Tensor, config_experts: int, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Any] | None:
    """The fused tensor that holds an expert's weight, and where in it; None where there is none."""
    found = re.fullmatch(r"(model\.layers\.\d+\.)block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight", tensor.key)
    if not found or not config_experts:
        return None
    which, half = FUSED[found[3]]
    rows, columns = tensor.shape
    for key in (f"{found[1]}{block}.experts.{which}" for block in ("mlp", "block_sparse_moe")):
        both = 2 if which == "gate_up_proj" else 1
        if shapes.get(key) == (config_experts, both * rows, columns):
            return key, ((int(found[2]) * both + half) * rows * columns, tensor.shape)
    return None


HEAD_KEY, EMBEDDING_KEY = HEAD[0][2], EMBEDDING[0][2]
BUFFER = "rotary_emb.inv_freq"
"""A buffer that transformers before 4.32 saved."""
ROWS = 2**24
"""Values of the head and the embedding that are compared at a time."""


def _is_copy_of_embedding(shards: Mapping[str, Shard], found: Mapping[str, list[str]]) -> bool:
    """Whether the head of a tied model, which some tools save too, equals the embedding value by value."""
    (head_file, *_), (embedding_file, *_) = found[HEAD_KEY], found[EMBEDDING_KEY]
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


def locate(
    folder: str, files: "dict[str, Shard]", wanted: list[Tensor], index: Mapping[str, str]
) -> list[tuple[Tensor, Source]]:
    """Where each tensor is stored; everything that is wrong is reported at once."""
    found: dict[str, list[str]] = {}
    for name, file in files.items():
        for key in file.tensors:
            if not key.endswith(BUFFER):
                found.setdefault(key, []).append(name)
    if HEAD_KEY in found and EMBEDDING_KEY in found and all(tensor.key != HEAD_KEY for tensor in wanted):
        if not _is_copy_of_embedding(files, found):
            raise UserError(
                f"{folder}: tie_word_embeddings is true in config.json, and {HEAD_KEY} in {found[HEAD_KEY][0]} is not "
                f"equal to {EMBEDDING_KEY}; set tie_word_embeddings to false to read both, or remove the first"
            )
        del found[HEAD_KEY]
    shapes = {key: files[names[0]].tensors[key].shape for key, names in found.items()}
    experts = 1 + max((tensor.at[1] for tensor in wanted if len(tensor.at) > 1), default=-1)
    places: dict[str, tuple[str, Any]] = {}
    for tensor in wanted:
        other = _other_name(tensor.key)
        key = tensor.key if tensor.key in found or other not in found else other
        places[tensor.key] = (_fused(tensor, experts, shapes) if key not in found else None) or (key, None)
    used = {key for key, _ in places.values()}
    wrong = [f"{key} is missing" for key in sorted(used - found.keys())]
    wrong += [f"{key} in {found[key][0]} is not part of this model" for key in sorted(found.keys() - used)]
    wrong += [f"{key} is in {' and in '.join(names)}" for key, names in sorted(found.items()) if len(names) > 1]
    for key in sorted(used & found.keys()) if index else ():
        if len(found[key]) == 1 and index.get(key) != found[key][0]:
            wrong.append(f"{key} is in {found[key][0]}, and {INDEX} names {index.get(key, 'no file')} for it")
    absent = index.keys() - used - {key for file in files.values() for key in file.tensors}
    wrong += [f"{key} is not in {index[key]}, which {INDEX} names for it" for key in sorted(absent)]
    for tensor in wanted:
        key, part = places[tensor.key]
        if key in found:
            stored = files[found[key][0]].tensors[key]
            if part is None and stored.shape != tensor.shape:
                wrong.append(f"{key} has shape {stored.shape}, config.json means {tensor.shape}")
    if wrong:
        shown = "\n  ".join(wrong[:20]) + (f"\n  … and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise UserError(
            f"{folder}: the weights do not fit config.json, {len(wrong)} tensor(s) differ:\n  {shown}\n"
            "config.json and the safetensors files must come from the same model; download the folder again"
        )
    return [
        (tensor, Source(files[found[key][0]], key, part)) for tensor in wanted for key, part in [places[tensor.key]]
    ]


def _other_name(key: str) -> str:
    """The router's, beside fused experts."""
    return key.replace(".block_sparse_moe.gate.", ".mlp.gate.")
