"""The report of a machine, written beneath the simulated driver, and read as a simulated machine again"""
import getpass
import json
import os
import platform
import re
import subprocess
import sys

import pynvml
import pytest
from click.testing import CliRunner
from conftest import MIB, ROOT

sys.path.insert(0, str(ROOT/"tests"/"gpu"))
import report as writer  # noqa: E402  (in a folder of its own)

from cjm_fasthtml_resources.cli import main  # noqa: E402
from cjm_fasthtml_resources.core.manager import ResourceManager  # noqa: E402
from cjm_fasthtml_resources.simulate import (  # noqa: E402
    PRESETS,
    ScenarioError,
    SimulatedDriver,
    SimulatedGpu,
    make_driver,
)
from cjm_fasthtml_resources.simulated.scenarios import find_scenario, parse_scenario, state_names  # noqa: E402


def every(conflict): return (*conflict.devices, *conflict.other_instances)


def written() -> dict:
    "A report of what is simulated now, as it stands in a file; CUDA's own library is not simulated"
    return json.loads(json.dumps(writer.make_report()))


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch):
    monkeypatch.setattr(writer, "cuda_order", lambda aliases, count: [])


def seen():
    "What the library sees of a machine, without UUIDs and PIDs"
    conflict = ResourceManager(track_self=False).check_gpu_availability()
    return [(d.device.id, d.device.name, d.status, d.shares, d.room, d.device.reason, d.device.unified,
             d.device.asleep, d.device.gpu_instance, d.device.compute_capability, d.device.utilization,
             sorted((p.kind, p.memory_used or 0) for p in d.processes)) for d in every(conflict)], conflict.notes


HABITS = [dict(process_size=32), dict(memory_v2_error=3), dict(missing=["nvmlDeviceGetMemoryInfo_v2"]),
          dict(missing=[f"nvmlDeviceGet{kind}RunningProcesses_v3" for kind in ("Compute", "Graphics", "MPSCompute")])]
MACHINES = {**{name: make() for name, make in PRESETS.items() if name != "slow-start"},
            **{name: find_scenario(name) for name in state_names()},
            **{str(habits): dict(PRESETS["pair"](), habits=habits) for habits in HABITS}}


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_is_the_same_after_its_report_was_loaded(name):
    with make_driver(MACHINES[name]): before = seen()
    with make_driver(MACHINES[name]): report = written()
    with make_driver(report): assert seen() == before


def test_a_first_call_that_takes_long_is_a_habit():
    with make_driver(dict(PRESETS["slow-start"](), habits=dict(start_delay=1.2))): report = written()
    assert 1.2 <= parse_scenario(report)["habits"].start_delay < 5


