"""Servers of all kinds in processes of their own, and pages that are open on them: real programs, as people start them.

`python tests/servers.py [NAME …]` prints how long each takes to end after Ctrl-C, with and without an open page.
"""
import contextlib
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

APP = """
import os
from importlib.util import find_spec
from pathlib import Path
from fasthtml.common import FastHTML, serve
from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
from cjm_fasthtml_resources.ui.web import EventStream, resource_routes, to_event

async def lifespan(app):
    with (Path(__file__).parents[1]/"up").open("a") as up: print(os.getpid(), file=up)
    yield

driver = SimulatedDriver([SimulatedGpu("NVIDIA 1st")]).start()
app = FastHTML(default_hdrs=False, secret_key="of a test", lifespan=lifespan)
metrics = "/metrics" if find_spec("prometheus_client") else None
manager = ResourceManager(track_self=False)
resource_routes(app, manager, metrics=metrics)

@app.get("/edition")
def edition(): return "1st"

@app.get("/flood")
def flood():
    async def events():
        while True: yield to_event("flood", "x"*100_000)
    return EventStream(events())
"""
PYTHON = [sys.executable, "-m"]
UVICORN = [*PYTHON, "uvicorn", "page:app", "--log-level", "warning", "--port", "{port}"]
GUNICORN = [*PYTHON, "gunicorn", "page:app", "--workers", "3", "--bind", "127.0.0.1:{port}", "--worker-class"]
HYPERCORN = [*PYTHON, "hypercorn", "page:app", "--bind", "127.0.0.1:{port}"]
GRANIAN = [*PYTHON, "granian", "page:app", "--interface", "asgi", "--port", "{port}"]
SERVERS = {
    "uvicorn": UVICORN,
    "uvicorn on asyncio": [*UVICORN, "--loop", "asyncio", "--http", "h11"],
    "uvicorn with reload": [*UVICORN, "--reload"],
    "uvicorn with workers": [*UVICORN, "--workers", "2"],
    "gunicorn with three workers": [*GUNICORN, "uvicorn_worker.UvicornWorker"],
    "gunicorn's own workers": [*GUNICORN, "asgi"],
    "hypercorn": HYPERCORN,
    "hypercorn with reload": [*HYPERCORN, "--reload"],
    "granian": GRANIAN,
    "granian with reload": [*GRANIAN, "--reload"],
    "FastHTML's serve": [sys.executable, "page.py"],
    "the command": [sys.executable, "-m", "cjm_fasthtml_resources", "--simulate", "idle", "serve", "--port", "{port}"],
}
RELOADING = ("uvicorn with reload", "gunicorn with three workers", "gunicorn's own workers", "hypercorn with reload",
             "granian with reload", "FastHTML's serve")


def need_server(name: str) -> list[str]:
    "The command of a server that is installed"
    command = SERVERS[name]
    for module in ("uvicorn", "uvicorn_worker", "gunicorn", "hypercorn", "granian"):
        if any(part.split(".")[0] == module for part in command) and find_spec(module) is None:
            pytest.skip(f"no {module}: pip install '.[servers]'")
    return command


def need_program(name: str, package: str) -> str:
    "A program of the system's packages, which the test command installs where it may"
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")
    if found: return found
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no {name}: apt-get install {package}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answer(url: str, path: str) -> str | None:
    "What is there; `None` where no server answers"
    try: return httpx.get(url + path, timeout=5).text
    except httpx.TransportError: return None


def wait_until(condition, seconds: float = 30, told=lambda: "it takes too long") -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, told()
        time.sleep(0.05)


