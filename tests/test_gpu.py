"Readings of odd drivers, from many threads, and beside other NVML programs; test_faults.py walks over calls and errors"
import asyncio
import os
import subprocess
import sys
import threading
import time

import pynvml
import pytest
from conftest import MIB
from hypothesis import given, settings
from hypothesis import strategies as st

from cjm_fasthtml_resources.core.conflict import ResourceUnavailable
from cjm_fasthtml_resources.core.devices import visible_devices
from cjm_fasthtml_resources.core.gpu import GpuSnapshot, read_gpus
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.core.nvml import GpuDevice, GpuProcess, in_words, merge_processes
from cjm_fasthtml_resources.core.resources import ResourceStatus
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

ERRORS = sorted({value for name, value in vars(pynvml).items()
                 if name.startswith("NVML_ERROR_") and isinstance(value, int)})
KINDS = ("Compute", "Graphics", "MPSCompute")
LISTS = [f"nvmlDeviceGet{kind}RunningProcesses_v3" for kind in KINDS]
OLDER_LISTS = [[f"nvmlDeviceGet{kind}RunningProcesses{form}" for form in ("_v2", "")] for kind in KINDS]
LOST = "the GPU is lost (it fell off the bus) and needs a reset or a reboot"


@pytest.mark.parametrize("error", ERRORS)
def test_a_device_that_fails_altogether_leaves_the_others(error):
    with SimulatedDriver([SimulatedGpu(), SimulatedGpu()]) as driver:
        driver.fail("*", error, gpu=1)
        good, bad = read_gpus().devices
        assert good.reason is None and bad.reason and bad.memory_total is None


@pytest.mark.parametrize("kind", range(3), ids=KINDS)
def test_the_process_list_is_whole_although_one_kind_is_not_supported(kind):
    gpu = SimulatedGpu(processes=[SimulatedProcess(4200001, 100), SimulatedProcess(4200002, 50, "graphics")])
    def read(error):
        for name in (LISTS[kind], *OLDER_LISTS[kind]): driver.fail(name, error)
        device = read_gpus().devices[0]
        driver.recover()
        return [p.pid for p in device.processes], device.processes_whole

    left = [[4200002], [4200001], [4200001, 4200002]][kind]
    for error in (3, 13, 2, 7, 999):
        with SimulatedDriver([gpu]) as driver: assert read(error) == (left, error in (3, 13) and kind != 0)
    with SimulatedDriver([gpu]) as driver:
        assert read_gpus().devices[0].processes_whole
        assert read(3) == (left, False)                       # it was there before


