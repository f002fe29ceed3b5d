"""Each habit of real drivers × {check, monitor, reserve, validation, pick_gpus, command, JSON, page, metrics}

Nothing raises, nothing is called available whose memory could not be read, and what is said is right. What nvitop and
gpustat show of the same machines is in test_machines.py.
"""
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from click.testing import CliRunner
from conftest import MIB

from cjm_fasthtml_resources.cli import main
from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.core.validation import validate_resources_for_job
from cjm_fasthtml_resources.simulate import PRESETS, make_driver
from cjm_fasthtml_resources.ui.cards import overview, to_html

TRAIN = dict(pid=4_400_001, memory_mb=9_000)
OLDER = [f"nvmlDeviceGet{kind}RunningProcesses_v3" for kind in ("Compute", "Graphics", "MPSCompute")]
OLDEST = [*OLDER, *(call.replace("_v3", "_v2") for call in OLDER)]


@dataclass
class Machine:
    "A machine, and what is right to say of it"
    scenario: dict
    statuses: dict                    # device → status
    used: dict = field(default_factory=dict)   # device → MiB
    fits: float = 4_000               # MiB that a reservation finds
    wakes: bool = False               # the answer of a reservation is that of the GPU once it is awake
    unified: bool = False


def preset(name, statuses, **more): return Machine(PRESETS[name](), statuses, **more)


def server(habits=None, statuses=None, machine=None, **gpu):
    "A GPU of which somebody's job uses 9,000 of 10,000 MiB, and one that is free"
    gpus = [dict(name="NVIDIA L4", memory_total_mb=10_000, processes=[TRAIN], **gpu),
            dict(name="NVIDIA L4", memory_total_mb=10_000, **gpu)]
    machine = dict(memory_total_mb=64_000, memory_used_mb=8_000,
                   processes=[dict(pid=4_400_001, name="train.py", username="bob")]) | (machine or {})
    statuses = statuses or {"0": "external_busy", "1": "available"}
    return Machine(dict(gpus=gpus, machine=machine, habits=habits or {}), statuses, {"0": 9_000, "1": 0})


def one(name, statuses, habits=None, machine=None, faults=(), **gpu):
    known = {key: gpu.pop(key) for key in ("used", "fits", "unified") if key in gpu}
    scenario = dict(gpus=[dict(name=name, **gpu)], habits=habits or {}, faults=list(faults),
                    machine=dict(memory_total_mb=64_000, memory_used_mb=8_000) | (machine or {}))
    return Machine(scenario, {"0": statuses}, **known)


