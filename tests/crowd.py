"""Many processes that reserve and use GPU memory at random: a program of its own

    crowd.py FOLDER PROCESSES SECONDS KILLS [--stops N] [--interrupts N] [--busy N] [--priorities N]

They share four simulated GPUs and one file. A quarter of the requests are for two of the GPUs, or for all. Each
allocates what it was promised, and the simulated driver refuses what is not there. So many times a second one of them
is killed and replaced, stopped for a moment (SIGSTOP), or interrupted wherever it is (SIGINT), after which half of
them go on and half of them end and are replaced. With --busy, so many processes beside them do nothing but run. With
--priorities half of the requests have a priority of N or -N.
Prints what happened as JSON.
"""
import argparse
import contextlib
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from cjm_fasthtml_resources.core.ledger import Ledger
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.store import Store, store_path
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

TOTAL_MB, GPUS = 24_000, 4
STOPPED_FOR = 0.7   # seconds
INTERRUPTED = 7     # the exit code of a member that was interrupted, and ended


class Interrupts:
    "SIGINT raises KeyboardInterrupt once in a round, but not while the simulated driver allocates"
    def __init__(self) -> None:
        self.armed = False
        signal.signal(signal.SIGINT, self.strike)

    def strike(self, *_: object) -> None:
        if not self.armed: return
        self.armed = False
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def held_off(self, driver: SimulatedDriver, memory: int, gpus: Iterable[int]) -> Iterator[None]:
        "Allocate on each; an interruption ends what is done in the block, and nothing of the driver"
        was_armed, self.armed = self.armed, False
        with contextlib.ExitStack() as allocated:
            for gpu in gpus: allocated.enter_context(driver.allocate(memory, gpu))
            try:
                self.armed = was_armed
                yield
            finally: self.armed = False


def member(driver: SimulatedDriver, report: int, until: float, patience: float, seed: int, step: int) -> int:
    "Reserve, use, release, again and again; the exit code"
    chance, interrupts = random.Random(seed), Interrupts()
    random.seed(seed)
    manager = ResourceManager(app=f"app-{seed % 3}")
    while time.monotonic() < until:
        memory, count = chance.choice([500, 2_000, 4_000, 8_000, 23_000]), chance.choice([1]*9 + [2, 2, GPUS])
        asked = time.monotonic()
        try:
            interrupts.armed = True
            priority = chance.choice([0, 0, step, -step])
            with manager.reserve(memory, timeout=patience, n=count, priority=priority) as held:
                os.write(report, f"{memory} {count} {time.monotonic() - asked:.3f}\n".encode())
                gpus = {device.index for device in held.devices}
                if len(gpus) != count: raise AssertionError(f"{gpus} instead of {count}")
                with interrupts.held_off(driver, memory, gpus): time.sleep(chance.uniform(0, 0.02))
            interrupts.armed = False
        except KeyboardInterrupt:
            if chance.random() < 0.5: return INTERRUPTED
    return 0


def start(act: Callable[[], int]) -> int:
    "The PID of a child of this process"
    if (pid := os.fork()) == 0:
        code = 1
        try: code = act()
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    return pid


def run_for_nothing() -> int:
    while True: pass