def test_an_older_driver_without_the_newer_calls():
    with SimulatedDriver([SimulatedGpu(memory_reserved_mb=100, processes=[SimulatedProcess(4200001, 100)])]) as driver:
        for name in ("nvmlDeviceGetMemoryInfo_v2", *LISTS): driver.fail(name, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        device = read_gpus().devices[0]
        assert (device.memory_used, device.memory_reserved) == (200*2**20, None)
        assert [p.pid for p in device.processes] == [4200001]


@pytest.mark.parametrize("error", sorted(set(ERRORS) - {0}))
def test_the_older_memory_call_is_asked_where_the_newer_one_fails_by_itself(error):
    "An error that only concerns a call costs nothing; one of the GPU or the driver is believed"
    of_the_driver = {1, 9, 10, 12, 15, 16, 17, 18}
    with SimulatedDriver([SimulatedGpu(memory_total_mb=1_000, memory_reserved_mb=100, memory_used_mb=200)]) as driver:
        driver.fail("nvmlDeviceGetMemoryInfo_v2", error)
        device = read_gpus().devices[0]
        assert (device.memory_used is None) == (error in of_the_driver) == bool(device.reason)
        if device.memory_used is None: return
        assert (device.memory_used, device.memory_free, device.memory_reserved) == (300*MIB, 700*MIB, None)
        driver.recover()
        driver.fail("nvmlDeviceGetMemoryInfo_v2", error, times=1)   # of the two readings, one by each call
        assert read_gpus().devices[0].memory_free == 700*MIB


@pytest.mark.parametrize("error", sorted(set(ERRORS) - {0, 3, 13}))
@pytest.mark.parametrize("gpu", [SimulatedGpu(uuid="GPU-a"), SimulatedGpu(mig=[SimulatedGpu(uuid="MIG-a")])])
def test_a_device_without_its_uuid_is_unavailable_and_never_called_otherwise(gpu, error):
    with SimulatedDriver([gpu, SimulatedGpu(uuid="GPU-b")]) as driver:
        whole = read_gpus().devices
        for times in (1, 2):
            driver.fail("nvmlDeviceGetUUID", error, times=times)
            found = read_gpus().devices
            missing = [d for d in found if d.memory_used is None]
            assert 1 <= len(missing) <= times and all(d.uuid is None and d.reason for d in missing)
            assert {d.uuid for d in found} - {None} <= {d.uuid for d in whole}
            assert read_gpus().devices == whole or times == 2
            driver.recover()


def test_nothing_is_carried_over_to_another_card():
    gpus = {name: SimulatedGpu(name, uuid=f"GPU-{name}", memory_used_mb=used)
            for used, name in enumerate("abcd", 1)}
    with SimulatedDriver([gpus["a"], gpus["b"]]) as driver:
        def seen(): return [(d.index, d.name, d.uuid, d.memory_used >> 20) for d in read_gpus().devices]
        for order in ("ab", "ba", "bca", "c", "ac", "", "dcba"):
            driver.gpus[:] = [gpus[name] for name in order]
            assert seen() == [(i, name, f"GPU-{name}", ord(name) - 96) for i, name in enumerate(order)]


def test_a_divided_gpu_is_never_taken_for_a_whole_one():
    "Not even if the driver says that it cannot be divided"
    with SimulatedDriver([SimulatedGpu(mig=[SimulatedGpu()])]) as driver:
        for error in (e for e in ERRORS if e):
            driver.fail("nvmlDeviceGetMigMode", error)
            device, = read_gpus().devices
            assert device.memory_used is None and device.reason
            driver.recover()
        for call in ("nvmlDeviceGetMigMode", "nvmlDeviceGetMaxMigDeviceCount"):   # a driver from before MIG
            driver.fail(call, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        assert read_gpus().devices[0].mig_mode is None


def test_a_whole_gpu_is_not_usable_beside_a_divided_one_that_does_not_answer(monkeypatch):
    "This process uses one instance and no other device, also while the mode of the GPU cannot be read"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with SimulatedDriver([SimulatedGpu(mig=[SimulatedGpu(memory_used_mb=24_000)]), SimulatedGpu()]) as driver:
        manager = ResourceManager(track_self=False)
        before = manager.check_gpu_availability()
        assert (before.status, [d.device.id for d in before.devices]) == (ResourceStatus.EXTERNAL_BUSY, ["0:0"])
        driver.fail("nvmlDeviceGetMigMode", pynvml.NVML_ERROR_UNKNOWN, gpu=0)
        assert [d.device.id for d in manager.check_gpu_availability().devices] == ["0:0"]
        driver.fail("nvmlDeviceGetMaxMigDeviceCount", pynvml.NVML_ERROR_UNKNOWN, gpu=0)
        unread = manager.check_gpu_availability()
        assert (unread.status, [d.device.id for d in unread.devices]) == (ResourceStatus.UNAVAILABLE, ["0:0"])


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
    odd = [SimulatedGpu(memory_total_mb=0), SimulatedGpu(memory_total_mb=100, memory_used_mb=5000),
           SimulatedGpu(name="n"*90),
           SimulatedGpu(processes=[SimulatedProcess(0, 10), SimulatedProcess(2**32 - 1, 10)])]
    with SimulatedDriver(odd) as driver:
        vars(driver.gpus[2])["name"] = b"\xff\xfe"   # no scenario may say so, a driver can
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
            "d = SimulatedDriver([SimulatedGpu()]); d.start(); d.hang('nvmlDeviceGetName')\n"
            "print(read_gpus(0.1).reason)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=10)
    assert (result.returncode, result.stderr) == (0, "") and "did not respond" in result.stdout


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


@pytest.mark.parametrize("peer, shown", [("gpustat", "300 100 300"),
                                         ("nvitop", "NVIDIA L4 700 580.105.08 (simulated)")])
def test_another_program_in_the_same_process_sees_the_same(peer, shown):
    pytest.importorskip(peer, reason=f"{peer} is a development dependency")
    code = "from cjm_fasthtml_resources.simulate import *" + PEERS[peer]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == shown, result.stderr


uuids = st.none() | st.text("GPU-MIGabc123", max_size=8)
devices = st.lists(st.builds(GpuDevice, st.integers(0, 20), uuid=uuids, mig_mode=st.none() | st.booleans()), max_size=5)


@given(devices, st.none() | st.text("0123456789,-GPUMIG abc", max_size=20) | st.text(max_size=10))
@settings(deadline=None, max_examples=500)
def test_any_value_of_cuda_visible_devices_is_understood_or_complained_about(found, value):
    visible, complaint = visible_devices(found, value)
    assert all(d in found and not d.mig_mode for d in visible)
    if value is not None and not visible and any(not d.mig_mode for d in found): assert complaint


@pytest.mark.parametrize("before, after", [(0, 5000), (5000, 0)])
def test_what_changes_hands_while_a_device_is_read_counts_as_used(monkeypatch, before, after):
    with SimulatedDriver([SimulatedGpu(memory_used_mb=before)]) as driver:
        listing = driver.nvmlDeviceGetComputeRunningProcesses_v3

        def changes(*args):
            driver.gpus[0].memory_used_mb = after
            return listing(*args)

        monkeypatch.setattr(driver, "nvmlDeviceGetComputeRunningProcesses_v3", changes)
        assert read_gpus().devices[0].memory_used == 5000*2**20


# The lists of processes

def on_device(count):
    return SimulatedGpu(memory_total_mb=2**20, processes=[SimulatedProcess(4_300_000 + i, i) for i in range(count)])


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 1_000])
def test_each_list_is_asked_for_once_and_a_longer_one_once_more(count):
    with SimulatedDriver([on_device(count), on_device(1)]) as driver:
        for again in (count > 128, 0):  # what was made larger stays
            driver.calls.clear()
            many, one = read_gpus().devices
            assert [(p.pid, p.memory_used) for p in many.processes] == [(4_300_000 + i, i*MIB) for i in range(count)]
            assert len(one.processes) == 1
            assert [driver.calls[name] for name in LISTS] == [2 + again, 2, 2]


