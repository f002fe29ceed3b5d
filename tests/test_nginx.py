"Behind Debian's nginx, with a prefix that it removes: buffering as it is by default, and everything compressed"
import contextlib
import re
import signal
import time
from pathlib import Path
from urllib.parse import urljoin

import pytest

pytest.importorskip("fasthtml", reason="the extra web is not installed")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from servers import (  # noqa: E402
    SERVERS,
    Tab,
    answer,
    free_port,
    need_program,
    running,
    serving,
    stop,
    wait_until,
    write_app,
)

# `gzip on` is what Debian's nginx.conf has; by default only pages are compressed
CONFIG = """
daemon off;
pid {folder}/nginx.pid;
error_log stderr;
events {{ }}
http {{
    access_log off;
    {temporary}
    gzip on;
    {options}
    server {{
        listen 127.0.0.1:{port};
        location {prefix}/ {{ proxy_pass http://127.0.0.1:{app}/; }}
    }}
}}
"""
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
PREFIX = "/team/gpus"
ALL_COMPRESSED = "gzip_types *; gzip_proxied any; gzip_min_length 0;"


@contextlib.contextmanager
def nginx(folder: Path, app: int, options: str = ALL_COMPRESSED, port: int | None = None):
    "An nginx before the app at a port, and the address of the app there"
    program, port = need_program("nginx", "nginx"), port or free_port()
    temporary = "\n    ".join(f"{name}_temp_path {folder}/{name};" for name in TEMPORARY)
    config = CONFIG.format(folder=folder, temporary=temporary, options=options, port=port, prefix=PREFIX, app=app)
    (folder/"nginx.conf").write_text(config)
    command = [program, "-p", str(folder), "-e", "stderr", "-c", str(folder/"nginx.conf")]
    with running(command, folder, "nginx.log") as process:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answer(url, PREFIX) is not None, 20, (folder/"nginx.log").read_text)
        yield process, url + PREFIX


@pytest.fixture
def app(tmp_path):
    "An app on uvicorn, and its port"
    port = free_port()
    with serving(SERVERS["uvicorn"], tmp_path, port): yield port


@pytest.mark.parametrize("options", ["", ALL_COMPRESSED], ids=["Debian's", "everything compressed"])
def test_the_stream_is_heard_while_it_goes_on(app, tmp_path, options):
    with nginx(tmp_path, app, options) as (_, url):
        page = httpx.get(f"{url}/resources", headers={"Accept-Encoding": "gzip"})
        assert page.headers["content-encoding"] == "gzip" and "NVIDIA 1st" in page.text
        for found in re.findall(r"(?:src|data-cjm-stream)=([\w./-]+)", page.text.replace('"', "")):
            with httpx.stream("GET", urljoin(f"{url}/resources", found)) as response: assert response.status_code == 200
        tab = Tab(url, **{"Accept-Encoding": "gzip"})
        began, first = time.monotonic(), len(tab.events)
        wait_until(lambda: len(tab.events) >= first + 3, 8)   # one a second
        assert time.monotonic() - began < 6 and tab.errors == []
        tab.closed = True


def test_a_page_goes_on_when_the_app_and_when_nginx_is_started_again(tmp_path):
    port, public = free_port(), free_port()
    with serving(SERVERS["uvicorn"], tmp_path, port) as (server, _), nginx(tmp_path, port, port=public) as (proxy, url):
        tab = Tab(url)
        proxy.send_signal(signal.SIGHUP)            # nginx reads its configuration again; its old workers go on
        time.sleep(0.5)
        assert answer(url, "/edition").endswith("1st")
        assert stop(server, signal.SIGTERM) < 3     # with the page open through nginx
        write_app(tmp_path, port, "2nd")
        with serving(SERVERS["uvicorn"], tmp_path, port):
            wait_until(lambda: "NVIDIA 2nd" in tab.text, 15)
            stop(proxy, signal.SIGTERM)
            heard = len(tab.events)
            with nginx(tmp_path, port, port=public): wait_until(lambda: len(tab.events) > heard, 10)
            tab.closed = True


def test_the_command_s_server_leads_to_its_page_below_the_prefix(tmp_path):
    port = free_port()
    command = [*SERVERS["the command"], "--token", "a b"]
    with running([part.format(port=port) for part in command], tmp_path), nginx(tmp_path, port) as (_, url):
        wait_until(lambda: (answer(url, "/") or "").startswith("This server needs its token"), 30)
        with httpx.Client(follow_redirects=True) as browser:
            entered = browser.get(f"{url}/", params=dict(token="a b"))
            assert (entered.status_code, str(entered.url)) == (200, f"{url}/resources")
            assert [cookie.path for cookie in browser.cookies.jar] == [PREFIX]
            assert browser.get(urljoin(f"{url}/resources", "resources/live")).status_code == 200
