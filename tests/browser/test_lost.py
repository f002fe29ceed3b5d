"Old figures never look live on a page: no script, a proxy that holds back, a session that has ended, a hidden tab"
import re
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import free_port, serving, violations, wait_for, wait_until
from test_web import ask, second

SERVER = Path(__file__).with_name("ended.py")


@pytest.fixture(scope="module")
def server_of_all(chromium, tmp_path_factory):
    "The address of an app, in a process of its own"
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("lost")/"log"
    with serving([sys.executable, str(SERVER), str(port)], f"{url}/test", log): yield url


@pytest.fixture
def server(server_of_all):
    "Its address, where everybody is logged in"
    ask(server_of_all, "?session=")
    return server_of_all


GREY = """() => getComputedStyle(document.querySelector('.cjm .banner')).textDecorationLine === 'line-through'"""


def is_lost(page) -> bool:
    "Whether the figures are grey, with a line that is seen and names a time"
    seen = page.locator("[data-cjm-lost], [data-cjm-lost] .told").locator("visible=true")
    lines = [line.inner_text() for line in seen.all()]
    return page.evaluate(GREY) and any(re.search(r"Showing data from .*\d\d?:\d\d:\d\d", line) for line in lines)


@pytest.mark.parametrize("path", ["/resources", "/"], ids=["the page", "a page of one's own"])
def test_a_page_whose_script_does_not_load_says_so_within_three_intervals(server, new_page, path):
    page = new_page()
    page.route("**/resources/live", lambda route: route.abort())
    page.goto(server + path)
    assert not is_lost(page) and page.locator(".told").count() == 1
    began = time.monotonic()
    wait_until(lambda: is_lost(page), 6)
    assert time.monotonic() - began < 3.5
    said = page.locator("[data-cjm-lost]").inner_text()
    assert re.fullmatch(r"Not live\. Showing data from \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \w+\.", said)
    assert violations(page) == []


def test_a_page_without_scripts_at_all_says_so_too(server, new_page):
    page = new_page(java_script_enabled=False)
    page.goto(f"{server}/resources")
    page.locator(".told").wait_for(timeout=6000)       # it is seen now
    assert "Not live. Showing data from" in page.locator("[data-cjm-lost]").inner_text()


class Proxy:
    "A proxy that passes pages on at once, and holds back what a stream says for some seconds"
    def __init__(self, server: str, seconds: float) -> None:
        self.server, self.seconds, self.front = server, seconds, ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.front.server_port}"
        threading.Thread(target=self.front.serve_forever, daemon=True).start()

    def handler(self):
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_): pass

            def do_GET(self):
                with urllib.request.urlopen(proxy.server + self.path, timeout=30) as answer, suppress(OSError):
                    self.send_response(answer.status)
                    self.send_header("Content-Type", answer.headers["Content-Type"])
                    self.end_headers()
                    if self.path.endswith("/stream"): self.hold_back(answer)
                    else: self.wfile.write(answer.read())

            def hold_back(self, answer):
                held = []
                while data := answer.read1(65536):
                    held.append((time.monotonic(), data))
                    while held and held[0][0] < time.monotonic() - proxy.seconds: self.wfile.write(held.pop(0)[1])

        return Handler


@pytest.mark.parametrize("seconds", [1e9, 4], ids=["everything", "four seconds"])
def test_a_proxy_that_holds_the_stream_back_does_not_make_old_figures_look_live(server, new_page, seconds):
    proxy, page = Proxy(server, seconds), new_page()
    page.goto(f"{proxy.url}/resources")
    wait_for(page, "!document.querySelector('.cjm').matches('.ages')")   # the script runs
    wait_until(lambda: is_lost(page), 5)
    seen, end = [], time.monotonic() + 5
    while time.monotonic() < end:
        seen.append(is_lost(page))
        time.sleep(0.1)
    assert all(seen)
    proxy.front.shutdown()


def test_a_session_that_has_ended_asks_to_log_in_again(server, new_page):
    page = new_page()
    page.goto(f"{server}/resources")
    second(page).wait_for()
    for end in ("401", "403", "login"):
        ask(server, f"?session={end}")
        page.get_by_role("link", name="log in again").wait_for()
        wait_until(lambda: is_lost(page), 5)
        assert "Your session has ended: log in again." in page.locator("[data-cjm-lost]").inner_text()
        assert violations(page) == []
        ask(server, "?session=")                                    # somebody logged in, in another tab
        wait_for(page, "document.querySelector('[data-cjm-lost]').textContent === ''")
        assert not is_lost(page)
    ask(server, "?session=401")
    page.get_by_role("link", name="log in again").click()
    page.get_by_text("Log in, please").wait_for()
    ask(server, "?session=")


def test_a_tab_that_comes_back_after_a_while_is_grey_until_there_are_new_figures(server, new_page):
    page = new_page()
    page.goto(f"{server}/resources")
    second(page).wait_for()
    hide = """hidden => {
        Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
        document.dispatchEvent(new Event('visibilitychange')); }"""
    page.evaluate(hide, True)
    time.sleep(4)
    page.route("**/resources/stream", lambda route: None)           # no answer comes
    page.evaluate(hide, False)
    wait_for(page, GREY, timeout=1000)
    page.unroute_all()