@pytest.mark.parametrize("claimed", [0, 128, 129, 2**22, 2**22 + 1, 2**32 - 1])
def test_a_driver_that_never_has_room_gives_no_list(monkeypatch, claimed):
    asked = []

    def never(handle, count, array):
        asked.append(len(array))
        count._obj.value = claimed
        return pynvml.NVML_ERROR_INSUFFICIENT_SIZE

    with SimulatedDriver([on_device(3)]) as driver:
        for name in LISTS[:2]: monkeypatch.setattr(driver, name, never)
        device = read_gpus().devices[0]
    assert (device.processes, device.memory_used, device.reason) == ((), 3*MIB, None)  # the third list is empty
    larger = 128 < claimed <= 2**22
    assert asked[0] == 128 and max(asked) == (2*claimed if larger else 128) and len(asked) == (3 if larger else 2)


@pytest.mark.parametrize("lacking, found", [("_v3", {4_300_001}), ("_v2", {4_300_001}), ("", None)])
def test_a_library_that_lacks_a_version_of_the_lists_is_asked_for_the_other(lacking, found):
    class Library(SimulatedDriver):
        def __getattr__(self, name):
            if "RunningProcesses" in name and name.endswith(lacking): raise AttributeError(name)
            return super().__getattr__(name)

    with Library([SimulatedGpu(processes=[SimulatedProcess(4_300_001, 5)])]): device = read_gpus().devices[0]
    assert (device.processes and {p.pid for p in device.processes}) == found
    assert (device.memory_used, device.reason) == (5*MIB, None)


