"""Readings that are wrong or lack something: none of them makes room that is not there

Each case reserves memory, disturbs a reading, and asks for more than is left.
"""
import asyncio
import os
import time

import pytest

from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
from cjm_fasthtml_resources.core.gpu import release_driver
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.store import StoreError
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedMachine, SimulatedProcess

GIB = 1024   # MiB
NOT_SUPPORTED, NOT_FOUND, UNKNOWN, LOST = 3, 6, 999, 15
MEMORY = "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2"
ME = os.getpid()


def machine(*gpus): return SimulatedDriver(gpus, SimulatedMachine(memory_total_mb=120*GIB, memory_used_mb=20*GIB))
def spark(name="NVIDIA GB10", **more): return SimulatedGpu(name=name, unified=True, **more)
def room(manager): return [d.room >> 20 for d in manager.check_gpu_availability().allowed]
def instances(manager): return [d for d in manager.read().devices if d.mig_parent is not None]


def halves():
    "A GPU with two compute instances that share 10 GiB"
    return SimulatedGpu(memory_total_mb=40*GIB, mig=[SimulatedGpu(memory_total_mb=10*GIB, gpu_instance=1),
                        SimulatedGpu(memory_total_mb=10*GIB, gpu_instance=1)])


def refuses(manager, memory, **more):
    "Assert that so much cannot be reserved now"
    with pytest.raises((ResourceBusy, ResourceUnavailable)): manager.reserve(memory, timeout=0, **more)


def test_a_promise_counts_on_a_compute_instance_whose_partner_is_not_visible(monkeypatch):
    with machine(halves()):
        manager = ResourceManager(track_self=False)
        first, second = instances(manager)
        with manager.reserve(8*GIB, device=second, timeout=0):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", first.uuid)
            assert room(manager) == [2*GIB]
            with pytest.raises(ResourceBusy): manager.pick_gpus(1, 8*GIB)


@pytest.mark.parametrize("call, error, after", [
    ("nvmlDeviceGetUUID", UNKNOWN, 2), ("nvmlDeviceGetMigDeviceHandleByIndex", UNKNOWN, 1),
    ("nvmlDeviceGetMigDeviceHandleByIndex", NOT_FOUND, 1),
    ("nvmlDeviceGetGpuInstanceId", UNKNOWN, 1), ("nvmlDeviceGetMaxMigDeviceCount", UNKNOWN, 0)])
def test_the_promises_on_an_instance_that_cannot_be_read_count_on_the_others(call, error, after):
    with machine(halves()) as driver:
        manager = ResourceManager(track_self=False)
        first, second = instances(manager)
        with manager.reserve(8*GIB, device=second, timeout=0):
            driver.fail(call, error, after=after, times=1)
            assert max(room(manager), default=0) <= 2*GIB
            driver.recover()
            driver.fail(call, error, after=after, times=1)
            refuses(manager, 8*GIB)


def test_all_gpus_that_use_the_machines_memory_share_it():
    parts = [spark("NVIDIA Thor MIG 1g"), spark("NVIDIA Thor MIG 2g")]
    for gpus in ([spark(), spark()], [spark("NVIDIA Thor", mig=parts)]):
        with machine(*gpus):
            manager = ResourceManager(track_self=False)
            first, second = [d for d in manager.read().devices if not d.mig_mode]
            with manager.reserve(80*GIB, device=first, timeout=0):
                assert set(room(manager)) == {20*GIB}
                refuses(manager, 80*GIB, device=second)
            if len(gpus) > 1:
                with pytest.raises(ResourceBusy): manager.pick_gpus(2, 60*GIB)
                assert len(manager.pick_gpus(2, 50*GIB).devices) == 2
                with pytest.raises(ValueError, match="n must be at most 1, .*share it"): manager.reserve(10, n=2)


def test_what_a_process_uses_on_one_of_them_is_used_of_its_promise_on_another():
    gpus = [spark(), spark()]
    with machine(*gpus):
        manager = ResourceManager(track_self=False)
        with manager.reserve(40*GIB, device=0, timeout=0):
            gpus[1].processes = [SimulatedProcess(ME, 10*GIB)]
            use = manager.check_memory_availability()
            assert use.memory.promised >> 20 == 30*GIB


def test_a_promise_on_a_whole_gpu_counts_on_its_instances_once_it_is_divided():
    gpu = SimulatedGpu(memory_total_mb=24*GIB)
    with machine(gpu):
        manager = ResourceManager(track_self=False)
        with manager.reserve(9*GIB, timeout=0):
            gpu.mig = [SimulatedGpu(memory_total_mb=10*GIB)]
            assert room(manager) == [GIB]
            refuses(manager, 9*GIB)


