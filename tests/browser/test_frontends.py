"The panel where others run the notebook: Voilà, papermill, nbconvert's HTML without a network, marimo"
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
from helpers import COUNT, JUPYTER_FOLDERS, SILENCE, free_port, notebook, process_tree, serving, wait_until

SETUP = """import subprocess, threading, time
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess
from cjm_fasthtml_resources.ui.panel import ResourcePanel
def vary():
    while True:
        gpus[0].utilization = (gpus[0].utilization + 1) % 100
        time.sleep(0.1)
gpus = [SimulatedGpu("NVIDIA L4", processes=[SimulatedProcess(4_200_101, 5000)]), SimulatedGpu("NVIDIA L40S")]
SimulatedDriver(gpus).start()
manager = ResourceManager()
_ = manager.register_worker(4_200_101, "llm", job_id="job-1")
threading.Thread(target=vary, daemon=True).start()"""
SHOW = "ResourcePanel(manager, interval=0.2)"
MARIMO = """import marimo
app = marimo.App()

@app.cell
def _():
{setup}
    from cjm_fasthtml_resources.ui import live_view
    from cjm_fasthtml_resources.ui.live_view import LiveView
    live_view.SIGN, live_view.EXPECT = 0.5, 6
    return LiveView, ResourceManager, ResourcePanel, manager

@app.cell
def _(ResourcePanel, manager):
    ResourcePanel(manager, interval=0.2)
    return

@app.cell
def _(LiveView, ResourceManager):
    LiveView(ResourceManager(), interval=0.2)
    return

@app.cell
def _():
    import marimo as mo
    refresh = mo.ui.refresh(default_interval="1s")
    refresh
    return (refresh,)

@app.cell
def _(manager, refresh):
    refresh
    manager
    return

if __name__ == "__main__": app.run()
"""


# Voilà's request to end the kernel of a page that is closed carries no such token, and is refused otherwise (voila's
# issue 1458); then the kernel goes on, and nothing tells it that its page is closed
ENDS = "--Voila.tornado_settings={'disable_check_xsrf': True}"


