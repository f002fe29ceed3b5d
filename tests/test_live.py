"The monitor, the panel and the stream: many who watch, some who are slow or break, and nothing left of them"
import asyncio
import contextlib
import gc
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from importlib import import_module

import pytest
from conftest import samplers, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.core.resources import ResourceStatus
from cjm_fasthtml_resources.core.settings import MONITOR_SCHEMA
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, load_scenario
from cjm_fasthtml_resources.ui.cards import render, render_tables

widgets = pytest.importorskip("ipywidgets")
pytest.importorskip("fasthtml", reason="the extra web is not installed")

from cjm_fasthtml_resources.ui import stream  # noqa: E402
from cjm_fasthtml_resources.ui.panel import ResourcePanel  # noqa: E402


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    wait_until(lambda: samplers() == 0)


# The monitor

odd = st.sampled_from([True, None, "1", float("nan"), float("inf")])


@given(st.sampled_from(["interval", "history"]), st.one_of(st.floats(-1, 1e5), odd))
@settings(deadline=None)
def test_the_monitor_takes_what_its_schema_allows_and_nothing_else(name, value):
    import jsonschema
    good = value == value and not list(jsonschema.Draft202012Validator(MONITOR_SCHEMA).iter_errors({name: value}))
    if good: assert ResourceMonitor(ResourceManager(), **{name: value}) is not None
    else:
        with pytest.raises((TypeError, ValueError), match=name): ResourceMonitor(ResourceManager(), **{name: value})


def test_the_defaults_of_the_monitor_are_those_of_its_schema():
    import inspect
    found = {name: p.default for name, p in inspect.signature(ResourceMonitor).parameters.items() if name != "manager"}
    assert found == {name: p["default"] for name, p in MONITOR_SCHEMA["properties"].items()}


