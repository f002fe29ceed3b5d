"Validation on machines that nobody thought of: what it decides must hold against what is there"
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceConflict, ResourceUnavailable
from cjm_fasthtml_resources.core.gpu import GpuDevice, GpuSnapshot
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.memory import HostMemory
from cjm_fasthtml_resources.core.plugins import PluginResourceRequirements
from cjm_fasthtml_resources.core.resources import (
    DeviceStatus,
    MemoryStatus,
    OwnedProcess,
    Promise,
    ResourceStatus,
    ResourceType,
    WorkerState,
)
from cjm_fasthtml_resources.core.room import held_by
from cjm_fasthtml_resources.core.store import StoreError
from cjm_fasthtml_resources.core.validation import (
    Job,
    ValidationAction,
    ValidationResult,
    decide_by_device,
    decide_for_worker,
    decide_on_cpu,
    describe_worker,
    only_device,
    owners_unknown,
    validate_resources_for_job,
    workers_on,
)
from cjm_fasthtml_resources.simulate import (
    SimulatedDriver,
    SimulatedGpu,
    SimulatedHostProcess,
    SimulatedMachine,
    SimulatedProcess,
)

PROCEED, RELOAD = ValidationAction.PROCEED, ValidationAction.RELOAD_PLUGIN
WAIT_FOR_JOB, WAIT_FOR_WORKER = ValidationAction.WAIT_FOR_JOB, ValidationAction.WAIT_FOR_OTHER_WORKER
INTERVENE, ABORT = ValidationAction.USER_INTERVENTION, ValidationAction.ABORT

TOTAL, WORKERS, OUTSIDERS = 24576, (41, 42, 43), (901, 902)
SIZES = st.sampled_from([None, 0, 500, 6000, 9000, 16000])
PROCESSES = st.dictionaries(st.sampled_from(WORKERS + OUTSIDERS), SIZES, max_size=3)
STATES = st.fixed_dictionaries(dict(
    worker_type=st.sampled_from(["transcription", "llm"]),
    job_id=st.sampled_from([None, "a", "b"]),
    plugin_id=st.sampled_from([None, "whisper", "llama"]),
    loaded_plugin_resource=st.sampled_from([None, "large", "tiny"])))


class Kept(logging.Handler):
    "What the library logs while a test runs, whatever the level"
    def __enter__(self):
        self.messages, self.logger = [], logging.getLogger("cjm_fasthtml_resources.core.validation")
        self.logger.addHandler(self)
        self.logger.setLevel(logging.DEBUG)
        return self

    def __exit__(self, *exc):
        self.logger.removeHandler(self)
        self.logger.setLevel(logging.NOTSET)

    def emit(self, record): self.messages.append(record.getMessage())


class Registry:
    def get_plugin(self, plugin_id): return None if plugin_id == "nobody" else SimpleNamespace(name=plugin_id)
    def load_plugin_config(self, plugin_id): return {"model": "large", "device": "cuda"}


def machine_of(gpus, ram, container):
    "A driver with these processes on its GPUs, each as {PID: MiB}, on a machine with so much RAM in use"
    processes = [SimulatedHostProcess(pid, "p", memory_mb=20) for pid in WORKERS + OUTSIDERS]
    machine = SimulatedMachine(100, ram, processes, pid_namespace=container)
    on_gpus = [[SimulatedProcess(pid, mb) for pid, mb in held.items()] for held in gpus]
    return SimulatedDriver([SimulatedGpu(memory_total_mb=TOTAL, processes=on) for on in on_gpus], machine)


@given(
    gpus=st.lists(PROCESSES, min_size=1, max_size=3) | st.just([]),
    states=st.dictionaries(st.sampled_from(WORKERS), STATES),
    stopping=st.sets(st.sampled_from(WORKERS), max_size=1),
    ram=st.integers(0, 100),
    container=st.booleans(),
    plugin=st.sampled_from(["whisper", "whisper", "llama", "nobody"]),
    device=st.sampled_from(["cuda", "cuda", "cuda:0", "cuda:1", "auto", "cpu", "mps", 0, None]),
    worker_pid=st.sampled_from([None, *WORKERS]),
    need=st.sampled_from([None, 1000, 9000, 16000, 20000, TOTAL, TOTAL + 1]))
