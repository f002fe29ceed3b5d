"Who a process is: told from /proc, through the host's, and before a signal is sent"
import os
import time
from pathlib import Path

from conftest import GONE

from cjm_fasthtml_resources.core import ending, memory
from cjm_fasthtml_resources.core import process as proc
from cjm_fasthtml_resources.core.process import ProcessId, ProcessInfo, Stat


def test_without_proc_the_same_is_told_by_psutil():
    there, by_psutil = proc.read_stat(os.getpid()), proc._stat_by_psutil(os.getpid())
    assert (by_psutil.name, by_psutil.ppid) == (there.name, there.ppid) and by_psutil.state in ("running", "sleeping")
    import psutil
    assert by_psutil.start_time == psutil.Process().create_time()


def test_of_known_processes_those_that_ended_are_forgotten(monkeypatch, spawn):
    me, other = proc.read_process(os.getpid()), spawn("input()").pid
    living = {os.getpid(): proc._Known(me), os.getppid(): proc._Known(proc.read_process(os.getppid()))}
    ended = {pid: proc._Known(ProcessInfo(pid, start)) for pid, start in ((GONE, 1.0), (other, -1.0))}
    monkeypatch.setattr(proc, "_LEAST", 3)
    monkeypatch.setattr(proc, "_known", {**living, **ended})
    proc._forget_ended()
    assert proc._known == living and proc._most == [4]
    monkeypatch.setattr(proc, "_LEAST", 5)
    proc._forget_ended()
    assert proc._most == [5]
    monkeypatch.setattr(proc, "_known", {})
    proc._forget_ended()
    assert proc._most == [5]


def test_where_the_hosts_processes_are(tmp_path, monkeypatch):
    (tmp_path/"self").mkdir()
    (tmp_path/"self/status").touch()
    monkeypatch.setenv("CJM_HOST_PROC", str(tmp_path))
    assert proc.host_proc() == str(tmp_path)
    exists, asked = os.path.exists, []
    monkeypatch.setattr(os.path, "exists", lambda path: (asked.append(path), exists(path))[1])
    monkeypatch.setenv("CJM_HOST_PROC", str(tmp_path/"not-here"))
    assert proc.host_proc() is None
    monkeypatch.delenv("CJM_HOST_PROC")
    proc.host_proc()
    assert asked == [f"{tmp_path}/not-here/self/status", "/host/proc/self/status"]


def test_ancestors_end_where_a_parent_is_younger_than_its_child(monkeypatch):
    stats = {9: Stat("i", "S", 8, 50.0), 8: Stat("h", "S", 7, 50.0), 7: Stat("g", "S", 6, 40.0),
             6: Stat("f", "S", 5, 41.0)}
    monkeypatch.setattr(proc, "read_stat", stats.get)
    assert proc.find_ancestors(9) == ((8, 50.0), (7, 40.0))    # started at the same tick; 6 is a later process
    stats[6] = Stat("f", "S", 5, 39.0)
    assert proc.find_ancestors(9) == ((8, 50.0), (7, 40.0), (6, 39.0), (5, None))   # 5 may not be seen
    ring = {pid: Stat("r", "S", pid % 3 + 1, 1.0) for pid in (1, 2, 3)}
    monkeypatch.setattr(proc, "read_stat", ring.get)
    assert len(proc.find_ancestors(1)) == 1000   # parents that change while we walk


def test_who_a_new_process_is(spawn):
    import psutil
    process = spawn("input()")
    name, username = proc._name_and_user(process.pid, proc.read_stat(process.pid))
    assert (name, username) == (psutil.Process(process.pid).name(), psutil.Process().username())
    assert proc._name_and_user(GONE, Stat("cut", "S", 1, 1.0)) == ("cut", None)
    info = proc._look_at(process.pid, proc.read_stat(process.pid))
    assert (info.name, info.username, info.start_time) == (name, username, proc.read_start(process.pid))
    assert info.ancestors[0].pid == os.getpid()


def test_a_signal_reaches_the_process_that_was_meant_or_nobody(spawn, monkeypatch):
    process = spawn("input()")
    itself = ProcessId(process.pid, proc.read_start(process.pid))
    sent = []
    assert ending.send_signal(itself, 0)
    assert not ending.send_signal(itself._replace(start_time=None), 0)
    assert not ending.send_signal(ProcessId(GONE, 1.0), 0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5): ending.send_signal(itself, 0)
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.setattr(os, "pidfd_open", lambda pid: (_ for _ in ()).throw(OSError(38, "no pidfd in this kernel")))
    monkeypatch.setattr(os, "kill", lambda *args: sent.append(args))
    assert ending.send_signal(itself, 15) and sent == [(process.pid, 15)]
    assert not ending.send_signal(itself._replace(start_time=1.0), 15) and len(sent) == 1
    monkeypatch.setattr(os, "kill", lambda *args: (_ for _ in ()).throw(ProcessLookupError()))
    assert not ending.send_signal(itself, 15)   # it ended in that very moment