@pytest.mark.parametrize("one, other, kept", [(3, 5, 5), (5, 3, 5), (None, 5, 5), (3, None, 3), (None, None, None)])
def test_of_a_process_in_two_lists_the_larger_figure_counts(one, other, kept):
    merged = merge_processes({"compute": [(7, one)], "graphics": [(7, other)], "mps": None})
    assert merged == (GpuProcess(7, kept, "compute+graphics"),)


def test_a_kind_whose_name_is_part_of_anothers_is_a_kind_of_its_own():
    merged = merge_processes({"mps-compute": [(7, 1)], "compute": [(7, 1), (8, 2)]})
    assert merged == (GpuProcess(7, 1, "mps-compute+compute"), GpuProcess(8, 2, "compute"))


def test_a_list_that_cannot_have_been_written_is_none(monkeypatch):
    with SimulatedDriver([on_device(3)]) as driver:
        listing = driver.nvmlDeviceGetComputeRunningProcesses_v3

        def boasts(handle, count, array):
            error = listing(handle, count, array)
            count._obj.value = 2**32 - 1
            return error

        monkeypatch.setattr(driver, "nvmlDeviceGetComputeRunningProcesses_v3", boasts)
        device = read_gpus().devices[0]
        assert (device.processes, device.memory_used, device.reason) == ((), 3*MIB, None)


# What is read, whole, and what is said of what cannot be

def test_a_device_is_read_whole():
    gpu = SimulatedGpu(
        "NVIDIA L4", uuid="GPU-a", memory_total_mb=24_000, memory_reserved_mb=300,
        utilization=37, temperature=61, power_usage=51.25, power_limit=72,
        processes=[SimulatedProcess(4_300_002, 700), SimulatedProcess(4_300_001, 100, "graphics"),
                   SimulatedProcess(4_300_003, None, "mps")])
    with SimulatedDriver([gpu]): snapshot = read_gpus()
    processes = (GpuProcess(4_300_001, 100*MIB, "graphics"), GpuProcess(4_300_002, 700*MIB, "compute"),
                 GpuProcess(4_300_003, None, "mps"))
    device = GpuDevice(0, "GPU-a", "NVIDIA L4", 24_000*MIB, 800*MIB, 22_900*MIB, 300*MIB, 37, 61, 51.25, 72.0,
                       processes, compute_capability=(8, 9), cuda_cores=7424, max_clock=2040, pci="0000:01:00.0")
    assert snapshot == GpuSnapshot((device,), None, "580.105.08 (simulated)", snapshot.time)
    assert abs(snapshot.time - time.time()) < 5 and snapshot.simulated and not snapshot.late
    assert snapshot.pids == {4_300_001, 4_300_002, 4_300_003}
    assert GpuDevice(0, memory_total=10, memory_reserved=3).capacity == 7 and GpuDevice(0).capacity == 0
    named = [GpuDevice(2, host="a"), GpuDevice(1, mig_parent=2, host="a"), GpuDevice(1, mig_parent=2)]
    assert [d.id for d in named] == ["a:2", "a:2:1", "2:1"]


