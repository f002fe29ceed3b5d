"What Prometheus gets: names and units by its conventions, a real server that scrapes it, and the dashboard's and the tutorial's queries"
import contextlib, json, os, re, shutil, socket, subprocess, sys, time, urllib.parse, urllib.request
from pathlib import Path

import pytest

from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedHostProcess, SimulatedMachine, SimulatedProcess

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


def text_of_tutorial() -> str: return "\n".join("".join(c["source"]) for c in json.loads(TUTORIAL.read_text(encoding="utf-8"))["cells"])


def blocks(language: str) -> list[str]: return re.findall(rf"```{language}\n(.*?)```", text_of_tutorial(), re.DOTALL)


def scrape(processes: bool = False) -> str:
    machine = SimulatedMachine(processes=[SimulatedHostProcess(4_200_001, HOSTILE, "mallory")])
    with SimulatedDriver([SimulatedGpu(HOSTILE, processes=[SimulatedProcess(4_200_001, 3_000)]), SimulatedGpu()], machine):
        manager = ResourceManager()
        manager.register_worker(4_000_000, HOSTILE, plugin_name=HOSTILE, job_id="job-1")
        manager.reserve(1_000)
        return exposition(ResourceCollector(ResourceMonitor(manager), processes))[0].decode()


def samples(text: str) -> set[str]: return {line.partition("{")[0].partition(" ")[0] for line in text.splitlines() if not line.startswith("#")}


def test_promtool_finds_nothing_to_say():
    need("promtool")
    for processes in (False, True):
        out = subprocess.run(["promtool", "check", "metrics"], input=scrape(processes), capture_output=True, text=True)
        assert (out.returncode, out.stdout, out.stderr) == (0, "", "")


def test_a_hostile_name_is_a_label_and_no_metric():
    text = scrape(processes=True)
    assert all(line.startswith(("cjm_resources_", "# HELP cjm_resources_", "# TYPE cjm_resources_")) for line in text.splitlines())
    assert text.count("evil") and "pid=" in text and "pid=" not in scrape()


def test_every_query_of_the_dashboard_and_the_tutorial_is_about_a_metric_that_there_is():
    there = samples(scrape()) | {"cjm_resources_reservation_wait_seconds_bucket"}
    dashboard = (ROOT/"nbs"/"dashboards"/"grafana.json").read_text(encoding="utf-8")
    labels = {"cjm_resources_status", "cjm_resources_gpu_status"}
    for text in (dashboard, text_of_tutorial()):
        named = set(re.findall(r"\bcjm_resources_\w+", text))
        assert named and named <= there | labels, named - there
    assert there - set(re.findall(r"\bcjm_resources_\w+", dashboard)) <= {  # and the dashboard leaves nothing out but what it need not draw
        "cjm_resources_gpu_info", "cjm_resources_memory_used_bytes", "cjm_resources_reservation_wait_seconds_count", "cjm_resources_reservation_wait_seconds_sum"}
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


def query(port: int, expression: str):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode(dict(query=expression))}", timeout=10) as answer:
        return json.load(answer)["data"]["result"]


def test_a_real_prometheus_scrapes_it_and_finds_the_busy_gpu(tmp_path):
    need("prometheus", "promtool")
    served, port = free_port(), free_port()
    config, alerts = blocks("yaml")
    assert "localhost:8765" in config
    (tmp_path/"prometheus.yml").write_text(config.replace("8765", str(served)).replace("15s", "1s").replace("    # auth", "    auth").replace("/etc/prometheus/cjm-resources.token", "token"))
    (tmp_path/"alerts.yml").write_text(alerts)
    (tmp_path/"token").write_text("secret")
    for kind, name in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        checked = subprocess.run(["promtool", "check", kind, name], cwd=tmp_path, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    command = [sys.executable, "-c", "from cjm_fasthtml_resources.cli import main; main()", "--simulate", "pair", "serve", "--metrics", "--port", str(served), "--token", "secret"]
    server = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}"]
    with running(*command), running(*server, cwd=tmp_path):
        end, busy = time.monotonic() + 60, []
        while not busy:
            assert time.monotonic() < end, "Prometheus found nothing"
            time.sleep(0.3)
            with contextlib.suppress(OSError): busy = query(port, 'cjm_resources_gpu_status{cjm_resources_gpu_status="external_busy"} == 1')
        free = query(port, 'cjm_resources_gpu_status{cjm_resources_gpu_status="available"} == 1') + query(port, 'cjm_resources_gpu_status{cjm_resources_gpu_status="app_busy"} == 1')
        assert {r["metric"]["gpu"] for r in busy + free} == {"0", "1"} and len(busy) == 1
        asked = [t["expr"] for p in json.loads((ROOT/"nbs"/"dashboards"/"grafana.json").read_text())["panels"] for t in p["targets"]]
        asked += re.findall(r"\| `(.+?)` \|", text_of_tutorial())
        assert len(asked) > 15
        for expression in asked: query(port, expression.replace("$instance", ".*").replace("$gpu", ".*"))  # each is understood
        assert {r["labels"]["alertname"] for r in json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/alerts"))["data"]["alerts"]} <= {"GPUHeldByOthers", "GPUUnavailable", "JobsWaitForGPU"}


def test_without_the_extra_the_command_says_so_in_words():
    code = "import sys; sys.modules['prometheus_client'] = None\nfrom cjm_fasthtml_resources.cli import main; main()"
    out = subprocess.run([sys.executable, "-c", code, "serve", "--metrics", "--port", "0"], capture_output=True, text=True, timeout=60)
    assert out.returncode == 69 and "pip install 'cjm-fasthtml-resources[web,prometheus]'" in out.stderr, out.stderr


def test_without_the_extra_an_app_gets_no_route_at_all(monkeypatch):
    from fasthtml.core import FastHTML
    from cjm_fasthtml_resources.ui.web import resource_routes
    app = FastHTML(secret_key="of a test", default_hdrs=False)
    before = len(app.router.routes)
    monkeypatch.setitem(sys.modules, "cjm_fasthtml_resources.ui.metrics", None)
    with pytest.raises(ImportError): resource_routes(app, ResourceManager(), metrics="/metrics")
    assert len(app.router.routes) == before
