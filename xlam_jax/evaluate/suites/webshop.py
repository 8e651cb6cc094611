"""WebShop (Yao et al., arXiv 2207.01206): buy what a request describes, in the original's server or one with its pages.

Each page is fetched and shown as text: [what can be clicked] in brackets, as in ReAct's prompts. Links, forms and
options are followed as they stand on the page. Reward and success are what the server says when something is bought.
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
    text_tool("click", "Clicks what stands in [brackets] on the page: a button, product or option.", "element"),
]
_EMPTY = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_HIDDEN = {"script", "style", "head", "title", "iframe"}


class WebShop(AgentSuite):
    """`reward` as the server gives it, `success`: the reward is 1; without a purchase both are 0."""

    name = "webshop"
    about = "buy what a request describes, at a WebShop server (--set url=http://localhost:3000)"
    main_score = "reward"
    settings: ClassVar[Mapping[str, str]] = {
        **AgentSuite.settings,
        "url": "the server's address (default: http://localhost:3000)",
        "tasks": "requests fixed_0 … fixed_N-1 are asked (default: 500, the original's test split)",
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
    labour = {"search_agent": ["search"], "click_agent": ["click"]}  # noqa: RUF012 - as the base class has it

    def __init__(self, options: Options):
        super().__init__(options)
        if options.data is not None:
            raise UserError(f"--data {options.data}: webshop reads no data; its server has them (--set url=…)")
        self._url = setting(options, "url", str, "http://localhost:3000").rstrip("/")
        check_address("--set url", self._url)
        self._count = setting(options, "tasks", int, 500)
        if self._count < 1:
            raise UserError(f"--set tasks={self._count}: is less than 1")

    def tasks(self) -> list[Task]:
        """The server's requests, by their sessions."""
        return [Task(f"fixed_{at}", f"fixed_{at}") for at in range(self._count)]

    def environment(self, task: Task) -> "Shopping":
        """A session of its own."""
        return Shopping(self._url)


class Shopping:
    """One request, and the page that is open."""

    def __init__(self, url: str):
        self._url = url
        self._page = Page("")
        self._at = url
        self._chosen: dict[str, str] = {}
        self._reward: float | None = None

    async def reset(self, task: Task) -> tuple[str, list[dict[str, Any]]]:
        """The request, and search and click."""
        await self._open(f"{self._url}/{task.data}")
        if not self._page.instruction or self._page.search is None:
            told = self._page.text[:100]
            raise EndpointFault(
                "environment", f"{self._at}: is no page of WebShop with a request and a search: {told!r}"
            )
        return f"{self._page.instruction}\n{self._page.text}", TOOLS

    async def step(self, action: ToolCall) -> Step:
        """Searches or clicks."""
        argument = next(iter(action.arguments.values())).strip()
        if action.name == "search":
            if self._page.search is None:
                return Step(f"This page has no search. Click one of: {self._listed()}")
            if not argument:
                return Step("A search needs words.")
            # the original reads the words from an address, in which a slash parts them from the rest
            await self._open(urljoin(self._at, self._page.search), {"search_query": argument.replace("/", " ")})
            self._chosen = {}
            return Step(self._page.text)
        wanted = argument.strip("[]").strip().lower()
        found = next((name for name in self._page.clickable if name.lower() == wanted), None)
        if found is None:
            return Step(f"There is no [{argument}]{nearest(argument, self._page.clickable)}. Click: {self._listed()}")
        if found in self._page.options:
            self._chosen[self._page.options[found]] = found
        elif "/item_" not in self._page.clickable[found]:
            self._chosen = {}
        await self._open(urljoin(self._at, self._page.clickable[found]))
        if self._page.score is not None:
            self._reward = self._page.score
            return Step(f"Bought. {SCORE}: {self._reward}", self._reward, done=True)
        chosen = ", ".join(f"{name} {value}" for name, value in self._chosen.items())
        return Step(f"Chosen: {chosen}\n{self._page.text}" if chosen and self._page.options else self._page.text)

    def outcome(self) -> tuple[Mapping[str, float], str, Mapping[str, Any]]:
        """The server's reward."""
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
    """A page of WebShop as text."""

    def __init__(self, html: str):
        super().__init__()
        self.clickable: dict[str, str] = {}
        """What can be clicked, and where it leads; of two with one name the first."""
        self.options: dict[str, str] = {}
        """What of it is an option, and of which name."""
        self.search: str | None = None
        """Where the search is sent, if the page has one."""
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
        """What is seen, a line each, options in one line with their name."""
        return "\n".join(self._lines)

    @property
    def score(self) -> float | None:
        """The reward, on the last page."""
        try:
            return float(self._lines[self._lines.index(SCORE) + 1])
        except (ValueError, IndexError):
            return None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form":
            self._form = given.get("action", "")
        elif tag == "a":
            self._link = given.get("href", "")
        elif tag == "label":
            self._label = given.get("for", "")
        elif tag == "input":
            if given.get("name") == "search_query":
                self.search = self._form
            if "data-url" in given:
                self._radios[given.get("id", "")] = (given["data-url"], given.get("name", ""))
        if tag not in _EMPTY:
            last = self._open[-1] if self._open else ("", False, False)
            hidden = last[1] or tag in _HIDDEN or "hidden" in given or "display:none" in given.get("style", "")
            self._open.append((tag, hidden, last[2] or given.get("id") == "instruction-text"))

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._form = ""
        elif tag == "a":
            self._link = ""
        elif tag == "label":
            self._label = ""
        # the original closes some headings with another one's tag
        level = {"h1", "h2", "h3", "h4", "h5", "h6", "p"}
        for at in range(len(self._open) - 1, -1, -1):
            opened = self._open[at][0]
            if opened == tag or (tag in level and opened in level):
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
