#!/usr/bin/env python3
"""What a recorder costs beside its monitor, and how long a look at a full file takes.

    python benchmarks/history.py

Eight GPUs with twenty processes each, whose sizes change from sample to sample. The recorder's part is the CPU time of
noting a sample and of its share in a write of ten; beside it stands that of taking the sample. The file has an hour of
seconds, a day of minutes and 90 days of quarters of an hour.
"""
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.samples import take_sample
from cjm_fasthtml_resources.recorded.file import LEVELS, add
from cjm_fasthtml_resources.recorded.notes import Notes
from cjm_fasthtml_resources.recorded.rows import Place, Row, Share
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

GPUS, EACH, SAMPLES = 8, 20, 60
NAMES, USERS = ("python3", "VLLM::EngineCore", "train.py", "jupyter-lab"), ("ada", "ben", "cleo")


def recorder_cost(path: Path) -> tuple[float, float]:
    "CPU seconds of a sample, and of recording it"
    gpus = [SimulatedGpu("NVIDIA H100", 81_559, processes=[SimulatedProcess(2**22 + 100*gpu + n) for n in range(EACH)])
            for gpu in range(GPUS)]
    manager, notes, taken, recorded = ResourceManager(), Notes(), 0.0, 0.0
    with SimulatedDriver(gpus):
        for number in range(SAMPLES):
            for gpu in gpus:
                for process in gpu.processes: process.memory_mb = random.randrange(300, 3000)
            start = time.process_time()
            sample = take_sample(manager)
            taken += time.process_time() - start
            start = time.process_time()
            notes.take(sample, 1.0, 0)
            if number % 10 == 9: add(path, *notes.take_out())
            recorded += time.process_time() - start
    return taken/SAMPLES, recorded/SAMPLES


def made_up_row(when: float) -> Row:
    def place(gpu: int) -> Place:
        sizes = [random.randrange(2**28, 2**32) for _ in range(EACH)]
        shares = tuple(Share(1000 + 100*gpu + n, 100*gpu + n*7.31, "external", random.choice(NAMES),
                             random.choice(USERS), size, size) for n, size in enumerate(sizes))
        used = sum(sizes)
        return Place(f"GPU-{gpu}", gpu, "NVIDIA H100", "external_busy", 85*10**9, used, used, 0, used, 0, 0, 50, 60,
                     400.0, shares)
    return Row(when, 1.0, tuple(map(place, range(GPUS))))


def fill(path: Path) -> None:
    "Write as many rows of each level as are kept"
    now, (second, minute, quarter) = time.time(), LEVELS
    begin = now - quarter.keeps*quarter.width
    day, hour = now - minute.keeps*minute.width, now - second.keeps
    times = [begin + n*quarter.width for n in range(quarter.keeps - 96)]
    times += [day + n*minute.width for n in range(minute.keeps - 60)] + [hour + n for n in range(second.keeps)]
    for at in range(0, len(times), 200): add(path, [made_up_row(when) for when in times[at:at + 200]])


def look_seconds(path: Path, *arguments: str) -> float:
    "Seconds of a command, the least of five"
    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cjm_fasthtml_resources", "history", "--file", path, *arguments],
                       check=True, capture_output=True)
        return time.perf_counter() - start
    return min(once() for _ in range(5))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/"history.sqlite3"
        taken, recorded = recorder_cost(path)
        print(f"a sample of {GPUS} GPUs with {GPUS*EACH} processes: {1000*taken:.2f} ms of CPU time")
        print(f"recording it, at one a second: {100*recorded:.2f} % of a core (bound 1 %)")
        path.unlink()
        fill(path)
        print(f"a full file: {path.stat().st_size/1e6:.1f} MB (bound 64 MB)")
        for arguments in (("--since", "1h"), ("--since", "24h"), ("--since", "90d")):
            print(f"history {' '.join(arguments)}: {look_seconds(path, *arguments):.2f} s (bound for 24h: 0.5 s)")


if __name__ == "__main__": main()
