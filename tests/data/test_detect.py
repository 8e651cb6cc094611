"""Detection of the wire format of a chat template."""

import pytest
from chat_templates import TEMPLATES, Template, published, tokenizer_with

from xlam_jax.data.render import wire_of
from xlam_jax.data.wire import ANY

_CHATML = ("<|im_start|>", "<|im_end|>")
DETECTED = {
    "qwen2_5": ("hermes", None, None),
    "qwen3": ("hermes", "think", False),
    "qwen3_instruct_2507": ("hermes", None, None),
    "qwen3_5_nothink": ("qwen3_coder", None, None),
    "qwen3_5_think": ("qwen3_coder", "think", True),
    "qwen3_6": ("qwen3_coder", "think", True),
    "lfm2_2_5": ("pythonic", "think", False),
}
"""Public template of the ChatML family → wire format, reasoning, whether the prompt opens the reasoning."""


@pytest.mark.parametrize("name", DETECTED)
def test_templates_of_the_chatml_family(name: str):
    wire = wire_of(tokenizer_with(Template(published(name), "", "<|im_end|>", _CHATML)), "native")
    reasoning = wire.reasoning and wire.reasoning.name
    assert (wire.format.name, reasoning, wire.opened) == DETECTED[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_the_chain(name: str):
    template = TEMPLATES[name]
    assert wire_of(tokenizer_with(template), template.format).format.name == template.wire


def test_a_template_without_calls_has_no_wire_format():
    text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    assert wire_of(tokenizer_with(Template(text, "", "<|im_end|>", _CHATML)), "native") is ANY
