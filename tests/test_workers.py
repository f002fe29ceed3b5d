"What is known of a worker, what its plugin is asked, and what may not be passed in"
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from conftest import GONE, Server, warned

from cjm_fasthtml_resources.core import host
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.resources import ResourceStatus
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedMachine, SimulatedProcess


def test_every_field_of_a_worker_can_be_changed_left_and_cleared(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    manager, config = ResourceManager(), {"model": "m"}
    first = manager.register_worker(GONE, "llm")
    fields = dict(
        job_id="j", plugin_id="p", plugin_name="n", loaded_plugin_resource="r",
        config=config, status="running", gpu_memory_mb=5)
    for name, value in fields.items():
        now[0] += 1
        state = manager.update_worker_state(GONE, **{name: value})
        assert getattr(state, name) == value and (state.last_used == now[0]) == (name in ("job_id", "status"))
    # later changes of the caller's dictionary are his own
    assert state == replace(first, **fields) and state.config is not config
    assert manager.get_worker_by_job("j") == state and manager.get_worker_by_job("k") is None
    for name in ("plugin_id", "plugin_name", "loaded_plugin_resource", "config", "gpu_memory_mb"):
        assert getattr(manager.update_worker_state(GONE, **{name: None}), name) is None
    assert manager.update_worker_state(GONE, status=None).status == "idle"
    assert manager.get_worker_by_job("j") is None and manager.get_worker_by_pid(GONE).job_id is None


def test_a_job_is_its_new_workers():
    manager = ResourceManager()
    manager.register_worker(GONE, "llm")
    manager.update_worker_state(GONE, job_id="j", status="running")
    other = manager.register_worker(GONE + 1, "llm", "j")
    assert manager.get_worker_by_job("j") == other
    manager.update_worker_state(GONE, plugin_id="q")
    assert manager.get_worker_by_job("j") == other   # whose it is now


def jobs(manager, pid):
    state = manager.get_worker_by_pid(pid)
    return state.status, state.job_id, state.waiting_jobs


def test_a_worker_may_be_given_its_next_jobs_before_the_last_is_done():
    manager = ResourceManager()
    manager.register_worker(GONE, "llm", "a")
    for job in "bcb": manager.update_worker_state(GONE, job_id=job, status="running")
    assert jobs(manager, GONE) == ("running", "a", ("b", "c"))
    for job in "abc": assert manager.get_worker_by_job(job).pid == GONE
    manager.update_worker_state(GONE, status="idle")
    assert jobs(manager, GONE) == ("running", "b", ("c",)) and manager.get_worker_by_job("a") is None
    manager.register_worker(GONE + 1, "llm", "c")               # one that waits is given to another
    assert jobs(manager, GONE) == ("running", "b", ()) and manager.get_worker_by_job("c").pid == GONE + 1
    manager.update_worker_state(GONE, job_id="c")
    manager.update_worker_state(GONE + 1, job_id="b")           # the one that runs
    assert jobs(manager, GONE) == ("running", "c", ()) and jobs(manager, GONE + 1) == ("running", "b", ())
    assert manager.update_worker_state(GONE, status=None).status == "idle"
    for job in "de": manager.update_worker_state(GONE, job_id=job)
    assert manager.update_worker_state(GONE, job_id=None).jobs == ()
    assert [manager.get_worker_by_job(job) for job in "acde"] == [None]*4


def test_an_end_that_is_told_late_ends_no_other_job():
    manager = ResourceManager()
    manager.register_worker(GONE, "llm", "a")
    manager.update_worker_state(GONE, job_id="b")
    manager.update_worker_state(GONE, job_id="a", status="idle")
    assert jobs(manager, GONE) == ("running", "b", ())
    manager.update_worker_state(GONE, job_id="a", status="idle")
    assert jobs(manager, GONE) == ("running", "b", ())
    manager.update_worker_state(GONE, job_id="b", status="idle")
    assert jobs(manager, GONE) == ("idle", None, ())


def test_jobs_wait_also_where_processes_share_them(folder):
    mine, other = ResourceManager(app="jobs"), ResourceManager(app="jobs")
    mine.register_worker(GONE, "llm", "a")
    other.update_worker_state(GONE, job_id="b")
    assert jobs(mine, GONE) == ("running", "a", ("b",))
    mine.update_worker_state(GONE, status="idle")
    assert jobs(other, GONE) == ("running", "b", ()) and other.get_worker_by_job("a") is None


def test_a_child_that_was_dead_when_it_was_declared_is_nobodys(spawn):
    other, worker = spawn("input()"), spawn("input()")
    manager, plugin = ResourceManager(track_self=False), Server()
    plugin.children = [other.pid]
    told = manager.register_worker(worker.pid, "llm", plugin_instance=plugin)

    def number_changes_hands(): manager.workers.table.children[other.pid][worker.pid] = None  # as if it was dead then
    number_changes_hands()
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(other.pid, 900)])]):
        manager.refresh_worker(worker.pid)
        assert manager.check_gpu_availability().app_pids == []
        manager.register_worker(worker.pid, "llm", plugin_instance=plugin)        # again, and it is still declared
        assert manager.check_gpu_availability().app_pids == []
        assert manager.get_all_related_pids(worker.pid) == [worker.pid, other.pid]
        plugin.children = []
        manager.refresh_worker(worker.pid)
        plugin.children = [other.pid]
        manager.refresh_worker(worker.pid)                                        # now it is another one
        assert manager.check_gpu_availability().app_pids == [other.pid]
    number_changes_hands()
    assert manager.stop_worker(worker.pid).pid == told.pid
    assert worker.wait() and other.poll() is None


