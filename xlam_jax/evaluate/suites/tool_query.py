"""Tool-Query of AgentBoard (Ma et al., NeurIPS 2024, https://arxiv.org/abs/2401.13178): questions that tools answer.

Data are the user's copy of AgentBoard's (GPL-2.0, so no part of this project): the folder `data` of
https://huggingface.co/datasets/hkust-nlp/agentboard, with `tool-query/test.jsonl` and `tool-query/academia/raw/*.pkl`.

The tool `academia` is here: it reads the two graphs of papers and authors from the user's files. AgentBoard's `weather`
and `movie` ask services of the web, whose answers change and of which one needs a key; their tasks are left out.

Progress is the largest share of a task's subgoals that results so far equal; success is all of them, and an end.
"""

import contextlib
import copy
import io
import pickle
import pickletools
import struct
import sys
from collections import OrderedDict, defaultdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.errors import UserError
from xlam_jax.evaluate.suite import AgentSuite, Options, Step, Task
from xlam_jax.evaluate.suites._rows import read_rows, wanted

TOOL = "academia"
GRAPHS = ("PaperNet", "AuthorNet")
INSTRUCTION = """Reach the goal with the tools. They know two graphs: PaperNet, in which papers cite papers, and
AuthorNet, in which authors who wrote papers together are neighbours. Load a graph before you ask for what is in it. At
the end call finish with the answer.

Goal: """


