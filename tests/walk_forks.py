"""Fork while another thread is anywhere in the library: the child can use all of it

    walk_forks.py [--sample N] [--seed S] [--jobs N] [NAME[/memory|/file] …]

For each operation (all of them, if none is named), in memory and with a file, at each line that it runs (of the
package, and of pynvml and psutil beneath it): a thread is held there, the process forks, and the child does every
operation. A line is told apart by who called it; one that several operations run with the same callers is walked with
the first of them. With --sample, so many points of each operation in each of the jobs. Prints what is wrong, and where;
closes with 'N points, N wrong'. A new operation is a function of the world below with `@operation`.
"""
import argparse
import asyncio
import contextlib
import faulthandler
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pynvml
from lines import PACKAGE, Turn, describe, held_at, lines_of
from parts import add_arguments, is_mine, report, share_out

from cjm_fasthtml_resources.core.gpu import GpuReader
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess
from cjm_fasthtml_resources.ui.metrics import ResourceCollector, exposition
from cjm_fasthtml_resources.ui.panel import ResourcePanel
from cjm_fasthtml_resources.ui.stream import Client, Hub

SECONDS = 20.0  # in which a child has done everything; more than any wait of the library but that of a lock for ever
BENEATH = (PACKAGE, pynvml.__file__, str(Path(psutil.__file__).parent))


class Plugin:
    "Declares a child process that is not there"
    def get_child_pids(self): return [4200102]
    def force_cleanup(self): pass


class World:
    "What the operations are about, made anew for each of them"
    def __init__(self, driver: SimulatedDriver, app: str | None = None) -> None:
        self.driver, self.manager, self.shared = driver, ResourceManager(gpu_timeout=60, app=app), app is not None
        self.worker = self.manager.register_worker(4200101, "llm", plugin_name="llama", plugin_instance=Plugin())
        self.monitor = ResourceMonitor(self.manager, interval=0.1)
        self.hub = Hub(self.monitor)


Operation = Callable[[World], Any]
OPERATIONS: dict[str, Operation] = {}


def operation(call: Operation) -> Operation:
    "Walk this one, too, and let each child do it"
    OPERATIONS[call.__name__.removeprefix("do_")] = call
    return call


@operation
def do_check(world: World) -> None:
    conflict = world.manager.check_gpu_availability()
    assert conflict.status.value == "app_busy" and 4200101 in conflict.app_pids, conflict


@operation
def do_memory(world: World) -> None: assert world.manager.check_memory_availability().memory.memory.total


@operation
def do_register(world: World) -> None:
    manager = world.manager
    manager.register_worker(4200103, "llm", "a job", config={"model_id": "a"}, plugin_instance=Plugin())
    assert manager.update_worker_state(4200103, job_id="b").jobs == ("a job", "b")
    assert manager.update_worker_state(4200103, status="idle").job_id == "b"
    assert manager.get_worker_by_job("b").pid == 4200103 and manager.get_worker_by_job("a job") is None
    assert manager.get_all_app_pids_including_children() >= {4200102, 4200103}
    assert manager.unregister_worker(4200103).job_id == "b"


@operation
def do_reserve(world: World) -> None:
    "Asked, granted, renewed and released; and waited for"
    with world.manager.reserve(500, timeout=60) as held: assert held.renew(60) and world.manager.get_claims()
    assert not held.release() and world.manager.wait_for_gpu(500, timeout=60).devices


@operation
def do_reserve_two(world: World) -> None:
    "Two of three devices at once, and how close they are"
    with world.manager.reserve(500, timeout=60, n=2) as held: assert len(held.devices) == 2 and held.renew(60)
    assert not held.release()


@operation
def do_job(world: World) -> None:
    "In this process, in a child process, and in a task"
    manager, process = world.manager, subprocess.Popen(["sleep", "600"])
    try:
        with manager.job("the job", 500, plugin="llama", timeout=60) as job:
            assert job.watch(process.pid) and manager.get_worker_by_job("the job").pid == process.pid
            assert job.holder in [claim.holder for claim in manager.get_claims()]
        assert manager.get_worker_by_pid(process.pid) is None
    finally:
        process.kill()
        process.wait()

    async def later() -> None:
        async with manager.job("the other job", 500, timeout=60) as job: assert job.env
    asyncio.run(later())


@operation
def do_stop(world: World) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            world.manager.register_worker(process.pid, "llm")
            assert world.manager.free_gpu(1) is not None
            if process.poll() is None: assert world.manager.stop_worker(process.pid, grace=1)
        finally: process.kill()


@operation
def do_refresh(world: World) -> None:
    "A check that asks the plugin again, on a thread"
    kept = world.manager.workers.plugins.get(4200101)
    if kept is not None: kept.asked = time.monotonic() - 60
    do_check(world)


@operation
def do_read(world: World) -> None:
    "The first reading of all, which starts the reader's thread"
    assert len(GpuReader().read(60).devices) == 3


@operation
def do_sample(world: World) -> None:
    before = len(world.monitor.history.points)
    assert world.monitor.take().gpu.devices and len(world.monitor.history.points) == before + 1


@operation
def do_subscribe(world: World) -> None:
    heard = threading.Event()
    with world.monitor.subscribe(lambda sample: heard.set()): assert heard.wait(60)


@operation
def do_stream(world: World) -> None:
    async def first() -> bytes:
        async with contextlib.aclosing(world.hub.events()) as events: return await asyncio.wait_for(anext(events), 60)
    assert asyncio.run(first()).startswith(b"event: layout")