LINES = """
import sys
from dataclasses import replace
from cjm_fasthtml_resources.core.registry import find_changes
from cjm_fasthtml_resources.core.workers import Workers, make_state

def fresh():
    workers = Workers()
    for pid, job in ((5_000_001, "a"), (5_000_002, "b")): workers.register(make_state(pid, "llm", job_id=job))
    workers.register(replace(make_state(5_000_003, "llm", gpu_memory_mb=5), child_pids=[5_000_009]), "plugin")
    return workers

def state(workers):
    table = workers.table
    for job, pid in table.jobs.items(): assert job in table.workers[pid].jobs, (job, pid)
    assert sorted(table.jobs) == sorted(job for w in table.workers.values() for job in w.jobs)
    assert set(table.children) == {c for w in table.workers.values() for c in w.child_pids}
    assert set(table.reporting) == {w.pid for w in table.workers.values() if w.gpu_memory_mb is not None}
    states = {pid: replace(w, last_used=None) for pid, w in table.workers.items()}
    indexes = table.jobs, table.children, table.reporting, table.plugins
    return states, list(table.workers), [dict(index) for index in indexes]

calls = dict(
    register=lambda w: w.register(make_state(5_000_001, "speech", job_id="b", gpu_memory_mb=7), "new"),
    update=lambda w: w.update(5_000_001, find_changes(job_id="b", gpu_memory_mb=7)),
    forget=lambda w: w.forget(5_000_003),
    prune=lambda w: w.forget_if_same(*w.all()))

for name, call in calls.items():
    workers = fresh()
    before, _ = state(workers), call(workers)
    after, at, told = state(workers), 0, set()
    while True:
        workers, left = fresh(), at

        def trace(frame, event, arg):
            global left
            if "/core/workers.py" not in frame.f_code.co_filename: return None
            if event == "line":
                if left == 0: left -= 1; raise KeyboardInterrupt
                left -= 1
            return trace

        sys.settrace(trace)
        try: call(workers)
        except KeyboardInterrupt: pass
        finally: sys.settrace(None)
        workers.all()
        found = state(workers)
        assert found in (before, after), (name, at, found)
        told.add(found == after)
        if left >= 0: break
        at += 1
    assert told == {False, True} and at > 20, (name, told, at)
print("consistent")
"""


def test_a_change_that_is_interrupted_at_any_line_happened_as_a_whole_or_not_at_all():
    done = subprocess.run([sys.executable, "-c", LINES], capture_output=True, text=True, timeout=120)
    assert done.stdout == "consistent\n", done.stderr[-2000:]


def is_usable(manager):
    "Change each of four workers, and return whether the jobs that they hold are those that are found"
    table = manager.workers.table
    for w in manager.get_all_workers(): manager.update_worker_state(w.pid, job_id=f"mine-{w.pid}")
    held = {job: w.pid for w in manager.get_all_workers() for job in w.jobs}
    return held == table.jobs and len(manager.get_all_workers()) == 4


def test_a_fork_while_other_threads_change_workers_leaves_the_child_a_usable_registry():
    manager, stop = ResourceManager(), threading.Event()
    for pid in range(GONE, GONE + 4): manager.register_worker(pid, "llm")

    def change():
        for n in itertools.count():
            if stop.is_set(): return
            manager.update_worker_state(GONE + n % 4, job_id=f"job-{n % 3}")
            if n % 5 == 0: manager.register_worker(GONE + n % 4, "llm", f"job-{n % 3}", gpu_memory_mb=n)

    threads = [threading.Thread(target=change) for _ in range(3)]
    for t in threads: t.start()
    try:
        for _ in range(40):
            if (child := os.fork()) == 0:
                signal.alarm(10)
                code = 1
                try:
                    code = 0 if is_usable(manager) else 2
                finally: os._exit(code)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for t in threads: t.join()


