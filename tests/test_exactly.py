"What examples show in passing, held exactly: each argument is passed on, each message says who and what, each boundary is where it is said to be"
import asyncio, json, logging, os, sqlite3, threading, time
from dataclasses import replace
from pathlib import Path

import pynvml, pytest

from cjm_fasthtml_resources.core import host, store
from cjm_fasthtml_resources.core.classify import DeviceStatus, OwnedProcess, ResourceConflict, ResourceStatus, ResourceType, WorkerState, classify_memory, conclude, explain_shortage, held_by, measure
from cjm_fasthtml_resources.core.gpu import GpuDevice, GpuProcess, GpuSnapshot, in_words, read_gpus, visible_devices, visible_env
from cjm_fasthtml_resources.core.host import HostMemory, ProcessId, ProcessInfo, Stat
from cjm_fasthtml_resources.core import manager as module
from cjm_fasthtml_resources.core.monitor import DevicePoint, History, Point, ResourceMonitor, Subscription, take_sample, to_point
from cjm_fasthtml_resources.core.reservations import WAIT_BUCKETS, Claim, DeviceUse, Ledger, Promise, Waits, find_pools, grant, read_use
from cjm_fasthtml_resources.core.roster import from_row, to_row
from cjm_fasthtml_resources.core.manager import ResourceBusy, ResourceManager, ResourceUnavailable, plan_room
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedMachine, SimulatedProcess

MIB, GIB = 2**20, 2**30
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


# What the driver says

def test_a_device_is_read_whole():
    gpu = SimulatedGpu("NVIDIA L4", uuid="GPU-a", memory_total_mb=24_000, memory_reserved_mb=300, utilization=37, temperature=61, power_usage=51.25, power_limit=72,
                       processes=[SimulatedProcess(4_300_002, 700), SimulatedProcess(4_300_001, 100, "graphics"), SimulatedProcess(4_300_003, None, "mps")])
    with SimulatedDriver([gpu]): snapshot = read_gpus()
    assert snapshot == GpuSnapshot((GpuDevice(
        0, "GPU-a", "NVIDIA L4", 24_000*MIB, 800*MIB, 22_900*MIB, 300*MIB, 37, 61, 51.25, 72.0,
        (GpuProcess(4_300_001, 100*MIB, "graphics"), GpuProcess(4_300_002, 700*MIB, "compute"), GpuProcess(4_300_003, None, "mps"))),), None, "580.105.08 (simulated)", snapshot.time)
    assert abs(snapshot.time - time.time()) < 5 and snapshot.simulated and not snapshot.late and snapshot.pids == {4_300_001, 4_300_002, 4_300_003}
    assert GpuDevice(0, memory_total=10, memory_reserved=3).capacity == 7 and GpuDevice(0).capacity == 0
    assert [GpuDevice(2, host="a").id, GpuDevice(1, mig_parent=2, host="a").id, GpuDevice(1, mig_parent=2).id] == ["a:2", "a:2:1", "2:1"]


@pytest.mark.parametrize("code, words", [
    (1, "the connection to the NVIDIA driver was closed"), (3, "the device does not report its memory"), (4, "no permission to ask the NVIDIA driver (in a container: is the GPU passed in?)"),
    (9, "the NVIDIA driver is not loaded"), (12, "no NVIDIA driver (its library libnvidia-ml was not found)"), (15, "the GPU is lost (it fell off the bus) and needs a reset or a reboot"),
    (16, "the GPU needs a reset before it can be used again"), (17, "the operating system blocks the GPU (cgroup device rules?)"),
    (18, "the NVIDIA library and the loaded driver are of different versions, as after an upgrade; reboot, or reload the driver, and start this program again"),
    (999, "the NVIDIA driver answered: Unknown Error")])
def test_an_error_of_the_driver_is_said_in_words(code, words):
    with SimulatedDriver(): assert in_words(pynvml.NVMLError(code)) == words
    assert in_words(OSError("no such device")) == "the NVIDIA driver answered: no such device" and in_words(ImportError("x")) == "the Python package nvidia-ml-py is not installed"


def test_what_a_driver_does_not_answer_is_none_and_the_rest_is_there():
    def read(*calls, code=3):
        with SimulatedDriver([SimulatedGpu(power_usage=50, processes=[SimulatedProcess(4_300_001, 100)])]) as driver:
            for call in calls: driver.fail(call, code)
            return read_gpus().devices[0]

    for call, field in [("nvmlDeviceGetUtilizationRates", "utilization"), ("nvmlDeviceGetTemperature", "temperature"), ("nvmlDeviceGetPowerUsage", "power_usage"),
                        ("nvmlDeviceGetEnforcedPowerLimit", "power_limit"), ("nvmlDeviceGetUUID", "uuid"), ("nvmlDeviceGetName", "name")]:
        device = read(call)
        assert getattr(device, field) is None and device.memory_used == 100*MIB and device.reason is None and device.processes
        assert [name for name in ("utilization", "temperature", "power_usage", "power_limit", "uuid", "name") if getattr(device, name) is None] == [field]
    none = read(*(f"nvmlDeviceGet{kind}RunningProcesses{version}" for kind in ("Compute", "Graphics", "MPSCompute") for version in ("_v2", "_v3")))
    assert none.processes is None and none.memory_used == 100*MIB
    assert read("nvmlDeviceGetHandleByIndex_v2", code=15) == GpuDevice(0, reason="the GPU is lost (it fell off the bus) and needs a reset or a reboot")
    divided = read("nvmlDeviceGetMigMode", code=15)   # one that is divided must not be taken for a whole one
    assert divided.uuid and divided.memory_used is None and divided.reason == "the GPU is lost (it fell off the bus) and needs a reset or a reboot"


def test_a_driver_that_is_late_is_said_to_be():
    with SimulatedDriver([SimulatedGpu()]) as driver:
        driver.hang("nvmlDeviceGetTemperature")
        late = read_gpus(0.05)
        assert (late.reason, late.late, late.devices) == ("the NVIDIA driver did not answer within 0.05 s", True, ())
        driver.recover()
        assert len(read_gpus(5).devices) == 1


def test_what_is_wrong_with_cuda_visible_devices_is_named():
    two = (GpuDevice(0, "GPU-aa11"), GpuDevice(1))
    assert visible_devices(two, " ") == ((), "CUDA_VISIBLE_DEVICES is empty, so no device may be used")
    assert visible_devices(two, "1, 7,0") == ((two[1],), "CUDA_VISIBLE_DEVICES='1, 7,0' names '7', which is not here: as in CUDA, it and what follows are not visible")
    assert visible_devices(two, "MIG-1")[0] == () and visible_devices(two, "XX")[0] == () and visible_devices(two, "GPU-") == ((two[0],), None)


def test_instances_of_a_divided_gpu_are_read_with_their_names_and_those_that_are_not_there_are_skipped():
    mig = [SimulatedGpu("1g", memory_total_mb=5_000, uuid="MIG-1"), SimulatedGpu("2g", memory_total_mb=9_000, uuid="MIG-2")]
    with SimulatedDriver([SimulatedGpu("A100", uuid="GPU-a", mig=mig)]) as driver:
        whole, one, two = read_gpus().devices
        assert (whole.id, whole.mig_mode, whole.processes) == (0, True, None)
        assert [(d.id, d.uuid, d.name, d.memory_total, d.mig_parent, d.processes) for d in (one, two)] == [("0:0", "MIG-1", "1g", 5_000*MIB, 0, ()), ("0:1", "MIG-2", "2g", 9_000*MIB, 0, ())]
        driver.fail("nvmlDeviceGetMigDeviceHandleByIndex", 6, times=1)   # NVML_ERROR_NOT_FOUND: the first instance was destroyed
        assert [d.id for d in read_gpus().devices] == [0, "0:1"]
        driver.recover()
        driver.fail("nvmlDeviceGetMaxMigDeviceCount", 15)
        assert read_gpus().devices[1] == GpuDevice(0, mig_parent=0, reason="the GPU is lost (it fell off the bus) and needs a reset or a reboot")


