"""The kind `arguments`: in every format its spans are the JSON of each call's arguments, and nothing else."""

from collections import defaultdict

import pytest

from xlam_jax.data.codec import Codec, to_json
from xlam_jax.data.formats.registry import find
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.render import Rendered, sequences
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.data.trajectory import Trajectory

CLOSING = set('}], "\n')
TOOL_CALL = "<tool_call>{}</tool_call>"
WRITTEN = {
    "object": TOOL_CALL.format("' + call.function | tojson + '"),
    "lines": TOOL_CALL.format("\\n' + call.function | tojson(indent=2) + '\\n"),
    "apart": "<function=' + call.function.name + '>' + call.function.arguments | tojson + '</function>",
    "tight": TOOL_CALL.format("' + call.function | tojson(separators=(',', ':')) + '"),
}
"""Ways in which templates write a call's arguments as JSON."""
CHATML = (
    "{{- tools | tojson -}}"
    "{%- for m in messages -%}"
    "{{- '<|im_start|>' + m.role + '\\n' -}}"
    "{%- if m.role == 'assistant' -%}BEGIN{{- m.content | trim -}}MIDDLE"
    "{%- for call in m.tool_calls or [] -%}{{- 'CALL' -}}{%- endfor -%}{{- '<|im_end|>' -}}END"
    "{%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
MARKS = {
    "none": ("", "", ""),
    "one": ("{%- generation -%}", "", "{%- endgeneration -%}"),
    "two": ("{%- generation -%}", "{%- endgeneration -%}{%- generation -%}", "{%- endgeneration -%}"),
}


def template(call: str, marks: str = "none") -> str:
    begin, middle, end = MARKS[marks]
    text = CHATML.replace("BEGIN", begin).replace("MIDDLE", middle).replace("END", end)
    return text.replace("CALL", call)


@pytest.fixture(scope="module")
def chatml(quickstart):
    """A tokenizer that is given a template."""
    tokenizer = load_tokenizer(str(quickstart / "tokenizer"))
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})

    def with_template(text: str):
        tokenizer.chat_template = text
        return tokenizer

    return with_template


def check(part: Trajectory, rendered: Rendered, tokenizer, squeeze: bool = False) -> int:
    """Compares the spans of each trained turn with its calls; a token may hold punctuation behind them. How many."""
    spans = defaultdict(list)
    for span in rendered.spans:
        if span.weight and span.kind == "arguments":
            spans[span.turn].append(rendered.input_ids[span.start : span.end])
    trained = {span.turn for span in rendered.spans if span.weight}
    for turn in trained:
        calls = part.conversation[turn].tool_calls
        assert len(spans[turn]) == len(calls), part.id
        for call, ids in zip(calls, spans[turn], strict=True):
            expected, written, shorter = to_json(call.arguments), tokenizer.decode(ids), tokenizer.decode(ids[:-1])
            if squeeze:
                expected, written, shorter = ("".join(text.split()) for text in (expected, written, shorter))
            written = written.removeprefix(" ")
            assert written.startswith(expected), part.id
            assert set(written[len(expected) :]) <= CLOSING
            assert len(shorter.removeprefix(" ")) < len(expected)
    return sum(map(len, spans.values()))


def pieces(trajectory: Trajectory, tokenizer, format: str, kind: str = "arguments") -> list[str]:
    """What the format says is of a kind, before any token is made."""
    layouts = find(format, tokenizer, Codec(tokenizer)).layouts(trajectory)
    return [one.text for layout in layouts for one in layout.segments if one.kind == kind]


@pytest.mark.parametrize("format", ["xlam", "xlam_v1"])
def test_the_projects_formats(format, tokenizer, bundled, row):
    checked = 0
    for trajectory in (parse_trajectory(row), *bundled[:: 2 if format == "xlam" else 6]):
        for part, rendered in sequences(trajectory, tokenizer, format):
            checked += check(part, rendered, tokenizer)
    assert checked > 90
    calls = [call for turn in parse_trajectory(row).conversation for call in turn.tool_calls]
    assert pieces(parse_trajectory(row), tokenizer, format) == [" " + to_json(call.arguments) for call in calls]


def test_mistrals_own_format(bundled, row):
    tokenizer = load_tokenizer("mistral:v3")
    row["conversation"][1]["content"] = ""
    checked = 0
    for trajectory in (parse_trajectory(row), *bundled):
        if not any(turn.content and turn.tool_calls for turn in trajectory.conversation):
            for part, rendered in sequences(trajectory, tokenizer, "native"):
                checked += check(part, rendered, tokenizer)
    assert checked > 200


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("written", WRITTEN)
def test_other_templates(written, marks, chatml, bundled, row):
    tokenizer = chatml(template(WRITTEN[written], marks))
    trajectories = [parse_trajectory(row), *bundled[::15]]
    checked = 0
    for trajectory in trajectories:
        for part, rendered in sequences(trajectory, tokenizer, "native"):
            checked += check(part, rendered, tokenizer, squeeze=written in ("lines", "tight"))
    assert checked > 30


def test_a_thought_that_spells_the_arguments_out_stays_a_thought(chatml, row):
    """And so do control tokens in them, and arguments that hold those of the next call."""
    arguments = [{"a": {"<|im_end|>": '{"x": 1}'}}, {"x": 1}, {}, {"x": 1}]
    row["conversation"][1]["content"] = thought = f"I call {to_json(arguments[0])} and {{}}"
    row["conversation"][1]["tool_calls"] = [
        {"type": "function", "id": f"c{at}", "function": {"name": "get_time", "arguments": one}}
        for at, one in enumerate(arguments)
    ]
    del row["conversation"][2:]
    for written, marks in ((written, marks) for written in WRITTEN for marks in MARKS):
        tokenizer = chatml(template(WRITTEN[written], marks))
        assert pieces(parse_trajectory(row), tokenizer, "native", "thought") == [thought]
        argument_texts = pieces(parse_trajectory(row), tokenizer, "native")
        assert ["".join(one.split()) for one in argument_texts] == ["".join(to_json(one).split()) for one in arguments]


@pytest.mark.parametrize(
    "call",
    [
        TOOL_CALL.format("' + call.function.name + ' ' + call.function.arguments | dictsort | string + '"),
        TOOL_CALL.format("' + call.function.name + ' ' + call.function.arguments | tojson | tojson + '"),
    ],
)
def test_arguments_that_are_not_written_as_json_stay_tool_call(call, chatml, row):
    tokenizer = chatml(template(call))
    ((_, rendered),) = sequences(parse_trajectory(row), tokenizer, "native")
    kinds = {(span.turn, span.kind) for span in rendered.spans if span.weight}
    assert {kind for turn, kind in kinds if turn == 1} == {"thought", "tool_call", "eos"}
