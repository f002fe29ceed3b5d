"What jobs need: against a plain list of them, in two processes, in an older file, and with a clock that is wrong"
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import pytest
from conftest import GONE, MIB, warned
from hypothesis import given, settings
from hypothesis import strategies as st

from cjm_fasthtml_resources.core import learned
from cjm_fasthtml_resources.core import needs as needs_module
from cjm_fasthtml_resources.core.learned import (
    Evidence,
    JobRun,
    NeedKey,
    format_range,
    merge,
    need_key,
    settings_that_matter,
)
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.needs import Needs, needs_path
from cjm_fasthtml_resources.core.roster import Roster, read_needs
from cjm_fasthtml_resources.core.secrets import shown_config
from cjm_fasthtml_resources.core.store import SCHEMA_VERSION, Store, StoreError, store_path
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

DAY = 86400
NOW = 20_000*DAY + 5_000
KEYS = [NeedKey("a", "m"), NeedKey("a", "m", "0a1b"), NeedKey("a"), NeedKey("b", "m")]


def at(moment): return patch.object(needs_module.time, "time", lambda: moment)


def ran(key, size=None, *, ended=NOW, **more): return JobRun(key, ended, 60, size and size*MIB, **more)


# Against a plain list of runs

sizes = st.none() | st.integers(0, 50)
runs = st.builds(
    JobRun, st.sampled_from(KEYS), st.integers(0, 80).map(lambda day: NOW + (day - 75)*DAY), st.integers(0, 900),
    sizes, sizes, sizes, st.booleans(), st.booleans())
shortages = st.tuples(st.sampled_from(KEYS), st.integers(0, 80))


def plain(happened, key, each, today):
    "What is known of a key after these runs and shortages (with their day), as one would say it"
    def concerns(other): return other[:2] == key[:2] and (each or other == key)
    seen = [(day, what) for day, other, what in happened if concerns(other)]
    found = [(day, what) for day, what in seen if isinstance(what, JobRun)]
    telling = [day for day, run in found if run.gpu_need] or [day for day, _ in seen]
    if not telling: return None
    newest = max(telling)
    since = min(today - 30, newest)
    recent = [what for day, what in seen if day >= since]
    jobs = [what for what in recent if isinstance(what, JobRun)]
    memory = [run.gpu_need for run in jobs if run.gpu_need]
    floors = [int(what*1.25) for what in recent if not isinstance(what, JobRun) and what]
    well = [run.seconds for run in jobs if run.succeeded]
    ram = max((run.ram or 0 for run in jobs if run.counts), default=0)
    if not (memory or floors or well): return None
    return dict(
        samples=len(memory), mean=sum(memory)/len(memory) if memory else None, highest=max(memory, default=None),
        floor=max(floors, default=None), ram=ram or None, jobs=len(well), seconds_min=min(well, default=None),
        seconds_max=max(well, default=None), failures=len(jobs) - len(well), is_old=newest < today - 30)