MACHINES = {
    "spark": preset("spark", {"0": "app_busy"}, used={"0": 84_300}, unified=True),
    "jetson": preset("jetson", {"0": "app_busy"}, used={"0": 11_900}, unified=True),
    "laptop": preset("laptop", {"0": "unavailable"}, wakes=True),
    "two-cards": preset("two-cards", {"0": "external_busy", "1": "available"}, used={"0": 5_600, "1": 0}),
    "mig-shared": preset("mig-shared", {"0:0": "app_busy", "0:2": "available", "0:3": "available",   # 0:1 is in 0:0
                                        "0:4": "available"}, used={"0:0": 16_925, "0:2": 17}),
    "slow-start": preset("slow-start", {"0": "available"}, used={"0": 50}),
    "wsl": preset("wsl", {"0": "app_busy"}, used={"0": 9_800}),
    "container": preset("container", {"0": "external_busy"}, used={"0": 17_900}),
    "entries of 32 bytes": server(dict(process_size=32)),
    "no third form of the lists": server(dict(missing=OLDER)),
    "only the first form of the lists": server(dict(missing=OLDEST)),
    "no second form of the memory": server(dict(missing=["nvmlDeviceGetMemoryInfo_v2"])),
    **{f"memory v2 fails with {code}": server(dict(memory_v2_error=code)) for code in (2, 3, 999)},
    "an older pynvml": server(dict(old_pynvml=True)),
    "all at once": server(dict(old_pynvml=True, memory_v2_error=3, missing=OLDER, version="535.98")),
    "a container with its own PIDs": server(machine=dict(pid_namespace=True, local_pids=True)),
    "HMM": server(addressing_mode="HMM"),   # no sign of unified memory
    "Thor": one("NVIDIA Thor", "available", unified=True, used={"0": 8_000}),
    "a GB10 whose driver tells RAM as its memory": one("NVIDIA GB10", "available", memory_total_mb=64_000, used={
        "0": 8_000}, unified=True),
    "N1X": one("NVIDIA N1X", "available", memory_total_mb=8_128, unified=True, used={"0": 8_000}),
    "GH200": one("NVIDIA GH200 480GB", "available", addressing_mode="ATS", memory_total_mb=97_871, memory_used_mb=600,
                 used={"0": 600}),
    "a vGPU without figures": one("GRID V100D-8Q", "unavailable", faults=[
        dict(call=f"nvmlDeviceGetMemoryInfo{form}", error=3) for form in ("", "_v2")]),
    "a full GB10": one("NVIDIA GB10", "external_busy", machine=dict(memory_used_mb=63_000, processes=[
        dict(pid=4_400_001, name="train.py", memory_mb=50_000)]), processes=[dict(pid=4_400_001, memory_mb=50_000)],
        used={"0": 63_000}, fits=500, unified=True),
}
MACHINES["slow-start"].scenario["habits"]["start_delay"] = 0.3   # instead of 8 s
MACHINES["slow-start"].scenario["faults"] = []


def test_every_preset_of_a_habit_is_here():
    assert {"spark", "jetson", "laptop", "two-cards", "mig-shared", "slow-start"} <= set(MACHINES) & set(PRESETS)


@pytest.fixture(params=MACHINES)
def machine(request, folder):
    return MACHINES[request.param]


@pytest.fixture
def driver(machine):
    with make_driver(machine.scenario) as running: yield running


def manager_of(driver, app=None):
    manager = ResourceManager(track_self=False, app=app)
    for worker in driver.workers: manager.register_worker(**worker)
    return manager


def every(conflict): return (*conflict.devices, *conflict.other_instances)


def check_answer(machine, conflict, same_statuses=True):
    "The answer of a check is right, and calls nothing available whose memory could not be read"
    devices = {str(d.device.id): d for d in every(conflict)}
    assert set(devices) == set(machine.statuses)
    for name, d in devices.items():
        known = d.device.memory_used is not None and bool(d.device.memory_total)
        assert known or d.status.value == "unavailable" and d.room == 0 and d.reason
        if same_statuses: assert d.status.value == machine.statuses[name], name
        if name in machine.used and same_statuses: assert d.device.memory_used == machine.used[name]*MIB, name
        if known: assert d.room + d.promised() == d.device.memory_free
        if known: assert sum(d.shares.values()) - d.promised() == d.device.memory_used
        assert d.device.unified == (machine.unified and known)
    assert (conflict.status.value == "available") == ("available" in {d.status.value for d in conflict.devices})


def test_check(machine, driver):
    conflict = manager_of(driver).check_gpu_availability()
    check_answer(machine, conflict)
    pools = {d.device.pool: d.device.memory_free or 0 for d in every(conflict)}
    whole = sum(gpu.memory_total_mb for gpu in driver.gpus)*MIB if not machine.unified else 2**60
    assert sum(pools.values()) <= whole
    assert all(d.processes == () or 0 not in {p.pid for p in d.processes} for d in every(conflict))


def test_monitor(machine, driver):
    monitor = ResourceMonitor(manager_of(driver), interval=3600)
    for _ in range(2): check_answer(machine, monitor.take().gpu)


def free(machine): return [d for d, status in machine.statuses.items() if status in ("available", "app_busy")]


