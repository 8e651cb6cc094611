"""ToolBench: trees of attempts to answer a query with RapidAPI's functions (Qin et al. 2023, arXiv:2307.16789).

Raw: one file per answer, answer/<group>_answer/<query id>_….json, {"win", "tree": {"tree": node}, "answer_generation":
{"query", "function": [schema, …], "train_messages", …}}. A node is {"node_type": "Thought", "Action" or "Action
Input", "description": its text, "observation", "finished", "children": [node, …]}; the root is empty. A path from the
root to a leaf is one attempt; when an attempt fails, the search goes back and continues with another child. Queries
without answers are in instruction/<group>_query.json, a JSON list.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlam_jax.data import literals
from xlam_jax.data.converters.common import (
    Converted,
    Dropped,
    Repaired,
    StepDropped,
    call,
    convert_one,
    declared_arguments,
    field,
    stem,
    tool,
)
from xlam_jax.data.files import LONGEST_ROW, open_bytes
from xlam_jax.data.problems import Report
from xlam_jax.data.row_json import decode_arguments, parse_json
from xlam_jax.data.rows import Row, read_rows
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError

FAILING = 16
"""Maximum number of failing paths that are kept per tree."""
INSTRUCTION = (
    "Answer the user's request with the functions: think about what you know and what to do next, then call one of "
    'them. Call "Finish" at the end, with an answer that tells the user everything, or to give up and restart where '
    "the functions fail or can't handle the request."
)
FINISH = tool(
    "Finish",
    "Give the final answer, or give up and restart. Call it at the end of every attempt; only the answer is shown.",
    {
        "return_type": {"type": "string", "enum": ["give_answer", "give_up_and_restart"]},
        "final_answer": {"type": "string", "description": "The answer; needed with give_answer."},
    },
    ["return_type"],
)
_STRING = re.compile(
    r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL
)  # also matches a string that is not closed, so that the search takes linear time
_CONTROL = {code: json.dumps(chr(code))[1:-1] for code in range(32)}

Node = dict[str, Any]
Item = dict[str, Any] | StepDropped | Repaired | InvalidTrajectory


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts each path to a leaf to a trajectory, with score 1 if the leaf is finished, else 0.

    At most `FAILING` failing paths are kept: those that share the longest beginning with the winning path, or else the
    first in the order of the search; equal paths are kept once. All trajectories of a task have the same tools,
    instruction and user turn, so that pairs can be made from them. Their ids differ in the number of the path,
    toolbench_<group>_<query id>_<path>: leaves count from 0 in the order of the search. The instruction is the recorded
    one, if any.
    Thoughts are the text of the call that follows them; those after the search went back mention attempts that are not
    on the path. Errors of functions stay as results; the result of the last call is dropped. Steps that call an
    undeclared function, or have unreadable arguments, are dropped; so is a path that ends with such a step.
    Repaired in arguments: what `decode_arguments` repairs, raw-control-character (in a string), python-literal, and
    numbers in text. Calls that break their schema in other ways are kept, because the recorded result answers them.
    Queries without a tree are dropped.
    """
    for path in paths:
        document = not ({".jsonl", ".ndjson"} & set(path.suffixes[-2:])) and _first_byte(path) != b"["
        for read in _read_document(path) if document else read_rows(path):
            name = _name(path) if document else f"{stem(path)}_{read.number}"
            named = lambda row, _, name=name: convert_row(row, name)  # noqa: E731
            yield from convert_one(path, read.number, read.row, named, read.padded, read.line)