class Crowd:
    "The members that live, and what happened to those that ended"
    def __init__(self, driver: SimulatedDriver, report: int, until: float, patience: float, step: int) -> None:
        self.driver, self.report, self.until, self.patience, self.step = driver, report, until, patience, step
        self.living, self.doomed, self.stopped = set(), set(), dict[int, float]()
        self.failed = self.killed = self.stops = self.interrupted = self.seed = 0

    def add(self) -> None:
        self.seed += 1
        seed = self.seed - 1
        act = partial(member, self.driver, self.report, self.until, self.patience, seed, self.step)
        self.living.add(start(act))

    def bury(self) -> None:
        "Forget those that ended, and replace those that were interrupted; one that ended badly by itself has failed"
        for pid in list(self.living):
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found: continue
            self.living.discard(pid)
            self.stopped.pop(pid, None)
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == INTERRUPTED:
                if time.monotonic() < self.until: self.add()
            elif pid not in self.doomed and status: self.failed += 1

    def any_of_them(self) -> int | None: return random.choice(sorted(self.living)) if self.living else None

    def kill_one(self) -> None:
        "Kill one of them, and start another in its place"
        if (victim := self.any_of_them()) is None: return
        self.doomed.add(victim)
        os.kill(victim, signal.SIGKILL)
        self.add()
        self.killed += 1

    def stop_one(self) -> None:
        "Stop one of them for a moment, wherever it is"
        if (victim := self.any_of_them()) is None: return
        os.kill(victim, signal.SIGSTOP)
        self.stopped[victim] = time.monotonic() + STOPPED_FOR
        self.stops += 1

    def interrupt_one(self) -> None:
        if (victim := self.any_of_them()) is None: return
        os.kill(victim, signal.SIGINT)
        self.interrupted += 1

    def continue_some(self) -> None:
        "Let those go on that were stopped for long enough"
        now = time.monotonic()
        for pid in [pid for pid, until in self.stopped.items() if until < now]:
            del self.stopped[pid]
            with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGCONT)


def watch(crowd: Crowd, ledger: Ledger, rates: dict[Callable[[], None], float]) -> list[int]:
    "Until all have ended, or a minute longer than they should: the most MiB that was ever promised on each GPU"
    most, began = [0]*GPUS, time.monotonic()
    due = {act: began + 1 for act, rate in rates.items() if rate}
    while crowd.living and time.monotonic() < crowd.until + crowd.patience:
        crowd.bury()
        crowd.continue_some()
        now = time.monotonic()
        for act in due:
            while due[act] < min(now, crowd.until):
                act()
                due[act] += 1/rates[act]
        promised = [0]*GPUS
        for claim in ledger.claims():  # they are read at one moment, and those that are over are left out
            if claim.device: promised[int(claim.device.split("-")[-1][:6], 16)] += claim.memory
        most = [max(before, found//2**20) for before, found in zip(most, promised, strict=True)]
        time.sleep(0.01)
    return most


def main(asked: argparse.Namespace) -> None:
    folder, began, patience = asked.folder, time.monotonic(), 60 + 5*asked.busy + 10*asked.priorities
    os.environ["CJM_RESOURCES_DIR"] = f"{folder}/state"
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    ledger = Ledger(Store(store_path()))
    report = os.open(f"{folder}/report", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    gpus = [SimulatedGpu(memory_total_mb=TOTAL_MB) for _ in range(GPUS)]
    with SimulatedDriver(gpus, shared=f"{folder}/gpus") as driver:
        crowd = Crowd(driver, report, began + asked.seconds, patience, asked.priorities)
        busy = [start(run_for_nothing) for _ in range(asked.busy)]
        try:
            for _ in range(asked.processes): crowd.add()
            rates = {crowd.kill_one: asked.kills, crowd.stop_one: asked.stops, crowd.interrupt_one: asked.interrupts}
            most = watch(crowd, ledger, rates)
            stuck = len(crowd.living)
        finally:
            for pid in (*busy, *crowd.living): os.kill(pid, signal.SIGKILL)
        rows = [line.split() for line in Path(f"{folder}/report").read_text().splitlines()]
        waits = {size: [float(wait) for memory, _, wait in rows if int(memory) == size] for size in (500, 23_000)}
        of_all = [float(wait) for memory, count, wait in rows if (memory, count) == ("23000", str(GPUS))]
        print(json.dumps(dict(
            processes=asked.processes, grants=len(rows), large_grants=len(waits[23_000]),
            grants_of_all=len(of_all), killed=crowd.killed,
            stopped=crowd.stops, interrupted=crowd.interrupted, failed=crowd.failed, stuck=stuck,
            left_over=len(ledger.claims()), most_promised_mb=most, total_mb=TOTAL_MB,
            longest_wait={size: max(found, default=None) for size, found in waits.items()},
            seconds=round(time.monotonic() - began, 1))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("processes", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("kills", type=float)
    for option in ("--stops", "--interrupts"): parser.add_argument(option, type=float, default=0)
    for option in ("--busy", "--priorities"): parser.add_argument(option, type=int, default=0)
    main(parser.parse_args())
