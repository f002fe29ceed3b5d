"A real browser, and servers for it to look at. Without one these tests are skipped; where CI is set that is a failure"
import os

import pytest
from helpers import CHROMIUM, FLAGS


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
        size = dict(width=width, height=height)
        contexts.append(chromium.new_context(viewport=size, color_scheme=color_scheme, **kw))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        return page

    yield new
    for context in contexts: context.close()
