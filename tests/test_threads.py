"""A signal while a thread starts: its error comes out, the call begins once or never, and one thread does the work"""
import itertools
import random
import signal
import threading
import time

import pytest

from cjm_fasthtml_resources.core.gpu import GpuReader
from cjm_fasthtml_resources.core.threads import CallThread, NoThreadError, SharedCalls, in_thread, start_thread
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

# a signal can come in a finalizer, whose errors Python swallows
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Alarm(TimeoutError):
    "An error of the kind that can mean that no thread could start"


@pytest.fixture
def alarm():
    "Send signals from a moment after it is called; the handler raises `Alarm` so many times"
    def ring(number, frame):
        if left: raise left.pop()
    def arm(times=1):
        left[:] = [Alarm]*times
        signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-5, 1e-3), moments.uniform(3e-5, 1e-4))
    before, moments, left = signal.signal(signal.SIGALRM, ring), random.Random(4), []
    yield arm
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
            try:
                alarm()
                call(number)
                time.sleep(0.02)   # until the signal comes
            except Alarm:
                errors += 1
                time.sleep(1e-3)   # until another one comes
        except Alarm: pass
    return errors


def settled(counts, rounds=300):
    "Return how often the calls ran, as soon as none of them runs"
    for _ in range(500):
        time.sleep(0.01)
        if not any(thread.name.endswith("call") for thread in threading.enumerate()): break
    return [len(found) for found in counts[:rounds]]


def test_the_error_of_a_signal_comes_out_and_the_call_runs_at_most_once(alarm):
    called = [[] for _ in range(300)]
    assert interrupt(alarm, lambda n: start_thread("a-call", called[n].append, n)) > 250
    found = settled(called)
    assert max(found) == 1 and sum(found) > 100


def test_a_call_that_a_task_awaits_runs_at_most_once(alarm, monkeypatch):
    monkeypatch.setattr("asyncio.wrap_future", lambda future: future)   # an event loop can lose its own callbacks
    called = [[] for _ in range(300)]
    assert interrupt(alarm, lambda n: in_thread(lambda: called[n].append(threading.current_thread().name))) > 250
    found = settled(called)
    assert max(found) == 1 and sum(found) > 100
    assert {name for names in called for name in names} == {"call"}


def test_a_shared_call_is_left_to_the_others_or_forgotten(alarm):
    calls, answers = SharedCalls(), itertools.count()
    assert interrupt(alarm, lambda n: calls.start("page", lambda: next(answers))) > 250
    for _ in range(2): assert isinstance(calls.start("page", lambda: -1).result(timeout=5), int)
    assert not calls.is_running("page")


@pytest.mark.parametrize("signals", [1, 2])
def test_an_object_that_starts_its_thread_again_has_only_one(alarm, signals):
    threads, end = [None]*300, threading.Event()

    def start(n):
        if threads[n] and threads[n].goes_on(): return
        threads[n] = CallThread("of-an-object", end.wait, 60)
        threads[n].begin()
    assert interrupt(lambda: alarm(signals), start) > 250
    for n in range(300): start(n)
    running = [thread for thread in threading.enumerate() if thread.name == "of-an-object"]
    end.set()
    assert len(running) == 300
    for thread in running: thread.join()


def test_one_thread_reads_the_driver(alarm):
    readers = [GpuReader() for _ in range(40)]
    with SimulatedDriver([SimulatedGpu()]):
        before = sum(thread.name == "nvml-reader" for thread in threading.enumerate())
        assert interrupt(lambda: alarm(2), lambda n: readers[n].read(), rounds=40) > 30
        for reader in readers: assert reader.read().devices
        assert sum(thread.name == "nvml-reader" for thread in threading.enumerate()) == before + 40


def test_a_failure_to_start_is_one(monkeypatch):
    def fail(*args): raise MemoryError
    monkeypatch.setattr("threading.Thread.start", fail)
    with pytest.raises(NoThreadError, match="MemoryError"): start_thread("a-call", print)


def test_a_signal_within_is_alive_makes_no_running_thread_look_gone(monkeypatch):
    "Up to Python 3.12, such a thread counts as ended from then on"
    end = threading.Event()
    thread = start_thread("a-call", end.wait, 60)
    monkeypatch.setattr(thread, "is_alive", lambda: False)
    assert thread.goes_on()
    end.set()
    thread.join()
    assert not thread.goes_on()
