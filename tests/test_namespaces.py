"Reservations that are seen from other PID and time namespaces, where numbers and clocks mean something else"
import json
import os
import shutil
import subprocess
import sys

import psutil
import pytest
from conftest import wait_until

from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.core.process import read_start
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

PID_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
AHEAD = ["unshare", "-T", "--fork", "--monotonic", "10000"]


def allows(namespace) -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*namespace, "true"], capture_output=True).returncode == 0


needs_pids = pytest.mark.skipif(not allows(PID_NAMESPACE), reason="making a PID namespace needs root")
needs_times = pytest.mark.skipif(not allows(AHEAD), reason="making a time namespace needs root and Linux 5.6")

ASKS = """
from cjm_fasthtml_resources import ResourceBusy, ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
with SimulatedDriver([SimulatedGpu(memory_total_mb=24000)]):
    manager = ResourceManager(app="b")
    found = len(manager.get_claims())
    try: manager.reserve(20000, timeout=0).release()
    except ResourceBusy: print(found, "busy")
    else: print(found, "given")
"""
KILLED = """
import sys
from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
with SimulatedDriver([SimulatedGpu(memory_total_mb=24000)]):
    held = ResourceManager(app="a").reserve(20000, timeout=0, pid=int(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.readline()
"""
# A shift by half a tick, as a restored checkpoint has it
SHIFTED = """
import ctypes, os, sys
assert ctypes.CDLL(None).unshare(0x80) == 0
with open("/proc/self/timens_offsets", "w") as file: file.write("boottime 100 5000000\\n")
if os.fork() == 0: os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
os.wait()
"""
ENDED = """
import json, sys
from cjm_fasthtml_resources.core.process import has_ended
print([has_ended(*process) for process in json.loads(sys.argv[1])])
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch): monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path/"state"))


def run(*command: str) -> str:
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


def python(script: str, *namespace: str) -> str: return run(*namespace, sys.executable, "-c", script)


@needs_pids
def test_a_process_that_cannot_be_seen_keeps_what_was_reserved_for_it(spawn):
    process = spawn("input()")
    asker = subprocess.Popen([sys.executable, "-c", KILLED, str(process.pid)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    with asker:
        assert asker.stdout.readline() == "held\n"
        asker.kill()
    assert [python(ASKS), python(ASKS, *PID_NAMESPACE)] == ["1 busy", "1 busy"]
    process.kill()
    process.wait()
    assert python(ASKS, *PID_NAMESPACE) == "1 busy"   # nothing tells that it has ended
    assert python(ASKS) == "0 given"


@needs_times
def test_a_ttl_runs_out_at_the_same_moment_in_every_time_namespace():
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24000)]):
        held = ResourceManager(app="a").reserve(20000, timeout=0, ttl=600)
        assert python(ASKS, *AHEAD) == "1 busy"
        assert held.renew(600) and python(ASKS, *AHEAD) == "1 busy"
        held.release()


@needs_times
def test_a_shift_by_a_part_of_a_tick_ends_no_process(spawn):
    pids = os.getpid(), os.getppid(), *(spawn("input()").pid for _ in range(4))
    processes = [(pid, read_start(pid)) for pid in pids]
    found = run(sys.executable, "-c", SHIFTED, ENDED, json.dumps(processes))
    assert found == str([False]*len(processes))


def write_back(copy, path): path.write_bytes(copy.read_bytes())   # into the same file
def put_back(copy, path): os.rename(shutil.copy2(copy, path.with_name("new")), path)
def remove(copy, path): path.unlink()


@pytest.mark.skipif(not allows(["unshare", "--mount"]), reason="making a mount namespace needs root")
@pytest.mark.parametrize("restore", [write_back, put_back, remove])
@pytest.mark.parametrize("holder", ["host", "container"])
def test_an_old_copy_hides_no_reservation_where_a_container_has_the_folder_at_another_path(tmp_path, restore, holder):
    "As with `docker -v ~/.local/state/…:/reservations`, and a backup of the files that is restored"
    state, inside, copy = tmp_path/"state", tmp_path/"elsewhere"/"reservations", tmp_path/"copy"
    assert python(ASKS) == "0 given"
    shutil.copy2(state/"resources.lock", copy)
    inside.mkdir(parents=True)
    enter = ["unshare", "--mount", "--propagation", "private", "sh", "-c",
             f'mount --bind "{state}" "{inside}" && CJM_RESOURCES_DIR="{inside}" exec "$@"', "sh"]
    holds, asks = ([], enter) if holder == "host" else (enter, [])
    with subprocess.Popen([*holds, sys.executable, "-c", KILLED, str(os.getpid())], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout.readline() == "held\n"
        assert python(ASKS, *asks) == "1 busy"
        restore(copy, state/"resources.lock")
        asked = subprocess.run([*asks, sys.executable, "-c", ASKS], capture_output=True, text=True, timeout=60)
        assert "given" not in asked.stdout
        assert "busy" in asked.stdout or "while other programs use it" in asked.stderr, asked.stderr
        held.kill()


WAITS = """
from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.core import reservations
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
reservations.POLL_WITHIN = 2.0
with SimulatedDriver([SimulatedGpu(memory_total_mb=24000)]):
    manager = ResourceManager(app="w")
    with manager.reserve(24000): print("given", flush=True)
"""


@needs_pids
def test_a_waiter_that_is_stopped_in_another_pid_namespace_is_passed_over_until_it_goes_on(spawn):
    waits = subprocess.Popen([*PID_NAMESPACE, sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True)
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24000)]), waits:
        manager = ResourceManager(app="a")
        with manager.reserve(5000, timeout=0):
            wait_until(lambda: len(manager.get_claims()) == 2)
            waiter = psutil.Process(waits.pid).children()[0]
            waiter.suspend()
            with manager.reserve(1000, timeout=20): pass   # of the 19,000 that are free
            line = next(c for c in manager.get_claims() if c.device is None)
            assert line.is_suspended
            waiter.resume()
            wait_until(lambda: not any(c.is_suspended for c in manager.get_claims()))
        assert waits.stdout.readline() == "given\n"
