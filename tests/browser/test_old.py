"Old figures never look live in a notebook: a kernel that has gone, a notebook that was saved, a panel that nobody sees"
import json
import os
import re
import signal
import time

import pytest
from helpers import notebook, wait_until
from test_notebook import Notebook

SETUP = """import os, threading, time
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
from cjm_fasthtml_resources.ui.panel import ResourcePanel
gpus = [SimulatedGpu("NVIDIA L4", temperature=40)]
SimulatedDriver(gpus).start()
manager = ResourceManager()
print(os.getpid())"""
SHOW = "ResourcePanel(manager, interval=0.2)"
OTHER = "other = ResourcePanel(manager)\nother"
WARM = "gpus[0].temperature = 77\ntime.sleep(1)"
TELL = """samplers = sum(t.name == "resource-monitor" for t in threading.enumerate())
told = dict(samplers=samplers, at=time.time())
print(told)"""
CELLS = [SETUP, SHOW, OTHER, WARM, TELL]
LIVE, PICTURE = ".cjm.widget-vbox", ".cjm[class*=kept-]"
GREY = """() => {
    const banner = document.querySelector(".cjm.widget-vbox .banner");
    return getComputedStyle(banner).textDecorationLine === "line-through"; }"""


@pytest.fixture
def opened(jupyter_server, new_page, request):
    "Open a new notebook with these cells"
    folder, address = jupyter_server
    name = re.sub(r"\W+", "-", request.node.originalname)
    (folder/f"{name}.ipynb").write_text(json.dumps(notebook(CELLS)))
    book = Notebook(new_page(width=1400, height=1800), address(name), CELLS)
    book.path, book.address = folder/f"{name}.ipynb", address(name)
    return book


# Note in the page, by its own clock, when the panel last changed and when it began to be grey
WATCH = """() => {
    const panel = document.querySelector(".cjm.widget-vbox"), told = window.told = {};
    new MutationObserver(() => { told.changed = performance.now(); }).observe(panel, {childList: true, subtree: true});
    panel.addEventListener("animationstart", (event) => {
        if (event.animationName.startsWith("cjm-old")) told.grey ??= performance.now(); }); }"""


def stays_live(page, seconds: float) -> bool:
    "Whether the figures are not grey for so long"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if page.evaluate(GREY) or page.locator(f"{LIVE} .told").is_visible(): return False
        time.sleep(0.1)
    return True


def save_until(book, condition) -> None:
    "Save the notebook until its file, which is written piece by piece, is as it has to be"
    def found():
        book.page.keyboard.press("Control+s")
        book.page.wait_for_timeout(300)
        try: saved = json.loads(book.path.read_text())
        except ValueError: return False
        return condition(saved)

    wait_until(found)


def samplers(book) -> int:
    seen = book.output(TELL)
    book.run(TELL)
    wait_until(lambda: book.output(TELL) != seen)
    return eval(book.output(TELL))["samplers"]


def delete(book, source):
    book.cell(source).locator(".jp-InputPrompt").first.click()
    book.page.keyboard.press("Escape")
    book.page.keyboard.press("d")
    book.page.keyboard.press("d")
    book.cells = [cell for cell in book.cells if cell != source]


def test_a_kernel_that_is_killed_or_suspended_leaves_figures_that_say_that_they_are_old(opened):
    book, page = opened, opened.page
    book.run(SETUP)
    book.run(SHOW)
    pid = int(book.output(SETUP))
    wait_until(lambda: stays_live(page, 3.5))      # longer than figures stay live; a starved kernel has gaps
    page.evaluate(WATCH)
    wait_until(lambda: page.evaluate("told.changed"))
    os.kill(pid, signal.SIGSTOP)                       # nothing is told to the page
    page.locator(f"{LIVE} .told").wait_for()
    assert page.evaluate(GREY) and 1.5 < page.evaluate("told.grey - told.changed")/1000 < 4.5
    said = page.locator(f"{LIVE} .told").inner_text()
    assert re.match(r"Not live\. Showing data from \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \w+", said)
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not page.evaluate(GREY) and not page.locator(f"{LIVE} .told").is_visible())
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: page.locator(".cjm .told:visible").count() or page.locator(f"{PICTURE}:visible").count())


def test_paused_figures_are_grey_and_name_their_time(opened):
    book, page = opened, opened.page
    book.run(SETUP)
    book.run(SHOW)
    page.get_by_role("button", name="Pause").click()
    wait_until(lambda: page.evaluate(GREY))
    said = page.locator(f"{LIVE} .state").first.inner_text()
    assert re.search(r"data from \d{4}-.*, out of date: paused", said)
    page.get_by_role("button", name="Resume").click()
    wait_until(lambda: not page.evaluate(GREY))


def test_a_saved_notebook_keeps_the_last_sample_and_shows_it_without_its_kernel(opened, new_page):
    book, page = opened, opened.page
    book.run(SETUP)
    book.run(SHOW)
    assert page.locator(f"{LIVE}:visible").count() == 1 and page.locator(f"{PICTURE}:visible").count() == 0
    book.run(WARM)
    page.locator(f"{LIVE} .load", has_text="77 °C").wait_for()

    def kept(saved):
        outputs = [o for cell in saved["cells"] for o in cell.get("outputs", [])]
        return "".join("".join(o.get("data", {}).get("text/html", "")) for o in outputs)

    save_until(book, lambda saved: "77 °C" in kept(saved))
    shown = kept(json.loads(book.path.read_text()))
    assert "40 °C" not in shown and re.search(r"Data from <time [^>]*>\d{4}-\d\d-\d\d ", shown)
    os.kill(int(book.output(SETUP)), signal.SIGKILL)
    page.close()
    time.sleep(1)
    later = new_page(width=1400, height=1800)
    later.goto(book.address)
    later.locator(f"{PICTURE}:visible").wait_for()
    assert later.locator(f"{PICTURE} .load", has_text="77 °C").is_visible()
    assert later.get_by_text("A static picture").is_visible()
    assert later.get_by_text("model not found").locator("visible=true").count() == 0


def test_a_panel_that_nobody_sees_ends_its_sampler_and_panels_of_one_manager_share_it(opened):
    book, page = opened, opened.page
    book.run(SETUP)
    book.run(SHOW)
    book.run(OTHER)
    assert samplers(book) == 1
    delete(book, SHOW)
    time.sleep(0.5)
    assert samplers(book) == 1                         # one is still there
    save_until(book, lambda saved: SHOW not in (kept := json.dumps(saved)) and "widget-view" in kept)
    page.reload()
    page.locator(LIVE).first.wait_for()                # it goes on, and counts its views again
    wait_until(lambda: not page.evaluate(GREY))
    delete(book, OTHER)
    wait_until(lambda: samplers(book) == 0)