def _tool(name: str, description: str, **parameters: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": parameters, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


_NAME = {"type": "string"}
TOOLS = [
    _tool("loadPaperNet", "Loads PaperNet."),
    _tool("loadAuthorNet", "Loads AuthorNet."),
    _tool(
        "neighbourCheck",
        "The neighbours of a node: titles of papers, or names of authors.",
        graph={"type": "string", "enum": list(GRAPHS)},
        node=_NAME,
    ),
    _tool("paperNodeCheck", "What PaperNet knows of a paper: authors, year, venue, citations, …", node=_NAME),
    _tool("authorNodeCheck", "What AuthorNet knows of an author: name, organization, …", node=_NAME),
    _tool("paperEdgeCheck", "What PaperNet knows of the link between two papers.", node1=_NAME, node2=_NAME),
    _tool("authorEdgeCheck", "The papers that two authors wrote together.", node1=_NAME, node2=_NAME),
    _tool("finish", "Ends the task.", answer={"type": ["string", "number", "array"], "description": "The answer."}),
]


class ToolQuery(AgentSuite):
    """Success and progress by difficulty."""

    name = "tool_query"
    about = "AgentBoard's Tool-Query, its tool academia: success and progress (--data DIR, your copy of its data)"
    main_score = "success"
    max_steps = 20
    settings: ClassVar = dict(AgentSuite.settings)

    def __init__(self, options: Options):
        super().__init__(options)
        data = wanted(self.name, options.data, "your copy of AgentBoard's folder `data`")
        folder = data / "tool-query" if (data / "tool-query").is_dir() else data
        self._tasks: list[Task] = []
        self.left_out = 0
        """Tasks of the other tools."""
        path = folder / "test.jsonl"
        if not path.exists():
            raise UserError(f"{path}: is not there; --data is AgentBoard's folder `data`, or `tool-query` in it")
        for number, row in read_rows(path, "task", "goal", "subgoals", "additional_info"):
            if not isinstance(row["additional_info"], dict) or not isinstance(row["subgoals"], list):
                raise UserError(f"{path}:{number}: additional_info is no object, or subgoals no list")
            if row["additional_info"].get("tool") != TOOL:
                self.left_out += 1
            elif not row["subgoals"]:
                raise UserError(f"{path}:{number}: has no subgoals; progress cannot be told")
            else:
                self._tasks.append(Task(f"{TOOL}/{row.get('id', number)}", row, str(row.get("difficulty") or "")))
        if not self._tasks:
            raise UserError(f"{path}: holds no task of the tool {TOOL}; those of weather and movie are not run here")
        if self.left_out:
            print(f"{path}: {self.left_out} tasks of other tools are left out", file=sys.stderr)
        self._library = Library(folder / TOOL / "raw")
        self._library.check()

    def tasks(self) -> list[Task]:
        """Those of the tool academia, in the order of the file."""
        return self._tasks

    def environment(self, task: Task) -> "Academia":
        return Academia(self._library)


class Library:
    """The graphs, read when first asked for; nothing of them is changed."""

    def __init__(self, folder: Path):
        self._folder = folder

    def check(self) -> None:
        """Raises `UserError` where a file is missing."""
        for name in ("paper_net", "author_net", "title2id_dict", "id2title_dict", "author2id_dict", "id2author_dict"):
            if not (path := self._folder / f"{name}.pkl").exists():
                raise UserError(f"{path}: is not there; it comes with AgentBoard's data")

    @cached_property
    def papers(self) -> "_Graph":
        return self._load("paper_net")

    @cached_property
    def authors(self) -> "_Graph":
        return self._load("author_net")

    @cached_property
    def paper_ids(self) -> dict[str, Any]:
        return self._load("title2id_dict")

    @cached_property
    def titles(self) -> dict[Any, str]:
        return self._load("id2title_dict")

    @cached_property
    def author_ids(self) -> dict[str, Any]:
        return self._load("author2id_dict")

    @cached_property
    def names(self) -> dict[Any, str]:
        return self._load("id2author_dict")

    def _load(self, name: str) -> Any:
        path = self._folder / f"{name}.pkl"
        data = path.read_bytes()
        try:
            check_sizes(data)
            return _Unpickler(data).load()
        except (
            pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError, IndexError, KeyError,
            MemoryError, OverflowError, RecursionError,
        ) as error:  # fmt: skip
            raise UserError(f"{path}: cannot be read ({error or type(error).__name__}); get it again") from None


_FIXED = {"uint1": 1, "uint2": 2, "int4": 4, "uint4": 4, "uint8": 8, "float8": 8}
"""Bytes of an instruction's argument, by its type as pickletools calls it."""
_COUNTED = {
    "string1": "<B", "bytes1": "<B", "unicodestring1": "<B", "long1": "<B", "string4": "<i", "long4": "<i",
    "bytes4": "<I", "unicodestring4": "<I", "bytes8": "<Q", "bytearray8": "<Q", "unicodestring8": "<Q",
}  # fmt: skip
"""Types that begin with a count of bytes, and the count's form. All other types are lines of text."""
_INSTRUCTIONS = {ord(one.code): (one.name, one.arg.name if one.arg else "") for one in pickletools.opcodes}
_HARMLESS = [0] * 256
"""Bytes of each instruction, its argument with it, that asks for nothing; 0 for all others."""
for _code, (_name, _argument) in _INSTRUCTIONS.items():
    if _name not in ("LONG_BINPUT", "STOP") and (not _argument or _argument in _FIXED):
        _HARMLESS[_code] = 1 + _FIXED.get(_argument, 0)


def check_sizes(data: bytes) -> None:
    """Raises `pickle.UnpicklingError` where a pickle asks for more memory than a file of its size can need.

    Python's reader reserves memory for a text of a stated length before it looks whether the file holds it, and for as
    many memoized objects as the largest index says, for which 5 bytes can ask 64 GB.
    """
    at, end = 0, len(data)
    while at < end:
        if harmless := _HARMLESS[data[at]]:
            at += harmless
            continue
        if data[at] not in _INSTRUCTIONS:
            raise pickle.UnpicklingError(f"byte {at} is {data[at]:#x}, which is no instruction")
        name, argument = _INSTRUCTIONS[data[at]]
        begin = at = at + 1
        if form := _COUNTED.get(argument):
            at += struct.calcsize(form)
            (count,) = struct.unpack(form, data[begin:at]) if at <= end else (0,)
            if not 0 <= count <= end - at:
                raise pickle.UnpicklingError(f"byte {begin} asks for {count} bytes, and {max(0, end - at)} are left")
            at += count
        elif argument in _FIXED:
            at += _FIXED[argument]
        elif argument:
            for _ in range(2 if argument == "stringnl_noescape_pair" else 1):
                at = data.find(b"\n", at) + 1 or end
        if name.endswith("PUT"):
            index = int(data[begin:at]) if name == "PUT" else int.from_bytes(data[begin:at], "little")
            if not 0 <= index <= begin:  # each object before it has a byte at least
                raise pickle.UnpicklingError(f"byte {begin} asks for room for {index} objects")
        elif name == "STOP":
            return


class _Graph:
    """What a pickled graph of networkx holds: node → its attributes, and node → neighbour → the link's attributes."""

    _node: dict[Any, dict[str, Any]]
    _adj: dict[Any, dict[Any, dict[str, Any]]]

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple):
            state = {key: value for part in state if isinstance(part, dict) for key, value in part.items()}
        self.__dict__.update(state)


class _Unpickler(pickle.Unpickler):
    """Makes plain containers and graphs only: a pickle may otherwise run any code, or multiply what it holds."""

    _FILLED: ClassVar = {
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "defaultdict"): defaultdict,
        ("builtins", "set"): set,
        ("builtins", "frozenset"): frozenset,
    }
    _EMPTY: ClassVar = {
        ("builtins", one.__name__): one for one in (dict, list, tuple, int, float, str, bytes, bool, object)
    }

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self._room = len(data)
        """Items that containers may still be filled with from others: each has a byte in the file at least."""

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)  # Python 2's names
        if module.partition(".")[0] == "networkx":
            return _Graph
        if (module, name) == ("copyreg", "_reconstructor"):
            return self._reconstruct
        if kind := self._FILLED.get((module, name)):
            return partial(self._fill, kind)
        if kind := self._EMPTY.get((module, name)):
            return partial(self._make, kind)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is neither a graph nor plain data")

    def _fill(self, kind: Any, *arguments: Any) -> Any:
        self._room -= sum(len(one) for one in arguments if hasattr(one, "__len__"))
        if self._room < 0:
            raise pickle.UnpicklingError("it copies its own parts again and again")
        return kind(*arguments)

    def _make(self, kind: Any, *arguments: Any) -> Any:
        """Empty ones only: `bytes(10**12)` would be a terabyte."""
        if arguments:
            raise pickle.UnpicklingError(f"it makes a {kind.__name__} by a call")
        return kind()

    def _reconstruct(self, kind: Any, *_: Any) -> Any:
        if kind is not _Graph:
            raise pickle.UnpicklingError("it makes an object that is no graph")
        return _Graph()


