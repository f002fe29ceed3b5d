"Validation on machines that nobody thought of: what it decides must hold against what is there"
import json
import logging
import re
import time
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceConflict, ResourceUnavailable
from cjm_fasthtml_resources.core.gpu import GpuDevice, GpuSnapshot
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.memory import HostMemory
from cjm_fasthtml_resources.core.options import OptionKind, explain_options
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
    statuses=st.dictionaries(st.sampled_from(WORKERS), st.sampled_from(["stopping", "busy", "loading"]), max_size=2),
    ram=st.integers(0, 100),
    container=st.booleans(),
    plugin=st.sampled_from(["whisper", "whisper", "llama", "nobody"]),
    device=st.sampled_from(["cuda", "cuda", "cuda:0", "cuda:1", "auto", "cpu", "mps", 0, None]),
    worker_pid=st.sampled_from([None, *WORKERS]),
    need=st.sampled_from([None, 1000, 9000, 16000, 20000, TOTAL, TOTAL + 1]))
@settings(max_examples=600, deadline=None)
def test_what_it_decides_holds(  # noqa: C901 - one invariant after another, with no nesting
        gpus, states, statuses, ram, container, plugin, device, worker_pid, need):
    manager = ResourceManager(track_self=False)
    with machine_of(gpus, ram, container), Kept() as log:
        for pid, state in states.items(): manager.register_worker(pid, **state)
        for pid in statuses.keys() & states.keys(): manager.update_worker_state(pid, status=statuses[pid])
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
    if action is WAIT_FOR_JOB: assert worker.status != "idle"
    assert not (result.can_proceed and result.options)
    assert result.message == " ".join(filter(None, [result.verdict, explain_options(result.options)]))
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
    said = "The job needs 10,001 MiB. The largest GPU here has 10,000 MiB that programs can use."
    assert more_than_it_has.message == said
    kept = device(free=9_500)
    kept = replace(kept, device=replace(kept.device, memory_reserved=500*MIB))   # the driver's own
    assert decide(job(9_500), [], kept).action is PROCEED
    over = decide(job(9_600), [], kept)
    assert over.action is ABORT
    assert over.message == "The job needs 9.4 GiB. The largest GPU here has 9.3 GiB that programs can use."


def test_what_others_reserved_is_theirs_and_what_the_app_reserved_is_waited_for():
    mine = Promise(7, "app", 6_000*MIB, 6_000*MIB)
    theirs = Promise(8, "external", 6_000*MIB, 6_000*MIB, "night-run")
    reserved = ("The job needs 8.8 GiB. This app has already reserved the memory: a reservation of PID 7 "
                "(5.9 GiB on GPU 0, not used yet). Call reserve() to wait for it.")
    waits = decide(job(9_000), [], device(status=APP, promises=(mine,)))
    assert (waits.action, waits.message) == (WAIT_FOR_JOB, reserved)
    assert decide(job(10_000), [], device(status=APP, promises=(mine,))).action is WAIT_FOR_JOB
    assert decide(job(10_000), [], device(status=APP, free=10_000 - BYTE, promises=(mine,))).action is INTERVENE
    blocked = decide(job(9_000), [], device(status=EXTERNAL, promises=(theirs,)), status=EXTERNAL)
    assert blocked.action is INTERVENE
    assert blocked.message == ("The job needs 8.8 GiB. GPU 0 has 3.9 GiB free. Other programs use 60 % of GPU 0: "
                               "a reservation of PID 8 (app night-run, 5.9 GiB on GPU 0, not used yet).")
    nearly = (mine, replace(theirs, unused=1))      # with the app's own back there would be one byte too little
    assert decide(job(9_000), [], device(status=EXTERNAL, free=9_000, promises=nearly)).action is INTERVENE
    assert decide(job(), [], device(status=APP, promises=(mine,))).action is WAIT_FOR_JOB
    assert decide(job(), [], device(status=APP, promises=(replace(mine, owner="external"),))).action is PROCEED
    taken = device(status=EXTERNAL, promises=(mine,), external_memory=5_000*MIB)
    assert decide(job(), [], taken, status=EXTERNAL).action is INTERVENE
    both = (mine, replace(theirs, unused=500*MIB))
    two = decide(job(9_000), [], device(0, status=APP, promises=both), device(1, status=APP, free=500))
    assert two.message == reserved


