"""WebShop (Yao et al., arXiv 2207.01206): buy the product that a request describes, on the original server or one with
the same pages.

Each page is fetched and shown as text, with [clickable elements] in brackets, as in ReAct's prompts. The suite follows
the links, forms and options of the pages. The server computes the reward of a purchase.
"""

from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any, ClassVar
from urllib.parse import urljoin

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.errors import UserError, check_address, nearest
from xlam_jax.evaluate._http import fetch
from xlam_jax.evaluate.endpoint import EndpointFault
from xlam_jax.evaluate.suite import AgentSuite, Demonstration, Options, Step, Task, setting, text_tool

SCORE = "Your score (min 0.0, max 1.0)"
TOOLS = [
    text_tool("search", "Searches the shop; possible where the page has [Search].", "query"),
    text_tool("click", "Clicks an element in [brackets] on the page: a button, product or option.", "element"),
]
_EMPTY = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_HIDDEN = {"script", "style", "head", "title", "iframe"}


class WebShop(AgentSuite):
    """Buys what a request describes.

    Scores: `reward`, 0 to 1, as the server computes it, and `success`, 1 where the reward is 1. Without a purchase both
    are 0.
    """

    name = "webshop"
    about = "buy what a request describes, at a WebShop server (--set url=http://localhost:3000)"
    main_score = "reward"
    settings: ClassVar[Mapping[str, str]] = {
        **AgentSuite.settings,
        "url": "the server's address (default: http://localhost:3000)",
        "tasks": "number N of requests, fixed_0 … fixed_N-1 (default: 500, the original's test split)",
    }
    max_steps = 15
    examples = (
        Demonstration(
            "Instruction: i need a soft cotton pillow case, color grey, and price lower than 20.00 dollars\n[Search]",
            "Search for the product, open one that fits in kind and price, choose the color, and buy it.",
            (
                (
                    "I search with the words of the request.",
                    ToolCall(None, "search", {"query": "soft cotton pillow case grey"}),
                    "[Back to Search]\nPage 1 of 2 total results\n[B0EXAMPLE1]\nSilk Pillow Case\n$31.0\n[B0EXAMPLE2]\n"
                    "Soft Cotton Pillow Case, Set of Two\n$14.5",
                ),
                (
                    "The second is of soft cotton and costs less than 20 dollars.",
                    ToolCall(None, "click", {"element": "B0EXAMPLE2"}),
                    "[Back to Search]\n[< Back to Results]\ncolor [white][grey]\nSoft Cotton Pillow Case, Set of Two\n"
                    "Price: $14.5\nRating: 4.5\n[Description]\n[Features]\n[Reviews]\n[Buy Now]",
                ),
                (
                    "It has the color; I choose it.",
                    ToolCall(None, "click", {"element": "grey"}),
                    "Chosen: color grey\n[Back to Search]\n…\n[Buy Now]",
                ),
                ("All fits, so I buy it.", ToolCall(None, "click", {"element": "Buy Now"}), ""),
            ),
        ),
    )
    labour = {"search_agent": ["search"], "click_agent": ["click"]}  # noqa: RUF012 - declared in the base class

    def __init__(self, options: Options):
        super().__init__(options)
        if options.data is not None:
            raise UserError(f"--data {options.data}: webshop takes no data; they are on its server (--set url=…)")
        self._url = setting(options, "url", str, "http://localhost:3000").rstrip("/")
        check_address("--set url", self._url)
        self._count = setting(options, "tasks", int, 500)
        if self._count < 1:
            raise UserError(f"--set tasks={self._count}: must be at least 1")

    def tasks(self) -> list[Task]:
        """Returns one task for each of the server's first N requests (`--set tasks=N`); its id names the session."""
        return [Task(f"fixed_{at}", f"fixed_{at}") for at in range(self._count)]

    def environment(self, task: Task) -> "Shopping":
        """Returns a new session."""
        return Shopping(self._url)


