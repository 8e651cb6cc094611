"""The files of checkpoints: reads them with verification, and writes converted models.

A run folder and a converted model have the same layout:

    config.json            the Hugging Face config of the model
    generation_config.json stop tokens and sampling defaults, where the source of the weights has them
    tokenizer/             the tokenizer with its chat template
    checkpoints/<step>/    Orbax: the items params, opt and data, and ema where a run keeps an average of its params;
                           with the run's configuration as metadata. evaluation.json: the metrics of its evaluation,
                           once that is complete

A step folder gets its name only once it is complete (Orbax writes to a temporary folder and renames it). Its metadata
contain a checksum of every array by value, digests of the tokenizer's files and of generation_config.json, and a
digest of themselves. Everything that is read is compared with them; a difference raises `DamagedError`.

Runs save by `training.save` and continue by `training.restore`. Nothing here knows of either.
"""

from xlam_jax.weights.checkpoint.arrays import (
    StoredParameter,
    check_params,
    check_shapes,
    load_params,
    named_leaves,
    open_arrays,
    open_params,
)
from xlam_jax.weights.checkpoint.layout import (
    EVALUATION,
    HF_CONFIG,
    METADATA,
    TOKENIZER,
    DamagedError,
    check_names,
    is_checkpoint,
    is_step,
    resolve,
    stamp,
    whole_steps,
)
from xlam_jax.weights.checkpoint.metadata import (
    ARRAYS,
    DIGEST,
    FILES,
    METRICS,
    check_files,
    file_digests,
    load_generation_config,
    load_hf_config,
    load_metadata,
    metadata_digest,
    tokenizer_dir,
    warn_unverified,
)
from xlam_jax.weights.checkpoint.new_model import NewModel, write_hf_config

__all__ = [
    "ARRAYS",
    "DIGEST",
    "EVALUATION",
    "FILES",
    "HF_CONFIG",
    "METADATA",
    "METRICS",
    "TOKENIZER",
    "DamagedError",
    "NewModel",
    "StoredParameter",
    "check_files",
    "check_names",
    "check_params",
    "check_shapes",
    "file_digests",
    "is_checkpoint",
    "is_step",
    "load_generation_config",
    "load_hf_config",
    "load_metadata",
    "load_params",
    "metadata_digest",
    "named_leaves",
    "open_arrays",
    "open_params",
    "resolve",
    "stamp",
    "tokenizer_dir",
    "warn_unverified",
    "whole_steps",
    "write_hf_config",
]
