"What examples show in passing, held exactly: each argument is passed on, each message says who and what, each boundary is where it is said to be"
import logging, os, sqlite3, threading, time
from dataclasses import replace
from pathlib import Path

import pytest

from cjm_fasthtml_resources.core import host, store
from cjm_fasthtml_resources.core.classify import DeviceStatus, OwnedProcess, ResourceConflict, ResourceStatus, ResourceType, WorkerState
from cjm_fasthtml_resources.core.gpu import GpuDevice
from cjm_fasthtml_resources.core.host import ProcessId, ProcessInfo
from cjm_fasthtml_resources.core.manager import ResourceBusy, ResourceManager, ResourceUnavailable
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

GONE = 2**22 + 1  # Linux gives no number as high as this


def warned(caplog) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return found


# Who a process is

def test_without_proc_the_same_is_told_by_psutil():
    there, by_psutil = host.read_stat(os.getpid()), host._stat_by_psutil(os.getpid())
    assert (by_psutil.name, by_psutil.ppid) == (there.name, there.ppid) and by_psutil.state in ("running", "sleeping")
    import psutil
    assert by_psutil.start_time == psutil.Process().create_time()


def test_of_known_processes_those_that_ended_are_forgotten(monkeypatch):
    me = host.read_process(os.getpid())
    living = {pid: replace(me, pid=pid) for pid in (os.getpid(), os.getppid())}
    living[os.getppid()] = host.read_process(os.getppid())
    monkeypatch.setattr(host, "_LEAST", 3)
    monkeypatch.setattr(host, "_known", {**living, GONE: ProcessInfo(GONE, 1.0), 1: ProcessInfo(1, -1.0)})
    host._forget_ended()
    assert host._known == living and host._most == [4]
    monkeypatch.setattr(host, "_LEAST", 5)
    host._forget_ended()
    assert host._most == [5]
    monkeypatch.setattr(host, "_known", {})
    host._forget_ended()
    assert host._most == [5]


def fake_proc(folder: Path, processes: dict[int | str, tuple[list[int], int]], namespace: int) -> str:
    "A process file system with the PIDs of each process in each namespace, its start in ticks, and its namespace"
    for pid, (numbers, start) in processes.items():
        (folder/str(pid)/"ns").mkdir(parents=True)
        (folder/str(pid)/"status").write_text("Name:\tx\nNSpid:\t" + "\t".join(map(str, numbers)) + "\n")
        (folder/str(pid)/"stat").write_text(f"{numbers[0]} (name of {pid}) S 1 " + " ".join(["0"]*17) + f" {start} 0\n")
        (folder/"inodes").mkdir(exist_ok=True)
        (folder/"inodes"/str(namespace)).touch()
        os.link(folder/"inodes"/str(namespace), folder/str(pid)/"ns"/"pid")
    return str(folder)


def test_a_number_of_the_hosts_is_translated_only_for_what_is_here(tmp_path):
    outer = fake_proc(tmp_path/"host", {"self": ([500, 1], 10), 600: ([600, 7], 20), 601: ([601], 20), 602: ([602, 8], 20), 603: ([603, 9], 20), 604: ([604, 7, 3], 20)}, 1)
    inner = fake_proc(tmp_path/"here", {"self": ([1], 10), 7: ([7], 20), 8: ([8], 99)}, 1)
    os.remove(tmp_path/"here/self/ns/pid")
    os.link(tmp_path/"host/inodes/1", tmp_path/"here/self/ns/pid")
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
    outer = fake_proc(tmp_path, {"self": ([500, os.getpid()], start), 600: ([600, os.getpid()], start)}, 1)
    os.remove(tmp_path/"600/ns/pid")
    assert host._read_through(outer, 600) == host.read_process(os.getpid())


def test_which_control_group_a_process_is_in():
    version, path = host._own_cgroup("/proc", os.getpid())
    assert host.in_cgroup(os.getpid(), host._folders("/sys/fs/cgroup", version, path)[0]) and not host.in_cgroup(os.getpid(), "/sys/fs/cgroup/not-this-one")
    assert not host.in_cgroup(GONE, "/sys/fs/cgroup")


# What is said

def test_a_worker_says_what_it_knows():
    assert repr(WorkerState(7, "llm")) == "WorkerState(pid=7, worker_type='llm', status='idle')"
    assert repr(WorkerState(7, "llm", "job", config={"key": 1}, is_remote=True, last_used=5.0, child_pids=[8])) == \
        "WorkerState(pid=7, worker_type='llm', job_id='job', config={'key': '***'}, status='idle', child_pids=[8], is_remote=True)"


