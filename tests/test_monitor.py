"The monitor's figures, its beat, and when a sample is old"
import ast
import asyncio
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import GONE

from cjm_fasthtml_resources.core import gpu, store
from cjm_fasthtml_resources.core.gpu import GpuDevice, GpuSnapshot
from cjm_fasthtml_resources.core.history import DevicePoint, History, Point, to_point
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor, Subscription, read_patiently
from cjm_fasthtml_resources.core.resources import DeviceStatus, Promise, ResourceStatus
from cjm_fasthtml_resources.core.samples import take_sample
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu


class Sampled:
    "What a monitor can watch in place of a manager, with what it does each time"
    def __init__(self, before):
        self.manager, self.before = ResourceManager(), before

    def take_sample(self):
        self.before()
        return take_sample(self.manager)


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def test_a_sample_says_what_is_simulated_and_lists_workers_where_they_can_be_read(monkeypatch):
    manager = ResourceManager()
    worker = manager.register_worker(GONE, "llm")
    with SimulatedDriver([]):
        sample = take_sample(manager)
        assert sample.simulated == "the NVIDIA driver" and sample.workers == (worker,) and sample.gpu.snapshot.simulated
        def broken(): raise store.StoreError("/a is damaged")
        monkeypatch.setattr(manager, "get_all_workers", broken)
        assert take_sample(manager).workers == ()
    assert take_sample(ResourceManager(), GpuSnapshot((), "nothing", "580.1")).simulated is None
    assert (ResourceMonitor(manager).interval, ResourceMonitor(manager).paused) == (1.0, False)


def test_a_driver_that_is_slow_makes_the_last_sample_stale_before_it_fails():
    late = "the NVIDIA driver did not respond within 0.3 s"
    with SimulatedDriver([SimulatedGpu()]) as driver:
        monitor, told = ResourceMonitor(ResourceManager(gpu_timeout=5), interval=0.1), []
        first = monitor.take()
        driver.delay("nvmlDeviceGetTemperature", 0.6)
        monitor.keep(replace(first, taken=time.monotonic() - 1))
        with monitor.subscribe(told.append): wait_until(lambda: len(told) >= 2)
        assert [s.stale for s in told[:2]] == [late, None] and told[1].gpu.devices
        wait_until(lambda: not monitor.running)
        told.clear()
        monitor.keep(replace(first, taken=time.monotonic() - 1))
        with monitor.subscribe(told.append):
            time.sleep(0.1)                                                  # the driver is being asked by now
            monitor.keep(replace(first, taken=time.monotonic() + 60))        # and somebody else has just taken one
            wait_until(lambda: told)
        assert told[0].stale is None
        wait_until(lambda: not monitor.running)
        reasons = []
        assert read_patiently(5.0, 0.3, reasons.append).devices and reasons == [late]
        assert read_patiently(0.3, 0.3, reasons.append).late and reasons == [late]   # no longer than the manager waits


def test_a_row_of_the_history_has_every_figure():
    point = DevicePoint(ResourceStatus.APP_BUSY, 10, 9, 5, 3, 1, 2, 50, 60, 70.5)
    assert History((Point(3, 1000.0, {"GPU-a": point}, 100, 40, 30),)).rows() == [dict(
        time=1000.0, device="GPU-a", status="app_busy", total=10, used=9, app=5, external=3, unattributed=1, promised=2,
        utilization=50, temperature=60, power_usage=70.5, memory_total=100, memory_app=40, memory_external=30)]


def test_what_is_kept_of_a_sample_is_what_it_says():
    gpu = GpuDevice(1, "GPU-a", memory_total=10, memory_used=9, memory_free=1,
                    utilization=50, temperature=60, power_usage=70.5)
    status = DeviceStatus(gpu, ResourceStatus.EXTERNAL_BUSY, (), 5, 3, 1, (Promise(7, "app", 4, 2),))
    with SimulatedDriver([]): sample = take_sample(ResourceManager())
    snapshot = replace(sample.gpu.snapshot, time=1000.0)
    sample = replace(sample, gpu=replace(sample.gpu, devices=(status,), snapshot=snapshot), number=3, taken=7.5)
    ram = sample.memory.memory
    device = DevicePoint(ResourceStatus.EXTERNAL_BUSY, 10, 9, 5, 3, 1, 2, 50, 60, 70.5)
    of_ram = (ram.memory.total, ram.app_memory, ram.external_memory)
    assert to_point(sample) == Point(3, 1000.0, {"GPU-a": device}, *of_ram, 7.5)


def test_history_goes_back_as_far_as_was_said_and_numbers_go_on():
    with SimulatedDriver([]): sample = take_sample(ResourceManager())
    monitor = ResourceMonitor(ResourceManager(), history=10)
    for at in (100.0, 101.0, 110.0, 111.0): monitor.keep(replace(sample, taken=at))
    kept = [(p.number, p.taken) for p in monitor.history.points]
    assert kept == [(2, 101.0), (3, 110.0), (4, 111.0)]   # exactly ten seconds is not too long