@pytest.mark.parametrize("in_file", [False, True])
@given(st.lists(runs | shortages, max_size=25), st.integers(0, 3), st.booleans())
@settings(deadline=None, max_examples=150)
def test_any_sequence_is_answered_as_a_plain_list_of_runs_would(in_file, happened, how_often, each):
    store, seen = Store(), []
    mine, other = (Needs(Roster(store, "app")) if in_file else Needs() for _ in range(2))
    if not in_file: other = mine
    with patch.object(Needs, "_start_writer"):
        for number, what in enumerate(happened):
            to = (mine, other)[number % 2]
            if isinstance(what, JobRun):
                to.record(what)
                seen.append((int(what.ended//DAY), what.key, what))
            else:
                key, had = what
                with at(NOW): to.raise_after_out_of_memory(key, had)
                if had: seen.append((NOW//DAY, key, had))
            if how_often and number % how_often == 0: to.write()
    other.write()   # the last ones of `mine` are known to itself alone
    with at(NOW):
        for key in KEYS:
            found, expected = mine.find(key, each, 20), plain(seen, key, each, NOW//DAY)
            assert (found is None) == (expected is None)
            if found is None: continue
            assert {name: getattr(found, name) for name in expected} == expected
            assert found.margin_percent == 20 and found.explain()
            most = max((found.highest or 0)*1.2, found.floor or 0)/MIB
            if most: assert most <= found.gpu_memory_mb <= most + 1.01
            else: assert found.gpu_memory_mb is None
            if each: assert mine.expected(*key[:2]) == max(found.highest or 0, found.floor or 0)


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("off", [400*DAY, 2*DAY, -NOW])
def test_a_clock_that_was_wrong_once_leaves_the_order_of_the_evidence(in_file, off):
    needs, key = Needs(Roster(Store(), "app") if in_file else None), KEYS[0]
    with patch.object(Needs, "_start_writer"):
        def note(moment, call, *args, **more):
            with at(moment):
                call(*args, **more)
                needs.write()
                return needs.find(key).gpu_memory_mb
        for day in range(4): note(NOW + day*DAY, needs.record, ran(key, 4_000, ended=NOW + day*DAY))
        wants = note(NOW + 4*DAY + off, needs.raise_after_out_of_memory, key, 4_000*MIB, wanted=16_000*MIB)
        later = [NOW + day*DAY for day in range(5, 10)]
        asked = [note(moment, needs.record, ran(key, 4_000, ended=moment)) for moment in later]
    assert wants == 20_000 and asked[:2] == [20_000]*2 and asked[-1] == 5_000


digits = [st.integers(0, 9)]*5
none = dict.fromkeys(("jobs", "seconds", "shortest", "longest", "floor"), st.just(0))
evidence = st.builds(Evidence, *digits, **none, failures=digits[0]) | st.builds(
    Evidence, *digits, st.integers(1, 9), *digits)


@given(evidence, evidence, evidence)
def test_evidence_is_the_same_in_any_order(a, b, c):
    assert merge(a, b) == merge(b, a)
    assert merge(merge(a, b), c) == merge(a, merge(b, c))


# Jobs in a process that used GPU memory before

@given(st.lists(st.tuples(st.integers(1, 50), st.booleans(), st.integers(0, 80)), min_size=1, max_size=8))
@settings(deadline=None)
def test_what_a_warm_process_added_is_a_need_of_its_own_and_lowers_none(happened):
    cold, needs = Needs(), Needs()
    for size, warm, day in happened:
        run = ran(KEYS[0], size, ended=NOW + (day - 80)*DAY, warm=warm)
        needs.record(run)
        if not warm: cold.record(run)
    with at(NOW): before, after = cold.find(KEYS[0]), needs.find(KEYS[0])
    if before is None: assert (after.highest, after.gpu_memory_mb) == (None, None) and after.least
    else: assert after.highest >= before.highest and after.samples == before.samples
    recent = [size for size, warm, day in happened if warm and day >= 50]
    assert ((after.least or 0) if before is None else after.highest) >= max(recent, default=0)*MIB


def test_what_a_job_wanted_by_mistake_is_refuted_by_later_jobs_and_what_it_had_is_not():
    needs, (key, other, *_) = Needs(), KEYS
    with at(NOW):
        needs.raise_after_out_of_memory(key, 8*MIB, wanted=800*MIB)
        for each in (other, key): needs.record(ran(each, 4))
    def asked(day):
        with at(NOW + day*DAY): return needs.find(key, each=False).gpu_memory_mb
    assert asked(0) == 1000
    for _ in range(3):
        assert asked(1) == 1000
        needs.record(ran(other, 4, ended=NOW + DAY))     # of other settings: says nothing of these
        needs.record(ran(key, 4, ended=NOW + DAY))
    assert asked(1) == 10


# Which settings matter

plain_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.lists(st.integers())
configs = st.recursive(st.dictionaries(st.text(max_size=12) | st.sampled_from(
    ["model", "api_key", "device", "batch_size", "model_path", "jobId"]), plain_values, max_size=5),
    lambda inner: st.dictionaries(st.text(max_size=5), inner | plain_values, max_size=3), max_leaves=5)


@given(configs)
@settings(deadline=None)
def test_another_process_that_sees_what_is_shown_finds_the_same_key(config):
    shown = json.loads(json.dumps(shown_config(config)))
    assert settings_that_matter(shown) == json.loads(json.dumps(settings_that_matter(config)))
    assert need_key("a", "m", shown) == need_key("a", "m", config)


@pytest.mark.parametrize("one, other, same", [
    ({"beams": 5}, {"beams": 6}, False), ({"dtype": "float16"}, {"dtype": "int8"}, False),
    ({"api_key": "sk-1"}, {"api_key": "sk-2222"}, True), ({"seed": 1}, {"seed": 2}, True),
    ({"runId": 1}, {"runId": 2}, True), ({"input": "/a.wav"}, {"input": "/other.wav"}, True),
    ({"device": "cuda:0"}, {"device": 1}, True), ({"device": "cuda"}, {"device": "cpu"}, False),
    ({"model": "m", "model_path": "/a"}, {"model": "m", "model_path": "/b"}, True), ({}, None, True),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True), ({"draft": {"model": "x"}}, {"draft": {"model": "y"}}, False),
    ({"beams": None}, {}, True)])
def test_which_settings_tell_needs_apart(one, other, same):
    assert (need_key("a", "m", one) == need_key("a", "m", other)) is same


def test_a_key_has_no_secret_and_takes_its_resource_from_the_configuration():
    key = need_key("a", None, {"model": "large", "token": "sk-1234567890abcdef12"})
    assert key == ("a", "large", "")
    assert "sk-" not in need_key("sk-1234567890abcdef12", "m").plugin
    for wrong in ("\ud800", "a\0b", "x"*5_000):
        with pytest.raises(ValueError, match="plugin_name"): need_key(wrong)
    with pytest.raises(TypeError, match="resource"): need_key("a", 7)


# Clocks


@pytest.mark.parametrize("wrong", [-DAY, DAY])
def test_a_clock_that_is_a_day_off_changes_nothing(wrong):
    needs, key = Needs(), KEYS[0]
    for day, size in ((20, 4), (10, 9), (1, 2)): needs.record(ran(key, size, ended=NOW - day*DAY))
    needs.record(ran(key, 3, ended=NOW + wrong))
    for moment in (NOW, NOW + wrong):
        with at(moment):
            found = needs.find(key)
            assert (found.highest, found.samples, found.is_old) == (9*MIB, 4, False)


def test_years_in_the_past_and_the_future_do_no_harm():
    needs, key = Needs(Roster(Store(), "app")), KEYS[0]
    for ended, size in ((NOW, 9), (0, 2), (NOW + 900*DAY, 3)): needs.record(ran(key, size, ended=ended))
    needs.write()
    for moment in (0, NOW):
        with at(moment): assert needs.find(key).highest == 9*MIB


def test_a_worker_that_lives_long_repeats_what_it_uses_today_and_not_its_old_peak():
    manager, gpu = ResourceManager(track_self=False), SimulatedGpu()
    manager.register_worker(os.getpid(), "llm", plugin_name="a")
    with SimulatedDriver([gpu]):
        for day, size in ((0, 900), (1, 400), (20, 300)):
            gpu.processes[:] = [SimulatedProcess(os.getpid(), size)]
            with at(NOW + day*DAY): manager.check_gpu_availability()
    for day, size in ((20, 900), (31, 400), (32, 300), (90, 300)):
        with at(NOW + day*DAY): assert manager.expected_gpu_memory_mb("a") == size
    with at(NOW + 90*DAY):
        assert manager.expected_need("a").explain() == (
            "a was seen to use up to 300 MiB (last seen more than 30 days ago); with 10 % margin: 330 MiB")


# What checks learn


def test_a_worker_that_loads_or_grows_is_no_need(monkeypatch):
    manager, gpu, now = ResourceManager(track_self=False), SimulatedGpu(), [1_000.0]
    monkeypatch.setattr(needs_module.time, "monotonic", lambda: now[0])
    manager.register_worker(GONE, "llm", "job-1", plugin_name="a")

    def check(size, seconds):
        now[0] += seconds
        gpu.processes[:] = [SimulatedProcess(GONE, size)]
        manager.check_gpu_availability()
        return manager.expected_gpu_memory_mb("a")

    with SimulatedDriver([gpu]):
        assert [check(size, 20) for size in (100, 500, 700, 700)] == [None]*4
        assert [check(700, 20), check(600, 5), check(900, 60)] == [700, 700, 700]
        manager.update_worker_state(GONE, status="loading")
        assert [check(900, 60), check(900, 60)] == [700, 700]
        manager.update_worker_state(GONE, status="idle")
        assert check(650, 1) == 900   # loading is over, and took that


def test_settings_are_those_of_the_worker(folder):
    mine, other = ResourceManager(track_self=False, app="app"), ResourceManager(track_self=False, app="app")
    config = {"model": "m", "batch_size": 8, "token": "sk-1234567890abcdef12"}
    mine.register_worker(GONE, "llm", plugin_name="a", loaded_plugin_resource="m", config=config)
    for manager, size in ((mine, 500), (other, 600)):   # the other one knows what is shown of it
        with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(GONE, size)])]):
            manager.check_gpu_availability()
        manager.needs.write()
    [(key, _)] = read_needs(Store(needs_path()))["app"].items()
    assert key == need_key("a", config=config, mark=mine.needs.mark(config))
    assert mine.expected_need("a", config=config).highest == 600*MIB
    assert mine.expected_need("a", "m", {**config, "batch_size": 9}) is None
    assert mine.expected_need("a", "m").highest == 600*MIB


# Files

OTHER = """
import sys, time
from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.core.learned import JobRun, need_key
manager = ResourceManager(app="app")
for number in range(int(sys.argv[1])):
    manager.needs.record(JobRun(need_key("a", "m"), time.time(), 60, gpu_highest=number*2**20))
"""


def test_two_processes_add_to_one_file_and_lose_nothing(folder):
    mine = ResourceManager(app="app")
    others = [subprocess.Popen([sys.executable, "-c", OTHER, "40"]) for _ in range(2)]
    for _ in range(40): mine.needs.record(ran(KEYS[0], 100, ended=time.time()))
    assert [process.wait(60) for process in others] == [0, 0]
    mine.needs.write()
    found = mine.expected_need("a", "m")
    assert (found.jobs, found.samples, found.highest) == (120, 118, 100*MIB)   # twice, none was seen
    assert found.gpu_memory_mb == 110


def test_a_killed_writer_leaves_whole_rows(folder):
    mine = ResourceManager(app="app")
    for _ in range(3):
        code = OTHER.replace("int(sys.argv[1])", "1, 10**9")   # each of them has used something
        process = subprocess.Popen([sys.executable, "-c", code])
        for _ in range(200):
            if process.poll() is None and read_needs(Store(needs_path())): break
            time.sleep(0.05)
        process.kill()
        process.wait()
        found = mine.expected_need("a", "m")
        assert found.jobs >= found.samples > 0 and found.highest <= found.jobs*MIB


def test_a_fork_writes_only_its_own(folder):
    mine = ResourceManager(app="app")
    with patch.object(needs_module, "start_thread", side_effect=needs_module.NoThreadError):
        mine.needs.record(ran(KEYS[0], 5, ended=time.time()))
        if (child := os.fork()) == 0:
            mine.needs.record(ran(KEYS[0], 7, ended=time.time()))
            mine.needs.write()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert mine.expected_need("a", "m").samples == 2
    mine.needs.write()
    assert mine.expected_need("a", "m").samples == 2


def test_an_older_file_is_used_as_it_is_and_an_older_program_can_go_on(folder):
    ResourceManager(app="app").register_worker(GONE, "llm")
    with sqlite3.connect(store_path()) as db:
        db.execute("DROP TABLE needs")
        db.execute("INSERT INTO peaks VALUES ('app', 'a', 'm', 7)")
    db.close()
    before = store_path().stat().st_ino
    mine = ResourceManager(app="app")
    assert mine.expected_need("a", "m") is None and read_needs(Store(needs_path())) == {}   # it might have been loading
    mine.needs.record(ran(KEYS[0], 5, ended=time.time()))
    mine.needs.write()
    assert mine.expected_need("a", "m").highest == 5*MIB and len(mine.get_all_workers()) == 1
    db = sqlite3.connect(store_path())
    assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,) == (2,)
    assert db.execute("SELECT * FROM peaks").fetchall() == [("app", "a", "m", 7)]   # as the older one has it
    db.close()
    assert store_path().stat().st_ino == before and not list(folder.glob("*damaged*"))


