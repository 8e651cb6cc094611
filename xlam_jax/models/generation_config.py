"""`generation_config.json`: which tokens end generation, and the sampling defaults of transformers and vLLM."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xlam_jax import documents
from xlam_jax.errors import UserError

GENERATION_CONFIG = "generation_config.json"
FROM_MODEL = "_from_model_config"
"""The key with which transformers marks a file that only repeats the token ids of config.json."""


def read_generation_config(path: Path) -> dict[str, Any] | None:
    """Reads a `generation_config.json`; None if the file is missing.

    Raises `UserError` if it is not a JSON object, or its token ids are invalid.
    """
    if not path.exists():
        return None
    generation = documents.read_object(path, "the generation config of a model is expected here; correct or remove it")
    eos = generation.get("eos_token_id")
    ids = {"eos_token_id": eos if isinstance(eos, list) else [eos]}
    ids |= {key: [generation.get(key)] for key in ("bos_token_id", "pad_token_id")}
    for key, values in ids.items():
        if not all(value is None or (type(value) is int and value >= 0) for value in values):
            expected = "a token id" + (" or a list of them" if key == "eos_token_id" else "") + ", or null"
            raise UserError(f"{path}: {key} is {generation[key]!r}; {expected} is expected")
    return generation


def copy_generation_config(folder: Path, to: Path) -> None:
    """Copies a model's `generation_config.json`, if it has one, byte for byte. Raises `UserError` if it is invalid."""
    if read_generation_config(folder / GENERATION_CONFIG) is not None:
        (to / GENERATION_CONFIG).write_bytes((folder / GENERATION_CONFIG).read_bytes())


def stop_ids(ends: Sequence[int], generation: Mapping[str, Any] | None) -> list[int]:
    """The tokens that end generation: those that end trained turns (`ends`), then those that the source's generation
    config adds. One that only repeats the ids of config.json adds none: they may differ from the trained ones."""
    added: Any = None if generation is None or generation.get(FROM_MODEL) else generation.get("eos_token_id")
    added = added if isinstance(added, list) else [] if added is None else [added]
    return list(dict.fromkeys([*ends, *(token for token in added if token is not None)]))


def derived(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The generation config that transformers writes for a model without one."""
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {FROM_MODEL: True} | {key: hf_config[key] for key in tokens if hf_config.get(key) is not None}


def align(
    hf_config: Mapping[str, Any], generation: Mapping[str, Any] | None, ends: Sequence[int], tokenizer: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns config.json and generation_config.json of a trained model, with the tokens that end trained turns.

    The ids of the begin and padding tokens are the tokenizer's, if it has them. Stop ids and sampling defaults of the
    source's generation config are kept.
    """
    ours = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tokens = {key: token for key, token in ours.items() if token is not None}
    config = {**hf_config, **tokens, "eos_token_id": _one_or_list(ends)}
    if generation is None:
        return config, derived(config)
    return config, {**generation, **tokens, "eos_token_id": _one_or_list(stop_ids(ends, generation))}


def _one_or_list(ids: Sequence[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)
