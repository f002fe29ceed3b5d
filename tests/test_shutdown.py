"Servers in processes of their own that are stopped, reloaded and started again while a page is open"
import contextlib
import signal
import time

import pytest

pytest.importorskip("fasthtml", reason="the extra web is not installed")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from servers import (  # noqa: E402
    RELOADING,
    SERVERS,
    UNMADE,
    Tab,
    answer,
    free_port,
    need_server,
    seconds_to_end,
    serving,
    stop,
    wait_until,
    write_app,
)

STOPPED_BELOW = ("gunicorn's own workers", "hypercorn with reload", "granian with reload")   # after they have reloaded
TROUBLE = ("Traceback", "Cancel", "ASGI callable returned", "Killing worker", "did not shut down", "WORKER TIMEOUT")


def trouble(folder) -> list[str]:
    "What a server says where a stream keeps it from its end, or ends badly"
    said = (folder/"log").read_text()
    return [said] if any(words in said for words in TROUBLE) else []


@pytest.mark.parametrize(("name", "pages"), [(name, pages) for name in SERVERS for pages in ("open", "unread")
                                             if (name, pages) not in UNMADE])
def test_ctrl_c_ends_any_server_within_a_second_though_pages_are_open(name, pages, tmp_path):
    "The best of four tries; a server that takes as long without a page has its own time, and half a second"
    tries = []
    while not tries or min(tries) >= 1 and len(tries) < 4:
        tries.append(seconds_to_end(name, pages, tmp_path/f"{pages}-{len(tries)}"))
    if min(tries) < 1: return
    alone = [seconds_to_end(name, "none", tmp_path/f"none-{i}") for i in range(4)]
    assert min(tries) < min(alone) + 0.5, (tries, alone)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize("name", [name for name in SERVERS if name not in STOPPED_BELOW])
def test_a_server_that_a_page_is_open_on_ends_when_it_is_told_to(name, number, tmp_path):
    with serving(need_server(name), tmp_path) as (process, url):
        tabs = [Tab(url) for _ in range(3)]
        assert stop(process, number) < 3      # it takes about 0.3 s where the machine has nothing else to do
        wait_until(lambda: all(tab.ended() for tab in tabs), 10)
        assert [tab.ended()[0] for tab in tabs] == [None]*3   # each stream ended as a whole answer does
        assert trouble(tmp_path) == []


@pytest.mark.parametrize("name", [name for name in SERVERS if name not in RELOADING])
def test_a_wish_that_is_granted_ends_as_a_whole_answer_does(name, tmp_path):
    with serving(need_server(name), tmp_path) as (_, url):
        granted = httpx.get(f"{url}/resources/room", params=dict(size="1GiB"), timeout=20)
        assert granted.status_code == 200 and "event: granted" in granted.text, granted.text
    assert trouble(tmp_path) == []


@pytest.mark.parametrize("name", RELOADING)
def test_an_edit_is_served_while_a_page_is_open_and_the_page_goes_on_after_a_restart(name, tmp_path):
    command, port = need_server(name), free_port()
    with serving(command, tmp_path, port) as (process, url):
        tab = Tab(url)
        assert "NVIDIA 1st" in tab.text and answer(url, "/edition").endswith("1st")
        time.sleep(1)    # reloaders go by the time of the file
        # granian's begins to watch the file after the first answer: where that is too late, it is edited again
        for patience in (30,) if "gunicorn" in name else (8, 16, 30):
            write_app(tmp_path, port, "2nd")
            if "gunicorn" in name: process.send_signal(signal.SIGHUP)   # as `systemctl reload` does
            with contextlib.suppress(AssertionError): wait_until(lambda: "NVIDIA 2nd" in tab.text, patience)
            if "NVIDIA 2nd" in tab.text: break
        assert "NVIDIA 2nd" in tab.text, (tmp_path/"log").read_text()
        wait_until(lambda: answer(url, "/edition").endswith("2nd"), 10)   # old workers may answer for a moment
        # gunicorn's own worker looks once a second, and waits 2 s for connections that are kept for a next request
        number = signal.SIGTERM if "gunicorn" in name else signal.SIGINT
        assert stop(process, number) < (6 if "own" in name else 3)
    write_app(tmp_path, port, "3rd")
    with serving(command, tmp_path, port): wait_until(lambda: "NVIDIA 3rd" in tab.text, 10)
    tab.closed = True
    assert trouble(tmp_path) == []


def test_a_server_that_stops_after_a_number_of_requests_ends(tmp_path):
    with serving([*SERVERS["uvicorn"], "--limit-max-requests", "20"], tmp_path) as (process, url):
        Tab(url)
        for _ in range(20): answer(url, "/edition")
        process.wait(10)
