"""What showing it live costs: the panel's updates, and a hundred clients of the stream. Called by benchmarks/run.py"""
import asyncio
import gc
import math
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil

from cjm_fasthtml_resources.core.history import History, to_point
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.samples import take_sample, with_commands
from cjm_fasthtml_resources.simulate import load_scenario
from cjm_fasthtml_resources.ui.cards import View, render, render_tables
from cjm_fasthtml_resources.ui.charts import Wanted, draw_charts
from cjm_fasthtml_resources.ui.panel import ResourcePanel, panel_slots
from cjm_fasthtml_resources.ui.parts import to_html
from cjm_fasthtml_resources.ui.web import change_event

CLIENTS, SECONDS = 100, 20

SERVER = """import math, sys, threading, time, uvicorn
from starlette.responses import PlainTextResponse
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import load_scenario
from cjm_fasthtml_resources.ui.web import make_app
driver = load_scenario("eight-h100")
manager = ResourceManager(track_self=False)
for worker in driver.workers: manager.register_worker(**worker)
def vary():
    turn = 0
    while True:
        turn += 1
        for gpu in driver.gpus: gpu.temperature, gpu.memory_used_mb = 40 + turn % 40, 40_000 + 300*(turn % 60)
        time.sleep(1)
app = make_app(manager)
inner = app
while not hasattr(inner, "route"): inner = inner.app   # what stands around the app, such as the headers
inner.route("/reads", methods=["GET"])(lambda: PlainTextResponse(str(driver.calls["nvmlDeviceGetCount_v2"])))
with driver:
    threading.Thread(target=vary, daemon=True).start()
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", timeout_graceful_shutdown=1,
                lifespan="off")
"""


def known_workers(driver):
    "A manager with the workers of a scenario"
    manager = ResourceManager(track_self=False)
    for worker in driver.workers: manager.register_worker(**worker)
    return manager


def varied(turn, place, status):
    "A device's status, some turns later"
    more = turn % 7*2**28
    # to one outsider on each GPU, to three on the fifth, whose processes are among those that are shown
    growing = range(10, 13 if place == 4 else 11)
    processes = tuple(replace(process, memory_used=process.memory_used + more) if number in growing else process
                      for number, process in enumerate(status.processes))
    more *= len(growing)
    device = replace(status.device, temperature=40 + turn % 40, utilization=turn % 100,
                     memory_used=status.device.memory_used + more, memory_free=status.device.memory_free - more)
    return replace(status, device=device, processes=processes, external_memory=status.external_memory + more)


def samples():
    """Eight GPUs with twenty processes each; from one to the next all eight GPUs' figures change, and the memory of ten
    processes
    """
    with load_scenario("eight-h100") as driver: first = take_sample(known_workers(driver))
    first = replace(first, gpu=with_commands(first.gpu, most=1000))   # whichever are the largest later

    def later(turn):
        devices = tuple(varied(turn, place, status) for place, status in enumerate(first.gpu.devices))
        return replace(first, gpu=replace(first.gpu, devices=devices))

    return [later(turn) for turn in range(300)]


def full_history(sample):
    "Ten minutes at one second"
    point = to_point(sample)

    def at(second):
        share = 0.6 + 0.4*math.sin(second/40)
        devices = {key: replace(device, used=int(device.used*share)) for key, device in point.devices.items()}
        return replace(point, number=second, devices=devices)

    return History(tuple(at(second) for second in range(1, 601)))


def update_cost():
    "Median CPU seconds to render an update"
    found, history = samples(), full_history(samples()[0])
    times = []
    for sample in found:
        began = time.thread_time()
        panel_slots(sample, history, View())
        times.append(time.thread_time() - began)
    return statistics.median(times[20:])


class Wire:
    "What widgets send, as Jupyter's messages"
    def __enter__(self):
        import ipywidgets
        from jupyter_client.session import Session
        session, self.messages = Session(key=b"of a benchmark"), []
        self._widget, self._send = ipywidgets.Widget, ipywidgets.Widget._send

        def send(widget, message, buffers=None):
            content = {"comm_id": widget.model_id, "data": message}
            whole = session.msg("comm_msg", content=content, metadata={"version": "2.1.0"})
            self.messages.append(sum(map(len, session.serialize(whole))))
            return self._send(widget, message, buffers)

        ipywidgets.Widget._send = send
        return self

    def __exit__(self, *exc): self._widget._send = self._send


