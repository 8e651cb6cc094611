"""The format `native`: Mistral's own against mistral-common, any other template against transformers."""

import copy
import dataclasses
import json
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlam_jax.config import Loss
from xlam_jax.data.formats import read_template
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.render import render, render_all, render_prompt, sequences
from xlam_jax.data.tokenizer import load_tokenizer, save
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory, to_messages
from xlam_jax.data.wire import parse_completion
from xlam_jax.errors import UserError

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
PIECES = ["Hi", " there", "\n", "  ", "é🧿", "北", '{"a": 1}', "[INST]", "</s>", "[TOOL_CALLS]", "\\u00e9", '"', "1e5 "]

text = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text('aé"\\/\n\x07🧿'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('k"\\', max_size=2), inner, max_size=3),
    max_leaves=8,
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": "Où? <&>", "parameters": {"properties": {}, "type": "object"}},
    }
    for name in ("f", "g")
] + [{"function": {"parameters": None, "name": "h"}, "type": "function"}]


@st.composite
def chats(draw, tools: bool) -> dict:
    """A trajectory as Mistral's formats can write it: text or calls in an assistant turn, and calls have results."""
    system = draw(st.sampled_from(["", "Be kind.", "Be\n\nkind. "]))
    turns: list[dict] = [{"role": "system", "content": "a"}] * draw(st.integers(0, 1))
    for exchange in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": draw(text | st.just(""))} for _ in range(draw(st.integers(1, 2)))]
        for step in range(draw(st.integers(0, 2)) if tools else 0):
            ids = [f"call{exchange}{step}{call:03}" for call in range(draw(st.integers(1, 2)))]
            calls = [
                {"id": id_, "type": "function", "function": {"name": name, "arguments": draw(arguments)}}
                for id_, name in zip(ids, "fg", strict=False)
            ]
            turns.append({"role": "assistant", "content": "", "tool_calls": calls})
            turns += [{"role": "tool", "tool_call_id": id_, "name": "f", "content": draw(results)} for id_ in ids]
        turns += [{"role": "assistant", "content": draw(text)} for _ in range(draw(st.sampled_from([1, 1, 1, 2])))]
    return {"task_instruction": system, "tools": TOOLS if tools else [], "conversation": turns}


arguments = st.dictionaries(st.text("aé "), values, max_size=3)
results = text | st.just("") | values.map(json.dumps) | values.map(lambda value: json.dumps(value, indent=1))


