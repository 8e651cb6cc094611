"""Reasoning in this project's own formats, and data.reasoning."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xlam_jax.config import Data, Loss
from xlam_jax.data import corpus, preview
from xlam_jax.data.formats.registry import find
from xlam_jax.data.formats.xlam import Xlam, earlier_template
from xlam_jax.data.lengths import fit, fit_pair
from xlam_jax.data.pair import parse_pair
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.problems import ignore
from xlam_jax.data.render import codec_and_format, render, render_all, render_prompt, wire_of
from xlam_jax.data.tokenizer import load_tokenizer, save, tokenizer_digest
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory, to_dict, to_messages, without_reasoning
from xlam_jax.data.validate import length_limit

REASONING = "A tool measures it;\n\nI ask it."


@pytest.fixture
def reasoned(row) -> Trajectory:
    """A trajectory with reasoning before a thought and calls, before text and before a call alone."""
    for turn in (1, 4, 7):
        row["conversation"][turn]["reasoning"] = f"{REASONING} {turn}"
    return parse_trajectory(row)


@pytest.fixture(scope="module", params=["tags", "control tokens", "think tokens"])
def tokenizer(request, quickstart):
    """Tokenizers without control tokens, with Mistral's, and with those of its reasoning models too."""
    if request.param == "tags":
        return load_tokenizer("mistral:v1")
    tokenizer = load_tokenizer(str(quickstart / "tokenizer"))
    if request.param == "think tokens":
        tokenizer.add_special_tokens({"extra_special_tokens": ["[THINK]", "[/THINK]"]})
    return tokenizer


def spans(trajectory: Trajectory, tokenizer: Any) -> list[tuple[str, int, str]]:
    rendered = render(trajectory, tokenizer)
    return [(s.kind, s.turn, tokenizer.decode(rendered.input_ids[s.start : s.end])) for s in rendered.spans if s.weight]


def test_xlam_writes_reasoning_in_front_of_the_turn(tokenizer, reasoned):
    opening, closing = ("[THINK]", "[/THINK]") if "[THINK]" in tokenizer.all_special_tokens else ("<think>", "</think>")
    written = spans(reasoned, tokenizer)
    assert [turn for kind, turn, _ in written if kind == "reasoning"] == [1, 4, 7]
    for kind, turn, text in written:
        if kind == "reasoning":
            assert text.strip().startswith(opening)
            assert text.strip().endswith(closing)
            assert text.strip().removeprefix(opening).removesuffix(closing).strip() == f"{REASONING} {turn}"
    kinds = [kind for kind, turn, _ in written if turn == 1]
    assert kinds[:4] + kinds[-1:] == ["reasoning", "thought", "tool_call", "arguments", "eos"]
    bare = spans(without_reasoning(reasoned), tokenizer)
    content = [(kind, turn, text.strip()) for kind, turn, text in written if kind != "reasoning"]
    assert content == [(kind, turn, text.strip()) for kind, turn, text in bare]


