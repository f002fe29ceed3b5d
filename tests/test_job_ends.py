"However a job ends, nothing is left of it: every way to run one x every way to end it, and many at once"
import asyncio
import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import GONE, MIB
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cjm_fasthtml_resources.core.claims import is_ram
from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
from cjm_fasthtml_resources.core.job import JobRequest, PluginNeeds
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.reservations import Request
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

TOTAL = 24_000


class Registry:
    "One plugin, which declares what it needs or does not"
    def __init__(self, **plugin) -> None: self.plugin = SimpleNamespace(name="whisper", **plugin)
    def get_plugin(self, plugin_id): return self.plugin if plugin_id == "whisper" else None
    def load_plugin_config(self, plugin_id): return dict(device="cuda", model_id="large", api_key_file="x")


NEEDS = dict(
    told=dict(gpu_memory_mb=4_000),
    declared=dict(needs=PluginNeeds(4_000, 1)),
    mapping=dict(needs=dict(gpu_memory_mb=4_000)),
    learned=dict(plugin="whisper"),
    unknown=dict(),
    amount=dict(unknown=4_000),
    no_gpu=dict(gpu_memory_mb=0),
    two=dict(gpu_memory_mb=2_500, n=2),
    registry_two=dict(plugin="whisper", registry=Registry(needs=dict(gpu_memory_mb=2_500, devices=2))),
    registry=dict(plugin="whisper", registry=Registry(needs=dict(gpu_memory_mb=4_000))),
    registry_told=dict(plugin="whisper", gpu_memory_mb=4_000, registry=Registry()),
    registry_learned=dict(plugin="whisper", registry=Registry()),
)


class World:
    "A GPU and a small one, a manager with a worker, and what was there before"
    def __init__(self, app: str | None) -> None:
        self.gpu = SimulatedGpu("NVIDIA L4", memory_total_mb=TOTAL, memory_reserved_mb=0)
        self.small = SimulatedGpu("NVIDIA T400", memory_total_mb=3_000, memory_used_mb=400)
        self.manager, self.processes = ResourceManager(app=app), list[subprocess.Popen]()
        self.afterwards = []
        self.worker = self.start()
        self.manager.register_worker(self.worker.pid, "llm", plugin_name="llama")
        self.leases = set(self.manager.workers.leases.held)     # that of the registry itself
        self.manager.needs.raise_after_out_of_memory(self.key("large"), 3_200*MIB)     # 4,000 are learned
        self.manager.needs.raise_after_out_of_memory(self.key(""), 3_200*MIB)

    @staticmethod
    def key(resource):
        from cjm_fasthtml_resources.core.learned import need_key
        return need_key("whisper", resource, dict(device="cuda", model_id="large") if resource else None)

    def start(self) -> subprocess.Popen:
        self.processes.append(subprocess.Popen(["sleep", "60"]))
        return self.processes[-1]

    def kill(self, process: subprocess.Popen) -> None:
        process.kill()
        process.wait()

    def close(self) -> None:
        for process in self.processes: self.kill(process)


def nothing_is_left(world: World) -> None:
    manager = world.manager
    while world.afterwards: world.afterwards.pop()()
    assert manager.get_claims() == []
    lives = world.worker.poll() is None
    assert [w.pid for w in manager.get_all_workers()] == [world.worker.pid]
    state = manager.get_worker_by_pid(world.worker.pid)
    assert not lives or (state.status, state.jobs, state.plugin_name) == ("idle", (), "llama")
    assert manager.job_looks.jobs == () and manager.workers.leases.held == world.leases
    until = time.monotonic() + 3
    while threads := [t.name for t in threading.enumerate() if t.name in ("job-looks", "unload", "call")]:
        assert time.monotonic() < until, threads
        time.sleep(0.01)
    if lives:       # and all of it can be had
        with manager.job("next", TOTAL, worker=world.worker.pid, timeout=0): pass


@pytest.fixture(params=[None, "ends"], ids=["memory", "file"])
def world(request, folder):
    found = World(request.param)
    with SimulatedDriver([found.gpu, found.small]): yield found
    found.close()


class Failed(Exception): pass


# What happens in a block, and what comes out of it

def ends_well(world, job): pass
def fails(world, job): raise Failed
def is_interrupted(world, job): raise KeyboardInterrupt
def exits(world, job): raise SystemExit(3)
def runs_out(world, job): raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total")


def signalled(world, job):
    signal.raise_signal(signal.SIGINT)
    time.sleep(5)


