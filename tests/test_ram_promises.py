"RAM is promised like GPU memory: once, together with the devices, and as one memory where a GPU uses it"
import contextlib
import mmap
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from click.testing import CliRunner
from conftest import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from cjm_fasthtml_resources import cli
from cjm_fasthtml_resources.core import memory
from cjm_fasthtml_resources.core.caps import Cap
from cjm_fasthtml_resources.core.claims import RAM, Claim, DeviceUse, find_pools, grant, is_ram
from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
from cjm_fasthtml_resources.core.gpu import GpuDevice
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.memory import HostMemory, SimulatedMemory
from cjm_fasthtml_resources.core.process import ProcessId
from cjm_fasthtml_resources.core.ram_use import group_name
from cjm_fasthtml_resources.core.receipts import Receipt
from cjm_fasthtml_resources.core.room import TooMuchMemory
from cjm_fasthtml_resources.core.store import StoreError
from cjm_fasthtml_resources.core.validation import decide_on_cpu
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedMachine, SimulatedProcess

MIB, GIB = 2**20, 1024   # bytes, MiB
MACHINE = SimulatedMachine(memory_total_mb=64*GIB, memory_used_mb=10*GIB)


@pytest.fixture(autouse=True)
def own_folder(folder): "What the processes of a test share is theirs alone"


@pytest.fixture
def manager():
    "A manager on a machine with 54 GiB of RAM available, and a GPU of 24 GiB"
    with SimulatedDriver([SimulatedGpu("NVIDIA L4", memory_total_mb=24_000)], machine=MACHINE):
        yield ResourceManager(app="a")


def room(manager): return manager.check_memory_availability().memory.room//MIB


# One promise


def test_two_jobs_are_not_promised_the_same_ram(manager):
    with manager.job("a", 0, needs=dict(ram_mb=40*GIB), timeout=0) as job:
        assert room(manager) == 14*GIB and job.device is None and job.env == {"CUDA_VISIBLE_DEVICES": ""}
        with pytest.raises(ResourceBusy, match="40.0 GiB of RAM.*14.0 GiB of 64.0 GiB free.*reserved by PID"):
            manager.job("b", 0, memory_mb=40*GIB, timeout=0).__enter__()
        with manager.job("c", 0, memory_mb=14*GIB, timeout=0): assert room(manager) == 0
    assert room(manager) == 54*GIB and manager.get_claims() == []


def test_a_reservation_of_ram_alone_needs_no_gpu():
    with SimulatedDriver([], machine=MACHINE):
        manager = ResourceManager()
        for gpu in (None, 0):
            with manager.reserve(gpu, memory_mb=40*GIB, timeout=0) as held:
                assert (held.devices, held.memory_mb, held.env) == ((), 40*GIB, {"CUDA_VISIBLE_DEVICES": ""})
                with pytest.raises(LookupError, match="RAM alone"): held.device  # noqa: B018
                with pytest.raises(ResourceBusy, match="of RAM"): manager.reserve(memory_mb=40*GIB, timeout=0)
        with pytest.raises(ResourceUnavailable): manager.reserve(1_000, memory_mb=GIB, timeout=0)
        with pytest.raises((ValueError, TypeError), match="gpu_memory_mb"): manager.reserve()


def test_gpu_memory_and_ram_are_granted_together_or_not_at_all(manager):
    with manager.reserve(20_000, memory_mb=30*GIB, timeout=0) as held:
        assert held.device.index == 0 and (held.gpu_memory_mb, held.memory_mb) == (20_000, 30*GIB)
        assert {c.device for c in manager.get_claims()} == {held.uuid, RAM}
        for gpu, ram, short in ((1_000, 30*GIB, "of RAM"), (20_000, GIB, "needs 19.5 GiB. GPU 0")):
            with pytest.raises(ResourceBusy, match=short): manager.reserve(gpu, memory_mb=ram, timeout=0)
        assert len(manager.get_claims()) == 2 and manager.check_gpu_availability().devices[0].room == 4_000*MIB
    assert manager.get_claims() == []


def test_what_can_never_fit_fails_at_once_and_says_why(manager):
    with pytest.raises(TooMuchMemory, match="memory_mb must be at most 65536 MiB, the capacity of this machine"):
        manager.reserve(memory_mb=65*GIB)
    with pytest.raises(TooMuchMemory, match="memory_mb"): manager.job("a", 0, memory_mb=65*GIB).__enter__()
    assert manager.get_claims() == []


