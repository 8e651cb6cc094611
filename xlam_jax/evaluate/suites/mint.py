"""MINT (Wang et al., ICLR 2024, https://arxiv.org/abs/2309.10691): reasoning tasks within k = 1…5 turns.

In each turn the model runs Python code or proposes a solution; it may propose two (one if k is 1). The user provides
the data: `data/processed/<set>/test_prompts.json` of https://github.com/xingyaoww/mint-bench (Apache-2.0), JSON lines
with id, prompt and reference (and answer_type in theoremqa).

Code is only executed with `--set execute=yes`, in `xlam_jax.evaluate.sandbox`. Unlike in MINT, there is no Wikipedia
function, and no feedback by a second model. Answers are judged as in MINT: numbers within 5 %, words by containment,
TheoremQA by its types. The exception is multiple choice: MINT accepts any answer that contains the right letter, while
this suite parses the letter of the chosen option.
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
from xlam_jax.evaluate.arithmetic import evaluate
from xlam_jax.evaluate.sandbox import Sandbox, find_problem
from xlam_jax.evaluate.suite import Options, Outcome, Suite, Task, setting

if TYPE_CHECKING:
    from xlam_jax.evaluate.agents import Agent
    from xlam_jax.evaluate.endpoint import Model

SETS = ("gsm8k", "hotpotqa", "math", "mmlu", "theoremqa")
STEPS = (1, 2, 3, 4, 5)
SOLUTIONS = 2
"""Maximum number of proposed solutions per task, as in MINT."""

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
    """A task and its number of turns (`steps`)."""

    set: str
    prompt: str
    reference: Any
    answer_type: str
    steps: int


class Mint(Suite):
    """Success rate by number of turns."""

    name = "mint"
    about = "MINT: reasoning tasks in 1 to 5 turns, with Python code if --set execute=yes"
    main_score = "success"
    settings: ClassVar = {
        "k": "comma-separated numbers of turns, 1 to 5 (default: 1,2,3,4,5); each is evaluated separately",
        "sets": f"comma-separated sets of tasks (default: {','.join(SETS)})",
        "execute": "yes: execute the model's Python code, in a sandbox without network (default: no)",
        "seconds": "time limit for each piece of code (default: 30)",
        "memory_mb": "memory limit of the code's process (default: 2048)",
    }

    def __init__(self, options: Options):
        super().__init__(options)
        if options.data is None:
            raise UserError("mint: needs --data, a copy of https://github.com/xingyaoww/mint-bench")
        self._steps = [_parse_turn_count(text) for text in _split_setting(options, "k", ",".join(map(str, STEPS)))]
        self._sets = _split_setting(options, "sets", ",".join(SETS))
        for name in self._sets:
            if name not in SETS:
                raise UserError(f"sets: there is no '{name}'; known: {', '.join(SETS)}{nearest(name, SETS)}")
        execute = options.extra.get("execute", "no")
        if execute not in ("yes", "no"):
            raise UserError(f"execute: '{execute}' is neither yes nor no; use one of them")
        self._execute = execute == "yes"
        self._seconds = setting(options, "seconds", float, 30.0)
        self._memory = setting(options, "memory_mb", int, 2048)
        for name, limit in (("seconds", self._seconds), ("memory_mb", self._memory)):
            if not 0 < limit < math.inf:
                raise UserError(f"--set {name}={limit}: must be a number above 0")
        if self._execute and (problem := find_problem()):
            raise UserError(
                f"execute=yes: this machine does not allow a sandbox ({problem}), so no code is executed; fix that, or "
                "use execute=no"
            )
        self._folder = next(
            (path for path in (options.data / "data" / "processed", options.data) if _has_files(path, self._sets)), None
        )
        if self._folder is None:
            raise UserError(
                f"{options.data}: contains no {self._sets[0]}/test_prompts.json, also not in data/processed; "
                "check --data and --set sets=…"
            )
        example = options.data / "mint/tasks/in_context_examples/reasoning/with_tool.txt"
        self._example = example.read_text(encoding="utf-8") if self._execute and example.exists() else ""

    def tasks(self) -> list[Task]:
        """Returns the first task of each set with all numbers of turns, then the second of each, and so on."""
        assert self._folder
        by_set = [
            [self._make_tasks(name, row) for row in _read_rows(self._folder / name / "test_prompts.json")]
            for name in self._sets
        ]
        return [task for tasks in chain.from_iterable(zip_longest(*by_set)) if tasks for task in tasks]

    def _make_tasks(self, name: str, row: dict[str, Any]) -> list[Task]:
        prompt = row["prompt"].strip()
        if name == "theoremqa":
            prompt = f"Answer with a number, a list of numbers, or True or False. {prompt}"
        return [
            Task(
                f"{name}/{row['id']}@{steps}",
                Question(name, prompt, row["reference"], row.get("answer_type", ""), steps),
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
                        if is_right(question, proposal):
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
                remaining = f"{question.steps - step} turn(s) and {solutions - len(proposed)} solution(s) are left."
                if step < question.steps:
                    messages.append({"role": "user", "content": f"Observation:\n{observation}\n{remaining}"})
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
    """Returns the texts between pairs of marks, one line per pair.

    A regular expression would take quadratic time, as it would search to the end of the text from each opening mark.
    """
    parts, at = [], 0
    while (begin := text.find(opening, at)) >= 0 and (end := text.find(closing, begin + len(opening))) >= 0:
        parts.append(text[begin + len(opening) : end].strip())
        at = end + len(closing)
    return "\n".join(parts)


def _split_setting(options: Options, name: str, default: str) -> list[str]:
    names = [part.strip() for part in options.extra.get(name, default).split(",") if part.strip()]
    if not names:
        raise UserError(f"{name}: is empty; the default is {default}")
    return list(dict.fromkeys(names))


def _parse_turn_count(text: str) -> int:
    if text not in map(str, STEPS):
        raise UserError(f"k: '{text}' is not a supported number of turns; known: {', '.join(map(str, STEPS))}")
    return int(text)


def _has_files(folder: Path, sets: list[str]) -> bool:
    return all((folder / name / "test_prompts.json").exists() for name in sets)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for at, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{at}: is not valid JSON ({error})") from None
        if missing := [key for key in ("id", "prompt", "reference") if not isinstance(row, dict) or key not in row]:
            raise UserError(f"{path}:{at}: has no '{missing[0]}'; each line must have id, prompt and reference")
        if not isinstance(row["prompt"], str):
            raise UserError(f"{path}:{at}: 'prompt' is not a string: {row['prompt']!r}")
        rows.append(row)
    return rows


def is_right(question: Question, proposal: str) -> bool:
    """Returns whether a proposed solution is right."""
    if question.set == "theoremqa":
        return theoremqa(question.reference, question.answer_type, proposal)
    if question.set == "mmlu":
        return multiple_choice(question.prompt, str(question.reference), proposal)
    return reasoning(str(question.reference), proposal)


def reasoning(reference: str, proposal: str) -> bool:
    """Judges gsm8k, math and hotpotqa: a number within 5 % of the reference, or a text that contains the reference."""
    reference, proposal = reference.strip().lower(), proposal.strip().lower()
    try:
        return abs(float(reference) - float(proposal)) <= 0.05 * abs(float(reference))
    except ValueError:
        return reference in proposal


_OPTION = re.compile(r"(?<![a-z])([a-z])\s*\)")


def multiple_choice(prompt: str, reference: str, proposal: str) -> bool:
    """Judges mmlu: the letter of the right option, with or without its text, or the text alone."""
    reference, proposal = reference.strip().lower().strip("() "), proposal.strip().lower()
    letters = set(_OPTION.findall(proposal)) or set(re.findall(r"^\(?([a-z])\)?[.:]?$", proposal))
    if letters:
        return letters == {reference}
    texts = {letter: text for letter, text in _options(prompt).items() if text and text in proposal}
    longest = max(texts.values(), key=len, default="")
    return bool(longest) and texts.get(reference) == longest


def _options(prompt: str) -> dict[str, str]:
    """Parses `Options: ['A) 1', 'B) 2']` or `Options: A ) 1 , B ) 2` into letter → text."""
    *_, listed = prompt.lower().rpartition("options:")
    letters = list(_OPTION.finditer(listed))
    ends = [mark.start() for mark in letters[1:]] + [len(listed)]
    return {mark[1]: listed[mark.end() : end].strip(" ,.'\"[]\n") for mark, end in zip(letters, ends, strict=True)}


def theoremqa(reference: Any, answer_type: str, proposal: str) -> bool:
    """Judges theoremqa by type: bool and option exactly, integers after rounding, floats within 4 %, lists in any
    order."""
    answer = _parse_value(proposal)
    match answer_type.lower():
        case "bool":
            return isinstance(answer, bool) and answer == reference
        case "option":
            return answer == str(reference).strip("() ").lower()
        case "integer" | "float":
            return _is_close(answer, reference)
        case "list of integer" | "list of float":
            if not isinstance(answer, list) or not isinstance(reference, list) or len(answer) != len(reference):
                return False
            if not all(isinstance(value, int | float) for value in answer):
                return False
            return all(
                _is_close(value, expected) for value, expected in zip(sorted(answer), sorted(reference), strict=True)
            )
    return False


def _is_close(value: Any, reference: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool) or not isinstance(reference, int | float):
        return False
    try:
        if isinstance(reference, float):
            return abs(value - reference) <= 0.04 * abs(reference)
        return round(value) == reference
    except (OverflowError, ValueError):
        return False


def _parse_value(text: str) -> Any:
    """Parses an answer: a number, a list of numbers, a truth value, or the letter of an option; None otherwise."""
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
        numbers = [_parse_number(part) for part in parts]
        return numbers if numbers and None not in numbers else _parse_number(text)
    return _parse_number(text)


LONGEST_NUMBER = 500
"""Maximum length of a number with its unit, in characters."""
LONGEST_LIST = 1000
"""Maximum length of a list of numbers."""


def _parse_number(text: str) -> float | int | None:
    """Parses a number, with or without a unit before or after it, or an arithmetic expression."""
    text = text.strip()
    if len(text) > LONGEST_NUMBER:
        return None
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    for shape in (r"(.*)", r"([-+]?[\d.,]*\d(?:e[-+]?\d+)?)\s*[^\d\s]\S*", r"[^-+\d\s]\S*\s*([-+]?[\d.,]*\d)"):
        if (match := re.fullmatch(shape, text, re.DOTALL)) is None:
            continue
        try:
            return evaluate(ast.parse(match[1].replace(",", ""), mode="eval").body)
        except (SyntaxError, ValueError, ArithmeticError, RecursionError):
            continue
    return None
