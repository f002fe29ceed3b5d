"RAM as it is on real machines: pages that processes share, control groups, and what a check reads"
import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import MIB

from cjm_fasthtml_resources.core import memory, ram, resident
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.memory import HostMemory
from cjm_fasthtml_resources.core.resources import ResourceStatus
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")

FAMILY = """
import json, mmap, os, sys, time
from cjm_fasthtml_resources import ResourceManager

def fork(work=lambda: None):
    pid = os.fork()
    if pid == 0:
        work()
        open(f"{folder}/{os.getpid()}", "w").close()
        time.sleep(60)
        os._exit(0)
    kids.append(pid)
    while not os.path.exists(f"{folder}/{pid}"): time.sleep(.01)

kids, folder, manager = [], sys.argv[1], ResourceManager()
exec(sys.argv[2])
found = manager.check_memory_availability(threshold_percent=0)
state = found.memory
print(json.dumps(dict(app=state.app_memory, external=state.external_memory, used=state.memory.used,
                      status=found.status.name, notes=found.notes, estimated=found.estimated,
                      processes={p.pid: p.memory_used for p in state.processes if p.owner == "app"},
                      pids=[os.getpid(), *kids])), flush=True)
time.sleep(60)
"""


def read_pss(pid: int) -> int:
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line[1]) << 10 for line in lines if line[0] == "Pss:")


@pytest.fixture
def family(tmp_path):
    "Run code in a process that forks; family(code) is what its manager found, and the sum of the shares in `pss`"
    begun = []

    def run(code: str, read=read_pss) -> dict:
        command = [sys.executable, "-c", FAMILY, tmp_path, code]
        begun.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        found = json.loads(begun[-1].stdout.readline())
        return dict(found, pss=sum(read(int(pid)) for pid in found["processes"]))
    yield run
    for process in begun:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, 9)
        process.communicate()


@linux
@pytest.mark.parametrize("code", [
    "block = bytearray(os.urandom(1 << 20))*200\nfor _ in range(8): fork()",
    "block = bytearray(os.urandom(1 << 20))*20\nfor _ in range(40): fork()",
    "block = mmap.mmap(-1, 200 << 20); block.write(bytes(200 << 20))\n"
    "for _ in range(4): fork(lambda: sum(block[::4096]))",
    "def child():\n    global block\n    block = bytearray(os.urandom(1 << 20))*100\n    fork(); fork()\nfork(child)",
], ids=["forks", "small forks", "shared memory", "forks of a fork"])
def test_pages_that_the_apps_processes_share_count_once(family, code):
    found = family(code)
    assert 0.7*found["pss"] < found["app"] <= 1.2*found["pss"] and not found["estimated"], found
    assert found["app"] + found["external"] == found["used"]
    assert found["status"] == ("APP_BUSY" if found["app"] > found["external"] else "EXTERNAL_BUSY")


@linux
def test_a_forks_own_pages_count_for_it(family):
    found = family("block = bytearray(os.urandom(1 << 20))*100\n"
                   "def change():\n    for i in range(0, len(block), 4096): block[i] = 1\n"
                   "fork(change); fork(); fork()")
    sizes = [found["processes"][str(pid)]/MIB for pid in found["pids"]]
    assert 95 < sizes[1] < 130 and all(20 < size < 60 for size in (sizes[0], *sizes[2:])), sizes


@linux
def test_what_is_read_again_when_a_family_grows(family):
    found = family("block = bytearray(os.urandom(1 << 20))*200\nmanager.check_memory_availability()\n"
                   "for _ in range(4): fork()")
    assert 190 < found["app"]/MIB < 300, found


@linux
def test_files_in_ram_are_nobodys(family, tmp_path):
    "The kernel drops them when memory is needed, so they are not in use"
    (tmp_path/"model").write_bytes(os.urandom(MIB)*200)
    found = family("file = open(folder + '/model', 'rb')\n"
                   "model = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); sum(model[::4096]); fork(); fork()")
    assert found["app"] < 100*MIB, found


@linux
@root
def test_shares_that_another_user_may_not_read_are_estimated_from_those_that_can(family):
    found = family("manager.check_memory_availability()\n"   # what it imports, nobody may not
                   "block = bytearray(os.urandom(1 << 20))*200\nfor _ in range(4): fork()\n"
                   "os.setgid(65534); os.setuid(65534)")
    assert found["estimated"] and any("share" in note for note in found["notes"]), found
    assert 180 < found["app"]/MIB < 350, found