def test_a_list_that_lacks_a_process_for_a_moment_lowers_no_base():
    gpu = SimulatedGpu(memory_total_mb=24*GIB, processes=[SimulatedProcess(ME, 5*GIB)])
    with machine(gpu):
        manager = ResourceManager(track_self=False)
        with manager.reserve(10*GIB, timeout=0):
            gpu.processes, gpu.memory_used_mb = [], 5*GIB
            with manager.reserve(100, timeout=0): pass
            gpu.processes, gpu.memory_used_mb = [SimulatedProcess(ME, 5*GIB)], None
            assert room(manager) == [9*GIB]


def test_an_empty_list_at_the_reservation_is_no_base():
    gpu = SimulatedGpu(memory_total_mb=24*GIB, memory_used_mb=5*GIB)
    with machine(gpu):
        manager = ResourceManager(track_self=False)
        with manager.reserve(10*GIB, timeout=0):
            gpu.processes, gpu.memory_used_mb = [SimulatedProcess(ME, 5*GIB)], None
            assert room(manager) == [9*GIB]
            refuses(manager, 13*GIB)


@pytest.mark.parametrize("kind", ["graphics", "compute+graphics"])
def test_a_figure_that_was_cut_is_no_base(kind):
    others = SimulatedProcess(1, 7*GIB, "graphics")
    mine = SimulatedProcess(ME, 5*GIB, kind)
    gpu = SimulatedGpu(memory_total_mb=24*GIB, memory_used_mb=6*GIB, processes=[mine, others])
    with machine(gpu):
        manager = ResourceManager(track_self=False)
        with manager.reserve(10*GIB, timeout=0):
            gpu.processes, gpu.memory_used_mb = [mine], 5*GIB + 512
            assert room(manager)[0] <= 24*GIB - 5*GIB - 512 - 10*GIB


def hang(driver): driver.hang("nvmlDeviceGetCount_v2")
def lose_count(driver): driver.fail("nvmlDeviceGetCount_v2", UNKNOWN)
def lose_uuid(driver): driver.fail("nvmlDeviceGetUUID", UNKNOWN)
def lose_handle(driver): driver.fail("nvmlDeviceGetHandleByIndex_v2", LOST)
def lose_mode(driver): driver.fail("nvmlDeviceGetAddressingMode", UNKNOWN)
def lose_memory(driver): driver.fail("nvmlDeviceGetMemoryInfo", UNKNOWN)
def lose_nothing(driver): pass


@pytest.mark.parametrize("disturb", [hang, lose_count, lose_uuid, lose_handle, lose_mode, lose_memory, lose_nothing])
def test_a_program_that_never_read_a_gpu_of_unified_memory_counts_its_promises(disturb):
    with machine(spark("a GPU of 2027")) as driver:
        held = ResourceManager(app="a", track_self=False).reserve(80*GIB, timeout=0)
        disturb(driver)
        fresh = ResourceManager(app="b", track_self=False, gpu_timeout=0.5)
        assert fresh.check_memory_availability().memory.room >> 20 == 20*GIB
        with pytest.raises(ResourceBusy, match="of RAM"): fresh.reserve(memory_mb=50*GIB, timeout=0)
        fresh.reserve(memory_mb=10*GIB, timeout=0).release()
        driver.recover()
        held.release()


@pytest.mark.parametrize("disturb", [hang, lose_count, lose_uuid, lose_handle, lose_memory])
def test_a_promise_on_a_gpu_with_memory_of_its_own_takes_no_ram_while_that_gpu_is_lost(disturb):
    with machine(SimulatedGpu(memory_total_mb=90*GIB)) as driver:
        held = ResourceManager(app="a", track_self=False).reserve(80*GIB, timeout=0)
        disturb(driver)
        fresh = ResourceManager(app="b", track_self=False, gpu_timeout=0.5)
        assert fresh.check_memory_availability().memory.promised == 0
        fresh.reserve(memory_mb=50*GIB, timeout=0).release()
        driver.recover()
        held.release()


@pytest.mark.parametrize("disturb", [hang, lose_count, lose_uuid, lose_handle, lose_nothing])
@pytest.mark.parametrize("name", ["NVIDIA GB10", "a GPU of 2027"])
def test_what_a_gpu_of_unified_memory_has_promised_is_no_ram(name, disturb):
    with machine(spark(name)) as driver:
        manager = ResourceManager(track_self=False)
        with manager.reserve(80*GIB, timeout=0):
            manager.check_memory_availability()
            disturb(driver)
            if disturb is hang: manager.gpu_timeout = 0.5
            found = manager.check_memory_availability()
            assert found.memory.room >> 20 == 20*GIB and bool(found.notes) == (disturb is not lose_nothing)
            with pytest.raises(ResourceBusy):
                manager.job("a job", 0, needs=dict(ram_mb=50*GIB), timeout=0).__enter__()
            driver.recover()