# What is said

def test_the_sentences_for_gpu_memory():
    def said(status, *devices, **kw): return ResourceConflict(ResourceType.GPU_MEMORY, status, devices=devices, **kw).message
    def on(index, status, *processes, free=4, **kw):
        held = {owner: sum(p.memory_used or 0 for p in processes if p.owner == owner) for owner in ("app", "external")}
        return DeviceStatus(GpuDevice(index, name=kw.pop("name", "L4"), memory_total=24*GIB, memory_used=(24 - free)*GIB, memory_free=free*GIB), status, processes, held["app"], held["external"], **kw)
    A, B, E = ResourceStatus.AVAILABLE, ResourceStatus.APP_BUSY, ResourceStatus.EXTERNAL_BUSY
    many = [OwnedProcess(i, "app", i*GIB, f"w{i}") for i in range(1, 6)]
    bob, nameless = OwnedProcess(9, "external", 2*GIB, "train.py", "bob"), OwnedProcess(8, "external", None)

    assert said(ResourceStatus.UNAVAILABLE, reason="the driver sleeps") == "No GPU can be used: the driver sleeps."
    assert said(A, on(0, A, free=3), on(1, A, free=5), on(2, B, free=9)) == "A GPU job could start now: GPU 1 (L4) has 5.0 GiB free."
    assert said(A, on(0, A, estimated=True, name=None)) == "A GPU job could start now (an estimate): GPU 0 (no name) has 4.0 GiB free."
    assert said(B, on(0, B, *many), on(1, E, bob)) == "Not on a GPU of its own: the app is at work with w5 (PID 5, 5.0 GiB on GPU 0), w4 (PID 4, 4.0 GiB on GPU 0), w3 (PID 3, 3.0 GiB on GPU 0) and 2 more; GPU 0 (L4) has 4.0 GiB free beside it."
    assert said(B, replace(on(0, B), app_memory=GIB)) == "Not on a GPU of its own: the app is at work with 1.0 GiB on GPU 0; GPU 0 (L4) has 4.0 GiB free beside it."
    promises = (Promise(7, "app", 2*GIB, GIB), Promise(6, "external", 2*GIB, GIB, "night-run"), Promise(5, "app", GIB, 0))
    assert said(B, on(0, B, promises=promises)) == "Not on a GPU of its own: the app is at work with 1.0 GiB on GPU 0 promised to PID 7; GPU 0 (L4) has 2.0 GiB free beside it."
    assert said(E, on(0, E, bob, nameless, many[0]), on(1, B, many[1])) == "Not now, others hold the GPU: train.py of bob (PID 9, 2.0 GiB on GPU 0), a process without a name (PID 8 on GPU 0)."
    assert said(E, on(0, E, bob, unattributed_memory=2*GIB, promises=promises)) == "Not now, others hold the GPU: train.py of bob (PID 9, 2.0 GiB on GPU 0), 1.0 GiB on GPU 0 promised to PID 6 of the app night-run."
    assert said(E, on(0, E, bob, unattributed_memory=2*GIB + 1)) == "Not now, others hold the GPU: 2.0 GiB on GPU 0 that no visible process accounts for, train.py of bob (PID 9, 2.0 GiB on GPU 0)."
    assert explain_shortage([on(0, E, bob, free=1), on(1, B, *many[:2], unattributed_memory=GIB, promises=promises[:1])], 6*GIB) == \
        "6.0 GiB of GPU memory are wanted, and GPU 1 has 3.0 GiB free, with w2 (PID 2, 2.0 GiB), w1 (PID 1, 1.0 GiB), 1.0 GiB on GPU 1 promised to PID 7 and 1 more on it."
    assert explain_shortage([on(0, A)], 6*GIB) == "6.0 GiB of GPU memory are wanted, and GPU 0 has 4.0 GiB free." and explain_shortage([], 1) == ""


