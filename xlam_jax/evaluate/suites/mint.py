"""MINT (Wang et al., ICLR 2024, https://arxiv.org/abs/2309.10691): reasoning tasks within k = 1…5 turns.

In each turn the model runs Python code or proposes a solution, of which it has two (one where k is 1). Data are the
user's: `data/processed/<set>/test_prompts.json` of https://github.com/xingyaoww/mint-bench (Apache-2.0), JSON lines of
id, prompt, reference (and answer_type in theoremqa).

Code is only executed with `--set execute=yes`, in `xlam_jax.evaluate.sandbox`. There is no Wikipedia there, which MINT
gives as a function, and no feedback in words by a second model. Answers are judged as MINT does: numbers within 5 %,
words by containment, TheoremQA by its types; but letters of options are read as letters, where MINT's own code takes
any answer in which the letter occurs.
"""

import ast
import json
import math
import re
from contextlib import AsyncExitStack
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from xlam_jax.errors import UserError, nearest
from xlam_jax.evaluate.arithmetic import number
from xlam_jax.evaluate.sandbox import Sandbox, why_not
from xlam_jax.evaluate.suite import Options, Outcome, Suite, Task, setting

if TYPE_CHECKING:
    from xlam_jax.evaluate.agents import Agent
    from xlam_jax.evaluate.endpoint import Model

SETS = ("gsm8k", "hotpotqa", "math", "mmlu", "theoremqa")
STEPS = (1, 2, 3, 4, 5)
SOLUTIONS = 2
"""That may be proposed, as in MINT."""

PROMPT = """You solve a task in turns. {tools}

In each turn first write what you think, as <thought> ... </thought>. Then do one of these:
{choices}

You have {steps} turn(s) in all, and may propose a solution {solutions} time(s).
{example}
Task:
{task}"""
WITH_CODE = "A Python session is there for you; its variables last from turn to turn. It has no network."
WITHOUT_CODE = "There are no tools: work it out yourself."
CODE = "- run Python code, and see in the next turn what it prints: ```python\nprint(1 + 1)\n```"
SOLVE = "- propose a solution, in the form that the task asks for: <solution> 42 </solution>"
NOT_UNDERSTOOD = (
    "That was not understood. Write code as ```python\n...\n```, or a solution as <solution> ... </solution>."
)
NOT_EXECUTED = "Code is not executed here. Propose a solution as <solution> ... </solution>."
WRONG = "Your answer is wrong."


class Question(NamedTuple):
    """A task and the turns for it."""

    set: str
    prompt: str
    reference: Any
    answer_type: str
    steps: int