LONGEST_RESULT = 1_000_000
"""Characters and items of what a tool shows."""


def is_short(value: Any, most: int = LONGEST_RESULT) -> bool:
    """Whether a value's text is not much longer than `most`. A small value can have a text without end: one that holds
    another twice, which holds a third twice, and so on."""
    waiting, seen = [value], 0
    while waiting:
        one = waiting.pop()
        parts = [*one.keys(), *one.values()] if isinstance(one, dict) else one
        seen += len(parts) if isinstance(parts, list | tuple | set | frozenset | str | bytes) else 1
        if seen > most:
            return False
        if isinstance(parts, list | tuple | set | frozenset):
            waiting += parts
    return True


class _Failed(Exception):  # noqa: N818 - a result like any other, which no subgoal equals
    """What a tool says when it cannot do what is asked."""


class Academia:
    """The tool of one task."""

    def __init__(self, library: Library):
        self._library = library
        self._loaded: set[str] = set()
        self._subgoals: list[Any] = []
        self._results: list[Any] = []
        self._answer: Any = None
        self._progress = 0.0
        self._done = False

    async def reset(self, task: Task) -> tuple[str, list[dict[str, Any]]]:
        self._subgoals = task.data["subgoals"]
        return INSTRUCTION + task.data["goal"], TOOLS

    async def step(self, action: ToolCall) -> Step:
        try:
            result = getattr(self, f"_{action.name}")(**action.arguments)
            if not is_short(result):
                raise _Failed("The result is too long to be shown.")
        except _Failed as failed:
            return Step(str(failed), self._progress)
        self._results.append(result)
        self._progress = max(self._progress, self._share())
        self._done = action.name == "finish"
        return Step(str(result), self._progress, self._done)

    def _share(self) -> float:
        """The share of subgoals that results equal, each result for one."""
        left = list(self._results)
        for subgoal in self._subgoals:
            with contextlib.suppress(ValueError):
                left.remove(subgoal)
        return (len(self._results) - len(left)) / len(self._subgoals)

    def outcome(self) -> tuple[dict[str, float], str, dict[str, Any]]:
        success = self._done and self._progress == 1
        failure = "" if success else "wrong-answer" if self._done else "not-finished"
        details = {"answer": self._answer, "subgoals": self._subgoals}
        return {"success": float(success), "progress": self._progress}, failure, details

    def _loadPaperNet(self) -> str:
        self._loaded.add("PaperNet")
        return "PaperNet is loaded."

    def _loadAuthorNet(self) -> str:
        self._loaded.add("AuthorNet")
        return "AuthorNet is loaded."

    def _neighbourCheck(self, graph: str, node: str) -> list[str]:
        known = self._graph(graph)
        names = self._library.titles if graph == "PaperNet" else self._library.names
        return [names[one] for one in known._adj[self._id(graph, node)]]

    def _paperNodeCheck(self, node: str) -> Any:
        return self._graph("PaperNet")._node[self._id("PaperNet", node)]

    def _authorNodeCheck(self, node: str) -> Any:
        return self._graph("AuthorNet")._node[self._id("AuthorNet", node)]

    def _paperEdgeCheck(self, node1: str, node2: str) -> Any:
        return self._edge("PaperNet", node1, node2)

    def _authorEdgeCheck(self, node1: str, node2: str) -> Any:
        edge = copy.deepcopy(self._edge("AuthorNet", node1, node2))
        if isinstance(papers := edge.get("collaborative_papers"), list):
            edge["collaborative_papers"] = [self._library.titles[one] for one in papers]
        return edge

    def _finish(self, answer: Any) -> Any:
        with contextlib.suppress(TypeError):  # of things that have no order
            answer = sorted(answer) if isinstance(answer, list) else answer
        self._answer = answer
        return answer

    def _graph(self, name: str) -> _Graph:
        if name not in self._loaded:
            raise _Failed(f"Please load the {name} first.")
        return self._library.papers if name == "PaperNet" else self._library.authors

    def _id(self, graph: str, node: str) -> Any:
        ids = self._library.paper_ids if graph == "PaperNet" else self._library.author_ids
        if node not in ids:
            raise _Failed(f"There is no node named {node} in the {graph}.")
        return ids[node]

    def _edge(self, graph: str, node1: str, node2: str) -> dict[str, Any]:
        known = self._graph(graph)
        first, second = self._id(graph, node1), self._id(graph, node2)
        if second not in known._adj[first]:
            raise _Failed(f"There is no edge between {node1} and {node2}.")
        return known._adj[first][second]
