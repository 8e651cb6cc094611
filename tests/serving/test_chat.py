"""The terminal chat, with its input from a pipe."""

import io
import json
from pathlib import Path

import pytest
from fake_server import answers, call, says, serve
from support import Commands

TOOLS = "def get_weather(city: str) -> dict:\n    'Current weather.'\n    return {'t': 3, 'city': city}\n"


def chat(commands: Commands, monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: object, code: int = 0):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return commands.call("serving.chat", *arguments, code=code)


def test_a_conversation_with_tools(commands: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "tools.py"
    file.write_text(TOOLS)
    replies = [says("I look.", [call("get_weather", {"city": "Oslo"})]), says("3 °C."), says("Bye."), says("New.")]
    with serve(*replies) as server:
        output = chat(
            commands, monkeypatch, "Weather in Oslo?\n\n/tools\nThanks\n/reset\n/what\nHello\n/quit\nnever\n",
            "--base-url", server.url, "--tools", file, "--system", "Be brief.", "--max-tokens", 20,
        ).stdout  # fmt: skip
    assert output.splitlines() == [
        "I look.",
        '→ get_weather({"city": "Oslo"})',
        '← {"t": 3, "city": "Oslo"}',
        "3 °C.",
        "  get_weather(city)  Current weather.",
        "Bye.",
        "/tools lists the tools, /reset starts a new conversation, /quit (or Ctrl-D) ends",
        "New.",
    ]
    sent = server.requests
    assert [request["model"] for request in sent] == ["tiny"] * 4, "the server's first model is the default"
    assert [len(request["messages"]) for request in sent] == [2, 4, 6, 2]
    assert (sent[0]["max_tokens"], sent[0]["messages"][0]["content"]) == (20, "Be brief.")


def test_the_user_types_the_results_of_tools_without_a_function(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {}}}}]))
    with serve(says("", [call("get_weather", {"city": "Oslo"})]), says("3 °C.")) as server:
        output = chat(
            commands, monkeypatch, "Weather?\nfine\n", "--base-url", server.url, "--tools", file, "--model", "tiny"
        ).stdout
    assert "result of get_weather: ← fine" in output
    assert server.requests[1]["messages"][-1]["content"] == "fine"


def test_errors_of_the_server_are_printed(commands: Commands, monkeypatch: pytest.MonkeyPatch):
    with serve(answers(400, "maximum context length is 7", "text/plain")) as server:
        output = chat(commands, monkeypatch, "Hello\n", "--base-url", server.url, code=2).stderr
        assert "error: " in output
        assert "shorten the conversation" in output
        url = server.url
    assert "cannot be reached" in chat(commands, monkeypatch, "", "--base-url", url, code=2).stderr