class Mint(Suite):
    """Success by the number of turns."""

    name = "mint"
    about = "MINT: reasoning tasks in 1 to 5 turns, with Python where --set execute=yes"
    main_score = "success"
    settings: ClassVar = {
        "k": "numbers of turns with commas, 1 to 5 (default: 1,2,3,4,5); each is a run of its own",
        "sets": f"sets of tasks with commas (default: {','.join(SETS)})",
        "execute": "yes: the model's Python code is executed, shut in without network (default: no)",
        "seconds": "for a piece of code (default: 30)",
        "memory_mb": "for the code's process (default: 2048)",
    }

    def __init__(self, options: Options):
        super().__init__(options)
        if options.data is None:
            raise UserError("mint: needs --data, a copy of https://github.com/xingyaoww/mint-bench")
        self._steps = [_step(one) for one in _parts(options, "k", ",".join(map(str, STEPS)))]
        self._sets = _parts(options, "sets", ",".join(SETS))
        for one in self._sets:
            if one not in SETS:
                raise UserError(f"sets: no '{one}'; known: {', '.join(SETS)}{nearest(one, SETS)}")
        execute = options.extra.get("execute", "no")
        if execute not in ("yes", "no"):
            raise UserError(f"execute: '{execute}' is neither yes nor no")
        self._execute = execute == "yes"
        self._seconds = setting(options, "seconds", float, 30.0)
        self._memory = setting(options, "memory_mb", int, 2048)
        for name, limit in (("seconds", self._seconds), ("memory_mb", self._memory)):
            if not 0 < limit < math.inf:
                raise UserError(f"--set {name}={limit}: is no number over 0")
        if self._execute and (problem := why_not()):
            raise UserError(f"execute=yes: the code cannot be shut in on this machine ({problem}); so it is not run")
        self._folder = next(
            (path for path in (options.data / "data" / "processed", options.data) if _files(path, self._sets)), None
        )
        if self._folder is None:
            raise UserError(f"{options.data}: holds no {self._sets[0]}/test_prompts.json, nor data/processed with it")
        example = options.data / "mint/tasks/in_context_examples/reasoning/with_tool.txt"
        self._example = example.read_text(encoding="utf-8") if self._execute and example.exists() else ""

    def tasks(self) -> list[Task]:
        """Of each set its first task with all numbers of turns, then of each its second, and so on."""
        assert self._folder
        by_set = [
            [self._of(name, row) for row in _rows(self._folder / name / "test_prompts.json")] for name in self._sets
        ]
        return [task for tasks in chain.from_iterable(zip_longest(*by_set)) if tasks for task in tasks]

    def _of(self, name: str, row: dict[str, Any]) -> list[Task]:
        asked = row["prompt"].strip()
        if name == "theoremqa":
            asked = f"Answer with a number, a list of numbers, or True or False. {asked}"
        return [
            Task(
                f"{name}/{row['id']}@{steps}",
                Question(name, asked, row["reference"], row.get("answer_type", ""), steps),
                f"{steps}-step",
            )
            for steps in self._steps
        ]

    async def run(self, task: Task, model: "Model", agent: "Agent") -> Outcome:
        question: Question = task.data
        solutions = min(SOLUTIONS, question.steps)
        prompt = PROMPT.format(
            tools=WITH_CODE if self._execute else WITHOUT_CODE,
            choices="\n".join([CODE, SOLVE] if self._execute else [SOLVE]),
            steps=question.steps,
            solutions=solutions,
            example=f"\n---\n{self._example}\n---\n" if self._example else "",
            task=question.prompt,
        )
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
        proposed: list[str] = []
        code_run = 0
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(self._sandbox()) if self._execute else None
            for step in range(1, question.steps + 1):
                answer = await model.chat(messages)
                messages.append(answer.message)
                if "<solution>" in answer.content:
                    proposal = between(answer.content, "<solution>", "</solution>")
                    if proposal:
                        proposed.append(proposal)
                        if right(question, proposal):
                            return self._outcome(question, messages, proposed, code_run, step, "")
                        observation = WRONG
                    else:
                        observation = NOT_UNDERSTOOD
                elif code := between(answer.content, "```python", "```"):
                    observation = await session.run(code) if session else NOT_EXECUTED
                    code_run += session is not None
                else:
                    observation = NOT_UNDERSTOOD
                if len(proposed) == solutions:
                    break
                left = f"{question.steps - step} turn(s) and {solutions - len(proposed)} solution(s) are left."
                if step < question.steps:
                    messages.append({"role": "user", "content": f"Observation:\n{observation}\n{left}"})
        failure = "wrong-answer" if proposed else "no-answer"
        return self._outcome(question, messages, proposed, code_run, None, failure)

    def _sandbox(self) -> Sandbox:
        return Sandbox(seconds=self._seconds, memory_mb=self._memory)

    def _outcome(
        self,
        question: Question,
        messages: list[dict[str, Any]],
        proposed: list[str],
        code_run: int,
        solved_at: int | None,
        failure: str,
    ) -> Outcome:
        details = {
            "set": question.set,
            "steps": question.steps,
            "proposed": proposed,
            "expected": question.reference,
            "code_run": code_run,
            "solved_at": solved_at,
        }
        return Outcome({"success": float(solved_at is not None)}, messages, failure, details)


def between(text: str, opening: str, closing: str) -> str:
    """What is between marks, a line for each pair. A pattern would search to the end of the text from each opening."""
    parts, at = [], 0
    while (begin := text.find(opening, at)) >= 0 and (end := text.find(closing, begin + len(opening))) >= 0:
        parts.append(text[begin + len(opening) : end].strip())
        at = end + len(closing)
    return "\n".join(parts)


def _parts(options: Options, name: str, default: str) -> list[str]:
    parts = [part.strip() for part in options.extra.get(name, default).split(",") if part.strip()]
    if not parts:
        raise UserError(f"{name}: names nothing; the default is {default}")
    return list(dict.fromkeys(parts))


def _step(text: str) -> int:
    if text not in map(str, STEPS):
        raise UserError(f"k: '{text}' is no number of turns; known: {', '.join(map(str, STEPS))}")
    return int(text)


def _files(folder: Path, sets: list[str]) -> bool:
    return all((folder / name / "test_prompts.json").exists() for name in sets)


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for at, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{at}: is no JSON ({error})") from None
        if missing := [key for key in ("id", "prompt", "reference") if not isinstance(row, dict) or key not in row]:
            raise UserError(f"{path}:{at}: has no '{missing[0]}'; a line is an object of id, prompt and reference")
        if not isinstance(row["prompt"], str):
            raise UserError(f"{path}:{at}: 'prompt' is no text: {row['prompt']!r}")
        rows.append(row)
    return rows


def right(question: Question, proposal: str) -> bool:
    """Whether a proposed solution is right."""
    if question.set == "theoremqa":
        return theoremqa(question.reference, question.answer_type, proposal)
    if question.set == "mmlu":
        return multiple_choice(question.prompt, str(question.reference), proposal)
    return reasoning(str(question.reference), proposal)


