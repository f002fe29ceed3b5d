"Needs of settings that differ in a text or a path: told apart, without a secret in any file"
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GONE, MIB
from hypothesis import given, settings
from hypothesis import strategies as st

from cjm_fasthtml_resources.core.learned import JobRun, NeedKey, need_key
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.needs import Needs, needs_path
from cjm_fasthtml_resources.core.roster import Roster, read_needs
from cjm_fasthtml_resources.core.store import Store
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

SECRET = "hunter2hunter2"
DIFFERENT = [dict(model="xl"), *(dict(model="xl", **more) for more in (
    dict(lora="/loras/a.safetensors"), dict(lora="/loras/b.safetensors"), dict(lora_path="/loras/a"),
    dict(checkpoint="a-v1.ckpt"), dict(checkpoint="b-v1.ckpt"), dict(vae="stabilityai/x"), dict(vae="stabilityai/y"),
    dict(loras=["a", "b"]), dict(loras=["b", "c"]), dict(loras=[{"path": "/a", "weight": 0.5}]),
    dict(adapter_id="a-1"), dict(adapter_id="b-1"), dict(model_path="/m/a.gguf"), dict(model_path="/m/b.gguf"),
    dict(lora=f"/loras/{'0a1b2c3d'*4}"), dict(lora=f"/loras/{'0a1b2c3e'*4}"), dict(draft=dict(model_path="/a")),
    dict(quantization="w8a8"), dict(quantization="w4a4"), dict(sizes=list(range(20))), dict(sizes=list(range(1, 21)))))]
SAME = [dict(audio="/a.wav"), dict(prompt="a cat"), dict(seed=5), dict(job_id="7"), dict(output_dir="/out"),
        dict(api_key=SECRET), dict(hf_token="hf_abcdefghijklmnop"), dict(auth={"user": "ada", "password": SECRET})]


def learn(manager, config, mb):
    key = need_key("sd", None, config, mark=manager.needs.mark(config))
    manager.needs.record(JobRun(key, time.time(), 60, gpu_highest=mb*MIB))


def highest(manager, config): return manager.expected_need("sd", config=config).highest//MIB


@pytest.mark.parametrize("app", [None, "app"])
def test_settings_that_differ_in_a_text_have_needs_of_their_own(folder, app):
    manager = ResourceManager(app=app)
    for mb, config in enumerate(DIFFERENT, 100): learn(manager, config, mb)
    manager.needs.write()
    assert [highest(manager, config) for config in DIFFERENT] == list(range(100, 100 + len(DIFFERENT)))
    if app: assert [highest(ResourceManager(app=app), c) for c in DIFFERENT] == list(range(100, 100 + len(DIFFERENT)))


def test_what_is_of_one_job_and_a_new_token_are_no_other_settings(folder):
    manager, config = ResourceManager(app="app"), dict(model="xl", lora="/loras/a")
    learn(manager, config, 100)
    learn(manager, dict(model="xl", lora="/loras/b"), 900)
    assert [highest(manager, {**config, **more}) for more in SAME] == [100]*len(SAME)
    for tokens in (("hf_abcdefghijklmnop", "hf_qrstuvwxyzabcdef"), ("https://a:b@h/m", "https://c:d@h/m")):
        one, other = (need_key("sd", None, dict(x=text), mark=manager.needs.mark(dict(x=text))) for text in tokens)
        assert one == other


def test_no_text_is_in_any_file_and_the_key_is_this_users_alone(folder):
    manager = ResourceManager(app="app")
    config = dict(model="xl", lora="/loras/a-name-of-mine", other=SECRET, api_key=SECRET)
    manager.register_worker(GONE, "llm", plugin_name="sd", config=config)
    learn(manager, config, 100)
    manager.needs.write()
    for path in (path for path in Path(folder).rglob("*") if path.is_file()):
        found = path.read_bytes()
        assert b"a-name-of-mine" not in found and SECRET.encode() not in found, path
    assert needs_path().with_suffix(".key").stat().st_mode & 0o777 == 0o600


