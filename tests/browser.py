"""Headless Chromium, driven by the DevTools protocol over a pipe: no port, no driver, no package."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
# A container's root has neither a sandbox nor a large /dev/shm; nothing here leaves the machine.
OPTIONS = """--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe
--no-first-run --disable-background-networking --disable-component-update --disable-sync
--window-size=1280,1000"""


class Browser:
    """One tab. `requests` are the addresses it asked for, `complaints` what its console said."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        (read_end, their_out), (their_in, write_end) = os.pipe(), os.pipe()
        words = [CHROMIUM, *OPTIONS.split(), f"--user-data-dir={profile}", "about:blank"]
        # It reads from descriptor 3 and writes to 4.
        their_in, their_out = _raised(their_in), _raised(their_out)
        command = ["bash", "-c", f'exec "$@" 3<&{their_in} 4>&{their_out}', "bash", *words]
        null = subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(their_in, their_out), stdout=null, stderr=null)
        os.close(their_in)
        os.close(their_out)
        self._answers, self._calls = os.fdopen(read_end, "rb"), os.fdopen(write_end, "wb", 0)
        self._number, self._session = 0, {}
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        self._calls.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        given = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in given:
            raise RuntimeError(f"{script}: {given['exceptionDetails']}")
        return given["result"].get("value")

    def open(self, address: str) -> None:
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def wait(self, script: str, timeout_s: float = 15.0) -> None:
        """Waits until an expression is true in the page."""
        deadline = time.monotonic() + timeout_s
        while not self._ask(script):
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {script}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def close(self) -> None:
        self._session = {}
        self.call("Browser.close")
        self._process.wait(timeout=10)
        self._answers.close()
        self._calls.close()

    def _ask(self, script: str) -> Any:
        try:
            return self.run(script)
        except RuntimeError:  # the page is on its way to another one
            return None

    def _next(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            message += byte
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        given: Callable[..., Any] = event.get("params", {}).get
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(given("request")["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(given("exceptionDetails")))
            case "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(given("args")))
            case "Log.entryAdded":
                self.complaints.append(json.dumps(given("entry")))


def _raised(fd: int) -> int:
    """The descriptor under a number of at least 10."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD, 10)
    os.close(fd)
    return high