def test_subscribers_come_and_go_on_many_threads_and_there_is_one_sampler():
    with SimulatedDriver([SimulatedGpu()]):
        monitor, most, errors = ResourceMonitor(ResourceManager(), interval=0.1), [], []

        def hear():
            heard = threading.Event()
            with monitor.subscribe(lambda sample: heard.set()):
                assert heard.wait(10)
                most.append(samplers())

        def watch():
            try:
                for _ in range(30): hear()
            except BaseException as error: errors.append(error)

        threads = [threading.Thread(target=watch) for _ in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert not errors and max(most) == 1


def test_a_sampler_whose_look_fails_tells_why_and_goes_on(monkeypatch, caplog):
    from cjm_fasthtml_resources.core import monitor as module
    take, broken, seen = module.take_sample, threading.Event(), []

    def sometimes(*args):
        if broken.is_set(): raise RuntimeError("a plugin broke")
        return take(*args)

    monkeypatch.setattr(module, "take_sample", sometimes)
    with SimulatedDriver([SimulatedGpu()]), caplog.at_level(logging.CRITICAL):
        monitor = ResourceMonitor(ResourceManager(), interval=0.1)
        with monitor.subscribe(seen.append):
            wait_until(lambda: seen)
            broken.set()
            wait_until(lambda: seen[-1].stale == "the last sample failed: a plugin broke")
            broken.clear()
            wait_until(lambda: not seen[-1].stale)


def test_history_is_kept_for_as_long_as_was_said():
    with SimulatedDriver([SimulatedGpu()]):
        monitor = ResourceMonitor(ResourceManager(), interval=0.1, history=0.5)
        with monitor.subscribe(lambda sample: None): wait_until(lambda: monitor.latest and monitor.latest.number > 12)
    points = monitor.history.points
    assert 2 <= len(points) <= 8 and points[-1].taken - points[0].taken <= 0.5


# The panel

def test_a_hundred_panels_leave_nothing():
    with load_scenario("eight-h100") as driver:
        manager = ResourceManager(track_self=False)
        for worker in driver.workers: manager.register_worker(**worker)
        before = len(widgets.widget._instances)
        for _ in range(100): ResourcePanel(manager, controls=True).close()
        gc.collect()
        assert len(widgets.widget._instances) == before
        wait_until(lambda: samplers() == 0)


def test_a_device_that_goes_and_comes_back_changes_the_layout_and_leaks_no_widget():
    with SimulatedDriver([SimulatedGpu(), SimulatedGpu()]) as driver:
        panel = ResourcePanel(ResourceManager(), interval=0.1)
        wait_until(lambda: panel.monitor.latest)
        whole = len(widgets.widget._instances)
        for _ in range(3):
            taken = driver.gpus.pop()
            wait_until(lambda: "gpu1.head" not in panel._slots)
            driver.gpus.append(taken)
            wait_until(lambda: "gpu1.head" in panel._slots)
        wait_until(lambda: len(widgets.widget._instances) == whole)
        panel.close()


def test_a_pause_is_not_lost_between_samples():
    "Clicks on one thread while the monitor samples on another: the last one counts"
    with SimulatedDriver([SimulatedGpu()]):
        panel = ResourcePanel(ResourceManager(), interval=0.1)
        for turn in range(60):
            panel._pause.value = turn % 2 == 0
            time.sleep(0.013)
            assert (panel._pause.value, panel.monitor.paused) == (turn % 2 == 0,)*2
        panel.close()


def test_clicks_from_many_threads_stop_a_worker_once(spawn):
    worker, stopped = spawn("input()"), []
    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager()
        manager.register_worker(worker.pid, "llm")
        stop = manager.stop_worker
        manager.stop_worker = lambda pid: (stopped.append(pid), stop(pid))
        panel = ResourcePanel(manager, interval=0.1, controls=True)
        wait_until(lambda: panel._stops.children)
        ask = panel._stops.children[0]
        for t in (asking := [threading.Thread(target=ask.click) for _ in range(8)]): t.start()
        for t in asking: t.join()
        yes = panel._asked.children[0]
        for t in (saying := [threading.Thread(target=yes.click) for _ in range(8)]): t.start()
        for t in saying: t.join()
        worker.wait(10)
        wait_until(lambda: "Stopped" in panel._said.value)
        assert stopped == [worker.pid]
        panel.close()


def test_a_sleeping_driver_is_shown_and_nothing_is_called_available():
    with SimulatedDriver([SimulatedGpu()]) as driver:
        panel = ResourcePanel(ResourceManager(gpu_timeout=1.0), interval=0.1)
        driver.hang("nvmlDeviceGetTemperature")
        wait_until(lambda: "out of date: the NVIDIA driver did not respond" in panel._slots["state"].value)
        wait_until(lambda: panel._sample.gpu.status is ResourceStatus.UNAVAILABLE)
        wait_until(lambda: "did not respond within 1 s" in panel._slots["banner"].value)
        driver.recover()
        wait_until(lambda: "gpu0.live" in panel._slots and not panel._slots["state"].value.count("out of date"))
        panel.close()


# The stream

def beat_of(event: bytes) -> list[int]:
    "What the last beat in an event says: the limit, when it was sent and when the figures were read, in ms"
    return list(map(int, event.rpartition(b"event: beat\n")[2].decode().replace("data: ", "").split()))


async def gone(): await asyncio.Event().wait()


def limit_of(event: bytes) -> int:
    "The ms in a beat after which a page takes its figures for old"
    return int(event.rpartition(b"event: beat\ndata: ")[2].split()[0])


def test_a_slow_client_gets_the_whole_picture_in_place_of_a_backlog():
    async def main():
        client = stream.Client()
        for i in range(50): client.put(f"{i}".encode(), b"whole")
        got = [client.events.get_nowait() for _ in range(client.events.qsize())]
        assert len(got) <= 8 and b"whole" in got and got[-1] in (b"49", b"whole")
    asyncio.run(main())


def test_a_client_that_takes_nothing_is_let_go(monkeypatch):
    monkeypatch.setattr(stream, "PATIENCE", 0.3)

    async def main():
        hub, sent = stream.Hub(ResourceMonitor(ResourceManager(), interval=0.1)), []

        async def send(message):
            sent.append(message)
            if message["type"] == "http.response.body": await asyncio.Event().wait()

        await asyncio.wait_for(stream.EventStream(hub.events())({}, gone, send), 10)
        assert [m["type"] for m in sent] == ["http.response.start", "http.response.body"] and not hub._clients
        assert len(asyncio.all_tasks()) == 1

    with SimulatedDriver([SimulatedGpu()]): asyncio.run(main())


def test_the_connection_of_a_client_that_takes_nothing_is_closed_and_the_log_is_quiet(monkeypatch, caplog):
    uvicorn = pytest.importorskip("uvicorn")
    monkeypatch.setattr(stream, "PATIENCE", 0.3)

    async def flood():
        while True: yield b"x"*100_000

    async def app(scope, receive, send): await stream.EventStream(flood())(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=[[listening]])
        thread.start()
        with socket.create_connection(listening.getsockname()) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            client.recv(9)
            assert server.server_state.connections
            wait_until(lambda: not server.server_state.connections)
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive() and "without completing" not in caplog.text


def test_a_hundred_clients_share_one_sampler_and_leave_nothing():
    async def main():
        hub = stream.Hub(ResourceMonitor(ResourceManager(), interval=0.1))
        received, leave = [0]*100, asyncio.Event()

        async def listen(n):
            async def receive():
                await leave.wait()
                return dict(type="http.disconnect")

            async def send(message): received[n] += message["type"] == "http.response.body"
            await stream.EventStream(hub.events())({}, receive, send)

        tasks = [asyncio.create_task(listen(n)) for n in range(100)]
        degrees = 0
        while min(received) < 5:
            driver.gpus[0].temperature = degrees = degrees + 1
            await asyncio.sleep(0.05)
            assert degrees < 400, received
        assert samplers() == 1
        leave.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert not hub._clients and len(asyncio.all_tasks()) == 1

    with SimulatedDriver([SimulatedGpu()]) as driver: asyncio.run(main())


def test_a_machine_on_which_nothing_changes_gives_signs_of_life(monkeypatch):
    "Whatever the interval is, more often than a page waits for one"
    async def main(hub):
        async with contextlib.aclosing(hub.events()) as events:
            first = await anext(events)
            limit = beat_of(first)[0]/1000
            assert first.startswith(b"event: layout") and limit == round(3*stream.pace(hub.monitor.interval), 3)
            return [await asyncio.wait_for(anext(events), limit) for _ in range(3)]

    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager(track_self=False)
        manager.register_worker(4_200_101, "llm")
        for interval in (0.2, 1): asyncio.run(main(stream.Hub(ResourceMonitor(manager, interval))))
        monkeypatch.setattr(stream, "BEAT", 0.3)
        slow = stream.Hub(ResourceMonitor(manager, 3600))    # its sampler sends nothing
        beats = [beat_of(event) for event in asyncio.run(main(slow))]
        assert [limit for limit, _, _ in beats] == [900]*3 and beats[0][1] < beats[-1][1]   # when it was sent
        assert beats[0][2] == beats[-1][2]                                                  # when the figures were read


def test_a_sample_without_a_change_is_a_sign_of_life():
    async def main():
        client = stream.Client()
        hub.join(client)
        await asyncio.sleep(0)
        for _ in range(2): hub.publish(sample)
        heard = [await client.next(1) for _ in range(3)]
        hub.leave(client)
        client.close()
        return heard[-1]

    with SimulatedDriver([SimulatedGpu()]):
        hub = stream.Hub(ResourceMonitor(ResourceManager(track_self=False), 3600))
        sample = hub.monitor.take()
        assert beat_of(asyncio.run(main()))[0] == 45_000


def test_a_sampler_that_is_held_up_makes_the_stream_say_so(monkeypatch):
    "Whatever it is that holds up the sampler's thread, the clients hear of it"
    async def main():
        async for event in hub.events():
            if b"NVIDIA L4" in event and not held.is_set(): held.set()
            if b"out of date: no new data for" in event: return

    held, release = threading.Event(), threading.Event()
    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager()
        hub = stream.Hub(ResourceMonitor(manager, interval=0.1))
        workers = manager.get_all_workers

        def slow():
            if held.is_set() and threading.current_thread().name == "resource-monitor": release.wait(10)
            return workers()

        manager.get_all_workers = slow
        try: asyncio.run(asyncio.wait_for(main(), 10))
        finally: release.set()


def test_a_client_with_a_longer_interval_hears_less_and_misses_nothing():
    async def main():
        counts, last = [], b""
        for every in (0, 0.5):
            events, end = [], time.monotonic() + 2.2
            async with contextlib.aclosing(hub.events(every)) as stream_of_one:
                async for event in stream_of_one:
                    driver.gpus[0].temperature += 1
                    events.append(event)
                    if time.monotonic() > end: break
            counts.append(len(events))
            last = events[-1]
        return counts, last

    with SimulatedDriver([SimulatedGpu(temperature=20)]) as driver:
        hub = stream.Hub(ResourceMonitor(ResourceManager(track_self=False), interval=0.1))
        (fast, slow), last = asyncio.run(main())
    assert fast > 12 and 3 <= slow <= 7
    assert b"event: layout" in last and limit_of(last) == 3000   # the whole picture, whatever was left out


def make_app(manager, **kw):
    from fasthtml.core import FastHTML

    from cjm_fasthtml_resources.ui.web import resource_routes
    app = FastHTML(secret_key="of a test", default_hdrs=False)
    routes = resource_routes(app, manager, **kw)

    @app.get("/own")
    def own(): return "the app's own"
    return app, routes


def test_only_so_many_streams_are_open_at_a_time_and_the_next_one_is_told_when_to_come():
    httpx = pytest.importorskip("httpx")

    async def open_stream(app, path):
        "The first message of a stream that then goes on, and the task"
        started, left = asyncio.get_running_loop().create_future(), asyncio.Event()

        async def receive():
            if not left.is_set() and not started.done(): return dict(type="http.request", body=b"")
            await left.wait()
            return dict(type="http.disconnect")

        async def send(message):
            if message["type"] == "http.response.start" and not started.done(): started.set_result(message)

        path, _, query = path.partition("?")
        scope = dict(type="http", method="GET", path=path, raw_path=path.encode(), query_string=query.encode(),
                     headers=[], http_version="1.1", scheme="http", server=("test", 80), client=("test", 1),
                     root_path="")
        task = asyncio.create_task(app(scope, receive, send))
        return (await asyncio.wait_for(started, 10))["status"], left, task

    async def main(app):
        opened = [await open_stream(app, path) for path in ("/resources/stream", "/resources/room?size=999GiB") * 2]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as browser:
            refused = await browser.get("/resources/stream")
            page = await browser.get("/resources")
        for _, left, _ in opened: left.set()
        await asyncio.wait_for(asyncio.gather(*(task for *_, task in opened)), 10)
        again = await open_stream(app, "/resources/stream")
        again[1].set()
        await again[2]
        return [status for status, *_ in opened], refused, page, again[0]

    with SimulatedDriver([SimulatedGpu(memory_total_mb=2_000_000, memory_used_mb=1_900_000)]):
        app, _ = make_app(ResourceManager(track_self=False), streams=4)
        statuses, refused, page, again = asyncio.run(main(app))
    assert statuses == [200]*4 and again == 200
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0 and "try again later" in refused.text
    assert page.status_code == 200   # the figures of this moment are there all the same
    with pytest.raises(ValueError, match="streams"): make_app(ResourceManager(), streams=0)


def test_the_headers_are_on_this_library_s_answers_alone():
    from starlette.testclient import TestClient

    from cjm_fasthtml_resources.ui.headers import HEADERS
    with SimulatedDriver([SimulatedGpu()]):
        app, _ = make_app(ResourceManager(track_self=False), controls=True, guard=lambda req: None)
        browser = TestClient(app)
        for path in ("", "/", "/fragment", "/live", "/page", "/stream?every=x", "/room"):
            found = browser.get(f"/resources{path}").headers
            assert {name: found[name] for name in HEADERS} == HEADERS, path
        assert browser.post("/resources/stop").headers["x-content-type-options"] == "nosniff"
        own = browser.get("/own")
    assert own.status_code == 200 and not {name.lower() for name in HEADERS} & set(own.headers)


def test_no_script_stands_in_a_page_since_the_policy_forbids_it():
    from starlette.testclient import TestClient
    with load_scenario("pair") as driver:
        manager = ResourceManager(track_self=False)
        for worker in driver.workers: manager.register_worker(**worker)
        app, _ = make_app(manager, controls=True, guard=lambda req: None)
        page = TestClient(app).get("/resources")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert all(" src=" in tag for tag in re.findall(r"<script[^>]*>", page.text))
    assert not re.search(r"<[^>]* on\w+=|javascript:", page.text)


@pytest.mark.parametrize("how", ["removed", "garbage", "a folder"])
def test_a_page_over_a_broken_file_answers_in_words(folder, how, spawn):
    from starlette.testclient import TestClient

    from cjm_fasthtml_resources.core.store import store_path
    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager(app="app")
        worker = manager.register_worker(spawn("input()").pid, "llm")
        app, _ = make_app(manager, controls=True, guard=lambda req: None)
        browser = TestClient(app)
        path = store_path()
        for file in path.parent.iterdir(): file.unlink()
        if how == "garbage":
            for file in (path, path.with_suffix(".lock")): file.write_bytes(b"garbage"*1000)
        if how == "a folder": path.mkdir()
        for address in ("/resources", "/resources/fragment"):
            answer = browser.get(address)
            assert answer.status_code == 200 and "resources.sqlite" in answer.text
        stop = browser.post("/resources/stop", data=dict(worker=f"{worker.pid}.{worker.start_time}"),
                            headers={"Sec-Fetch-Site": "same-origin"})
    assert stop.status_code == 503 and "cannot read the workers" in stop.text


def test_a_page_without_any_sample_answers_in_words_and_its_stream_recovers():
    from starlette.testclient import TestClient

    async def main(hub):
        async with contextlib.aclosing(hub.events()) as events:
            first = await anext(events)
            broken.clear()
            async for event in events:
                if b"NVIDIA L4" in event: return first

    broken = threading.Event()
    broken.set()
    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager()
        workers = manager.get_all_workers

        def sometimes():
            if broken.is_set(): raise RuntimeError("a plugin broke")
            return workers()

        manager.get_all_workers = sometimes
        app, routes = make_app(manager, interval=0.1)
        page = TestClient(app).get("/resources")
        first = asyncio.run(asyncio.wait_for(main(routes.hub), 10))
    assert page.status_code == 200 and "Cannot read the figures: a plugin broke" in page.text
    assert b"Cannot read the figures: a plugin broke" in first


def test_the_command_s_server_answers_to_every_address_of_this_machine_and_to_no_name():
    from starlette.testclient import TestClient

    from cjm_fasthtml_resources.ui.web import make_app as own_server
    with load_scenario("idle"):
        app = own_server(ResourceManager(track_self=False))
        hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.2:8765", "[::1]:8765", "localhost", "127.0.0.2.evil.example",
                 "10.0.0.1")
        statuses = [TestClient(app, base_url=f"http://{host}").get("/resources").status_code for host in hosts]
    assert statuses == [200]*5 + [403]*2


