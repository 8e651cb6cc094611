"""Public chat templates, and tokenizers that have them with their control tokens."""

import copy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from support import ROOT

from xlam_jax.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Template(NamedTuple):
    """A chat template, and what it needs."""

    text: str | None
    """The jinja template of the format native, None for a format of this project."""
    wire: str
    """The wire format of its calls."""
    eos: str
    tokens: tuple[str, ...]
    """Further control tokens."""
    format: str = "native"
    parallel: bool = True
    """Whether it can write two calls in one turn."""
    thoughts: bool = True
    """Whether it can write text in front of calls."""


@cache
def published(name: str) -> str:
    """Returns a public template that the package trl contains."""
    package = find_spec("trl")  # not imported: that needs further packages
    assert package is not None
    assert package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0])
    return (folder / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


MISTRAL_V11 = """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}[SYSTEM_PROMPT]{{ message.content }}[/SYSTEM_PROMPT]
{%- elif message.role == 'user' -%}
{%- if tools and loop.last or tools and not (messages[loop.index:] | selectattr('role', 'equalto', 'user') | list) -%}
[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]
{%- endif -%}
[INST]{{ message.content }}[/INST]
{%- elif message.role == 'assistant' -%}
{{- message.content -}}
{%- for call in message.tool_calls or [] -%}
[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}
{%- endfor -%}
{{- eos_token -}}
{%- elif message.role == 'tool' -%}[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]
{%- endif -%}
{%- endfor -%}
"""
"""Mistral's format since v11, with calls as mistral-common writes them; tools are in front of the last user turn."""
_CHATML = ("<|im_start|>", "<|im_end|>")
_LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
_MISTRAL = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]")

TEMPLATES = {
    "xlam": Template(None, "array", "</s>", (), format="xlam"),
    "xlam2": Template(None, "array", "<|im_end|>", _CHATML, format="xlam2"),
    "qwen2_5": Template(published("qwen2_5"), "hermes", "<|im_end|>", _CHATML),
    "llama3_1": Template(published("llama3_1"), "llama3_json", "<|eot_id|>", _LLAMA, parallel=False, thoughts=False),
    "mistral_v11": Template(MISTRAL_V11, "mistral", "</s>", _MISTRAL),
}


@cache
def _base() -> "PreTrainedTokenizerFast":
    return load_tokenizer(str(ROOT / "examples/quickstart/tokenizer"))


def tokenizer_with(template: Template) -> "PreTrainedTokenizerFast":
    """Returns the quickstart's tokenizer with a template and its control tokens."""
    tokenizer = copy.deepcopy(_base())
    missing = [token for token in (template.eos, *template.tokens) if token not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"additional_special_tokens": missing})
    tokenizer.eos_token = template.eos
    if template.text is not None:
        tokenizer.chat_template = template.text
    return tokenizer
