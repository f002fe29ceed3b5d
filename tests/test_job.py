"Jobs: what a notebook is the wrong place for"
import asyncio
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import MIB, warned

from cjm_fasthtml_resources.core import job as jobs
from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedMachine, SimulatedProcess
from cjm_fasthtml_resources.simulated.machine import use_ram


@pytest.fixture
def gpu():
    gpu = SimulatedGpu("NVIDIA L4")
    with SimulatedDriver([gpu]): yield gpu


def test_a_job_that_waits_for_a_gpu_of_its_own_says_so_once(gpu, monkeypatch, caplog):
    monkeypatch.setattr(jobs, "TELL_AFTER", 0.1)
    gpu.processes.append(SimulatedProcess(4_200_301, 5_000))
    manager = ResourceManager()
    with pytest.raises(ResourceBusy, match="The need of flux is unknown"):
        manager.job("job-1", plugin="flux", timeout=0.6).__enter__()
    said, = warned(caplog)
    assert all(part in said for part in ("job-1 waits: The job needs 21.6 GiB", "PID 4200301", "unknown= (in MiB)"))
    for known in (dict(gpu_memory_mb=22_000), dict(unknown=22_000)):   # somebody has asked for that much
        with pytest.raises(ResourceBusy) as error: manager.job("job-1", timeout=0.3, **known).__enter__()
        assert "is unknown" not in str(error.value)
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


def test_a_job_of_unknown_need_goes_to_the_gpu_that_it_names():
    with SimulatedDriver([SimulatedGpu("NVIDIA L4"), SimulatedGpu("NVIDIA L4")]):
        manager = ResourceManager()
        for device in (1, "cuda:1", manager.check_gpu_availability().devices[1].device):
            with manager.job("job-1", device=device, timeout=1) as job: assert job.device.index == 1
        with pytest.raises(ValueError, match="device 7 is not visible"):
            manager.job("job-1", device=7, timeout=1).__enter__()


def test_a_job_of_unknown_need_takes_the_first_of_several_gpus_that_becomes_empty():
    gpus = [SimulatedGpu("NVIDIA L4", memory_used_mb=9_000), SimulatedGpu("NVIDIA L4", memory_used_mb=9_000)]
    with SimulatedDriver(gpus):
        job = ResourceManager().job("job-1", timeout=10)
        for number, pause in enumerate(jobs.begin(job)):
            if number == 3: gpus[1].memory_used_mb = 0
            time.sleep(pause)
        assert job.device.index == 1
        job.close()


def test_a_child_that_has_ended_is_not_watched_even_if_nobody_waited_for_it(gpu):
    with ResourceManager().job("job-1", 1_000) as job:
        child = subprocess.Popen(["true"])
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE: time.sleep(0.01)
        assert job.watch(child.pid) is False
        child.wait()


@pytest.fixture
def worker():
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_the_memory_of_a_workers_job_is_on_the_gpu_where_the_worker_is(worker):
    gpus = [SimulatedGpu("NVIDIA L4", processes=[SimulatedProcess(worker.pid, 14_000)]), SimulatedGpu("NVIDIA L4")]
    with SimulatedDriver(gpus):
        manager = ResourceManager()
        manager.register_worker(worker.pid, "llm")
        with manager.job("job-1", 15_000, worker=worker.pid, timeout=1) as job:
            assert job.device.index == 0 and manager.check_gpu_availability().devices[0].promised("app") == 1_000*MIB


KILLED = """if True:
    import os, sys
    from cjm_fasthtml_resources.core.manager import ResourceManager
    from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
    with SimulatedDriver([SimulatedGpu("NVIDIA L4")]):
        manager = ResourceManager(app="killed")
        with manager.job("job-1", 9_000, worker=int(sys.argv[1])):
            print("began", flush=True)
            sys.stdin.read()
"""


def test_a_killed_program_leaves_no_memory_reserved_for_its_workers_job(worker, tmp_path, monkeypatch):
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    with SimulatedDriver([SimulatedGpu("NVIDIA L4")]):
        manager = ResourceManager(app="killed")
        manager.register_worker(worker.pid, "llm")
        program = subprocess.Popen([sys.executable, "-c", KILLED, str(worker.pid)], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)
        assert program.stdout.readline() == "began\n" and len(manager.get_claims()) == 1
        program.kill()
        program.wait()
        assert manager.get_claims() == [] and worker.poll() is None


def test_what_a_registered_worker_uses_is_not_what_this_processes_job_took(gpu, worker):
    manager = ResourceManager()
    manager.register_worker(worker.pid, "llm")
    with manager.job("job-1", 2_000, plugin="small"):
        gpu.processes[:] = [SimulatedProcess(os.getpid(), 1_500), SimulatedProcess(worker.pid, 9_000)]
        manager.job_looks.look(False)
    assert manager.expected_need("small").highest == 1_500*MIB


class Registry:
    "One plugin with a model"
    def get_plugin(self, plugin_id): return self if plugin_id == "llama" else None
    def load_plugin_config(self, plugin_id): return dict(device="cuda", model_id="7b")
    name, needs = "llama", dict(gpu_memory_mb=4_000)