def test_the_pieces_are_the_same_for_the_panel_the_page_and_a_picture():
    from cjm_fasthtml_resources.core.samples import take_sample
    from cjm_fasthtml_resources.ui.cards import overview
    with load_scenario("shared") as driver:
        manager = ResourceManager(track_self=False)
        for worker in driver.workers: manager.register_worker(**worker)
        sample = take_sample(manager)
    picture = str(overview(sample))
    for html in (render(sample) | render_tables(sample)).values(): assert html in picture


# The end of the interpreter

EVERYTHING = """
import asyncio, os, sys, threading, time
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
from cjm_fasthtml_resources.ui.panel import ResourcePanel
from cjm_fasthtml_resources.ui.web import Hub
driver = SimulatedDriver([SimulatedGpu()]).start()
manager = ResourceManager()
panel, hub = ResourcePanel(manager, interval=0.1), Hub(ResourceMonitor(manager, interval=0.1))
held = manager.reserve(1_000)
hub.monitor.subscribe(lambda sample: None)
time.sleep(0.5)
"""


ENDINGS = {"running": "", "with a driver that hangs": "driver.hang('nvmlDeviceGetTemperature'); time.sleep(0.3)",
           "exit": "sys.exit(0)", "execv": "os.execv(sys.executable, [sys.executable, '-c', ''])"}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_program_with_all_of_it_running_ends_quietly_and_at_once(ending):
    script = EVERYTHING + "print(time.monotonic(), flush=True)\n" + ending
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (out.returncode, out.stderr) == (0, "") and time.monotonic() - float(out.stdout) < 2 + 0.3


