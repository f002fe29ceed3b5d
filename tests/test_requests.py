"What is checked and asked for: which device, with what arguments, and what is said where it cannot be given"
import asyncio
import os
import threading

import pytest
from conftest import GONE, MIB

from cjm_fasthtml_resources.core import checks, devices, leases, ram, requests
from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
from cjm_fasthtml_resources.core.devices import env_by_index, visible_env
from cjm_fasthtml_resources.core.gpu import GpuDevice, read_gpus
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.memory import HostMemory
from cjm_fasthtml_resources.core.resident import ResidentProcess
from cjm_fasthtml_resources.core.resources import OwnedProcess, ResourceStatus
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedMachine, SimulatedProcess


def test_what_a_check_says_where_something_is_missing(monkeypatch):
    manager = ResourceManager(40.0, track_self=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,7")
    unknown = "no unique device matches '7'. As in CUDA, '7' and everything after it are ignored"
    with SimulatedDriver([SimulatedGpu(), SimulatedGpu()]):
        found = manager.check_gpu_availability()
        assert [d.device.index for d in found.devices] == [1]
        assert found.notes == (f"CUDA_VISIBLE_DEVICES='1,7': {unknown}",)
        assert manager.reserve(1, 0, timeout=0).index == 1 and found.threshold_percent == 40.0
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        found = manager.check_gpu_availability()
        assert found.reason == f"CUDA_VISIBLE_DEVICES='7': {unknown}" and found.notes == ()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with SimulatedDriver([SimulatedGpu(mig=[])]):
        assert manager.check_gpu_availability().reason == "MIG is enabled, but no MIG instance exists"
    with SimulatedDriver([]):
        assert manager.check_gpu_availability().reason == "the NVIDIA driver lists no GPU"


def test_a_check_says_what_it_estimates():
    manager = ResourceManager(40.0, track_self=False)
    drawing = SimulatedGpu(processes=[SimulatedProcess(GONE, 900, "graphics")])
    with SimulatedDriver([drawing, SimulatedGpu(memory_used_mb=900)], SimulatedMachine(pid_namespace=True)):
        manager.register_worker(5_000_007, "llm", gpu_memory_mb=1_000)
        found = manager.check_gpu_availability()
        assert found.devices[0].processes == (OwnedProcess(GONE, "unknown", 900*MIB, kind="graphics"),)
        assert [d.app_memory//MIB for d in found.devices] == [900, 100]
        assert len(found.notes) == 1
        assert found.notes[0].startswith("Estimate: the driver names processes by the host's PIDs")
    without_figure = SimulatedProcess(GONE, None, "graphics")
    with SimulatedDriver([SimulatedGpu(memory_used_mb=900, processes=[without_figure])]):
        found = manager.check_gpu_availability()
        assert found.devices[0].processes[0].kind == "graphics"
        assert found.notes[0].startswith("Estimate: the driver reports no memory")


def test_any_device_is_meant_by_no_number_and_an_unknown_word_is_refused():
    assert ResourceBusy("x").retryable and ResourceBusy("x").suggested_action is None
    with SimulatedDriver([SimulatedGpu()]):
        found = read_gpus().devices
        for name in ("cuda", "gpu", "auto", None): assert devices.select_devices(found, name) == list(found)
        for name in ("", "tpu", "CUDA-1"):
            with pytest.raises(ValueError): devices.select_devices(found, name)


def test_ram_is_judged_by_its_threshold_and_of_a_control_group_its_own(monkeypatch):
    manager = ResourceManager()
    group = "/sys/fs/cgroup/x"
    monkeypatch.setattr(checks, "read_memory", lambda: HostMemory(100, 60, group))
    held = {os.getpid(): 40, 1: 20, os.getppid(): 10}
    monkeypatch.setattr(ram, "list_resident", lambda reader: [ResidentProcess(*item) for item in held.items()])
    monkeypatch.setattr(ram, "cgroup_pids", lambda cgroup: {group: {1}}[cgroup])
    found = manager.check_memory_availability(60)
    assert found.status is ResourceStatus.APP_BUSY and found.threshold_percent == 60
    assert [p.pid for p in found.memory.processes] == [os.getpid(), 1]
    assert manager.check_memory_availability(61).status is ResourceStatus.AVAILABLE
    assert manager.check_memory_availability().threshold_percent == 90
    with pytest.raises(ValueError, match="^threshold_percent must be between 0 and 100, not 101$"):
        manager.check_memory_availability(101)


def test_the_devices_with_the_most_room_come_first():
    sizes = (1_000, 3_000, 2_000)
    with SimulatedDriver([SimulatedGpu(memory_total_mb=total, memory_reserved_mb=0) for total in sizes]):
        manager = ResourceManager()
        assert [d.index for d in manager.pick_gpus(3).devices] == [1, 2, 0]
        free = [d.room/2**20 for d in manager.check_gpu_availability().devices]
        assert [d.index for d in manager.pick_gpus(2, min_free_mb=free[2]).devices] == [1, 2]   # exactly what it has
        too_few = (r"^Requested 2 GPUs with 2,001 MiB free on each\. Enough is free on 1 of the 3 GPUs\. "
                   r"GPU 2 has 2,000 MiB free\.$")
        with pytest.raises(ResourceBusy, match=too_few) as busy: manager.pick_gpus(2, min_free_mb=free[2] + 1)
        assert len(busy.value.conflict.devices) == 3
        assert not busy.value.retryable            # the two smaller GPUs will never have so much
        with pytest.raises(ResourceUnavailable, match=r"^Requested 4 GPUs; 3 can be used$") as too_many:
            manager.pick_gpus(4)
        assert len(too_many.value.conflict.devices) == 3
    outsider = SimulatedProcess(GONE, 900)
    with SimulatedDriver([SimulatedGpu(memory_total_mb=1_000, memory_reserved_mb=0, processes=[outsider])]):
        who = rf"^No GPU has 500 MiB free \(checked: 1\)\. GPU 0 has 100 MiB free. In .*PID {GONE}, 900"
        with pytest.raises(ResourceBusy, match=who) as busy: ResourceManager().pick_gpus(1, min_free_mb=500)
        assert busy.value.retryable
    with SimulatedDriver([SimulatedGpu(memory_total_mb=1_000, processes=[SimulatedProcess(GONE, 1_000)])]):
        assert ResourceManager().pick_gpus().devices[0].index == 0   # without a figure a full one is one
    none = "^Requested 1 GPU; none can be used: the NVIDIA driver lists no GPU$"
    with SimulatedDriver([]), pytest.raises(ResourceUnavailable, match=none): ResourceManager().pick_gpus()


def test_a_child_sees_the_devices_by_uuid_and_where_there_is_none_by_number():
    gpus = [GpuDevice(0, "GPU-a"), GpuDevice(3, "GPU-b")]
    assert visible_env(gpus) == {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}
    by_number = {"CUDA_VISIBLE_DEVICES": "0,3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert visible_env([gpus[0], GpuDevice(3)]) == env_by_index(gpus) == by_number   # CUDA reads all in one form


@pytest.mark.parametrize("args, error, words", [
    (dict(gpu_memory_mb=0), ValueError, "gpu_memory_mb must be 1 or more, not 0"),
    (dict(gpu_memory_mb="8"), TypeError, "gpu_memory_mb must be a number, not '8': it counts MiB"),
    (dict(timeout=-1), ValueError, f"timeout must be between 0 and {threading.TIMEOUT_MAX:g}, not -1"),
    (dict(timeout=True), TypeError, "timeout must be a number, not True"),
    (dict(ttl=0), ValueError, "ttl must be 0.001 or more, not 0"),
    (dict(pid=GONE), ValueError, f"pid must be that of a living process, not {GONE}"),
    (dict(pid=True), TypeError, "pid must be a positive int, not True"),
    (dict(device=2), ValueError, "device 2 is not visible to this process. Visible: GPU-a, GPU-b"),
    (dict(device=True), TypeError, "device must be a number, 'cuda:1', a UUID, a GpuDevice or None, not True"),
    (dict(device="GPU-c"), ValueError, "device 'GPU-c' is not visible to this process. Visible: GPU-a, GPU-b"),
    (dict(gpu_memory_mb=1_001), ValueError,
     "gpu_memory_mb must be at most 1000 MiB, the capacity of the largest device, not 1001"),
    (dict(gpu_memory_mb=901, device=1), ValueError,
     "gpu_memory_mb must be at most 900 MiB, the capacity of the largest device, not 901"),
])
def test_a_bad_request_names_its_argument_and_enters_no_queue(args, error, words):
    gpus = [
        SimulatedGpu(uuid="GPU-a", memory_total_mb=1_000),
        SimulatedGpu(uuid="GPU-b", memory_total_mb=1_000, memory_reserved_mb=100),
    ]
    with SimulatedDriver(gpus):
        manager = ResourceManager()
        with pytest.raises(error) as raised: manager.reserve(**{"gpu_memory_mb": 1, **args})
        assert str(raised.value) == words and manager.get_claims() == []


def test_exactly_as_much_as_a_device_has_may_be_asked_for():
    gpus = [SimulatedGpu(uuid="GPU-a", memory_total_mb=1_000), SimulatedGpu(uuid="GPU-b", memory_total_mb=900)]
    with SimulatedDriver(gpus):
        manager = ResourceManager()
        with manager.reserve(1_000) as whole, manager.reserve(1, ttl=0.001):
            assert (whole.uuid, whole.index, whole.gpu_memory_mb) == ("GPU-a", 0, 1_000)
        for name in (1, "1", "cuda:1", "GPU:1", "GPU-b", read_gpus().devices[1]):
            with manager.reserve(1, name) as held:
                assert held.uuid == "GPU-b" and held.env == {"CUDA_VISIBLE_DEVICES": "GPU-b"}


def different(**second):
    return [SimulatedGpu(name="One", uuid="GPU-a", memory_total_mb=1_000, memory_used_mb=900),
            SimulatedGpu(name="Other", uuid="GPU-b", memory_total_mb=9_000, **second)]


def test_a_number_that_can_mean_another_gpu_is_answered_for_the_worse_one(monkeypatch):
    manager = ResourceManager(track_self=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with SimulatedDriver(different()):
        found = manager.check_gpu_availability()
        assert (found.status, found.devices[0].device.uuid) == (ResourceStatus.EXTERNAL_BUSY, "GPU-a")
        assert found.notes[0].startswith("CUDA_VISIBLE_DEVICES='1' can mean GPU 0 (One) or GPU 1 (Other)")
        monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        found = manager.check_gpu_availability()
        assert (found.status, found.devices[0].device.uuid, found.notes) == (ResourceStatus.AVAILABLE, "GPU-b", ())
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    with SimulatedDriver(different(memory_used_mb=8_000)):   # more is free than on the other, and it is as busy
        assert manager.check_gpu_availability().devices[0].device.uuid == "GPU-a"


def test_a_position_that_can_mean_another_gpu_is_refused_in_words(monkeypatch):
    manager = ResourceManager(track_self=False)
    with SimulatedDriver(different()):
        with pytest.raises(ValueError, match="device .cuda:1. can mean GPU 0 \\(One\\) or"):
            manager.reserve(10, "cuda:1")
        assert manager.get_claims() == []
        with manager.reserve(10, "GPU-b") as held: assert held.device.notes == ()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")   # a single one, which can be either
        with pytest.raises(ValueError, match="device 0 can mean GPU 0 \\(One\\) or GPU 1 \\(Other\\)"):
            manager.reserve(10, 0)
        with manager.reserve(10) as held, pytest.raises(LookupError, match="cuda:0 can mean GPU 0 \\(One\\) or GPU 1"):
            print(held.ordinal)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        with manager.reserve(10, "cuda:1") as held: assert held.device.notes == ()


def test_a_child_can_be_given_each_mig_instance_and_no_two():
    parts = [SimulatedGpu(memory_total_mb=5_000, uuid="MIG-a", processes=[SimulatedProcess(GONE, 4_000)]),
             SimulatedGpu(memory_total_mb=9_000, uuid="MIG-b")]
    with SimulatedDriver([SimulatedGpu(mig=parts)]) as driver:
        manager = ResourceManager(track_self=False)
        assert [d.device.uuid for d in manager.check_gpu_availability().devices] == ["MIG-a"]
        assert manager.pick_gpus().env == {"CUDA_VISIBLE_DEVICES": "MIG-b"}
        assert manager.free_gpu(8_000) == []
        with manager.reserve(7_500, timeout=0) as held:
            assert held.env == {"CUDA_VISIBLE_DEVICES": "MIG-b"}
            with pytest.raises(LookupError, match="MIG instance 0:1 has no number"): print(held.env_by_index)
            with pytest.raises(ResourceBusy, match="GPU 0:1 has"): manager.reserve(8_000, timeout=0)
        for name in ("MIG-b", "0:1"):
            with manager.reserve(1, name) as held: assert held.uuid == "MIG-b"
        with pytest.raises(ValueError, match="Visible: MIG-a; for a child process also MIG-b$"): manager.reserve(1, 1)
        one = "^Requested 2 GPUs; 1 can be used: a process can use one MIG instance, and then only that$"
        with pytest.raises(ResourceUnavailable, match=one): manager.pick_gpus(2)
        driver.gpus += [SimulatedGpu(uuid="GPU-c"), SimulatedGpu(uuid="GPU-d")]
        assert {d.uuid for d in manager.pick_gpus(2).devices} == {"GPU-c", "GPU-d"}
        by_number = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        with manager.reserve(1, "GPU-c") as held: assert held.env_by_index == by_number


def test_a_device_that_cannot_be_used_is_named_with_its_reason():
    with SimulatedDriver([SimulatedGpu(), SimulatedGpu()]) as driver:
        manager = ResourceManager()
        driver.fail("nvmlDeviceGetMemoryInfo_v2", 15, gpu=1)
        with pytest.raises(ResourceUnavailable) as raised: manager.reserve(1, 1)
        lost = "the GPU is lost (it fell off the bus) and needs a reset or a reboot"
        assert str(raised.value) == f"The device 1 cannot be used: {lost}."
        assert len(raised.value.conflict.devices) == 2
        driver.fail("nvmlDeviceGetMemoryInfo_v2", 15)
        with pytest.raises(ResourceUnavailable) as raised: manager.reserve(1)
        assert str(raised.value) == raised.value.conflict.message
        assert str(raised.value).startswith("No GPU can be used: ")


def test_who_gives_up_says_who_was_in_the_way_where_it_asked(capfd, monkeypatch):
    outsider = SimulatedProcess(GONE, 9*1024)
    gpus = [SimulatedGpu(memory_total_mb=10*1024, processes=[outsider]), SimulatedGpu(memory_total_mb=10*1024)]
    short = "The job needs 2.0 GiB. GPU 0 has 1.0 GiB free"
    with SimulatedDriver(gpus):
        manager = ResourceManager()
        with pytest.raises(ResourceBusy) as busy: manager.reserve(2*1024, 0, timeout=0.2)
        assert str(busy.value) == \
            f"{short}. In use there: a process without a name (PID {GONE}, 9.0 GiB). Gave up after 0.2 s."
        assert len(busy.value.conflict.devices) == 2 and busy.value.retryable and manager.get_claims() == []
        assert manager.waits.read()[0][-1] == (float("inf"), 0)   # it was not granted, so it is not in the histogram
        with pytest.raises(ResourceBusy): manager.reserve(2*1024, 0, timeout=1.6, progress=True)
        who = f"In use there: a process without a name (PID {GONE}, 9.0 GiB)"
        assert capfd.readouterr().err == f"Waiting for GPU memory: {short}. {who}.\n"   # once, where no bar can be
        monkeypatch.setattr(requests, "_is_in_notebook", lambda: True)
        with pytest.raises(ResourceBusy): manager.reserve(2*1024, 0, timeout=0.7, progress=True)
    bar = capfd.readouterr().err
    assert "waiting for GPU memory: " in bar and f" 1.0 of 2.0 GiB free, 00:00, {short}" in bar, bar


def spy(monkeypatch, there, name) -> list:
    "The arguments of each call of a method or a module's function from now on: (args, kwargs)"
    real, calls = getattr(there, name), []

    def spied(*args, **kw):
        calls.append((args, kw))
        return real(*args, **kw)

    monkeypatch.setattr(there, name, spied)
    return calls


def test_waiting_passes_its_arguments_on(monkeypatch):
    with SimulatedDriver([SimulatedGpu(), SimulatedGpu()]):
        manager = ResourceManager()
        asked = spy(monkeypatch, manager, "reserve")
        assert manager.wait_for_gpu(1_000, 1, 5).devices[0].index == 1
        assert manager.wait_for_gpu(1_000, 0, progress=True).devices[0].index == 0
    assert asked == [((1_000, 1, 5), {"progress": False, "n": 1}), ((1_000, 0, None), {"progress": True, "n": 1})]


def test_reserving_without_blocking_passes_its_arguments_on_too(monkeypatch, spawn):
    child = spawn("input()").pid
    with SimulatedDriver([SimulatedGpu(), SimulatedGpu()]):
        manager = ResourceManager()
        progress = spy(monkeypatch, requests, "show_progress")
        def bars(): return [wanted for (_, _, wanted), _ in progress]

        async def main():
            async with manager.reserve_async(1_000, 1, ttl=50, pid=child) as held:
                claim, = manager.get_claims()
                assert held.index == 1 and held.holder.pid == child and claim.ttl == 50 and bars() == [False]
            async with manager.reserve_async(1_000, progress=True): assert bars() == [False, True]
            with pytest.raises(ResourceBusy, match="The job did not wait: timeout is 0"):
                async with manager.reserve_async(20_000, 0), manager.reserve_async(20_000, 0, 0): pass

        asyncio.run(main())


def test_waiting_without_blocking_passes_its_arguments_on_too(monkeypatch):
    with SimulatedDriver([SimulatedGpu(), SimulatedGpu()]):
        manager = ResourceManager()
        asked = spy(monkeypatch, manager, "reserve_async")

        async def main():
            assert (await manager.wait_for_gpu_async(1_000, 1, 5)).devices[0].index == 1
            assert (await manager.wait_for_gpu_async(1_000, 0, progress=True)).devices[0].index == 0

        asyncio.run(main())
    assert asked == [((1_000, 1, 5), {"progress": False, "n": 1}), ((1_000, 0, None), {"progress": True, "n": 1})]


def test_a_request_that_was_withdrawn_is_given_nothing_and_one_of_a_dead_process_says_so(spawn):
    process = spawn("input()")
    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager()
        gone = manager.request(1)
        gone.withdraw()
        assert gone.poll() is None and manager.get_claims() == []
        held = manager.reserve(20_000)
        assert manager.waits.read()[1] < 5
        waiting = manager.request(20_000, pid=process.pid)
        assert waiting.poll() is None and len(manager.get_claims()) == 2
        process.kill()
        process.wait()
        manager.reserve(1, timeout=0)   # any look drops what is over
        ended = f"^the process with PID {process.pid} ended before its request was granted$"
        with pytest.raises(ProcessLookupError, match=ended):
            for _ in range(100): waiting.poll()
        held.release()


@pytest.mark.parametrize("number", range(1, 6))
def test_a_request_that_another_thread_withdraws_while_it_enters_leaves_nothing(monkeypatch, tmp_path, number):
    "As a cancelled task does: before each lock of its lease and of its mark"
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path/"state"))
    lock_byte, asking, locked, threads = leases.lock_byte, threading.get_ident(), [], []

    def lock(*args):
        if threading.get_ident() == asking:
            locked.append(args)
            if len(locked) == number:
                threads.append(threading.Thread(target=request.withdraw))
                threads[0].start()
                threads[0].join(0.2)   # it waits until the lease is taken
        return lock_byte(*args)

    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
        manager = ResourceManager(app="a", track_self=False)
        manager.reserve(1, timeout=0).release()
        request = manager.request(20_000, timeout=0)
        monkeypatch.setattr(leases, "lock_byte", lock)
        request.poll()
        monkeypatch.setattr(leases, "lock_byte", lock_byte)
        threads[0].join()
        assert manager.get_claims() == [] and request.lease not in manager.ledger.leases.held
        with ResourceManager(app="b", track_self=False).reserve(20_000, timeout=0): pass