def test_history_goes_back_ten_minutes_if_nothing_else_is_said():
    with SimulatedDriver([]): sample = take_sample(ResourceManager())
    monitor = ResourceMonitor(ResourceManager())
    for at in (100.0, 700.0, 700.5):
        monitor.keep(replace(sample, taken=at))
        if at == 700.0: assert [p.taken for p in monitor.history.points] == [100.0, 700.0]
    assert [p.taken for p in monitor.history.points] == [700.0, 700.5]


def test_a_sample_is_old_after_three_intervals():
    with SimulatedDriver([]):
        monitor = ResourceMonitor(ResourceManager(), interval=10)
        first = monitor.take()

        def aged(seconds):
            monitor.keep(replace(first, taken=time.monotonic() - seconds))
            return monitor.latest.stale

        assert [aged(29), aged(30.6)] == [None, "no new data for 31 s"]
        old = monitor.latest.number
        assert monitor.current().number == old + 1      # one was taken
        assert monitor.current() is monitor.latest      # and it is of this moment
        aged(31)
        old = monitor.latest.number
        monitor.pause()
        assert (monitor.latest.stale, monitor.current().number) == ("paused", old)   # a pause is kept
        assert repr(monitor) == "ResourceMonitor(interval=10, 0 subscribers, paused)"
        monitor.resume()
        assert repr(monitor) == "ResourceMonitor(interval=10, 0 subscribers)" and monitor.current().number == old + 1


def test_a_late_sampler_keeps_its_beat():
    "A sample that was late comes at once, and the next on the beat; who subscribes right after one waits for the next"
    looks = []

    def slow():
        looks.append(time.monotonic())
        if len(looks) == 2: time.sleep(0.75)   # until half an interval after the next beat

    with SimulatedDriver([]):
        monitor = ResourceMonitor(Sampled(slow), interval=0.5)
        with monitor.subscribe(lambda sample: None): wait_until(lambda: len(looks) >= 4)
        beats = [round((at - looks[0])/0.5, 1) for at in looks]
        assert all(abs(beat - due) < 0.4 for beat, due in zip(beats, (0, 1, 2.5, 3), strict=False)), beats
        monitor.take()
        looks.clear()
        began = time.monotonic()
        with monitor.subscribe(lambda sample: None): wait_until(lambda: looks)
        assert looks[0] - began > 0.25


def by_monitor(caplog) -> list[str]:
    "What a monitor has logged: threads of earlier tests log, too"
    return [r.getMessage() for r in caplog.records if r.name.endswith("core.monitor")]


def test_what_a_monitor_cannot_watch_is_named(caplog):
    wrong = "^manager must be a ResourceManager, or a cluster's, not int$"
    with pytest.raises(TypeError, match=wrong): ResourceMonitor(7)
    fails = []

    def sometimes():
        if fails: raise ZeroDivisionError("division by zero")

    with SimulatedDriver([]):
        monitor, seen = ResourceMonitor(Sampled(sometimes), interval=0.1), []
        monitor.take()
        fails.append(True)
        with monitor.subscribe(seen.append): wait_until(lambda: len(seen) >= 3)
        assert {s.stale for s in seen} == {"the last sample failed: division by zero"}
        logged = by_monitor(caplog)
        assert logged == ["the resource monitor could not take a sample; repetitions are left out of the log"]
        caplog.clear()
        calls = []

        def bad(sample):
            calls.append(sample)
            raise RuntimeError("mine")

        subscription = Subscription(bad, lambda s: None)
        for _ in range(2): subscription.tell(seen[0])
        logged = by_monitor(caplog)
        assert logged == ["a subscriber of the resource monitor raised; further errors of it are not logged"]
        assert calls == [seen[0]]*2


def test_an_asynchronous_reader_gets_each_sample_once_and_hears_when_nothing_comes():
    async def main():
        with SimulatedDriver([]):
            monitor, got = ResourceMonitor(ResourceManager(), interval=0.3), []
            samples = aiter(monitor)
            for _ in range(3): got.append(await asyncio.wait_for(anext(samples), 5))
            assert len({s.number for s in got}) == 3 and not any(s.stale for s in got)
            monitor.pause()
            paused = await asyncio.wait_for(anext(samples), 5)
            while not paused.stale: paused = await asyncio.wait_for(anext(samples), 5)
            assert paused.stale == "paused"
            with pytest.raises(asyncio.TimeoutError):   # it was said, and is not said again
                await asyncio.wait_for(anext(samples), 2)
            monitor.close()
    asyncio.run(main())


class Wild:
    "A wall clock that is set back or ahead by a day at every look"
    def __init__(self): self.looks = 0
    def __call__(self):
        self.looks += 1
        return 1.8e9 + (-1)**self.looks*86_400*self.looks


