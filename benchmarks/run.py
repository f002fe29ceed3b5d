#!/usr/bin/env python3
"""What the library costs, as ratios that are each measured in one run.

    python benchmarks/run.py           make an environment with the peers in .venvs/bench, and print the tables
    python benchmarks/run.py --save    and keep them in benchmarks/results.md, which the README quotes, peers.md and cluster.md
    python benchmarks/run.py --short   look in a minute whether the ratios are still what was saved

Eight simulated GPUs hold twenty live processes each: ten are grandchildren of the app's workers, ten are outsiders.
The two sides of a ratio take turns, so that both see the same machine; the figure is the ratio of their medians, for a
check and a reservation of the least medians of three runs.
"""
import argparse, atexit, contextlib, datetime, os, platform, sqlite3, statistics, subprocess, sys, tempfile, time, venv
from importlib.metadata import version
from pathlib import Path

import psutil, pynvml

from cjm_fasthtml_resources.core.gpu import read_gpus
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

GPUS, EACH = 8, 20
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results.md")
CALL = 1e-4  # seconds that a slower driver lets each call wait. On a Tesla K40m nvmlDeviceGetPowerUsage took 0.36 ms: github.com/wookayin/gpustat/issues/76
NOISE = 1.6  # how much worse a ratio can come out on a busy machine


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


def pin():
    "Keep this process on one core"
    if hasattr(os, "sched_setaffinity"): os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


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


def simulated(pids):
    return [SimulatedGpu(name="NVIDIA H100 80GB HBM3", memory_total_mb=81559, processes=[SimulatedProcess(pid, 1000) for pid in group]) for group in pids]


@contextlib.contextmanager
def bare_session(pids):
    "Simulated devices with these processes on them, also for `bare_calls`"
    with SimulatedDriver(simulated(pids)) as driver:
        pynvml.nvmlInit()
        HANDLES.clear()  # of another driver
        yield driver


def looks(rounds=40):
    "Seconds of a check and of bare calls, of the two with one GPU and one process, of these with a slower driver, and of a check with 10 and with 100,000 workers"
    with live_processes() as (workers, pids):
        with bare_session(pids):
            few, many = filled(workers, 10), filled(workers, 100_000)
            found = few.check_gpu_availability()
            assert len(found.app_pids) == GPUS*EACH//2 and sum(len(d.processes) for d in found.devices) == GPUS*EACH, found
            beside_bare = medians(few.check_gpu_availability, bare_calls, rounds=rounds)
            more_workers = medians(few.check_gpu_availability, many.check_gpu_availability, rounds=rounds)
        with bare_session([pids[0][:1]]) as driver:
            sides = filled(workers, 10).check_gpu_availability, bare_calls
            one_gpu = medians(*sides, rounds=10*rounds)
            driver.delay("*", CALL)
            slower = medians(*sides, rounds=rounds)
    return [*beside_bare, *one_gpu, *slower, *more_workers]


def placed(*arguments, runs):
    "What a run of this file measures, each time the least of so many runs: on one core, as pyperf pins a benchmark, since a Python process computes on one; and as the kernel places its two threads"
    def once(core): return map(float, subprocess.run([sys.executable, __file__, *arguments, *core], check=True, capture_output=True, text=True).stdout.split())
    return [[min(times) for times in zip(*(once(core) for _ in range(runs)))] for core in (["--pin"], [])]


def checking(rounds=40, runs=3):
    "Rows of a check, beside bare calls and with more workers"
    places = dict(zip(("on one core", "on two cores"), placed("--looks", str(rounds), runs=runs)))
    sizes = {"a check, in bare pynvml calls + one start time per process": 0, "the same with one GPU and one process on it": 2,
             f"this with calls that take at least {CALL*1e3:g} ms each": 4}  # where the two times stand
    *_, ten, lots = places["on one core"]
    return [
        *(row(f"{what}, {place}", found[at]/found[at + 1], 1.5, f"{found[at]*1e3:.2f} ms : {found[at + 1]*1e3:.2f} ms") for what, at in sizes.items() for place, found in places.items()),
        row("a check with 100,000 workers, in checks with 10", lots/ten, 1.2, f"{lots*1e3:.2f} ms : {ten*1e3:.2f} ms")]