def test_who_is_in_the_way_is_named_also_below_the_threshold():
    unseen = decide(job(9_500), [], device(free=9_000, unattributed_memory=1_000*MIB)).message
    assert unseen.endswith("use 10 % of GPU 0: processes that are not visible from here (1000 MiB on GPU 0).")
    nobody = decide(job(9_500), [], device(free=9_000, name=None), status=ResourceStatus.AVAILABLE)
    assert nobody.message == "The job needs 9.3 GiB. GPU 0 has 8.8 GiB free."   # nobody has it, and it is not free
    assert decide(job(), [], device(name=None)).message == "GPU 0 (no name) has 9.8 GiB free."


def test_of_those_in_the_way_an_idle_one_is_named_first():
    running = replace(LLM, pid=43, status="running", job_id="chat")
    blocked = decide(job(6_000), [running, LLM], busy((42, 4_000), (43, 5_000)))
    assert (blocked.action, blocked.current_worker) == (WAIT_FOR_WORKER, LLM)
    assert blocked.message.endswith("in use by the llm worker (PID 42, llama, idle, 3.9 GiB on GPU 0).")
    works = decide(job(6_000), [running], busy((43, 9_000)))
    assert works.message.endswith("llama, running chat, 8.8 GiB on GPU 0).")
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
    not_idle = ("The worker that the job needs is busy: "
                f"the transcription worker (PID 41, whisper / tiny, running, {where}).")
    assert decide_for_worker(job(), running, held) == ValidationResult(WAIT_FOR_JOB, False, not_idle, held, running)
    load = f"Load Whisper on the transcription worker (PID 41, whisper / tiny, idle, {where})."
    assert decide_for_worker(job(resource=None), SPEECH, held).message == load
    by_name = WorkerState(41, "transcription", plugin_name="Whisper", loaded_plugin_resource="large")
    assert job().loaded_on(by_name) and not job().loaded_on(replace(by_name, plugin_name="llama"))
    assert not job().loaded_on(replace(by_name, plugin_name=None))
    ready = decide_by_device(job(), [replace(LLM, worker_type="llm"), by_name], held)
    assert (ready.action, ready.current_worker) == (PROCEED, by_name)
    assert (ready.device.index, ready.conflict) == (1, held)
    assert "PID 41, idle, 2.9 GiB on GPU 0" in describe_worker(WorkerState(41, "transcription"), held.devices)


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
                                   (APP, WAIT_FOR_WORKER, SPEECH), (ResourceStatus.UNAVAILABLE, ABORT, None)]:
        found = decide_on_cpu(replace(memory, status=status), [SPEECH, LLM])
        assert (found.action, found.conflict.status, found.current_worker) == (action, status, worker)
    running = replace(LLM, status="running")
    found = decide_on_cpu(replace(memory, status=APP), [SPEECH, running])
    assert (found.action, found.current_worker, found.conflict.status) == (WAIT_FOR_JOB, running, APP)
    assert found.message.endswith("The llm worker (PID 42, llama, running) is busy.")
    loading = replace(SPEECH, status="loading")
    assert decide_on_cpu(replace(memory, status=APP), [loading]).current_worker is loading
    assert decide_on_cpu(replace(memory, status=APP), []).current_worker is None


def test_one_device_alone_keeps_what_was_read_and_what_it_was_held_against():
    second = device(1, status=EXTERNAL, external_memory=9_000*MIB)
    whole = answer(device(0), second, status=ResourceStatus.AVAILABLE)
    one = only_device(whole, "cuda:1")
    assert (one.status, one.devices) == (EXTERNAL, (second,))
    assert (one.threshold_percent, one.notes, one.snapshot) == (30.0, ("as it is",), whole.snapshot)
    assert only_device(whole, "cuda") is whole
    assert only_device(whole, "cuda:2").reason == "device 'cuda:2' does not exist: 2 GPUs are visible"


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
        assert warnings == ["the need of whisper is unknown: /a is damaged"]
    with SimulatedDriver([], SimulatedMachine(100, 95, [SimulatedHostProcess(41, "worker", memory_mb=90)])):
        manager.register_worker(41, "transcription")
        found = ask("whisper", {"device": "auto"})
        assert (found.action, found.current_worker.pid) == (WAIT_FOR_WORKER, 41)
        why = "The job runs on the CPU because no GPU can be used: the NVIDIA driver lists no GPU. RAM is low"
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