def test_a_look_up_does_not_wait_for_a_change_that_waits():
    manager = ResourceManager()
    manager.register_worker(GONE, "llm", "a")
    within, done = threading.Event(), threading.Event()

    def change():
        with manager.workers.changing() as table:
            table.put(replace(table.workers.get(GONE), plugin_id="x"))
            within.set()
            done.wait(10)

    thread = threading.Thread(target=change)
    thread.start()
    assert within.wait(5)
    began = time.monotonic()
    assert manager.get_worker_by_job("a").plugin_id is None and time.monotonic() - began < 1   # not yet
    done.set()
    thread.join()
    assert manager.get_worker_by_job("a").plugin_id == "x"


def test_what_is_not_registered_is_warned_of(caplog):
    manager = ResourceManager()
    assert manager.update_worker_state(7, status="idle") is None and manager.unregister_worker(8) is None
    assert warned(caplog) == [
        "update_worker_state: no worker with PID 7 is registered",
        "unregister_worker: no worker with PID 8 is registered",
    ]


def test_dead_workers_are_pruned_and_no_others(spawn):
    alive, dead = spawn("input()"), spawn("input()")
    manager = ResourceManager()
    for pid in (alive.pid, dead.pid, GONE): manager.register_worker(pid, "llm")
    dead.kill()
    dead.wait()
    assert [w.pid for w in manager.prune_dead_workers()] == [dead.pid]
    assert [w.pid for w in manager.get_all_workers()] == [alive.pid, GONE]   # who was never seen alive stays


def test_a_refresh_takes_what_is_new_and_warns_of_what_is_not_there(caplog):
    manager, plugin = ResourceManager(), Server()
    assert manager.refresh_worker(5_000_007) is None
    assert warned(caplog) == ["refresh_worker: no worker with PID 5000007 is registered"]
    silent = manager.register_worker(5_000_008, "llm")
    assert manager.refresh_worker(5_000_008) is silent and not warned(caplog)   # there is no plugin to ask
    before = manager.register_worker(5_000_009, "llm", plugin_instance=plugin)
    asked = manager.workers.plugins[5_000_009].asked
    # nothing new: the same object
    assert manager.refresh_worker(5_000_009) is before
    assert manager.workers.plugins[5_000_009].asked > asked and 5_000_008 not in manager.workers.plugins
    plugin.children = [GONE, os.getpid()]
    after = manager.refresh_worker(5_000_009)
    own = host.read_start(os.getpid())
    assert after.child_pids == [GONE, os.getpid()] and manager.workers.table.children[os.getpid()] == {5_000_009: own}
    assert manager.refresh_worker(5_000_009) is after
    manager.workers.table.children[os.getpid()][5_000_009] = 0.5   # as if the number had changed hands since
    # the child that was declared is not taken for another
    assert manager.refresh_worker(5_000_009) == after
    assert manager.workers.table.children[os.getpid()] == {5_000_009: 0.5}


def test_a_plugin_that_fails_is_named_with_what_it_did(caplog):
    class Odd(Server):
        def get_execution_mode(self): raise RuntimeError("not ready")
        def get_child_pids(self): return [GONE, "7", True, -1, 0, 1]
        def get_managed_resources(self): return {"container_id": "c0ffee", "conda_env": "speech"}

    manager, plugin = ResourceManager(), Odd()
    state = manager.register_worker(5_000_007, "llm", plugin_instance=plugin)
    assert (state.execution_mode, state.child_pids) == (None, [GONE, 1])
    assert (state.container_id, state.conda_env) == ("c0ffee", "speech")
    assert warned(caplog) == [
        "Odd.get_execution_mode() raised RuntimeError: not ready",
        "Odd.get_child_pids() returned ['7', True, -1, 0], which are not valid PIDs",
    ]
    plugin.get_execution_mode, plugin.get_child_pids = (lambda: "docker"), (lambda: [])
    assert manager.refresh_worker(5_000_007).execution_mode == "docker" and not warned(caplog)

    def fails(*args): raise RuntimeError("later")
    methods = ("get_execution_mode", "get_child_pids", "get_managed_resources")
    for name in methods: setattr(plugin, name, fails)
    assert manager.refresh_worker(5_000_007).execution_mode == "docker"   # what it said last still holds
    assert warned(caplog) == [f"Odd.{name}() raised RuntimeError: later" for name in methods]


