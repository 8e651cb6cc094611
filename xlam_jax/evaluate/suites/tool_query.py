"""Tool-Query of AgentBoard (Ma et al., NeurIPS 2024, https://arxiv.org/abs/2401.13178): questions that tools answer.

The user provides AgentBoard's data (GPL-2.0, hence not part of this project): the folder `data` of
https://huggingface.co/datasets/hkust-nlp/agentboard, with `tool-query/test.jsonl` and `tool-query/academia/raw/*.pkl`.

Only the tool `academia` is implemented: it reads the two graphs of papers and authors from the user's files.
AgentBoard's `weather` and `movie` call web services, whose answers change and one of which needs a key; their tasks are
skipped.

Progress is the largest fraction of a task's subgoals that equal results of tools so far. Success is a progress of 1,
and a call of finish.
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
from xlam_jax.evaluate.suites._rows import check_data, read_rows

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
    _tool("paperNodeCheck", "The attributes of a paper in PaperNet: authors, year, venue, citations, …", node=_NAME),
    _tool("authorNodeCheck", "The attributes of an author in AuthorNet: name, organization, …", node=_NAME),
    _tool("paperEdgeCheck", "The attributes of the edge between two papers in PaperNet.", node1=_NAME, node2=_NAME),
    _tool("authorEdgeCheck", "The papers that two authors wrote together.", node1=_NAME, node2=_NAME),
    _tool("finish", "Ends the task.", answer={"type": ["string", "number", "array"], "description": "The answer."}),
]


class ToolQuery(AgentSuite):
    """Success rate and progress by difficulty."""

    name = "tool_query"
    about = "AgentBoard's Tool-Query, tool academia only: success and progress (--data DIR, your copy of its data)"
    main_score = "success"
    max_steps = 20
    settings: ClassVar = dict(AgentSuite.settings)

    def __init__(self, options: Options):
        super().__init__(options)
        data = check_data(self.name, options.data, "your copy of AgentBoard's folder `data`")
        folder = data / "tool-query" if (data / "tool-query").is_dir() else data
        self._tasks: list[Task] = []
        self.skipped = 0
        """Number of skipped tasks, which need other tools."""
        path = folder / "test.jsonl"
        if not path.exists():
            raise UserError(f"{path}: does not exist; --data is AgentBoard's folder `data`, or `tool-query` in it")
        for number, row in read_rows(path, "task", "goal", "subgoals", "additional_info"):
            if not isinstance(row["additional_info"], dict) or not isinstance(row["subgoals"], list):
                raise UserError(f"{path}:{number}: additional_info must be an object, and subgoals a list")
            if row["additional_info"].get("tool") != TOOL:
                self.skipped += 1
            elif not row["subgoals"]:
                raise UserError(f"{path}:{number}: has no subgoals, so progress is undefined")
            else:
                self._tasks.append(Task(f"{TOOL}/{row.get('id', number)}", row, str(row.get("difficulty") or "")))
        if not self._tasks:
            raise UserError(f"{path}: contains no tasks of the tool {TOOL}; weather and movie are not supported")
        if self.skipped:
            print(f"{path}: skips {self.skipped} tasks of other tools", file=sys.stderr)
        self._library = Library(folder / TOOL / "raw")
        self._library.check()

    def tasks(self) -> list[Task]:
        """Returns the tasks of the tool academia, in the order of the file."""
        return self._tasks

    def environment(self, task: Task) -> "Academia":
        return Academia(self._library)


class Library:
    """The graphs, which are read at first use and never changed."""

    def __init__(self, folder: Path):
        self._folder = folder

    def check(self) -> None:
        """Raises `UserError` if a file is missing."""
        for name in ("paper_net", "author_net", "title2id_dict", "id2title_dict", "author2id_dict", "id2author_dict"):
            if not (path := self._folder / f"{name}.pkl").exists():
                raise UserError(f"{path}: does not exist; it is part of AgentBoard's data")

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
            raise UserError(f"{path}: cannot be read ({error or type(error).__name__}); download it again") from None


_FIXED = {"uint1": 1, "uint2": 2, "int4": 4, "uint4": 4, "uint8": 8, "float8": 8}
"""Type of an instruction's argument, as named by pickletools → its length in bytes."""
_COUNTED = {
    "string1": "<B", "bytes1": "<B", "unicodestring1": "<B", "long1": "<B", "string4": "<i", "long4": "<i",
    "bytes4": "<I", "unicodestring4": "<I", "bytes8": "<Q", "bytearray8": "<Q", "unicodestring8": "<Q",
}  # fmt: skip
"""Types that begin with a number of bytes → the struct format of that number. All other types are lines of text."""
_INSTRUCTIONS = {
    ord(opcode.code): (opcode.name, opcode.arg.name if opcode.arg else "") for opcode in pickletools.opcodes
}
_FIXED_LENGTHS = [0] * 256
"""Length in bytes, with argument, of each instruction that allocates no more memory than its length; 0 for others."""
for _code, (_name, _argument) in _INSTRUCTIONS.items():
    if _name not in ("LONG_BINPUT", "STOP") and (not _argument or _argument in _FIXED):
        _FIXED_LENGTHS[_code] = 1 + _FIXED.get(_argument, 0)


