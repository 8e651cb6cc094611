"""A registry by module name: each public module of a package defines one class."""

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
    """Returns the names of a package's modules that do not begin with `_`, without importing them."""
    spec = util.find_spec(package)
    assert spec
    assert spec.submodule_search_locations
    modules = (module.name for module in pkgutil.iter_modules(spec.submodule_search_locations))
    return sorted(name for name in modules if not name.startswith("_"))


def load(option: str, name: str, package: str, base: type[T]) -> type[T]:
    """Returns the subclass of `base` in the module `name`, or in a user's file if `name` ends in .py.

    `option` names the command-line option in messages. Raises `UserError` for an unknown name, and for a file that
    does not define exactly one such class.
    """
    if name.endswith(".py"):
        return _get_class(option, name, user_code.load(Path(name), f"a {base.__name__.lower()}"), base)
    available = names(package)
    if name not in available:
        raise UserError(
            f"--{option} {name}: unknown{nearest(name, available)}; known: {', '.join(available)}, or a file FILE.py"
        )
    return _get_class(option, name, import_module(f"{package}.{name}"), base)


def _get_class(option: str, name: str, module: ModuleType, base: type[T]) -> type[T]:
    classes: Sequence[type[T]] = [
        member
        for member in vars(module).values()
        if isinstance(member, type)
        and issubclass(member, base)
        and member.__module__ == module.__name__
        and not getattr(member, "__abstractmethods__", None)
    ]
    if len(classes) != 1:
        defined = ", ".join(member.__name__ for member in classes) or "none"
        raise UserError(
            f"--{option} {name}: must define exactly one concrete subclass of {base.__name__}, but defines: {defined}"
        )
    return classes[0]