def test_the_sentences_for_ram():
    worker, bob = OwnedProcess(7, "app", 3*GIB, "worker"), OwnedProcess(9, "external", 2*GIB, "train.py", "bob")
    def ram(used, *processes, threshold=90.0): return classify_memory(HostMemory(10*GIB, used*GIB), processes, threshold)
    assert ram(5).message == "RAM is available: 5.0 GiB of 10.0 GiB free."
    mine, theirs = ram(9, OwnedProcess(8, "app", 2*GIB, "child"), bob, worker), ram(9.5, worker, bob)
    assert mine.message == "RAM is short, 1.0 GiB of 10.0 GiB free: the app itself holds it, worker (PID 7, 3.0 GiB), child (PID 8, 2.0 GiB)."
    assert theirs.message == "RAM is short, 512 MiB of 10.0 GiB free: others hold it, train.py of bob (PID 9, 2.0 GiB)."
    assert (mine.app_pids, mine.external_pids, theirs.app_pids, theirs.external_pids) == ([7, 8], [], [7], [9])
    assert mine.app_processes[0] == dict(pid=7, name="worker", username=None, memory_mb=3*1024, memory_percent=30.0, parent_pid=None, parent_worker_type=None)
    assert theirs.external_processes == [dict(pid=9, name="train.py", username="bob", memory_mb=2*1024, memory_percent=20.0)]
    assert (mine.memory.shares, mine.threshold_percent, mine.resource_type) == ({"app": 5*GIB, "external": 4*GIB}, 90.0, ResourceType.SYSTEM_MEMORY)
    small = ram(9.5, OwnedProcess(1, "external", GIB//10, "one"), OwnedProcess(2, "external", GIB//10 - 1, "less"))
    assert small.external_pids == [1] and small.memory.external_memory == 9.5*GIB   # from 1 % of the total on
    assert ram(9.5, OwnedProcess(2, "external", 1, "tiny")).external_pids == [2]    # the largest always
    unknown = ResourceConflict(ResourceType.SYSTEM_MEMORY, ResourceStatus.UNAVAILABLE, reason="2 hosts do not answer", memory=theirs.memory)
    assert unknown.message == "RAM cannot be told: 2 hosts do not answer."


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


# The arithmetic of an answer

def test_what_a_worker_holds_and_was_seen_to_hold():
    worker, silent, nameless = WorkerState(10, "llm", plugin_name="a", loaded_plugin_resource="m"), WorkerState(20, "llm", plugin_name="a", loaded_plugin_resource="m", gpu_memory_mb=3), WorkerState(30, "llm")
    tree = (OwnedProcess(10, "app", 100), OwnedProcess(11, "app", 50, parent_pid=10), OwnedProcess(12, "app", None, parent_pid=10), OwnedProcess(30, "app", 999), OwnedProcess(9, "external", 500, parent_pid=10))
    two = [DeviceStatus(GpuDevice(0), ResourceStatus.APP_BUSY, tree), DeviceStatus(GpuDevice(1), ResourceStatus.APP_BUSY, (OwnedProcess(10, "app", None),)),
           DeviceStatus(GpuDevice(2, host="b"), ResourceStatus.APP_BUSY, (OwnedProcess(10, "app", 7),))]
    assert held_by(worker, two) == {0: 150, 1: 0}   # a process without a figure is there all the same; the number 10 of another host is somebody else
    known = {w.pid: w for w in (nameless, worker, silent)}
    assert measure(known, two[:1]) == {("a", "m"): 3*MIB} and measure({10: worker}, two[:1]) == {("a", "m"): 150}
    assert measure({10: replace(worker, gpu_memory_mb=50/MIB)}, two[:1]) == {("a", "m"): 150} and measure({10: replace(worker, gpu_memory_mb=1)}, two[:1]) == {("a", "m"): MIB}   # the larger of what is seen and said
    assert measure({30: nameless, 10: replace(worker, loaded_plugin_resource=None)}, two[:1]) == {("a", ""): 150} and measure({}, two[:1]) == {}
    assert measure({10: worker}, [DeviceStatus(GpuDevice(0), ResourceStatus.APP_BUSY, (OwnedProcess(10, "app", None),))]) == {}   # nothing was seen


def test_the_best_device_decides_and_outsiders_are_named_where_they_are_in_the_way():
    A, B, E, U = ResourceStatus.AVAILABLE, ResourceStatus.APP_BUSY, ResourceStatus.EXTERNAL_BUSY, ResourceStatus.UNAVAILABLE
    def on(index, status, *processes, **kw): return DeviceStatus(GpuDevice(index, name="L4", memory_total=100, memory_used=50, memory_free=50), status, processes, **kw)
    mine, theirs = OwnedProcess(7, "app", 3*MIB//2, "w", "ada", "compute", 6, "llm"), OwnedProcess(9, "external", None, "train.py", "bob", "compute")
    free, shared, full = on(0, A, replace(theirs, pid=8)), on(1, B, mine, theirs), on(2, E, theirs, mine)
    snapshot = GpuSnapshot()
    found = conclude([full, shared, free], 40.0, "why", ["note"], snapshot)
    assert (found.status, found.app_pids, found.external_pids, found.reason, found.notes, found.threshold_percent, found.snapshot) == (A, [7], [9], None, ("note",), 40.0, snapshot)
    assert found.app_processes == [dict(pid=7, name="w", username="ada", gpu_memory_mb=1.5, device_id=at, device_name="L4", parent_pid=6, parent_worker_type="llm") for at in (2, 1)]
    assert found.external_processes == [dict(pid=9, name="train.py", username="bob", gpu_memory_mb=None, device_id=2, device_name="L4")] and found.devices == (full, shared, free)
    assert [conclude(d).status for d in ([full, shared], [full], [on(0, U, reason="lost"), full])] == [B, E, E] and conclude([full]).threshold_percent == 45.0
    assert conclude([on(0, U, reason="lost"), on(1, U, reason="asleep")], 45.0, "x").reason == "GPU 0: lost; GPU 1: asleep"
    assert conclude((), 45.0, "no driver").reason == "no driver" and conclude(()).reason == "there is no device" and conclude(()).status is U


def test_ram_is_the_apps_only_where_it_holds_more_than_the_others():
    def ram(used, *processes, **kw): return classify_memory(HostMemory(1_000, used), [OwnedProcess(i, owner, size) for i, (owner, size) in enumerate(processes)], **kw)
    A, B, E = ResourceStatus.AVAILABLE, ResourceStatus.APP_BUSY, ResourceStatus.EXTERNAL_BUSY
    assert [ram(900, ("app", n)).status for n in (450, 451)] == [E, B] and [ram(n).status for n in (899, 900)] == [A, E]
    less = ram(950, ("app", None), ("app", 3), ("external", None))
    assert (less.memory.app_memory, less.memory.external_memory, less.external_pids) == (3, 947, [2]) and less.app_processes[1]["memory_mb"] == 0 and ram(10, ("app", 30)).memory.external_memory == 0
    found = ram(950, ("app", 123), ("external", 400))
    assert found.app_processes[0]["memory_percent"] == 12.3 and classify_memory(HostMemory(3, 3), [OwnedProcess(1, "app", 2)]).app_processes[0]["memory_percent"] == 66.67
    assert classify_memory(HostMemory(0, 0), [OwnedProcess(1, "app", 2)]).app_processes[0]["memory_percent"] == 0.0
    assert [p["memory_mb"] for p in classify_memory(HostMemory(100*MIB, 99*MIB), [OwnedProcess(1, "app", 1_300_000)]).app_processes] == [1.24]


def test_every_field_of_a_worker_can_be_changed_left_and_cleared(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("cjm_fasthtml_resources.core.manager.time.monotonic", lambda: now[0])
    manager, config = ResourceManager(), {"model": "m"}
    first = manager.register_worker(GONE, "llm")
    fields = dict(job_id="j", plugin_id="p", plugin_name="n", loaded_plugin_resource="r", config=config, status="running", gpu_memory_mb=5)
    for name, value in fields.items():
        now[0] += 1
        state = manager.update_worker_state(GONE, **{name: value})
        assert getattr(state, name) == value and (state.last_used == now[0]) == (name in ("job_id", "status"))
    assert state == replace(first, **fields) and state.config is not config   # later changes of the caller's dictionary are his own
    assert manager.get_worker_by_job("j") == state and manager.get_worker_by_job("k") is None
    for name in ("plugin_id", "plugin_name", "loaded_plugin_resource", "config", "gpu_memory_mb"): assert getattr(manager.update_worker_state(GONE, **{name: None}), name) is None
    assert manager.update_worker_state(GONE, status=None).status == "idle" and manager.get_worker_by_job("j") is None and manager.get_worker_by_pid(GONE).job_id is None
    manager.update_worker_state(GONE, job_id="j", status="running")
    other = manager.register_worker(GONE + 1, "llm", "j")
    assert manager.get_worker_by_job("j") == other
    manager.update_worker_state(GONE, plugin_id="q")
    assert manager.get_worker_by_job("j") == other   # whose it is now


def test_what_a_check_says_where_something_is_missing(monkeypatch):
    manager = ResourceManager(40.0, track_self=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,7")
    with SimulatedDriver([SimulatedGpu(), SimulatedGpu()]):
        found = manager.check_gpu_availability()
        assert [d.device.index for d in found.devices] == [1] and found.notes == ("CUDA_VISIBLE_DEVICES='1,7' names '7', which is not here: as in CUDA, it and what follows are not visible",)
        assert manager.reserve(1, 0, timeout=0).index == 1 and found.threshold_percent == 40.0
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        found = manager.check_gpu_availability()
        assert found.reason == "CUDA_VISIBLE_DEVICES='7' names '7', which is not here: as in CUDA, it and what follows are not visible" and found.notes == ()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with SimulatedDriver([SimulatedGpu(mig=[])]): assert manager.check_gpu_availability().reason == "MIG is on, but there is no instance"
    with SimulatedDriver([]): assert manager.check_gpu_availability().reason == "the NVIDIA driver sees no GPU"
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(GONE, 900, "graphics")]), SimulatedGpu(memory_used_mb=900)], SimulatedMachine(pid_namespace=True)):
        manager.register_worker(7, "llm", gpu_memory_mb=1_000)
        found = manager.check_gpu_availability()
        assert found.devices[0].processes == (OwnedProcess(GONE, "unknown", 900*MIB, kind="graphics"),)
        assert [d.app_memory//MIB for d in found.devices] == [900, 100] and len(found.notes) == 1 and found.notes[0].startswith("An estimate: inside a container")
    with SimulatedDriver([SimulatedGpu(memory_used_mb=900, processes=[SimulatedProcess(GONE, None, "graphics")])]):
        found = manager.check_gpu_availability()
        assert found.devices[0].processes[0].kind == "graphics" and found.notes[0].startswith("An estimate: the driver does not say")
        assert ResourceBusy("x").retryable and ResourceBusy("x").suggested_action is None
        for name in ("cuda", "gpu", "auto", None): assert module.select_devices(found.snapshot.devices, name) == list(found.snapshot.devices)
        for name in ("", "tpu", "CUDA-1"):
            with pytest.raises(ValueError): module.select_devices(found.snapshot.devices, name)


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


def test_a_plugin_that_fails_is_named_with_what_it_did(caplog):
    class Odd(Server):
        def get_execution_mode(self): raise RuntimeError("not ready")
        def get_child_pids(self): return [GONE, "7", True, -1, 0, 1]
        def get_managed_resources(self): return {"container_id": "c0ffee", "conda_env": "speech"}

    manager, plugin = ResourceManager(), Odd()
    state = manager.register_worker(7, "llm", plugin_instance=plugin)
    assert (state.execution_mode, state.child_pids, state.container_id, state.conda_env) == (None, [GONE, 1], "c0ffee", "speech")
    assert warned(caplog) == ["Odd.get_execution_mode() raised RuntimeError: not ready", "Odd.get_child_pids() gave ['7', True, -1, 0], which are no PIDs"]
    plugin.get_execution_mode, plugin.get_child_pids = (lambda: "docker"), (lambda: [])
    assert manager.refresh_worker(7).execution_mode == "docker" and not warned(caplog)

    def fails(*args): raise RuntimeError("later")
    for name in ("get_execution_mode", "get_child_pids", "get_managed_resources"): setattr(plugin, name, fails)
    assert manager.refresh_worker(7).execution_mode == "docker"   # what it said last still holds
    assert warned(caplog) == [f"Odd.{name}() raised RuntimeError: later" for name in ("get_execution_mode", "get_child_pids", "get_managed_resources")]


def test_a_rented_machine_is_known_as_long_as_its_plugin_says_so(caplog):
    class Rented:
        info = {"provider": "x", "region": "eu", "secret_field": 1}
        def get_remote_resource_info(self): return self.info

    manager, plugin = ResourceManager(), Rented()
    known = ("provider", "region", "instance_id", "status", "ssh_host", "gpu_count", "gpu_type", "estimated_cost_per_hour")
    first = manager.register_worker(7, "llm", plugin_instance=plugin)
    assert first.is_remote and first.remote_resource == {name: plugin.info.get(name) for name in known}
    plugin.get_remote_resource_info = lambda: 1/0
    assert manager.refresh_worker(7).remote_resource == first.remote_resource and warned(caplog) == ["Rented.get_remote_resource_info() raised ZeroDivisionError: division by zero"]
    plugin.get_remote_resource_info = lambda: None
    assert not manager.refresh_worker(7).is_remote and manager.get_worker_by_pid(7).remote_resource is None


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


def test_waiting_without_blocking_passes_its_arguments_on_too(monkeypatch, spawn):
    asked, bars = [], []
    child = spawn("input()").pid
    with SimulatedDriver([SimulatedGpu(), SimulatedGpu()]):
        manager = ResourceManager()
        reserve_async, progress = manager.reserve_async, manager._progress
        monkeypatch.setattr(manager, "_progress", lambda request, wanted: (bars.append(wanted), progress(request, wanted))[1])

        async def main():
            async with manager.reserve_async(1_000, 1, ttl=50, pid=child) as held:
                claim, = manager.get_claims()
                assert held.index == 1 and held.holder.pid == child and claim.ttl == 50 and bars == [False]
            async with manager.reserve_async(1_000, progress=True): assert bars == [False, True]
            with pytest.raises(ResourceBusy, match="waited for 0 s"):
                async with manager.reserve_async(20_000, 0), manager.reserve_async(20_000, 0, 0): pass
            monkeypatch.setattr(manager, "reserve_async", lambda *args, **kw: (asked.append((args, kw)), reserve_async(*args, **kw))[1])
            assert (await manager.wait_for_gpu_async(1_000, 1, 5)).devices[0].index == 1
            assert (await manager.wait_for_gpu_async(1_000, 0, progress=True)).devices[0].index == 0

        asyncio.run(main())
    assert asked == [((1_000, 1, 5), {"progress": False}), ((1_000, 0, None), {"progress": True})]


def test_a_child_sees_the_devices_by_uuid_and_where_there_is_none_by_number():
    assert visible_env([GpuDevice(0, "GPU-a"), GpuDevice(3)]) == {"CUDA_VISIBLE_DEVICES": "GPU-a,3"}


def test_room_is_made_with_exactly_what_is_needed():
    def on(index, *processes): return DeviceStatus(GpuDevice(index, memory_total=1_000, memory_used=900, memory_free=100), ResourceStatus.APP_BUSY, tuple(OwnedProcess(pid, "app", size) for pid, size in processes))
    first, second = WorkerState(1, "llm"), WorkerState(2, "llm")
    assert plan_room([on(0, (1, 60), (2, 600))], [first, second], 160) == [first] and plan_room([on(0, (1, 60), (2, 600))], [first, second], 161) == [first, second]
    assert plan_room([on(0, (2, 600))], [first, second], 700) == [second] and plan_room([on(0, (2, 600))], [first, second], 100) == []
    idle = WorkerState(1, "llm", start_time=1.0)
    assert [module._is_idle(w) for w in (idle, replace(idle, status="running"), replace(idle, job_id="a"), replace(idle, start_time=None))] == [True, False, False, False]


def test_what_cannot_be_made_free_is_said_with_who_holds_it(monkeypatch):
    manager = ResourceManager()
    with SimulatedDriver([SimulatedGpu(memory_total_mb=1_000, memory_reserved_mb=0), SimulatedGpu(memory_total_mb=3_000, memory_reserved_mb=0, processes=[SimulatedProcess(GONE, 500)])]):
        assert manager.free_gpu(2_500) == [] and manager.free_gpu(0) == []   # exactly as much as there is
        with pytest.raises(ResourceBusy, match=r"^2.9 GiB cannot be made free by stopping idle workers\. A GPU job could start now") as busy: manager.free_gpu(3_000)
        assert len(busy.value.conflict.devices) == 2
        with pytest.raises(ValueError, match="^mb must be at most 3000, which is what the largest device has, not 3001$"): manager.free_gpu(3_001)
        with pytest.raises(ValueError, match="^mb must be 0 or more, not -1$"): manager.free_gpu(-1)
    with SimulatedDriver([]), pytest.raises(ResourceUnavailable, match="^No GPU can be used: the NVIDIA driver sees no GPU.$") as none: manager.free_gpu(1)
    assert none.value.conflict.reason == "the NVIDIA driver sees no GPU"


def test_a_worker_that_is_being_stopped_is_nobodys_choice(spawn, monkeypatch):
    process = spawn("input()")
    gpu = SimulatedGpu(memory_total_mb=1_000, processes=[SimulatedProcess(process.pid, 800)])
    manager, seen = ResourceManager(track_self=False), []
    worker = manager.register_worker(process.pid, "llm")

    def stop(pid, **kw):
        seen.append((manager.get_worker_by_pid(pid).status, kw))
        gpu.processes.clear()

    monkeypatch.setattr(manager, "stop_worker", stop)
    with SimulatedDriver([gpu]): assert manager.free_gpu(900, grace=2.5) == [worker]
    assert seen == [("stopping", {"grace": 2.5})]
    manager.unregister_worker(process.pid)
    assert not manager._mark_stopping(worker)   # forgotten meanwhile


def test_what_workers_report_counts_while_they_live(spawn):
    process = spawn("input()")
    manager, inside = ResourceManager(track_self=False), SimulatedMachine(pid_namespace=True)
    manager.register_worker(process.pid, "llm", gpu_memory_mb=300)
    manager.register_worker(GONE, "llm", gpu_memory_mb=0)
    with SimulatedDriver([SimulatedGpu(memory_total_mb=1_000, memory_used_mb=600, memory_reserved_mb=0)], inside):
        assert manager.check_gpu_availability().devices[0].app_memory == 300*2**20
        process.kill()
        process.wait()
        assert manager.check_gpu_availability().devices[0].app_memory == 0


def test_the_need_of_a_plugin_without_a_resource_is_its_own():
    manager = ResourceManager(track_self=False)
    manager.register_worker(GONE, "llm", plugin_name="piper")
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(GONE, 700)])]): manager.check_gpu_availability()
    assert manager.expected_gpu_memory_mb("piper") == 700 and manager.expected_gpu_memory_mb("piper", "de") is None
    with pytest.raises(TypeError, match="^plugin_name must be a string or None, not 7$"): manager.expected_gpu_memory_mb(7)
    with pytest.raises(TypeError, match="^resource must be a string or None, not 7$"): manager.expected_gpu_memory_mb("piper", 7)


