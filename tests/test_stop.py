"Ending workers: all of theirs, nothing else, whatever they do about it"
import os
import random
import threading
import time
from dataclasses import replace

import pytest
from conftest import GONE, warned
from lines import interrupted_at

from cjm_fasthtml_resources.core import freeing, host, stopping
from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
from cjm_fasthtml_resources.core.gpu import GpuDevice
from cjm_fasthtml_resources.core.leases import new_lease
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.process import ProcessId
from cjm_fasthtml_resources.core.resources import DeviceStatus, OwnedProcess, ResourceStatus, WorkerState
from cjm_fasthtml_resources.core.room import plan_room
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

SLEEPER = "import subprocess, sys, time\n"
CHILD = f"{SLEEPER}p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
# answers SIGTERM by starting another process, in a session of its own, and goes on
HYDRA = f"""{SLEEPER}import signal
def more(*_): print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid, flush=True)
signal.signal(signal.SIGTERM, more)
print('ready', flush=True)
while True: time.sleep(1)"""


def gone(pid): return host.read_stat(pid) is None or host.read_stat(pid).state == "Z"


def test_the_whole_tree_ends(spawn):
    worker, manager = spawn(CHILD), ResourceManager(track_self=False)
    child = int(worker.stdout.readline())
    manager.register_worker(worker.pid, "llm")
    assert manager.stop_worker(worker.pid).pid == worker.pid
    assert gone(worker.pid) and gone(child) and manager.get_all_workers() == []


def test_what_is_started_in_answer_to_the_signal_ends_too(spawn):
    worker, manager = spawn(HYDRA), ResourceManager(track_self=False)
    assert worker.stdout.readline() == "ready\n"
    manager.register_worker(worker.pid, "llm")
    manager.stop_worker(worker.pid, grace=0.5)
    assert gone(worker.pid) and gone(int(worker.stdout.readline()))


def test_children_of_a_worker_that_ended_are_found(spawn):
    worker, manager = spawn(CHILD), ResourceManager(track_self=False)
    child = int(worker.stdout.readline())
    manager.register_worker(worker.pid, "llm")
    host.read_process(child)  # as any check does that finds it on a GPU
    worker.kill()
    worker.wait()
    manager.stop_worker(worker.pid)
    assert gone(child)


def test_nobody_elses_process_is_stopped(spawn):
    theirs, manager = spawn(CHILD), ResourceManager(track_self=False)
    theirs.stdout.readline()
    for pid in (theirs.pid, os.getpid(), os.getppid(), 1, 2**22 + 1):
        with pytest.raises(PermissionError, match=str(pid)): manager.stop_worker(pid)
    manager.register_worker(os.getpid(), "server")
    with pytest.raises(PermissionError, match="this process"): manager.stop_worker(os.getpid())
    for bad in (True, "7", -1):
        with pytest.raises((TypeError, ValueError), match="pid"): manager.stop_worker(bad)
    with pytest.raises(ValueError, match="grace"): manager.stop_worker(theirs.pid, grace=-1)
    assert theirs.poll() is None


def test_a_number_that_changed_hands_is_not_stopped(spawn):
    other, manager = spawn(CHILD), ResourceManager(track_self=False)
    other.stdout.readline()
    state = manager.register_worker(other.pid, "llm")
    # the registered one was an earlier process with this number
    manager.workers.table.workers[other.pid] = replace(state, start_time=state.start_time - 5)
    manager.stop_worker(other.pid)
    assert other.poll() is None and manager.get_all_workers() == []
    # registered before there was a process with this number
    manager.workers.table.workers[other.pid] = replace(state, start_time=None)
    with pytest.raises(PermissionError, match="started after it was registered"): manager.stop_worker(other.pid)
    assert other.poll() is None


def test_a_server_that_two_workers_declared_ends_with_the_second(spawn):
    server, first, second = spawn("input()"), spawn("input()"), spawn("input()")
    manager = ResourceManager(track_self=False)

    class Shared:
        def get_child_pids(self): return [server.pid]

    for worker in (first, second): manager.register_worker(worker.pid, "llm", plugin_instance=Shared())
    manager.stop_worker(first.pid)
    assert gone(first.pid) and server.poll() is None
    manager.stop_worker(second.pid)
    assert gone(second.pid) and gone(server.pid)


