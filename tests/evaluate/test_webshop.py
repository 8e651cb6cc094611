"""WebShop: pages of the original, our shop, and failing servers."""

import asyncio
import html
import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from fake_server import Handler, Reply, answers, says, serve
from support import Commands

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.evaluate import shop
from xlam_jax.evaluate.suite import Task
from xlam_jax.evaluate.suites.webshop import Page, Shopping

# like the original: attributes on both sides of a comment, headings closed by other tags, hidden parts
RESULTS = """<!DOCTYPE html><html><head><link rel="stylesheet" href="x.css">
<script src="jquery.js"></script></head><body>
<div class="container py-5"><div id="instruction-text"><h4 style="padding:2px">Instruction: i need a lamp</h4>
<h4>Current Query:  lamp </h4></div><div class="row"><h1>Results</h1><p>Page 1 (1-10) of 50 total results</p>
<form method="post" action="/fixed_0"><button type="submit">Back to Search</button></form>
<form method="post" action="/search_results/fixed_0/%5B%27lamp%27%5D/2"><button>Next &gt;</button></form></div>
<!-- <h4><a class="product-link" href="/old">B000000000</a></h5> -->
<div class="grid-item"><img src="a.jpg"><h4 class="mt-0"><a class="product-link"
 href="/item_page/fixed_0/B09ABC/%5B%27lamp%27%5D/1/%7B%7D">B09ABC</a></h4><h4 class="product-title">A Lamp</h5>
<div><h5 class="product-price">$9.99</h6></div></div></div></body></html>"""
ITEM = """<html><body><div><div id="instruction-text"><h4>Instruction: i need a lamp</h4></div>
<form method="post" action="/fixed_0"><button>Back to Search</button></form>
<div><h4>color</h4><div class="radio-toolbar">
<input type="radio" id="radio_color0" name="color" value="red" data-url="/item_page/a">
<label for="radio_color0">red</label><input type="radio" id="radio_color1" name="color" value="blue"
 data-url="/item_page/b">
<label for="radio_color1">blue</label></div></div><h2>A Lamp</h2><h4>Price: $9.99</h4>
<form method="post" action="/done/x"><button type="submit" class="btn">Buy Now</button></form></div></body>
<script>$(document).ready(function() { let a = "<b>x</b>"; })</script></html>"""
DONE = """<html><body><div><h1>Thank you for shopping with us!</h1>
<div style="display:none"><h4 id="asin">asin<pre>B0</pre></p>
<h4>Goal <div id="goal"><pre>secret</pre></div></h4></div>
<h3 id="reward">Your score (min 0.0, max 1.0)<pre>0.75</pre></h3>
<h4 hidden>Reward Details <div><pre>{'r_att': 1}</pre></div></h4></div></body></html>"""


@contextmanager
def serve_pages(pages: list[Reply]) -> Iterator[str]:
    """Runs a server that answers with these pages in turn."""

    class Pages(Handler):
        def do_GET(self) -> None:
            pages.pop(0)(self, {})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_pages_of_the_original():
    results = Page(RESULTS)
    assert results.instruction == "Instruction: i need a lamp"
    assert results.text == (
        "Results\nPage 1 (1-10) of 50 total results\n[Back to Search]\n[Next >]\n[B09ABC]\nA Lamp\n$9.99"
    )
    assert results.clickable["B09ABC"].startswith("/item_page/fixed_0/B09ABC/")
    assert results.clickable["Next >"].endswith("/2")
    item = Page(ITEM)
    assert item.text == "[Back to Search]\ncolor [red][blue]\nA Lamp\nPrice: $9.99\n[Buy Now]"
    assert item.options == {"red": "color", "blue": "color"}
    assert item.clickable["blue"] == "/item_page/b"
    done = Page(DONE)
    assert done.score == 0.75
    assert "secret" not in done.text
    assert Page("<p>x").score is None


def test_shopping():
    """Observations describe invalid actions; options are kept until another product is opened."""
    goal = shop.goal(3)

    async def act(url: str) -> list[str]:
        shopping = Shopping(url)
        observations = [(await shopping.reset(Task("fixed_3", "fixed_3")))[0]]
        for name, text in (
            ("click", "Buy Now"), ("search", goal.product.title + " a/b"), ("search", "x"),
            ("click", f"[{goal.product.asin}]"),
            ("click", goal.options["color"].upper()), ("click", "Description"), ("click", "< Back to Item Page"),
            ("click", "Back to Search"), ("search", goal.product.title), ("click", goal.product.asin),
        ):  # fmt: skip
            observations.append((await shopping.step(ToolCall(None, name, {"x": text}))).observation)
        assert shopping.outcome()[1] == "no-purchase"
        return observations

    with shop.serve() as url:
        observations = asyncio.run(act(url))
    assert goal.instruction in observations[0]
    assert "[Search]" in observations[0]
    assert observations[1].startswith("There is no [Buy Now]")
    assert f"[{goal.product.asin}]" in observations[2]
    assert observations[3].startswith("This page has no search. Click one of: [Back to Search]")
    assert "Chosen" not in observations[4]
    assert observations[5].startswith(f"Chosen: color {goal.options['color']}\n")
    assert goal.product.kind in observations[6]
    assert observations[7].startswith("Chosen: color")
    assert "Chosen" not in observations[10]


