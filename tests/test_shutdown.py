"Servers in processes of their own that are stopped, and reloaded, while a page is open"
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("fasthtml", reason="the extra web is not installed")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

APP = """
from fasthtml.common import FastHTML, serve
from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
from cjm_fasthtml_resources.ui.web import resource_routes

driver = SimulatedDriver([SimulatedGpu()]).start()
app = FastHTML(default_hdrs=False, secret_key="of a test")
resource_routes(app, ResourceManager(track_self=False))

@app.get("/edition")
def edition(): return "1st"
"""
UVICORN = [sys.executable, "-m", "uvicorn", "page:app", "--log-level", "warning", "--port", "{port}"]
SERVERS = {
    "uvicorn": UVICORN,
    "uvicorn on asyncio": [*UVICORN, "--loop", "asyncio", "--http", "h11"],
    "uvicorn with reload": [*UVICORN, "--reload"],
    "uvicorn with workers": [*UVICORN, "--workers", "2"],
    "FastHTML's serve": [sys.executable, "page.py"],
    "the command": [sys.executable, "-m", "cjm_fasthtml_resources", "--simulate", "idle", "serve", "--port", "{port}"],
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def serving(command, folder):
    "A server, and its address"
    port = free_port()
    (folder/"page.py").write_text(f"{APP}\nserve(port={port}, host='127.0.0.1')\n")
    command, url = [part.format(port=port) for part in command], f"http://127.0.0.1:{port}"
    with open(folder/"log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while answer(url, "/resources") is None:
            assert process.poll() is None and time.monotonic() < end, (folder/"log").read_text()
            time.sleep(0.1)
        yield process, url
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answer(url: str, path: str) -> str | None:
    "What is there; `None` where no server answers"
    try: return httpx.get(url + path, timeout=5).text
    except httpx.TransportError: return None


class Page(threading.Thread):
    "A page that is open: its stream, until that ends"
    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.heard, self.error = url, threading.Event(), None
        self.start()
        assert self.heard.wait(20)

    def run(self) -> None:
        try:
            with httpx.stream("GET", f"{self.url}/resources/stream", timeout=30) as response:
                for _ in response.iter_lines(): self.heard.set()
        except httpx.TransportError as error: self.error = error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize("command", SERVERS.values(), ids=SERVERS)
def test_a_server_that_a_page_is_open_on_ends_when_it_is_told_to(command, number, tmp_path):
    with serving(command, tmp_path) as (process, url):
        pages = [Page(url) for _ in range(3)]
        began = time.monotonic()
        if number == signal.SIGINT: os.killpg(process.pid, number)   # as a terminal does
        else: process.send_signal(number)
        process.wait(10)
        assert time.monotonic() - began < 3      # it takes about 0.3 s where the machine has nothing else to do
        for page in pages: page.join(10)
        assert [page.error for page in pages] == [None]*3   # each stream ended as a whole answer does
        said = (tmp_path/"log").read_text()
        assert "Traceback" not in said and "Cancel" not in said and "ASGI callable returned" not in said


@pytest.mark.parametrize("command", [SERVERS["uvicorn with reload"], SERVERS["FastHTML's serve"]],
                         ids=["uvicorn with reload", "FastHTML's serve"])
def test_an_edit_is_served_while_a_page_is_open(command, tmp_path):
    with serving(command, tmp_path) as (_, url):
        page = Page(url)
        assert "1st" in answer(url, "/edition")
        source = tmp_path/"page.py"
        time.sleep(1)    # the reloader goes by the time of the file
        source.write_text(source.read_text().replace("1st", "2nd"))
        end = time.monotonic() + 30
        while "2nd" not in (answer(url, "/edition") or ""):
            assert time.monotonic() < end, (tmp_path/"log").read_text()
            time.sleep(0.1)
        page.join(10)
        assert not page.is_alive() and page.error is None
        Page(url)        # and there are streams again


def test_a_server_that_stops_after_a_number_of_requests_ends(tmp_path):
    with serving([*UVICORN, "--limit-max-requests", "20"], tmp_path) as (process, url):
        Page(url)
        for _ in range(20): answer(url, "/edition")
        process.wait(10)
