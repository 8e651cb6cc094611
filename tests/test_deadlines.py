"""The verdict of no default test depends on the load of the machine."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

TESTS = ROOT / "tests"
APART = {"browser", "serve", "slow"}
"""Marks of tests that run one at a time."""
HOURS = {"run": 300, "communicate": 300, "wait": 300, "join": 300, "get": 300}
"""Methods with a time limit, and the shortest limit, in seconds, that only what hangs for ever reaches."""


def is_time(node: ast.AST) -> bool:
    """Returns whether a call is `time.monotonic()` or similar; CPU time does not count."""
    names = ("monotonic", "time", "perf_counter")
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names


def faults(test: ast.AST) -> Iterator[str]:
    for node in ast.walk(test):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.BinOp) and is_time(node.left.left):
            limit = node.comparators[-1]
            if isinstance(node.ops[-1], (ast.Lt, ast.LtE)) and isinstance(limit, ast.Constant):
                yield f"line {node.lineno}: a time is compared with {limit.value}"
        if isinstance(node, ast.Compare) and is_time(node.left):
            yield f"line {node.lineno}: waits for a moment"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in HOURS:
            for keyword in node.keywords:
                if keyword.arg == "timeout" and isinstance(keyword.value, ast.Constant):
                    limit = keyword.value.value
                    assert limit is None or isinstance(limit, (int, float))
                    if limit is not None and limit < HOURS[node.func.attr]:
                        yield f"line {node.lineno}: {node.func.attr} waits for {limit} s at most"


def marks(node: ast.AST) -> set[str]:
    """Returns the marks of a test function."""
    decorators = getattr(node, "decorator_list", [])
    return {word for decorator in decorators for word in ast.unparse(decorator).split("(")[0].split(".")}


FILES = [path for path in sorted(TESTS.rglob("*.py")) if "browser" not in path.parts and path.name != "support.py"]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(TESTS)) for path in FILES])
def test_deadlines_are_those_of_the_nightly_tests(path: Path):
    """Use `deadline(60)` or `wait_until(…)`, or mark the test `nightly`."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    if any(
        f"pytest.mark.{mark}" in ast.unparse(node)
        for node in module.body
        for mark in APART
        if "pytestmark" in ast.unparse(node)
    ):
        return
    violations = [fault for node in module.body if not marks(node) & (APART | {"nightly"}) for fault in faults(node)]
    assert not violations, f"{path}: {violations}"


def test_the_check_sees_what_it_is_for():
    code = """
def test():
    assert time.monotonic() - began < 5
    process.communicate(timeout=30)
    while time.time() < until:
        pass
    assert time.monotonic() - began < deadline(5)
    process.communicate(timeout=deadline(30))
    assert 0.2 <= time.monotonic() - began
"""
    assert len(list(faults(ast.parse(code)))) == 3


def test_the_targets_share_the_marks():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert '-m "not slow and not nightly and not browser and not serve"' in makefile
    assert 'REAL_DEADLINES=1 $(PY) -m pytest -m "(nightly or deadlines) and not browser and not serve"' in makefile
