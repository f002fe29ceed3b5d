"Readings of odd drivers, from many threads, and beside other NVML programs; test_faults.py walks over calls and errors"
import os, subprocess, sys, threading, time

import pynvml, pytest
from hypothesis import given, settings, strategies as st

from cjm_fasthtml_resources.core.gpu import GpuDevice, read_gpus, visible_devices
from cjm_fasthtml_resources.core.manager import ResourceManager, ResourceStatus
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

ERRORS = sorted({value for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_") and isinstance(value, int)})


@pytest.mark.parametrize("error", ERRORS)
def test_a_device_that_fails_altogether_leaves_the_others(error):
    with SimulatedDriver([SimulatedGpu(), SimulatedGpu()]) as driver:
        driver.fail("*", error, gpu=1)
        good, bad = read_gpus().devices
        assert good.reason is None and bad.reason and bad.memory_total is None


def test_the_process_list_is_whole_although_one_kind_fails():
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(4200001, 100), SimulatedProcess(4200002, 50, "graphics")])]) as driver:
        for version in ("_v2", "_v3"): driver.fail("nvmlDeviceGetGraphicsRunningProcesses" + version, pynvml.NVML_ERROR_NOT_SUPPORTED)
        assert [p.pid for p in read_gpus().devices[0].processes] == [4200001]


def test_an_older_driver_without_the_newer_calls():
    with SimulatedDriver([SimulatedGpu(memory_reserved_mb=100, processes=[SimulatedProcess(4200001, 100)])]) as driver:
        for name in ("nvmlDeviceGetMemoryInfo_v2", *(f"nvmlDeviceGet{kind}RunningProcesses_v3" for kind in ("Compute", "Graphics", "MPSCompute"))):
            driver.fail(name, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        device = read_gpus().devices[0]
        assert (device.memory_used, device.memory_reserved, [p.pid for p in device.processes]) == (200*2**20, None, [4200001])


def test_what_a_caller_gets_was_read_after_it_asked():
    with SimulatedDriver([SimulatedGpu(memory_used_mb=0)]) as driver:
        driver.delay("nvmlDeviceGetUtilizationRates", 0.05)  # after the memory was read
        stale, wrong = threading.Event(), []

        def ask():
            while not stale.is_set():
                used = driver.gpus[0].memory_used_mb
                if read_gpus().devices[0].memory_used < used*2**20: wrong.append(used)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for t in threads: t.start()
        for n in range(1, 60):
            driver.gpus[0].memory_used_mb = n
            time.sleep(0.01)
        stale.set()
        for t in threads: t.join()
        assert not wrong
        assert driver.calls["nvmlDeviceGetCount_v2"] < 40  # callers share readings


def test_the_number_of_devices_changes():
    with SimulatedDriver([SimulatedGpu(name=f"GPU {i}") for i in range(4)]) as driver:
        assert len(read_gpus().devices) == 4
        del driver.gpus[1]
        assert len(read_gpus().devices) == 3
        driver.gpus.append(SimulatedGpu())
        assert len(read_gpus().devices) == 4


def test_impossible_values_are_survived():
    odd = [SimulatedGpu(memory_total_mb=0), SimulatedGpu(memory_total_mb=100, memory_used_mb=5000), SimulatedGpu(name="n"*90),
           SimulatedGpu(processes=[SimulatedProcess(0, 10), SimulatedProcess(2**32 - 1, 10)])]
    with SimulatedDriver(odd) as driver:
        driver.gpus[2].name = b"\xff\xfe"
        found = ResourceManager().check_gpu_availability()
        assert found.devices[0].status is ResourceStatus.UNAVAILABLE
        assert found.devices[1].status is ResourceStatus.EXTERNAL_BUSY
        assert found.devices[2].device.name is None
        assert isinstance(found.message, str)


def test_after_a_fork_in_the_middle_of_a_reading_the_child_reads():
    with SimulatedDriver([SimulatedGpu()]) as driver:
        driver.delay("nvmlDeviceGetUtilizationRates", 0.3)
        reading = threading.Thread(target=read_gpus)
        reading.start()
        time.sleep(0.1)
        if (child := os.fork()) == 0: os._exit(len(read_gpus().devices))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        reading.join()


def test_the_interpreter_ends_although_the_driver_hangs():
    code = ("from cjm_fasthtml_resources.simulate import *; from cjm_fasthtml_resources.core.gpu import read_gpus\n"
            "d = SimulatedDriver([SimulatedGpu()]); d.__enter__(); d.hang('nvmlDeviceGetName'); print(read_gpus(0.1).reason)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=10)
    assert (result.returncode, result.stderr) == (0, "") and "did not answer" in result.stdout


PEERS = {  # each replaces or wraps something of pynvml when it is imported
    "gpustat": """
import gpustat
from cjm_fasthtml_resources.core.gpu import read_gpus
with SimulatedDriver([SimulatedGpu(memory_reserved_mb=100, memory_used_mb=300)]):
    device = read_gpus().devices[0]
    print(device.memory_used >> 20, device.memory_reserved >> 20, gpustat.new_query().gpus[0].memory_used)""",
    "nvitop": """
import atexit, os, nvitop
atexit.unregister(nvitop.libnvml.nvmlShutdown)
with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(os.getpid(), 700)])]):
    found = nvitop.take_snapshots()
    print(found.devices[0].name, found.gpu_processes[0].gpu_memory >> 20, nvitop.Device.driver_version())"""}


@pytest.mark.parametrize("peer, shown", [("gpustat", "300 100 300"), ("nvitop", "NVIDIA L4 700 580.105.08 (simulated)")])
def test_another_program_in_the_same_process_sees_the_same(peer, shown):
    pytest.importorskip(peer, reason=f"{peer} is a development dependency")
    result = subprocess.run([sys.executable, "-c", "from cjm_fasthtml_resources.simulate import *" + PEERS[peer]], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == shown, result.stderr


devices = st.lists(st.builds(GpuDevice, st.integers(0, 20), uuid=st.none() | st.text("GPU-MIGabc123", max_size=8), mig_mode=st.none() | st.booleans()), max_size=5)


@given(devices, st.none() | st.text("0123456789,-GPUMIG abc", max_size=20) | st.text(max_size=10))
@settings(deadline=None, max_examples=500)
def test_any_value_of_cuda_visible_devices_is_understood_or_complained_about(found, value):
    visible, complaint = visible_devices(found, value)
    assert all(d in found and not d.mig_mode for d in visible)
    if value is not None and not visible and any(not d.mig_mode for d in found): assert complaint


@pytest.mark.parametrize("before, after", [(0, 5000), (5000, 0)])
def test_what_changes_hands_while_a_device_is_read_counts_as_used(monkeypatch, before, after):
    with SimulatedDriver([SimulatedGpu(memory_used_mb=before)]) as driver:
        listing = pynvml.nvmlDeviceGetComputeRunningProcesses_v3

        def changes(handle):
            driver.gpus[0].memory_used_mb = after
            return listing(handle)

        monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses_v3", changes)
        assert read_gpus().devices[0].memory_used == 5000*2**20
