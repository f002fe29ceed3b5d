"What tutorials/compare.ipynb says of other programs, each row tried on the same simulated devices"
import importlib.util
import subprocess
import sys
import threading

import pynvml
import pytest

from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.resources import ResourceStatus
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

INSTALLED = all(importlib.util.find_spec(name) for name in ("nvitop", "gpustat"))
pytestmark = pytest.mark.skipif(not INSTALLED, reason="nvitop and gpustat are not installed")


@pytest.fixture(scope="module", autouse=True)
def peers():
    "Both, imported for these tests alone: gpustat changes pynvml's functions for the whole process"
    global nvitop, gpustat
    before = dict(vars(pynvml))
    import gpustat
    import nvitop
    yield
    vars(pynvml).update(before)


@pytest.fixture
def worker():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_names(worker):
    with SimulatedDriver([SimulatedGpu("NVIDIA L4", processes=[SimulatedProcess(worker.pid, 5_000)])]):
        mine = ResourceManager(track_self=False).check_gpu_availability().devices[0].processes
        theirs = nvitop.take_snapshots().gpu_processes
        query = gpustat.new_query().gpus[0].processes
    assert [p.pid for p in mine] == [p.pid for p in theirs] == [p["pid"] for p in query] == [worker.pid]
    assert mine[0].username == theirs[0].username == query[0]["username"]
    assert mine[0].memory_used == theirs[0].gpu_memory == query[0]["gpu_memory_usage"]*2**20


def test_owners(worker):
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(worker.pid, 5_000)])]):
        manager = ResourceManager(track_self=False)
        assert manager.check_gpu_availability().devices[0].processes[0].owner == "external"
        manager.register_worker(worker.pid, "llm")
        assert manager.check_gpu_availability().devices[0].processes[0].owner == "app"
        theirs = dir(nvitop.take_snapshots().gpu_processes[0])
        query = gpustat.new_query().gpus[0].processes[0]
        assert not [name for name in (*theirs, *query) if "owner" in name or "app" in name.split("_")]


def test_ram():
    assert ResourceManager().check_memory_availability().memory.memory.total > 0
    assert nvitop.host.virtual_memory().total > 0
    with SimulatedDriver([SimulatedGpu()]): query = gpustat.new_query().jsonify()
    assert not [key for key in query if "mem" in key or "ram" in key]


def waiting(look, seconds) -> threading.Thread:
    "The thread of a look, after so long"
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(seconds)
    return thread


def test_hang():
    with SimulatedDriver([SimulatedGpu()]) as driver:
        manager = ResourceManager(gpu_timeout=0.5)
        nvitop.take_snapshots(), gpustat.new_query()
        driver.hang("nvmlDeviceGetMemoryInfo_v2")
        driver.hang("nvmlDeviceGetMemoryInfo")
        assert not waiting(manager.check_gpu_availability, 2).is_alive()
        theirs = [waiting(look, 2) for look in (nvitop.take_snapshots, gpustat.new_query)]
        assert [t.is_alive() for t in theirs] == [True, True]
        driver.recover()
        for t in theirs: t.join(10)


def test_lost():
    with SimulatedDriver([SimulatedGpu("first"), SimulatedGpu("second")]) as driver:
        for call in ("nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetMemoryInfo"):
            driver.fail(call, pynvml.NVML_ERROR_GPU_IS_LOST, gpu=0)
        mine = ResourceManager().check_gpu_availability()
        assert [d.status for d in mine.devices] == [ResourceStatus.UNAVAILABLE, ResourceStatus.AVAILABLE]
        theirs = nvitop.take_snapshots().devices
        assert str(theirs[0].memory_total) == "N/A" and theirs[1].memory_total > 0
        query = gpustat.new_query()
        assert "??" in str(query.gpus[0]) and query.gpus[1].memory_total == 24576


def test_reserve():
    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager()
        with manager.reserve(20_000): assert manager.check_gpu_availability().status is ResourceStatus.APP_BUSY
    for module in (nvitop, gpustat):
        assert not [name for name in dir(module) if "reserv" in name.lower()]  # codespell:ignore reserv