@pytest.mark.parametrize("cleanup", [lambda self: 1/0, lambda self: time.sleep(60)], ids=["raises", "hangs"])
def test_a_cleanup_that_fails_does_not_keep_the_worker_alive(spawn, cleanup):
    worker, manager = spawn("input()"), ResourceManager(track_self=False)
    manager.register_worker(worker.pid, "llm", plugin_instance=type("Plugin", (), dict(force_cleanup=cleanup))())
    manager.stop_worker(worker.pid, grace=0.3)
    assert gone(worker.pid)


class Room:
    "Workers that hold 6000 MiB each on one GPU of 24 GiB, and give it back when they are cleaned up"
    def __init__(self, spawn, count):
        self.manager, self.gpu = ResourceManager(track_self=False), SimulatedGpu()
        self.processes = [spawn("input()") for _ in range(count)]
        for process in self.processes:
            held = SimulatedProcess(process.pid, 6000)
            self.gpu.processes.append(held)
            plugin = type("Plugin", (), dict(force_cleanup=lambda _, held=held: self.gpu.processes.remove(held)))()
            self.manager.register_worker(process.pid, "llm", plugin_instance=plugin)

    @property
    def living(self): return [i for i, p in enumerate(self.processes) if not gone(p.pid)]


def test_idle_workers_go_in_the_order_of_their_last_use_and_no_more_than_needed(spawn):
    room = Room(spawn, 3)
    for i, jobs in enumerate(["abc", "a", "ab"]):
        for job in jobs: room.manager.update_worker_state(room.processes[i].pid, job_id=f"{i}{job}", status="running")
    for i, count in ((2, 2), (0, 3), (1, 1)):   # as many times as it has jobs
        for _ in range(count): room.manager.update_worker_state(room.processes[i].pid, status="idle")
    with SimulatedDriver([room.gpu]):
        assert room.manager.free_gpu(6000) == [] and room.living == [0, 1, 2]
        assert [w.pid for w in room.manager.free_gpu(8000)] == [room.processes[2].pid] and room.living == [0, 1]
        assert [w.pid for w in room.manager.free_gpu(24000)] == [room.processes[0].pid, room.processes[1].pid]


def test_a_worker_that_is_just_given_a_job_is_spared(spawn, monkeypatch):
    room = Room(spawn, 2)

    def plan(devices, idle, need, gentle, count=1):
        monkeypatch.setattr(freeing, "plan_room", plan_room)
        room.manager.update_worker_state(idle[0].pid, job_id="now", status="running")  # by another thread, just now
        return plan_room(devices, idle, need, gentle)

    monkeypatch.setattr(freeing, "plan_room", plan)
    with SimulatedDriver([room.gpu]): room.manager.free_gpu(18000)
    assert room.living == [0] and room.manager.get_worker_by_job("now").status == "running"


class Slow:
    "A plugin that gives its memory back after a while, during which the test does something"
    def __init__(self, gpu, meanwhile): self.gpu, self.meanwhile = gpu, meanwhile
    def force_cleanup(self):
        self.meanwhile()
        self.gpu.processes.clear()


def one_worker(spawn, meanwhile, code="input()", **kw):
    "A manager with one worker that fills a GPU of 1000 MiB"
    process, manager = spawn(code), ResourceManager(track_self=False, **kw)
    gpu = SimulatedGpu(memory_total_mb=1_000, processes=[SimulatedProcess(process.pid, 800)])
    manager.register_worker(process.pid, "llm", plugin_instance=Slow(gpu, lambda: meanwhile(manager, process)))
    return manager, process, gpu


def test_what_is_given_to_a_worker_that_is_being_stopped_is_refused(spawn, caplog):
    answers = []

    def give(manager, process):
        answers.append(manager.get_worker_by_pid(process.pid).status)
        changes = dict(job_id="a", status="running"), dict(job_id="b"), dict(status="loading"), dict(plugin_id="x")
        for given in changes:
            answers.append(manager.update_worker_state(process.pid, **given))
        answers.append(manager.unregister_worker(process.pid))
        with pytest.raises(ValueError, match=f"^pid {process.pid} is being stopped, so it cannot be registered$"):
            manager.register_worker(process.pid, "llm", "c")

    manager, process, gpu = one_worker(spawn, give)
    with SimulatedDriver([gpu]): assert [w.pid for w in manager.free_gpu(900)] == [process.pid]
    assert answers == ["stopping", *[None]*5] and gone(process.pid) and manager.get_all_workers() == []
    told = warned(caplog)
    assert told[0] == f"update_worker_state: the worker with PID {process.pid} is being stopped"
    assert told[-1] == f"unregister_worker: the worker with PID {process.pid} is being stopped"


