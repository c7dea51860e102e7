"""A real browser for tests: headless Chromium spoken to over a pipe, so that nothing but the browser is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
INSTALL = "apt-get install chromium"
PHONE, SCREEN = 390, 1280
CHECKS = (Path(__file__).parent / "page_checks.js").read_text(encoding="utf-8")


def find_browser() -> str | None:
    """The browser to drive: EDGEFT_BROWSER, or the first of the usual names on the PATH."""
    named = os.environ.get("EDGEFT_BROWSER")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class BrowserError(Exception):
    """What the browser, or a script in the page, answered instead of a result."""


class Browser:
    """One page of a headless Chromium; commands are those of the DevTools protocol."""

    def __init__(self, path: str, profile: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def hand_over() -> None:  # the protocol wants the pipe at 3 and 4
            high = os.dup(to_browser), os.dup(from_browser)
            for number, given in zip((3, 4), high, strict=True):
                os.dup2(given, number)
                os.set_inheritable(number, True)

        flags = ["--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run",
                 "--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking",
                 "--disable-component-update", "--hide-scrollbars", f"--user-data-dir={profile}"]  # fmt: skip
        self.process = subprocess.Popen(
            [path, *flags, "about:blank"], preexec_fn=hand_over, close_fds=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session = b"", 0, ""
        self.requests: list[str] = []  # addresses that pages asked for
        self.said: list[str] = []  # what pages wrote to the console, and their errors
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{part}.enable")

    def call(self, method: str, seconds: float = 60, **parameters: Any) -> dict[str, Any]:
        """The result of one command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._wait(self._number, seconds)

    def _wait(self, number: int | None, seconds: float) -> dict[str, Any]:
        """The answer of that number; without one, until the page has loaded."""
        end = time.monotonic() + seconds
        while True:
            found = self._message(end)
            if number is not None and found.get("id") == number:
                if "error" in found:
                    raise BrowserError(found["error"]["message"])
                result: dict[str, Any] = found["result"]
                return result
            self._event(found)
            if number is None and self._loaded:
                return {}

    def _message(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise BrowserError("the browser did not answer in time")
            if not (more := os.read(self._read, 1 << 20)):
                raise BrowserError("the browser has ended")
            self._buffer += more
        text, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(text)
        return found

    def _event(self, found: dict[str, Any]) -> None:
        method, parameters = found.get("method"), found.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"][:200])
        elif method == "Runtime.exceptionThrown":
            detail = parameters["exceptionDetails"]
            self.said.append(detail.get("exception", {}).get("description") or detail["text"])
        elif method == "Runtime.consoleAPICalled":
            self.said.append(" ".join(str(each.get("value")) for each in parameters["args"]))
        elif method == "Log.entryAdded":
            self.said.append(parameters["entry"]["text"])

    def size(self, width: int, height: int = 900) -> None:
        """The window, as a phone or a screen has it."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def media(self, scheme: str = "light", kind: str = "screen") -> None:
        """light or dark, screen or print."""
        wanted = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=kind, features=wanted)

    def open(self, address: str, seconds: float = 60) -> None:
        self._loaded = False
        self.call("Page.navigate", url=address)
        self._wait(None, seconds) if not self._loaded else None

    def evaluate(self, script: str, seconds: float = 60) -> Any:
        """The value of a JavaScript expression in the page; a promise is waited for."""
        found = self.call("Runtime.evaluate", seconds, expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            detail = found["exceptionDetails"]
            raise BrowserError(detail.get("exception", {}).get("description") or detail["text"])
        return found["result"].get("value")

    def picture(self, path: Path, whole: bool = False) -> None:
        """The window, or the whole page, as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed, on the paper it asks for."""
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._read)
        os.close(self._write)


@contextmanager
def browser(path: str) -> Iterator[Browser]:
    """A browser with a profile of its own, ended afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = Browser(path, Path(folder))
        try:
            yield made
        finally:
            made.close()


def look(found: Browser, width: int = SCREEN, scheme: str = "light") -> list[dict[str, str]]:
    """What is wrong with the page that is open at that width, everything that can be folded unfolded."""
    found.media(scheme)
    found.size(width)
    found.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    found.size(width, int(found.evaluate("document.documentElement.scrollHeight")) + 50)
    result: list[dict[str, str]] = found.evaluate(CHECKS)
    return result


def faults(found: Browser, page: str, folder: Path, width: int = SCREEN, scheme: str = "light") -> list[dict[str, str]]:
    """What is wrong with a page that is not there yet."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    found.media(scheme)
    found.size(width)
    found.open(path.as_uri())
    return look(found, width, scheme)
