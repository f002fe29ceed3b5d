"The panel in JupyterLab and Notebook 7: live while a cell runs, steered by clicks, and gone when it is closed"
import json, os, re, sys, time

import pytest
from helpers import free_port, serving, violations

SETUP = """import subprocess, sys, threading, time
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess
from cjm_fasthtml_resources.ui.panel import ResourcePanel
def vary():
    while True:
        gpus[0].utilization = (gpus[0].utilization + 1) % 100
        time.sleep(0.1)
worker = subprocess.Popen(["cat"], stdin=subprocess.PIPE)   # ends with its parent
gpus = [SimulatedGpu("NVIDIA L4", processes=[SimulatedProcess(worker.pid, 5000)]), SimulatedGpu("NVIDIA L40S")]
SimulatedDriver(gpus).__enter__()
manager = ResourceManager()
_ = manager.register_worker(worker.pid, "llm", job_id="job-1")
threading.Thread(target=vary, daemon=True).start()"""
SHOW = "panel = ResourcePanel(manager, interval=0.2, controls=True)\npanel"
BUSY = "time.sleep(10)\nprint('awake')"
TELL = "print(dict(threads=sum(t.name == 'resource-monitor' for t in threading.enumerate()), paused=panel.monitor.paused, interval=panel.monitor.interval, ended=worker.poll()), time.time())"
CLOSE = "panel.close(); time.sleep(0.5)"
CELLS = [SETUP, SHOW, BUSY, TELL, CLOSE]


@pytest.fixture(scope="module", params=["lab", "notebook"])
def jupyter(request, chromium, tmp_path_factory):
    "The address of a notebook in JupyterLab or Notebook 7, and how that is opened"
    folder = tmp_path_factory.mktemp("notebooks")
    cells = [dict(cell_type="code", id=f"cell-{i}", execution_count=None, metadata={}, outputs=[], source=source) for i, source in enumerate(CELLS)]
    kernel = dict(name="python3", display_name="Python 3", language="python")
    port, app = free_port(), "jupyterlab" if request.param == "lab" else "notebook"
    own = {name: str(folder/name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    command = [sys.executable, "-m", app, "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}"]

    def write(name):
        (folder/f"{name}.ipynb").write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
        return f"http://127.0.0.1:{port}/{f'lab/workspaces/{name}/tree' if app == 'jupyterlab' else 'notebooks'}/{name}.ipynb?token=t"

    with serving(command, f"http://127.0.0.1:{port}/api", folder/"log", env={**os.environ, **own}): yield write


class Notebook:
    "An open notebook"
    def __init__(self, page, url):
        self.page = page
        page.goto(url)
        page.locator(".jp-Notebook .jp-Cell").nth(len(CELLS) - 1).wait_for()
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for()

    def cell(self, source): return self.page.locator(".jp-Notebook .jp-Cell").nth(CELLS.index(source))

    def start(self, source):
        "Run a cell and do not wait for it"
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
            if now == before and not re.search(r"\d", before) and time.monotonic() > began + 4:  # sent before the kernel was connected, and lost
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

    def load(self) -> str: return self.page.locator(".cjm .load span").first.inner_text()

    def moves(self, seconds=2.0) -> bool:
        "Whether the figures change"
        seen, end = {self.load()}, time.monotonic() + seconds
        while time.monotonic() < end:
            seen.add(self.load())
            time.sleep(0.1)
        return len(seen) > 1


def wait_until(condition, seconds=15.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def test_it_moves_while_a_cell_runs_and_a_click_is_honoured_once(jupyter, new_page):
    notebook = Notebook(new_page(width=1400, height=1600), jupyter("busy"))
    notebook.run(SETUP)
    notebook.run(SHOW)
    assert notebook.moves()
    notebook.start(BUSY)
    assert notebook.moves(3) and notebook.output(BUSY) == ""                # still at work
    pause = notebook.page.get_by_role("button", name="Pause")
    pause.click()
    wait_until(lambda: notebook.output(BUSY) == "awake", 20)
    wait_until(lambda: not notebook.moves(1.5))
    assert notebook.tell()["paused"] is True
    assert notebook.page.locator(".cjm .state").inner_text().endswith("not of this moment: paused")
    notebook.page.get_by_role("button", name="Resume").click()
    wait_until(lambda: notebook.moves(1))
    assert notebook.tell()["paused"] is False and notebook.output(SHOW).count("Error") == 0


def test_interval_run_again_and_close(jupyter, new_page):
    notebook = Notebook(new_page(width=1400, height=1600), jupyter("again"))
    notebook.run(SETUP)
    notebook.run(SHOW)
    assert notebook.moves()
    notebook.page.get_by_label("every").select_option("5 s")
    wait_until(lambda: notebook.tell()["interval"] == 5.0)
    for _ in range(3): notebook.run(SHOW)
    wait_until(lambda: notebook.tell() == dict(threads=1, paused=False, interval=0.2, ended=None))
    assert notebook.moves()
    assert violations(notebook.page) == []
    notebook.run(CLOSE)
    assert notebook.tell()["threads"] == 0


def test_a_worker_is_stopped_after_a_question_and_a_selection_stays(jupyter, new_page):
    notebook = Notebook(new_page(width=1400, height=1600), jupyter("stop"))
    notebook.run(SETUP)
    notebook.run(SHOW)
    page = notebook.page
    page.evaluate("""() => getSelection().selectAllChildren([...document.querySelectorAll('.cjm .processes td')].find(td => td.textContent === 'cat'))""")
    assert notebook.moves() and page.evaluate("getSelection().toString()") == "cat"
    page.set_viewport_size(dict(width=1400, height=500))
    pane = page.wait_for_function("""() => [...document.querySelectorAll('*')].find(e => e.querySelector('.cjm') && e.scrollHeight > e.clientHeight + 20 && ['auto', 'scroll'].includes(getComputedStyle(e).overflowY))""")
    place = page.evaluate("pane => { pane.scrollTop = 120; return pane.scrollTop; }", pane)
    assert place > 50 and notebook.moves() and page.evaluate("pane => pane.scrollTop", pane) == place
    page.set_viewport_size(dict(width=1400, height=1600))
    page.get_by_role("button", name=re.compile("Stop llm")).click()
    page.get_by_text("which is running job-1").wait_for()
    page.get_by_role("button", name="Keep it").click()
    assert notebook.tell()["ended"] is None
    page.get_by_role("button", name=re.compile("Stop llm")).click()
    page.get_by_role("button", name="Stop it").dblclick()
    page.get_by_text("Stopped the llm worker").wait_for()
    assert notebook.tell()["ended"] == -15
