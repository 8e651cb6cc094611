"""Server of the control channel between hosts (`link`), on host 0.

One thread runs an event loop, which owns all state. A connection that does not prove the shared secret has no effect on
the run; neither has one that arrives when all hosts have joined.
"""

import asyncio
import contextlib
import hmac
import json
import secrets
import socket
import sys
import threading
from typing import Any

from xlam_jax.errors import STOPPED, UserError
from xlam_jax.parallel.link import (
    DISCONNECTED,
    HEARTBEAT,
    HEARTBEAT_TIMEOUT,
    LOST,
    RESTART_HINT,
    SECRET,
    SETTLE,
    explain_loss,
    explain_silence,
    host_name,
    prove,
)

HELLO_TIMEOUT = 20.0
"""Time limit for a new connection to identify itself, in seconds."""
LONGEST_HELLO = 4096
"""Maximum length of a hello, in bytes."""
LONGEST_NAME = 255
"""Maximum length of a host's name, in characters."""
STRANGERS = 256
"""Maximum number of open connections that are not hosts; a new one closes the oldest, so that idle connections never
delay a host."""
WARNINGS = 5
"""Maximum number of refused connections that are reported; a port scan causes many."""


class Hub:
    """Tracks which hosts have joined, and relays values, stops and failures between them."""

    def __init__(
        self,
        port: int,
        count: int,
        *,
        timeout: float,
        heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
        secret: str = "",
        local: bool = False,
    ):
        """Listens on `port` in the background.

        If fewer than `count` hosts join within `timeout` seconds, those that have joined learn which are missing.
        `local` admits connections from this machine only. Raises `UserError` when the port is taken.
        """
        self.count, self.secret = count, secret
        self._timeout, self._heartbeat_timeout = timeout, heartbeat_timeout
        self.members: dict[int, Connection] = {}
        self._strangers: dict[Connection, None] = {}  # in the order in which they connected
        self._refusals = 0
        self._values: dict[int, Any] = {}
        self._continued = -1  # the latest step after which a host got permission to continue
        self._last: int | None = None
        self._stop_requested = False
        self.ended: dict[str, Any] | None = None
        """The message that ended the run."""
        both = socket.has_dualstack_ipv6() and not local
        try:
            self.server = socket.create_server(
                ("127.0.0.1" if local else "", port),
                family=socket.AF_INET6 if both else socket.AF_INET,
                dualstack_ipv6=both,
                backlog=1024,
            )
        except OSError as error:
            raise UserError(
                f"--coordinator: port {port} of this machine is not available ({error.strerror}); is another run "
                "using it? Choose another port for all hosts"
            ) from None
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda loop, context: None)  # such as too many open files; asyncio retries
        threading.Thread(target=self._run, name="hub", daemon=True).start()

    def _run(self) -> None:
        serve = self.loop.create_server(lambda: Connection(self), sock=self.server, backlog=1024)
        self.loop.run_until_complete(serve)
        self.loop.call_later(self._timeout, self.check_all_joined)
        self.loop.call_later(HEARTBEAT, self._tick)
        self.loop.run_forever()

    def _tick(self) -> None:
        if not self.ended:
            self.loop.call_later(HEARTBEAT, self._tick)
            self.check_heartbeats()

    def check_all_joined(self) -> None:
        """Ends the run if hosts are missing."""
        missing = sorted(set(range(self.count)) - self.members.keys())
        if missing:
            shown = ", ".join(map(str, missing[:20])) + (" …" if len(missing) > 20 else "")
            self._end(
                f"{self.count - len(missing)} of {self.count} processes joined within {self._timeout:.0f} s; "
                f"missing: process {shown}; were all of them started, and can they reach host 0?",
                2,
            )

    def check_heartbeats(self) -> None:
        """Sends a heartbeat and ends the run if a host has missed too many. Called once every `HEARTBEAT` seconds; a
        pause of this process counts as one missed heartbeat, since what arrived meanwhile has not been read yet."""
        self._send({"heartbeat": True}, *self.members.values())
        for process, member in self.members.items():
            member.missed += 1
            if member.missed * HEARTBEAT > self._heartbeat_timeout:
                self._lose(process, explain_silence(self._heartbeat_timeout))

    def connected(self, connection: "Connection") -> None:
        """Starts to wait for the hello of a new connection."""
        if len(self._strangers) >= STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.abort()
        self._strangers[connection] = None
        self._send({"nonce": connection.nonce}, connection)
        self.loop.call_later(HELLO_TIMEOUT, self.greet, connection, b"")

    def disconnected(self, connection: "Connection") -> None:
        """Ends the run if the connection was that of a host which has not left."""
        self._strangers.pop(connection, None)
        if connection.process is not None and not connection.has_left:
            self._lose(connection.process, DISCONNECTED)

    def greet(self, connection: "Connection", hello: bytes) -> None:
        """Admits or refuses a connection by its first line; an empty line means that none arrived."""
        if connection not in self._strangers or connection.is_refused:
            return
        try:
            fields = json.loads(hello)
            process, name, count, proof = (fields[key] for key in ("hello", "name", "count", "proof"))
            if not isinstance(process, int) or not (name.isprintable() and len(name) <= LONGEST_NAME):
                raise ValueError("process or name is invalid; both are printed")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self._refuse(connection, f"{connection.address} connected, but is not a host of this run")
            return
        host = host_name(process, name)
        if not hmac.compare_digest(str(proof), prove(self.secret, connection.nonce, process, name, count)):
            different = f"{host} has another {SECRET} than host 0; set the variable to one value on all hosts"
            self._refuse(connection, f"{different} (a connection from {connection.address})")
        elif self.ended:
            self._dismiss(connection, self.ended)
        elif len(self.members) == self.count:
            self._refuse(connection, f"{host} arrived after all {self.count} processes of the run had joined")
        elif conflict := self._find_conflict(process, name, count):
            self._dismiss(connection, {"end": conflict, "code": 2})
            self._end(conflict, 2)
        else:
            self._admit(connection, process, name)

    def _find_conflict(self, process: int, name: str, count: int) -> str:
        """Returns why a process that knows the secret can't be part of this run; empty if it can."""
        if count != self.count:
            return f"{host_name(process, name)} is one of {count} processes, and host 0 expects {self.count}"
        if process not in range(count):
            return f"{host_name(process, name)} is not one of the processes 0 to {count - 1}"
        if process in self.members:
            return f"two processes have the id {process}: on {self.members[process].name} and on {name}"
        return ""

    def _admit(self, connection: "Connection", process: int, name: str) -> None:
        del self._strangers[connection]
        connection.process, connection.name = process, name
        self.members[process] = connection
        if len(self.members) == self.count:
            names = [self.members[process].name for process in range(self.count)]
            self._send({"members": names}, *self.members.values())

    def _refuse(self, connection: "Connection", reason: str) -> None:
        """Reports and ends a connection; the run is not affected."""
        self._refusals += 1
        if self._refusals <= WARNINGS:
            more = "; further ones are not reported" if self._refusals == WARNINGS else ""
            with contextlib.suppress(OSError, ValueError):
                print(f"warning: refused: {reason}{more}", file=sys.stderr, flush=True)
        self._dismiss(connection, {"end": reason, "code": 2})

    def _dismiss(self, connection: "Connection", message: dict[str, Any]) -> None:
        """Sends a last message. The connection is closed by its other end, or after a while: closing it here, with
        input unread, would discard the message."""
        self._send(message, connection)
        connection.is_refused = True
        with contextlib.suppress(OSError):
            connection.transport.write_eof()
        self.loop.call_later(SETTLE, connection.abort)

    def receive(self, process: int, message: dict[str, Any]) -> None:
        """Handles a message of a host. Raises `KeyError` or `TypeError` for a malformed one."""
        member = self.members[process]
        member.missed = 0
        if "value" in message:
            self._values[process] = message["value"]
            if len(self._values) == self.count:
                values, self._values = [self._values[process] for process in range(self.count)], {}
                self._send({"values": values}, *self.members.values())
        elif "step" in message:
            self._answer_step(member, message["step"], message["requested"])
        elif "failed" in message:
            # An error ends all hosts with its own code: with LOST, all would restart and meet the same error.
            code = message["code"] if message["code"] in (1, 2, STOPPED) else LOST
            hint = RESTART_HINT if code in (LOST, STOPPED) else ""
            host = host_name(process, member.name)
            self._end(
                f"{host} stopped: {message['failed']}; this host ends with code {code}{hint}", code, cause=process
            )
        elif "leave" in message:
            member.has_left = True
            if all(member.has_left for member in self.members.values()):
                self._send({"left": True}, self.members[0])

    def _answer_step(self, member: "Connection", step: int, requested: bool) -> None:
        """Answers whether a host should continue after `step`. The last step must be one that no host has passed: the
        step after the latest one for which a host got permission to continue, as all hosts will ask about that step."""
        self._stop_requested |= requested
        if self._stop_requested and self._last is None:
            self._last = max(self._continued + 1, step)
        elif self._last is None:
            self._continued = max(self._continued, step)
        self._send({"last": self._last}, member)

    def _lose(self, process: int, reason: str) -> None:
        member = self.members[process]
        if not member.has_left:
            self._end(explain_loss(host_name(process, member.name), reason), LOST, cause=process)

    def _end(self, text: str, code: int, cause: int | None = None) -> None:
        """Informs all hosts that the run is over: host 0 late, since the hub ends with it, and the host that is the
        `cause` last, since it waits for this message as a sign that the others have been informed."""
        if self.ended:
            return
        self.ended = {"end": text, "code": code}
        order = sorted(self.members, key=lambda process: (process == cause, process == 0))
        self._send(self.ended, *(self.members[process] for process in order))

    def _send(self, message: dict[str, Any], *connections: "Connection") -> None:
        line = json.dumps(message).encode() + b"\n"
        for connection in connections:
            if not connection.transport.is_closing():
                connection.transport.write(line)