def convert_row(row: dict[str, Any], name: str) -> Iterator[Item]:
    """Converts one answer tree; yields `InvalidTrajectory` for each path that is dropped."""
    if "tree" not in row and "query" in row:
        raise InvalidTrajectory("no-answer-tree", "a query without its answer")
    leaves = list(_paths(field(field(row, "tree", dict), "tree", dict)))
    answer = field(row, "answer_generation", dict)
    tools = _tools(field(answer, "function", list))
    task = {
        "source": "toolbench",
        "task_instruction": _instruction(answer),
        "tools": list(tools.values()),
    }
    user = {"role": "user", "content": field(answer, "query", str).strip()}
    seen: dict[str, int] = {}
    kept = 0
    for number, path in _ranked(leaves):
        won = path[-1].get("finished") is True
        if kept == FAILING and not won:
            yield InvalidTrajectory("too-many-failing-paths", f"path {number}: the tree has more than {FAILING}")
            continue
        try:
            turns, notes = _turns(path, tools)
        except InvalidTrajectory as invalid:  # the tree's other paths may be valid
            yield InvalidTrajectory(invalid.reason, f"path {number}: {invalid.detail}")
            continue
        first = seen.setdefault(repr(turns), number)
        if first != number:
            yield InvalidTrajectory("same-path", f"path {number} equals path {first}")
            continue
        kept += not won
        yield from notes
        yield {
            "unique_trajectory_id": f"toolbench_{name}_{number}",
            "score": 1.0 if won else 0.0,
            **task,
            "conversation": [user, *turns],
        }


def _paths(root: Node) -> Iterator[tuple[Node, ...]]:
    """Yields the path to each leaf, without the root, in the order of the search."""
    stack: list[tuple[Node, ...]] = [(root,)]
    while stack:
        path = stack.pop()
        children = path[-1].get("children") or []
        if not isinstance(children, list) or not all(isinstance(child, dict) for child in children):
            raise InvalidTrajectory("bad-tree", "`children` is not a list of nodes")
        if children:
            stack += [(*path, child) for child in reversed(children)]
        elif len(path) == 1:
            raise InvalidTrajectory("bad-tree", "the tree has no node but its root")
        else:
            yield path[1:]


def _ranked(leaves: list[tuple[Node, ...]]) -> list[tuple[int, tuple[Node, ...]]]:
    """Returns (number, path): winning paths first, then failing ones by the length that they share with the first."""
    winner = next((path for path in leaves if path[-1].get("finished") is True), ())

    def rank(item: tuple[int, tuple[Node, ...]]) -> tuple[bool, int]:
        shared = sum(node is other for node, other in zip(item[1], winner, strict=False))
        return item[1][-1].get("finished") is not True, -shared

    return sorted(enumerate(leaves), key=rank)


def _turns(
    path: tuple[Node, ...], tools: dict[str, dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[StepDropped | Repaired]]:
    """Returns (assistant and tool turns of a path, dropped steps and repairs)."""
    turns: list[dict[str, Any]] = []
    notes: list[StepDropped | Repaired] = []
    thoughts: list[str] = []
    action: str | None = None
    number = 0
    for i, node in enumerate(path):
        kind, text = field(node, "node_type", str), field(node, "description", str)
        if kind not in ("Thought", "Action", "Action Input") or (kind == "Action Input") != (action is not None):
            raise InvalidTrajectory("bad-tree", f"node {i} is '{kind[:200]}' after {'an' if action else 'no'} action")
        if kind == "Thought":
            thoughts.append(text.strip())
        elif kind == "Action":
            action = text
        else:
            try:
                arguments, repairs = _arguments(action or "", text, tools)
            except InvalidTrajectory as invalid:
                if i == len(path) - 1:
                    raise
                notes.append(StepDropped(invalid.reason, f"node {i}: {invalid.detail}"))
            else:
                notes += repairs
                number += 1
                turns.append(_assistant(thoughts) | {"tool_calls": [call(number, action or "", arguments)]})
                result = node.get("observation", "")
                turns.append({"role": "tool", "tool_call_id": f"call_{number}", "name": action, "content": result})
            action, thoughts = None, []
    if action is not None:
        raise InvalidTrajectory("call-without-input", f"the path ends in a call of '{action[:200]}' without its input")
    if path[-1]["node_type"] == "Thought":
        turns.append(_assistant(thoughts))
    else:
        turns.pop()
    return turns, notes


def _assistant(thoughts: list[str]) -> dict[str, Any]:
    return {"role": "assistant", "content": "\n\n".join(filter(None, thoughts))}


def _arguments(name: str, text: str, tools: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], list[Repaired]]:
    """Returns (arguments in `text` with their declared types, repairs). Raises `InvalidTrajectory`."""
    if name not in tools:
        raise InvalidTrajectory("undeclared-tool", f"'{name[:200]}' is called with {text[:200]}")
    repairs: list[Repaired] = []

    def note(reason: str, detail: str) -> None:
        repairs.append(Repaired(reason, detail))

    try:
        value = decode_arguments(text, f"'{name}' has", note)
    except InvalidTrajectory as invalid:
        value = _repaired(text, name, invalid, note)
    if not isinstance(value, dict):
        raise InvalidTrajectory("bad-arguments", f"'{name}' has a {type(value).__name__}, not an object: {text[:200]}")
    parameters = tools[name]["function"].get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    schemas = {key: schema for key, schema in (properties or {}).items() if isinstance(schema, dict)}
    arguments, changes = declared_arguments(name, value, schemas)
    return arguments, repairs + changes


