"""Everything at once for a while, as a program of its own: soak.py SECONDS [FOLDER]

Worker processes come and go, jobs reserve and use GPU memory, a panel and ten clients of the stream watch, and the
simulated driver fails at random. After a first quarter, in which caches fill up, memory, threads, file descriptors and
the shared file may not grow beyond what is alive; at the end every promise is accounted for. Prints what it measured
as JSON; exits with 1 if something grew or failed.
"""
import asyncio
import contextlib
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pynvml

from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.core.resources import ResourceStatus
from cjm_fasthtml_resources.core.store import store_path
from cjm_fasthtml_resources.simulate import CALLS, SimulatedDriver, SimulatedGpu
from cjm_fasthtml_resources.ui.panel import ResourcePanel
from cjm_fasthtml_resources.ui.web import EventStream, Hub

ERRORS = [
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_UNKNOWN,
    pynvml.NVML_ERROR_TIMEOUT,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
]


class Soak:
    "The parts, each on a thread of its own until `stop` is set"
    def __init__(self, driver: SimulatedDriver) -> None:
        self.driver, self.manager, self.stop = driver, ResourceManager(app="soak", gpu_timeout=1.0), threading.Event()
        # a history that is full after the first quarter of a long run
        self.panel = ResourcePanel(self.manager, interval=0.2, history=60, controls=True)
        self.hub = Hub(ResourceMonitor(self.manager, interval=0.2, history=60))
        self.failed, self.counts = [], dict(workers=0, grants=0, busy=0, faults=0, events=0, checks=0, wrong=0)

    def guarded(self, part):
        def run():
            try: part()
            except BaseException as error:
                self.failed.append(f"{part.__name__}: {type(error).__name__}: {error}")
                self.stop.set()
        return threading.Thread(target=run, name=part.__name__)

    def workers(self):
        chance, living = random.Random(1), []
        while not self.stop.is_set() or living:
            if not self.stop.is_set() and len(living) < 6: living.append(self.new_worker(chance))
            elif living: self.end_worker(living.pop(chance.randrange(len(living))), chance)
            self.stop.wait(0.1)

    def new_worker(self, chance: random.Random) -> subprocess.Popen:
        process = subprocess.Popen(["sleep", "600"])
        kind, plugin = chance.choice(["llm", "speech"]), chance.choice(["vllm", "whisper"])
        job = f"job-{chance.randrange(4)}"
        self.manager.register_worker(process.pid, kind, plugin_name=plugin, job_id=job)
        self.counts["workers"] += 1
        return process

    def end_worker(self, process: subprocess.Popen, chance: random.Random) -> None:
        "Half of them are stopped by the manager, the others just die"
        self.manager.update_worker_state(process.pid, status="idle", gpu_memory_mb=chance.choice([None, 500]))
        if chance.random() < 0.5: self.manager.stop_worker(process.pid, grace=1)
        else:
            process.kill()
            process.wait()
            self.manager.prune_dead_workers()
        process.wait()

    def jobs(self):
        chance = random.Random(threading.get_ident())
        while not self.stop.is_set():
            memory = chance.choice([500, 4_000, 12_000])
            try:
                with (
                    self.manager.reserve(memory, timeout=1) as held,
                    self.driver.allocate(held.gpu_memory_mb, held.index),
                ):
                    self.counts["grants"] += 1
                    self.stop.wait(chance.uniform(0, 0.2))
            except (ResourceBusy, ResourceUnavailable): self.counts["busy"] += 1

    def checks(self):
        while not self.stop.is_set():
            conflict = self.manager.check_gpu_availability()
            self.counts["checks"] += 1
            free = [found for found in conflict.devices if found.status is ResourceStatus.AVAILABLE]
            self.counts["wrong"] += any(found.device.memory_used is None for found in free)
            self.stop.wait(0.1)

    def faults(self):
        chance = random.Random(2)
        while not self.stop.is_set():
            call, error, gpu = chance.choice(sorted(CALLS)), chance.choice(ERRORS), chance.choice([None, 0, 1])
            self.driver.fail(call, error, gpu, times=chance.randrange(1, 4))
            self.counts["faults"] += 1
            self.stop.wait(1)
            self.driver.recover()
            self.stop.wait(0.5)

    def clients(self):
        async def client(patience):
            async def receive():
                await asyncio.sleep(patience)
                return dict(type="http.disconnect")

            async def send(message): self.counts["events"] += message["type"] == "http.response.body"
            while not self.stop.is_set(): await EventStream(self.hub.events())({}, receive, send)

        async def main(): await asyncio.gather(*(client(0.5 + n/4) for n in range(10)))
        asyncio.run(main())


