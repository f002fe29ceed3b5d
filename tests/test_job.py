"Jobs: what a notebook is the wrong place for"
import asyncio

import pytest
from conftest import warned

from cjm_fasthtml_resources.core import job as jobs
from cjm_fasthtml_resources.core.conflict import ResourceBusy
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess


@pytest.fixture
def gpu():
    gpu = SimulatedGpu("NVIDIA L4")
    with SimulatedDriver([gpu]): yield gpu


def test_a_job_that_waits_for_a_gpu_of_its_own_says_so_once(gpu, monkeypatch, caplog):
    monkeypatch.setattr(jobs, "TELL_AFTER", 0.1)
    gpu.processes.append(SimulatedProcess(4_200_301, 5_000))
    manager = ResourceManager()
    with pytest.raises(ResourceBusy, match="What flux needs is not known"):
        manager.job("job-1", plugin="flux", timeout=0.6).__enter__()
    said, = warned(caplog)
    assert said.startswith("job-1 waits: 21.6 GiB") and "PID 4200301" in said and "unknown= (in MiB)" in said
    for known in (dict(gpu_memory_mb=22_000), dict(unknown=22_000)):   # somebody has asked for that much
        with pytest.raises(ResourceBusy) as error: manager.job("job-1", timeout=0.3, **known).__enter__()
        assert "not known" not in str(error.value)
    assert warned(caplog) == [] and manager.get_claims() == []


def test_a_job_has_one_block(gpu):
    manager = ResourceManager()
    job = manager.job("job-1", 8_000)
    async def twice():
        async with job: assert job.env
        async with job: pytest.fail("nothing is held here")
    with pytest.raises(RuntimeError, match="is over: make another one"): asyncio.run(twice())
    with pytest.raises(RuntimeError, match="is over"): job.__enter__()
    waiting = manager.job("job-2", 8_000)
    with waiting, pytest.raises(RuntimeError, match="is running"): waiting.__enter__()
    assert manager.get_claims() == [] and repr(waiting) == "ActiveJob('job-2', over)"
    late = manager.job("job-3", 24_000, timeout=0)
    with manager.job("job-4", 8_000), pytest.raises(ResourceBusy): late.__enter__()
    assert repr(late) == "ActiveJob('job-3', over)"


def test_outside_its_block_a_job_gives_nothing(gpu):
    job = ResourceManager().job("job-1", 8_000)
    for use in (lambda: job.env, lambda: job.env_by_index, lambda: job.watch(1)):
        with pytest.raises(RuntimeError, match="is not begun: use it inside"): use()
    with job: assert job.env and job.env_by_index


def test_a_worker_has_no_two_jobs_of_one_name(gpu, spawn):
    "The end of the first would make it idle while the second runs"
    worker, manager = spawn("input()"), ResourceManager()
    manager.register_worker(worker.pid, "llm")
    with manager.job("job-1", 100, worker=worker.pid):
        for concurrent in (False, True):
            double = manager.job("job-1", 100, worker=worker.pid, concurrent=concurrent)
            with pytest.raises(ValueError, match="has the job 'job-1' already"): double.__enter__()
        state = manager.get_worker_by_pid(worker.pid)
        assert (state.status, state.jobs) == ("running", ("job-1",))
    with manager.job("job-1", 100, worker=worker.pid): pass   # one after the other
    assert manager.get_worker_by_pid(worker.pid).status == "idle"
