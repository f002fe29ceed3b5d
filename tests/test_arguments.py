"""Each public entrance refuses what it cannot carry, by the argument's name

What is refused changes nothing, and what was returned changes nothing either.
"""
import copy
import math
from types import SimpleNamespace

import pytest
from conftest import warned
from hypothesis import given
from hypothesis import strategies as st

from cjm_fasthtml_resources.core.copies import copy_config, copy_in_depth
from cjm_fasthtml_resources.core.gpu import read_gpus
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.core.validation import validate_resources_for_job
from cjm_fasthtml_resources.simulate import ScenarioError, SimulatedDriver, SimulatedGpu, load_scenario, make_driver

ENDLESS = [math.inf, -math.inf, math.nan, 10**400, -10**400, 10**5000, 1e300]
PIDS = [0, -1, 2**31, 2**32 - 1, 10**400, 10**5000, True, 1.0, "7", None, math.nan]
TEXTS = ["a\0b", "\ud800", "a\udfff", "x"*5000, "ä"*3_000_000, 5, b"a", ["a"]]
TOO_DEEP: list = []
TOO_DEEP.append(TOO_DEEP)
DEEP: dict = {}
for _ in range(2000): DEEP = {"a": DEEP}
WIDE: list = []
for _ in range(40): WIDE = [WIDE, WIDE]
CONFIGS = [{1: 2}, {None: 1}, {b"a": 1}, {("a",): 1}, {"a": TOO_DEEP}, DEEP, {"a": WIDE}, {"a": "x"*2_000_000},
           {"a\0": 1}, {"a": "\udc80"}, {"a": {"b": ["c\0"]}}, {"a": {None: 1}}, {"x"*2_000_000: 1},
           "x", [("a", 1)], 5]
BAD = (TypeError, ValueError)


def kind_of(value) -> str: return type(value).__name__   # pytest cannot write 5000 digits


class Registry:
    def get_plugin(self, plugin_id): return {"name": "llama"}
    def load_plugin_config(self, plugin_id): return {"model": "m", "device": "cuda"}


def refused(name, call, *args, **kw):
    "It raises, in a short sentence that names the argument, and the message has no part of a huge value"
    with pytest.raises(BAD) as raised: call(*args, **kw)
    text = str(raised.value)
    assert name in text and len(text) < 400 and text.isprintable(), text
    assert "digits) for integer string" not in text


@pytest.fixture
def manager():
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24576)]):
        made = ResourceManager(track_self=False)
        made.register_worker(5_000_001, "llm", "job", config={"model": "m"})
        before = made.get_all_workers(), made.get_claims()
        yield made
        assert (made.get_all_workers(), made.get_claims()) == before


@pytest.mark.parametrize("pid", PIDS, ids=kind_of)
def test_pids(manager, pid):
    calls = [manager.get_worker_by_pid, manager.unregister_worker, manager.update_worker_state,
             manager.refresh_worker, manager.stop_worker, lambda pid: manager.register_worker(pid, "llm")]
    for call in calls: refused("pid", call, pid)
    refused("pid", manager.get_all_related_pids, pid)
    if pid is not None:
        refused("pid", manager.reserve, 100, timeout=0, pid=pid)
        refused("pid", validate_resources_for_job, manager, Registry(), "p", worker_pid=pid)
    refused("n", manager.pick_gpus, pid)


@pytest.mark.parametrize("number", [*ENDLESS, "5", True, [1]], ids=kind_of)
def test_numbers(manager, number):
    refused("gpu_memory_mb", manager.register_worker, 5, "llm", gpu_memory_mb=number)
    refused("gpu_memory_mb", manager.update_worker_state, 5_000_001, gpu_memory_mb=number)
    for call in (manager.reserve, manager.request, manager.wait_for_gpu):
        refused("gpu_memory_mb", call, number, timeout=0)
    for name in ("timeout", "ttl"): refused(name, manager.reserve, 100, **{name: number})
    refused("min_free_mb", manager.pick_gpus, 1, number)
    refused("mb", manager.free_gpu, number)
    refused("grace", manager.free_gpu, 1, grace=number)
    refused("grace", manager.stop_worker, 5, grace=number)
    refused("threshold_percent", manager.check_memory_availability, number)
    refused("duration_hours", manager.estimate_total_cloud_cost, number)
    for name in ("gpu_memory_mb", "memory_threshold_percent"):
        refused(name, validate_resources_for_job, manager, Registry(), "p", **{name: number})
    refused("gpu_memory_threshold_percent", ResourceManager, number)
    refused("gpu_timeout", ResourceManager, gpu_timeout=number)
    refused("gpu_timeout", ResourceManager.from_config, {"gpu_timeout": number})
    refused("interval", ResourceMonitor, manager, number)
    refused("history", ResourceMonitor, manager, history=number)
    refused("timeout", read_gpus, number)