def row(what, ratio, bound, detail):
    "A ratio of which less is better"
    return what, f"{ratio:.2f} ×" if ratio < 20 else f"{ratio:.0f} ×", f"≤ {bound:g}", ratio <= bound, detail


def beside_nvitop():
    import nvitop
    with live_processes() as (workers, pids), SimulatedDriver(simulated(pids)):
        manager = filled(workers, 10)
        assert len(nvitop.take_snapshots().gpu_processes) == GPUS*EACH
        check, peer = medians(manager.check_gpu_availability, nvitop.take_snapshots, rounds=15)
        atexit.unregister(nvitop.libnvml.nvmlShutdown)  # it would complain that the simulated driver is gone
    return [("nvitop 1.7 `take_snapshots`, in checks", f"{peer/check:.1f} ×", "≥ 8", peer/check >= 8, f"{peer*1e3:.1f} ms : {check*1e3:.2f} ms")]


def registry():
    "Rows of what is done with one worker among 10, 1,000 and 100,000"
    sizes = (10, 1_000, 100_000)
    managers, first = [filled([], size) for size in sizes], 5_000_000

    def each(call): return medians(*[lambda m=m: [call(m) for _ in range(500)] for m in managers], rounds=25)

    def look_up(manager): manager.get_worker_by_pid(first + 5), manager.get_worker_by_job(f"job-{first + 5}")

    def come_and_go(manager):
        manager.register_worker(first - 1, "llm", job_id="job")
        manager.unregister_worker(first - 1)

    calls = {"looking a worker up by PID and by job": look_up,
             "changing a worker's state": lambda m: m.update_worker_state(first + 5, plugin_name="vllm"),
             "registering a worker and unregistering it": come_and_go}
    found = {what: each(call) for what, call in calls.items()}
    return [row(f"{what} among 100,000, as among 10", times[-1]/times[0], 1.5, " : ".join(f"{t/500*1e6:.1f}" for t in reversed(times)) + " µs (100,000 : 1,000 : 10)")
            for what, times in found.items()]


def importing(rounds=15):
    mine, base = zip(*[(import_seconds("import cjm_fasthtml_resources.core.manager"), import_seconds("import pynvml, psutil")) for _ in range(rounds)])
    return [row("importing core.manager, in imports of pynvml and psutil", min(mine)/min(base), 1.3, f"{min(mine)*1e3:.1f} ms : {min(base)*1e3:.1f} ms")]


def reserving(runs=3):
    "Rows of a reservation"
    (in_memory, in_file, reading, insert, operation), on_two = placed("--grants", runs=runs)
    def on(index): return f"on one core, {on_two[index]*1e3:.2f} ms on two"
    return [
        ("a reservation granted at once, in memory, in dict operations", f"{in_memory/operation:.0f} ×", "< 0.2 ms", in_memory < 2e-4,
         f"{in_memory*1e3:.2f} ms, of which {reading*1e3:.2f} ms read the driver : {operation*1e6:.2f} µs, {on(0)}"),
        ("a reservation granted at once, in an app's file, in SQLite inserts", f"{in_file/insert:.0f} ×", "< 2 ms", in_file < 2e-3, f"{in_file*1e3:.2f} ms : {insert*1e6:.0f} µs, {on(1)}")]


def ratio_of(figure): return float(figure.removesuffix(" ×"))


def short_run():
    "Whether no ratio is worse than the saved one by more than noise; of three short runs the best counts, for noise only adds"
    saved = {cells[1].strip(): cells[2].strip() for line in RESULTS.read_text(encoding="utf-8").splitlines() if len(cells := line.split("|")) == 6}
    best: dict[str, float] = {}
    for _ in range(3):
        for what, figure, *_ in [*checking(15, 1), *registry(), *importing(5), *reserving(1)]: best[what] = min(ratio_of(figure), best.get(what, float("inf")))
    failed = 0
    for what, ratio in best.items():
        allowed = NOISE*max(ratio_of(saved[what]), 1) if what in saved else 0
        failed += ratio > allowed
        print(f"{what}: {ratio:.2f} ×, saved {saved.get(what, 'nowhere')}{'' if ratio <= allowed else f' - MORE THAN {allowed:.2f}'}")
    print(f"{len(best) - failed} passed, {failed} failed")
    return bool(failed)


