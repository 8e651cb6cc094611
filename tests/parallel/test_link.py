"""When a host counts as missing or lost, at moments that the tests choose."""

import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import wait_until

from xlam_jax.launch import free_ports
from xlam_jax.parallel.link import LOST, SILENCE, Hub, proof

HOUR = 3600.0


class Host:
    """A host that says hello, and nothing after it."""

    def __init__(self, port: int, process: int, count: int, name: str = ""):
        name = name or f"node{process}"
        self._socket = socket.create_connection(("localhost", port))
        self._lines = self._socket.makefile("rb")
        nonce = self.next("nonce")["nonce"]
        hello = {"hello": process, "name": name, "count": count, "proof": proof("", nonce, process, name, count)}
        self._socket.sendall(json.dumps(hello).encode() + b"\n")

    def next(self, kind: str) -> dict[str, Any]:
        """The next message of a kind."""
        return next(message for message in map(json.loads, self._lines) if kind in message)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


Meet = Callable[..., tuple[Hub, list[Host]]]


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meet]:
    """Starts a hub that waits for `count` hosts, and those of them that `come`; they meet before it returns."""
    monkeypatch.setattr(Hub, "_watch", lambda hub: None)  # it looks at moments of its own
    hosts: list[Host] = []

    def meet(count: int, *come: int) -> tuple[Hub, list[Host]]:
        port = free_ports()
        hub = Hub(port, count, timeout=HOUR, silence=HOUR)
        hosts.extend(Host(port, process, count) for process in come)
        wait_until(lambda: len(hub._peers) == len(come))
        return hub, hosts

    yield meet
    for host in hosts:
        host.close()


def test_a_silent_host_is_named(meet: Meet):
    hub, hosts = meet(3, 0, 1, 2)
    now = time.monotonic()
    for peer in hub._peers.values():
        peer.heard = now
    hub._look(now + HOUR, now, late=False)  # not more than the silence that is allowed
    assert not hub._ended
    hub._peers[0].heard = hub._peers[2].heard = now + HOUR
    hub._look(now + HOUR + 1, now, late=False)
    for host in hosts:
        end = host.next("end")
        assert end["code"] == LOST
        assert end["end"].startswith(
            "host 1 (node1) has not been heard of for 3600 s: it hangs, or the network is cut;"
        )


def test_after_a_standstill_of_its_own_none_is_silent(meet: Meet):
    hub, _ = meet(2, 0, 1)
    now = time.monotonic()
    hub._look(now + 10 * HOUR, now, late=True)
    hub._look(now + 10 * HOUR + SILENCE, now, late=False)
    assert not hub._ended


def test_a_host_that_does_not_come_is_named(meet: Meet):
    hub, hosts = meet(4, 0, 1, 3)
    hub._look(HOUR, 0.0, late=False)
    assert not hub._ended
    hub._look(math.nextafter(HOUR, math.inf), 0.0, late=False)
    for host in hosts:
        end = host.next("end")
        assert end["code"] == 2
        assert end["end"].startswith(
            "3 of 4 processes came within 3600 s; missing: process 2; were all of them started"
        )


@pytest.mark.parametrize("name", ["\x1b[2Jnode", "node\nerror: host 1 stopped", "n" * 300])
def test_a_name_that_would_spoil_a_log_is_refused(name: str, capsys: pytest.CaptureFixture[str]):
    port = free_ports()
    Hub(port, 2, timeout=HOUR, silence=HOUR)
    stranger = Host(port, 0, 2, name)
    assert "is not a host of this run" in stranger.next("end")["end"]
    stranger.close()
    assert name not in capsys.readouterr().err