def test_of_two_jobs_that_choose_the_same_idle_worker_the_second_chooses_another_one(gpu, spawn, monkeypatch):
    manager, registry = ResourceManager(), Registry()
    first, second = (spawn("import time; time.sleep(60)") for _ in range(2))
    for process in (first, second):
        manager.register_worker(process.pid, "llm", plugin_id="llama", plugin_name="llama", loaded_plugin_resource="7b")
        gpu.processes.append(SimulatedProcess(process.pid, 5_000))
    decide = jobs.decide
    taken = []

    def late(job):
        "Another job is given the worker that this one has just chosen"
        decision = decide(job)
        if not taken:
            taken.append(decision.current_worker.pid)
            manager.update_worker_state(taken[0], job_id="other", status="running")
        return decision

    monkeypatch.setattr(jobs, "decide", late)
    with manager.job("mine", plugin="llama", registry=registry, worker_type="llm", timeout=5) as job:
        assert {job.worker_pid, *taken} == {first.pid, second.pid}
        assert manager.get_worker_by_pid(taken[0]).jobs == ("other",)
        assert manager.get_worker_by_pid(job.worker_pid).jobs == ("mine",)
    assert manager.get_worker_by_pid(taken[0]).jobs == ("other",)
    assert manager.get_worker_by_pid(job.worker_pid).status == "idle"


GIVES = """
import sys, time
from cjm_fasthtml_resources.core.manager import ResourceManager
manager, pid = ResourceManager(app="app"), int(sys.argv[1])
with manager.job("job-1", 0, worker=pid), manager.job("job-2", 0, worker=pid, concurrent=True):
    print("began", flush=True)
    time.sleep(60)
"""


def test_the_jobs_that_a_killed_app_gave_to_a_worker_are_over(folder, spawn):
    manager, worker = ResourceManager(app="app"), spawn("import time; time.sleep(60)")
    manager.register_worker(worker.pid, "llm")
    with subprocess.Popen([sys.executable, "-c", GIVES, str(worker.pid)], stdout=subprocess.PIPE) as app:
        app.stdout.readline()
        found = manager.get_worker_by_pid(worker.pid)
        assert (found.jobs, found.status) == (("job-1", "job-2"), "running")
        manager.update_worker_state(worker.pid, job_id="mine")
        app.kill()
    for each in (manager, ResourceManager(app="app")):
        found = each.get_worker_by_pid(worker.pid)
        assert (found.jobs, found.status) == (("mine",), "running")      # what it was told by other means stays
        assert each.get_worker_by_job("job-1") is None
    manager.update_worker_state(worker.pid, job_id="mine", status="idle")
    with manager.job("job-1", 0, worker=worker.pid, timeout=0):
        assert ResourceManager(app="app").get_worker_by_pid(worker.pid).jobs == ("job-1",)
    assert [w.status for w in ResourceManager(app="app").get_all_workers()] == ["idle"]


def test_ram_is_looked_at_again_when_the_gpu_memory_is_granted(monkeypatch):
    machine = SimulatedMachine(memory_total_mb=64_000, memory_used_mb=10_000)
    gpu = SimulatedGpu("NVIDIA L4", processes=[SimulatedProcess(4200301, 20_000)])
    with SimulatedDriver([gpu], machine=machine):
        job = ResourceManager(track_self=False).job("job-1", 8_000, needs=dict(ram_mb=30_000), timeout=0.5)
        wait, undo = jobs.await_memory, []

        def late(*args):
            "While it waits for the GPU, another program takes the RAM"
            for pause in wait(*args):
                undo.append(use_ram(45_000*MIB))
                gpu.processes.clear()
                yield pause

        monkeypatch.setattr(jobs, "await_memory", late)
        with pytest.raises(ResourceBusy, match="of RAM"): job.__enter__()
        assert undo and job.manager.get_claims() == []


def test_memory_of_a_unified_gpu_and_ram_are_one_pool_for_a_job():
    machine = SimulatedMachine(memory_total_mb=120_000, memory_used_mb=80_000)
    with SimulatedDriver([SimulatedGpu("NVIDIA GB10", unified=True)], machine=machine):
        manager = ResourceManager(track_self=False)
        both = manager.job("job-1", 30_000, needs=dict(ram_mb=30_000), timeout=0)
        with pytest.raises(ResourceBusy, match="of RAM"): both.__enter__()
        assert manager.get_claims() == []
        with manager.job("job-2", 20_000, needs=dict(ram_mb=10_000), timeout=0) as job: assert job.device.unified


def test_a_job_without_a_gpu_shows_its_child_none(gpu):
    with ResourceManager().job("job-1", 0) as job:
        assert job.env == job.env_by_index == {"CUDA_VISIBLE_DEVICES": ""}


def test_a_driver_that_begins_to_hang_holds_a_job_no_longer_than_its_time():
    with SimulatedDriver([SimulatedGpu(memory_total_mb=1000, memory_used_mb=900)]) as driver:
        manager = ResourceManager(gpu_timeout=60)
        job = manager.job("a job", 500, timeout=1)
        def hang(): driver.hang("nvmlDeviceGetCount_v2")
        timer = threading.Timer(0.3, hang)
        timer.start()
        began = time.monotonic()
        with pytest.raises((ResourceBusy, ResourceUnavailable)): job.__enter__()
        timer.join()
        assert time.monotonic() - began < 5
