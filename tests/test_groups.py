"Reservations of several devices at once: all or none, never more than there is, and nobody waits for ever"
import asyncio
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cjm_fasthtml_resources import cli
from cjm_fasthtml_resources.core import ledger as ledgers
from cjm_fasthtml_resources.core.claims import Claim, DeviceUse, find_pools, grant
from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
from cjm_fasthtml_resources.core.gpu import GpuDevice
from cjm_fasthtml_resources.core.leases import new_lease
from cjm_fasthtml_resources.core.ledger import Ledger, Rows, from_bytes, to_bytes
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.process import ProcessId, this_process
from cjm_fasthtml_resources.core.store import Store
from cjm_fasthtml_resources.core.topology import Links
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

KEYS = ("GPU-0", "GPU-1", "GPU-2", "GPU-3")
MORE = 20 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 1
holders = st.integers(1, 3).map(lambda n: ProcessId(n, float(n)))

# The arithmetic


@st.composite
def situations(draw):
    "Devices in use, and claims of which some are promised, as they can come about"
    uses = []
    for number in range(draw(st.integers(1, 4))):
        processes = draw(st.lists(st.tuples(holders.map(lambda h: (h,)), st.integers(0, 30)), max_size=3))
        used = min(sum(m for _, m in processes) + draw(st.integers(0, 30)), 200)
        gpu = GpuDevice(number, KEYS[number], memory_total=200, memory_used=used, memory_free=200 - used)
        uses.append(DeviceUse(gpu, tuple(processes) if draw(st.booleans()) else None))
    claims, id = [], 1
    for _ in range(draw(st.integers(0, 7))):
        count = draw(st.integers(1, 3))
        allowed = tuple(sorted(draw(st.sets(st.sampled_from(KEYS), min_size=1))))
        links = Links(KEYS, draw(st.text("012", min_size=6, max_size=6))) if count > 1 and draw(st.booleans()) else None
        claim = Claim(id, draw(holders), draw(st.integers(1, 120)), allowed, count=count, links=links)
        found = [c for c in grant([*claims, claim], uses, choose=min) if c.id >= id] if draw(st.booleans()) else [claim]
        claims, id = [*claims, *found], id + count
    return uses, claims


def members(claim, claims): return [c for c in claims if claim.id <= c.id < claim.id + claim.count]


@given(situations())
@settings(max_examples=500*MORE, deadline=None)
def test_a_group_gets_all_it_asks_for_or_nothing_and_nobody_who_fits_is_passed_over(situation):
    uses, claims = situation
    after = grant(claims, uses, choose=min)
    room = {u.key: u.device.memory_free - sum(p.unused for p in find_pools(u, after).values()) for u in uses}
    assert [c.id for c in after] == sorted(c.id for c in after)
    first, new = None, []
    for claim in claims:
        found = members(claim, after)
        if claim.device is not None: assert [(c.device, c.count) for c in found] == [(claim.device, 1)]
        elif found[0].device is None:
            assert found == [claim]                                  # the whole request waits
            first = first or claim
        else:
            places = [c.device for c in found]
            assert len(found) == claim.count == len(set(places)) and set(places) <= set(claim.allowed)
            assert all((c.memory, c.holder, c.count) == (claim.memory, claim.holder, 1) for c in found)
            assert all(room[key] >= 0 for key in places)
            new += found
    if first:   # it would not fit, even with what those behind it were given now
        later = {key: sum(c.memory for c in new if c.device == key and c.id > first.id) for key in room}
        assert sum(room[key] + later[key] >= first.memory for key in room if key in first.allowed) < first.count


@given(situations())
@settings(max_examples=200*MORE, deadline=None)
def test_what_is_written_is_read_and_a_program_without_groups_changes_none(situation):
    uses, claims = situation
    rows = Rows(tuple(claims), 3, KEYS, 40)
    data = to_bytes(rows)
    assert from_bytes(data) == rows
    with pytest.MonkeyPatch.context() as patched:   # a program of the version before: it reads thirteen values
        patched.setattr(ledgers, "_to_claim",
                        lambda id, holder, memory, allowed, *others: Claim(id, ProcessId(*holder), memory,
                                                                           tuple(allowed), *others))
        seen = from_bytes(data)
        after = to_bytes(seen._replace(claims=tuple(grant(seen.claims, uses, choose=min))))
    back = from_bytes(after).claims
    assert [c for c in back if c.count > 1] == [c for c in claims if c.count > 1]   # they wait as before
    assert {c.id for c in back} == {c.id for c in claims}
    def promised(claims, key): return sum(c.memory for c in claims if c.device == key)
    for use in uses:
        before, now = promised(claims, use.key), promised(back, use.key)
        assert now == before or now <= 200   # what is promised to a group counts for it as well


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), min_size=12, max_size=60), st.integers(50, 100),
       st.integers(2, 3))