def test_an_answer_in_a_terminal_has_a_line_for_each_device():
    class Printer:
        def text(self, text): self.shown = text
    printer = Printer()
    free = DeviceStatus(GpuDevice(0, memory_total=2**30, memory_used=2**28, memory_free=3*2**28), ResourceStatus.AVAILABLE, external_memory=2**28)
    lost = DeviceStatus(GpuDevice(1, name="NVIDIA L4"), ResourceStatus.UNAVAILABLE, reason="the GPU is lost")
    ResourceConflict(ResourceType.GPU_MEMORY, ResourceStatus.AVAILABLE, devices=(free, lost))._repr_pretty_(printer, False)
    assert printer.shown.splitlines() == ["gpu_memory: available. A GPU job could start now: GPU 0 (no name) has 768 MiB free.",
                                          "  GPU 0  no name  available: external 256 MiB, free 768 MiB", "  GPU 1  NVIDIA L4  unavailable: the GPU is lost"]


def test_a_configuration_that_is_none_is_named():
    with pytest.raises(TypeError, match="^config must be a dictionary, not list$"): ResourceManager.from_config([])
    with pytest.raises(ValueError, match="^config has no field 'gpus'; allowed are: gpu_memory_threshold_percent, "): ResourceManager.from_config({"gpus": 1})


# What a plugin is asked

class Server:
    "A plugin with child processes, whose answers the test sets"
    children = [GONE]
    def get_execution_mode(self): return "subprocess"
    def get_child_pids(self): return self.children
    def get_managed_resources(self): return {}
    def force_cleanup(self): pass


def test_a_refresh_takes_what_is_new_and_warns_of_what_is_not_there(caplog):
    manager, plugin = ResourceManager(), Server()
    assert manager.refresh_worker(7) is None and warned(caplog) == ["refresh_worker: no worker with PID 7 is registered"]
    silent = manager.register_worker(8, "llm")
    assert manager.refresh_worker(8) is silent and not warned(caplog)   # nobody to ask, nothing to complain about
    before = manager.register_worker(9, "llm", plugin_instance=plugin)
    asked = manager._asked[9]
    assert manager.refresh_worker(9) is before and manager._asked[9] > asked and 8 not in manager._asked   # nothing new: the same object
    plugin.children = [GONE, os.getpid()]
    after = manager.refresh_worker(9)
    assert after.child_pids == [GONE, os.getpid()] and manager._children[os.getpid()] == {9: host.read_start(os.getpid())}
    assert manager.refresh_worker(9) is after
    manager._children[os.getpid()][9] = 0.5   # as if the number had changed hands since
    assert manager.refresh_worker(9) == after and manager._children[os.getpid()] == {9: 0.5}   # the child that was declared is not taken for another


def test_a_plugin_that_hangs_holds_up_no_check_and_is_heard_when_it_answers(caplog, monkeypatch):
    answer, calls = threading.Event(), []

    class Hanging(Server):
        def get_child_pids(self):
            calls.append(threading.current_thread())
            if len(calls) > 1: answer.wait(10)
            return self.children + [os.getpid()][:answer.is_set()]

    other = Server()
    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager()
        for pid, plugin in [(7, Hanging()), (8, other)]: manager.register_worker(pid, "llm", plugin_instance=plugin)
        monkeypatch.setattr("cjm_fasthtml_resources.core.manager._REFRESH_AFTER", 0.05)
        monkeypatch.setattr("cjm_fasthtml_resources.core.manager._PLUGIN_WITHIN", 0.3)
        other.children = [GONE + 1]
        time.sleep(0.06)
        began = time.monotonic()
        assert manager.check_gpu_availability().status is ResourceStatus.AVAILABLE and 0.3 <= time.monotonic() - began < 2
        assert warned(caplog) == ["the plugin of worker 7 does not answer within 0.3 s; what it said before counts until it does"]
        assert manager.get_worker_by_pid(7).child_pids == [GONE] and manager.get_worker_by_pid(8).child_pids == [GONE + 1]   # the others are heard
        time.sleep(0.06)
        began = time.monotonic()
        for _ in range(20): manager.check_gpu_availability()
        assert time.monotonic() - began < 0.3 and len(calls) == 2 and not warned(caplog)   # not waited for again, and no second thread
        answer.set()
        calls[1].join(5)
        assert manager.get_worker_by_pid(7).child_pids == [GONE, os.getpid()]
        time.sleep(0.06)
        manager.check_gpu_availability()
        assert len(calls) == 3