@linux
def test_the_shares_of_programs_of_their_own_are_not_read(monkeypatch, spawn):
    "However much they have, it is theirs"
    worker = spawn("block = bytearray(b'x')*(100 << 20); print(1, flush=True); input()")
    worker.stdout.readline()
    manager = ResourceManager(track_self=False)
    manager.register_worker(worker.pid, "llm")
    monkeypatch.setattr(resident, "read_share", lambda *args: pytest.fail("read a share"))
    state = manager.check_memory_availability().memory
    assert 100*MIB < state.app_memory < 160*MIB


@linux
def test_of_a_large_family_the_largest_are_read():
    reads = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resident, "is_fork", lambda pid, proc: True)
        patch.setattr(resident, "read_share", lambda pid, proc: reads.append(pid) or 5*MIB)
        known = resident.KnownProcess(1, None, ())
        rows = [(resident.ResidentProcess(pid, 50*MIB if pid < 65 else 20*MIB, 0, pid), known) for pid in range(1, 201)]
        rows = [(p, known._replace(pids=(p.pid,))) for p, _ in rows]
        found = resident.SharedPages().count(rows)
    assert sorted(reads) == list(range(1, 65)) and not found.whole
    assert found.memory[1] == 5*MIB and found.memory[200] == 2*MIB


def test_the_app_never_has_more_than_is_used(monkeypatch):
    def huge(self, rows): return resident.Counted({p.pid: 2**60 for p, _ in rows}, False)
    monkeypatch.setattr(ram.SharedPages, "count", huge)
    found = ResourceManager().check_memory_availability(0)
    assert found.memory.app_memory == found.memory.memory.used and found.memory.external_memory == 0
    assert found.status is ResourceStatus.APP_BUSY and found.estimated and "(estimate)" in found.message


@linux
def test_kernel_threads_and_ended_processes_have_no_ram():
    ended = subprocess.Popen(["true"])
    time.sleep(0.2)
    found = {p.pid for p in resident.ResidentReader().read()}
    assert ended.pid not in found and os.getpid() in found
    stat = Path("/proc/2/stat")
    if stat.exists() and b"(kthreadd)" in stat.read_bytes(): assert 2 not in found
    ended.wait()


@linux
def test_a_process_whose_main_thread_ended_still_has_its_ram(spawn):
    code = ("import ctypes, threading, time\nblock = bytearray(b'x')*(50 << 20)\n"
            "threading.Thread(target=lambda: (time.sleep(.2), print(1, flush=True), time.sleep(60))).start()\n"
            "ctypes.CDLL(None).pthread_exit(None)")
    process, reader = spawn(code), resident.ResidentReader()
    process.stdout.readline()
    for _ in range(2):
        found = {p.pid: p.memory for p in reader.read()}
        assert found[process.pid] > 50*MIB


@linux
def test_a_second_check_looks_no_name_up_and_identifies_nobody(monkeypatch, spawn):
    spawn("print(1, flush=True); input()").stdout.readline()
    manager = ResourceManager()
    before = manager.check_memory_availability()
    asked, read = [], resident.read_process
    monkeypatch.setattr(resident, "read_process", lambda pid, *proc: asked.append(pid) or read(pid, *proc))
    after = manager.check_memory_availability()
    new = {p.pid for p in after.memory.processes} - {p.pid for p in before.memory.processes}
    assert os.getpid() in after.app_pids and len(asked) <= len(new) + 10   # those that started meanwhile


@linux
@root
def test_another_process_with_the_same_number_is_another(spawn):
    numbers = Path("/proc/sys/kernel/ns_last_pid")
    if not os.access(numbers, os.W_OK): pytest.skip("the kernel gives no number that is asked for")
    reader, names = resident.ResidentReader(), resident.ProcessNames()

    def look(pid):
        found = reader.read()
        return next(k.info.start_time for p, k in zip(found, names.identify(found), strict=True) if p.pid == pid)
    first = subprocess.Popen(["sleep", "60"])
    begun = look(first.pid)
    first.kill()
    first.wait()
    time.sleep(0.05)
    for _ in range(50):
        with contextlib.suppress(OSError): numbers.write_text(str(first.pid - 1))
        second = subprocess.Popen(["sleep", "60"])
        if second.pid == first.pid: break
        second.kill()
        second.wait()
    else: pytest.skip("others took the number")
    assert look(second.pid) > begun
    second.kill()
    second.wait()