def worker_memory():
    "Megabytes that the process grows by with 100,000 workers, each with a configuration and a job"
    process = psutil.Process()
    manager, before = ResourceManager(), process.memory_info().rss
    for pid in range(5_000_000, 5_100_000):
        manager.register_worker(pid, "llm", job_id=f"job-{pid}", plugin_id="llm_vllm", plugin_name="vllm", config={"model_id": "llama", "port": pid})
    return (process.memory_info().rss - before)/1e6


def in_environment(arguments):
    "The same in an environment of its own, which has the peers"
    path = ROOT/".venvs"/"bench"
    venv.EnvBuilder(with_pip=True, clear=True).create(path)
    python = path/("Scripts" if os.name == "nt" else "bin")/"python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{ROOT}[bench]"], check=True)
    return subprocess.call([python, __file__, "--here", *arguments])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the tables in benchmarks/results.md, peers.md and cluster.md")
    parser.add_argument("--here", action="store_true", help="with what is installed here, which must have the extra `bench`")
    parser.add_argument("--short", action="store_true", help="a short run here: is no saved ratio missed by more than noise? Exits with 1 if one is")
    parser.add_argument("--looks", type=int, help=argparse.SUPPRESS)
    for step in ("--memory", "--grants", "--pin"): parser.add_argument(step, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pin: pin()
    if args.grants or args.looks:
        print(*(looks(args.looks) if args.looks else grants()))
        return 0
    if args.memory:
        print(worker_memory())
        return 0
    if args.short: return short_run()
    if not args.here: return in_environment(["--save"] if args.save else [])
    megabytes = float(subprocess.run([sys.executable, __file__, "--memory"], check=True, capture_output=True, text=True).stdout)
    rows = [*beside_nvitop(), *checking(), *registry(), *importing(), *reserving(),
            ("memory of 100,000 workers", f"{megabytes:.0f} MB", "< 150", megabytes < 150, f"{megabytes*10:.0f} bytes each")]
    import cluster, live, peers  # beside this file; the first imports a web framework, which would make the garbage collector's work above larger
    rows += live.measure()
    machine = (f"{datetime.date.today()}, {platform.machine()} with {os.cpu_count()} cores, Python {platform.python_version()}, "
               + ", ".join(f"{name} {version(name)}" for name in ("nvidia-ml-py", "psutil", "nvitop", "gpustat")) + ".")
    lines = ["| what is compared | figure | bound | measured |", "|---|---|---|---|", *(f"| {what} | {figure} | {bound} | {detail} |" for what, figure, bound, _, detail in rows),
             "", f"{GPUS} simulated GPUs with {EACH} live processes each. The caller hands the reading to a thread of its own, so that a driver that hangs holds nobody up; on two cores that wakes the other one. "
             f"Beside simulated calls of a few microseconds this is much where there are few: peers.md tells it for each size. A real driver's calls take longer ([0.36 ms for the power on a Tesla K40m](https://github.com/wookayin/gpustat/issues/76)); there it is the few calls that count, and a check asks once for each list of processes, pynvml twice. {machine}"]
    print("\n".join(lines), flush=True)
    tables = {RESULTS: lines}
    for more in (peers, cluster):
        tables[more.RESULTS] = [*more.table(), "", f"{more.ABOUT} {machine}"]
        print("\n".join(["", *tables[more.RESULTS]]), flush=True)
    if args.save:
        for path, found in tables.items(): path.write_text("\n".join(found) + "\n", encoding="utf-8")
        print("\nsaved; the pages that show them: python tools/notebooks.py --update index cluster && nbdev_clean && python tools/readme.py")
    missed = [what for what, _, _, good, _ in rows if not good]
    if missed: print("\nshort of its bound: " + "; ".join(missed))
    return bool(missed)


if __name__ == "__main__": sys.exit(main())