@settings(max_examples=600, deadline=None)
def test_what_it_decides_holds(  # noqa: C901 - one invariant after another, with no nesting
        gpus, states, stopping, ram, container, plugin, device, worker_pid, need):
    manager = ResourceManager(track_self=False)
    with machine_of(gpus, ram, container), Kept() as log:
        for pid, state in states.items(): manager.register_worker(pid, **state)
        for pid in stopping & states.keys(): manager.update_worker_state(pid, status="stopping")
        before = manager.get_all_workers()
        config = {"model": "large", "device": device}
        result = validate_resources_for_job(manager, Registry(), plugin, config, worker_pid, gpu_memory_mb=need)
    worker, action = result.current_worker, result.action

    assert result.message.endswith(".") and manager.get_all_workers() == before
    assert result.can_proceed == (action in (PROCEED, RELOAD))
    error = None
    try: assert result.raise_if_blocked() is result
    except (ResourceBusy, ResourceUnavailable) as raised: error = raised
    assert (error is None) == result.can_proceed
    assert isinstance(error, ResourceUnavailable) == (action is ABORT)
    if error: assert (str(error), error.conflict, error.result) == (result.message, result.conflict, result)
    assert log.messages[-1] == f"{plugin}: {action.value}. {result.message}"
    if plugin != "nobody":
        needs = PluginResourceRequirements(True, device not in ("cpu", None), "large", device)
        assert log.messages[0] == f"{plugin} needs {needs!r}", log.messages
        found = result.conflict
        assert found and found.snapshot is not None or found.resource_type is ResourceType.SYSTEM_MEMORY
        assert ("GPU memory: " in log.messages[1]) == (device not in ("cpu", None, "mps"))

    if action is PROCEED and result.device and worker is None and need is not None:
        assert result.device.memory_free >= need*2**20
    if action is PROCEED and worker: assert (worker.loaded_plugin_resource, worker.status) == ("large", "idle")
    if action is RELOAD: assert worker.status == "idle" and result.plugin_name_to_reload == plugin
    if worker and result.can_proceed:   # the device where it has most, if it can be told
        held = held_by(worker, result.conflict.devices)
        most = [place for place, size in held.items() if size == max(held.values())]
        assert (result.device and result.device.id) in (most or [None])
    if action is WAIT_FOR_JOB:
        assert worker.status == "running" or worker.pid in stopping and worker.pid == worker_pid
    if action is ABORT:
        there = len(gpus) > (1 if device == "cuda:1" else 0)
        assert plugin == "nobody" or not there or need > TOTAL
    if device in ("cpu", None, "mps") and plugin != "nobody" and ram < 90: assert action is PROCEED


def test_the_steps_are_logged_and_nothing_is_printed(caplog, capsys):
    caplog.set_level(logging.DEBUG, "cjm_fasthtml_resources")
    config = {"model": "large", "device": "cuda", "api_token": "hush"}
    with SimulatedDriver([SimulatedGpu()], SimulatedMachine()):
        validate_resources_for_job(ResourceManager(), Registry(), "whisper", config)
    assert "whisper: proceed" in caplog.text and "hush" not in caplog.text and capsys.readouterr().out == ""


def test_a_worker_that_has_nothing_loaded_depends_on_the_devices():
    "And one that has something else loaded is reloaded, also where there is room beside it"
    machine = SimulatedMachine(processes=[SimulatedHostProcess(pid, "worker") for pid in WORKERS])
    with SimulatedDriver([SimulatedGpu(memory_total_mb=TOTAL, processes=[SimulatedProcess(41, 500)])], machine):
        manager = ResourceManager(track_self=False)

        def ask(**state):
            manager.register_worker(41, "transcription", **state)
            return validate_resources_for_job(manager, Registry(), "whisper", worker_pid=41, gpu_memory_mb=9_000).action

        assert ask() is PROCEED
        assert ask(plugin_id="llama", loaded_plugin_resource="tiny") is RELOAD
        assert ask(plugin_name="llama", loaded_plugin_resource="tiny") is RELOAD
        assert ask(plugin_id="whisper", loaded_plugin_resource="large") is PROCEED


