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


def violations(page, context=".cjm") -> list[str]:
    "What axe-core finds that is serious, in words"
    from axe_playwright_python.sync_playwright import Axe
    found = Axe().run(page, context=context).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    return [f"{v['id']}: {v['help']}: {[node['html'][:160] for node in v['nodes'][:3]]}" for v in serious]
