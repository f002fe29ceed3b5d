"""What Prometheus gets: names and units by its conventions, a real server that scrapes it,
and the dashboard's and the tutorial's queries"""
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.simulate import (
    SimulatedDriver,
    SimulatedGpu,
    SimulatedHostProcess,
    SimulatedMachine,
    SimulatedProcess,
)

pytest.importorskip("prometheus_client", reason="the extra prometheus is not installed")
pytest.importorskip("fasthtml", reason="the extra web is not installed")
from cjm_fasthtml_resources.ui.metrics import ResourceCollector, exposition  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT/"nbs"/"tutorials"/"prometheus.ipynb"
HOSTILE = 'a"b\\c\n# TYPE evil gauge\nevil 1\n'


def need(*programs):
    "Prometheus' own programs, which the test command installs where it may"
    missing = [p for p in programs if shutil.which(p) is None]
    if missing and os.environ.get("CI"): pytest.fail(f"{missing} is missing: apt-get install prometheus")
    if missing: pytest.skip(f"{missing} is missing: apt-get install prometheus")


def text_of_tutorial() -> str:
    cells = json.loads(TUTORIAL.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(c["source"]) for c in cells)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of_tutorial(), re.DOTALL)


def scrape(processes: bool = False) -> str:
    machine = SimulatedMachine(processes=[SimulatedHostProcess(4_200_001, HOSTILE, "mallory")])
    gpus = [SimulatedGpu(HOSTILE, processes=[SimulatedProcess(4_200_001, 3_000)]), SimulatedGpu()]
    with SimulatedDriver(gpus, machine):
        manager = ResourceManager()
        manager.register_worker(5_000_000, HOSTILE, plugin_name=HOSTILE, job_id="job-1")
        manager.reserve(1_000)
        return exposition(ResourceCollector(ResourceMonitor(manager), processes))[0].decode()


def samples(text: str) -> set[str]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.partition("{")[0].partition(" ")[0] for line in lines}


def test_promtool_finds_nothing_to_say():
    need("promtool")
    for processes in (False, True):
        check = ["promtool", "check", "metrics"]
        out = subprocess.run(check, input=scrape(processes), capture_output=True, text=True)
        assert (out.returncode, out.stdout, out.stderr) == (0, "", "")


def test_a_hostile_name_is_a_label_and_no_metric():
    text = scrape(processes=True)
    begins = ("cjm_resources_", "# HELP cjm_resources_", "# TYPE cjm_resources_")
    assert all(line.startswith(begins) for line in text.splitlines())
    assert text.count("evil") and "pid=" in text and "pid=" not in scrape()


