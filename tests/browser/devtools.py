"""Headless Chromium, driven through its DevTools pipe: one page at a time, with a record of all its requests."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--disable-default-apps", "--mute-audio",
    "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 60.0
"""Seconds until an answer must have come."""


def find() -> str:
    """Returns the path of the browser; without one, the tests fail with advice on what to install."""
    executable = next((path for name in NAMES if (path := shutil.which(name))), None)
    assert executable, (
        f"none of {', '.join(NAMES)} is on the PATH: install Chromium (Debian, Ubuntu: apt-get install chromium) or "
        "Google Chrome to run the tests of pages"
    )
    return executable


class Browser:
    """A browser with a separate profile and one open page.

    The protocol (chromedevtools.github.io/devtools-protocol) consists of JSON messages that end with a zero byte; with
    --remote-debugging-pipe, the browser reads them from file descriptor 3 and answers on 4.
    """

    def __init__(self, profile: Path):
        shell = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null'
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", shell, "sh", find(), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        self._buffer, self._count, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        """Events that the browser has sent since the page was opened."""
        pages = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """Ends the browser."""
        self._to.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._from.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        number = self._count
        while True:
            reply = self._read()
            if reply.get("id") == number:
                assert "error" not in reply, reply["error"]
                return reply["result"]
            self.events.append(reply)

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser has not answered for {PATIENCE:.0f} s"
            chunk = os.read(self._from.fileno(), 1 << 20)
            assert chunk, f"the browser ended with code {self._process.wait()}"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, width: int, *, dark: bool = False, media: str = "") -> None:
        """Opens a file in a window of `width` CSS pixels and waits until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def run(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression on the page; waits for a promise."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def screenshot(self) -> bytes:
        """Returns the whole page as PNG, whatever its height."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def requests(self) -> list[str]:
        """Returns the addresses requested since the page was opened, allowed or not."""
        self.run("new Promise(done => setTimeout(done, 200))")
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """Returns errors and uncaught exceptions since the page was opened."""
        logged = [event["params"] for event in self.events if event.get("method") == "Log.entryAdded"]
        thrown = [event["params"] for event in self.events if event.get("method") == "Runtime.exceptionThrown"]
        return [one["entry"]["text"] for one in logged] + [one["exceptionDetails"]["text"] for one in thrown]
