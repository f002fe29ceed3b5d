"Identifiers, kinds of strings, control characters and cut texts: what is named stays apart and is shown safely"
import enum
import json
import os

import numpy as np
import pytest

from cjm_fasthtml_resources.core.command import show_command
from cjm_fasthtml_resources.core.conflict import ResourceBusy
from cjm_fasthtml_resources.core.gpu import GpuReader
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.secrets import redact, shown_error
from cjm_fasthtml_resources.core.threads import CallThread
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

ONE, OTHER = "vytxeTZskVKR7C7WgdSP3d", "aAbBcC3TZskVKR7C7WgdSP"   # as shortuuid makes them: they look like secrets
HOSTILE = "ev\x1b[31mil\nNEXT\u202e"


class Kind(str, enum.Enum):
    LLM = "llm"


@pytest.fixture
def two(monkeypatch, tmp_path):
    "The managers of two processes of one app, in this one"
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path/"state"))
    return ResourceManager(app="studio", track_self=False), ResourceManager(app="studio", track_self=False)


def test_two_jobs_whose_ids_look_like_secrets_stay_two_for_another_process(two):
    mine, theirs = two
    gpu = SimulatedGpu(processes=[SimulatedProcess(os.getpid(), 20_000)])
    mine.register_worker(os.getpid(), "llm", job_id=ONE)
    mine.update_worker_state(os.getpid(), job_id=OTHER)
    seen = theirs.get_worker_by_pid(os.getpid())
    assert len({*seen.jobs}) == 2 and not any(ONE in job or OTHER in job for job in seen.jobs)
    assert theirs.get_worker_by_job(OTHER).pid == theirs.get_worker_by_job(ONE).pid == os.getpid()
    theirs.update_worker_state(os.getpid(), job_id=ONE)              # it has this one already
    theirs.update_worker_state(os.getpid(), status="idle")           # ends the running one, and that alone
    assert mine.get_worker_by_job(OTHER) and mine.get_worker_by_job(ONE) is None
    with SimulatedDriver([gpu]), pytest.raises(ResourceBusy): mine.free_gpu(10_000)
    theirs.update_worker_state(os.getpid(), status="idle", job_id=OTHER)
    assert mine.get_worker_by_pid(os.getpid()).status == "idle"
    assert redact(redact(ONE, "job_id"), "job_id") == redact(ONE, "job_id") != redact(OTHER, "job_id")


@pytest.mark.parametrize("make", [np.str_, type("Text", (str,), {}), lambda text: Kind.LLM],
                         ids=["numpy", "own", "enum"])
def test_any_kind_of_string_is_taken_for_its_characters(two, make):
    mine, theirs = two
    mine.register_worker(4_200_901, make("llm"), job_id=make("llm"))
    worker, = theirs.get_workers_by_type("llm")
    assert type(worker.worker_type) is str and (worker.worker_type, worker.job_id) == ("llm", "llm")


def test_an_empty_job_id_makes_no_worker_busy(two):
    assert two[0].register_worker(4_200_902, "llm", job_id="").status == "idle"


def test_an_odd_wake_is_refused_and_a_reader_whose_thread_ended_works_again():
    with SimulatedDriver([SimulatedGpu()]):
        reader = GpuReader()
        assert reader.read().devices
        with pytest.raises(TypeError, match="wake must be True or False"): reader.read(wake=np.array([True, False]))
        reader._thread, reader._since = CallThread("old", print), 0.0     # as after an end within a reading
        assert reader.read().devices


def test_control_characters_of_names_reach_no_message():
    gpu = SimulatedGpu(processes=[SimulatedProcess(4_200_903, 20_000)])
    manager = ResourceManager(track_self=False)
    manager.register_worker(4_200_903, HOSTILE, plugin_name=HOSTILE, job_id=HOSTILE)
    with SimulatedDriver([gpu]):
        said = [manager.check_gpu_availability().message]
        with pytest.raises(ResourceBusy) as busy: manager.reserve(20_000, timeout=0)
        said.append(str(busy.value))
    for text in said: assert "ev" in text and not set(HOSTILE) & {"\x1b", "\n", "\u202e"} & set(text), text


@pytest.mark.parametrize("before", range(1_950, 2_001, 5))
def test_a_text_is_cut_between_words_so_no_half_of_a_secret_is_bared(before):
    assert "hunter2" not in show_command(["prog", "x"*8 + "A1b2"*(before//4), "https://ada:hunter2xyz@host/x"])


def test_an_error_is_cut_between_words():
    for length in range(9_960, 9_999, 4):
        assert "hunter2" not in shown_error(ValueError("A1"*(length//2) + " https://ada:hunter2xyz@host"))


def test_what_is_written_stays_json(two, tmp_path):
    two[0].register_worker(4_200_904, "llm", config={"a": {1, 2}, "b": object()}, job_id=ONE)
    assert json.loads(json.dumps(two[1].get_worker_by_pid(4_200_904).shown().config))