def wire():
    "Bytes of an update to a panel and to a page, and messages of one that changes nothing"
    found, history = samples(), full_history(samples()[0])
    with load_scenario("eight-h100") as driver:
        panel = ResourcePanel(known_workers(driver), interval=3600)
        panel.monitor._points.extend(history.points)
        panel._show(found[0])
        sizes = []
        for sample in found[1:40]:
            with Wire() as sent: panel._show(sample)
            sizes.append(sum(sent.messages))
        with Wire() as idle: panel._show(found[39])
        panel.close()
    before, after = ({**render(s, history), **render_tables(s)} for s in found[:2])
    return statistics.median(sizes), len(change_event(before, after)), len(idle.messages)


def charts():
    "Bytes that a page with open charts is sent each ten seconds, and bytes and CPU seconds of all of them at first"
    sample = samples()[0]
    points = full_history(sample).points
    moved = [replace(point, time=sample.time - len(points) + n, taken=sample.taken - len(points) + n)
             for n, point in enumerate(points, 1)]
    began = time.thread_time()
    whole = to_html(draw_charts(sample, History(tuple(moved)), Wanted(workers=False)))
    spent = time.thread_time() - began
    new = draw_charts(sample, History(tuple(moved)), Wanted(since=int(sample.time//10) - 1, workers=False))
    return len(to_html(new)), len(whole), spent


def cycles():
    "Megabytes and threads more after a hundred panels were opened and closed"
    with load_scenario("eight-h100") as driver:
        manager = known_workers(driver)

        def turn(count):
            for _ in range(count): ResourcePanel(manager, controls=True).close()
            gc.collect()

        def state(): return psutil.Process().memory_info().rss/1e6, threading.active_count()

        turn(100)  # the caches of what is drawn fill up first
        before = state()
        turn(100)
        end = time.monotonic() + 5
        while threading.active_count() > before[1] and time.monotonic() < end: time.sleep(0.01)
        after = state()
    return after[0] - before[0], after[1] - before[1]


async def _listen(port, counts, n):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /resources/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
    while line := await reader.readline(): counts[n] += line.startswith(b"event:") or line.startswith(b"data:")


async def _clients(port, server):
    counts = [0]*CLIENTS
    tasks = [asyncio.create_task(_listen(port, counts, n)) for n in range(CLIENTS)]
    await asyncio.sleep(3)

    async def reads():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /reads HTTP/1.0\r\nHost: localhost\r\n\r\n")
        return int((await reader.read()).rpartition(b"\r\n")[2])

    def spent(): return sum(server.cpu_times()[:2])
    before, cpu, began, heard = await reads(), spent(), time.monotonic(), list(counts)
    await asyncio.sleep(SECONDS)
    seconds = time.monotonic() - began
    load, rate = (spent() - cpu)/seconds, (await reads() - before)/seconds
    least = min(now - then for now, then in zip(counts, heard, strict=True))
    for task in tasks: task.cancel()
    return load, rate, least/seconds


def stream():
    """Share of a core that a hundred clients at 1 Hz cost the server, readings of the driver per second, and lines that
    each client had per second
    """
    port = 18_765
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(port)])
    try:
        end = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionError:
                if time.monotonic() > end: raise
                time.sleep(0.2)
        return asyncio.run(_clients(port, psutil.Process(server.pid)))
    finally:
        server.terminate()
        server.wait()


def measure():
    "Rows: what, figure, bound, whether it holds, detail"
    render_time, (panel_bytes, page_bytes, idle), (grown, threads) = update_cost(), wire(), cycles()
    chart_bytes, chart_whole, chart_time = charts()
    load, rate, lines = stream()
    return [
        ("rendering an update: 8 GPUs' figures and 10 processes changed", f"{render_time*1e3:.1f} ms",
         "< 3 ms CPU", render_time < 3e-3, "of 8 GPUs with 20 processes each"),
        ("that update on the wire, to a panel and to a page", f"{panel_bytes/1e3:.1f} and {page_bytes/1e3:.1f} KB",
         "< 12 KB", max(panel_bytes, page_bytes) < 12e3, f"{idle} messages when nothing changed"),
        ("open charts of 8 GPUs and RAM, each ten seconds, on the wire", f"{chart_bytes/1e3:.1f} KB", "< 12 KB",
         chart_bytes < 12e3, f"{chart_whole/1e3:.0f} KB when they are opened, drawn in {chart_time*1e3:.0f} ms CPU"),
        ("100 panels opened and closed", f"{grown:+.1f} MB",
         "within 2 MB", abs(grown) < 2 and threads == 0, f"{threads:+d} threads"),
        ("100 clients of the stream at 1 Hz", f"{100*load:.0f} % of a core",
         "< 20 %", load < 0.2 and rate < 1.2 and lines > 1.5, f"{rate:.2f} readings of the driver a second"),
    ]
