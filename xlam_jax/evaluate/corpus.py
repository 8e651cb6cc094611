"""Pages that an agent can look up by title: a file of the user, or a live Wikipedia.

A file is JSONL of {"title", "text"} (or HotpotQA's {"title", "text": [sentences]}), or an SQLite database with a table
`pages(title, text)`. `python -m xlam_jax.evaluate.corpus --pages FILE.jsonl --out FILE.sqlite` converts JSONL to SQLite
with an index, so that millions of pages need not be loaded into memory.
"""

import contextlib
import json
import re
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlencode

from xlam_jax import cli
from xlam_jax.errors import UserError
from xlam_jax.outputs import check_file, new_path

SIMILAR = 5
"""Number of similar titles that are listed for an unknown title."""
_MAGIC = b"SQLite format 3\0"


class Corpus(Protocol):
    """A collection of pages."""

    async def page(self, title: str) -> tuple[str, str] | None:
        """Returns (title, text) of a page; None if there is none. Titles are case-insensitive."""
        ...

    async def similar(self, text: str) -> list[str]:
        """Returns the titles of pages that are similar to a text, the best match first."""
        ...


class Local:
    """Pages in SQLite."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection
        self._ranked = _has_index(connection)

    @classmethod
    def of(cls, pages: Iterable[tuple[str, str]]) -> "Local":
        """Returns a corpus in memory from (title, text) pairs."""
        connection = sqlite3.connect(":memory:")
        write(connection, pages)
        return cls(connection)

    @classmethod
    def open(cls, path: Path) -> "Local":
        """Opens a JSONL or SQLite file. Raises `UserError`."""
        if not path.is_file():
            raise UserError(f"{path}: does not exist; a corpus is a JSONL or SQLite file of pages (title, text)")
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return cls.of(read_pages(path))
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            connection.execute("SELECT title, text FROM pages LIMIT 1").fetchone()
        except sqlite3.Error as error:
            connection.close()
            raise UserError(
                f"{path}: has no table pages(title, text) ({error}); docs/evaluation.md describes how to create one"
            ) from None
        return cls(connection)

    async def page(self, title: str) -> tuple[str, str] | None:
        """See `Corpus`."""
        normalized = " ".join(title.replace("_", " ").split())
        query = "SELECT title, text FROM pages WHERE title = ? COLLATE NOCASE AND typeof(text) = 'text' LIMIT 1"
        return self._connection.execute(query, (normalized,)).fetchone()

    async def similar(self, text: str) -> list[str]:
        """See `Corpus`. Ranks by words of title (with a higher weight) and text. Without the index, matches titles that
        begin with the text."""
        if not self._ranked:
            query = "SELECT title FROM pages WHERE title LIKE ? ESCAPE '\\' LIMIT ?"
            pattern = re.sub(r"([%_\\])", r"\\\1", text.strip()) + "%"
            return [title for (title,) in self._connection.execute(query, (pattern, SIMILAR))]
        words = " OR ".join(f'"{word}"' for word in dict.fromkeys(re.findall(r"\w+", text.lower())[:32]))
        if not words:
            return []
        query = "SELECT title FROM titles WHERE titles MATCH ? ORDER BY bm25(titles, 10.0, 1.0), rowid LIMIT ?"
        return [title for (title,) in self._connection.execute(query, (words, SIMILAR))]

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()


class Wikipedia:
    """A live MediaWiki: `url` is its api.php, such as https://en.wikipedia.org/w/api.php. Its pages may change, and
    with them the scores."""

    def __init__(self, url: str):
        self._url = url

    async def page(self, title: str) -> tuple[str, str] | None:
        """See `Corpus`. Returns the plain text of a page; follows redirects."""
        reply = await self._ask(prop="extracts", explaintext="1", redirects="1", titles=title)
        pages = reply.get("pages") or []
        text = pages[0].get("extract") if pages and isinstance(pages[0], dict) else None
        return (str(pages[0].get("title")), text) if isinstance(text, str) and text else None

    async def similar(self, text: str) -> list[str]:
        """See `Corpus`."""
        reply = await self._ask(list="search", srsearch=text, srlimit=str(SIMILAR))
        return [
            str(result["title"])
            for result in reply.get("search") or []
            if isinstance(result, dict) and "title" in result
        ]

    async def _ask(self, **parameters: str) -> dict[str, Any]:
        from xlam_jax.evaluate._http import fetch
        from xlam_jax.evaluate.endpoint import EndpointFault

        query = urlencode({"action": "query", "format": "json", "formatversion": "2", **parameters})
        _, text = await fetch(f"{self._url}?{query}")
        try:
            return json.loads(text).get("query") or {}
        except (ValueError, AttributeError):
            raise EndpointFault("environment", f"{self._url}: is not a MediaWiki api.php: {text[:100]!r}") from None

    def close(self) -> None:
        """Does nothing: there are no open connections."""


def read_pages(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (title, text) of each page of a JSONL file. Raises `UserError`."""
    from xlam_jax.evaluate.suites._rows import read_rows

    for number, row in read_rows(path, "page", "title", "text"):
        title, text = row["title"], row["text"]
        if isinstance(text, list) and all(isinstance(sentence, str) for sentence in text):
            text = "".join(text) if any(sentence.startswith(" ") for sentence in text) else " ".join(text)
        if not isinstance(title, str) or not isinstance(text, str):
            raise UserError(
                f"{path}:{number}: 'title' must be a string, and 'text' a string or a list of strings (sentences)"
            )
        yield title, text


def write(connection: sqlite3.Connection, pages: Iterable[tuple[str, str]]) -> int:
    """Fills an empty database; returns the number of pages. Of pages with equal titles, the first is kept."""
    connection.execute("CREATE TABLE pages(title TEXT UNIQUE COLLATE NOCASE, text TEXT)")
    rows = ((" ".join(title.split()), text) for title, text in pages)
    connection.executemany("INSERT OR IGNORE INTO pages VALUES (?, ?)", rows)
    connection.execute(
        "CREATE VIRTUAL TABLE titles USING fts5(title, text, content=pages, tokenize='porter unicode61')"
    )
    connection.execute("INSERT INTO titles(titles) VALUES ('rebuild')")
    connection.commit()
    return connection.execute("SELECT count(*) FROM pages").fetchone()[0]


def _has_index(connection: sqlite3.Connection) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE name = 'titles' AND sql LIKE '%fts5(title, text%'"
    return connection.execute(query).fetchone() is not None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = cli.Parser(
        prog="python -m xlam_jax.evaluate.corpus", description="Converts JSONL pages to an SQLite corpus with an index."
    )
    parser.add_argument("--pages", type=Path, required=True, metavar="FILE.jsonl", help="one {title, text} per line")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.sqlite", help="must not exist")
    options = parser.parse_args(arguments)
    check_file(options.out, advice="remove it, or name another file")
    with new_path(options.out) as part, contextlib.closing(sqlite3.connect(part)) as connection:
        count = write(connection, read_pages(options.pages))
        if not count:
            raise UserError(f"{options.pages}: contains no pages; lines of {{title, text}} are expected")
    print(f"{options.out}: {count:,} pages", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
