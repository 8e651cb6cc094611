"""What is known by a name: the modules of a folder, each with one thing in it."""

import pkgutil
from collections.abc import Sequence
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from xlam_jax import user_code
from xlam_jax.errors import UserError, nearest

T = TypeVar("T")


def names(package: str) -> list[str]:
    """The names in a package: its modules but for those that begin with `_`. None of them is imported."""
    found = util.find_spec(package)
    assert found
    assert found.submodule_search_locations
    modules = (one.name for one in pkgutil.iter_modules(found.submodule_search_locations))
    return sorted(name for name in modules if not name.startswith("_"))


def load(option: str, name: str, package: str, base: type[T]) -> type[T]:
    """The class of that name, or that of a user's file where the name ends in .py; a subclass of `base`.

    `option` is the command's, for messages. Raises `UserError` for a name that is not known, and a file that holds no
    such class.
    """
    if name.endswith(".py"):
        return _only(option, name, user_code.load(Path(name), f"a {base.__name__.lower()}"), base)
    known = names(package)
    if name not in known:
        raise UserError(
            f"--{option} {name}: unknown{nearest(name, known)}; known: {', '.join(known)}, or a file FILE.py"
        )
    return _only(option, name, import_module(f"{package}.{name}"), base)


def _only(option: str, name: str, module: ModuleType, base: type[T]) -> type[T]:
    found: Sequence[type[T]] = [
        one
        for one in vars(module).values()
        if isinstance(one, type)
        and issubclass(one, base)
        and one.__module__ == module.__name__
        and not getattr(one, "__abstractmethods__", None)
    ]
    if len(found) != 1:
        held = ", ".join(one.__name__ for one in found) or "none"
        raise UserError(f"--{option} {name}: holds one whole subclass of {base.__name__}, found: {held}")
    return found[0]