def test_a_gpu_that_is_lost_and_a_driver_that_does_not_start_are_in_it():
    with SimulatedDriver([SimulatedGpu("first"), SimulatedGpu("second")]) as driver:
        driver.fail("nvmlDeviceGetHandleByIndex_v2", pynvml.NVML_ERROR_GPU_IS_LOST, gpu=1)
        report = written()
    assert report["devices"][1] == dict(index=1, asleep=False, error=15)
    with make_driver(report):
        assert [d.status.value for d in ResourceManager().check_gpu_availability().devices] == [
            "available", "unavailable"]
    with SimulatedDriver() as driver:
        driver.fail("nvmlInitWithFlags", pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
        report = written()
    assert "different versions" in report["reason"]
    with make_driver(report): assert "different versions" in ResourceManager().check_gpu_availability().message


def test_a_driver_that_hangs_is_named_with_the_call():
    with SimulatedDriver([SimulatedGpu()]) as driver:
        driver.hang("nvmlDeviceGetPowerUsage")
        report = json.loads(json.dumps(writer.make_report(limit=0.3)))
        driver.recover()
    assert report["reason"] == "the driver did not answer nvmlDeviceGetPowerUsage within 0.3 s"
    assert len(report["devices"]) == 1
    with make_driver(report): assert ResourceManager().check_gpu_availability().status.value == "unavailable"


def test_an_answer_that_nobody_expected_costs_what_follows_and_is_named(monkeypatch):
    monkeypatch.setattr(writer.Reader, "entries", lambda *args: 1/0)
    with make_driver(PRESETS["shared"]()): report = written()
    assert report["reason"] == "nvmlDeviceGetComputeRunningProcesses_v3 could not be read: ZeroDivisionError"
    with make_driver(report): assert ResourceManager().check_gpu_availability().status.value == "unavailable"


def test_it_has_the_raw_answers_and_the_bytes_that_were_written():
    scenario = dict(gpus=[dict(memory_total_mb=10_000, processes=[dict(pid=4_400_001, memory_mb=700),
                                                                  dict(pid=0), dict(pid=os.getpid(), memory_mb=5)])],
                    habits=dict(process_size=32), faults=[dict(call="nvmlDeviceGetPowerUsage", error=3)])
    with make_driver(scenario): report = written()
    (device,) = report["devices"]
    assert device["answers"]["nvmlDeviceGetPowerUsage"] == dict(error=3)
    assert device["answers"]["nvmlDeviceGetMemoryInfo_v2"]["value"]["total"] == 10_000*MIB
    newest = device["lists"]["nvmlDeviceGetComputeRunningProcesses_v3"]
    assert (newest["error"], newest["count"], newest["bytes"], newest["entry"]) == (0, 3, 96, 32)
    assert [row[:2] for row in newest["entries"]] == [[4_400_001, 700*MIB], [0, None], [writer.FIRST_PID, 5*MIB]]
    assert device["lists"]["nvmlDeviceGetComputeRunningProcesses"]["bytes"] == 48
    assert report["processes_here"] == [writer.FIRST_PID]   # this test's; the others are on no machine
    assert "nvmlDeviceGetRunningProcessDetailList" in report["missing"]
    assert report["driver"]["version"] == "580.105.08 (simulated)" and report["driver"]["cuda"] == 13000


def test_nothing_in_it_names_a_person_a_host_or_a_program():
    uuid = "GPU-0a1b2c3d-4e5f-4a6b-8c7d-9e8f7a6b5c4d"
    scenario = dict(gpus=[dict(uuid=uuid, processes=[dict(pid=4_400_001, memory_mb=5)],
                               mig=[dict(uuid=f"MIG-{uuid}/1/0"), dict(uuid="MIG-odd")])],
                    machine=dict(processes=[dict(pid=4_400_001, name="secret-job.py", username="bobby")]))
    with make_driver(scenario): text = json.dumps(written())
    for word in ("secret-job", "bobby", "0a1b2c3d", "9e8f7a6b5c4d", "MIG-odd", sys.executable): assert word not in text
    assert not {platform.node(), getpass.getuser()} & set(re.findall(r"[\w.-]+", text))
    assert '"GPU-51000000-0000-4000-8000-000000000000"' in text   # of the same form
    assert '"MIG-GPU-51000000-0000-4000-8000-000000000000/1/0"' in text
    assert "UUID of another form" in text


RUN = [sys.executable, ROOT/"tests"/"gpu"/"run.py", "--report"]


def test_it_is_written_without_a_gpu_too_and_says_so(tmp_path):
    if ResourceManager().check_gpu_availability().devices: pytest.skip("there is a GPU here")
    path = tmp_path/"report.json"
    done = subprocess.run([*RUN, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "no GPU (no NVIDIA driver" in done.stdout, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert report["schema_version"] == 1 and report["devices"] == [] and "no NVIDIA driver" in report["reason"]
    shown = CliRunner().invoke(main, ["--simulate", str(path)])
    assert shown.exit_code == 0 and "No GPU can be used" in shown.output
    done = subprocess.run([*RUN, tmp_path/"no"/"folder.json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "could not be written" in done.stderr


@pytest.mark.parametrize("changed, words", [
    (dict(schema_version=2), "this report has the version 2, and this release of cjm-fasthtml-resources reads"),
    (dict(schema_version="1"), "this report has the version '1'"), (dict(schema_version=True), "the version True"),
    (dict(devices=None), "it lacks a list of devices"), (dict(devices=["?"]), "this report is unreadable"),
    (dict(machine={}), "this report is unreadable: KeyError: 'memory_total'"),
    (dict(devices=[dict(index=0, answers=dict(nvmlDeviceGetName=dict(value="x"*200)))]), "SimulatedGpu.name")])
def test_a_report_of_another_version_or_a_damaged_one_is_a_sentence(changed, words, tmp_path):
    with SimulatedDriver([SimulatedGpu()]): report = written()
    path = tmp_path/"report.json"
    path.write_text(json.dumps(report | changed))
    shown = CliRunner(env=dict(COLUMNS="300")).invoke(main, ["--simulate", str(path)])
    assert shown.exit_code == 2 and words in shown.output and "Traceback" not in shown.output, shown.output
    with pytest.raises(ScenarioError): make_driver(report | changed)


REAL = sorted((ROOT/"benchmarks"/"gpu").glob("*-report.json"))


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_a_real_machines_report_is_shown_with_its_own_figures(path):
    raw = json.loads(path.read_text())["devices"][0]
    memory = raw["answers"]["nvmlDeviceGetMemoryInfo_v2"]["value"]
    listed = raw["lists"]["nvmlDeviceGetComputeRunningProcesses_v3"]["entries"]
    with make_driver(find_scenario(str(path))): status, = ResourceManager().check_gpu_availability().devices
    device = status.device
    shown = dict(total=device.memory_total, reserved=device.memory_reserved, free=status.room, used=device.memory_used)
    for name, value in shown.items(): assert abs(value - memory[name]) <= 2*MIB, (name, value, memory[name])
    assert sorted(p.memory_used for p in status.processes) == sorted(row[1] for row in listed)
    assert device.name == raw["answers"]["nvmlDeviceGetName"]["value"] and not device.unified


def test_what_the_command_prints_as_json_is_no_report(tmp_path):
    path = tmp_path/"answer.json"
    path.write_text(CliRunner().invoke(main, ["--simulate", "idle", "--json"]).output)
    shown = CliRunner(env=dict(COLUMNS="300")).invoke(main, ["--simulate", str(path)])
    assert shown.exit_code == 2 and "not a report of tests/gpu/run.py" in shown.output


def test_which_kernel_module_it_is(tmp_path):
    version, folder = tmp_path/"version", tmp_path/"module"
    assert writer.kernel_module(str(version), str(folder)) is None
    (folder/"nvgpu").mkdir(parents=True)
    assert writer.kernel_module(str(version), str(folder)) == "nvgpu"
    (folder/"nvidia").mkdir()
    for taint, kind in (("OE\n", "open"), ("POE\n", "proprietary")):
        (folder/"nvidia"/"taint").write_text(taint)
        assert writer.kernel_module(str(version), str(folder)) == kind
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n")
    assert writer.kernel_module(str(version), str(folder)) == "open"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19\n")
    assert writer.kernel_module(str(version), str(folder)) == "proprietary"


def test_cudas_own_order_is_asked_in_a_process_of_its_own(monkeypatch):
    monkeypatch.undo()   # the real function; here is no libcuda
    found = writer.cuda_order(writer.Aliases(), 2)
    assert found and ("reason" in found[0] or all("cuInit" in row for row in found))
