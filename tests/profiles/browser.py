"""Chromium without a window, driven through its own pipe: no package, no port, no network.

with Browser() as browser:
    page = browser.open("file:///...", width=390, scheme="dark")
    page.run("document.title"), page.problems, page.screenshot(path)
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_S = 60.0
MOVE = """
import os, sys
os.dup2(int(sys.argv[1]), 3), os.dup2(int(sys.argv[2]), 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def chromium() -> str:
    """The browser's path; RuntimeError says how to get one."""
    found = os.environ.get("EVIT_FAST_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), "")
    if not found:
        raise RuntimeError(
            "the report's browser test needs Chromium; install it (apt-get install chromium) "
            "or name it in EVIT_FAST_CHROMIUM"
        )
    return found


class Page:
    """One tab. problems: errors, warnings and failed or refused requests that it has logged."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.loaded = False

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.send(method, self.session, **parameters)

    def run(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        result = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise AssertionError(result["exceptionDetails"])
        return result["result"].get("value")

    def view(self, width: int, height: int, scheme: str) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=False,  # a phone would widen its window to what overflows
        )  # fmt: skip
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=media)

    def screenshot(self, path: Path) -> None:
        """The whole page, however long."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def heard(self, method: str, what: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(what["exceptionDetails"]))
        elif method == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            self.problems.append(what["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning"):
            self.problems.append(str(what["args"]))


class Browser:
    def __enter__(self) -> Browser:
        self.folder = tempfile.mkdtemp(prefix="evit_fast_browser_")
        down, up = os.pipe(), os.pipe()  # ours to the browser, the browser's to us
        command = [
            chromium(), "--headless=new", "--remote-debugging-pipe", "--no-sandbox",
            "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
            "--disable-background-networking", f"--user-data-dir={self.folder}", "about:blank",
        ]  # fmt: skip
        # The browser reads from descriptor 3 and writes to 4; a process of ours moves them there,
        # once they are out of the way of both.
        read, write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (down[0], up[1]))
        self.process = subprocess.Popen(
            [sys.executable, "-c", MOVE, str(read), str(write), *command],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (down[0], up[1], read, write):
            os.close(fd)
        self.out, self.into = down[1], up[0]
        self.rest, self.count = b"", 0
        self.pages: dict[str, Page] = {}
        self.send("Target.setDiscoverTargets", discover=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE_S)
        os.close(self.out)
        os.close(self.into)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _message(self, end: float) -> dict[str, Any]:
        while b"\0" not in self.rest:
            if not select.select([self.into], [], [], max(0.0, end - time.monotonic()))[0]:
                raise AssertionError("Chromium did not answer in time")
            part = os.read(self.into, 1 << 20)
            if not part:
                raise AssertionError(f"Chromium ended with code {self.process.wait(PATIENCE_S)}")
            self.rest += part
        text, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(text)
        page = self.pages.get(message.get("sessionId", ""))
        if page and "method" in message:
            page.heard(message["method"], message["params"])
        return message

    def send(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        self.count += 1
        request = {"id": self.count, "method": method, "params": parameters}
        if session:
            request["sessionId"] = session
        data = memoryview(json.dumps(request).encode() + b"\0")
        while data:
            data = data[os.write(self.out, data) :]
        end = time.monotonic() + PATIENCE_S
        while True:
            message = self._message(end)
            if message.get("id") == self.count:
                if "error" in message:
                    raise AssertionError(f"{method}: {message['error']}")
                return message["result"]

    def open(self, url: str, width: int, scheme: str, height: int = 900) -> Page:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.view(width, height, scheme)
        page.send("Page.navigate", url=url)
        end = time.monotonic() + PATIENCE_S
        while not page.loaded:
            self._message(end)
        return page