class Shopping:
    """The environment of one request, with the open page."""

    def __init__(self, url: str):
        self._url = url
        self._page = Page("")
        self._at = url
        self._chosen: dict[str, str] = {}
        self._reward: float | None = None

    async def reset(self, task: Task) -> tuple[str, list[dict[str, Any]]]:
        """Returns the request, and the tools search and click."""
        await self._open(f"{self._url}/{task.data}")
        if not self._page.instruction or self._page.search is None:
            beginning = self._page.text[:100]
            raise EndpointFault(
                "environment", f"{self._at}: is not a WebShop page with a request and a search: {beginning!r}"
            )
        return f"{self._page.instruction}\n{self._page.text}", TOOLS

    async def step(self, action: ToolCall) -> Step:
        """Executes search or click."""
        argument = next(iter(action.arguments.values())).strip()
        if action.name == "search":
            if self._page.search is None:
                return Step(f"This page has no search. Click one of: {self._listed()}")
            if not argument:
                return Step("A search needs words.")
            # the original parses the words from a URL, in which a slash ends them
            await self._open(urljoin(self._at, self._page.search), {"search_query": argument.replace("/", " ")})
            self._chosen = {}
            return Step(self._page.text)
        label = argument.strip("[]").strip().lower()
        name = next((name for name in self._page.clickable if name.lower() == label), None)
        if name is None:
            return Step(f"There is no [{argument}]{nearest(argument, self._page.clickable)}. Click: {self._listed()}")
        if name in self._page.options:
            self._chosen[self._page.options[name]] = name
        elif "/item_" not in self._page.clickable[name]:
            self._chosen = {}
        await self._open(urljoin(self._at, self._page.clickable[name]))
        if self._page.score is not None:
            self._reward = self._page.score
            return Step(f"Bought. {SCORE}: {self._reward}", self._reward, done=True)
        chosen = ", ".join(f"{name} {value}" for name, value in self._chosen.items())
        return Step(f"Chosen: {chosen}\n{self._page.text}" if chosen and self._page.options else self._page.text)

    def outcome(self) -> tuple[Mapping[str, float], str, Mapping[str, Any]]:
        """Returns the server's reward."""
        reward = self._reward or 0.0
        failure = (
            "no-purchase" if self._reward is None else "" if reward == 1 else "partly-right" if reward else "wrong"
        )
        return {"reward": reward, "success": float(reward == 1)}, failure, {"bought": self._reward is not None}

    async def _open(self, url: str, form: dict[str, str] | None = None) -> None:
        self._at, text = await fetch(url, form)
        self._page = Page(text)

    def _listed(self) -> str:
        return " ".join(f"[{name}]" for name in self._page.clickable)


class Page(HTMLParser):
    """Parses a page of WebShop into text, links and options."""

    def __init__(self, html: str):
        super().__init__()
        self.clickable: dict[str, str] = {}
        """Label of a clickable element → its URL; of equal labels, the first."""
        self.options: dict[str, str] = {}
        """Label of a clickable element that is an option → the option's name, such as color."""
        self.search: str | None = None
        """URL of the search form; None if the page has none."""
        self.instruction = ""
        self._lines: list[str] = []
        self._open: list[tuple[str, bool, bool]] = []  # tag, hidden, in the instruction
        self._form = self._link = self._label = ""
        self._radios: dict[str, tuple[str, str]] = {}
        self.feed(html)
        self.close()
        self.instruction = self.instruction.strip()

    @property
    def text(self) -> str:
        """The visible text, one element per line; options are in the line of their name."""
        return "\n".join(self._lines)

    @property
    def score(self) -> float | None:
        """The reward on the last page; None on all others."""
        try:
            return float(self._lines[self._lines.index(SCORE) + 1])
        except (ValueError, IndexError):
            return None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        if tag == "form":
            self._form = attributes.get("action", "")
        elif tag == "a":
            self._link = attributes.get("href", "")
        elif tag == "label":
            self._label = attributes.get("for", "")
        elif tag == "input":
            if attributes.get("name") == "search_query":
                self.search = self._form
            if "data-url" in attributes:
                self._radios[attributes.get("id", "")] = (attributes["data-url"], attributes.get("name", ""))
        if tag not in _EMPTY:
            last = self._open[-1] if self._open else ("", False, False)
            hidden = (
                last[1] or tag in _HIDDEN or "hidden" in attributes or "display:none" in attributes.get("style", "")
            )
            self._open.append((tag, hidden, last[2] or attributes.get("id") == "instruction-text"))

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._form = ""
        elif tag == "a":
            self._link = ""
        elif tag == "label":
            self._label = ""
        # the original closes some headings with the tag of another level
        headings = {"h1", "h2", "h3", "h4", "h5", "h6", "p"}
        for at in range(len(self._open) - 1, -1, -1):
            opened = self._open[at][0]
            if opened == tag or (tag in headings and opened in headings):
                del self._open[at:]
                return
            if opened in ("div", "body", "html", "head") and tag != "html":
                return

    def handle_data(self, data: str) -> None:
        text = " ".join(data.split())
        if not text or not self._open or self._open[-1][1]:
            return
        tag, _, instruction = self._open[-1]
        if instruction:
            if not text.startswith("Current Query"):
                self.instruction += f" {text}"
            return
        if self._label in self._radios and tag == "label":
            url, name = self._radios[self._label]
            self.options.setdefault(text, name)
            self.clickable.setdefault(text, url)
            if self._lines:
                self._lines[-1] += f"[{text}]" if self._lines[-1].endswith("]") else f" [{text}]"
        elif tag == "button" or self._link:
            if text != "Search" or self.search is None:
                self.clickable.setdefault(text, self._link or self._form)
            self._lines.append(f"[{text}]")
        else:
            self._lines.append(text)
