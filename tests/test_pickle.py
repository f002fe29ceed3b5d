"What can be sent to another process comes back the same, and what cannot says why"
import copy
import pickle

import pytest

from cjm_fasthtml_resources.core.arguments import UNCHANGED
from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.core.samples import take_sample
from cjm_fasthtml_resources.core.store import StoreError
from cjm_fasthtml_resources.core.validation import ValidationAction, ValidationResult
from cjm_fasthtml_resources.simulate import ScenarioError, SimulatedDriver, SimulatedGpu, load_scenario

protocols = pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))


@pytest.fixture(scope="module")
def sample():
    with load_scenario("pair") as driver:
        manager = ResourceManager(track_self=False)
        for worker in driver.workers: manager.register_worker(**worker, config={"deep": [{"er": 1}]})
        yield take_sample(manager)


@protocols
def test_unchanged_is_itself_after_each_way(protocol):
    assert pickle.loads(pickle.dumps(UNCHANGED, protocol)) is UNCHANGED
    assert copy.copy(UNCHANGED) is UNCHANGED and copy.deepcopy({"a": UNCHANGED})["a"] is UNCHANGED


@protocols
def test_answers_samples_and_figures_come_back_the_same(protocol, sample):
    monitor = ResourceMonitor(ResourceManager())
    monitor.keep(sample)
    result = ValidationResult(ValidationAction.RELOAD_PLUGIN, True, "Load it.", sample.gpu, sample.workers[0],
                              new_config={"a": [1]}, device=sample.gpu.devices[0].device)
    for sent in (sample.gpu, sample.memory, sample, sample.workers[0], sample.gpu.snapshot, monitor.history, result):
        found = pickle.loads(pickle.dumps(sent, protocol))
        assert found == sent and type(found) is type(sent) and repr(found) == repr(sent)
        assert copy.deepcopy(sent) == sent


@protocols
def test_errors_come_back_with_all_that_they_carry(protocol, sample):
    result = ValidationResult(ValidationAction.WAIT_FOR_JOB, False, "Wait.", sample.gpu)
    busy = ResourceBusy("no room", sample.gpu, retryable=False, suggested_action="wait", result=result)
    found = pickle.loads(pickle.dumps(busy, protocol))
    assert (type(found), str(found), vars(found)) == (ResourceBusy, "no room", vars(busy))
    gone = pickle.loads(pickle.dumps(ResourceUnavailable("none", sample.memory, result=result), protocol))
    assert (str(gone), gone.conflict, gone.result) == ("none", sample.memory, result)
    for error in (StoreError("/a is damaged"), ScenarioError("gpus must be a list")):
        found = pickle.loads(pickle.dumps(error, protocol))
        assert (type(found), str(found)) == (type(error), str(error))


def stays(thing) -> str:
    "What is said when it is sent or copied"
    said = set()
    for way in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError) as raised: way(thing)
        said.add(str(raised.value))
    assert len(said) == 1
    return said.pop()


def test_what_belongs_to_this_process_says_so_and_what_to_do():
    manager = ResourceManager()
    said = "a ResourceManager cannot be pickled or copied: it belongs to this process. Create a manager"
    assert stays(manager).startswith(said)
    monitor = ResourceMonitor(manager)
    assert "a ResourceMonitor cannot be pickled" in stays(monitor) and "monitor.latest" in stays(monitor)
    with SimulatedDriver([SimulatedGpu()]), monitor.subscribe(print) as subscription:
        assert "a Subscription cannot" in stays(subscription)


def test_a_panel_says_so_too():
    from cjm_fasthtml_resources.ui.panel import ResourcePanel
    with SimulatedDriver([SimulatedGpu()]):
        panel = ResourcePanel(ResourceManager())
        with pytest.raises(TypeError, match="a ResourcePanel cannot be pickled"): pickle.dumps(panel)
        panel.close()


def test_a_reservation_says_so_too():
    with SimulatedDriver([SimulatedGpu()]), ResourceManager().reserve(1000, timeout=0) as held:
        assert "a Reservation cannot be pickled" in stays(held)
