"Servers and a browser for the tests, and for the pictures of the documentation"
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
JUPYTER_FOLDERS = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
                   "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def serving(command, url, log, **kw):
    "A server process that answers at `url`"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **kw)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{command[0]} did not start: {Path(log).read_text()[-2000:]}") from None
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try: process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def notebook(sources: list[str]) -> dict:
    "A notebook with these cells, as its file has it"
    cells = [dict(cell_type="code", id=f"cell-{i}", execution_count=None, metadata={}, outputs=[], source=source)
             for i, source in enumerate(sources)]
    kernel = dict(name="python3", display_name="Python 3", language="python")
    return dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)


@contextlib.contextmanager
def jupyter(app: str, folder: Path):
    "The address of a Jupyter server on a folder, which keeps all of its own in there"
    port = free_port()
    command = [sys.executable, "-m", app, "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}"]
    env = {**os.environ, **{name: str(folder/name.lower()) for name in JUPYTER_FOLDERS}}
    with serving(command, f"http://127.0.0.1:{port}/api", folder/"log", env=env): yield f"http://127.0.0.1:{port}"


# In a notebook: writes to a file how many samplers there are, and has a closed page noticed after seconds, not minutes
COUNT = """import threading, time
from pathlib import Path
from cjm_fasthtml_resources.ui import heard, seen
heard.SILENCE, seen.SIGN, seen._EXPECT = 4, 0.5, 6
def count():
    while True:
        Path("NAME.new").write_text(str(sum(t.name == "resource-monitor" for t in threading.enumerate())))
        Path("NAME.new").rename("NAME")             # at once, for its reader
        time.sleep(0.2)
threading.Thread(target=count, daemon=True).start()"""


SILENCE = 4   # seconds, as above


def process_tree(pid: int) -> list[int]:
    "The processes that descend from one, such as the kernels of a server"
    import psutil
    try: return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess: return []


def wait_until(condition, seconds: float = 30) -> None:
    "Wait until a condition is true; a machine that is busy with other tests is slow"
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so in {seconds:g} s"
        time.sleep(0.05)


def wait_for(page, expression: str, timeout: float = 30_000) -> None:
    "Wait until an expression is true in a page. Playwright's own way evaluates text there, which the page forbids"
    end = time.monotonic() + timeout/1000
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not so in {timeout:g} ms: {expression}"
        page.wait_for_timeout(50)


def settle(page, seconds: float = 5.0) -> None:
    "Wait until the panel in a page has the same size twice in a row, after its window got another one"
    size, end = None, time.monotonic() + seconds
    while size != (size := page.evaluate(SIZE)) and time.monotonic() < end: page.wait_for_timeout(60)


# The window's size, and of each panel where it is; two frames later than asked for, or after a second without a frame
SIZE = """() => new Promise(tell => {
    const size = () => tell(JSON.stringify(
        [innerWidth, ...[...document.querySelectorAll('.cjm')].map(e => e.getBoundingClientRect())]));
    setTimeout(size, 1000);
    requestAnimationFrame(() => requestAnimationFrame(size));
})"""


def violations(page, context=".cjm") -> list[str]:
    "What axe-core finds that is serious, in words"
    from axe_playwright_python.sync_playwright import Axe
    found = Axe().run(page, context=context).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    return [f"{v['id']}: {v['help']}: {[node['html'][:160] for node in v['nodes'][:3]]}" for v in serious]


# What a person would be annoyed by: headers that are cut, columns that are squeezed to nothing, words over one another
CUT = """() => {
    const visible = (e) => e.checkVisibility({visibilityProperty: true});
    const said = [];
    const wide = document.documentElement.scrollWidth;
    if (wide > innerWidth) said.push(`the page is ${wide} px wide`);
    for (const th of document.querySelectorAll('.cjm th')) {
        if (!visible(th)) continue;
        const name = th.textContent, box = th.getBoundingClientRect();
        if (th.scrollWidth > th.clientWidth) said.push(`the header ${name} is cut`);
        if (['process', 'type', 'status'].includes(name) && box.width < 44) said.push(`${name} has ${box.width} px`);
    }
    for (const box of document.querySelectorAll('.cjm .halves')) {
        const [left, right] = [...box.querySelectorAll('table')].map((table) =>
            [...table.rows].map((tr) => Math.round(tr.getBoundingClientRect().top)).join());
        if (left !== right) said.push(`rows beside each other are at ${left} and ${right}`);
    }
    for (const name of ['type', 'status', 'process'])
        if (![...document.querySelectorAll('.cjm th')].some((th) => th.textContent === name && visible(th)))
            said.push(`no ${name}`);
    for (const td of document.querySelectorAll('.cjm .n, .cjm .processes td:nth-child(2), .cjm .only td'))
        if (visible(td) && td.scrollWidth > td.clientWidth + 1) said.push(`the figure ${td.textContent} is cut`);
    return said;
}"""
