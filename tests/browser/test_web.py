"The web page in a real browser: two tabs, a GPU that fills up, a hostile name, a stream that is cut"
import json
import platform
import signal
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from fastcore.xml import P
from helpers import CUT, free_port, serving, violations, wait_for, wait_until

from cjm_fasthtml_resources.core.questions import Question
from cjm_fasthtml_resources.core.resources import OwnedProcess, WorkerState
from cjm_fasthtml_resources.core.waiting import ReservationRow
from cjm_fasthtml_resources.ui.cards import framed
from cjm_fasthtml_resources.ui.parts import to_html
from cjm_fasthtml_resources.ui.tables import process_table, reservation_table, to_row, worker_table
from cjm_fasthtml_resources.ui.web import answer_buttons

SERVER = Path(__file__).with_name("server.py")


@pytest.fixture(scope="module")
def server_of_all(chromium, tmp_path_factory):
    "The address of an app, in a process of its own"
    port, log = free_port(), tmp_path_factory.mktemp("web")/"log"
    url = f"http://127.0.0.1:{port}"
    with serving([sys.executable, str(SERVER), str(port)], f"{url}/test", log): yield url


@pytest.fixture
def server(server_of_all):
    "Its address; it shows what it shows at its start"
    ask(server_of_all, "?reset")
    return server_of_all


def ask(server: str, query: str = "") -> dict:
    with urllib.request.urlopen(f"{server}/test{query}", timeout=10) as answer: return json.load(answer)


def second(page): return page.locator(".cjm-card", has_text="NVIDIA L40S")


def test_two_tabs_show_a_gpu_that_fills_up_and_is_freed_and_share_one_sampler(server, new_page):
    tabs = [new_page() for _ in range(2)]
    for page, path in zip(tabs, ("/resources", "/"), strict=True): page.goto(server + path)
    for used, words in (("30000", "▲ external busy"), ("0", "✓ available")):
        ask(server, f"?used={used}")
        for page in tabs: second(page).locator(".cjm-badge", has_text=words).wait_for()
    before, began = ask(server)["reads"], time.monotonic()
    time.sleep(2)
    assert ask(server)["reads"] - before <= (time.monotonic() - began)/0.25 + 2
    assert ask(server)["threads"].count("resource-monitor") == 1
    for page in tabs: page.close()
    wait_until(lambda: "resource-monitor" not in ask(server)["threads"])


def test_a_hostile_name_is_text(server, new_page):
    page, alerts = new_page(), []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    page.goto(f"{server}/resources")
    ask(server, "?temperature=77")
    page.get_by_text("77 °C").wait_for()
    assert page.locator(".processes td", has_text="<script>alert(1)</script>").count() == 1
    assert page.locator(".cjm script:not([src]), .cjm img").count() == 0 and alerts == []


def test_what_is_selected_and_where_it_was_scrolled_to_stays(server, new_page):
    page = new_page(height=300)
    page.goto(f"{server}/resources")
    page.evaluate("""() => {
        const cell = [...document.querySelectorAll('.processes td')].find(td => td.textContent === 'train.py');
        cell.scrollIntoView(); getSelection().selectAllChildren(cell); window.scrolled = scrollY; }""")
    for degrees in (50, 51, 52):
        ask(server, f"?temperature={degrees}&used={degrees*300}")
        page.get_by_text(f"{degrees} °C").wait_for(state="attached")
    assert page.evaluate("[getSelection().toString(), scrollY === window.scrolled]") == ["train.py", True]


def test_a_stream_that_is_cut_says_so_and_comes_back(chromium, new_page, tmp_path):
    port = free_port()
    command, url, page = [sys.executable, str(SERVER), str(port)], f"http://127.0.0.1:{port}", new_page()
    with serving(command, f"{url}/test", tmp_path/"first"):
        page.goto(f"{url}/resources")
        second(page).wait_for()
        assert page.locator("[data-cjm-lost]").inner_text() == ""
    page.get_by_text("Disconnected. Showing data from").wait_for()
    with serving(command, f"{url}/test", tmp_path/"second"):
        wait_until(lambda: page.evaluate("document.querySelector('[data-cjm-lost]').textContent === ''"))
        ask(url, "?used=30000")
        second(page).locator(".cjm-badge", has_text="▲ external busy").wait_for()


