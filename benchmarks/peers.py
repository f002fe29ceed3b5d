"""What one look costs, beside the peers: bare pynvml calls, nvitop, gpustat and dask's reader, on the same simulated
devices and live processes. Called by benchmarks/run.py

Each peer runs in a process of its own. Wall time and CPU time are medians; opens are the files that Python code opened
for one look, as an audit hook counts them (those that psutil opens in C are not among them).
"""
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import bare_calls, pin

RESULTS = Path(__file__).with_name("peers.md")
GPUS, EACH = (1, 2, 4, 8, 16), (0, 1, 20, 100)
PEERS = ("bare calls", "a check", "a check on two cores", "nvitop", "gpustat", "dask")
ABOUT = (
    "Simulated GPUs with live processes; medians, each program on one core in a process of its own, one after the "
    "other, the fastest of three runs (results.md has the check and the bare calls in turns). Where the kernel may "
    "place a check's two threads on two cores, its ratio is larger and differs more from run to run. `nvidia-smi` "
    "needs a real driver and is left out. gpustat sleeps 0.1 s in each look, to measure CPU shares. "
    "dask.distributed's reader (`diagnostics.nvml.real_time`) tells the memory and the load of one device and lists "
    "no processes. A check hands the reading to a thread, so that a hung driver holds nobody up; that is most of it "
    "where there are few processes.")
HEAD = (
    "| GPUs | processes on each | bare pynvml calls + start times | a check | in bare calls "
    "| on two cores, in bare calls | nvitop, in checks | gpustat, in checks | dask's reader, of one device "
    "| files opened: bare, check, nvitop, gpustat, dask |",
    "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|")


def looks(peer: str):
    "What is called for one look"
    if peer == "bare calls":
        import pynvml
        pynvml.nvmlInit()
        return bare_calls
    if peer.startswith("a check"):
        from cjm_fasthtml_resources.core.manager import ResourceManager
        return ResourceManager(track_self=False).check_gpu_availability
    if peer == "nvitop":
        import atexit

        import nvitop
        atexit.unregister(nvitop.libnvml.nvmlShutdown)  # it would complain that the simulated driver is gone
        return nvitop.take_snapshots
    if peer == "gpustat":
        import gpustat
        return gpustat.new_query
    from distributed.diagnostics import nvml
    return nvml.real_time


def measure_one(peer: str, gpus: int, pids: list[int], each: int) -> dict[str, float]:
    "In a process of its own: medians of one look"
    from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

    def device(place):
        processes = [SimulatedProcess(pid, 100) for pid in pids[place*each:(place + 1)*each]]
        return SimulatedGpu("NVIDIA H100 80GB HBM3", memory_total_mb=81559, processes=processes)

    if peer != "a check on two cores": pin()
    with SimulatedDriver([device(place) for place in range(gpus)]):
        look, opened, counting = looks(peer), [0], [False]

        def audit(event, args):
            if counting[0] and event == "open": opened[0] += 1

        sys.addaudithook(audit)
        for _ in range(3): look()
        counting[0] = True
        for _ in range(5): look()
        counting[0] = False
        wall, cpu, end = [], [], time.monotonic() + 1.5
        while len(wall) < 200 and (time.monotonic() < end or len(wall) < 5):
            began, spent = time.perf_counter(), time.process_time()
            look()
            wall.append(time.perf_counter() - began)
            cpu.append(time.process_time() - spent)
    return {"wall": statistics.median(wall), "cpu": statistics.median(cpu), "opens": opened[0]/5}


def run_one(peer: str, gpus: int, each: int, pids: list[int]) -> dict[str, float]:
    "The same, measured in a new process"
    arguments = json.dumps([peer, gpus, pids[:gpus*each], each])
    out = subprocess.run([sys.executable, __file__, arguments], capture_output=True, text=True, timeout=120)
    if out.returncode: raise RuntimeError(f"{peer}: {out.stderr[-2000:]}")
    return json.loads(out.stdout.splitlines()[-1])


def table() -> list[str]:
    "A row for each number of GPUs and of processes on each"
    living = [subprocess.Popen(["sleep", "3600"]) for _ in range(max(GPUS)*max(EACH))]
    pids = [process.pid for process in living]
    sizes = [(gpus, each) for gpus in GPUS for each in EACH]
    try:  # a virtual machine is slow for seconds at a time: the runs of one size are minutes apart
        runs = [{size: {peer: run_one(peer, *size, pids) for peer in PEERS} for size in sizes} for _ in range(3)]
        return [*HEAD, *(line(*size, [run[size] for run in runs]) for size in sizes)]
    finally:
        for process in living: process.kill()
        for process in living: process.wait()


def line(gpus: int, each: int, runs: list[dict[str, dict[str, float]]]) -> str:
    "A row from the figures of each peer in each run"
    def fastest(peer): return min((one[peer] for one in runs), key=lambda figures: figures["wall"])  # noise only adds
    found = {peer: fastest(peer) for peer in PEERS}
    ms = {peer: f"{f['wall']*1e3:.2f} ms, {f['cpu']*1e3:.2f} CPU" for peer, f in found.items()}
    opens = ", ".join(format(found[peer]["opens"], ".0f") for peer in PEERS if peer != "a check on two cores")
    ratio = {peer: f["wall"]/found["a check"]["wall"] for peer, f in found.items()}
    bare = ratio["bare calls"]
    cells = [gpus, each, ms["bare calls"], ms["a check"],
             f"{1/bare:.2f} ×", f"{ratio['a check on two cores']/bare:.2f} ×",
             f"{ratio['nvitop']:.1f} ×", f"{ratio['gpustat']:.1f} ×", f"{found['dask']['wall']*1e3:.3f} ms", opens]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__": print(json.dumps(measure_one(*json.loads(sys.argv[1]))))
