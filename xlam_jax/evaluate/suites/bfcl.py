"""BFCL, the Berkeley Function Calling Leaderboard (v4): are the right functions called, with the right arguments?

Data and checkers are those of the package bfcl-eval. Single turns are one request; the calls are compared with the
possible answers, or it is seen whether there are any. In multi-turn tasks the model's calls are executed in BFCL's
simulated classes, up to twenty steps a turn and one more, and the states that result are compared.

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
from xlam_jax.evaluate.bfcl.calls import Call, NoCalls, parse, source, system_prompt, tools
from xlam_jax.evaluate.bfcl.rows import Row
from xlam_jax.evaluate.suite import Options, Outcome, Suite, Task

if TYPE_CHECKING:
    from xlam_jax.evaluate.agents import Agent
    from xlam_jax.evaluate.endpoint import Answer, Model


class Bfcl(Suite):
    """The categories that need no service of others: all but memory and web search."""

    name = "bfcl"
    about = "Berkeley Function Calling Leaderboard: single and multi-turn calls, and when not to call (bfcl-eval)"
    overall: ClassVar[str] = "mean of rows"
    settings: ClassVar = {
        "categories": f"names of categories and groups with commas (default: all): {', '.join(rows.GROUPS)}",
        "mode": "fc: functions are tools of the request (default); prompt: they are in the system prompt",
    }

    def __init__(self, options: Options):
        super().__init__(options)
        self._mode = options.extra.get("mode", "fc")
        if self._mode not in package.MODES:
            known = ", ".join(package.MODES)
            raise UserError(f"mode: '{self._mode}' is none; known: {known}{nearest(self._mode, package.MODES)}")
        self._categories = rows.chosen(options.extra.get("categories", "all"))
        self._folder = package.data_folder(options.data)
        package.prompts()

    def tasks(self) -> list[Task]:
        """The categories in turn: one task of each, then the next of each, so that a limit leaves none out."""
        read = [
            [Task(row.id, row, category) for row in rows.read(self._folder, category)] for category in self._categories
        ]
        return [task for task in chain.from_iterable(zip_longest(*read)) if task is not None]

    async def run(self, task: Task, model: "Model", agent: "Agent") -> Outcome:
        row: Row = task.data
        if row.category in rows.MULTI_TURN:
            return await self._turns(row, model)
        chat = _Chat(self._mode, row)
        chat.say(row.turns[0])
        answer = await chat.ask(model)
        calls = chat.calls(answer)
        verdict = self._check(row, calls)
        details = {
            "result": chat.result(answer),
            "expected": row.expected,
            "checker": verdict.words,
            "unreadable_calls": int(chat.unreadable(answer)),
        }
        return Outcome({"accuracy": float(verdict.valid)}, chat.messages, verdict.kind, details)

    def notes(self, summary: Mapping[str, Any]) -> list[str]:
        """What the number over all rows is not, and which answers were right only because they cannot be read."""
        notes = [
            f"'{self.overall}' is not the leaderboard's overall number: that one weighs groups of categories (agentic "
            "40 %, multi-turn 30 %, and 10 % each live, non-live and irrelevance), and agentic is not run here"
        ]
        for name, group in summary.get("groups", {}).items():
            if name in ("irrelevance", "live_irrelevance") and (count := group.get("unreadable_calls")):
                notes.append(
                    f"{name}: {count} of {group['scored']} answers were meant as calls and cannot be read; they count "
                    "as no call, and so as right, as in bfcl-eval"
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

    async def _turns(self, row: Row, model: "Model") -> Outcome:
        chat = _Chat(self._mode, row)
        done: list[list[list[str]]] = []  # turn, step, call
        results: list[list[Any]] = []
        unreadable = 0
        with package.World(row.raw) as world:
            for turn, messages in enumerate(row.turns):
                if turn in row.held_back:
                    messages = chat.hand_out(row.held_back[turn])
                chat.say(messages)
                done.append([])
                results.append([])
                steps = 0
                while steps <= package.prompts().MAXIMUM_STEP_LIMIT:
                    answer = await chat.ask(model)
                    results[-1].append(chat.result(answer))
                    unreadable += chat.unreadable(answer)
                    calls = chat.calls(answer)
                    if not calls:
                        break
                    written = [source(call, world.methods) for call in calls]
                    done[-1].append(written)
                    chat.hear(answer, written, world.execute(written))
                    steps += 1
                else:
                    break  # as in BFCL, in the last turn what was done may still be right
            if len(done) < len(row.turns):
                verdict = package.Verdict(False, "steps-used-up")
            else:
                verdict = world.check(done, row.expected)
        details = {
            "result": results,
            "expected": row.expected,
            "checker": verdict.words,
            "unreadable_calls": unreadable,
        }
        return Outcome({"accuracy": float(verdict.valid)}, chat.messages, verdict.kind, details)


_CALL = re.compile(r"[`\s]*+(?:python\s++)?+\[?\s*+[A-Za-z_][\w.]*+\(")
"""The beginning of a list of calls as the prompt asks for it."""


class _Chat:
    """The conversation of a task, in one of the two ways of asking."""

    def __init__(self, mode: str, row: Row):
        self._fc = mode == "fc"
        self._language = row.language
        self._functions = rows.described(row.functions, row.language)
        self.messages: list[dict[str, Any]] = []

    def say(self, messages: Sequence[dict[str, Any]]) -> None:
        """The user's words."""
        said = [dict(message) for message in messages]
        if not self._fc and not self.messages:
            prompt = system_prompt(self._functions)
            if said[0]["role"] == "system":
                said[0]["content"] = f"{prompt}\n\n{said[0]['content']}"
            else:
                said.insert(0, {"role": "system", "content": prompt})
        self.messages.extend(said)

    def hand_out(self, functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Gives the model functions that were held back; returns the words that go with them."""
        texts = package.prompts()
        if self._fc:
            self._functions = [*self._functions, *functions]
            return [{"role": "user", "content": texts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC}]
        words = texts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_PROMPTING.format(functions=functions)
        return [{"role": "user", "content": words}]

    async def ask(self, model: "Model") -> "Answer":
        answer = await model.chat(self.messages, tools(self._functions) if self._fc else None)
        self.messages.append(answer.message)
        return answer

    def calls(self, answer: "Answer") -> list[Call] | None:
        """The answer's calls, None where it has none that can be read."""
        if self._fc:
            return [(call.name, call.arguments) for call in answer.calls] or None
        try:
            return parse(answer.content, self._language)
        except NoCalls:
            return None

    def unreadable(self, answer: "Answer") -> bool:
        """Whether the answer was meant as calls that cannot be read."""
        if self._fc:
            return answer.unreadable
        return self.calls(answer) is None and _CALL.match(answer.content) is not None

    def result(self, answer: "Answer") -> Any:
        """The answer as bfcl-eval's own files of results have it."""
        if self._fc and answer.calls:
            return [{call.name: json.dumps(call.arguments, ensure_ascii=False)} for call in answer.calls]
        return answer.content

    def hear(self, answer: "Answer", calls: Sequence[str], results: Sequence[str]) -> None:
        """What the calls gave."""
        if self._fc:
            for call, result in zip(answer.calls, results, strict=True):
                self.messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result})
        else:
            told = [{"role": "tool", "name": call, "content": one} for call, one in zip(calls, results, strict=True)]
            self.messages.append({"role": "user", "content": repr(told)})
