#!/usr/bin/env python3
"""Take the pictures of the documentation that are of a real browser: the panel in JupyterLab, and the page, each at
three widths in light and dark, and the charts of the page.

    python tools/screenshots.py               writes nbs/images/panel-*.png, page-*.png and charts-*.png
    python tools/screenshots.py charts        only these

It needs Chromium, and the extras web and browser.

What is shown is simulated. Fonts differ from machine to machine, so these pictures are not compared with the kept ones.
"""
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT/"nbs"/"images"
sys.path.insert(0, str(ROOT/"tests"/"browser"))

from helpers import CHROMIUM, FLAGS, free_port, jupyter, notebook, serving  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

# An hour of a worker that loads its model and of an outsider that comes, in half a minute
SETUP = """import math, threading, time
from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.simulate import load_scenario
driver = load_scenario("pair").start()
manager = ResourceManager(track_self=False)
for worker in driver.workers: _ = manager.register_worker(**worker)
def vary():
    began = time.monotonic()
    while True:
        t = time.monotonic() - began
        for gpu, used, phase in zip(driver.gpus, (15420, 39900), (0, 2)):
            gpu.memory_used_mb = used + 2500*math.sin(t/2 + phase) + 2500
            gpu.utilization = int(60 + 39*math.sin(t + phase))
        time.sleep(0.1)
threading.Thread(target=vary, daemon=True).start()"""
TO_TOP = """element => {
    const pane = [...element.querySelectorAll('*'), element].find(e =>
        e.scrollHeight > e.clientHeight + 5 && getComputedStyle(e).overflowY !== 'visible');
    if (pane) pane.scrollTop = 0;
}"""
CELLS = ["from demo import manager, time   # an app's ResourceManager, on a simulated machine",
         "from cjm_fasthtml_resources import ResourcePanel\n\nResourcePanel(manager, interval=0.5, controls=True)",
         "time.sleep(300)   # the panel goes on while this runs"]
SERVE = SETUP + """
import sys, uvicorn
from cjm_fasthtml_resources.ui.web import make_app
app = make_app(manager, interval=0.5)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", timeout_graceful_shutdown=1)"""

# Ten minutes of an app that loads a model, and of a program that comes, as a monitor would have seen them
REMEMBER = """import math, time
from dataclasses import replace
import uvicorn
from fasthtml.common import FastHTML
from cjm_fasthtml_resources import ResourceManager, ResourceMonitor
from cjm_fasthtml_resources.core.samples import take_sample
from cjm_fasthtml_resources.simulate import load_scenario
from cjm_fasthtml_resources.ui.web import resource_routes
driver = load_scenario("pair").start()
manager = ResourceManager(track_self=False)
for worker in driver.workers: _ = manager.register_worker(**worker)
monitor, now, clock = ResourceMonitor(manager), time.time(), time.monotonic()
own, others = (next(p for p in gpu.processes if p.memory_mb > 9000) for gpu in driver.gpus)
full, theirs, first, second = own.memory_mb, others.memory_mb, *(gpu.memory_used_mb for gpu in driver.gpus)
for ago in range(598, -1, -2):
    loaded = min(max((480 - ago)/90, 0.1), 1)
    came = 1 if ago < 210 else 0.12
    own.memory_mb, others.memory_mb = full*loaded, theirs*came
    driver.gpus[0].memory_used_mb = first - full*(1 - loaded) + (700*math.sin(ago/23) if loaded == 1 else 0) + 700
    driver.gpus[1].memory_used_mb = second - theirs*(1 - came)
    driver.gpus[0].utilization = int(62 + 30*math.sin(ago/17) + 7*math.sin(ago*1.7)) if loaded == 1 else 2
    driver.gpus[1].utilization = int(90 + 9*math.sin(ago/5)) if came == 1 else int(20 + 14*math.sin(ago/31))
    sample = take_sample(manager)
    snapshot = replace(sample.gpu.snapshot, time=now - ago)
    monitor.keep(replace(sample, gpu=replace(sample.gpu, snapshot=snapshot), taken=clock - ago))
import sys
app = FastHTML(secret_key="of a picture", default_hdrs=False)
resource_routes(app, manager, monitor=monitor)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", timeout_graceful_shutdown=1)"""