@contextlib.contextmanager
def running(command, folder: Path, log: str = "log", **kw):
    "A process with those that it starts, whose output goes into a file"
    # bytecode goes by a file's size and second, so two editions of one second would be one
    given = dict(cwd=folder, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}) | kw
    with open(folder/log, "a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, **given)
    try: yield process
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_app(folder: Path, port: int, edition: str = "1st") -> None:
    text = APP.replace("1st", edition)
    (folder/"app").mkdir(exist_ok=True)      # without the log, which a reloader would take for an edit
    (folder/"app"/"page.py").write_text(f"{text}\nserve(port={port}, host='127.0.0.1')\n")


def count_workers(command) -> int:
    "The processes that run the app; 0 where it is another one"
    if not any("page" in part for part in command): return 0
    return int(command[command.index("--workers") + 1]) if "--workers" in command else 1


@contextlib.contextmanager
def serving(command, folder: Path, port: int | None = None):
    "A server, and its address"
    port = port or free_port()
    if not (folder/"app").exists(): write_app(folder, port)
    url, up = f"http://127.0.0.1:{port}", folder/"up"
    up.touch()
    before = len(up.read_text().split())
    with running([part.format(port=port) for part in command], folder, cwd=folder/"app") as process:
        def is_up() -> bool:
            assert process.poll() is None, (folder/"log").read_text()
            return answer(url, "/resources") is not None
        wait_until(is_up, 60, (folder/"log").read_text)
        # a worker that is told to end while it starts can miss it, and its server then waits for it
        wait_until(lambda: len(up.read_text().split()) - before >= count_workers(command), 60, (folder/"log").read_text)
        yield process, url


def stop(process: subprocess.Popen, number: int) -> float:
    "Stop a server, as a terminal or as a service manager does; the seconds that it took"
    began = time.monotonic()
    if number == signal.SIGINT: os.killpg(process.pid, number)
    else: process.send_signal(number)
    process.wait(20)
    return time.monotonic() - began


class Tab(threading.Thread):
    "A page that is open: it holds its stream, and asks for a new one when that ends, as the page's script does"
    def __init__(self, url: str, path: str = "/resources/stream", **headers: str) -> None:
        super().__init__(daemon=True)
        self.url, self.headers = url + path, headers
        self.text, self.closed = "", False
        self.events, self.errors = list[tuple[float, str]](), list[Exception | None]()   # when and what; how it ended
        self.start()
        wait_until(lambda: self.events, 20, lambda: f"no event: {self.errors}")

    def run(self) -> None:
        with httpx.Client(timeout=httpx.Timeout(30, connect=2)) as client:
            while not self.closed:
                self.errors.append(self._listen(client))
                time.sleep(0.2)

    def _listen(self, client: httpx.Client) -> Exception | None:
        "Hear a stream to its end; the error that it ended with"
        name = ""
        try:
            with client.stream("GET", self.url, headers=self.headers) as response:
                if response.status_code != 200: raise httpx.TransportError(f"{response.status_code}")
                for line in response.iter_lines():
                    if self.closed: return None
                    kind, _, text = line.partition(": ")
                    if kind == "event": name = text
                    elif kind == "data":
                        self.events.append((time.monotonic(), name))
                        if name == "layout": self.text = text
        except (httpx.TransportError, httpx.DecodingError) as error: return error
        return None

    def ended(self) -> list[Exception | None]:
        "How each stream ended that was heard of; `None`: as a whole answer does"
        return [error for error in self.errors if not isinstance(error, httpx.ConnectError)]


class HalfRead:
    "A page that reads the beginning of a stream, and then no more"
    def __init__(self, url: str, path: str = "/resources/stream") -> None:
        host, port = url.removeprefix("http://").split(":")
        self.connection, self.closed = socket.create_connection((host, int(port)), 20), False
        self.connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        got = b""
        while b"event: " not in got:
            part = self.connection.recv(100)
            assert part, got
            got += part


def open_unread(url: str) -> HalfRead:
    "A page as on a laptop that sleeps: what it has not read fills all buffers between it and the app"
    page = HalfRead(url, "/flood")
    time.sleep(1)
    return page


PAGES = {
    "none": lambda url: [],
    "open": lambda url: [Tab(url), Tab(url), HalfRead(url)],
    "unread": lambda url: [open_unread(url)],
}


UNMADE = (("the command", "unread"),)   # its own stream is small, and would fill no buffer for an hour


def seconds_to_end(name: str, pages: str, folder: Path, number: int = signal.SIGINT) -> float:
    """From the signal to the end of a server that such pages are open on; infinite if it hangs, as granian can:
    two signals at once lock it up while its event loop is busy, also without this library (its issue 875)"""
    folder.mkdir(exist_ok=True)
    with serving(need_server(name), folder) as (process, url):
        tabs = PAGES[pages](url)
        time.sleep(0.3)
        try: seconds = stop(process, number)
        except subprocess.TimeoutExpired: seconds = math.inf
        for tab in tabs: tab.closed = True
    return seconds


def main(names: list[str], tries: int = 3) -> None:
    "Print a table of seconds: the best and the median of some tries"
    print(f"{'from Ctrl-C to the end, in s':30}", *(f"{pages + ' best':>12} median" for pages in PAGES))
    for name in names or SERVERS:
        row = []
        for pages in PAGES:
            if (name, pages) in UNMADE: continue
            with tempfile.TemporaryDirectory() as folder:
                took = [seconds_to_end(name, pages, Path(folder)/str(i)) for i in range(tries)]
            row.append(f"{min(took):12.2f} {statistics.median(took):6.2f}")
        print(f"{name:30}", *row, flush=True)


if __name__ == "__main__": main(sys.argv[1:])
