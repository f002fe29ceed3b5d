"The history: a recorder that is killed, a full disk, a clock that jumps, hostile names, months in 64 MB"
import itertools
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from click.testing import CliRunner
from conftest import GIB, wait_until
from hypothesis import given
from hypothesis import strategies as st

from cjm_fasthtml_resources import explain_out_of_memory
from cjm_fasthtml_resources.cli import main
from cjm_fasthtml_resources.core.caps import Cap
from cjm_fasthtml_resources.core.folder import StoreError
from cjm_fasthtml_resources.core.gpu import GpuSnapshot
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.core.needs import history_path
from cjm_fasthtml_resources.core.samples import take_sample
from cjm_fasthtml_resources.recorded.changes import Asked, Change
from cjm_fasthtml_resources.recorded.file import (
    LEVELS,
    MINUTE,
    QUARTER,
    SECOND,
    add,
    alone,
    opened,
    read_changes,
    read_rows,
)
from cjm_fasthtml_resources.recorded.history import RecordedHistory
from cjm_fasthtml_resources.recorded.notes import Notes
from cjm_fasthtml_resources.recorded.queues import Job, QueueRule, play_jobs, replay_queue
from cjm_fasthtml_resources.recorded.recorder import Recorder
from cjm_fasthtml_resources.recorded.replay import replay
from cjm_fasthtml_resources.recorded.rows import Place, Row, Share, to_row
from cjm_fasthtml_resources.recorded.scenario import save_scenario
from cjm_fasthtml_resources.simulate import (
    SimulatedDriver,
    SimulatedGpu,
    SimulatedHostProcess,
    SimulatedMachine,
    SimulatedProcess,
    load_scenario,
)

HOSTILE = "\x1b]0;owned\x07<script>alert(1)</script>\n\u202e"


def row_at(when: float, seconds: float = 1.0, processes: int = 1) -> Row:
    "A row of a GPU with so many processes, whose names do not compress well"
    shares = tuple(Share(1000 + n, n*7.31, "external", os.urandom(20).hex(), "ada", GIB, GIB) for n in range(processes))
    gpu = Place("GPU-1", 0, "NVIDIA L4", "available", 24*GIB, GIB, GIB, 0, GIB, 0, 0, 5, 40, 30.0, shares)
    return Row(when, seconds, (gpu,))


RECORDER = """
import sys, time
from pathlib import Path
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.recorded import recorder
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
recorder.FLUSH_SECONDS = 0.02
with SimulatedDriver([SimulatedGpu()]):
    with recorder.Recorder(ResourceMonitor(ResourceManager(), interval=0.1), Path(sys.argv[1])) as made:
        print(made.records, flush=True)
        time.sleep(60)
"""