def state() -> dict[str, float]:
    "What may not grow"
    gc.collect()
    process = psutil.Process()
    shared = sum(path.stat().st_size for path in store_path().parent.glob(f"{store_path().name}*"))
    return dict(
        memory_mb=process.memory_info().rss/1e6,
        threads=threading.active_count(),
        descriptors=process.num_fds(),
        shared_mb=shared/1e6,
    )


def growth(early: dict[str, float], samples: list[dict[str, float]]) -> dict[str, float]:
    "By how much the median of the last quarter is above `early`"
    late = samples[-max(len(samples)//4, 1):]
    middle = {name: sorted(sample[name] for sample in late)[len(late)//2] for name in early}
    return {name: round(middle[name] - early[name], 2) for name in early}


def threads_over(before: int) -> int:
    "How many threads are left: the driver's reader stays, and a loop's workers for a moment"
    settle = time.monotonic() + 10
    while threading.active_count() > before + 2 and time.monotonic() < settle: time.sleep(0.05)
    over = threading.active_count() - before
    return over if over > 2 else 0


def run(soak: Soak, seconds: float) -> tuple[dict[str, float], list[dict[str, float]], list[str]]:
    "Let all parts run: the state after the first quarter, those after it, and the parts that did not end"
    parts = [soak.workers, soak.jobs, soak.jobs, soak.jobs, soak.checks, soak.faults, soak.clients]
    threads = [soak.guarded(part) for part in parts]
    for thread in threads: thread.start()
    soak.stop.wait(seconds/4)
    early, samples = state(), []
    end = time.monotonic() + seconds*3/4
    while time.monotonic() < end and not soak.stop.wait(min(1, seconds/20)): samples.append(state())
    soak.stop.set()
    for thread in threads: thread.join(30)
    return early, samples, [thread.name for thread in threads if thread.is_alive()]


def main(seconds: float, folder: str) -> int:
    os.environ["CJM_RESOURCES_DIR"] = f"{folder}/state"
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    with SimulatedDriver([SimulatedGpu(), SimulatedGpu()], shared=f"{folder}/gpus") as driver:
        before = threading.active_count()
        soak = Soak(driver)
        early, samples, stuck = run(soak, seconds)
        soak.panel.close()
        driver.recover()
        claims, workers = soak.manager.get_claims(), soak.manager.get_all_workers()
        left = dict(claims=len(claims), workers=len(workers), clients=len(soak.hub._clients))
        over = threads_over(before)
        grown = growth(early, samples)
        # what is alive goes up and down by so much
        bounds = dict(memory_mb=15 if seconds < 120 else 8, threads=12, descriptors=12, shared_mb=5)
        bad = [
            *soak.failed,
            *(f"{name} grew by {grown[name]}" for name in grown if grown[name] > bounds[name]),
            *(f"stuck: {name}" for name in stuck),
            *(f"{count} {name} left over" for name, count in left.items() if count),
        ]
        if soak.counts["wrong"]: bad.append("a device whose memory could not be read was called available")
        if over: bad.append(f"{over} threads left over")
        print(json.dumps(dict(seconds=seconds, **soak.counts, grown=grown, left=left, bad=bad)))
    return bool(bad)


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        folder = sys.argv[2] if len(sys.argv) > 2 else stack.enter_context(tempfile.TemporaryDirectory())
        Path(folder).mkdir(parents=True, exist_ok=True)
        sys.exit(main(float(sys.argv[1]), folder))
