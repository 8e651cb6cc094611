"""The agents: strategies to prompt a model through an `Episode`. Each module here that does not begin with `_` defines
one, named like the module.

All but `native` are text-based: the prompt lists the actions, and `Action: name[argument]` is parsed from the answer,
so they work with any chat model. BOLAA (arXiv 2308.05960) compared them, except for Act.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from xlam_jax.evaluate import _registry
from xlam_jax.evaluate.episode import Episode

if TYPE_CHECKING:
    from xlam_jax.evaluate.endpoint import Model


class Agent(ABC):
    """Prompts a model through episodes. Episodes are concurrent, so an agent stores no state."""

    about: ClassVar[str]
    """One line for `--help`, with the paper."""

    @abstractmethod
    async def lead(self, model: "Model", episode: Episode) -> None:
        """Acts until the episode is over; appends the conversation to its messages. Raises `EndpointFault`."""


def names() -> list[str]:
    """Returns the names of all agents."""
    return _registry.names(__name__)


def load(name: str) -> Agent:
    """Returns an agent, given its name or the path of a user's file. Raises `UserError`."""
    kind: Any = _registry.load("agent", name, __name__, Agent)
    return kind()
