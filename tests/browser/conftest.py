"A real browser, and servers for it to look at. Without one these tests are skipped; where CI is set that is a failure"
import json
import os

import pytest
from helpers import CHROMIUM, FLAGS, jupyter


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


@pytest.fixture(scope="session", params=["jupyterlab", "notebook"])
def jupyter_server(request, chromium, tmp_path_factory):
    "The folder of a server of JupyterLab or Notebook 7, and what gives the address of a notebook in it"
    folder = tmp_path_factory.mktemp("notebooks")
    settings = folder/"jupyterlab_settings_dir"/"@jupyterlab"/"apputils-extension"
    settings.mkdir(parents=True)
    (settings/"themes.jupyterlab-settings").write_text(json.dumps({"adaptive-theme": True}))   # as the browser's
    with jupyter(request.param, folder) as server:
        def address(name: str) -> str:
            place = f"lab/workspaces/{name}/tree" if request.param == "jupyterlab" else "notebooks"
            return f"{server}/{place}/{name}.ipynb?token=t"

        yield folder, address


class KeptPages(dict):
    "What stays open for other tests, by a name"
    def __init__(self, chromium):
        super().__init__()
        self.chromium, self.contexts = chromium, []

    def new(self, width=1400, height=1600):
        self.contexts.append(self.chromium.new_context(viewport=dict(width=width, height=height)))
        page = self.contexts[-1].new_page()
        page.set_default_timeout(30_000)
        return page


@pytest.fixture(scope="session")
def kept_pages(jupyter_server, chromium):
    kept = KeptPages(chromium)
    yield kept
    for context in kept.contexts: context.close()


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