def test_of_many_other_programs_the_largest_are_named(monkeypatch):
    listed = [resident.ResidentProcess(4_200_101 + n, n) for n in range(200)]
    monkeypatch.setattr(ram, "list_resident", lambda reader: listed)
    found = ResourceManager(track_self=False).check_memory_availability().memory
    assert [p.memory_used for p in found.processes] == list(range(199, 149, -1)) and found.left_out == 150


@linux
def test_without_descriptors_a_reading_has_less_and_goes_on():
    reader = resident.ResidentReader()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
        with contextlib.suppress(OSError):
            while True: opened.append(os.open(os.devnull, os.O_RDONLY))
        assert reader.read() == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in opened: os.close(descriptor)
    assert os.getpid() in {p.pid for p in reader.read()}


@linux
def test_checks_of_several_threads_do_not_disturb_each_other():
    manager, wrong = ResourceManager(), []

    def check():
        for _ in range(10):
            if os.getpid() not in manager.check_memory_availability().app_pids: wrong.append(1)
    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not wrong


def test_where_there_is_no_proc_psutil_reads_the_figures(monkeypatch):
    monkeypatch.setattr(resident, "_HAS_PROC", False)
    found = ResourceManager().check_memory_availability()
    assert found.memory.app_memory > 0 and os.getpid() in found.app_pids


IN_GROUP = """
import ctypes, json, mmap, os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.core.memory import read_memory
manager = ResourceManager()
def look():
    found = manager.check_memory_availability()
    memory = found.memory.memory
    return dict(total=memory.total, used=memory.used, cgroup=memory.cgroup, app=found.memory.app_memory,
                pids=[p.pid for p in found.memory.processes], me=os.getpid())
looks = [look()]
with open(sys.argv[2], "wb") as file:
    for _ in range(60): file.write(os.urandom(1 << 20))
    file.flush(); os.fsync(file.fileno())
with open(sys.argv[2], "rb") as file:
    while file.read(1 << 20): pass
looks.append(look())                              # 60 MiB in file cache
block = bytearray(os.urandom(1 << 20))*50
looks.append(look())                              # and 50 MiB of its own
shm = mmap.mmap(-1, 40 << 20); shm.write(bytes(40 << 20))
looks.append(look())                              # and 40 MiB of shared memory, which is not dropped
with open(sys.argv[2], "r+b") as file: locked = mmap.mmap(file.fileno(), 30 << 20)
pages = (ctypes.c_char*len(locked)).from_buffer(locked)
assert ctypes.CDLL(None).mlock(pages, ctypes.c_size_t(len(locked))) == 0
looks.append(look())                              # and 30 MiB of the file are locked
print(json.dumps(looks))
"""


@pytest.fixture(params=["v1", "v2"])
def control_group(request):
    "The folder of a real control group with a limit of 400 MiB"
    base = Path("/sys/fs/cgroup")
    if request.param == "v1": base, limit = base/"memory", "memory.limit_in_bytes"
    else:
        limit = "memory.max"
        unified = [path for path in (base, base/"unified") if (path/"cgroup.controllers").exists()]
        if not unified or "memory" not in (unified[0]/"cgroup.controllers").read_text().split():
            pytest.skip("the kernel counts no memory in groups of version 2 here")
        base = unified[0]
    if not base.is_dir(): pytest.skip(f"there are no groups of version {request.param[1:]} here")
    if request.param == "v1":
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((line.split(":", 2)[2] for line in lines if "memory" in line.split(":")[1].split(",")), "/")
        base = base/own.strip("/")
    group = base/f"cjm-test-{os.getpid()}"
    try:
        if request.param == "v2": (base/"cgroup.subtree_control").write_text("+memory")
        group.mkdir()
        (group/limit).write_text(str(400*MIB))
    except OSError as error: pytest.skip(f"no group can be made here: {error}")
    yield group
    group.rmdir()