def test_who_may_not_be_signalled_lives_on_and_the_others_end(spawn, monkeypatch):
    first, second = (spawn("input()") for _ in range(2))
    ids = [ProcessId(p.pid, proc.read_start(p.pid)) for p in (first, second)]
    send = ending.send_signal
    def refuse(process, number):
        if process == ids[0]: raise PermissionError
        return send(process, number)
    monkeypatch.setattr(ending, "send_signal", refuse)
    began = time.monotonic()
    assert ending._signal_all(ids, 9, 0.3) == [ids[0]] and 0.3 <= time.monotonic() - began < 1 and second.wait() == -9


def fake_proc(folder: Path, processes: dict[int | str, tuple[list[int], int]], namespace: Path) -> str:
    "A process file system: the PIDs of each process in each namespace, its start, and one namespace, a file, for all"
    namespace.touch()
    for pid, (numbers, start) in processes.items():
        (folder/str(pid)/"ns").mkdir(parents=True)
        (folder/str(pid)/"status").write_text("Name:\tx\nNSpid:\t" + "\t".join(map(str, numbers)) + "\n")
        (folder/str(pid)/"stat").write_text(f"{numbers[0]} (name of {pid}) S 1 " + " ".join(["0"]*17) + f" {start} 0\n")
        os.link(namespace, folder/str(pid)/"ns/pid")
    return str(folder)


def test_a_number_of_the_hosts_is_translated_only_for_what_is_here(tmp_path):
    outer = fake_proc(tmp_path/"host", {
        "self": ([500, 1], 10), 600: ([600, 7], 20), 601: ([601], 20), 602: ([602, 8], 20), 603: ([603, 9], 20),
        604: ([604, 7, 3], 20)}, tmp_path/"namespace")
    inner = fake_proc(tmp_path/"here", {"self": ([1], 10), 7: ([7], 20), 8: ([8], 99)}, tmp_path/"namespace")
    assert proc.to_local_pid(600, outer, inner) == 7
    assert proc.to_local_pid(601, outer, inner) is None   # it has no number in here
    assert proc.to_local_pid(602, outer, inner) is None   # its number is another process' here: another start
    assert proc.to_local_pid(603, outer, inner) is None   # no process has its number here
    assert proc.to_local_pid(604, outer, inner) == 7      # in a namespace within this one
    assert proc.to_local_pid(699, outer, inner) is None   # nobody
    os.remove(tmp_path/"here/self/ns/pid")
    (tmp_path/"here/self/ns/pid").touch()
    assert proc.to_local_pid(600, outer, inner) is None   # as deep as we are, but in another namespace
    os.remove(tmp_path/"host/600/ns/pid")
    assert proc.to_local_pid(600, outer, inner) == 7      # which namespace may not be read: start and number have to do
    (tmp_path/"host/self/status").write_text("NSpid:\t1\n")
    assert proc.to_local_pid(600, outer, inner) is None   # where there is no namespace there is nothing to translate


def test_who_a_process_of_the_hosts_is(tmp_path):
    me = os.getpid()
    itself = ProcessInfo(me, name=proc.read_stat(me).name, foreign=True)   # /proc is this one's: not in a container
    assert proc._read_through("/proc", me) == itself
    assert proc._read_through("/proc", GONE) == ProcessInfo(GONE, foreign=True)
    start = round(proc.read_start(os.getpid())*os.sysconf("SC_CLK_TCK"))
    numbers = {"self": ([500, me], start), 600: ([600, me], start)}
    outer = fake_proc(tmp_path, numbers, tmp_path/"namespace")
    os.remove(tmp_path/"600/ns/pid")
    assert proc._read_through(outer, 600) == proc.read_process(os.getpid())


def test_which_control_group_a_process_is_in():
    version, path = memory._own_cgroup("/proc", os.getpid())
    assert memory.in_cgroup(os.getpid(), memory._folders("/sys/fs/cgroup", version, path)[0])
    assert not memory.in_cgroup(os.getpid(), "/sys/fs/cgroup/not-this-one")
    assert not memory.in_cgroup(GONE, "/sys/fs/cgroup")
