"""The answer on a real NVIDIA GPU against what was allocated, nvidia-smi, nvitop and the bare calls

Skipped where there is no GPU.

GPU_FIGURES names a file for what was measured; tests/gpu/run.py sets it.
"""
import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cjm_fasthtml_resources.core.conflict import ResourceBusy
from cjm_fasthtml_resources.core.devices import read_digits
from cjm_fasthtml_resources.core.gpu import read_gpus
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.memory import read_machine
from cjm_fasthtml_resources.core.process import driver_numbers, driver_pid_reader, host_proc
from cjm_fasthtml_resources.core.resources import ResourceStatus

SNAPSHOT = read_gpus()
pytestmark = pytest.mark.skipif(
    not SNAPSHOT.devices or SNAPSHOT.simulated, reason=f"no NVIDIA GPU here: {SNAPSHOT.reason}")
HERE = Path(__file__).parent
HOLD = HERE/"cuda.py"
sys.path.insert(0, str(HERE))
import report  # noqa: E402  (its neighbour)

CROWD, CROWD_SECONDS = 8, float(os.environ.get("CROWD_SECONDS", "10"))   # processes at once, for so long
OVERHEAD_MIB = 800  # of a CUDA context, on top of what is allocated; less on most cards


@pytest.fixture(scope="module")
def figures():
    "What is measured, with card, driver and date"
    found = dict(
        card=SNAPSHOT.devices[0].name,
        driver=SNAPSHOT.driver_version,
        date=time.strftime("%Y-%m-%d"),
        exact=driver_pid_reader() is not None,
    )
    yield found
    if path := os.environ.get("GPU_FIGURES"):
        Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def holding(mib, depth=0, env=None, *more, within=()):
    "A process that holds memory, and the PID of the one that does, as it sees it"
    process = subprocess.Popen(
        [*within, sys.executable, HOLD, str(mib), str(depth), *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env={**os.environ, **(env or {})})
    try:
        said = process.stdout.readline().split()
        if said == ["not", "supported"]: pytest.skip("the driver does not support it")
        assert said[:1] == ["ready"], said
        yield process, int(said[1])
    finally:
        process.stdin.close()
        process.wait(20)


def test_each_gpu_has_the_address_that_linux_lists():
    listed = Path("/proc/driver/nvidia/gpus")
    if not listed.is_dir(): pytest.skip("the kernel module lists no GPU here, as under WSL")
    assert {d.pci for d in SNAPSHOT.devices} <= set(os.listdir(listed))


def nearly(mib, allocated): return allocated <= mib <= allocated + OVERHEAD_MIB


def nvidia_smi() -> dict[int, float]:
    "The MiB of each PID that nvidia-smi lists with a figure"
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    rows = [line.split(",") for line in listed.splitlines() if "[" not in line]
    return {int(pid): float(mib) for pid, mib in rows}


def test_child_grandchild_and_outsider_are_told_apart_by_what_they_allocated(figures):
    if driver_pid_reader() is None: pytest.skip("inside a container without the host's /proc nobody can be told apart")
    manager = ResourceManager(track_self=False)
    before = manager.check_gpu_availability().devices[0]
    with holding(1_000) as (child, _), holding(700, depth=2) as (parent, grandchild), holding(500) as (_, outsider):
        for worker in (child, parent): manager.register_worker(worker.pid, "test")
        status = manager.check_gpu_availability().devices[0]
        held = {p.pid: (p.owner, (p.memory_used or 0)/2**20) for p in status.processes}
        assert held[child.pid][0] == "app" and nearly(held[child.pid][1], 1_000), held
        assert held[grandchild][0] == "app" and nearly(held[grandchild][1], 700), held
        assert held[outsider][0] == "external" and nearly(held[outsider][1], 500), held
        grown = (status.device.memory_used - before.device.memory_used)/2**20
        figures["allocated_mib"], figures["device_grew_mib"] = 2_200, round(grown)
        told = dict(child=child.pid, grandchild=grandchild, outsider=outsider)
        figures["seen_mib"] = {who: round(held[pid][1]) for who, pid in told.items()}
        assert 2_200 <= grown <= 2_200 + 3*OVERHEAD_MIB
        if shutil.which("nvidia-smi"):
            smi = nvidia_smi()
            for pid in (child.pid, grandchild, outsider): assert abs(smi[pid] - held[pid][1]) <= 2, (smi, held)
        if importlib.util.find_spec("nvitop"):   # the extra bench has it
            import nvitop
            listed = nvitop.Device(status.device.index).processes()
            peer = {pid: process.gpu_memory()/2**20 for pid, process in listed.items()}
            for pid in (child.pid, grandchild, outsider): assert abs(peer[pid] - held[pid][1]) <= 2, (peer, held)


def test_all_that_was_allocated_is_somebodys(figures):
    "Also where no process can be told: then it is unattributed, or the app's as far as it says so"
    manager = ResourceManager(track_self=False)
    before = manager.check_gpu_availability().devices[0]
    with holding(2_000):
        status = manager.check_gpu_availability().devices[0]
        more = sum(status.shares.values()) - sum(before.shares.values())
        assert nearly(more/2**20, 2_000)


def test_what_a_check_costs_beside_the_bare_calls(figures):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]/"benchmarks"))
    import pynvml
    run = pytest.importorskip("run", reason="needs the extra bench")
    pynvml.nvmlInit()
    with holding(500):
        ours, bare = run.medians(ResourceManager().check_gpu_availability, run.bare_calls)
    figures["check_ms"], figures["bare_calls_ms"] = round(ours*1e3, 3), round(bare*1e3, 3)
    figures["ratio"] = round(ours/bare, 2)
    assert figures["ratio"] > 1   # it makes those calls, and more


