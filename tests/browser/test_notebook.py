"The panel in JupyterLab and Notebook 7: live while a cell runs, steered by clicks, and gone when it is closed"
import json
import re
import time

import pytest
from helpers import COUNT, CUT, SILENCE, notebook, settle, violations, wait_until

SETUP = """import subprocess, sys, threading, time
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess
from cjm_fasthtml_resources.ui.panel import ResourcePanel
def vary():
    while True:
        gpus[0].utilization = (gpus[0].utilization + 1) % 100
        time.sleep(0.1)
if "driver" in globals():   # it was run before
    if "panel" in globals(): panel.close()
    driver.stop()
    worker.kill()
worker = subprocess.Popen(["cat"], stdin=subprocess.PIPE)   # ends with its parent
on_gpu = [SimulatedProcess(worker.pid, 5000), SimulatedProcess(1, 3000)]
gpus = [SimulatedGpu("NVIDIA L4", processes=on_gpu), SimulatedGpu("NVIDIA L40S")]
driver = SimulatedDriver(gpus).start()
manager = ResourceManager()
_ = manager.register_worker(worker.pid, "llm", job_id="job-1"), manager.register_worker(4_200_101, "transcription")
threading.Thread(target=vary, daemon=True).start()"""
SHOW = "panel = ResourcePanel(manager, interval=0.2, controls=True)\npanel"
BUSY = "from pathlib import Path\nwhile Path('busy').exists(): time.sleep(0.05)\nprint('awake')"
TELL = """threads = sum(t.name == 'resource-monitor' for t in threading.enumerate())
told = dict(threads=threads, paused=panel.monitor.paused, interval=panel.monitor.interval, ended=worker.poll())
print(told, time.time())"""
CLOSE = "panel.close(); time.sleep(0.5)"
CHECK = "manager.check_gpu_availability()"
CELLS = [SETUP, SHOW, BUSY, TELL, CLOSE, CHECK]


@pytest.fixture
def open_notebook(jupyter_server):
    "Write a notebook, and give its address in JupyterLab or Notebook 7"
    folder, address = jupyter_server

    def write(name, cells=CELLS):
        (folder/f"{name}.ipynb").write_text(json.dumps(notebook(cells)))
        return address(name)

    write.folder = folder
    return write


@pytest.fixture
def book(open_notebook, kept_pages):
    "An open notebook with a panel that has just been made. It stays open for the next test, which costs it seconds"
    def opened():
        page = kept_pages.new()
        return Notebook(page, open_notebook(f"panel-{time.monotonic_ns()}"))

    key = str(open_notebook.folder)
    if key not in kept_pages: kept_pages[key] = opened()
    kept_pages[key].page.set_viewport_size(dict(width=1400, height=1600))
    kept_pages[key].page.emulate_media(color_scheme="light")
    kept_pages[key].run(SETUP)
    kept_pages[key].run(SHOW)
    yield kept_pages[key]


# How the cells of a table look
LOOK = """table => [...table.querySelectorAll('th')].map(th => th.textContent).map((name, i) => [name,
    ...[...table.querySelectorAll(`th:nth-child(${i + 1}), tr:first-child td:nth-child(${i + 1})`)].map(cell => {
        const {textAlign, padding, fontSize, lineHeight, verticalAlign} = getComputedStyle(cell);
        return [textAlign, padding, fontSize, lineHeight, verticalAlign,
                getComputedStyle(cell.parentNode).backgroundColor].join(' ');
    })])"""


class Notebook:
    "An open notebook"
    def __init__(self, page, url, cells=CELLS):
        self.page, self.cells = page, cells
        page.goto(url)
        page.locator(".jp-Notebook .jp-Cell").nth(len(cells) - 1).wait_for()
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for()

    def cell(self, source): return self.page.locator(".jp-Notebook .jp-Cell").nth(self.cells.index(source))

    def start(self, source):
        "Run a cell and do not wait for it"
        if self.page.locator(".jp-Dialog").count(): self.page.keyboard.press("Enter")   # which kernel: the usual one
        self.cell(source).locator(".jp-InputPrompt").first.click()
        self.page.keyboard.press("Control+Enter")

    def run(self, source):
        "Run a cell to its end"
        prompt = self.cell(source).locator(".jp-InputPrompt").first
        before, began = prompt.inner_text(), time.monotonic()
        self.start(source)
        while (now := prompt.inner_text()) == before or not re.search(r"\d", now):
            assert time.monotonic() < began + 30, f"{source!r} does not end"
            time.sleep(0.05)
            # what is sent before the kernel is connected gets lost
            if now == before and not re.search(r"\d", before) and time.monotonic() > began + 4:
                began = time.monotonic()
                self.start(source)

    def tell(self) -> dict:
        "What the kernel says about the panel"
        seen = self.output(TELL)
        self.run(TELL)
        end = time.monotonic() + 10
        while (now := self.output(TELL)) == seen:
            assert time.monotonic() < end
            time.sleep(0.05)
        return eval(now.rpartition(" ")[0])

    def output(self, source) -> str:
        found = self.cell(source).locator(".jp-OutputArea-output")
        return found.first.inner_text().strip() if found.count() else ""

    def load(self) -> str: return self.page.locator(".cjm .load").first.inner_text()

    def moves(self, seconds=15.0) -> bool:
        "Whether the figures change within seconds"
        seen, end = self.load(), time.monotonic() + seconds
        while time.monotonic() < end:
            if self.load() != seen: return True
            time.sleep(0.05)
        return False