def test_every_query_of_the_dashboard_and_the_tutorial_is_about_a_metric_that_there_is():
    there = samples(scrape()) | {"cjm_resources_reservation_wait_seconds_bucket"}
    dashboard = (ROOT/"nbs"/"dashboards"/"grafana.json").read_text(encoding="utf-8")
    labels = {"cjm_resources_status", "cjm_resources_gpu_status"}
    for text in (dashboard, text_of_tutorial()):
        named = set(re.findall(r"\bcjm_resources_\w+", text))
        assert named and named <= there | labels, named - there
    left_out = there - set(re.findall(r"\bcjm_resources_\w+", dashboard))
    assert left_out <= {   # what it need not draw
        "cjm_resources_gpu_info", "cjm_resources_gpu_memory_reserved_bytes", "cjm_resources_memory_used_bytes",
        "cjm_resources_reservation_wait_seconds_count", "cjm_resources_reservation_wait_seconds_sum",
        "cjm_resources_user_gpu_processes"}
    panels = json.loads(dashboard)["panels"]
    assert len({p["id"] for p in panels}) == len(panels) and all(t["expr"] for p in panels for t in p["targets"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def running(*command, cwd=None):
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try: yield process
        finally:
            process.terminate()
            process.communicate(timeout=20)


def ask(port: int, path: str):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=10) as answer:
        return json.load(answer)["data"]


def query(port: int, expression: str):
    return ask(port, f"query?{urllib.parse.urlencode(dict(query=expression))}")["result"]


def test_a_real_prometheus_scrapes_it_and_finds_the_busy_gpu(tmp_path):
    need("prometheus", "promtool")
    served, port = free_port(), free_port()
    config, alerts = blocks("yaml")
    assert "localhost:8765" in config
    for text, instead in (("8765", str(served)), ("15s", "1s"), ("    # auth", "    auth"),
                          ("/etc/prometheus/cjm-resources.token", "token")):
        config = config.replace(text, instead)
    (tmp_path/"prometheus.yml").write_text(config)
    (tmp_path/"alerts.yml").write_text(alerts)
    (tmp_path/"token").write_text("secret")
    for kind, name in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        checked = subprocess.run(["promtool", "check", kind, name], cwd=tmp_path, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    program = [sys.executable, "-c", "from cjm_fasthtml_resources.cli import main; main()"]
    command = [*program, "--simulate", "pair", "serve", "--metrics", "--port", str(served), "--token", "secret"]
    server = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data",
              f"--web.listen-address=127.0.0.1:{port}"]
    status = 'cjm_resources_gpu_status{{cjm_resources_gpu_status="{}"}} == 1'.format
    with running(*command), running(*server, cwd=tmp_path):
        end, busy = time.monotonic() + 60, []
        while not busy:
            assert time.monotonic() < end, "Prometheus found nothing"
            time.sleep(0.3)
            with contextlib.suppress(OSError): busy = query(port, status("external_busy"))
        free = query(port, status("available")) + query(port, status("app_busy"))
        assert {r["metric"]["gpu"] for r in busy + free} == {"0", "1"} and len(busy) == 1
        panels = json.loads((ROOT/"nbs"/"dashboards"/"grafana.json").read_text())["panels"]
        asked = [t["expr"] for p in panels for t in p["targets"]]
        asked += re.findall(r"\| `(.+?)` \|", text_of_tutorial())
        assert len(asked) > 15
        for expression in asked:   # each is understood
            query(port, expression.replace("$instance", ".*").replace("$gpu", ".*"))
        alerts = {a["labels"]["alertname"] for a in ask(port, "alerts")["alerts"]}
        assert alerts <= {"GPUHeldByOthers", "GPUUnavailable", "JobsWaitForGPU"}


SCRAPED = """import sys
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
from cjm_fasthtml_resources.ui.metrics import ResourceCollector, exposition
SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]).start()
manager = ResourceManager(app="app")
collector, held = ResourceCollector(ResourceMonitor(manager)), []
for line in sys.stdin:
    what = line.strip()
    if what == "reserve": held.append(manager.reserve(1_000))
    elif what == "release": held.pop().release()
    elif what == "refuse":
        try: manager.reserve(23_900, timeout=0)
        except RuntimeError: pass
    else: print(exposition(collector)[0].decode(), end="", flush=True)
    print("done", flush=True)
"""


class Worker:
    "One of the processes of a server, of which a scrape reaches any"
    def __init__(self, process): self.process = process

    def do(self, what: str) -> str:
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        lines = list(iter(lambda: self.process.stdout.readline() or "done\n", "done\n"))
        assert self.process.poll() is None
        return "".join(lines)

    def counters(self) -> dict[str, float]:
        lines = self.do("scrape").splitlines()
        found = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        shared = ("_total", "_bucket", "_count", "_sum")
        return {name: float(value) for name, _, value in found
                if name.partition("{")[0].endswith(shared)}


def test_counters_never_go_backwards_whichever_process_of_an_app_is_scraped(folder, spawn):
    workers, holders, before = [Worker(spawn(SCRAPED)) for _ in range(3)], [], {}
    steps = ["reserve", "refuse", "reserve", "release", "reserve", "refuse", "release"]
    for number, what in enumerate(steps*2):
        worker = holders.pop() if what == "release" else workers[number % 3]
        if what == "reserve": holders.append(worker)
        worker.do(what)
        for worker in workers:
            now = worker.counters()
            assert len(now) > 15 and all(now[name] >= value for name, value in before.items()), what
            before = now
    assert before["cjm_resources_reservations_granted_total"] == 6
    assert before["cjm_resources_reservation_wait_seconds_count"] == 6
    assert before["cjm_resources_reservations_refused_total"] == 4


def test_a_reservation_that_ends_with_its_process_is_counted_once(folder, spawn):
    first, second = (Worker(spawn(SCRAPED)) for _ in range(2))
    first.do("reserve")
    assert second.counters()["cjm_resources_reservations_ended_total"] == 0
    first.process.kill()
    first.process.wait()
    assert second.counters()["cjm_resources_reservations_ended_total"] == 1   # before it is deleted …
    second.do("reserve")
    assert second.counters()["cjm_resources_reservations_ended_total"] == 1   # … and after
    second.do("release")
    assert second.counters()["cjm_resources_reservations_ended_total"] == 2
    new = Worker(spawn(SCRAPED))
    assert new.counters()["cjm_resources_reservations_ended_total"] == 2      # also after a restart


def test_stops_and_jobs_that_ran_out_of_memory_are_counted(spawn):
    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager()
        process = spawn("input()")
        manager.register_worker(process.pid, "llm")
        manager.stop_worker(process.pid)
        with pytest.raises(MemoryError), manager.job("job-1", 1_000): raise MemoryError("CUDA error: out of memory")
        with pytest.raises(KeyError), manager.job("job-2", 1_000): raise KeyError("another error")
        counts = manager.events.read().counts
    assert (counts["stopped"], counts["out_of_memory"], counts["granted"]) == (1, 1, 2)


def test_hundreds_of_users_have_fifty_labels_and_one_for_the_rest():
    collector, seen = ResourceCollector(ResourceMonitor(ResourceManager(), interval=3600)), set()
    for begin in range(0, 300, 60):
        hosted = [SimulatedHostProcess(4_200_100 + begin + n, "train.py", f"user-{begin + n}") for n in range(60)]
        gpu = SimulatedGpu(processes=[SimulatedProcess(p.pid, 10) for p in hosted])
        with SimulatedDriver([gpu], SimulatedMachine(processes=hosted)):
            collector.monitor.take()
            text = exposition(collector)[0].decode()
        rows = re.findall(r'user_gpu_memory_bytes{user="(.+?)"} (\S+)', text)
        assert sum(float(size) for _, size in rows) == 60*10*2**20
        seen |= {user for user, _ in rows}
    assert len(seen) == 51 and "other" in seen


def test_the_memory_of_each_process_is_an_option_of_the_routes():
    from fasthtml.core import FastHTML
    from starlette.testclient import TestClient

    from cjm_fasthtml_resources.ui.web import make_app, resource_routes
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(4_200_001, 3_000)])]):
        for wanted in (False, True):
            app = FastHTML(secret_key="of a test", default_hdrs=False)
            resource_routes(app, ResourceManager(), metrics="/metrics", process_metrics=wanted)
            own = make_app(ResourceManager(), metrics=True, process_metrics=wanted)
            for served in (app, own):
                text = TestClient(served, base_url="http://localhost").get("/metrics").text
                assert ('pid="4200001"' in text) is wanted


def test_without_the_extra_the_command_says_so_in_words():
    code = "import sys; sys.modules['prometheus_client'] = None\nfrom cjm_fasthtml_resources.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--metrics", "--port", "0"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert out.returncode == 69 and "pip install 'cjm-fasthtml-resources[web,prometheus]'" in out.stderr, out.stderr


def test_without_the_extra_an_app_gets_no_route_at_all(monkeypatch):
    from fasthtml.core import FastHTML

    from cjm_fasthtml_resources.ui.web import resource_routes
    app = FastHTML(secret_key="of a test", default_hdrs=False)
    before = len(app.router.routes)
    monkeypatch.setitem(sys.modules, "cjm_fasthtml_resources.ui.metrics", None)
    with pytest.raises(ImportError): resource_routes(app, ResourceManager(), metrics="/metrics")
    assert len(app.router.routes) == before
