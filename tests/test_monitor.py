"The monitor's figures, its beat, and when a sample is old"
import asyncio, time
from dataclasses import replace

import pytest
from conftest import GONE

from cjm_fasthtml_resources.core import store
from cjm_fasthtml_resources.core.classify import DeviceStatus, ResourceStatus
from cjm_fasthtml_resources.core.gpu import GpuDevice, GpuSnapshot
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import DevicePoint, History, Point, ResourceMonitor, Subscription, take_sample, to_point
from cjm_fasthtml_resources.core.reservations import Promise
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu


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
    assert (ResourceMonitor(manager)._interval, ResourceMonitor(manager)._keep, ResourceMonitor(manager).paused) == (1.0, 600.0, False)


def test_a_driver_that_is_slow_makes_the_last_sample_stale_before_it_fails():
    with SimulatedDriver([SimulatedGpu()]) as driver:
        monitor, told = ResourceMonitor(ResourceManager(gpu_timeout=5), interval=0.1), []
        first = monitor.take()
        monitor._tell = told.append
        driver.delay("nvmlDeviceGetTemperature", 0.6)
        monitor._latest = replace(first, taken=time.monotonic() - 1)
        assert monitor._read(5.0).devices and [s.stale for s in told] == ["the NVIDIA driver did not answer within 0.3 s"]
        monitor._latest = replace(first, taken=time.monotonic() + 60)   # somebody else has just taken one
        told.clear()
        assert monitor._read(5.0).devices and not told
        assert monitor._read(0.3).late and not told   # no longer than the manager waits


def test_a_row_of_the_history_has_every_figure():
    point = DevicePoint(ResourceStatus.APP_BUSY, 10, 9, 5, 3, 1, 2, 50, 60, 70.5)
    assert History((Point(3, 1000.0, {"GPU-a": point}, 100, 40, 30),)).rows() == [dict(
        time=1000.0, device="GPU-a", status="app_busy", total=10, used=9, app=5, external=3, unattributed=1, promised=2,
        utilization=50, temperature=60, power_usage=70.5, memory_total=100, memory_app=40, memory_external=30)]


def test_what_is_kept_of_a_sample_is_what_it_says():
    gpu = GpuDevice(1, "GPU-a", memory_total=10, memory_used=9, memory_free=1, utilization=50, temperature=60, power_usage=70.5)
    status = DeviceStatus(gpu, ResourceStatus.EXTERNAL_BUSY, (), 5, 3, 1, (Promise(7, "app", 4, 2),))
    with SimulatedDriver([]): sample = take_sample(ResourceManager())
    sample = replace(sample, gpu=replace(sample.gpu, devices=(status,), snapshot=replace(sample.gpu.snapshot, time=1000.0)), number=3)
    ram = sample.memory.memory
    assert to_point(sample) == Point(3, 1000.0, {"GPU-a": DevicePoint(ResourceStatus.EXTERNAL_BUSY, 10, 9, 5, 3, 1, 2, 50, 60, 70.5)}, ram.memory.total, ram.app_memory, ram.external_memory)


def test_history_goes_back_as_far_as_was_said_and_numbers_go_on():
    with SimulatedDriver([]): sample = take_sample(ResourceManager())
    monitor = ResourceMonitor(ResourceManager(), history=10)
    for at in (100.0, 101.0, 110.0, 111.0): monitor._keep_sample(monitor._number(replace(sample, gpu=replace(sample.gpu, snapshot=replace(sample.gpu.snapshot, time=at)))))
    assert [(p.number, p.time) for p in monitor.history.points] == [(2, 101.0), (3, 110.0), (4, 111.0)]   # exactly ten seconds is not too long


def test_a_sample_is_old_after_three_intervals():
    with SimulatedDriver([]):
        monitor = ResourceMonitor(ResourceManager(), interval=10)
        first = monitor.take()
        def aged(seconds):
            monitor._latest = replace(first, taken=time.monotonic() - seconds)
            return monitor.latest.stale
        assert [aged(29), aged(30.6)] == [None, "nothing newer for 31 s"]
        assert monitor.current().number == 2 and monitor.current() is monitor.latest   # one was taken, and it is of this moment
        aged(31)
        monitor.pause()
        assert (monitor.latest.stale, monitor.current().number, repr(monitor)) == ("paused", 1, "ResourceMonitor(interval=10, 0 subscribers, paused)")   # a pause is kept
        monitor.resume()
        assert repr(monitor) == "ResourceMonitor(interval=10, 0 subscribers)" and monitor.current().number == 2


def test_a_late_sampler_keeps_its_beat(monkeypatch):
    "A look that was late comes at once, and the next on the beat; who subscribes right after a look waits for the next"
    with SimulatedDriver([]):
        monitor, looks = ResourceMonitor(ResourceManager(), interval=0.5), []
        real = monitor._look

        def slow(read):
            looks.append(time.monotonic())
            if len(looks) == 2: time.sleep(0.75)   # until half an interval after the next beat
            return real(read)

        monkeypatch.setattr(monitor, "_look", slow)
        with monitor.subscribe(lambda sample: None):
            while len(looks) < 4: time.sleep(0.01)
        beats = [round((at - looks[0])/0.5, 1) for at in looks]
        assert all(abs(beat - due) < 0.4 for beat, due in zip(beats, (0, 1, 2.5, 3))), beats
        monitor.take()
        looks.clear()
        began = time.monotonic()
        with monitor.subscribe(lambda sample: None):
            while not looks: time.sleep(0.01)
        assert looks[0] - began > 0.25


def test_what_a_monitor_cannot_watch_is_named(caplog):
    with pytest.raises(TypeError, match="^manager must be a ResourceManager, or a cluster's, not int$"): ResourceMonitor(7)
    with SimulatedDriver([]):
        monitor, seen = ResourceMonitor(ResourceManager(), interval=0.1), []
        monitor.take()
        monitor._look = lambda read: 1/0
        with monitor.subscribe(seen.append):
            while len(seen) < 3: time.sleep(0.01)
        assert {s.stale for s in seen} == {"the last look failed: division by zero"}
        assert [r.getMessage() for r in caplog.records] == ["the resource monitor could not look; the same again is not logged"]
        caplog.clear()
        calls = []
        def bad(sample):
            calls.append(sample)
            raise RuntimeError("mine")
        subscription = Subscription(bad, lambda s: None)
        for _ in range(2): subscription.tell(seen[0])
        assert [r.getMessage() for r in caplog.records] == ["a subscriber of the resource monitor raised; further errors of it are not logged"] and calls == [seen[0]]*2


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
            with pytest.raises(asyncio.TimeoutError): await asyncio.wait_for(anext(samples), 2)   # it was said, and is not said again
            monitor.close()
    asyncio.run(main())
