"""Closes the clients of each test when it ends."""

from collections.abc import Iterator
from typing import Any

import pytest

from xlam_jax.client.completion import xLAMChatCompletion


@pytest.fixture(autouse=True)
def closed_clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An unclosed socket would raise a warning in whichever test runs when it is garbage-collected."""
    clients: list[xLAMChatCompletion] = []
    connection = xLAMChatCompletion._connection

    def record(self: xLAMChatCompletion) -> dict[str, Any]:
        clients.append(self)
        return connection(self)

    monkeypatch.setattr(xLAMChatCompletion, "_connection", record)
    yield
    for llm in clients:
        llm.close()