def test_many_processes_that_reserve_fill_the_card_and_none_runs_out_of_memory(figures, tmp_path, monkeypatch):
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    device = ResourceManager().check_gpu_availability().devices[0]
    if device.status is ResourceStatus.UNAVAILABLE: pytest.skip(device.reason or "")
    each = int(device.room/2**20/4)   # four fit, ten want to
    code = f"""import subprocess, sys
from cjm_fasthtml_resources.core.manager import ResourceManager
with ResourceManager(app="fill").reserve({each}, 0, timeout=120) as gpu:
    sys.exit(subprocess.call([sys.executable, {str(HOLD)!r}, "{max(each - OVERHEAD_MIB, 100)}", "0", "3"]))
"""
    start = [sys.executable, "-c", code]
    jobs = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(10)]
    most, ended = 0, []
    while any(job.poll() is None for job in jobs):
        most = max(most, read_gpus().devices[0].memory_used or 0)
        time.sleep(0.1)
    for job in jobs: ended.append((job.returncode, job.stdout.read().split()[:1]))
    figures["jobs"], figures["most_used_mib"] = len(jobs), round(most/2**20)
    figures["total_mib"] = round(device.device.memory_total/2**20)
    assert ended == [(0, ["ready"])]*10


CROWD_JOB = """
import os, random, sys, time
sys.path.insert(0, {folder!r})
from cuda import allocate
from cjm_fasthtml_resources.core.manager import ResourceManager
draw = random.Random(os.getpid())
mib = draw.randint({least}, {most})
with ResourceManager(app=f"crowd-{{os.getpid() % 3}}").reserve(mib, timeout=120):
    allocate(mib - {overhead})
    time.sleep(draw.random())
"""