# The table of the notebook and the ways out, on random machines. What is expected is found from the machine itself

@dataclass
class Case:
    "A machine with identical GPUs, and a job; sizes are in MiB"
    gpus: list[dict[int, int]]                 # PID → MiB
    hidden: list[int]                          # of no visible process, on each GPU
    kept: int                                  # the driver's own, on each GPU
    states: dict[int, dict]
    statuses: dict[int, str]
    promise: tuple[int, int] | None            # of this app: the GPU and the MiB
    device: str
    need: int | None
    own: int | None
    concurrent: bool
    total: int = TOTAL
    reservation: object = field(default=None, repr=False)

    def used(self, i, pids): return sum(mb for pid, mb in self.gpus[i].items() if pid in pids)
    def others(self, i): return sum(mb for pid, mb in self.gpus[i].items() if pid not in self.states) + self.hidden[i]
    def free(self, i): return self.total - self.kept - self.hidden[i] - sum(self.gpus[i].values())
    def room(self, i): return self.free(i) - self.promised(i)
    def promised(self, i): return self.promise[1] if self.promise and self.promise[0] == i else 0

    def status(self, i):
        "E for others, B for the app, A for free"
        others = self.others(i)
        if others and 100*others >= 45*self.total: return "E"
        mine = self.gpus[i].keys() & self.states.keys()
        return "B" if mine or self.promised(i) else "A"

    def there(self):
        named = int(self.device[5:]) if ":" in self.device else None
        return [i for i in range(len(self.gpus)) if named in (None, i)]

    def loaded(self, pid):
        holds = self.need is None or any(pid in self.gpus[i] for i in self.there())
        said = self.states[pid]["plugin_id"], self.states[pid]["loaded_plugin_resource"]
        return said == ("whisper", "large") and holds

    def at_work(self, pid): return self.word(pid) != "idle"
    def word(self, pid): return self.statuses.get(pid) or ("running" if self.states[pid]["job_id"] else "idle")
    def shares(self, pid): return self.concurrent and self.loaded(pid) and self.word(pid) in ("running", "busy")

    def setup(self, manager):
        for pid, state in self.states.items(): manager.register_worker(pid, **state)
        for pid, word in self.statuses.items(): manager.update_worker_state(pid, status=word)
        if self.promise: self.reservation = manager.reserve(self.promise[1], self.promise[0], timeout=0)

    def driver(self):
        gpus = [SimulatedGpu(memory_total_mb=self.total, memory_reserved_mb=self.kept,
                             memory_used_mb=sum(held.values()) + hidden,
                             processes=[SimulatedProcess(*p) for p in held.items()])
                for held, hidden in zip(self.gpus, self.hidden, strict=True)]
        processes = [SimulatedHostProcess(pid, "p", memory_mb=20) for pid in WORKERS + OUTSIDERS]
        return SimulatedDriver(gpus, SimulatedMachine(100, 50, processes))

    def validate(self, manager, device=None, need=None):
        config = {"model": "large", "device": device or self.device}
        return validate_resources_for_job(manager, Registry(), "whisper", config, self.own,
                                          gpu_memory_mb=need or self.need, concurrent=self.concurrent)


