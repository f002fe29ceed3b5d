"""Every NVML call that the library makes, with every error that nvml.h defines, once, always and after good answers,
seen through the check, the monitor, the panel, the stream and the command; and every call that hangs"""
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pynvml
import pytest
from click.testing import CliRunner
from conftest import newer_forms

from cjm_fasthtml_resources.cli import main
from cjm_fasthtml_resources.core.gpu import read_gpus
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.core.resources import ResourceStatus, best_status
from cjm_fasthtml_resources.simulate import CALLS, SimulatedDriver, SimulatedGpu, SimulatedProcess, make_driver

pytest.importorskip("fasthtml", reason="the extra web is not installed")
from cjm_fasthtml_resources.ui.panel import ResourcePanel  # noqa: E402
from cjm_fasthtml_resources.ui.web import Hub  # noqa: E402

ERRORS = sorted({value for name, value in vars(pynvml).items()
                 if name.startswith("NVML_ERROR_") and isinstance(value, int)})
TIMES = {"once": dict(times=1), "always": dict(), "after two good answers": dict(after=2, times=4)}
AVAILABLE, EXTERNAL, UNAVAILABLE = ResourceStatus.AVAILABLE, ResourceStatus.EXTERNAL_BUSY, ResourceStatus.UNAVAILABLE

# The first GPU is an outsider's, the second is divided into two instances of which one is free, the third is free
SCENARIO = dict(
    gpus=[dict(name="full", memory_total_mb=10_000, processes=[dict(pid=4_400_001, memory_mb=9_000)]),
          dict(name="divided", memory_total_mb=10_000, mig=[
              dict(memory_total_mb=5_000, processes=[dict(pid=4_400_001, memory_mb=4_000)]),
              dict(memory_total_mb=5_000)]),
          dict(name="free", memory_total_mb=10_000)],
    machine=dict(processes=[dict(pid=4_400_001, name="train.py", username="bob")]))
NEWER = ("nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetComputeRunningProcesses_v3",
         "nvmlDeviceGetGraphicsRunningProcesses_v3", "nvmlDeviceGetMPSComputeRunningProcesses_v3")
ASKED_ONCE = ("nvmlDeviceGetName", "nvmlDeviceGetCudaComputeCapability", "nvmlDeviceGetNumGpuCores",
              "nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetGpuInstanceId", "nvmlDeviceGetComputeInstanceId",
              "nvmlDeviceGetPciInfo_v3")
GOOD = {"0": EXTERNAL, "1:0": EXTERNAL, "1:1": AVAILABLE, "2": AVAILABLE}


def statuses(conflict): return {str(d.device.id): d.status for d in conflict.allowed}


