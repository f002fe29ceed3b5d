"Hosts of a dask cluster on this machine, started by dask's own commands: for the tests and for benchmarks/cluster.py"
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# Each worker process of a host sees the same simulated GPUs; `driver.allocate` fails when there is no room
SIM_HOST = """
import os, sys
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
gpus = int(os.environ["SIM_GPUS"])
if gpus:
    machine = os.environ.get("SIM_MACHINE") or os.environ["CJM_RESOURCES_HOST"]   # whose GPUs they are
    cards = [SimulatedGpu("NVIDIA L4", memory_total_mb=24_000, uuid=f"GPU-{machine}-{n}") for n in range(gpus)]
    driver = SimulatedDriver(cards, shared=os.environ["CJM_RESOURCES_DIR"] + "/gpus")
    driver.start()
if boot := os.environ.get("SIM_BOOT"):   # a machine of its own
    import cjm_fasthtml_resources.hosts.worker as worker
    worker.boot_id = lambda: boot
"""


class Cluster:
    "A scheduler and hosts, started by dask's own commands"
    def __init__(self, folder: Path, stack: contextlib.ExitStack, options: tuple[str, ...] = ()) -> None:
        self.folder, self.stack, self.hosts = folder, stack, dict[str, list[subprocess.Popen]]()
        (folder/"sim_host.py").write_text(SIM_HOST)
        self.file, self.options = folder/"scheduler.json", options
        self.start_scheduler("0")

    def start_scheduler(self, port: str) -> None:
        self.scheduler = self.start("scheduler", "scheduler", "--port", port)
        end = time.monotonic() + 60
        while not self.file.exists():
            assert time.monotonic() < end and self.scheduler.poll() is None, "the scheduler does not start"
            time.sleep(0.05)

    def kill(self) -> str:
        "Kill the scheduler and its workers; returns the scheduler's port"
        port = json.loads(self.file.read_text())["address"].rpartition(":")[2]
        for process in (self.scheduler, *(p for each in self.hosts.values() for p in each)):
            os.killpg(process.pid, signal.SIGKILL)
        self.scheduler.wait()
        self.hosts.clear()
        self.file.unlink()
        return port

    def start(self, name: str, *command: str, **env: str) -> subprocess.Popen:
        path = os.pathsep.join([str(self.folder), str(Path(__file__).parent), *filter(None, sys.path)])
        log = self.stack.enter_context((self.folder/f"{name}.log").open("ab"))
        options = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(self.file), *self.options]
        process = subprocess.Popen([sys.executable, "-m", "dask", *command, *options], start_new_session=True,
                                   env={**os.environ, "PYTHONPATH": path, **env},
                                   cwd=self.folder, stdout=log, stderr=log)
        self.stack.callback(self.end, process)
        return process

    def end(self, process: subprocess.Popen) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):  # asked first, it keeps what coverage has counted
            with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired): process.wait(3)
        process.wait()

    def add(
        self, host: str, gpus: int = 1, workers: int = 1, threads: int = 4, nanny: bool = False, *,
        folder: str = "", options: tuple[str, ...] = (), **env: str,
    ) -> None:
        for n in range(workers):
            state = self.folder/(folder or host)
            state.mkdir(mode=0o700, exist_ok=True)
            (state/"gpus").mkdir(mode=0o700, exist_ok=True)
            command = ["--nthreads", str(threads), "--nanny" if nanny else "--no-nanny", "--preload", "sim_host"]
            process = self.start(f"{folder or host}-{n}", "worker", *command, *options, **env,
                                 CJM_RESOURCES_DIR=str(state), CJM_RESOURCES_HOST=host, SIM_GPUS=str(gpus))
            self.hosts.setdefault(host, []).append(process)