def test_a_crowd_that_is_killed_all_the_while_never_runs_out_of_memory(figures, tmp_path, monkeypatch):
    "Each job takes what it reserved, in its own process; a third of them are killed, also while they allocate"
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    device = ResourceManager().check_gpu_availability().devices[0]
    if device.status is ResourceStatus.UNAVAILABLE: pytest.skip(device.reason or "")
    room = device.room//2**20
    code = CROWD_JOB.format(folder=str(HERE), least=room//16, most=room//2, overhead=OVERHEAD_MIB)
    draw, dies, ended, most = random.Random(0), {}, [], 0
    until = time.monotonic() + CROWD_SECONDS
    while dies or time.monotonic() < until:
        while len(dies) < CROWD and time.monotonic() < until:
            job = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
            dies[job] = time.monotonic() + (4*draw.random() if draw.random() < 0.3 else 1_000)
        for job, end in dies.items():
            if time.monotonic() >= end: job.kill()
        most = max(most, read_gpus().devices[0].memory_used or 0)
        time.sleep(0.05)
        ended += [job for job in dies if job.poll() is not None]
        dies = {job: end for job, end in dies.items() if job not in ended}
    errors = [job.stderr.read() for job in ended if job.returncode not in (0, -signal.SIGKILL)]
    assert not errors, errors[0]
    done, killed = (sum(job.returncode == code for job in ended) for code in (0, -signal.SIGKILL))
    figures["crowd"] = dict(jobs=len(ended), done=done, killed=killed, most_used_mib=round(most/2**20))
    assert done and killed and not ResourceManager().get_claims()


UNLOADS = """
import os, sys, time
sys.path.insert(0, {folder!r})
from cuda import allocate, free
from cjm_fasthtml_resources.core.manager import ResourceManager

class Model:
    def __init__(self): self.memory = allocate({mib})
    def release(self): free(self.memory)
    def on_request(self, question): return True

manager = ResourceManager(app="chat")
manager.register_worker(os.getpid(), "llm", loaded_plugin_resource="a model", plugin_instance=Model())
print("ready", flush=True)
time.sleep(60)
"""


def test_a_model_that_is_unloaded_on_request_makes_room(figures, tmp_path, monkeypatch):
    "The process goes on, with its context"
    if driver_pid_reader() is None: pytest.skip("inside a container without the host's /proc no process can be told")
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    manager = ResourceManager(app="speech", track_self=False)
    room = manager.check_gpu_availability().devices[0].room//2**20
    code = UNLOADS.format(folder=str(HERE), mib=room*2//3)
    chat = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert chat.stdout.readline() == "ready\n"
        with pytest.raises(ResourceBusy): manager.reserve(room//2, timeout=0)
        began = time.monotonic()
        with manager.reserve(room//2, ask_idle=True, timeout=30): took = time.monotonic() - began
        held = {p.pid: (p.memory_used or 0)/2**20 for p in read_gpus().devices[0].processes or ()}
        figures["unloaded_mib"], figures["unloaded_after_s"] = room*2//3, round(took, 3)
        assert chat.poll() is None and held.get(chat.pid, 0) <= OVERHEAD_MIB
    finally:
        chat.kill()
        chat.wait()


COMMAND = [sys.executable, "-m", "cjm_fasthtml_resources"]


def test_a_recorder_tells_afterwards_who_was_there(tmp_path, monkeypatch):
    if driver_pid_reader() is None: pytest.skip("inside a container without the host's /proc no process can be told")
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    recorder = subprocess.Popen([*COMMAND, "record"], stdout=subprocess.PIPE, text=True)
    try:
        assert recorder.stdout.readline()
        time.sleep(2)   # its first sample knows of no change
        with ResourceManager(app="speech").reserve(3_500) as held, holding(3_000) as (process, _): time.sleep(3)
        time.sleep(3)   # it takes a sample each second
    finally:
        recorder.send_signal(signal.SIGINT)
        recorder.wait(20)
    said = subprocess.run([*COMMAND, "history", "--since", "1m", "--json"], capture_output=True, text=True, check=True)
    changes = [(change["kind"], change["pid"]) for change in json.loads(said.stdout)["changes"]]
    assert {("started", process.pid), ("ended", process.pid)} <= {*changes}
    assert {("reserved", os.getpid()), ("released", os.getpid())} <= {*changes} and not held.release()


OUT_OF_MEMORY = """
import torch
held = torch.empty({mib}*2**20, dtype=torch.uint8, device="cuda")
"""


def test_a_command_that_runs_out_of_memory_is_told_who_had_it(tmp_path, monkeypatch):
    if not importlib.util.find_spec("torch"): pytest.skip("needs PyTorch")
    if driver_pid_reader() is None: pytest.skip("inside a container without the host's /proc no process can be told")
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    room = ResourceManager().check_gpu_availability().devices[0].room//2**20
    with holding(room//2) as (process, _):
        command = [sys.executable, "-c", OUT_OF_MEMORY.format(mib=room*3//4)]
        done = subprocess.run([*COMMAND, "run", "--gpu-memory", "2GiB", "--", *command], capture_output=True, text=True)
    assert done.returncode == 1 and "out of memory" in done.stderr, done.stderr
    explained = done.stderr.splitlines()[-6:]
    assert any(f"PID {process.pid}" in line for line in explained), explained


def test_memory_is_free_again_once_its_process_has_been_killed(figures):
    manager = ResourceManager(track_self=False)
    with holding(2_000) as (process, _):
        before = manager.check_gpu_availability().devices[0].room
        process.kill()
        process.wait()
        ended = time.monotonic()
        while manager.check_gpu_availability().devices[0].room < before + 2_000*2**20:
            assert time.monotonic() < ended + 10
    figures["free_after_s"] = round(time.monotonic() - ended, 3)


def test_managed_memory_is_used_and_no_process_says_so(figures):
    "cuMemAllocManaged: it stands in no process's figure, so it is unattributed"
    if SNAPSHOT.devices[0].unified or SNAPSHOT.devices[0].mig_mode: pytest.skip("on a GPU with memory of its own")
    manager = ResourceManager(track_self=False)
    before = manager.check_gpu_availability().devices[0]
    with holding(1_000, 0, None, "0", "managed"):
        after = manager.check_gpu_availability().devices[0]
    unseen = (after.unattributed_memory - before.unattributed_memory)/2**20
    figures["managed_mib"], figures["managed_unattributed_mib"] = 1_000, round(unseen)
    assert before.room - after.room >= 1_000*2**20
    assert unseen >= 950


def test_a_job_is_learned_from_what_its_process_took(figures):
    if driver_pid_reader() is None: pytest.skip("inside a container without the host's /proc no process can be told")
    manager = ResourceManager(track_self=False)
    with manager.job("a job", 4_000, plugin="test") as job, holding(2_000, env=job.env) as (process, _):
        assert job.watch(process.pid)
        promise, = manager.check_gpu_availability().devices[0].promises
        assert promise.pid == process.pid and nearly(4_000 - promise.unused/2**20, 2_000)
        manager.job_looks.look(True)
    learned = manager.expected_need("test")
    figures["learned_mib"], figures["learned_of_mib"] = round(learned.highest/2**20), 2_000
    assert nearly(learned.highest/2**20, 2_000) and learned.ram > 2**20 and not manager.get_claims()


OPEN_FILES = """
import os
from cjm_fasthtml_resources.core.gpu import read_gpus, release_driver

def files():
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try: found.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError: continue
    return {path for path in found if path.startswith("/dev/nv")} | {
        line.split()[-1] for line in open("/proc/self/maps") if "/dev/nv" in line}

read_gpus()
reading = files()
release_driver()
print(bool(reading), sorted(files()), len(read_gpus().devices))
"""


def test_a_driver_that_was_released_has_no_file_of_this_process_open():
    "A reset of a GPU, a change of MIG and a reload of the driver wait for nobody then"
    if not Path("/dev/nvidiactl").exists(): pytest.skip("the driver has no device files here")
    done = subprocess.run([sys.executable, "-c", OPEN_FILES], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"True [] {len(SNAPSHOT.devices)}\n", done.stdout + done.stderr


INSIDE = """
import subprocess, sys
from cjm_fasthtml_resources.core.manager import ResourceManager
child = subprocess.Popen([sys.executable, {hold!r}, "500"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
pid = int(child.stdout.readline().split()[1])
device = ResourceManager().check_gpu_availability().devices[0]
print(pid == child.pid, [(p.pid == pid, p.owner) for p in device.processes], device.estimated)
child.stdin.close()
child.wait()
"""


def test_a_pid_namespace_sees_its_own_processes_by_its_own_numbers(figures):
    "An open kernel module from release 565 on: an exact answer in a container, without the host's /proc"
    if driver_numbers() != "own": pytest.skip("this driver does not tell a container its own numbers")
    within = ["unshare", "--mount-proc", "--pid", "--fork", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*within, "true"], capture_output=True).returncode:
        pytest.skip("making a PID namespace needs root")
    code = INSIDE.format(hold=str(HOLD))
    with holding(700), holding(600, within=within):   # one outside, one in another namespace
        found = subprocess.run([*within, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        seen = sorted(p.owner for p in ResourceManager().check_gpu_availability().devices[0].processes)
    assert found.stdout == "True [(True, 'app')] False\n", found.stdout + found.stderr
    assert seen.count("app") >= 2   # from outside all of them are seen: this process started both
    figures["namespace"] = "own numbers, own processes"


# What drivers and machines differ in

def every(conflict): return (*conflict.devices, *getattr(conflict, "other_instances", ()))


def facts_of(device):
    "What the report has of a device: the raw answers"
    found = report.make_report()["devices"]
    top = found[device.index if device.mig_parent is None else device.mig_parent]
    return top if device.mig_parent is None else next(p for p in top["instances"] if p["index"] == device.index)


def test_the_size_of_an_entry_is_what_the_driver_writes(figures):
    with holding(300) as (_, pid), holding(200):
        device = read_gpus().devices[0]
        lists = facts_of(device)["lists"]
        held = {p.pid: p.memory_used for p in device.processes or ()}
    for call, found in lists.items():
        if found.get("count"): figures.setdefault("bytes_of_an_entry", {})[call] = found["entry"]
    sizes = {call: found["entry"] for call, found in lists.items() if found.get("count") and not found["error"]}
    if not sizes: pytest.skip("the driver lists no process here")
    for call, size in sizes.items(): assert size in ((16,) if not call.endswith(("_v2", "_v3")) else (24, 32)), sizes
    assert pid in held or driver_pid_reader() is None
    raw = max(len(found["entries"]) for found in lists.values() if found.get("entries"))
    assert len(held) >= raw    # none is lost by a wrong size


def test_open_or_proprietary_module_tells_whose_numbers_it_gives(figures):
    module, numbers = report.kernel_module(), driver_numbers(host_proc())
    figures["module"] = module
    if module is None: pytest.skip("no file tells which kernel module it is")
    if module == "proprietary": assert numbers == "host"
    elif module == "open": assert numbers in ("own", "mixed", "host")
    if SNAPSHOT.driver_version and module == "open" and int(SNAPSHOT.driver_version.split(".")[0]) >= 565:
        assert numbers == "own"


def values(devices):
    "Some values of CUDA_VISIBLE_DEVICES for this machine"
    uuids, last = [d.uuid for d in devices if d.uuid and not d.mig_mode], len(SNAPSHOT.devices) - 1
    named = [*uuids, ",".join(uuids), ",".join(reversed(uuids))]
    if uuids: named += [f"{uuids[0]},0", f"0,{uuids[0]}", uuids[0][:12]]
    numbers = ["0", " 0", "+0", "0a", "1", "0,0", "0,1", "1,0", "0,-1", "-1", f"{last},0"]
    return list(dict.fromkeys([None, "", "none", *numbers, *named]))


BOTH = """
import json, sys
sys.path.insert(0, {folder!r})
from visible import enumerate_cuda
from cjm_fasthtml_resources.core.manager import ResourceManager
conflict = ResourceManager().check_gpu_availability()
print(json.dumps([enumerate_cuda(), [d.device.uuid for d in conflict.devices], list(conflict.notes)]))
"""


def seen_with(value, order):
    "What CUDA's library shows a process, and what this library says that it does"
    given = dict(CUDA_VISIBLE_DEVICES=value, CUDA_DEVICE_ORDER=order)
    env = {name: text for name, text in os.environ.items() if name not in given}
    env |= {name: text for name, text in given.items() if text is not None}
    code = BOTH.format(folder=str(HERE))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SETTINGS = [*((value, "PCI_BUS_ID") for value in values(SNAPSHOT.devices)),
            *((value, None) for value in (None, "0", "1", "0,1", "1,0"))]


@pytest.mark.parametrize(("value", "order"), SETTINGS, ids=lambda text: repr(text)[:24])
def test_the_devices_are_those_of_cuda_in_its_order(value, order):
    cuda, ours, notes = seen_with(value, order)
    if "reason" in cuda: pytest.skip(cuda["reason"])
    digits = [read_digits(uuid) for uuid in ours]
    if order is None and any("can mean" in note or "fastest" in note.lower() for note in notes):
        assert sorted(digits) == sorted(cuda["devices"])   # it says itself that the order is not certain
    else: assert digits == cuda["devices"], (value, order, cuda)


def test_unified_memory_is_the_machines(figures):
    unified = [d for d in every(ResourceManager().check_gpu_availability()) if d.device.unified]
    if not unified: pytest.skip("the GPUs of this machine have memory of their own")
    before = unified[0]
    assert before.device.memory_total == read_machine().total
    with holding(1_000) as (_, pid):
        after = next(d for d in every(ResourceManager().check_gpu_availability()) if d.device.unified)
        held = {p.pid: (p.memory_used or 0)/2**20 for p in after.processes}
    figures["unified_grew_mib"] = round((after.device.memory_used - before.device.memory_used)/2**20)
    assert driver_pid_reader() is None or nearly(held[pid], 1_000)
    assert sum(after.shares.values()) - after.promised() == after.device.memory_used


def test_the_instances_of_a_divided_gpu_add_up_to_no_more_than_it_has(figures):
    divided = [d for d in SNAPSHOT.devices if d.mig_mode]
    if not divided: pytest.skip("no GPU of this machine is divided by MIG")
    conflict = ResourceManager().check_gpu_availability()
    for gpu in divided:
        pools = {d.device.pool: d for d in every(conflict) if d.device.mig_parent == gpu.index}
        figures[f"pools_of_{gpu.index}"] = len(pools)
        assert sum(d.device.memory_total for d in pools.values()) <= gpu.memory_total
        assert sum(d.room for d in pools.values()) <= gpu.memory_free + 8*2**20
