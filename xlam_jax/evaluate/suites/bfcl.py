"""BFCL, the Berkeley Function Calling Leaderboard (v4): are the right functions called, with the right arguments?

Data and checkers are those of the package bfcl-eval. Single-turn tasks are one request, whose calls are compared with
the possible answers; the relevance categories only check whether there are calls. In multi-turn tasks the model's calls
are executed in BFCL's simulated classes, up to 21 steps per turn, and the resulting states are compared.

Patil et al., The Berkeley Function Calling Leaderboard: From Tool Use to Agentic Evaluation of Large Language Models,
ICML 2025; https://gorilla.cs.berkeley.edu/leaderboard.html
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, ClassVar

from xlam_jax.errors import UserError, nearest
from xlam_jax.evaluate.bfcl import package, rows
from xlam_jax.evaluate.bfcl.calls import Call, NoCalls, parse, system_prompt, to_source, tools
from xlam_jax.evaluate.bfcl.rows import Row
from xlam_jax.evaluate.suite import Options, Outcome, Suite, Task

if TYPE_CHECKING:
    from xlam_jax.evaluate.agents import Agent
    from xlam_jax.evaluate.endpoint import Answer, Model


class Bfcl(Suite):
    """The categories that need no external services: all but memory and web search."""

    name = "bfcl"
    about = "Berkeley Function Calling Leaderboard: single and multi-turn calls, and when not to call (bfcl-eval)"
    overall: ClassVar[str] = "mean of rows"
    settings: ClassVar = {
        "categories": f"comma-separated categories and groups (default: all): {', '.join(rows.GROUPS)}",
        "mode": "fc: functions are tools of the request (default); prompt: they are in the system prompt",
    }

    def __init__(self, options: Options):
        super().__init__(options)
        self._mode = options.extra.get("mode", "fc")
        if self._mode not in package.MODES:
            modes = ", ".join(package.MODES)
            raise UserError(f"mode: there is no '{self._mode}'; known: {modes}{nearest(self._mode, package.MODES)}")
        self._categories = rows.parse_categories(options.extra.get("categories", "all"))
        self._folder = package.data_folder(options.data)
        package.prompts()

    def tasks(self) -> list[Task]:
        """Returns the first task of each category, then the second of each, and so on: `--limit` covers them all."""
        by_category = [
            [Task(row.id, row, category) for row in rows.read_rows(self._folder, category)]
            for category in self._categories
        ]
        return [task for task in chain.from_iterable(zip_longest(*by_category)) if task is not None]

    async def run(self, task: Task, model: "Model", agent: "Agent") -> Outcome:
        row: Row = task.data
        if row.category in rows.MULTI_TURN:
            return await self._run_turns(row, model)
        chat = _Chat(self._mode, row)
        chat.add_user(row.turns[0])
        answer = await chat.ask(model)
        calls = chat.get_calls(answer)
        verdict = self._check(row, calls)
        details = {
            "result": chat.get_result(answer),
            "expected": row.expected,
            "checker": verdict.words,
            "unreadable_calls": int(chat.is_unreadable(answer)),
        }
        return Outcome({"accuracy": float(verdict.valid)}, chat.messages, verdict.kind, details)

    def notes(self, summary: Mapping[str, Any]) -> list[str]:
        """Explains the mean of rows, and counts answers that are right only because they cannot be parsed."""
        notes = [
            f"'{self.overall}' is not the leaderboard's overall number, which weights groups of categories (agentic "
            "40 %, multi-turn 30 %, and 10 % each live, non-live and irrelevance); agentic tasks are not supported here"
        ]
        for name, group in summary.get("groups", {}).items():
            if name in ("irrelevance", "live_irrelevance") and (count := group.get("unreadable_calls")):
                notes.append(
                    f"{name}: {count} of {group['scored']} answers were meant as calls but cannot be parsed; they "
                    "count as no call, and therefore as right, as in bfcl-eval"
                )
        return notes

    def _check(self, row: Row, calls: list[Call] | None) -> package.Verdict:
        if row.category in rows.RELEVANCE:
            if row.category == "live_relevance":
                return package.Verdict(bool(calls), "" if calls else "no-call")
            return package.Verdict(not calls, "called" if calls else "")
        if calls is None:
            return package.Verdict(False, "no-call")
        named = [{name: arguments} for name, arguments in calls]
        functions = row.functions
        return package.check_calls(functions, named, row.expected, row.category, row.language, self._mode)

    async def _run_turns(self, row: Row, model: "Model") -> Outcome:
        chat = _Chat(self._mode, row)
        calls_by_turn: list[list[list[str]]] = []  # turn, step, call
        results: list[list[Any]] = []
        unreadable = 0
        with package.World(row.raw) as world:
            for turn, messages in enumerate(row.turns):
                if turn in row.held_back:
                    messages = chat.add_functions(row.held_back[turn])
                chat.add_user(messages)
                calls_by_turn.append([])
                results.append([])
                steps = 0
                while steps <= package.prompts().MAXIMUM_STEP_LIMIT:
                    answer = await chat.ask(model)
                    results[-1].append(chat.get_result(answer))
                    unreadable += chat.is_unreadable(answer)
                    calls = chat.get_calls(answer)
                    if not calls:
                        break
                    sources = [to_source(call, world.methods) for call in calls]
                    calls_by_turn[-1].append(sources)
                    chat.add_results(answer, sources, world.execute(sources))
                    steps += 1
                else:
                    break  # as in BFCL, the last turn may still be right
            if len(calls_by_turn) < len(row.turns):
                verdict = package.Verdict(False, "steps-used-up")
            else:
                verdict = world.check(calls_by_turn, row.expected)
        details = {
            "result": results,
            "expected": row.expected,
            "checker": verdict.words,
            "unreadable_calls": unreadable,
        }
        return Outcome({"accuracy": float(verdict.valid)}, chat.messages, verdict.kind, details)


_CALL = re.compile(r"[`\s]*+(?:python\s++)?+\[?\s*+[A-Za-z_][\w.]*+\(")
"""The beginning of a list of calls, in the form that the prompt requests."""


class _Chat:
    """The conversation of a task, in one of the two modes."""

    def __init__(self, mode: str, row: Row):
        self._fc = mode == "fc"
        self._language = row.language
        self._functions = rows.describe(row.functions, row.language)
        self.messages: list[dict[str, Any]] = []

    def add_user(self, messages: Sequence[dict[str, Any]]) -> None:
        """Appends messages of the user, after the system prompt in prompt mode."""
        added = [dict(message) for message in messages]
        if not self._fc and not self.messages:
            prompt = system_prompt(self._functions)
            if added[0]["role"] == "system":
                added[0]["content"] = f"{prompt}\n\n{added[0]['content']}"
            else:
                added.insert(0, {"role": "system", "content": prompt})
        self.messages.extend(added)

    def add_functions(self, functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Adds functions that were held back; returns the message that announces them."""
        texts = package.prompts()
        if self._fc:
            self._functions = [*self._functions, *functions]
            return [{"role": "user", "content": texts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC}]
        text = texts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_PROMPTING.format(functions=functions)
        return [{"role": "user", "content": text}]

    async def ask(self, model: "Model") -> "Answer":
        answer = await model.chat(self.messages, tools(self._functions) if self._fc else None)
        self.messages.append(answer.message)
        return answer

    def get_calls(self, answer: "Answer") -> list[Call] | None:
        """Returns the calls of an answer; None if it has none or they cannot be parsed."""
        if self._fc:
            return [(call.name, call.arguments) for call in answer.calls] or None
        try:
            return parse(answer.content, self._language)
        except NoCalls:
            return None

    def is_unreadable(self, answer: "Answer") -> bool:
        """Returns whether the answer was meant as calls, but cannot be parsed."""
        if self._fc:
            return answer.unreadable
        return self.get_calls(answer) is None and _CALL.match(answer.content) is not None

    def get_result(self, answer: "Answer") -> Any:
        """Returns the answer in the form of bfcl-eval's result files."""
        if self._fc and answer.calls:
            return [{call.name: json.dumps(call.arguments, ensure_ascii=False)} for call in answer.calls]
        return answer.content

    def add_results(self, answer: "Answer", calls: Sequence[str], results: Sequence[str]) -> None:
        """Appends the results of the calls."""
        if self._fc:
            for call, result in zip(answer.calls, results, strict=True):
                self.messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result})
        else:
            observed = [
                {"role": "tool", "name": call, "content": content} for call, content in zip(calls, results, strict=True)
            ]
            self.messages.append({"role": "user", "content": repr(observed)})
