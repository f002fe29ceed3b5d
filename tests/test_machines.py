"""What tutorials/compare.ipynb says of machines that people have: each row tried on the same simulated machine"""
import importlib.util
import json
import subprocess
import sys

import pytest

INSTALLED = all(importlib.util.find_spec(name) for name in ("nvitop", "gpustat"))
pytestmark = pytest.mark.skipif(not INSTALLED, reason="nvitop and gpustat are not installed")

PEERS = {   # each prints what it sees; in a process of its own, since gpustat changes pynvml for the whole process
    "nvitop": """
import atexit, nvitop
atexit.unregister(nvitop.libnvml.nvmlShutdown)
for d in nvitop.Device.all():
    parts = [[m.memory_used(), sorted(m.processes())] for m in d.mig_devices()]
    held = {str(pid): p.gpu_memory() for pid, p in d.processes().items()}
    seen.append(dict(name=d.name(), total=d.memory_total(), used=d.memory_used(), held=held, parts=parts))""",
    "gpustat": """
import gpustat
for g in gpustat.new_query().gpus: seen.append(dict(name=g.name, total=g.memory_total, used=g.memory_used))""",
    "this": """
from cjm_fasthtml_resources import ResourceManager
manager = ResourceManager(track_self=False)
for worker in driver.workers: manager.register_worker(**worker)
conflict = manager.check_gpu_availability()
for d in conflict.allowed:
    held = {str(p.pid): p.memory_used for p in d.processes}
    seen.append(dict(name=d.device.name, total=d.device.memory_total, used=d.device.memory_used, room=d.room, held=held,
                     status=d.status.value))"""}
RUN = """
import json, sys
from cjm_fasthtml_resources.simulate import make_driver
seen = []
with make_driver(json.loads(sys.argv[1])) as driver:
    try:
{body}
    except Exception as error: seen = repr(error)
    asleep = [gpu.asleep for gpu in driver.gpus]
print(json.dumps(dict(seen=seen, asleep=asleep), default=str))"""


def look(peer, scenario):
    "Return what a program sees of a machine, or its error, and which GPUs sleep afterwards"
    body = "\n".join(f"        {line}" for line in PEERS[peer].strip().splitlines())
    result = subprocess.run([sys.executable, "-c", RUN.replace("{body}", body), json.dumps(scenario)],
                            capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    return found["seen"], found["asleep"]


def preset(name):
    from cjm_fasthtml_resources.simulate import PRESETS
    return PRESETS[name]()


def test_spark():
    scenario = preset("spark")
    (mine,), _ = look("this", scenario)
    assert (mine["total"] >> 20, mine["room"] >> 20) == (124610, 40310) and mine["held"]["4200103"] == 61200 << 20
    (theirs,), _ = look("nvitop", scenario)
    assert theirs["total"] and theirs["held"]["4200103"] == 61200 << 20   # of the real machine: it asks psutil
    error, _ = look("gpustat", scenario)
    assert "TypeError" in error


def test_jetson():
    scenario = preset("jetson")
    (mine,), _ = look("this", scenario)
    assert list(mine["held"]) == ["4200101"] and mine["total"] >> 20 == 62841
    (theirs,), _ = look("nvitop", scenario)
    assert theirs["held"]["0"] > 2**60                       # the entry that cannot be
    assert "TypeError" in look("gpustat", scenario)[0]


def test_laptop():
    scenario = preset("laptop")
    (mine,), asleep = look("this", scenario)
    assert asleep == [True] and mine["name"] and mine["status"] == "unavailable"
    for peer in ("nvitop", "gpustat"): assert look(peer, scenario)[1] == [False]


def test_entries_of_32_bytes():
    processes = [dict(pid=4200101, memory_mb=700), dict(pid=4200102, memory_mb=300)]
    scenario = dict(gpus=[dict(processes=processes)], habits=dict(process_size=32))
    right = {"4200101": 700 << 20, "4200102": 300 << 20}
    for peer in ("this", "nvitop"): assert look(peer, scenario)[0][0]["held"] == right, peer


def test_memory_v2():
    scenario = dict(gpus=[dict(memory_total_mb=8000, memory_used_mb=700)], habits=dict(memory_v2_error=3))
    (mine,), _ = look("this", scenario)
    assert (mine["total"] >> 20, mine["used"] >> 20) == (8000, 700)
    (theirs,), _ = look("nvitop", scenario)
    assert theirs["total"] >> 20 != 8000                     # it takes the machine's memory for the GPU's
    assert "TypeError" in look("gpustat", scenario)[0]


def test_shared_instances():
    scenario = preset("mig-shared")
    mine, _ = look("this", scenario)
    assert sum(d["used"] for d in mine) >> 20 == 16925 + 17 + 9 + 9
    assert sum(d["room"] for d in mine) >> 20 <= 126199
    assert set(mine[0]["held"]) == {"4200103", "4200301"}    # who uses the memory that the two share
    (theirs,), _ = look("nvitop", scenario)
    assert sum(used for used, _ in theirs["parts"]) >> 20 > 2*16925


def test_two_cards():
    scenario = preset("two-cards")
    mine, _ = look("this", scenario)
    assert [d["name"] for d in mine] == ["NVIDIA GeForce RTX 3090", "NVIDIA GeForce GTX 1660 SUPER"]   # as CUDA has it
    for peer in ("nvitop", "gpustat"):
        theirs, _ = look(peer, scenario)
        assert [d["name"] for d in theirs] == ["NVIDIA GeForce GTX 1660 SUPER", "NVIDIA GeForce RTX 3090"], peer


def test_slow_start():
    scenario = preset("slow-start") | dict(habits=dict(start_delay=7))
    assert look("this", scenario)[0] == []                   # after 5 seconds, with a sentence
    for peer in ("nvitop", "gpustat"):                       # they wait, and there is no limit to set
        assert look(peer, scenario)[0][0]["name"] == "NVIDIA A100-SXM4-80GB"
