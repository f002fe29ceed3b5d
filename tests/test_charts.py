"Charts: hostile names, clocks that jump, machines that change, a full day, and what a page is sent"
import math
import random
import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from fasthtml.common import FastHTML
from starlette.testclient import TestClient

from cjm_fasthtml_resources.core.history import History, to_point, worker_key
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.core.samples import take_sample
from cjm_fasthtml_resources.recorded.changes import Change
from cjm_fasthtml_resources.recorded.file import MINUTE, add
from cjm_fasthtml_resources.recorded.history import RecordedHistory
from cjm_fasthtml_resources.recorded.rows import Place, Row, Share, merge_rows
from cjm_fasthtml_resources.simulate import (
    SimulatedDriver,
    SimulatedGpu,
    SimulatedProcess,
    load_scenario,
)
from cjm_fasthtml_resources.ui.charts import (
    RANGES,
    Subject,
    Wanted,
    chart_grid,
    draw_charts,
    monitor_charts,
    recorded_charts,
    row_charts,
    span_of,
    subjects_of_rows,
)
from cjm_fasthtml_resources.ui.parts import to_html
from cjm_fasthtml_resources.ui.svg_chart import Chart, Column, Mark, Span, draw_chart, strokes, tick_times
from cjm_fasthtml_resources.ui.view import View
from cjm_fasthtml_resources.ui.web import resource_routes

GIB = 2**30
HOSTILE = "\"'></title></svg><script>alert(1)</script><img src=x onerror=alert(2)>\x1b]0;x\x07\u202e"


class Tags(HTMLParser):
    "The elements of some HTML, with the texts of their attributes"
    def __init__(self, html: str) -> None:
        super().__init__()
        self.names, self.attributes = set(), set()
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attributes}


@pytest.fixture(scope="module")
def sample():
    with load_scenario("pair") as driver:
        manager = ResourceManager(track_self=False)
        for worker in driver.workers: manager.register_worker(**worker)
        yield take_sample(manager)


def history_of(sample, seconds, **changes):
    "A point for each second, the last one at 1,800,000,000 by the clock"
    point = to_point(sample)
    return History(tuple(replace(point, number=n, time=1_800_000_000.0 - seconds + n + 1, taken=1000.0 + n, **changes)
                         for n in range(seconds)))


def test_a_hostile_name_of_a_worker_or_in_an_event_is_text():
    with SimulatedDriver([SimulatedGpu("NVIDIA L4", processes=[SimulatedProcess(4200301, 3000)])]):
        manager = ResourceManager(track_self=False)
        manager.register_worker(4200301, HOSTILE)
        sample = take_sample(manager)
    key = next(iter(to_point(sample).devices))
    changes = [(1_800_000_000.0 - 60, Change("started", key, 4200301, HOSTILE))]
    html = to_html([draw_chart(chart) for chart in monitor_charts(sample, history_of(sample, 100), Wanted(), changes)])
    html += to_html(draw_charts(sample, history_of(sample, 100)))
    tags = Tags(html)
    assert not {"script", "img"} & tags.names and not {name for name in tags.attributes if name.startswith("on")}
    assert "alert(1)" in html and not re.search("[\x1b\x07\u202e]", html)


def test_a_column_is_drawn_for_each_stretch_and_never_outside(sample):
    for seconds in (1, 2, 7, 599, 600, 5000):
        for chart in monitor_charts(sample, history_of(sample, seconds)):
            numbers = [column.number for column in chart.columns]
            assert numbers == sorted(set(numbers)) and chart.first <= numbers[0] and numbers[-1] == chart.end - 1
            assert len(numbers) == min(math.ceil(seconds/5), 120) or seconds < 10
    assert all(not chart.columns for chart in monitor_charts(sample, History()))
    assert "no figures yet" in to_html(draw_charts(sample, History()))


@pytest.mark.parametrize("jump", [-3600.0, 3600.0, -0.5])
def test_a_clock_that_is_set_moves_no_column(sample, jump):
    steady = history_of(sample, 300).points
    jumped = [*steady[:150], *(replace(point, time=point.time + jump) for point in steady[150:])]
    charts = monitor_charts(sample, History(tuple(jumped)))
    assert all(60 <= len(chart.columns) <= 61 for chart in charts)
    assert abs((charts[0].end - 1)*5 - jumped[-1].time) <= 5      # up to now, by the clock that is right


