"""Control channel between the hosts of a run: membership, agreement on values, failure detection.

Every host holds one TCP connection to the hub on host 0 (`hub`) and sends heartbeats over it, so that a connection that
breaks or stays silent has a host name. Messages are JSON objects, one per line:

    hub → host    nonce    a random text, new for each connection
                  members  names of all hosts; sent when the last one has joined
                  values   the values that all hosts sent with `value`, by process
                  last     number of the last step, or null to continue
                  left     all hosts have sent `leave`
                  end      why the run is over, and the `code` to exit with
                  heartbeat
    host → hub    hello    process id, name, number of processes, and a proof of the shared secret
                  value    this host's part of a `gather`
                  step     number of a finished step, and whether a signal `requested` to stop
                  failed   why this host ends, and its exit `code`
                  leave    this host has finished
                  heartbeat

JAX's coordination service detects a lost host too. It can't replace this channel: it aborts every process with SIGABRT
(exit code 134) instead of code 3, the message has a task number and no host name, it needs its full heartbeat timeout
where a broken connection is seen at once, names nobody when the coordinator itself is lost or when hosts are missing or
configured differently at the start, and has no authentication. A callback in place of the abort crashes in jaxlib 0.10
(std::bad_cast). So JAX's own timeout is disabled (`distributed`). Nothing here needs JAX or a device.
"""

import contextlib
import hashlib
import hmac
import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, Self

from xlam_jax.errors import STOPPED, StoppedError, UserError

HEARTBEAT = 1.0
"""Seconds between heartbeats."""
HEARTBEAT_TIMEOUT = 25.0
"""Heartbeat timeout in seconds. Shorter than the 30 s after which collectives on CPUs fail with a message that names no
host."""
LOST = 3
"""Exit code of a host that ends because another one was lost: restarting all hosts continues the run."""
RESTART_HINT = ", so that all can be started again and continue"
RETRY = 0.2
"""Seconds between attempts to connect."""
SECRET = "XLAM_JAX_SECRET"
"""Environment variable with a text that only the hosts of a run know. Without it, any program that speaks this protocol
can join until all hosts are present."""
SETTLE = 5.0
"""Seconds that an ending process waits for the hub: to learn which host was lost (a collective often fails slightly
before the hub sees the broken connection), and to have its last message delivered."""


def prove(secret: str, nonce: str, process: int, name: str, count: int) -> str:
    """Returns the HMAC-SHA256 of a host's hello and the hub's nonce: proves the secret without revealing it."""
    message = json.dumps([nonce, process, name, count]).encode()
    return hmac.new(secret.encode(), message, hashlib.sha256).hexdigest()


def host_name(process: int, name: str) -> str:
    """Returns how messages refer to a host."""
    return f"host {process} ({name})"


def explain_loss(host: str, reason: str) -> str:
    """Returns the message with which a host ends because another one was lost."""
    return f"{host} {reason}; this host ends with code {LOST}{RESTART_HINT}"


def explain_silence(heartbeat_timeout: float) -> str:
    """Returns the reason for `explain_loss` when no heartbeat arrives."""
    return f"sent no heartbeat for {heartbeat_timeout:.0f} s: it hangs, or the network is interrupted"


DISCONNECTED = "closed its connection without a message: it was killed, or its machine went down"
"""The reason for `explain_loss` when a connection breaks."""