def need(*modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    reason = f"no {' and no '.join(missing)}: pip install '.[browser]'"
    if missing: (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def environment(folder) -> dict[str, str]:
    "Where Jupyter's programs and marimo keep all of their own"
    names = (*JUPYTER_FOLDERS, "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME")
    return {**os.environ, **{name: str(folder/name.lower()) for name in names}}


def tool(folder, *command: str) -> str:
    "Run a program of Jupyter's to its end"
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=environment(folder), timeout=120,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def loads(page) -> list[str]: return page.locator(".load").all_inner_texts()


def moves(page, panel: int = 0) -> bool:
    "Whether the figures of a panel change"
    card, seen, end = page.locator(".cjm:visible").nth(panel).locator(".load").first, set(), time.monotonic() + 15
    while time.monotonic() < end and len(seen) < 3:
        seen.add(card.inner_text())
        time.sleep(0.1)
    return len(seen) >= 3


@pytest.fixture(scope="module")
def executed(chromium, tmp_path_factory):
    "A notebook with two cells of the same source, as papermill has run it"
    need("papermill", "nbconvert")
    folder = tmp_path_factory.mktemp("papermill")
    last = "time.sleep(1)\ngpus[0].temperature = 77\ntime.sleep(1)\nprint('threads', threading.active_count())"
    (folder/"in.ipynb").write_text(json.dumps(notebook([SETUP, SHOW, SHOW, last])))
    tool(folder, "papermill", "in.ipynb", "out.ipynb")
    return folder


def test_nbconvert_shows_the_last_sample_without_a_network(executed, new_page):
    tool(executed, "nbconvert", "--to", "html", "out.ipynb")
    page = new_page()
    page.context.set_offline(True)
    page.route(re.compile("^https?:"), lambda route: route.abort())
    page.goto(f"file://{executed}/out.html", wait_until="domcontentloaded")
    page.locator(".cjm .cjm-card").first.wait_for()
    cards = page.locator(".cjm .cjm-card:visible", has_text="NVIDIA L4")
    assert cards.count() >= 2                        # two cells with one source are two panels
    assert "77 °C" in loads(page)[0]                 # the last sample
    assert page.locator(".cjm .workers", has_text="job-1").count() == 2


def test_voila_shows_it_live_and_ends_with_its_pages(chromium, new_page, tmp_path):
    need("voila")
    (tmp_path/"panel.ipynb").write_text(json.dumps(notebook([SETUP, SHOW, SHOW])))
    port = free_port()
    command = [sys.executable, "-m", "voila", "panel.ipynb", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
               ENDS]
    url = f"http://127.0.0.1:{port}/"
    own = dict(cwd=tmp_path, env=environment(tmp_path))
    with serving(command, f"{url}voila/static/voila.js", tmp_path/"log", **own) as process:
        page = new_page()
        page.goto(url)
        page.locator(".cjm .cjm-card").first.wait_for()
        page.locator(".cjm:visible .cjm-card").nth(5).wait_for()     # two cells with one source are two panels
        assert moves(page, 0) and moves(page, 1)
        assert len(process_tree(process.pid)) > 0
        page.goto("about:blank")                                     # a closed page ends its kernel
        wait_until(lambda: process_tree(process.pid) == [])
        page.goto(url)
        page.locator(".cjm .cjm-card").first.wait_for()
        kernels = process_tree(process.pid)
        process.send_signal(signal.SIGTERM)                          # with a page open
        process.wait(10)
        wait_until(lambda: not any(map(is_there, kernels)))


# Kernels without a page are ended after a while: the other way, which needs no such setting
CULLS = ("--MappingKernelManager.cull_idle_timeout=3", "--MappingKernelManager.cull_interval=1")


def test_voila_ends_the_sampler_of_a_closed_page_and_so_its_kernel(chromium, new_page, tmp_path):
    need("voila")
    (tmp_path/"panel.ipynb").write_text(json.dumps(notebook([SETUP, COUNT.replace("NAME", "samplers"), SHOW])))
    port, told = free_port(), tmp_path/"samplers"
    command = [sys.executable, "-m", "voila", "panel.ipynb", "--no-browser", "--ip=127.0.0.1", f"--port={port}", *CULLS]
    url = f"http://127.0.0.1:{port}/"
    own = dict(cwd=tmp_path, env=environment(tmp_path))
    with serving(command, f"{url}voila/static/voila.js", tmp_path/"log", **own) as process:
        page = new_page()
        page.goto(url)
        page.locator(".cjm:visible .cjm-card").first.wait_for()
        time.sleep(2*SILENCE)                                        # longer than any of the limits
        assert moves(page) and told.read_text() == "1"
        kernel = process_tree(process.pid)
        page.goto("about:blank")
        wait_until(lambda: told.read_text() == "0")                  # nobody sees it
        wait_until(lambda: not any(map(is_there, kernel)))


def is_there(pid: int) -> bool:
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return True


def test_marimo_shows_it(chromium, new_page, tmp_path):
    need("marimo", "anywidget")
    told = tmp_path/"samplers"
    cell = "\n".join(f"    {line}" for line in (SETUP + "\n" + COUNT.replace("NAME", str(told))).splitlines())
    (tmp_path/"app.py").write_text(MARIMO.format(setup=cell))
    port = free_port()
    command = [sys.executable, "-m", "marimo", "-q", "-y", "run", "app.py", "--headless", "--no-token", "--host",
               "127.0.0.1", "--port", str(port)]
    own = dict(cwd=tmp_path, env=environment(tmp_path))
    with serving(command, f"http://127.0.0.1:{port}/health", tmp_path/"log", **own) as process:
        page = new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        page.locator(".cjm .cjm-card").nth(8).wait_for()
        panel = page.locator(".cjm").first
        assert "A static picture. Data from" in panel.inner_text() or moves(page)   # old figures never look live
        assert moves(page, 1) and moves(page, 2)   # a LiveView, and what marimo shows again each second
        wait_until(lambda: told.read_text() == "1")                  # the picture takes no samples
        live = page.locator(".cjm[data-cjm-watched]")                # the LiveView
        live.locator(".processes th button", has_text="PID").click()
        assert live.locator(".processes th[aria-sort=descending]").count() == 1
        shown = loads(live)
        wait_until(lambda: loads(live) != shown)
        assert live.locator(".processes th[aria-sort=descending]").count() == 1
        process.send_signal(signal.SIGSTOP)                          # nothing is told to the page
        live.get_by_text("Not live. Showing data from").wait_for()
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: not live.get_by_text("Not live. Showing data from").is_visible())
        page.goto("about:blank")
        wait_until(lambda: told.read_text() == "0")                  # a closed page ends its sampler
        page.goto(f"http://127.0.0.1:{port}/")
        page.locator(".cjm .cjm-card").nth(8).wait_for()
        process.send_signal(signal.SIGTERM)                          # with a page open
        process.wait(10)