# Boundaries, on devices made for them

MIB, BYTE = 2**20, 2**-20   # sizes below are in MiB


def device(index=0, free=10_000, status=ResourceStatus.AVAILABLE, name="L4", **fields):
    memory = dict(memory_total=10_000*MIB, memory_used=int((10_000 - free)*MIB), memory_free=int(free*MIB))
    return DeviceStatus(GpuDevice(index, name=name, **memory), status, **fields)


def answer(*devices, status=ResourceStatus.APP_BUSY):
    return ResourceConflict(ResourceType.GPU_MEMORY, status, devices=devices, threshold_percent=30.0,
                            snapshot=GpuSnapshot(), notes=("as it is",))


def job(memory=None, resource="large", **fields):
    needs = PluginResourceRequirements(True, True, resource, "cuda")
    memory = None if memory is None else memory*MIB
    return Job("whisper", "Whisper", {"model": resource}, needs, "transcription", memory, **fields)


APP, EXTERNAL = ResourceStatus.APP_BUSY, ResourceStatus.EXTERNAL_BUSY
SPEECH = WorkerState(41, "transcription", plugin_id="whisper", loaded_plugin_resource="tiny")
LLM = WorkerState(42, "llm", plugin_name="llama")


def busy(*processes, index=0, free=1_000, **fields):
    owned = tuple(OwnedProcess(pid, "app", size*MIB) for pid, size in processes)
    app_memory = sum(size for _, size in processes)*MIB
    return device(index, free=free, status=APP, processes=owned, app_memory=app_memory, **fields)


def decide(job, workers, *devices, **fields): return decide_by_device(job, workers, answer(*devices, **fields))


def test_exactly_as_much_as_there_is_is_enough():
    found = decide(job(4_000), [], device(free=4_000))
    assert (found.action, found.device.index) == (PROCEED, 0)
    too_much = decide(job(4_000 + BYTE), [], device(free=4_000), status=ResourceStatus.AVAILABLE)
    assert too_much.action is INTERVENE
    full = busy((41, 9_000))
    assert decide(job(10_000), [SPEECH], full).action is RELOAD              # 9,000 of its own and 1,000 free
    assert decide(job(9_000 + BYTE), [SPEECH], busy((41, 8_000))).action is INTERVENE
    assert decide(job(9_000), [SPEECH], busy((41, 8_000))).action is RELOAD
    more_than_it_has = decide(job(10_000 + BYTE), [], device())
    assert more_than_it_has.message == "It needs 9.8 GiB. No GPU here has so much, the largest has 9.8 GiB."


def test_what_others_reserved_is_theirs_and_what_the_app_reserved_is_waited_for():
    mine = Promise(7, "app", 6_000*MIB, 6_000*MIB)
    theirs = Promise(8, "external", 6_000*MIB, 6_000*MIB, "night-run")
    reserved = ("It needs 8.8 GiB. Reserved by the app itself: 5.9 GiB on GPU 0 promised to PID 7; "
                "reserve() waits until there is room.")
    waits = decide(job(9_000), [], device(status=APP, promises=(mine,)))
    assert (waits.action, waits.message) == (WAIT_FOR_JOB, reserved)
    assert decide(job(10_000), [], device(status=APP, promises=(mine,))).action is WAIT_FOR_JOB
    assert decide(job(10_000), [], device(status=APP, free=10_000 - BYTE, promises=(mine,))).action is INTERVENE
    blocked = decide(job(9_000), [], device(status=EXTERNAL, promises=(theirs,)), status=EXTERNAL)
    assert blocked.action is INTERVENE
    assert blocked.message == ("It needs 8.8 GiB. GPU 0 has 3.9 GiB free. Not now, others hold the GPU: "
                               "5.9 GiB on GPU 0 promised to PID 8 of the app night-run.")
    nearly = (mine, replace(theirs, unused=1))      # with the app's own back there would be one byte too little
    assert decide(job(9_000), [], device(status=EXTERNAL, free=9_000, promises=nearly)).action is INTERVENE
    assert decide(job(), [], device(status=APP, promises=(mine,))).action is WAIT_FOR_JOB
    assert decide(job(), [], device(status=APP, promises=(replace(mine, owner="external"),))).action is PROCEED
    taken = device(status=EXTERNAL, promises=(mine,), external_memory=5_000*MIB)
    assert decide(job(), [], taken).action is INTERVENE
    both = (mine, replace(theirs, unused=500*MIB))
    two = decide(job(9_000), [], device(0, status=APP, promises=both), device(1, status=APP, free=500))
    assert two.message == reserved