def start_recorder(path: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", RECORDER, path], stdout=subprocess.PIPE, text=True)


def test_a_recorder_that_is_killed_leaves_a_good_file_and_the_next_one_takes_over(tmp_path):
    path = tmp_path/"history.sqlite3"
    for _ in range(3):
        with start_recorder(path) as process:
            assert process.stdout.readline() == "True\n"       # nothing of the killed one is in the way
            known = len(read_rows(path, SECOND))
            wait_until(lambda known=known: len(read_rows(path, SECOND)) > known)
            process.kill()
    with opened(path) as db: assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    began = [change for _, change in read_changes(path) if change.kind == "recording"]
    assert len(began) == 3 and not list(tmp_path.glob("*.damaged*"))


def test_a_recorder_that_is_suspended_is_not_written_beside(tmp_path):
    path = tmp_path/"history.sqlite3"
    with start_recorder(path) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        with alone(path) as free: assert not free
        process.kill()


def test_on_a_full_disk_nothing_is_lost_for_a_while_and_the_file_stays_good(tmp_path):
    path = tmp_path/"history.sqlite3"
    add(path, [row_at(1)])
    with opened(path) as db: pages = db.execute("PRAGMA page_count").fetchone()[0]
    monitor = ResourceMonitor(ResourceManager())
    with SimulatedDriver([SimulatedGpu()]):
        recorder = Recorder(monitor, path)
        with monitor.subscribe(recorder._hear): wait_until(lambda: monitor.latest)
    full = patch.dict(add.__globals__, LARGEST=4096*(16 + pages), _make_room=lambda db: None)
    with full, pytest.raises(StoreError, match="cannot be written: its disk is full"):
        add(path, [row_at(2 + n, processes=64) for n in range(50)])
    assert [row.time for row in read_rows(path, SECOND)] == [1]   # all or none
    recorder.flush()
    assert len(read_rows(path, SECOND)) == 2


def test_what_is_kept_stays_within_its_size_and_keeps_the_newest(tmp_path):
    path, limit = tmp_path/"history.sqlite3", 2_000_000
    with patch.dict(add.__globals__, LARGEST=limit):
        for batch in range(20):
            add(path, [row_at(1000*(20*batch + n), processes=60) for n in range(20)])
            assert path.stat().st_size <= limit
    for level in LEVELS:
        kept = read_rows(path, level)
        assert 20 < len(kept) < 400, level
    assert read_rows(path, SECOND)[-1].time == 399_000


def test_ninety_days_of_quarters_a_day_of_minutes_and_an_hour_of_seconds_are_kept(tmp_path):
    path, counts = tmp_path/"history.sqlite3", dict[int, int]()
    small = [level._replace(keeps=level.keeps//60) for level in LEVELS]
    with patch.dict(add.__globals__, LEVELS=small):
        for start in range(0, 400_000, 20_000): add(path, [row_at(start + n, 100) for n in range(0, 20_000, 100)])
    for level in LEVELS: counts[level.number] = len(read_rows(path, level))
    assert counts == {0: 60, 1: 24, 2: 144}
    assert read_rows(path, QUARTER)[-1].time >= 398_000 and read_rows(path, MINUTE)[-1].time >= 399_000


@pytest.mark.parametrize("jump", [-86_400, 86_400, 31_536_000])
def test_a_clock_that_jumps_deletes_nothing_and_is_told(tmp_path, jump):
    path, now = tmp_path/"history.sqlite3", 1_800_000_000
    add(path, [row_at(now + n) for n in range(300)])
    add(path, [row_at(now + jump + n) for n in range(300)])
    add(path, [row_at(now + 300 + n) for n in range(300)])       # it was set right
    assert len(read_rows(path, SECOND)) == 900
    history = RecordedHistory(path)
    assert history.at(now + 100).seconds == history.at(now + jump + 100).seconds == 1
    assert sum(row.seconds for row in read_rows(path, MINUTE)) <= 900


def test_hostile_names_stay_text(tmp_path):
    path = tmp_path/"history.sqlite3"
    gpu = SimulatedGpu()
    machine = SimulatedMachine(processes=[SimulatedHostProcess(4711, HOSTILE, HOSTILE)])
    with SimulatedDriver([gpu], machine):
        monitor = ResourceMonitor(ResourceManager(app="x" + "y"*50), interval=0.1)
        with Recorder(monitor, path):
            wait_until(lambda: monitor.latest)
            gpu.processes.append(SimulatedProcess(4711, 2000))
            number = monitor.latest.number
            wait_until(lambda: monitor.latest.number > number + 2)
    for arguments in (["--since", "10s"], ["--at", time.strftime("%Y-%m-%dT%H:%M:%S")], ["--json"], ["--csv"]):
        output = CliRunner().invoke(main, ["history", "--file", str(path), *arguments]).output
        assert not {"\x1b", "\x07", "\u202e"} & set(output), arguments
    assert "4711" in CliRunner().invoke(main, ["history", "--file", str(path), "--since", "10s"]).output


def test_a_reader_and_a_writer_do_not_stop_each_other(tmp_path):
    path = tmp_path/"history.sqlite3"
    with start_recorder(path) as process:
        process.stdout.readline()
        until = time.monotonic() + 2
        while time.monotonic() < until: RecordedHistory(path).between(time.time() - 10)
        process.kill()
    assert read_rows(path, SECOND)


def test_another_users_file_is_not_used(tmp_path):
    path = tmp_path/"history.sqlite3"
    add(path, [row_at(1)])
    path.chmod(0o666)
    with pytest.raises(StoreError, match="can be written by other users"): read_rows(path, SECOND)
    result = CliRunner().invoke(main, ["history", "--file", str(path)])
    assert result.exit_code == 74 and "can be written by other users" in result.output


def test_a_file_of_a_later_version_is_said_and_left(tmp_path):
    path = tmp_path/"history.sqlite3"
    add(path, [row_at(1)])
    with opened(path, "rw") as db: db.execute("PRAGMA user_version = 99")
    for use in (lambda: read_rows(path, SECOND), lambda: add(path, [row_at(2)])):
        with pytest.raises(StoreError, match="has version 99"): use()
    assert path.exists() and not list(tmp_path.glob("*.damaged*"))


def lacks_memory(**more) -> str:
    "The explanation of an error on a GPU that another program has filled"
    gpu = SimulatedGpu(memory_total_mb=24576, uuid="GPU-1", processes=[SimulatedProcess(4711, 24000)])
    with SimulatedDriver([gpu], SimulatedMachine(processes=[SimulatedHostProcess(4711, "train.py", "bob")])):
        found = explain_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 8.00 GiB."), **more)
    assert found is not None and "train.py" in found
    return found


def test_an_explanation_names_who_came_shortly_before_and_not_who_came_long_before(tmp_path):
    path, now = tmp_path/"history.sqlite3", time.time()
    came = Change("started", "GPU-1", 4711, f"{HOSTILE} (PID 4711, user bob) began to use GPU 0 (27.0 GiB).")
    add(path, [], [(now - 4000, came._replace(text="long ago")), (now - 60, came),
                   (now - 50, came._replace(place="GPU-2", text="elsewhere")),
                   (now - 40, came._replace(pid=os.getpid(), text="the job itself"))])
    text = lacks_memory(history=path)
    clock = time.strftime("%H:%M", time.localtime(now - 60))
    assert f"Shortly before: at {clock}" in text and "user bob) began to use GPU 0 (27.0 GiB). To fix it" in text
    assert not {"\x1b", "\x07", "\u202e", "\n"} & set(text)
    assert not any(words in text for words in ("long ago", "elsewhere", "itself"))


def test_an_explanation_goes_without_a_history_that_cannot_be_read_now(tmp_path):
    path = tmp_path/"history.sqlite3"
    plain = lacks_memory()
    assert lacks_memory(history=path) == plain and not path.exists()
    add(path, [], [(time.time(), Change("started", "GPU-1", 4711, "train.py started."))])
    assert "Shortly before" in lacks_memory(history=path)
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")                              # a recorder in the middle of writing
    began = time.monotonic()
    assert lacks_memory(history=path) == plain
    assert time.monotonic() - began < 4                            # SQLite's own wait would be 5 s
    writer.execute("UPDATE changes SET text = x'ff', pid = 'x'")
    writer.execute("COMMIT")
    assert "Cannot read" not in lacks_memory(history=path)
    writer.execute("UPDATE changes SET time = 1e300")
    writer.close()
    assert lacks_memory(history=path) == plain
    path.write_bytes(b"damaged"*1000)
    assert lacks_memory(history=path) == plain
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"damaged"*1000


def test_where_there_is_no_history_an_explanation_does_not_import_it(tmp_path):
    code = ("import sys\nfrom cjm_fasthtml_resources.core.out_of_memory import read_lately\n"
            "assert read_lately() == ()\nassert not any('.recorded' in name for name in sys.modules)\n")
    env = dict(os.environ, CJM_RESOURCES_DIR=str(tmp_path))
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)


def test_a_saved_moment_is_the_same_machine_on_the_simulated_driver(tmp_path):
    gpus = [SimulatedGpu("NVIDIA A100", 40960, uuid="GPU-7", temperature=61, processes=[
        SimulatedProcess(4711, 9000), SimulatedProcess(4712, None), SimulatedProcess(4713, 12000)]), SimulatedGpu()]
    machine = SimulatedMachine(40000, 9000, processes=[
        SimulatedHostProcess(4711, "train.py", "bob", memory_mb=700), SimulatedHostProcess(4713, "python", "ada")])
    with SimulatedDriver(gpus, machine):
        manager = ResourceManager(track_self=False)
        manager.register_worker(4713, "transcription", plugin_name="whisper", job_id="job-1")
        row = to_row(take_sample(manager))
        told = manager.check_gpu_availability()
    save_scenario(row, tmp_path/"moment.json")
    with load_scenario(tmp_path/"moment.json") as driver:
        again = ResourceManager(track_self=False)
        for worker in driver.workers: again.register_worker(**worker)
        answer, ram = again.check_gpu_availability(), again.check_memory_availability().memory

    def known(conflict):
        return [(d.device.name, d.device.uuid, d.device.memory_total, d.device.memory_used, d.device.temperature,
                 d.status, d.shares, [(p.pid, p.name, p.username, p.memory_used, p.owner) for p in d.processes])
                for d in conflict.devices]

    first, second = known(told), known(answer)
    assert first[0][:7] == second[0][:7] and answer.message == told.message
    assert {p[0]: p[2:] for p in first[0][7]} == {p[0]: p[2:] for p in second[0][7]}
    assert ram.memory.total == 40000*2**20 and ram.memory.used == 9000*2**20
    assert again.get_worker_by_pid(4713).job_id == "job-1"
    output = CliRunner().invoke(main, ["--simulate", str(tmp_path/"moment.json")]).output
    assert "train.py" in output and "bob" in output


@pytest.mark.parametrize("name", [HOSTILE, "\ud800", "x\0y", "界"*60, "", "../../etc worker, x", "a worker"*20])
def test_hostile_names_in_a_saved_scenario_stay_text(tmp_path, name):
    share = Share(4711, 7.5, "app", name, name, GIB, GIB)
    row = row_at(1_800_000_000)
    row = row._replace(places=(row.places[0]._replace(name=name, shares=(share, share._replace(pid=0))),))
    save_scenario(row, tmp_path/"moment.json")
    with load_scenario(tmp_path/"moment.json") as driver:
        manager = ResourceManager(track_self=False)
        for worker in driver.workers: manager.register_worker(**worker)
        found = manager.check_gpu_availability()
    assert len(found.devices[0].processes) == 2 and len(found.app_pids) == 2
    output = CliRunner().invoke(main, ["--simulate", str(tmp_path/"moment.json")]).output
    assert "4711" in output and not {"\x1b", "\x07", "\u202e", "\0"} & set(output)


@pytest.mark.parametrize("wrong", [
    dict(temperature="hot"), dict(total="x"), dict(most=-5), dict(key=7), dict(name=None),
    dict(shares=(Share(-4, 1.0, "app", "x", "y", GIB, GIB),))])
def test_a_row_of_a_damaged_history_is_refused_and_no_file_is_left(tmp_path, wrong):
    row = row_at(1_800_000_000)
    with pytest.raises(ValueError, match="this row of the history cannot be a scenario"):
        save_scenario(row._replace(places=(row.places[0]._replace(**wrong),)), tmp_path/"moment.json")
    assert not [*tmp_path.iterdir()]


def test_the_commands_say_what_is_wrong_with_their_files(tmp_path):
    path, out = tmp_path/"history.sqlite3", tmp_path/"moment.json"
    for arguments in (["--at", "03:12", "--save-scenario", str(out)], ["--what-if-threshold", "60"]):
        def run(*more, arguments=arguments):
            return CliRunner().invoke(main, ["history", *arguments, "--file", str(path), *more])
        path.unlink(missing_ok=True)
        assert run().exit_code == 66 and "nothing is recorded for that time" in run().output and not path.exists()
        path.write_bytes(b"damaged"*1000)
        assert run().exit_code == 74 and "not a database" in run().output
        assert not out.exists() and path.read_bytes() == b"damaged"*1000
    now = time.time()
    path.unlink()
    add(path, [row_at(now - 20 + n) for n in range(10)])
    when = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now - 15))
    for target, code in ((tmp_path/"nowhere"/"x.json", 74), (tmp_path/"x.txt", 2)):
        found = CliRunner().invoke(main, ["history", "--at", when, "--save-scenario", str(target), "--file", str(path)])
        assert found.exit_code == code, found.output


