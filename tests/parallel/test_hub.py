"""When the hub reports a host as missing or lost, at times chosen by the tests; and which hosts it admits."""

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import wait_until

from xlam_jax.launch import free_ports
from xlam_jax.parallel import hub as hubs
from xlam_jax.parallel.hub import STRANGERS, Hub
from xlam_jax.parallel.link import HEARTBEAT, LOST, prove

HOUR = 3600.0
BEATS = int(HOUR / HEARTBEAT)
"""Heartbeats that a host may miss."""


class Host:
    """A host that sends its hello, and nothing else."""

    def __init__(self, port: int, process: int, count: int, name: str = ""):
        name = name or f"node{process}"
        self._socket = socket.create_connection(("localhost", port))
        self._lines = self._socket.makefile("rb")
        nonce = self.next("nonce")["nonce"]
        hello = {"hello": process, "name": name, "count": count, "proof": prove("", nonce, process, name, count)}
        self.send(hello)

    def send(self, message: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def next(self, kind: str) -> dict[str, Any]:
        """Returns the next message of a kind."""
        return next(message for message in map(json.loads, self._lines) if kind in message)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def call(hub: Hub, function: Callable[[], None], times: int = 1) -> None:
    """Calls a function of the hub in the thread that owns its state."""

    async def repeat() -> None:
        for _ in range(times):
            function()

    asyncio.run_coroutine_threadsafe(repeat(), hub.loop).result()


Meet = Callable[..., tuple[Hub, list[Host]]]


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meet]:
    """Starts a hub that waits for `count` hosts, and the hosts `come`; returns when these have joined."""
    monkeypatch.setattr(Hub, "_tick", lambda hub: None)  # the tests check heartbeats themselves
    hosts: list[Host] = []

    def meet(count: int, *come: int) -> tuple[Hub, list[Host]]:
        port = free_ports()
        hub = Hub(port, count, timeout=HOUR, heartbeat_timeout=HOUR)
        hosts.extend(Host(port, process, count) for process in come)
        wait_until(lambda: len(hub.members) == len(come))
        return hub, hosts

    yield meet
    for host in hosts:
        host.close()


def test_a_silent_host_is_named(meet: Meet):
    hub, hosts = meet(3, 0, 1, 2)
    call(hub, hub.check_heartbeats, BEATS)  # not more than are allowed
    assert not hub.ended
    for process in (0, 2):
        hosts[process].send({"heartbeat": True})
    wait_until(lambda: [hub.members[process].missed for process in range(3)] == [0, BEATS, 0])
    call(hub, hub.check_heartbeats)
    for host in hosts:
        end = host.next("end")
        assert end["code"] == LOST
        assert end["end"].startswith(
            "host 1 (node1) sent no heartbeat for 3600 s: it hangs, or the network is interrupted;"
        )


def test_after_a_pause_of_the_hub_itself_no_host_is_lost(meet: Meet):
    """However long the pause, it counts as one check; messages sent in the meantime are read after it."""
    hub, hosts = meet(2, 0, 1)
    call(hub, hub.check_heartbeats, BEATS)
    for host in hosts:
        host.send({"heartbeat": True})
    wait_until(lambda: all(not member.missed for member in hub.members.values()))
    call(hub, hub.check_heartbeats, BEATS)
    assert not hub.ended


def test_a_host_that_does_not_come_is_named(meet: Meet):
    hub, hosts = meet(4, 0, 1, 3)
    assert not hub.ended
    call(hub, hub.check_all_joined)
    for host in hosts:
        end = host.next("end")
        assert end["code"] == 2
        assert end["end"].startswith(
            "3 of 4 processes joined within 3600 s; missing: process 2; were all of them started"
        )


def test_nobody_is_missing_when_all_have_come(meet: Meet):
    hub, _ = meet(2, 0, 1)
    call(hub, hub.check_all_joined)
    assert not hub.ended


@pytest.mark.parametrize("name", ["\x1b[2Jnode", "node\nerror: host 1 stopped", "n" * 300])
def test_a_name_that_would_spoil_a_log_is_refused(name: str, capsys: pytest.CaptureFixture[str]):
    port = free_ports()
    Hub(port, 2, timeout=HOUR, heartbeat_timeout=HOUR)
    stranger = Host(port, 0, 2, name)
    assert "is not a host of this run" in stranger.next("end")["end"]
    stranger.close()
    assert name not in capsys.readouterr().err


def test_idle_connections_delay_no_host(monkeypatch: pytest.MonkeyPatch, meet: Meet):
    """More idle connections than the hub keeps open: the oldest are closed, unless they have joined."""
    monkeypatch.setattr(hubs, "HELLO_TIMEOUT", HOUR)
    hub, hosts = meet(3, 0)
    port = hub.server.getsockname()[1]
    idle = [socket.create_connection(("localhost", port)) for _ in range(STRANGERS)]
    hosts.append(Host(port, 1, 3))
    idle += [socket.create_connection(("localhost", port)) for _ in range(STRANGERS)]
    hosts.append(Host(port, 2, 3))
    try:
        for host in hosts:
            assert host.next("members")["members"] == ["node0", "node1", "node2"]
        with idle[0].makefile("rb") as lines:
            assert len(list(lines)) == 1  # the nonce, and then the end
    finally:
        for connection in idle:
            connection.close()


def test_a_long_message_is_read_whole(meet: Meet):
    """A malformed message counts as the loss of its host."""
    _, hosts = meet(2, 0, 1)
    long = "x" * 3_000_000
    hosts[0].send({"value": long})
    hosts[1].send({"value": 1})
    assert hosts[0].next("values")["values"] == [long, 1]
    assert hosts[1].next("values")["values"] == [long, 1]
    hosts[1].send({"step": None, "requested": 7})
    assert hosts[0].next("end")["end"].startswith("host 1 (node1) closed its connection without a message")