@pytest.mark.parametrize("number", [*ENDLESS, -1, 101, "5", True, None], ids=kind_of)
def test_settings_are_checked_when_they_are_assigned(manager, number):
    monitor = ResourceMonitor(manager)
    refused("gpu_memory_threshold_percent", setattr, manager, "gpu_memory_threshold_percent", number)
    if number != 101: refused("gpu_timeout", setattr, manager, "gpu_timeout", number)
    if number != 101: refused("interval", setattr, monitor, "interval", number)
    assert (manager.gpu_memory_threshold_percent, manager.gpu_timeout, monitor.interval) == (45.0, 5.0, 1.0)


@pytest.mark.parametrize("text", TEXTS, ids=kind_of)
def test_texts(manager, text):
    refused("worker_type", manager.register_worker, 5, text)
    for name in ("job_id", "plugin_id", "plugin_name", "loaded_plugin_resource"):
        refused(name, manager.register_worker, 5, "llm", **{name: text})
        refused(name, manager.update_worker_state, 5_000_001, **{name: text})
    refused("status", manager.update_worker_state, 5_000_001, status=text)
    refused("job_id", manager.get_worker_by_job, text)
    for call in (manager.get_workers_by_type, manager.has_worker_type): refused("worker_type", call, text)
    refused("plugin_name", manager.expected_gpu_memory_mb, text)
    refused("resource", manager.expected_gpu_memory_mb, "p", text)
    refused("app", ResourceManager, app=text)
    refused("config", ResourceManager.from_config, {text if isinstance(text, str) else 5: 1})
    for name in ("plugin_id", "worker_type"):
        refused(name, validate_resources_for_job, manager, Registry(), **{"plugin_id": "p", name: text})
    if text != 5: refused("device", manager.reserve, 100, text, timeout=0)


DEVICES = [10**400, 10**5000, -1, 7, "9"*400, "cuda:" + "9"*5000, 1.5, True, object(), "x"*10**6]