def expected(case):  # noqa: C901 - the rows of the table, from above
    "The action that the table has for a case"
    there, workers, need = case.there(), list(case.states), case.need
    if not there: return ABORT

    def would_do(i, freed): return case.status(i) != "E" if need is None else case.room(i) + freed >= need
    def without(*pids): return any(would_do(i, case.used(i, pids)) for i in there)

    own = case.own if case.own in workers else None
    if own:
        workers.remove(own)
        if case.at_work(own): return PROCEED if case.shares(own) else WAIT_FOR_JOB
        if case.loaded(own): return PROCEED
        if case.states[own]["plugin_id"] and without(own): return RELOAD
    of_type = [pid for pid in workers if case.states[pid]["worker_type"] == "transcription"]
    if any(case.loaded(pid) and not case.at_work(pid) or case.shares(pid) for pid in of_type): return PROCEED
    on_them = [pid for pid in workers if any(pid in case.gpus[i] for i in there)]
    if need is None:
        if any(case.status(i) == "A" for i in there): return PROCEED
        if not on_them and any(case.status(i) == "B" and not case.promised(i) for i in there): return PROCEED
    elif any(case.room(i) >= need for i in there): return PROCEED
    if any(case.loaded(pid) and case.word(pid) != "stopping" for pid in of_type): return WAIT_FOR_JOB
    if need is not None and need > case.total - case.kept: return ABORT
    mine = [own] if own else []
    if on_them and without(*on_them, *mine):
        same = [pid for pid in on_them if pid in of_type]
        if any(without(pid, *mine) for pid in same if not case.at_work(pid)): return RELOAD
        return WAIT_FOR_JOB if any(map(case.at_work, same)) else WAIT_FOR_WORKER
    if any(case.promised(i) and would_do(i, case.promised(i)) for i in there): return WAIT_FOR_JOB
    if need is not None and any(would_do(i, case.promised(i) + case.used(i, case.states)) for i in there):
        return WAIT_FOR_WORKER
    return INTERVENE


def follow(case, manager, driver, option):
    "Do what an option says, to the machine or to the job, and validate again"
    pids = [int(pid) for pid in re.findall(r"stop_worker\((\d+)\)", option.call)]
    if option.kind is OptionKind.OTHER_DEVICE: return case.validate(manager, device=option.call.split("'")[3])
    if option.kind is OptionKind.SMALLER:
        return case.validate(manager, need=int(re.search(r"gpu_memory_mb=(\d+)", option.call)[1]))
    if option.kind is OptionKind.WAIT_FOR_RESERVATION: case.reservation.release()
    if option.kind is OptionKind.WAIT_FOR_JOB:
        waited = int(re.search(r"\(PID (\d+)\)", option.what)[1])
        manager.update_worker_state(waited, job_id=None, status="idle")
        if option.what.endswith("has ended"): pids.append(waited)
    if option.kind is OptionKind.WAIT_FOR_OTHERS:
        place = int(re.search(r"of GPU (\d)$", option.what)[1])
        left = option.freed/MIB if case.need else 1e9    # for an unknown need, other programs use less than 45 %
        assert left <= case.others(place) + 1024/10 or not case.need   # they have as much, but for the rounding
        gpu = driver.gpus[place]
        for process in [p for p in gpu.processes if p.pid not in case.states]:
            freed = min(left, process.memory_mb)
            process.memory_mb -= freed
            gpu.memory_used_mb -= freed
            left -= freed
        gpu.memory_used_mb -= min(left, case.hidden[place])
    for gpu in driver.gpus:
        gpu.memory_used_mb -= sum(p.memory_mb for p in gpu.processes if p.pid in pids)
        gpu.processes[:] = [p for p in gpu.processes if p.pid not in pids]
    for pid in pids: manager.unregister_worker(pid)
    return case.validate(manager)


SOME = st.sampled_from([0, 500, 4000, 6000, 9000, 16000])

@st.composite
def cases(draw):
    held = st.dictionaries(st.sampled_from(WORKERS + OUTSIDERS), SOME, max_size=3)
    gpus = draw(st.lists(held, min_size=1, max_size=2))
    states = draw(st.dictionaries(st.sampled_from(WORKERS), STATES))
    words = st.dictionaries(st.sampled_from(WORKERS), st.sampled_from(["busy", "loading", "stopping"]), max_size=2)
    statuses = {pid: word for pid, word in draw(words).items() if pid in states}
    promise = draw(st.none() | st.tuples(st.integers(0, len(gpus) - 1), st.sampled_from([3000, 9000, 15000])))
    case = Case(gpus, [draw(st.sampled_from([0, 0, 3000, 12000])) for _ in gpus], draw(st.sampled_from([0, 600])),
                states, statuses, promise, draw(st.sampled_from(["cuda", "cuda", "cuda:0", "cuda:1"])),
                draw(st.sampled_from([None, 1000, 9000, 16000, 20000, TOTAL - 600, TOTAL])),
                draw(st.sampled_from([None, None, *WORKERS])), draw(st.booleans()))
    assume(all(case.room(i) >= 0 for i in range(len(gpus))))
    return case


