"""The suites: each module here that does not begin with `_` is one, known by the module's name, and holds one class.

They are imported when they are asked for, and cost nothing before; a module imports what is heavy in its functions.
"""

from xlam_jax.evaluate import _named
from xlam_jax.evaluate.suite import Suite


def names() -> list[str]:
    """All of them."""
    return _named.names(__name__)


def load(name: str) -> type[Suite]:
    """A suite by its name, or by the path of a user's file. Raises `UserError`."""
    return _named.load("suite", name, __name__, Suite)