@pytest.mark.parametrize("code, words", [
    (1, "the connection to the NVIDIA driver was closed"),
    (3, "the device does not report its memory"),
    (4, "no permission to ask the NVIDIA driver (in a container: is the GPU passed in?)"),
    (9, "the NVIDIA driver is not loaded"),
    (12, "no NVIDIA driver (its library libnvidia-ml was not found)"),
    (15, LOST),
    (16, "the GPU needs a reset before it can be used again"),
    (17, "the operating system blocks the GPU (cgroup device rules?)"),
    (18, "the NVIDIA library and the loaded driver are of different versions, as after an upgrade; "
         "reboot, or reload the driver, and start this program again"),
    (999, "the NVIDIA driver answered: Unknown Error")])
def test_an_error_of_the_driver_is_said_in_words(code, words):
    with SimulatedDriver(): assert in_words(pynvml.NVMLError(code)) == words
    assert in_words(OSError("no such device")) == "the NVIDIA driver answered: no such device"
    assert in_words(ImportError("x")) == "the Python package nvidia-ml-py is not installed"


OF_CALL = {"nvmlDeviceGetUtilizationRates": "utilization", "nvmlDeviceGetTemperature": "temperature",
           "nvmlDeviceGetPowerUsage": "power_usage", "nvmlDeviceGetEnforcedPowerLimit": "power_limit",
           "nvmlDeviceGetUUID": "uuid", "nvmlDeviceGetName": "name"}


def test_what_a_driver_does_not_answer_is_none_and_the_rest_is_there():
    def read(*calls, code=3):
        with SimulatedDriver([SimulatedGpu(power_usage=50, processes=[SimulatedProcess(4_300_001, 100)])]) as driver:
            for call in calls: driver.fail(call, code)
            return read_gpus().devices[0]

    for call, field in OF_CALL.items():
        device = read(call)
        assert getattr(device, field) is None and device.memory_used == 100*MIB and device.reason is None
        assert device.processes and [name for name in OF_CALL.values() if getattr(device, name) is None] == [field]
    none = read(*LISTS, *sum(OLDER_LISTS, []))
    assert none.processes is None and none.memory_used == 100*MIB
    assert read("nvmlDeviceGetHandleByIndex_v2", code=15) == GpuDevice(0, reason=LOST)
    divided = read("nvmlDeviceGetMigMode", code=15)   # one that is divided must not be taken for a whole one
    assert divided.uuid and divided.memory_used is None and divided.reason == LOST


def test_a_driver_that_is_late_is_said_to_be():
    with SimulatedDriver([SimulatedGpu()]) as driver:
        driver.hang("nvmlDeviceGetTemperature")
        late = read_gpus(0.05)
        assert (late.reason, late.late, late.devices) == ("the NVIDIA driver did not respond within 0.05 s", True, ())
        driver.recover()
        assert len(read_gpus(5).devices) == 1


def test_what_is_wrong_with_cuda_visible_devices_is_named():
    two = (GpuDevice(0, "GPU-aa11"), GpuDevice(1))
    assert visible_devices(two, " ") == ((), "CUDA_VISIBLE_DEVICES is empty, so every device is hidden")
    complaint = ("CUDA_VISIBLE_DEVICES='1, 7,0': no unique device matches '7'. "
                 "As in CUDA, '7' and everything after it are ignored")
    assert visible_devices(two, "1, 7,0") == ((two[1],), complaint)
    assert visible_devices(two, "MIG-1")[0] == () and visible_devices(two, "XX")[0] == ()
    assert visible_devices(two, "GPU-")[0] == () and visible_devices(two, "GPU-a") == ((two[0],), None)


def test_instances_of_a_divided_gpu_are_read_with_their_names_and_those_that_are_not_there_are_skipped():
    mig = [SimulatedGpu("1g", memory_total_mb=5_000, uuid="MIG-1"),
           SimulatedGpu("2g", memory_total_mb=9_000, uuid="MIG-2")]
    with SimulatedDriver([SimulatedGpu("A100", uuid="GPU-a", mig=mig)]) as driver:
        whole, one, two = read_gpus().devices
        assert (whole.id, whole.mig_mode, whole.processes) == (0, True, None)
        assert [(d.id, d.uuid, d.name, d.memory_total, d.mig_parent, d.processes) for d in (one, two)] == [
            ("0:0", "MIG-1", "1g", 5_000*MIB, 0, ()), ("0:1", "MIG-2", "2g", 9_000*MIB, 0, ())]
        driver.fail("nvmlDeviceGetMigDeviceHandleByIndex", 6, times=1)   # NOT_FOUND: the first instance was destroyed
        assert [d.id for d in read_gpus().devices] == [0, "0:1"]
        driver.recover()
        driver.fail("nvmlDeviceGetMaxMigDeviceCount", 15)
        assert read_gpus().devices[1] == GpuDevice(0, mig_parent=0, reason=LOST)


