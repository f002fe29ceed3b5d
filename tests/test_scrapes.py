"Prometheus against gunicorn with three workers: each scrape reaches another process, and no counter goes back"
import contextlib
import json
import urllib.parse
import urllib.request

import pytest

pytest.importorskip("fasthtml", reason="the extra web is not installed")
pytest.importorskip("prometheus_client", reason="the extra prometheus is not installed")
pytest.importorskip("httpx")

from servers import APP, Tab, answer, free_port, need_program, need_server, running, serving, wait_until  # noqa: E402

RESERVE = """
import os
@app.get("/reserve")
def reserve():
    with manager.reserve(100): return str(os.getpid())
"""
CONFIG = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}
scrape_configs: [{{job_name: web, static_configs: [{{targets: ["127.0.0.1:{port}"]}}]}}]
"""
COUNTERS = '{__name__=~"cjm_resources_.*_(total|count|bucket|sum)"}'


def query(port: int, expression: str) -> list[dict]:
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode(dict(query=expression))}"
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10) as found:
        return json.load(found)["data"]["result"]
    return []


def value(port: int, expression: str) -> float | None:
    found = query(port, expression)
    return float(found[0]["value"][1]) if found else None


def test_counters_of_three_workers_never_go_back(tmp_path, folder):
    command, program = need_server("gunicorn with three workers"), need_program("prometheus", "prometheus")
    port = free_port()
    (tmp_path/"app").mkdir()
    (tmp_path/"app"/"page.py").write_text(APP.replace("track_self=False", "track_self=False, app='web'") + RESERVE)
    # as with a longer interval, when Prometheus finds its connection closed and comes to any of the workers
    with serving([*command, "--keep-alive", "0"], tmp_path) as (_, url):
        (tmp_path/"prometheus.yml").write_text(CONFIG.format(port=url.rpartition(":")[2]))
        scraper = [program, "--config.file=prometheus.yml", "--storage.tsdb.path=data",
                   f"--web.listen-address=127.0.0.1:{port}"]
        with running(scraper, tmp_path, "prometheus.log"):
            wait_until(lambda: value(port, "count_over_time(up[1m])"), 30, (tmp_path/"prometheus.log").read_text)
            tab = Tab(url)                                      # a page is open meanwhile
            workers = set()
            while len(workers) < 3 or len(query(port, COUNTERS)) < 3: workers.add(answer(url, "/reserve"))
            seen = value(port, "count_over_time(up[1m])")
            wait_until(lambda: value(port, "count_over_time(up[1m])") >= seen + 20)
            assert value(port, "min_over_time(up[1m])") == 1
            names = {result["metric"]["__name__"] for result in query(port, COUNTERS)}
            assert len(names) >= 3
            back = {name: value(port, f"max(resets({name}[1m]))") for name in names}
            assert back == dict.fromkeys(names, 0)
            assert value(port, "cjm_resources_reservation_wait_seconds_count") >= 3
            tab.closed = True