def test_a_child_of_a_worker_that_is_being_stopped_is_no_new_worker(spawn):
    def register_child(manager, process):
        child = int(process.stdout.readline())
        with pytest.raises(ValueError, match="is being stopped"): manager.register_worker(child, "llm", "job")

    manager, process, gpu = one_worker(spawn, register_child, CHILD)
    with SimulatedDriver([gpu]): manager.free_gpu(900)
    assert gone(process.pid) and manager.get_all_workers() == []


def test_an_idle_worker_with_a_busy_one_below_it_is_not_stopped(spawn):
    manager, process, gpu = one_worker(spawn, lambda *_: None, CHILD)
    child = int(process.stdout.readline())
    manager.register_worker(child, "llm", "job")
    with SimulatedDriver([gpu]), pytest.raises(ResourceBusy, match="would not free"): manager.free_gpu(900)
    assert not gone(process.pid) and not gone(child)
    manager.update_worker_state(child, status="idle")      # both are idle, and both go
    with SimulatedDriver([gpu]): assert [w.pid for w in manager.free_gpu(900)] == [process.pid]
    assert gone(process.pid) and gone(child)


def test_a_worker_with_a_job_keeps_its_declared_server_alive(spawn):
    "Its server runs below another worker, which is idle"
    manager, process, gpu = one_worker(spawn, lambda *_: None, CHILD)
    server, busy = int(process.stdout.readline()), spawn("input()")
    plugin = type("Plugin", (), dict(get_child_pids=lambda self: [server]))()
    manager.register_worker(busy.pid, "llm", "job", plugin_instance=plugin)
    with SimulatedDriver([gpu]), pytest.raises(ResourceBusy): manager.free_gpu(900)
    assert not gone(server) and not gone(process.pid)


def test_a_dead_worker_with_a_job_is_not_tidied_away(spawn):
    manager, process, _ = one_worker(spawn, lambda *_: None)
    state = manager.update_worker_state(process.pid, job_id="job")
    process.kill()
    process.wait()
    assert stopping.find_idle(manager.workers, ()) == [] == stopping.mark_idle(manager.workers, state, 1)


def test_a_job_that_is_accepted_at_whatever_moment_is_not_killed(spawn):
    chance, accepted, refused = random.Random(7), 0, 0
    for _ in range(12):
        manager, process, gpu = one_worker(spawn, lambda *_: time.sleep(0.02))
        given, wait = [], chance.uniform(0, 0.06)

        def give(manager=manager, process=process, given=given, wait=wait):
            time.sleep(wait)
            given.append(manager.update_worker_state(process.pid, job_id="job", status="running"))

        thread = threading.Thread(target=give)
        thread.start()
        with SimulatedDriver([gpu]):
            if wait < 0.01: thread.join()
            try: stopped = manager.free_gpu(900, grace=1.0)
            except ResourceBusy: stopped = []
        thread.join()
        assert (given[0] is None) == bool(stopped) == gone(process.pid)
        accepted, refused = accepted + (given[0] is not None), refused + bool(stopped)
    assert accepted and refused


def test_free_gpu_that_is_interrupted_at_any_line_leaves_nobody_stopping(spawn, monkeypatch):
    process, at, seen = spawn("input()"), 0, set()
    gpu = SimulatedGpu(memory_total_mb=1_000)
    monkeypatch.setattr(stopping, "end_processes", lambda ends, grace: gpu.processes.clear() or [])
    with SimulatedDriver([gpu]):
        while True:
            gpu.processes[:] = [SimulatedProcess(process.pid, 800)]
            manager = ResourceManager(track_self=False)
            manager.register_worker(process.pid, "llm")
            files = ("core/freeing.py", "core/stopping.py", "core/workers.py")
            reached = interrupted_at(at, files, lambda manager=manager: manager.free_gpu(900))
            left_over = [w.status for w in manager.get_all_workers()]
            assert left_over in (["idle"], []), at
            if left_over: assert manager.update_worker_state(process.pid, job_id="job").job_id == "job", at
            seen.add(tuple(left_over))
            if not reached: break
            at += 1
    assert at > 100 and seen == {("idle",), ()}


