"Making room gently: who unloads, who is stopped, and who is left alone; with real processes on a shared driver"
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import warned
from lines import interrupted_at

from cjm_fasthtml_resources.core import freeing, stopping, unloading
from cjm_fasthtml_resources.core.asking import AskedPlugin
from cjm_fasthtml_resources.core.conflict import ResourceBusy
from cjm_fasthtml_resources.core.leases import new_lease
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

TOTAL = 24_000
DRIVER = f"""import json, os, sys, threading, time
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
driver = SimulatedDriver([SimulatedGpu(memory_total_mb={TOTAL}, memory_reserved_mb=0)], shared=sys.argv[1]).start()
"""
# its context stays when the model is unloaded, as CUDA's does
WORKER = DRIVER + """
with driver.allocate(300):
    with driver.allocate(int(sys.argv[2])):
        print("ready", flush=True)
        sys.stdin.readline()
    print("released", flush=True)
    sys.stdin.readline()
"""


class Machine:
    "One GPU that all processes of a test share, and its workers"
    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, list[subprocess.Popen]()
        self.driver = SimulatedDriver([SimulatedGpu(memory_total_mb=TOTAL, memory_reserved_mb=0)], shared=folder)

    def start(self, code: str, *args: object) -> subprocess.Popen:
        command = [sys.executable, "-c", code, str(self.folder), *map(str, args)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.processes.append(subprocess.Popen(command, **pipes))
        return self.processes[-1]

    def workers(self, *sizes: int) -> list[subprocess.Popen]:
        "Processes that use so many MiB, with 300 for their context"
        found = [self.start(WORKER, size - 300) for size in sizes]
        for process in found: assert process.stdout.readline() == "ready\n"
        return found

    def __enter__(self) -> "Machine":
        self.driver.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.driver.stop()
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def machine(folder, tmp_path):
    with Machine(tmp_path/"gpus") as found: yield found


def tell(process: subprocess.Popen, line: str = "unload") -> str:
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


class Unloads:
    "The plugin of a worker that unloads"
    def __init__(self, process: subprocess.Popen) -> None: self.process = process
    def release(self) -> None: assert tell(self.process) == "released"


def register(manager, process, **given): return manager.register_worker(process.pid, "llm", **given)
def lives(process): return process.poll() is None


def test_workers_unload_and_stay(machine):
    first, second = machine.workers(10_000, 10_000)
    manager = ResourceManager()
    for process in (first, second):
        register(manager, process, plugin_id="l", plugin_name="llama", loaded_plugin_resource="8b",
                 plugin_instance=Unloads(process))
    made = manager.make_room(10_000)
    assert made.steps == (f"The idle llm worker (PID {first.pid}) unloaded 8b: 9.5 GiB of GPU memory freed.",)
    assert [w.loaded_plugin_resource for w in made.released] == ["8b"] and made.stopped == ()
    assert lives(first) and lives(second)
    state = manager.get_worker_by_pid(first.pid)
    assert [state.plugin_id, state.plugin_name, state.loaded_plugin_resource, state.status] == [None]*3 + ["idle"]
    assert manager.get_worker_by_pid(second.pid).plugin_name == "llama"
    assert manager.free_gpu(20_000) == [] and lives(first) and lives(second)
    assert manager.make_room(20_000).steps == ()      # there is room


def test_what_unloading_does_not_bring_is_brought_by_stopping_and_each_step_is_said(machine):
    first, second, third = machine.workers(6_000, 6_000, 6_000)
    manager = ResourceManager()
    register(manager, first, plugin_name="whisper")                    # cannot unload
    register(manager, second, plugin_name="llama", plugin_instance=Unloads(second))
    register(manager, third, plugin_name="flux", plugin_instance=Unloads(third))
    made = manager.make_room(23_700)
    assert [w.pid for w in made.released] == [second.pid, third.pid]
    # their contexts are in use still, and so is what the one has that cannot unload
    assert [w.pid for w in made.stopped] == [first.pid, second.pid] and lives(third)
    done = [step.split("(")[1].split(":")[0] for step in made.steps]
    assert done == [f"PID {second.pid}) unloaded llama", f"PID {third.pid}) unloaded flux",
                    f"PID {first.pid}, whisper) was stopped", f"PID {second.pid}) was stopped"]


@pytest.mark.parametrize("release, said, plugin", [
    (lambda self: False, "was asked to unload llama: it refused.", "llama"),
    (lambda self: 1/0, "was asked to unload llama: it raised ZeroDivisionError.", None),
    (lambda self: self.gone_on.wait(60), "was asked to unload llama: it did not respond within 0.3 s.", None),
    (lambda self: None, "unloaded llama: 0 MiB of GPU memory freed.", None),
], ids=["refuses", "raises", "hangs", "lies"])
def test_a_worker_that_does_not_unload_is_stopped(machine, monkeypatch, release, said, plugin):
    process, = machine.workers(10_000)
    manager, seen, gone_on = ResourceManager(), [], threading.Event()
    end = freeing.end_worker

    def ending(workers, state, *given):
        seen.append(state.plugin_name)
        return end(workers, state, *given)

    monkeypatch.setattr(freeing, "end_worker", ending)
    monkeypatch.setattr(freeing, "UNLOADED_WITHIN", 0.3)
    plugin_instance = type("Plugin", (), dict(release=release, gone_on=gone_on))()
    register(manager, process, plugin_name="llama", plugin_instance=plugin_instance)
    made = manager.make_room(20_000, grace=0.3)
    gone_on.set()   # the thread that hangs is not left to the tests that follow
    assert made.steps[0] == f"The idle llm worker (PID {process.pid}) {said}"
    assert "was stopped: 9.8 GiB" in made.steps[1] and not lives(process) and seen == [plugin]


def test_the_apps_function_unloads_what_another_process_registered(machine):
    process, = machine.workers(10_000)
    mine, other = ResourceManager(app="a"), ResourceManager(app="a")
    register(other, process, plugin_name="llama", plugin_instance=Unloads(process))
    asked = []

    def unload(worker):
        asked.append((worker.plugin_name, other.get_worker_by_pid(process.pid).status,
                      other.update_worker_state(process.pid, job_id="now")))
        return tell(process) == "released"

    assert mine.free_gpu(20_000, unload=unload) == []
    assert asked == [("llama", "stopping", None)]             # no job meanwhile
    assert other.get_worker_by_pid(process.pid).plugin_name is None and lives(process)
    # nothing is loaded now, so it is not asked again
    assert [w.pid for w in mine.free_gpu(TOTAL, unload=unload)] == [process.pid] and len(asked) == 1


@pytest.mark.parametrize("call", [
    lambda manager, unload: manager.make_room(1, unload=unload),
    lambda manager, unload: manager.free_gpu(1, unload=unload),
    lambda manager, unload: manager.job("a", 1, unload=unload)], ids=["make_room", "free_gpu", "job"])
def test_unload_must_be_a_plain_function(call):
    async def later(worker): pass
    for wrong in (later, "x", 5):
        with pytest.raises(TypeError, match="^unload must be a function"): call(ResourceManager(), wrong)


def test_who_has_nothing_there_or_is_waited_for_is_left_alone(machine):
    first, second = machine.workers(10_000, 10_000)
    empty = machine.start("import sys; sys.stdin.readline()")
    manager = ResourceManager()
    for process in (empty, first, second): register(manager, process)
    request = manager.request(20_000, pid=first.pid)
    assert request.poll() is None              # it waits
    assert [w.pid for w in manager.free_gpu(10_000)] == [second.pid]
    assert lives(empty) and lives(first)
    with pytest.raises(ResourceBusy, match="Stopping all idle workers would not free"): manager.free_gpu(20_000)
    request.withdraw()
    assert [w.pid for w in manager.free_gpu(20_000)] == [first.pid] and lives(empty)


def test_the_parent_of_a_process_that_waits_is_left_alone(machine):
    below = "p = __import__('subprocess').Popen(['sleep', '60'])\nprint(p.pid, flush=True)\nsys.stdin.readline()\n"
    process = machine.start(DRIVER + f"used = driver.allocate(10_000)\nused.__enter__()\n{below}")
    child, manager = int(process.stdout.readline()), ResourceManager()
    register(manager, process)
    request = manager.request(22_000, pid=child)
    request.poll()
    with pytest.raises(ResourceBusy): manager.free_gpu(20_000)
    assert lives(process)
    request.withdraw()
    assert [w.pid for w in manager.free_gpu(20_000)] == [process.pid]


def test_memory_that_this_process_reserved_for_its_worker_is_no_room(machine):
    process, = machine.workers(10_000)
    manager = ResourceManager()
    with manager.reserve(12_000) as held:
        register(manager, process, plugin_name="llama", plugin_instance=Unloads(process))
        room = manager.check_gpu_availability().devices[0].room/2**20
        if room < TOTAL - 12_000:       # the reading came before: the worker was there before the reservation
            with pytest.raises(ResourceBusy): manager.free_gpu(TOTAL - 11_000)
        assert held.release()
    assert manager.free_gpu(TOTAL - 300) == [] and lives(process)


def test_a_worker_with_a_reservation_of_its_own_is_not_asked_but_stopped(machine):
    process, = machine.workers(10_000)
    manager = ResourceManager()
    register(manager, process, plugin_name="llama", plugin_instance=Unloads(process))
    assert manager.request(10_000, pid=process.pid).poll()
    assert [w.pid for w in manager.free_gpu(20_000)] == [process.pid] and not lives(process)
    assert manager.get_claims() == []


def test_unloading_that_is_interrupted_at_any_line_leaves_nobody_stopping(spawn, monkeypatch):
    process, at, seen = spawn("input()"), 0, set()
    gpu = SimulatedGpu(memory_total_mb=1_000)

    class Plugin:
        def release(self): gpu.processes[:] = []

    files = ("core/freeing.py", "core/stopping.py", "core/workers.py", "core/unloading.py")
    with SimulatedDriver([gpu]):
        while True:
            gpu.processes[:] = [SimulatedProcess(process.pid, 800)]
            manager = ResourceManager(track_self=False)
            manager.register_worker(process.pid, "llm", plugin_name="llama", plugin_instance=Plugin())
            reached = interrupted_at(at, files, lambda manager=manager: manager.free_gpu(900))
            worker, = manager.get_all_workers()
            assert worker.status == "idle", at
            if worker.plugin_name: assert gpu.processes, f"{at}: it is said to have its model still"
            assert manager.update_worker_state(process.pid, job_id="job").job_id == "job", at
            seen.add((worker.plugin_name, len(gpu.processes)))
            if not reached: break
            at += 1
    assert at > 100 and seen >= {("llama", 1), (None, 0)}


FREE = DRIVER + """
sys.stdin.readline()
try: found = [w.pid for w in ResourceManager(app="together").free_gpu(int(sys.argv[2]), grace=1)]
except Exception as error: found = str(error)
print(json.dumps(found), flush=True)
"""


def test_processes_that_make_room_at_the_same_moment_stop_no_more_than_one_would(machine):
    workers = machine.workers(5_000, 5_000, 5_000, 5_000)
    manager = ResourceManager(app="together")
    for process in workers: register(manager, process)
    callers = [machine.start(FREE, 8_000) for _ in range(4)]
    for caller in callers:                     # 4,000 MiB are free, so one worker is enough for all
        caller.stdin.write("go\n")
        caller.stdin.flush()
    answers = [json.loads(caller.stdout.readline()) for caller in callers]
    assert sorted(answers) == [[], [], [], [workers[0].pid]], answers
    assert [lives(process) for process in workers] == [False, True, True, True]


def test_threads_likewise(machine):
    workers = machine.workers(5_000, 5_000, 5_000, 5_000)
    manager, answers = ResourceManager(), []
    for process in workers: register(manager, process, plugin_name="m", plugin_instance=Unloads(process))
    threads = [threading.Thread(target=lambda: answers.append(manager.make_room(8_000))) for _ in range(6)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(answers) == 6 and sum(len(made.steps) for made in answers) == 1 and all(map(lives, workers))


def test_a_call_that_waits_for_another_one_gives_up_in_words(spawn, monkeypatch):
    process, manager = spawn("input()"), ResourceManager(track_self=False)
    gpu = SimulatedGpu(memory_total_mb=1_000, processes=[SimulatedProcess(process.pid, 800)])
    worker, lease = manager.register_worker(process.pid, "llm"), new_lease()
    manager.workers.leases.take(lease)
    assert stopping.mark_idle(manager.workers, worker, lease)
    monkeypatch.setattr(freeing, "RELEASE_WITHIN", 0.1)
    with SimulatedDriver([gpu]):
        message = rf"^another call is still unloading or stopping the llm worker .PID {process.pid}., after [\d.]+ s$"
        with pytest.raises(ResourceBusy, match=message): manager.free_gpu(900, grace=0.1)
    manager.workers.leases.drop(lease)


# For jobs

def job_of(manager, *given, **more): return manager.job(*given, make_room=True, **more)


def test_a_job_makes_room_also_without_time(machine):
    first, second = machine.workers(10_000, 10_000)
    manager = ResourceManager()
    register(manager, first, plugin_name="llama", plugin_instance=Unloads(first))
    register(manager, second, plugin_name="flux")
    with job_of(manager, "a", 10_000, timeout=0) as job:
        assert [w.pid for w in job.room_made.released] == [first.pid] and lives(second)
        assert manager.get_claims()[0].memory == 10_000*2**20
    with pytest.raises(ResourceBusy), manager.job("b", 20_000, timeout=0): pass
    with job_of(manager, "b", 20_000, timeout=0) as job:
        assert [w.pid for w in job.room_made.stopped] == [second.pid]
    assert job.room_made.steps[0].endswith("was stopped: 9.8 GiB of GPU memory freed.") and lives(first)
    assert manager.get_claims() == []


def test_a_job_whose_room_others_have_stops_nobody_and_waits(machine):
    mine, = machine.workers(4_000)
    machine.workers(18_000)                                  # of another program
    manager = ResourceManager(track_self=False)
    register(manager, mine)
    began = time.monotonic()
    with pytest.raises(ResourceBusy, match="Gave up after 0.5 s"), job_of(manager, "a", 10_000, timeout=0.5): pass
    assert lives(mine) and time.monotonic() - began < 5


def test_a_worker_that_becomes_idle_later_makes_room_then(machine):
    process, = machine.workers(20_000)
    manager = ResourceManager()
    register(manager, process, job_id="chat")
    threading.Timer(0.6, lambda: manager.update_worker_state(process.pid, status="idle")).start()
    with job_of(manager, "a", 10_000, timeout=30) as job: assert [w.pid for w in job.room_made.stopped] == [process.pid]


def test_a_job_for_a_worker_keeps_that_worker_and_counts_what_it_has(machine):
    own, other = machine.workers(10_000, 10_000)
    manager = ResourceManager()
    register(manager, own)
    register(manager, other)
    with job_of(manager, "a", 14_000, worker=own.pid, timeout=5) as job: pass        # 4,000 are free
    assert job.room_made.steps == ()
    with job_of(manager, "a", 16_000, worker=own.pid, timeout=5) as job: assert lives(own) and not lives(other)
    assert [w.pid for w in job.room_made.stopped] == [other.pid]


def test_only_the_first_in_the_queue_makes_room(machine):
    process, = machine.workers(20_000)
    manager = ResourceManager()
    register(manager, process)
    first = manager.request(22_000)                      # somebody who makes no room
    assert first.poll() is None
    with pytest.raises(ResourceBusy), job_of(manager, "b", 10_000, timeout=0.3): pass
    assert lives(process)
    first.withdraw()
    with job_of(manager, "b", 10_000, timeout=5): assert not lives(process)


def test_a_request_that_waits_for_a_cap_is_passed_over(machine, folder):
    process, = machine.workers(10_000)                   # 14,000 are free
    manager, other = ResourceManager(app="jobs"), ResourceManager(app="other")
    register(manager, process)
    with other.reserve(8_000):
        settings = folder/"settings.toml"
        settings.write_text('max_share = 0.5\nper = "app"')
        settings.chmod(0o600)
        capped = other.request(5_000)                    # 12,000 are the most of one app
        assert capped.poll() is None
        with job_of(manager, "a", 10_000, timeout=0) as job: assert not lives(process)
        assert [w.pid for w in job.room_made.stopped] == [process.pid]
        assert capped.poll() is None
        capped.withdraw()


def test_a_job_makes_room_for_a_whole_gpu(machine):
    first, second = machine.workers(10_000, 10_000)
    manager = ResourceManager()
    for process in (first, second): register(manager, process)
    with job_of(manager, "a", "all", timeout=0) as job:
        assert [w.pid for w in job.room_made.stopped] == [first.pid, second.pid]
        assert job.reservation.gpu_memory_mb == TOTAL


JOB = DRIVER + """
sys.stdin.readline()
with ResourceManager(app="jobs").job(f"job-{os.getpid()}", 6_000, make_room=True, timeout=60) as job:
    with driver.allocate(6_000): time.sleep(0.3)
    print(json.dumps([w.pid for w in job.room_made.stopped]), flush=True)
"""


def test_jobs_of_several_processes_stop_as_many_workers_as_they_need_together(machine):
    workers = machine.workers(7_000, 7_000, 7_000)      # 3,000 MiB are free: one worker for one job
    manager = ResourceManager(app="jobs")
    for process in workers: register(manager, process)
    jobs = [machine.start(JOB) for _ in range(2)]
    for process in jobs:
        process.stdin.write("go\n")
        process.stdin.flush()
    stopped = [pid for process in jobs for pid in json.loads(process.stdout.readline())]
    assert len(stopped) in (1, 2) and set(stopped) == {w.pid for w in workers[:len(stopped)]}
    assert sum(map(lives, workers)) == 3 - len(stopped)
    for process in jobs: process.wait()
    assert manager.get_claims() == []


def test_a_job_that_is_cancelled_while_it_makes_room_leaves_nobody_stopping(machine, monkeypatch):
    monkeypatch.setattr(freeing, "UNLOADED_WITHIN", 0.3)
    process, = machine.workers(20_000)
    manager, began = ResourceManager(), threading.Event()

    class Slow:
        def release(self):
            began.set()
            time.sleep(0.5)

    register(manager, process, plugin_name="llama", plugin_instance=Slow())

    async def main():
        async def run():
            async with job_of(manager, "a", 10_000): raise AssertionError("it began")
        task = asyncio.create_task(run())
        while not began.is_set(): await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task

    asyncio.run(main())
    assert manager.get_claims() == [] and lives(process)
    assert manager.get_worker_by_pid(process.pid).status == "idle"


def test_a_worker_that_cannot_be_ended_does_not_end_the_waiting(machine, monkeypatch, caplog):
    process, = machine.workers(20_000)
    manager = ResourceManager()
    register(manager, process)
    monkeypatch.setattr(stopping, "end_processes", lambda ends, grace: ends)
    with pytest.raises(ResourceBusy, match="Gave up after 0.3 s"), job_of(manager, "a", 10_000, timeout=0.3): pass
    assert any("making room failed" in line for line in warned(caplog))
    assert manager.get_worker_by_pid(process.pid).status == "idle"


def test_a_plugin_whose_release_cannot_be_read_is_one_without():
    class Odd:
        @property
        def release(self): raise RuntimeError("odd")
    with contextlib.suppress(RuntimeError): assert Odd().release
    worker = ResourceManager().register_worker(os.getpid(), "llm")
    assert unloading.find_unloader(worker, AskedPlugin(Odd()), None) is None