def reasoning(reference: str, proposal: str) -> bool:
    """Two numbers within 5 % of the reference; else the reference's words are in the answer. gsm8k, math, hotpotqa."""
    reference, proposal = reference.strip().lower(), proposal.strip().lower()
    try:
        return abs(float(reference) - float(proposal)) <= 0.05 * abs(float(reference))
    except ValueError:
        return reference in proposal


_OPTION = re.compile(r"(?<![a-z])([a-z])\s*\)")


def multiple_choice(prompt: str, reference: str, proposal: str) -> bool:
    """The letter of the right option, with or without its text; or that text alone. mmlu."""
    reference, proposal = reference.strip().lower().strip("() "), proposal.strip().lower()
    letters = set(_OPTION.findall(proposal)) or set(re.findall(r"^\(?([a-z])\)?[.:]?$", proposal))
    if letters:
        return letters == {reference}
    texts = {letter: text for letter, text in _options(prompt).items() if text and text in proposal}
    longest = max(texts.values(), key=len, default="")
    return bool(longest) and texts.get(reference) == longest


def _options(prompt: str) -> dict[str, str]:
    """Letter → text, from `Options: ['A) 1', 'B) 2']` or `Options: A ) 1 , B ) 2`."""
    *_, listed = prompt.lower().rpartition("options:")
    marks = list(_OPTION.finditer(listed))
    ends = [mark.start() for mark in marks[1:]] + [len(listed)]
    return {mark[1]: listed[mark.end() : end].strip(" ,.'\"[]\n") for mark, end in zip(marks, ends, strict=True)}


def theoremqa(reference: Any, answer_type: str, proposal: str) -> bool:
    """By TheoremQA's types: bool and option exactly, integers when rounded, floats within 4 %, lists in any order."""
    found = _value(proposal)
    match answer_type.lower():
        case "bool":
            return isinstance(found, bool) and found == reference
        case "option":
            return found == str(reference).strip("() ").lower()
        case "integer" | "float":
            return _close(found, reference)
        case "list of integer" | "list of float":
            if not isinstance(found, list) or not isinstance(reference, list) or len(found) != len(reference):
                return False
            if not all(isinstance(one, int | float) for one in found):
                return False
            return all(_close(one, other) for one, other in zip(sorted(found), sorted(reference), strict=True))
    return False


def _close(found: Any, reference: Any) -> bool:
    if not isinstance(found, int | float) or isinstance(found, bool) or not isinstance(reference, int | float):
        return False
    try:
        if isinstance(reference, float):
            return abs(found - reference) <= 0.04 * abs(reference)
        return round(found) == reference
    except (OverflowError, ValueError):
        return False


def _value(text: str) -> Any:
    """What an answer in words stands for: a number, a list of numbers, a truth value, or an option's letter."""
    text = re.split(r"[=≈]", text)[-1]
    text = re.sub(r"[`$°]|approximately|about", "", text).split(" or ")[0].strip().rstrip(".")
    lower = text.lower()
    if lower in ("true", "yes", "false", "no") or re.search(r"\b(True|False)\b", text):
        return "true" in lower or lower == "yes"
    if option := re.search(r"(?<![a-z])\(?([a-d])\s*\)", lower) or re.fullmatch(r"([a-d])", lower):
        return option[1]
    text = re.sub(r"10\^\{?(-?\d+)\}?", r"10**(\1)", text)
    text = text.replace(" x ", "*").replace("×", "*").replace("\\times", "*").replace("^", "**")
    if "[" in text or "(" in text[:1] or "{" in text[:1]:
        opening = re.search(r"[\[({]", text)
        last = max(map(text.rfind, "])}"))
        parts = text[opening.end() : last].split(",") if opening and last > opening.start() else []
        if len(parts) > LONGEST_LIST:
            return None
        numbers = [_one(part) for part in parts]
        return numbers if numbers and None not in numbers else _one(text)
    return _one(text)


LONGEST_NUMBER = 500
"""Characters of a number, its unit with it."""
LONGEST_LIST = 1000
"""Numbers of an answer; each is parsed."""


def _one(text: str) -> float | int | None:
    """A number, with a unit before or after it or without, or an expression of numbers."""
    text = text.strip()
    if len(text) > LONGEST_NUMBER:
        return None
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    for shape in (r"(.*)", r"([-+]?[\d.,]*\d(?:e[-+]?\d+)?)\s*[^\d\s]\S*", r"[^-+\d\s]\S*\s*([-+]?[\d.,]*\d)"):
        if (found := re.fullmatch(shape, text, re.DOTALL)) is None:
            continue
        try:
            return number(ast.parse(found[1].replace(",", ""), mode="eval").body)
        except (SyntaxError, ValueError, ArithmeticError, RecursionError):
            continue
    return None
