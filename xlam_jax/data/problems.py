"""Where the parser of trajectories reports what it repairs and what it cannot read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from xlam_jax.data.trajectory import InvalidTrajectory

Report = Callable[[str, str], None]
"""Called with (reason, detail): a short code to count by, and a sentence."""
Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")
Default = TypeVar("Default")


def ignore(reason: str, detail: str) -> None:
    """Reports nothing."""


def refuse(reason: str, detail: str) -> None:
    """Raises `InvalidTrajectory`."""
    raise InvalidTrajectory(reason, detail)


@dataclass(frozen=True, slots=True)
class Sink:
    """Receives each repair and each problem of a row.

    The default `problem` raises at the first one. With a `problem` that returns, the parser continues and drops the
    part that it cannot read, or replaces it by a placeholder; so each problem of a row is reported once.
    """

    repaired: Report = ignore
    problem: Report = refuse

    def attempt(
        self,
        default: Default,
        read: Callable[Parameters, Value],
        *arguments: Parameters.args,
        **options: Parameters.kwargs,
    ) -> Value | Default:
        """Returns `read(*arguments, **options)`. An `InvalidTrajectory` is reported, and `default` returned."""
        try:
            return read(*arguments, **options)
        except InvalidTrajectory as error:
            invalid = error
        self.problem(invalid.reason, invalid.detail)
        return default


def type_name(value: object) -> str:
    """The type of a value for a message: "a list", or "nothing" for None."""
    return "nothing" if value is None else f"a {type(value).__name__}"