def test_what_can_never_fit_into_one_memory_fails_at_once_and_says_why():
    with (SimulatedDriver([SimulatedGpu("NVIDIA GB10", unified=True)], machine=MACHINE),
          pytest.raises(TooMuchMemory, match="minus this request.s 40.0 GiB of RAM")):
        ResourceManager().reserve(40*GIB, memory_mb=40*GIB)


@pytest.mark.parametrize("bad", [-1, float("nan"), "1", None, True])
def test_a_malformed_amount_is_refused(manager, bad):
    with pytest.raises((ValueError, TypeError), match="memory_mb"): manager.reserve(1_000, memory_mb=bad)


def test_a_job_that_runs_on_the_cpu_waits_for_what_is_promised(manager):
    assert decide_on_cpu(manager.check_memory_availability(), []).can_proceed
    with ResourceManager(app="b").reserve(memory_mb=50*GIB, timeout=0):
        decision = decide_on_cpu(manager.check_memory_availability(), [])
        assert not decision.can_proceed and "(app b)" in decision.message
        found = manager.check_memory_availability().memory
        assert [(p.owner, p.app, p.unused//MIB) for p in found.promises] == [("external", "b", 50*GIB)]
        assert found.shares["promised"] == 50*GIB*MIB


def test_reservations_that_cannot_be_read_leave_no_ram(manager, monkeypatch):
    def fail(*args): raise StoreError("it is damaged")
    monkeypatch.setattr(manager.ledger, "read", fail)
    found = manager.check_memory_availability()
    assert found.memory.room == 0 and "no memory counts as free" in found.notes[-1]


# One memory with a GPU's


def test_on_unified_memory_both_are_one_pool_and_count_once():
    with SimulatedDriver([SimulatedGpu("NVIDIA GB10", unified=True)], machine=MACHINE) as driver:
        manager = ResourceManager()
        def rooms(): return [round(n/GIB/MIB, 3) for n in (manager.check_memory_availability().memory.room,
                                                          manager.check_gpu_availability().devices[0].room)]
        with manager.reserve(20*GIB, memory_mb=10*GIB, timeout=0):
            assert rooms() == [24]*2
            with driver.allocate(20*GIB): assert rooms() == [24]*2
            with manager.reserve(memory_mb=20*GIB, timeout=0): assert rooms() == [4]*2
            for asked in (dict(gpu_memory_mb=25*GIB), dict(memory_mb=25*GIB),
                          dict(gpu_memory_mb=15*GIB, memory_mb=15*GIB)):
                with pytest.raises(ResourceBusy): manager.reserve(**asked, timeout=0)
            with manager.reserve(14*GIB, memory_mb=10*GIB, timeout=0): assert rooms() == [0]*2
        assert rooms() == [54]*2


def test_what_is_promised_on_a_unified_gpu_is_no_ram_while_the_driver_is_lost():
    with SimulatedDriver([SimulatedGpu("NVIDIA GB10", unified=True)], machine=MACHINE) as driver:
        manager = ResourceManager()
        with manager.reserve(40*GIB, timeout=0):
            driver.fail("nvmlDeviceGetCount_v2", 999)
            with pytest.raises(ResourceBusy, match="of RAM"): manager.reserve(memory_mb=20*GIB, timeout=0)


# Control groups


@contextlib.contextmanager
def inside(monkeypatch, total, used, folder):
    "A machine of 64 GiB, seen from a control group"
    with monkeypatch.context() as patched:
        patched.setattr(memory, "simulated", SimulatedMemory(HostMemory(total*GIB*MIB, used*GIB*MIB, folder), {}))
        patched.setattr(memory, "read_machine", lambda: HostMemory(64*GIB*MIB, 10*GIB*MIB))
        yield


def test_each_control_group_has_its_own_limit_and_all_share_the_machine(monkeypatch):
    with SimulatedDriver([], machine=MACHINE):
        manager, groups = ResourceManager(), ["/proc/self", "/proc"]
        with inside(monkeypatch, 40, 0, groups[0]):
            first = manager.reserve(memory_mb=30*GIB, timeout=0)
            assert {c.device for c in manager.get_claims()} == {RAM, group_name(groups[0])}
            assert room(manager) == 10*GIB                                     # of the group
            with pytest.raises(ResourceBusy): manager.reserve(memory_mb=11*GIB, timeout=0)
        with inside(monkeypatch, 40, 0, groups[1]):
            assert room(manager) == 24*GIB                                     # of the machine
            with pytest.raises(ResourceBusy): manager.reserve(memory_mb=25*GIB, timeout=0)
            with manager.reserve(memory_mb=24*GIB, timeout=0): assert room(manager) == 0
        assert room(manager) == 24*GIB
        first.release()


# Real processes

HOLDER = """import mmap, os, sys
from cjm_fasthtml_resources.core.conflict import ResourceBusy
from cjm_fasthtml_resources.core.manager import ResourceManager
def fill(mb):
    held = mmap.mmap(-1, mb << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, mb << 20, 4096): held[at] = 1
    return held
manager, kept = ResourceManager(app="holder"), []
for line in sys.stdin:
    what, *mb = line.split()
    if what == "fill": kept.append(fill(int(mb[0])))
    if what == "fork" and not os.fork(): sys.stdin.close(); os.read(os.pipe()[0], 1)
    if what == "free": kept.clear()
    if what == "release": kept.clear(); held.release()
    if what == "reserve":
        try: held = manager.reserve(memory_mb=float(mb[0]), timeout=0)
        except ResourceBusy: what = "busy"
    print(what, flush=True)
"""


def do(process, line):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.fixture
def holder(spawn):
    "Start holders in sessions of their own, whose forks end with them"
    started = []
    def start():
        started.append(subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, start_new_session=True))
        return started[-1]
    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def unused(manager):
    "MiB that are promised on the machine's RAM and not in use yet"
    return sum(p.unused for p in manager.check_memory_availability().memory.promises)//MIB


def test_of_real_processes_one_is_promised_most_of_the_machine_and_a_killed_one_gives_it_back(holder):
    most = int(memory.read_machine().available/MIB*0.7)
    processes = [holder() for _ in range(4)]
    for process in processes:   # at the same moment
        process.stdin.write(f"reserve {most}\n")
        process.stdin.flush()
    answers = [process.stdout.readline().strip() for process in processes]
    assert sorted(answers) == ["busy"]*3 + ["reserve"]
    winner = processes[answers.index("reserve")]
    winner.kill()
    winner.wait()
    other = next(p for p in processes if p is not winner)
    assert do(other, f"reserve {most}") == "reserve"


def test_what_a_real_process_allocates_is_used_of_its_promise(holder):
    process, manager = holder(), ResourceManager(app="watcher")
    assert do(process, "fill 100") == "fill"                 # it is there before
    assert do(process, "reserve 400") == "reserve" and unused(manager) >= 390
    do(process, "fill 300")
    assert 60 <= unused(manager) <= 140
    do(process, "free")
    assert unused(manager) >= 390
    do(process, "release")
    assert unused(manager) == 0


def test_pages_that_a_forked_child_shares_are_no_use_of_a_promise(holder):
    process, manager = holder(), ResourceManager(app="watcher")
    do(process, "fill 200")
    do(process, "reserve 500")
    for _ in range(2): do(process, "fork")
    assert unused(manager) >= 490
    do(process, "fill 200")
    assert 260 <= unused(manager) <= 340


def test_a_mapped_file_is_no_use_of_a_promise(tmp_path):
    "Its pages stay available: whoever took them for use would give the same memory away twice"
    path = tmp_path/"model"
    path.write_bytes(b"x"*(200*MIB))
    manager = ResourceManager()
    with manager.reserve(memory_mb=300, timeout=0), open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        assert sum(mapped[at] for at in range(0, 200*MIB, 4096)) and unused(manager) >= 280
        mapped.close()


def test_ram_goes_with_a_job_to_its_process(spawn):
    manager = ResourceManager()
    code = "x = bytearray(150 << 20); print(len(x), flush=True); input()"
    with manager.job("a", 0, memory_mb=400, timeout=0) as job:
        child = spawn(code)
        assert job.watch(child.pid) and child.stdout.readline()
        assert {c.holder.pid for c in manager.get_claims()} == {child.pid}
        wait_until(lambda: 200 <= unused(manager) <= 280)


MEMBER = """import random, sys, time
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedMachine, SimulatedProcess
random.seed(int(sys.argv[1]))
with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]*2, SimulatedMachine(64*1024, 10*1024)):
    manager = ResourceManager(app="crowd")
    for _ in range(12):
        gpu, ram = random.choice([(0, 30), (12_000, 25), (20_000, 0), (20_000, 50)])
        with manager.reserve(gpu, memory_mb=ram*1024, timeout=100, priority=random.choice([0, 0, 5])):
            time.sleep(random.random()/50)
"""


def test_a_crowd_that_asks_for_both_never_holds_more_than_there_is_and_nobody_waits_for_ever(tmp_path):
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]*2, machine=MACHINE):
        manager = ResourceManager(app="crowd")
        crowd = [subprocess.Popen([sys.executable, "-c", MEMBER, str(n)]) for n in range(6)]
        seen = 0
        while any(process.poll() is None for process in crowd):
            promised: dict[str, int] = {}
            for c in manager.get_claims():
                if c.device: promised[c.device] = promised.get(c.device, 0) + c.memory
            assert promised.pop(RAM, 0) <= 54*GIB*MIB and all(m <= 24_000*MIB for m in promised.values())
            seen += 1
            time.sleep(0.002)
        assert [process.wait() for process in crowd] == [0]*6 and seen > 20
        assert manager.get_claims() == []