def test_reserve(machine, driver):
    manager = manager_of(driver, "habits")
    if not free(machine) and not machine.wakes and not machine.fits < 1_000:
        with pytest.raises((ResourceBusy, ResourceUnavailable, ValueError)):
            manager.reserve(15_000, timeout=0)   # more than is free anywhere
        return
    with manager.reserve(machine.fits, timeout=5) as gpu:
        assert gpu.env["CUDA_VISIBLE_DEVICES"].startswith(("GPU-", "MIG-"))
        conflict = manager.check_gpu_availability()
        mine = [d for d in every(conflict) if d.promised()]
        assert {d.device.pool for d in mine} and len({d.device.pool for d in mine}) == 1   # in one pool of memory
        assert all(d.promised() == machine.fits*MIB for d in mine)
        for d in mine: assert d.room + d.promised() == d.device.memory_free
    assert not any(d.promised() for d in every(manager.check_gpu_availability()))


class Plugin:
    def is_local_plugin(self): return True
    def get_execution_mode(self): return "in_process"
    def requires_gpu(self): return True


class Registry:
    "One plugin, which needs a GPU"
    def get_plugin(self, plugin): return Plugin()
    def load_plugin_config(self, plugin): return dict(device="cuda")


def test_validation(machine, driver):
    result = validate_resources_for_job(manager_of(driver), Registry(), "whisper", gpu_memory_mb=machine.fits)
    statuses = {d.status.value for d in result.conflict.devices}
    if "available" in statuses: assert result.can_proceed and result.env
    if statuses == {"unavailable"}: assert not result.can_proceed
    assert result.message


def test_pick_gpus(machine, driver):
    manager = manager_of(driver)
    try: choice = manager.pick_gpus(1, machine.fits)
    except (ResourceBusy, ResourceUnavailable) as error:
        assert str(error)
        assert not free(machine) and not machine.wakes
        return
    assert choice.devices[0].memory_free >= machine.fits*MIB
    assert choice.env["CUDA_VISIBLE_DEVICES"] == choice.devices[0].uuid


def run(machine, tmp_path, *options):
    path = tmp_path/"machine.json"
    path.write_text(json.dumps(machine.scenario))
    return CliRunner(env=dict(COLUMNS="200")).invoke(main, ["--simulate", str(path), *options])


def test_command(machine, tmp_path):
    result = run(machine, tmp_path)
    assert result.exit_code == 0 and "Traceback" not in result.output, result.output
    for device in machine.statuses: assert f"GPU {device} " in result.output
    assert ("unified memory" in result.output) == machine.unified


def test_json(machine, tmp_path):
    answer = json.loads(run(machine, tmp_path, "--json").output)["gpu"]
    devices = [*answer["devices"], *answer["other_instances"]]
    for d in devices:
        # the command names no app, so what is the app's is another program's here
        assert d["status"] == "unavailable" or d["memory_total"] and d["memory_used"] is not None
        if str(d["id"]) in machine.used: assert d["memory_used"] == machine.used[str(d["id"])]*MIB
        assert d["unified"] == (machine.unified and d["memory_used"] is not None)
    assert {str(d["id"]) for d in devices} == set(machine.statuses)


def test_page(machine, driver):
    sample = ResourceMonitor(manager_of(driver), interval=3600).take()
    html = to_html(overview(sample))
    for device, status in machine.statuses.items():
        assert f"<b>GPU {device}</b>" in html
        if status == "unavailable": assert "asleep" in html or "does not report its memory" in html
    assert html.count("unified memory") >= machine.unified and "nan" not in html


def test_metrics(machine, driver):
    metrics = pytest.importorskip("cjm_fasthtml_resources.ui.metrics", reason="the extra prometheus is not installed")
    collector = metrics.ResourceCollector(ResourceMonitor(manager_of(driver), interval=3600), processes=True)
    text = metrics.exposition(collector)[0].decode()
    assert "cjm_resources_scrape_errors_total 0.0" in text
    for device, mib in machine.used.items():
        (line,) = [line for line in text.splitlines()
                   if line.startswith(f'cjm_resources_gpu_memory_used_bytes{{gpu="{device}"')]
        assert float(line.split()[-1]) == mib*MIB