@settings(max_examples=150*MORE, deadline=None)
def test_a_group_is_not_starved_by_small_ones(small, large, count):
    "Small ones come without end on three devices and hold for two rounds each; the group is served soon"
    me, claims, born, id = ProcessId(1, 1.0), [], {}, 1
    uses = [DeviceUse(GpuDevice(n, key, memory_total=100, memory_used=0, memory_free=100), ())
            for n, key in enumerate(KEYS[:3])]
    asked = None
    for turn, (size, wanted) in enumerate(small):
        if turn == 2: asked, size, wanted = id, large, count
        claims.append(Claim(id, me, size, KEYS[:3], count=wanted))
        id += wanted
        claims = grant([c for c in claims if turn - born.get(c.id, turn) < 2], uses)
        for c in claims:
            if c.device: born.setdefault(c.id, turn)
    assert asked in born and born[asked] <= 6


# The ledger

class Groups(RuleBasedStateMachine):
    """Requests for one or more devices, beside a plain model: what is promised never exceeds a device, a group is
    whole, and with nothing promised the first that fits is served"""
    @initialize(sizes=st.lists(st.integers(50, 100), min_size=2, max_size=4))
    def begin(self, sizes):
        self.sizes, self.ledger, self.asked = sizes, Ledger(Store()), {}
        self.keys, self.used = KEYS[:len(sizes)], [0]*len(sizes)

    def look(self):
        return [DeviceUse(GpuDevice(n, key, memory_total=size, memory_used=used, memory_free=size - used), ())
                for n, (key, size, used) in enumerate(zip(self.keys, self.sizes, self.used, strict=True))]

    @rule(memory=st.integers(1, 100), count=st.integers(1, 4), skip=st.integers(0, 3))
    def ask(self, memory, count, skip):
        lease = new_lease()
        claim = Claim(0, this_process(), memory, self.keys[min(skip, len(self.keys) - 1):], lease=lease, count=count)
        self.asked[lease] = (memory, count, claim.allowed)
        self.ledger.settle(self.look, lambda: claim)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def release(self, data):
        lease = self.any_of_them(data)
        del self.asked[lease]
        self.ledger.withdraw(lease)

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), seconds=st.sampled_from([0, 60, None]))
    def renew(self, data, seconds):
        lease = self.any_of_them(data)
        if not any(c.device for c in self.ledger.find_all(lease)): return
        assert self.ledger.renew(lease, seconds)
        if seconds == 0:
            del self.asked[lease]
            self.ledger.settle(self.look)
            self.ledger.withdraw(lease)

    @rule(place=st.integers(0, 3), memory=st.integers(0, 60))
    def use(self, place, memory):
        "Another program takes what is neither used nor promised, and frees it again"
        place = min(place, len(self.keys) - 1)
        self.used[place] = 0
        self.used[place] = max(min(memory, self.sizes[place] - self.promised()[place]), 0)

    @rule()
    def settle(self): self.ledger.settle(self.look)

    @rule()
    def forget(self):
        "The process ends, with all that it asked for"
        for lease in self.asked: self.ledger.leases.drop(lease)
        self.asked.clear()

    def any_of_them(self, data):   # by its place: the lease itself is another one in each run
        return list(self.asked)[data.draw(st.integers(0, len(self.asked) - 1))]

    def promised(self):
        return [sum(c.memory for c in self.ledger.claims() if c.device == key) for key in self.keys]

    @invariant()
    def never_more_than_there_is(self):
        if not hasattr(self, "sizes"): return
        sums = zip(self.promised(), self.used, self.sizes, strict=True)
        assert all(promised + used <= size for promised, used, size in sums)

    @invariant()
    def each_group_is_whole(self):
        if not hasattr(self, "sizes"): return
        rows = {lease: [c for c in self.ledger.claims() if c.lease == lease] for lease in self.asked}
        assert sum(map(len, rows.values())) == len(self.ledger.claims())
        for lease, found in rows.items():
            memory, count, allowed = self.asked[lease]
            assert all(c.memory == memory for c in found)
            if found[0].device is None: assert [c.count for c in found] == [count]
            else: assert len({c.device for c in found} & set(allowed)) == len(found) == count

    def teardown(self):
        "When all that is promised was released, nobody is left who fits"
        if not hasattr(self, "sizes"): return
        for _ in range(len(self.asked) + 1):
            for lease in [c.lease for c in self.ledger.claims() if c.device]:
                self.ledger.withdraw(lease)
                self.asked.pop(lease, None)
            self.ledger.settle(self.look)
        for memory, count, allowed in self.asked.values():
            free = [size - used for key, size, used in zip(self.keys, self.sizes, self.used, strict=True)
                    if key in allowed]
            assert sum(room >= memory for room in free) < count