@pytest.fixture
def busy(open_notebook):
    "While this file exists, the cell BUSY is running"
    file = open_notebook.folder/"busy"
    file.touch()
    yield file
    file.unlink(missing_ok=True)


def test_it_moves_while_a_cell_runs_and_a_click_is_honoured_once(book, busy):
    assert book.moves()
    book.start(BUSY)
    assert book.moves() and book.output(BUSY) == ""                 # still at work
    pause = book.page.get_by_role("button", name="Pause")
    pause.click()
    busy.unlink()
    wait_until(lambda: book.output(BUSY) == "awake")
    wait_until(lambda: not book.moves(1.5))
    assert book.tell()["paused"] is True
    assert book.page.locator(".cjm.widget-vbox .state").inner_text().endswith("out of date: paused")
    book.page.get_by_role("button", name="Resume").click()
    wait_until(lambda: book.moves(1))
    assert book.tell()["paused"] is False and book.output(SHOW).count("Error") == 0


def test_interval_run_again_and_close(book):
    assert book.moves()
    book.page.get_by_label("every").select_option("5 s")
    wait_until(lambda: book.tell()["interval"] == 5.0)
    for _ in range(3): book.run(SHOW)
    wait_until(lambda: book.tell() == dict(threads=1, paused=False, interval=0.2, ended=None))
    assert book.moves()
    assert violations(book.page) == []
    book.run(CLOSE)
    assert book.tell()["threads"] == 0


def test_tables_are_sorted_filtered_and_opened_while_they_move(book):
    page = book.page

    def shown(half=".processes"):
        return page.locator(f".halves:has(.processes) {half} tbody tr:visible").all_inner_texts()

    wait_until(lambda: len(shown()) == 2)
    page.locator(".cjm.widget-vbox .processes th button", has_text="PID").click()          # the largest first
    assert [("llm worker" in row) for row in shown()] == [True, False]
    page.locator(".cjm.widget-vbox .processes th button", has_text="PID").press("Enter")
    assert [("llm worker" in row) for row in shown()] == [False, True]
    assert shown(".only") == ["2.9 GiB", "4.9 GiB"] and book.moves()      # the memory follows
    page.locator(".cjm.widget-vbox .only th button").first.click()
    page.get_by_role("searchbox", name="Filter").press_sequentially("llm 4.9")
    assert len(shown()) == 1 and shown(".only") == ["4.9 GiB"]
    page.get_by_role("button", name="Totals").click()
    page.locator(".cjm.widget-vbox .totals td", has_text="this app").wait_for()
    page.get_by_role("button", name="Details").click()
    page.locator(".cjm.widget-vbox .processes th", has_text="age").wait_for()
    assert len(shown()) == 1 and shown(".only") == ["4.9 GiB"] and book.moves()
    assert page.locator(".jp-Notebook .jp-Cell").count() == len(CELLS) and violations(page) == []


def test_a_worker_is_stopped_after_a_question_and_a_selection_stays(book):
    page = book.page
    page.evaluate("""() => getSelection().selectAllChildren(
        [...document.querySelectorAll('.cjm .processes td')].find(td => td.textContent === 'llm worker, job-1'))""")
    assert book.moves() and page.evaluate("getSelection().toString()") == "llm worker, job-1"
    page.set_viewport_size(dict(width=1400, height=500))
    pane = page.wait_for_function("""() => [...document.querySelectorAll('*')].find(e =>
        e.querySelector('.cjm') && e.scrollHeight > e.clientHeight + 20
        && ['auto', 'scroll'].includes(getComputedStyle(e).overflowY))""")
    place = page.evaluate("pane => { pane.scrollTop = 120; return pane.scrollTop; }", pane)
    assert place > 50 and book.moves() and page.evaluate("pane => pane.scrollTop", pane) == place
    page.set_viewport_size(dict(width=1400, height=1600))
    page.get_by_role("button", name=re.compile("Stop llm")).click()
    page.get_by_text("It is running job-1").wait_for()
    page.get_by_role("button", name="Keep it").click()
    assert book.tell()["ended"] is None
    page.get_by_role("button", name=re.compile("Stop llm")).click()
    page.get_by_role("button", name="Stop it").dblclick()
    page.get_by_text("Stopped the llm worker").wait_for()
    assert book.tell()["ended"] == -15