# The arithmetic

holders = st.integers(1, 3).map(lambda n: ProcessId(n, float(n)))


@st.composite
def situations(draw):
    "Two GPUs, of which one can use the machine's RAM, and claims of which some are granted"
    unified = draw(st.booleans())
    rest = frozenset({"GPU-1", RAM})
    gpu = GpuDevice(0, "GPU-0", memory_total=100, memory_used=0, memory_free=100)
    shared = GpuDevice(1, "GPU-1", memory_total=100, memory_used=0, memory_free=100, unified=unified)
    ram = GpuDevice(-1, RAM, memory_total=100, memory_used=0, memory_free=100, unified=True)
    uses = [DeviceUse(gpu, ()), *(DeviceUse(d, (), sharing=rest - {d.uuid} if unified else frozenset())
                                  for d in (shared, ram))]
    claims, id = [], 1
    for _ in range(draw(st.integers(1, 8))):
        count, size = draw(st.integers(0, 2)), draw(st.integers(0, 60))
        beside = ((RAM, size),) if size or not count else ()
        claim = Claim(id, draw(holders), draw(st.integers(1, 60)) if count else 0, ("GPU-0", "GPU-1") if count else (),
                      count=count, beside=beside, priority=draw(st.integers(-3, 3)))
        claims, id = [*claims, claim], id + claim.size
        if draw(st.booleans()): claims = grant(claims, uses, choose=min)
    return uses, claims