def test_the_saved_template_writes_the_same(tokenizer, reasoned, tmp_path):
    from transformers import AutoTokenizer

    save(tokenizer, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    messages = to_messages(reasoned)
    for key in ("reasoning_content", "reasoning", "thinking"):  # servers give one of them
        spelled = [
            {key if name == "reasoning_content" else name: value for name, value in message.items()}
            for message in messages
        ]
        out = saved.apply_chat_template(
            spelled, tools=reasoned.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        rendered = render(reasoned, tokenizer)
        assert rendered.input_ids.tolist() == out["input_ids"]
        assert rendered.loss_mask.astype(int).tolist() == out["assistant_masks"]
    prompt = render_prompt(messages[:5], reasoned.tools, saved)
    assert prompt == render(reasoned, tokenizer).input_ids[: len(prompt)].tolist()
    assert isinstance(codec_and_format(saved, "native")[1], Xlam)


def test_weights_of_reasoning(quickstart, reasoned):
    tokenizer = load_tokenizer(str(quickstart / "tokenizer"))
    (rendered,) = render_all(reasoned, tokenizer, loss=Loss(reasoning=0.5, thought=0, answer=0, tool_call=0))
    assert {(span.kind, span.weight) for span in rendered.spans if span.weight} == {("reasoning", 0.5)}
    (rendered,) = render_all(reasoned, tokenizer, loss=Loss(reasoning=0))
    assert "reasoning" not in {span.kind for span in rendered.spans if span.weight}


@pytest.mark.parametrize(
    ("name", "format", "writer"),
    [
        ("mistral:v3", "xlam_v1", "the format xlam_v1"),
        ("mistral:v3", "native", "Mistral's v3 format"),
        ("mistral:v1", "native", "Mistral's v1 format"),
    ],
)
def test_formats_that_cannot_write_it_refuse_it_by_name(name, format, writer):
    turns = [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "2 m", "reasoning": REASONING}]
    trajectory, tokenizer = parse_trajectory({"conversation": turns}), load_tokenizer(name)
    why = f"not-representable: turn 1 has reasoning, which {writer} cannot write; .* data.reasoning: drop"
    with pytest.raises(InvalidTrajectory, match=why):
        render_all(trajectory, tokenizer, format)
    assert render_all(without_reasoning(trajectory), tokenizer, format)


@pytest.mark.parametrize("text", ["a</think>b", "a[/THINK]b"])
def test_a_closing_mark_in_reasoning_does_not_end_it(text, tokenizer):
    turns = [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "2 m", "reasoning": text}]
    written = spans(parse_trajectory({"conversation": turns}), tokenizer)
    assert [kind for kind, *_ in written] == ["reasoning", "answer", "eos"]
    parsed = wire_of(tokenizer, "xlam").parse("".join(piece for *_, piece in written[:2]))
    assert (parsed.reasoning, parsed.content) == (f"a{text[1]}\u200b{text[2:]}", "2 m")


# ---- the template of earlier versions -------------------------------------------------------------------------------


def test_the_template_of_an_earlier_export_is_still_that_of_the_format(quickstart, reasoned, tmp_path):
    tokenizer = load_tokenizer(str(quickstart / "tokenizer"))
    now, digest = tokenizer.chat_template, tokenizer_digest(tokenizer)
    tokenizer.chat_template = earlier_template(True, True)
    assert tokenizer.chat_template != now
    bare = without_reasoning(reasoned)
    tools: list[Any] = bare.tools
    ids = render(bare, tokenizer, "native").input_ids.tolist()
    assert ids == tokenizer.apply_chat_template(to_messages(bare), tools=tools, return_dict=False)
    assert isinstance(find("native", tokenizer, codec_and_format(tokenizer, "xlam")[0]), Xlam)
    assert tokenizer_digest(tokenizer) == digest
    save(tokenizer, tmp_path / "new", "native")
    assert (tmp_path / "new/chat_template.jinja").read_text(encoding="utf-8") == now
    # a run that is continued keeps its files, whose digests are in its checkpoints
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    save(tokenizer, tmp_path / "continued", before=earlier)
    assert (tmp_path / "continued/chat_template.jinja").read_text(encoding="utf-8") == tokenizer.chat_template
    save(tokenizer, tmp_path / "v1", "xlam_v1", before=earlier)
    assert "xLAM v1" in (tmp_path / "v1/chat_template.jinja").read_text(encoding="utf-8")


# ---- data.reasoning -------------------------------------------------------------------------------------------------


def data_of(quickstart: Path, path: Path, **options: Any) -> Data:
    return Data.model_validate(
        {
            "sources": [{"name": "s", "files": [str(path)]}],
            "tokenizer": str(quickstart / "tokenizer"),
            "sequence_length": 1024,
            "heldout": 0.0,
            "streams": 1,
            **options,
        }
    )


