import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlam_jax import config as configs
from xlam_jax.data import corpus, pipeline, preview
from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.render import codec_and_format, render
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.data.trajectory import Trajectory
from xlam_jax.enums import SPAN_KINDS
from xlam_jax.errors import UserError

ROOT = Path(__file__).parents[2]
load_once = cache(load_tokenizer)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Two bundled sources, thoughts at half weight."""
    path = tmp_path_factory.mktemp("preview") / "c.yaml"
    quickstart = ROOT / "examples" / "quickstart"
    path.write_text(
        f"extends: {ROOT}/configs/quickstart.yaml\n"
        f"model: {{config: {ROOT}/configs/models/tiny_mixtral.json}}\n"
        f"data:\n  tokenizer: {quickstart}/tokenizer\n  loss: {{thought: 0.5}}\n  streams: 2\n  sources:\n"
        f"    - {{name: webshop, files: [{quickstart}/webshop.jsonl]}}\n"
        f"    - {{name: hammer, files: [{quickstart}/hammer.jsonl], weight: 3}}\n"
        "train: {batch_size: 4}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def shown(config) -> list[preview.Row]:
    return list(preview.rows(config, count=6))


def loaded(config: Path, overrides: tuple[str, ...] = ()):
    run = configs.load(config, list(overrides)).config
    tokenizer = load_tokenizer(run.data.tokenizer)
    return run, tokenizer, corpus.load(run.data, tokenizer)


def as_trained(rows: list[preview.Row], run, tokenizer, data) -> None:
    """Fails unless the rows hold, place for place, what the loader of a training run gives."""
    loader = pipeline.Loader(data, run.data, batch_size=run.train.batch_size, seed=run.seed, tokenizer=tokenizer)
    batches = (next(loader) for _ in iter(int, 1))
    trained = (columns for batch in batches for columns in zip(*batch[:5], strict=True))
    for row, columns in zip(rows, trained, strict=False):
        tokens, labels, weights, positions, segments = columns
        assert row.padding == (segments == 0).sum()
        assert row.length == len(tokens)
        assert len(row.segments) == segments.max()
        for segment in row.segments:
            places = slice(segment.at, segment.at + segment.places)
            ids = [token.id for token in segment.tokens]
            assert ids[:-1] == tokens[places].tolist()
            assert ids[1:] == labels[places].tolist()
            assert [token.weight for token in segment.tokens[1:]] == weights[places].tolist()
            assert [token.position for token in segment.tokens[:-1]] == positions[places].tolist()
            assert len(set(segments[places].tolist())) == 1


def test_shows_the_rows_of_training_in_their_order(config, shown):
    assert [row.number for row in shown] == [1, 2, 3, 4, 5, 6]
    as_trained(shown, *loaded(config))


def test_shows_augmented_rows_too(config):
    overrides = ("data.augment.tools=true", "data.augment.negatives=0.5")
    rows = list(preview.rows(config, overrides, count=5))
    as_trained(rows, *loaded(config, overrides))
    assert {token.kind for row in rows for segment in row.segments for token in segment.tokens} == set(SPAN_KINDS) - {
        "reasoning"  # the bundled trajectories have none
    }


def test_both_sides_of_pairs_are_shown_as_they_are_trained(config):
    files = ROOT / "examples" / "dpo" / "hotpotqa.jsonl"
    overrides = (
        f"data.sources=[{{name: pairs, files: [{files}], format: pairs}}]",
        "objective.kind=sigmoid",
        "data.loss.thought=1",
    )
    rows = list(preview.rows(config, overrides, count=3))
    as_trained(rows, *loaded(config, overrides))
    pairs = {pair["unique_trajectory_id"]: pair for pair in map(json.loads, files.read_text("utf-8").splitlines())}
    for row in rows:
        for chosen, rejected in zip(row.segments[::2], row.segments[1::2], strict=True):
            pair, _, side = chosen.id.rpartition(", ")
            assert (side, rejected.id) == ("chosen", f"{pair}, rejected")
            for side, segment in (("chosen", chosen), ("rejected", rejected)):
                text = "".join(token.text for token in segment.tokens if token.weight > 0)
                answers = [turn for turn in pairs[pair][side] if turn["role"] == "assistant"]
                assert text.count("</s>") == len(answers)
                assert all(json.dumps(turn["content"], ensure_ascii=False)[1:9] in text for turn in answers)
                last = answers[-1]["tool_calls"][0]["function"]["arguments"]
                assert text.endswith(f'"arguments": {json.dumps(last, ensure_ascii=False)}}}]</s>')
    text = "\n".join(preview.terminal(rows, color=False))
    assert re.search(r"^pairs: .*, rejected \(places \d+ to \d+, \d+ trained tokens\)$", text, re.MULTILINE)


def test_names_each_segment_and_marks_its_tokens_as_rendered(config, shown):
    run, tokenizer, _ = loaded(config)
    trajectories: dict[tuple[str, str], Trajectory] = {}
    for source in run.data.sources:
        for _, trajectory in read_jsonl(source.files[0]):
            assert isinstance(trajectory, Trajectory)
            trajectories[source.name, trajectory.id] = trajectory
    for segment in (segment for row in shown for segment in row.segments):
        trajectory = trajectories[segment.source, segment.id]
        rendered = render(trajectory, tokenizer, run.data.format, run.data.loss)
        assert [token.id for token in segment.tokens] == rendered.input_ids.tolist()
        for span in rendered.spans:
            for token in segment.tokens[max(1, span.start) : span.end]:
                assert (token.kind, token.turn, token.weight) == (span.kind, span.turn, span.weight)
        assert segment.roles == tuple(turn.role for turn in trajectory.conversation)
        assert segment.trained == rendered.loss_mask.sum()


def test_one_source_alone(config):
    rows = list(preview.rows(config, count=3, source="webshop"))
    assert {segment.source for row in rows for segment in row.segments} == {"webshop"}
    assert all(row.segments for row in rows)
    everything = list(preview.rows(config, count=rows[-1].number))
    holds = [row for row in everything if any(segment.source == "webshop" for segment in row.segments)]
    assert [row.number for row in rows] == [row.number for row in holds]
    assert [len(row.segments) + row.hidden for row in rows] == [len(row.segments) for row in holds]
    with pytest.raises(UserError, match="--source webshp: the config has webshop, hammer; did you mean 'webshop'"):
        next(preview.rows(config, count=1, source="webshp"))


def test_the_plain_text_says_which_words_are_trained(shown):
    text = "\n".join(preview.terminal(shown, color=False))
    assert "\x1b" not in text
    parts = re.split(r"\n\n(?=row \d+: |\w+: \S+ \(places )", text)
    parts = [part for part in parts if " (places " in part.partition("\n")[0]]
    segments = [segment for row in shown for segment in row.segments]
    for segment, part in zip(segments, parts, strict=True):
        assert part.startswith(f"{segment.source}: {segment.id} (")
        marked = re.findall(r"«(\w+)( ×[\d.]+)?\| (.*?)»", part, re.DOTALL)
        trained: dict[str, str] = {}
        for token in segment.tokens:
            if token.weight > 0:
                name = "end" if token.kind == "eos" else token.kind
                trained[name] = trained.get(name, "") + token.text
        assert trained
        for name in trained:
            words_of_kind = "".join(words for kind, _, words in marked if kind == name)
            assert re.sub("[⟦⟧⏎]", "", words_of_kind) == trained[name]
        assert {weight for kind, weight, _ in marked if kind == "thought"} <= {" ×0.5"}
        assert {weight for kind, weight, _ in marked if kind != "thought"} == {""}
    assert f"{shown[0].padding} of 1024 places are padding" in text


def test_colours_are_added_to_the_same_text(shown):
    plain = "\n".join(preview.terminal(shown, color=False)).partition("\n")[2]
    colored = "\n".join(preview.terminal(shown, color=True))
    assert "\x1b[30;48;5;153m" in colored
    bare = re.sub(r"\x1b\[[\d;]*m", "", re.sub(r"\x1b\[2m×0.5", "", colored)).partition("\n")[2]
    assert bare == re.sub(r"«[^|«]*\| |»", "", plain)
    for line in colored.splitlines():  # a colour never runs over the end of a line
        assert line.count("\x1b[30;") + line.count("\x1b[1m") + line.count("\x1b[2m") == line.count("\x1b[0m")


class Page(HTMLParser):
    """The tokens and links of a page."""

    def __init__(self):
        super().__init__()
        self.tokens: list[tuple[str, str]] = []
        self.links: list[str | None] = []
        self.tags: set[str] = set()
        self._title: str | None = None

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action")]
        self._title = dict(attrs).get("title")
        if self._title:
            self.tokens.append((self._title, ""))

    def handle_data(self, data):
        if self._title:
            title, text = self.tokens[-1]
            self.tokens[-1] = (title, text + data)

    def handle_endtag(self, tag):
        self._title = None


def test_the_page_holds_every_token_with_its_id_and_weight_and_nothing_from_elsewhere(shown, tmp_path):
    preview.write_page(shown, tmp_path / "p.html")
    page = Page()
    page.feed((tmp_path / "p.html").read_text(encoding="utf-8"))
    tokens = [token for row in shown for segment in row.segments for token in segment.tokens]
    assert len(page.tokens) == len(tokens)
    for (title, text), token in zip(page.tokens, tokens, strict=True):
        assert title.startswith(f"id {token.id}, position {token.position}, weight {token.weight:g}")
        assert text.replace("⏎\n", "\n") == token.text
    assert not page.links
    assert "script" not in page.tags
    assert [path.name for path in tmp_path.iterdir()] == ["p.html"]


def test_what_the_content_holds_is_shown_and_never_acts(tmp_path, tokenizer):
    text = "<script>alert(1)</script>\x1b[2J\t[INST]\r\u202e&amp;"
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    shown = preview.texts(tokenizer)
    tokens = [preview.Token(*shown(token), token, at, 1.0, "answer", 0) for at, token in enumerate(ids)]
    row = preview.Row(1, len(ids), 0, 0, [preview.Segment("s", "<b>", 0, len(ids) - 1, ("user",), tokens)])
    plain = "\n".join(preview.terminal([row], color=False))
    assert "\x1b" not in plain
    assert "\r" not in plain
    assert "\\x1b[2J⇥" in plain
    assert "⟦[INST]⟧" not in plain
    preview.write_page([row], tmp_path / "p.html")
    page = Page()
    page.feed((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert not page.tags & {"script", "strong > b"}
    assert "".join(text for _, text in page.tokens).lstrip(" ").startswith("<script>alert(1)</script>\\x1b[2J⇥")


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_the_texts_of_tokens_are_exactly_the_text(text):
    for name in ("mistral:v3", str(ROOT / "examples" / "quickstart" / "tokenizer")):
        tokenizer = load_once(name)
        shown = preview.texts(tokenizer)
        # text that looks like our notation for single bytes would be ambiguous
        clean = text.replace("⟨", "(").replace("▁", "_")
        plain = codec_and_format(tokenizer, "xlam")[0].plain  # a control token written out is text
        pieces = [shown(token) for token in plain.encode(clean, add_special_tokens=False).ids]
        assert not any(special for _, special in pieces)
        raw = re.sub(
            rb"((?:\xe2\x9f\xa8[0-9a-f]{2}\xe2\x9f\xa9)+)",
            lambda match: bytes.fromhex(re.sub(rb"[^0-9a-f]", b"", match[1]).decode()),
            "".join(piece for piece, _ in pieces).encode(),
        )
        assert raw.decode().removeprefix(" " if name == "mistral:v3" else "") == clean


def test_special_tokens_and_ids_without_a_token():
    tokenizer = load_tokenizer("mistral:v3")
    shown = preview.texts(tokenizer)

    def id_of(token: str) -> int:
        token_id = tokenizer.convert_tokens_to_ids(token)
        assert isinstance(token_id, int)
        return token_id

    assert shown(id_of("[INST]")) == ("[INST]", True)
    assert isinstance(tokenizer.bos_token_id, int)
    assert shown(tokenizer.bos_token_id) == ("<s>", True)
    assert shown(10**6) == ("⟨no token 1000000⟩", True)
    assert shown(id_of("<0xF0>")) == ("⟨f0⟩", False)
    assert shown(id_of("<0x41>")) == ("A", False)
