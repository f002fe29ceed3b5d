"Promises of GPU memory: between threads, tasks and processes, with everything that can end a holder or break the file"
import asyncio
import contextlib
import errno
import gc
import itertools
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from conftest import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from cjm_fasthtml_resources.core import database, host, lockfile, requests, reservations
from cjm_fasthtml_resources.core import folder as places
from cjm_fasthtml_resources.core.claims import Claim, DeviceUse, find_pools, grant, read_use
from cjm_fasthtml_resources.core.conflict import ResourceBusy
from cjm_fasthtml_resources.core.devices import device_key
from cjm_fasthtml_resources.core.gpu import GpuDevice, read_gpus
from cjm_fasthtml_resources.core.leases import new_lease
from cjm_fasthtml_resources.core.ledger import Ledger
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.process import ProcessId
from cjm_fasthtml_resources.core.resources import ResourceStatus
from cjm_fasthtml_resources.core.store import Store, StoreError, store_path
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedMachine, SimulatedProcess

# The arithmetic

holders = st.integers(1, 4).map(lambda n: ProcessId(n, float(n)))
keys = ["GPU-0", "GPU-1", "GPU-2"]


@st.composite
def devices_in_use(draw, key):
    "A device with processes on it, and some of the use is nobody's"
    processes = draw(st.lists(st.tuples(holders.map(lambda h: (h,)), st.integers(0, 30)), max_size=3))
    used = min(sum(m for _, m in processes) + draw(st.integers(0, 30)), 200)
    device = GpuDevice(int(key[-1]), key, memory_total=200, memory_used=used, memory_free=200 - used)
    return DeviceUse(device, tuple(processes) if draw(st.booleans()) else None)


@st.composite
def situations(draw):
    "Devices in use, and claims of which some are promised, as they can come about: no more is promised than there is"
    uses = [draw(devices_in_use(key)) for key in keys[:draw(st.integers(1, 3))]]
    claims = []
    for id in range(1, draw(st.integers(1, 9))):
        allowed = st.sets(st.sampled_from(keys), min_size=1)
        claim = Claim(id, draw(holders), draw(st.integers(1, 120)), tuple(draw(allowed)))
        if draw(st.booleans()):
            granted = [c for c in grant([*claims, claim], uses, choose=min) if c.id == id]
            if granted[0].device: claim = granted[0]
        claims.append(claim)
    return uses, claims


@given(situations())
@settings(max_examples=400, deadline=None)
def test_what_is_granted_is_there_and_nobody_who_fits_is_passed_over(situation):
    uses, claims = situation
    before, after = {c.id: c for c in claims}, {c.id: c for c in grant(claims, uses, choose=min)}
    room = {u.key: u.device.memory_free - sum(p.unused for p in find_pools(u, after.values()).values()) for u in uses}
    given_now = [c for c in after.values() if c.device and before[c.id].device is None]
    for c in given_now:
        assert c.device in c.allowed and room[c.device] >= 0
    waiting = [c for c in after.values() if c.device is None]
    if waiting:  # the first who waits would not fit anywhere it may go, even with what those before it were given
        first = waiting[0]
        for key in room.keys() & set(first.allowed):
            later = sum(c.memory for c in given_now if c.device == key and c.id > first.id)
            assert room[key] + later < first.memory
    assert [(c.id, c.holder, c.memory) for c in after.values()] == [(c.id, c.holder, c.memory) for c in claims]
    assert all(after[c.id].device == c.device for c in claims if c.device)  # what is promised stays promised


@given(st.lists(st.integers(1, 40), min_size=5, max_size=60), st.integers(50, 100))
@settings(max_examples=100, deadline=None)
def test_a_large_request_is_not_starved_by_small_ones(small, large):
    "Small ones come without end and hold for two rounds; the large one is served when those before it are gone"
    me, claims = ProcessId(1, 1.0), []
    free = DeviceUse(GpuDevice(0, "GPU-0", memory_total=100, memory_used=0, memory_free=100), ())
    born = {}
    for turn, size in enumerate(small):
        claims.append(Claim(turn + 1, me, large if turn == 2 else size, ("GPU-0",)))
        claims = grant([c for c in claims if turn - born.get(c.id, turn) < 2], [free])
        for c in claims:
            if c.device: born.setdefault(c.id, turn)
    assert 3 in born and born[3] <= 4


# One process

