"""The answer on a real NVIDIA GPU against what was allocated, nvidia-smi, nvitop and the bare calls

Skipped where there is no GPU.

GPU_FIGURES names a file for what was measured; tests/gpu/run.py sets it.
"""
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cjm_fasthtml_resources.core.gpu import read_gpus
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.process import driver_pid_reader
from cjm_fasthtml_resources.core.resources import ResourceStatus

SNAPSHOT = read_gpus()
pytestmark = pytest.mark.skipif(
    not SNAPSHOT.devices or SNAPSHOT.simulated, reason=f"no NVIDIA GPU here: {SNAPSHOT.reason}")
HOLD = Path(__file__).with_name("cuda.py")
OVERHEAD_MIB = 800  # of a CUDA context, on top of what is allocated; less on most cards


@pytest.fixture(scope="module")
def figures():
    "What is measured, with card, driver and date"
    found = dict(
        card=SNAPSHOT.devices[0].name,
        driver=SNAPSHOT.driver_version,
        date=time.strftime("%Y-%m-%d"),
        exact=driver_pid_reader() is not None,
    )
    yield found
    if path := os.environ.get("GPU_FIGURES"):
        Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def holding(mib, depth=0, env=None):
    "A process that holds memory, and the PID of the one that does"
    process = subprocess.Popen(
        [sys.executable, HOLD, str(mib), str(depth)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **(env or {})})
    try:
        said = process.stdout.readline().split()
        assert said[:1] == ["ready"], said
        yield process, int(said[1])
    finally:
        process.stdin.close()
        process.wait(20)


def nearly(mib, allocated): return allocated <= mib <= allocated + OVERHEAD_MIB


def nvidia_smi() -> dict[int, float]:
    "The MiB of each PID that nvidia-smi lists with a figure"
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    rows = [line.split(",") for line in listed.splitlines() if "[" not in line]
    return {int(pid): float(mib) for pid, mib in rows}


def test_child_grandchild_and_outsider_are_told_apart_by_what_they_allocated(figures):
    if driver_pid_reader() is None: pytest.skip("inside a container without the host's /proc nobody can be told apart")
    manager = ResourceManager(track_self=False)
    before = manager.check_gpu_availability().devices[0]
    with holding(1_000) as (child, _), holding(700, depth=2) as (parent, grandchild), holding(500) as (_, outsider):
        for worker in (child, parent): manager.register_worker(worker.pid, "test")
        status = manager.check_gpu_availability().devices[0]
        held = {p.pid: (p.owner, (p.memory_used or 0)/2**20) for p in status.processes}
        assert held[child.pid][0] == "app" and nearly(held[child.pid][1], 1_000), held
        assert held[grandchild][0] == "app" and nearly(held[grandchild][1], 700), held
        assert held[outsider][0] == "external" and nearly(held[outsider][1], 500), held
        grown = (status.device.memory_used - before.device.memory_used)/2**20
        figures["allocated_mib"], figures["device_grew_mib"] = 2_200, round(grown)
        told = dict(child=child.pid, grandchild=grandchild, outsider=outsider)
        figures["seen_mib"] = {who: round(held[pid][1]) for who, pid in told.items()}
        assert 2_200 <= grown <= 2_200 + 3*OVERHEAD_MIB
        if shutil.which("nvidia-smi"):
            smi = nvidia_smi()
            for pid in (child.pid, grandchild, outsider): assert abs(smi[pid] - held[pid][1]) <= 2, (smi, held)
        if importlib.util.find_spec("nvitop"):   # the extra bench has it
            import nvitop
            listed = nvitop.Device(status.device.index).processes()
            peer = {pid: process.gpu_memory()/2**20 for pid, process in listed.items()}
            for pid in (child.pid, grandchild, outsider): assert abs(peer[pid] - held[pid][1]) <= 2, (peer, held)


def test_all_that_was_allocated_is_somebodys(figures):
    "Also where no process can be told: then it is unattributed, or the app's as far as it says so"
    manager = ResourceManager(track_self=False)
    before = manager.check_gpu_availability().devices[0]
    with holding(2_000):
        status = manager.check_gpu_availability().devices[0]
        more = sum(status.shares.values()) - sum(before.shares.values())
        assert nearly(more/2**20, 2_000)


def test_what_a_check_costs_beside_the_bare_calls(figures):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]/"benchmarks"))
    import pynvml
    run = pytest.importorskip("run", reason="needs the extra bench")
    pynvml.nvmlInit()
    with holding(500):
        ours, bare = run.medians(ResourceManager().check_gpu_availability, run.bare_calls)
    figures["check_ms"], figures["bare_calls_ms"] = round(ours*1e3, 3), round(bare*1e3, 3)
    figures["ratio"] = round(ours/bare, 2)
    assert figures["ratio"] > 1   # it makes those calls, and more


def test_many_processes_that_reserve_fill_the_card_and_none_runs_out_of_memory(figures, tmp_path, monkeypatch):
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    device = ResourceManager().check_gpu_availability().devices[0]
    if device.status is ResourceStatus.UNAVAILABLE: pytest.skip(device.reason or "")
    each = int(device.room/2**20/4)   # four fit, ten want to
    code = f"""import subprocess, sys
from cjm_fasthtml_resources.core.manager import ResourceManager
with ResourceManager(app="fill").reserve({each}, 0, timeout=120) as gpu:
    sys.exit(subprocess.call([sys.executable, {str(HOLD)!r}, "{max(each - OVERHEAD_MIB, 100)}", "0", "3"]))
"""
    start = [sys.executable, "-c", code]
    jobs = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(10)]
    most, ended = 0, []
    while any(job.poll() is None for job in jobs):
        most = max(most, read_gpus().devices[0].memory_used or 0)
        time.sleep(0.1)
    for job in jobs: ended.append((job.returncode, job.stdout.read().split()[:1]))
    figures["jobs"], figures["most_used_mib"] = len(jobs), round(most/2**20)
    figures["total_mib"] = round(device.device.memory_total/2**20)
    assert ended == [(0, ["ready"])]*10
