"""The suite tool_query on two small graphs in AgentBoard's form."""

import asyncio
import json
import pickle
import pickletools
import struct
import tracemalloc
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.errors import UserError
from xlam_jax.evaluate import agents
from xlam_jax.evaluate.endpoint import Answer
from xlam_jax.evaluate.suite import Options, Outcome
from xlam_jax.evaluate.suites.tool_query import Library, ToolQuery

PAPER = {"authors": ["Ada"], "year": 1843, "n_citation": 2}


@pytest.fixture(params=[2, 5])
def data(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    raw = tmp_path / "tool-query" / "academia" / "raw"
    raw.mkdir(parents=True)
    papers: Any = nx.DiGraph()
    papers.add_node("p1", **PAPER)
    papers.add_node("p2", authors=["Bob"], year=2000)
    papers.add_edge("p1", "p2", kind="cites")
    authors: Any = nx.Graph()
    authors.add_node("a1", name="Ada", org="X")
    authors.add_node("a2", name="Bob", org="Y")
    authors.add_node("a3", name="Eve", org="Z")
    authors.add_edge("a1", "a2", weight=1, collaborative_papers=["p1", "p2"])
    authors.add_edge("a1", "a3", weight=1, collaborative_papers=[])
    views = authors.adj, papers.nodes  # networkx keeps such views in the pickle
    assert len(views) == 2
    pickled = {
        "paper_net": papers,
        "author_net": authors,
        "title2id_dict": {"Notes": "p1", "More": "p2"},
        "id2title_dict": {"p1": "Notes", "p2": "More"},
        "author2id_dict": {"Ada": "a1", "Bob": "a2", "Eve": "a3"},
        "id2author_dict": {"a1": "Ada", "a2": "Bob", "a3": "Eve"},
    }
    for name, value in pickled.items():
        (raw / f"{name}.pkl").write_bytes(pickle.dumps(value, protocol=request.param))
    subgoals = ["AuthorNet is loaded.", ["Bob", "Eve"], ["Bob", "Eve"]]
    rows = [
        {
            "id": 0,
            "goal": "Who wrote with Ada?",
            "subgoals": subgoals,
            "difficulty": "easy",
            "additional_info": {"tool": "academia"},
        },
        {"id": 1, "goal": "Rain?", "subgoals": ["x"], "difficulty": "hard", "additional_info": {"tool": "weather"}},
        {
            "id": 2,
            "goal": "When?",
            "subgoals": ["PaperNet is loaded.", PAPER, 1843],
            "additional_info": {"tool": "academia"},
        },
    ]
    (tmp_path / "tool-query" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


class ScriptedModel:
    def __init__(self, *calls: ToolCall):
        self._calls = list(calls)
        self.observations: list[str] = []

    async def chat(self, messages: Sequence[dict[str, Any]], tools: Any = None, **options: Any) -> Answer:
        self.observations.append(messages[-1]["content"])
        return Answer(list(messages), "", (self._calls.pop(0),), "tool_calls")


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall("c", name, arguments)


def run_task(data: Path, at: int, *calls: ToolCall) -> tuple[Outcome, ScriptedModel]:
    suite = ToolQuery(Options(data=data))
    model = ScriptedModel(*calls)
    return asyncio.run(suite.run(suite.tasks()[at], model, agents.load("native"))), model  # type: ignore[arg-type]


def test_all_subgoals_and_an_end_are_success(data: Path) -> None:
    neighbours = call("neighbourCheck", graph="AuthorNet", node="Ada")
    outcome, model = run_task(
        data, 0, neighbours, call("loadAuthorNet"), neighbours, call("finish", answer=["Eve", "Bob"])
    )
    assert outcome.scores == {"success": 1.0, "progress": 1.0}
    assert outcome.failure == ""
    assert model.observations[0].endswith("Goal: Who wrote with Ada?")
    assert model.observations[1:] == ["Please load the AuthorNet first.", "AuthorNet is loaded.", "['Bob', 'Eve']"]
    outcome, _ = run_task(
        data, 2 - 1, call("loadPaperNet"), call("paperNodeCheck", node="Notes"), call("finish", answer=1843)
    )
    assert outcome.scores == {"success": 1.0, "progress": 1.0}


def test_progress_is_the_fraction_of_subgoals(data: Path) -> None:
    outcome, _ = run_task(data, 0, call("loadAuthorNet"), call("loadAuthorNet"), call("finish", answer="Bob"))
    assert outcome.scores == {"success": 0.0, "progress": pytest.approx(1 / 3)}
    assert outcome.failure == "wrong-answer"
    steps = [call("loadAuthorNet"), call("neighbourCheck", graph="AuthorNet", node="Ada")] * 10
    outcome, _ = run_task(data, 0, *steps)
    assert outcome.scores == {"success": 0.0, "progress": 1.0}  # all results were observed, but finish was never called
    assert outcome.failure == "steps-used-up"


def test_results_of_tools(data: Path) -> None:
    calls = [
        call("loadPaperNet"),
        call("loadAuthorNet"),
        call("authorEdgeCheck", node1="Ada", node2="Bob"),
        call("authorEdgeCheck", node1="Bob", node2="Eve"),
        call("authorNodeCheck", node="Eve"),
        call("authorNodeCheck", node="Zoe"),
        call("paperEdgeCheck", node1="Notes", node2="More"),
        call("paperEdgeCheck", node1="More", node2="Notes"),
        call("neighbourCheck", graph="PaperNet", node="Notes"),
        call("neighbourCheck", graph="CarNet", node="Notes"),
        call("fly"),
        call("finish", answer=""),
    ]
    _, model = run_task(data, 0, *calls)
    assert model.observations[3:10] == [
        "{'weight': 1, 'collaborative_papers': ['Notes', 'More']}",
        "There is no edge between Bob and Eve.",
        "{'name': 'Eve', 'org': 'Z'}",
        "There is no node named Zoe in the AuthorNet.",
        "{'kind': 'cites'}",
        "There is no edge between More and Notes.",
        "['More']",
    ]
    assert "CarNet" in model.observations[10]
    assert model.observations[11].startswith("There is no action fly")
    _, again = run_task(data, 0, *calls)
    assert again.observations == model.observations


def test_tasks_of_other_tools_are_skipped(data: Path) -> None:
    suite = ToolQuery(Options(data=data / "tool-query"))
    assert [(task.id, task.group) for task in suite.tasks()] == [("academia/0", "easy"), ("academia/2", "")]
    assert suite.skipped == 1


class Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_pickles_run_nothing(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "tool-query/academia/raw/paper_net.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"paper_net\.pkl: cannot be read \(it contains builtins\.print"):
        run_task(data, 0, call("loadPaperNet"), call("paperNodeCheck", node="Notes"))
    assert "executed" not in capsys.readouterr().out


def put(index: int) -> bytes:
    return b"]r" + struct.pack("<I", index) + b"."


@pytest.mark.parametrize(
    "pickled",
    [
        put(2**32 - 1),
        put(10**6),
        b"]p4000000000\n.",
        b"\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
        b"\x96" + struct.pack("<Q", 1 << 40) + b"x.",
        b"\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
        b"B" + struct.pack("<I", 2**32 - 1) + b"x.",
        b"T" + struct.pack("<i", 2**31 - 1) + b"x.",
        b"T" + struct.pack("<i", -1) + b"x.",
        b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
        b"cbuiltins\nbytes\n(L1000000000000L\ntR.",
        b"c__builtin__\nlist\n(L1L\ntR.",
        b"ccopy_reg\n_reconstructor\n(cbuiltins\nbytes\ncbuiltins\nbytes\nL1000000000000L\ntR.",
        pickle.dumps(list(range(1000)))[:-1] + b"q\x0000" + b"(cbuiltins\nset\nh\x00\x85R" * 500 + b"t.",
        b"\xff",
        b"",
    ],
)
def test_pickles_that_request_too_much_memory_are_refused(tmp_path: Path, pickled: bytes) -> None:
    (tmp_path / "paper_net.pkl").write_bytes(pickled)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"paper_net\.pkl: cannot be read"):
            _ = Library(tmp_path).papers
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_plain_data_are_read(tmp_path: Path, protocol: int) -> None:
    values = {
        "a": [1, -(2**70), 2.5, None, True, "é\n", (), (1, (2, 3))],
        7: {"x" * 300: {1, 2}, "y": frozenset("ab")},
        "ordered": OrderedDict(a=1),
        "default": defaultdict(list, b=[1]),
    }
    for data in (pickle.dumps(values, protocol), pickletools.optimize(pickle.dumps(values, protocol))):
        (tmp_path / "paper_net.pkl").write_bytes(data)
        assert Library(tmp_path).papers == values  # pyright: ignore[reportUnnecessaryComparison]


def test_a_very_long_result_is_not_shown(data: Path) -> None:
    path = data / "tool-query/academia/raw/paper_net.pkl"
    nodes: dict[str, Any] = {"p1": {"x": "y"}}
    for _ in range(60):
        nodes = {"p1": {"x": [nodes["p1"]["x"]] * 2}}
    papers: Any = nx.DiGraph()
    papers.add_node("p1", **nodes["p1"])
    path.write_bytes(pickle.dumps(papers))
    _, model = run_task(data, 0, call("loadPaperNet"), call("paperNodeCheck", node="Notes"), call("finish", answer=""))
    assert model.observations[2] == "The result is too long to be shown."


def test_errors(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data is missing"):
        ToolQuery(Options())
    (data / "tool-query/academia/raw/id2title_dict.pkl").unlink()
    with pytest.raises(UserError, match=r"id2title_dict\.pkl: does not exist"):
        ToolQuery(Options(data=data))
    (data / "tool-query/test.jsonl").write_text(
        '{"goal": "x", "subgoals": [], "additional_info": {"tool": "academia"}}\n'
    )
    with pytest.raises(UserError, match=r"test\.jsonl:1: has no subgoals"):
        ToolQuery(Options(data=data))
