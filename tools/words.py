"""Finds words that slow readers down, in texts and in names: `python tools/words.py [FILE…]`; exit code 1 if any.

Texts are documentation, comments, docstrings and messages. Names are those of variables, parameters and functions in
the code: a name says what the thing is.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KINDS = (".py", ".md", ".yaml", ".toml", ".jinja", "Makefile")

TEXT = {
    r"\b(told|tell|tells|telling)\b": "report, log, print, raise, warn",
    r"\bsays? so\b": "report, warn",
    r"\bmend(s|ed|ing)?\b": "repair, fix",
    r"\bbeside\b": "next to, alongside",
    r"\bstands?\b(?! for\b)": "is, contains, is stored in",
    r"\blies?\b": "is, is stored in",
    r"\b(left|leaves?|taken|takes?) out\b": "dropped, skipped, removed",
    r"\b(go|goes|going|went|gone) on\b": "continue, resume",
    r"\bcarr(y|ies|ied|ying) loss\b": "contributes to the loss, trained tokens",
    r"\bknown by (its|their)\b": "identified by",
    r"(?<!there )\b(is|are|was|were) no (?!longer\b|more\b|such\b|other\b)": "is not a, invalid",
    r"\bthe (least|middle one)\b": "minimum, median",
    r"\b(bytes|GB|MB|lines|loss(es)?|requests|rows|seconds|steps|times|tokens|trajectories|turns|values) "
    r"(a|an) (batch|call|chip|device|host|item|layer|line|row|run|second|step|token|turn)\b": "per",
    r"\bhave an? (\w+) of (its|their) own\b": "separate",
}
"""Pattern → what to write instead."""

EXCEPTIONS = {
    ("xlam_jax/data/converters/api_bank.py", "told"),
    ("xlam_jax/data/converters/toolbench.py", "tells"),
    ("tests/data/test_function_environments.py", "tell"),
}
"""Files and words in them that are data: instructions to models, and turns of the examples."""

TEMPLATES = ("xlam_jax/data/templates/", "examples/quickstart/tokenizer/")
"""Texts that are not checked: a tokenizer's saved template is compared with them, and older exports keep theirs."""

NAMES = {"told", "found", "known", "how", "made", "given", "asked", "mine", "away", "theirs"}
"""Names that say nothing about the thing."""


class Hit(NamedTuple):
    """A discouraged word."""

    line: int
    word: str
    instead: str


def in_text(text: str, first: int = 1) -> Iterator[Hit]:
    """Yields the discouraged words of a text whose first line has the number `first`."""
    for pattern, instead in TEXT.items():
        for match in re.finditer(pattern, text, re.IGNORECASE):
            yield Hit(first + text.count("\n", 0, match.start()), match[0], instead)


def in_python(source: str) -> Iterator[Hit]:
    """Yields the discouraged words of comments, docstrings, messages and names."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield from in_text(token.string, token.start[0])
    hypothesis = "from hypothesis import" in source
    for node in ast.walk(ast.parse(source)):
        name = None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
        if name and name.lower().lstrip("_") in NAMES and not (name == "given" and hypothesis):
            yield Hit(getattr(node, "lineno", 0), name, "a name that says what it is")


def hits(path: Path) -> list[Hit]:
    """The discouraged words of a file, by line."""
    text = path.read_text(encoding="utf-8")
    name = str(path.relative_to(ROOT)) if path.is_absolute() else str(path)
    listed = in_python(text) if path.suffix == ".py" else in_text(text)
    return sorted(hit for hit in listed if (name, hit.word) not in EXCEPTIONS)


def files() -> list[Path]:
    """The project's own texts: not the data, nor this list."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    paths = [Path(name) for name in listed if name.endswith(KINDS)]
    skipped = ("fixtures", "examples/quickstart/LICENSES", *TEMPLATES)
    return [ROOT / path for path in paths if path.name != "words.py" and not any(part in str(path) for part in skipped)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python tools/words.py", description="Finds words that slow readers down.")
    parser.add_argument("files", nargs="*", type=Path, help="default: all files of the project")
    parser.add_argument("--count", action="store_true", help="print the number per file only")
    args = parser.parse_args()
    total = 0
    for path in args.files or files():
        listed = hits(path)
        total += len(listed)
        if args.count and listed:
            print(f"{len(listed):5} {path.relative_to(ROOT) if path.is_absolute() else path}")
        for hit in [] if args.count else listed:
            print(f"{path.relative_to(ROOT) if path.is_absolute() else path}:{hit.line}: {hit.word!r}: {hit.instead}")
    if total:
        print(f"{total} discouraged words", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