@pytest.mark.parametrize("app", [None, "threads"])
def test_threads_never_hold_more_than_there_is(folder, app):
    manager, errors = ResourceManager(app=app), []
    driver = SimulatedDriver([SimulatedGpu(memory_total_mb=10_000) for _ in range(2)])

    def work():
        try:
            for _ in range(4):
                with manager.reserve(4_000, timeout=30) as held, driver.allocate(4_000, held.index): time.sleep(0.002)
        except BaseException as error: errors.append(error)

    with driver:
        threads = [threading.Thread(target=work) for _ in range(12)]
        for t in threads: t.start()
        for t in threads: t.join()
    assert not errors and manager.ledger.claims() == []


@contextlib.contextmanager
def no_search_of_older_objects():
    "A full garbage collection stops all threads: 0.26 s for the 400,000 objects of pytest with this project's tests"
    gc.collect()
    gc.freeze()
    try: yield
    finally: gc.unfreeze()


@pytest.mark.parametrize("app", [None, "app"], ids=["in memory", "in a file"])
def test_threads_wake_one_another_and_wait_for_no_next_poll(folder, app, monkeypatch):
    monkeypatch.setattr(reservations, "pauses", lambda: itertools.repeat(300.0))   # between two polls
    taken = []
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
        manager = ResourceManager(app=app)

        def work(number: int) -> None:
            with manager.reserve(20_000):
                taken.append(number)
                wait_until(lambda: len(manager.get_claims()) == 8 - len(taken) + 1)   # all others wait

        threads = [threading.Thread(target=work, args=[number], daemon=True) for number in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(30)
    assert sorted(taken) == list(range(8))


def test_the_event_loop_goes_on_while_a_task_waits():
    manager, ticks = ResourceManager(), []

    async def tick():
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.01)

    async def main():
        held = await manager.reserve_async(20_000)
        clock = asyncio.create_task(tick())
        with pytest.raises(ResourceBusy, match="Gave up after 0.5 s"): await manager.reserve_async(20_000, timeout=0.5)
        driver.delay("nvmlDeviceGetCount_v2", 0.4)  # a slow driver holds up the request, and its bar, alone
        with pytest.raises(ResourceBusy): await manager.reserve_async(20_000, timeout=1, progress=True)
        driver.recover()
        waiting = asyncio.create_task(manager.wait_for_gpu_async(20_000))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        async with held: pass
        assert (await waiting).devices[0].index == 0
        clock.cancel()

    with SimulatedDriver([SimulatedGpu()]) as driver, no_search_of_older_objects(): asyncio.run(main())
    assert max(b - a for a, b in pairwise(ticks)) < 0.2 and manager.ledger.claims() == []


def test_a_bar_says_who_is_in_the_way(capfd, monkeypatch):
    monkeypatch.setattr(requests, "_is_in_notebook", lambda: True)
    manager, gpu = ResourceManager(), SimulatedGpu(processes=[SimulatedProcess(os.getpid(), 20_000)])
    with SimulatedDriver([gpu]), pytest.raises(ResourceBusy): manager.reserve(10_000, timeout=0.8, progress=True)
    shown = capfd.readouterr().err
    assert f"(PID {os.getpid()}, user" in shown and re.search(r"4\.5 of 9\.8 GiB free", shown)


def test_inside_a_container_nothing_is_known_of_a_promise_but_its_size():
    manager, gpu = ResourceManager(), SimulatedGpu(memory_total_mb=30_000, memory_used_mb=4_000)
    with SimulatedDriver([gpu], SimulatedMachine(pid_namespace=True)), manager.reserve(10_000, pid=None):
        def seen():
            d, = manager.check_gpu_availability().devices
            return d.room//2**20, d.promised()//2**20, d.app_memory//2**20
        assert seen() == (16_000, 10_000, 0)
        gpu.memory_used_mb = 11_000
        assert seen() == (9_000, 10_000, 0)     # by whom cannot be told


def test_what_is_held_is_what_was_asked_for():
    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager()
        with manager.reserve(16.5, ttl=60) as held:
            assert held.gpu_memory_mb == 16.5 and manager.get_claims()[0].memory == 16.5*2**20
            assert 59 < manager.get_claims()[0].expires - time.monotonic() <= 60
            assert held.renew(600) and manager.get_claims()[0].expires - time.monotonic() > 590


def test_in_a_fork_the_child_neither_releases_nor_inherits(folder):
    with SimulatedDriver([SimulatedGpu()]):
        for manager, seen in ((ResourceManager(), 0), (ResourceManager(app="fork"), 1)):
            with manager.reserve(1_000) as held:
                if (pid := os.fork()) == 0: os._exit(10*held.release() + len(manager.ledger.claims()))
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == seen
                assert len(manager.ledger.claims()) == 1