@linux
@root
def test_in_a_real_control_group_file_cache_is_available_and_shared_memory_is_not(control_group, tmp_path):
    command = [sys.executable, "-c", IN_GROUP, control_group, tmp_path/"file"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    looks = json.loads(done.stdout)
    assert all((look["total"], look["cgroup"]) == (400*MIB, str(control_group)) for look in looks), looks
    assert all(look["pids"] == [look["me"]] and 0 < look["app"] <= look["used"] for look in looks), looks
    begin, cached, own, shared, locked = used = [look["used"]/MIB for look in looks]
    assert abs(cached - begin) < 15 and 40 < own - cached < 65 and 30 < shared - own < 55, used
    assert 20 < locked - shared < 40, used


@linux
@root
def test_a_workers_job_has_the_ram_of_the_workers_control_group(control_group):
    worker = subprocess.Popen(["sleep", "60"])
    (control_group/"cgroup.procs").write_text(str(worker.pid))
    try:
        with SimulatedDriver([SimulatedGpu()]):
            manager = ResourceManager()
            manager.register_worker(worker.pid, "llm")
            of_worker = manager.check_memory_availability(pid=worker.pid).memory.memory
            assert (of_worker.total, of_worker.cgroup) == (400*MIB, str(control_group))
            assert manager.check_memory_availability().memory.memory.total > 400*MIB
            with pytest.raises(ValueError, match="at most 400"):
                manager.job("too much", 0, worker=worker.pid, needs=dict(ram_mb=1024), timeout=0).__enter__()
            with manager.job("a job", 0, worker=worker.pid, needs=dict(ram_mb=100), timeout=0): pass
    finally:
        worker.kill()
        worker.wait()


def test_a_control_group_that_cannot_be_read_is_said_to_be(monkeypatch):
    monkeypatch.setattr(memory, "sees_cgroup", lambda pid: False)
    found = ResourceManager().check_memory_availability(pid=os.getpid())
    assert any("cannot be read from here" in note for note in found.notes)
    assert found.memory.memory.total == memory.read_memory().total


def write_group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items(): (folder/name.replace("__", ".")).write_text(f"{value}\n")


def test_what_the_kernel_can_drop_is_available_in_either_version(tmp_path):
    (tmp_path/"proc/self").mkdir(parents=True)

    def used(own, folder, **files):
        (tmp_path/"proc/self/cgroup").write_text(own)
        write_group(tmp_path/folder, **files)
        return memory.cgroup_memory(str(tmp_path), str(tmp_path/"proc")).used
    new = dict(memory__max=1000, memory__current=900)
    stat = "anon 200\nfile 600\nshmem 100\ninactive_file 200\nactive_file 300\n"
    assert used("0::/a\n", "a", **new, memory__stat=stat) == 400
    assert used("0::/a\n", "a", **new, memory__stat=stat + "slab_reclaimable 50\nslab_unreclaimable 9\n") == 350
    assert used("0::/a\n", "a", **new, memory__stat="file 600\nshmem 100\nunevictable 500\n") == 900   # without lists
    assert used("0::/a\n", "a", **new, memory__stat="file 5000\n") == 0
    assert used("0::/a\n", "a", **new, memory__stat="shmem 700\nfile 600\n") == 900
    assert used("0::/a\n", "a", **new, memory__stat="") == 900
    old = dict(memory__limit_in_bytes=1000, memory__usage_in_bytes=900)
    lines = "cache 1\nshmem 1\ntotal_cache 600\ntotal_shmem 100\ntotal_inactive_file 200\ntotal_active_file 300\n"
    assert used("4:memory:/b\n", "memory/b", **old, memory__stat=lines) == 400


def test_a_container_has_the_smallest_limit_above_it_and_the_machines_swap(monkeypatch):
    machine = HostMemory(1000, 400, swap_total=500, swap_used=200)
    monkeypatch.setattr(memory, "read_machine", lambda: machine)
    for group, total, swap in [
            (None, 1000, (500, 200)), (HostMemory(1000, 9, "/a", swap_total=1, swap_used=1), 1000, (500, 200)),
            (HostMemory(999, 9, "/a", swap_total=None, swap_used=7), 999, (500, 7)),
            (HostMemory(999, 9, "/a", swap_total=0, swap_used=0), 999, (0, 0)),
            (HostMemory(999, 9, "/a"), 999, (500, None))]:
        monkeypatch.setattr(memory, "cgroup_memory", lambda group=group: group)
        found = memory.read_memory()
        assert (found.total, (found.swap_total, found.swap_used)) == (total, swap)


def test_swap_is_told_where_ram_is_short():
    used = HostMemory(100 << 30, 95 << 30, swap_total=8 << 30, swap_used=3 << 30)
    from cjm_fasthtml_resources.core.classify import classify_memory
    assert "3.0 GiB of 8.0 GiB swap in use" in classify_memory(used, []).message
    assert "swap" not in classify_memory(HostMemory(100 << 30, 95 << 30), []).message
    assert "swap" not in classify_memory(HostMemory(100 << 30, 5 << 30, swap_total=1, swap_used=1), []).message