# Bad input

@pytest.mark.parametrize("habits, words", [
    (dict(sleeps_on_sundays=True), "habits has no field 'sleeps_on_sundays'; allowed are: process_size"),
    (dict(process_size=40), "process_size must be one of (24, 32), not 40"),
    (dict(start_delay="long"), "start_delay must be float, not 'long'"), ([], "habits must be an object, not []"),
    ("slow", "habits must be an object, not 'slow'")])
def test_a_habit_that_does_not_exist_is_named(habits, words, tmp_path):
    path = tmp_path/"scenario.json"
    path.write_text(json.dumps(dict(habits=habits)))
    result = CliRunner(env=dict(COLUMNS="300")).invoke(main, ["--simulate", str(path)])
    assert result.exit_code == 2 and words in result.output, result.output


# The simulation against programs that know real drivers

SHOW = """
import json, sys
from cjm_fasthtml_resources.simulate import make_driver
with make_driver(json.loads(sys.argv[1])):
    import {module}
    print(json.dumps({code}))
"""
PEERS = dict(
    nvitop="{p.pid: p.gpu_memory() for d in nvitop.Device.all() for p in d.processes().values()}",
    gpustat="{p['pid']: p['gpu_memory_usage'] for g in gpustat.new_query() for p in g.processes}")


def shown_by(peer, scenario):
    "What another program lists, in a process of its own; `None` if it fails"
    if not importlib.util.find_spec(peer): pytest.skip(f"{peer} is not installed")
    code = SHOW.format(module=peer, code=PEERS[peer])
    done = subprocess.run([sys.executable, "-c", code, json.dumps(scenario)], capture_output=True, text=True)
    return None if done.returncode else {int(pid): memory for pid, memory in json.loads(done.stdout).items()}


TWO = dict(gpus=[dict(memory_total_mb=10_000, processes=[dict(pid=4_400_001, memory_mb=900),
                                                         dict(pid=4_400_002, memory_mb=400)])])


@pytest.mark.parametrize("habits", [{}, dict(process_size=32), dict(missing=OLDER), dict(missing=OLDEST)],
                         ids=["today's", "32 bytes", "no third form", "the first form only"])
def test_nvitop_reads_the_lists_of_each_kind_of_driver(habits):
    "It tells 32 bytes by two functions of which such a driver has only the first"
    assert shown_by("nvitop", dict(TWO, habits=habits)) == {4_400_001: 900*MIB, 4_400_002: 400*MIB}


def test_gpustat_shuffles_entries_of_32_bytes(spawn):
    "It takes what nvidia-ml-py reads, entries of 24 bytes; it leaves out processes that do not exist"
    pids = [spawn("input()").pid for _ in range(2)]
    scenario = dict(gpus=[dict(memory_total_mb=10_000, processes=[
        dict(pid=pid, memory_mb=mib) for pid, mib in zip(pids, (900, 400), strict=True)])])
    assert shown_by("gpustat", scenario) == dict(zip(pids, (900, 400), strict=True))
    wrong = shown_by("gpustat", dict(scenario, habits=dict(process_size=32)))
    assert wrong is None or pids[1] not in wrong
    with make_driver(dict(scenario, habits=dict(process_size=32))):
        held = {p.pid: p.memory_used for p in ResourceManager().check_gpu_availability().devices[0].processes}
    assert held == {pids[0]: 900*MIB, pids[1]: 400*MIB}


def test_nvitop_lists_the_processes_of_a_gb10():
    "gpustat fails there, as in its issue 179: see test_machines.py"
    scenario = dict(gpus=[dict(TWO["gpus"][0], name="NVIDIA GB10", unified=True)])
    assert shown_by("nvitop", scenario) == {4_400_001: 900*MIB, 4_400_002: 400*MIB}
