"Who a process is: told from /proc, through the host's, and before a signal is sent"
import os, time
from dataclasses import replace
from pathlib import Path

from conftest import GONE

from cjm_fasthtml_resources.core import host
from cjm_fasthtml_resources.core.host import ProcessId, ProcessInfo, Stat


def test_without_proc_the_same_is_told_by_psutil():
    there, by_psutil = host.read_stat(os.getpid()), host._stat_by_psutil(os.getpid())
    assert (by_psutil.name, by_psutil.ppid) == (there.name, there.ppid) and by_psutil.state in ("running", "sleeping")
    import psutil
    assert by_psutil.start_time == psutil.Process().create_time()


def test_of_known_processes_those_that_ended_are_forgotten(monkeypatch, spawn):
    me, other = host.read_process(os.getpid()), spawn("input()").pid
    living = {pid: replace(me, pid=pid) for pid in (os.getpid(), os.getppid())}
    living[os.getppid()] = host.read_process(os.getppid())
    monkeypatch.setattr(host, "_LEAST", 3)
    monkeypatch.setattr(host, "_known", {**living, GONE: ProcessInfo(GONE, 1.0), other: ProcessInfo(other, -1.0)})
    host._forget_ended()
    assert host._known == living and host._most == [4]
    monkeypatch.setattr(host, "_LEAST", 5)
    host._forget_ended()
    assert host._most == [5]
    monkeypatch.setattr(host, "_known", {})
    host._forget_ended()
    assert host._most == [5]


def test_where_the_hosts_processes_are(tmp_path, monkeypatch):
    (tmp_path/"self").mkdir()
    (tmp_path/"self/status").touch()
    monkeypatch.setenv("CJM_HOST_PROC", str(tmp_path))
    assert host.host_proc() == str(tmp_path)
    exists, asked = os.path.exists, []
    monkeypatch.setattr(os.path, "exists", lambda path: (asked.append(path), exists(path))[1])
    monkeypatch.setenv("CJM_HOST_PROC", str(tmp_path/"not-here"))
    assert host.host_proc() is None
    monkeypatch.delenv("CJM_HOST_PROC")
    host.host_proc()
    assert asked == [f"{tmp_path}/not-here/self/status", "/host/proc/self/status"]


def test_ancestors_end_where_a_parent_is_younger_than_its_child(monkeypatch):
    stats = {9: Stat("i", "S", 8, 50.0), 8: Stat("h", "S", 7, 50.0), 7: Stat("g", "S", 6, 40.0), 6: Stat("f", "S", 5, 41.0)}
    monkeypatch.setattr(host, "read_stat", stats.get)
    assert host.find_ancestors(9) == ((8, 50.0), (7, 40.0))    # started at the same moment, which is the clock's tick; 6 is a later process
    stats[6] = Stat("f", "S", 5, 39.0)
    assert host.find_ancestors(9) == ((8, 50.0), (7, 40.0), (6, 39.0), (5, None))   # 5 may not be seen
    ring = {pid: Stat("r", "S", pid % 3 + 1, 1.0) for pid in (1, 2, 3)}
    monkeypatch.setattr(host, "read_stat", ring.get)
    assert len(host.find_ancestors(1)) == 1000   # parents that change while we walk


def test_who_a_new_process_is(spawn):
    import psutil
    process = spawn("input()")
    name, username = host._name_and_user(process.pid, host.read_stat(process.pid))
    assert (name, username) == (psutil.Process(process.pid).name(), psutil.Process().username())
    assert host._name_and_user(GONE, Stat("cut", "S", 1, 1.0)) == ("cut", None)
    info = host._look_at(process.pid, host.read_stat(process.pid))
    assert (info.name, info.username, info.start_time, info.ancestors[0].pid) == (name, username, host.read_start(process.pid), os.getpid())


def test_a_signal_reaches_the_process_that_was_meant_or_nobody(spawn, monkeypatch):
    process = spawn("input()")
    itself = ProcessId(process.pid, host.read_start(process.pid))
    sent = []
    assert host.send_signal(itself, 0) and not host.send_signal(itself._replace(start_time=None), 0) and not host.send_signal(ProcessId(GONE, 1.0), 0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5): host.send_signal(itself, 0)
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.setattr(os, "pidfd_open", lambda pid: (_ for _ in ()).throw(OSError(38, "no pidfd in this kernel")))
    monkeypatch.setattr(os, "kill", lambda *args: sent.append(args))
    assert host.send_signal(itself, 15) and sent == [(process.pid, 15)] and not host.send_signal(itself._replace(start_time=1.0), 15) and len(sent) == 1
    monkeypatch.setattr(os, "kill", lambda *args: (_ for _ in ()).throw(ProcessLookupError()))
    assert not host.send_signal(itself, 15)   # it ended in that very moment


