"""The suite toolbench with a small tool server and a judge: requests, scores and errors."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fake_server
import pytest

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.errors import UserError
from xlam_jax.evaluate import agents
from xlam_jax.evaluate.endpoint import Answer, EndpointFault
from xlam_jax.evaluate.suite import Options, Outcome
from xlam_jax.evaluate.suites import toolbench
from xlam_jax.evaluate.suites.toolbench import Toolbench

API = {
    "category_name": "Data",
    "tool_name": "Kick.com API | Kick",
    "api_name": "Get Channel's Clips",
    "api_description": "Clips of a channel",
    "required_parameters": [{"name": "Channel Name", "type": "STRING", "description": "whose", "default": "ada"}],
    "optional_parameters": [{"name": "id", "type": "NUMBER", "description": "", "default": ""}],
    "method": "GET",
}
QUERIES = [
    {"query": "Which clips has ada?", "api_list": [API, API], "relevant APIs": [], "query_id": 588},
    {"query": "Not solvable", "api_list": [API], "query_id": 7},
]
NAME = "get_channel_s_clips_for_kick_com_api_kick"


def tool(handler: Any, request: dict[str, Any]) -> None:
    handler.send(200, json.dumps({"error": "", "response": f"clips of {request['tool_input']} {'.' * 2000}"}))


def make_judge(status: str) -> Any:
    return fake_server.says(f'Well: {{"reason": "it is", "status": "{status}"}}')


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for folder in ("test_instruction", "test_query_ids"):
        (tmp_path / "solvable_queries" / folder).mkdir(parents=True)
    root = tmp_path / "solvable_queries"
    (root / "test_instruction" / "G1_instruction.json").write_text(json.dumps(QUERIES))
    (root / "test_query_ids" / "G1_instruction.json").write_text(json.dumps({"588": 0}))
    (root / "test_instruction" / "G3_instruction.json").write_text(json.dumps(QUERIES))
    return tmp_path


class ScriptedModel:
    """A model that makes one of the calls per answer."""

    def __init__(self, *calls: tuple[str, dict[str, Any]]):
        self._calls = list(calls)
        self.tools: Any = None
        self.observations: list[str] = []

    async def chat(self, messages: Sequence[dict[str, Any]], tools: Any = None, **options: Any) -> Answer:
        self.tools, (name, arguments) = tools, self._calls.pop(0)
        self.observations.append(messages[-1]["content"])
        return Answer(list(messages), "", (ToolCall("c", name, arguments),), "tool_calls")


FINISH = ("Finish", {"return_type": "give_answer", "final_answer": "Three clips."})


@pytest.fixture
def server() -> Iterator[fake_server.Running]:
    with fake_server.serve(tool) as running:
        yield running


def settings(server: str, judge: str) -> dict[str, str]:
    return {"server": f"{server}/virtual", "judge": judge, "judge_model": "tiny", "toolbench_key": "k"}


def run_query(data: Path, server: str, status: str, *calls: Any) -> tuple[Outcome, ScriptedModel, list[dict[str, Any]]]:
    with fake_server.serve(make_judge(status)) as judge:
        suite = Toolbench(Options(data=data, extra=settings(server, judge.url)))
        model = ScriptedModel(*calls)
        outcome = asyncio.run(suite.run(suite.tasks()[0], model, agents.load("native")))  # type: ignore[arg-type]
        return outcome, model, judge.requests


def test_a_query_is_answered_and_judged(data: Path, server: fake_server.Running) -> None:
    outcome, model, judge_requests = run_query(data, server.url, "Solved", (NAME, {"channel_name": "ada"}), FINISH)
    assert outcome.scores == {"pass_rate": 1.0}
    assert (outcome.failure, outcome.details["answer"]) == ("", "Three clips.")
    assert server.requests == [
        {
            "category": "Data",
            "tool_name": "kick_com_api_kick",
            "api_name": "get_channel_s_clips",
            "tool_input": {"channel_name": "ada"},
            "strip": "",
            "toolbench_key": "k",
        }
    ]
    function = model.tools[0]["function"]
    assert [tool_["function"]["name"] for tool_ in model.tools] == [NAME, "Finish"]
    assert function["parameters"]["required"] == ["channel_name"]
    assert {name: tool_["type"] for name, tool_ in function["parameters"]["properties"].items()} == {
        "channel_name": "string",
        "is_id": "number",
    }
    assert model.observations[0].endswith("Query: Which clips has ada?")
    assert len(model.observations[1]) == toolbench.LONGEST_RESULT + 3
    text = judge_requests[0]["messages"][-1]["content"]
    assert "Final answer:\nThree clips." in text
    assert "clips of {'channel_name': 'ada'}" in text


@pytest.mark.parametrize(("status", "score"), [("Unsolved", 0.0), ("Unsure", 0.5), ("solved", 1.0)])
def test_the_judge_decides(data: Path, server: fake_server.Running, status: str, score: float) -> None:
    outcome, _, _ = run_query(data, server.url, status, FINISH)
    assert outcome.scores == {"pass_rate": score}
    assert outcome.failure == ("" if score == 1 else status.lower())


def test_without_an_answer_the_judge_is_not_called(data: Path, server: fake_server.Running) -> None:
    given_up = ("Finish", {"return_type": "give_up_and_restart"})
    outcome, _, judge_requests = run_query(data, server.url, "Solved", given_up)
    assert (outcome.scores["pass_rate"], outcome.failure, judge_requests) == (0, "gave-up", [])
    empty = ("Finish", {"return_type": "give_answer"})
    outcome, _, judge_requests = run_query(data, server.url, "Solved", *[empty] * 12)
    assert (outcome.scores["pass_rate"], outcome.failure, judge_requests) == (0, "steps-used-up", [])


def test_faults_are_not_scored(data: Path, server: fake_server.Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EndpointFault, match="no verdict") as fault:
        run_query(data, server.url, "Perhaps", FINISH)
    assert fault.value.kind == "malformed"
    assert fault.value.messages
    monkeypatch.setattr(toolbench, "TRIES", 1)
    with pytest.raises(EndpointFault, match="cannot be reached") as fault:
        run_query(data, "http://127.0.0.1:9", "Solved", (NAME, {"channel_name": "a"}))
    assert fault.value.kind == "environment"


def test_unsolvable_queries_are_skipped(data: Path) -> None:
    suite = Toolbench(Options(data=data, extra=settings("http://x", "http://y")))
    assert [task.id for task in suite.tasks()] == ["G1_instruction/588", "G3_instruction/588", "G3_instruction/7"]
    assert {task.group for task in suite.tasks()} == {"G1_instruction", "G3_instruction"}


def test_names_are_those_of_toolbench() -> None:
    for api_name, name in (("Kick.com API | Kick", "kick_com_api_kick"), ("_2 go!", "get_2_go"), ("", "")):
        assert toolbench.normalize_name(api_name) == name


def test_errors(data: Path, tmp_path: Path) -> None:
    full = settings("http://x", "http://y")
    with pytest.raises(UserError, match="--data is missing"):
        Toolbench(Options(extra=full))
    for name in ("server", "judge", "judge_model"):
        with pytest.raises(UserError, match=f"--set {name}=… is missing"):
            Toolbench(Options(data=data, extra={key: value for key, value in full.items() if key != name}))
    with pytest.raises(UserError, match=r"has no G1_tool\.json; available: G1_instruction, G3_instruction"):
        Toolbench(Options(data=data, extra={**full, "subsets": "G1_tool"}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains none of G1_instruction"):
        Toolbench(Options(data=tmp_path / "empty", extra=full))
