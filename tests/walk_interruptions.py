"""Every line x an interruption: a program of its own

    walk_interruptions.py [--sample N] [--seed S] [--jobs N] [--error NAME] [--lines-of MODULE]…
                          [CALL[/memory|/file] …]

For each call (all of them, if none is named), in memory and with a file: which lines of the package does it run? Then
it is called once for each of them, and KeyboardInterrupt is raised just before that line runs. Afterwards the error
that comes out is that one; this process and another one are promised the whole device at once; nothing is promised, no
worker is half registered, no descriptor and no thread is left. A line is told apart by who called it, and in a loop the
first two rounds are tried. With --sample, so many lines of each call. --error raises another error, such as SystemExit.
--lines-of core/ledger takes only the lines of a module: what is to be walked again after a change there.
Prints what is wrong, and where; closes with 'N points, N wrong'.
"""
import argparse
import asyncio
import contextlib
import faulthandler
import gc
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from lines import Lines, Point, describe
from parts import add_arguments, is_mine, report, share_out

from cjm_fasthtml_resources.core.conflict import ResourceBusy
from cjm_fasthtml_resources.core.endings import end_claim
from cjm_fasthtml_resources.core.gpu import read_gpus
from cjm_fasthtml_resources.core.locking import lock_byte
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.process import read_start
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

WHOLE = 20_000     # MiB of the first device; half as much is not there a second time
SMALL = 5_000      # MiB, for which the two others have room, too
GPUS = [24_000, 6_000, 6_000]
APP = "walk"
AT_ONCE = 1.0      # seconds: what does not wait takes no longer, on a busy machine
STUCK_AFTER = 8   # seconds after which a call that does not return is ended


class Stuck(BaseException):
    "A call did not return"


class Plugin:
    "A plugin that can tell everything"
    def get_execution_mode(self): return "subprocess"
    def get_child_pids(self): return [os.getpid()]
    def get_managed_resources(self): return {}
    def force_cleanup(self): pass


# The other process

def serve() -> None:
    "Obey the lines of stdin: FOLDER COMMAND; as a new program, it knows the folder by its environment alone"
    held: list[Any] = []
    for line in sys.stdin:
        folder, command = line.split()
        os.environ["CJM_RESOURCES_DIR"] = folder
        try: answer = dict(reserve=try_whole, hold=hold, release=release, workers=list_workers)[command](held)
        except Exception as error: answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


def try_whole(held: list[Any]) -> Any:
    "Reserve the whole device at once, and give it back; the claims that are left"
    manager, began = ResourceManager(app=APP), time.monotonic()
    with manager.reserve(WHOLE, timeout=0): took = time.monotonic() - began
    return [took, len(manager.get_claims())]


def hold(held: list[Any]) -> Any: return held.append(ResourceManager(app=APP).reserve(WHOLE, timeout=1))
def release(held: list[Any]) -> Any: return [one.release() for one in held] and held.clear()
def list_workers(held: list[Any]) -> Any:
    return sorted(f"{w.pid} {w.worker_type} {w.status} {w.job_id}" for w in ResourceManager(app=APP).get_all_workers())