@given(cases())
@settings(max_examples=400, deadline=None)
def test_it_follows_its_table_and_each_way_out_is_one(case):
    manager = ResourceManager(track_self=False)
    with case.driver():
        case.setup(manager)
        found = case.validate(manager)
    assert found.action is expected(case)
    assert not (found.can_proceed and found.options)
    for option in found.options:
        manager = ResourceManager(track_self=False)
        with case.driver() as driver:
            case.setup(manager)
            assert follow(case, manager, driver, option).can_proceed, option
    assert any(map(case.others, range(len(case.gpus)))) or not re.search("thers hold|Other programs", found.verdict)


def test_each_option_is_plain_json_and_sorted_by_time_then_cost():
    case = Case([{41: 6000, 42: 6000, 901: 6000}], [0], 0, {
        41: dict(worker_type="llm", job_id=None, plugin_id=None, loaded_plugin_resource="tiny"),
        42: dict(worker_type="llm", job_id="chat", plugin_id=None, loaded_plugin_resource=None)}, {}, None, "cuda",
        12000, None, False)
    manager = ResourceManager(track_self=False)
    manager.needs.durations = lambda plugin, resource: (600, 1200) if plugin == "llama" else None
    with case.driver():
        case.setup(manager)
        manager.update_worker_state(42, plugin_name="llama")
        found = case.validate(manager)
    kinds = [option.kind.value for option in found.options]
    assert kinds == ["stop_worker", "smaller", "wait_for_job", "wait_for_others"]
    when = [option["when"] for option in json.loads(json.dumps([asdict(o) for o in found.options]))]
    assert (when[:2], when[3]) == ([0, 0], None) and 1190 < when[2][1] <= 1200
    assert "wait for chat of" in found.message and "about 15 minutes (its jobs took 10 to 20 minutes)" in found.message
    assert found.options[0].cost == "tiny has to be loaded again" and found.options[0].freed == 6000*MIB
    with pytest.raises(ResourceBusy) as blocked: found.raise_if_blocked()
    assert blocked.value.result.options == found.options and blocked.value.suggested_action


def test_an_option_is_done_by_its_call(spawn):
    "The workers are processes; the call that is printed is executed as it is"
    manager, gpu = ResourceManager(track_self=False), SimulatedGpu()
    for _ in range(2):
        process = spawn("input()")
        gpu.processes.append(held := SimulatedProcess(process.pid, 9000))
        plugin = type("Plugin", (), dict(force_cleanup=lambda _, held=held: gpu.processes.remove(held)))()
        manager.register_worker(process.pid, "llm", plugin_instance=plugin)

    def ask(need): return validate_resources_for_job(manager, Registry(), "whisper", gpu_memory_mb=need)
    with SimulatedDriver([gpu]):
        both, = [o for o in ask(20_000).options if o.kind is OptionKind.STOP_WORKER]
        first, second = [o for o in ask(12_000).options if o.kind is OptionKind.STOP_WORKER]
        assert both.call == f"{first.call}; {second.call}" or both.call == f"{second.call}; {first.call}"
        exec(second.call, dict(manager=manager))
        assert ask(12_000).action is PROCEED and len(manager.get_all_workers()) == 1
        last, = [o for o in ask(20_000).options if o.kind is OptionKind.STOP_WORKER]
        exec(last.call, dict(manager=manager))
        assert ask(20_000).action is PROCEED


def test_memory_that_a_reservation_of_this_process_keeps_is_no_way_out(spawn):
    "Stopping the worker would free it for the reservation, which its parent process has, and for nothing else"
    manager, gpu = ResourceManager(track_self=False), SimulatedGpu()
    with SimulatedDriver([gpu]), manager.reserve(9000):
        process = spawn("input()")
        manager.register_worker(process.pid, "llm")
        gpu.processes.append(SimulatedProcess(process.pid, 9000))
        refused = validate_resources_for_job(manager, Registry(), "whisper", gpu_memory_mb=20_000)
        assert refused.action is WAIT_FOR_WORKER
        assert [o.kind for o in refused.options if o.kind is OptionKind.STOP_WORKER] == []


