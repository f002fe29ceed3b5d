"""Readings that lack something, times reservations that exist: what is promised and used never adds up to more than a
device has, room never grows, and when the fault is gone a reservation that fits is granted"""
import os
import threading
import time
from dataclasses import dataclass

import pynvml
import pytest
from conftest import GIB, GONE, newer_forms
from hypothesis import given, settings
from hypothesis import strategies as st

from cjm_fasthtml_resources.core.claims import Claim, DeviceUse, find_pools, grant
from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
from cjm_fasthtml_resources.core.gpu import GpuDevice, read_gpus, release_driver
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.process import ProcessId
from cjm_fasthtml_resources.core.resources import ResourceStatus
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedMachine, SimulatedProcess

MISSING, UNSUPPORTED, UNKNOWN, LOST = (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_NOT_SUPPORTED,
                                       pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_GPU_IS_LOST)
ERRORS = {  # one of each class: of the call, of the card, of the session, of the library, of the machine
    "not supported": UNSUPPORTED, "function not found": MISSING, "unknown": UNKNOWN, "lost": LOST,
    "invalid argument": pynvml.NVML_ERROR_INVALID_ARGUMENT, "not found": pynvml.NVML_ERROR_NOT_FOUND,
    "no permission": pynvml.NVML_ERROR_NO_PERMISSION, "insufficient size": pynvml.NVML_ERROR_INSUFFICIENT_SIZE,
    "timeout": pynvml.NVML_ERROR_TIMEOUT, "uninitialized": pynvml.NVML_ERROR_UNINITIALIZED,
    "version": pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH, "mismatch": pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH}
KINDS = ("Compute", "Graphics", "MPSCompute")
NEWER = ("nvmlDeviceGetMemoryInfo_v2", *(f"nvmlDeviceGet{kind}RunningProcesses_v3" for kind in KINDS))
LISTS = [f"nvmlDeviceGet{kind}RunningProcesses{form}" for kind in KINDS for form in ("", "_v2", "_v3")]
OUTSIDER = 1   # the machine's first process
REFUSED = (ResourceBusy, ResourceUnavailable)


WHOLE, INSTANCE = "GPU-a", "MIG-a"   # UUIDs: a process that sees an instance sees no whole GPU, which has no place then


@dataclass
class Scene:
    """A whole GPU of 24 GiB and an instance of 10 GiB. Another program uses 8 and 3 of them; the worker has 1 GiB on
    the whole one, and was then promised 8 and 4; this process has 2 on the whole one. So 5 and 3 are left"""
    driver: SimulatedDriver
    manager: ResourceManager
    worker: int   # PID
    room = {0: 5, "1:0": 3}

    def place(self, part: float, mine: int = 2, mine_on_instance: int = 0) -> None:
        "Let the worker use a part of what it was promised, and this process so many GiB"
        whole, instance = self.driver.gpus[0], self.driver.gpus[1].mig[0]
        whole.processes = [SimulatedProcess(OUTSIDER, 8*1024), SimulatedProcess(self.worker, (1 + 8*part)*1024),
                           SimulatedProcess(os.getpid(), mine*1024)]
        instance.processes = [SimulatedProcess(OUTSIDER, 3*1024), SimulatedProcess(self.worker, 4*part*1024),
                              SimulatedProcess(os.getpid(), mine_on_instance*1024)]

    def rooms(self) -> dict[int | str, float]:
        "GiB of each device that a check says can be used"
        found = self.manager.check_gpu_availability().allowed
        return {d.device.id: d.room/GIB for d in found if d.status is not ResourceStatus.UNAVAILABLE}

    def never_grows(self, taken: dict[int | str, float] | None = None) -> None:
        "No device that can be used has more room than there is; a divided GPU is none"
        for device, room in self.rooms().items(): assert room <= self.room[device] - (taken or {}).get(device, 0)


