"""The tokenizer of a config: tokens that it adds, and a chat template from a file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support import Commands
from tool_template import ADDED, TEMPLATE

from xlam_jax import config as configs
from xlam_jax.config import Data
from xlam_jax.data import cache
from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.render import render
from xlam_jax.data.tokenizer import load_tokenizer, open_tokenizer, save, tokenizer_digest, with_added_tokens
from xlam_jax.data.trajectory import Trajectory, to_messages
from xlam_jax.errors import UserError


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "tools.jinja"
    path.write_text(TEMPLATE, encoding="utf-8")
    return path


@pytest.fixture
def data(quickstart: Path, template: Path) -> Data:
    return described(quickstart, template)


def described(quickstart: Path, template: Path, **fields: Any) -> Data:
    values = {
        "sources": [{"files": [str(quickstart / "hammer.jsonl")]}],
        "tokenizer": str(quickstart / "tokenizer"),
        "format": "native",
        "sequence_length": 512,
        "chat_template": str(template),
        "added_tokens": ADDED,
    }
    return Data.model_validate(values | fields)


def test_added_tokens_follow_the_tokenizers_own(data: Data, tmp_path: Path):
    tokenizer, plain = open_tokenizer(data), load_tokenizer(data.tokenizer)
    first = len(plain)
    ids = [first, first + 1, first + 2]
    assert tokenizer.convert_tokens_to_ids(["<call>", "</call>", "<note>"]) == ids
    assert len(tokenizer) == first + 3
    assert [tokenizer.added_tokens_decoder[i].special for i in ids] == [True, True, False]
    text = "a <call>b</call> c"
    assert set(ids[:2]) < set(tokenizer.encode(text))
    assert tokenizer.encode("a b c") == plain.encode("a b c")
    save(tokenizer, tmp_path / "saved", data.format)
    reloaded = load_tokenizer(str(tmp_path / "saved"))
    assert tokenizer_digest(reloaded) == tokenizer_digest(tokenizer) != tokenizer_digest(plain)
    assert reloaded.chat_template == TEMPLATE


def test_the_file_is_the_native_template(data: Data, quickstart: Path, tmp_path: Path):
    """Of the trained ids, and of a server that loads the saved tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = open_tokenizer(data)
    save(tokenizer, tmp_path / "saved", data.format)
    server: Any = AutoTokenizer.from_pretrained(tmp_path / "saved")
    call = tokenizer.convert_tokens_to_ids("<call>")
    rows = [row for _, row in read_jsonl(quickstart / "hammer.jsonl")][:5]
    for trajectory in rows:
        assert isinstance(trajectory, Trajectory)
        rendered = render(trajectory, tokenizer, data.format)
        expected = server.apply_chat_template(
            to_messages(trajectory), tools=trajectory.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        assert rendered.input_ids.tolist() == expected["input_ids"]
        if all(turn.loss is not False for turn in trajectory.conversation):
            assert rendered.loss_mask.tolist() == [bool(mask) for mask in expected["assistant_masks"]]
        assert call in rendered.input_ids[rendered.loss_mask]


def test_content_that_spells_a_special_token_stays_text(data: Data, quickstart: Path):
    tokenizer = open_tokenizer(data)
    [(_, row), *_] = read_jsonl(quickstart / "hammer.jsonl")
    assert isinstance(row, Trajectory)
    turns = row.conversation
    spelled = replace(row, conversation=(replace(turns[0], content="say <call> and <note>"), *turns[1:]))
    ids = render(spelled, tokenizer, data.format).input_ids.tolist()
    before = render(row, tokenizer, data.format).input_ids.tolist()
    call, note = (tokenizer.get_vocab()[token] for token in ("<call>", "<note>"))
    assert ids.count(call) == before.count(call)
    assert ids.count(note) == before.count(note) + 1  # not special


def test_template_and_tokens_are_part_of_the_cache_key(quickstart: Path, template: Path, tmp_path: Path):
    data = described(quickstart, template)
    key = cache.make_key(data, open_tokenizer(data))
    assert cache.make_key(data, open_tokenizer(data)) == key
    other = tmp_path / "other.jinja"
    other.write_text(TEMPLATE + "\n{# changed #}", encoding="utf-8")
    changed = described(quickstart, other)
    assert cache.make_key(changed, open_tokenizer(changed))["template"] != key["template"]
    fewer = described(quickstart, template, added_tokens=ADDED[:2])
    assert cache.make_key(fewer, open_tokenizer(fewer))["tokenizer"] != key["tokenizer"]


def test_unused_rows_of_the_model_are_used_first(tiny_config: Path):
    def resolve(*overrides: str) -> configs.Resolved:
        return with_added_tokens(configs.load(tiny_config, ["data.added_tokens=[<call>, <note>]", *overrides]))

    grown = resolve()
    tokens = len(load_tokenizer(grown.config.data.tokenizer))
    assert grown.model.added == (tokens, 2)
    assert grown.model.vocab_size == grown.hf_config["vocab_size"] == tokens + 64
    assert with_added_tokens(grown) == grown
    spare = resolve(f"model.overrides.vocab_size={tokens + 2}")
    assert spare.model.vocab_size == tokens + 2
    assert not grown.warnings
    assert "set lora.train_tokens to true" in resolve("train.trainable=lora").warnings[-1]
    assert not resolve("train.trainable=lora", "lora.train_tokens=true").warnings
    with pytest.raises(UserError, match="more than the model's vocab_size"):
        resolve("model.overrides.vocab_size=512")


def test_the_json_schema_has_both_spellings():
    for tokens in (["<a>"], [{"text": "<a>", "special": False}], ["<a>", {"text": "<b>"}]):
        jsonschema.validate({"extends": "a.yaml", "data": {"added_tokens": tokens}}, configs.json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"extends": "a.yaml", "data": {"added_tokens": [3]}}, configs.json_schema())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.added_tokens=[<a>, <a>]"], "data.added_tokens has '<a>' twice; remove one"),
        (["data.added_tokens=['<a> ']"], "the added token '<a> ' begins or ends with white space; remove it"),
        (["data.added_tokens=['']"], "data.added_tokens.0.text is '': string should have at least 1 character"),
        (["data.added_tokens=[{text: <a>, kind: x}]"], "unknown key data.added_tokens.0.kind"),
        (["lora.train_tokens=true"], "lora.train_tokens is true and data.added_tokens is empty"),
        (["data.chat_template=a.jinja"], "data.chat_template is a.jinja and data.format is xlam, which has its own"),
        (["data.chat_template=a.jinja", "data.format=xlam_v1"], "data.format is xlam_v1, which has its own template"),
    ],
)
def test_contradictions_are_refused(tiny_config: Path, overrides: list[str], message: str):
    with pytest.raises(UserError) as error:
        configs.load(tiny_config, overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory; name a jinja file"),
        (b"\xff\xfe", "cannot be read: it is not UTF-8 text"),
        (b" \n", "is empty; name a jinja file"),
        (b"a\n{% if x %}b{% fi %}\n", "line 2: not valid jinja: Encountered unknown tag 'fi'"),
        (b"{{ a | nothing }}", "line 1: not valid jinja: No filter named 'nothing'"),
    ],
)
def test_invalid_templates_are_refused(
    commands: Commands, tiny_config: Path, tmp_path: Path, content: bytes | None, message: str
):
    path = tmp_path / "broken.jinja"
    if content is not None:
        path.write_bytes(content)
    said = commands.fails(
        "xlam_jax.data", "stats", "--config", tiny_config, "data.format=native", f"data.chat_template={path}"
    )
    assert said.startswith(f"error: data.chat_template: {path}")
    assert message in said


def test_a_template_that_refuses_the_probe_is_valid(quickstart: Path, tmp_path: Path):
    path = tmp_path / "strict.jinja"
    path.write_text("{{ raise_exception('not today') }}", encoding="utf-8")
    assert open_tokenizer(described(quickstart, path)).chat_template == path.read_text(encoding="utf-8")


def test_tokens_that_exist_are_refused(quickstart: Path, template: Path):
    for text in ("</s>", "[TOOL_CALLS]", "e"):
        with pytest.raises(UserError, match=r"data.added_tokens.0: the tokenizer .* has the token .* already, with id"):
            open_tokenizer(described(quickstart, template, added_tokens=[text]))
