"The manager with many threads, with every sequence of calls, and with real processes that end and come back"
import copy
import json
import os
import pickle
import signal
import subprocess
import threading
import time
from dataclasses import asdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cjm_fasthtml_resources.core import host
from cjm_fasthtml_resources.core import process as proc
from cjm_fasthtml_resources.core.conflict import ResourceBusy
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.resources import ResourceStatus
from cjm_fasthtml_resources.simulate import (
    PRESETS,
    SimulatedDriver,
    SimulatedGpu,
    SimulatedHostProcess,
    SimulatedMachine,
    SimulatedProcess,
    load_scenario,
)

PIDS, JOBS = st.integers(5_000_001, 5_000_005), st.sampled_from(["a", "b", "c"])
TOTALS = [1_000, 600]  # MiB of the simulated GPUs


class Registry(RuleBasedStateMachine):
    "Any sequence of registrations, updates and reservations against the plainest model of what they mean"
    def __init__(self):
        super().__init__()
        self.manager, self.jobs, self.types, self.states = ResourceManager(), {}, {}, {}
        self.driver = SimulatedDriver([SimulatedGpu(memory_total_mb=total) for total in TOTALS]).start()
        self.held = []  # (device, MiB, reservation)

    def teardown(self): self.driver.stop()

    def promised(self, device): return sum(memory for where, memory, _ in self.held if where == device)

    def take(self, pid, job):
        for other, held in self.jobs.items():
            if other != pid and job in held: held.remove(job)
        if job not in self.jobs[pid]: self.jobs[pid].append(job)

    @rule(pid=PIDS, kind=st.sampled_from(["llm", "speech"]), job=st.none() | JOBS)
    def register(self, pid, kind, job):
        self.types[pid], self.states[pid] = kind, "running" if job else "idle"
        self.jobs[pid] = []
        if job: self.take(pid, job)
        assert self.manager.register_worker(pid, kind, job).pid == pid

    @rule(pid=PIDS, job=st.none() | JOBS)
    def give(self, pid, job):
        state = self.manager.update_worker_state(pid, job_id=job)
        if pid not in self.types: assert state is None
        elif job: self.take(pid, job)
        else: self.jobs[pid] = []

    @rule(pid=PIDS, status=st.sampled_from(["idle", "running", None]))
    def set_status(self, pid, status):
        self.manager.update_worker_state(pid, status=status)
        if pid not in self.types: return
        if status != "running": self.jobs[pid][:1] = []   # the one that it works on is done
        self.states[pid] = "running" if status == "running" or self.jobs[pid] else "idle"

    @rule(pid=PIDS, job=JOBS)
    def finish(self, pid, job):
        self.manager.update_worker_state(pid, job_id=job, status="idle")
        if pid not in self.types: return
        running = self.jobs[pid][:1]
        if job in self.jobs[pid]: self.jobs[pid].remove(job)
        if not self.jobs[pid]: self.states[pid] = "idle"
        elif self.jobs[pid][:1] != running: self.states[pid] = "running"

    @rule(pid=PIDS)
    def unregister(self, pid):
        self.manager.unregister_worker(pid)
        for held in (self.types, self.states, self.jobs): held.pop(pid, None)

    @rule(memory=st.integers(1, 1_000), device=st.none() | st.sampled_from(range(len(TOTALS))))
    def reserve(self, memory, device):
        allowed = range(len(TOTALS)) if device is None else [device]
        room = {d: TOTALS[d] - self.promised(d) for d in allowed}
        if memory > max(TOTALS[d] for d in allowed): refused = ValueError
        else: refused = None if max(room.values()) >= memory else ResourceBusy
        if refused:
            with pytest.raises(refused): self.manager.reserve(memory, device, timeout=0)
            return
        given = self.manager.reserve(memory, device, timeout=0)
        assert room[given.index] >= memory and room[given.index] >= max(room.values()) - TOTALS[given.index]/100
        self.held.append((given.index, memory, given))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        _, _, reservation = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        assert reservation.release() and not reservation.release()

    @invariant()
    def promises_agree(self):
        promised = sorted((c.device[-7], c.memory//2**20) for c in self.manager.get_claims())
        assert promised == sorted((str(device), memory) for device, memory, _ in self.held)
        if len(self.held) % 3 == 1:  # a check costs more than all else here
            devices = self.manager.check_gpu_availability().devices
            assert [d.promised("app")//2**20 for d in devices] == [self.promised(d) for d in range(len(TOTALS))]

    @invariant()
    def agrees(self):
        found = {w.pid: (w.worker_type, w.status, list(w.jobs)) for w in self.manager.get_all_workers()}
        assert found == {pid: (self.types[pid], self.states[pid], self.jobs[pid]) for pid in self.types}
        for job in ("a", "b", "c"):
            holders = [pid for pid, held in self.jobs.items() if job in held]
            found = self.manager.get_worker_by_job(job)
            assert ([found.pid] if found else []) == holders
        assert self.manager.get_active_worker_types() == set(self.types.values())


TestRegistry = Registry.TestCase
TestRegistry.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_many_threads_at_once():
    manager, errors = ResourceManager(), []

    def work(n):
        try:
            for i in range(150):
                pid = 5_000_000 + n*1000 + i % 7
                manager.register_worker(pid, f"type-{n}", job_id=f"job-{i % 5}")
                manager.update_worker_state(pid, status="running", job_id=f"job-{(i + n) % 5}")
                manager.get_worker_by_job("job-1"), manager.get_all_workers(), manager.get_active_worker_types()
                if i % 3 == 0: manager.unregister_worker(pid)
                if i % 50 == 0: manager.check_gpu_availability()
        except Exception as error: errors.append(error)

    with load_scenario("pair"):
        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
    assert not errors
    for job in range(5): assert sum(f"job-{job}" in w.jobs for w in manager.get_all_workers()) <= 1


def test_a_worker_is_known_by_its_start_also_after_the_clock_was_set(spawn, monkeypatch):
    worker, manager = spawn("input()"), ResourceManager(track_self=False)
    manager.register_worker(worker.pid, "llm")
    proc._known.clear()
    monkeypatch.setattr("psutil.boot_time", lambda: 1.0)
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(worker.pid, 100)])]):
        assert manager.check_gpu_availability().app_pids == [worker.pid]


