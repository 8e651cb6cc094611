"""ToolBench (Qin et al., ICLR 2024, https://arxiv.org/abs/2307.16789) in the version of StableToolBench
(https://arxiv.org/abs/2403.07714): queries for real web APIs, a server that simulates the APIs, and a model as judge.

The user provides the queries: `solvable_queries` of https://github.com/THUNLP-MT/StableToolBench (Apache-2.0). The
server is the one in that repository (`server/main.py` or `main_mirrorapi_cache.py`), or any with the same POST request.
The pass rate is StableToolBench's solvable pass rate: 1 if the answer solves the query, 0.5 if the judge is unsure, 0
otherwise; the judge's prompt is our own. The agent takes a single sequence of actions (their CoT), without tree search.
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
from xlam_jax.evaluate.suites._rows import check_data, read_rows

if TYPE_CHECKING:
    import httpx2

    from xlam_jax.evaluate.agents import Agent

SUBSETS = ("G1_instruction", "G1_tool", "G1_category", "G2_instruction", "G2_category", "G3_instruction")
LONGEST_RESULT = 1024
"""Maximum length of a result in the conversation, in characters."""
TRIES = 3
"""Number of attempts for a request to the tool server, with pauses of 1, 2, … seconds."""
FINISH = "Finish"

INSTRUCTION = """Answer the user's query with the help of functions. A function may fail: then try another, or other
arguments. When you know the answer call Finish with it; it is all that the user sees, so it has to hold everything
that was asked for. If the functions cannot answer the query, call Finish with give_up_and_restart.

Query: """
JUDGE = """You judge whether an assistant solved a user's query. You are given the query, the functions that the
assistant had, its calls and their results, and its final answer.

Solved: the final answer gives all that was asked for, and it follows from what the functions returned.
Unsolved: the answer is missing, refuses, omits a part, or is not what the functions returned.
Unsure: there is not enough information to decide.

Answer with one JSON object and nothing else:
{"reason": "one or two sentences", "status": "Solved", "Unsolved" or "Unsure"}"""
SCORES = {"solved": 1.0, "unsure": 0.5, "unsolved": 0.0}


class Toolbench(AgentSuite):
    """Pass rate by subset; see the module's docstring."""

    name = "toolbench"
    about = "ToolBench's solvable queries on a tool server, pass rate by a judge (--data DIR --set server=URL …)"
    main_score = "pass_rate"
    agent = "native"
    max_steps = 12
    settings: ClassVar = {
        **AgentSuite.settings,
        "server": "address of the tool server, such as http://localhost:8080/virtual",
        "toolbench_key": "API key of the tool server (default: the variable TOOLBENCH_KEY, or EMPTY)",
        "subsets": f"comma-separated (default: the existing ones of {', '.join(SUBSETS)})",
        "judge": "address of the judge model's server, including /v1",
        "judge_model": "name of the judge model on that server",
        "judge_key": "API key of the judge's server (default: the variable OPENAI_API_KEY, or EMPTY)",
    }

    def __init__(self, options: Options):
        super().__init__(options)
        data = check_data(self.name, options.data, "a copy of StableToolBench's solvable_queries")
        self._server = _require_setting(options, "server", "the address of a running tool server")
        self._judge = _require_setting(options, "judge", "the address of the judge model's server, including /v1")
        check_address("--set server", self._server)
        check_address("--set judge", self._judge)
        self._judge_model = _require_setting(options, "judge_model", "the name of the judge model")
        self._judge_key = options.extra.get("judge_key")
        self._key = resolve_key(options.extra.get("toolbench_key"), "--set toolbench_key", "TOOLBENCH_KEY")
        folders = [data / "solvable_queries", data]
        root = next((folder for folder in folders if (folder / "test_instruction").is_dir()), data)
        queries = root / "test_instruction" if (root / "test_instruction").is_dir() else root
        available = [subset for subset in SUBSETS if (queries / f"{subset}.json").exists()]
        subsets = [
            part.strip() for part in options.extra.get("subsets", ",".join(available)).split(",") if part.strip()
        ]
        for subset in subsets:
            if subset not in available:
                names = ", ".join(available) or "none"
                raise UserError(
                    f"--set subsets={subset}: {queries} has no {subset}.json; available: {names}"
                    f"{nearest(subset, available)}"
                )
        if not subsets:
            raise UserError(f"{queries}: contains none of {', '.join(f'{subset}.json' for subset in SUBSETS)}")
        self._by_subset = [
            _tasks(queries / f"{subset}.json", root / "test_query_ids" / f"{subset}.json", subset) for subset in subsets
        ]

    def tasks(self) -> list[Task]:
        """Returns the first query of each subset, then the second of each, and so on."""
        return [task for task in chain.from_iterable(zip_longest(*self._by_subset)) if task is not None]

    def environment(self, task: Task) -> "Tools":
        return Tools(self._server, self._key)

    async def run(self, task: Task, model: Model, agent: "Agent") -> Outcome:
        outcome = await super().run(task, model, agent)
        if outcome.details["answer"] is None:
            return outcome
        tools = [tool["function"] for tool in _functions(task.data)[0]]
        status, reason = await self._judge_answer(task.data["query"], tools, outcome)
        details = {**outcome.details, "status": status, "reason": reason}
        failure = "" if status == "solved" else status
        return outcome._replace(scores={"pass_rate": SCORES[status]}, failure=failure, details=details)

    async def _judge_answer(self, query: str, tools: list[dict[str, Any]], outcome: Outcome) -> tuple[str, str]:
        """Returns (solved, unsure or unsolved; reason). Raises `EndpointFault` if there is no verdict."""
        calls = [call for call in outcome.details["done"] if call["name"] != FINISH]
        parts = {"Query": query, "Functions": tools, "Calls": calls, "Final answer": outcome.details["answer"]}
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
        verdict = next((candidate for candidate in reversed(list(objects_in(content))) if "status" in candidate), {})
        status = str(verdict.get("status")).strip().lower()
        if status not in SCORES:
            raise EndpointFault("malformed", f"the judge: no verdict in {content[:200]!r}", outcome.messages)
        return status, str(verdict.get("reason", ""))


