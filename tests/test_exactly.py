"What examples show in passing, held exactly: each argument is passed on, each message says who and what, each boundary is where it is said to be"
import asyncio, json, logging, os, sqlite3, threading, time
from dataclasses import replace
from pathlib import Path

import pytest

from cjm_fasthtml_resources.core import host, store
from cjm_fasthtml_resources.core.classify import DeviceStatus, OwnedProcess, ResourceConflict, ResourceStatus, ResourceType, WorkerState
from cjm_fasthtml_resources.core.gpu import GpuDevice, visible_env
from cjm_fasthtml_resources.core.host import ProcessId, ProcessInfo
from cjm_fasthtml_resources.core import manager as module
from cjm_fasthtml_resources.core.monitor import DevicePoint, History, Point, ResourceMonitor, Subscription, take_sample, to_point
from cjm_fasthtml_resources.core.reservations import Claim, DeviceUse, Ledger, Promise
from cjm_fasthtml_resources.core.roster import from_row, to_row
from cjm_fasthtml_resources.core.manager import ResourceBusy, ResourceManager, ResourceUnavailable, plan_room
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedMachine, SimulatedProcess

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


# The monitor

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


# The list of promises

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


def test_a_file_keeps_when_declared_children_started(folder):
    manager, plugin = ResourceManager(app="rows"), Server()
    plugin.children = [os.getpid(), GONE]
    manager.register_worker(7, "llm", plugin_instance=plugin)
    assert json.loads(manager._row(7))[1] == [[os.getpid(), host.read_start(os.getpid())], [GONE, None]]
    other = ResourceManager(app="rows")
    other.get_all_workers()
    assert other._children == manager._children


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
