"""Every agent with every agent suite, against an endpoint that knows the right actions."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import small_corpus
from fake_server import says, serve
from scripted import Action, scripted
from small_corpus import PLACES, TRADES, question
from support import Commands

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.evaluate import agents, shop
from xlam_jax.evaluate.agents import _actions
from xlam_jax.evaluate.suite import Episode
from xlam_jax.evaluate.suites.hotpotqa import TOOLS, HotpotQA
from xlam_jax.evaluate.suites.webshop import WebShop

AGENTS = ["act", "bolaa", "native", "planact", "planreact", "react", "zero_shot", "zero_shot_think"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus.write(tmp_path_factory.mktemp("hotpotqa"))


def script() -> dict[str, list[Action]]:
    """Right actions for eight questions. The ninth answer shares a word with the right one, the tenth never comes."""
    actions: dict[str, list[Action]] = {}
    for at, (place, trade) in enumerate(zip(PLACES, TRADES, strict=True)):
        actions[question(place, trade)] = [
            ("search", f"the {trade} of {place}"),
            ("lookup", "workshop"),
            ("search", f"{trade.title()} Street ({place})"),
            ("finish", f"{1500 + 11 * at}" if at < 8 else f"in {1500 + 11 * at}"),
        ]
    actions[question(PLACES[9], TRADES[9])] = [("search", "nothing of the kind")]
    return actions


def records(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


def test_names_of_agents():
    assert agents.names() == AGENTS


@pytest.mark.parametrize("agent", AGENTS)
def test_hotpotqa(commands: Commands, folder: Path, tmp_path: Path, agent: str):
    with scripted(script(), HotpotQA.labour) as server:
        result = commands.call(
            "xlam_jax.evaluate", "--suite", "hotpotqa", "--agent", agent, "--base-url", server.url,
            "--model", "tiny", "--data", folder / "questions.jsonl", "--set", f"corpus={folder / 'pages.jsonl'}",
            "--set", "max_steps=5", "--out", tmp_path / "out",
        )  # fmt: skip
    summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert summary["scores"] == pytest.approx({"f1": (8 + 2 / 3) / 10, "em": 0.8, "accuracy": 0.8})
    assert summary["failures"] == {"wrong-answer": 1, "steps-used-up": 1}
    assert summary["errors"] == {}
    assert {name: group["examples"] for name, group in summary["groups"].items()} == {"easy": 4, "hard": 2, "medium": 4}
    assert summary["groups"]["hard"]["scores"]["em"] == 1
    record = records(tmp_path / "out")["q0"]
    assert record["details"]["steps"] == 4
    assert [message["role"] for message in record["messages"][:2]] == ["user", "assistant"]
    seen = json.dumps(record["messages"], ensure_ascii=False)
    assert "(1 of 1) The workshop stood in Baker Street (Oslo)." in seen
    assert "It was laid out in 1500." in seen
    assert "0.8000" in result.stdout


@pytest.mark.parametrize("agent", AGENTS)
def test_webshop(commands: Commands, tmp_path: Path, agent: str):
    """Eight right purchases, one without the options, and one of a product of another kind."""
    actions: dict[str, list[Action]] = {}
    expected = []
    for number in range(10):
        goal = shop.goal(number)
        product = goal.product if number != 9 else shop.goal(0).product
        options = [("click", value) for value in goal.options.values()] if number != 8 else []
        actions[goal.instruction] = [
            ("search", product.title), ("click", product.asin), ("click", "Features"), ("click", "< Back to Item Page"),
            *options, ("click", "Buy Now"),
        ]  # fmt: skip
        expected.append({8: 3 / 5, 9: 0.0}.get(number, 1.0))
    with shop.serve() as url, scripted(actions, WebShop.labour) as server:
        commands.call(
            "xlam_jax.evaluate", "--suite", "webshop", "--agent", agent, "--base-url", server.url,
            "--model", "tiny", "--set", f"url={url}", "--set", "tasks=10", "--out", tmp_path / "out",
        )  # fmt: skip
    records_by_id = records(tmp_path / "out")
    assert [records_by_id[f"fixed_{at}"]["scores"]["reward"] for at in range(10)] == expected
    summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert summary["scores"] == pytest.approx({"reward": 0.86, "success": 0.8})
    assert summary["failures"] == {"partly-right": 1, "wrong": 1}


TOOL = {tool["function"]["name"]: tool["function"] for tool in TOOLS}


@pytest.mark.parametrize(
    "text",
    [
        "Action: search[Oslo (city)]",
        "Thought: I look.\nAction: search[Oslo (city)]\nObservation: Oslo is …\nAction: finish[x]",
        "**Action 2:** Search[Oslo (city)]",
        "action: `search[Oslo (city)]`",
        "Action: search(Oslo (city))",
        'Action: search["Oslo (city)"]',
        'Action: search[query="Oslo (city)"]',
        'Action: search[{"query": "Oslo (city)"}]',
        "Action: search[Oslo (city)",
        "I would like to\nsearch[Oslo (city)]",
        'Action: {"name": "search", "arguments": {"query": "Oslo (city)"}}',
        'I look. [{"name": "search", "arguments": {"query": "Oslo (city)"}}]',
    ],
)
def test_actions_are_parsed(text: str):
    assert _actions.parse_action(text, TOOL) == ToolCall(None, "search", {"query": "Oslo (city)"})


@pytest.mark.parametrize("text", ["", "I do not know.", "Action:", "Action: hm", "The array is list[0]."])
def test_text_without_an_action(text: str):
    assert _actions.parse_action(text, TOOL) is None


def test_formatted_actions_are_parsed():
    for action in (
        ToolCall(None, "search", {"query": "a [b] c"}),
        ToolCall(None, "book", {"from": "Oslo", "seats": 2}),
        ToolCall(None, "stop", {}),
    ):
        tools = TOOL | {"book": {"parameters": {"properties": {"from": {}, "seats": {}}}}, "stop": {"parameters": {}}}
        assert _actions.parse_action(f"Action: {_actions.format_action(action)}", tools) == action


@pytest.mark.parametrize("agent", ["react", "native", "bolaa"])
def test_a_model_that_never_acts(commands: Commands, folder: Path, tmp_path: Path, agent: str):
    """Its answers, including empty ones, are failures, not errors."""
    with serve(says("I do not know."), says("")) as server:
        commands.call(
            "xlam_jax.evaluate", "--suite", "hotpotqa", "--agent", agent, "--base-url", server.url,
            "--model", "tiny", "--data", folder / "questions.jsonl", "--set", f"corpus={folder / 'pages.jsonl'}",
            "--set", "max_steps=3", "--limit", "2", "--out", tmp_path / "out",
        )  # fmt: skip
    summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert summary["failures"] == {"no-action": 2}
    assert summary["scores"] == {"f1": 0, "em": 0, "accuracy": 0}


def test_a_user_defined_agent(commands: Commands, folder: Path, tmp_path: Path):
    """One file. The agent answers without a request."""
    (tmp_path / "guess.py").write_text(
        "from xlam_jax.data.trajectory import ToolCall\n"
        "from xlam_jax.evaluate.agents import Agent\n\n"
        "class Guess(Agent):\n"
        "    about = 'always 1500'\n\n"
        "    async def lead(self, model, episode):\n"
        "        await episode.act(ToolCall(None, 'finish', {'answer': '1500'}))\n",
        encoding="utf-8",
    )
    commands.call(
        "xlam_jax.evaluate", "--suite", "hotpotqa", "--agent", tmp_path / "guess.py", "--base-url",
        "http://127.0.0.1:9/v1", "--model", "tiny", "--data", folder / "questions.jsonl", "--set",
        f"corpus={folder / 'pages.jsonl'}", "--out", tmp_path / "out",
    )  # fmt: skip
    summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert summary["scores"]["em"] == 0.1


def test_invalid_calls_do_not_reach_the_environment():
    """An environment only receives calls that match its tools."""

    class Untouched:
        async def reset(self, task):
            raise AssertionError

        async def step(self, action):
            raise AssertionError(action)

        def outcome(self):
            raise AssertionError

    episode = Episode(Untouched(), "?", TOOLS, 5)

    async def act() -> list[str]:
        return [
            await episode.act(ToolCall(None, name, arguments))
            for name, arguments in (("serch", {}), ("search", {}), ("search", {"query": 3}), ("lookup", {"query": "x"}))
        ]

    observations = asyncio.run(act())
    assert observations[0] == "There is no action serch; the actions are: search, lookup, finish."
    assert all(
        observation.startswith(("search cannot be called like this: ", "lookup cannot be called like this: "))
        for observation in observations[1:]
    )
    assert episode.steps == 4