def test_reservations_that_cannot_be_read_leave_no_ram(monkeypatch):
    for gpu in (spark(), SimulatedGpu()):
        with machine(gpu):
            manager = ResourceManager(track_self=False)
            def fail(*args): raise StoreError("it is damaged")
            monkeypatch.setattr(manager.ledger, "read", fail)
            found = manager.check_memory_availability()
            assert found.memory.room == 0 and "it is damaged" in found.notes[0]


def test_a_check_of_ram_leaves_other_gpus_alone():
    with machine(SimulatedGpu()) as driver:
        manager = ResourceManager(track_self=False)
        manager.check_memory_availability()
        assert not driver.calls["nvmlDeviceGetCount_v2"]
        with manager.reserve(80, timeout=0):
            before = driver.calls["nvmlDeviceGetCount_v2"]
            for _ in range(3): assert not manager.check_memory_availability().memory.promised
            assert driver.calls["nvmlDeviceGetCount_v2"] == before


def grace(**more): return SimulatedGpu("NVIDIA GH200 480GB", memory_total_mb=96*GIB, memory_used_mb=90*GIB,
                                       addressing_mode="ATS", **more)


def test_a_gpu_that_is_known_to_have_memory_of_its_own_never_has_the_machines():
    with machine(grace()) as driver:
        for call in MEMORY: driver.fail(call, NOT_SUPPORTED)
        manager = ResourceManager(track_self=False)
        assert not any(d.unified for d in manager.read().devices)
        refuses(manager, 90*GIB)


def test_one_answer_out_of_two_is_enough_to_know_that():
    gpu = SimulatedGpu("a GPU of 2027", memory_total_mb=200*GIB, addressing_mode="ATS")
    for after in 0, 1:
        with machine(gpu) as driver:
            for call in MEMORY: driver.fail(call, NOT_SUPPORTED, after=after, times=1)
            assert not ResourceManager(track_self=False).read().devices[0].unified


def lose_session(driver, manager):
    driver.fail("nvmlDeviceGetMemoryInfo_v2", LOST, gpu=1, times=1)
    manager.read()
def let_go(driver, manager): assert release_driver()


@pytest.mark.parametrize("end", [lose_session, let_go])
def test_what_a_gpu_has_told_outlives_the_connection(end):
    gpu = SimulatedGpu(memory_total_mb=24*GIB, processes=[SimulatedProcess(ME, 5*GIB, "graphics")])
    with machine(gpu, SimulatedGpu(memory_total_mb=GIB)) as driver:
        manager = ResourceManager(track_self=False)
        with manager.reserve(10*GIB, device=0, timeout=0):
            end(driver, manager)
            driver.fail("nvmlDeviceGetGraphicsRunningProcesses_v3", NOT_SUPPORTED)
            with manager.reserve(100, device=0, timeout=0): pass
            driver.recover()
            assert room(manager)[0] == 9*GIB


def test_an_instance_that_does_not_say_what_it_is_part_of_is_asked_again():
    with machine(halves()) as driver:
        driver.fail("nvmlDeviceGetGpuInstanceId", NOT_SUPPORTED, after=1, times=1)
        manager = ResourceManager(track_self=False)
        assert instances(manager)[1].memory_total is None
        first, second = instances(manager)
        with manager.reserve(8*GIB, device=second, timeout=0): refuses(manager, 8*GIB, device=first)


def test_a_divided_gpu_that_seems_to_know_no_mig_stays_divided():
    with machine(SimulatedGpu(memory_total_mb=40*GIB, mig=[SimulatedGpu(memory_total_mb=20*GIB)])) as driver:
        manager = ResourceManager(track_self=False)
        with manager.reserve(18*GIB, timeout=0):
            for call in ("nvmlDeviceGetMigMode", "nvmlDeviceGetMaxMigDeviceCount"): driver.fail(call, NOT_SUPPORTED)
            refuses(manager, 38*GIB)


def three_cards(): return [SimulatedGpu(name, 24*GIB) for name in ("A", "B", "C")]


@pytest.fixture
def bus_order(monkeypatch): monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def room_by_name(manager): return {d.device.name: d.room >> 20 for d in manager.check_gpu_availability().devices}