def test_a_rented_machine_costs_what_its_plugin_estimates_else_its_price_per_hour(caplog):
    class Rented:
        def __init__(self, price, estimate): self.price, self.estimate = price, estimate
        def get_remote_resource_info(self): return {"provider": "x", "estimated_cost_per_hour": self.price}
        def provision_remote_resource(self, **config): ...
        def check_remote_resource_status(self): return "running"
        def terminate_remote_resource(self): return True
        def estimate_cost(self, hours): return self.estimate and self.estimate(hours)

    def cost(price, estimate, *hours):
        manager = ResourceManager()
        manager.register_worker(41, "llm", plugin_instance=Rented(price, estimate))
        return manager.estimate_total_cloud_cost(*hours)

    assert cost(2, lambda hours: 10 + hours) == 11 and cost(2, lambda hours: 10 + hours, 3) == 13
    assert cost(2, None) == 2 and cost(2, None, 3) == 6 and cost(2, lambda hours: True, 3) == 6 and not warned(caplog)
    assert cost(None, None) == 0.0 and warned(caplog) == ["the plugin of worker 41 says nothing about cost; it is left out of the sum"]


# Which device

def test_the_devices_with_the_most_room_come_first():
    with SimulatedDriver([SimulatedGpu(memory_total_mb=total, memory_reserved_mb=0) for total in (1_000, 3_000, 2_000)]):
        manager = ResourceManager()
        assert [d.index for d in manager.pick_gpus(3).devices] == [1, 2, 0]
        free = [d.room/2**20 for d in manager.check_gpu_availability().devices]
        assert [d.index for d in manager.pick_gpus(2, min_free_mb=free[2]).devices] == [1, 2]   # exactly as much as it has
        with pytest.raises(ResourceBusy, match=r"^2 GPUs with .* free were asked for, 1 of 3 have it$") as busy: manager.pick_gpus(2, min_free_mb=free[2] + 1)
        assert len(busy.value.conflict.devices) == 3
        with pytest.raises(ResourceUnavailable, match=r"^4 GPUs were asked for, 3 can be used$") as too_many: manager.pick_gpus(4)
        assert len(too_many.value.conflict.devices) == 3
    with SimulatedDriver([SimulatedGpu(memory_total_mb=1_000, processes=[SimulatedProcess(GONE, 1_000)])]):
        assert ResourceManager().pick_gpus().devices[0].index == 0   # without a figure a full one is one
    with SimulatedDriver([]), pytest.raises(ResourceUnavailable, match="^1 GPUs were asked for, 0 can be used: the NVIDIA driver sees no GPU$"): ResourceManager().pick_gpus()


def test_waiting_passes_its_arguments_on(monkeypatch):
    asked = []
    with SimulatedDriver([SimulatedGpu(), SimulatedGpu()]):
        manager = ResourceManager()
        reserve = manager.reserve
        monkeypatch.setattr(manager, "reserve", lambda *args, **kw: (asked.append((args, kw)), reserve(*args, **kw))[1])
        assert manager.wait_for_gpu(1_000, 1, 5).devices[0].index == 1
        assert manager.wait_for_gpu(1_000, 0, progress=True).devices[0].index == 0
    assert asked == [((1_000, 1, 5), {"progress": False}), ((1_000, 0, None), {"progress": True})]


# The file of an app

def test_a_damaged_file_is_set_aside_with_what_belongs_to_it(tmp_path):
    path = tmp_path/"apps.sqlite"
    for number in (1, 2):
        for suffix in ("", "-wal", "-shm"): Path(f"{path}{suffix}").write_text(f"{number}{suffix}")
        assert store._set_aside(path) == Path(f"{path}.damaged-{number}")
        assert [Path(f"{path}.damaged-{number}{suffix}").read_text() for suffix in ("", "-wal", "-shm")] == [f"{number}", f"{number}-wal", f"{number}-shm"]
    assert not path.exists()


def test_what_is_wrong_with_a_file_is_said_in_words():
    assert store._is_damaged(sqlite3.DatabaseError("malformed")) and not store._is_damaged(sqlite3.OperationalError("locked")) and not store._is_damaged(sqlite3.InterfaceError("x"))
    said = store._in_words
    assert said(None, sqlite3.OperationalError("interrupted")) == "the store in memory cannot be used: interrupted"
    assert said(Path("/a"), sqlite3.OperationalError("database is locked")) == "/a is locked by another process for 10 s now; is that one stopped?"
    assert said(Path("/a"), sqlite3.OperationalError("database or disk is full")) == "/a cannot be written, its disk is full"
    assert said(Path("/a"), sqlite3.OperationalError("attempt to write a readonly database")) == "/a cannot be written, it or its disk is read-only"
    assert said(Path("/a"), sqlite3.OperationalError("unable to open database file")) == "/a cannot be opened; may its folder be written?"
