"""Pages in a real browser: headless Chromium, driven through its DevTools protocol. Tests skip where it is missing."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 60  # seconds for an answer
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",  # a camera that shows a test pattern
)  # fmt: skip


class Browser:
    """A Chromium that lives until `close`; commands and answers go through two pipes."""

    def __init__(self, program: str, folder: Path) -> None:
        to_read, self._commands = _pipe()
        self._answers, to_write = _pipe()
        command = shlex.join([program, *OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"])
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {command} 3<&{to_read} 4>&{to_write}"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._received = b""
        self._ids = itertools.count(1)
        self._target: str | None = None
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """A command's result; events that come before it are added to `events`."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def wait(self, method: str, session: str) -> None:
        """Wait for an event of a page."""
        while not any(event["method"] == method and event.get("sessionId") == session for event in self.events):
            self._receive()

    def open(self, file: Path | str, width: int = 1440, height: int = 900, dark: bool = False) -> Page:
        """A file, or what is at an address, in a new page of this size, instead of the page before."""
        self.close_page()
        target = self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.events.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", session, **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", session, features=[scheme])
        self.call("Page.navigate", session, url=file if isinstance(file, str) else file.absolute().as_uri())
        self.wait("Page.loadEventFired", session)
        return Page(self, session)

    def close_page(self) -> None:
        """Close the page that is open, if one is."""
        if self._target is not None:
            self.call("Target.closeTarget", targetId=self._target)
            self._target = None

    def close(self) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._commands)
            os.close(self._answers)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._answers], [], [], PATIENCE)
            content = os.read(self._answers, 1 << 20) if ready else b""
            if not content:
                raise TimeoutError("Chromium does not answer")
            self._received += content
        message, _, self._received = self._received.partition(b"\0")
        received = json.loads(message)
        if "method" in received:
            self.events.append(received)
        return received


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are none of 3 and 4, which Chromium reads from and writes to."""
    ends = os.pipe()
    high = fcntl.fcntl(ends[0], fcntl.F_DUPFD_CLOEXEC, 10), fcntl.fcntl(ends[1], fcntl.F_DUPFD_CLOEXEC, 10)
    for end in ends:
        os.close(end)
    return high


class Page:
    """A page that has been loaded."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser = browser
        self.session = session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        options = {"returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        """The text of each element that is shown."""
        shown = f"[...document.querySelectorAll({json.dumps(selector)})].filter((e) => e.checkVisibility())"
        return self.run(f"{shown}.map((e) => e.innerText.trim())")

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str) -> None:
        """Put text into a field."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{field}.value = {json.dumps(text)}, {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")

    def wait(self, script: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, f"never true: {script}\n{self.run('document.body.innerText')}"
            time.sleep(0.1)

    def choose(self, selector: str, file: Path) -> None:
        """Choose a file in a file input."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        self.call("DOM.setFileInputFiles", files=[str(file)], objectId=found["result"]["objectId"])

    def screenshot(self, file: Path | None = None, whole: bool = False, **clip: float) -> bytes:
        """A PNG of what is seen, of the whole page, or of a part of the window: x, y, width, height."""
        options: dict[str, Any] = {"captureBeyondViewport": whole}
        if clip:
            left, top = self.run("new Promise((done) => requestAnimationFrame(() => done([scrollX, scrollY])))")
            options["clip"] = clip | {"scale": 1, "x": clip["x"] + left, "y": clip["y"] + top}
        content = base64.b64decode(self.call("Page.captureScreenshot", **options)["data"])
        if file is not None:
            file.write_bytes(content)
        return content

    def box(self, selector: str) -> dict[str, float]:
        """Place and size of an element in the window, which is scrolled to it: x, y, width, height."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        return self.run(f"(({{x, y, width, height}}) => ({{x, y, width, height}}))({element}.getBoundingClientRect())")

    def problems(self, origin: str | None = None) -> list[str]:
        """Errors and warnings of the console, requests for anything but the page, and horizontal overflow.

        Args:
            origin: where the page may request more from, such as "http://127.0.0.1:7860".
        """
        time.sleep(0.1)
        self.run("1")
        found = []
        for event in self.browser.events:
            params, method = event.get("params", {}), event["method"]
            if event.get("sessionId") != self.session:
                continue
            if method == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"]))
            elif method == "Log.entryAdded" or (
                method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert")
            ):
                found.append(json.dumps(params))
            elif method == "Network.requestWillBeSent" and params["type"] != "Document":
                url = params["request"]["url"]
                own = url.startswith(("data:", *((f"{origin}/", f"blob:{origin}/") if origin else ())))
                found += [] if own else [url[:200]]
        width = self.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return found + ([f"the page is {width} pixels too wide"] if width > 0 else [])


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for the tests of one file, after which it ends: pages that move take time from other tests."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("needs Chromium")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """A browser without pages; those of the test are closed after it."""
    yield chromium
    chromium.close_page()