def test_a_promise_on_a_gpu_without_uuid_stays_on_it_when_another_one_goes(bus_order):
    with machine(*three_cards()) as driver:
        driver.fail("nvmlDeviceGetUUID", NOT_SUPPORTED)
        manager = ResourceManager(track_self=False)
        with manager.reserve(20*GIB, device=1, timeout=0):
            driver.gpus.pop(0)
            assert room_by_name(manager) == {"B": 4*GIB, "C": 24*GIB}
            refuses(manager, 20*GIB, device=manager.read().devices[0])


@pytest.mark.parametrize("before", [True, False])
def test_a_promise_stays_on_its_gpu_when_the_uuid_comes_or_goes(before, bus_order):
    with machine(*three_cards()) as driver:
        if before: driver.fail("nvmlDeviceGetUUID", NOT_SUPPORTED)
        manager = ResourceManager(track_self=False)
        with manager.reserve(20*GIB, device=1, timeout=0):
            if before: driver.recover()
            else: driver.fail("nvmlDeviceGetUUID", NOT_SUPPORTED)
            driver.gpus.reverse()
            found = room_by_name(manager)
            # without a UUID a promise under one can be on any GPU
            assert found == {"A": 24*GIB, "B": 4*GIB, "C": 24*GIB} if before else found["B"] == 4*GIB


def test_a_gpu_that_has_neither_uuid_nor_address_is_not_reservable():
    with machine(SimulatedGpu()) as driver:
        for call in ("nvmlDeviceGetUUID", "nvmlDeviceGetPciInfo_v3"): driver.fail(call, NOT_SUPPORTED)
        manager = ResourceManager(track_self=False)
        with pytest.raises(ResourceUnavailable, match="neither its UUID nor"): manager.reserve(10, timeout=0)
        driver.recover()
        driver.fail("nvmlDeviceGetPciInfo_v3", NOT_SUPPORTED)   # a UUID is enough
        manager.reserve(10, timeout=0).release()


def test_the_address_is_asked_for_once():
    with machine(*three_cards()) as driver:
        manager = ResourceManager(track_self=False)
        for _ in range(3): manager.check_gpu_availability()
        assert driver.calls["nvmlDeviceGetPciInfo_v3"] == 3
        driver.fail("nvmlDeviceGetPciInfo_v3", UNKNOWN)   # of no importance now
        assert manager.read().devices[0].pci == "0000:01:00.0"


@pytest.mark.parametrize("before, now", [(24, 24_000), (24, 48), (24, 23)])
def test_a_total_that_changes_makes_no_room(before, now):
    gpu = SimulatedGpu(memory_total_mb=before*GIB, memory_used_mb=20*GIB)
    with machine(gpu):
        manager = ResourceManager(track_self=False)
        manager.read()
        gpu.memory_total_mb = now*GIB
        found = manager.check_gpu_availability()
        assert room(manager)[0] <= 4*GIB and (found.notes or found.devices[0].reason)
        refuses(manager, 22*GIB)
        gpu.memory_total_mb = before*GIB
        assert room(manager) == [4*GIB] and not manager.check_gpu_availability().notes


def test_a_total_that_no_gpu_has_is_none():
    with machine(SimulatedGpu(memory_total_mb=2**43)):
        manager = ResourceManager(track_self=False)
        assert "more than any GPU has" in manager.check_gpu_availability().message
        refuses(manager, 10)


@pytest.mark.parametrize("progress", [False, True])
def test_a_driver_that_hangs_takes_no_more_than_the_callers_time(progress):
    with machine(SimulatedGpu()) as driver:
        manager, took = ResourceManager(track_self=False, gpu_timeout=60), []
        driver.hang("nvmlDeviceGetCount_v2")
        async def reserve(): await manager.reserve_async(10, timeout=0.4, progress=progress)
        for attempt in (lambda: manager.reserve(10, timeout=0.4, progress=progress), lambda: asyncio.run(reserve())):
            started = time.monotonic()
            with pytest.raises(ResourceUnavailable, match="did not respond"): attempt()
            took.append(time.monotonic() - started)
        assert max(took) < 5


def test_a_driver_that_begins_to_hang_while_a_request_waits_takes_no_more_than_its_time():
    with machine(SimulatedGpu(memory_total_mb=GIB, memory_used_mb=1000)) as driver:
        manager = ResourceManager(track_self=False, gpu_timeout=60)
        request = manager.request(500, timeout=1)
        assert request.poll() is None
        driver.hang("nvmlDeviceGetCount_v2")
        started = time.monotonic()
        with pytest.raises(ResourceBusy, match="GPU 0 has 24 MiB free"): request.wait()   # what it said last
        assert time.monotonic() - started < 5
