"Processes as /proc shows them: hidden, dead and not waited for, in a storm of forks, and with a number that was reused"
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

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
