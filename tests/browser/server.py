"""An app with the page and with simulated GPUs that a test can change: server.py PORT [PREFIX]

With a prefix, the server stands for a proxy, too: it removes that, and the app does not learn of it.
PUT /test?used=MIB fills the second GPU, ?grown=MIB is what train.py uses on the first, ?workers=N has so many idle
workers before the first one, ?idle ends its job, ?reset has all as at the start; /test says what the driver was asked
and which threads there are. Where HISTORY names a recorder's file, the charts show it.
"""
import os
import subprocess
import sys
import threading
from pathlib import Path

import uvicorn
from fasthtml.common import FastHTML, Titled
from starlette.responses import JSONResponse, Response

from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.recorded.history import RecordedHistory
from cjm_fasthtml_resources.simulate import (
    SimulatedDriver,
    SimulatedGpu,
    SimulatedHostProcess,
    SimulatedMachine,
    SimulatedProcess,
)
from cjm_fasthtml_resources.ui.web import ResourceCard, resource_routes

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
hosted = [SimulatedHostProcess(4200001, HOSTILE, "mallory"), SimulatedHostProcess(4200002, "train.py", "bob")]
on_gpu = [SimulatedProcess(4200001, 3000), SimulatedProcess(4200002, 2000)]
gpus = [SimulatedGpu("NVIDIA L4", memory_used_mb=5000, processes=on_gpu),
        SimulatedGpu("NVIDIA L40S", memory_total_mb=46068)]
driver, manager = SimulatedDriver(gpus, SimulatedMachine(processes=hosted)), ResourceManager()
app = FastHTML(secret_key="of a test", default_hdrs=False)
recorded = RecordedHistory(Path(os.environ["HISTORY"])) if "HISTORY" in os.environ else None
resource_routes(app, manager, interval=0.25, controls=True, guard=lambda req: None, recorded=recorded)
at_first = [(gpu, gpu.memory_used_mb, gpu.temperature) for gpu in gpus]


def start_worker() -> subprocess.Popen:
    "Start a worker, which ends with its parent"
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    manager.register_worker(process.pid, "llm", plugin_name="vllm", job_id="job-1")
    return process


worker = start_worker()


@app.get("/")
def home(): return Titled("An app of one's own", ResourceCard(manager))


@app.get("/team/ada")
def team(): return Titled("A page further down", ResourceCard(manager))


def have_idle(count: int) -> None:
    "Have so many workers that are idle, and come before the one that is not where all are"
    for pid in range(4_200_301, 4_200_311): manager.unregister_worker(pid)
    manager.unregister_worker(worker.pid)
    for pid in range(4_200_301, 4_200_301 + count): manager.register_worker(pid, "whisper")
    manager.register_worker(worker.pid, "llm", plugin_name="vllm", job_id="job-1")


def begin_again() -> None:
    "Have all as at the start; a worker that was stopped is followed by another"
    global worker
    for gpu, used, temperature in at_first: gpu.memory_used_mb, gpu.temperature = used, temperature
    on_gpu[1].memory_mb = 2000
    have_idle(0)
    if worker.poll() is None: return
    manager.unregister_worker(worker.pid)
    worker = start_worker()


@app.route("/test", methods=["GET", "PUT"])
def state(req):
    if "reset" in req.query_params: begin_again()
    if "used" in req.query_params: gpus[1].memory_used_mb = float(req.query_params["used"])
    if "grown" in req.query_params: on_gpu[1].memory_mb = float(req.query_params["grown"])
    if "first" in req.query_params: gpus[0].memory_used_mb = float(req.query_params["first"])
    if "workers" in req.query_params: have_idle(int(req.query_params["workers"]))
    if "idle" in req.query_params: manager.update_worker_state(worker.pid, job_id=None, status="idle")
    if "temperature" in req.query_params: gpus[0].temperature = int(req.query_params["temperature"])
    threads = [t.name for t in threading.enumerate()]
    reads = driver.calls["nvmlDeviceGetCount_v2"]
    return JSONResponse(dict(reads=reads, threads=threads, worker=worker.pid, ended=worker.poll()))


def behind(prefix: str):
    "The app behind a proxy"
    async def proxied(scope, receive, send):
        if scope["type"] == "http" and scope["path"].startswith(f"{prefix}/"):
            cut = {name: scope[name][len(prefix):] for name in ("path", "raw_path")}
            return await app({**scope, **cut}, receive, send)
        if scope["type"] == "http": return await Response(status_code=404)(scope, receive, send)
        await app(scope, receive, send)
    return proxied


if __name__ == "__main__":
    served = behind(sys.argv[2]) if sys.argv[2:] else app
    with driver:
        try: uvicorn.run(served, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
        finally: worker.kill()