def watches(world, job): assert job.watch(world.start().pid)


def watches_twice(world, job):
    child = world.start()
    assert job.watch(child.pid) and job.watch(child.pid)


def watches_two(world, job):
    first, second = world.start(), world.start()
    assert job.watch(first.pid) and job.watch(second.pid)
    claims = world.manager.get_claims()
    assert {c.holder.pid for c in claims} <= {second.pid}
    assert sum(not is_ram(c.device) for c in claims) == len(job.devices)


def watches_an_ended_one(world, job):
    child = world.start()
    child.kill()
    child.wait()
    assert job.watch(child.pid) is False and job.watch(GONE) is False


def watches_a_zombie(world, job):
    child = world.start()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert job.watch(child.pid) is False


def child_is_killed(world, job):
    child = world.start()
    job.watch(child.pid)
    world.kill(child)


def child_is_stopped(world, job):
    child = world.start()
    job.watch(child.pid)
    world.manager.stop_worker(child.pid, grace=1)
    child.wait()


def child_is_killed_and_fails(world, job):
    child_is_killed(world, job)
    raise Failed


def child_registers_itself(world, job):
    "As what the block started does, before it is watched"
    child = world.start()
    world.manager.register_worker(child.pid, "training", plugin_name="mine")
    try: assert job.watch(child.pid) and world.manager.get_worker_by_pid(child.pid).job_id == job.job_id
    finally: world.manager.unregister_worker(child.pid)


def worker_is_killed(world, job): world.kill(world.worker)


def worker_ends_its_job(world, job):
    "As the worker itself does, when it is done"
    world.manager.update_worker_state(world.worker.pid, job_id=job.job_id, status="idle")


def worker_loads(world, job):
    "A status of the app's own stays"
    worker_ends_its_job(world, job)
    world.manager.update_worker_state(world.worker.pid, status="loading")
    def still_loads():
        assert world.manager.get_worker_by_pid(world.worker.pid).status == "loading"
        world.manager.update_worker_state(world.worker.pid, status="idle")
    world.afterwards.append(still_loads)


def worker_is_given_more(world, job):
    world.manager.update_worker_state(world.worker.pid, job_id="more", status="running")
    world.manager.update_worker_state(world.worker.pid, job_id="more", status="idle")


ENDS = dict(well=ends_well, error=fails, interrupted=is_interrupted, signal=signalled, exit=exits, oom=runs_out,
            watch=watches, twice=watches_twice, two=watches_two, ended=watches_an_ended_one, zombie=watches_a_zombie,
            child_killed=child_is_killed, child_stopped=child_is_stopped, child_failed=child_is_killed_and_fails,
            registered=child_registers_itself, worker_killed=worker_is_killed,
            worker_done=worker_ends_its_job, loads=worker_loads,
            given_more=worker_is_given_more)
RAISES = dict(error=Failed, child_failed=Failed, interrupted=KeyboardInterrupt, signal=KeyboardInterrupt,
              exit=SystemExit, oom=RuntimeError)


def run(world, asked, end, is_async):
    "Run a job whose block ends like that"
    if not is_async:
        with world.manager.job("job-1", **asked) as job: ENDS[end](world, job)
        return

    async def main():
        async with world.manager.job("job-1", **asked) as job: ENDS[end](world, job)
    asyncio.run(main())


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("home", ["here", "worker"])
@pytest.mark.parametrize("need", NEEDS)
def test_however_a_block_ends_nothing_is_left(world, need, home, is_async):
    for end in ENDS:
        if end == "worker_killed" or end == "signal" and is_async: continue      # below
        asked = {**NEEDS[need], "timeout": 5, **(dict(worker=world.worker.pid) if home == "worker" else {})}
        if home == "worker" and need.startswith("registry"): asked["worker_type"] = "llm"
        try: run(world, asked, end, is_async)
        except RAISES.get(end, ()): pass
        else: assert end not in RAISES, end
        try: nothing_is_left(world)
        except AssertionError as error: raise AssertionError(f"after {end}: {error}") from error


@pytest.mark.parametrize("need", ["told", "learned", "unknown", "registry"])
def test_a_worker_that_is_killed_in_the_block_leaves_nothing(world, need):
    run(world, {**NEEDS[need], "worker": world.worker.pid, "worker_type": "llm"}, "worker_killed", False)
    assert world.manager.get_claims() == [] and world.manager.job_looks.jobs == ()
    with world.manager.job("next", TOTAL, timeout=0): pass
    world.manager.prune_dead_workers()
    assert world.manager.get_all_workers() == []


