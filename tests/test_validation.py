"Validation on machines that nobody thought of: what it decides must hold against what is there"
import logging
from types import SimpleNamespace

from hypothesis import given, settings, strategies as st

from cjm_fasthtml_resources.core.manager import ResourceBusy, ResourceManager, ResourceUnavailable
from cjm_fasthtml_resources.core.validation import ValidationAction, validate_resources_for_job
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedHostProcess, SimulatedMachine, SimulatedProcess

TOTAL, WORKERS, OUTSIDERS = 24576, (41, 42, 43), (901, 902)
PROCESSES = st.dictionaries(st.sampled_from(WORKERS + OUTSIDERS), st.sampled_from([None, 0, 500, 6000, 9000, 16000]), max_size=3)
STATES = st.fixed_dictionaries(dict(
    worker_type=st.sampled_from(["transcription", "llm"]), job_id=st.sampled_from([None, "a", "b"]), plugin_id=st.sampled_from([None, "whisper", "llama"]),
    loaded_plugin_resource=st.sampled_from([None, "large", "tiny"])))


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
    logging.disable()
    with driver:
        for pid, state in states.items(): manager.register_worker(pid, **state)
        for pid in stopping & states.keys(): manager.update_worker_state(pid, status="stopping")
        before = manager.get_all_workers()
        result = validate_resources_for_job(manager, Registry(), plugin, {"model": "large", "device": device}, worker_pid, gpu_memory_mb=need)
    logging.disable(logging.NOTSET)
    worker, action = result.current_worker, result.action

    assert result.message.endswith(".") and manager.get_all_workers() == before
    assert result.can_proceed == (action in (ValidationAction.PROCEED, ValidationAction.RELOAD_PLUGIN))
    error = None
    try: assert result.raise_if_blocked() is result
    except (ResourceBusy, ResourceUnavailable) as raised: error = raised
    assert (error is None) == result.can_proceed and isinstance(error, ResourceUnavailable) == (action is ValidationAction.ABORT)

    if action is ValidationAction.PROCEED and result.device and worker is None and need is not None:
        assert result.device.memory_free >= need*2**20
    if action is ValidationAction.PROCEED and worker: assert worker.loaded_plugin_resource == "large" and worker.status == "idle"
    if action is ValidationAction.RELOAD_PLUGIN: assert worker.status == "idle" and result.plugin_name_to_reload == plugin
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