def test_a_sampler_that_stood_still_leaves_a_gap_and_a_slow_one_does_not(sample):
    points = history_of(sample, 300).points
    gap = monitor_charts(sample, History((*points[:100], *points[200:])))[0]
    assert 40 <= len(gap.columns) <= 42
    slow = monitor_charts(sample, History(points[::20]), Wanted(interval=20.0))[0]
    assert len(slow.columns) >= 55


def test_a_gpu_that_comes_has_columns_from_then_on(sample):
    points = history_of(sample, 100).points
    first, second = to_point(sample).devices
    points = [replace(p, devices={k: d for k, d in p.devices.items() if k == first or n >= 50})
              for n, p in enumerate(points)]
    by_key = {chart.key: chart for chart in monitor_charts(sample, History(tuple(points)))}
    assert len(by_key[second].columns) < len(by_key[first].columns)
    assert by_key[second].columns[-1].number == by_key[first].columns[-1].number


def test_the_fullest_moment_of_a_stretch_is_shown(sample):
    points = list(history_of(sample, 100).points)
    key, device = next(iter(points[52].devices.items()))
    points[52] = replace(points[52], devices=points[52].devices | {key: replace(device, external=40*GIB)})
    chart = monitor_charts(sample, History(tuple(points)))[0]
    assert sum(column.external == 40*GIB for column in chart.columns) == 1


def test_a_worker_has_its_own_memory_with_its_child_processes(sample):
    charts = {chart.key: chart for chart in monitor_charts(sample, history_of(sample, 20))}
    for worker in sample.workers:
        used = sum(p.memory_used for d in sample.gpu.devices for p in d.processes
                   if p.owner == "app" and worker.pid in (p.pid, p.parent_pid))
        assert charts[worker_key(worker)].columns[-1].app == used > 0