@pytest.mark.parametrize("need", ["told", "mapping", "learned", "unknown", "amount", "registry", "two", "registry_two"])
@pytest.mark.parametrize("seconds", [0, 0.05, 0.3])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_job_that_gives_up_leaves_nothing(world, need, seconds, is_async):
    world.gpu.processes[:] = [SimulatedProcess(4_200_301, 22_000)]
    for more in (dict(), dict(worker=world.worker.pid)):
        began = time.monotonic()
        asked = {**NEEDS[need], **more, "timeout": seconds}
        with pytest.raises(ResourceBusy) as caught: run(world, asked, "well", is_async)
        assert time.monotonic() - began < seconds + 2 and caught.value.conflict is not None
        world.gpu.processes.clear()
        nothing_is_left(world)
        world.gpu.processes[:] = [SimulatedProcess(4_200_301, 22_000)]


def test_a_worker_that_is_killed_while_its_job_waits_ends_the_waiting(world):
    world.gpu.processes[:] = [SimulatedProcess(4_200_301, 22_000)]
    threading.Timer(0.3, lambda: world.kill(world.worker)).start()
    with pytest.raises(ProcessLookupError, match=f"PID {world.worker.pid} ended"):
        run(world, dict(gpu_memory_mb=4_000, worker=world.worker.pid, timeout=20), "well", False)
    assert world.manager.get_claims() == [] and world.manager.job_looks.jobs == ()


@pytest.mark.parametrize("what", ["turn", "memory", "decision", "running"])
def test_a_task_that_is_cancelled_leaves_nothing(world, what):
    manager, pid = world.manager, world.worker.pid
    asked = dict(gpu_memory_mb=4_000)
    if what == "turn":
        manager.update_worker_state(pid, job_id="other", status="running")
        asked["worker"] = pid
    if what in ("memory", "decision"): world.gpu.processes[:] = [SimulatedProcess(4_200_301, 22_000)]
    if what == "decision": asked.update(plugin="whisper", registry=Registry())

    async def main():
        begun = asyncio.Event()

        async def one():
            async with manager.job("job-1", **asked):
                begun.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(one())
        if what == "running": await begun.wait()
        else: await asyncio.sleep(0.2)
        assert begun.is_set() == (what == "running")
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task

    asyncio.run(main())
    if what == "turn":
        assert manager.get_worker_by_pid(pid).jobs == ("other",)
        manager.update_worker_state(pid, status="idle")
    world.gpu.processes.clear()
    nothing_is_left(world)


def test_a_task_that_is_cancelled_at_any_moment_leaves_nothing(world):
    async def main():
        for number in range(25):
            async def one(number=number):
                async with world.manager.job(f"job-{number}", 4_000, worker=world.worker.pid):
                    await asyncio.sleep(0.002)
            task = asyncio.create_task(one())
            await asyncio.sleep(0.0008*number)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError): await task

    asyncio.run(main())
    nothing_is_left(world)


def test_a_forks_child_that_leaves_the_block_puts_nothing_back(world):
    "The job is its parent's, which goes on"
    manager, pid = world.manager, world.worker.pid
    with manager.job("job-1", 4_000, worker=pid) as job:
        child = 0
        try:
            with manager.job("job-2", 1_000) as inner:
                job_child = world.start()
                inner.watch(job_child.pid)
                if (child := os.fork()) == 0: raise Failed
                assert os.waitpid(child, 0)[1] == 0
                assert len(manager.get_claims()) == 2 and manager.get_worker_by_pid(job_child.pid).job_id == "job-2"
        except Failed:
            if child: raise
            with contextlib.suppress(BaseException): job.close()
            os._exit(0)
        assert manager.get_worker_by_pid(pid).jobs == ("job-1",) and len(manager.get_claims()) == 1
    nothing_is_left(world)


# Sequences against a plain model

@st.composite
def steps(draw):
    "Jobs one after the other or within each other: their plugin, what they use, and how they end"
    one = st.tuples(st.sampled_from("ab"), st.integers(0, 9_000), st.sampled_from(["well", "error", "oom", "kill"]),
                    st.sampled_from(["told", "learned", "amount"]), st.booleans())
    return draw(st.lists(one, min_size=1, max_size=8))