def test_a_full_disk_is_logged_once_and_the_job_goes_on(folder, caplog, monkeypatch):
    mine = ResourceManager(app="app")
    with monkeypatch.context() as context:
        def full(*args): raise StoreError("/a is full")
        context.setattr(mine.needs.roster, "add", full)
        for _ in range(3):
            mine.needs.record(ran(KEYS[0], 5, ended=time.time()))
            mine.needs.write()
        assert warned(caplog) == ["keeping the needs of plugins failed: /a is full"]
        assert mine.expected_need("a", "m").samples == 3
    mine.needs.write()
    assert ResourceManager(app="app").expected_need("a", "m").samples == 3


def test_an_interrupted_write_is_done_again(folder, monkeypatch):
    mine = ResourceManager(app="app")
    monkeypatch.setattr(needs_module, "start_thread", lambda *args: threading.current_thread())
    mine.needs.record(ran(KEYS[0], 5, ended=time.time()))
    with patch.object(mine.needs.roster, "add", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        mine.needs.write()
    assert mine.expected_need("a", "m").samples == 1
    mine.needs.write()
    assert ResourceManager(app="app").expected_need("a", "m").samples == 1


def test_needs_outlive_a_boot(tmp_path, monkeypatch):
    monkeypatch.delenv("CJM_RESOURCES_DIR", raising=False)
    monkeypatch.setattr(needs_module, "machine_id", lambda: "5eed")
    place = tmp_path/"boot-1"/"resources.sqlite"
    for module in ("core.needs", "core.manager"):
        monkeypatch.setattr(f"cjm_fasthtml_resources.{module}.store_path", lambda: place)
    mine = ResourceManager(app="app")
    mine.needs.record(ran(KEYS[0], 5, ended=time.time()))
    mine.needs.write()
    place = tmp_path/"boot-2"/"resources.sqlite"
    assert ResourceManager(app="app").expected_need("a", "m").samples == 1
    assert {path.name for path in tmp_path.iterdir()} == {"boot-1", "boot-2", "needs-5eed"}
    assert (tmp_path/"needs-5eed").stat().st_mode & 0o777 == 0o700


def test_what_is_malformed_is_refused_and_words_fit():
    for wrong in (dict(seconds=-1), dict(ended=float("nan")), dict(gpu_highest=2**60), dict(ram=-1)):
        with pytest.raises(ValueError, match=next(iter(wrong))): replace(ran(KEYS[0], 5), **wrong)
    for margin in (-1, float("inf")):
        with pytest.raises(ValueError, match="margin_percent"):
            ResourceManager().expected_need("a", margin_percent=margin)
    assert format_range(0, 0) == "less than 1 second" and format_range(3600, 14_000) == "1 to 4 hours"
    assert learned.STEADY_SECONDS >= 10


# The command


def test_the_command_lists_and_forgets(folder, command):
    for app in ("studio", "night-run"):
        needs = ResourceManager(app=app).needs
        for key in KEYS: needs.record(ran(key, 1_000, ended=time.time(), ram=5))
        needs.write()
    shown = command("needs", COLUMNS="120").stdout
    assert Counter(shown.split())["1000"] == 8 and "last seen" in shown
    found = json.loads(command("needs", "--json", "--app", "studio").stdout)
    assert found["schema_version"] == 1
    assert [(need["app"], need["plugin"], need["gpu_memory_mb"]) for need in found["needs"]] == [
        ("studio", plugin, 1100) for plugin in "aaab"]
    assert command("needs", "--forget", "a", "--app", "studio").stdout == "Forgot 3 needs of a.\n"
    assert command("needs", "--forget", "a").stdout == "Forgot 3 needs of a.\n"
    assert len(json.loads(command("needs", "--json").stdout)["needs"]) == 2
    wrong = command("needs", "--app", "x y")
    assert wrong.returncode == 2 and "Invalid app name" in wrong.stderr


def test_the_command_makes_no_file_and_names_one_that_cannot_be_used(folder, command, tmp_path):
    assert command("needs").stdout == "No needs are learned yet.\n"
    assert command("needs", "--forget", "a").stdout == "Forgot 0 needs of a.\n"
    assert not folder.exists()
    link = tmp_path/"link"
    link.symlink_to(tmp_path)
    failed = command("needs", CJM_RESOURCES_DIR=str(link))
    assert failed.returncode == os.EX_IOERR and "symbolic link" in failed.stderr


def test_what_is_simulated_is_no_lesson(folder, command, tmp_path):
    scenario = tmp_path/"machine.json"
    scenario.write_text(json.dumps({
        "gpus": [{"processes": [{"pid": 4200101, "memory_mb": 700}]}],
        "workers": [{"pid": 4200101, "worker_type": "llm", "plugin_name": "a"}]}))
    shown = command("--simulate", str(scenario), "--app", "studio")
    assert shown.returncode == 0, shown.stderr
    assert command("needs").stdout == "No needs are learned yet.\n"