def test_strokes_are_within_the_chart_whatever_the_figures_are():
    for total in (0, 1, 24*GIB):
        for used in (0, 1, 12*GIB, 24*GIB, 50*GIB):
            for load in (None, 0, 100, 255):
                found = strokes(Column(0, used, used//2, used//3, used//4, load), total)
                assert all(0 <= top < bottom <= 136 for _, bottom, top in found)
                memory = [stroke for stroke in found if stroke[0] != "load"]
                assert all(a[2] == b[1] for a, b in zip(memory, memory[1:], strict=False))   # one on the other


@pytest.mark.parametrize("zone", [None, 0, -210, 345, 845])
@pytest.mark.parametrize("span", [Span(600, 5, 120), Span(3600, 60, 900), Span(86400, 900, 4*3600)])
def test_times_on_the_axis_are_round_and_within_the_chart(zone, span):
    chart = Chart("k", "GPU 0", GIB, span, 1_800_000_000//span.width, zone=zone)
    times = tick_times(chart)
    assert 3 <= len(times) <= 8
    assert all(chart.first*span.width <= when <= chart.end*span.width for when in times)
    if zone is not None: assert all((when + 60*zone) % span.tick == 0 for when in times)


def test_many_events_in_one_column_are_one_mark_and_a_count():
    marks = tuple(Mark(10.0 + n/100, f"event {n}") for n in range(200))
    html = to_html(draw_chart(Chart("k", "GPU 0", GIB, Span(600, 10, 120), 60, marks=marks, zone=0)))
    assert html.count("class=mark") == 1 and "and 195 more" in html and len(html) < 3000


def test_an_event_in_a_gap_of_the_record_has_a_column_that_says_so():
    columns = tuple(Column(n, app=GIB) for n in (1, 2, 8))
    marks = (Mark(55.0, "in the gap"), Mark(21.0, "at a figure"), Mark(999.0, "outside"))
    chart = Chart("k", "GPU 0", 2*GIB, Span(100, 10, 50), 10, columns, marks, zone=0)
    html = to_html(draw_chart(chart))
    assert re.findall(r"<g transform=translate\((\d+)\)><title>([^<]*)", html) == [
        ("1", "00:00:10 · app 1.0 GiB"), ("2", "00:00:20 · app 1.0 GiB"), ("5", "00:00:50 · no figures"),
        ("8", "00:01:20 · app 1.0 GiB")]
    assert "no figures" not in to_html(draw_chart(chart, since=6))


def random_row(n, dice):
    "A row of one second, in which owners come and go"
    app, external, unseen = (dice.choice([0, 4, 18])*GIB for _ in range(3))
    used = app + external + unseen
    shares = (Share(1, 1.0, "app", "mine", "ada", app, app),
              Share(2, 1.0, "external", "train.py", "bob", external, external))
    place = Place("GPU-1", 0, "NVIDIA L4", "available", 80*GIB, used, used, app, external, unseen, GIB, 50, 60, 70.0,
                  shares)
    return Row(float(n), 1.0, (place,))


@pytest.mark.parametrize("seed", range(20))
def test_no_owner_has_more_than_a_sample_of_the_stretch_says_and_the_fullest_moment_is_shown(seed):
    dice = random.Random(seed)
    minutes = [[random_row(60*minute + n, dice) for n in range(60)] for minute in range(10)]
    rows = [merge_rows(samples) for samples in minutes]
    chart, = row_charts(rows, subjects_of_rows(rows), span_of("1h", 1), 10)
    for column, samples in zip(chart.columns, minutes, strict=True):
        places = [row.places[0] for row in samples]
        for owner in ("app", "external", "unattributed", "promised"):
            assert getattr(column, owner) <= max(getattr(place, owner) for place in places), owner
        assert column.used == max(place.used for place in places)
        title = f"fullest moment {column.used/GIB:.1f} GiB in all"
        assert title in to_html(draw_chart(chart))
    assert "fullest moment (owner not recorded)" in to_html(chart_grid([chart]))


def test_a_worker_whose_child_processes_take_turns_has_what_one_of_them_had():
    def sample_of(n):
        share = Share(41 + n % 2, 1.0, "app", "worker", "ada", 8*GIB, 8*GIB)
        place = Place("GPU-1", 0, "NVIDIA L4", "available", 24*GIB, 8*GIB, 8*GIB, 8*GIB, 0, 0, 0, 50, 60, 70.0,
                      (share,))
        return Row(float(n), 1.0, (place,))
    row = merge_rows([sample_of(n) for n in range(60)])
    for pids in ({41}, {41, 42}):
        chart, = row_charts([row], [Subject("/41/1.0", "worker", 24*GIB, pids=frozenset(pids))], span_of("1h", 1), 1)
        assert chart.columns[0].app == 8*GIB


def test_the_largest_other_program_is_named_with_its_user_and_a_hostile_name_is_text():
    shares = (Share(1, 1.0, "app", "mine", "ada", 9*GIB, 9*GIB),
              Share(0, None, "external", "12 others", "", 5*GIB, 5*GIB),
              Share(2, 1.0, "external", "</title><script>·alert(1)</script>", "bob", 3*GIB, 3*GIB),
              Share(3, 1.0, "external", "small.py", "cleo", GIB, GIB))
    place = Place("GPU-1", 0, "NVIDIA L4", "available", 24*GIB, 18*GIB, 18*GIB, 9*GIB, 9*GIB, 0, 0, 50, 60, 70.0,
                  shares)
    rows = [Row(0.0, 60.0, (place,))]
    chart, = row_charts(rows, subjects_of_rows(rows), span_of("1h", 1), 1, zone=0)
    html = to_html(chart_grid([chart]))
    assert "script" not in Tags(html).names and "(&lt;/title&gt;&lt;script&gt; alert(1…, bob 3.0 GiB)" in html
    alone = [Row(0.0, 60.0, (place._replace(external=GIB, shares=shares[3:]),))]
    chart, = row_charts(alone, subjects_of_rows(alone), span_of("1h", 1), 1, zone=0)
    assert "other programs 1.0 GiB (small.py, cleo) · " in to_html(draw_chart(chart))   # its size is that of all


def write_day(path, minutes, key="GPU-1"):
    "A day of minutes, up to now, without the figures of one hour"
    end, rows = time.time()//60*60, []
    for n in range(minutes):
        if 600 <= n < 660: continue
        used = (4 + n % 9)*GIB
        share = Share(77, 1.0, "external", "train.py", "bob", used, used)
        place = Place(key, 0, "NVIDIA L4", "available", 24*GIB, used, used, 0, used, 0, 0, 50, 60, 70.0, (share,))
        rows.append(Row(end - 60*(minutes - n), 60.0, (place,)))
    add(path, rows, [(end - 7200, Change("started", key, 77, "train.py (PID 77, user bob) began to use GPU 0."))])
    return end


def test_a_day_of_minutes_is_drawn_in_time_with_its_gap_and_its_events(tmp_path):
    recorded = RecordedHistory(tmp_path/"history.sqlite3")
    write_day(recorded.file, 1440)
    began = time.process_time()
    chart, = recorded_charts(recorded, "24h")
    assert time.process_time() - began < 0.5
    assert chart.span.count == 96 and 90 <= len(chart.columns) <= 93   # an hour is missing
    assert max(column.used for column in chart.columns) == 12*GIB      # the fullest minute, and no mean
    assert len(chart.marks) == 1
    html = to_html(draw_chart(chart))
    assert html.count("class=mark") == 1 and len(html) < 28_000
    hour, = recorded_charts(recorded, "1h")
    assert 58 <= len(hour.columns) <= 60
    assert MINUTE.width == hour.span.width


def test_a_recorder_that_has_stopped_is_told_with_the_command(tmp_path, sample):
    recorded, key = RecordedHistory(tmp_path/"history.sqlite3"), next(iter(to_point(sample).devices))
    now = time.time()
    place = Place(key, 0, "NVIDIA L4", "available", 24*GIB, GIB, GIB, 0, GIB, 0, 0, 50, 60, 70.0)
    add(recorded.file, [Row(now - 3000 + 60*n, 60.0, (place,)) for n in range(20)])
    html = to_html(draw_charts(sample, History(), Wanted("1h"), recorded))
    assert "no recorder is running" in html and "cjm-resources record</code>" in html
    recorded.file.write_bytes(b"garbage"*1000)
    assert "Cannot read the history" in to_html(draw_charts(sample, History(), Wanted("1h"), recorded))
    assert "<figure" in to_html(draw_charts(sample, history_of(sample, 20), Wanted(), recorded))   # of the monitor


@pytest.fixture
def client(tmp_path):
    with load_scenario("eight-h100") as driver:
        manager = ResourceManager(track_self=False)
        for worker in driver.workers: manager.register_worker(**worker)
        monitor, app = ResourceMonitor(manager), FastHTML(secret_key="of a test", default_hdrs=False)
        resource_routes(app, manager, monitor=monitor, recorded=RecordedHistory(tmp_path/"history.sqlite3"))
        latest = monitor.take()
        points = [replace(to_point(latest), time=latest.time - 600 + n, taken=latest.taken - 600 + n)
                  for n in range(600)]
        monitor._points.extendleft(reversed(points))
        yield TestClient(app)


def test_a_page_is_sent_what_is_new_of_eight_gpus_in_12_kb(client):
    whole = client.get("/resources/charts?range=10m&zone=60")
    assert whole.status_code == 200 and whole.headers["cjm-charts"].startswith("10m 10 ")
    assert whole.text.count("<figure") == 9                            # workers are folded, and fetched when they open
    last = max(int(n) for n in re.findall(r"data-first=(\d+)", whole.text)) + 59
    new = client.get(f"/resources/charts?range=10m&zone=60&since={last}")
    assert new.text.count("<g transform=") <= 2*9 and len(new.content) < 12_000 < len(whole.content)
    assert client.get("/resources/charts?workers=1").text.count("<figure") > 9
    page = client.get("/resources")
    sent = sum(len(client.get(path).content) for path in ("/resources", "/resources/live", "/resources/page"))
    assert sent < 100_000 and "<figure" not in page.text
    assert whole.headers["cache-control"] == "no-store" and "default-src 'none'" in whole.headers[
        "content-security-policy"]


@pytest.mark.parametrize("query", ["range=1y", "range=", "zone=x", "zone=99999", "since=1e3", "since=" + "9"*40,
                                   "since=%00", "range=%3Cscript%3E"])
def test_a_request_that_makes_no_sense_is_refused_in_words(client, query):
    answer = client.get(f"/resources/charts?{query}")
    assert answer.status_code == 400 and answer.headers["content-type"].startswith("text/plain")


def test_every_range_is_answered_without_a_recorder(client):
    for name in RANGES:
        answer = client.get(f"/resources/charts?range={name}")
        assert answer.status_code == 200
        assert ("cjm-resources record" in answer.text) == (name != "10m")


def test_a_view_chooses_which_gpus_have_charts(sample):
    charts = monitor_charts(sample, history_of(sample, 20), Wanted(view=View(gpus=(1,))))
    assert [chart.label for chart in charts if chart.label.startswith("GPU")] == ["GPU 1"]
