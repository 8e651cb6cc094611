"""Whether the models of two folders compute the same: their logits on a few tokens, in f32."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xlam_jax.errors import UserError
from xlam_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from xlam_jax.models.params import Params

SMALL = 500_000_000
"""Parameters of a model whose logits are compared: two of them are held in f32."""
LENGTH = 32
TOLERANCE = 1e-4
"""Of the largest logit."""


def compare_logits(hf: Path, hf_config: dict[str, Any], params: "Params", step: Path, dtype: Any = None) -> None:
    """Compares a checkpoint's logits with those of a Hugging Face folder, computed by transformers where PyTorch is
    installed, else by this project from what the folder says.

    Raises `UserError` where they differ. `params` are numpy arrays, or indexed by their layers; `dtype`: what they were
    rounded to on the way.
    """
    config = ModelConfig.from_hf(hf_config)
    if config.parameters() > SMALL:
        print(f"logits are compared for models of up to {SMALL / 1e6:,.0f} million parameters")
        return
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (1, LENGTH), dtype=np.int32)
    ours_BTV = _logits(config, params, tokens_BT, dtype)
    theirs_BTV, whose = _of_folder(hf, tokens_BT)
    scale = float(np.abs(theirs_BTV).max())
    off = float(np.abs(ours_BTV - theirs_BTV).max()) / scale if ours_BTV.shape == theirs_BTV.shape else np.inf
    if not off <= TOLERANCE:
        raise UserError(
            f"{hf}: the logits that {whose} computes differ from those of {step} by {off:.1e} of the largest "
            f"({TOLERANCE:g} is allowed); the weights or config.json are not the same model's"
        )
    print(f"verified: the logits of {LENGTH} tokens are those of {whose}, to {off:.1e} of the largest")


def _of_folder(folder: Path, tokens_BT: np.ndarray) -> tuple[np.ndarray, str]:
    """Its logits, and who computed them."""
    if find_spec("torch") is None:
        from xlam_jax.weights.hf import load_hf

        hf_config, params = load_hf(folder)
        return _logits(ModelConfig.from_hf(hf_config), params, tokens_BT), "this project from the folder"
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT).long(), use_cache=False).logits.numpy(), "transformers"


def _logits(config: ModelConfig, params: "Params", tokens_BT: np.ndarray, dtype: Any = None) -> np.ndarray:
    import jax
    import jax.numpy as jnp

    from xlam_jax.models.params import binder
    from xlam_jax.weights.run import read_layers

    bind = binder(config, dtype=jnp.float32)

    @jax.jit
    def of(params: "Params", tokens_BT: jax.Array) -> jax.Array:
        model = bind(params)
        return model.logits(model(tokens_BT, jnp.arange(tokens_BT.shape[1])[None], jnp.ones_like(tokens_BT))[0])

    read = read_layers(config, params)
    given = jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype).astype(np.float32), read)
    return np.asarray(of(given, tokens_BT))