def test_a_zombie_has_ended(spawn):
    worker, manager = spawn("pass"), ResourceManager()
    manager.register_worker(worker.pid, "llm")
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # it ended, and nobody looked at its exit status yet
    assert host.read_stat(worker.pid).state == "Z"
    assert [w.pid for w in manager.prune_dead_workers()] == [worker.pid] and manager.get_all_workers() == []


@pytest.fixture
def next_pid():
    "next_pid(n): the next process that starts has the PID n, if it is free"
    try: last = open("/proc/sys/kernel/ns_last_pid", "r+")  # noqa: SIM115
    except OSError: pytest.skip("only root may choose the next PID")

    def choose(pid: int) -> None:
        last.seek(0)
        last.write(str(pid - 1))
        last.flush()

    with last: yield choose


def start_sleeper() -> int:
    "The PID of a new child, which does nothing"
    pid = os.fork()
    if pid == 0: signal.pause()
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_pid_that_was_given_to_another_process(next_pid):
    manager = ResourceManager(track_self=False)
    for _ in range(20):
        first = start_sleeper()
        manager.register_worker(first, "llm")
        end(first)
        time.sleep(0.03)  # start times are counted in hundredths of a second
        next_pid(first)
        second = start_sleeper()
        try:
            if second != first: continue
            with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(second, 20000)])]):
                found = manager.check_gpu_availability()
            assert (found.app_pids, found.external_pids) == ([], [second])
            assert found.status is ResourceStatus.EXTERNAL_BUSY
            assert [w.pid for w in manager.prune_dead_workers()] == [first]
            return
        finally:
            end(second)
            manager.unregister_worker(first)
    pytest.skip("the number was not given again in 20 attempts")


def test_processes_that_come_and_go_while_being_looked_at():
    manager, stop = ResourceManager(), threading.Event()

    def storm():
        while not stop.is_set():
            pid = os.posix_spawn("/bin/true", ["true"], {})
            alive.append(pid)
            os.waitpid(pid, 0)

    alive = [os.getpid()]
    thread = threading.Thread(target=storm)
    thread.start()
    try:
        with SimulatedDriver([SimulatedGpu()]) as driver:
            for _ in range(60):
                driver.gpus[0].processes = [SimulatedProcess(pid, 1) for pid in dict.fromkeys(alive[-20:])]
                assert manager.check_gpu_availability().devices[0].processes
                assert manager.check_memory_availability().memory.memory.total
    finally:
        stop.set()
        thread.join()