def test_dead_workers_are_pruned_and_no_others(spawn):
    alive, dead = spawn("input()"), spawn("input()")
    manager = ResourceManager()
    for pid in (alive.pid, dead.pid, GONE): manager.register_worker(pid, "llm")
    dead.kill()
    dead.wait()
    assert [w.pid for w in manager.prune_dead_workers()] == [dead.pid]
    assert [w.pid for w in manager.get_all_workers()] == [alive.pid, GONE]   # who was never seen alive stays


def test_what_could_not_be_ended_is_named(spawn, monkeypatch):
    process, asked = spawn("input()"), []
    manager = ResourceManager(track_self=False)
    manager.register_worker(process.pid, "llm")
    monkeypatch.setattr(host, "end_processes", lambda roots, grace: asked.append((roots, grace)) or [ProcessId(7, 1.0), ProcessId(8, 1.0)])
    with pytest.raises(TimeoutError, match=f"^of the worker with PID {process.pid}, these processes could not be ended: 7, 8$"): manager.stop_worker(process.pid, grace=2)
    assert asked == [([ProcessId(process.pid, host.read_start(process.pid))], 2)] and manager.get_worker_by_pid(process.pid)   # it is still there
    with pytest.raises(ValueError, match="^grace must be between 0 and"): manager.stop_worker(process.pid, grace=float("inf"))
    monkeypatch.setattr(host, "end_processes", lambda roots, grace: (asked.append(grace), manager.register_worker(process.pid, "again"))[:0])
    manager._workers[process.pid] = replace(manager._workers[process.pid], start_time=1.0)   # that worker ended, and its number was registered anew meanwhile
    monkeypatch.setattr(host, "has_ended", lambda *process: False)
    manager.stop_worker(process.pid)
    assert asked[-1] == 5.0 and manager.get_worker_by_pid(process.pid).worker_type == "again"


