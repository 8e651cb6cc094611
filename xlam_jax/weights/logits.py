"""Compares the logits of the models in two folders on a few tokens, in float32."""

from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xlam_jax.errors import UserError
from xlam_jax.gguf_file import find_gguf
from xlam_jax.models.config import ModelConfig, read_model_config

if TYPE_CHECKING:
    from xlam_jax.models.params import Params

SMALL = 500_000_000
"""Maximum number of parameters of a model whose logits are compared: two copies are in memory in float32."""
LENGTH = 32
"""Number of tokens."""
TOLERANCE = 1e-4
"""Maximum difference relative to the largest logit."""


def compare_logits(hf: Path, hf_config: dict[str, Any], params: "Params", step: Path, dtype: Any = None) -> None:
    """Compares a checkpoint's logits with those of a Hugging Face folder or a GGUF file, and prints the result.

    The folder's logits are computed by transformers if PyTorch is installed, else by this project. `params`: arrays of
    the checkpoint, or lazy arrays that are indexed by layer. `dtype`: dtype of the folder, to which they are rounded
    first. Raises `UserError` if the logits differ. Larger models than SMALL are skipped with a printed line.
    """
    config = ModelConfig.from_hf(hf_config)
    if config.parameters() > SMALL:
        print(f"logits are compared for models of up to {SMALL / 1e6:,.0f} million parameters")
        return
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (1, LENGTH), dtype=np.int32)
    ours_BTV = _logits(config, params, tokens_BT, dtype)
    folder_BTV, library = _folder_logits(hf, tokens_BT)
    scale = float(np.abs(folder_BTV).max())
    error = float(np.abs(ours_BTV - folder_BTV).max()) / scale if ours_BTV.shape == folder_BTV.shape else np.inf
    if not error <= TOLERANCE:
        raise UserError(
            f"{hf}: the logits that {library} computes differ from those of {step} by {error:.1e} of the largest "
            f"({TOLERANCE:g} is allowed); the weights or config.json belong to different models"
        )
    print(f"verified: the logits of {LENGTH} tokens are those of {library}, to {error:.1e} of the largest")


def _folder_logits(folder: Path, tokens_BT: np.ndarray) -> tuple[np.ndarray, str]:
    """Returns the folder's logits [B, T, V] in float32, and the name of the library that computed them."""
    if find_spec("torch") is None:
        from xlam_jax.weights.hf import load_hf

        hf_config, params = load_hf(folder)
        return _logits(ModelConfig.from_hf(hf_config), params, tokens_BT), "this project from the folder"
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    gguf = find_gguf(folder)
    model_class = AutoModelForImageTextToText if read_model_config(folder).wrapper else AutoModelForCausalLM
    if gguf:
        folder, options = gguf.parent, options | {"gguf_file": gguf.name}
    with redirect_stderr(StringIO()) if gguf else nullcontext():  # transformers' progress bar of GGUF files
        model = model_class.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT).long(), use_cache=False).logits.numpy(), "transformers"


def _logits(config: ModelConfig, params: "Params", tokens_BT: np.ndarray, dtype: Any = None) -> np.ndarray:
    import jax
    import jax.numpy as jnp

    from xlam_jax.models.params import binder
    from xlam_jax.weights.run import read_layers

    bind = binder(config, dtype=jnp.float32)

    @jax.jit
    def compute(params: "Params", tokens_BT: jax.Array) -> jax.Array:
        model = bind(params)
        return model.logits(model(tokens_BT, jnp.arange(tokens_BT.shape[1])[None], jnp.ones_like(tokens_BT))[0])

    arrays = read_layers(config, params)
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype).astype(np.float32), arrays)
    return np.asarray(compute(rounded, tokens_BT))