@pytest.mark.parametrize("threshold", [0, 4.1, 4.2, 45, 60, 100])
@pytest.mark.parametrize("used", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (6, 1, 0), (10, 14, 0), (0, 1, 13), (20, 0, 4)])
def test_a_replay_answers_as_a_check_of_the_same_moment_does(tmp_path, threshold, used):
    app, external, hidden = (size*GIB for size in used)
    shares = tuple(Share(pid, 7.5, owner, "python", "ada", size, size)
                   for pid, owner, size in ((11, "app", app), (12, "external", external)) if size)
    total = app + external + hidden
    gpu = Place("GPU-1", 0, "NVIDIA L4", "", 24*GIB, total, total, app, external, hidden, 0, 5, 40, 30.0, shares)
    row = Row(1_800_000_000.0, 1.0, (gpu,))
    save_scenario(row, tmp_path/"moment.json")
    with load_scenario(tmp_path/"moment.json") as driver:
        manager = ResourceManager(threshold, track_self=False)
        for worker in driver.workers: manager.register_worker(**worker)
        checked = manager.check_gpu_availability().status
    assert replay([row], threshold, usual=45).answers[0].other is checked


def test_what_if_lists_the_stretches_with_another_answer(tmp_path):
    path, now = tmp_path/"history.sqlite3", time.time()
    rows = [row_at(now - 100 + n) for n in range(100)]
    busy = [row._replace(places=(row.places[0]._replace(used=12*GIB, external=12*GIB),)) for row in rows[40:]]
    add(path, rows[:40] + busy)
    found = CliRunner().invoke(main, ["history", "--since", "10m", "--what-if-threshold", "60", "--file", str(path)])
    assert found.exit_code == 0 and "threshold of 60 %" in found.output and "with 45 %" in found.output
    assert "available instead of external busy, for 1 min" in found.output