# The monitor

def test_a_sample_says_what_is_simulated_and_lists_workers_where_they_can_be_read(monkeypatch):
    manager = ResourceManager()
    worker = manager.register_worker(GONE, "llm")
    with SimulatedDriver([]):
        sample = take_sample(manager)
        assert sample.simulated == "the NVIDIA driver" and sample.workers == (worker,) and sample.gpu.snapshot.simulated
        def broken(): raise store.StoreError("/a is damaged")
        monkeypatch.setattr(manager, "get_all_workers", broken)
        assert take_sample(manager).workers == ()
    assert take_sample(ResourceManager(), GpuSnapshot((), "nothing", "580.1")).simulated is None
    assert (ResourceMonitor(manager)._interval, ResourceMonitor(manager)._keep, ResourceMonitor(manager).paused) == (1.0, 600.0, False)


def test_a_driver_that_is_slow_makes_the_last_sample_stale_before_it_fails():
    with SimulatedDriver([SimulatedGpu()]) as driver:
        monitor, told = ResourceMonitor(ResourceManager(gpu_timeout=5), interval=0.1), []
        first = monitor.take()
        monitor._tell = told.append
        driver.delay("nvmlDeviceGetTemperature", 0.6)
        monitor._latest = replace(first, taken=time.monotonic() - 1)
        assert monitor._read(5.0).devices and [s.stale for s in told] == ["the NVIDIA driver did not answer within 0.3 s"]
        monitor._latest = replace(first, taken=time.monotonic() + 60)   # somebody else has just taken one
        told.clear()
        assert monitor._read(5.0).devices and not told
        assert monitor._read(0.3).late and not told   # no longer than the manager waits


def test_a_row_of_the_history_has_every_figure():
    point = DevicePoint(ResourceStatus.APP_BUSY, 10, 9, 5, 3, 1, 2, 50, 60, 70.5)
    assert History((Point(3, 1000.0, {"GPU-a": point}, 100, 40, 30),)).rows() == [dict(
        time=1000.0, device="GPU-a", status="app_busy", total=10, used=9, app=5, external=3, unattributed=1, promised=2,
        utilization=50, temperature=60, power_usage=70.5, memory_total=100, memory_app=40, memory_external=30)]


def test_what_is_kept_of_a_sample_is_what_it_says():
    gpu = GpuDevice(1, "GPU-a", memory_total=10, memory_used=9, memory_free=1, utilization=50, temperature=60, power_usage=70.5)
    status = DeviceStatus(gpu, ResourceStatus.EXTERNAL_BUSY, (), 5, 3, 1, (Promise(7, "app", 4, 2),))
    with SimulatedDriver([]): sample = take_sample(ResourceManager())
    sample = replace(sample, gpu=replace(sample.gpu, devices=(status,), snapshot=replace(sample.gpu.snapshot, time=1000.0)), number=3)
    ram = sample.memory.memory
    assert to_point(sample) == Point(3, 1000.0, {"GPU-a": DevicePoint(ResourceStatus.EXTERNAL_BUSY, 10, 9, 5, 3, 1, 2, 50, 60, 70.5)}, ram.memory.total, ram.app_memory, ram.external_memory)


def test_history_goes_back_as_far_as_was_said_and_numbers_go_on():
    with SimulatedDriver([]): sample = take_sample(ResourceManager())
    monitor = ResourceMonitor(ResourceManager(), history=10)
    for at in (100.0, 101.0, 110.0, 111.0): monitor._keep_sample(monitor._number(replace(sample, gpu=replace(sample.gpu, snapshot=replace(sample.gpu.snapshot, time=at)))))
    assert [(p.number, p.time) for p in monitor.history.points] == [(2, 101.0), (3, 110.0), (4, 111.0)]   # exactly ten seconds is not too long


def test_a_sample_is_old_after_three_intervals():
    with SimulatedDriver([]):
        monitor = ResourceMonitor(ResourceManager(), interval=10)
        first = monitor.take()
        def aged(seconds):
            monitor._latest = replace(first, taken=time.monotonic() - seconds)
            return monitor.latest.stale
        assert [aged(29), aged(30.6)] == [None, "nothing newer for 31 s"]
        assert monitor.current().number == 2 and monitor.current() is monitor.latest   # one was taken, and it is of this moment
        aged(31)
        monitor.pause()
        assert (monitor.latest.stale, monitor.current().number, repr(monitor)) == ("paused", 1, "ResourceMonitor(interval=10, 0 subscribers, paused)")   # a pause is kept
        monitor.resume()
        assert repr(monitor) == "ResourceMonitor(interval=10, 0 subscribers)" and monitor.current().number == 2


def test_a_late_sampler_keeps_its_beat(monkeypatch):
    "A look that was late comes at once, and the next on the beat; who subscribes right after a look waits for the next"
    with SimulatedDriver([]):
        monitor, looks = ResourceMonitor(ResourceManager(), interval=0.2), []
        real = monitor._look

        def slow(read):
            looks.append(time.monotonic())
            if len(looks) == 2: time.sleep(0.3)   # until half an interval after the next beat
            return real(read)

        monkeypatch.setattr(monitor, "_look", slow)
        with monitor.subscribe(lambda sample: None):
            while len(looks) < 4: time.sleep(0.01)
        beats = [round((at - looks[0])/0.2, 1) for at in looks]
        assert all(abs(beat - due) < 0.4 for beat, due in zip(beats, (0, 1, 2.5, 3))), beats
        monitor.take()
        looks.clear()
        began = time.monotonic()
        with monitor.subscribe(lambda sample: None):
            while not looks: time.sleep(0.01)
        assert looks[0] - began > 0.1


