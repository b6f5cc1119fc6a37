"""A headless Chromium to test a page with, spoken to through two pipes (Chrome DevTools Protocol).

    with Browser(folder) as browser:
        browser.open(page)                  a file; waits until it has loaded
        browser.value("document.title")     what a JavaScript expression gives
        browser.size(400, 900)              width and height in CSS pixels
        browser.requests                    addresses that were asked for since it was opened
"""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")
PATIENCE = 30       # seconds


def find_browser():
    """The path of a Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page in a browser of its own, with a profile and downloads in `folder`."""

    def __init__(self, folder):
        self.requests = []
        self.whole_files = []
        self.events = []
        self.numbers = itertools.count(1)
        # Chrome reads commands from file 3 and answers on file 4, each message ended by a zero
        read_commands, self.commands = os.pipe()
        self.answers, write_answers = os.pipe()
        os.set_blocking(self.answers, False)
        plumbing = f'exec "$@" 3<&{read_commands} 4>&{write_answers}'
        command = [find_browser(), *FLAGS, "--remote-debugging-pipe",
                   f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self.process = subprocess.Popen(["bash", "-c", plumbing, "browser", *command],
                                        pass_fds=(read_commands, write_answers),
                                        stderr=subprocess.DEVNULL)
        os.close(read_commands)
        os.close(write_answers)
        self.received = b""
        self.session = None
        page = self.first_page()
        self.session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.ask("Page.enable")
        self.ask("Network.enable")
        self.ask("Browser.setDownloadBehavior", behavior="allow",
                 downloadPath=str(folder / "downloads"), eventsEnabled=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session = None
        with contextlib.suppress(OSError, TimeoutError):
            self.ask("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        os.close(self.commands)
        os.close(self.answers)

    def first_page(self):
        """The id of the page that a browser opens with."""
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            for target in self.ask("Target.getTargets")["targetInfos"]:
                if target["type"] == "page":
                    return target["targetId"]
            time.sleep(0.05)
        raise TimeoutError("the browser opens no page")

    def ask(self, method, **parameters):
        """Send a command, wait for its answer."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            found = self.receive()
            if found.get("id") == number:
                assert "error" not in found, found
                return found["result"]

    def receive(self):
        """The next message; what it says of the network, loading and files is kept."""
        give_up = time.monotonic() + PATIENCE
        while b"\0" not in self.received:
            if time.monotonic() > give_up:
                raise TimeoutError("the browser does not answer")
            try:
                self.received += os.read(self.answers, 1 << 20)
            except BlockingIOError:
                time.sleep(0.005)
        text, _, self.received = self.received.partition(b"\0")
        found = json.loads(text)
        if found.get("method") == "Network.requestWillBeSent":
            self.requests.append(found["params"]["request"]["url"])
        progress = found.get("params", {})
        if found.get("method") == "Browser.downloadProgress" and progress["state"] == "completed":
            self.whole_files.append(Path(progress["filePath"]))
        if "method" in found:
            self.events.append(found["method"])
        return found

    def open(self, page):
        """Open a file, or load it again, and wait until its scripts have run."""
        self.events.clear()
        if self.value("location.href") == page.as_uri():
            self.ask("Page.reload")     # in the same process: it knows what was stored just now
        else:
            self.ask("Page.navigate", url=page.as_uri())
        while "Page.loadEventFired" not in self.events:
            self.receive()

    def value(self, expression):
        """What a JavaScript expression gives, as JSON."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def size(self, width, height, dark=False):
        """The size of the window in CSS pixels, as on a telephone where it is narrow."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key):
        """Press a key, as a user would: Tab, Enter, Space or a letter."""
        text = {"Enter": "\r", "Space": " "}.get(key, key if len(key) == 1 else "")
        name = {"Space": " "}.get(key, key)
        code = {"Tab": 9, "Enter": 13, "Space": 32}.get(key, 0)
        self.ask("Input.dispatchKeyEvent", type="keyDown", key=name, text=text,
                 windowsVirtualKeyCode=code)
        self.ask("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)

    def downloaded(self):
        """The next file that is downloaded, once it is whole."""
        while not self.whole_files:
            self.receive()
        return self.whole_files.pop()