class Connection(asyncio.Protocol):
    """A connection to the hub: splits its input into lines."""

    transport: asyncio.Transport

    def __init__(self, hub: Hub):
        self._hub = hub
        self._unread = b""
        self.nonce = secrets.token_hex(16)
        self.address = ""
        self.process: int | None = None
        """Process id of the host; None before it has joined."""
        self.name = ""
        self.missed = 0
        """Heartbeats missed in a row."""
        self.has_left = self.is_refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.address = (transport.get_extra_info("peername") or ("?",))[0]
        self._hub.connected(self)

    def data_received(self, data: bytes) -> None:
        *lines, self._unread = (self._unread + data).split(b"\n")
        if self.process is None and not lines and len(self._unread) >= LONGEST_HELLO:
            lines = [self._unread]
        for line in lines:
            if self.is_refused:
                self._unread = b""
            elif self.process is None:
                self._hub.greet(self, line[:LONGEST_HELLO])
            else:
                try:
                    self._hub.receive(self.process, json.loads(line))
                except (ValueError, KeyError, TypeError, RecursionError):
                    self.abort()  # which counts as a lost host
                    return

    def eof_received(self) -> None:
        self._hub.greet(self, b"")

    def connection_lost(self, exc: Exception | None) -> None:
        self._hub.disconnected(self)

    def abort(self) -> None:
        """Closes the connection immediately."""
        self.transport.abort()