def check_sizes(data: bytes) -> None:
    """Raises `pickle.UnpicklingError` if a pickle requests more memory than a file of its size can need.

    Python's unpickler allocates memory for a text before it checks that the file contains as many bytes, and for as
    many memoized objects as the largest index, so that 5 bytes can request 64 GB.
    """
    at, end = 0, len(data)
    while at < end:
        if length := _FIXED_LENGTHS[data[at]]:
            at += length
            continue
        if data[at] not in _INSTRUCTIONS:
            raise pickle.UnpicklingError(f"byte {at} is {data[at]:#x}, which is not an instruction")
        name, argument = _INSTRUCTIONS[data[at]]
        begin = at = at + 1
        if format := _COUNTED.get(argument):
            at += struct.calcsize(format)
            (count,) = struct.unpack(format, data[begin:at]) if at <= end else (0,)
            if not 0 <= count <= end - at:
                raise pickle.UnpicklingError(f"byte {begin} requests {count} bytes, but {max(0, end - at)} are left")
            at += count
        elif argument in _FIXED:
            at += _FIXED[argument]
        elif argument:
            for _ in range(2 if argument == "stringnl_noescape_pair" else 1):
                at = data.find(b"\n", at) + 1 or end
        if name.endswith("PUT"):
            index = int(data[begin:at]) if name == "PUT" else int.from_bytes(data[begin:at], "little")
            if not 0 <= index <= begin:  # each earlier object has at least one byte
                raise pickle.UnpicklingError(f"byte {begin} requests memory for {index} objects")
        elif name == "STOP":
            return


class _Graph:
    """The content of a pickled networkx graph: node → attributes, and node → neighbour → attributes of the edge."""

    _node: dict[Any, dict[str, Any]]
    _adj: dict[Any, dict[Any, dict[str, Any]]]

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple):
            state = {key: value for part in state if isinstance(part, dict) for key, value in part.items()}
        self.__dict__.update(state)


class _Unpickler(pickle.Unpickler):
    """Creates plain containers and graphs only: other pickles can run any code, or multiply their content."""

    _FILLED: ClassVar = {
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "defaultdict"): defaultdict,
        ("builtins", "set"): set,
        ("builtins", "frozenset"): frozenset,
    }
    _EMPTY: ClassVar = {
        ("builtins", kind.__name__): kind for kind in (dict, list, tuple, int, float, str, bytes, bool, object)
    }

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self._room = len(data)
        """Number of items that may still be copied between containers: each has at least one byte in the file."""

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
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which is neither a graph nor plain data")

    def _fill(self, kind: Any, *arguments: Any) -> Any:
        self._room -= sum(len(argument) for argument in arguments if hasattr(argument, "__len__"))
        if self._room < 0:
            raise pickle.UnpicklingError("it copies its own parts repeatedly")
        return kind(*arguments)

    def _make(self, kind: Any, *arguments: Any) -> Any:
        """Creates empty values only: `bytes(10**12)` would take a terabyte."""
        if arguments:
            raise pickle.UnpicklingError(f"it creates a {kind.__name__} by a call with arguments")
        return kind()

    def _reconstruct(self, kind: Any, *_: Any) -> Any:
        if kind is not _Graph:
            raise pickle.UnpicklingError("it creates an object that is not a graph")
        return _Graph()