@pytest.mark.parametrize("device", DEVICES, ids=kind_of)
def test_devices(manager, device, monkeypatch):
    refused("device", manager.reserve, 100, device, timeout=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9"*5000)
    assert manager.check_gpu_availability().reason


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_configs(manager, number):
    config = CONFIGS[number]
    refused("config", manager.register_worker, 5, "llm", config=config)
    refused("config", manager.update_worker_state, 5_000_001, config=config)
    refused("plugin_config", validate_resources_for_job, manager, Registry(), "p", config)


def test_snapshots_and_callbacks(manager):
    for bad in ({}, "x", 5): refused("snapshot", manager.check_gpu_availability, snapshot=bad)
    refused("snapshot", manager.judge, None)
    refused("callback", ResourceMonitor(manager).subscribe, None)
    refused("manager", ResourceMonitor, None)


# What was given and what is returned


def test_a_config_that_was_given_or_returned_changes_nothing(manager):
    mine = {"a": [1, {"b": {2}}], "c": SimpleNamespace(d=[3])}
    manager.register_worker(5_000_007, "llm", config=mine)
    kept = copy.deepcopy(mine)
    mine["a"][1]["b"].add(5)
    mine["c"].d.append(5)
    for get in (lambda: manager.get_worker_by_pid(5_000_007), lambda: manager.get_all_workers()[-1],
                lambda: manager.update_worker_state(5_000_007, job_id="x"), lambda: manager.get_worker_by_job("x"),
                lambda: manager.get_workers_by_type("llm")[-1], lambda: manager.refresh_worker(5_000_007)):
        found = get()
        assert found.config == kept
        found.config["a"][1]["b"].clear()
        found.config["c"].d.clear()
        found.config.clear()
        found.child_pids.append(9)
        assert get().config == kept and get().child_pids == []
    assert manager.unregister_worker(5_000_007).config == kept


def test_what_a_plugin_gave_or_was_shown_changes_nothing():
    rented, children = {"provider": "x", "region": "eu"}, [5_099_001]
    plugin = SimpleNamespace(get_child_pids=lambda: children, get_remote_resource_info=lambda: rented)
    manager = ResourceManager(track_self=False)
    worker = manager.register_worker(5_000_007, "llm", plugin_instance=plugin)
    children.append(5)
    worker.child_pids.append(6)
    worker.remote_resource["region"] = rented["region"] = "us"
    manager.get_all_app_pids_including_children().add(8)
    found = manager.get_worker_by_pid(5_000_007)
    assert (found.child_pids, found.remote_resource["region"]) == ([5_099_001], "eu")
    assert manager.get_all_app_pids_including_children() == {5_000_007, 5_099_001}
    assert manager.get_all_related_pids(5_000_007) == [5_000_007, 5_099_001]


def test_the_lists_of_an_answer_are_the_readers_own():
    with load_scenario("pair") as driver:
        manager = ResourceManager(track_self=False)
        for worker in driver.workers: manager.register_worker(**worker)
        monitor = ResourceMonitor(manager)
        monitor.take()
    for read in (lambda: monitor.latest.gpu, lambda: monitor.latest.memory):
        before = copy.deepcopy(read())
        for name in ("app_pids", "external_pids", "app_processes", "external_processes"): getattr(read(), name).clear()
        for row in read().app_processes: row.clear()
        assert read() == before
    point = monitor.history.points[0]
    point.devices.clear()
    assert len(monitor.history.points[0].devices) == 2


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)


def hold(inner):
    "Containers of values"
    space = st.builds(lambda a: SimpleNamespace(a=a), inner)
    names = st.text(max_size=4)
    return st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3) | st.tuples(inner, inner) | space


deep = st.recursive(plain, hold, max_leaves=10)


@given(st.dictionaries(st.text(max_size=4), deep, max_size=4))
def test_a_copy_is_the_same_and_shares_no_container(config):
    try: found = copy_config(config)
    except ValueError as error: assert "config" in str(error)   # NUL, half a character
    else: assert repr(found) == repr(config) == repr(copy_in_depth(found)) and found is not config


# What plugins say


class Says:
    "A plugin whose answers the test sets"
    def __init__(self, **answers): self.answers = answers

    def __getattr__(self, name):
        if name.startswith("__") or name not in self.answers: raise AttributeError(name)
        answer = self.answers[name]
        if isinstance(answer, Exception): raise answer
        return lambda *args: answer


class Evil:
    def __str__(self): raise RuntimeError("no text")
    def __getattr__(self, name): raise RuntimeError("no attribute")


METHODS = ["get_child_pids", "get_execution_mode", "get_managed_resources", "get_remote_resource_info", "estimate_cost"]
ODD = [*ENDLESS, *TEXTS, *CONFIGS[:5], object(), Evil(), RuntimeError("no"), {1, 2}, None, True]


@pytest.mark.parametrize("number", range(len(ODD)))
def test_what_a_plugin_says_is_left_out_or_kept_and_never_raises(number, caplog):
    odd = ODD[number]
    for name in METHODS:
        for answer in (odd, [odd], dict.fromkeys(["container_id", "region", "estimated_cost_per_hour"], odd)):
            manager = ResourceManager(track_self=False)
            worker = manager.register_worker(5_000_007, "llm", plugin_instance=Says(**{name: answer}))
            assert all(0 < pid < 2**31 for pid in worker.child_pids)
            for text in (worker.execution_mode, worker.container_id, worker.conda_env):
                assert text is None or len(text.encode()) <= 4 * 4096 and "\0" not in text
            for value in (worker.remote_resource or {}).values():
                assert value is None or isinstance(value, (str, bool)) or 0 <= value <= 1e12
            assert math.isfinite(manager.estimate_total_cloud_cost(2))
            assert len(repr(worker)) < 60_000 and worker._repr_html_()
    assert all(len(text) < 400 for text in warned(caplog))


