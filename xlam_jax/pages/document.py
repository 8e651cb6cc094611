"""Writes a page from a template and plain data.

All markup, CSS and JavaScript are files in `templates/`. Templates escape every value, so that texts of data sets and
models are shown as text. A page is one file: style and script are inlined, and its Content-Security-Policy forbids a
browser to load anything or to run any other script.
"""

import hashlib
from base64 import b64encode
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from xlam_jax.errors import UserError
from xlam_jax.outputs import new_file

HEAD = 4096
"""Bytes at the start of a page among which `check_output` looks for the name of its generator."""


@cache
def environment() -> jinja2.Environment:
    """Returns the environment of all templates: every value is escaped, and an undefined variable is an error."""
    jinja = jinja2.Environment(
        loader=jinja2.PackageLoader("xlam_jax.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    jinja.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    jinja.globals["inline"] = _inline
    jinja.filters["sha256"] = _sha256
    return jinja


@cache
def _inline(name: str) -> Markup:
    """Returns a style sheet or script of `templates/` as it is, for use between `<style>` or `<script>` tags."""
    loader = environment().loader
    assert loader is not None
    text, _, _ = loader.get_source(environment(), name)
    assert "</" not in text, f"{name} would end the element that contains it"
    return Markup(text)


def _sha256(text: str) -> str:
    """Returns the digest that a Content-Security-Policy names an inline script by."""
    return b64encode(hashlib.sha256(text.encode()).digest()).decode()


def render(template: str, **data: Any) -> Iterator[str]:
    """Yields a page in parts. `data`: the template's variables; an iterator among them is read as the page is made."""
    return environment().get_template(template).generate(data)


def write(path: Path, template: str, **data: Any) -> None:
    """Writes a page; the file appears only when it is complete.

    Lone surrogates, which JSON can contain and UTF-8 cannot, are written as backslash escapes such as \\ud800.
    """
    with new_file(path) as file:
        file.writelines(render(template, **data))


def check_output(
    path: Path, generator: str, *, force: bool = False, advice: str = "name another file, or overwrite it with --force"
) -> None:
    """Checks that a page may be written to `path`.

    generator: the name that pages of the calling command carry; only such pages are overwritten, unless `force` is set.
    advice: how to resolve the conflict, for the error message.

    Raises `UserError` if the folder does not exist, `path` is a folder, or it is a file from elsewhere.
    """
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder; name a file, such as {path / 'report.html'}")
    if path.exists() and not force:
        with path.open("rb") as file:
            ours = f'<meta name="generator" content="{generator}">'.encode() in file.read(HEAD)
        if not ours:
            raise UserError(f"--out {path}: exists and is not a page of this command; {advice}")
