"""Many processes that reserve and use GPU memory at random: a program of its own

    crowd.py FOLDER PROCESSES SECONDS KILLS

They share four simulated GPUs and one file. Each allocates what it was promised, and the simulated driver refuses what
is not there. KILLS times a second one of them is killed and replaced. Prints what happened as JSON.
"""
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from cjm_fasthtml_resources.core.ledger import Ledger
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.store import Store, store_path
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

TOTAL_MB, GPUS = 24_000, 4
PROMISED = "SELECT device, sum(memory) FROM claims WHERE device IS NOT NULL GROUP BY device"


def member(driver: SimulatedDriver, report: int, until: float, seed: int) -> None:
    "Reserve, use, release, again and again"
    chance = random.Random(seed)
    random.seed(seed)
    manager = ResourceManager(app=f"app-{seed % 3}")
    while time.monotonic() < until:
        memory = chance.choice([500, 2_000, 4_000, 8_000, 23_000])
        asked = time.monotonic()
        with manager.reserve(memory, timeout=60) as held:
            os.write(report, f"{memory} {time.monotonic() - asked:.3f}\n".encode())
            with driver.allocate(memory, held.index): time.sleep(chance.uniform(0, 0.02))


def start(driver: SimulatedDriver, report: int, until: float, seed: int) -> int:
    "The PID of a new member, a child of this process"
    if (pid := os.fork()) == 0:
        code = 1
        try:
            member(driver, report, until, seed)
            code = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    return pid


class Crowd:
    "The members that live, and what happened to those that ended"
    def __init__(self, driver: SimulatedDriver, report: int, until: float) -> None:
        self.driver, self.report, self.until = driver, report, until
        self.living, self.doomed = set(), set()
        self.failed = self.killed = 0

    def add(self, seed: int) -> None: self.living.add(start(self.driver, self.report, self.until, seed))

    def bury(self) -> None:
        "Forget those that ended; one that ended badly and was not killed has failed"
        while self.living:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid: return
            self.living.discard(pid)
            if pid not in self.doomed and status: self.failed += 1

    def kill_one(self, seed: int) -> None:
        "Kill one of them at random, and start another in its place"
        self.doomed.add(victim := random.choice(sorted(self.living)))
        os.kill(victim, signal.SIGKILL)
        self.add(seed)
        self.killed += 1


def watch(crowd: Crowd, ledger: Ledger, processes: int, kills: float) -> list[int]:
    "Until all have ended, or a minute longer than they should: the most MiB that was ever promised on each GPU"
    most = [0]*GPUS
    next_kill = time.monotonic() + 1
    while crowd.living and time.monotonic() < crowd.until + 60:
        crowd.bury()
        if kills and next_kill < time.monotonic() < crowd.until and crowd.living:
            crowd.kill_one(processes + crowd.killed)
            next_kill = time.monotonic() + 1/kills
        with ledger.store.reading() as db: found = db.execute(PROMISED).fetchall()  # a statement sees one moment
        for device, promised in found:
            index = int(device.split("-")[-1][:6], 16)
            most[index] = max(most[index], promised//2**20)
        time.sleep(0.01)
    return most


def main(folder: str, processes: int, seconds: float, kills: float) -> None:
    os.environ["CJM_RESOURCES_DIR"] = f"{folder}/state"
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    ledger, began = Ledger(Store(store_path())), time.monotonic()
    report = os.open(f"{folder}/report", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    gpus = [SimulatedGpu(memory_total_mb=TOTAL_MB) for _ in range(GPUS)]
    with SimulatedDriver(gpus, shared=f"{folder}/gpus") as driver:
        crowd = Crowd(driver, report, began + seconds)
        for seed in range(processes): crowd.add(seed)
        most = watch(crowd, ledger, processes, kills)
        stuck = len(crowd.living)
        for pid in crowd.living: os.kill(pid, signal.SIGKILL)
        rows = [line.split() for line in Path(f"{folder}/report").read_text().splitlines()]
        waits = {size: [float(wait) for memory, wait in rows if int(memory) == size] for size in (500, 23_000)}
        print(json.dumps(dict(
            processes=processes, grants=len(rows), large_grants=len(waits[23_000]), killed=crowd.killed,
            failed=crowd.failed, stuck=stuck, left_over=len(ledger.claims()), most_promised_mb=most, total_mb=TOTAL_MB,
            longest_wait={size: max(found, default=None) for size, found in waits.items()},
            seconds=round(time.monotonic() - began, 1))))


if __name__ == "__main__": main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