def test_in_a_fork_what_the_child_reserves_is_its_own():
    "A process is read once, and after a fork it is another one"
    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager()
        assert manager.reserve(1_000).holder.pid == os.getpid()
        if (pid := os.fork()) == 0:
            mine = host.read_process(os.getpid()).lineage[0]
            os._exit(manager.reserve(1_000).holder == mine)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


# Several processes

HOLDER = """import sys
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
driver = SimulatedDriver([SimulatedGpu()]).start()
held = ResourceManager(app="theirs").reserve(20_000)
print("held", flush=True)
sys.stdin.readline()"""


def test_another_apps_promise_counts_until_it_is_killed(folder, spawn):
    other = spawn(HOLDER)
    assert other.stdout.readline() == "held\n"
    manager = ResourceManager(app="mine")
    with SimulatedDriver([SimulatedGpu()]):
        conflict = manager.check_gpu_availability()
        assert conflict.status is ResourceStatus.EXTERNAL_BUSY
        assert f"a reservation of PID {other.pid} (app theirs, " in conflict.message
        with pytest.raises(ResourceBusy, match=f"PID {other.pid}"): manager.reserve(10_000, timeout=0)
        assert ResourceManager(app="theirs").check_gpu_availability().status is ResourceStatus.APP_BUSY
        # it names no app, so it shares nothing
        assert ResourceManager().check_gpu_availability().status is ResourceStatus.AVAILABLE
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert manager.check_gpu_availability().status is ResourceStatus.AVAILABLE
        assert manager.reserve(10_000, timeout=0).release()


# The file

def answers(manager):
    "What a check and a reservation say about a file that cannot be used"
    with SimulatedDriver([SimulatedGpu()]):
        conflict = manager.check_gpu_availability()
        with pytest.raises(Exception) as raised: manager.reserve(1_000, timeout=0)
    return conflict, raised


@contextlib.contextmanager
def locked(how):
    "Another program that has the gate, or the database by this statement"
    if how == "gate":
        with lockfile.in_gate(store_path().with_suffix(".lock")): yield
    else:
        with contextlib.closing(sqlite3.connect(store_path())) as other:
            other.execute(how)
            yield


LOCKS = ["gate", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"]


@pytest.mark.parametrize("how", LOCKS)
def test_a_file_that_is_locked_is_said_to_be(folder, monkeypatch, how):
    for place in (lockfile, database): monkeypatch.setattr(place, "BUSY_SECONDS", 0.1)
    manager, path = ResourceManager(app="mine"), store_path()
    named = f"{path} has been locked by another process for 0.1 s"
    if how == "gate": named = f"{path.with_suffix('.lock')} has been locked by PID {os.getpid()} for 0.1 s"
    with SimulatedDriver([SimulatedGpu()]):
        for change in (lambda: manager.reserve(1_000), lambda: manager.register_worker(os.getpid(), "llm")):
            with locked(how), ThreadPoolExecutor(1) as other_thread, pytest.raises(StoreError, match=re.escape(named)):
                other_thread.submit(change).result()
        assert manager.ledger.claims() == [] and manager.reserve(1_000).release()


@pytest.mark.parametrize("how", LOCKS)
@pytest.mark.parametrize("change", ["transaction", "changing"])
def test_who_waits_for_the_file_can_be_interrupted(folder, spawn, change, how):
    ResourceManager(app="mine")  # makes the file
    with locked(how):
        waiting = spawn(f"""if True:
            from cjm_fasthtml_resources.core.store import Store, store_path
            store = Store(store_path())
            try:
                print("opened", flush=True)
                with store.{change}(): print("begun")
            except KeyboardInterrupt: print("interrupted")""")
        assert waiting.stdout.readline() == "opened\n"
        time.sleep(0.5)
        waiting.send_signal(signal.SIGINT)
        assert waiting.communicate(timeout=10) == ("interrupted\n", None)


def damage(path): path.write_bytes(b"\xff"*5_000)
def remove(path): path.unlink()
def replace(path):
    path.rename(f"{path}.old")
    path.touch(0o600)


@pytest.mark.parametrize("harm", [remove, replace])
def test_a_file_that_is_gone_under_a_running_process_is_never_an_available(folder, harm):
    manager, lock_path = ResourceManager(app="mine"), store_path().with_suffix(".lock")
    harm(lock_path)
    conflict, raised = answers(manager)
    assert conflict.status is ResourceStatus.UNAVAILABLE
    assert str(store_path()) in conflict.reason and "removed or replaced" in conflict.reason
    assert str(store_path()) in str(raised.value) and raised.type is StoreError
    with pytest.raises(StoreError, match=f"{re.escape(str(lock_path))} was removed while other programs use it"):
        Ledger(Store(store_path())).settle(list)   # one that starts now does not hand out anew what is promised


@pytest.mark.parametrize("harm", [remove, replace, damage])
def test_a_database_that_is_gone_under_a_running_process_hides_no_promise(folder, harm):
    manager = ResourceManager(app="mine")
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]), manager.reserve(20_000) as held:
        harm(store_path())
        conflict = manager.check_gpu_availability()
        assert conflict.status is ResourceStatus.UNAVAILABLE and str(store_path()) in conflict.reason
        assert "while other programs use it" in conflict.reason
        with pytest.raises(StoreError, match="while other programs use it"): ResourceManager(app="late")
        for one in (manager, ResourceManager()):   # promises are not in it
            if one is not manager: one.ledger = Ledger(Store(store_path()))
            assert [c.lease for c in one.ledger.claims()] == [held.lease]
        request = Claim(0, held.holder, 10_000*2**20, (device_key(held.device),), lease=new_lease())
        uses = read_use(read_gpus().devices)
        assert manager.ledger.settle(lambda: uses, lambda: request)[-1].device is None


