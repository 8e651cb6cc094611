"""ToolBench (Qin et al., ICLR 2024, https://arxiv.org/abs/2307.16789) as StableToolBench keeps it
(https://arxiv.org/abs/2403.07714): queries for real web APIs, a server that plays the APIs, a model as judge.

The queries are the user's: `solvable_queries` of https://github.com/THUNLP-MT/StableToolBench (Apache-2.0). The server
is the one of that repository (`server/main.py` or `main_mirrorapi_cache.py`), or any that takes the same POST. The pass
rate is StableToolBench's solvable pass rate: 1 for an answer that solves the query, 0.5 where the judge is unsure, 0
else; the judge's prompt is our own. An answer is sought in one line of actions (their CoT); there is no tree search.
"""

import asyncio
import json
import re
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from xlam_jax.client.completion import resolve_key
from xlam_jax.data.trajectory import ToolCall
from xlam_jax.data.wire import objects_in
from xlam_jax.errors import UserError, check_address, nearest
from xlam_jax.evaluate.endpoint import EndpointFault, Model
from xlam_jax.evaluate.suite import AgentSuite, Options, Outcome, Step, Task
from xlam_jax.evaluate.suites._rows import read_rows, wanted

if TYPE_CHECKING:
    import httpx2

    from xlam_jax.evaluate.agents import Agent

SUBSETS = ("G1_instruction", "G1_tool", "G1_category", "G2_instruction", "G2_category", "G3_instruction")
LONGEST_RESULT = 1024
"""Characters of a result that the model is shown."""
TRIES = 3
"""Of a request to the tool server that failed, with pauses of 1, 2, … seconds between them."""
FINISH = "Finish"

INSTRUCTION = """Answer the user's query with the help of functions. A function may fail: then try another, or other
arguments. When you know the answer call Finish with it; it is all that the user sees, so it has to hold everything
that was asked for. If the functions cannot answer the query, call Finish with give_up_and_restart.

Query: """
JUDGE = """You judge whether an assistant solved a user's query. You are given the query, the functions that the
assistant had, what it called and was told, and its final answer.

Solved: the final answer gives all that was asked for, and it follows from what the functions returned.
Unsolved: the answer is missing, refuses, leaves out a part, or is not what the functions returned.
Unsure: what is there is not enough to tell.

Answer with one JSON object and nothing else:
{"reason": "one or two sentences", "status": "Solved", "Unsolved" or "Unsure"}"""
SCORES = {"solved": 1.0, "unsure": 0.5, "unsolved": 0.0}