def test_a_driver_that_starts_slowly_is_waited_for_as_long_as_there_is_time():
    manager = ResourceManager(gpu_timeout=0.1)
    with SimulatedDriver([SimulatedGpu()], habits=dict(start_delay=1.5)):
        assert manager.check_gpu_availability().is_late
        with pytest.raises(ResourceUnavailable, match="did not respond within 0.1 s. The job did not wait"):
            manager.reserve(1024, timeout=0)
        with pytest.raises(ResourceUnavailable, match="Gave up after 0.2 s"): manager.reserve(1024, timeout=0.2)
        assert manager.get_claims() == []
        with manager.reserve(1024, timeout=30) as held: assert held.index == 0
    with SimulatedDriver([SimulatedGpu()], habits=dict(start_delay=1.5)):
        async def wait():
            async with manager.reserve_async(1024, timeout=30) as held: return held.index

        assert asyncio.run(wait()) == 0


def test_a_sleeping_gpu_is_woken_by_a_reservation_and_not_by_looking():
    gpus = [SimulatedGpu("NVIDIA RTX 500 Ada Laptop GPU", asleep=True)]
    with SimulatedDriver(gpus) as driver:
        manager = ResourceManager()
        monitor = ResourceMonitor(manager)
        for _ in range(3): assert monitor.take().gpu.devices[0].device.asleep
        assert "asleep" in manager.check_gpu_availability().message and not driver.calls
        with manager.reserve(1024, timeout=0): assert not gpus[0].asleep
        for wake in (manager.pick_gpus, lambda: manager.free_gpu(1), lambda: manager.wait_for_gpu(1),
                     lambda: manager.check_gpu_availability(wake=True)):
            gpus[0].asleep = True
            wake()
            assert not gpus[0].asleep


def test_a_sleeping_gpu_beside_one_that_is_awake():
    gpus = [SimulatedGpu("first"), SimulatedGpu("second"), SimulatedGpu("third")]
    with SimulatedDriver(gpus) as driver:
        assert [d.asleep for d in read_gpus().devices] == [False]*3
        gpus[1].asleep = True
        for _ in range(2):
            found = read_gpus().devices
            assert [(d.index, d.name, d.asleep) for d in found] == [(0, "first", False), (1, "second", True),
                                                                    (2, "third", False)]
        assert found[1].uuid and found[1].memory_total is None and gpus[1].asleep
        assert driver.calls["nvmlInitWithFlags"] == 1          # no new session for a device that sleeps


def test_what_a_driver_writes_over_the_end_of_a_list_is_not_lost():
    processes = [SimulatedProcess(4200001 + n, n) for n in range(128)]
    with SimulatedDriver([SimulatedGpu(processes=processes)], habits=dict(process_size=32)):
        assert [(p.pid, p.memory_used >> 20) for p in read_gpus().devices[0].processes] == [
            (4200001 + n, n) for n in range(128)]


def test_an_older_pynvml_is_enough():
    gpu = SimulatedGpu(memory_reserved_mb=100, processes=[SimulatedProcess(4200001, 100)])
    with SimulatedDriver([gpu], habits=dict(old_pynvml=True)):
        device = read_gpus().devices[0]
    assert (device.memory_used >> 20, device.memory_reserved, device.processes[0].pid) == (200, None, 4200001)