def test_a_clock_that_is_set_back_and_ahead_changes_no_age_wait_or_history(monkeypatch):
    from cjm_fasthtml_resources.core.conflict import ResourceBusy
    monkeypatch.setattr(time, "time", wild := Wild())
    with SimulatedDriver([SimulatedGpu()]):
        monitor = ResourceMonitor(ResourceManager(), interval=0.1, history=0.5)
        seen = []
        with monitor.subscribe(seen.append): wait_until(lambda: len(seen) >= 12)
        fresh = [s for s in seen if not s.stale]    # on a busy machine one may be late
        assert len(fresh) >= 8 and [s.number for s in fresh] == list(range(1, len(fresh) + 1))
        assert all(-60 < s.age < 60 for s in seen)
        points = monitor.history.points
        assert 1 <= len(points) <= 8 and max(abs(p.time - 1.8e9) for p in points) >= 86_400
        assert 0 <= points[-1].taken - points[0].taken <= 0.5
        assert [p.taken for p in points] == sorted(p.taken for p in points)
        wait_until(lambda: (monitor.latest.stale or "").startswith("no new data for"))   # after three intervals

        manager, began = ResourceManager(), time.monotonic()
        with manager.reserve(20_000), pytest.raises(ResourceBusy): manager.reserve(20_000, timeout=0.3)
        assert 0.25 < time.monotonic() - began < 20
        held = manager.reserve(20_000, ttl=0.3)
        assert manager.get_claims()
        manager.reserve(20_000, timeout=20).release()      # as soon as the other has run out, and not before
        assert time.monotonic() - began > 0.5 and not held.release()
    assert wild.looks > 10


def test_a_subscriber_that_raises_what_ends_programs_does_not_end_the_sampler(caplog):
    seen = []

    def raises(error):
        def tell(sample): raise error
        return tell

    class Cancelled(Sampled):
        def take_sample(self):
            if len(seen) == 3: raise asyncio.CancelledError
            return super().take_sample()

    with SimulatedDriver([SimulatedGpu()]):
        monitor = ResourceMonitor(Cancelled(lambda: None), interval=0.1)
        bad = [monitor.subscribe(raises(e)) for e in (SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(),
                                                      GeneratorExit())]
        with monitor.subscribe(seen.append): wait_until(lambda: len(seen) >= 6)
        assert [s.stale for s in seen].count("the last sample failed: CancelledError") == 1 and not seen[-1].stale
        for subscription in bad: subscription.close()
        wait_until(lambda: not monitor.running)
    logged = [r.getMessage() for r in caplog.records]
    assert logged.count("a subscriber of the resource monitor raised; further errors of it are not logged") == 4
    assert logged.count("the resource monitor could not take a sample; repetitions are left out of the log") == 1


def test_ctrl_c_in_a_subscriber_that_the_main_thread_tells_is_ctrl_c():
    def interrupted(sample): raise KeyboardInterrupt
    with SimulatedDriver([SimulatedGpu()]):
        monitor = ResourceMonitor(ResourceManager())
        monitor.take()
        subscription = Subscription(interrupted, lambda s: None)
        monitor._subscriptions = (subscription,)
        with pytest.raises(KeyboardInterrupt): monitor.pause()


NO_THREAD = """
import threading
from cjm_fasthtml_resources.core.gpu import read_gpus
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
driver, manager, seen = SimulatedDriver([SimulatedGpu()]).start(), ResourceManager(), []
monitor, usual = ResourceMonitor(manager, interval=0.1), threading.stack_size()
threading.stack_size(2**46)     # no thread has such a stack: the system refuses it
words = "starting a thread failed (can't start new thread); end some, or raise the limit"
assert read_gpus().reason.startswith("cannot ask the NVIDIA driver: " + words), read_gpus().reason
assert words in manager.check_gpu_availability().message
assert words in monitor.take().gpu.message
try: monitor.subscribe(seen.append)
except RuntimeError as error: assert str(error).startswith(words), error
else: raise AssertionError("it cannot sample")
threading.stack_size(usual)
assert read_gpus().devices and manager.check_gpu_availability().status.value == "available"
heard = threading.Event()
with monitor.subscribe(lambda sample: heard.set()): assert heard.wait(20)
"""


def test_where_no_thread_can_be_started_it_is_said_and_works_again_afterwards():
    "A real refusal, by the system"
    out = subprocess.run([sys.executable, "-c", NO_THREAD], capture_output=True, text=True, timeout=60)
    assert (out.returncode, out.stderr) == (0, "")


def calls(path: Path) -> set[str]:
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}


def test_the_time_of_day_is_read_for_people_and_for_days_alone():
    """A snapshot's, a point's or a row's without a snapshot, a page's; the day of a need; the end of what is shown
    or told of a history; boot's, without a clock for it
    """
    found = [path.name for path in Path(gpu.__file__).parents[1].rglob("*.py") if "time.time()" in calls(path)]
    assert sorted(found) == ["age.py", "gpu.py", "history.py", "history.py", "history.py", "job.py", "needs.py",
                             "needs.py", "out_of_memory.py", "process.py", "report.py", "roster.py", "rows.py",
                             "screen.py"]