class Hosts:
    """The hosts of a run, seen from one of them. This class is a run of one host; `Link` is one of several."""

    process = 0
    """Process id of this host."""
    count = 1
    names = ("this one",)
    """Machine names, by process id."""

    @property
    def first(self) -> bool:
        """Whether this is host 0, which prints the log and writes shared files."""
        return self.process == 0

    def gather(self, value: Any) -> list[Any]:
        """Returns every host's value, by process id, on every host. All hosts must call it; values are JSON."""
        return [value]

    def stops(self, step: int, requested: bool) -> bool:
        """Returns whether `step` is the last one for all hosts. All hosts call it after every step; `requested` is
        whether this host was asked to stop."""
        return requested

    def fail(self, error: BaseException) -> None:
        """Informs the other hosts why this one ends."""

    def close(self) -> None:
        """Waits for all hosts to finish, and leaves the run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is None:
            self.close()
        elif not isinstance(error, SystemExit):
            self.fail(error)


class Link(Hosts):
    """The control channel of one host of several. The process ends when the hub ends the run or is lost itself."""

    def __init__(
        self,
        address: tuple[str, int],
        process: int,
        count: int,
        *,
        timeout: float,
        heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
        secret: str = "",
    ):
        """Connects to the hub at `address` and returns when all `count` hosts have joined.

        Raises `UserError` when that takes more than `timeout` seconds, or when the hub refuses this host, as it does
        for a different `secret`.
        """
        self.process, self.count, self._secret = process, count, secret
        self.me = host_name(process, socket.gethostname())
        self._heartbeat_timeout, self._missed = heartbeat_timeout, 0
        self.names = ("?",) * count
        self._joined, self._ended, self._left = threading.Event(), threading.Event(), threading.Event()
        self._greeted = threading.Event()
        self._values: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._last_step: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._refusal = ""
        self._is_ending = self._is_leaving = False
        self._lock = threading.Lock()
        deadline = time.monotonic() + timeout
        where = f"{address[0]}:{address[1]}"
        try:
            self._socket = connect(address, timeout)
        except OSError as error:
            raise UserError(
                f"{self.me}: the coordinator, host 0 at {where}, did not answer within {timeout:.0f} s "
                f"({error.strerror or error}); is it running there, and can this address be reached from here?"
            ) from None
        for task in (self._read, self._beat, self._watch):
            threading.Thread(target=task, name="link", daemon=True).start()
        # The timeout of the hub is shorter, and its message names the missing hosts.
        joined = self._joined.wait(max(0.0, deadline + SETTLE - time.monotonic()))
        if not joined or self._refusal:
            self._is_ending = True
            silent = f"{self.me}: host 0 at {where} accepted the connection and sent nothing for {timeout:.0f} s"
            raise UserError(self._refusal or silent)

    def gather(self, value: Any) -> list[Any]:
        self._send(value=value)
        return self._values.get()

    def stops(self, step: int, requested: bool) -> bool:
        self._send(step=step, requested=requested)
        last = self._last_step.get()
        return last is not None and step >= last

    def fail(self, error: BaseException) -> NoReturn:
        """Informs the other hosts and ends this process. An error that may be a consequence of a lost host first waits
        for the hub to name that host."""
        code = 1
        if isinstance(error, UserError):
            code, text = 2, str(error)
        elif isinstance(error, StoppedError):
            code, text = STOPPED, str(error)
        elif isinstance(error, KeyboardInterrupt):
            code, text = 130, "interrupted"
        else:
            time.sleep(SETTLE)
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        self._is_ending = True
        with contextlib.suppress(OSError):
            self._send(failed=text, code=code)
            self._ended.wait(SETTLE)  # the hub has informed the others
        if code == 1:
            with contextlib.suppress(OSError, ValueError):  # the terminal may be closed
                traceback.print_exception(error)
        _exit(f"{self.me}: {text}", code)

    def close(self) -> None:
        self._is_leaving = True
        self.gather(None)
        with contextlib.suppress(OSError):
            self._send(leave=True)
        if self.first:  # the hub ends with this process, and would lose messages that it has not handled
            self._left.wait(SETTLE)

    def _send(self, **message: Any) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            self._socket.sendall(line)

    def _beat(self) -> None:
        """Sends heartbeats."""
        self._greeted.wait()  # the hello must be the first message
        while not self._ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                self._send(heartbeat=True)

    def _watch(self) -> None:
        """Ends the process when the hub's heartbeats stop. Counts missed heartbeats rather than seconds: a pause of
        this process counts as one, since what arrived in the meantime has not been read yet."""
        while not self._ended.wait(HEARTBEAT):
            self._missed += 1
            if self._missed * HEARTBEAT > self._heartbeat_timeout:
                self._lose_hub(explain_silence(self._heartbeat_timeout))

    def _read(self) -> None:
        """Handles the hub's messages until the connection ends."""
        with contextlib.suppress(OSError, ValueError), self._socket.makefile("rb") as lines:
            for line in lines:
                self._missed = 0
                self._handle(json.loads(line))
        self._lose_hub(DISCONNECTED)

    def _handle(self, message: dict[str, Any]) -> None:
        if "nonce" in message:
            name = socket.gethostname()
            proof = prove(self._secret, message["nonce"], self.process, name, self.count)
            self._send(hello=self.process, name=name, count=self.count, proof=proof)
            self._greeted.set()
        elif "members" in message:
            self.names = tuple(message["members"])
            self._joined.set()
        elif "values" in message:
            # All hosts have finished: host 0 may exit before this one has looked at the values.
            self._is_ending |= self._is_leaving
            self._values.put(message["values"])
        elif "last" in message:
            self._last_step.put(message["last"])
        elif "left" in message:
            self._left.set()
        elif "end" in message:
            self._ended.set()
            if not self._joined.is_set():
                self._refusal = message["end"]
                self._joined.set()
            elif not self._is_ending:
                _exit(message["end"], message["code"])

    def _lose_hub(self, reason: str) -> None:
        if not self._is_ending and not self._ended.is_set():
            _exit(explain_loss(host_name(0, self.names[0]), reason), LOST)


def _exit(text: str, code: int) -> NoReturn:
    """Prints a message and ends the process immediately: XLA's threads may wait forever for a host that is lost."""
    with contextlib.suppress(OSError, ValueError):
        text = text if code == STOPPED else f"error: {text}"
        print(f"\n{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(code)


def connect(address: tuple[str, int], timeout: float) -> socket.socket:
    """Connects as soon as the other side listens. Raises `OSError` when it does not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection(address, timeout=max(0.1, min(5.0, deadline - time.monotonic())))
        except OSError:
            if time.monotonic() + RETRY > deadline:
                raise
            time.sleep(RETRY)
        else:
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection


def relay(to: Callable[[], socket.socket]) -> int:
    """Forwards connections from a port of this machine to where `to` connects; returns the port.

    JAX's client aborts the process as soon as its connection to the coordinator breaks. When the far end disconnects,
    the near end stays open, which leaves `Link` the time to name the lost host.
    """
    server = socket.create_server(("127.0.0.1", 0))
    open_ends: list[socket.socket] = []

    def forward(source: socket.socket, target: socket.socket, *, ends: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        if ends:
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while True:
            near, _ = server.accept()
            open_ends.append(near)
            try:
                far = to()
            except OSError:
                continue  # left open, without an answer
            for source, target in ((near, far), (far, near)):
                options = {"ends": target is far}
                threading.Thread(
                    target=forward, args=(source, target), kwargs=options, name="relay", daemon=True
                ).start()

    threading.Thread(target=serve, name="relay", daemon=True).start()
    return server.getsockname()[1]