@pytest.mark.parametrize("harm", [damage, remove, replace])
def test_a_lock_file_that_is_harmed_while_leases_are_held_is_made_anew_when_they_have_gone(folder, spawn, harm):
    other, path = spawn(HOLDER), store_path()
    assert other.stdout.readline() == "held\n"
    harm(path.with_suffix(".lock"))
    late = Ledger(Store(path))
    for call in (late.claims, lambda: late.settle(list)):
        with pytest.raises(StoreError, match=f"{re.escape(str(path.with_suffix('.lock')))} .*other programs use it"):
            call()
    other.kill()
    other.wait()
    assert late.claims() == []
    with SimulatedDriver([SimulatedGpu()]): assert ResourceManager(app="late").reserve(20_000, timeout=0).release()


def test_a_lock_file_of_another_version_is_made_anew_when_nobody_uses_it(folder, spawn):
    "Its first bytes are others, and the database fits it"
    manager, path = ResourceManager(app="mine"), store_path().with_suffix(".lock")
    with path.open("r+b") as file: file.write(b"CJMRES0")
    with pytest.raises(StoreError, match="was removed while other programs use it"): manager.register_worker(1, "llm")
    manager.ledger.store.close()
    with SimulatedDriver([SimulatedGpu()]): assert ResourceManager(app="late").reserve(20_000, timeout=0).release()


def test_a_lock_file_that_is_replaced_by_its_copy_hides_no_promise(folder, spawn):
    "As by an editor, or from a backup: the rows are there, and the leases are on the file that is gone"
    other, path = spawn(HOLDER), store_path().with_suffix(".lock")
    assert other.stdout.readline() == "held\n"
    shutil.copy(path, f"{path}.copy")
    os.replace(f"{path}.copy", path)
    try: promised = Ledger(Store(store_path())).claims()
    except StoreError: return
    assert [c.memory for c in promised] == [20_000*2**20]


@pytest.mark.parametrize("which", [".lock", ".sqlite", "both", "folder"])
def test_files_that_are_removed_while_nobody_uses_them_are_made_anew(folder, which):
    manager = ResourceManager(app="mine")
    manager.ledger.store.close()   # it goes on with the next use
    if which == "folder": shutil.rmtree(folder)
    else:
        for suffix in (".lock", ".sqlite") if which == "both" else (which,): remove(store_path().with_suffix(suffix))
    with SimulatedDriver([SimulatedGpu()]):
        assert manager.reserve(1_000, timeout=0).release()
        assert manager.register_worker(os.getpid(), "llm") in manager.get_all_workers()
        assert manager.check_gpu_availability().status is ResourceStatus.AVAILABLE


def test_a_file_that_is_damaged_under_running_processes_is_made_anew_when_they_have_gone(folder, caplog):
    first = ResourceManager(app="mine")
    damage(store_path())
    with pytest.raises(StoreError, match="damaged.*other programs use it"): ResourceManager(app="late")
    first.ledger.store.close()
    ResourceManager(app="late").register_worker(os.getpid(), "llm")
    assert "set aside" in caplog.text and len(list(folder.glob("*.damaged-1"))) == 1