@given(situations())
@settings(max_examples=400, deadline=None)
def test_all_that_a_request_asks_for_or_nothing_and_never_more_than_there_is(situation):
    uses, claims = situation
    after = grant(claims, uses, choose=min)
    for use in uses: assert sum(p.promised for p in find_pools(use, after).values()) <= 100
    for claim in claims:
        if claim.device is not None: continue
        found = [c for c in after if claim.id <= c.id < claim.id + claim.size]
        if found[0].device is None: assert found == [claim]
        else:
            asked = [*[claim.memory]*claim.count, *(size for _, size in claim.beside)]
            assert [c.memory for c in found] == asked and len({c.device for c in found}) == len(found)
    assert len({c.id for c in after}) == len(after)


@given(situations(), st.data())
@settings(max_examples=200, deadline=None)
def test_nobody_is_given_more_than_the_cap_and_what_is_under_it_is_as_without(situation, data):
    uses, claims = situation
    cap = Cap(data.draw(st.sampled_from([0.3, 0.6, 1.0])))
    claims = [replace(c, receipt=Receipt(data.draw(st.integers(1, 2)))) for c in claims]
    after = grant(claims, uses, choose=min, may_have=cap.allows)
    had = {c.id for c in claims if c.device is not None}
    for c in after:
        if c.device is None or c.id in had or is_ram(c.device): continue
        use = next(use for use in uses if use.key == c.device)
        assert cap.reserved(c, use, after) <= cap.most(use.device) or use.device.unified   # RAM can follow
    for use in uses: assert sum(p.promised for p in find_pools(use, after).values()) <= 100
    asked = [(c.receipt.user, c.memory + sum(size for _, size in c.beside)) for c in claims]
    if all(sum(size for user, size in asked if user == one) <= 100*cap.share for one in (1, 2)):
        assert after == grant(claims, uses, choose=min)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 40), st.integers(-2, 0)), min_size=60, max_size=80),
       st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_no_request_waits_for_ever_whatever_is_asked_for_later(small, priority):
    "Small requests with a better priority come without end, each for two rounds; the large one passes after its places"
    me, claims, born, id = ProcessId(1, 1.0), [], {}, 1
    uses = [DeviceUse(GpuDevice(0, "GPU-0", memory_total=100, memory_used=0, memory_free=100), ()),
            DeviceUse(GpuDevice(-1, RAM, memory_total=100, memory_used=0, memory_free=100), ())]
    for turn, (count, size, better) in enumerate(small):
        asked = Claim(id, me, size if count else 0, ("GPU-0",) if count else (), count=count, beside=((RAM, size),),
                      priority=better)
        if turn == 2:
            both = dict(count=1, memory=90, allowed=("GPU-0",), beside=((RAM, 90),))
            asked, large = replace(asked, **both, priority=priority), id
        claims, id = [*claims, asked], id + asked.size
        claims = grant([c for c in claims if turn - born.get(c.id, turn) < 2], uses)
        for c in claims:
            if c.device: born.setdefault(c.id, turn)
    assert large in born and born[large] <= 2 + 10*(priority + 2) + 6


