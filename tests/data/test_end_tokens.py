"""The tokens that end assistant turns are read from what a format renders, not from the tokenizer's settings."""

from pathlib import Path

import pytest

from xlam_jax.data.render import end_tokens
from xlam_jax.data.tokenizer import load_tokenizer, save

ANSWERS = (
    "{%- for m in messages -%}"
    "{{- '<|im_start|>' + m.role + '\\n' -}}"
    "{%- if m.role == 'assistant' -%}{{- m.content -}}"
    "{%- for call in m.tool_calls or [] -%}{{- call.function | tojson -}}{%- endfor -%}"
    "{{- END -}}{%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
WITH_TOOLS = "{%- if tools -%}{{- tools | tojson -}}{%- endif -%}" + ANSWERS
ONE_END = "'<|im_end|>'"
TWO_ENDS = "('<|eom|>' if m.tool_calls else '<|im_end|>')"
MARKED = ANSWERS.replace("'assistant' -%}{{-", "'assistant' -%}{%- generation -%}{{-").replace(
    "{{- END -}}", "{{- END -}}{%- endgeneration -%}"
)


def chatml(quickstart: Path, template: str):
    """A tokenizer whose end-of-sequence token, </s>, is not what its template ends turns with."""
    tokenizer = load_tokenizer(str(quickstart / "tokenizer"))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eom|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("format", ["xlam", "xlam_v1", "native"])
def test_the_projects_formats_end_with_the_end_of_sequence_token(tokenizer, format: str, tmp_path: Path):
    if format == "native" and not tokenizer.chat_template:
        pytest.skip("the tokenizer has no template")
    assert end_tokens(tokenizer, format) == (tokenizer.eos_token_id,)
    save(tokenizer, tmp_path, format)
    assert end_tokens(load_tokenizer(str(tmp_path))) == (tokenizer.eos_token_id,), "by the saved template"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ANSWERS.replace("END", ONE_END), ["<|im_end|>"]),
        (WITH_TOOLS.replace("END", ONE_END), ["<|im_end|>"]),
        (MARKED.replace("END", ONE_END), ["<|im_end|>"]),
        (WITH_TOOLS.replace("END", TWO_ENDS), ["<|im_end|>", "<|eom|>"]),
        (ANSWERS.replace("END", "eos_token"), ["</s>"]),
        ("{{- messages[0].content -}}", ["</s>"]),  # renders no answer
    ],
    ids=["answers", "tools", "marked", "two ends", "eos", "none"],
)
def test_a_template_says_what_ends_its_turns(quickstart: Path, tmp_path: Path, template: str, expected: list[str]):
    tokenizer = chatml(quickstart, template)
    assert tokenizer.convert_ids_to_tokens(list(end_tokens(tokenizer, "native"))) == expected
    save(tokenizer, tmp_path, "native")
    assert tokenizer.convert_ids_to_tokens(list(end_tokens(load_tokenizer(str(tmp_path))))) == expected
    assert end_tokens(tokenizer, "xlam") == (tokenizer.eos_token_id,), "the format decides"