def test_a_full_disk_and_a_read_only_file_lose_nothing(folder, monkeypatch):
    manager, write, open_file = ResourceManager(app="mine"), os.pwrite, os.open

    def no_space(fd, data, offset):
        if offset < 2**12: return write(fd, data, offset)   # in the header, which is there already
        if offset%2**12 == 0: return write(fd, data[:20], offset)   # as much as there is place for
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_RDWR | os.O_WRONLY): raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return open_file(path, flags, *args, **kwargs)

    harms = [("pwrite", no_space, "disk is full"), ("open", read_only, "read-only")]
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]), manager.reserve(1_000, ttl=600) as held:
        for name, broken, said in harms:
            other, before = manager.reserve(2_000), manager.ledger.rows()
            for _ in range(3):   # the next place in the file is never that of what is written
                with monkeypatch.context() as patch:
                    patch.setattr(os, name, broken)
                    with pytest.raises(StoreError, match=said): manager.reserve(1_000)
                    with pytest.raises(StoreError, match=said): held.renew(1_200)
                    assert manager.ledger.rows() == before
                assert manager.ledger.rows() == before and Ledger(Store(store_path())).rows() == before
            with monkeypatch.context() as patch:
                patch.setattr(os, name, broken)
                assert other.release() and not other.release()   # which needs no writing
                assert [c.lease for c in manager.ledger.claims()] == [held.lease]
        assert manager.reserve(22_500, timeout=0).release()   # all the rest is there
        assert [(c.id, c.lease) for c in manager.ledger.claims()] == [(held.id, held.lease)] and held.renew(1_200)


def test_a_full_disk_and_a_read_only_database_lose_no_worker(folder, monkeypatch):
    manager, connect = ResourceManager(app="mine"), database._connect
    manager.register_worker(os.getpid(), "llm", "job-1", config={"a": 1})
    known = manager.get_all_workers()
    for setting, said in (("max_page_count = 1", "disk is full"), ("query_only = 1", "read-only")):
        def limited(path, *timeout, setting=setting):
            db = connect(path, *timeout)
            db.execute(f"PRAGMA {setting}")   # SQLite raises the lowest of them to what there is
            return db
        with monkeypatch.context() as patch:
            patch.setattr(database, "_connect", limited)
            with pytest.raises(StoreError, match=f"{re.escape(str(store_path()))} .*{said}"):
                manager.register_worker(os.getppid(), "llm", "job-2", config={f"key_{n}": n for n in range(9_000)})
            assert manager.get_all_workers() == known and manager.get_worker_by_job("job-2") is None
        assert ResourceManager(app="mine").get_all_workers() == known
    assert manager.register_worker(os.getppid(), "llm", "job-2").pid == os.getppid()


def test_after_a_restart_of_the_machine_nothing_is_promised(folder, spawn, monkeypatch):
    manager, living, ended = ResourceManager(app="mine"), spawn("input()"), spawn("input()")
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
        for pid in (None, ended.pid): manager.reserve(10_000, pid=pid)
        ended.kill()
        # what a restart leaves is what is written; the kernel that knew the leases is gone, and so are the processes
        shutil.copytree(folder, folder.with_name("restarted"))
        assert [c.memory for c in ResourceManager(app="mine").ledger.claims()][0] == 10_000*2**20
        monkeypatch.setenv("CJM_RESOURCES_DIR", str(folder.with_name("restarted")))
        after = ResourceManager(app="mine")
        ended.wait()
        assert len(after.ledger.rows().claims) == 2 and after.ledger.claims() == []
        assert after.reserve(24_000, timeout=0).release()
        assert living.poll() is None
    # where no folder is set, there is a new one
    monkeypatch.delenv("CJM_RESOURCES_DIR")
    before = store_path()
    monkeypatch.setattr(places, "boot_id", lambda: "another")
    assert store_path() != before and store_path().name == before.name


def test_two_that_start_at_once_make_one_file(folder):
    "Many processes open the file that is not there yet"
    code = """if True:
        from cjm_fasthtml_resources.core.manager import ResourceManager
        manager = ResourceManager(app="many")
        print(manager.ledger.store.path.stat().st_ino)
        input()"""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    started = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(8)]
    assert len({p.stdout.readline() for p in started}) == 1
    for p in started: p.communicate("\n")
    assert all(p.returncode == 0 for p in started)


# Whose the file is

@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root: to give a file away")
@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_belongs_to_another_user_is_not_used(folder, which):
    ResourceManager(app="mine").register_worker(2**31 - 2, "llm")
    given = store_path() if which == "file" else store_path().parent
    os.chown(given, 12345, -1)
    refused = rf"{re.escape(str(given))} belongs to another user \(UID 12345\), so it is refused"
    with pytest.raises(StoreError, match=refused): ResourceManager(app="mine")
