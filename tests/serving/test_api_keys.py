"""Every client reads the server's key from the environment if no key is passed."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fake_server import Handler, says, serve

from serving import chat
from serving import serve as serving
from serving.fastchat_worker import Worker
from serving.parity import Server
from xlam_jax.client.completion import xLAMChatCompletion, xLAMConfig
from xlam_jax.data import __main__ as data
from xlam_jax.errors import UserError
from xlam_jax.evaluate import __main__ as evaluate
from xlam_jax.evaluate.endpoint import Model

URL = "http://localhost:1/v1"
MESSAGES = [{"role": "user", "content": "Hi"}]
FLAGS = ["--base-url", URL, "--model", "m", "--out", "out"]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment")
    return "sk-environment"


def test_requests_send_the_passed_key_or_that_of_the_environment(key: str) -> None:
    received: list[str] = []

    def reply(handler: Handler, request: dict[str, Any]) -> None:
        received.append(handler.headers["Authorization"])
        says("Hello.")(handler, request)

    async def ask(api_key: str | None) -> None:
        async with Model.connect(server.url, "tiny", api_key=api_key) as model:
            await model.chat(MESSAGES)

    with serve(reply) as server:
        for api_key in (None, "sk-given"):
            with xLAMChatCompletion(server.url, "tiny", api_key=api_key) as llm:
                llm.completion(MESSAGES)
            asyncio.run(ask(api_key))
        worker = Worker(server.url, "http://localhost:2", "http://localhost:3")
        worker._llm.chat.completions.create(model="tiny", messages=MESSAGES)  # type: ignore[arg-type]
        Server(server.url, "tiny", 10)._ask("POST", f"{server.url}/completions", {})
    assert received == [f"Bearer {key}"] * 2 + ["Bearer sk-given"] * 2 + [f"Bearer {key}"] * 2


def test_the_worker_sends_its_key_when_it_counts_tokens() -> None:
    received: list[str | None] = []

    def reply(handler: Handler, request: dict[str, Any]) -> None:
        received.append(handler.headers["Authorization"])
        handler.send(200, '{"count": 2}')

    with serve(reply) as server:
        Worker(server.url, "http://localhost:2", "http://localhost:3").count_token({"prompt": "a text"})
        Worker(server.url, "http://localhost:2", "http://localhost:3", api_key="sk-own").count_token({"prompt": "x"})
    assert received == ["Bearer sk-environment", "Bearer sk-own"]


def test_a_key_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A config in a log or a traceback must not reveal the key."""
    assert "sk-" not in repr(xLAMConfig(base_url=URL, model="m"))
    assert "sk-" not in repr(xLAMConfig(base_url=URL, model="m", api_key="sk-given"))
    with serving._print_ready(URL, "tiny", "sk-given"):
        printed = capsys.readouterr().out
    assert '-H "Authorization: Bearer $OPENAI_API_KEY"' in printed
    assert "sk-given" not in printed


@pytest.mark.parametrize(
    ("flags", "variable", "expected"),
    [
        ([], "", None),
        ([], "b", "b"),
        (["--seed", "7", "--api-key", "a", "c"], "b", "a"),
        (["--api-key=a"], "", "a"),
        (["--api-key"], "", None),
    ],
)
def test_the_key_of_a_server_that_is_started(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], variable: str, expected: str | None
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", variable)
    assert serving.server_key(flags) == expected


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("node0", False)],
)
def test_a_server_without_a_key_that_others_can_reach(
    host: str, local: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    serving.warn_if_exposed(host, 8000, "set VLLM_API_KEY")
    expected = f"warning: port 8000 on {host} accepts requests without a key; set VLLM_API_KEY\n"
    assert capsys.readouterr().err == ("" if local else expected)


def test_without_any_key_the_default_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", None):
        monkeypatch.setenv("OPENAI_API_KEY", name) if name is not None else monkeypatch.delenv("OPENAI_API_KEY")
        assert xLAMConfig(base_url=URL, model="m").api_key == "EMPTY"


def test_the_error_for_an_invalid_key_names_its_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="api_key: is empty"):
        xLAMConfig(base_url=URL, model="m", api_key="")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x\n")
    with pytest.raises(UserError, match="OPENAI_API_KEY: is empty, or contains"):
        xLAMConfig(base_url=URL, model="m")


def test_no_command_has_a_default_key(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    assert evaluate._parser().parse_args(["--suite", "x", *FLAGS]).api_key is None
    assert data._parsers()[0].parse_args(["rate", "file.jsonl", *FLAGS]).api_key is None
    talks: list[chat.Chat] = []
    monkeypatch.setattr(chat, "talk", lambda session, _: talks.append(session))
    monkeypatch.setattr("sys.argv", ["chat", "--base-url", URL, "--model", "m"])
    chat.main()
    assert talks[0]._llm.config.api_key == key


def test_the_tool_server_and_the_judge_have_separate_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from xlam_jax.evaluate.suite import Options
    from xlam_jax.evaluate.suites.toolbench import Toolbench

    (tmp_path / "G1_tool.json").write_text("[]")
    monkeypatch.setenv("TOOLBENCH_KEY", "tb-environment")
    extra = {"server": URL, "judge": URL, "judge_model": "judge"}
    suite = Toolbench(Options(data=tmp_path, extra=extra))
    assert (suite._key, suite._judge_key) == ("tb-environment", None)
    suite = Toolbench(Options(data=tmp_path, extra=extra | {"toolbench_key": "a", "judge_key": "b"}))
    assert (suite._key, suite._judge_key) == ("a", "b")
    monkeypatch.setenv("TOOLBENCH_KEY", "sk\n")
    with pytest.raises(UserError, match="TOOLBENCH_KEY: is empty, or contains"):
        Toolbench(Options(data=tmp_path, extra=extra))
