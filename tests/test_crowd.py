"Many processes that ask for the same memory while they are killed, stopped and interrupted"
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cjm_fasthtml_resources.core.conflict import ResourceBusy
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

CROWD = Path(__file__).with_name("crowd.py")


HARM = [5, "--stops", 2, "--interrupts", 5, "--priorities", 3]


@pytest.mark.parametrize("harm", [[0], HARM], ids=["unharmed", "harmed"])
def test_a_crowd_never_holds_more_than_there_is_and_nobody_waits_for_ever(tmp_path, harm):
    crowd = [sys.executable, CROWD, tmp_path, 200, 20, *harm]
    out = subprocess.run(map(str, crowd), capture_output=True, text=True, timeout=200)
    found = json.loads(out.stdout)
    print(found, out.stderr)
    # no MemoryError, no timeout, no error
    assert (found["failed"], found["stuck"], found["left_over"]) == (0, 0, 0), out.stderr
    assert max(found["most_promised_mb"]) <= found["total_mb"]
    assert found["large_grants"] and found["grants_of_all"] and found["grants"] > (100 if harm[1:] else 200)
    assert all(bool(found[what]) == bool(harm[1:]) for what in ("killed", "stopped", "interrupted"))


WAITER = """import sys
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
    with ResourceManager(app="waiters").reserve(20_000, timeout=60):
        print("held", flush=True)
        sys.stdin.readline()
print("released", flush=True)"""


def says(process: subprocess.Popen, seconds: float) -> str:
    "What a process says within so many seconds"
    if not select.select([process.stdout], [], [], seconds)[0]: return f"nothing within {seconds:g} s"
    return process.stdout.readline().strip()


def queue_up(manager: ResourceManager, spawn) -> subprocess.Popen:
    "One more process that waits, behind those that do already"
    before, waiter = len(manager.get_claims()), spawn(WAITER)
    until = time.monotonic() + 30
    while len(manager.get_claims()) == before and time.monotonic() < until: time.sleep(0.02)
    assert len(manager.get_claims()) == before + 1, "it does not wait"
    return waiter


def hand_on(waiter: subprocess.Popen) -> None:
    "Let one that holds the memory release it"
    waiter.stdin.write("\n")
    waiter.stdin.flush()
    assert says(waiter, 10) == "released"


def test_a_waiter_that_is_stopped_is_passed_over_and_then_served_next(folder, spawn):
    manager = ResourceManager(app="waiters")
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
        held = manager.reserve(20_000)
        first, second, third = (queue_up(manager, spawn) for _ in range(3))
        os.kill(first.pid, signal.SIGSTOP)
        time.sleep(0.1)
        assert held.release()
        assert says(second, 1.0) == "held"
        assert (says(first, 0.2), says(third, 0.2)) == ("nothing within 0.2 s",)*2
        os.kill(first.pid, signal.SIGCONT)
        time.sleep(0.3)
        hand_on(second)
        assert says(first, 2.0) == "held" and says(third, 0.2) == "nothing within 0.2 s"
        hand_on(first)
        assert says(third, 2.0) == "held"
        hand_on(third)
        assert manager.get_claims() == []


def test_what_a_stopped_process_holds_stays_promised(folder, spawn):
    manager = ResourceManager(app="waiters")
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
        holder = spawn(WAITER)
        assert says(holder, 30) == "held"
        os.kill(holder.pid, signal.SIGSTOP)
        with pytest.raises(ResourceBusy): manager.reserve(20_000, timeout=0.5)
        os.kill(holder.pid, signal.SIGCONT)
        hand_on(holder)
        assert manager.reserve(20_000, timeout=1).release()
