"""The suites: each module here that does not begin with `_` defines one, named like the module.

A suite is imported when it is requested. Heavy imports are inside functions.
"""

from xlam_jax.evaluate import _registry
from xlam_jax.evaluate.suite import Suite


def names() -> list[str]:
    """Returns the names of all suites."""
    return _registry.names(__name__)


def load(name: str) -> type[Suite]:
    """Returns a suite, given its name or the path of a user's file. Raises `UserError`."""
    return _registry.load("suite", name, __name__, Suite)
