"""The chain from training to parsed calls, per chat template: a model that memorized rows answers with their calls."""

from pathlib import Path

import memorized
import pytest
from chat_templates import TEMPLATES

from xlam_jax.data.render import wire_of
from xlam_jax.data.tokenizer import load_tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_memorized_call_is_parsed(tmp_path: Path, name: str):
    run = memorized.train(tmp_path, name)
    assert memorized.exact(run) == (1, 1)
    assert wire_of(load_tokenizer(str(run / "tokenizer"))).format.name == TEMPLATES[name].wire