def test_rewards_of_the_shop():
    goal = shop.goal(0)
    assert shop.reward(goal, goal.product, goal.options) == 1
    assert shop.reward(goal, goal.product, {}) == pytest.approx(3 / 5)
    assert shop.reward(goal._replace(price=1.0), goal.product, goal.options) == pytest.approx(4 / 5)
    assert {shop.goal(at).product.asin for at in range(shop.GOALS)} == set(shop.PRODUCTS)
    assert all(goal.price >= goal.product.price for goal in map(shop.goal, range(shop.GOALS)))


def test_the_shop_escapes_hostile_searches():
    """Search words are the only untrusted texts; links contain them too."""
    hostile = "lamp \"'><script>alert(1)</script><img src=x onerror=alert(2)>"
    status, url = shop.answer("/fixed_0", {"search_query": [hostile]})
    assert status == 302
    status, text = shop.answer(url, {})
    assert status == 200
    assert not {"<script", "<img"} & set(re.findall("<[a-z]+", text))
    page = Page(text)
    assert hostile in html.unescape(text)
    item = next(link for name, link in page.clickable.items() if name.startswith("B0"))
    status, text = shop.answer(item, {})
    assert status == 200
    assert not {"<script", "<img"} & set(re.findall("<[a-z]+", text))
    assert hostile in html.unescape(text)


def test_the_command_of_the_shop(commands: Commands):
    process = commands.start("xlam_jax.evaluate.shop", "--port", 0)
    assert process.stdout
    try:
        url = process.stdout.readline().split()[1].rstrip(",")
        with urllib.request.urlopen(f"{url}/fixed_0") as page:
            assert shop.goal(0).instruction in page.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/item_page/fixed_0/nothing/x/1/%7B%7D")
    finally:
        process.terminate()
        process.communicate()


def test_a_server_that_is_not_a_shop(commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Such a server is an error of the environment, and not scored."""
    monkeypatch.setattr("xlam_jax.evaluate._http.TRIES", 1)
    with serve(answers(200, "hello")) as other, serve(says("x")) as server:
        commands.call(
            "xlam_jax.evaluate", "--suite", "webshop", "--base-url", server.url, "--model", "tiny", "--set",
            f"url={other.url.removesuffix('/v1')}", "--set", "tasks=2", "--out", tmp_path / "out", code=1,
        )  # fmt: skip
    summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert (summary["errors"], summary["scored"], summary["scores"]) == ({"environment": 2}, 0, {})


@pytest.mark.parametrize("other_server", [False, True], ids=["nothing", "another-server"])
def test_without_a_shop_the_run_ends(
    other_server: bool, commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The run ends after ten examples in a row, not after all 500, and the message names the shop."""
    monkeypatch.setattr("xlam_jax.evaluate._http.TRIES", 1)
    with serve(answers(200, "hello")) as other, serve(says("x")) as server:
        shop_url = other.url.removesuffix("/v1") if other_server else "http://127.0.0.1:9"
        error = commands.fails(
            "xlam_jax.evaluate", "--suite", "webshop", "--base-url", server.url, "--model", "tiny",
            "--concurrency", 1, "--set", f"url={shop_url}", "--out", tmp_path / "out",
        )  # fmt: skip
        assert server.requests == []
    assert f"{shop_url}/fixed_9" in error
    assert "10 examples in a row" in error
    summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert (summary["errors"], summary["wanted"]) == ({"environment": 10}, 500)


def test_temporary_failures_of_the_shop_do_not_end_the_run(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Only consecutive failures end a run."""
    monkeypatch.setattr("xlam_jax.evaluate._http.TRIES", 1)
    page = RESULTS.replace("Page 1", '<form action="/search"><input name="search_query"></form>')
    unavailable, available = answers(500, "unavailable"), answers(200, page, "text/html")
    with (
        serve(says("Thought: no.")) as server,
        serve_pages([unavailable] * 9 + [available] + [unavailable] * 9 + [available]) as url,
    ):
        commands.call(
            "xlam_jax.evaluate", "--suite", "webshop", "--base-url", server.url, "--model", "tiny", "--concurrency", 1,
            "--set", f"url={url}", "--set", "tasks=20", "--set", "max_steps=1", "--out", tmp_path / "out", code=1,
        )  # fmt: skip
    summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert (summary["errors"], summary["scored"]) == ({"environment": 18}, 2)