def test_a_key_that_others_can_read_is_not_used_and_the_highest_need_counts(folder):
    manager, (_, small, large, *_) = ResourceManager(app="app"), DIFFERENT
    for config, mb in ((small, 100), (large, 900)): learn(manager, config, mb)
    path = needs_path().with_suffix(".key")
    path.chmod(0o644)
    assert highest(manager, small) == 900
    learn(manager, small, 950)                # without a mark
    path.chmod(0o600)
    assert [highest(manager, config) for config in (small, DIFFERENT[3])] == [100, 950]
    path.unlink()                             # another key: other marks
    assert manager.needs.mark(small) and highest(manager, small) == 950


MARK = """
import sys
from cjm_fasthtml_resources.core.manager import ResourceManager
print(ResourceManager(app="app").needs.mark(dict(lora="/loras/a")))
"""


def test_programs_that_start_together_and_later_ones_find_the_same_mark(folder):
    started = [subprocess.Popen([sys.executable, "-c", MARK], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    marks = {process.communicate(timeout=60)[0].strip() for process in started}
    assert marks == {ResourceManager(app="app").needs.mark(dict(lora="/loras/a"))} and "" not in marks
    assert [path.name for path in needs_path().parent.iterdir() if "key" in path.name] == ["resources.key"]


def test_another_process_that_sees_what_is_shown_learns_for_the_same_settings(folder):
    mine, other = ResourceManager(track_self=False, app="app"), ResourceManager(track_self=False, app="app")
    one, two = (dict(model="xl", lora=f"/loras/{name}") for name in "ab")
    for config, size in ((one, 500), (two, 900)):
        mine.register_worker(GONE, "sd", plugin_name="sd", loaded_plugin_resource="xl", config=config)
        with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(GONE, size)])]):
            other.check_gpu_availability()
        other.needs.write()
    assert [highest(mine, config) for config in (one, two)] == [500, 900]
    mine.update_worker_state(GONE, config=one)
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(GONE, 700)])]): other.check_gpu_availability()
    other.needs.write()
    assert [highest(mine, config) for config in (one, two)] == [700, 900]


def test_needs_from_before_there_were_marks_count_for_all_settings(folder):
    manager, roster = ResourceManager(app="app"), Roster(Store(needs_path()), "app")
    Needs(roster).record(JobRun(need_key("sd", "xl", DIFFERENT[1]), time.time(), 60, gpu_highest=700*MIB))
    learn(manager, DIFFERENT[2], 100)
    manager.needs.write()
    assert [highest(manager, config) for config in DIFFERENT[1:4]] == [700, 100, 700]
    assert manager.expected_need("sd", config=DIFFERENT[1]).is_shared
    assert manager.expected_need("sd", "xl").highest == 700*MIB


def test_a_setting_that_is_new_each_time_does_not_fill_the_file(folder):
    manager = ResourceManager(app="app")
    for n in range(80): learn(manager, dict(model="xl", chapter=f"chapter {n}"), 100 + n)
    manager.needs.write()
    known = read_needs(Store(needs_path()))["app"]
    assert len(known) == 65 and sum(e.samples for days in known.values() for e in days.values()) == 80
    assert highest(manager, dict(model="xl", chapter="a new one")) == 179


ADDED = st.lists(st.tuples(st.sampled_from(range(4)), st.sampled_from(["", "0a"]), st.integers(1, 50)), max_size=12)


@given(ADDED)
@settings(deadline=None)
def test_less_information_never_means_less_memory(added):
    needs = Needs()
    for mark, coarse, size in added:
        key = NeedKey("sd", "xl", f"{coarse}.{mark}" if mark else coarse)
        needs.record(JobRun(key, time.time(), 60, gpu_highest=size*MIB))
    for coarse, mark in itertools.product(["", "0a"], range(1, 5)):
        alike = [size for _, other, size in added if other == coarse]
        own = [size for found, other, size in added if (found, other) == (mark, coarse)]
        found = needs.find(NeedKey("sd", "xl", f"{coarse}.{mark}"), each=False)
        assert (found.highest//MIB if found else 0) == max(own or alike, default=0)
        known = needs.find(NeedKey("sd", "xl", coarse), each=False)
        assert (known.highest//MIB if known else 0) == max(alike, default=0)


def test_a_fork_keeps_the_key_of_its_parent():
    manager, config = ResourceManager(), dict(lora="/loras/a")
    assert manager.needs.mark(config) != ""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, manager.needs.mark(config).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100).decode() == manager.needs.mark(config)