def test_who_is_in_the_way_is_named_also_below_the_threshold():
    unseen = decide(job(9_500), [], device(free=9_000, unattributed_memory=1_000*MIB)).message
    assert unseen.endswith("Not now, others hold the GPU: 1000 MiB on GPU 0 that no visible process accounts for.")
    nobody = decide(job(9_500), [], device(free=9_000, name=None), status=ResourceStatus.AVAILABLE)
    assert nobody.message == ("It needs 9.3 GiB. GPU 0 has 8.8 GiB free. "     # nobody has it, and it is not free
                              "A GPU job could start now: GPU 0 (no name) has 8.8 GiB free.")
    assert decide(job(), [], device(name=None)).message == "GPU 0 (no name) has 9.8 GiB free."


def test_of_those_in_the_way_an_idle_one_is_named_first():
    running = replace(LLM, pid=43, status="running", job_id="chat")
    blocked = decide(job(6_000), [running, LLM], busy((42, 4_000), (43, 5_000)))
    assert (blocked.action, blocked.current_worker) == (WAIT_FOR_WORKER, LLM)
    assert blocked.message.endswith("Stopping it would free its memory.")
    works = decide(job(6_000), [running], busy((43, 9_000)))
    assert works.message.endswith("It holds its memory until it has done its job.")
    other = replace(SPEECH, pid=44)   # of the same type, idle, and with too little to let go of
    assert decide(job(6_000), [other, running], busy((44, 1_000), (43, 8_000))).current_worker is other
    same = [other, replace(other, pid=45, status="running")]
    assert decide(job(6_000), same, busy((44, 1_000), (45, 8_000))).action is WAIT_FOR_JOB


def test_the_worker_that_a_job_is_for():
    held = answer(busy((41, 3_000)), busy((41, 5_000), index=1))
    done = decide_for_worker(job(resource="tiny"), SPEECH, held)
    assert (done.action, done.device.index) == (PROCEED, 1)
    assert (done.conflict, done.current_worker) == (held, SPEECH)
    running = replace(SPEECH, status="running")
    where = "2.9 GiB on GPU 0, 4.9 GiB on GPU 1"
    not_idle = f"Its worker is not idle: the transcription worker with PID 41 (whisper with tiny, running, {where})."
    assert decide_for_worker(job(), running, held) == ValidationResult(WAIT_FOR_JOB, False, not_idle, held, running)
    load = f"Load Whisper on the transcription worker with PID 41 (whisper with tiny, idle, {where})."
    assert decide_for_worker(job(resource=None), SPEECH, held).message == load
    by_name = WorkerState(41, "transcription", plugin_name="Whisper", loaded_plugin_resource="large")
    assert job().loaded_on(by_name) and not job().loaded_on(replace(by_name, plugin_name="llama"))
    assert not job().loaded_on(replace(by_name, plugin_name=None))
    ready = decide_by_device(job(), [replace(LLM, worker_type="llm"), by_name], held)
    assert (ready.action, ready.current_worker) == (PROCEED, by_name)
    assert (ready.device.index, ready.conflict) == (1, held)
    assert "PID 41 (idle, 2.9 GiB on GPU 0" in describe_worker(WorkerState(41, "transcription"), held.devices)


def test_where_nobody_can_be_told_the_workers_reports_say_who_is_in_the_way():
    unmatched = (OwnedProcess(900, "unknown", 9_000*MIB),)
    unknown = device(free=1_000, status=APP, app_memory=9_000*MIB, processes=unmatched, estimated=True)
    silent, says = WorkerState(42, "llm"), WorkerState(43, "llm", gpu_memory_mb=9_000)
    rented = WorkerState(44, "llm", is_remote=True)
    assert workers_on([silent, says, rented], [unknown]) == [says]
    assert workers_on([silent, rented], [unknown]) == [silent]
    assert decide(job(9_000), [silent], unknown).action is WAIT_FOR_WORKER   # what is the app's is its workers'
    told = replace(unknown, processes=(OwnedProcess(42, "app", None),))   # no figure, as under WSL, and yet known
    assert workers_on([silent, says], [told]) == [silent]
    assert not owners_unknown(device(estimated=False)) and owners_unknown(device(estimated=True))


