"""`bfcl-eval`, from which data and checkers come, and how it is used without what it requires.

It requires 150 packages in exact versions, of which several cannot stand beside JAX; but its checkers import none of
them, except through one module: the table of vendors' models. A stand-in takes that module's place while the checker
is loaded, under no name, so that whoever else imports `bfcl_eval` finds what they would have found.
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
"""Function calling: tools are in the request, and dots in names become underscores. Prompt: they are in its text."""

_MODELS = "bfcl_eval.constants.model_config"
_CHECKER = "bfcl_eval.eval_checker.ast_eval.ast_checker"
_TURNS = "bfcl_eval.eval_checker.multi_turn_eval"
_runs = itertools.count()


class Verdict(NamedTuple):
    """What a checker says."""

    valid: bool
    kind: str = ""
    """Why not, in a word or two."""
    words: Any = ""
    """The checker's own."""


def data_folder(given: Path | None = None) -> Path:
    """The folder with `BFCL_v4_*.json`: the user's, or the installed package's. Raises `UserError`."""
    if find_spec("bfcl_eval") is None:
        raise UserError(f"the suite bfcl needs the package bfcl-eval, which is not installed; {INSTALL}")
    folder = given or Path(str(_module("bfcl_eval").__path__[0]), "data")
    if not (folder / "BFCL_v4_simple_python.json").exists():
        raise UserError(f"{folder}: holds no BFCL_v4_simple_python.json; give the folder `data` of bfcl-eval {VERSION}")
    return folder


def prompts() -> ModuleType:
    """The texts of BFCL's prompts, and its limit of steps."""
    return _module("bfcl_eval.constants.default_prompts")


def check_calls(
    functions: Sequence[Mapping[str, Any]], calls: Any, expected: Any, category: str, language: str, mode: str
) -> Verdict:
    """Checks calls, `[{name: arguments}, …]`, against the answers that are possible (BFCL's `ast_checker`)."""
    checker = _ast_checker()
    try:
        said = checker.ast_checker(functions, calls, expected, checker.Language(language), category, mode)
    except Exception as error:  # what a model can answer is more than the checker was written for
        return Verdict(False, "checker-failed", f"{type(error).__name__}: {error}")
    if said["valid"]:
        return Verdict(True)
    where, _, kind = str(said["error_type"]).partition(":")
    return Verdict(False, _KINDS.get(kind) or where, said["error"])


_KINDS: dict[str, str] = {
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
    """The simulated classes of one multi-turn task, with their state. Use it in a `with`, which forgets them.

    BFCL executes calls as source text, by `eval`, and keeps the state under the names of model and task; so each world
    has a model's name of its own, and is given none but calls of the classes' public methods (`source`).
    """

    def __init__(self, row: Mapping[str, Any]):
        self._row = row
        self._name = f"world{next(_runs)}"
        self._utils = _module(f"{_TURNS}.multi_turn_utils")
        self._long = "long_context" in row["id"]
        modules = _module("bfcl_eval.constants.executable_backend_config").CLASS_FILE_PATH_MAPPING
        classes = [getattr(_module(modules[name]), name) for name in row["involved_classes"]]
        self.methods = frozenset(
            name
            for one in classes
            for name, _ in inspect.getmembers(one, inspect.isfunction)
            if not name.startswith("_")
        )

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        kept = vars(self._utils)
        for name in [name for name in kept if name.startswith(f"{self._name}_")]:
            del kept[name]

    def execute(self, calls: Sequence[str]) -> list[str]:
        """Does what calls in `source` form say; returns what each gave, or the error that it met."""
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
        """Compares turns of steps of calls in `source` form with the expected ones: the states that they lead to, and
        what they return (BFCL's `multi_turn_checker`)."""
        checker = _module(f"{_TURNS}.multi_turn_checker")
        try:
            said = checker.multi_turn_checker(turns, expected, self._row, self._row["id"], self._name)
        except Exception as error:  # as above
            return Verdict(False, "checker-failed", f"{type(error).__name__}: {error}")
        if said["valid"]:
            return Verdict(True)
        return Verdict(False, said["error_type"].split(":")[-1].replace("_", "-"), said["error_message"])


@cache
def _ast_checker() -> ModuleType:
    """BFCL's checker of calls, its table of models replaced: a mode takes a model's place."""
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