@pytest.mark.parametrize("fails", [KeyboardInterrupt, SystemExit, OSError, TimeoutError])
def test_free_gpu_that_fails_leaves_nobody_stopping(spawn, monkeypatch, fails):
    manager, process, gpu = one_worker(spawn, lambda *_: None)

    def end(ends, grace): raise fails("half-way")

    monkeypatch.setattr(stopping, "end_processes", end)
    with SimulatedDriver([gpu]), pytest.raises(fails, match="half-way"): manager.free_gpu(900)
    assert manager.get_worker_by_pid(process.pid).status == "idle"
    assert manager.update_worker_state(process.pid, job_id="job", status="running").job_id == "job"
    with pytest.raises(fails, match="half-way"): manager.stop_worker(process.pid)
    assert manager.get_worker_by_pid(process.pid).status == "running"     # as it was


def test_the_mark_of_a_process_that_stops_a_worker_counts_for_all_and_for_no_longer_than_it_holds(folder, spawn):
    process, (mine, other) = spawn("input()"), (ResourceManager(app="stop", track_self=False) for _ in range(2))
    leases = mine.workers.leases
    worker, lease = mine.register_worker(process.pid, "llm"), new_lease()
    leases.take(lease)
    assert stopping.mark_idle(mine.workers, worker, lease)
    assert other.get_worker_by_pid(process.pid).status == "stopping"
    assert other.update_worker_state(process.pid, job_id="job") is None
    assert not stopping.mark_idle(other.workers, worker, new_lease()) and stopping.find_idle(other.workers, ()) == []
    leases.drop(lease)      # as the kernel does with those of a process that is killed
    assert other.get_worker_by_pid(process.pid).status == "idle"
    assert other.update_worker_state(process.pid, job_id="job").job_id == "job"
    assert mine.get_worker_by_pid(process.pid).job_id == "job" and not stopping.mark_idle(mine.workers, worker, lease)


def test_in_a_forks_child_nobody_is_being_stopped_by_its_parents_threads(spawn):
    children = []

    def fork(manager, process):
        if (child := os.fork()) == 0:
            state = manager.update_worker_state(process.pid, job_id="job")
            os._exit(0 if state and state.job_id == "job" else 1)
        children.append(os.waitpid(child, 0)[1])

    manager, _, gpu = one_worker(spawn, fork)
    with SimulatedDriver([gpu]): manager.free_gpu(900)
    assert children == [0]


def test_a_worker_that_took_over_a_number_while_it_was_freed_is_not_stopped(spawn, monkeypatch):
    manager, process, gpu = one_worker(spawn, lambda *_: None)
    start, ended = manager.get_worker_by_pid(process.pid).start_time, []
    asked = freeing.mark_idle

    def mark(workers, worker, *given):
        found = asked(workers, worker, *given)
        # it ended just now, and another worker has its number
        state = replace(worker, start_time=start + 5, status="running", job_id="job")
        workers.table.workers[process.pid] = state
        return found

    def end(ends, grace):
        gpu.processes.clear()
        ended.append(list(ends))
        return []

    monkeypatch.setattr(freeing, "mark_idle", mark)
    monkeypatch.setattr(stopping, "end_processes", end)
    with SimulatedDriver([gpu]): manager.free_gpu(900)
    assert ended == [[ProcessId(process.pid, start)]]
    assert manager.workers.table.workers[process.pid].job_id == "job"


def test_memory_that_does_not_come_back_stops_no_more_workers(spawn, monkeypatch):
    room = Room(spawn, 3)
    room.manager.workers.plugins.clear()  # so nobody tells the simulated driver that the process has ended
    monkeypatch.setattr(stopping, "RELEASE_WITHIN", 0.2)
    with SimulatedDriver([room.gpu]), pytest.raises(ResourceBusy, match="not released its GPU memory after 0.2 s"):
        room.manager.free_gpu(15000)
    assert room.living == [1, 2]


def test_a_server_that_is_registered_itself_is_not_stopped(spawn):
    room = Room(spawn, 1)
    room.manager.register_worker(os.getpid(), "server")
    room.gpu.processes.append(SimulatedProcess(os.getpid(), 9000))
    with SimulatedDriver([room.gpu]), pytest.raises(ResourceBusy, match="would not free"):
        room.manager.free_gpu(20000)
    assert room.living == [0]


