import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.render import CONTROL_TOKENS, render
from xlam_jax.data.tokenizer import MISTRAL, load_tokenizer, save
from xlam_jax.errors import UserError


@pytest.fixture(scope="module", params=MISTRAL)
def mistral(request):
    """A Mistral tokenizer and the SentencePiece model that it is made from."""
    spec = find_spec("mistral_common")
    assert spec is not None
    folder = Path(str(spec.origin)).parent / "data"
    return load_tokenizer(request.param), SentencePieceProcessor(model_file=str(folder / MISTRAL[request.param][0]))


@pytest.fixture
def small(quickstart) -> str:
    return str(quickstart / "tokenizer")


def texts(model: SentencePieceProcessor) -> list[str]:
    """Whitespace and symbol runs, every piece, mixed scripts, random characters and random pieces."""
    random_ = random.Random(0)
    alphabet = ' \n\t  abAB019.,{}[]":=-_#/\\éßя中文日🙂👩‍👧\u200b\u00a0\x00\x07▁ñ\u0301한'
    pieces = [model.id_to_piece(i).replace("▁", " ") for i in range(model.vocab_size())]
    samples = [c * n for c in " -=#*\n\t.0a_/!e~" for n in range(1, 60)]
    samples += pieces[::7]
    for _ in range(700):
        samples.append(
            "".join(random_.choice(alphabet) * random_.choice([1, 1, 2, 5]) for _ in range(random_.randint(1, 40)))
        )
        samples.append("".join(random_.choice(pieces) for _ in range(random_.randint(1, 25))))
    return samples


def test_ids_are_sentencepieces(mistral):
    """Also of control tokens written out, which SentencePiece takes for text, and of text after a control token."""
    tokenizer, model = mistral
    backend = tokenizer.backend_tokenizer
    eos = tokenizer.eos_token
    control = tokenizer.all_special_tokens
    for text in texts(model):
        backend.encode_special_tokens = True
        assert backend.encode(text, add_special_tokens=False).ids == model.encode(text), repr(text)
        backend.encode_special_tokens = False
        if not any(token in text for token in control):
            ids = tokenizer(eos + text, add_special_tokens=False).input_ids
            assert ids == [tokenizer.eos_token_id, *model.encode(text)], repr(text)


def test_special_tokens_are_mistrals(mistral):
    tokenizer, model = mistral
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert len(tokenizer) == model.vocab_size()
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer("a").input_ids == model.encode("a")  # no <s> of its own accord
    if len(tokenizer) == 32768:
        assert tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)) == [3, 4, 5, 6, 7, 8, 9]
        assert tokenizer("[TOOL_CALLS][{").input_ids == [5, *model.encode("[{")]


def test_decoding_gives_the_text_back(mistral):
    tokenizer, model = mistral
    for text in ("a  b\n\tc é🧿中 x", " lead", '[{"a": 1}]'):
        assert tokenizer.decode(model.encode(text)) == text


@pytest.mark.parametrize("format", ["xlam", "native", "xlam_v1"])
def test_saving_twice_gives_the_same_bytes(format, tokenizer, tmp_path):
    own = tokenizer.chat_template
    save(tokenizer, tmp_path / "a", format)
    assert tokenizer.chat_template == own
    save(load_tokenizer(str(tmp_path / "a")), tmp_path / "b", format)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_model_config_next_to_it_changes_nothing(tokenizer, tmp_path):
    from transformers import MixtralConfig

    save(tokenizer, tmp_path)
    MixtralConfig(architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    text = "  Hello\n\nwörld   don't 123 </s>[TOOL_CALLS][{"
    assert load_tokenizer(str(tmp_path))(text).input_ids == tokenizer(text).input_ids


def test_bos_is_not_doubled(row, small, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(small)
    plain = render(parse_trajectory(row), tokenizer).input_ids.tolist()
    adding = load_tokenizer(small)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    save(adding, tmp_path)
    adding = load_tokenizer(str(tmp_path))
    assert adding("a").input_ids[0] == 1
    assert render(parse_trajectory(row), adding).input_ids.tolist() == plain


def test_padding_and_truncation_do_not_touch_rendering(row, small):
    tokenizer = load_tokenizer(small)
    plain = render(parse_trajectory(row), tokenizer).input_ids.tolist()
    other = load_tokenizer(small)
    other(["a", "b c"], padding="max_length", truncation=True, max_length=4)
    assert render(parse_trajectory(row), other).input_ids.tolist() == plain


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("mistral:v33", "known are mistral:v1, mistral:v3; did you mean"),
        ("./nowhere", "no tokenizer_config.json there"),
    ],
)
def test_a_missing_tokenizer_is_a_user_error(name, match):
    with pytest.raises(UserError, match=match):
        load_tokenizer(name)


def test_a_tokenizer_without_eos_is_a_user_error(row, small):
    tokenizer = load_tokenizer(small)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        render(parse_trajectory(row), tokenizer)


def test_the_quickstarts_tokenizer_is_remade_byte_for_byte(quickstart, tmp_path):
    subprocess.run([sys.executable, quickstart / "make_tokenizer.py", "--out", tmp_path / "made"], check=True)
    for path in (quickstart / "tokenizer").iterdir():
        assert (tmp_path / "made" / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(load_tokenizer(str(quickstart / "tokenizer"))) == 2048


def test_the_quickstarts_trajectories_are_short(quickstart, bundled):
    tokenizer = load_tokenizer(str(quickstart / "tokenizer"))
    rendered = [render(trajectory, tokenizer) for trajectory in bundled]
    assert len(bundled) >= 500
    assert len({trajectory.id for trajectory in bundled}) == len(bundled)
    assert max(len(one.input_ids) for one in rendered) <= 1024
    total = sum(len(one.input_ids) for one in rendered)
    assert total < 200_000  # several epochs of it must fit into minutes
    assert f"{len(bundled)} trajectories, {total:,} tokens" in (quickstart / "README.md").read_text(encoding="utf-8")
    assert all(one.loss_mask.any() for one in rendered)


def test_data_code_does_not_import_jax_or_transformers():
    modules = "xlam_jax.data.tokenizer, xlam_jax.data.render, xlam_jax.data.trajectory, converters.trajectories"
    code = f"import {modules}, sys; sys.exit(any(name in sys.modules for name in ('jax', 'transformers', 'torch')))"
    subprocess.run([sys.executable, "-c", code], check=True)