def test_what_is_kept_about_processes_does_not_grow(monkeypatch):
    "At most twice as many as live, however many came and went"
    proc._known.clear()
    monkeypatch.setattr(proc, "_LEAST", 5)
    monkeypatch.setattr(proc, "_most", [5])
    living = subprocess.Popen(["sleep", "60"])
    for _ in range(100):
        child = subprocess.Popen(["sleep", "60"])
        for pid in (child.pid, living.pid): host.read_process(pid)
        child.kill()
        child.wait()
    kept = set(proc._known)
    living.kill()
    living.wait()
    assert proc._most[0] <= 2*len(kept) + 5
    assert living.pid in kept and len(kept) <= 2*(len(kept & set(host.resident_memory())) + 1) + 5 < 100


@pytest.mark.parametrize("preset", PRESETS)
def test_answers_can_be_copied_pickled_and_written_as_json(preset):
    with load_scenario(preset) as driver:
        manager = ResourceManager()
        for worker in driver.workers: manager.register_worker(**worker)
        for found in (manager.check_gpu_availability(), manager.check_memory_availability()):
            assert pickle.loads(pickle.dumps(found)) == found == copy.deepcopy(found)
            json.dumps(asdict(found), default=lambda enum: enum.value)
        for state in manager.get_all_workers(): assert pickle.loads(pickle.dumps(state)) == state


def test_no_text_shows_a_secret(caplog):
    class Plugin:
        def get_remote_resource_info(self): return dict(provider="p", status="up", ssh_host="h")
        def get_child_pids(self): raise RuntimeError("not yet")

    manager = ResourceManager()
    config = {
        "api_key": "hush",
        "deep": {"auth": [{"Access-Token": "hush"}]},
        "client_secret": "hush",
        "dbPassword": "hush",
        "model": "m",
    }
    state = manager.register_worker(5_000_001, "llm", config=config, plugin_instance=Plugin())
    shown = [state, manager, manager.check_gpu_availability(), manager.get_all_workers()]
    texts = [*map(repr, shown), str(state), f"{state}", caplog.text]
    assert not any("hush" in text for text in texts) and "get_child_pids" in caplog.text
    assert state.config["api_key"] == "hush"  # it is hidden, not lost


def test_a_terminal_shows_an_answer_in_lines():
    lines = []

    class Printer:
        text = staticmethod(lines.append)

    with load_scenario("pair"): conflict = ResourceManager(track_self=False).check_gpu_availability()
    conflict._repr_pretty_(Printer, False)
    first, *devices = lines[0].splitlines()
    assert first.startswith("gpu_memory: available. A GPU job can start now: GPU 0")
    card = "NVIDIA RTX 6000 Ada Generation"
    assert devices == [
        f"  GPU 0  {card}  available: other programs 14.6 GiB, not visible 510 MiB, free 32.3 GiB",
        f"  GPU 1  {card}  external_busy: other programs 38.6 GiB, not visible 400 MiB, free 8.4 GiB",
    ]


@pytest.mark.parametrize("percent, gpu, ram", [
    (44.9, "available", "available"),
    (45, "external_busy", "available"),
    (89.9, "external_busy", "available"),
    (90, "external_busy", "external_busy"),
])
def test_what_is_short_by_default(percent, gpu, ram):
    "45 % of a device and 90 % of the RAM, and exactly that is short already"
    used = SimulatedProcess(4_200_001, 10*percent)
    outsider = SimulatedHostProcess(4_200_001, "train.py", "bob", memory_mb=10*percent)
    machine = SimulatedMachine(1_000, 10*percent, [outsider])
    with SimulatedDriver([SimulatedGpu(memory_total_mb=1_000, processes=[used])], machine):
        manager = ResourceManager(track_self=False)
        assert manager.check_gpu_availability().status.value == gpu
        assert manager.check_memory_availability().status.value == ram
