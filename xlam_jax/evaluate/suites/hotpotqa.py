"""HotpotQA (Yang et al., arXiv 1809.09600) in the form of ReAct (arXiv 2210.03629): the agent searches a page, looks up
words in it, and finishes with an answer. As in BOLAA (arXiv 2308.05960), scores are also reported by difficulty.

The user provides the questions: HotpotQA's own files (CC BY-SA 4.0), or any rows with `question` and `answer`.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.errors import UserError, check_address
from xlam_jax.evaluate.corpus import Corpus, Local, Wikipedia
from xlam_jax.evaluate.suite import AgentSuite, Demonstration, Options, Step, Task, setting, text_tool
from xlam_jax.evaluate.suites._rows import check_data, read_rows

SENTENCES = 5
"""Number of sentences in the result of a search."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED = ("yes", "no", "noanswer")

TOOLS = [
    text_tool("search", "Opens the page of that title and shows its beginning; else names similar titles.", "query"),
    text_tool("lookup", "Shows the next sentence of the open page that contains the words.", "words"),
    text_tool("finish", "Gives the answer, as short as it can be, and ends the task.", "answer"),
]


def normalize(answer: str) -> str:
    """Normalizes an answer as HotpotQA's evaluation does: lower case, no punctuation, articles or extra spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> bool:
    """Returns whether two answers are equal after `normalize`: HotpotQA's exact match (EM)."""
    return normalize(answer) == normalize(gold)