def test_reasoning_is_dropped_on_request_and_counted(write_jsonl, quickstart, reasoned):
    bare = replace(without_reasoning(reasoned), id="bare")
    tokenizer = load_tokenizer(str(quickstart / "tokenizer"))
    path = write_jsonl(to_dict(reasoned), to_dict(bare))
    lines: list[str] = []
    data = data_of(quickstart, path, reasoning="drop")
    (loaded,) = corpus.load(data, tokenizer, lines.append, annotate=True)
    assert loaded.changed == {"reasoning-dropped": 1}
    assert "changed: 1 reasoning-dropped" in lines[0]
    assert loaded.train[0]["tokens"].tolist() == loaded.train[1]["tokens"].tolist()
    assert not any(turn.reasoning for one in loaded.trajectories or () for turn in one.conversation)  # pyright: ignore
    assert fit(bare, tokenizer, data).reasons == []
    (loaded,) = corpus.load(data_of(quickstart, path), tokenizer)
    assert not loaded.changed
    assert len(loaded.train[0]["tokens"]) > len(loaded.train[1]["tokens"])
    old = data_of(quickstart, path, format="xlam_v1", on_invalid="drop")
    (loaded,) = corpus.load(old, tokenizer)
    assert loaded.dropped == {"not-representable": 1}


def test_pairs_that_differ_in_reasoning(quickstart, tmp_path):
    side = lambda text, reasoning: [{"role": "assistant", "content": text, "reasoning": reasoning}]  # noqa: E731
    turns = [{"role": "user", "content": "Tide?"}]
    tokenizer, keep = load_tokenizer(str(quickstart / "tokenizer")), data_of(quickstart, tmp_path)
    drop = keep.model_copy(update={"reasoning": "drop"})

    def pair(chosen: Any, rejected: Any):
        return parse_pair({"conversation": turns, "chosen": chosen, "rejected": rejected}, "p", ignore)

    same_answer = pair(side("2 m", "I know."), side("2 m", "I guess."))
    assert fit_pair(same_answer, tokenizer, keep).reasons == []
    assert fit_pair(same_answer, tokenizer, drop).reasons == ["equal-sides"]
    later = [{"role": "user", "content": "Sure?"}]
    both = pair(
        [*side("2 m", "I know."), *later, *side("Yes", "")], [*side("2 m", "I guess."), *later, *side("No", "")]
    )
    fitted = fit_pair(both, tokenizer, drop)
    assert fitted.reasons == ["reasoning-dropped"]
    assert [{span.turn for span in one.spans if span.weight} for one in fitted.rendered] == [{3}, {3}]


def test_validate_and_preview_show_it(write_jsonl, quickstart, reasoned, tmp_path):
    path = write_jsonl(to_dict(reasoned))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"output_dir: {tmp_path / 'run'}\nmodel: {{config: configs/models/tiny_mixtral.json}}\n"
        f"data: {{tokenizer: {quickstart / 'tokenizer'}, sources: [{{files: [{path}]}}], sequence_length: 512, "
        "heldout: 0.0, streams: 1}\ntrain: {steps: 1, batch_size: 1, learning_rate: 0.1}\n",
        encoding="utf-8",
    )
    assert not list(length_limit(config)(reasoned))
    (problem,) = length_limit(config, ["data.reasoning=drop"])(reasoned)
    assert problem.reason == "reasoning-dropped"
    (problem,) = length_limit(config, ["data.format=xlam_v1"])(reasoned)
    assert "has reasoning, which the format xlam_v1 cannot write" in problem.detail
    rows = list(preview.rows(config, count=1))
    kinds = {token.kind for row in rows for segment in row.segments for token in segment.tokens}
    assert "reasoning" in kinds
    text = "\n".join(preview.terminal(rows, color=False))
    assert "«reasoning| <think>⏎" in text
    masked = preview.terminal(preview.rows(config, ["data.loss.reasoning=0"], count=1), color=False)
    assert "«reasoning|" not in "\n".join(masked)
    page = tmp_path / "page.html"
    preview.write_page(rows, page)
    assert ".reasoning { background:" in page.read_text(encoding="utf-8")
