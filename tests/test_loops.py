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


HANGING = """
import asyncio, random, time
import httpx
from fasthtml.core import FastHTML
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import newest_samples
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
from cjm_fasthtml_resources.ui.web import EventStream, ResourceCard, resource_routes

app, manager = FastHTML(default_hdrs=False, secret_key="of a test"), ResourceManager(gpu_timeout=60)
routes = resource_routes(app, manager, interval=0.2, metrics="/metrics", controls=True, guard=lambda req: None)

@app.get("/mine")
async def mine(): return ResourceCard(manager)

async def tick(gaps):
    while True:
        began = time.monotonic()
        await asyncio.sleep(0.01)
        gaps.append(time.monotonic() - began)

async def stream(seconds):
    "A browser that is there for so long"
    async def leave():
        await asyncio.sleep(seconds)
        return dict(type="http.disconnect")
    async def send(message): pass
    await EventStream(routes.hub.events())({}, leave, send)

async def main():
    browser = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
    gaps, chance, stop = [], random.Random(1), dict(data=dict(worker="4200101.1.5"))
    stop["headers"] = {"Sec-Fetch-Site": "same-origin"}
    first = await browser.get("/resources")                  # what is loaded at the first use
    assert first.status_code == 200 and (await browser.get("/metrics")).status_code == 200, first.text
    driver.hang("nvmlDeviceGetTemperature")
    ticking = asyncio.ensure_future(tick(gaps))
    paths = ["/resources", "/resources/fragment", "/metrics", "/mine"]
    await asyncio.sleep(1)                                  # what was read is stale by now
    waiting = [asyncio.ensure_future(browser.get(path)) for path in paths*15]
    streams = [asyncio.ensure_future(stream(chance.uniform(0, 2.5))) for _ in range(40)]
    samples = asyncio.ensure_future(anext(newest_samples(routes.monitor)))
    await asyncio.sleep(0.3)
    for task in [*waiting[:20], *streams[:10]]: task.cancel()   # they leave while they wait
    began = time.monotonic()
    await asyncio.to_thread(time.sleep, 0)                  # the pool that the app shares has threads left
    free = time.monotonic() - began
    assert (await browser.post("/resources/stop", **stop)).status_code == 409   # and other pages go on
    await asyncio.wait(streams)
    other = time.monotonic() - began
    samples.cancel()
    await asyncio.sleep(max(3 - other, 0))
    driver.recover()
    answers = await asyncio.gather(*waiting[20:])
    assert {a.status_code for a in answers} == {200}
    await browser.aclose()
    ticking.cancel()
    assert not routes.hub._clients
    print(max(gaps) < 1, free < 1, len(gaps) > 20, max(gaps) if max(gaps) >= 1 else "")

with SimulatedDriver([SimulatedGpu()]) as driver: asyncio.run(main())
"""


def test_a_driver_that_hangs_holds_neither_the_loop_nor_the_pool_that_an_app_shares():
    "For three seconds, with pages, streams, scrapes and components that wait, and browsers that leave meanwhile"
    pytest.importorskip("fasthtml", reason="the extra web is not installed")
    pytest.importorskip("prometheus_client", reason="the extra prometheus is not installed")
    assert run(HANGING) == ["True", "True", "True"]
