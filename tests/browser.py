"""A headless Chromium for the tests, driven through chromedriver's WebDriver protocol (W3C)."""

import json
import os
import shutil
import subprocess
import time
import urllib.request

import pytest

PATIENCE = 60  # seconds until what must become true counts as false
INSTALL = "apt-get install -y --no-install-recommends chromium chromium-driver"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key by which the protocol names an element
KEYS = {
    **{"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015"},
    **{"backspace": "\ue003", "tab": "\ue004", "escape": "\ue00c", "delete": "\ue017"},
    **{"enter": "\ue007", "ctrl": "\ue009"},
}


def have_chromium(may_install):
    """Skips the test where there is no Chromium and none may or can be installed."""
    reason = INSTALL
    if not is_installed() and may_install and os.geteuid() == 0 and shutil.which("apt-get"):
        command = f"apt-get update && {INSTALL}"
        # a network that never answers is none
        command = f"timeout 300 bash -c '{command}'"
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        reason = f"apt-get: {done.stderr[-200:]}"
    if not is_installed():
        pytest.skip(f"chromium and chromedriver are not there; {reason}")


def is_installed():
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


class Browser:
    """A session. Its profile and what it downloads lie in `folder`."""

    def __init__(self, folder):
        self.downloads = folder / "downloads"
        self.driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        # it says which port it found free
        line = b""
        while b"successfully on port" not in line:
            line = self.driver.stdout.readline()
            assert line, "chromedriver does not start"
        self.url = f"http://127.0.0.1:{int(line.split()[-1].strip(b'.'))}/session"
        options = {
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--mute-audio",
                f"--user-data-dir={folder / 'profile'}",
                "--window-size=1400,900",
            ],
            "prefs": {"download.default_directory": str(self.downloads)},
        }
        capabilities = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self.id = ""
        session = self.ask("POST", "", {"capabilities": {"alwaysMatch": capabilities}})
        self.id = f"/{session['sessionId']}"

    def ask(self, method, path, content=None):
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self.url}{self.id}{path}", data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            return json.load(reply)["value"]

    def open(self, path):
        self.ask("POST", "/url", {"url": path.as_uri()})

    def resize(self, width, height):
        """The window, its frame included."""
        self.ask("POST", "/window/rect", {"width": width, "height": height})

    def run(self, script):
        """The value of a JavaScript expression in the page."""
        return self.ask("POST", "/execute/sync", {"script": f"return {script}", "args": []})

    def wait(self, script):
        """Until the expression is true."""
        end = time.monotonic() + PATIENCE
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)
        return value

    def act(self, kind, steps):
        """Steps of one device, as the protocol names them."""
        actions = {"type": kind, "id": kind, "actions": steps}
        self.ask("POST", "/actions", {"actions": [actions]})

    def press(self, key, *others):
        """A key, as from a keyboard, or several that are held together."""
        values = [KEYS.get(name, name) for name in (key, *others)]
        steps = [{"type": "keyDown", "value": value} for value in values]
        steps += [{"type": "keyUp", "value": value} for value in reversed(values)]
        self.act("key", steps)

    def drag(self, x, y, right=0.0, down=0.0, key=None):
        """The mouse from a point of the window on by so many pixels; without any a click.

        key: pressed halfway.
        """
        places = [(x, y)]
        # in several steps, as a hand does
        if right or down:
            places += [(x + k / 4 * right, y + k / 4 * down) for k in range(1, 5)]
        moves = [
            {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)} for x, y in places
        ]
        press = {"type": "pointerDown", "button": 0}
        steps = [moves[0], press, *moves[1:], {"type": "pointerUp", "button": 0}]
        if key:
            self.act("pointer", steps[:4])
            self.press(key)
            steps = steps[4:]
        self.act("pointer", steps)

    def click(self, selector):
        """The middle of an element, as by a mouse."""
        found = self.ask("POST", "/element", {"using": "css selector", "value": selector})
        self.ask("POST", f"/element/{found[ELEMENT]}/click", {})

    def mistakes(self):
        """What the page wrote to the console as an error since the last call."""
        entries = self.ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def downloaded(self, name):
        """The path of a file that the page saved, once it is whole."""
        path = self.downloads / name
        end = time.monotonic() + PATIENCE
        while not path.exists():
            assert time.monotonic() < end, f"{name} was not saved"
            time.sleep(0.02)
        return path

    def close(self):
        try:
            self.ask("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()
