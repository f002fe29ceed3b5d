"""Many processes that reserve and use GPU memory at random, as a program of its own: crowd.py FOLDER PROCESSES SECONDS KILLS

They share four simulated GPUs and one file. Each allocates what it was promised, and the simulated driver refuses what
is not there. KILLS times a second one of them is killed and replaced. Prints what happened as JSON.
"""
import json, os, random, signal, sys, time, traceback
from pathlib import Path

from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.reservations import Ledger
from cjm_fasthtml_resources.core.store import Store, store_path
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

TOTAL_MB, GPUS = 24_000, 4


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
    if (pid := os.fork()) == 0:
        code = 1
        try:
            member(driver, report, until, seed)
            code = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    return pid


def main(folder: str, processes: int, seconds: float, kills: float) -> None:
    os.environ["CJM_RESOURCES_DIR"] = f"{folder}/state"
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    ledger, most, failed, killed, began = Ledger(Store(store_path())), [0]*GPUS, 0, 0, time.monotonic()
    report = os.open(f"{folder}/report", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    with SimulatedDriver([SimulatedGpu(memory_total_mb=TOTAL_MB) for _ in range(GPUS)], shared=f"{folder}/gpus") as driver:
        until = began + seconds
        living = {start(driver, report, until, seed) for seed in range(processes)}
        doomed, next_kill = set(), began + 1
        while living and time.monotonic() < until + 60:
            while (ended := os.waitpid(-1, os.WNOHANG) if living else (0, 0))[0]:
                living.discard(ended[0])
                if ended[0] not in doomed and ended[1]: failed += 1
            if kills and next_kill < time.monotonic() < until and living:
                doomed.add(victim := random.choice(sorted(living)))
                os.kill(victim, signal.SIGKILL)
                living.add(start(driver, report, until, processes + killed))
                killed, next_kill = killed + 1, time.monotonic() + 1/kills
            with ledger.store.reading() as db:  # a statement sees one moment
                for device, promised in db.execute("SELECT device, sum(memory) FROM claims WHERE device IS NOT NULL GROUP BY device").fetchall():
                    index = int(device.split("-")[-1][:6], 16)
                    most[index] = max(most[index], promised//2**20)
            time.sleep(0.01)
        stuck = len(living)
        for pid in living: os.kill(pid, signal.SIGKILL)
        rows = [line.split() for line in Path(f"{folder}/report").read_text().splitlines()]
        waits = {size: [float(wait) for memory, wait in rows if int(memory) == size] for size in (500, 23_000)}
        print(json.dumps(dict(
            processes=processes, grants=len(rows), failed=failed, stuck=stuck, killed=killed, most_promised_mb=most, total_mb=TOTAL_MB, seconds=round(time.monotonic() - began, 1),
            longest_wait={size: max(found, default=None) for size, found in waits.items()}, large_grants=len(waits[23_000]),
            left_over=len(ledger.claims()))))


if __name__ == "__main__": main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
