"""A thin line between the hosts of a run beside the devices' own: who is there, what all agree on, who is gone.

JAX ends a process whose peer is lost with a message that names nobody, or leaves it waiting. So every host holds one
TCP connection to a hub on host 0 and sends a beat over it; one that breaks or falls silent has a name. JSON lines:

    host → hub    hello, beat, say (a value that all wait for), step (may I go on?), failed, bye
    hub → host    all (everyone is here), beat, told (everyone's values), stop (the last step), left (all said bye), end
                  (why it is over)

Nothing here needs JAX or a device.
"""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

from xlam_jax.errors import STOPPED, StoppedError, UserError

BEAT = 2.0
"""Seconds between beats."""
SILENCE = 25.0
"""Seconds after which a host that is not heard of counts as lost; less than the 30 after which collectives on CPUs give
up, with a message that names no host."""
LOST = 3
"""Exit code of a host that ends because another one was lost: starting all of them again continues the run."""
AGAIN = ", so that all can be started again and continue"
RETRY = 0.2
"""Seconds between attempts to connect."""
VERDICT = 5.0
"""Seconds in which the hub knows that a connection broke; a collective often fails a little earlier."""


def host_name(process: int, name: str) -> str:
    """How messages call a host."""
    return f"host {process} ({name})"


class Hosts:
    """The hosts of a run. This one is alone; `Link` is one of several."""

    process = 0
    """Which one this is."""
    count = 1
    names = ("this one",)
    """Of the machines, by process."""

    @property
    def first(self) -> bool:
        """Whether this is the one that tells and writes."""
        return self.process == 0

    def gather(self, value: Any) -> list[Any]:
        """Every host's value, by process, on every host, when all have called. Values can be written as JSON."""
        return [value]

    def stops(self, step: int, asked: bool) -> bool:
        """Whether this step is the last for all hosts; asked after each step, whether one is asked to stop or not."""
        return asked

    def fail(self, error: BaseException) -> None:
        """Tells the others why this host ends."""

    def close(self) -> None:
        """Leaves, when all hosts are at their end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is None:
            self.close()
        elif not isinstance(error, SystemExit):
            self.fail(error)


class Link(Hosts):
    """This host's end of the line. When the hub says that it is over, or is lost itself, the process ends."""

    def __init__(self, address: tuple[str, int], process: int, count: int, *, timeout: float, silence: float = SILENCE):
        """Returns when all hosts are there. Raises `UserError` when that takes more than `timeout` seconds."""
        self.process, self.count = process, count
        self.me = host_name(process, socket.gethostname())
        self._silence = silence
        self.names = ("?",) * count
        self._here, self._over, self._left = threading.Event(), threading.Event(), threading.Event()
        self._told: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._stop: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._refused: dict[str, Any] | None = None
        self._failing = self._leaving = False
        self._lock = threading.Lock()
        began = self._heard = time.monotonic()
        where = f"{address[0]}:{address[1]}"
        try:
            self._socket = connect(address, timeout)
        except OSError as error:
            raise UserError(
                f"{self.me}: the coordinator, host 0 at {where}, did not answer within {timeout:.0f} s "
                f"({error.strerror or error}); is it running there, and can this address be reached from here?"
            ) from None
        self._send(hello=process, name=socket.gethostname(), count=count)
        for task in (self._read, self._beat):
            threading.Thread(target=task, name="link", daemon=True).start()
        # the hub says who is missing a moment before
        here = self._here.wait(max(0.0, began + timeout + VERDICT - time.monotonic()))
        if not here or self._refused:
            self._failing = True
            raise UserError(
                self._refused["end"]
                if self._refused
                else f"{self.me}: host 0 at {where} took the connection and said nothing for {timeout:.0f} s"
            )

    def gather(self, value: Any) -> list[Any]:
        self._send(say=value)
        return self._told.get()

    def stops(self, step: int, asked: bool) -> bool:
        self._send(step=step, asked=asked)
        last = self._stop.get()
        return last is not None and step >= last

    def fail(self, error: BaseException) -> NoReturn:
        """Tells the others and ends this process. An error that comes of a lost host waits for its name."""
        code = 1
        if isinstance(error, UserError):
            code, text = 2, str(error)
        elif isinstance(error, StoppedError):
            code, text = STOPPED, str(error)
        elif isinstance(error, KeyboardInterrupt):
            code, text = 130, "interrupted"
        else:
            time.sleep(VERDICT)
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        self._failing = True
        with contextlib.suppress(OSError):
            self._send(failed=text, code=code)
            self._over.wait(VERDICT)  # the others have been told
        if code == 1:
            with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
                traceback.print_exception(error)
        _end(f"{self.me}: {text}", code)

    def close(self) -> None:
        self._leaving = True
        self.gather(None)
        with contextlib.suppress(OSError):
            self._send(bye=True)
        if self.first:  # with this process the hub ends, and what it has not sent or read yet is lost
            self._left.wait(VERDICT)

    def _send(self, **message: Any) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            self._socket.sendall(line)

    def _beat(self) -> None:
        at = time.monotonic()
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):
                self._send(beat=True)
            late, at = time.monotonic() - at > 3 * BEAT, time.monotonic()
            if late:  # this process stood still; what came meanwhile is not read yet
                self._heard = at
            if at - self._heard > self._silence:
                self._lost(f"has not been heard of for {self._silence:.0f} s: it hangs, or the network is cut")

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._socket.makefile("rb") as lines:
            for line in lines:
                self._heard = time.monotonic()
                self._take(json.loads(line))
        self._lost("ended without a word: it was killed, or its machine went down")

    def _take(self, message: dict[str, Any]) -> None:
        if "all" in message:
            self.names = tuple(message["all"])
            self._here.set()
        elif "told" in message:
            # all are at their end: host 0 may be gone before this one has looked at it
            self._failing |= self._leaving
            self._told.put(message["told"])
        elif "stop" in message:
            self._stop.put(message["stop"])
        elif "left" in message:
            self._left.set()
        elif "end" in message:
            self._over.set()
            if not self._here.is_set():
                self._refused = message
                self._here.set()
            elif not self._failing:
                _end(message["end"], message["code"])

    def _lost(self, why: str) -> None:
        if not self._failing and not self._over.is_set():
            _end(_gone(host_name(0, self.names[0]), why), LOST)