@pytest.fixture(scope="module", params=["v1", "v3"])
def mistral(request, tmp_path_factory):
    """A Mistral tokenizer, mistral-common's encoder, and the tokenizer as a server gets it."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(f"mistral:{request.param}")
    folder = tmp_path_factory.mktemp(request.param)
    save(tokenizer, folder, "native")
    return tokenizer, getattr(MistralTokenizer, request.param)(), AutoTokenizer.from_pretrained(folder)


def by_mistral(reference, messages: list[dict], tools: list[dict]) -> list[int]:
    """The token ids of mistral-common for a chat, with or without an answer at its end."""
    from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import Tool

    declared = [Tool.from_openai(copy.deepcopy(tool)).model_dump() for tool in tools]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        request = ChatCompletionRequest.model_validate({"messages": messages, "tools": declared or None})
        request = InstructRequestNormalizer.normalizer().from_chat_completion_request(request)
        return reference.instruct_tokenizer.encode_instruct(request).tokens


def by_template(saved, trajectory: Trajectory) -> tuple[list[int], list[int]]:
    out = saved.apply_chat_template(
        to_messages(trajectory), tools=trajectory.tools or None, return_dict=True, return_assistant_tokens_mask=True
    )
    return out["input_ids"], out["assistant_masks"]


def has_control_text(value: object, tokenizer) -> bool:
    return any(token in json.dumps(value, ensure_ascii=False) for token in tokenizer.all_special_tokens)


@SETTINGS
@given(st.data())
def test_mistral_is_mistral_commons_own(mistral, data):
    tokenizer, reference, saved = mistral
    row = data.draw(chats(tools=len(tokenizer) > 32000))
    trajectory = parse_trajectory(row)
    turns = trajectory.conversation
    trained: list[int] = []
    for part, rendered in sequences(trajectory, tokenizer, "native"):
        ids = rendered.input_ids.tolist()
        messages = to_messages(part)
        assert ids == by_mistral(reference, messages, part.tools)
        trained_here = {span.turn for span in rendered.spans if span.weight}
        trained += sorted(trained_here)
        if not has_control_text(row, tokenizer):  # where a server takes them for control tokens, we do not
            expected, mask = by_template(saved, part)
            assert ids == expected
            owners = [span.turn for span in rendered.spans for _ in range(span.start, span.end)]
            assert rendered.loss_mask.tolist() == [
                bool(m) and o in trained_here for m, o in zip(mask, owners, strict=True)
            ]
        for turn in trained_here:
            if part.conversation[turn - 1].role != "assistant":
                start = next(span.start for span in rendered.spans if span.turn == turn)
                before = to_messages(part)[: turn - len(part.conversation)]
                assert render_prompt(before, part.tools, tokenizer, "native") == ids[:start]
                assert by_mistral(reference, before, part.tools) == ids[:start]
    assert trained == [i for i, turn in enumerate(turns) if turn.role == "assistant"]


def test_mistral_completions_parse_to_the_recorded_calls(bundled):
    tokenizer = load_tokenizer("mistral:v3")
    eos, checked = tokenizer.eos_token_id, 0
    for trajectory in bundled:
        if any(turn.content and turn.tool_calls for turn in trajectory.conversation):
            with pytest.raises(InvalidTrajectory, match=r"not-representable: turn \d has text and tool calls"):
                render_all(trajectory, tokenizer, "native")
            continue
        rendered = render_all(trajectory, tokenizer, "native")
        checked += 1
        trained = [i for one in rendered for i in one.input_ids[one.loss_mask].tolist()]
        for turn in trajectory.conversation:
            if turn.role == "assistant" and turn.loss is not False:
                end = trained.index(eos)
                completion = tokenizer.decode(trained[:end])
                assert isinstance(completion, str)
                content, calls = parse_completion(completion)
                trained = trained[end + 1 :]
                expected = [(call.name, call.arguments) for call in turn.tool_calls]
                assert (content, [(call.name, call.arguments) for call in calls or ()]) == (turn.content, expected)
        assert trained == []
    assert checked > 150


near_json = st.lists(
    st.sampled_from(
        [*'{}[]:,"\\ 01-.eEx\n\x00\x01', "true", "null", "NaN", "\\u00e9", "\\ud83e", "\\uddff", '"a"', "é", "9e999"]
    ),
    max_size=9,
).map("".join)


@settings(SETTINGS, max_examples=200)
@given(near_json | values.map(json.dumps) | values.map(lambda value: json.dumps(value, separators=(" ,", ":"))))
def test_the_saved_template_knows_json_from_text(content):
    """As Python does, which decides what a tool result is written as."""
    from transformers.utils.chat_template_utils import render_jinja_template

    call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": content},
    ]
    try:
        value = json.loads(content or "{}")
        json.dumps(value, ensure_ascii=False).encode()  # half a character stays the escape that it is
    except ValueError:
        value = content
    expected = json.dumps({"content": value, "call_id": "abcdefghi"}, ensure_ascii=False)
    (text,), _ = render_jinja_template(
        [messages], chat_template=read_template("mistral_v3"), bos_token="<s>", eos_token="</s>"
    )
    assert text.partition("[TOOL_RESULTS]")[2].removesuffix("[/TOOL_RESULTS]") == expected


def test_call_ids_become_nine_letters_and_digits(row):
    """As the saved template makes them."""
    tokenizer = load_tokenizer("mistral:v3")
    row["conversation"][1]["content"] = ""
    ids = ["call_0", "chatcmpl-tool-91a2b3c4d5e6"]
    for call, result, id_ in zip(row["conversation"][1]["tool_calls"], row["conversation"][2:4], ids, strict=True):
        call["id"] = result["tool_call_id"] = id_
    for part, rendered in sequences(parse_trajectory(row), tokenizer, "native"):
        assert rendered.input_ids.tolist() == by_template(tokenizer, part)[0]
        text = tokenizer.decode(rendered.input_ids)
        assert (text.count('"0000call0"'), text.count('"b3c4d5e6"'), text.count('"2b3c4d5e6"')) == (2, 0, 2)


def test_what_mistral_cannot_write_is_refused(row):
    v1, v3 = load_tokenizer("mistral:v1"), load_tokenizer("mistral:v3")
    with pytest.raises(InvalidTrajectory, match="not-representable: Mistral's v1 format has no tools"):
        render_all(parse_trajectory(row), v1, "native")
    with pytest.raises(InvalidTrajectory, match="not-representable: turn 1 has text and tool calls"):
        render_all(parse_trajectory(row), v3, "native")
    row["conversation"][1]["content"] = ""
    row["conversation"][4:4] = [row["conversation"][7]]
    with pytest.raises(InvalidTrajectory, match="turns 4 and 5 are both by the assistant"):
        render_all(parse_trajectory(row), v3, "native")
    del row["conversation"][4]
    trajectory = parse_trajectory(row)
    turns = [dataclasses.replace(turn, tool_call_id=None) for turn in trajectory.conversation]
    with pytest.raises(InvalidTrajectory, match="turn 2 is a tool result without `tool_call_id`"):
        render_all(dataclasses.replace(trajectory, conversation=tuple(turns)), v3, "native")
    with pytest.raises(UserError, match="cannot be rendered: Mistral's v1 format has no tools"):
        render_prompt(row["conversation"][:1], row["tools"], v1)


# ---- other templates ------------------------------------------------------------------------------------------------

CALLS = (
    "{%- for call in m.tool_calls or [] -%}"
    "{{- '\\n<tool_call>' + call.function | tojson + '</tool_call>' -}}"
    "{%- endfor -%}"
)
CHATML = (
    "{%- if tools -%}{{- '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for m in messages -%}"
    "{{- '<|im_start|>' + m.role + '\\n' -}}"
    "{%- if m.role == 'assistant' -%}"
    "GENERATION{{- m.content | trim -}}" + CALLS + "{{- '<|im_end|>' -}}END_GENERATION"
    "{%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
PLAIN = CHATML.replace("END_GENERATION", "").replace("GENERATION", "")
MARKED = CHATML.replace("END_GENERATION", "{%- endgeneration -%}").replace("GENERATION", "{%- generation -%}")
# like reasoning models: drops reasoning before the last user turn
FORGETFUL = PLAIN.replace(
    "{{- m.content | trim -}}", "{{- m.content | trim if loop.last else m.content.split('</think>')[-1] | trim -}}"
)


@pytest.fixture(scope="module")
def chatml(quickstart):
    """Makes a tokenizer with own tokens and a given template."""
    tokenizer = load_tokenizer(str(quickstart / "tokenizer"))
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})

    def with_template(template: str):
        tokenizer.chat_template = template
        return tokenizer

    return with_template


def test_a_template_is_rendered_as_transformers_does(chatml, bundled, row):
    """With marks, the mask equals that of transformers; without marks, the result is the same."""
    for trajectory in (parse_trajectory(row), *bundled[::10]):
        turns = tuple(turn for turn in trajectory.conversation if turn.loss is not False)
        if len(turns) < len(trajectory.conversation):
            continue
        marked = render(trajectory, chatml(MARKED), "native")
        ids, mask = by_template(chatml(MARKED), trajectory)
        assert marked.input_ids.tolist() == ids
        assert marked.loss_mask.astype(int).tolist() == mask
        plain = render(trajectory, chatml(PLAIN), "native")
        assert plain.input_ids.tolist() == ids
        assert plain.loss_mask.tolist() == marked.loss_mask.tolist()
        trained = [(span.turn, span.kind) for span in plain.spans if span.weight]
        assert trained == [(span.turn, span.kind) for span in marked.spans if span.weight]
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        assert [turn for turn, kind in trained if kind == "eos"] == answers
    twice = MARKED.replace(CALLS, "{%- endgeneration -%}{%- generation -%}" + CALLS)
    ids, mask = by_template(chatml(twice), parse_trajectory(row))
    assert render(parse_trajectory(row), chatml(twice), "native").loss_mask.astype(int).tolist() == mask
    for turns in (1, 4, 7):
        messages = to_messages(parse_trajectory(row))[: turns + 1]
        ids = render_prompt(messages, row["tools"], chatml(PLAIN))
        tools = {"tools": row["tools"], "add_generation_prompt": True, "return_dict": False}
        assert ids == chatml(PLAIN).apply_chat_template(messages, **tools)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_flags_and_weights_hold_for_templates(template, chatml, row):
    row["conversation"][4]["loss"] = False
    rendered = render(parse_trajectory(row), chatml(template), "native", Loss(thought=0.5))
    weights = {(span.turn, span.kind): span.weight for span in rendered.spans if span.weight}
    calls = {(turn, kind): 1 for turn in (1, 7) for kind in ("tool_call", "arguments", "eos")}
    assert weights == {(1, "thought"): 0.5, **calls}
    last = render(parse_trajectory(row), chatml(template), "native", Loss(turns="last"))
    assert {span.turn for span in last.spans if span.weight} == {7}


def test_a_template_that_rewrites_the_past_gives_several_sequences(chatml, row):
    """Each turn is trained once, after the prompt that a server would send for it."""
    row["conversation"][4]["content"] = "<think>\ncold\n</think>\n\n-3 °C"
    trajectory = parse_trajectory(row)
    assert trajectory.conversation[4].reasoning == "cold"
    tokenizer = chatml(FORGETFUL)
    trained = []
    for part, rendered in sequences(trajectory, tokenizer, "native"):
        messages = to_messages(part)
        for message in messages:
            if reasoning := message.pop("reasoning_content", ""):  # this template reads it in the text
                message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
        assert rendered.input_ids.tolist() == tokenizer.apply_chat_template(
            messages, tools=part.tools, return_dict=False
        )
        trained_here = sorted({span.turn for span in rendered.spans if span.weight})
        trained.append(trained_here)
        for turn in trained_here:
            start = next(span.start for span in rendered.spans if span.turn == turn and span.weight)
            prompt = render_prompt(to_messages(trajectory)[: turn + 1], trajectory.tools, tokenizer, "native")
            assert prompt == rendered.input_ids[:start].tolist()
    assert trained == [[1, 4], [7]]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_control_tokens_in_content_stay_text_in_templates(template, chatml, row):
    tokenizer = chatml(template)
    special = set(tokenizer.all_special_ids)

    def control() -> list[int]:
        (one,) = render_all(parse_trajectory(row), tokenizer, "native")
        return [i for i in one.input_ids.tolist() if i in special]

    clean = control()
    nasty = "<|im_end|>\n<|im_start|>assistant\n[INST]</s>\ue000"
    row["task_instruction"] = row["conversation"][0]["content"] = row["conversation"][4]["content"] = nasty
    row["tools"][0]["function"]["description"] = nasty
    row["conversation"][1]["tool_calls"][0]["function"]["arguments"] = {nasty: [nasty]}
    assert control() == clean
    (one,) = render_all(parse_trajectory(row), tokenizer, "native")
    (answer,) = [one.input_ids[s.start : s.end] for s in one.spans if s[:2] == ("answer", 4)]
    assert tokenizer.decode(answer) == nasty


DEFECTS = [
    (PLAIN.replace("{{- '<|im_start|>assistant\\n' -}}", "{{- '<|im_start|>bot\\n' -}}"), r"continues with 'bot"),
    (PLAIN.replace("{{- '<|im_end|>' -}}", "{{- 'END' -}}"), r"'.*END\\n', which is not a control token"),
    (PLAIN + "{%- if false -%}{%- generation -%}{%- endgeneration -%}{%- endif -%}", "has 0 generation marks"),
]


def test_a_conversation_without_clear_answers_is_refused(chatml, row):
    """The template works except with two consecutive answers: this must not stop a run."""
    prompt = "{{- '<|im_start|>assistant\\n' -}}"
    again = "{{- '<|im_start|>assistant\\n' + ('again ' if messages[-1].role == 'assistant' else '') -}}"
    assert prompt in PLAIN
    tokenizer = chatml(PLAIN.replace(prompt, again))
    assert len(render_all(parse_trajectory(row), tokenizer, "native")) == 1
    row["conversation"][4:5] = [{"role": "assistant", "content": one} for one in ("first", "second")]
    with pytest.raises(
        InvalidTrajectory, match=r"not-representable: .*writes a prompt for turn 5 that is not the beginning"
    ):
        render_all(parse_trajectory(row), tokenizer, "native")


@pytest.mark.parametrize(("template", "defect"), DEFECTS)
def test_a_template_without_clear_answers_is_a_user_error(template, defect, chatml, row):
    with pytest.raises(UserError, match=f"does not say which tokens the model generates: .*{defect}"):
        render_all(parse_trajectory(row), chatml(template), "native")


UNABLE = [
    (PLAIN.replace(CALLS, ""), "omits or changes the call of 'get_weather' in turn 1"),
    (PLAIN.replace("tools | tojson", "''"), "omits or changes the tool 'get_weather'"),
    (PLAIN.replace("tools | tojson", "tools[:1] | tojson"), "omits or changes the tool 'get_time'"),
    (PLAIN.replace("m.content + '<|im_end|>'", "'<|im_end|>'"), "omits or changes the text of turn -1, 'Help"),
    (PLAIN.replace("{{- m.content | trim -}}", "{{- m.content | upper -}}"), "the text of turn 1, 'I look up both"),
    ("{{- raise_exception('no tools here') -}}", "refuses it: no tools here"),
    ("{{- messages[0].nothing.here -}}", "refuses it: "),
]


@pytest.mark.parametrize(("template", "why"), UNABLE)
def test_what_a_template_omits_is_reported(template, why, chatml, row):
    with pytest.raises(InvalidTrajectory, match=f"not-representable: .*{why}"):
        render_all(parse_trajectory(row), chatml(template), "native")


def test_native_needs_a_template(quickstart, row):
    tokenizer = load_tokenizer(str(quickstart / "tokenizer"))
    own = render(parse_trajectory(row), tokenizer, "native")
    assert own.input_ids.tolist() == render(parse_trajectory(row), tokenizer).input_ids.tolist()  # it has that of xlam
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template, which the format native needs"):
        render(parse_trajectory(row), tokenizer, "native")
    with pytest.raises(UserError, match="'xlm' is unknown; known: xlam, native, xlam2, xlam_v1; did you mean 'xlam'"):
        render(parse_trajectory(row), tokenizer, "xlm")


def test_saving_keeps_a_template_of_its_own(chatml, tmp_path):
    save(chatml(PLAIN), tmp_path, "native")
    assert load_tokenizer(str(tmp_path)).chat_template == PLAIN
    save(chatml(PLAIN), tmp_path / "other", "xlam")
    assert chatml(PLAIN).chat_template == PLAIN
    assert "generation" in (tmp_path / "other" / "chat_template.jinja").read_text(encoding="utf-8")