def f1(answer: str, gold: str) -> float:
    """Returns HotpotQA's F1 of words, 0 to 1. For the answers yes, no and noanswer it is 0 or 1."""
    normalized, normalized_gold = normalize(answer), normalize(gold)
    if normalized != normalized_gold and (normalized in _CLOSED or normalized_gold in _CLOSED):
        return 0.0
    words, gold_words = normalized.split(), normalized_gold.split()
    common = sum((Counter(words) & Counter(gold_words)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(words), common / len(gold_words)
    return 2 * precision * recall / (precision + recall)


class HotpotQA(AgentSuite):
    """`f1` and `em` are those of HotpotQA's evaluation; `accuracy` is AgentLite's: the answer is the recorded text."""

    name = "hotpotqa"
    about = "questions over pages: search, lookup, finish (--data QUESTIONS --set corpus=PAGES)"
    main_score = "f1"
    settings: ClassVar[Mapping[str, str]] = {
        **AgentSuite.settings,
        "corpus": "JSONL or SQLite file of pages (title, text); default: the pages in the questions' `context`",
        "wikipedia": "instead of a corpus: api.php of a live Wikipedia, e.g. https://en.wikipedia.org/w/api.php",
    }
    max_steps = 10
    examples = (
        Demonstration(
            "Question: Was the architect of Stockholm's Nordic Museum born before the one of its city hall?",
            "Find who built each of the two, look up when each of them was born, and compare the years.",
            (
                (
                    "I need the architects of the Nordic Museum and of Stockholm City Hall, and their years of birth.",
                    ToolCall(None, "search", {"query": "Nordic Museum"}),
                    "The Nordic Museum is a museum in Stockholm. It was designed by Isak Gustaf Clason.",
                ),
                (
                    "The museum's architect is Isak Gustaf Clason. Now the year of his birth.",
                    ToolCall(None, "search", {"query": "Isak Gustaf Clason"}),
                    "Isak Gustaf Clason (30 July 1856 – 19 July 1930) was a Swedish architect.",
                ),
                (
                    "Clason was born in 1856. Now the architect of the city hall.",
                    ToolCall(None, "search", {"query": "Stockholm City Hall"}),
                    "Stockholm City Hall is the seat of Stockholm Municipality. It is on the tip of Kungsholmen.",
                ),
                (
                    "The page's beginning does not name the architect.",
                    ToolCall(None, "lookup", {"words": "architect"}),
                    "(1 of 2) It was built from 1911 to 1923 to the plans of the architect Ragnar Östberg.",
                ),
                (
                    "Now the year in which Östberg was born.",
                    ToolCall(None, "search", {"query": "Ragnar Östberg"}),
                    "Ragnar Östberg (14 July 1866 – 5 February 1945) was a Swedish architect.",
                ),
                ("1856 is before 1866, so the answer is yes.", ToolCall(None, "finish", {"answer": "yes"}), ""),
            ),
        ),
    )
    labour = {  # noqa: RUF012 - declared in the base class
        "search_agent": ["search", "lookup"],
        "answer_agent": ["finish"],
    }

    def __init__(self, options: Options):
        super().__init__(options)
        path = check_data(self.name, options.data, "a .jsonl or .json file of questions with their answers")
        corpus = setting(options, "corpus", str, "")
        wikipedia = setting(options, "wikipedia", str, "")
        if corpus and wikipedia:
            raise UserError(f"--set corpus={corpus} and --set wikipedia={wikipedia}: set only one of them")
        if wikipedia:
            check_address("--set wikipedia", wikipedia)
        self._tasks: list[Task] = []
        pages: dict[str, str] = {}
        for number, row in read_rows(path, "question", "question", "answer"):
            for key in ("question", "answer"):
                if not isinstance(row[key], str):
                    raise UserError(f"{path}:{number}: '{key}' is not a string: {row[key]!r}")
            if not corpus and not wikipedia:
                pages.update(_context(path, number, row))
            data = {"question": row["question"], "answer": row["answer"]}
            name = row.get("_id", row.get("id", number))
            self._tasks.append(Task(str(name), data, str(row.get("level") or "")))
        if not self._tasks:
            raise UserError(f"{path}: contains no questions")
        self._corpus: Local | Wikipedia
        if wikipedia:
            self._corpus = Wikipedia(wikipedia)
        else:
            self._corpus = Local.open(Path(corpus)) if corpus else Local.of(pages.items())

    def tasks(self) -> list[Task]:
        """Returns the questions in the order of the file."""
        return self._tasks

    def environment(self, task: Task) -> "Reading":
        """Returns a new environment."""
        return Reading(self._corpus)

    def close(self) -> None:
        """Closes the corpus."""
        self._corpus.close()


def _context(path: Path, number: int, row: dict[str, Any]) -> dict[str, str]:
    """Returns the pages (title → text) in a question of HotpotQA's files. `context` is [[title, [sentences]], …], or it
    has columns: {"title": […], "sentences": [[…], …]}."""
    context = row.get("context")
    try:
        if isinstance(context, dict):
            context = list(zip(context.get("title") or [], context.get("sentences") or [], strict=False))
        pages = (
            {title: "".join(sentences) for title, sentences in context}
            if context
            else _refuse_without_pages(path, number)
        )
        if not all(isinstance(title, str) for title in pages):
            raise TypeError("a title is not a string")
        return pages
    except (TypeError, ValueError):
        raise UserError(f"{path}:{number}: `context` is not a list of [title, [sentences]]") from None


def _refuse_without_pages(path: Path, number: int) -> dict[str, str]:
    raise UserError(
        f"{path}:{number}: the question has no pages (`context`); set --set corpus=FILE or --set wikipedia=URL"
    )


class Reading:
    """The environment of one question, with the open page."""

    def __init__(self, corpus: Corpus):
        self._corpus = corpus
        self._sentences: list[str] = []
        self._matches: list[str] = []
        self._words = ""
        self._shown = 0
        self._gold = ""
        self._answer: str | None = None

    async def reset(self, task: Task) -> tuple[str, list[dict[str, Any]]]:
        """Returns the question, and the tools search, lookup and finish."""
        self._gold = task.data["answer"]
        return f"Question: {task.data['question']}", TOOLS

    async def step(self, action: ToolCall) -> Step:
        """Executes search, lookup or finish."""
        argument = str(next(iter(action.arguments.values()), "")).strip()
        if action.name == "search":
            return Step(await self._search(argument))
        if action.name == "lookup":
            return Step(self._lookup(argument))
        self._answer = argument
        score = f1(argument, self._gold)
        return Step("The answer is taken.", score, done=True)

    async def _search(self, title: str) -> str:
        page = await self._corpus.page(title) if title else None
        if page is None:
            similar = await self._corpus.similar(title) if title else []
            return f"There is no page {title!r}. " + (
                f"Similar: {', '.join(similar)}." if similar else "None is similar."
            )
        self._sentences, self._words = split_sentences(page[1]), ""
        return " ".join(self._sentences[:SENTENCES]) or "The page is empty."

    def _lookup(self, words: str) -> str:
        if not self._sentences:
            return "No page is open; search one first."
        if words != self._words:
            self._words, self._shown = words, 0
            self._matches = [sentence for sentence in self._sentences if words.lower() in sentence.lower()]
        if self._shown >= len(self._matches):
            return "No more results." if self._matches else f"The page does not contain {words!r}."
        self._shown += 1
        return f"({self._shown} of {len(self._matches)}) {self._matches[self._shown - 1]}"

    def outcome(self) -> tuple[Mapping[str, float], str, Mapping[str, Any]]:
        """Returns F1, EM and accuracy; all are 0 without an answer."""
        answer = self._answer or ""
        scores = {
            "f1": f1(answer, self._gold),
            "em": float(exact_match(answer, self._gold)),
            "accuracy": float(answer == self._gold.strip()),
        }
        failure = "no-answer" if not answer else "" if scores["em"] else "wrong-answer"
        return scores, failure, {"answer": self._answer, "expected": self._gold}


def split_sentences(text: str) -> list[str]:
    """Splits a text into sentences, approximately."""
    parts = [part for line in text.splitlines() for part in re.split(r"(?<=[.!?])\s+(?=[\"“'(\[]?[A-Z0-9])", line)]
    return [part.strip() for part in parts if part.strip()]
