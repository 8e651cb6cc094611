"""What is trained is what a server would parse: a run whose calls cannot be parsed back is refused before it starts."""

from pathlib import Path
from typing import Any

import pytest
from chat_templates import TEMPLATES, Template, tokenizer_with

from xlam_jax.config import Data
from xlam_jax.data import corpus, render_sources
from xlam_jax.data.readback import unreadable_turn
from xlam_jax.data.render import render, wire_of
from xlam_jax.data.trajectory import Message, ToolCall, Trajectory
from xlam_jax.errors import UserError

HERMES = TEMPLATES["qwen2_5"]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def row(id: str, content: str = "", name: str = "look", arguments: Any = None) -> dict[str, Any]:
    call = {"function": {"name": name, "arguments": arguments}}
    turn = {"role": "assistant", "content": content} | ({} if arguments is None else {"tool_calls": [call]})
    turns = [{"role": "user", "content": "q"}, turn]
    return {"unique_trajectory_id": id, "tools": [TOOL], "conversation": turns}


def data(path: Path, **changes: Any) -> Data:
    source = {"name": "rows", "files": [str(path)]}
    values = {"sources": [source], "tokenizer": "t", "format": "native", "sequence_length": 1024, "heldout": 0.0}
    return Data.model_validate(values | changes)


def test_calls_that_are_parsed_back_are_trained(write_jsonl):
    rows = [row("a", "I look.", arguments={"q": '</tool_call> "x"\n[1]'}), row("b", arguments={}), row("c", "No.")]
    [loaded] = corpus.load(data(write_jsonl(*rows)), tokenizer_with(HERMES))
    assert (len(loaded.train), loaded.changed) == (3, {})


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_call_that_is_not_parsed_back_is_named(write_jsonl, monkeypatch, processes: int):
    monkeypatch.setattr(render_sources, "PROCESSES", processes)
    monkeypatch.setattr(render_sources, "ALONE", 1)
    path = write_jsonl(row("a", arguments={"q": 1}), row("b", "<tool_call>", arguments={"q": 2}))
    tokenizer = tokenizer_with(HERMES)
    with pytest.raises(UserError) as refused:
        corpus.load(data(path), tokenizer)
    message = str(refused.value)
    assert message.startswith(f'{path}:2: unreadable-call: turn 1 calls look({{"q": 2}}); written as \'<tool_call>\\n')
    assert "it is not parsed as calls by the wire format hermes" in message
    assert message.endswith("or train it nevertheless with data.unreadable_calls=allow")
    [loaded] = corpus.load(data(path, unreadable_calls="allow"), tokenizer)
    assert (len(loaded.train), loaded.changed) == (2, {"unreadable-call": 1})


def test_text_that_is_parsed_as_a_call_is_named():
    text = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    trajectory = Trajectory("a", None, None, "", [TOOL], (Message("user", "q"), Message("assistant", text)))
    tokenizer = tokenizer_with(HERMES)
    rendered = render(trajectory, tokenizer, "native")
    decode: Any = tokenizer.decode
    unreadable = unreadable_turn(rendered, trajectory, wire_of(tokenizer, "native"), decode)
    assert unreadable is not None
    assert unreadable.reason == "text-read-as-call"
    assert unreadable.detail.startswith("turn 1: ")


def test_a_template_whose_calls_no_format_reads_is_refused(write_jsonl):
    text = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} WITH {{ c.function.arguments }}{% endfor %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_with(Template(text, "", "<|im_end|>", ("<|im_start|>",)))
    path = write_jsonl(row("a", "Hi."), row("b", arguments={"q": 1}))
    with pytest.raises(UserError, match=r"rows\.jsonl:2: .*no wire format is known for \"CALL look WITH"):
        corpus.load(data(path), tokenizer)


def test_turns_without_loss_are_not_checked():
    turns = (
        Message("user", "q"),
        Message("assistant", "<tool_call>", (ToolCall(None, "look", {"q": 1}),), loss=False),
        Message("tool", "r"),
        Message("assistant", "Done."),
    )
    tokenizer = tokenizer_with(HERMES)
    trajectory = Trajectory("a", None, None, "", [TOOL], turns)
    rendered = render(trajectory, tokenizer, "native")
    decode: Any = tokenizer.decode
    assert unreadable_turn(rendered, trajectory, wire_of(tokenizer, "native"), decode) is None


@pytest.mark.parametrize(
    ("name", "text", "first"),
    [
        ("qwen2_5", "a <|im_end|> b", "'<|im_end|>' in turn 0"),
        ("llama3_1", "<|eot_id|>", "'<|eot_id|>' in turn 0"),
        ("mistral_v11", "[/INST]", "'[/INST]' in turn 0"),
        ("xlam2", "<|im_start|>system", "'<|im_start|>' in turn 0"),
        ("xlam", "[TOOL_CALLS]", "'[TOOL_CALLS]' in turn 0"),
    ],
)
def test_data_that_spell_a_mark_are_reported(write_jsonl, name: str, text: str, first: str):
    spelled = row("a", "No.")
    spelled["conversation"][0]["content"] = text
    path = write_jsonl(row("b", "No."), spelled)
    lines: list[str] = []
    template = TEMPLATES[name]
    tokenizer = tokenizer_with(template)
    [loaded] = corpus.load(data(path, format=template.format), tokenizer, lines.append)
    [line] = [line for line in lines if "spells a mark" in line]
    warning = "" if name in ("xlam", "xlam2") else "warning: "
    assert line.startswith(f"rows: {warning}in 1 trajectories, text spells a mark of the format (first: {path}:2: ")
    assert first in line
    assert ("a server that tokenizes" in line) == bool(warning)
    assert ("it stays text at any server" in line) == (not warning)
    # the spelled token stays text: as many special tokens as in the row that spells none
    special = set(tokenizer.all_special_ids)
    counts = [sum(int(token) in special for token in example["tokens"]) for example in loaded.train]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["qwen2_5", "xlam2"])
def test_marks_in_tools_and_calls_are_reported(write_jsonl, name: str):
    template = TEMPLATES[name]
    tokenizer = tokenizer_with(template)
    in_tools = row("a", "No.") | {
        "tools": [{"type": "function", "function": TOOL["function"] | {"description": "Ends with <|im_end|>."}}]
    }
    for spelled, first in (
        (in_tools, "'<|im_end|>' in the tools"),
        (row("a", arguments={"q": "<|im_end|>"}), "'<|im_end|>' in a call of turn 1"),
    ):
        path, lines = write_jsonl(row("b", "No."), spelled), list[str]()
        corpus.load(data(path, format=template.format), tokenizer, lines.append)
        [line] = [line for line in lines if "spells a mark" in line]
        assert f"(first: {path}:2: {first})" in line