def test_room_is_made_with_exactly_what_is_needed():
    def on(index, *processes):
        device = GpuDevice(index, memory_total=1_000, memory_used=900, memory_free=100)
        held = tuple(OwnedProcess(pid, "app", size) for pid, size in processes)
        return DeviceStatus(device, ResourceStatus.APP_BUSY, held)
    first, second = WorkerState(1, "llm"), WorkerState(2, "llm")
    both, one = [on(0, (1, 60), (2, 600))], [on(0, (2, 600))]
    assert plan_room(both, [first, second], 160) == [first]
    assert plan_room(both, [first, second], 161) == [second]           # not the first one for nothing
    assert plan_room(both, [first, second], 701) == [first, second]
    assert plan_room(one, [first, second], 700) == [second] and plan_room(one, [first, second], 100) == []
    idle = WorkerState(1, "llm", start_time=1.0)
    busy = replace(idle, status="running"), replace(idle, job_id="a"), replace(idle, start_time=None)
    assert [stopping.is_idle(w) for w in (idle, *busy)] == [True, False, False, False]


def test_what_cannot_be_made_free_is_said_with_who_holds_it(monkeypatch):
    manager = ResourceManager()
    gpus = [SimulatedGpu(memory_total_mb=1_000, memory_reserved_mb=0),
            SimulatedGpu(memory_total_mb=3_000, memory_reserved_mb=0, processes=[SimulatedProcess(GONE, 500)])]
    with SimulatedDriver(gpus):
        assert manager.free_gpu(2_500) == [] and manager.free_gpu(0) == []   # exactly as much as there is
        message = (r"^Stopping all idle workers would not free 2.9 GiB\. GPU 1 has 2.4 GiB free\. "
                   rf"In use there: a process without a name \(PID {GONE}, 500 MiB\)\.$")
        with pytest.raises(ResourceBusy, match=message) as busy: manager.free_gpu(3_000)
        assert len(busy.value.conflict.devices) == 2
        message = "^mb must be at most 3000 MiB, the capacity of the largest device, not 3001$"
        with pytest.raises(ValueError, match=message): manager.free_gpu(3_001)
        with pytest.raises(ValueError, match="^mb must be 0 or more, not -1$"): manager.free_gpu(-1)
    message = "^No GPU can be used: the NVIDIA driver lists no GPU.$"
    with SimulatedDriver([]), pytest.raises(ResourceUnavailable, match=message) as none: manager.free_gpu(1)
    assert none.value.conflict.reason == "the NVIDIA driver lists no GPU"


def test_a_worker_that_is_being_stopped_is_nobodys_choice(spawn, monkeypatch):
    process = spawn("input()")
    gpu = SimulatedGpu(memory_total_mb=1_000, processes=[SimulatedProcess(process.pid, 800)])
    manager, seen = ResourceManager(track_self=False), []
    worker = manager.register_worker(process.pid, "llm")

    def stop(workers, state, pid, ends, grace):
        seen.append((workers.get(pid).status, ends, grace))
        gpu.processes.clear()

    monkeypatch.setattr(freeing, "end_worker", stop)
    with SimulatedDriver([gpu]): assert manager.free_gpu(900, grace=2.5) == [worker]
    assert seen == [("stopping", [ProcessId(process.pid, host.read_start(process.pid))], 2.5)]
    assert manager.get_worker_by_pid(process.pid) is worker      # it was not stopped after all
    manager.unregister_worker(process.pid)
    assert not stopping.mark_idle(manager.workers, worker, 1)    # forgotten meanwhile


def test_what_could_not_be_ended_is_named(spawn, monkeypatch):
    process, asked = spawn("input()"), []
    manager = ResourceManager(track_self=False)
    manager.register_worker(process.pid, "llm")
    left = [ProcessId(7, 1.0), ProcessId(8, 1.0)]
    monkeypatch.setattr(stopping, "end_processes", lambda roots, grace: asked.append((roots, grace)) or left)
    message = f"^Could not stop these processes of worker {process.pid}: 7, 8$"
    with pytest.raises(TimeoutError, match=message): manager.stop_worker(process.pid, grace=2)
    assert asked == [([ProcessId(process.pid, host.read_start(process.pid))], 2)]
    assert manager.get_worker_by_pid(process.pid)   # it is still there
    with pytest.raises(ValueError, match="^grace must be between 0 and"):
        manager.stop_worker(process.pid, grace=float("inf"))

    def register_again(roots, grace):
        asked.append(grace)
        manager.register_worker(process.pid, "again")
        return []

    monkeypatch.setattr(stopping, "end_processes", register_again)
    # that worker ended, and meanwhile its number was registered again
    manager.workers.table.workers[process.pid] = replace(manager.workers.table.workers[process.pid], start_time=1.0)
    manager.stop_worker(process.pid)
    assert asked[-1] == 5.0 and manager.get_worker_by_pid(process.pid).worker_type == "again"