def _repaired(text: str, name: str, invalid: InvalidTrajectory, note: Report) -> Any:
    """Returns the value of JSON with raw control characters, or of a Python literal; else raises `invalid`."""
    escaped = _STRING.sub(lambda match: match[0].translate(_CONTROL), text)
    if escaped != text:
        try:
            value = decode_arguments(escaped, f"'{name}' has", note)
        except InvalidTrajectory:
            pass
        else:
            note("raw-control-character", f"'{name}' has a control character in a string: {text[:200]!r}")
            return value
    try:
        value = literals.value(literals.expression(text))
    except ValueError:
        raise invalid from None
    note("python-literal", f"'{name}' has Python in place of JSON: {text[:200]}")
    return value


def _tools(functions: list[Any]) -> dict[str, dict[str, Any]]:
    tools: dict[str, dict[str, Any]] = {}
    for function in functions:
        name = field(function, "name", str)
        if name in tools:
            raise InvalidTrajectory("duplicate-tool", f"'{name}' is declared twice")
        if not isinstance(function.get("parameters"), dict | None):
            raise InvalidTrajectory("bad-tools", f"`parameters` of '{name}' is not an object")
        if not isinstance((function.get("parameters") or {}).get("properties"), dict | None):
            raise InvalidTrajectory("bad-tools", f"`properties` of '{name}' is not an object")
        tools[name] = {"type": "function", "function": function}
    return {**tools, "Finish": tools.get("Finish", FINISH)}


def _instruction(answer: dict[str, Any]) -> str:
    match answer.get("train_messages"):
        case [[{"role": "system", "content": str(text)}, *_], *_]:
            return text.strip()
    return INSTRUCTION


def _name(path: Path) -> str:
    """<group>_<query id> if the file and its folder have such names, else the file's name."""
    group = re.fullmatch(r"(G\d+)(_answer)?", path.absolute().parent.name)
    query = re.match(r"\d+(?=_|$)", stem(path))
    return f"{group[1]}_{query[0]}" if group and query else stem(path)


def _first_byte(path: Path) -> bytes:
    with open_bytes(path) as file:
        return file.read(1 << 10).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _read_document(path: Path) -> Iterator[Row]:
    """Yields the only object of a file as row 1."""
    with open_bytes(path) as file:
        text = file.read(LONGEST_ROW + 1)
    if len(text) > LONGEST_ROW:
        raise UserError(
            f"{path}: more than {LONGEST_ROW >> 20} MiB in one object; put each answer tree into a separate file"
        )
    try:
        row = parse_json(text)
        if not isinstance(row, dict):
            raise InvalidTrajectory("not-an-object", f"an answer is a JSON object, got a {type(row).__name__}")
        yield Row(1, 1, row)
    except InvalidTrajectory as invalid:
        yield Row(1, 1, invalid)
