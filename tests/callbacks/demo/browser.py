"""A headless Chromium, driven over the WebDriver protocol."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def missing():
    """What is not installed, or None."""
    if shutil.which("chromedriver") is None:
        return "chromedriver (Debian's chromium-driver) is not installed"
    if shutil.which("chromium") is None:
        return "chromium is not installed"
    return None


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Browser:
    """One window."""

    def __init__(self, downloads):
        port = free_port()
        self.process = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.root = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        arguments += ["--window-size=900,900", f"--user-data-dir={downloads}/profile"]
        options = {
            "binary": shutil.which("chromium"),
            "args": arguments,
            "prefs": {"download.default_directory": str(downloads)},
        }
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        try:
            self.wait(lambda: self._reachable(), 30)
            self.root += f"/session/{self.call('POST', '/session', wanted)['sessionId']}"
        except BaseException:
            self.process.kill()
            raise

    def _reachable(self):
        try:
            return self.call("GET", "/status")["ready"]
        except (urllib.error.URLError, ConnectionError):
            return False

    def call(self, method, path, body=None):
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.root + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def close(self):
        try:
            self.call("DELETE", "")
        finally:
            self.process.kill()
            self.process.wait()

    def run(self, script, *arguments):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, name):
        return self.run("return document.getElementById(arguments[0]).textContent", name)

    def find(self, name):
        found = self.call("POST", "/element", {"using": "css selector", "value": f"#{name}"})
        return found[ELEMENT]

    def upload(self, name, path):
        self.call("POST", f"/element/{self.find(name)}/value", {"text": str(path)})

    def click(self, name):
        self.call("POST", f"/element/{self.find(name)}/click")

    def drag(self, *places):
        """Press at the first place (viewport pixels), move over the others, release."""
        steps = [{"type": "pointerMove", "duration": 0, "x": int(x), "y": int(y)} for x, y in places]
        steps.insert(1, {"type": "pointerDown", "button": 0})
        steps.append({"type": "pointerUp", "button": 0})
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": steps}
        self.call("POST", "/actions", {"actions": [pointer]})

    @staticmethod
    def wait(condition, seconds=60):
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, "the page did not get there"
            time.sleep(0.05)
        return found
