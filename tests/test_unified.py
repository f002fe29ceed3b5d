"GPUs that use the machine's memory: what is free, who has it, and what is reserved counts once"
import pynvml
import pytest

from cjm_fasthtml_resources.core import requests, reservations
from cjm_fasthtml_resources.core.conflict import ResourceBusy
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.memory import HostMemory
from cjm_fasthtml_resources.core.resources import ResourceStatus
from cjm_fasthtml_resources.core.validation import ValidationAction, validate_resources_for_job
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedMachine, SimulatedProcess

TOTAL, USED = 100_000, 30_000   # MiB
MIB = 2**20


def machine(*gpus): return SimulatedDriver(gpus, SimulatedMachine(memory_total_mb=TOTAL, memory_used_mb=USED))
def spark(**more): return SimulatedGpu("NVIDIA GB10", unified=True, **more)


class Plugin:
    "A plugin for any GPU, in a registry of its own"
    class Meta: name = "llm"

    def get_plugin(self, plugin_id): return self
    def get_plugin_meta(self, plugin_id): return self.Meta
    def load_plugin_config(self, plugin_id): return dict(device="auto")
    def is_local_resource(self): return True
    def requires_gpu(self): return True


def test_total_and_room_are_the_machines():
    with machine(spark(processes=[SimulatedProcess(4200101, 5_000)], utilization=87, temperature=54)):
        found = ResourceManager().check_gpu_availability()
    device = found.devices[0].device
    assert device.unified and (device.utilization, device.temperature) == (87, 54)
    assert (device.memory_total//MIB, found.devices[0].room//MIB) == (TOTAL, TOTAL - USED)
    assert found.devices[0].shares == dict(app=0, external=5_000*MIB, unattributed=0, promised=0, ram=25_000*MIB)
    assert found.status is ResourceStatus.AVAILABLE and not found.estimated


def test_a_reservation_counts_against_both_and_what_is_used_of_it_only_once():
    with machine(spark()) as driver:
        manager = ResourceManager()
        with manager.reserve(40_000, timeout=0):
            assert manager.check_gpu_availability().devices[0].room == 30_000*MIB
            ram = manager.check_memory_availability(60)
            assert ram.memory.room == 30_000*MIB and ram.status is ResourceStatus.APP_BUSY
            assert "reserved on the GPU" in ram.message
            with driver.allocate(25_000):
                assert manager.check_gpu_availability().devices[0].room == 30_000*MIB
                ram = manager.check_memory_availability()
                assert ram.memory.room == 30_000*MIB and ram.memory.promised == 15_000*MIB
                assert sum(ram.memory.shares.values()) == (USED + 40_000)*MIB
            with pytest.raises(ResourceBusy, match="programs in RAM"): manager.reserve(30_001, timeout=0)
        assert manager.check_memory_availability().memory.promised == 0


def test_the_command_sample_counts_it_too():
    from cjm_fasthtml_resources.core.samples import take_sample
    from cjm_fasthtml_resources.ui.export import to_json
    with machine(spark()):
        manager = ResourceManager()
        with manager.reserve(40_000, timeout=0): found = to_json(take_sample(manager))
    assert found["gpu"]["devices"][0]["unified"] is True and found["gpu"]["devices"][0]["ram_memory"] == USED*MIB


def test_pick_gpus_and_validation_work_there():
    with machine(spark()):
        manager = ResourceManager()
        assert manager.pick_gpus(1, min_free_mb=60_000).devices[0].unified
        with pytest.raises(ResourceBusy): manager.pick_gpus(1, min_free_mb=80_000)
        with pytest.raises(ValueError, match="at most 100000"): manager.reserve(100_001)
        for need, action in ((60_000, ValidationAction.PROCEED), (80_000, ValidationAction.USER_INTERVENTION),
                             (200_000, ValidationAction.ABORT)):
            assert validate_resources_for_job(manager, Plugin(), "llm", gpu_memory_mb=need).action is action, need


@pytest.mark.parametrize("gpu, code", [
    (spark(), pynvml.NVML_ERROR_GPU_IS_LOST),
    (spark(), pynvml.NVML_ERROR_RESET_REQUIRED),
    (SimulatedGpu("GRID T4-8Q"), pynvml.NVML_ERROR_NOT_SUPPORTED),
    (SimulatedGpu("NVIDIA A100", mig=[SimulatedGpu()]), pynvml.NVML_ERROR_NOT_SUPPORTED),
    (SimulatedGpu("NVIDIA GH200 480GB", addressing_mode="ATS"), pynvml.NVML_ERROR_UNKNOWN)])
def test_what_only_looks_alike_is_not_taken_for_it(gpu, code):
    with machine(gpu) as driver:
        for call in ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2"): driver.fail(call, code)
        found = ResourceManager().check_gpu_availability()
        assert found.status is ResourceStatus.UNAVAILABLE
        assert not any(d.device.unified for d in found.allowed)


def test_a_gpu_that_had_memory_of_its_own_keeps_it():
    with machine(SimulatedGpu("NVIDIA GH200 480GB", addressing_mode="ATS")) as driver:
        manager = ResourceManager()
        assert manager.check_gpu_availability().status is ResourceStatus.AVAILABLE
        for call in ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2"):
            driver.fail(call, pynvml.NVML_ERROR_NOT_SUPPORTED)
        assert manager.check_gpu_availability().status is ResourceStatus.UNAVAILABLE


def test_no_other_process_gives_a_request_what_its_control_group_lacks(monkeypatch):
    group = HostMemory(60_000*MIB, 50_000*MIB, "/cg")
    for module in (requests, reservations): monkeypatch.setattr(module, "find_cgroup", lambda pid: group)
    with machine(spark()):
        one, other = ResourceManager(app="one"), ResourceManager(app="other")
        with pytest.raises(ValueError, match="at most 60000"): one.reserve(60_001)
        request = one.request(40_000)
        for _ in range(3):
            assert request.poll() is None
            with other.reserve(1_000, timeout=0): pass   # it settles for all
        group = HostMemory(60_000*MIB, 20_000*MIB, "/cg")
        with request.wait(): assert other.check_gpu_availability().devices[0].promised() == 40_000*MIB
