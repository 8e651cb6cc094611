"""Messages as callers pass them become those that are sent and rendered."""

import json
from typing import Any

import pytest
from fake_server import says, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage

from xlam_jax.client.completion import xLAMChatCompletion
from xlam_jax.data.messages import call_ids, normal_messages, parse_request, unique_ids
from xlam_jax.data.parse import parse_messages
from xlam_jax.data.render import chat_template, render_prompt
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Weather?"}
HELLO = {"role": "assistant", "content": "Hello."}
LATE = {"role": "system", "content": "Answer in French."}
CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "3 °C"}
ANSWERED = ChatCompletionMessage.model_validate(CALLING)
"""As OpenAI's client returns it."""


def user_turn(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


LEGACY = {"role": "assistant", "content": None, "function_call": CALL["function"]}
NUMBERED = {"id": "call_1_0"}
FRENCH = "Answer in French."
NO = {"role": "assistant", "content": "No."}
SENT: dict[str, tuple[list[Any], list[dict[str, Any]]]] = {
    "developer": ([{"role": "developer", "content": "Be brief."}, USER], [SYSTEM, USER]),
    "assistant first": ([SYSTEM, HELLO, USER], [SYSTEM, HELLO, USER]),
    "SDK message": ([USER, ANSWERED, RESULT], [USER, CALLING, RESULT]),
    "SDK calls": ([USER, CALLING | {"tool_calls": ANSWERED.tool_calls}, RESULT], [USER, CALLING, RESULT]),
    "function_call": (
        [USER, LEGACY, {"role": "function", "name": "look", "content": "3 °C"}],
        [
            USER,
            CALLING | {"tool_calls": [CALL | NUMBERED]},
            {"role": "tool", "tool_call_id": "call_1_0", "name": "look", "content": "3 °C"},
        ],
    ),
    "refusal": ([USER, {"role": "assistant", "content": None, "refusal": "No."}, USER], [USER, NO, USER]),
    "refusal part": ([USER, NO | {"content": [{"type": "refusal", "refusal": "No."}]}, USER], [USER, NO, USER]),
    "input text": ([{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}], [USER]),
    "empty answer": ([USER, NO | {"content": ""}, USER], [USER, NO | {"content": " "}, USER]),
    "late system": ([USER, HELLO, LATE, USER], [USER, HELLO, user_turn(f"{FRENCH}\n\nWeather?")]),
    "last system": ([USER, LATE], [user_turn(f"Weather?\n\n{FRENCH}")]),
    "system before an answer": ([USER, LATE, HELLO, USER], [user_turn(f"Weather?\n\n{FRENCH}"), HELLO, USER]),
    "system between answers": ([HELLO, LATE, HELLO, USER], [HELLO, user_turn(FRENCH), HELLO, USER]),
    "system before a result": ([USER, CALLING, LATE, RESULT], [USER, CALLING, RESULT, user_turn(FRENCH)]),
    "two late systems": (
        [USER, CALLING, RESULT, LATE, LATE, USER],
        [USER, CALLING, RESULT, user_turn(f"{FRENCH}\n\n{FRENCH}\n\nWeather?")],
    ),
    "late developer in parts": (
        [USER, HELLO, {"role": "developer", "content": [{"type": "text", "text": FRENCH}]}, USER],
        [USER, HELLO, user_turn(f"{FRENCH}\n\nWeather?")],
    ),
    "one id": (
        [USER, CALLING | {"tool_calls": [CALL, CALL]}, RESULT, RESULT | {"content": "5 °C"}],
        [
            USER,
            CALLING | {"tool_calls": [CALL, CALL | {"id": "a_2"}]},
            RESULT,
            RESULT | {"tool_call_id": "a_2", "content": "5 °C"},
        ],
    ),
}


@pytest.mark.parametrize(("messages", "expected"), SENT.values(), ids=SENT)
def test_what_is_sent(messages: list[Any], expected: list[dict[str, Any]]):
    with serve(says("Fine.")) as server, xLAMChatCompletion(server.url, "tiny", retries=0) as llm:
        llm.completion(messages)
        sent = server.requests[0]["messages"]
    assert sent == expected


def test_tools_of_an_sdk():
    from openai import pydantic_function_tool
    from openai.types.shared import FunctionDefinition
    from pydantic import BaseModel

    class Look(BaseModel):
        place: str

    flat = FunctionDefinition(name="look", parameters={"type": "object", "properties": {}})
    with serve(says("Fine.")) as server, xLAMChatCompletion(server.url, "tiny", retries=0) as llm:
        llm.completion([USER], [flat, dict(pydantic_function_tool(Look))])
        names = [tool["function"]["name"] for tool in server.requests[0]["tools"]]
    assert names == ["look", "Look"]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [USER, HELLO, {"role": "system", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, USER],
        [RESULT],
        [USER, HELLO, RESULT],
        [USER, {**CALLING, "function_call": CALL["function"]}],
        [3],
        [],
        ["hello"],
        [USER, {"role": "assistant", "tool_calls": [3]}],
    ],
)
def test_what_is_not_a_conversation_is_refused(messages: list[Any]):
    with pytest.raises(InvalidTrajectory):
        parse_request(messages)


def test_what_is_trained_has_its_system_text_in_front_and_begins_with_the_user():
    for messages in ([HELLO, USER], [USER, HELLO, LATE, USER]):
        with pytest.raises(InvalidTrajectory, match="turn"):
            parse_messages(messages)


@pytest.mark.parametrize("messages", [[SYSTEM, HELLO, USER], [USER, HELLO, LATE, USER], [USER, LATE]])
@pytest.mark.parametrize("format", ["xlam", "xlam_v1"])
def test_templates_render_what_is_sent(messages: list[Any], format: str, tokenizer: Any):
    """The server's template and our own renderer make the same prompt of it."""
    sent = normal_messages(messages)
    template = chat_template(tokenizer, format)
    served = tokenizer.apply_chat_template(sent, chat_template=template, add_generation_prompt=True, return_dict=False)
    assert render_prompt(messages, None, tokenizer, format) == served


MESSAGES = st.lists(
    st.sampled_from(
        [SYSTEM, LATE, USER, HELLO, CALLING, RESULT, ANSWERED, {"role": "developer", "content": "x"}, 5, {}]
    ),
    max_size=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(MESSAGES)
def test_no_text_is_lost_and_twice_is_the_same(messages: list[Any]):
    sent = normal_messages(messages)
    assert normal_messages(sent) == sent
    texts = [one["content"] for one in messages if isinstance(one, dict) and one.get("content")]
    assert all(text in json.dumps(sent, ensure_ascii=False) for text in texts)
    roles = [one.get("role") for one in sent if isinstance(one, dict)]
    assert "system" not in roles[roles.index("user") :] if "user" in roles else True


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["a", "b", "a_2", "call_1_0", "", None, 3, True]), max_size=6))
def test_ids_differ(ids: list[Any]):
    unique = unique_ids(ids)
    kept = [id for id in unique if id is not None]
    assert len(set(kept)) == len(kept)
    assert unique_ids(unique) == unique
    assert {str(id) for id in ids if id not in ("", None, True)} <= set(kept)
    filled = call_ids(ids, 1)
    assert len(set(filled)) == len(ids)


def test_malformed_messages_are_the_callers_error():
    with pytest.raises(UserError, match="the request is malformed: turn 1 has `function_call` and `tool_calls`"):
        xLAMChatCompletion("http://127.0.0.1:9/v1", "tiny").completion(
            [USER, {**CALLING, "function_call": CALL["function"]}]
        )
