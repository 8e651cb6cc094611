"""Clients are closed when their test ends."""

from collections.abc import Iterator
from typing import Any

import pytest

from xlam_jax.client.completion import xLAMChatCompletion


@pytest.fixture(autouse=True)
def closed_clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A socket that is left to the garbage collector warns in whatever test runs then."""
    made: list[xLAMChatCompletion] = []
    connection = xLAMChatCompletion._connection

    def noted(self: xLAMChatCompletion) -> dict[str, Any]:
        made.append(self)
        return connection(self)

    monkeypatch.setattr(xLAMChatCompletion, "_connection", noted)
    yield
    for llm in made:
        llm.close()
