"""A small shop with the pages of WebShop (Yao et al., arXiv 2207.01206), for trying out agents without the original.

The original needs Java, Python 3.8 and 5 GB of data; this one runs as `python -m xlam_jax.evaluate.shop --port 3000`.
Addresses, forms and reward are the same; the products are invented. A session named `…_N` gets request number N, like
`fixed_N` of the original.
"""

import contextlib
import threading
from ast import literal_eval
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from xlam_jax import cli, errors
from xlam_jax.pages import document

GOALS = 500
PAGE = 10
"""Products per page of results."""
SCORE = "Your score (min 0.0, max 1.0)"
KINDS = ("kettle", "lamp", "backpack", "blanket", "headphones", "water bottle", "desk chair", "rain jacket")
TRAITS = (("steel", "quiet"), ("wooden", "light"), ("cotton", "soft"), ("recycled", "durable"), ("foldable", "large"))
COLORS = ("black", "white", "forest green", "navy blue")
SIZES = ("small", "medium", "large")


class Product(NamedTuple):
    """A product on sale."""

    asin: str
    kind: str
    title: str
    price: float
    """Dollars."""
    traits: tuple[str, ...]
    options: dict[str, tuple[str, ...]]


class Goal(NamedTuple):
    """The product that a session has to buy."""

    product: Product
    options: dict[str, str]
    price: float
    """Upper limit, in dollars."""

    @property
    def instruction(self) -> str:
        """The request in words, in the style of WebShop."""
        options = " and ".join(f"{name} {value}" for name, value in self.options.items())
        traits = ", ".join(self.product.traits)
        return f"i need a {traits} {self.product.kind}, {options}, and price lower than {self.price:.2f} dollars"


def _products() -> dict[str, Product]:
    products = [
        Product(
            f"B0{kind:02}{trait:02}SHOP",
            name,
            f"{traits[0].title()} {name.title()}, {traits[1].title()}, {len(name) + trait}-Year Warranty",
            round(9.5 + 7.25 * kind + 3.1 * trait, 2),
            traits,
            {"color": COLORS[: 2 + trait % 3], "size": SIZES[: 2 + kind % 2]},
        )
        for kind, name in enumerate(KINDS)
        for trait, traits in enumerate(TRAITS)
    ]
    return {product.asin: product for product in products}


PRODUCTS = _products()


def goal(number: int) -> Goal:
    """Returns the goal of session `…_<number>`."""
    product = list(PRODUCTS.values())[number * 7 % len(PRODUCTS)]
    chosen = {name: values[number % len(values)] for name, values in product.options.items()}
    return Goal(product, chosen, float(int(product.price / 10 + 1) * 10))


def reward(goal: Goal, bought: Product, options: Mapping[str, str]) -> float:
    """Returns WebShop's reward: the fraction of traits, options and price limit that are met.

    A product of another kind scores 0; the original compares texts there.
    """
    if bought.kind != goal.product.kind:
        return 0.0
    traits = len(set(goal.product.traits) & set(bought.traits))
    met = sum(options.get(name) == value for name, value in goal.options.items())
    cheap = bought.price <= goal.price
    return (traits + met + cheap) / (len(goal.product.traits) + len(goal.options) + 1)


def search(words: Sequence[str]) -> list[Product]:
    """Returns the products that contain any of the words: most matches first, then cheapest first."""
    query = {word.strip(",.").lower() for word in words}

    def score(product: Product) -> int:
        return len(query & set(f"{product.title} {product.kind}".lower().replace(",", "").split()))

    matches = (product for product in PRODUCTS.values() if score(product))
    return sorted(matches, key=lambda product: (-score(product), product.price))


def answer(path: str, form: Mapping[str, list[str]]) -> tuple[int, str]:
    """Returns the status and page for an address, or (302, address) for a redirect."""
    parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
    try:
        match parts:
            case [session]:
                if "search_query" in form:
                    words = form["search_query"][0].lower().split(" ")
                    return 302, _url("search_results", session, words, 1)
                return 200, _index_page(session)
            case ["search_results", session, words, number]:
                return 200, _results_page(session, _words(words), int(number))
            case ["item_page", session, asin, words, number, options]:
                return 200, _item_page(session, PRODUCTS[asin], _words(words), int(number), literal_eval(options))
            case ["item_sub_page", session, asin, words, number, name, options]:
                product, options = PRODUCTS[asin], literal_eval(options)
                return 200, _text_page(session, product, _words(words), int(number), name, options)
            case ["done", session, asin, options]:
                score = reward(_goal(session), PRODUCTS[asin], literal_eval(options))
                return 200, _page("done", label=SCORE, score=score)
    except (KeyError, ValueError, SyntaxError, IndexError):
        pass
    return 404, _page("missing")


