"Validation on machines that nobody thought of: what it decides must hold against what is there"
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st

from cjm_fasthtml_resources.core.classify import DeviceStatus, MemoryStatus, OwnedProcess, ResourceConflict, ResourceStatus, ResourceType, WorkerState, held_by
from cjm_fasthtml_resources.core.gpu import GpuDevice, GpuSnapshot
from cjm_fasthtml_resources.core.host import HostMemory
from cjm_fasthtml_resources.core import validation
from cjm_fasthtml_resources.core.manager import ResourceBusy, ResourceManager, ResourceUnavailable
from cjm_fasthtml_resources.core.plugins import PluginResourceRequirements
from cjm_fasthtml_resources.core.reservations import Promise
from cjm_fasthtml_resources.core.store import StoreError
from cjm_fasthtml_resources.core.validation import Job, ValidationAction, ValidationResult, decide_by_device, decide_for_worker, decide_on_cpu, validate_resources_for_job
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedHostProcess, SimulatedMachine, SimulatedProcess

TOTAL, WORKERS, OUTSIDERS = 24576, (41, 42, 43), (901, 902)
PROCESSES = st.dictionaries(st.sampled_from(WORKERS + OUTSIDERS), st.sampled_from([None, 0, 500, 6000, 9000, 16000]), max_size=3)
STATES = st.fixed_dictionaries(dict(
    worker_type=st.sampled_from(["transcription", "llm"]), job_id=st.sampled_from([None, "a", "b"]), plugin_id=st.sampled_from([None, "whisper", "llama"]),
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


@given(gpus=st.lists(PROCESSES, min_size=1, max_size=3) | st.just([]), states=st.dictionaries(st.sampled_from(WORKERS), STATES), stopping=st.sets(st.sampled_from(WORKERS), max_size=1), ram=st.integers(0, 100), container=st.booleans(),
       plugin=st.sampled_from(["whisper", "whisper", "llama", "nobody"]), device=st.sampled_from(["cuda", "cuda", "cuda:0", "cuda:1", "auto", "cpu", "mps", 0, None]),
       worker_pid=st.sampled_from([None, *WORKERS]), need=st.sampled_from([None, 1000, 9000, 16000, 20000, TOTAL, TOTAL + 1]))
@settings(max_examples=600, deadline=None)
def test_what_it_decides_holds(gpus, states, stopping, ram, container, plugin, device, worker_pid, need):
    manager = ResourceManager(track_self=False)
    machine = SimulatedMachine(100, ram, [SimulatedHostProcess(pid, "p", memory_mb=20) for pid in WORKERS + OUTSIDERS], pid_namespace=container)
    driver = SimulatedDriver([SimulatedGpu(memory_total_mb=TOTAL, processes=[SimulatedProcess(pid, mb) for pid, mb in held.items()]) for held in gpus], machine)
    with driver, Kept() as log:
        for pid, state in states.items(): manager.register_worker(pid, **state)
        for pid in stopping & states.keys(): manager.update_worker_state(pid, status="stopping")
        before = manager.get_all_workers()
        result = validate_resources_for_job(manager, Registry(), plugin, {"model": "large", "device": device}, worker_pid, gpu_memory_mb=need)
    worker, action = result.current_worker, result.action

    assert result.message.endswith(".") and manager.get_all_workers() == before
    assert result.can_proceed == (action in (ValidationAction.PROCEED, ValidationAction.RELOAD_PLUGIN))
    error = None
    try: assert result.raise_if_blocked() is result
    except (ResourceBusy, ResourceUnavailable) as raised: error = raised
    assert (error is None) == result.can_proceed and isinstance(error, ResourceUnavailable) == (action is ValidationAction.ABORT)
    if error: assert (str(error), error.conflict, error.result) == (result.message, result.conflict, result)
    assert log.messages[-1] == f"{plugin}: {action.value}. {result.message}"
    if plugin != "nobody":
        assert log.messages[0] == f"{plugin} needs {PluginResourceRequirements(True, device not in ('cpu', None), 'large', device)!r}", log.messages
        assert result.conflict and result.conflict.snapshot is not None or result.conflict.resource_type is ResourceType.SYSTEM_MEMORY
        assert ("GPU memory: " in log.messages[1]) == (device not in ("cpu", None, "mps"))

    if action is ValidationAction.PROCEED and result.device and worker is None and need is not None:
        assert result.device.memory_free >= need*2**20
    if action is ValidationAction.PROCEED and worker: assert worker.loaded_plugin_resource == "large" and worker.status == "idle"
    if action is ValidationAction.RELOAD_PLUGIN: assert worker.status == "idle" and result.plugin_name_to_reload == plugin
    if worker and result.can_proceed:   # the device where it has most, if it can be told
        held = held_by(worker, result.conflict.devices)
        assert (result.device and result.device.id) in ([place for place, size in held.items() if size == max(held.values())] or [None])
    if action is ValidationAction.WAIT_FOR_JOB: assert worker.status == "running" or worker.pid in stopping and worker.pid == worker_pid
    if action is ValidationAction.ABORT:
        there = len(gpus) > (1 if device == "cuda:1" else 0)
        assert plugin == "nobody" or not there or need > TOTAL
    if device in ("cpu", None, "mps") and plugin != "nobody" and ram < 90: assert action is ValidationAction.PROCEED


def test_the_steps_are_logged_and_nothing_is_printed(caplog, capsys):
    caplog.set_level(logging.DEBUG, "cjm_fasthtml_resources")
    with SimulatedDriver([SimulatedGpu()], SimulatedMachine()):
        validate_resources_for_job(ResourceManager(), Registry(), "whisper", {"model": "large", "device": "cuda", "api_token": "hush"})
    assert "whisper: proceed" in caplog.text and "hush" not in caplog.text and capsys.readouterr().out == ""


def test_a_worker_that_has_nothing_loaded_depends_on_the_devices():
    "And one that has something else loaded is reloaded, also where there is room beside it"
    machine = SimulatedMachine(processes=[SimulatedHostProcess(pid, "worker") for pid in WORKERS])
    with SimulatedDriver([SimulatedGpu(memory_total_mb=TOTAL, processes=[SimulatedProcess(41, 500)])], machine):
        manager = ResourceManager(track_self=False)

        def ask(**state):
            manager.register_worker(41, "transcription", **state)
            return validate_resources_for_job(manager, Registry(), "whisper", worker_pid=41, gpu_memory_mb=9_000).action

        assert ask() is ValidationAction.PROCEED
        assert ask(plugin_id="llama", loaded_plugin_resource="tiny") is ValidationAction.RELOAD_PLUGIN
        assert ask(plugin_name="llama", loaded_plugin_resource="tiny") is ValidationAction.RELOAD_PLUGIN
        assert ask(plugin_id="whisper", loaded_plugin_resource="large") is ValidationAction.PROCEED


# Boundaries, on devices made for them

MIB, BYTE = 2**20, 2**-20   # sizes below are in MiB


def device(index=0, free=10_000, status=ResourceStatus.AVAILABLE, name="L4", **fields):
    return DeviceStatus(GpuDevice(index, name=name, memory_total=10_000*MIB, memory_used=int((10_000 - free)*MIB), memory_free=int(free*MIB)), status, **fields)


def answer(*devices, status=ResourceStatus.APP_BUSY): return ResourceConflict(ResourceType.GPU_MEMORY, status, devices=devices, threshold_percent=30.0, snapshot=GpuSnapshot(), notes=("as it is",))


def job(memory=None, resource="large", **fields): return Job("whisper", "Whisper", {"model": resource}, PluginResourceRequirements(True, True, resource, "cuda"), "transcription", None if memory is None else memory*MIB, **fields)


APP, EXTERNAL = ResourceStatus.APP_BUSY, ResourceStatus.EXTERNAL_BUSY
SPEECH, LLM = WorkerState(41, "transcription", plugin_id="whisper", loaded_plugin_resource="tiny"), WorkerState(42, "llm", plugin_name="llama")


def busy(*processes, index=0, free=1_000, **fields):
    return device(index, free=free, status=APP, processes=tuple(OwnedProcess(pid, "app", size*MIB) for pid, size in processes), app_memory=sum(size for _, size in processes)*MIB, **fields)


def test_exactly_as_much_as_there_is_is_enough():
    found = decide_by_device(job(4_000), [], answer(device(free=4_000)))
    assert (found.action, found.device.index) == (ValidationAction.PROCEED, 0)
    assert decide_by_device(job(4_000 + BYTE), [], answer(device(free=4_000), status=ResourceStatus.AVAILABLE)).action is ValidationAction.USER_INTERVENTION
    full = answer(busy((41, 9_000)))
    assert decide_by_device(job(10_000), [SPEECH], full).action is ValidationAction.RELOAD_PLUGIN              # 9,000 of its own and 1,000 free
    assert decide_by_device(job(9_000 + BYTE), [SPEECH], answer(busy((41, 8_000)))).action is ValidationAction.USER_INTERVENTION
    assert decide_by_device(job(9_000), [SPEECH], answer(busy((41, 8_000)))).action is ValidationAction.RELOAD_PLUGIN
    assert decide_by_device(job(10_000 + BYTE), [], answer(device())).message == "It needs 9.8 GiB. No GPU here has so much, the largest has 9.8 GiB."


def test_what_others_reserved_is_theirs_and_what_the_app_reserved_is_waited_for():
    mine, theirs = Promise(7, "app", 6_000*MIB, 6_000*MIB), Promise(8, "external", 6_000*MIB, 6_000*MIB, "night-run")
    waits = decide_by_device(job(9_000), [], answer(device(status=APP, promises=(mine,))))
    assert waits.action is ValidationAction.WAIT_FOR_JOB and waits.message == "It needs 8.8 GiB. Reserved by the app itself: 5.9 GiB on GPU 0 promised to PID 7; reserve() waits until there is room."
    assert decide_by_device(job(10_000), [], answer(device(status=APP, promises=(mine,)))).action is ValidationAction.WAIT_FOR_JOB
    assert decide_by_device(job(10_000), [], answer(device(status=APP, free=10_000 - BYTE, promises=(mine,)))).action is ValidationAction.USER_INTERVENTION
    blocked = decide_by_device(job(9_000), [], answer(device(status=EXTERNAL, promises=(theirs,)), status=EXTERNAL))
    assert blocked.action is ValidationAction.USER_INTERVENTION
    assert blocked.message == "It needs 8.8 GiB. GPU 0 has 3.9 GiB free. Not now, others hold the GPU: 5.9 GiB on GPU 0 promised to PID 8 of the app night-run."
    both = decide_by_device(job(9_000), [], answer(device(status=EXTERNAL, free=9_000, promises=(mine, replace(theirs, unused=1)))))
    assert both.action is ValidationAction.USER_INTERVENTION            # with the app's own back there would be one byte too little
    assert decide_by_device(job(), [], answer(device(status=APP, promises=(mine,)))).action is ValidationAction.WAIT_FOR_JOB
    assert decide_by_device(job(), [], answer(device(status=APP, promises=(replace(mine, owner="external"),)))).action is ValidationAction.PROCEED
    assert decide_by_device(job(), [], answer(device(status=EXTERNAL, promises=(mine,), external_memory=5_000*MIB))).action is ValidationAction.USER_INTERVENTION
    two = decide_by_device(job(9_000), [], answer(device(0, status=APP, promises=(mine, replace(theirs, unused=500*MIB))), device(1, status=APP, free=500)))
    assert two.message == "It needs 8.8 GiB. Reserved by the app itself: 5.9 GiB on GPU 0 promised to PID 7; reserve() waits until there is room."


def test_who_is_in_the_way_is_named_also_below_the_threshold():
    assert decide_by_device(job(9_500), [], answer(device(free=9_000, unattributed_memory=1_000*MIB))).message.endswith("Not now, others hold the GPU: 1000 MiB on GPU 0 that no visible process accounts for.")
    nobody = decide_by_device(job(9_500), [], answer(device(free=9_000, name=None), status=ResourceStatus.AVAILABLE))   # nobody has it, and it is not free
    assert nobody.message == "It needs 9.3 GiB. GPU 0 has 8.8 GiB free. A GPU job could start now: GPU 0 (no name) has 8.8 GiB free."
    assert decide_by_device(job(), [], answer(device(name=None))).message == "GPU 0 (no name) has 9.8 GiB free."


def test_of_those_in_the_way_an_idle_one_is_named_first():
    running = replace(LLM, pid=43, status="running", job_id="chat")
    full = answer(busy((42, 4_000), (43, 5_000)))
    blocked = decide_by_device(job(6_000), [running, LLM], full)
    assert (blocked.action, blocked.current_worker) == (ValidationAction.WAIT_FOR_OTHER_WORKER, LLM) and blocked.message.endswith("Stopping it would free its memory.")
    assert decide_by_device(job(6_000), [running], answer(busy((43, 9_000)))).message.endswith("It holds its memory until it has done its job.")
    other = replace(SPEECH, pid=44)   # of the same type, idle, and with too little to let go of
    assert decide_by_device(job(6_000), [other, running], answer(busy((44, 1_000), (43, 8_000)))).current_worker is other
    assert decide_by_device(job(6_000), [other, replace(other, pid=45, status="running")], answer(busy((44, 1_000), (45, 8_000)))).action is ValidationAction.WAIT_FOR_JOB


def test_the_worker_that_a_job_is_for():
    held = answer(busy((41, 3_000)), busy((41, 5_000), index=1))
    done = decide_for_worker(job(resource="tiny"), SPEECH, held)
    assert (done.action, done.device.index, done.conflict, done.current_worker) == (ValidationAction.PROCEED, 1, held, SPEECH)
    assert decide_for_worker(job(), replace(SPEECH, status="running"), held) == ValidationResult(
        ValidationAction.WAIT_FOR_JOB, False, "Its worker is not idle: the transcription worker with PID 41 (whisper with tiny, running, 2.9 GiB on GPU 0, 4.9 GiB on GPU 1).", held, replace(SPEECH, status="running"))
    assert decide_for_worker(job(resource=None), SPEECH, held).message == "Load Whisper on the transcription worker with PID 41 (whisper with tiny, idle, 2.9 GiB on GPU 0, 4.9 GiB on GPU 1)."
    by_name = WorkerState(41, "transcription", plugin_name="Whisper", loaded_plugin_resource="large")
    assert job().loaded_on(by_name) and not job().loaded_on(replace(by_name, plugin_name="llama")) and not job().loaded_on(replace(by_name, plugin_name=None))
    ready = decide_by_device(job(), [replace(LLM, worker_type="llm"), by_name], held)
    assert (ready.action, ready.current_worker, ready.device.index, ready.conflict) == (ValidationAction.PROCEED, by_name, 1, held)
    assert "PID 41 (idle, 2.9 GiB on GPU 0" in validation._describe(WorkerState(41, "transcription"), held.devices)


def test_where_nobody_can_be_told_the_workers_reports_say_who_is_in_the_way():
    unknown = device(free=1_000, status=APP, app_memory=9_000*MIB, processes=(OwnedProcess(900, "unknown", 9_000*MIB),), estimated=True)
    silent, says, rented = WorkerState(42, "llm"), WorkerState(43, "llm", gpu_memory_mb=9_000), WorkerState(44, "llm", is_remote=True)
    assert validation._in_the_way([silent, says, rented], [unknown]) == [says] and validation._in_the_way([silent, rented], [unknown]) == [silent]
    assert decide_by_device(job(9_000), [silent], answer(unknown)).action is ValidationAction.WAIT_FOR_OTHER_WORKER   # what is the app's is its workers', whose ever
    told = replace(unknown, processes=(OwnedProcess(42, "app", None),))   # one without a figure, as under WSL, is known all the same
    assert validation._in_the_way([silent, says], [told]) == [silent] and not validation._untold(device(estimated=False)) and validation._untold(device(estimated=True))


def test_ram_that_is_short_names_the_worker_that_could_end():
    memory = ResourceConflict(ResourceType.SYSTEM_MEMORY, ResourceStatus.UNAVAILABLE, memory=MemoryStatus(HostMemory(1_000, 950)))
    for status, action, worker in [(ResourceStatus.AVAILABLE, ValidationAction.PROCEED, None), (EXTERNAL, ValidationAction.USER_INTERVENTION, None), (APP, ValidationAction.WAIT_FOR_OTHER_WORKER, SPEECH)]:
        found = decide_on_cpu(replace(memory, status=status), [SPEECH, LLM])
        assert (found.action, found.conflict.status, found.current_worker) == (action, status, worker)
    running = replace(LLM, status="running")
    found = decide_on_cpu(replace(memory, status=APP), [SPEECH, running])
    assert (found.action, found.current_worker, found.conflict.status) == (ValidationAction.WAIT_FOR_JOB, running, APP) and found.message.endswith("Busy is the llm worker with PID 42 (llama, running).")
    assert decide_on_cpu(replace(memory, status=APP), []).current_worker is None


def test_one_device_alone_keeps_what_was_read_and_what_it_was_held_against():
    whole = answer(device(0), device(1, status=EXTERNAL, external_memory=9_000*MIB), status=ResourceStatus.AVAILABLE)
    one = validation._narrow(whole, "cuda:1")
    assert (one.status, one.threshold_percent, one.notes, one.snapshot, [d.device.index for d in one.devices]) == (EXTERNAL, 30.0, ("as it is",), whole.snapshot, [1])
    assert validation._narrow(whole, "cuda") is whole and validation._narrow(whole, "cuda:2").reason == "device 'cuda:2' was asked for, and there are 2"


def test_what_is_asked_of_it_is_passed_on(monkeypatch, caplog):
    manager = ResourceManager(track_self=False)
    with SimulatedDriver([SimulatedGpu()], SimulatedMachine(100, 90)):
        def on_cpu(**kw): return validate_resources_for_job(manager, Registry(), "piper", {"device": "cpu"}, **kw).action
        assert on_cpu() is ValidationAction.USER_INTERVENTION and on_cpu(memory_threshold_percent=91) is ValidationAction.PROCEED   # 90 % of it are in use
        with pytest.raises(ValueError, match="^gpu_memory_mb must be"): validate_resources_for_job(manager, Registry(), "piper", gpu_memory_mb=-1)
        assert validate_resources_for_job(manager, Registry(), "gone", {"device": "cpu", "api_key": ""}).conflict.resource_type is ResourceType.SYSTEM_MEMORY
        monkeypatch.setattr(manager, "expected_gpu_memory_mb", lambda *args: (_ for _ in ()).throw(StoreError("/a is damaged")))
        assert validate_resources_for_job(manager, Registry(), "whisper").action is ValidationAction.PROCEED
        assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == ["what whisper needs is not known: /a is damaged"]
    with SimulatedDriver([], SimulatedMachine(100, 95, [SimulatedHostProcess(41, "worker", memory_mb=90)])):
        manager.register_worker(41, "transcription")
        found = validate_resources_for_job(manager, Registry(), "whisper", {"device": "auto"})
        assert (found.action, found.current_worker.pid) == (ValidationAction.WAIT_FOR_OTHER_WORKER, 41) and found.message.startswith("It runs on the CPU, for no GPU can be used: the NVIDIA driver sees no GPU. RAM is short")


def test_a_worker_that_has_ended_is_in_nobodys_way(spawn):
    process = spawn("input()")
    manager = ResourceManager(track_self=False)
    manager.register_worker(process.pid, "transcription", plugin_id="whisper", loaded_plugin_resource="large")
    process.kill()
    process.wait()
    with SimulatedDriver([SimulatedGpu()]):
        found = validate_resources_for_job(manager, Registry(), "whisper")
        assert found.action is ValidationAction.PROCEED and found.current_worker is None
