"""The scale of queries by their position (Ministral 3), which vLLM 0.31 does not read where transformers writes it."""

import json
from collections.abc import Container
from pathlib import Path

from serving.checks import load_config
from xlam_jax.errors import UserError
from xlam_jax.models.config import ModelConfig, read_model_config
from xlam_jax.models.families import family_of

FLAG = "--hf-overrides"


def query_scale_flags(folder: Path, set_by_user: Container[str]) -> list[str]:
    """Returns the flag with which vLLM scales queries as the model in `folder` does, [] if it does not.

    transformers reads `rope_parameters.llama_4_scaling_beta`; vLLM reads `llama_4_scaling`, and computes other logits
    without it from `original_max_position_embeddings` on. Raises `UserError` if the user sets the flag.
    """
    config = load_config(folder)
    scaling = ModelConfig.from_hf(config, str(folder / "config.json")).rope_scaling if family_of(config) else None
    if scaling is None or not scaling.query_scale:
        return []
    own = {"beta": scaling.query_scale, "original_max_position_embeddings": scaling.original_max_positions}
    values = {"llama_4_scaling": own}
    if read_model_config(folder).wrapper:
        values = {"text_config": values}
    if FLAG in set_by_user:
        raise UserError(
            f"{folder}: this model needs {FLAG} {json.dumps(values)!r} in vLLM, and {FLAG} is set; put your values "
            "into its config.json"
        )
    return [FLAG, json.dumps(values)]