class Toolbench(AgentSuite):
    """Pass rate by subset."""

    name = "toolbench"
    about = "ToolBench's solvable queries over a tool server, pass rate by a judge (--data DIR --set server=URL …)"
    main_score = "pass_rate"
    agent = "native"
    max_steps = 12
    settings: ClassVar = {
        **AgentSuite.settings,
        "server": "address that plays the tools, such as http://localhost:8080/virtual",
        "toolbench_key": "that the tool server wants (default: the variable TOOLBENCH_KEY, or EMPTY)",
        "subsets": f"with commas (default: those that are there of {', '.join(SUBSETS)})",
        "judge": "the judge model's server, up to and with /v1",
        "judge_model": "the name under which that server has it",
        "judge_key": "that the judge's server wants (default: the variable OPENAI_API_KEY, or EMPTY)",
    }

    def __init__(self, options: Options):
        super().__init__(options)
        data = wanted(self.name, options.data, "a copy of StableToolBench's solvable_queries")
        self._server = _needed(options, "server", "the address of a running tool server")
        self._judge = _needed(options, "judge", "the server of a judge model, up to and with /v1")
        check_address("--set server", self._server)
        check_address("--set judge", self._judge)
        self._judge_model = _needed(options, "judge_model", "the name of the judge model")
        self._judge_key = options.extra.get("judge_key")
        self._key = resolve_key(options.extra.get("toolbench_key"), "--set toolbench_key", "TOOLBENCH_KEY")
        folders = [data / "solvable_queries", data]
        root = next((one for one in folders if (one / "test_instruction").is_dir()), data)
        queries = root / "test_instruction" if (root / "test_instruction").is_dir() else root
        there = [one for one in SUBSETS if (queries / f"{one}.json").exists()]
        asked = [part.strip() for part in options.extra.get("subsets", ",".join(there)).split(",") if part.strip()]
        for one in asked:
            if one not in there:
                known = ", ".join(there) or "none"
                raise UserError(
                    f"--set subsets={one}: {queries} has no {one}.json; there: {known}{nearest(one, there)}"
                )
        if not asked:
            raise UserError(f"{queries}: holds none of {', '.join(f'{one}.json' for one in SUBSETS)}")
        self._by_subset = [
            _tasks(queries / f"{one}.json", root / "test_query_ids" / f"{one}.json", one) for one in asked
        ]

    def tasks(self) -> list[Task]:
        """Of each subset its first query, then of each its second, and so on."""
        return [task for task in chain.from_iterable(zip_longest(*self._by_subset)) if task is not None]

    def environment(self, task: Task) -> "Tools":
        return Tools(self._server, self._key)

    async def run(self, task: Task, model: Model, agent: "Agent") -> Outcome:
        outcome = await super().run(task, model, agent)
        if outcome.details["answer"] is None:
            return outcome
        tools = [one["function"] for one in _functions(task.data)[0]]
        status, reason = await self._judged(task.data["query"], tools, outcome)
        details = {**outcome.details, "status": status, "reason": reason}
        failure = "" if status == "solved" else status
        return outcome._replace(scores={"pass_rate": SCORES[status]}, failure=failure, details=details)

    async def _judged(self, query: str, tools: list[dict[str, Any]], outcome: Outcome) -> tuple[str, str]:
        """(solved, unsure or unsolved; why). Raises `EndpointFault` where there is no verdict."""
        done = [one for one in outcome.details["done"] if one["name"] != FINISH]
        parts = {"Query": query, "Functions": tools, "Calls": done, "Final answer": outcome.details["answer"]}
        text = "\n\n".join(
            f"{name}:\n{part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)}"
            for name, part in parts.items()
        )
        messages = [{"role": "system", "content": JUDGE}, {"role": "user", "content": text}]
        try:
            async with Model.connect(self._judge, self._judge_model, api_key=self._judge_key) as judge:
                content = (await judge.chat(messages)).content
        except EndpointFault as fault:
            raise EndpointFault(fault.kind, f"the judge: {fault}", outcome.messages) from None
        verdict = next((found for found in reversed(list(objects_in(content))) if "status" in found), {})
        status = str(verdict.get("status")).strip().lower()
        if status not in SCORES:
            raise EndpointFault("malformed", f"the judge: no verdict in {content[:200]!r}", outcome.messages)
        return status, str(verdict.get("reason", ""))


class Api(NamedTuple):
    """A function as the tool server knows it."""

    category: str
    tool: str
    name: str


class Tools:
    """The APIs of one query."""

    def __init__(self, server: str, key: str):
        self._server, self._key = server, key
        self._apis: dict[str, Api] = {}
        self._client: httpx2.AsyncClient | None = None
        self._answer: str | None = None
        self._gave_up = False
        self._done: list[dict[str, Any]] = []

    async def reset(self, task: Task) -> tuple[str, list[dict[str, Any]]]:
        import httpx2

        self._client = httpx2.AsyncClient(timeout=120.0, headers={"toolbench_key": self._key})
        tools, self._apis = _functions(task.data)
        return INSTRUCTION + task.data["query"], tools

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def step(self, action: ToolCall) -> Step:
        if action.name == FINISH:
            step = self._finish(action.arguments)
        else:
            result = await self._call(self._apis[action.name], action.arguments)
            step = Step(result if len(result) <= LONGEST_RESULT else f"{result[:LONGEST_RESULT]}...")
        self._done.append({"name": action.name, "arguments": action.arguments, "result": step.observation})
        return step

    def _finish(self, arguments: dict[str, Any]) -> Step:
        if arguments.get("return_type") == "give_up_and_restart":
            self._gave_up = True
            return Step("Given up.", done=True)
        answer = arguments.get("final_answer")
        if not isinstance(answer, str) or not answer.strip():
            return Step('{"error": "must have final_answer"}')
        self._answer = answer
        return Step("The final answer was given.", done=True)

    async def _call(self, api: Api, arguments: dict[str, Any]) -> str:
        import httpx2

        assert self._client
        asked = {
            "category": api.category,
            "tool_name": api.tool,
            "api_name": api.name,
            "tool_input": arguments,
            "strip": "",
            "toolbench_key": self._key,
        }
        fault = ""
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(attempt)
            try:
                response = await self._client.post(self._server, json=asked)
                if response.status_code < 500 and response.status_code != 429:
                    response.raise_for_status()
                    return json.dumps(response.json(), ensure_ascii=False)
                fault = f"answered {response.status_code}"
            except httpx2.HTTPStatusError as error:
                fault = f"answered {error.response.status_code}; is that the address of its `virtual`?"
                break
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                fault = f"cannot be reached ({error or type(error).__name__})"
            except ValueError:
                fault = "answered what is no JSON"
        raise EndpointFault("environment", f"the tool server {self._server} {fault}")

    def outcome(self) -> tuple[dict[str, float], str, dict[str, Any]]:
        failure = "gave-up" if self._gave_up else "no-answer" if self._answer is None else "not-judged"
        return {"pass_rate": 0.0}, failure, {"answer": self._answer, "done": self._done}