LATE = """
import atexit, sys, threading, time

def late():
    "It was registered first, so it runs last: after this library's own"
    world.update(now="late")
    snapshot, heard = read_gpus(), []
    assert snapshot.devices or "since the program ends" in snapshot.reason, snapshot.reason
    assert manager.check_gpu_availability().message and manager.check_memory_availability().message
    manager.register_worker(4200101, "llm", plugin_instance=Plugin())
    manager.workers.plugins[4200101].asked -= 60
    assert manager.check_gpu_availability().message
    assert manager.unregister_worker(4200101)
    assert monitor.take() and monitor.current()
    with monitor.subscribe(heard.append): pass
    hub.publish(monitor.take())
    panel.close()
    print("it ends well", flush=True)

atexit.register(late)
world = {}
from cjm_fasthtml_resources.core.gpu import read_gpus
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
from cjm_fasthtml_resources.ui.panel import ResourcePanel
from cjm_fasthtml_resources.ui.web import Hub

class Plugin:
    def get_child_pids(self): return [4200102]

class LooksWhenItGoes:
    def __del__(self, look=read_gpus): look(1)

driver, manager = SimulatedDriver([SimulatedGpu()]).start(), ResourceManager()
monitor = ResourceMonitor(manager, interval=0.1)
hub = Hub(monitor)
panel = ResourcePanel(manager, interval=0.1)
if "never read" in sys.argv:
    from cjm_fasthtml_resources.core import gpu
    gpu._reader.after_fork()               # its thread has not been started
if "no thread" in sys.argv:                # as from Python 3.12 on
    def refuse(self): raise RuntimeError("can't create new thread at interpreter shutdown")
    atexit.register(lambda: setattr(threading.Thread, "start", refuse))
if "busy" in sys.argv:
    def work():
        while True:
            read_gpus()
            manager.check_gpu_availability()
            with monitor.subscribe(lambda sample: None): hub.publish(monitor.take())
    for _ in range(4): threading.Thread(target=work, daemon=True).start()
    goes = LooksWhenItGoes()
    time.sleep(0.3)
"""