def test_ram_that_is_short_names_the_worker_that_could_end():
    state = MemoryStatus(HostMemory(1_000, 950))
    memory = ResourceConflict(ResourceType.SYSTEM_MEMORY, ResourceStatus.UNAVAILABLE, memory=state)
    for status, action, worker in [(ResourceStatus.AVAILABLE, PROCEED, None), (EXTERNAL, INTERVENE, None),
                                   (APP, WAIT_FOR_WORKER, SPEECH)]:
        found = decide_on_cpu(replace(memory, status=status), [SPEECH, LLM])
        assert (found.action, found.conflict.status, found.current_worker) == (action, status, worker)
    running = replace(LLM, status="running")
    found = decide_on_cpu(replace(memory, status=APP), [SPEECH, running])
    assert (found.action, found.current_worker, found.conflict.status) == (WAIT_FOR_JOB, running, APP)
    assert found.message.endswith("Busy is the llm worker with PID 42 (llama, running).")
    assert decide_on_cpu(replace(memory, status=APP), []).current_worker is None


def test_one_device_alone_keeps_what_was_read_and_what_it_was_held_against():
    second = device(1, status=EXTERNAL, external_memory=9_000*MIB)
    whole = answer(device(0), second, status=ResourceStatus.AVAILABLE)
    one = only_device(whole, "cuda:1")
    assert (one.status, one.devices) == (EXTERNAL, (second,))
    assert (one.threshold_percent, one.notes, one.snapshot) == (30.0, ("as it is",), whole.snapshot)
    assert only_device(whole, "cuda") is whole
    assert only_device(whole, "cuda:2").reason == "device 'cuda:2' was asked for, and there are 2"


def test_what_is_asked_of_it_is_passed_on(monkeypatch, caplog):
    manager = ResourceManager(track_self=False)

    def ask(plugin, config=None, **kw): return validate_resources_for_job(manager, Registry(), plugin, config, **kw)
    def broken(*args): raise StoreError("/a is damaged")

    with SimulatedDriver([SimulatedGpu()], SimulatedMachine(100, 90)):
        on_cpu = {"device": "cpu"}
        assert ask("piper", on_cpu).action is INTERVENE                                  # 90 % of it are in use
        assert ask("piper", on_cpu, memory_threshold_percent=91).action is PROCEED
        with pytest.raises(ValueError, match="^gpu_memory_mb must be"): ask("piper", gpu_memory_mb=-1)
        with_a_key = ask("gone", {"device": "cpu", "api_key": ""})
        assert with_a_key.conflict.resource_type is ResourceType.SYSTEM_MEMORY
        monkeypatch.setattr(manager, "expected_gpu_memory_mb", broken)
        assert ask("whisper").action is PROCEED
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert warnings == ["what whisper needs is not known: /a is damaged"]
    with SimulatedDriver([], SimulatedMachine(100, 95, [SimulatedHostProcess(41, "worker", memory_mb=90)])):
        manager.register_worker(41, "transcription")
        found = ask("whisper", {"device": "auto"})
        assert (found.action, found.current_worker.pid) == (WAIT_FOR_WORKER, 41)
        why = "It runs on the CPU, for no GPU can be used: the NVIDIA driver sees no GPU. RAM is short"
        assert found.message.startswith(why)


def test_a_worker_that_has_ended_is_in_nobodys_way(spawn):
    process = spawn("input()")
    manager = ResourceManager(track_self=False)
    manager.register_worker(process.pid, "transcription", plugin_id="whisper", loaded_plugin_resource="large")
    process.kill()
    process.wait()
    with SimulatedDriver([SimulatedGpu()]):
        found = validate_resources_for_job(manager, Registry(), "whisper")
        assert found.action is PROCEED and found.current_worker is None
