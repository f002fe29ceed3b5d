"The walks in their short form: a part of all lines and system calls, the same each time; README.md has the long one"
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SEED = os.environ.get("WALK_SEED", "0")


def walk(name: str, *options: str) -> None:
    program = [sys.executable, Path(__file__).with_name(name), "--seed", SEED, *options]
    out = subprocess.run(program, capture_output=True, text=True, timeout=900)
    assert out.returncode == 0, out.stdout + out.stderr
    assert int(out.stdout.splitlines()[-1].split()[0]) >= 60, out.stdout


def test_an_interruption_at_any_line_leaves_nothing_behind():
    walk("walk_interruptions.py", "--sample", "20")


@pytest.mark.parametrize("error", ["SystemExit", "GeneratorExit"])
def test_nor_does_another_that_ends_a_program_or_a_generator(error):
    walk("walk_interruptions.py", "--sample", "15", "--error", error, "with_block", "handed_over", "wait_for_gpu")


SIGNALLED = """if True:
    import signal, sys, threading, time
    from cjm_fasthtml_resources.core.locking import holding

    def interrupt(*_): raise KeyboardInterrupt
    def is_free():
        found = []
        def tries():
            found.append(lock.acquire(blocking=False))
            if found[0]: lock.release()
        thread = threading.Thread(target=tries)
        thread.start()
        thread.join()
        return found[0]

    signal.signal(signal.SIGALRM, interrupt)
    lock, number, left, end = getattr(threading, sys.argv[1])(), 0, 0, time.monotonic() + 3
    while time.monotonic() < end:
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-4 + 1e-6*(number%50))
            while True:
                with holding(lock): pass
        except KeyboardInterrupt: number += 1
        left += not is_free()
        if left: break
    print(number, left)
"""


@pytest.mark.parametrize("kind", ["Lock", "RLock"])
def test_a_signal_between_two_instructions_leaves_a_lock_free(kind):
    "The walk raises before a line; a signal can come within one, as between taking a lock and noting that"
    program = [sys.executable, "-c", SIGNALLED, kind]
    out = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True)
    number, left = map(int, out.stdout.split())
    assert number > 100 and left == 0


PRESSES = """
import os, random, signal, sys, time
for line in sys.stdin:
    time.sleep(random.uniform(0, 4e-3))
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(float(sys.argv[1]))
    os.kill(os.getppid(), signal.SIGINT)
    print(flush=True)
"""
BURSTS = """
import os, random, select, subprocess, sys
from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

presses = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
go, done, interrupted, left = presses.stdin.fileno(), presses.stdout.fileno(), 0, 0

def work():
    with manager.reserve(100, timeout=0): pass
    manager.update_worker_state(os.getpid(), status=random.choice(["idle", "running"]))

with SimulatedDriver([SimulatedGpu(memory_total_mb=24000)]):
    manager = ResourceManager(app="a")
    manager.register_worker(os.getpid(), "llm")
    work()
    for _ in range(1500):
        try:
            try:
                os.write(go, b"\\n")
                while not select.select([done], [], [], 0)[0]: work()
            except KeyboardInterrupt:
                interrupted += 1
                select.select([done], [], [])
        except KeyboardInterrupt: select.select([done], [], [])   # the second one
        os.read(done, 1)
        left += len(manager.get_claims())
        work()   # an error if the gate stays locked
presses.stdin.close()
presses.wait()
print(interrupted, left)
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="before 3.11, a signal can come between a call and `return`")
@pytest.mark.parametrize("gap", [3e-5, 1e-4, 3e-4])
def test_two_signals_in_a_row_leave_nothing_behind(gap, tmp_path):
    "As a terminal and a parent send them: the second one comes while the first one's cleanup runs"
    program = [sys.executable, "-c", BURSTS, PRESSES, str(gap)]
    environment = dict(os.environ, CJM_RESOURCES_DIR=str(tmp_path/"state"))
    ended = subprocess.run(program, capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode == 0, ended.stderr
    interrupted, left = map(int, ended.stdout.split())
    assert interrupted > 1000 and left == 0


@pytest.mark.skipif(not shutil.which("strace") and not os.environ.get("CI"),
                    reason="needs strace (Debian's package strace)")
def test_whatever_happens_at_any_system_call_the_next_program_works():
    walk("walk_syscalls.py", "--sample", "120")
