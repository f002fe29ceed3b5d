"Ctrl-C by real signals, at any instruction: what a `with` block holds is given back, and no lock stays taken"
import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cjm_fasthtml_resources
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

PACKAGE = Path(cjm_fasthtml_resources.__file__).parent

SIGNALS = """
import random, signal, sys, threading, time
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

def interrupt(*_): raise KeyboardInterrupt

def work():
    while True:
        with manager.reserve(20_000, timeout=0): pass
        if "job" in sys.argv:
            with manager.job("job-1", 2_000, timeout=0): pass

def try_again():
    "In another thread, which waits for a lock that is still taken"
    with manager.reserve(22_000, timeout=0): given.append(1)

signal.signal(signal.SIGALRM, interrupt)
with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
    manager = ResourceManager(app=None if "memory" in sys.argv else "chat", track_self=False)
    signals, end = 0, time.monotonic() + 5
    while time.monotonic() < end:
        try:
            # again, for a signal that comes within a finalizer, whose errors Python swallows
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 6e-3), 0.5)
            work()
        except KeyboardInterrupt as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signals, given = signals + 1, []
            thread = threading.Thread(target=try_again)   # while the traceback still exists
            thread.start()
            thread.join(20)
            assert given and not manager.get_claims(), f"signal {signals}"
    print(signals)
"""


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("what", ["reservation", "job"])
def test_a_signal_at_any_instruction_leaves_nothing_reserved_and_no_lock_taken(what, where, tmp_path):
    env = {**os.environ, "CJM_RESOURCES_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SIGNALS, what, where]
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) > 50


MAKE = {"pending": lambda manager: manager.reserve_async(20_000, timeout=0),
        "reservation": lambda manager: manager.reserve(20_000, timeout=0),
        "job": lambda manager: manager.job("job-1", 20_000, timeout=0)}


def interrupt_first(frame, event, arg):
    "As a signal whose handler raises, at the first instruction of the end that `async with` calls"
    is_end = frame.f_code.co_name in ("_run", "__aexit__") and frame.f_code.co_filename.startswith(str(PACKAGE))
    if event == "call" and is_end:
        sys.settrace(None)
        raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("what", MAKE)
def test_an_interruption_as_async_with_ends_leaves_nothing_reserved(what, where, tmp_path, monkeypatch):
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))

    async def hold(manager):
        async with MAKE[what](manager): sys.settrace(interrupt_first)

    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
        manager, loop = ResourceManager(app=None if where == "memory" else "chat"), asyncio.new_event_loop()
        with pytest.raises(KeyboardInterrupt): loop.run_until_complete(hold(manager))
        with manager.reserve(20_000, timeout=0): pass
        loop.close()


def delete_with_an_interruption(objects, number):
    "Delete an object, with Ctrl-C before so many lines of its end; return how many there are"
    lines = []
    def trace(frame, event, arg):
        if frame.f_code.co_name not in ("_run", "call_again") or "blocks" not in frame.f_code.co_filename: return None
        if event == "line": lines.append(frame.f_lineno)
        if len(lines) == number: raise KeyboardInterrupt
        return trace
    sys.settrace(trace)
    objects.clear()
    sys.settrace(None)
    return len(lines)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_while_a_reservation_is_deleted_leaves_its_rest_reserved(tmp_path, monkeypatch):
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    number = 1
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
        manager = ResourceManager(app="chat", track_self=False)
        while True:
            first = [manager.reserve(20_000, timeout=0)]
            rest = first[0].shrink(10_000)   # of the same lease
            lines = delete_with_an_interruption(first, number)
            for _ in range(2): assert len(manager.get_claims()) == 1, f"line {number}"
            rest.release()
            if lines < number: break
            number += 1
    assert number > 6   # two objects, with some lines each


def test_the_package_uses_these_blocks_alone():
    found = [f"{path.relative_to(PACKAGE)}" for path in sorted(PACKAGE.rglob("*.py"))
             if path.name != "blocks.py" and "contextmanager" in path.read_text().replace("asynccontextmanager", "")]
    assert found == []