def test_a_smaller_priority_goes_first(manager):
    held = manager.reserve(20_000, timeout=0)
    waiting, order = [manager.request(20_000, priority=p) for p in (0, 5, -5)], []
    for request in waiting: assert request.poll() is None
    seen = manager.check_gpu_availability().waiting
    assert [(w.priority, w.position) for w in seen] == [(-5, 1), (0, 2), (5, 3)]
    while waiting:
        held.release()
        wait_until(lambda: any(c.device for c in (waiting[0].poll(), manager.get_claims())[1]))
        leases = {c.lease for c in manager.get_claims() if c.device}
        request = next(r for r in waiting if r.lease in leases)
        held = request.wait()
        waiting.remove(request)
        order.append(request.priority)
    held.release()
    assert order == [-5, 0, 5]


@pytest.mark.parametrize("bad", [20, -21, 1.5, True, "1"])
def test_a_malformed_priority_is_refused(manager, bad):
    with pytest.raises((ValueError, TypeError), match="priority"): manager.reserve(1_000, priority=bad)


# The commands


def command(*arguments): return CliRunner().invoke(cli.main, ["--simulate", "pair", *arguments])


def test_the_commands_reserve_ram():
    found = command("wait", "--ram", "1GiB")
    assert (found.exit_code, found.output) == (0, "CUDA_VISIBLE_DEVICES=\n")
    found = command("wait", "--gpu-memory", "2GiB", "--ram", "1GiB")
    assert found.exit_code == 0 and "CUDA_VISIBLE_DEVICES=GPU" in found.output
    found = command("wait", "--ram", "9999GiB")
    assert found.exit_code == 2 and "--ram" in found.output and "more than this machine" in found.output
    assert command("wait").exit_code == 2 and "--ram" in command("wait").output
    assert command("wait", "--ram", "1GiB", "--priority", "20").exit_code == 2
    found = command("wait", "--gpu-memory", "all", "--timeout", "0")
    # others use both of the pair
    assert found.exit_code == 75 and "The job needs a GPU for itself alone" in found.output




# A device for itself


def test_a_benchmark_gets_an_empty_gpu_for_itself(manager):
    "As a need, not as a flag: it asks for all of a device"
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000, processes=[SimulatedProcess(4200301, 500)]),
                          SimulatedGpu(memory_total_mb=24_000)],
                         machine=MACHINE):
        with manager.reserve("all", timeout=0) as first, manager.reserve("all", timeout=0) as second:
            assert {first.index, second.index} == {0, 1} and first.gpu_memory_mb + second.gpu_memory_mb == 47_500
            with pytest.raises(ResourceBusy): manager.reserve(1, timeout=0)
        with manager.reserve(1, 0, timeout=0), manager.reserve("all", timeout=0) as alone: assert alone.index == 1
        with (manager.reserve(1, 0, timeout=0), manager.reserve(1, 1, timeout=0),
              pytest.raises(ResourceBusy, match="The job needs a GPU for itself alone.*a reservation of PID")):
            manager.job("benchmark", "all", timeout=0).__enter__()
        with manager.job("benchmark", needs=dict(gpu_memory_mb="all", devices=2), timeout=0) as job:
            assert len(job.devices) == 2
        with pytest.raises(TypeError, match="gpu_memory_mb"): manager.reserve("much", timeout=0)