def test_a_rented_machine_is_known_as_long_as_its_plugin_says_so(caplog):
    class Rented:
        info = {"provider": "x", "region": "eu", "secret_field": 1}
        def get_remote_resource_info(self): return self.info

    manager, plugin = ResourceManager(), Rented()
    known = (
        "provider", "region", "instance_id", "status", "ssh_host", "gpu_count", "gpu_type", "estimated_cost_per_hour")
    first = manager.register_worker(5_000_007, "llm", plugin_instance=plugin)
    assert first.is_remote and first.remote_resource == {name: plugin.info.get(name) for name in known}
    plugin.get_remote_resource_info = lambda: 1/0
    assert manager.refresh_worker(5_000_007).remote_resource == first.remote_resource
    assert warned(caplog) == ["Rented.get_remote_resource_info() raised ZeroDivisionError: division by zero"]
    plugin.get_remote_resource_info = lambda: None
    assert not manager.refresh_worker(5_000_007).is_remote
    assert manager.get_worker_by_pid(5_000_007).remote_resource is None


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
        manager.register_worker(5_000_041, "llm", plugin_instance=Rented(price, estimate))
        return manager.estimate_total_cloud_cost(*hours)

    assert cost(2, lambda hours: 10 + hours) == 11 and cost(2, lambda hours: 10 + hours, 3) == 13
    assert cost(2, None) == 2 and cost(2, None, 3) == 6
    assert cost(2, lambda hours: True, 3) == 6 and not warned(caplog)
    assert cost(None, None) == 0.0
    assert warned(caplog) == ["the plugin of worker 5000041 reports no cost; it is left out of the sum"]


def test_a_plugin_that_hangs_holds_up_no_check_and_is_heard_when_it_answers(caplog, monkeypatch):
    answer, calls = threading.Event(), []
    note = "The plugin of worker 5000007 is not responding. Its last reported child processes are used."

    class Hanging(Server):
        def get_child_pids(self):
            calls.append(threading.current_thread())
            if len(calls) > 1: answer.wait(10)
            return self.children + [os.getpid()][:answer.is_set()]

    other = Server()
    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager()
        manager.register_worker(5_000_007, "llm", plugin_instance=Hanging())
        manager.register_worker(5_000_008, "llm", plugin_instance=other)
        monkeypatch.setattr("cjm_fasthtml_resources.core.asking.REFRESH_AFTER", 0.05)
        monkeypatch.setattr("cjm_fasthtml_resources.core.asking.ANSWER_WITHIN", 0.5)
        other.children = [GONE + 1]
        time.sleep(0.06)
        began = time.monotonic()
        conflict = manager.check_gpu_availability()
        assert (conflict.status, conflict.notes) == (ResourceStatus.AVAILABLE, (note,))
        assert 0.5 <= time.monotonic() - began < 2
        assert warned(caplog) == [
            "the plugin of worker 5000007 is not responding within 0.5 s; its last report counts until it does"]
        assert manager.get_worker_by_pid(5_000_007).child_pids == [GONE]
        assert manager.get_worker_by_pid(5_000_008).child_pids == [GONE + 1]   # the others are heard
        time.sleep(0.06)
        began = time.monotonic()
        for _ in range(20): manager.check_gpu_availability()
        # not waited for again, and no second thread
        assert time.monotonic() - began < 0.5 and len(calls) == 2 and not warned(caplog)
        # but said each time
        assert manager.check_gpu_availability().notes == manager.check_memory_availability().notes == (note,)
        answer.set()
        calls[1].join(5)
        assert manager.get_worker_by_pid(5_000_007).child_pids == [GONE, os.getpid()]
        time.sleep(0.06)
        assert manager.check_gpu_availability().notes == () and len(calls) == 3
        assert manager.check_memory_availability().notes == ()


