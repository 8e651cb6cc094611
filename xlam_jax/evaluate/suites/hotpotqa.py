"""HotpotQA (Yang et al., arXiv 1809.09600) as agents play it since ReAct (arXiv 2210.03629): search a page, look up
words in it, finish with an answer. As in BOLAA (arXiv 2308.05960) scores are also told by difficulty.

The questions are the user's: HotpotQA's own files (CC BY-SA 4.0), or any rows with `question` and `answer`.
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
from xlam_jax.evaluate.suites._rows import read_rows, wanted

SENTENCES = 5
"""Of a page that are shown when it is found."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED = ("yes", "no", "noanswer")

TOOLS = [
    text_tool("search", "Opens the page of that title and shows its beginning; else names similar titles.", "query"),
    text_tool("lookup", "Shows the next sentence of the open page that holds the words.", "words"),
    text_tool("finish", "Gives the answer, as short as it can be, and ends the task.", "answer"),
]


def normalized(answer: str) -> str:
    """An answer as HotpotQA's evaluation compares it: lower case, without punctuation, articles and extra spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> bool:
    """HotpotQA's EM."""
    return normalized(answer) == normalized(gold)


def f1(answer: str, gold: str) -> float:
    """HotpotQA's F1, of words; yes, no and noanswer are right or wrong, and nothing between."""
    one, other = normalized(answer), normalized(gold)
    if one != other and (one in _CLOSED or other in _CLOSED):
        return 0.0
    words, gold_words = one.split(), other.split()
    same = sum((Counter(words) & Counter(gold_words)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(words), same / len(gold_words)
    return 2 * precision * recall / (precision + recall)


class HotpotQA(AgentSuite):
    """`f1` and `em` as HotpotQA's evaluation has them; `accuracy` is AgentLite's: the answer is the recorded text."""

    name = "hotpotqa"
    about = "questions over pages: search, lookup, finish (--data QUESTIONS --set corpus=PAGES)"
    main_score = "f1"
    settings: ClassVar[Mapping[str, str]] = {
        **AgentSuite.settings,
        "corpus": "JSONL or SQLite of pages (title, text); without it the pages that come with the questions",
        "wikipedia": "in place of a corpus: a live one's api.php, such as https://en.wikipedia.org/w/api.php",
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
                    "Stockholm City Hall is the seat of Stockholm Municipality. It stands on the tip of Kungsholmen.",
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
    labour = {  # noqa: RUF012 - as the base class has it
        "search_agent": ["search", "lookup"],
        "answer_agent": ["finish"],
    }

    def __init__(self, options: Options):
        super().__init__(options)
        path = wanted(self.name, options.data, "a .jsonl or .json file of questions with their answers")
        corpus = setting(options, "corpus", str, "")
        wikipedia = setting(options, "wikipedia", str, "")
        if corpus and wikipedia:
            raise UserError(f"--set corpus={corpus} and --set wikipedia={wikipedia}: give one of them")
        if wikipedia:
            check_address("--set wikipedia", wikipedia)
        self._tasks: list[Task] = []
        pages: dict[str, str] = {}
        for number, row in read_rows(path, "question", "question", "answer"):
            for key in ("question", "answer"):
                if not isinstance(row[key], str):
                    raise UserError(f"{path}:{number}: '{key}' is no text: {row[key]!r}")
            if not corpus and not wikipedia:
                pages.update(_context(path, number, row))
            data = {"question": row["question"], "answer": row["answer"]}
            name = row.get("_id", row.get("id", number))
            self._tasks.append(Task(str(name), data, str(row.get("level") or "")))
        if not self._tasks:
            raise UserError(f"{path}: holds no question")
        self._corpus: Local | Wikipedia
        if wikipedia:
            self._corpus = Wikipedia(wikipedia)
        else:
            self._corpus = Local.open(Path(corpus)) if corpus else Local.of(pages.items())

    def tasks(self) -> list[Task]:
        """The questions in the order of the file."""
        return self._tasks

    def environment(self, task: Task) -> "Reading":
        """A reader of its own."""
        return Reading(self._corpus)

    def close(self) -> None:
        """Closes the corpus."""
        self._corpus.close()


def _context(path: Path, number: int, row: dict[str, Any]) -> dict[str, str]:
    """The pages that come with a question of HotpotQA's files: `context` is [[title, [sentences]], …], or the columns
    {"title": […], "sentences": [[…], …]}."""
    context = row.get("context")
    try:
        if isinstance(context, dict):
            context = list(zip(context.get("title") or [], context.get("sentences") or [], strict=False))
        pages = {title: "".join(sentences) for title, sentences in context} if context else _none(path, number)
        if not all(isinstance(title, str) for title in pages):
            raise TypeError("a title is a text")
        return pages
    except (TypeError, ValueError):
        raise UserError(f"{path}:{number}: its `context` is no list of [title, [sentences]]") from None


def _none(path: Path, number: int) -> dict[str, str]:
    raise UserError(
        f"{path}:{number}: the question brings no pages (`context`); give them with --set corpus=FILE, or --set "
        "wikipedia=URL"
    )


class Reading:
    """One question, and the page that is open."""

    def __init__(self, corpus: Corpus):
        self._corpus = corpus
        self._sentences: list[str] = []
        self._found: list[str] = []
        self._words = ""
        self._shown = 0
        self._gold = ""
        self._answer: str | None = None

    async def reset(self, task: Task) -> tuple[str, list[dict[str, Any]]]:
        """The question, and search, lookup and finish."""
        self._gold = task.data["answer"]
        return f"Question: {task.data['question']}", TOOLS

    async def step(self, action: ToolCall) -> Step:
        """Does one of the three."""
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
        self._sentences, self._words = sentences(page[1]), ""
        return " ".join(self._sentences[:SENTENCES]) or "The page is empty."

    def _lookup(self, words: str) -> str:
        if not self._sentences:
            return "No page is open; search one first."
        if words != self._words:
            self._words, self._shown = words, 0
            self._found = [one for one in self._sentences if words.lower() in one.lower()]
        if self._shown >= len(self._found):
            return "No more results." if self._found else f"The page does not hold {words!r}."
        self._shown += 1
        return f"({self._shown} of {len(self._found)}) {self._found[self._shown - 1]}"

    def outcome(self) -> tuple[Mapping[str, float], str, Mapping[str, Any]]:
        """F1, EM and accuracy; a question without an answer has none of them."""
        answer = self._answer or ""
        scores = {
            "f1": f1(answer, self._gold),
            "em": float(exact_match(answer, self._gold)),
            "accuracy": float(answer == self._gold.strip()),
        }
        failure = "no-answer" if not answer else "" if scores["em"] else "wrong-answer"
        return scores, failure, {"answer": self._answer, "expected": self._gold}


def sentences(text: str) -> list[str]:
    """A text's sentences, roughly."""
    parts = [part for line in text.splitlines() for part in re.split(r"(?<=[.!?])\s+(?=[\"“'(\[]?[A-Z0-9])", line)]
    return [part.strip() for part in parts if part.strip()]