@pytest.mark.parametrize("how", ["", "never read", "no thread", "no thread,never read", "busy", "busy,no thread"])
def test_an_exit_handler_and_a_late_thread_use_everything_without_a_traceback(how):
    command = [sys.executable, "-c", LATE, *how.split(",")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (out.returncode, out.stderr, out.stdout) == (0, "", "it ends well\n")


@pytest.mark.parametrize("module, name", [("panel", "ResourcePanel"), ("live_view", "LiveView")])
def test_a_view_that_is_collected_when_python_ends_waits_for_no_lock(module, name, monkeypatch):
    "Threads have stopped where they were by then, and one that has a lock keeps it"
    if module == "live_view": pytest.importorskip("anywidget", reason="the extra marimo is not installed")
    view = getattr(import_module(f"cjm_fasthtml_resources.ui.{module}"), name)(ResourceManager(track_self=False))
    taken, over = threading.Event(), threading.Event()

    def keep() -> None:
        with view._lock:
            taken.set()
            over.wait(30)
    threading.Thread(target=keep, daemon=True).start()
    assert taken.wait(5)
    with monkeypatch.context() as ending:
        ending.setattr(type(view), "_is_ending", lambda view: True)
        closing = threading.Thread(target=view.__del__, daemon=True)
        closing.start()
        closing.join(5)
    assert not closing.is_alive()
    over.set()
    view.close()



def test_a_spawned_and_a_forked_process_start_with_nothing_running():
    only_once = "import multiprocessing\nif __name__ != '__main__': raise SystemExit\n"
    script = EVERYTHING.replace("driver = ", f"{only_once}driver = ") + """
import multiprocessing
def child(): sys.exit(threading.active_count() - 1)
if (pid := os.fork()) == 0: os._exit(threading.active_count() - 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
process = multiprocessing.get_context("fork").Process(target=child)
process.start(); process.join()
assert process.exitcode == 0
if (pid := os.fork()) == 0:                      # and can begin anew
    seen = []
    with ResourceMonitor(ResourceManager(), interval=0.1).subscribe(seen.append): time.sleep(0.5)
    os._exit(0 if len(seen) >= 2 and seen[-1].gpu.status.value == "available" else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (out.returncode, out.stderr) == (0, "")
