"""A headless Chromium, driven by its own driver over plain HTTP: https://www.w3.org/TR/webdriver2/."""

import json
import os
import re
import shutil
import subprocess
import urllib.request

import pytest

MISSING = "the page's tests need Chromium and its driver: apt-get install chromium chromium-driver"


class Browser:
    def __init__(self, width=1280, height=900):
        if not (shutil.which("chromium") and shutil.which("chromedriver")):
            # A developer may be without; where changes are accepted it must not go unnoticed.
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(MISSING)
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        said = (re.search(r"started successfully on port (\d+)", line) for line in self.driver.stdout)
        started = next(filter(None, said), None)
        assert started, "chromedriver ended before it had said its port"
        self.address = f"http://127.0.0.1:{started[1]}/session"
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}"]}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}, "timeouts": {"script": 60_000}}
        self.session, self.file = "", None
        self.session = "/" + self.command("POST", "", capabilities={"alwaysMatch": capabilities})["sessionId"]

    def command(self, method, path, **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.address + self.session + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, file):
        self.file = file
        self.visit(file.resolve().as_uri())

    def visit(self, address):
        self.command("POST", "/url", url=address)

    def run(self, script, *arguments):
        """What an async JavaScript function with this body returns; its arguments are `given`."""
        wrapped = f"const [given, done] = [[...arguments].slice(0, -1), arguments[arguments.length - 1]];(async () => {{{script}}})()"
        wrapped += ".then(value => done({value}), error => done({error: `${error.message} ${error.stack}`}))"
        result = self.command("POST", "/execute/async", script=wrapped, args=list(arguments))
        if "error" in result:
            raise RuntimeError(result["error"])
        return result.get("value")

    def log(self):
        """What the page has written to the console, errors included, since the last call."""
        return [entry["message"] for entry in self.command("POST", "/se/log", type="browser")]

    def close(self):
        try:
            self.command("DELETE", "")
        finally:
            self.driver.kill()
            self.driver.wait()
            self.driver.stdout.close()
