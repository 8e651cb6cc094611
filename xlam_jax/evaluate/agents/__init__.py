"""The agents: ways to lead a model through an `Episode`. Each module here that does not begin with `_` is one, known by
the module's name, and holds one class with its prompts.

All of them but `native` speak in words: what they may do stands in the prompt, and `Action: name[argument]` is read
from what the model writes, so they work with any chat model. BOLAA (arXiv 2308.05960) compared them, Act apart.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from xlam_jax.evaluate import _named
from xlam_jax.evaluate.episode import Episode

if TYPE_CHECKING:
    from xlam_jax.evaluate.endpoint import Model


class Agent(ABC):
    """Leads a model through episodes, many at once: it keeps nothing on itself."""

    about: ClassVar[str]
    """One line for `--help`, with its paper."""

    @abstractmethod
    async def lead(self, model: "Model", episode: Episode) -> None:
        """Acts until the episode is over; adds all that is said to its messages. Raises `EndpointFault`."""


def names() -> list[str]:
    """All of them."""
    return _named.names(__name__)


def load(name: str) -> Agent:
    """An agent by its name, or by the path of a user's file. Raises `UserError`."""
    kind: Any = _named.load("agent", name, __name__, Agent)
    return kind()