TestGroups = Groups.TestCase
TestGroups.settings = settings(max_examples=60*MORE, stateful_step_count=30, deadline=None)


# The manager

@pytest.mark.parametrize("app", [None, "groups"])
def test_threads_that_ask_for_some_of_three_devices_all_get_them(folder, app):
    "Two that hold one device each and want the other would wait for ever"
    manager, errors = ResourceManager(app=app), []
    driver = SimulatedDriver([SimulatedGpu(memory_total_mb=10_000) for _ in range(3)])

    def work(count):
        try:
            for _ in range(4):
                with manager.reserve(6_000, timeout=60, n=count) as held:
                    assert len({d.index for d in held.devices}) == count
                    allocations = [driver.allocate(6_000, d.index) for d in held.devices]
                    for one in allocations: one.__enter__()
                    time.sleep(0.002)
                    for one in allocations: one.__exit__(None, None, None)
        except BaseException as error: errors.append(error)

    with driver:
        threads = [threading.Thread(target=work, args=(1 + number % 3,)) for number in range(12)]
        for t in threads: t.start()
        for t in threads: t.join()
    assert not errors and manager.get_claims() == []


def eight(**fields): return [SimulatedGpu(memory_total_mb=10_000, numa_node=n//4, nvlink=n//2) for n in range(8)]


def test_close_devices_are_preferred_among_those_that_are_equally_free():
    with SimulatedDriver(eight()) as driver:
        manager = ResourceManager()
        def places(count):
            with manager.reserve(1_000, timeout=0, n=count) as held: return [d.index for d in held.devices]
        pairs = {tuple(places(2)) for _ in range(40)}
        assert pairs <= {(0, 1), (2, 3), (4, 5), (6, 7)} and len(pairs) > 1
        assert {tuple(places(4)) for _ in range(20)} == {(0, 1, 2, 3), (4, 5, 6, 7)}
        for index in (0, 3, 4, 6, 7): driver.gpus[index].memory_used_mb = 5_000
        assert places(2) == [1, 2]                           # on one node, and not 5
        assert places(3) == [1, 2, 5] and places(8) == list(range(8))


def test_only_a_request_for_some_of_several_asks_how_close_they_are():
    with SimulatedDriver(eight()[:3]) as driver:
        manager = ResourceManager()
        def asked(): return driver.calls["nvmlDeviceGetP2PStatus"]
        manager.check_gpu_availability()
        for count in (1, 3):
            with manager.reserve(1_000, n=count): assert not asked()
        with manager.reserve(1_000, n=2): assert asked() == 3
        with manager.reserve(1_000, n=2): assert asked() == 3   # it never changes
        driver.gpus[0].uuid = "GPU-another"
        driver.hang("nvmlDeviceGetTopologyCommonAncestor")
        manager.gpu_timeout = 0.2
        with manager.reserve(1_000, n=2, timeout=0) as held: assert len(held.devices) == 2   # it costs the preference
        with pytest.raises(ResourceUnavailable): manager.reserve(1_000, n=2, timeout=0)      # the driver still hangs
        driver.recover()
        manager.gpu_timeout = 5
        with manager.reserve(1_000, n=2, timeout=5) as held: assert len(held.devices) == 2


def test_devices_are_named_in_the_order_of_cuda(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0,1")
    with SimulatedDriver([SimulatedGpu(uuid=f"GPU-{n}") for n in "abc"]):
        manager = ResourceManager()
        with manager.reserve(1_000, n=3) as held:
            assert held.env == {"CUDA_VISIBLE_DEVICES": "GPU-c,GPU-a,GPU-b"} and held.uuid == "GPU-c"
            assert held.env_by_index == {"CUDA_VISIBLE_DEVICES": "2,0,1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            assert [d.uuid for d in held.devices] == ["GPU-c", "GPU-a", "GPU-b"]
        assert manager.wait_for_gpu(1_000, n=3).env == {"CUDA_VISIBLE_DEVICES": "GPU-c,GPU-a,GPU-b"}
        found = asyncio.run(manager.wait_for_gpu_async(1_000, n=2))
        assert len(found.devices) == 2 and manager.get_claims() == []
        async def hold():
            async with manager.reserve_async(1_000, n=2) as held: return len(held.devices), len(manager.get_claims())
        assert asyncio.run(hold()) == (2, 2) and manager.get_claims() == []


@pytest.mark.parametrize("asked, error, words", [
    (dict(n=3), ValueError, "n must be at most 2, the number of GPUs of this machine, not 3"),
    (dict(n=0), ValueError, "n must be a positive int, not 0"),
    (dict(n=2.0), TypeError, "n must be a positive int, not 2.0"),
    (dict(n=2, device=1), ValueError, "device must be None with n=2, not 1: it names one device"),
    (dict(n=2, gpu_memory_mb=950), ValueError,
     "gpu_memory_mb must be at most 900 MiB, the capacity of each of the 2 largest devices, not 950"),
])
def test_a_bad_request_names_its_argument(asked, error, words):
    gpus = [SimulatedGpu(memory_total_mb=1_000), SimulatedGpu(memory_total_mb=1_000, memory_reserved_mb=100)]
    with SimulatedDriver(gpus):
        manager = ResourceManager()
        with pytest.raises(error) as raised: manager.reserve(**{"gpu_memory_mb": 1, **asked})
        assert str(raised.value) == words and manager.get_claims() == []


def test_too_few_that_can_be_used_are_named_with_the_reason(monkeypatch):
    parts = [SimulatedGpu(memory_total_mb=5_000, uuid=f"MIG-{n}") for n in "ab"]
    with SimulatedDriver([SimulatedGpu(mig=parts, memory_total_mb=10_000), SimulatedGpu(uuid="GPU-b")]):
        few = "^Requested 2 GPUs; 1 can be used: a process can use one MIG instance, and then only that$"
        with pytest.raises(ResourceUnavailable, match=few): ResourceManager().reserve(1_000, n=2)
    with SimulatedDriver([SimulatedGpu(uuid=f"GPU-{n}") for n in "abc"]) as driver:
        manager = ResourceManager()
        driver.fail("nvmlDeviceGetMemoryInfo_v2", 15, gpu=2)
        with pytest.raises(ResourceUnavailable, match="Requested 3 GPUs; 2 can be used: GPU 2 is lost"):
            manager.reserve(1_000, n=3)
        driver.recover()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        with pytest.raises(ResourceUnavailable, match="1 can be used: CUDA_VISIBLE_DEVICES is '0'") as raised:
            manager.reserve(1_000, n=2)
        assert raised.value.conflict is not None
    with SimulatedDriver([]), pytest.raises(ResourceUnavailable, match="No GPU can be used"):
        ResourceManager().reserve(1_000, n=2)


def test_a_group_waits_as_a_whole_and_says_for_what():
    with SimulatedDriver([SimulatedGpu(memory_total_mb=10_000) for _ in range(3)]):
        manager = ResourceManager()
        first, second = manager.reserve(8_000), manager.reserve(8_000)
        waiting = manager.request(5_000, n=2)
        assert waiting.poll() is None and [(c.device, c.count) for c in manager.get_claims()][2:] == [(None, 2)]
        with pytest.raises(ResourceBusy) as busy: manager.reserve(5_000, n=2, timeout=0.1)
        assert str(busy.value).startswith("The job needs 4.9 GiB on each of 2 GPUs. Enough is free on 1 of the 3 GPUs.")
        with pytest.raises(ResourceBusy): manager.reserve(5_000, first.index, timeout=0)
        first.release()
        held = waiting.wait()
        assert {d.index for d in held.devices} == {0, 1, 2} - {second.index}
        for one in (held, second): assert one.release()
        assert manager.get_claims() == []


def test_a_lost_device_of_a_group_frees_nothing_of_the_others():
    with SimulatedDriver([SimulatedGpu(memory_total_mb=10_000) for _ in range(2)]) as driver:
        manager = ResourceManager()
        with manager.reserve(8_000, n=2):
            driver.fail("nvmlDeviceGetMemoryInfo_v2", 15, gpu=1)
            with pytest.raises(ResourceBusy): manager.reserve(5_000, timeout=0.3)
            assert [c.device is None for c in manager.get_claims()] == [False, False]
            driver.recover()
            for place in (0, 1):
                with pytest.raises(ResourceBusy): manager.reserve(5_000, place, timeout=0)
        waiting = manager.request(5_000, n=2)
        with manager.reserve(8_000, 0):
            assert waiting.poll() is None
            driver.fail("nvmlDeviceGetMemoryInfo_v2", 15, gpu=1)
            assert manager.reserve(1_000, 0, timeout=5).release()    # what never fits blocks nobody
        time.sleep(0.3)
        assert waiting.poll() is None
        driver.recover()
        assert len(waiting.wait().devices) == 2


def test_a_group_for_another_process_ends_with_it_on_all_devices(folder, spawn):
    child = spawn("input()")
    with SimulatedDriver([SimulatedGpu(memory_total_mb=10_000) for _ in range(2)]):
        manager = ResourceManager(app="groups")
        manager.reserve(8_000, n=2, pid=child.pid)
        assert [c.holder.pid for c in manager.get_claims()] == [child.pid]*2
        with pytest.raises(ResourceBusy): manager.reserve(5_000, timeout=0)
        child.kill()
        child.wait()
        assert manager.get_claims() == [] and manager.reserve(8_000, n=2, timeout=0).release()


def test_a_reservation_of_several_runs_out_on_all_and_gives_back_what_a_full_disk_kept(folder):
    with SimulatedDriver([SimulatedGpu(memory_total_mb=10_000) for _ in range(2)]):
        manager = ResourceManager(app="groups")
        held = manager.reserve(8_000, n=2, ttl=0.05)
        assert len({c.expires for c in manager.get_claims()}) == 1
        time.sleep(0.06)
        assert manager.get_claims() == [] and manager.reserve(8_000, n=2, timeout=0).release() and not held.release()


class Unloads:
    "The plugin of a worker that unloads from its GPU"
    def __init__(self, gpu): self.gpu = gpu
    def release(self): self.gpu.processes.clear()


def test_room_is_made_on_as_many_devices_as_a_job_needs(spawn):
    from cjm_fasthtml_resources.simulate import SimulatedProcess
    gpus, manager = [SimulatedGpu(memory_total_mb=10_000) for _ in range(3)], ResourceManager()
    workers = [spawn("input()") for _ in gpus]
    for gpu, worker in zip(gpus, workers, strict=True): gpu.processes.append(SimulatedProcess(worker.pid, 8_000))
    with SimulatedDriver(gpus):
        for gpu, worker in zip(gpus, workers, strict=True):
            manager.register_worker(worker.pid, "llm", plugin_name="vllm", plugin_instance=Unloads(gpu))
        with manager.job("job", 5_000, n=2, make_room=True, timeout=5) as job:
            assert len(job.devices) == 2 and len(job.room_made.released) == 2
        assert sum(bool(gpu.processes) for gpu in gpus) == 1
        with pytest.raises(ResourceBusy, match="on each of 3 GPUs. Enough is free on 2 of the 3 GPUs"):
            manager.update_worker_state(next(w for w, g in zip(workers, gpus, strict=True) if g.processes).pid,
                                        status="busy")
            with manager.job("job", 5_000, n=3, make_room=True, timeout=0): pass


def test_a_job_of_several_learns_the_most_that_it_took_of_one():
    with SimulatedDriver([SimulatedGpu(memory_total_mb=10_000) for _ in range(2)]) as driver:
        manager = ResourceManager()
        with manager.job("job", 8_000, n=2, plugin="llm", resource="70b") as job:
            child = subprocess.Popen(["sleep", "60"])
            job.watch(child.pid)
            used = driver.gpus[0].processes, driver.gpus[1].processes
            from cjm_fasthtml_resources.simulate import SimulatedProcess
            for processes, memory in zip(used, (3_000, 5_000), strict=True):
                processes.append(SimulatedProcess(child.pid, memory))
            manager.job_looks.look(False)
            assert job.usage.level.highest == 5_000*2**20
        for processes in used: processes.clear()
        child.kill()
        child.wait()
        assert manager.expected_need("llm", "70b", devices=2).gpu_memory_mb == pytest.approx(5_500)
        need = manager.expected_need("llm", "70b")
        assert need is None or need.gpu_memory_mb >= 8_000   # of a worker on one device


def test_what_a_process_used_before_it_was_handed_a_group_is_told_for_each_device(spawn):
    from cjm_fasthtml_resources.simulate import SimulatedProcess
    child = spawn("input()")
    gpus = [SimulatedGpu(memory_total_mb=10_000, processes=[SimulatedProcess(child.pid, memory)])
            for memory in (1_000, 2_000)]
    with SimulatedDriver(gpus):
        manager = ResourceManager()
        time.sleep(0.05)
        with manager.job("job", 5_000, n=2) as job:
            job.watch(child.pid)
            assert [c.base//2**20 for c in manager.get_claims()] == [1_000, 2_000]
            assert [d.promised()//2**20 for d in manager.check_gpu_availability().devices] == [5_000, 5_000]
        assert manager.get_claims() == []


def test_a_group_of_a_worker_is_on_the_devices_where_it_is(spawn):
    from cjm_fasthtml_resources.simulate import SimulatedProcess
    worker = spawn("input()")
    gpus = [SimulatedGpu(memory_total_mb=10_000) for _ in range(4)]
    for place in (1, 3): gpus[place].processes.append(SimulatedProcess(worker.pid, 4_000))
    with SimulatedDriver(gpus):
        manager = ResourceManager()
        manager.register_worker(worker.pid, "llm")
        with manager.job("job", 6_000, n=2, worker=worker.pid, timeout=0) as job:
            assert [d.index for d in job.devices] == [1, 3]
            assert [d.promised()//2**20 for d in manager.check_gpu_availability().devices] == [0, 2_000, 0, 2_000]


def test_a_fork_of_the_holder_neither_releases_nor_inherits_a_group(folder):
    with SimulatedDriver([SimulatedGpu(memory_total_mb=10_000) for _ in range(2)]):
        manager = ResourceManager(app="groups")
        with manager.reserve(8_000, n=2) as held:
            if (pid := os.fork()) == 0: os._exit(10*held.release() + len(manager.get_claims()))
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2 and len(manager.get_claims()) == 2


def test_the_command_waits_for_several_and_runs_on_several():
    def ask(*words): return CliRunner().invoke(cli.main, words)
    found = ask("--simulate", "eight-h100", "wait", "--gpu-memory", "2GiB", "--gpus", "4")
    assert found.exit_code == 0 and found.stdout.count("GPU-") == 4
    for words, said in ((["--gpus", "9"], "--gpus must be at most 8, the number of GPUs of this machine, not 9"),
                        (["--gpus", "2", "--device", "1"], "--device names one GPU, so it cannot"),
                        (["--gpus", "0"], "0 is not in the range")):
        found = ask("--simulate", "eight-h100", "wait", "--gpu-memory", "2GiB", *words)
        assert found.exit_code == 2 and said in found.stderr
    found = ask("--simulate", "eight-h100", "wait", "--gpu-memory", "500GiB", "--gpus", "2")
    assert found.exit_code == 2 and "is more than each of the 2 largest GPUs has (79.1 GiB)" in found.stderr
    command = [sys.executable, "-m", "cjm_fasthtml_resources", "--simulate", "eight-h100", "run", "--gpus", "3",
               "--gpu-memory", "2GiB", "--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout.count("GPU-")) == (0, 3), ran.stderr


def test_a_claim_of_the_past_without_a_count_is_one_device():
    claim = Claim(1, ProcessId(1, 1.0), 10, KEYS[:2])
    assert replace(claim).count == 1 and from_bytes(to_bytes(Rows((claim,)))).claims == (claim,)