def test_another_host_is_named_where_it_has_room(caplog):
    host = replace(device(), device=replace(device().device, host="gpu-2"))
    answers = SimpleNamespace(check_gpu_availability=lambda: answer(host))
    manager = ResourceManager(track_self=False)

    def ask(cluster):
        return validate_resources_for_job(manager, Registry(), "whisper", gpu_memory_mb=9_000, cluster=cluster)

    def closed(): raise RuntimeError("the client is closed")
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(901, 20_000)])]):
        option = ask(answers).options[0]
        assert (str(option), option.call) == ("use host gpu-2 now", "cluster.pick_gpus(min_free_mb=9000)")
        lost = ask(SimpleNamespace(check_gpu_availability=closed))
        assert [o.kind.value for o in lost.options] == ["smaller", "wait_for_others"] and "closed" in caplog.text
    with SimulatedDriver([]):
        assert ask(answers).options[0].kind is OptionKind.OTHER_HOST and ask(None).options == ()


def test_a_time_is_not_invented():
    manager, now = ResourceManager(track_self=False), time.monotonic()
    case = Case([{42: 20000}], [0], 0, {42: dict(worker_type="transcription", job_id="a", plugin_id="llama",
                                                 loaded_plugin_resource=None)}, {}, None, "cuda", 9000, None, False)
    def broken(plugin, resource): raise StoreError("/a is damaged")
    with case.driver():
        case.setup(manager)
        manager.update_worker_state(42, plugin_name="llama")
        for durations in (lambda *names: None, broken):
            manager.needs.durations = durations
            found = case.validate(manager)
            assert found.options[-1].when is None and ", time unknown" in found.message
        manager.needs.durations = lambda *names: (0.0, 1e-9)      # it has run for longer than any before it
        assert case.validate(manager).options[-1].when is None and time.monotonic() > now


# Several GPUs


class OnSeveral:
    "A plugin without a model of which nothing is known"
    name = "llm"
    def get_plugin(self, plugin_id): return self
    def load_plugin_config(self, plugin_id): return dict(device="cuda")


@given(st.lists(st.integers(0, 24), min_size=1, max_size=3), st.integers(1, 26), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_a_group_of_devices_is_judged_as_the_queue_grants_it(used, need, count):
    manager = ResourceManager(track_self=False)
    there = [[SimulatedProcess(901, mb*1000)] if mb else [] for mb in used]
    gpus = [SimulatedGpu(memory_total_mb=TOTAL, processes=processes) for processes in there]
    with SimulatedDriver(gpus):
        found = validate_resources_for_job(manager, OnSeveral(), "llm", gpu_memory_mb=need*1000, n=count)
        try:
            with manager.reserve(need*1000, n=count, timeout=0) as held: granted = [d.index for d in held.devices]
        except ResourceBusy: granted = None
        except (ResourceUnavailable, ValueError): granted = "never"
    assert found.can_proceed == isinstance(granted, list)
    assert (found.action is ABORT) == (granted == "never"), found.message
    if found.can_proceed and count > 1:
        said = [d.index for d in found.devices]
        assert sorted(used[n] for n in said) == sorted(used[n] for n in granted)   # of equal ones it takes any
        assert said != granted or found.env == held.env
    for option in found.options:
        assert option.kind in (OptionKind.SMALLER, OptionKind.WAIT_FOR_OTHERS)


def test_a_job_on_two_gpus_with_a_registry_is_refused_for_the_group():
    manager = ResourceManager(track_self=False)
    gpus = [SimulatedGpu(memory_total_mb=TOTAL), SimulatedGpu(memory_total_mb=TOTAL, memory_used_mb=20_000)]
    with SimulatedDriver(gpus):
        for n, need, error, said in ((2, 9_000, ResourceBusy, "on each of 2 GPUs. Enough is free on 1 of the 2 GPUs"),
                                     (2, 30_000, ResourceUnavailable, "The 2 largest GPUs here have at least"),
                                     (3, 9_000, ResourceUnavailable, "The job needs 3 GPUs. 2 can be used")):
            job = manager.job("job-1", need, plugin="llm", registry=OnSeveral(), n=n, timeout=0)
            with pytest.raises(error, match=said): job.__enter__()
        with manager.job("job-1", 4_000, plugin="llm", registry=OnSeveral(), n=2, timeout=0) as job:
            assert [d.index for d in job.decision.devices] == [d.index for d in job.devices] == [0, 1]
        assert manager.get_claims() == []
    with pytest.raises(ValueError, match="n must be"): validate_resources_for_job(manager, OnSeveral(), "llm", n=0)
