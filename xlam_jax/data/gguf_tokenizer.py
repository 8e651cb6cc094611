"""Builds the tokenizer that a GGUF file contains."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlam_jax.errors import UserError
from xlam_jax.gguf_file import open_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREFIX = "tokenizer."
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Special token → its name in `tokenizer.ggml.NAME_token_id`."""


def read_gguf_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """Returns the tokenizer of a GGUF file with its chat template.

    Vocabulary, merges and the splitting of text are converted by transformers. `from_pretrained(…, gguf_file=…)` gives
    the same tokenizer, but needs PyTorch. Raises `UserError` as `GGUFFile`, and for a file without a tokenizer; other
    exceptions for an invalid one.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    metadata = open_gguf(path).metadata
    own = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    if "ggml.tokens" not in own:
        raise UserError(f"tokenizer '{path}': the file contains no tokenizer; give a folder with tokenizer.json")
    groups: dict[str, dict[str, Any]] = {
        group: {name: own[key] for key, name in names.items() if key in own}
        for group, names in GGUF_TOKENIZER_MAPPING.items()
    }
    backend, _ = convert_gguf_tokenizer(metadata.get("general.architecture", ""), groups["tokenizer"])
    options = groups["tokenizer_config"]
    if own.get("ggml.model") == "llama":  # llama.cpp adds it unless the file says otherwise
        options.setdefault("add_bos_token", True)
    for token, name in SPECIAL.items():
        index = own.get(f"ggml.{name}_token_id")
        options[token] = None if index is None else own["ggml.tokens"][index]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)
