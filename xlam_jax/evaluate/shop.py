"""A small shop with the pages of WebShop (Yao et al., arXiv 2207.01206), to try agents out without the original, which
needs Java, Python 3.8 and 5 GB of data: `python -m xlam_jax.evaluate.shop --port 3000`.

It has the original's addresses, forms and reward; its products are made up. A session's name that ends in `_N` has the
N-th request, as the original's `fixed_N`.
"""

import contextlib
import threading
from ast import literal_eval
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from xlam_jax import cli, errors

GOALS = 500
PAGE = 10
"""Products of a page of results."""
SCORE = "Your score (min 0.0, max 1.0)"
KINDS = ("kettle", "lamp", "backpack", "blanket", "headphones", "water bottle", "desk chair", "rain jacket")
TRAITS = (("steel", "quiet"), ("wooden", "light"), ("cotton", "soft"), ("recycled", "durable"), ("foldable", "large"))
COLORS = ("black", "white", "forest green", "navy blue")
SIZES = ("small", "medium", "large")


class Product(NamedTuple):
    """What the shop sells."""

    asin: str
    kind: str
    title: str
    price: float
    """Dollars."""
    traits: tuple[str, ...]
    options: dict[str, tuple[str, ...]]


class Goal(NamedTuple):
    """What a session is to buy."""

    product: Product
    options: dict[str, str]
    price: float
    """At most, in dollars."""

    @property
    def instruction(self) -> str:
        """In words, as WebShop's requests are."""
        wanted = " and ".join(f"{name} {value}" for name, value in self.options.items())
        traits = ", ".join(self.product.traits)
        return f"i need a {traits} {self.product.kind}, {wanted}, and price lower than {self.price:.2f} dollars"


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
    """The request of session `…_<number>`."""
    product = list(PRODUCTS.values())[number * 7 % len(PRODUCTS)]
    chosen = {name: values[number % len(values)] for name, values in product.options.items()}
    return Goal(product, chosen, float(int(product.price / 10 + 1) * 10))


def reward(goal: Goal, bought: Product, options: Mapping[str, str]) -> float:
    """WebShop's: the share of wanted traits, options and price that are met, times whether the kind is right (a wrong
    kind counts 0 here, where the original compares texts)."""
    if bought.kind != goal.product.kind:
        return 0.0
    traits = len(set(goal.product.traits) & set(bought.traits))
    met = sum(options.get(name) == value for name, value in goal.options.items())
    cheap = bought.price <= goal.price
    return (traits + met + cheap) / (len(goal.product.traits) + len(goal.options) + 1)


def search(words: Sequence[str]) -> list[Product]:
    """Products by how many of the words they hold, the cheapest first among equals; without any, none."""
    wanted = {word.strip(",.").lower() for word in words}

    def score(product: Product) -> int:
        return len(wanted & set(f"{product.title} {product.kind}".lower().replace(",", "").split()))

    return sorted((one for one in PRODUCTS.values() if score(one)), key=lambda one: (-score(one), one.price))


def answer(path: str, form: Mapping[str, list[str]]) -> tuple[int, str]:
    """(Status, page) for an address; (302, address) sends the browser on."""
    parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
    try:
        match parts:
            case [session]:
                if "search_query" in form:
                    words = form["search_query"][0].lower().split(" ")
                    return 302, _url("search_results", session, words, 1)
                return 200, _index(session)
            case ["search_results", session, words, number]:
                return 200, _results(session, _words(words), int(number))
            case ["item_page", session, asin, words, number, options]:
                return 200, _item(session, PRODUCTS[asin], _words(words), int(number), literal_eval(options))
            case ["item_sub_page", session, asin, words, number, sub, options]:
                return 200, _sub(session, PRODUCTS[asin], _words(words), int(number), sub, literal_eval(options))
            case ["done", session, asin, options]:
                score = reward(_goal(session), PRODUCTS[asin], literal_eval(options))
                return 200, _page(f"<h1>Thank you for shopping with us!</h1><h3>{SCORE}<pre>{score}</pre></h3>")
    except (KeyError, ValueError, SyntaxError, IndexError):
        pass
    return 404, _page("<p>There is no such page.</p>")


def _goal(session: str) -> Goal:
    number = int(session.rsplit("_", 1)[1])
    if not 0 <= number < GOALS:
        raise KeyError(number)
    return goal(number)


def _words(text: str) -> list[str]:
    return literal_eval(text) if text.startswith("[") else [text]


def _url(*parts: object) -> str:
    return "/" + "/".join(quote(str(part), safe="") for part in parts)