def test_a_closed_page_ends_the_sampler_and_one_that_is_opened_begins_it(open_notebook, new_page, busy):
    name = f"closed-{time.monotonic_ns()}"
    cells = [SETUP, COUNT.replace("NAME", name), SHOW, BUSY]
    url = open_notebook(name, cells)
    book = Notebook(new_page(width=1400, height=1600), url, cells)
    for source in cells[:3]: book.run(source)
    told = open_notebook.folder/name
    wait_until(lambda: told.read_text() == "1" and book.moves())
    book.start(BUSY)                                 # a kernel that is at work hears no page
    end = time.monotonic() + 2*SILENCE
    while time.monotonic() < end:
        assert told.read_text() == "1" and book.moves()
        assert book.page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").count() == 0
    busy.unlink()
    time.sleep(2*SILENCE)
    assert told.read_text() == "1" and book.moves()
    book.page.keyboard.press("Control+s")
    wait_until(lambda: "widget-view+json" in (open_notebook.folder/f"{name}.ipynb").read_text())
    book.page.goto("about:blank")
    wait_until(lambda: told.read_text() == "0")
    book.page.goto(url)
    book.page.locator(".cjm.widget-vbox .load").first.wait_for()
    wait_until(lambda: told.read_text() == "1" and book.moves(1))


def test_charts_are_chosen_and_read_by_keyboard_while_they_are_drawn_anew(book):
    page = book.page
    panel = page.locator(".cjm.widget-vbox").first
    choose = panel.locator(".widget-dropdown", has_text="charts").locator("select")
    assert panel.locator(".chart").count() == 0
    choose.select_option("10 minutes")
    plot = panel.locator(".chart .plot").first
    plot.locator(".columns g").first.wait_for(state="attached")
    plot.evaluate("e => { e.drawn = 'at first'; e.focus(); }")
    page.keyboard.press("Home")
    said = panel.locator(".chart output").first
    first = plot.locator(".columns title").first.text_content()
    page.keyboard.press("Enter")
    assert said.inner_text().startswith(first.replace(" · ", " ")) and re.match(r"\d\d:\d\d:\d\d · ", first)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.locator(f"body[data-jp-theme-light={str(scheme == 'light').lower()}]").wait_for(state="attached")
        assert violations(page, ".chart") == []
    wait_until(lambda: plot.evaluate("e => e.drawn") != "at first")
    page.wait_for_timeout(200)
    assert plot.evaluate("e => e === document.activeElement")          # the keyboard stays where it was
    assert said.inner_text().split()[0] == first.split(" · ")[0]
    assert "kept" in panel.locator(".chart").first.get_attribute("class")   # as does the column that Enter has kept
    choose.select_option("24 hours")
    panel.locator("code", has_text="cjm-resources record").wait_for()   # simulated, so there is no recorder
    choose.select_option("none")
    wait_until(lambda: panel.locator(".chart, .note code").count() == 0)


def test_everybody_can_read_the_panel_and_nothing_of_it_is_cut_in_a_narrow_window(book):
    page = book.page
    page.get_by_role("button", name=re.compile("Stop llm")).click()
    book.run(CHECK)
    page.keyboard.press("Control+b")         # JupyterLab's side bar would take the room
    panel, check = (page.locator(".cjm .processes:visible").nth(i).evaluate(LOOK) for i in range(2))
    assert panel == check[:len(panel)] and len(panel) > 3 and check[-1][0] == "memory"   # a table beside it, in a panel
    found = {}
    for width in (1400, 1100, 1000, 940, 880, 820, 760, 700, 640, 560, 480, 420, 390, 360):
        page.set_viewport_size(dict(width=width, height=1600))
        settle(page)
        room = page.locator(".cjm").first.bounding_box()["width"]
        if room >= 240 and (said := page.evaluate(CUT)): found[width, room] = said
    assert found == {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.locator(f"body[data-jp-theme-light={str(scheme == 'light').lower()}]").wait_for(state="attached")
        for width in (390, 700, 1280):
            page.set_viewport_size(dict(width=width, height=1600))
            settle(page)
            assert violations(page) == [], (scheme, width)
