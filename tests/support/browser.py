"""A browser without a window, driven over the Chrome DevTools Protocol, which it speaks on a pipe.

Only what a test of a page needs: open it, run a script in it, move the mouse, take a picture of a
part of it, and know every request and every complaint. No package is needed but the browser.
"""

from __future__ import annotations

import base64
import io
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe"),
)
_TIMEOUT_SECONDS = 60


def found() -> str | None:
    """Return the path of a browser, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def started(program: str, profile: Path) -> Iterator[Browser]:
    """Yield a browser with an empty profile; end it afterwards."""
    to_browser, from_browser = os.pipe(), os.pipe()
    ends = f"3<&{to_browser[0]} 4>&{from_browser[1]}"  # it reads from 3 and writes to 4
    command = [
        "bash",
        "-c",
        f'exec "$@" {ends}',
        "bash",
        program,
        *_FLAGS,
        f"--user-data-dir={profile}",
    ]
    process = subprocess.Popen(
        command,
        pass_fds=(to_browser[0], from_browser[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        yield Browser(to_browser[1], from_browser[0])
    finally:
        process.terminate()
        process.wait(timeout=_TIMEOUT_SECONDS)
        os.close(to_browser[1])
        os.close(from_browser[0])


class Browser:
    """One tab of it."""

    def __init__(self, write_to: int, read_from: int) -> None:
        self._write_to, self._read_from = write_to, read_from
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.requests: list[str] = []
        """Addresses that the page asked for since it was opened."""
        self.complaints: list[str] = []
        """What it wrote to the console, and errors."""
        self._is_loaded = False
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def open(self, address: str, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a page in a window of that size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self._call("Emulation.setDeviceMetricsOverride", **size, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self.requests, self.complaints, self._is_loaded = [], [], False
        self._call("Page.navigate", url=address)
        self._until(lambda: self._is_loaded)

    def run(self, script: str) -> object:
        """Return the value of an expression in the page."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse at one place of the window, move it, and let it go at another."""
        for kind, (x, y) in (("Pressed", start), ("Moved", end), ("Released", end)):
            self._call(
                "Input.dispatchMouseEvent",
                type=f"mouse{kind}",
                x=x,
                y=y,
                button="left",
                buttons=0 if kind == "Released" else 1,
                clickCount=1,
            )

    def place(self, selector: str) -> dict[str, float]:
        """Return where the first such element is in the window: x, y, width, height."""
        shown = (
            f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})"
        )
        self.run(shown)
        rectangle = (
            f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()"
        )
        found = self.run(rectangle)
        assert isinstance(found, dict)
        return {name: found[name] for name in ("x", "y", "width", "height")}

    def picture(self, selector: str) -> np.ndarray:
        """Return the pixels [H, W, 3] of the first such element, as shown."""
        clip = {**self.place(selector), "scale": 1}
        clip["x"] += float(self.run("scrollX"))
        clip["y"] += float(self.run("scrollY"))
        content = self._call("Page.captureScreenshot", format="png", clip=clip)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))

    def _call(self, method: str, **arguments: object) -> dict:
        """Return what a method of the protocol answers; note the events that come before."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": arguments}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write_to, json.dumps(message).encode() + b"\0")
        answers: list[dict] = []
        self._until(lambda: bool(answers), answers=answers, number=number)
        assert "error" not in answers[0], answers[0]
        return answers[0]["result"]

    def _until(self, is_done, *, answers: list[dict] | None = None, number: int = 0) -> None:
        """Read messages until that holds."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while not is_done():
            message = self._next(deadline)
            if message.get("id") == number and answers is not None:
                answers.append(message)
            self._note(message.get("method", ""), message.get("params", {}))

    def _next(self, deadline: float) -> dict:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read_from], [], [], deadline - time.monotonic())
            assert ready, "the browser does not answer"
            content = os.read(self._read_from, 1 << 16)
            assert content, "the browser ended"
            self._rest += content
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: str, found: dict) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif event == "Page.loadEventFired":
            self._is_loaded = True
        elif event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(found))
