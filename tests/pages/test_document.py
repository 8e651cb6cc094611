"""The environment of the templates: escaping, missing variables, inlined files, packaging; and where pages go."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import jinja2
import pytest
from support import ROOT

from xlam_jax.errors import UserError
from xlam_jax.pages import document

HOSTILE = "</script></style><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;\ud800"
TEMPLATES = ROOT / "xlam_jax" / "pages" / "templates"
STATS = {"title": "t", "generator": "", "sections": [], "course": "", "notes": []}


def test_values_are_escaped(tmp_path: Path):
    document.write(
        tmp_path / "p.html",
        "stats.html.jinja",
        **STATS | {"title": HOSTILE, "sections": [(HOSTILE, [HOSTILE], [[HOSTILE]], HOSTILE)], "notes": [HOSTILE]},
    )
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<img" not in text
    assert "<script" not in text
    assert text.count("&lt;img src=x onerror=alert(2)&gt;&amp;lt;\\ud800") == 7
    assert [path.name for path in tmp_path.iterdir()] == ["p.html"]


def test_a_missing_variable_is_an_error_and_leaves_no_file(tmp_path: Path):
    without_notes = {name: value for name, value in STATS.items() if name != "notes"}
    with pytest.raises(jinja2.UndefinedError, match="'notes' is undefined"):
        document.write(tmp_path / "p.html", "stats.html.jinja", **without_notes)
    assert not list(tmp_path.iterdir())


def test_a_page_without_script_allows_none():
    text = "".join(document.render("stats.html.jinja", **STATS))
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\">" in text
    assert "generator" not in text


@pytest.mark.parametrize("path", sorted(TEMPLATES.rglob("*.*")), ids=lambda path: path.name)
def test_templates_are_valid_load_nothing_and_are_packaged(path: Path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(|<link|\| *safe|autoescape", text)
    if path.suffix == ".jinja":
        document.environment().get_template(path.relative_to(TEMPLATES).as_posix())
    else:
        assert any(f'inline("{path.name}")' in page.read_text("utf-8") for page in TEMPLATES.glob("*.jinja"))
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    name = path.relative_to(TEMPLATES.parent)
    assert any(
        fnmatch(name.as_posix(), pattern) and pattern.count("/") == len(name.parts) - 1
        for pattern in packaged["xlam_jax.pages"]
    )


def test_only_pages_of_the_same_generator_are_overwritten(tmp_path: Path):
    page = tmp_path / "page.html"
    document.check_output(page, "xlam_jax.report")
    document.write(page, "stats.html.jinja", **STATS | {"title": "x" * 10_000, "generator": "xlam_jax.report"})
    document.check_output(page, "xlam_jax.report")
    with pytest.raises(UserError, match="exists and is not a page of this command; move it"):
        document.check_output(page, "xlam_jax.evaluate", advice="move it")
    document.check_output(page, "xlam_jax.evaluate", force=True)
    with pytest.raises(UserError, match="is a folder; name a file"):
        document.check_output(tmp_path, "xlam_jax.report", force=True)
    with pytest.raises(UserError, match="does not exist; make it first"):
        document.check_output(tmp_path / "no" / "page.html", "xlam_jax.report", force=True)
