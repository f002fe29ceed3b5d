"A server with several processes: counters do not go backwards, pages agree, and each process has one sampler"
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fasthtml", reason="the extra web is not installed")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

APP = """
import os, subprocess, threading
from fasthtml.common import FastHTML
from starlette.responses import JSONResponse
from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
from cjm_fasthtml_resources.ui.web import resource_routes

driver = SimulatedDriver([SimulatedGpu()]).start()
app = FastHTML(default_hdrs=False, secret_key="of a test")
manager = ResourceManager(app="shop")
routes = resource_routes(app, manager, interval=0.2, controls=True, guard=lambda req: None, metrics="/metrics")

@app.get("/reserve")
def reserve():
    with manager.reserve(100): return JSONResponse(os.getpid())

failing = threading.Lock()   # or of two at once, the second would put back what the first has broken

@app.get("/fail")
def fail():
    with failing:
        take, manager.get_claims = manager.get_claims, None
        try: list(routes_collector.collect())
        finally: manager.get_claims = take
    return JSONResponse(os.getpid())

@app.get("/work")
def work():
    worker = subprocess.Popen(["sleep", "100"])
    manager.register_worker(worker.pid, "llm", job_id="job-1")
    return JSONResponse([worker.pid, os.getpid()])

@app.get("/samplers")
def samplers(): return JSONResponse([os.getpid(), [t.name for t in threading.enumerate()].count("resource-monitor")])

from cjm_fasthtml_resources.ui.metrics import ResourceCollector
routes_collector = ResourceCollector(routes.monitor)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def get(url: str): return httpx.get(url, timeout=10)   # a connection of its own, so any process answers


@pytest.fixture
def server(tmp_path):
    port = free_port()
    (tmp_path/"shop.py").write_text(APP)
    options = ["--workers", "3", "--port", str(port), "--log-level", "warning"]
    command = [sys.executable, "-m", "uvicorn", "shop:app", *options]
    env = {**os.environ, "CJM_RESOURCES_DIR": str(tmp_path/"shared")}
    with open(tmp_path/"log", "w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while True:
            try: get(f"{url}/samplers")
            except httpx.HTTPError:
                assert time.monotonic() < end, (tmp_path/"log").read_text()
                time.sleep(0.2)
            else: break
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def spread(url: str, path: str, processes: int = 2) -> list:
    "Ask until several processes have answered; what they say"
    found, end = [], time.monotonic() + 30
    while len({pid for pid, _ in found}) < processes:
        assert time.monotonic() < end
        with ThreadPoolExecutor(6) as threads:
            answers = [answer.json() for answer in threads.map(get, [url + path]*6)]
        found += [answer if isinstance(answer, list) else [answer, None] for answer in answers]
    return found


def value(text: str, name: str) -> float:
    return float(re.search(rf"^cjm_resources_{name} (\S+)$", text, re.MULTILINE)[1])


def test_counters_do_not_go_backwards_whichever_process_answers(server):
    for path, name in (("/reserve", "reservation_wait_seconds_count"), ("/fail", "scrape_errors_total")):
        known = 0.0
        for _ in range(2):
            known += len(spread(server, path))
            assert {value(get(f"{server}/metrics").text, name) for _ in range(12)} == {known}


def test_every_page_shows_every_worker_and_stops_it(server):
    workers = spread(server, "/work")
    pids = {worker for worker, _ in workers}
    for _ in range(12):
        page = get(f"{server}/resources").text
        assert all(str(pid) in page for pid in pids)
    questions = set(re.findall(r"value=\"?(\d+\.[\d.]+)", page))
    assert {int(who.partition(".")[0]) for who in questions} == pids
    for who in questions:                            # whichever process is asked
        same = {"Sec-Fetch-Site": "same-origin"}
        answer = httpx.post(f"{server}/resources/stop", data=dict(worker=who), headers=same)
        assert answer.status_code == 303, answer.text
    time.sleep(1)                                    # a page may be one interval old
    for _ in range(12): assert "job-1" not in get(f"{server}/resources").text


def test_each_process_has_one_sampler_however_many_pages_are_open(server):
    import contextlib
    with contextlib.ExitStack() as pages:
        for _ in range(12): pages.enter_context(httpx.stream("GET", f"{server}/resources/stream", timeout=10))
        time.sleep(1)
        assert {count for _, count in spread(server, "/samplers")} <= {0, 1}