def test_figures_that_nothing_is_heard_of_are_marked_as_old_until_there_are_new_ones(chromium, new_page, tmp_path):
    "A server that is suspended: the connection stays open, and a browser is told nothing"
    port = free_port()
    command, url, page = [sys.executable, str(SERVER), str(port)], f"http://127.0.0.1:{port}", new_page()
    grey = "document.querySelector('[data-cjm-place]').matches('.old')"
    with serving(command, f"{url}/test", tmp_path/"log") as process:
        page.goto(f"{url}/resources")
        second(page).wait_for()
        time.sleep(4)                                  # nothing changes here, and it is live all the same
        assert page.locator("[data-cjm-lost]").inner_text() == "" and not page.evaluate(grey)
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        page.get_by_text("Disconnected. Showing data from").wait_for()
        assert time.monotonic() - began < 6 and page.evaluate(grey)
        assert page.locator("[data-cjm-lost]").get_attribute("aria-live") == "polite"
        said = page.locator("[data-cjm-lost]").inner_text()
        time.sleep(4)                                  # it tries again, and the time stays
        assert page.locator("[data-cjm-lost]").inner_text() == said
        assert violations(page) == []
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: page.evaluate(f"document.querySelector('[data-cjm-lost]').textContent === '' && !{grey}"))
        ask(url, "?used=30000")
        second(page).locator(".cjm-badge", has_text="▲ external busy").wait_for()


def test_behind_a_prefix_that_a_proxy_removes_pages_are_live_and_a_worker_is_stopped(chromium, new_page, tmp_path):
    port, prefix = free_port(), "/user/ada/proxy/8765"
    command, url = [sys.executable, str(SERVER), str(port), prefix], f"http://127.0.0.1:{port}{prefix}"
    with serving(command, f"{url}/test", tmp_path/"log"):
        paths = ("/resources", "/resources/", "/", "/team/ada")
        pages = [new_page() for _ in paths]
        for page, path in zip(pages, paths, strict=True): page.goto(url + path)
        ask(url, "?temperature=66")
        for page in pages: page.get_by_text("66 °C").wait_for()
        ask_for(pages[0], "10")                               # its streams are below the prefix, too
        pages[0].get_by_text("This reserves no memory.").wait_for()
        page, pid = pages[-1], ask(url)["worker"]
        page.locator(".workers summary").click()
        page.get_by_role("button", name=f"Yes, stop {pid}").click()
        page.wait_for_url(f"{url}/resources")
        wait_until(lambda: page.evaluate("!document.querySelector('.workers')"))
        assert ask(url)["ended"] is not None


def test_a_worker_is_stopped_after_a_question(server, new_page):
    page, pid = new_page(), ask(server)["worker"]
    page.goto(f"{server}/resources")
    page.locator(".workers summary").click()
    ask(server, "?temperature=66")                                  # an update does not close the question
    page.get_by_text("66 °C").wait_for()
    assert ask(server)["ended"] is None
    page.get_by_role("button", name=f"Yes, stop {pid}").click()
    wait_until(lambda: page.evaluate("!document.querySelector('.workers')"))
    assert ask(server)["ended"] is not None


def icon(page) -> str: return page.locator("link[rel=icon]").get_attribute("href")


def test_the_icon_is_red_when_others_use_every_gpu_and_grey_when_the_figures_are_old(chromium, new_page, tmp_path):
    port = free_port()
    command, url, page = [sys.executable, str(SERVER), str(port)], f"http://127.0.0.1:{port}", new_page()
    with serving(command, f"{url}/test", tmp_path/"log"):
        page.goto(f"{url}/resources")
        wait_until(lambda: "1a7f37" in icon(page))                    # green
        ask(url, "?used=40000&first=20000")
        wait_until(lambda: "cf222e" in icon(page))                    # red
        ask(url, "?used=0")
        wait_until(lambda: "1a7f37" in icon(page))
    wait_until(lambda: "6e7781" in icon(page))                        # grey


def test_the_header_says_which_machine_and_of_when_and_is_as_new_as_the_figures(server, new_page):
    page = new_page()
    errors = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{server}/resources")
    assert platform.node() in page.locator("h1").inner_text() and platform.node() in page.title()
    assert "/tutorials/" in page.get_by_role("link", name="Docs").get_attribute("href")
    shown = page.locator("header time").inner_text()
    wait_until(lambda: page.locator("header time").inner_text() != shown)
    moment = page.evaluate("new Date(document.querySelector('header time').dateTime).getTime()")
    assert abs(moment/1000 - time.time()) < 5
    assert errors == []   # the policy lets through what the page needs


def test_a_pause_is_that_of_one_tab_and_closes_its_stream(server, new_page):
    first, second = new_page(), new_page()
    for page in (first, second): page.goto(f"{server}/resources")
    first.get_by_role("button", name="Pause").click()
    first.get_by_text("Paused. Showing data from").wait_for()
    ask(server, "?temperature=61")
    second.get_by_text("61 °C").wait_for()
    time.sleep(1)
    assert first.get_by_text("61 °C").count() == 0 and "6e7781" in icon(first)
    first.get_by_role("button", name="Resume").click()
    first.get_by_text("61 °C").wait_for()
    assert first.locator("[data-cjm-lost]").inner_text() == ""