def _end(text: str, code: int) -> NoReturn:
    """Ends the process at once: threads of XLA may wait for a host that is gone, and would never let it go."""
    with contextlib.suppress(OSError, ValueError):
        text = text if code == STOPPED else f"error: {text}"
        print(f"\n{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(code)


def _gone(who: str, why: str) -> str:
    return f"{who} {why}; this host ends with code {LOST}{AGAIN}"


def connect(address: tuple[str, int], timeout: float) -> socket.socket:
    """Connects as soon as the other side listens. Raises `OSError` when it does not within `timeout` seconds."""
    until = time.monotonic() + timeout
    while True:
        try:
            made = socket.create_connection(address, timeout=max(0.1, min(5.0, until - time.monotonic())))
        except OSError:
            if time.monotonic() + RETRY > until:
                raise
            time.sleep(RETRY)
        else:
            made.settimeout(None)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return made


@dataclass
class _Peer:
    connection: socket.socket
    name: str
    heard: float = field(default_factory=time.monotonic)
    gone: bool = False


class Hub:
    """The middle of the line, on host 0."""

    def __init__(self, port: int, count: int, *, timeout: float, silence: float = SILENCE):
        """Waits for `count` hosts on a port, in the background; when they are not there after `timeout` seconds, those
        that are learn who is missing. Raises `UserError` when the port is taken."""
        self._count, self._timeout, self._silence = count, timeout, silence
        self._peers: dict[int, _Peer] = {}
        self._said: dict[int, Any] = {}
        self._going, self._last = -1, None  # the step that some host was last told to go on after; the last one
        self._wished = False
        self._ended: dict[str, Any] | None = None  # what was told to all
        self._lock = threading.RLock()
        both = socket.has_dualstack_ipv6()
        try:
            self._server = socket.create_server(
                ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=1024
            )
        except OSError as error:
            raise UserError(
                f"--coordinator: port {port} of this machine can't be had ({error.strerror}); is another run going on "
                "here? Choose another port for all hosts"
            ) from None
        for task in (self._accept, self._watch):
            threading.Thread(target=task, name="hub", daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._server.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(connection,), name="hub", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """One host's lines, to their end."""
        process = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), connection.makefile("rb") as lines:
            hello = json.loads(next(lines, b"{}"))
            process = self._join(connection, hello)
            if process is None:
                return
            for line in lines:
                with self._lock:
                    self._peers[process].heard = time.monotonic()
                    self._take(process, json.loads(line))
        if process is not None:
            with self._lock:
                self._lost(process, "ended without a word: it was killed, or its machine went down")

    def _join(self, connection: socket.socket, hello: dict[str, Any]) -> int | None:
        process, name = hello["hello"], hello["name"]
        with self._lock:
            if self._ended:  # before this one came
                self._peers[process] = _Peer(connection, name)
                self._tell(self._ended, to=process)
                return None
            wrong = None
            if hello["count"] != self._count:
                who = host_name(process, name)
                wrong = f"{who} is one of {hello['count']} processes, and host 0 expects {self._count}"
            elif process in self._peers:
                wrong = f"two processes have the id {process}: on {self._peers[process].name} and on {name}"
            if wrong:
                self._peers[self._count + len(self._peers)] = _Peer(connection, name)  # to be told as well
                self._end(wrong, 2)
                return None
            self._peers[process] = _Peer(connection, name)
            if len(self._peers) == self._count:
                self._tell({"all": [self._peers[at].name for at in range(self._count)]})
            return process

    def _take(self, process: int, message: dict[str, Any]) -> None:
        if "say" in message:
            self._said[process] = message["say"]
            if len(self._said) == self._count:
                told, self._said = [self._said[at] for at in range(self._count)], {}
                self._tell({"told": told})
        elif "step" in message:
            # No host was told yet to go on after the step behind `_going`: all will ask about it.
            self._wished |= message["asked"]
            if self._wished and self._last is None:
                self._last = max(self._going + 1, message["step"])
            elif self._last is None:
                self._going = max(self._going, message["step"])
            self._tell({"stop": self._last}, to=process)
        elif "failed" in message:
            who = host_name(process, self._peers[process].name)
            # an error ends all with its own code: with LOST, all would be started again and come to the same error
            code = message["code"] if message["code"] in (1, 2, STOPPED) else LOST
            again = AGAIN if code in (LOST, STOPPED) else ""
            self._end(f"{who} stopped: {message['failed']}; this host ends with code {code}{again}", code, but=process)
        elif "bye" in message:
            self._peers[process].gone = True
            if all(peer.gone for peer in self._peers.values()):
                self._tell({"left": True}, to=0)

    def _watch(self) -> None:
        began = at = time.monotonic()
        while not self._ended:
            time.sleep(BEAT / 2)
            late, at = time.monotonic() - at > 3 * BEAT, time.monotonic()
            self._look(at, began, late)

    def _look(self, at: float, began: float, late: bool) -> None:
        """Ends the run if a host is missing or silent at this moment; `late` after a time in which this process stood
        still."""
        with self._lock:
            self._tell({"beat": True})
            missing = sorted(set(range(self._count)) - self._peers.keys())
            if missing and at - began > self._timeout:
                shown = ", ".join(map(str, missing[:20])) + (" …" if len(missing) > 20 else "")
                came = f"{self._count - len(missing)} of {self._count} processes came"
                self._end(
                    f"{came} within {self._timeout:.0f} s; missing: process {shown}; were all of them started, "
                    "and can they reach host 0?",
                    2,
                )
            for process, peer in list(self._peers.items()):
                if late:  # this process stood still; what came meanwhile is not read yet
                    peer.heard = at
                elif at - peer.heard > self._silence:
                    text = f"has not been heard of for {self._silence:.0f} s: it hangs, or the network is cut"
                    self._lost(process, text)

    def _lost(self, process: int, why: str) -> None:
        if not self._peers[process].gone:
            self._end(_gone(host_name(process, self._peers[process].name), why), LOST, but=process)

    def _end(self, text: str, code: int, but: int | None = None) -> None:
        """Tells everyone that it is over, the host `but` last."""
        if self._ended:
            return
        self._ended = {"end": text, "code": code}
        for process in sorted(self._peers, key=lambda one: (one == but, one == 0)):
            self._tell(self._ended, to=process)

    def _tell(self, message: dict[str, Any], to: int | None = None) -> None:
        line = json.dumps(message).encode() + b"\n"
        for process in self._peers if to is None else (to,):
            with contextlib.suppress(OSError):
                self._peers[process].connection.sendall(line)


def relay(to: Callable[[], socket.socket]) -> int:
    """Forwards connections to a port of this machine, which is returned, to where `to` connects.

    When the far end goes away, the near one is left open: JAX's client aborts the process as soon as its coordinator is
    gone, and this leaves the link the time to say who that was.
    """
    server = socket.create_server(("127.0.0.1", 0))
    kept: list[socket.socket] = []

    def pump(source: socket.socket, target: socket.socket, *, near: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        if near:
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while True:
            near, _ = server.accept()
            kept.append(near)
            try:
                far = to()
            except OSError:
                continue  # left open, unanswered
            for source, target, is_near in ((near, far, True), (far, near, False)):
                options = {"near": is_near}
                threading.Thread(target=pump, args=(source, target), kwargs=options, name="relay", daemon=True).start()

    threading.Thread(target=serve, name="relay", daemon=True).start()
    return server.getsockname()[1]
