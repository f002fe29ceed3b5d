"Charts on the page: opened, moved on, read with the pointer and with the keyboard, for everybody"
import os
import re
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from helpers import free_port, serving, violations, wait_for

from cjm_fasthtml_resources.recorded.changes import Change
from cjm_fasthtml_resources.recorded.file import add
from cjm_fasthtml_resources.recorded.rows import Place, Row

SERVER = Path(__file__).with_name("server.py")
BOXES = "all => all.map((e) => e.getBoundingClientRect().toJSON())"
LONG = "train_lora.py (PID {}, user bob) grew on GPU 0 from 6.0 GiB to 12.2 GiB, and it is the largest program there."
HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)> started on GPU 0."


def write_history(path: Path, key: str) -> None:
    "Keep twenty hours of a GPU, with one event two hours ago, five at once before it, and one in a gap of the record"
    now, gib = time.time(), 2**30
    rows = []
    for n in range(1200):
        if 400 <= n < 460: continue
        used = (3 + n % 7)*gib
        place = Place(key, 0, "NVIDIA L4", "available", 23*gib, used, used, 0, used, 0, 0, n % 100, 60, 70.0)
        rows.append(Row(now - 60*(1200 - n), 60.0, (place,)))
    many = [(now//900*900 - 5*3600 + n, Change("grew", key, n, LONG.format(n))) for n in range(5)]
    add(path, rows, [(now - 60*(1200 - 430), Change("status", key, 0, "GPU 0 is available.")), *many,
                     (now - 7200, Change("started", key, 4200001, HOSTILE))])


@pytest.fixture(scope="module")
def server(chromium, tmp_path_factory):
    "The address of an app without a recorder"
    yield from serve(tmp_path_factory.mktemp("charts"), {})


@pytest.fixture(scope="module")
def with_history(chromium, tmp_path_factory):
    "The address of an app with one, whose file comes later"
    folder = tmp_path_factory.mktemp("recorded")
    yield from ((url, folder/"history.sqlite3")
                for url in serve(folder, dict(HISTORY=str(folder/"history.sqlite3"))))


def serve(folder: Path, more: dict[str, str]):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with serving([sys.executable, str(SERVER), str(port)], f"{url}/test", folder/"log", env={**os.environ, **more}):
        yield url


def ask(server: str, query: str = "") -> None:
    with urllib.request.urlopen(urllib.request.Request(f"{server}/test{query}", method="PUT"), timeout=10): pass


def opened(server: str, page, path: str = "/resources"):
    "Open the charts of a page, and wait until they have figures"
    page.alerts = []
    page.on("dialog", lambda dialog: (page.alerts.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: page.alerts.append(str(error)))
    page.goto(server + path)
    page.locator(".charts > summary").click()
    page.locator(".chart .columns g").first.wait_for(state="attached")
    return page


def said(page) -> str: return page.locator(".chart output").first.inner_text()


def words(title) -> str: return title.text_content().replace(" · ", " ")


def of_day(with_history, page):
    "Open the charts of a day, and return the first one"
    url, path = with_history
    opened(url, page)
    chart = page.locator(".chart").first
    if not path.exists(): write_history(path, chart.get_attribute("data-key"))
    page.locator("input[value='24h']").check()
    chart.locator(".mark").first.wait_for(state="attached")
    chart.scroll_into_view_if_needed()
    return chart


def centre(chart, place: int) -> tuple[float, float]:
    "Return the point in the middle of a column"
    box = chart.locator(".columns > g").nth(place).locator("rect").bounding_box()
    return box["x"] + box["width"]/2, box["y"] + 50


def place_of(chart, text: str) -> int:
    "Return the place, among the columns, of the one in which something happened"
    x = chart.locator(".mark").evaluate_all(
        "(all, text) => all.find((e) => e.textContent.includes(text)).dataset.x", text)
    at = chart.locator(".columns > g").evaluate_all("all => all.map((g) => g.getAttribute('transform'))")
    return at.index(f"translate({x})")


def columns(page) -> int: return page.locator(".chart").first.locator(".columns > g").count()


def test_charts_are_fetched_while_they_are_open_and_move_on_by_what_is_new(server, new_page):
    page = new_page()
    asked = []
    page.on("response", lambda answer: "/charts?" in answer.url and asked.append(answer))
    page.goto(f"{server}/resources")
    page.locator(".charts > summary").wait_for()
    page.wait_for_timeout(600)
    assert asked == []                                                # closed: nothing is fetched
    page.locator(".charts > summary").click()
    page.locator(".chart").first.wait_for()
    plot = page.locator(".chart").first.locator(".plot")
    label, before = plot.get_attribute("aria-label"), columns(page)
    page.evaluate("document.querySelector('.chart').mine = true")
    ask(server, "?first=15000")
    wait_for(page, "/ 14\\.[0-9] of|to 14\\.[0-9] of/.test(document.querySelector('.plot').ariaLabel)", 15_000)
    assert columns(page) > before and plot.get_attribute("aria-label") != label
    assert page.evaluate("document.querySelector('.chart').mine")     # the same element, moved on
    assert "since=" not in asked[0].url and "since=" in asked[-1].url
    assert page.locator(".chart").first.locator(".columns > g").last.evaluate(
        "g => [...g.parentNode.children].map(e => +/[0-9]+/.exec(e.getAttribute('transform'))[0])"
        ".every((x, i, all) => !i || x > all[i - 1])")                # each column once, in order
    page.locator(".charts > summary").click()
    page.wait_for_timeout(300)
    count = len(asked)
    page.wait_for_timeout(6000)
    assert len(asked) == count
    ask(server, "?reset")


def test_figures_under_the_pointer_and_by_arrow_keys(server, new_page):
    page = opened(server, new_page())
    wait_for(page, "document.querySelector('.chart').querySelectorAll('.columns > g').length >= 2", 15_000)
    plot, now = page.locator(".plot").first, said(page)
    titles = plot.locator(".columns > g > title")
    assert words(titles.last) == now and re.match(r"\d\d:\d\d:\d\d ", now)
    plot.focus()
    for key, place in (("Home", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        assert said(page).startswith(words(titles.nth(place)))         # an event follows the figures
    page.keyboard.press("End")
    assert said(page).startswith(words(titles.last)) and plot.locator(".columns .at").count() == 1
    assert page.locator(".chart output").first.get_attribute("aria-live") == "polite"   # read out with the focus
    plot.evaluate("e => e.blur()")
    assert plot.locator(".columns .at").count() == 0
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 20)                      # where there is no column: the nearest one
    assert said(page).startswith(words(titles.first))
    page.mouse.move(1, 1)
    wait_for(page, "!document.querySelector('.columns .at')")
    assert page.alerts == []


def test_the_pointer_reads_the_column_below_it_where_columns_fill_a_part(with_history, new_page):
    page = new_page()
    chart = of_day(with_history, page)
    titles = chart.locator(".columns > g > title")
    assert 60 < titles.count() < 90                                   # the first hours are missing
    for place in range(titles.count()):
        page.mouse.move(*centre(chart, place))
        assert said(page).startswith(words(titles.nth(place))), place
    assert page.alerts == []


@pytest.mark.parametrize("width", [390, 700, 1280])
def test_nothing_moves_while_the_pointer_does_and_a_click_shows_the_whole_text(with_history, new_page, width):
    page = new_page(width=width)
    chart, tops = of_day(with_history, page), []
    for place in range(0, columns(page)):
        page.mouse.move(*centre(chart, place))
        tops.append(page.evaluate("[...document.querySelectorAll('.plot')].map((e) => e.getBoundingClientRect().y)"))
    assert all(top == tops[0] for top in tops)
    many = place_of(chart, "PID 0,")
    page.mouse.move(*centre(chart, many))
    output = chart.locator("output")
    assert output.evaluate("e => e.matches('.more') && e.scrollHeight > e.clientHeight")
    page.mouse.down()
    page.mouse.up()
    page.mouse.move(1, 1)                                             # kept while the pointer is elsewhere
    assert output.evaluate("e => !e.matches('.more') && e.scrollHeight <= e.clientHeight")
    assert all(LONG.format(n) in said(page) for n in range(5))
    boxes = output.locator(".event").evaluate_all(BOXES)
    assert len(boxes) == 5 and all(box["left"] >= 0 and box["right"] <= width for box in boxes)
    assert violations(page, ".chart") == []
    assert chart.locator(".plot").evaluate("e => e.getBoundingClientRect().y") == tops[0][0]
    page.mouse.move(*centre(chart, 3))
    assert LONG.format(0) in said(page)                               # it stays, until a click
    page.mouse.move(*centre(chart, many))
    page.mouse.down()
    page.mouse.up()
    assert "kept" not in chart.get_attribute("class")
    page.mouse.move(*centre(chart, 3))
    assert said(page).startswith(words(chart.locator(".columns > g > title").nth(3)))
    assert page.alerts == []


def test_a_tap_shows_a_column_until_the_next_one_or_escape(with_history, new_page):
    page = new_page(width=390, has_touch=True)
    chart = of_day(with_history, page)
    titles = chart.locator(".columns > g > title")
    for place in (9, 40):
        page.touchscreen.tap(*centre(chart, place))
        page.wait_for_timeout(200)
        assert said(page).startswith(words(titles.nth(place))) and "kept" in chart.get_attribute("class")
        assert chart.locator(".at").count() == 2                      # the column and its figures
    page.touchscreen.tap(*centre(chart, 40))
    assert "kept" not in chart.get_attribute("class")
    page.touchscreen.tap(*centre(chart, 9))
    page.keyboard.press("Escape")
    assert "kept" not in chart.get_attribute("class")
    assert chart.locator(".plot").evaluate("e => getComputedStyle(e).touchAction") == "pan-y pinch-zoom"
    assert page.alerts == []


def test_events_are_read_whole_by_keyboard_those_in_a_gap_of_the_record_too(with_history, new_page):
    page = new_page()
    chart = of_day(with_history, page)
    gap, many = place_of(chart, "GPU 0 is available."), place_of(chart, "PID 0,")
    page.mouse.move(*centre(chart, gap))
    assert re.match(r"\w+ \d\d:\d\d no figures", said(page)) and "GPU 0 is available." in said(page)
    page.mouse.move(1, 1)
    chart.locator(".plot").focus()
    page.keyboard.press("Home")
    for place in range(many + 1):
        assert chart.locator(".columns > g").nth(place).get_attribute("class") == "at"
        if place == gap: assert "GPU 0 is available." in said(page)
        if place < many: page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert chart.locator("output").evaluate("e => e.scrollHeight <= e.clientHeight") and LONG.format(4) in said(page)
    page.keyboard.press("Tab")
    assert LONG.format(4) in said(page)                               # it stays without the focus
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Escape")
    assert "kept" not in chart.get_attribute("class") and chart.locator("output.more").count() == 1
    assert page.alerts == []


def test_a_range_is_chosen_by_keyboard_and_without_a_recorder_the_command_is_named(server, new_page):
    page = opened(server, new_page())
    page.locator(".charts input:checked").focus()
    for words in ("1 hour", "24 hours"):
        page.keyboard.press("ArrowRight")
        page.locator(".charts label", has_text=words).locator("input:checked").wait_for()
        page.locator(".charts code", has_text="cjm-resources record").wait_for()
    page.locator("input[value='10m']").check()
    page.locator(".chart .plot").first.wait_for()


def test_an_hour_and_a_day_come_from_the_recorder_with_its_events_as_text(with_history, new_page):
    url, path = with_history
    page = opened(url, new_page())
    key = page.locator(".chart").first.get_attribute("data-key")
    if not path.exists(): write_history(path, key)
    page.locator("input[value='24h']").check()
    page.locator(".mark").first.wait_for(state="attached")
    assert 60 < columns(page) <= 96 and page.locator(".chart").first.locator(".mark").count() == 3
    assert "<script>alert(1)</script>" in page.locator(".mark title").last.text_content()
    plot = page.locator(".plot").first
    plot.focus()
    place = int(page.locator(".mark").last.get_attribute("data-x"))
    page.keyboard.press("Home")
    for _ in range(96):
        if plot.locator(".columns .at").get_attribute("transform") == f"translate({place})": break
        page.keyboard.press("ArrowRight")
    assert "<script>" in said(page)                                   # what happened is read with the figures, as text
    page.locator("input[value='1h']").check()
    wait_for(page, "document.querySelector('.chart').querySelectorAll('.columns > g').length >= 30")
    assert page.locator(".cjm img, .cjm script:not([src])").count() == 0 and page.alerts == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 700, 1280])
def test_everybody_can_read_the_charts(with_history, new_page, scheme, width):
    url, path = with_history
    page = opened(url, new_page(width=width, color_scheme=scheme))
    if not path.exists(): write_history(path, page.locator(".chart").first.get_attribute("data-key"))
    for value in ("10m", "24h"):
        page.locator(f"input[value='{value}']").check()
        page.locator(".chart .columns g").first.wait_for(state="attached")
        page.locator(".plot").first.focus()
        assert violations(page) == []
    assert page.locator(".plot").first.get_attribute("role") == "img"


def test_nothing_sticks_out_from_320_px_on(with_history, new_page):
    page = opened(with_history[0], new_page())
    for width in (320, 360, 390, 480, 600, 700, 840, 1000, 1280):
        page.set_viewport_size(dict(width=width, height=900))
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
        boxes = page.locator(".chart text:visible").evaluate_all(BOXES)
        assert all(box["left"] >= 0 and box["right"] <= width for box in boxes), width


def test_where_the_system_sets_the_colours_each_owner_has_dashes_of_its_own(server, new_page):
    page = opened(server, new_page(forced_colors="active"))
    owners = ["app", "external", "unattributed", "promised", "peak"]
    strokes = page.evaluate("""(owners) => Object.fromEntries(owners.map((name) => {
        const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
        path.setAttribute('class', name);
        document.querySelector('.columns').append(path);
        const style = getComputedStyle(path);
        return [name, [style.stroke, style.strokeDasharray]];
    }))""", owners)
    assert len({tuple(stroke) for stroke in strokes.values()}) == 5
    background = page.evaluate("getComputedStyle(document.querySelector('.cjm')).backgroundColor")
    assert all(stroke != background for stroke, _ in strokes.values())
    assert len({dashes for _, dashes in strokes.values()}) == 5


def test_without_a_script_there_is_no_chart_that_does_nothing(server, new_page):
    page = new_page(java_script_enabled=False)
    page.goto(f"{server}/resources")
    page.locator(".cjm-card").first.wait_for()
    assert page.locator(".charts").count() == 0
