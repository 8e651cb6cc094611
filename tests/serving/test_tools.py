"""Python functions as tools, and the loop in which a model calls them."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from fake_server import answers, call, says, serve
from pydantic import BaseModel

from serving.tools import Tool, as_tool, call_tool, load_tools, run_tools
from xlam_jax.client.completion import BadOutput, xLAMChatCompletion
from xlam_jax.errors import UserError

USER = [{"role": "user", "content": "Weather in Oslo?"}]


class Place(BaseModel):
    title: str
    country: str = "NO"


def get_weather(city: str, unit: Literal["C", "F"] = "C", days: list[int] | None = None) -> dict[str, Any]:
    """Current weather.

    In a city.
    """
    return {"city": city, "unit": unit, "days": days}


def fails(name: str) -> str:
    raise KeyError(name)


def test_a_function_becomes_a_tool():
    assert as_tool(get_weather).schema == {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Current weather.\n\nIn a city.",
            "parameters": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "city": {"type": "string"},
                    "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                    "days": {
                        "anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}],
                        "default": None,
                    },
                },
                "required": ["city"],
            },
        },
    }


def test_a_parameter_named_title_is_kept():
    def find(title: str, place: Place) -> str:
        return title

    parameters = as_tool(find).schema["function"]["parameters"]
    assert parameters["properties"]["title"] == {"type": "string"}
    assert parameters["$defs"]["Place"]["properties"].keys() == {"title", "country"}


def test_functions_that_cannot_be_tools():
    with pytest.raises(UserError, match=r"'\*cities'"):
        as_tool(lambda *cities: cities)

    class Odd: ...

    def function(x: Odd) -> None: ...

    function.__annotations__["x"] = Odd
    with pytest.raises(UserError, match="no JSON Schema"):
        as_tool(function)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("get_weather", {"city": "Oslo"}, '{"city": "Oslo", "unit": "C", "days": null}'),
        ("get_weather", {"city": "Oslo", "unit": "K"}, "argument 'unit'"),
        ("get_weather", {"town": "Oslo"}, "argument 'city' is missing"),
        ("get_weather", ["Oslo"], "not a JSON object"),
        ("get_wether", {}, "did you mean 'get_weather'?"),
        ("fails", {"name": "x"}, "KeyError: 'x'"),
    ],
)
def test_calls_are_checked_and_run(name: str, arguments: Any, expected: str):
    result = call_tool([as_tool(get_weather), as_tool(fails)], name, arguments)
    assert expected in result
    assert ("error" in json.loads(result)) == (not expected.startswith("{"))


def test_the_loop_runs_tools_until_the_model_answers():
    calls = [call("get_weather", {"city": "Oslo"}, "a"), call("get_weather", {"unit": "C"}, "b")]
    added: list[dict[str, Any]] = []
    with serve(says("I look.", calls, "tool_calls"), says("3 °C.")) as server:
        llm = xLAMChatCompletion(server.url, "tiny")
        result = run_tools(llm, USER, [get_weather], on_message=added.append, temperature=0.5)
    assert (result.content, result.ended) == ("3 °C.", "answered")
    assert result.messages == [*USER, *added]
    assert [message["role"] for message in added] == ["assistant", "tool", "tool", "assistant"]
    assert [message.get("tool_call_id") for message in added] == [None, "a", "b", None]
    assert json.loads(added[1]["content"])["city"] == "Oslo"
    assert "'city' is missing" in added[2]["content"]
    assert server.requests[1]["temperature"] == 0.5
    assert [message["role"] for message in server.requests[1]["messages"]] == ["user", "assistant", "tool", "tool"]


def test_the_loop_streams():
    pieces: list[str] = []
    with serve(says("I look.", [call("get_weather", {"city": "Oslo"})]), says("3 °C.")) as server:
        result = run_tools(xLAMChatCompletion(server.url, "tiny"), USER, [get_weather], on_text=pieces.append)
    assert "".join(pieces) == "I look.3 °C."
    assert result.content == "3 °C."


def test_the_loop_ends():
    with serve(says("", [call("get_weather", {"city": "Oslo"})])) as server:
        result = run_tools(xLAMChatCompletion(server.url, "tiny"), USER, [get_weather], max_turns=3)
        assert (result.ended, len(server.requests)) == ("max_turns", 3)
    with serve(says("It is", finish="length")) as server:
        assert run_tools(xLAMChatCompletion(server.url, "tiny"), USER, [get_weather]).ended == "length"
    with serve(says("")) as server:
        with pytest.raises(BadOutput):
            run_tools(xLAMChatCompletion(server.url, "tiny"), USER, [get_weather])
        marks = xLAMChatCompletion(server.url, "tiny", bad_output="mark")
        assert run_tools(marks, USER, [get_weather]).ended == "bad_output"


def test_the_model_receives_an_error_for_a_result_that_is_not_json():
    def loops() -> list[Any]:
        """Returns a list that contains itself."""
        items: list[Any] = []
        items.append(items)
        return items

    assert "ValueError" in call_tool([as_tool(loops)], "loops", {})

    async def later() -> str:
        """Returns later."""
        return "late"

    with pytest.raises(UserError, match="tool later: is a coroutine function"):
        as_tool(later)


def test_calls_in_a_text_get_ids():
    wire = '[{"name": "get_weather", "arguments": {"city": "Oslo"}}, {"name": "get_weather", "arguments": {}}]'
    with serve(says(wire), says("3 °C.")) as server:
        result = run_tools(xLAMChatCompletion(server.url, "tiny"), USER, [get_weather])
    ids = [call["id"] for call in result.messages[1]["tool_calls"]]
    assert len({*ids}) == 2
    assert [message["tool_call_id"] for message in result.messages[2:4]] == ids


def test_a_schema_without_a_function():
    schema = Tool(as_tool(get_weather).schema)
    with pytest.raises(UserError, match="only a schema"):
        call_tool([schema], "get_weather", {"city": "Oslo"})
    assert call_tool([schema], "get_weather", {"city": "Oslo"}, lambda name, arguments: arguments["city"]) == "Oslo"


def test_files_of_tools(tmp_path: Path):
    python, flat = tmp_path / "tools.py", tmp_path / "tools.json"
    python.write_text("from json import dumps\n\ndef f(a: int) -> int:\n    return a + 1\n\ndef _g(): ...\n")
    [tool] = load_tools(python)
    assert (tool.name, call_tool([tool], "f", {"a": 1})) == ("f", "2")
    python.write_text("def f(): ...\ndef g(): ...\nTOOLS = [g]\n")
    assert [tool.name for tool in load_tools(python)] == ["g"]
    flat.write_text(
        '[{"name": "f", "parameters": {"type": "object"}}, {"type": "function", "function": {"name": "g"}}]'
    )
    assert [(tool.name, tool.function) for tool in load_tools(flat)] == [("f", None), ("g", None)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tools.py", "def f(:\n", "SyntaxError"),
        ("tools.py", "import nonsense_of_mine\n", "ModuleNotFoundError"),
        ("tools.py", "x = 1\n", "add a public function"),
        ("tools.py", None, "can't be read"),
        ("tools.json", "{}", "contains a dict"),
        ("tools.json", '[{"description": "x"}]', "tool 0"),
        ("tools.json", None, "no such file"),
    ],
)
def test_invalid_tool_files(tmp_path: Path, name: str, text: str | None, expected: str):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=expected) as error:
        load_tools(tmp_path / name)
    assert name in str(error.value)


def test_a_server_error_ends_the_loop():
    with serve(answers(400, "no", "text/plain")) as server, pytest.raises(UserError, match="400"):
        run_tools(xLAMChatCompletion(server.url, "tiny"), USER, [get_weather])
