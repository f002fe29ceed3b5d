#!/usr/bin/env python3
"""What the library costs, as ratios that are each measured in one run.

    python benchmarks/run.py          print the table
    python benchmarks/run.py --save   and keep it in benchmarks/results.md, which the README quotes

Eight simulated GPUs hold twenty live processes each: ten are grandchildren of the app's workers, ten are outsiders.
Needs the extra `bench`. The two sides of a ratio take turns, so that both see the same machine; the figure is the
ratio of their medians.
"""
import argparse, atexit, contextlib, datetime, os, platform, sqlite3, statistics, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path

import psutil, pynvml

from cjm_fasthtml_resources.core.gpu import read_gpus
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

GPUS, EACH = 8, 20
RESULTS = Path(__file__).with_name("results.md")


@contextlib.contextmanager
def live_processes():
    "Workers' PIDs, and for each GPU the PIDs on it; every one is a process that lives"
    tree = f"sh -c 'for i in {' '.join(map(str, range(EACH//2)))}; do sleep 3600 & echo $!; done; wait' & wait"
    workers = [subprocess.Popen(["sh", "-c", tree], stdout=subprocess.PIPE, text=True, start_new_session=True) for _ in range(GPUS)]
    outsiders = [subprocess.Popen(["sleep", "3600"]) for _ in range(GPUS*EACH//2)]
    try:
        inner = [[int(worker.stdout.readline()) for _ in range(EACH//2)] for worker in workers]
        yield [w.pid for w in workers], [mine + [o.pid for o in outsiders[g*EACH//2:(g + 1)*EACH//2]] for g, mine in enumerate(inner)]
    finally:
        for worker in workers: os.killpg(worker.pid, 9)
        for process in [*workers, *outsiders]:
            process.kill()
            process.wait()


def medians(*sides, rounds=40, warmup=5):
    "Median seconds of each side, measured in turns"
    times = [[] for _ in sides]
    for i in range(rounds + warmup):
        for side, found in zip(sides, times):
            began = time.perf_counter()
            side()
            if i >= warmup: found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in times]


def start_time(pid):
    "The cheapest way to read when a process started; psutil's create_time() takes about three times as long"
    file = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    try: return int(os.read(file, 4096).rpartition(b")")[2].split()[19])
    finally: os.close(file)


def bare_calls():
    "The NVML calls that a check makes, by pynvml alone, and one read of each process's start time"
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = HANDLES.setdefault(index, pynvml.nvmlDeviceGetHandleByIndex(index))
        with contextlib.suppress(pynvml.NVMLError): pynvml.nvmlDeviceGetMigMode(handle)
        for _ in range(2): pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)  # on both sides of the lists
        pynvml.nvmlDeviceGetUtilizationRates(handle)
        pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        pynvml.nvmlDeviceGetPowerUsage(handle)
        pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)
        for call in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses, pynvml.nvmlDeviceGetMPSComputeRunningProcesses):
            for process in call(handle): start_time(process.pid)

HANDLES: dict[int, object] = {}


def filled(workers, count):
    "A manager with the given workers among `count` registered ones"
    manager = ResourceManager(track_self=False)
    for pid in workers: manager.register_worker(pid, "llm")
    for pid in range(5_000_000, 5_000_000 + count - len(workers)): manager.register_worker(pid, "llm", job_id=f"job-{pid}")
    return manager


def grants():
    "Seconds of a reservation that is granted at once, in memory and in a file, of its reading of the driver, of an insert into the same kind of file and of a dict operation"
    with tempfile.TemporaryDirectory() as folder, SimulatedDriver([SimulatedGpu()]):
        os.environ["CJM_RESOURCES_DIR"] = folder
        inserted = sqlite3.connect(f"{folder}/insert.sqlite", isolation_level=None)
        for line in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = NORMAL", "CREATE TABLE rows (id INTEGER PRIMARY KEY, memory INTEGER)"): inserted.execute(line)
        held, plain = [], {}

        def reserving(manager):
            def side(): held.append(manager.reserve(1_000, timeout=0))
            return side

        def count(): plain["promised"] = plain.get("promised", 0) + 1

        def insert(): inserted.execute("INSERT INTO rows (memory) VALUES (1000)")

        def give_back():
            while held: held.pop().release()

        found = medians(reserving(ResourceManager()), reserving(ResourceManager(app="bench")), read_gpus, insert, count, give_back, rounds=400)
        inserted.close()
        return found[:5]


def import_seconds(code):
    "The least of many imports, each in a new interpreter that finds compiled bytecode"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    script = f"import time; t = time.perf_counter()\n{code}\nprint(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", script], env=env, cwd="/", check=True, capture_output=True, text=True).stdout)


def measure():
    "Rows: what, figure, bound"
    import nvitop
    with live_processes() as (workers, pids):
        gpus = [SimulatedGpu(name="NVIDIA H100 80GB HBM3", memory_total_mb=81559, processes=[SimulatedProcess(pid, 1000) for pid in group]) for group in pids]
        with SimulatedDriver(gpus):
            pynvml.nvmlInit()
            few, many = filled(workers, 10), filled(workers, 100_000)
            found = few.check_gpu_availability()
            assert len(found.app_pids) == GPUS*EACH//2 and sum(len(d.processes) for d in found.devices) == GPUS*EACH, found
            assert len(nvitop.take_snapshots().gpu_processes) == GPUS*EACH
            check, peer = medians(few.check_gpu_availability, nvitop.take_snapshots, rounds=15)
            ours, bare = medians(few.check_gpu_availability, bare_calls)
            ten, lots = medians(few.check_gpu_availability, many.check_gpu_availability)
            atexit.unregister(nvitop.libnvml.nvmlShutdown)  # it would complain that the simulated driver is gone

    def lookups(manager, pid):
        def side():
            for _ in range(2000): manager.get_worker_by_pid(pid), manager.get_worker_by_job(f"job-{pid}")
        return side

    by_few, by_many = medians(lookups(few, 5_000_001), lookups(many, 5_050_000))
    mine, base = zip(*[(import_seconds("import cjm_fasthtml_resources.core.manager"), import_seconds("import pynvml, psutil")) for _ in range(15)])
    megabytes = float(subprocess.run([sys.executable, __file__, "--memory"], check=True, capture_output=True, text=True).stdout)
    in_memory, in_file, reading, insert, operation = grants()
    return [
        ("nvitop 1.7 `take_snapshots`, in checks", f"{peer/check:.1f} ×", "≥ 8", peer/check >= 8, f"{peer*1e3:.1f} ms : {check*1e3:.2f} ms"),
        ("a check, in bare pynvml calls + one start time per process", f"{ours/bare:.2f} ×", "≤ 2", ours/bare <= 2, f"{ours*1e3:.2f} ms : {bare*1e3:.2f} ms"),
        ("a check with 100,000 workers, in checks with 10", f"{lots/ten:.2f} ×", "≤ 1.2", lots/ten <= 1.2, f"{lots*1e3:.2f} ms : {ten*1e3:.2f} ms"),
        ("lookup by PID and by job among 100,000, in lookups among 10", f"{by_many/by_few:.2f} ×", "about 1", by_many/by_few < 1.5, f"{by_many/2e-3:.2f} µs : {by_few/2e-3:.2f} µs"),
        ("importing core.manager, in imports of pynvml and psutil", f"{min(mine)/min(base):.2f} ×", "≤ 1.3", min(mine)/min(base) <= 1.3, f"{min(mine)*1e3:.1f} ms : {min(base)*1e3:.1f} ms"),
        ("a reservation granted at once, in memory, in dict operations", f"{in_memory/operation:.0f} ×", "< 0.2 ms", in_memory < 2e-4, f"{in_memory*1e3:.2f} ms, of which {reading*1e3:.2f} ms read the driver : {operation*1e6:.2f} µs"),
        ("a reservation granted at once, in an app's file, in SQLite inserts", f"{in_file/insert:.0f} ×", "< 2 ms", in_file < 2e-3, f"{in_file*1e3:.2f} ms : {insert*1e6:.0f} µs"),
        ("memory of 100,000 workers", f"{megabytes:.0f} MB", "< 150", megabytes < 150, f"{megabytes*10:.0f} bytes each"),
    ]


def worker_memory():
    "Megabytes that the process grows by with 100,000 workers, each with a configuration and a job"
    process = psutil.Process()
    manager, before = ResourceManager(), process.memory_info().rss
    for pid in range(5_000_000, 5_100_000):
        manager.register_worker(pid, "llm", job_id=f"job-{pid}", plugin_id="llm_vllm", plugin_name="vllm", config={"model_id": "llama", "port": pid})
    return (process.memory_info().rss - before)/1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the table in benchmarks/results.md")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(worker_memory())
        return 0
    rows = measure()
    import live  # beside this file; it imports a web framework, which would make the garbage collector's work above larger
    rows += live.measure()
    where = (f"{GPUS} simulated GPUs with {EACH} live processes each. {datetime.date.today()}, {platform.machine()} with {os.cpu_count()} cores, "
             f"Python {platform.python_version()}, nvidia-ml-py {version('nvidia-ml-py')}, psutil {version('psutil')}, nvitop {version('nvitop')}.")
    lines = ["| what is compared | figure | bound | measured |", "|---|---|---|---|", *(f"| {what} | {figure} | {bound} | {detail} |" for what, figure, bound, _, detail in rows), "", where]
    print("\n".join(lines))
    if args.save: RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    missed = [what for what, _, _, good, _ in rows if not good]
    if missed: print("\nshort of its bound: " + "; ".join(missed))
    return bool(missed)


if __name__ == "__main__": sys.exit(main())