@pytest.fixture
def scene(spawn, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    instance = SimulatedGpu(memory_total_mb=10*1024, uuid=INSTANCE)
    gpus = [SimulatedGpu(memory_total_mb=24*1024, uuid=WHOLE), SimulatedGpu(memory_total_mb=12*1024, mig=[instance])]
    with SimulatedDriver(gpus) as driver:
        found = Scene(driver, ResourceManager(), spawn("input()").pid)
        found.place(0)
        found.manager.reserve(8*1024, WHOLE, pid=found.worker, timeout=0)
        found.manager.reserve(4*1024, INSTANCE, pid=found.worker, timeout=0)
        assert found.rooms() == found.room
        yield found


def calls_of_a_look() -> list[str]:
    "What a look calls: on a driver of today, and where that has only the older forms"
    made = set()
    for missing in ((), NEWER):
        with SimulatedDriver([SimulatedGpu(), SimulatedGpu(mig=[SimulatedGpu()])]) as driver:
            for call in missing: driver.fail(call, MISSING)
            read_gpus()
            made |= set(driver.calls)
    return sorted(made - {"nvmlErrorString"})


def try_while_it_fails(scene: Scene) -> None:
    "Ask for more than there is, which is refused, and for a little, which counts if it is given"
    scene.never_grows()
    with pytest.raises(REFUSED): scene.manager.reserve(6*1024, timeout=0)
    try: held = scene.manager.reserve(2*1024, timeout=0)
    except REFUSED: held = None
    taken = {held.device.id: 2} if held else {}
    scene.never_grows(taken)
    scene.driver.recover()
    scene.never_grows(taken)
    if held:
        # what this process had is none of its promise
        rest = (scene.room[held.device.id] - 1)*1024
        with pytest.raises(REFUSED): scene.manager.reserve(rest, held.device, timeout=0)
        held.release()


@pytest.mark.parametrize("call", calls_of_a_look())
@pytest.mark.parametrize("error", ERRORS)
def test_no_failed_call_makes_room_and_what_fits_is_granted_afterwards(scene, call, error):
    for part in (0, 0.5, 1):
        for times in (1, None):
            for first in (False, True):   # at the first look of a session, or after one
                scene.place(part)
                if first:
                    scene.driver.fail("nvmlDeviceGetCount_v2", LOST, times=1)
                    scene.rooms()
                for newer in newer_forms(call): scene.driver.fail(newer, MISSING)
                scene.driver.fail(call, ERRORS[error], times=times)
                try_while_it_fails(scene)
                assert scene.rooms() == scene.room, (part, times, first)
                with scene.manager.reserve(5*1024, timeout=0) as held: assert held.index == 0


def silent(*processes): return [SimulatedProcess(p.pid, None) for p in processes]


def hide_outsider(scene): scene.driver.gpus[0].processes[:1] = silent(*scene.driver.gpus[0].processes[:1])
def hide_worker(scene): scene.driver.gpus[0].processes[1:2] = silent(*scene.driver.gpus[0].processes[1:2])
def hide_all(scene):
    for gpu in (scene.driver.gpus[0], *scene.driver.gpus[1].mig): gpu.processes = silent(*gpu.processes)
def add_a_stranger(scene): scene.driver.gpus[0].processes.append(SimulatedProcess(GONE, None))
def add_rubbish(scene): scene.driver.gpus[0].processes += [SimulatedProcess(0, 1), SimulatedProcess(2**32 - 1, 2**43)]
def too_much_of_the_worker(scene): scene.driver.gpus[0].processes[1].memory_mb = 2**43
def no_list_at_all(scene):
    for call in LISTS: scene.driver.fail(call, UNKNOWN)
def no_list_is_supported(scene):
    for call in LISTS: scene.driver.fail(call, UNSUPPORTED)
def no_count_can_be(scene):
    def boasts(handle, count, array):
        count._obj.value = 2**32 - 1
        return 0
    scene.driver.nvmlDeviceGetComputeRunningProcesses_v3 = boasts
def more_free_than_there_is(scene):
    listing = scene.driver.nvmlDeviceGetMemoryInfo_v2
    def generous(handle, ref):
        error = listing(handle, ref)
        ref._obj.free = ref._obj.total
        return error
    scene.driver.nvmlDeviceGetMemoryInfo_v2 = generous


DISTURBANCES = [hide_outsider, hide_worker, hide_all, add_a_stranger, add_rubbish, too_much_of_the_worker,
                no_list_at_all, no_list_is_supported, no_count_can_be, more_free_than_there_is]


@pytest.mark.parametrize("part", [0, 0.5, 1])
@pytest.mark.parametrize("disturb", DISTURBANCES)
def test_no_odd_list_or_figure_makes_room(scene, disturb, part):
    scene.place(part)
    whole, instance = scene.driver.gpus[0], scene.driver.gpus[1].mig[0]
    whole.memory_used_mb, instance.memory_used_mb = whole.used_mb, instance.used_mb   # whatever is listed
    disturb(scene)
    scene.never_grows()
    with pytest.raises(REFUSED): scene.manager.reserve(6*1024, timeout=0)
    for name in ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetMemoryInfo_v2"):
        vars(scene.driver).pop(name, None)
    scene.driver.recover()
    scene.place(part)
    whole.memory_used_mb = instance.memory_used_mb = None
    assert scene.rooms() == scene.room


@pytest.mark.parametrize("lists", [LISTS, LISTS[:3], LISTS[3:6]], ids=["all", "compute", "graphics"])
def test_a_promise_of_a_moment_without_lists_counts_nothing_that_was_there_before(scene, lists):
    "What this process used before it asked is none of its promise, although it was not seen when that was given"
    for call in lists: scene.driver.fail(call, UNKNOWN)
    held = scene.manager.reserve(2*1024, WHOLE, timeout=0)
    scene.driver.recover()
    scene.never_grows({0: 2})
    with pytest.raises(REFUSED): scene.manager.reserve(4*1024, WHOLE, timeout=0)
    scene.manager.reserve(1, WHOLE, timeout=0).release()       # a whole look, which writes down what is known now
    assert scene.rooms()[0] == 3
    scene.place(0, mine=4)   # it is used; the worker's GiB may be in the base, it is a child
    assert 1.99 < scene.rooms()[0] <= 3   # the MiB that was released can be in use, too
    held.release()
    scene.place(0)
    assert scene.rooms() == scene.room


def test_a_device_that_loses_its_list_stays_as_busy(scene):
    gpu = SimulatedGpu(memory_total_mb=10_000, processes=[SimulatedProcess(OUTSIDER, 6_000)])
    with SimulatedDriver([gpu]) as driver:
        manager = ResourceManager()
        for calls in (LISTS, LISTS[:3]):
            for error in (UNKNOWN, UNSUPPORTED, MISSING):
                for call in calls: driver.fail(call, error)
                found = manager.check_gpu_availability()
                assert found.status is ResourceStatus.EXTERNAL_BUSY and found.devices[0].room == 4_000*2**20
                assert found.estimated and "could not list every process" in found.notes[0]
                driver.recover()
        assert not manager.check_gpu_availability().estimated


def test_inside_a_container_a_promise_counts_in_full_until_it_is_released():
    gpu = SimulatedGpu(memory_total_mb=20_000, memory_used_mb=2_000)
    with SimulatedDriver([gpu], SimulatedMachine(pid_namespace=True)):
        manager = ResourceManager()
        def room(): return manager.check_gpu_availability().devices[0].room >> 20
        with manager.reserve(6_000, timeout=0):
            assert room() == 12_000
            gpu.memory_used_mb = 8_000      # it is used, or another program came: that cannot be told
            assert room() == 6_000
            with pytest.raises(ResourceBusy): manager.reserve(6_001, timeout=0)
        assert room() == 12_000


# The arithmetic

HOLDERS = [ProcessId(n, float(n)) for n in range(1, 4)]


@st.composite
def moments(draw):
    "A device with what each holder uses, and claims that were granted one after the other while they used less or more"
    total, claims = 200, []
    def use():
        rows = [((h,), draw(st.integers(0, 25))) for h in HOLDERS]
        used = sum(memory for _, memory in rows) + draw(st.integers(0, 10))
        device = GpuDevice(0, "GPU-0", memory_total=total, memory_used=used, memory_free=total - used)
        return DeviceUse(device, tuple(rows))
    for id in range(1, draw(st.integers(2, 6))):
        asked = Claim(id, draw(st.sampled_from(HOLDERS)), draw(st.integers(1, 40)), ("GPU-0",))
        claims = grant([*claims, asked], [use()])
    return use(), claims


def room(use, claims): return use.device.memory_free - sum(p.unused for p in find_pools(use, claims).values())


@given(moments(), st.sets(st.integers(0, 2)), st.integers(1, 200))
@settings(max_examples=400, deadline=None)
def test_a_look_that_lacks_processes_has_no_more_room_and_leaves_none_more_behind(moment, lacking, memory):
    whole, claims = moment
    seen = tuple(row for n, row in enumerate(whole.processes) if n not in lacking)
    for look in (DeviceUse(whole.device, seen, whole=False), DeviceUse(whole.device, None)):
        assert room(look, claims) <= room(whole, claims)
        after = grant(claims, [look])                                       # what waited may be given now
        again = grant([*after, Claim(99, HOLDERS[0], memory, ("GPU-0",))], [look])
        given_now = sum(c.memory for c, before in zip(again, [*claims, None], strict=True)
                        if c.device and (before is None or not before.device))
        assert room(whole, again) <= room(whole, grant(claims, [])) - given_now


def test_what_a_holder_took_beyond_its_promise_is_none_of_the_next_one():
    me, other = HOLDERS[:2]
    def use(mine):
        gpu = GpuDevice(0, "GPU-0", memory_total=30, memory_used=mine, memory_free=30 - mine)
        return DeviceUse(gpu, (((me,), mine),))
    first = grant([Claim(1, me, 10, ("GPU-0",))], [use(0)])
    second = grant([*first, Claim(2, me, 10, ("GPU-0",))], [use(15)])
    third = grant([*second, Claim(3, other, 6, ("GPU-0",))], [use(15)])
    assert [c.device for c in third] == ["GPU-0", "GPU-0", None]            # 15 are used and 10 promised, of 30


# Devices that change while a request waits

def full(uuid): return SimulatedGpu("i", 9_856, uuid=uuid, processes=[SimulatedProcess(OUTSIDER, 9_000)])
def free(uuid): return SimulatedGpu("i", 19_968, uuid=uuid)
def busy_gpu():
    return SimulatedGpu(memory_total_mb=24_576, uuid="GPU-busy", processes=[SimulatedProcess(OUTSIDER, 22_000)])
def divided(): return [SimulatedGpu(memory_total_mb=40_960, uuid="GPU-a", mig=[full("MIG-a"), full("MIG-b")])]
def redivide(driver): driver.gpus[0].mig[:] = [free("MIG-new-1"), free("MIG-new-2")]
def undivide(driver): driver.gpus[0].mig = None
def come_back(driver): driver.recover()
def plug_in(driver):
    driver.recover()
    driver.gpus.append(SimulatedGpu(uuid="GPU-new"))

def replace_it(driver): driver.gpus[:] = [SimulatedGpu(uuid="GPU-new")]


CHANGES = {
    "divided again": (divided, redivide, {"MIG-new-1", "MIG-new-2"}),
    "no longer divided": (divided, undivide, {"GPU-a"}),
    "a lost one is back": (lambda: [busy_gpu(), SimulatedGpu(uuid="GPU-lost")], come_back, {"GPU-lost"}),
    "another one": (lambda: [busy_gpu()], plug_in, {"GPU-new"}),
    "one for another": (lambda: [busy_gpu()], replace_it, {"GPU-new"}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("app", [None, "waiting"])
def test_requests_that_wait_are_served_by_what_there_is_by_then(folder, change, app):
    gpus, happen, expected = CHANGES[change]
    with SimulatedDriver(gpus()) as driver:
        driver.fail("nvmlDeviceGetMemoryInfo_v2", LOST, gpu=1)
        manager, granted = ResourceManager(app=app), []

        def wait(): granted.append(manager.reserve(8_000, timeout=10).uuid)

        threads = [threading.Thread(target=wait) for _ in range(2)]
        for t in threads: t.start()
        time.sleep(0.5)
        assert len(manager.get_claims()) == 2 and not granted
        happen(driver)
        for t in threads: t.join(5)
        assert len(granted) == 2 and set(granted) <= expected


def test_a_request_keeps_waiting_while_nothing_can_be_used_and_its_time_is_not_up():
    with SimulatedDriver([busy_gpu()]) as driver:
        manager = ResourceManager()
        waiting = manager.request(8_000, timeout=1)
        assert waiting.poll() is None
        driver.fail("nvmlDeviceGetUUID", UNKNOWN)                # no device can be used …
        for _ in range(4):
            time.sleep(0.15)
            assert waiting.poll() is None
        with pytest.raises(REFUSED): manager.reserve(1, timeout=5)   # … which only a new request is told at once
        time.sleep(0.5)
        with pytest.raises(ResourceBusy, match="reading its UUID failed.*Gave up after 1 s"): waiting.poll()
        waiting.withdraw()


def test_a_request_for_a_device_that_is_away_waits_for_that_one():
    gpus = [SimulatedGpu(uuid="GPU-a"), SimulatedGpu(uuid="GPU-b", processes=[SimulatedProcess(OUTSIDER, 20_000)])]
    with SimulatedDriver(gpus) as driver:
        waiting = ResourceManager().request(8_000, "GPU-b")
        assert waiting.poll() is None
        gone = driver.gpus.pop()
        for _ in range(2):
            time.sleep(0.3)
            assert waiting.poll() is None
        gone.processes = []
        driver.gpus.insert(0, gone)
        time.sleep(0.3)
        assert (waiting.poll() or waiting.wait()).uuid == "GPU-b"


@pytest.mark.parametrize("gpus", [
    [SimulatedGpu(memory_total_mb=24*1024)],
    [SimulatedGpu(memory_total_mb=24*1024), SimulatedGpu(memory_total_mb=4*1024)],
    [SimulatedGpu(memory_total_mb=40*1024, mig=[SimulatedGpu("NVIDIA A100 MIG 3g.20gb", 24*1024)])],
], ids=["one", "two", "instance"])
def test_a_promise_of_a_program_that_reads_no_uuid_counts_for_one_that_reads_no_address(folder, gpus):
    with SimulatedDriver(gpus) as driver:
        driver.fail("nvmlDeviceGetUUID", pynvml.NVML_ERROR_NOT_SUPPORTED)
        held = ResourceManager(app="a", track_self=False).reserve(20*1024, timeout=0)
        assert held.uuid is None
        driver.recover()
        release_driver()   # the next reading is another program's
        driver.fail("nvmlDeviceGetPciInfo_v3", pynvml.NVML_ERROR_UNKNOWN)
        with pytest.raises(REFUSED): ResourceManager(app="b", track_self=False).reserve(10*1024, timeout=0)
        held.release()
        with ResourceManager(app="b", track_self=False).reserve(10*1024, timeout=0) as other: assert other.uuid


def test_a_program_that_has_another_gpu_leaves_ended_promises_to_those_that_have_this_one(folder, spawn):
    gpus = [SimulatedGpu(memory_total_mb=8*1024, uuid="GPU-1"), SimulatedGpu(memory_total_mb=24*1024, uuid="GPU-0")]
    with SimulatedDriver(gpus) as driver:
        manager, child = ResourceManager(app="a", track_self=False), spawn("input()")
        def room() -> float: return manager.check_gpu_availability().allowed[1].room/GIB

        with manager.reserve(10*1024, "GPU-0", timeout=0), driver.allocate(10*1024, gpu=1):
            manager.reserve(4*1024, "GPU-0", timeout=0, pid=child.pid)
            assert room() == 10
            child.kill()
            child.wait()
            seen = driver.gpus.pop()   # as in a container without it
            with ResourceManager(app="b").reserve(100, timeout=0) as other: assert other.uuid == "GPU-1"
            driver.gpus.append(seen)
            assert room() == 14
            with manager.reserve(14*1024, "GPU-0", timeout=0): assert room() == 0
            assert 2 not in [c.id for c in manager.ledger.rows().claims]   # deleted by who has the GPU


@pytest.mark.parametrize("listed", [True, False], ids=["another", "none"])
def test_what_a_holder_used_before_the_driver_lists_it_is_none_of_its_promise(folder, listed):
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24*1024, memory_used_mb=10*1024)]) as driver:
        gpu = driver.gpus[0]
        gpu.processes = [SimulatedProcess(OUTSIDER, 2*1024)] if listed else []
        with ResourceManager(app="a").reserve(10*1024, timeout=0):
            gpu.processes = [SimulatedProcess(OUTSIDER, 2*1024), SimulatedProcess(os.getpid(), 8*1024)]
            with pytest.raises(ResourceBusy): ResourceManager(app="b").reserve(5*1024, timeout=0)
            with ResourceManager(app="b").reserve(4*1024, timeout=0) as other: assert other.index == 0
