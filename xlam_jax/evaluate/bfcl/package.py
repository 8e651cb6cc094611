"""The package `bfcl-eval`: its data and checkers, used without its dependencies.

It requires exact versions of 150 packages, several of which conflict with JAX. Its checkers import none of them, except
through one module: the table of vendors' models. A stub replaces that module while the checker is loaded. Neither is
left in `sys.modules`, so that other users of `bfcl_eval` import the original modules.
"""

import importlib
import inspect
import itertools
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from xlam_jax.errors import UserError

VERSION = "2026.3.23"
INSTALL = f"run `make eval`, or `pip install --no-deps bfcl-eval=={VERSION}` and `pip install mpmath`"
MODES = ("fc", "prompt")
"""fc (function calling): tools are a field of the request, and dots in names become underscores. prompt: they are in
the system prompt."""

_MODELS = "bfcl_eval.constants.model_config"
_CHECKER = "bfcl_eval.eval_checker.ast_eval.ast_checker"
_TURNS = "bfcl_eval.eval_checker.multi_turn_eval"
_world_numbers = itertools.count()


class Verdict(NamedTuple):
    """The result of a checker."""

    valid: bool
    kind: str = ""
    """Short code of the failure."""
    words: Any = ""
    """The checker's message."""


def data_folder(user_folder: Path | None = None) -> Path:
    """Returns the folder with `BFCL_v4_*.json`: the user's, or that of the installed package. Raises `UserError`."""
    if find_spec("bfcl_eval") is None:
        raise UserError(f"the suite bfcl needs the package bfcl-eval, which is not installed; {INSTALL}")
    folder = user_folder or Path(str(_module("bfcl_eval").__path__[0]), "data")
    if not (folder / "BFCL_v4_simple_python.json").exists():
        raise UserError(
            f"{folder}: contains no BFCL_v4_simple_python.json; give the folder `data` of bfcl-eval {VERSION}"
        )
    return folder


def prompts() -> ModuleType:
    """Returns the module with BFCL's prompts, and its limit of steps."""
    return _module("bfcl_eval.constants.default_prompts")


def check_calls(
    functions: Sequence[Mapping[str, Any]], calls: Any, expected: Any, category: str, language: str, mode: str
) -> Verdict:
    """Compares calls, `[{name: arguments}, …]`, with the possible answers (BFCL's `ast_checker`)."""
    checker = _ast_checker()
    try:
        result = checker.ast_checker(functions, calls, expected, checker.Language(language), category, mode)
    except Exception as error:  # the checker does not support all possible answers
        return Verdict(False, "checker-failed", f"{type(error).__name__}: {error}")
    if result["valid"]:
        return Verdict(True)
    category_of_error, _, kind = str(result["error_type"]).partition(":")
    return Verdict(False, _FAILURES.get(kind) or category_of_error, result["error"])


_FAILURES: dict[str, str] = {
    "wrong_func_name": "wrong-function",
    "wrong_count": "wrong-number-of-calls",
    "missing_required": "missing-argument",
    "missing_optional": "missing-argument",
    "unexpected_param": "unexpected-argument",
    "cannot_find_match": "wrong-calls",
    **dict.fromkeys(("simple", "nested", "java", "js"), "wrong-type"),
    **dict.fromkeys(("string", "list/tuple", "list_dict_count", "dict_key", "dict_value", "others"), "wrong-value"),
}


class World:
    """The simulated classes of one multi-turn task, with their state. Use it in a `with`, which deletes the state.

    BFCL executes calls as source text, with `eval`, and stores the state by the names of model and task. Each world
    therefore has a unique model name, and only executes calls of the classes' public methods (`to_source`).
    """

    def __init__(self, row: Mapping[str, Any]):
        self._row = row
        self._name = f"world{next(_world_numbers)}"
        self._utils = _module(f"{_TURNS}.multi_turn_utils")
        self._long = "long_context" in row["id"]
        modules = _module("bfcl_eval.constants.executable_backend_config").CLASS_FILE_PATH_MAPPING
        classes = [getattr(_module(modules[name]), name) for name in row["involved_classes"]]
        self.methods = frozenset(
            name
            for cls in classes
            for name, _ in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_")
        )

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        state = vars(self._utils)
        for name in [name for name in state if name.startswith(f"{self._name}_")]:
            del state[name]

    def execute(self, calls: Sequence[str]) -> list[str]:
        """Executes calls in `to_source` form; returns the result or error of each."""
        results, _ = self._utils.execute_multi_turn_func_call(
            list(calls),
            self._row["initial_config"],
            self._row["involved_classes"],
            self._name,
            self._row["id"],
            long_context=self._long,
        )
        return results

    def check(self, turns: Sequence[Sequence[Sequence[str]]], expected: Sequence[Sequence[str]]) -> Verdict:
        """Compares calls in `to_source` form, indexed by turn, step and call, with the expected ones: the resulting
        states, and the return values (BFCL's `multi_turn_checker`)."""
        checker = _module(f"{_TURNS}.multi_turn_checker")
        try:
            result = checker.multi_turn_checker(turns, expected, self._row, self._row["id"], self._name)
        except Exception as error:  # as in `check_calls`
            return Verdict(False, "checker-failed", f"{type(error).__name__}: {error}")
        if result["valid"]:
            return Verdict(True)
        return Verdict(False, result["error_type"].split(":")[-1].replace("_", "-"), result["error_message"])


@cache
def _ast_checker() -> ModuleType:
    """Loads BFCL's checker of calls with a stub for the table of models, in which modes replace models."""
    spec = find_spec(_CHECKER)
    if spec is None or spec.loader is None:
        raise UserError(f"the installed bfcl-eval has no {_CHECKER}; {INSTALL}")
    stand_in: Any = ModuleType(_MODELS)
    stand_in.MODEL_CONFIG_MAPPING = {mode: SimpleNamespace(underscore_to_dot=mode == "fc") for mode in MODES}
    before = sys.modules.get(_MODELS)
    sys.modules[_MODELS] = stand_in
    try:
        checker = module_from_spec(spec)
        spec.loader.exec_module(checker)
    finally:
        del sys.modules[_MODELS]
        if before is not None:
            sys.modules[_MODELS] = before
    return checker


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} cannot be imported ({error}); {INSTALL}") from None