LONGEST_RESULT = 1_000_000
"""Maximum size of a tool's result, in characters and items."""


def is_short(value: Any, limit: int = LONGEST_RESULT) -> bool:
    """Returns whether a value's text is not much longer than `limit`. The text of a small value can be exponentially
    long: a list that contains another twice, which contains a third twice, and so on."""
    pending, size = [value], 0
    while pending:
        item = pending.pop()
        parts = [*item.keys(), *item.values()] if isinstance(item, dict) else item
        size += len(parts) if isinstance(parts, list | tuple | set | frozenset | str | bytes) else 1
        if size > limit:
            return False
        if isinstance(parts, list | tuple | set | frozenset):
            pending += parts
    return True


class _ToolError(Exception):
    """The observation of a call that a tool cannot execute. It equals no subgoal."""


class Academia:
    """The environment of one task."""

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
                raise _ToolError("The result is too long to be shown.")
        except _ToolError as failed:
            return Step(str(failed), self._progress)
        self._results.append(result)
        self._progress = max(self._progress, self._compute_progress())
        self._done = action.name == "finish"
        return Step(str(result), self._progress, self._done)

    def _compute_progress(self) -> float:
        """Returns the fraction of subgoals that equal a result; each result counts for one subgoal."""
        remaining = list(self._results)
        for subgoal in self._subgoals:
            with contextlib.suppress(ValueError):
                remaining.remove(subgoal)
        return (len(self._results) - len(remaining)) / len(self._subgoals)

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
        data = self._get_graph(graph)
        names = self._library.titles if graph == "PaperNet" else self._library.names
        return [names[neighbour] for neighbour in data._adj[self._look_up(graph, node)]]

    def _paperNodeCheck(self, node: str) -> Any:
        return self._get_graph("PaperNet")._node[self._look_up("PaperNet", node)]

    def _authorNodeCheck(self, node: str) -> Any:
        return self._get_graph("AuthorNet")._node[self._look_up("AuthorNet", node)]

    def _paperEdgeCheck(self, node1: str, node2: str) -> Any:
        return self._get_edge("PaperNet", node1, node2)

    def _authorEdgeCheck(self, node1: str, node2: str) -> Any:
        edge = copy.deepcopy(self._get_edge("AuthorNet", node1, node2))
        if isinstance(papers := edge.get("collaborative_papers"), list):
            edge["collaborative_papers"] = [self._library.titles[paper] for paper in papers]
        return edge

    def _finish(self, answer: Any) -> Any:
        with contextlib.suppress(TypeError):  # items without an order
            answer = sorted(answer) if isinstance(answer, list) else answer
        self._answer = answer
        return answer

    def _get_graph(self, name: str) -> _Graph:
        if name not in self._loaded:
            raise _ToolError(f"Please load the {name} first.")
        return self._library.papers if name == "PaperNet" else self._library.authors

    def _look_up(self, graph: str, node: str) -> Any:
        ids = self._library.paper_ids if graph == "PaperNet" else self._library.author_ids
        if node not in ids:
            raise _ToolError(f"There is no node named {node} in the {graph}.")
        return ids[node]

    def _get_edge(self, graph: str, node1: str, node2: str) -> dict[str, Any]:
        data = self._get_graph(graph)
        first, second = self._look_up(graph, node1), self._look_up(graph, node2)
        if second not in data._adj[first]:
            raise _ToolError(f"There is no edge between {node1} and {node2}.")
        return data._adj[first][second]
