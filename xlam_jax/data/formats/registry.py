"""Finds formats by name."""

from typing import TYPE_CHECKING

from xlam_jax.data.codec import Codec
from xlam_jax.data.formats import Format, as_unguarded
from xlam_jax.data.formats.mistral import MistralV1, MistralV3
from xlam_jax.data.formats.template import Template
from xlam_jax.data.formats.xlam import Xlam, earlier_template
from xlam_jax.data.formats.xlam2 import Xlam2
from xlam_jax.data.formats.xlam_v1 import XlamV1
from xlam_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAMES = ("xlam", "native", "xlam2", "xlam_v1")


def find(name: str, tokenizer: "PreTrainedTokenizerFast", codec: Codec) -> Format:
    """Returns a format for a tokenizer; `native` is the tokenizer's own chat template.

    Raises `UserError` for a name that is not in `NAMES`, for `native` without a chat template, and for `xlam2` without
    the control tokens that it needs.
    """
    if name == "xlam":
        return Xlam(codec)
    if name == "xlam_v1":
        return XlamV1(codec)
    if name == "xlam2":
        return Xlam2(codec)
    if name != "native":
        raise UserError(f"format '{name}' is unknown; known: {', '.join(NAMES)}{nearest(name, NAMES)}")
    if not tokenizer.chat_template:
        raise UserError(
            f"tokenizer '{tokenizer.name_or_path}' has no chat template, which the format native needs; "
            "use the format xlam, or name a template in data.chat_template"
        )
    own = tokenizer.chat_template
    template = as_unguarded(own) if isinstance(own, str) else own  # as versions saved it that did not guard
    if template == earlier_template(codec.control_tokens, codec.tool_calls_token):
        return Xlam(codec)
    for kind in (Xlam, XlamV1, Xlam2, MistralV1, MistralV3):
        if kind.fits(codec) and template == as_unguarded((format_ := kind(codec)).template):
            return format_
    return Template(tokenizer, codec)