@operation
def do_publish(world: World) -> None:
    async def join() -> bytes | None:
        client = Client()
        world.hub.join(client)
        world.driver.gpus[0].temperature += 1
        world.hub.publish(world.monitor.take())
        try: return await client.next(60)
        finally:
            client.close()
            world.hub.leave(client)
    assert (asyncio.run(join()) or b"").startswith(b"event: layout")


@operation
def do_page(world: World) -> None: assert asyncio.run(world.hub.current()).slots["gpu0.head"]


@operation
def do_metrics(world: World) -> None:
    assert b"cjm_resources_scrape_errors_total 0.0" in exposition(ResourceCollector(world.monitor))[0]


@operation
def do_panel(world: World) -> None:
    panel = ResourcePanel(world.manager, interval=0.1)
    assert "gpu0.head" in panel._slots
    panel.close()


@operation
def do_allocate(world: World) -> None:
    with world.driver.allocate(100): do_check(world)


def use_some(world: World) -> None:
    for call in (do_check, do_register, do_reserve, do_job, do_sample): call(world)


def use_everything(world: World) -> None:
    "What a child does: it uses what there was, and what it makes anew"
    if world.shared:   # its parent is using the same workers
        do_reserve(world)
        with world.manager.job(f"job-{os.getpid()}", 500, timeout=60) as job: assert job.env
        assert world.manager.get_all_workers() and world.monitor.take().gpu.devices
        return use_some(World(world.driver, f"child-{os.getpid()}"))
    if not world.manager.get_all_workers():  # it was just being registered, and is thrown away
        world.manager.register_worker(4200101, "llm", plugin_instance=Plugin())
    for call in OPERATIONS.values(): call(world)
    use_some(World(world.driver))


@contextlib.contextmanager
def simulated() -> Iterator[SimulatedDriver]:
    gpus = [SimulatedGpu(processes=[SimulatedProcess(4200101, 1000)]) for _ in range(3)]
    with SimulatedDriver(gpus) as driver, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which is what this is about
        yield driver


class Child:
    "A fork that uses everything"
    def __init__(self, world: World) -> None:
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `wait` closes it
        if (pid := os.fork()) == 0:
            status = 1
            try:
                faulthandler.dump_traceback_later(SECONDS, file=self.said)
                use_everything(world)
                status = 0
            except BaseException: traceback.print_exc(file=self.said)
            finally:
                self.said.flush()
                os._exit(status)
        self.pid, self.end = pid, time.monotonic() + SECONDS + 2

    def wait(self) -> str:
        "What is wrong in it, nothing if it is well"
        with self.said:
            while (found := os.waitpid(self.pid, os.WNOHANG))[0] == 0 and time.monotonic() < self.end: time.sleep(0.005)
            if found[0] == 0:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
            elif found[1] == 0: return ""
            self.said.seek(0)
            return f"the child {'fails' if found[0] else 'hangs'}:\n{self.said.read()}"


def walk(
    name: str,                         # of the operation
    app: str | None,                   # with the file of that app; then the thread goes on once the process has forked
    sample: int | None = None,         # so many points
    seed: int = 0,
    walked: set[Turn] | None = None,   # those that other operations had; this one's are added
    part: int = 0,                     # of the points; see parts.py
    parts: int = 1,
) -> tuple[int, list[str]]:
    "How many points were tried, and what is wrong"
    chance, call, wrong, tried = random.Random(seed), OPERATIONS[name], list[str](), 0
    walked = set() if walked is None else walked
    with simulated() as driver:
        use_everything(World(driver, app))  # what is loaded at the first use
        points = [at for at in lines_of(lambda: call(World(driver, app)), within=BENEATH, threads=True)
                  if at not in walked and is_mine(at, part, parts)]
        walked.update(points)
        if sample is not None: points = chance.sample(points, len(points))   # some are reached the first time only
        for at in points:
            if tried == sample: break
            try: reached, what = fork_at(at, call, World(driver, app))
            except Exception as error: reached, what = True, f"the parent fails: {type(error).__name__}: {error}"
            tried += reached
            if what: wrong.append(f"{name}, {describe(at[0])}: {what}")
    return tried, wrong


def fork_at(at: Turn, call: Operation, world: World) -> tuple[bool, str]:
    "Fork while a thread is held at a point; whether it came there, and what is wrong"
    child, what = None, ""
    try:
        with held_at(lambda: call(world), at, within=BENEATH, threads=True) as held:
            if held:
                child = Child(world)
                if not world.shared: what = child.wait()
        if child and world.shared: what = child.wait()
    finally: world.monitor.close()
    return held, what


def find_units(names: list[str]) -> list[str]:
    "Each operation with where its claims are: `reserve/file`"
    every = [f"{name}/{where}" for where in ("memory", "file") for name in OPERATIONS]
    return [unit for unit in every if not names or unit in names or unit.split("/")[0] in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(OPERATIONS)}")
    parser.add_argument("--sample", type=int, help="so many lines of each operation")
    parser.add_argument("--seed", type=int, default=0)
    add_arguments(parser)
    asked = parser.parse_args()
    units = find_units(asked.names)
    if not asked.parts: return share_out(asked.jobs)
    with tempfile.TemporaryDirectory(prefix="walk-") as folder:
        os.environ["CJM_RESOURCES_DIR"] = folder
        walked: dict[str, set[Turn]] = dict(memory=set(), file=set())
        for unit in units:
            (name, where), began = unit.split("/"), time.monotonic()
            app = "walk" if where == "file" else None
            tried, wrong = walk(name, app, asked.sample, asked.seed, walked[where], asked.part, asked.parts)
            report(unit, tried, wrong, time.monotonic() - began)
    return 0


if __name__ == "__main__": sys.exit(main())