def test_what_a_monitor_cannot_watch_is_named(caplog):
    with pytest.raises(TypeError, match="^manager must be a ResourceManager, or a cluster's, not int$"): ResourceMonitor(7)
    with SimulatedDriver([]):
        monitor, seen = ResourceMonitor(ResourceManager(), interval=0.1), []
        monitor.take()
        monitor._look = lambda read: 1/0
        with monitor.subscribe(seen.append):
            while len(seen) < 3: time.sleep(0.01)
        assert {s.stale for s in seen} == {"the last look failed: division by zero"}
        assert [r.getMessage() for r in caplog.records] == ["the resource monitor could not look; the same again is not logged"]
        caplog.clear()
        calls = []
        def bad(sample):
            calls.append(sample)
            raise RuntimeError("mine")
        subscription = Subscription(bad, lambda s: None)
        for _ in range(2): subscription.tell(seen[0])
        assert [r.getMessage() for r in caplog.records] == ["a subscriber of the resource monitor raised; further errors of it are not logged"] and calls == [seen[0]]*2


def test_an_asynchronous_reader_gets_each_sample_once_and_hears_when_nothing_comes():
    async def main():
        with SimulatedDriver([]):
            monitor, got = ResourceMonitor(ResourceManager(), interval=0.1), []
            samples = aiter(monitor)
            for _ in range(3): got.append(await asyncio.wait_for(anext(samples), 5))
            assert len({s.number for s in got}) == 3 and not any(s.stale for s in got)
            monitor.pause()
            paused = await asyncio.wait_for(anext(samples), 5)
            while not paused.stale: paused = await asyncio.wait_for(anext(samples), 5)
            assert paused.stale == "paused"
            with pytest.raises(asyncio.TimeoutError): await asyncio.wait_for(anext(samples), 0.7)   # it was said, and is not said again
            monitor.close()
    asyncio.run(main())


# What may be asked for

@pytest.mark.parametrize("args, error, words", [
    (dict(gpu_memory_mb=0), ValueError, "gpu_memory_mb must be 1 or more, not 0"), (dict(gpu_memory_mb="8"), TypeError, "gpu_memory_mb must be a number, not '8'"),
    (dict(gpu_memory_mb=1, timeout=-1), ValueError, f"timeout must be between 0 and {threading.TIMEOUT_MAX:g}, not -1"), (dict(gpu_memory_mb=1, timeout=True), TypeError, "timeout must be a number, not True"),
    (dict(gpu_memory_mb=1, ttl=0), ValueError, "ttl must be 0.001 or more, not 0"), (dict(gpu_memory_mb=1, pid=GONE), ValueError, f"pid must be that of a living process, not {GONE}"),
    (dict(gpu_memory_mb=1, pid=True), TypeError, "pid must be a positive int, not True"), (dict(gpu_memory_mb=1, device=2), ValueError, "device must name one of the 2 that are visible, not 2: GPU-a, GPU-b"),
    (dict(gpu_memory_mb=1, device=True), TypeError, "device must be a number, 'cuda:1', a UUID, a GpuDevice or None, not True"), (dict(gpu_memory_mb=1, device="GPU-c"), ValueError, "device must name one of the 2 that are visible, not 'GPU-c': GPU-a, GPU-b"),
    (dict(gpu_memory_mb=1_001), ValueError, "gpu_memory_mb must be at most 1000, which is what the largest device has, not 1001"),
    (dict(gpu_memory_mb=901, device=1), ValueError, "gpu_memory_mb must be at most 900, which is what the largest device has, not 901")])
def test_a_bad_request_names_its_argument_and_enters_no_queue(args, error, words):
    with SimulatedDriver([SimulatedGpu(uuid="GPU-a", memory_total_mb=1_000), SimulatedGpu(uuid="GPU-b", memory_total_mb=1_000, memory_reserved_mb=100)]):
        manager = ResourceManager()
        with pytest.raises(error) as raised: manager.reserve(**args)
        assert str(raised.value) == words and manager.get_claims() == []


def test_exactly_as_much_as_a_device_has_may_be_asked_for():
    with SimulatedDriver([SimulatedGpu(uuid="GPU-a", memory_total_mb=1_000), SimulatedGpu(uuid="GPU-b", memory_total_mb=900)]):
        manager = ResourceManager()
        with manager.reserve(1_000) as all_of_it, manager.reserve(1, ttl=0.001): assert (all_of_it.uuid, all_of_it.index, all_of_it.gpu_memory_mb) == ("GPU-a", 0, 1_000)
        for name in (1, "1", "cuda:1", "GPU:1", "GPU-b", read_gpus().devices[1]):
            with manager.reserve(1, name) as held: assert held.uuid == "GPU-b" and held.env == {"CUDA_VISIBLE_DEVICES": "GPU-b"}


def test_a_device_that_cannot_be_used_is_named_with_its_reason():
    with SimulatedDriver([SimulatedGpu(), SimulatedGpu()]) as driver:
        manager = ResourceManager()
        driver.fail("nvmlDeviceGetMemoryInfo_v2", 15, gpu=1)
        with pytest.raises(ResourceUnavailable) as raised: manager.reserve(1, 1)
        assert str(raised.value) == "The device 1 cannot be used: the GPU is lost (it fell off the bus) and needs a reset or a reboot." and len(raised.value.conflict.devices) == 2
        driver.fail("nvmlDeviceGetMemoryInfo_v2", 15)
        with pytest.raises(ResourceUnavailable) as raised: manager.reserve(1)
        assert str(raised.value) == raised.value.conflict.message and str(raised.value).startswith("No GPU can be used: ")


def test_who_gives_up_says_who_was_in_the_way_where_it_asked(capfd):
    with SimulatedDriver([SimulatedGpu(memory_total_mb=10*1024, processes=[SimulatedProcess(GONE, 9*1024)]), SimulatedGpu(memory_total_mb=10*1024)]):
        manager = ResourceManager()
        with pytest.raises(ResourceBusy) as busy: manager.reserve(2*1024, 0, timeout=0.2)
        assert str(busy.value) == f"2.0 GiB of GPU memory are wanted, and GPU 0 has 1.0 GiB free, with a process without a name (PID {GONE}, 9.0 GiB) on it. It was waited for 0.2 s."
        assert len(busy.value.conflict.devices) == 2 and busy.value.retryable and manager.get_claims() == []
        assert manager.waits.read()[0][-1] == (float("inf"), 0)   # it was not granted, so it is not in the histogram
        with pytest.raises(ResourceBusy): manager.reserve(2*1024, 0, timeout=0.7, progress=True)
    bar = capfd.readouterr().err
    assert "waiting for GPU memory: " in bar and " 1.0 of 2.0 GiB free, 00:00, 2.0 GiB of GPU memory are wanted, and GPU 0 has 1.0 GiB free" in bar, bar


def test_waits_are_counted_in_the_bucket_that_holds_them():
    waits = Waits()
    for seconds in (0.1, 0.11, 0.5, 5, 1e6): waits.observe(seconds)
    buckets, total = waits.read()
    assert [n for _, n in buckets] == [1, 3, 4, 4, 4, 4, 4, 4, 5] and [le for le, _ in buckets] == list(WAIT_BUCKETS) and total == 1_000_005.71


def test_a_request_that_was_withdrawn_is_given_nothing_and_one_of_a_dead_process_says_so(spawn):
    process = spawn("input()")
    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager()
        gone = manager._request(1, None, None, None, None)
        gone.withdraw()
        assert gone.poll() is None and manager.get_claims() == []
        held = manager.reserve(20_000)
        assert manager.waits.read()[1] < 5
        waiting = manager._request(20_000, None, None, None, process.pid)
        assert waiting.poll() is None and len(manager.get_claims()) == 2
        process.kill()
        process.wait()
        manager.reserve(1, timeout=0)   # any look drops what is over
        with pytest.raises(ProcessLookupError, match=f"^the process with PID {process.pid} ended before it was given any GPU memory$"):
            for _ in range(100): waiting.poll()
        held.release()