def _goal(session: str) -> Goal:
    number = int(session.rsplit("_", 1)[1])
    if not 0 <= number < GOALS:
        raise KeyError(number)
    return goal(number)


def _words(text: str) -> list[str]:
    return literal_eval(text) if text.startswith("[") else [text]


def _url(*parts: object) -> str:
    return "/" + "/".join(quote(str(part), safe="") for part in parts)


def _page(name: str, **data: Any) -> str:
    return "".join(document.render(f"shop/{name}.html.jinja", **data))


def _request(session: str, query: Sequence[str]) -> dict[str, str]:
    return {"instruction": _goal(session).instruction, "query": " ".join(query)}


def _search_link(session: str) -> tuple[str, str]:
    return _url(session), "Back to Search"


def _index_page(session: str) -> str:
    return _page("index", instruction=_goal(session).instruction, url=_url(session))


def _results_page(session: str, words: list[str], number: int) -> str:
    matches = search(words)
    buttons = [_search_link(session)]
    if number > 1:
        buttons.append((_url("search_results", session, words, number - 1), "< Prev"))
    if number * PAGE < len(matches):
        buttons.append((_url("search_results", session, words, number + 1), "Next >"))
    items = [
        (_url("item_page", session, product.asin, words, number, {}), product)
        for product in matches[(number - 1) * PAGE : number * PAGE]
    ]
    return _page("results", **_request(session, words), number=number, total=len(matches), buttons=buttons, items=items)


def _item_page(session: str, product: Product, words: list[str], number: int, options: dict[str, str]) -> str:
    def choose(name: str, value: str) -> str:
        return _url("item_page", session, product.asin, words, number, {**options, name: value})

    return _page(
        "item",
        **_request(session, words),
        product=product,
        choices=[
            (name, [(value, choose(name, value)) for value in values]) for name, values in product.options.items()
        ],
        back=[_search_link(session), (_url("search_results", session, words, number), "< Back to Results")],
        texts=[
            (_url("item_sub_page", session, product.asin, words, number, text, options), text)
            for text in ("Description", "Features", "Reviews")
        ],
        buy=_url("done", session, product.asin, options),
    )


def _text_page(session: str, product: Product, words: list[str], number: int, name: str, options: object) -> str:
    texts = {
        "Description": f"A {product.kind} that is {' and '.join(product.traits)}.",
        "Features": "; ".join(product.traits),
        "Reviews": "No reviews",
    }
    back = [
        _search_link(session),
        (_url("item_page", session, product.asin, words, number, options), "< Back to Item Page"),
    ]
    return _page("text", **_request(session, words), back=back, text=texts[name])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self._answer(parse_qs(body.decode(errors="replace")))

    def _answer(self, form: Mapping[str, list[str]]) -> None:
        status, text = answer(self.path, form)
        data = b"" if status == 302 else text.encode()
        self.send_response(status)
        if status == 302:
            self.send_header("location", text)
        self.send_header("content-type", "text/html; charset=utf-8")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


@contextlib.contextmanager
def serve(port: int = 0) -> Iterator[str]:
    """Runs the shop in a thread and yields its address. Port 0 selects a free port."""
    with _Server(("127.0.0.1", port), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = cli.Parser(
        prog="python -m xlam_jax.evaluate.shop",
        description="A small shop with the pages of WebShop, to try out the suite webshop. Stop it with Ctrl-C.",
    )
    parser.add_argument("--port", type=int, default=3000, metavar="N", help="port on 127.0.0.1 (default: 3000)")
    options = parser.parse_args(arguments)
    try:
        with serve(options.port) as url, contextlib.suppress(KeyboardInterrupt):
            print(f"shop: {url}, {len(PRODUCTS)} products, {GOALS} requests (fixed_0 to fixed_{GOALS - 1})", flush=True)
            threading.Event().wait()
    except (OSError, OverflowError) as error:
        raise errors.UserError(f"--port {options.port}: cannot be used ({error}); choose another") from None
    return 0


if __name__ == "__main__":
    cli.run(main)
