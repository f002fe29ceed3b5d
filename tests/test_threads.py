"""A signal while a thread starts: its error comes out, the call begins once or never, and one thread does the work"""
import itertools
import random
import signal
import threading
import time

import pytest

from cjm_fasthtml_resources.core.gpu import GpuReader
from cjm_fasthtml_resources.core.threads import NoThreadError, SharedCalls, in_thread, start_thread
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu


class Alarm(TimeoutError):
    "An error of the kind that can mean that no thread could start"


@pytest.fixture
def alarm():
    "Send a signal a moment after it is called; its handler raises `Alarm`"
    def ring(number, frame): raise Alarm
    before, moments = signal.signal(signal.SIGALRM, ring), random.Random(4)
    yield lambda: signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-5, 1e-3))
    while True:
        try: signal.setitimer(signal.ITIMER_REAL, 0)
        except Alarm: continue
        break
    signal.signal(signal.SIGALRM, before)


def interrupt(alarm, call, rounds=300):
    "Call again and again, each time with a signal; return how often its error came out"
    errors = 0
    for number in range(rounds):
        try:
            alarm()
            call(number)
            time.sleep(0.02)   # until the signal comes
        except Alarm: errors += 1
    return errors


def settled(counts, rounds=300):
    "Return how often the calls ran, as soon as none of them runs"
    for _ in range(500):
        time.sleep(0.01)
        if not any(thread.name.endswith("call") for thread in threading.enumerate()): break
    return [len(found) for found in counts[:rounds]]


def test_the_error_of_a_signal_comes_out_and_the_call_runs_at_most_once(alarm):
    called = [[] for _ in range(300)]
    assert interrupt(alarm, lambda n: start_thread("a-call", called[n].append, n)) == 300
    found = settled(called)
    assert max(found) == 1 and sum(found) > 100


def test_a_call_that_a_task_awaits_runs_at_most_once(alarm, monkeypatch):
    monkeypatch.setattr("asyncio.wrap_future", lambda future: future)   # an event loop can lose its own callbacks
    called = [[] for _ in range(300)]
    assert interrupt(alarm, lambda n: in_thread(lambda: called[n].append(threading.current_thread().name))) == 300
    found = settled(called)
    assert max(found) == 1 and sum(found) > 100
    assert {name for names in called for name in names} == {"call"}


def test_a_shared_call_is_left_to_the_others_or_forgotten(alarm):
    calls, answers = SharedCalls(), itertools.count()
    assert interrupt(alarm, lambda n: calls.start("page", lambda: next(answers))) == 300
    for _ in range(2): assert isinstance(calls.start("page", lambda: -1).result(timeout=5), int)
    assert not calls.is_running("page")


def test_one_thread_reads_the_driver(alarm):
    readers = [GpuReader() for _ in range(300)]
    with SimulatedDriver([SimulatedGpu()]):
        before = sum(thread.name == "nvml-reader" for thread in threading.enumerate())
        assert interrupt(alarm, lambda n: readers[n].read()) == 300
        for reader in readers[:50]: assert reader.read().devices
        started = [reader for reader in readers if reader._is_running()]
        running = sum(thread.name == "nvml-reader" for thread in threading.enumerate())
    assert running - before == len(started)


def test_a_failure_to_start_is_one(monkeypatch):
    def fail(*args): raise MemoryError
    monkeypatch.setattr("threading.Thread.start", fail)
    with pytest.raises(NoThreadError, match="MemoryError"): start_thread("a-call", print)
