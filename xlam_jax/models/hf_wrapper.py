"""The text model of a wrapper (`families.WRAPPERS`): its own config.json."""

from collections.abc import Mapping
from typing import Any

from xlam_jax.errors import UserError
from xlam_jax.models.families import family_named, wrapper_of
from xlam_jax.models.families.base import Wrapper

SHARED = (
    "dtype",
    "torch_dtype",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "compression_config",
    "transformers_version",
)
"""Keys of a wrapper's config.json that are also those of its text model, if `text_config` lacks them."""


def text_model(hf: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Returns the config.json of the text model; that of any other model is returned as it is.

    Raises `UserError` if the text model is of a family that the wrapper does not have.
    """
    wrapper = wrapper_of(hf)
    if wrapper is None:
        return dict(hf)
    text = hf.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"{origin}: text_config is {text!r}; the config of the text model is expected")
    name = text.get("model_type", wrapper.default_text)
    if not isinstance(name, str) or name not in wrapper.texts:
        raise UserError(
            f"{origin}: the model_type of text_config is {name!r}; in a {wrapper.architecture}, this project reads "
            f"{' and '.join(sorted(wrapper.texts))}"
        )
    shared = {key: hf[key] for key in SHARED if key in hf}
    if text.keys() & {"dtype", "torch_dtype"}:
        shared = {key: value for key, value in shared.items() if key not in ("dtype", "torch_dtype")}
    return shared | text | {"model_type": name, "architectures": [family_named(name).architecture]}


def text_model_line(wrapper: Wrapper, family: str, origin: str) -> str:
    """Returns the line that reports which part of a wrapper is read."""
    architecture = family_named(family).architecture
    return f"{origin}: of this {wrapper.architecture}, only the text model is read, a {architecture}"