def test_a_longer_interval_is_that_of_one_tab(server, new_page):
    page = new_page()
    page.goto(f"{server}/resources")
    with page.expect_request("**/resources/stream?every=2"): page.get_by_label("every").select_option("2 s")
    began, seen = time.monotonic(), []
    while time.monotonic() - began < 7:
        ask(server, f"?temperature={30 + len(seen) % 50}")
        now = page.locator(".load").first.inner_text()
        if not seen or now != seen[-1]: seen.append(now)
        time.sleep(0.1)
    assert 2 <= len(seen) <= 8   # not the 28 of a tab that hears each sample
    assert page.locator("[data-cjm-lost]").inner_text() == ""          # and it is live all the time


NOTED = """() => {
    window.noted = [];
    class Noted { constructor(title, options) { window.noted.push([title, options.body]); }
                  static permission = "granted"; static requestPermission() { return Promise.resolve("granted"); } }
    window.Notification = Noted; }"""


def ask_for(page, gib: str) -> None:
    if page.locator("details.tell[open]").count() == 0: page.get_by_text("Notify me when memory is free").click()
    page.get_by_label("GPU memory in GiB").fill(gib)
    page.get_by_role("button", name="Tell me").click()


def test_a_reader_is_told_when_there_is_room_and_that_it_cannot_be(server, new_page):
    page = new_page()
    page.add_init_script(f"({NOTED})()")
    ask(server, "?used=40000")
    page.goto(f"{server}/resources")
    ask_for(page, "30")
    said = page.locator("[data-cjm-said]")
    said.get_by_text("Most free now:").wait_for()
    assert page.evaluate("noted") == [] and "Waiting for 30 GiB" in said.inner_text()
    ask(server, "?used=1000")
    said.get_by_text("This reserves no memory.").wait_for()
    (title, body), = page.evaluate("noted")
    assert title == f"There is room on {platform.node()}" and body in said.inner_text() and "GPU 1 has " in body
    assert page.title().startswith("● ")
    ask_for(page, "100")
    said.get_by_text("is more than the largest GPU has").wait_for()
    assert page.evaluate("noted.length") == 2 and not page.get_by_role("button", name="Stop waiting").is_visible()


def test_a_reader_is_told_in_the_page_where_there_are_no_notifications_and_can_stop_waiting(server, new_page):
    page = new_page()
    page.add_init_script("delete window.Notification")
    ask(server, "?used=40000")
    page.goto(f"{server}/resources")
    ask_for(page, "30")
    page.get_by_text("This browser shows no notifications from here").wait_for()
    page.get_by_role("button", name="Stop waiting").click()
    page.get_by_text("No longer waiting.").wait_for()
    ask(server, "?used=0")
    time.sleep(1)
    assert page.locator("[data-cjm-said]").inner_text() == "No longer waiting."
    ask_for(page, "30")
    page.get_by_text("This reserves no memory.").wait_for()


def test_a_reader_who_leaves_the_browser_s_question_open_is_told_all_the_same(server, new_page):
    page = new_page()
    page.add_init_script("""window.Notification = class { static permission = "default";
                            static requestPermission() { return new Promise(() => {}); } }""")
    page.goto(f"{server}/resources")
    ask_for(page, "100")
    page.get_by_text("is more than the largest GPU has").wait_for()


def test_a_page_of_another_site_cannot_show_it_in_a_frame(server, new_page):
    page = new_page()
    frame = f"<iframe src='{server}/resources'></iframe>"
    page.route("http://other.example/", lambda route: route.fulfill(body=frame, content_type="text/html"))
    page.goto("http://other.example/")
    wait_until(lambda: len(page.frames) == 2 and page.frames[1].url != "about:blank")
    time.sleep(0.5)
    assert page.frames[1].locator("h1").count() == 0 or "GPU and memory" not in page.frames[1].content()


def test_without_a_script_it_is_a_picture_without_controls(server, new_page):
    page = new_page(java_script_enabled=False)
    page.goto(f"{server}/resources")
    second(page).wait_for()
    assert page.locator("header button:visible, header select:visible, header details:visible").count() == 0


WIDTHS = (320, 360, 390, 480, 560, 600, 640, 680, 700, 720, 760, 800, 840, 900, 1000, 1280)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 700, 1280])
def test_everybody_can_read_it(server, new_page, scheme, width):
    page = new_page(width=width, color_scheme=scheme)
    page.goto(f"{server}/resources")
    ask(server, "?used=30000")
    second(page).locator(".cjm-badge", has_text="▲ external busy").wait_for()
    page.get_by_text("Notify me when memory is free").click()
    assert violations(page) == [] and violations(page, "header") == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")   # nothing sticks out
    page.locator(".workers summary").click()
    assert violations(page) == []                                    # with an open question, too