def test_what_a_plugin_was_seen_to_need_is_its_workers_own_tree():
    manager = ResourceManager(track_self=False)
    worker = manager.register_worker(os.getpid(), "llm", plugin_name="a", loaded_plugin_resource="m")
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(os.getpid(), 700), SimulatedProcess(GONE, 5_000)])]) as driver:
        manager.check_gpu_availability()
        assert manager.expected_gpu_memory_mb("a", "m") == 700
        driver.gpus[0].processes[0] = SimulatedProcess(os.getpid(), 300)
        manager.check_gpu_availability()
        assert manager.expected_gpu_memory_mb("a", "m") == 700 and manager.get_worker_by_pid(os.getpid()) == worker   # the most that was seen


def test_ram_is_judged_by_its_threshold_and_of_a_control_group_its_own(monkeypatch):
    manager = ResourceManager()
    monkeypatch.setattr(host, "read_memory", lambda: HostMemory(100, 60, "/sys/fs/cgroup/x"))
    monkeypatch.setattr(host, "resident_memory", lambda: {os.getpid(): 40, 1: 20, os.getppid(): 10})
    monkeypatch.setattr(host, "in_cgroup", lambda pid, cgroup: (pid, cgroup) == (1, "/sys/fs/cgroup/x"))
    found = manager.check_memory_availability(60)
    assert found.status is ResourceStatus.APP_BUSY and found.threshold_percent == 60 and [p.pid for p in found.memory.processes] == [os.getpid(), 1]
    assert manager.check_memory_availability(61).status is ResourceStatus.AVAILABLE and manager.check_memory_availability().threshold_percent == 90
    with pytest.raises(ValueError, match="^threshold_percent must be between 0 and 100, not 101$"): manager.check_memory_availability(101)


@pytest.mark.parametrize("call, error, words", [
    (lambda m: m.register_worker(0, "llm"), ValueError, "pid must be a positive int, not 0"), (lambda m: m.register_worker("7", "llm"), TypeError, "pid must be a positive int, not '7'"),
    (lambda m: m.register_worker(7, 5), TypeError, "worker_type must be a string that says something, not 5"), (lambda m: m.register_worker(7, "llm", config=[1]), TypeError, "config must be a dictionary or None, not list"),
    (lambda m: m.update_worker_state(7, gpu_memory_mb=-1), ValueError, "gpu_memory_mb must be 0 or more, not -1"), (lambda m: m.update_worker_state(7, status=1), TypeError, "status must be a string or None, not 1"),
    (lambda m: m.pick_gpus(0), ValueError, "n must be a positive int, not 0"), (lambda m: m.pick_gpus(min_free_mb=-1), ValueError, "min_free_mb must be 0 or more, not -1"),
    (lambda m: m.estimate_total_cloud_cost("1"), TypeError, "duration_hours must be a number, not '1'"), (lambda m: ResourceManager(101), ValueError, "gpu_memory_threshold_percent must be between 0 and 100, not 101"),
    (lambda m: ResourceManager(gpu_timeout=0), ValueError, None), (lambda m: ResourceManager(app="4711"), ValueError, "app must be a letter and then at most 63 letters, digits or any of '_.-', not '4711'"),
    (lambda m: ResourceManager(app=7), TypeError, "app must be a name, not 7")])
def test_what_may_not_be_passed_in_is_named(call, error, words):
    with pytest.raises(error) as raised: call(ResourceManager())
    assert words is None or str(raised.value) == words


def test_what_is_not_registered_is_warned_of(caplog):
    manager = ResourceManager()
    assert manager.update_worker_state(7, status="idle") is None and manager.unregister_worker(8) is None
    assert warned(caplog) == ["update_worker_state: no worker with PID 7 is registered", "unregister_worker: no worker with PID 8 is registered"]


# The list of promises

def on_device(index, free, *rows, claims=(), **fields):
    device = GpuDevice(index, f"GPU-{index}", memory_total=1_000, memory_used=1_000 - free, memory_free=free)
    return DeviceUse(replace(device, **fields), rows)


def test_what_is_handed_out_and_where():
    me, other = ProcessId(1, 1.0), ProcessId(2, 2.0)
    def asked(id, memory, device=None, holder=me, base=0): return Claim(id, holder, memory, ("GPU-0", "GPU-1"), device, base)
    def given(claims, *uses): return [(c.device, c.base) for c in grant(claims, uses, choose=lambda keys: "+".join(keys) if len(keys) > 1 else keys[0])]

    with pytest.raises(KeyError, match="GPU-0\\+GPU-1"): given([asked(1, 10)], on_device(0, 500), on_device(1, 490))   # nearly equal, within one percent: at random
    assert given([asked(1, 10)], on_device(0, 500), on_device(1, 489)) == [("GPU-0", 0)]
    assert given([asked(1, 500)], on_device(0, 500)) == [("GPU-0", 0)] and given([asked(1, 501)], on_device(0, 500)) == [(None, 0)]
    # who waits keeps the device where it may be served first, which is the one with the most room, and no more than that one
    waiting = [asked(1, 600, "GPU-0", other), asked(2, 500, "GPU-1", other), asked(3, 900), asked(4, 100)]
    assert given(waiting, on_device(0, 1_000), on_device(1, 1_000)) == [("GPU-0", 0), ("GPU-1", 0), (None, 0), ("GPU-0", 0)]
    assert given([asked(1, 900, "GPU-0", other), asked(2, 1_000), asked(3, 50)], on_device(0, 1_000)) == [("GPU-0", 0), (None, 0), (None, 0)]
    assert given([asked(1, 900, "GPU-0", other), asked(2, 1_001), asked(3, 50)], on_device(0, 1_000)) == [("GPU-0", 0), (None, 0), ("GPU-0", 0)]   # it will not fit, whoever lets go
    used = on_device(0, 300, ((other,), 700))
    assert given([asked(1, 700, "GPU-0", other), asked(2, 900), asked(3, 50)], used) == [("GPU-0", 0), (None, 0), (None, 0)]    # what the promise is used for comes back, too
    # a new promise counts from what its holder has there and no promise accounts for
    mine = on_device(0, 500, ((me,), 300), ((other, me), 200))
    assert given([asked(1, 100)], mine) == [("GPU-0", 500)]                                        # a child's is the holder's
    assert given([asked(1, 50, "GPU-0", other), asked(2, 100)], mine) == [("GPU-0", 0), ("GPU-0", 300)]   # unless it holds a promise itself
    assert given([asked(1, 200, "GPU-0", me), asked(2, 100)], mine) == [("GPU-0", 0), ("GPU-0", 300)]
    assert given([asked(1, 50, "GPU-1", other), asked(2, 100)], mine, on_device(1, 100)) == [("GPU-1", 0), ("GPU-0", 500)]   # a promise elsewhere makes no difference
    assert given([asked(1, 100)], replace(mine, processes=None)) == [("GPU-0", 500)]               # whose it is cannot be told
    assert given([asked(1, 100, "GPU-0"), asked(2, 100)], replace(mine, processes=None)) == [("GPU-0", 0), ("GPU-0", 400)]
    assert given([asked(1, 100, "GPU-0", base=400)], mine) == [("GPU-0", 400)] and given([asked(1, 100, "GPU-0", base=600)], mine) == [("GPU-0", 500)]   # given back, and not to be given back again


def test_a_device_that_says_nothing_of_its_memory_is_not_counted_on():
    assert read_use([GpuDevice(0, memory_total=0, memory_used=0), GpuDevice(1, memory_total=10), GpuDevice(2, memory_total=10, memory_used=1, mig_mode=True)]) == []
    silent = DeviceUse(GpuDevice(0, "GPU-0"), None)
    assert find_pools(silent, [Claim(1, ProcessId(1, 1.0), 10, ("GPU-0",), "GPU-0")])[None].used == 0 and [c.device for c in grant([Claim(1, ProcessId(1, 1.0), 1, ("GPU-0",))], [silent])] == [None]


