"The web server against what a hostile or broken client may send, with real sockets"
import contextlib
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

pytest.importorskip("fasthtml", reason="the extra web is not installed")
uvicorn = pytest.importorskip("uvicorn")

from cjm_fasthtml_resources.ui import gate, web  # noqa: E402


@contextlib.contextmanager
def served(app):
    "The port of a real server on this app"
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listening]))
        thread.start()
        try:
            while not server.started: time.sleep(0.01)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)
    assert not thread.is_alive()


@contextlib.contextmanager
def served_by_command(*options):
    "The port of `cjm-resources serve`, in which nothing is raised"
    main = "from cjm_fasthtml_resources.cli import main; main()"
    command = [sys.executable, "-c", main, "--simulate", "shared", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try: yield int(re.search(r":(\d+)/", process.stdout.readline())[1])
        finally: process.terminate()
        assert "Traceback" not in process.communicate(timeout=10)[1]


def ask(port: int, data: bytes, seconds: float = 10) -> bytes:
    "Send bytes as they are; what comes back until the server closes, or says no more for a moment"
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        with contextlib.suppress(ConnectionError): connection.sendall(data)
        answer = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while piece := connection.recv(65536):
                answer += piece
                connection.settimeout(0.5)
    return answer


def request(path: bytes = b"/resources/fragment", host: bytes = b"localhost", more: bytes = b"") -> bytes:
    return b"GET " + path + b" HTTP/1.1\r\nHost: " + host + b"\r\n" + more + b"Connection: close\r\n\r\n"


def status(answer: bytes) -> int: return int(answer.split(None, 2)[1])


NOT_HERE = (b"evil.example", b"localhost.evil.example", b"127.0.0.1.evil.example", b"evil.example#localhost",
            b"localhost@evil.example", b"[::1", b"[", b"", b"\xff\xfe")
NO_TOKEN = (b"Authorization: Bearer \xff\xfe\r\n", b"Cookie: cjm_resources=\xff; ;;=\r\n", b"Authorization: \r\n",
            b"X-Forwarded-Host: localhost\r\n")


@pytest.mark.parametrize("token", [None, "secret"])
def test_no_request_gets_more_than_it_may_and_none_breaks_the_server(token):
    with served_by_command(*(["--token", token] if token else [])) as port:
        pass_on, refused = (b"Authorization: Bearer secret\r\n", (401, 400)) if token else (b"", (403, 400))
        assert status(ask(port, request(more=pass_on))) == 200
        for host in NOT_HERE: assert status(ask(port, request(host=host))) in refused, host
        for more in NO_TOKEN:
            assert status(ask(port, request(host=b"evil.example", more=more))) in refused, more
        assert status(ask(port, b"NOT HTTP\r\n\r\n")) == 400
        endless = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a"*1_000_000
        answer = ask(port, endless)  # it is not kept
        assert answer == b"" or status(answer) in (400, 431)
        assert status(ask(port, request(more=pass_on))) == 200


def test_nothing_that_is_asked_for_becomes_a_header():
    with served_by_command("--token", "secret") as port:
        head = ask(port, request(b"/resources%0d%0aX-Injected:%20yes?token=secret")).partition(b"\r\n\r\n")[0]
        assert status(head) == 303
        assert not [line for line in head.split(b"\r\n") if line.lower().startswith(b"x-injected")]
        # a redirection stays here
        head = ask(port, request(b"//evil.example/resources?token=secret")).partition(b"\r\n\r\n")[0]
        assert status(head) == 303 and b"\r\nlocation: ./resources\r" in head.lower() + b"\r"
        assert status(ask(port, request(b"/resources?token=%ff%fe"))) == 401


def test_a_form_is_read_only_as_far_as_a_form_goes(monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)
    from fasthtml.core import FastHTML
    app = FastHTML(default_hdrs=False, secret_key="of a test")
    web.resource_routes(app, ResourceManager(), controls=True, guard=lambda req: None)
    head = (b"POST /resources/stop HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: same-origin\r\n"
            b"Content-Type: application/x-www-form-urlencoded\r\nConnection: close\r\n")
    with SimulatedDriver([SimulatedGpu()]), served(app) as port:
        assert status(ask(port, head + b"Content-Length: 8\r\n\r\nworker=x")) == 400  # read, and no worker
        large = b"Content-Length: 1000000000\r\n\r\nworker=" + b"x"*5_000
        assert status(ask(port, head + large)) == 413  # not waited for
        assert status(ask(port, head + b"Transfer-Encoding: chunked\r\n\r\n1388\r\n" + b"x"*5_000 + b"\r\n")) == 413
        page = head.replace(b"POST /resources/stop", b"GET /resources")
        assert status(ask(port, page + b"Content-Length: 9000\r\n\r\n" + b"x"*9_000)) == 413
        began = time.monotonic()
        assert status(ask(port, head + b"Content-Length: 8\r\n\r\nwork")) == 408  # the rest never comes
        assert time.monotonic() - began < 5
        bad = head.replace(b"Sec-Fetch-Site: same-origin", b"Origin: http://[::1")
        assert status(ask(port, bad + b"Content-Length: 8\r\n\r\nworker=x")) == 403
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]  # they say nothing
        assert status(ask(port, request())) == 200
        for connection in slow: connection.close()


def test_a_server_without_a_thread_to_spare_says_so_and_goes_on(monkeypatch):
    "A real refusal by the system, which gives no thread such a stack"
    pytest.importorskip("prometheus_client", reason="the extra prometheus is not installed")
    from fasthtml.core import FastHTML
    app = FastHTML(default_hdrs=False, secret_key="of a test")
    web.resource_routes(app, ResourceManager(), metrics="/metrics")

    @app.get("/mine")
    async def mine(): return web.ResourceCard(ResourceManager())

    paths = (b"/resources", b"/resources/fragment", b"/metrics")
    with SimulatedDriver([SimulatedGpu()]), served(app) as port:
        usual = threading.stack_size(2**46)
        try:
            for path in paths:
                answer = ask(port, request(path))
                assert status(answer) == 503 and b"starting a thread failed (can't start new thread)" in answer
            assert b"The driver has yet to answer." in ask(port, request(b"/mine"))
            assert status(ask(port, request(b"/resources/stream"))) == 200   # it ends, and the browser tries again
        finally: threading.stack_size(usual)
        assert [status(ask(port, request(path))) for path in paths] == [200]*3
        assert b"NVIDIA L4" in ask(port, request(b"/mine"))