def test_the_error_of_a_job_names_who_came_shortly_before(tmp_path, monkeypatch):
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    monkeypatch.setattr(GpuSnapshot, "simulated", False)      # of a real machine the user's own history is read
    add(history_path(), [], [(time.time() - 60, Change("started", "GPU-1", 4711, "train.py (PID 4711) began."))])
    gpu = SimulatedGpu(memory_total_mb=24576, uuid="GPU-1", processes=[SimulatedProcess(4711, 1000)])
    with SimulatedDriver([gpu]), pytest.raises(RuntimeError) as raised, ResourceManager().job("a", gpu_memory_mb=2000):
        gpu.processes[0].memory_mb = 24000
        raise RuntimeError("CUDA out of memory. Tried to allocate 8.00 GiB.")
    text = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", ())])
    assert "Shortly before: at " in text and "(PID 4711) began" in text


PLANS = st.lists(st.fixed_dictionaries(dict(
    asked=st.integers(0, 40), seconds=st.integers(1, 30), gib=st.integers(1, 20), n=st.integers(1, 2),
    priority=st.integers(-1, 1), app=st.sampled_from(["a", "b", "c"]))), min_size=1, max_size=8)
CAPS = st.builds(Cap, st.sampled_from([0.5, 0.75, 1.0]), st.sampled_from(["user", "app"]))
RULES = st.builds(QueueRule, st.none() | CAPS,
                  st.dictionaries(st.sampled_from(["a", "b"]), st.integers(-2, 2)))