def calls_made() -> list[str]:
    "What a check calls: on a driver of today, and where that has only the older forms"
    made = set()
    for missing in ((), NEWER):
        with make_driver(SCENARIO) as driver:
            for call in missing: driver.fail(call, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
            assert statuses(ResourceManager().check_gpu_availability()) == GOOD
            made |= set(driver.calls)
    return sorted(made - {"nvmlErrorString"})


def others(found, faulty): return {device: status for device, status in found.items() if device.split(":")[0] != faulty}


def check_one(conflict, faulty: str | None) -> None:
    "Whatever fails: what is full is never called available, and the devices without a fault keep their answer"
    found = statuses(conflict)
    for device, status in found.items():
        # a device that cannot be read may stand for its instances
        assert status in (GOOD.get(device), UNAVAILABLE), (device, status)
    for d in conflict.allowed:
        assert (d.status is UNAVAILABLE) == (d.device.memory_used is None)
        assert d.status is UNAVAILABLE or d.device.memory_total
    if any(":" in device for device in found): assert [str(d.device.id)[:2] for d in conflict.devices] == ["1:"]
    assert conflict.status in (AVAILABLE, EXTERNAL, UNAVAILABLE)
    assert conflict.status is best_status(d.status for d in conflict.devices)
    assert bool(conflict.reason) == (conflict.status is UNAVAILABLE)
    if faulty is not None and found: assert others(found, faulty) == others(GOOD, faulty)


@pytest.fixture(scope="module")
def watched():
    "A driver with a manager, and with a panel and a stream that watch it; their samples are taken by hand"
    with make_driver(SCENARIO) as driver:
        manager = ResourceManager()
        panel, hub = ResourcePanel(manager, interval=3600), Hub(ResourceMonitor(manager, interval=3600))
        yield driver, manager, panel, hub
        panel.close()


def test_the_list_of_calls_is_that_of_the_library():
    made = calls_made()
    assert set(made) <= CALLS and len(made) >= 20, made
    assert len(ERRORS) >= 25


@pytest.mark.parametrize("call", calls_made())
def test_every_error_of_every_call_through_check_monitor_panel_and_stream(watched, call):
    driver, manager, panel, hub = watched
    session = call in ("nvmlInitWithFlags", "nvmlSystemGetDriverVersion", "nvmlDeviceGetCount_v2", "nvmlShutdown")
    driver.recover()
    for error in ERRORS:
        for often in TIMES.values():
            for gpu in (None,) if session else (None, 0):
                for newer in newer_forms(call): driver.fail(newer, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, gpu)
                driver.fail(call, error, gpu, **often)
                # makes nothing worse
                if session: driver.fail("nvmlDeviceGetTemperature", pynvml.NVML_ERROR_GPU_IS_LOST, times=1)
                for _ in range(3):
                    check_one(manager.check_gpu_availability(), None if gpu is None else "0")
                    sample = hub.monitor.take()
                    check_one(sample.gpu, None if gpu is None else "0")
                    panel._show(sample)
                    hub.publish(sample)
                    assert ("gpu0.head" in panel._slots) == bool(sample.gpu.devices) and panel._slots["banner"].value
                driver.recover()
                for _ in range(2): conflict = manager.check_gpu_availability()
                assert statuses(conflict) == GOOD, (call, error, often, gpu)


@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
@pytest.mark.parametrize("call", calls_made())
def test_no_failure_of_one_call_frees_memory_where_all_is_taken(call, times):
    for error in ERRORS:   # also those that say that a divided GPU is whole
        gpus = [SimulatedGpu(processes=[SimulatedProcess(4_400_001, 20_000)]),
                SimulatedGpu(mig=[SimulatedGpu(memory_total_mb=22_000, memory_used_mb=20_000)])]
        with SimulatedDriver(gpus) as driver:
            driver.fail(call, error, times=times)
            conflict = ResourceManager().check_gpu_availability()
            assert conflict.status in (EXTERNAL, UNAVAILABLE) and (conflict.devices or conflict.reason), (call, error)
            for d in conflict.devices: assert (d.status is UNAVAILABLE) == (d.device.memory_used is None)
            driver.recover()
            assert ResourceManager().check_gpu_availability().status is EXTERNAL, (call, error)


@pytest.mark.parametrize("call", calls_made())
def test_every_error_of_every_call_through_the_command(tmp_path, call):
    for error in ERRORS:
        path = tmp_path/f"{error}.json"
        path.write_text(json.dumps({**SCENARIO, "faults": [dict(call=call, error=error)]}))
        result = CliRunner().invoke(main, ["--simulate", str(path), "--json", "--exit-code"])
        assert result.exception is None or isinstance(result.exception, SystemExit), (call, error, result.exception)
        answer = json.loads(result.output)
        assert result.exit_code == {"available": 0, "external_busy": 11, "unavailable": 12}[answer["status"]]
        for d in answer["gpu"]["devices"]:
            assert d["status"] == "unavailable" or d["status"] == GOOD[str(d["id"])].value
        shown = CliRunner().invoke(main, ["--simulate", str(path)])
        assert shown.exit_code == 0 and "Traceback" not in shown.output


@pytest.mark.parametrize("call", calls_made())
def test_a_call_that_hangs_costs_one_answer_and_no_more(call):
    with make_driver(SCENARIO) as driver:
        manager = ResourceManager(gpu_timeout=0.15)
        if call in ("nvmlInitWithFlags", "nvmlSystemGetDriverVersion", "nvmlShutdown"):   # the session is opened again
            driver.fail("nvmlDeviceGetCount_v2", pynvml.NVML_ERROR_UNKNOWN, times=1)
        manager.check_gpu_availability()
        for newer in newer_forms(call): driver.fail(newer, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        if call in ("nvmlDeviceGetUUID", "nvmlDeviceGetHandleByIndex_v2", "nvmlShutdown", *ASKED_ONCE):
            driver.fail("nvmlDeviceGetCount_v2", pynvml.NVML_ERROR_UNKNOWN, times=1)
            if call != "nvmlShutdown": manager.check_gpu_availability()
        before = {t for t in threading.enumerate() if t.name == "nvml-reader"}   # examples may have left some
        driver.hang(call)
        began = time.monotonic()
        conflict = manager.check_gpu_availability()
        assert time.monotonic() - began < 1 and conflict.status is UNAVAILABLE
        assert "did not respond within 0.15 s" in conflict.message, conflict.message
        for _ in range(20): assert manager.check_gpu_availability().status is UNAVAILABLE   # no time is left for them
        assert time.monotonic() - began < 1
        assert before and {t for t in threading.enumerate() if t.name == "nvml-reader"} == before   # and no thread more
        driver.recover()
        deadline = time.monotonic() + 5
        while statuses(manager.check_gpu_availability()) != GOOD: assert time.monotonic() < deadline


def test_answers_hold_while_every_call_takes_its_own_time():
    "Twelve threads ask at once while each call takes up to 10 ms, another time at each turn"
    chance = random.Random(5)
    with make_driver(SCENARIO) as driver, ThreadPoolExecutor(12) as pool:
        manager = ResourceManager(gpu_timeout=30)
        for _ in range(4):
            driver.recover()
            for call in calls_made(): driver.delay(call, chance.uniform(0, 0.01))
            for conflict in pool.map(lambda _: manager.check_gpu_availability(), range(24)):
                assert statuses(conflict) == GOOD
        manager.gpu_timeout = 0.05            # a reading takes longer than this now: nothing is known, none available
        driver.delay("*", 0.02)
        began = time.monotonic()
        assert manager.check_gpu_availability().status is UNAVAILABLE and time.monotonic() - began < 1
        driver.recover()
        deadline = time.monotonic() + 5
        while statuses(manager.check_gpu_availability()) != GOOD: assert time.monotonic() < deadline


# Values that cannot be

@pytest.mark.parametrize("total, used", [(10_000, 20_000), (0, 0), (0, 5_000), (10_000, 2**43)])
def test_more_used_than_there_is_and_a_total_of_nothing_are_not_available(total, used):
    with SimulatedDriver([SimulatedGpu(memory_total_mb=total, memory_used_mb=used), SimulatedGpu()]):
        manager = ResourceManager()
        conflict = manager.check_gpu_availability()
        assert conflict.devices[0].status in (EXTERNAL, UNAVAILABLE) and conflict.devices[1].status is AVAILABLE
        assert conflict.devices[0].room == 0
        assert "nan" not in manager._repr_html_().lower() and manager.reserve(20_000, timeout=0).index == 1


@pytest.mark.parametrize("pid", [0, 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("memory", [None, 0, 5_000, 2**43])
def test_a_pid_or_a_size_that_cannot_be_costs_no_answer(pid, memory):
    with SimulatedDriver([SimulatedGpu(memory_used_mb=5_000, processes=[SimulatedProcess(pid, memory)])]):
        manager = ResourceManager(track_self=False)
        conflict = manager.check_gpu_availability()
        assert conflict.status in (AVAILABLE, EXTERNAL) and str(pid) in manager._repr_html_()


def test_a_name_that_is_no_utf_8_is_shown_as_unknown():
    with SimulatedDriver([SimulatedGpu(name=b"\xff\xfe".decode("latin-1"))]) as driver:
        driver.library.nvmlDeviceGetName = lambda handle, buffer, size: setattr(buffer, "value", b"\xff\xfe") or 0
        assert ResourceManager().check_gpu_availability().status is AVAILABLE and read_gpus().devices[0].name is None


def test_devices_that_come_and_go_and_a_driver_that_is_replaced():
    with SimulatedDriver([SimulatedGpu()]) as driver:
        manager, seen = ResourceManager(), []
        for count in (1, 3, 0, 2):
            driver.gpus[:] = [SimulatedGpu() for _ in range(count)]
            manager.check_gpu_availability()
            seen.append(len(manager.check_gpu_availability().devices))
        assert seen == [1, 3, 0, 2]
        driver.fail("*", pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)        # the driver was upgraded under this process
        conflict = manager.check_gpu_availability()
        assert conflict.status is UNAVAILABLE and "different versions" in conflict.message
        driver.recover()                                                   # … and it is good again, as after a reload
        assert manager.check_gpu_availability().status is AVAILABLE