WIDTHS = dict(phone=390, tablet=700, desktop=1280)
HEIGHTS = dict(phone=1730, tablet=1240, desktop=900)   # of the panel: so much that all of it is there
THEMES = ("light", "dark")


def panel(browser, folder: Path) -> None:
    "The panel in JupyterLab while a cell runs"
    (folder/"demo.py").write_text(SETUP)
    settings = folder/"jupyterlab_settings_dir"/"@jupyterlab"/"apputils-extension"
    settings.mkdir(parents=True)
    quiet = dict(fetchNews="false", checkForUpdates=False)
    (settings/"notification.jupyterlab-settings").write_text(json.dumps(quiet))
    (settings/"themes.jupyterlab-settings").write_text(json.dumps({"adaptive-theme": True}))   # as the browser's
    (folder/"Train.ipynb").write_text(json.dumps(notebook(CELLS)))
    with jupyter("jupyterlab", folder) as server:
        page = browser.new_page(viewport=dict(width=1280, height=900))
        page.goto(f"{server}/lab/tree/Train.ipynb?token=t")
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for()
        page.keyboard.press("Control+b")  # without the side bar
        while not page.locator(".cjm .bar").count():  # what is run before the kernel is connected gets lost
            if page.locator(".jp-Dialog").count(): page.keyboard.press("Enter")   # which kernel: the usual one
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_text("Run All Cells", exact=True).click()
            time.sleep(8)
        time.sleep(20)
        for theme in THEMES:
            page.emulate_media(color_scheme=theme)
            page.locator(f"body[data-jp-theme-light={str(theme == 'light').lower()}]").wait_for(state="attached")
            for name, width in WIDTHS.items():
                page.set_viewport_size(dict(width=width, height=HEIGHTS[name]))
                time.sleep(1)
                page.locator(".jp-Notebook").evaluate(TO_TOP)
                time.sleep(1)
                page.screenshot(path=IMAGES/("panel" + ("" if name == "desktop" else f"-{name}") + f"-{theme}.png"))
        page.close()


def page(browser, folder: Path) -> None:
    "The page"
    (folder/"serve.py").write_text(SERVE)
    port = free_port()
    url = f"http://127.0.0.1:{port}/resources"
    with serving([sys.executable, str(folder/"serve.py"), str(port)], url, folder/"page-log"):
        tabs = {}
        for name, width in WIDTHS.items():
            for theme in THEMES:
                tab = browser.new_page(viewport=dict(width=width, height=560), color_scheme=theme)
                tab.goto(url)
                tabs[f"page-{name}-{theme}.png"] = tab
        time.sleep(20)
        for name, tab in tabs.items(): tab.screenshot(path=IMAGES/name, full_page=True)


def charts(browser, folder: Path) -> None:
    "The charts of the page, with the figures of a column that the keyboard has chosen"
    (folder/"remember.py").write_text(REMEMBER)
    port = free_port()
    url = f"http://127.0.0.1:{port}/resources"
    with serving([sys.executable, str(folder/"remember.py"), str(port)], url, folder/"charts-log"):
        for name, width in WIDTHS.items():
            for theme in THEMES:
                tab = browser.new_page(viewport=dict(width=width, height=900), color_scheme=theme)
                tab.goto(url)
                tab.locator(".charts > summary").click()
                tab.locator(".columns g").first.wait_for(state="attached")
                tab.locator(".plot").first.focus()
                for _ in range(40): tab.keyboard.press("ArrowLeft")
                tab.mouse.move(0, 0)
                tab.evaluate("scrollTo(0, 0)")
                box = tab.locator(".charts").bounding_box()
                clip = dict(x=box["x"] - 10, y=box["y"] - 6, width=box["width"] + 20, height=box["height"] + 12)
                tab.screenshot(path=IMAGES/f"charts-{name}-{theme}.png", full_page=True, clip=clip)
                tab.close()


if __name__ == "__main__":
    parts = dict(page=page, charts=charts, panel=panel)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for name in sys.argv[1:] or parts: parts[name](browser, Path(folder))