@pytest.mark.parametrize("path", ["/resources", "/"], ids=["the page", "a page of one's own"])
def test_nothing_is_cut_and_nothing_sticks_out_from_320_px_on(server, new_page, path):
    page = new_page()
    page.goto(server + path)
    page.locator(".workers").wait_for()
    found = {}
    for is_open in (False, True):
        if is_open: page.locator(".workers summary").click()
        for width in WIDTHS:
            page.set_viewport_size(dict(width=width, height=900))
            if said := page.evaluate(CUT): found[width, is_open] = said
    assert found == {}


def test_a_table_of_many_hosts_and_containers_keeps_its_process_column(new_page):
    process = OwnedProcess(4_200_101, "app", 2**30, "python3", "bob", parent_pid=4_200_100,
                           parent_worker_type="transcription", container="whisper-container-name")
    page, found = new_page(), {}
    for place in (0, "gpu-host-12:1"):
        page.set_content(to_html(framed(process_table([(place, process)]))))
        for width, room in process_columns(page):
            if room < 44: found[place, width] = room
    assert found == {}


def process_columns(page):
    "The width of a page, and that of the process column there"
    for width in WIDTHS:
        page.set_viewport_size(dict(width=width, height=900))
        yield width, page.get_by_role("columnheader", name="process", exact=True).bounding_box()["width"]


def test_a_table_of_reservations_keeps_its_process_column(new_page):
    page, found = new_page(), {}
    for place in ("0", "0 and 1", "gpu-host-12:1"):
        row = ReservationRow(place, 4_200_101, "app", "llm worker", "studio", "waits, no. 12", 2**34, 12, "5 min")
        page.set_content(to_html(framed(reservation_table([row]))))
        for width, room in process_columns(page):
            if room < 44: found[place, width] = room
    assert found == {}


def test_on_which_gpus_a_worker_s_memory_is_can_be_read(new_page):
    page, found = new_page(), {}
    for held in ({"0:1": 4*2**30}, {0: 12*2**30, 1: 4*2**30}):
        row = to_row(WorkerState(4_200_101, "transcription"), held)
        page.set_content(to_html(framed(worker_table([row]))))
        for width in WIDTHS:
            page.set_viewport_size(dict(width=width, height=900))
            cut = page.locator(".held").last.evaluate("cell => cell.scrollWidth > cell.clientWidth")
            if cut and width >= 390: found[len(held), width] = cut
    assert found == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_another_app_asks_can_be_read_and_answered_at_every_width(new_page, scheme):
    worker = WorkerState(4_200_101, "transcription", loaded_plugin_resource="openai/whisper-large-v3-turbo")
    question = Question(7, 1, ("GPU-0",), "speech", "bob in a-container-name", 2**33, 1, (0,), (worker,), (2**33,))
    page = new_page(color_scheme=scheme)
    page.set_content(f'<main>{to_html(framed(P(str(question), answer_buttons("")(question), cls="asks")))}</main>')
    assert violations(page) == []
    for width in WIDTHS:
        page.set_viewport_size(dict(width=width, height=900))
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
    found = {name: page.get_by_role("button", name=name).get_attribute("value") for name in ("Unload", "Keep")}
    assert found == dict(Unload="7.1.4200101", Keep="7.0.4200101")


def test_a_question_names_the_worker_and_stays_open_while_rows_move(server, new_page):
    page = new_page(width=390)
    page.goto(f"{server}/resources")
    page.locator(".workers summary").click()
    question = page.locator(".workers details")
    pid = ask(server)["worker"]
    assert f"Stop worker {pid} (llm, vllm) and its child processes? It is running job-1." in question.inner_text()
    page.evaluate("document.querySelector('.workers details button').focus()")
    for others in (3, 1, 5):                       # idle workers come and go, and the one at work stays
        ask(server, f"?workers={others}")
        wait_for(page, f"document.querySelectorAll('.workers tbody tr').length === {others + 1}")
    ask(server, "?idle=1")                           # it is idle now, too, so that its row goes to another place
    cells = "[...document.querySelectorAll('.workers tr > td:nth-child(3)')]"
    wait_for(page, f"{cells}.every(td => td.textContent === 'idle')")
    is_open = "[...document.querySelectorAll('.workers details')].map(d => d.open && d.dataset.key)"
    assert [key for key in page.evaluate(is_open) if key] == [page.evaluate("document.activeElement.value")]
    assert page.evaluate("document.activeElement.value").startswith(f"{pid}.")