def test_a_child_forked_while_a_plugin_hangs_asks_it_itself(monkeypatch):
    answer, parent = threading.Event(), os.getpid()

    class Hanging(Server):
        hangs = False
        def get_child_pids(self):
            if self.hangs and os.getpid() == parent: answer.wait(10)
            return [GONE + (os.getpid() != parent)]

    with SimulatedDriver([SimulatedGpu()]):
        manager, plugin = ResourceManager(), Hanging()
        manager.register_worker(5_000_007, "llm", plugin_instance=plugin)
        plugin.hangs = True
        monkeypatch.setattr("cjm_fasthtml_resources.core.asking.REFRESH_AFTER", 0.01)
        monkeypatch.setattr("cjm_fasthtml_resources.core.asking.ANSWER_WITHIN", 0.2)
        time.sleep(0.02)
        assert manager.check_gpu_availability().notes
        if (child := os.fork()) == 0:
            monkeypatch.setattr("cjm_fasthtml_resources.core.asking.ANSWER_WITHIN", 5.0)
            notes, children = manager.check_gpu_availability().notes, manager.get_worker_by_pid(5_000_007).child_pids
            os._exit(0 if notes == () and children == [GONE + 1] else 1)
        assert os.waitpid(child, 0)[1] == 0
        answer.set()


def test_what_a_plugin_was_seen_to_need_is_its_workers_own_tree():
    manager = ResourceManager(track_self=False)
    worker = manager.register_worker(os.getpid(), "llm", plugin_name="a", loaded_plugin_resource="m")
    gpu = SimulatedGpu(processes=[SimulatedProcess(os.getpid(), 700), SimulatedProcess(GONE, 5_000)])
    with SimulatedDriver([gpu]):
        manager.check_gpu_availability()
        assert manager.expected_gpu_memory_mb("a", "m") == 700
        gpu.processes[0] = SimulatedProcess(os.getpid(), 300)
        manager.check_gpu_availability()
        assert manager.expected_gpu_memory_mb("a", "m") == 700   # the most that was seen
        assert manager.get_worker_by_pid(os.getpid()) == worker


def test_the_need_of_a_plugin_without_a_resource_is_its_own():
    manager = ResourceManager(track_self=False)
    manager.register_worker(GONE, "llm", plugin_name="piper")
    gpu = SimulatedGpu(processes=[SimulatedProcess(GONE, 700)])
    with SimulatedDriver([gpu]): manager.check_gpu_availability()
    assert manager.expected_gpu_memory_mb("piper") == 700 and manager.expected_gpu_memory_mb("piper", "de") is None
    with pytest.raises(TypeError, match="^plugin_name must be a string, not 7$"):
        manager.expected_gpu_memory_mb(7)
    with pytest.raises(TypeError, match="^resource must be a string or None, not 7$"):
        manager.expected_gpu_memory_mb("piper", 7)


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


def test_a_configuration_that_is_none_is_named():
    with pytest.raises(TypeError, match="^config must be a dictionary, not list$"):
        ResourceManager.from_config([])
    unknown = "^config has no field 'gpus'; allowed are: gpu_memory_threshold_percent, "
    with pytest.raises(ValueError, match=unknown): ResourceManager.from_config({"gpus": 1})


@pytest.mark.parametrize("call, error, words", [
    (lambda m: m.register_worker(0, "llm"), ValueError, "pid must be a positive int, not 0"),
    (lambda m: m.register_worker("7", "llm"), TypeError, "pid must be a positive int, not '7'"),
    (lambda m: m.register_worker(7, 5), TypeError, "worker_type must be a non-empty string, not 5"),
    (lambda m: m.register_worker(7, "llm", config=[1]), TypeError, "config must be a dictionary or None, not list"),
    (lambda m: m.update_worker_state(7, gpu_memory_mb=-1), ValueError, "gpu_memory_mb must be 0 or more, not -1"),
    (lambda m: m.update_worker_state(7, status=1), TypeError, "status must be a string or None, not 1"),
    (lambda m: m.pick_gpus(0), ValueError, "n must be a positive int, not 0"),
    (lambda m: m.pick_gpus(min_free_mb=-1), ValueError, "min_free_mb must be 0 or more, not -1"),
    (lambda m: m.estimate_total_cloud_cost("1"), TypeError, "duration_hours must be a number, not '1'"),
    (lambda m: ResourceManager(101), ValueError,
     "gpu_memory_threshold_percent must be between 0 and 100, not 101"),
    (lambda m: ResourceManager(gpu_timeout=0), ValueError, "gpu_timeout must be between 0.001 and 1e+06, not 0"),
    (lambda m: ResourceManager(app="4711"), ValueError,
     "Invalid app name '4711'. Start with a letter, then use up to 63 letters, digits, '_', '.' or '-'"),
    (lambda m: ResourceManager(app=7), TypeError, "app must be a name, not 7"),
])
def test_what_may_not_be_passed_in_is_named(call, error, words):
    with pytest.raises(error) as raised: call(ResourceManager())
    assert str(raised.value) == words