def test_who_waits_looks_again_when_the_last_look_is_old(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("cjm_fasthtml_resources.core.reservations.time.monotonic", lambda: now[0])
    ledger = Ledger(store.Store())
    ledger.settle(list)
    assert not ledger.is_due()
    now[0] += 0.25
    assert ledger.is_due() and not ledger.is_due()   # for one of those who ask
    now[0] += 0.24
    assert not ledger.is_due()


def test_a_promise_is_renewed_from_now_on_or_for_good(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("cjm_fasthtml_resources.core.reservations.time.monotonic", lambda: now[0])
    ledger = Ledger(store.Store())
    use = DeviceUse(GpuDevice(0, "GPU-a", memory_total=100, memory_used=0, memory_free=100), ())
    ask = lambda: Claim(0, host.this_process(), 10, ("GPU-a",), ttl=5)   # noqa: E731
    claim = ledger.settle(lambda: [use], ask)[-1]
    assert (claim.device, claim.expires, ledger.find(claim.id)) == ("GPU-a", 1005.0, claim)
    now[0] = 1004.0
    assert ledger.renew(claim.id, 10) and (ledger.find(claim.id).ttl, ledger.find(claim.id).expires) == (10, 1014.0)
    now[0] = 1013.9
    assert [c.id for c in ledger.claims()] == [claim.id]
    now[0] = 1014.0
    assert ledger.claims() == [] and not ledger.renew(claim.id, 10) and not ledger.renew(claim.id, None)   # too late
    second = ledger.settle(lambda: [use], ask)[-1]
    assert ledger.renew(second.id, None) and (ledger.find(second.id).ttl, ledger.find(second.id).expires) == (None, None)
    now[0] += 1e6
    assert [c.id for c in ledger.claims()] == [second.id] and ledger.renew(second.id, 1)
    assert ledger.withdraw(second.id) and not ledger.withdraw(second.id) and ledger.claims() == []


# The file of an app

def test_a_row_has_no_secrets_and_takes_what_is_no_json():
    remote = {"provider": Path("/x"), "api_key": "sk-2"}
    state = WorkerState(7, "llm", config={"path": Path("/m"), "api_key": "sk-1"}, is_remote=True, remote_resource=remote)
    again, starts = from_row(to_row(state, {8: None}))
    assert (again.config, again.remote_resource, starts) == ({"path": "/m", "api_key": "***"}, {"provider": "/x", "api_key": "***"}, {8: None})
    assert from_row(to_row(state, {}), state)[0].config == state.config and from_row(to_row(state, {}), replace(state, start_time=1.0))[0].config == again.config
    assert from_row(to_row(state, {}), replace(state, config={"path": Path("/n"), "api_key": "sk-1"}))[0].config == again.config   # it was changed by another process


def test_a_file_that_cannot_be_read_is_named_in_every_answer(folder, caplog, monkeypatch):
    manager, plugin = ResourceManager(app="broken"), Server()
    manager.register_worker(os.getpid(), "llm", plugin_name="a", plugin_instance=plugin)
    path = store.store_path()
    monkeypatch.setattr(manager._roster, "raise_peaks", lambda higher: (_ for _ in ()).throw(store.StoreError("/a is full")))
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(os.getpid(), 700)])]):
        assert manager.check_gpu_availability().status is ResourceStatus.APP_BUSY and warned(caplog) == ["what plugins need was not kept: /a is full"]
        assert manager.check_memory_availability().notes == ()
        monkeypatch.setattr(module, "_REFRESH_AFTER", -1)
        plugin.children = [GONE + 1]
        monkeypatch.setattr(manager._roster, "write", lambda *rows: (_ for _ in ()).throw(store.StoreError("/a is read-only")))
        found = manager.check_gpu_availability()   # what its plugin says now cannot be kept
        assert found.reason == "what is promised cannot be read: /a is read-only" and found.snapshot.devices and found.threshold_percent == 45.0 and found.devices == ()
        assert manager.check_memory_availability().notes == ("The app's workers are those of an earlier moment: /a is read-only",)
        path.rename(f"{path}.away")
        gone = f"{path} was removed or replaced while this program uses it; end the programs that use it, and start them again"
        assert manager.check_gpu_availability().reason == f"what is promised cannot be read: {gone}"
        assert ResourceManager().check_gpu_availability().status is ResourceStatus.APP_BUSY   # in memory, it needs no file


def test_a_worker_that_another_process_registers_anew_loses_its_plugin(folder):
    mine, other = ResourceManager(app="rows"), ResourceManager(app="rows")
    for pid in (GONE, GONE + 1): mine.register_worker(pid, "llm", plugin_instance=Server())
    other.update_worker_state(GONE, status="running")
    mine.get_all_workers()
    assert set(mine._plugins) == set(mine._asked) == {GONE, GONE + 1}   # a change is no registration
    other.unregister_worker(GONE)
    mine.get_all_workers()
    assert set(mine._plugins) == set(mine._asked) == {GONE + 1} and mine._children == {GONE: {GONE + 1: None}}
    reads = []
    read = mine._roster.read
    mine._roster.read = lambda db: (reads.append(1), read(db))[1]
    for _ in range(3): mine.get_all_workers()
    assert not reads   # nothing has changed, so nothing is read again
    mine.unregister_worker(GONE + 1)
    assert mine._children == {} and other.get_all_workers() == []


def test_a_damaged_file_is_made_anew_in_a_folder_of_its_own(tmp_path, caplog):
    path = tmp_path/"deep"/"er"/"apps.sqlite"
    first = store.Store(path)
    with first.transaction() as db: db.execute("INSERT INTO apps VALUES ('a', 1)")
    assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    first.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff"*len(data[4096:])
    path.write_bytes(data)
    second = store.Store(path)
    with second.reading() as db: assert db.execute("SELECT count(*) FROM apps").fetchone() == (0,)
    message, = warned(caplog)
    assert message.startswith(f"{path} was damaged (") and message.endswith(f") and set aside as {path}.damaged-1") and "(None)" not in message and Path(f"{path}.damaged-1").exists()
    second.close()


def test_a_file_keeps_when_declared_children_started(folder):
    manager, plugin = ResourceManager(app="rows"), Server()
    plugin.children = [os.getpid(), GONE]
    manager.register_worker(7, "llm", plugin_instance=plugin)
    assert json.loads(manager._row(7))[1] == [[os.getpid(), host.read_start(os.getpid())], [GONE, None]]
    other = ResourceManager(app="rows")
    other.get_all_workers()
    assert other._children == manager._children


def test_the_file_is_the_machines_and_in_a_container_the_containers(monkeypatch):
    monkeypatch.delenv("CJM_RESOURCES_DIR", raising=False)
    import platform, platformdirs
    monkeypatch.setattr(platform, "node", lambda: "lab 7/ä.local")
    monkeypatch.setattr(host, "_namespace", lambda *where: {("/proc", "self"): space}[where])
    space = host._FIRST_PID_NAMESPACE
    folder = Path(platformdirs.user_state_dir("cjm-fasthtml-resources", appauthor=False))
    assert store.store_path() == folder/"lab_7_ä.local.sqlite"
    space = None
    assert store.store_path() == folder/"lab_7_ä.local.sqlite"
    space = 4711
    assert store.store_path() == folder/"lab_7_ä.local-4711.sqlite"
    monkeypatch.setattr(platform, "node", lambda: "")
    assert store.store_path() == folder/"localhost-4711.sqlite"
    monkeypatch.setenv("CJM_RESOURCES_DIR", "/elsewhere")
    assert store.store_path() == Path("/elsewhere/localhost-4711.sqlite")


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