class Model:
    "What is asked for next, by the words of the documentation"
    def __init__(self) -> None: self.highest, self.floor = dict[str, int](), dict[str, float]()

    def asks(self, plugin: str) -> float | None:
        known = max(self.highest.get(plugin, 0)*110/100, self.floor.get(plugin, 0))
        return min(math.ceil(known), TOTAL) if known else None

    def ended(self, plugin: str, used: int, end: str) -> None:
        if end == "well": self.highest[plugin] = max(self.highest.get(plugin, 0), used)
        if end == "oom": self.floor[plugin] = max(self.floor.get(plugin, 0), int(used*MIB*1.25)/MIB)


@given(steps())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_sequences_of_jobs_follow_a_plain_model(sequence):
    gpu, model = SimulatedGpu("NVIDIA L4", memory_total_mb=TOTAL, memory_reserved_mb=0), Model()
    with SimulatedDriver([gpu]):
        manager = ResourceManager()
        for number, (plugin, used, end, need, nested) in enumerate(sequence):
            told = dict(told=dict(gpu_memory_mb=5_000), amount=dict(unknown=3_000)).get(need, {})
            expected = model.asks(plugin)
            asks = 5_000 if need == "told" else expected or dict(amount=3_000).get(need, int(0.9*TOTAL))
            with contextlib.suppress(RuntimeError, Failed):  # noqa: SIM117 - one is what the other raises
                with manager.job(f"job-{number}", plugin=plugin, timeout=5, **told) as job:
                    assert (job.reservation.gpu_memory_mb, job.is_alone) == (asks, not (told or expected))
                    room = manager.check_gpu_availability().devices[0].room
                    assert sum(c.memory for c in manager.get_claims()) == asks*MIB and room == TOTAL*MIB - asks*MIB
                    gpu.processes[:] = [SimulatedProcess(os.getpid(), used)] if used else []
                    manager.job_looks.look(False)
                    if nested and asks < TOTAL:      # another job of this process: nothing is learned from either
                        with manager.job(f"inner-{number}", min(500, TOTAL - asks), plugin="inner", timeout=5): pass
                    gpu.processes[:] = []
                    if end == "oom": raise RuntimeError("CUDA out of memory")
                    if end != "well": raise Failed
            if not (nested and asks < TOTAL): model.ended(plugin, used, end)
            assert manager.get_claims() == [] and manager.get_all_workers() == []
            assert manager.check_gpu_availability().devices[0].room == TOTAL*MIB
        assert manager.expected_need("inner") is None


# Many at once