# Pages and clusters


@pytest.mark.parametrize("token", ["", "x"*5000, "a\0", "\udc80", 5])
def test_a_token_that_no_visitor_could_send_is_refused_and_not_shown(token):
    pytest.importorskip("starlette")
    from cjm_fasthtml_resources.ui.gate import Gate
    refused("token", Gate, None, token)


def test_paths_of_a_page():
    fasthtml = pytest.importorskip("fasthtml.core")
    from cjm_fasthtml_resources.ui.web import resource_routes
    app = fasthtml.FastHTML(secret_key="x")
    for bad in ("/a\0", "/\udc80", "/" + "x"*10**6, 5, "a"):
        for name in ("prefix", "metrics"): refused(name, resource_routes, app, ResourceManager(), **{name: bad})


@pytest.mark.parametrize("app", ["", "a b", "x"*10**6, "1", 5, None, "a\0"])
def test_the_name_of_a_clusters_app_is_checked_before_it_is_sent(app):
    pytest.importorskip("distributed")
    from cjm_fasthtml_resources.hosts.worker import HostPlugin
    refused("app", HostPlugin, app, {})


# Simulated machines


@pytest.mark.parametrize("number", ENDLESS, ids=kind_of)
@pytest.mark.parametrize("field", ["memory_total_mb", "memory_used_mb", "power_usage", "temperature"])
def test_a_scenario_has_numbers_that_a_driver_could_have(number, field):
    for scenario in ({"gpus": [{field: number}]}, {"gpus": [{"mig": [{field: number}]}]}):
        with pytest.raises(ScenarioError) as raised: make_driver(scenario)
        assert field in str(raised.value) and len(str(raised.value)) < 200
    gpu = SimulatedGpu()
    with pytest.raises(ScenarioError, match=field): setattr(gpu, field, number)
    with SimulatedDriver([gpu]) as driver, pytest.raises(ScenarioError), driver.allocate(number): pass


def test_other_parts_of_a_scenario():
    for scenario in (TOO_DEEP, {"gpus": TOO_DEEP}, DEEP, {"gpus": [{"name": "x"*10**7}]}, {"gpus": [{"uuid": "a\0"}]},
                     {"machine": {"memory_total_mb": math.inf}}, 10**5000, {10**5000: 1},
                     {"faults": [{"call": "x"*10**6}]},
                     {"machine": {"processes": [{"pid": 10**400, "name": "x"}]}},
                     {"faults": [{"call": "*", "delay": math.nan}]}):
        with pytest.raises(ScenarioError) as raised: make_driver(scenario)
        assert len(str(raised.value)) < 6000


def test_a_file_that_is_too_deep_to_read_is_an_error_in_words(tmp_path):
    path = tmp_path/"deep.json"
    path.write_text("["*100_000)
    with pytest.raises(ScenarioError, match="cannot read the scenario"): load_scenario(str(path))


# The command


@pytest.mark.parametrize("args", [
    ["wait", "--gpu-memory", "9"*400], ["wait", "--gpu-memory", "9"*5000 + "GiB"],
    ["wait", "--gpu-memory", "1"*20 + "TiB"],
    ["wait", "--gpu-memory", "1MiB", "--timeout", "9"*400], ["wait", "--gpu-memory", "1MiB", "--device", "9"*5000],
    ["--app", "9"*5000], ["--app", "4294967296"], ["--interval", "nan"], ["--threshold", "nan"], ["--top", "9"*5000]])
def test_the_command_says_what_is_wrong_in_a_line(args, capsys, folder, monkeypatch):
    from cjm_fasthtml_resources.cli import main
    with pytest.raises(SystemExit) as raised: main(["--simulate", "idle", *args])
    said = capsys.readouterr().err
    assert raised.value.code == 2 and "Error: " in said and "digits) for integer string" not in said
