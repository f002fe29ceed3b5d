"The page in a browser behind Debian's nginx: with a prefix, everything compressed, and held back"
import sys
import time
from pathlib import Path

import pytest
from helpers import free_port, serving

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from servers import need_program  # noqa: E402
from test_nginx import ALL_COMPRESSED, nginx  # noqa: E402
from test_web import SERVER, ask, second  # noqa: E402


@pytest.fixture
def app(chromium, tmp_path):
    "The port of an app"
    need_program("nginx", "nginx")
    port = free_port()
    with serving([sys.executable, str(SERVER), str(port)], f"http://127.0.0.1:{port}/test", tmp_path/"log"): yield port


def test_behind_nginx_it_is_live_and_a_worker_is_stopped(app, new_page, tmp_path):
    with nginx(tmp_path, app) as (_, url):
        page = new_page()
        for path in ("/resources", "/team/ada"):
            page.goto(url + path)
            degrees = 60 + len(path)
            ask(url, f"?temperature={degrees}")
            page.get_by_text(f"{degrees} °C").wait_for()
        pid = ask(url)["worker"]
        page.locator(".workers summary").click()
        page.get_by_role("button", name=f"Yes, stop {pid}").click()
        page.wait_for_url(f"{url}/resources")
        page.wait_for_function("!document.querySelector('.workers')")


def test_a_proxy_that_holds_the_stream_back_is_said_to_be_no_live_view(app, new_page, tmp_path):
    with nginx(tmp_path, app, f"proxy_ignore_headers X-Accel-Buffering; {ALL_COMPRESSED}") as (_, url):
        page, began = new_page(), time.monotonic()
        page.goto(f"{url}/resources")
        second(page).wait_for()
        assert page.locator("[data-cjm-lost]").inner_text() == ""
        page.get_by_text("Disconnected. Showing data from").wait_for()
        assert time.monotonic() - began < 10
        assert page.evaluate("document.querySelector('[data-cjm-place]').matches('.old')")
