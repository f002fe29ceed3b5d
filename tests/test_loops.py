"Other event loops in the process: uvloop in place of asyncio's, and gevent, which makes greenlets of threads"
import subprocess
import sys

import pytest


def run(code: str) -> list[str]:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (out.returncode, out.stderr) == (0, ""), out.stderr
    return out.stdout.split()


def test_uvloop_runs_the_stream_and_the_waiting():
    pytest.importorskip("uvloop")
    pytest.importorskip("fasthtml", reason="the extra web is not installed")
    assert run("""
import asyncio, time, uvloop
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
from cjm_fasthtml_resources.ui.web import EventStream, Hub

async def main():
    manager = ResourceManager()
    hub, received, leave = Hub(ResourceMonitor(manager, interval=0.1)), [], asyncio.Event()
    async def receive():
        await leave.wait()
        return dict(type="http.disconnect")
    async def send(message): received.append(message.get("body", b""))
    stream = asyncio.create_task(EventStream(hub.events())({}, receive, send))
    async with manager.reserve_async(20_000) as held:
        waiting = asyncio.create_task(manager.wait_for_gpu_async(20_000, timeout=10))
        while len(received) < 4:
            driver.gpus[0].temperature += 1
            await asyncio.sleep(0.05)
        assert not waiting.done()
    assert (await waiting).devices
    leave.set()
    await stream
    assert not hub._clients and not manager.get_claims()
    print(type(asyncio.get_running_loop()).__module__, received[1].startswith(b"event: layout"))

with SimulatedDriver([SimulatedGpu()]) as driver: uvloop.run(main())
""") == ["uvloop", "True"]


def test_gevent_with_everything_patched():
    "All threads are greenlets, so a driver that hangs holds up the program there; else it is as everywhere"
    pytest.importorskip("gevent")
    assert run("""
from gevent import monkey; monkey.patch_all()
import threading, time, gevent
from cjm_fasthtml_resources.core.conflict import ResourceBusy
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
with SimulatedDriver([SimulatedGpu()]) as driver:
    manager, seen = ResourceManager(), []
    checks = {c.get().status.value for c in [gevent.spawn(manager.check_gpu_availability) for _ in range(20)]}
    with ResourceMonitor(manager, interval=0.1).subscribe(seen.append):
        held = manager.reserve(20_000)
        waiting = gevent.spawn(manager.reserve, 20_000, None, 10)
        gevent.sleep(0.5)
        assert not waiting.ready() and len(seen) > 2
        held.release()
        print(waiting.get().index, *checks)
    try: manager.reserve(20_000, timeout=0.1)
    except ResourceBusy as error: print(error.conflict.status.value)
""") == ["0", "available", "app_busy"]
