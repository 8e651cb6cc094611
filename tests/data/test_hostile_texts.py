"""The search for tools and calls takes linear time, whatever the text."""

import pytest
from conversions import items
from tool_spellings import TOOLS, row_with

from xlam_jax.data.validate import check_row

HOSTILE = [
    *(
        "<tool_call>",
        '<tool_call>{"a": "',
        "<tools> x",
        '{"name": "get_tide", ',
        "[get_tide(",
        "[f(a=1)](",
        '"\\',
        "```json\n",
    ),
    """<functioncall> {"name": "f", "arguments": '{"a": "b's"}'} """,
]
MORE_HOSTILE = [
    *(
        "<tool_call>x",
        "<tool_call>{",
        "<tools>",
        '<tools>{"',
        "[TOOL_CALLS]",
        "<function=f>",
        '{"name": ',
        "[ ",
        "\n",
        "[{(",
    ),
    *(
        '[{"name": "x", "arguments": [',
        "[get_tide(a=[",
        "get_tide(a=1), ",
        "'\\\"",
        "{'name': '",
        'functions {"name": ',
    ),
    "Action: get_tide\nAction Input: ",
    """{"name": "f", "arguments": '{}'}, """,
    """{"name": "get_tide", "arguments": {}} x """,
    '{"name": "x", "description": "", "parameters": {"properties": {}}} ',
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_long_texts_take_linear_time(unit: str):
    """A search in quadratic time would take hours here."""
    text = unit * (500_000 // len(unit))
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert len(items("sharegpt", {"system": text, "conversations": turns})) == 1
    assert len(items("unified", row_with(text))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("unit", [*HOSTILE, *MORE_HOSTILE])
@pytest.mark.parametrize("front", ["", "<functioncall>", '"', "<tools>"])
def test_more_long_texts_take_linear_time(unit: str, front: str):
    text = front + unit * (1_000_000 // len(unit))
    list(check_row(row_with(text)))
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]
    for row in (
        {"system": text, "conversations": [turns[0], {"from": "gpt", "value": "a"}]},
        {"conversations": turns, "tools": TOOLS},
    ):
        assert len(items("sharegpt", row)) == 1