def _needed(options: Options, name: str, what: str) -> str:
    if not (value := options.extra.get(name, "")):
        raise UserError(f"--suite toolbench: --set {name}=… is missing: {what}")
    return value


def _tasks(path: Path, ids: Path, subset: str) -> list[Task]:
    kept: set[str] | None = None
    if ids.exists():
        try:
            kept = {str(one) for one in json.loads(ids.read_text(encoding="utf-8"))}
        except ValueError as error:
            raise UserError(f"{ids}: is no JSON ({error})") from None
    tasks = []
    for number, row in read_rows(path, "query", "query", "api_list"):
        name = str(row.get("query_id", number))
        if kept is None or name in kept:
            tasks.append(Task(f"{subset}/{name}", row, subset))
    return tasks


_JSON_TYPES = {"NUMBER": "number", "STRING": "string", "BOOLEAN": "boolean"}
_RESERVED = ("from", "class", "return", "false", "true", "id", "and")


def _functions(row: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Api]]:
    """A query's APIs as tools in OpenAI form, and what the server calls each of them."""
    tools, apis = [], {}
    for one in row["api_list"]:
        tool, api = standard(one["tool_name"]), _renamed(standard(one["api_name"]))
        name = f"{api}_for_{tool}"[-64:]
        if name in apis:
            continue
        apis[name] = Api(one["category_name"], tool, api)
        properties = {}
        for parameter in [*(one.get("required_parameters") or ()), *(one.get("optional_parameters") or ())]:
            schema: dict[str, Any] = {"type": _JSON_TYPES.get(str(parameter.get("type")).upper(), "string")}
            schema["description"] = str(parameter.get("description") or "")[:256]
            if (example := parameter.get("default")) not in (None, ""):
                schema["description"] = f"{schema['description']} (for example: {example})".strip()
            properties[_renamed(standard(parameter["name"]))] = schema
        required = [_renamed(standard(parameter["name"])) for parameter in one.get("required_parameters") or ()]
        described = str(one.get("api_description") or "").strip()[:256]
        function = {
            "name": name,
            "description": f"A function of the tool {tool}. {described}".strip(),
            "parameters": {"type": "object", "properties": properties, "required": required},
        }
        tools.append({"type": "function", "function": function})
    tools.append({"type": "function", "function": _FINISH})
    return tools, apis


_FINISH = {
    "name": FINISH,
    "description": "Ends the task: with the final answer, or by giving up.",
    "parameters": {
        "type": "object",
        "properties": {
            "return_type": {"type": "string", "enum": ["give_answer", "give_up_and_restart"]},
            "final_answer": {"type": "string", "description": "All that the user is told; with give_answer."},
        },
        "required": ["return_type"],
    },
}


def standard(name: str) -> str:
    """A name as ToolBench writes it in code: small letters, digits and single underscores."""
    name = re.sub(r"_+", "_", re.sub(r"[^\u4e00-\u9fa5a-zA-Z0-9_^]", "_", name)).lower().strip("_")
    return f"get_{name}" if name[:1].isdigit() else name


def _renamed(name: str) -> str:
    return f"is_{name}" if name in _RESERVED else name