class Other:
    "Another process, which does what it is told"
    def __init__(self, gpus: Path) -> None:
        self.process = subprocess.Popen([sys.executable, __file__, "--serve", str(gpus)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)

    def tell(self, command: str) -> None:
        self.process.stdin.write(f"{os.environ['CJM_RESOURCES_DIR']} {command}\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def answer(self) -> Any: return json.loads(self.process.stdout.readline())

    def ask(self, command: str) -> Any:
        self.tell(command)
        return self.answer()


# What is walked: each is prepared, yields the call, and then does what its caller would

class World:
    "What a call has at hand, and what went wrong"
    def __init__(self, gpus: Path, other: Other | None) -> None:
        self.gpus, self.other, self.wrong = gpus, other, list[str]()
        self.manager = ResourceManager(app=APP if other else None)
        self.interrupted, self.processes = False, list[subprocess.Popen]()

    def check(self, ok: bool, complaint: str) -> None:
        if not ok: self.wrong.append(complaint)

    def start_worker(self, memory: int) -> subprocess.Popen:
        "A worker process that has so many MiB of the device, as it was before any job"
        draft = self.gpus/f".{len(self.processes)}"
        with FileIO(draft, "x+") as file:   # in use as long as this file is locked, in the simulated driver
            lock_byte(file.fileno(), 0)
            process = subprocess.Popen(["sleep", "600"], pass_fds=[file.fileno()])
            self.processes.append(process)
            draft.rename(self.gpus/f"0_{process.pid}_{read_start(process.pid)}_{memory*2**20}_{process.pid:x}")
        self.check(read_gpus().devices[0].memory_used >= memory*2**20, "the worker's memory is not in use")
        self.manager.register_worker(process.pid, "llm", plugin_name="vllm")
        return process

    def close(self) -> None:
        "End the workers that are left"
        for process in self.processes:
            process.kill()
            process.wait()

    def agree(self) -> None:
        "This process and the other one know the same workers"
        if not self.other: return
        mine = sorted(f"{w.pid} {w.worker_type} {w.status} {w.job_id}" for w in self.manager.get_all_workers())
        theirs = self.other.ask("workers")
        self.check(mine == theirs, f"this process knows the workers {mine}, the other one {theirs}")


Scene = Iterator[Callable[[], Any]]


def open_file(world: World) -> Scene:
    os.environ["CJM_RESOURCES_DIR"] += "-new"
    yield lambda: ResourceManager(app=APP)


def reserve(world: World) -> Scene:
    held = []
    yield lambda: held.append(world.manager.reserve(WHOLE, timeout=0))
    for one in held: one.release()


def release_it(world: World) -> Scene:
    held = world.manager.reserve(WHOLE, timeout=0)
    yield held.release
    if world.interrupted: held.release()
    world.check(held.release() is False, "a release of what was released is not False")


def with_block(world: World) -> Scene:
    def call() -> None:
        with world.manager.reserve(WHOLE, timeout=0): pass
    yield call


def with_ttl(world: World) -> Scene:
    def call() -> None:
        with world.manager.reserve(WHOLE, "cuda:0", timeout=0, ttl=60, progress=True): pass
    yield call


def renew(world: World) -> Scene:
    held = world.manager.reserve(WHOLE, timeout=0, ttl=60)
    yield lambda: held.renew(600)
    world.check(bool(world.manager.get_claims()), "a promise was lost while it was renewed")
    held.release()


def shrink(world: World) -> Scene:
    "Give a part back, and look how much was used"
    held = world.manager.reserve(WHOLE, timeout=0)
    def call() -> None: held.shrink(held.receipt.most_used/2**20 + 1_000)
    yield call
    sizes = [claim.memory >> 20 for claim in world.manager.get_claims()]
    world.check(sizes in ([WHOLE], [1_000]), f"a promise was lost, or is a part: {sizes}")
    held.release()


def release_by_id(world: World) -> Scene:
    "Release it as another program does"
    held = world.manager.reserve(WHOLE, timeout=0)
    yield lambda: end_claim(world.manager.ledger, held.id)
    left = len(world.manager.get_claims())
    world.check(left == 0 or world.interrupted, "it is not released")
    world.check(held.release() is (left == 1), "the holder is not told whether it still had it")


def refused(world: World) -> Scene:
    "It waits for a moment, and is told who has the memory"
    held = None if world.other else world.manager.reserve(WHOLE, timeout=0)
    if world.other: world.other.ask("hold")
    def call() -> None:
        with contextlib.suppress(ResourceBusy): world.manager.reserve(WHOLE, timeout=0.05)
    yield call
    if world.other: world.other.ask("release")
    if held: held.release()


def handed_over(world: World) -> Scene:
    "It waits until the other one releases"
    held = None if world.other else world.manager.reserve(WHOLE, timeout=0)
    if world.other: world.other.ask("hold")

    def give() -> None:
        time.sleep(0.03)
        if world.other: world.other.tell("release")
        if held: held.release()

    giver = threading.Thread(target=give)

    def call() -> None:
        giver.start()
        with world.manager.reserve(WHOLE, timeout=10): pass

    yield call
    if giver.ident is None: giver.start()
    giver.join()
    if world.other: world.other.answer()


def reserve_async(world: World) -> Scene:
    async def main() -> None:
        async with world.manager.reserve_async(WHOLE, timeout=0): pass
    yield lambda: asyncio.run(main())


def reserve_two(world: World) -> Scene:
    "Two of three devices at once, those that are closer"
    def call() -> None:
        with world.manager.reserve(SMALL, timeout=0, n=2): pass
    yield call


def wait_for_three(world: World) -> Scene:
    "It waits until the other one releases one of them, and holds nothing until then"
    held = None if world.other else world.manager.reserve(WHOLE, timeout=0)
    if world.other: world.other.ask("hold")

    def give() -> None:
        time.sleep(0.03)
        if world.other: world.other.tell("release")
        if held: held.release()

    giver = threading.Thread(target=give)

    def call() -> None:
        giver.start()
        with world.manager.job("a job", SMALL, n=3, timeout=10): pass

    yield call
    if giver.ident is None: giver.start()
    giver.join()
    if world.other: world.other.answer()


def job(world: World) -> Scene:
    "In this process"
    def call() -> None:
        with world.manager.job("a job", WHOLE, plugin="llm", timeout=0): pass
    yield call


def job_in_worker(world: World) -> Scene:
    worker = world.start_worker(1_000)
    def call() -> None:
        with world.manager.job("a job", WHOLE, worker=worker.pid, timeout=0): pass
    yield call
    state = world.manager.get_worker_by_pid(worker.pid)
    is_idle = state is not None and (state.status, state.jobs) == ("idle", ())
    world.check(is_idle, f"the worker has its job still: {state}")
    world.manager.stop_worker(worker.pid, grace=1)


def job_of_child(world: World) -> Scene:
    process = subprocess.Popen(["sleep", "600"])
    world.processes.append(process)
    def call() -> None:
        with world.manager.job("a job", WHOLE, timeout=0) as active: active.watch(process.pid)
    yield call
    world.check(world.manager.get_worker_by_pid(process.pid) is None, "the process is a worker still")


def job_async(world: World) -> Scene:
    async def main() -> None:
        async with world.manager.job("a job", WHOLE, timeout=0): pass
    yield lambda: asyncio.run(main())


def wait_for_gpu(world: World) -> Scene: yield lambda: world.manager.wait_for_gpu(WHOLE, timeout=0)


def check(world: World) -> Scene:
    worker = world.start_worker(1_000)
    yield world.manager.check_gpu_availability
    world.manager.stop_worker(worker.pid, grace=1)


def check_memory(world: World) -> Scene: yield world.manager.check_memory_availability


def register(world: World) -> Scene:
    pid = os.getppid()
    def call() -> Any:
        return world.manager.register_worker(pid, "llm", "job", plugin_name="vllm", config=dict(model="a"),
                                             plugin_instance=Plugin())
    yield call
    found = world.manager.get_worker_by_pid(pid)
    world.check(found in (None, world.manager.get_worker_by_job("job")), "a worker without its job")
    world.check(found is None or (found.job_id, found.config, found.child_pids) ==
                ("job", dict(model="a"), [os.getpid()]), f"a worker that is half registered: {found}")
    world.agree()
    world.check(call().pid == pid, "it cannot be registered again")
    world.manager.unregister_worker(pid)


def update(world: World) -> Scene:
    pid, manager = os.getppid(), world.manager
    manager.register_worker(pid, "llm", "first", plugin_name="vllm", plugin_instance=Plugin())
    yield lambda: manager.update_worker_state(pid, "second", status="running")
    world.check(manager.get_worker_by_pid(pid).job_id in ("first", "second"), "a job that nobody gave it")
    for job in ("first", "second"):
        found = manager.get_worker_by_job(job)
        world.check(found is None or found.pid == pid, f"{job} belongs to {found}")
    world.agree()
    for _ in range(2): manager.update_worker_state(pid, status="idle")   # each ends one job
    world.check(manager.get_worker_by_pid(pid).job_id is None, "a job that cannot be ended")
    world.agree()
    manager.unregister_worker(pid)


def unregister(world: World) -> Scene:
    pid, manager = os.getppid(), world.manager
    manager.register_worker(pid, "llm", "job", plugin_instance=Plugin())
    yield lambda: manager.unregister_worker(pid)
    world.check(manager.get_worker_by_pid(pid) == manager.get_worker_by_job("job"), "a worker and its job differ")
    world.agree()
    if manager.get_worker_by_pid(pid): manager.unregister_worker(pid)
    world.check(manager.get_all_app_pids_including_children() == set(), "a child of a worker that is forgotten")


def stop_worker(world: World) -> Scene:
    worker = world.start_worker(1_000)
    yield lambda: world.manager.stop_worker(worker.pid, grace=1)
    stop_again(world, worker)


def free_gpu(world: World) -> Scene:
    worker = world.start_worker(WHOLE)
    yield lambda: world.manager.free_gpu(WHOLE, grace=1)
    found = world.manager.get_worker_by_pid(worker.pid)
    world.check(found is None or found.status == "idle", f"a worker that stays {found and found.status!r}")
    world.agree()
    world.manager.free_gpu(WHOLE, grace=1)
    stop_again(world, worker)


class Unloads:
    "The plugin of a worker whose memory is free once it was asked"
    def __init__(self, world: World, worker: subprocess.Popen) -> None: self.world, self.worker = world, worker
    def release(self) -> None:
        for used in self.world.gpus.glob(f"0_{self.worker.pid}_*"): used.unlink()


def unload(world: World) -> Scene:
    "A worker that unloads; it is idle again, and is not said to have what it unloaded"
    worker = world.start_worker(WHOLE)
    world.manager.register_worker(worker.pid, "llm", plugin_name="vllm", plugin_instance=Unloads(world, worker))
    yield lambda: world.manager.free_gpu(WHOLE, grace=1)
    found = world.manager.get_worker_by_pid(worker.pid)
    world.check(found is not None and found.status == "idle", f"a worker that is {found and found.status!r}")
    is_loaded = any(world.gpus.glob(f"0_{worker.pid}_*"))
    world.check(is_loaded or not found or not found.plugin_name, "a plugin that is said to be loaded")
    world.agree()
    world.manager.free_gpu(WHOLE, grace=1)
    world.manager.stop_worker(worker.pid, grace=1)


def job_with_room(world: World) -> Scene:
    worker = world.start_worker(WHOLE)
    world.manager.register_worker(worker.pid, "llm", plugin_name="vllm", plugin_instance=Unloads(world, worker))
    def call() -> None:
        with world.manager.job("a job", WHOLE, timeout=0, make_room=True): pass
    yield call
    found = world.manager.get_worker_by_pid(worker.pid)
    world.check(found is not None and found.status == "idle", f"a worker that is {found and found.status!r}")
    world.manager.stop_worker(worker.pid, grace=1)


def stop_again(world: World, worker: subprocess.Popen) -> None:
    "What an interrupted call began can be ended by calling again"
    if world.manager.get_worker_by_pid(worker.pid): world.manager.stop_worker(worker.pid, grace=1)
    world.check(worker.poll() is not None, "a worker that was stopped goes on")
    world.check(world.manager.get_all_workers() == [], "a worker that was stopped stays registered")


CALLS: dict[str, Callable[[World], Scene]] = dict(
    open=open_file, reserve=reserve, reserve_two=reserve_two, wait_for_three=wait_for_three, release=release_it,
    with_block=with_block, with_ttl=with_ttl, renew=renew,
    shrink=shrink, release_by_id=release_by_id,
    job=job, job_in_worker=job_in_worker, job_of_child=job_of_child, job_async=job_async,
    refused=refused, handed_over=handed_over, reserve_async=reserve_async, wait_for_gpu=wait_for_gpu, check=check,
    check_memory=check_memory, register=register, update=update, unregister=unregister, stop_worker=stop_worker,
    free_gpu=free_gpu, unload=unload, job_with_room=job_with_room)


# The walk

def descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError): found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


def stuck(*_: object) -> None: raise Stuck


@contextlib.contextmanager
def limited() -> Iterator[None]:
    "Raise `Stuck` in what does not return; end the program where even that does not help"
    faulthandler.dump_traceback_later(3*STUCK_AFTER, exit=True)
    signal.signal(signal.SIGALRM, stuck)
    signal.setitimer(signal.ITIMER_REAL, STUCK_AFTER)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def wait_for_calls() -> None:
    "Wait for the threads of an `async` call: an interruption of the event loop leaves them running"
    for thread in threading.enumerate():
        if thread.name == "call": thread.join(AT_ONCE)


swallowed: list[Any] = []   # errors in finalizers, which Python swallows, as in a generator that is closed


def within(call: Callable[[], Any]) -> Iterator[Any]:
    """Call within a generator: an error that a tracer raises as a `with` ends by another error leaves that one in
    `sys.exc_info()`, from Python 3.11 on; a generator that ends takes it along"""
    yield call()


class Walker:
    "Calls in memory, or with a file"
    def __init__(self, folder: Path, shared: bool, error: type[BaseException]) -> None:
        self.folder, self.shared, self.error, self.number = folder, shared, error, 0
        self.other: Other | None = None
        self.start_anew()

    def start_anew(self) -> None:
        "Another folder and another process, so that what is wrong in one round is not carried into the next"
        self.stop()
        self.new_folder()
        if self.shared: self.other = Other(self.folder/"gpus")

    def new_folder(self) -> None:
        self.number += 1
        os.environ["CJM_RESOURCES_DIR"] = str(self.folder/f"state-{'file' if self.shared else 'memory'}-{self.number}")

    def stop(self) -> None:
        if self.other: self.other.stop()

    def round(self, name: str, lines: Lines, at: Point | None) -> list[str]:
        "One call with what comes before and after; what is wrong"
        gc.collect()
        before, threads = descriptors(), threading.active_count()
        world = World(self.folder/"gpus", self.other)
        scene = CALLS[name](world)
        with limited():
            try:
                world.wrong += self.call(next(scene), lines, world, at)
                wait_for_calls()
                for _ in scene: pass
                world.wrong += self.look(world)
            except Stuck: world.wrong.append("it hangs")
            except Exception as error: world.wrong.append(f"afterwards: {type(error).__name__}: {error}")
        wrong = world.wrong
        world.close()
        del world, scene
        gc.collect()
        until = time.monotonic() + 3
        while threading.active_count() > threads and time.monotonic() < until: time.sleep(0.01)   # they end soon
        if threading.active_count() > threads: wrong.append(f"{threading.active_count() - threads} threads are left")
        gc.collect()   # what a thread has held, too
        left = {fd: path for fd, path in descriptors().items() if before.get(fd) != path}
        if left: wrong.append(f"left open: {sorted(left.values())}")
        if wrong: self.start_anew()
        elif name == "open": self.new_folder()
        return wrong

    def call(self, call: Callable[[], Any], lines: Lines, world: World, at: Point | None) -> list[str]:
        "Whether the error that comes out is the one that was raised"
        swallowed.clear()
        out = None
        try:
            with lines: next(within(call))
        except self.error as error: out = str(error)
        except Stuck: raise
        except BaseException as error: out = f"{type(error).__name__}: {error}"
        world.interrupted = lines.reached
        if out is None: return ["it goes on as if nothing were"] if lines.reached and not swallowed else []
        return [] if out == "walk" else [f"what comes out is {out}"]

    def look(self, world: World) -> list[str]:
        "What is promised and by whom, and whether everybody is served at once"
        wrong, began = [], time.monotonic()
        if claims := world.manager.get_claims(): wrong.append(f"still promised: {len(claims)}")
        try:
            with world.manager.reserve(WHOLE, timeout=0): pass
        except Exception as error: wrong.append(f"this process: {type(error).__name__}: {error}")
        if time.monotonic() - began > AT_ONCE: wrong.append(f"this process took {time.monotonic() - began:.1f} s")
        if not self.other: return wrong
        found = self.other.ask("reserve")
        if isinstance(found, str): wrong.append(f"another process: {found}")
        elif found[0] > AT_ONCE or found[1]: wrong.append(f"another process: {found[0]:.1f} s, {found[1]} claims")
        return wrong

    def interrupt(self) -> None:
        if self.error is GeneratorExit and isinstance(sys.exc_info()[1], GeneratorExit): swallowed.append(self.error)
        raise self.error("walk")

    def walk(self, name: str, asked: argparse.Namespace, chance: random.Random) -> tuple[int, list[str]]:
        "How many points were tried, and what is wrong"
        for _ in range(2): self.round(name, Lines(at=((), 0)), None)  # what is loaded at the first use
        counts = Lines()
        wrong = [f"{name}, not interrupted: {what}" for what in self.round(name, counts, None)]
        points = [(point, turn) for point, count in counts.counts.items() for turn in (1, 2)[:count]
                  if is_among(point, asked.lines_of)]
        if asked.sample is not None and asked.sample < len(points): points = chance.sample(points, asked.sample)
        points = [turn for turn in points if is_mine(turn, asked.part, asked.parts)]
        for point, turn in points:
            lines = Lines((point, turn), self.interrupt)
            wrong += [f"{name}, {describe(point)}: {what}" for what in self.round(name, lines, point)]
        return len(points), wrong


def is_among(point: Point, modules: list[str]) -> bool:
    "Whether a line is one of these modules', which all are if there are none"
    return not modules or any(Path(point[0][0]).match(f"{module}.py") for module in modules)


def walk(units: list[str], asked: argparse.Namespace) -> None:
    "Walk a part of each call's points, and report what was found"
    error = __builtins__.__dict__[asked.error]
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    with tempfile.TemporaryDirectory(prefix="walk-") as name, \
            SimulatedDriver([SimulatedGpu(memory_total_mb=total) for total in GPUS], shared=f"{name}/gpus"):
        walkers = {}
        gc.freeze()
        for unit in units:
            call, where = unit.split("/")
            if where not in walkers: walkers[where] = Walker(Path(name), where == "file", error)
            walker = walkers[where]
            walker.new_folder()
            began = time.monotonic()
            count, wrong = walker.walk(call, asked, random.Random(f"{asked.seed} {unit}"))
            report(unit, count, wrong, time.monotonic() - began)
        for walker in walkers.values(): walker.stop()


def find_units(names: list[str]) -> list[str]:
    "Each call with where it is made: `reserve/file`"
    every = [f"{call}/{where}" for call in CALLS for where in ("file", "memory") if (call, where) != ("open", "memory")]
    return [unit for unit in every if not names or unit in names or unit.split("/")[0] in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("calls", nargs="*")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--error", default="KeyboardInterrupt")
    parser.add_argument("--lines-of", action="append", default=[], metavar="MODULE")
    add_arguments(parser)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        with SimulatedDriver([SimulatedGpu(memory_total_mb=total) for total in GPUS], shared=asked.serve): serve()
        return 0
    units = find_units(asked.calls)
    if asked.parts:
        sys.unraisablehook = lambda what: swallowed.append(type(what.exc_value))
        walk(units, asked)
        return 0
    return share_out(asked.jobs)


if __name__ == "__main__": sys.exit(main())