def test_who_may_not_be_signalled_lives_on_and_the_others_end(spawn, monkeypatch):
    first, second = (spawn("input()") for _ in range(2))
    ids = [ProcessId(p.pid, host.read_start(p.pid)) for p in (first, second)]
    send = host.send_signal
    def refuse(process, number):
        if process == ids[0]: raise PermissionError
        return send(process, number)
    monkeypatch.setattr(host, "send_signal", refuse)
    began = time.monotonic()
    assert host._signal_all(ids, 9, 0.3) == [ids[0]] and 0.3 <= time.monotonic() - began < 1 and second.wait() == -9


def fake_proc(folder: Path, processes: dict[int | str, tuple[list[int], int]], namespace: Path) -> str:
    "A process file system with the PIDs of each process in each namespace, its start in ticks, and all in one namespace, which is a file"
    namespace.touch()
    for pid, (numbers, start) in processes.items():
        (folder/str(pid)/"ns").mkdir(parents=True)
        (folder/str(pid)/"status").write_text("Name:\tx\nNSpid:\t" + "\t".join(map(str, numbers)) + "\n")
        (folder/str(pid)/"stat").write_text(f"{numbers[0]} (name of {pid}) S 1 " + " ".join(["0"]*17) + f" {start} 0\n")
        os.link(namespace, folder/str(pid)/"ns/pid")
    return str(folder)


def test_a_number_of_the_hosts_is_translated_only_for_what_is_here(tmp_path):
    outer = fake_proc(tmp_path/"host", {"self": ([500, 1], 10), 600: ([600, 7], 20), 601: ([601], 20), 602: ([602, 8], 20), 603: ([603, 9], 20), 604: ([604, 7, 3], 20)}, tmp_path/"namespace")
    inner = fake_proc(tmp_path/"here", {"self": ([1], 10), 7: ([7], 20), 8: ([8], 99)}, tmp_path/"namespace")
    assert host.to_local_pid(600, outer, inner) == 7
    assert host.to_local_pid(601, outer, inner) is None   # it has no number in here
    assert host.to_local_pid(602, outer, inner) is None   # its number is another process' here: it started at another time
    assert host.to_local_pid(603, outer, inner) is None   # no process has its number here
    assert host.to_local_pid(604, outer, inner) == 7      # in a namespace within this one
    assert host.to_local_pid(699, outer, inner) is None   # nobody
    os.remove(tmp_path/"here/self/ns/pid")
    (tmp_path/"here/self/ns/pid").touch()
    assert host.to_local_pid(600, outer, inner) is None   # as deep as we are, but in another namespace
    os.remove(tmp_path/"host/600/ns/pid")
    assert host.to_local_pid(600, outer, inner) == 7      # which namespace may not be read: start and number have to do
    (tmp_path/"host/self/status").write_text("NSpid:\t1\n")
    assert host.to_local_pid(600, outer, inner) is None   # where there is no namespace there is nothing to translate


def test_who_a_process_of_the_hosts_is(tmp_path):
    assert host._read_through("/proc", os.getpid()) == ProcessInfo(os.getpid(), name=host.read_stat(os.getpid()).name, foreign=True)  # /proc is this one's: not in a container
    assert host._read_through("/proc", GONE) == ProcessInfo(GONE, foreign=True)
    start = round(host.read_start(os.getpid())*os.sysconf("SC_CLK_TCK"))
    outer = fake_proc(tmp_path, {"self": ([500, os.getpid()], start), 600: ([600, os.getpid()], start)}, tmp_path/"namespace")
    os.remove(tmp_path/"600/ns/pid")
    assert host._read_through(outer, 600) == host.read_process(os.getpid())


def test_which_control_group_a_process_is_in():
    version, path = host._own_cgroup("/proc", os.getpid())
    assert host.in_cgroup(os.getpid(), host._folders("/sys/fs/cgroup", version, path)[0]) and not host.in_cgroup(os.getpid(), "/sys/fs/cgroup/not-this-one")
    assert not host.in_cgroup(GONE, "/sys/fs/cgroup")