def jobs_of(plans: list[dict], *keys: str) -> list[Job]:
    "Jobs that take so long, in the order of asking; when they run is still open"
    return [Job(plan["gib"]*GIB, keys, keys[:plan["n"]], plan["priority"], plan["app"], plan["app"]*2,
                float(plan["asked"]), 1e6, 1e6 + plan["seconds"])
            for plan in sorted(plans, key=lambda plan: plan["asked"])]


def rows_of(ran: list[Job], others: int, *keys: str) -> list[Row]:
    """A row for each 32 seconds, with the means of a recorder: GPUs with 24 GiB, on which jobs use half of what they
    reserved, and others use some"""
    def place(key: str, at: int) -> Place:
        lasted = [(job, max(min(job.ended, at + 32) - max(job.began, at), 0)) for job in ran if key in job.had]
        held = sum(job.memory*int(seconds)//32 for job, seconds in lasted)
        return Place(key, key, "", "", 24*GIB, others*GIB + held//2, 0, 0, 0, 0, held - held//2, 0, 0, 0.0)
    return [Row(float(at), 32.0, tuple(place(key, at) for key in keys)) for at in range(0, 512, 32)]


def most_at_once(jobs: list[Job], starts: list[float]) -> int:
    "The most bytes that are reserved together"
    held = [(at, at + job.ended - job.began, job.memory*len(job.had))
            for job, at in zip(jobs, starts, strict=True) if at < math.inf]
    return max((sum(size for begin, end, size in held if begin <= at < end) for at, *_ in held), default=0)


@given(PLANS, st.integers(0, 4))
def test_a_recorded_queue_is_replayed_as_it_was(plans, others):
    jobs = jobs_of([plan | dict(n=1) for plan in plans], "A")
    starts = play_jobs(jobs, rows_of([], others, "A"))
    ran = [job._replace(began=at, ended=at + job.ended - 1e6) for job, at in zip(jobs, starts, strict=True)]
    asked = [Asked(id, job.memory, ("A",), 1, job.priority, job.app, job.user) for id, job in enumerate(ran, 1)]
    events = [(when, Change(kind, "", 7, "", one)) for one, job in zip(asked, ran, strict=True)
              for when, kind in ((job.asked, "requested"), (job.began, "reserved"), (job.ended, "released"))]
    found = replay_queue(sorted(events, key=lambda event: event[0]), rows_of(ran, others, "A"), QueueRule())
    assert (list(found.jobs), list(found.usual)) == (ran, starts) and found.usual == found.other
    assert most_at_once(ran, starts) <= (24 - others)*GIB


@given(PLANS, st.integers(0, 4), RULES)
def test_by_no_rule_is_more_reserved_than_there_is(plans, others, rule):
    jobs = jobs_of(plans, "A", "B")
    assert most_at_once(jobs, play_jobs(jobs, rows_of([], others, "A", "B"), rule)) <= 2*(24 - others)*GIB


def take_at(manager: ResourceManager, when: float):
    "A sample with this time"
    sample = take_sample(manager)
    return replace(sample, taken=when, gpu=replace(sample.gpu, snapshot=replace(sample.gpu.snapshot, time=when)))


def test_a_queue_of_real_requests_is_on_record_and_another_rule_would_have_changed_it(tmp_path):
    "A request of another app waits behind a training; with a limit for one app it would have started at once"
    path, notes, clock = tmp_path/"history.sqlite3", Notes(), itertools.count(1_800_000_000, 60)
    with SimulatedDriver([SimulatedGpu("NVIDIA L4", 24_000)]), patch.dict(os.environ, CJM_RESOURCES_DIR=str(tmp_path)):
        training, speech = (ResourceManager(track_self=False, app=app) for app in ("training", "speech"))
        def look(): notes.take(take_at(speech, next(clock)), 60.0)
        look()
        first = training.reserve(15_000)
        look()
        second, third = training.request(15_000), speech.request(8_000)
        assert not second.poll() and not third.poll()
        for _ in range(5): look()
        first.release()
        held = [second.poll(), third.poll()]
        look()
        for one in held: one.release()
        look()
    add(path, *notes.take_out())
    said = CliRunner().invoke(main, ["history", "--since", "3650d", "--until", "2027-01-16", "--file", str(path),
                                     "--what-if-max-share", "70%", "--per", "app", "--json"])
    jobs = json.loads(said.output)["jobs"]
    assert [(job["app"], job["waited"], job["usual"], job["other"]) for job in jobs] == [
        ("training", 0, 0, 0), ("training", 300, 300, 300), ("speech", 300, 300, 0)]
