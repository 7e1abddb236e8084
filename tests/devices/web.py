"""onnxruntime-web in node, and a page in headless Chromium, for the tests: what they need, how they are called.

Chromium is driven by its DevTools protocol over two pipes (--remote-debugging-pipe): JSON messages that end with a zero
byte, so no port, no websocket and no driver is needed.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.devices import guest

SAMPLE = guest.ROOT / "samples" / "web"
SECONDS = 60.0  # a check takes a few, on a busy machine some ten; a minute means that something hangs
# Descriptors 3 and 4 are where Chromium looks for its pipes; a process in between puts them there.
IN_PLACE = (
    "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
INSECURE = "packlight.test"  # a name of this machine that is not localhost: over http it is no secure context
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    f"--host-resolver-rules=MAP {INSECURE} 127.0.0.1",
)


def need_node() -> str:
    guest.require("npm", "apt-get install nodejs npm")
    return guest.require("node", "apt-get install nodejs npm")


def set_up(bundle: Path, out: Path) -> Path:
    """The folder that samples/web/setup.sh makes: the page, the bundle, onnxruntime-web (kept in ~/.cache by version)."""
    need_node()
    command = ["sh", str(SAMPLE / "setup.sh"), str(bundle), str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return out


def check_in_node(out: Path, bundle: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """(exit status, verdict) of the page's check, run by node."""
    command = [need_node(), str(out / "node.mjs"), str(bundle), *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.stdout, ran.stderr
    return ran.returncode, json.loads(ran.stdout)


def read_outputs(file: Path) -> list[dict[str, NDArray[Any]]]:
    """What `node.mjs --outputs FILE` wrote: the outputs of every batch, bit for bit."""
    batches = json.loads(file.read_text())
    return [
        {
            name: np.frombuffer(bytes.fromhex(each["data"]), each["dtype"]).reshape(each["shape"])
            for name, each in batch.items()
        }
        for batch in batches
    ]


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """`python -m http.server` in a folder, as a process of its own; its URL. The server is gone when the block ends."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().split("port ")[1].split()[0]
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A page of a headless Chromium of its own, with a profile that is gone when the block ends."""
    chromium = guest.require("chromium", "apt-get install chromium")
    read_commands, write_commands = _high_pipe()
    read_answers, write_answers = _high_pipe()
    with tempfile.TemporaryDirectory(prefix="packlight-chromium-", ignore_cleanup_errors=True) as profile:
        command = [sys.executable, "-c", IN_PLACE, str(read_commands), str(write_answers), chromium]
        started = subprocess.Popen(
            [*command, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        try:
            yield Page(write_commands, read_answers)
        finally:
            os.close(write_commands)  # Chromium ends with its pipe
            try:
                started.wait(10)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()
            os.close(read_answers)


def _high_pipe() -> tuple[int, int]:
    """A pipe whose ends are not 3 or 4, which IN_PLACE overwrites."""
    low = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return high[0], high[1]


class Page:
    """One page of a running Chromium, spoken to in CDP: methods by name, answers as dictionaries.

    requests: the URLs that the page and its workers asked for. logged: what the browser complained of.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from, self._rest, self._sent = to_browser, from_browser, b"", 0
        self.requests: list[str] = []
        self.logged: list[str] = []
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        # A worker waits until it is watched: none of its requests is missed.
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True)

    def call(self, method: str, **params: object) -> dict[str, Any]:
        number = self._send(self._session, method, params)
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            self._hear(answer)

    def open(self, url: str) -> None:
        """Go to a URL; done when the new page is there instead of the old one."""
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The first value of a JavaScript expression that is true."""
        end = time.monotonic() + SECONDS
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, (expression, self.evaluate("document.body.innerText"), self.logged)
            time.sleep(0.1)
        return value

    def verdict(self) -> dict[str, Any]:
        """The data of <script id="verdict">, as soon as it is there."""
        verdict: dict[str, Any] = json.loads(self.wait_for("document.getElementById('verdict')?.textContent"))
        return verdict

    def show(self, *, width: int, dark: bool) -> None:
        """Lay the page out for a screen: width in CSS pixels, light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def _send(self, session: str, method: str, params: Mapping[str, object]) -> int:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        return self._sent

    def _hear(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Log.entryAdded":
                self.logged.append(params["entry"]["text"])
            case "Runtime.exceptionThrown":
                self.logged.append(params["exceptionDetails"]["text"])
            case "Target.attachedToTarget" if params["waitingForDebugger"]:
                for method in ("Network.enable", "Log.enable", "Runtime.runIfWaitingForDebugger"):
                    self._send(params["sessionId"], method, {})

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], SECONDS)
            block = os.read(self._from, 1 << 16) if ready else b""
            assert block, "Chromium has ended, or does not answer"
            self._rest += block
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer
