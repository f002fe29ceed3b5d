"Processes as /proc shows them: hidden, dead and not waited for, in a storm of forks, and with a number that was reused"
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time

import pytest

from cjm_fasthtml_resources.core import ending
from cjm_fasthtml_resources.core import process as proc
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.resources import ResourceStatus
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("unshare") is not None


def in_namespace(code: str, *flags: str, prepare: str = "true", user: str = "") -> subprocess.CompletedProcess:
    "Run Python in namespaces of its own"
    environment = f"PYTHONPATH='{os.pathsep.join(p for p in sys.path if p)}' PYTHONDONTWRITEBYTECODE=1"
    python = f"{environment} {sys.executable} -c \"$CODE\""
    as_user = f"setpriv --reuid={user} --regid={user} --clear-groups env CODE=\"$CODE\" sh -c '{python}'"
    command = f"{prepare} && " + (as_user if user else python).replace("'" + os.pathsep, "'")
    return subprocess.run(["unshare", *flags, "sh", "-c", command], env={**os.environ, "CODE": code},
                          capture_output=True, text=True, timeout=60)


def allowed(*flags: str) -> bool:
    return ROOT and subprocess.run(["unshare", *flags, "true"], capture_output=True).returncode == 0


needs_namespace = pytest.mark.skipif(not allowed("--pid", "--fork", "--mount-proc"),
                                     reason="needs root and unshare: a PID namespace of its own")


def test_a_zombie_holds_nothing_and_its_worker_is_pruned(spawn):
    worker = subprocess.Popen(["sleep", "600"])
    manager = ResourceManager()
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(worker.pid, 5_000)])]) as driver:
        state = manager.register_worker(worker.pid, "llm")
        worker.kill()
        while proc.read_stat(worker.pid).state != "Z": time.sleep(0.01)
        assert proc.has_ended(worker.pid, state.start_time)
        driver.gpus[0].processes.clear()
        assert [w.pid for w in manager.prune_dead_workers()] == [worker.pid]
        assert manager.check_gpu_availability().status is ResourceStatus.AVAILABLE
    worker.wait()


HEADLESS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=[60]).start()
print("ready", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_whose_main_thread_ended_has_not_ended_while_others_run(spawn):
    worker = spawn(HEADLESS)
    assert worker.stdout.readline() == "ready\n"
    manager = ResourceManager(track_self=False)
    state = manager.register_worker(worker.pid, "llm")
    while proc.read_stat(worker.pid).state != "Z": time.sleep(0.01)
    assert not proc.has_ended(worker.pid, state.start_time) and manager.prune_dead_workers() == []
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(worker.pid, 5_000)])]):
        assert manager.check_gpu_availability().app_pids == [worker.pid]
    assert manager.stop_worker(worker.pid).pid == worker.pid and worker.wait()
    assert proc.has_ended(worker.pid, state.start_time)


@contextlib.contextmanager
def without_descriptors():
    "Nothing can be opened meanwhile"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_without_descriptors_nobody_has_ended_and_nothing_is_forgotten(spawn, monkeypatch):
    worker, unknown, dead = spawn("input()"), spawn("input()"), spawn("pass")
    manager = ResourceManager(track_self=False)
    state, other = manager.register_worker(worker.pid, "llm"), manager.register_worker(dead.pid, "llm")
    before, start = proc.read_process(worker.pid), proc.read_start(unknown.pid)
    dead.wait()
    with without_descriptors():
        assert proc.read_stat(worker.pid) is None
        assert not proc.has_ended(worker.pid, state.start_time) and not proc.has_ended(unknown.pid, start)
        proc._forget_ended()
        assert proc.read_process(worker.pid) is before
        assert proc.read_process(unknown.pid).start_time is None
        # what is known to have ended has: its number is free
        assert manager.prune_dead_workers() == [other]
        # it is not sent to what may be another process by now
        assert not ending.send_signal(before.lineage[0], 9)
        with pytest.raises(OSError): manager.stop_worker(worker.pid)
    assert manager.get_worker_by_pid(worker.pid) is state and worker.poll() is None and unknown.poll() is None
    assert proc.read_process(unknown.pid).lineage[0] == (unknown.pid, start)


def test_what_was_read_in_part_is_read_again(spawn, monkeypatch):
    child, real, left = spawn("input()"), os.open, [3]
    proc.read_process(os.getpid())

    def opens(path, *args, **kw):
        left[0] -= 1
        if left[0] < 0: raise OSError(24, "Too many open files")
        return real(path, *args, **kw)

    for count in range(1, 8):
        proc._known.pop(child.pid, None)
        left[0] = count
        monkeypatch.setattr(os, "open", opens)
        proc.read_process(child.pid)
        monkeypatch.setattr(os, "open", real)
        assert proc.read_process(child.pid).ancestors == proc.find_ancestors(child.pid)
        assert proc.find_ancestors(child.pid)[0].pid == os.getpid()


def test_a_storm_of_forks_costs_no_answer_and_what_is_known_stays_bounded(monkeypatch):
    monkeypatch.setattr(proc, "_LEAST", 500)
    monkeypatch.setattr(proc, "_most", [500])
    stop, pids, lock = threading.Event(), [], threading.Lock()

    def storm():
        while not stop.is_set():
            children = [subprocess.Popen(["true"]) for _ in range(20)]
            with lock: pids[:] = [c.pid for c in children] + pids[:100]
            for c in children: c.wait()

    threads = [threading.Thread(target=storm) for _ in range(2)]
    for t in threads: t.start()
    try:
        with SimulatedDriver([SimulatedGpu()]) as driver:
            manager, end, checks = ResourceManager(), time.monotonic() + 4, 0
            while time.monotonic() < end:
                with lock: driver.gpus[0].processes = [SimulatedProcess(pid, 10) for pid in pids[:40]]
                conflict = manager.check_gpu_availability()
                manager.check_memory_availability()
                assert conflict.devices[0].status in (ResourceStatus.AVAILABLE, ResourceStatus.APP_BUSY)
                checks += 1
    finally:
        stop.set()
        for t in threads: t.join()
    assert checks > 5 and len(proc._known) <= 500


@needs_namespace
def test_a_number_that_was_given_to_another_process_is_not_the_apps():
    code = """
import json, os, subprocess
from cjm_fasthtml_resources.core import process as proc
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess
proc.in_pid_namespace = lambda: False      # the simulated driver speaks in this namespace's numbers
import time
manager, first = ResourceManager(track_self=False), subprocess.Popen(["sleep", "600"])
with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(first.pid, 20000)])]):
    manager.register_worker(first.pid, "llm")
    mine = manager.check_gpu_availability().status.value
    first.kill(); first.wait()
    time.sleep(0.05)                       # a start time counts in hundredths of a second
    with open("/proc/sys/kernel/ns_last_pid", "w") as file: file.write(str(first.pid - 1))
    second = subprocess.Popen(["sleep", "600"])
    now = manager.check_gpu_availability().status.value
    pruned = [w.pid for w in manager.prune_dead_workers()] == [first.pid]
    print(json.dumps([second.pid == first.pid, mine, now, pruned]))
    second.kill()
"""
    out = in_namespace(code, "--pid", "--fork", "--mount-proc")
    assert out.returncode == 0, out.stderr
    reused, mine, now, pruned = json.loads(out.stdout)
    if not reused: pytest.skip("the kernel gave another number")
    assert (mine, now, pruned) == ("app_busy", "external_busy", True)


@needs_namespace
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd")
def test_a_number_that_changes_hands_between_the_question_and_the_signal_is_spared():
    code = """
import subprocess
from cjm_fasthtml_resources.core import ending
from cjm_fasthtml_resources.core.process import read_process
meant, other = subprocess.Popen(["sleep", "60"]), []
process, ask = read_process(meant.pid).lineage[0], ending.has_ended

def ask_and_change_hands(*who):
    found = ask(*who)
    meant.kill(); meant.wait()
    for _ in range(50):
        with open("/proc/sys/kernel/ns_last_pid", "w") as file: file.write(str(meant.pid - 1))
        other.append(subprocess.Popen(["sleep", "60"]))
        if other[-1].pid == meant.pid: return found
    raise SystemExit("the kernel gave another number")

ending.has_ended = ask_and_change_hands
print(ending.send_signal(process, 9), other[-1].pid == process.pid)
try: print(other[-1].wait(0.3))
except subprocess.TimeoutExpired: print("lives")
for p in other: p.kill()
"""
    out = in_namespace(code, "--pid", "--fork", "--mount-proc")
    if any(text in out.stderr for text in ("another number", "Read-only", "Permission denied")):
        pytest.skip(f"no number can be forced here: {out.stderr.strip().splitlines()[-1]}")
    assert (out.stdout.split(), out.returncode) == (["False", "True", "lives"], 0), out.stderr


@needs_namespace
def test_in_a_pid_namespace_the_drivers_numbers_are_nobodys():
    code = """
import os
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess
held = SimulatedProcess(os.getpid(), 20000)     # the host's process with this number
with SimulatedDriver([SimulatedGpu(processes=[held])]):
    conflict = ResourceManager().check_gpu_availability()
    print(conflict.status.value, conflict.devices[0].processes[0].owner, conflict.estimated)
"""
    out = in_namespace(code, "--pid", "--fork", "--mount-proc")
    assert (out.stdout.split(), out.returncode) == (["external_busy", "unknown", "True"], 0), out.stderr


@pytest.mark.skipif(not allowed("--mount") or not shutil.which("setpriv"),
                    reason="needs root, unshare and setpriv: a /proc mounted with hidepid")
def test_processes_that_are_hidden_are_outsiders_without_a_name(spawn):
    hidden = spawn("input()")
    code = f"""
from cjm_fasthtml_resources.core import process as proc
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess
assert proc.read_stat({hidden.pid}) is None, 'it can be seen'
proc.in_pid_namespace = lambda: False
with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess({hidden.pid}, 20000)])]):
    manager = ResourceManager()
    conflict = manager.check_gpu_availability()
    print(conflict.status.value, conflict.external_pids, manager.check_memory_availability().status.value)
"""
    out = in_namespace(code, "--mount", prepare="mount -t proc -o hidepid=2 proc /proc", user="65534")
    impossible = ("it can be seen", "mount:", "Permission denied", "shared libraries")
    if any(text in out.stderr for text in impossible):
        pytest.skip(f"this kernel does not hide processes here: {out.stderr.strip().splitlines()[-1]}")
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith(f"external_busy [{hidden.pid}]")


HIDING = "mount -t proc -o hidepid=2 proc /proc"
WITHOUT_PTRACE = "setpriv --regid=65534 --clear-groups --bounding-set=-sys_ptrace,-kill --inh-caps=-sys_ptrace,-kill"


@pytest.mark.skipif(not allowed("--mount") or not shutil.which("setpriv"),
                    reason="needs root, unshare and setpriv: a /proc mounted with hidepid")
def test_what_is_hidden_lives_until_its_number_is_free():
    hidden = subprocess.Popen(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sleep", "60"])
    deadline = time.monotonic() + 10
    while proc.read_stat(hidden.pid).name != "sleep" and time.monotonic() < deadline: time.sleep(0.01)
    code = f"""
import sys
from cjm_fasthtml_resources.core import process as proc
from cjm_fasthtml_resources.core.manager import ResourceManager
assert proc.read_stat({hidden.pid}) is None, 'it can be seen'
manager = ResourceManager(track_self=False)
state = manager.register_worker({hidden.pid}, 'llm')
start = {proc.read_start(hidden.pid)}
print(state.start_time, proc.is_free({hidden.pid}), proc.has_ended({hidden.pid}, start), flush=True)
input()
print(proc.is_free({hidden.pid}), proc.has_ended({hidden.pid}, start))
"""
    environment = {**os.environ, "CODE": code, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    looker = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"{HIDING} && exec {WITHOUT_PTRACE} {sys.executable} -c \"$CODE\""],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = looker.stdout.readline()
    hidden.kill()
    hidden.wait()
    then, errors = looker.communicate("\n", timeout=30)
    if "it can be seen" in errors or "mount:" in errors: pytest.skip(f"not here: {errors.strip().splitlines()[-1]}")
    assert (first, then) == ("None False False\n", "True True\n"), errors


@pytest.mark.skipif(not allowed("--time", "--fork"), reason="needs root and time namespaces")
@pytest.mark.parametrize("seconds", [100_000, -100])
def test_in_a_time_namespace_a_process_has_the_same_start(seconds, tmp_path, monkeypatch):
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    mine = ResourceManager(app="times")
    mine.register_worker(os.getpid(), "llm")
    code = f"""
import os
from cjm_fasthtml_resources.core import process as proc
from cjm_fasthtml_resources.core.manager import ResourceManager
me = {tuple(proc.this_process())}
manager = ResourceManager(app="times")
print(proc.read_process(me[0]).lineage[0] == me, proc.has_ended(*me), manager.prune_dead_workers())
manager.register_worker(os.getpid(), "inside")
print(proc.read_start(os.getpid()) > me[1], [w.worker_type for w in manager.get_all_workers()])
"""
    out = in_namespace(code, "--time", f"--boottime={seconds}", "--fork")
    if "timens_offsets" in out.stderr: pytest.skip(out.stderr)
    assert out.stdout == "True False []\nTrue ['llm', 'inside']\n", out.stderr


@needs_namespace
def test_the_processes_of_another_namespace_are_not_taken_for_those_of_here():
    "With the old /proc in a new PID namespace: its number 1 is the machine's first process, and not this one"
    code = """
import os
from cjm_fasthtml_resources.core import process as proc
print(proc.this_process().start_time, proc.read_stat(1), proc.has_ended(1, 0.5))
print(proc.is_free(1), proc.is_free(4_000_000))
"""
    out = in_namespace(code, "--pid", "--fork")
    assert out.stdout == "None None False\nFalse True\n", (out.stdout, out.stderr)