class Api(NamedTuple):
    """The names of a function on the tool server."""

    category: str
    tool: str
    name: str


class Tools:
    """The environment of one query: its APIs on the tool server."""

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
        body = {
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
                response = await self._client.post(self._server, json=body)
                if response.status_code < 500 and response.status_code != 429:
                    response.raise_for_status()
                    return json.dumps(response.json(), ensure_ascii=False)
                fault = f"answered {response.status_code}"
            except httpx2.HTTPStatusError as error:
                fault = f"answered {error.response.status_code}; check that the address is that of its `virtual`"
                break
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                fault = f"cannot be reached ({error or type(error).__name__})"
            except ValueError:
                fault = "sent an answer that is not JSON"
        raise EndpointFault("environment", f"the tool server {self._server} {fault}")

    def outcome(self) -> tuple[dict[str, float], str, dict[str, Any]]:
        failure = "gave-up" if self._gave_up else "no-answer" if self._answer is None else "not-judged"
        return {"pass_rate": 0.0}, failure, {"answer": self._answer, "done": self._done}


def _require_setting(options: Options, name: str, expected: str) -> str:
    if not (value := options.extra.get(name, "")):
        raise UserError(f"--suite toolbench: --set {name}=… is missing: {expected}")
    return value


def _tasks(path: Path, ids: Path, subset: str) -> list[Task]:
    solvable: set[str] | None = None
    if ids.exists():
        try:
            solvable = {str(query_id) for query_id in json.loads(ids.read_text(encoding="utf-8"))}
        except ValueError as error:
            raise UserError(f"{ids}: is not valid JSON ({error})") from None
    tasks = []
    for number, row in read_rows(path, "query", "query", "api_list"):
        name = str(row.get("query_id", number))
        if solvable is None or name in solvable:
            tasks.append(Task(f"{subset}/{name}", row, subset))
    return tasks


_JSON_TYPES = {"NUMBER": "number", "STRING": "string", "BOOLEAN": "boolean"}
_RESERVED = ("from", "class", "return", "false", "true", "id", "and")


def _functions(row: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Api]]:
    """Returns a query's APIs as tools in OpenAI form, and their names on the server."""
    tools, apis = [], {}
    for item in row["api_list"]:
        tool, api = normalize_name(item["tool_name"]), _avoid_reserved(normalize_name(item["api_name"]))
        name = f"{api}_for_{tool}"[-64:]
        if name in apis:
            continue
        apis[name] = Api(item["category_name"], tool, api)
        properties = {}
        for parameter in [*(item.get("required_parameters") or ()), *(item.get("optional_parameters") or ())]:
            schema: dict[str, Any] = {"type": _JSON_TYPES.get(str(parameter.get("type")).upper(), "string")}
            schema["description"] = str(parameter.get("description") or "")[:256]
            if (example := parameter.get("default")) not in (None, ""):
                schema["description"] = f"{schema['description']} (for example: {example})".strip()
            properties[_avoid_reserved(normalize_name(parameter["name"]))] = schema
        required = [
            _avoid_reserved(normalize_name(parameter["name"])) for parameter in item.get("required_parameters") or ()
        ]
        description = str(item.get("api_description") or "").strip()[:256]
        function = {
            "name": name,
            "description": f"A function of the tool {tool}. {description}".strip(),
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
            "final_answer": {"type": "string", "description": "All that the user sees; with give_answer."},
        },
        "required": ["return_type"],
    },
}


def normalize_name(name: str) -> str:
    """Normalizes a name as ToolBench's code does: lower-case letters, digits and single underscores."""
    name = re.sub(r"_+", "_", re.sub(r"[^\u4e00-\u9fa5a-zA-Z0-9_^]", "_", name)).lower().strip("_")
    return f"get_{name}" if name[:1].isdigit() else name


def _avoid_reserved(name: str) -> str:
    return f"is_{name}" if name in _RESERVED else name
