"The web app of the examples, as a person uses it"
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

import psutil
import pytest
from conftest import ROOT

from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

pytest.importorskip("fasthtml", reason="the extra web is not installed")
pytest.importorskip("uvicorn")

APP, REQUESTS = ROOT/"examples/job_app.py", 5
SERVER = [sys.executable, "-m", "uvicorn", "--app-dir", str(APP.parent), "job_app:app", "--port", "0",
          "--limit-max-requests", str(REQUESTS)]   # so that it ends by itself after the last one


@pytest.fixture
def address(folder, tmp_path, monkeypatch):
    "Where the app is served, in a folder of its own; it must have ended by itself when the test is over"
    monkeypatch.chdir(tmp_path)
    server = subprocess.Popen(SERVER, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        while not (found := re.search(r"running on (http://\S+)", said)):
            line = server.stderr.readline()
            assert line, f"it did not start: {said}"
            said += line
        yield found[1]
        rest = server.communicate(timeout=30)[1]
        assert server.returncode == 0 and "Traceback" not in rest, rest
    finally:
        server.kill()
        server.communicate()


def ask(url: str, method: str = "GET") -> str:
    with urlopen(Request(url, method=method), timeout=60) as answer: return answer.read().decode()


def running_worker(manager: ResourceManager, kind: str) -> psutil.Process:
    "The worker of a kind, once its model is loaded"
    end = time.monotonic() + 30
    while time.monotonic() < end:
        used = manager.check_gpu_availability().app_pids
        found = next((w.pid for w in manager.get_all_workers() if w.worker_type == kind and w.pid in used), None)
        if found: return psutil.Process(found)
        time.sleep(0.02)
    raise AssertionError(f"no {kind} worker has come")


def test_jobs_of_two_kinds_run_and_one_that_takes_too_much_is_told_who_was_there(address, tmp_path):
    manager = ResourceManager(app="studio", track_self=False)
    with SimulatedDriver([SimulatedGpu("NVIDIA L4")], shared=tmp_path/".gpus"), ThreadPoolExecutor(1) as pool:
        home = ask(address)
        assert all(f'hx-post="{path}"' in home for path in ("transcription", "diffusion", "diffusion?mb=20000"))
        transcription = pool.submit(ask, f"{address}/transcription", "POST")
        worker = running_worker(manager, "transcription")
        worker.suspend()   # it is there until it is resumed
        job = manager.get_worker_by_pid(worker.pid).job_id
        page = ask(f"{address}/resources")
        assert all(text in page for text in (job, str(worker.pid), "transcription", "NVIDIA L4"))
        said = ask(f"{address}/diffusion?mb=20000", "POST")
        assert "asked for 19.5 GiB of GPU memory on GPU 0" in said
        assert f"your transcription worker (PID {worker.pid}, running {job}, 5.9 GiB)" in said
        worker.resume()
        assert re.search(r"diffusion-\w+ is done", ask(f"{address}/diffusion", "POST"))
        assert f"{job} is done" in transcription.result()
        assert (manager.get_all_workers(), manager.get_claims()) == ([], [])


def test_it_can_be_read_at_a_glance():
    lines = APP.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