def _page(body: str) -> str:
    return f"<!DOCTYPE html><html><head><title>WebShop</title></head><body><div>{body}</div></body></html>"


def _button(url: str, text: str) -> str:
    return f'<form method="post" action="{escape(url)}"><button type="submit">{escape(text)}</button></form>'


def _head(session: str, query: Sequence[str] | None = None) -> str:
    said = f"<h4>Instruction: <br>{escape(_goal(session).instruction)}</h4>"
    if query is not None:
        said += f"<h4>Current Query: {escape(' '.join(query))}</h4>"
    return f'<div id="instruction-text">{said}</div>'


def _index(session: str) -> str:
    field = '<input id="search_input" type="text" name="search_query" placeholder="Search..." required/>'
    form = f'<form method="post" action="{_url(session)}">{field}<button type="submit">Search</button></form>'
    return _page(f"<h2>WebShop</h2>{_head(session)}{form}")


def _results(session: str, words: list[str], number: int) -> str:
    found = search(words)
    shown = found[(number - 1) * PAGE : number * PAGE]
    buttons = _button(_url(session), "Back to Search")
    if number > 1:
        buttons += _button(_url("search_results", session, words, number - 1), "< Prev")
    if number * PAGE < len(found):
        buttons += _button(_url("search_results", session, words, number + 1), "Next >")
    items = "".join(
        f'<div><h4 class="product-asin"><a class="product-link" href="'
        f'{escape(_url("item_page", session, one.asin, words, number, {}))}">{one.asin}</a></h4>'
        f'<h4 class="product-title">{escape(one.title)}</h4><h5 class="product-price">${one.price}</h5></div>'
        for one in shown
    )
    count = f"<h1>Results</h1><p>Page {number} of {len(found)} total results</p>"
    return _page(f"{_head(session, words)}{count}{buttons}{items}")


def _item(session: str, product: Product, words: list[str], number: int, options: dict[str, str]) -> str:
    choices = ""
    for name, values in product.options.items():
        choices += f"<h4>{name}</h4>"
        for at, value in enumerate(values):
            url = _url("item_page", session, product.asin, words, number, {**options, name: value})
            id = f"radio_{name}{at}"
            choices += f'<input type="radio" id="{id}" name="{name}" value="{value}" data-url="{escape(url)}">'
            choices += f'<label for="{id}">{value}</label>'
    subs = "".join(
        _button(_url("item_sub_page", session, product.asin, words, number, sub, options), sub)
        for sub in ("Description", "Features", "Reviews")
    )
    return _page(
        f"{_head(session, words)}{_button(_url(session), 'Back to Search')}"
        f"{_button(_url('search_results', session, words, number), '< Back to Results')}{choices}"
        f"<h2>{escape(product.title)}</h2><h4>Price: ${product.price}</h4><h4>Rating: N.A.</h4>{subs}"
        f"{_button(_url('done', session, product.asin, options), 'Buy Now')}"
    )


def _sub(session: str, product: Product, words: list[str], number: int, sub: str, options: dict[str, str]) -> str:
    texts = {
        "Description": f"A {product.kind} that is {' and '.join(product.traits)}.",
        "Features": "; ".join(product.traits),
        "Reviews": "No reviews",
    }
    back = _button(_url("item_page", session, product.asin, words, number, options), "< Back to Item Page")
    return _page(f"{_head(session, words)}{_button(_url(session), 'Back to Search')}{back}<p>{escape(texts[sub])}</p>")


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
        status, said = answer(self.path, form)
        data = b"" if status == 302 else said.encode()
        self.send_response(status)
        if status == 302:
            self.send_header("location", said)
        self.send_header("content-type", "text/html; charset=utf-8")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


@contextlib.contextmanager
def serve(port: int = 0) -> Iterator[str]:
    """Runs the shop on a thread, on any free port unless one is given; yields its address."""
    with _Server(("127.0.0.1", port), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(
        prog="python -m xlam_jax.evaluate.shop",
        description="A small shop with the pages of WebShop, to try the suite webshop out. Ends with Ctrl-C.",
    )
    parser.add_argument("--port", type=int, default=3000, metavar="N", help="of 127.0.0.1 (default: 3000)")
    options = parser.parse_args(arguments)
    try:
        with serve(options.port) as url, contextlib.suppress(KeyboardInterrupt):
            print(f"shop: {url}, {len(PRODUCTS)} products, {GOALS} requests (fixed_0 to fixed_{GOALS - 1})", flush=True)
            threading.Event().wait()
    except (OSError, OverflowError) as error:
        raise errors.UserError(f"--port {options.port}: cannot be used ({error}); give another") from None
    return 0


if __name__ == "__main__":
    cli.run(main)
