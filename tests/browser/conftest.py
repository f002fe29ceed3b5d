"A real browser, and servers for it to look at. Without one these tests are skipped; where CI is set that is a failure"
import contextlib, json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def missing() -> str | None:
    "What is not there, in words"
    if CHROMIUM is None: return "no Chromium: apt-get install chromium"
    for module in ("playwright", "jupyterlab", "notebook", "axe_playwright_python"):
        try: __import__(module)
        except ImportError: return f"no {module}: pip install '.[browser]'"
    return None


@pytest.fixture(scope="session")
def chromium():
    "A browser"
    if reason := missing(): (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium):
    "Open pages that are closed with the test; new_page(width=…, color_scheme=…)"
    contexts = []

    def new(width=1280, height=900, color_scheme="light", **kw):
        contexts.append(chromium.new_context(viewport=dict(width=width, height=height), color_scheme=color_scheme, **kw))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        return page

    yield new
    for context in contexts: context.close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def serving(command, url, log, **kw):
    "A server process that answers at `url`"
    with open(log, "w") as file: process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **kw)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end: raise RuntimeError(f"{command[0]} did not start: {Path(log).read_text()[-2000:]}") from None
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try: process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def violations(page) -> list[str]:
    "What axe-core finds that is serious, in words"
    from axe_playwright_python.sync_playwright import Axe
    found = Axe().run(page, context=".cjm").response["violations"]
    return [f"{v['id']}: {v['help']}: {[node['html'][:160] for node in v['nodes'][:3]]}" for v in found if v["impact"] in ("serious", "critical")]