@pytest.mark.parametrize("app", [None, "many"], ids=["memory", "file"])
@pytest.mark.parametrize("kind", ["threads", "tasks"])
def test_twenty_jobs_at_once_never_have_more_than_there_is(folder, app, kind):
    manager, done, most = ResourceManager(app=app), [], [0]
    gpu = SimulatedGpu(memory_total_mb=10_000, memory_reserved_mb=0)

    def look():
        claims = [c for c in manager.get_claims() if c.device]
        most[0] = max(most[0], sum(c.memory for c in claims)//MIB)

    def work(number):
        with manager.job(f"job-{number}", 3_000, timeout=60), driver.allocate(3_000):
            look()
            time.sleep(0.005)
            done.append(number)

    async def task(number):
        async with manager.job(f"job-{number}", 3_000, timeout=60):
            with driver.allocate(3_000):
                look()
                await asyncio.sleep(0.005)
                done.append(number)

    with SimulatedDriver([gpu]) as driver:
        if kind == "threads":
            threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
        else:
            async def main(): await asyncio.gather(*map(task, range(20)))
            asyncio.run(main())
        assert sorted(done) == list(range(20)) and 6_000 <= most[0] <= 9_000
        assert manager.get_claims() == [] and manager.job_looks.jobs == ()


@pytest.mark.parametrize("kind", ["threads", "tasks"])
def test_twenty_jobs_of_one_worker_take_turns_in_their_order(world, kind):
    manager, pid, began, at_work = world.manager, world.worker.pid, [], []

    def enter(number):
        assert not at_work
        at_work.append(number)
        began.append(number)

    def work(number):
        with manager.job(f"job-{number}", 3_000, worker=pid, timeout=60):
            enter(number)
            time.sleep(0.003)
            at_work.clear()

    async def task(number):
        async with manager.job(f"job-{number}", 3_000, worker=pid, timeout=60):
            enter(number)
            await asyncio.sleep(0.003)
            at_work.clear()

    manager.update_worker_state(pid, job_id="first", status="running")      # until all are in its line
    if kind == "threads":
        threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
        for thread in threads: thread.start()
        while len(manager.get_worker_by_pid(pid).jobs) < 21: time.sleep(0.01)
        line = manager.get_worker_by_pid(pid).waiting_jobs
        manager.update_worker_state(pid, job_id="first", status="idle")
        for thread in threads: thread.join()
    else:
        async def main():
            tasks = [asyncio.create_task(task(number)) for number in range(20)]
            while len(manager.get_worker_by_pid(pid).jobs) < 21: await asyncio.sleep(0.01)
            found = manager.get_worker_by_pid(pid).waiting_jobs
            manager.update_worker_state(pid, job_id="first", status="idle")
            await asyncio.gather(*tasks)
            return found
        line = asyncio.run(main())
    assert [f"job-{number}" for number in began] == list(line)
    nothing_is_left(world)


TURNS = """import sys, time
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
pid, name = int(sys.argv[1]), sys.argv[2]
with SimulatedDriver([SimulatedGpu(memory_total_mb=10_000)]) as driver:
    manager = ResourceManager(app="turns")
    sys.stdin.readline()
    for number in range(6):
        with manager.job(f"{name}-{number}", 8_000, worker=pid, timeout=60) as job:
            began = time.monotonic()
            claims = [c for c in manager.get_claims() if c.device]
            assert len(claims) == 1, claims
            assert manager.get_worker_by_pid(pid).job_id == job.job_id
            time.sleep(0.01)
            ended = time.monotonic()
        print(began, ended, flush=True)
"""


def test_the_jobs_of_several_processes_for_one_worker_take_turns(folder, spawn):
    worker, manager = subprocess.Popen(["sleep", "60"]), ResourceManager(app="turns")
    try:
        manager.register_worker(worker.pid, "llm")
        command = [sys.executable, "-c", TURNS, str(worker.pid)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        programs = [subprocess.Popen([*command, name], **pipes) for name in "abc"]
        for program in programs:
            program.stdin.write("go\n")
            program.stdin.flush()
        answers = [program.communicate()[0] for program in programs]
        assert [program.returncode for program in programs] == [0, 0, 0]
        times = sorted(tuple(map(float, line.split())) for out in answers for line in out.splitlines())
        assert len(times) == 18 and all(a[1] <= b[0] for a, b in zip(times, times[1:], strict=False))
        with SimulatedDriver([SimulatedGpu()]):
            assert manager.get_claims() == [] and manager.get_worker_by_pid(worker.pid).jobs == ()
    finally:
        worker.kill()
        worker.wait()


# What is passed in

NUMBERS = [float("nan"), float("inf"), -float("inf"), -1, 10**400, "8000", b"1", True, [1], None.__class__]
TEXTS = [7, b"x", ["x"], "\ud800", "a\0b", "x"*2_000_000]
HOSTILE = [
    *[("gpu_memory_mb", value) for value in NUMBERS],
    *[("timeout", value) for value in NUMBERS],
    *[("unknown", value) for value in [*NUMBERS, "all", 0, "\ud800"]],
    *[("worker", value) for value in [*NUMBERS[:-2], 0, 2**40, "1"]],
    *[("job_id", value) for value in [*TEXTS, "", None]], *[("worker_type", value) for value in [*TEXTS, "", None]],
    *[("plugin", value) for value in TEXTS], *[("resource", value) for value in TEXTS],
    *[("config", value) for value in [5, "x", [("a", 1)], {1: 2}, {"a": "\ud800"}]],
    *[("needs", value) for value in [5, "x", [5], dict(gpu=1), dict(gpu_memory_mb=float("nan")), dict(ram_mb="x"),
                                     dict(ram_mb=None), {1: 2}]],
    *[(flag, value) for flag in ("concurrent", "progress", "make_room") for value in (1, "yes", None, [])],
]


@pytest.mark.parametrize("name, value", HOSTILE, ids=[f"{name}-{number}" for number, (name, _) in enumerate(HOSTILE)])
def test_a_wrong_argument_is_named(name, value):
    "Before anything has happened"
    with pytest.raises((TypeError, ValueError)) as caught: ResourceManager().job(**{"job_id": "job-1", name: value})
    said = str(caught.value)
    words = dict(needs=("needs", "gpu_memory_mb", "ram_mb", "field"), unknown=("unknown",))
    assert any(word in said for word in words.get(name, (name,))) and len(said) < 500
    said.encode()


@pytest.mark.parametrize("device", [float("nan"), -2, 10**30, "cuda:99", "\ud800", "GPU-none", [0], True, b"0"])
@pytest.mark.parametrize("need", [dict(gpu_memory_mb=10), dict()], ids=["told", "unknown"])
def test_a_device_that_is_none_is_named(world, device, need):
    with pytest.raises((TypeError, ValueError), match="device"), world.manager.job("job-1", device=device, **need): pass
    nothing_is_left(world)


@pytest.mark.parametrize("mb", [10**6, TOTAL + 1])
def test_more_than_any_gpu_has_is_an_error_at_once(world, mb):
    for more in (dict(), dict(worker=world.worker.pid), dict(make_room=True)):
        job = world.manager.job("job-1", mb, **more)
        with pytest.raises(ValueError, match="gpu_memory_mb must be at most"), job: pass
    nothing_is_left(world)


def test_without_a_gpu_it_is_said_at_once(folder):
    for need in NEEDS:
        manager = ResourceManager()
        with SimulatedDriver([]):
            asked = NEEDS[need]
            if need == "no_gpu":
                with manager.job("job-1", **asked): pass
                continue
            with pytest.raises(ResourceUnavailable, match="lists no GPU"), manager.job("job-1", **asked): pass
        assert manager.get_claims() == []


SECRET = "sk-verysecret0123456789"


def test_secrets_of_a_configuration_are_never_shown(world, caplog, capsys):
    "In no repr, log or error, also when it fails"
    caplog.set_level(logging.DEBUG)
    config, said = dict(device="cuda", model_id="large", api_key=SECRET, nested=dict(token=SECRET)), []
    registry = Registry(needs=dict(gpu_memory_mb=4_000))
    for more in (dict(), dict(registry=registry), dict(worker=world.worker.pid)):
        job = world.manager.job("job-1", 4_000, plugin="whisper", config=config, timeout=0, **more)
        said += [repr(job), repr(job.asked), repr(JobRequest("a", config=config))]
        with contextlib.suppress(RuntimeError), job:
            job.watch(world.start().pid)
            said += [repr(job), repr(world.manager.get_all_workers()), repr(job.decision)]
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        said += [repr(job), job.explanation or ""]
        world.gpu.processes[:] = [SimulatedProcess(4_200_301, 22_000)]
        busy = world.manager.job("job-2", 4_000, plugin="whisper", config=config, timeout=0, **more)
        with pytest.raises(ResourceBusy) as caught, busy: pass
        said += [str(caught.value), repr(caught.value)]
        world.gpu.processes.clear()
    with pytest.raises((TypeError, ValueError)) as wrong:
        world.manager.job("job-1", config={**config, "bad": "\ud800"})
    said += [str(wrong.value), caplog.text, *capsys.readouterr()]
    assert SECRET not in "".join(said) and len(said) > 10


LATER = """import os, sys
from unittest.mock import patch
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.store import StoreError
manager = ResourceManager(app="later")
with patch.object(ResourceManager, "update_worker_state", autospec=True) as update:
    update.side_effect = lambda manager, pid, **given: manager.workers.update(pid, given)
    with manager.job("job-1", 0, worker=int(sys.argv[1])):
        update.side_effect = StoreError("no space left")
print(manager.get_worker_by_job("job-1"), flush=True)
"""


def test_a_full_disk_keeps_no_job_at_its_worker(folder):
    worker, manager = subprocess.Popen(["sleep", "60"]), ResourceManager(app="later")
    try:
        manager.register_worker(worker.pid, "llm")
        out = subprocess.run([sys.executable, "-c", LATER, str(worker.pid)], capture_output=True, text=True, timeout=60)
        assert out.stdout == "None\n", out.stderr       # the job's lease ended with its block
        assert "is tried again later: no space left" in out.stderr
        assert manager.get_worker_by_pid(worker.pid).jobs == ()
        assert manager.get_worker_by_pid(worker.pid).status == "idle"
    finally:
        worker.kill()
        worker.wait()


def test_two_interruptions_in_a_row_at_the_end_of_a_job_leave_nothing(monkeypatch):
    calls = []
    real = Request.withdraw

    def interrupted(request):
        calls.append(request)
        if len(calls) <= 2: raise KeyboardInterrupt
        real(request)

    monkeypatch.setattr(Request, "withdraw", interrupted)
    with SimulatedDriver([SimulatedGpu(memory_total_mb=TOTAL)]):
        manager = ResourceManager(track_self=False)
        with pytest.raises(KeyboardInterrupt), manager.job("a job", 20_000, timeout=0): pass
        with manager.reserve(20_000, timeout=0): pass   # at the next use
        assert manager.get_claims() == [] and len(calls) > 2
