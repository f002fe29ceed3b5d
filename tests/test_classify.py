"The arithmetic of an answer, and its sentences word for word"
from dataclasses import replace

from conftest import GIB, MIB

from cjm_fasthtml_resources.core.classify import classify_memory, conclude
from cjm_fasthtml_resources.core.conflict import ResourceConflict
from cjm_fasthtml_resources.core.explain import explain_shortage
from cjm_fasthtml_resources.core.gpu import GpuDevice, GpuSnapshot
from cjm_fasthtml_resources.core.memory import HostMemory
from cjm_fasthtml_resources.core.needs import measure
from cjm_fasthtml_resources.core.resources import (
    DeviceStatus,
    OwnedProcess,
    Promise,
    ResourceStatus,
    ResourceType,
    WorkerState,
)
from cjm_fasthtml_resources.core.room import held_by


def test_what_a_worker_holds_and_was_seen_to_hold():
    worker = WorkerState(10, "llm", plugin_name="a", loaded_plugin_resource="m")
    silent = WorkerState(20, "llm", plugin_name="a", loaded_plugin_resource="m", gpu_memory_mb=3)
    nameless = WorkerState(30, "llm")
    tree = (
        OwnedProcess(10, "app", 100),
        OwnedProcess(11, "app", 50, parent_pid=10),
        OwnedProcess(12, "app", None, parent_pid=10),
        OwnedProcess(30, "app", 999),
        OwnedProcess(9, "external", 500, parent_pid=10),
    )
    first = DeviceStatus(GpuDevice(0), ResourceStatus.APP_BUSY, tree)
    unseen = DeviceStatus(GpuDevice(1), ResourceStatus.APP_BUSY, (OwnedProcess(10, "app", None),))
    elsewhere = DeviceStatus(GpuDevice(2, host="b"), ResourceStatus.APP_BUSY, (OwnedProcess(10, "app", 7),))
    # a process without a figure is there all the same; the number 10 of another host is somebody else
    assert held_by(worker, [first, unseen, elsewhere]) == {0: 150, 1: 0}
    known = {w.pid: w for w in (nameless, worker, silent)}
    assert measure(known, [first]) == {("a", "m"): 3*MIB}
    assert measure({10: worker}, [first]) == {("a", "m"): 150}
    # the larger of what is seen and said
    assert measure({10: replace(worker, gpu_memory_mb=50/MIB)}, [first]) == {("a", "m"): 150}
    assert measure({10: replace(worker, gpu_memory_mb=1)}, [first]) == {("a", "m"): MIB}
    assert measure({30: nameless, 10: replace(worker, loaded_plugin_resource=None)}, [first]) == {("a", ""): 150}
    assert measure({}, [first]) == {}
    assert measure({10: worker}, [replace(unseen, device=GpuDevice(0))]) == {}   # nothing was seen


def test_the_best_device_decides_and_outsiders_are_named_where_they_are_in_the_way():
    A, B, E, U = (ResourceStatus[name] for name in ("AVAILABLE", "APP_BUSY", "EXTERNAL_BUSY", "UNAVAILABLE"))
    def on(index, status, *processes, **kw):
        device = GpuDevice(index, name="L4", memory_total=100, memory_used=50, memory_free=50)
        return DeviceStatus(device, status, processes, **kw)
    mine = OwnedProcess(7, "app", 3*MIB//2, "w", "ada", "compute", 6, "llm")
    theirs = OwnedProcess(9, "external", None, "train.py", "bob", "compute")
    free, shared, full = on(0, A, replace(theirs, pid=8)), on(1, B, mine, theirs), on(2, E, theirs, mine)
    snapshot = GpuSnapshot()
    found = conclude([full, shared, free], 40.0, "why", ["note"], snapshot)
    assert (found.status, found.app_pids, found.external_pids, found.devices) == (A, [7], [9], (full, shared, free))
    assert (found.reason, found.notes, found.threshold_percent, found.snapshot) == (None, ("note",), 40.0, snapshot)
    seen = dict(
        pid=7, name="w", username="ada", gpu_memory_mb=1.5, device_name="L4", parent_pid=6, parent_worker_type="llm")
    assert found.app_processes == [dict(seen, device_id=2), dict(seen, device_id=1)]
    assert found.external_processes == [
        dict(pid=9, name="train.py", username="bob", gpu_memory_mb=None, device_id=2, device_name="L4")]
    lost, asleep = on(0, U, reason="lost"), on(1, U, reason="asleep")
    assert [conclude(devices).status for devices in ([full, shared], [full], [lost, full])] == [B, E, E]
    assert conclude([full]).threshold_percent == 45.0
    assert conclude([lost, asleep], 45.0, "x").reason == "GPU 0: lost; GPU 1: asleep"
    assert conclude((), 45.0, "no driver").reason == "no driver"
    assert conclude(()).reason == "no GPU was found" and conclude(()).status is U


def test_ram_is_the_apps_only_where_it_holds_more_than_the_others():
    def ram(used, *processes):
        owned = [OwnedProcess(pid, owner, size) for pid, (owner, size) in enumerate(processes)]
        return classify_memory(HostMemory(1_000, used), owned)
    A, B, E = ResourceStatus.AVAILABLE, ResourceStatus.APP_BUSY, ResourceStatus.EXTERNAL_BUSY
    assert [ram(900, ("app", size)).status for size in (450, 451)] == [E, B]
    assert [ram(used).status for used in (899, 900)] == [A, E]
    less = ram(950, ("app", None), ("app", 3), ("external", None))
    assert (less.memory.app_memory, less.memory.external_memory, less.external_pids) == (3, 947, [2])
    assert less.app_processes[1]["memory_mb"] == 0 and ram(10, ("app", 30)).memory.external_memory == 0
    assert ram(950, ("app", 123), ("external", 400)).app_processes[0]["memory_percent"] == 12.3

    def shown(total, used, held):
        return classify_memory(HostMemory(total, used), [OwnedProcess(1, "app", held)]).app_processes
    assert shown(3, 3, 2)[0]["memory_percent"] == 66.67
    assert shown(0, 0, 2)[0]["memory_percent"] == 0.0
    assert [process["memory_mb"] for process in shown(100*MIB, 99*MIB, 1_300_000)] == [1.24]


def said(status, *devices, **kw) -> str:
    "The sentence of an answer about GPU memory"
    return ResourceConflict(ResourceType.GPU_MEMORY, status, devices=devices, **kw).message


def l4(index, status, *processes, free=4, name="L4", **kw) -> DeviceStatus:
    "A device of 24 GiB on which `free` GiB are left"
    device = GpuDevice(index, name=name, memory_total=24*GIB, memory_used=(24 - free)*GIB, memory_free=free*GIB)
    held = {owner: sum(p.memory_used or 0 for p in processes if p.owner == owner) for owner in ("app", "external")}
    return DeviceStatus(device, status, processes, held["app"], held["external"], **kw)


def test_the_sentences_for_gpu_memory():
    A, B, E = ResourceStatus.AVAILABLE, ResourceStatus.APP_BUSY, ResourceStatus.EXTERNAL_BUSY
    many = [OwnedProcess(i, "app", i*GIB, f"w{i}") for i in range(1, 6)]
    bob, nameless = OwnedProcess(9, "external", 2*GIB, "train.py", "bob"), OwnedProcess(8, "external", None)

    assert said(ResourceStatus.UNAVAILABLE, reason="the driver sleeps") == "No GPU can be used: the driver sleeps."
    assert said(A, l4(0, A, free=3), l4(1, A, free=5), l4(2, B, free=9)) == \
        "A GPU job can start now: GPU 1 (L4) has 5.0 GiB free."
    assert said(A, l4(0, A, estimated=True, name=None)) == \
        "A GPU job can start now (estimate): GPU 0 (no name) has 4.0 GiB free."

    own = "A new job would share a GPU with this app. Most free: 4.0 GiB on GPU 0 (L4). In use by this app: "
    assert said(B, l4(0, B, *many), l4(1, E, bob)) == \
        f"{own}w5 (PID 5, 5.0 GiB on GPU 0), w4 (PID 4, 4.0 GiB on GPU 0), " \
        "w3 (PID 3, 3.0 GiB on GPU 0) and 2 more (3.0 GiB)."
    assert said(B, replace(l4(0, B), app_memory=GIB)) == f"{own}1.0 GiB on GPU 0."

    promises = (
        Promise(7, "app", 2*GIB, GIB),
        Promise(6, "external", 2*GIB, GIB, "night-run"),
        Promise(5, "app", GIB, 0),
    )
    reserved = said(B, l4(0, B, promises=promises))
    assert "2.0 GiB on GPU 0 (L4)" in reserved
    assert reserved.endswith(": a reservation of PID 7 (1.0 GiB on GPU 0, not used yet).")

    others = "No GPU is available: other programs use a large part of GPU 0. Largest: "
    bobs, unseen = "train.py (PID 9, user bob, 2.0 GiB on GPU 0)", "processes that are not visible from here"
    assert said(E, l4(0, E, bob, nameless, many[0]), l4(1, B, many[1])) == \
        f"{others}{bobs}, a process without a name (PID 8, on GPU 0)."
    assert said(E, l4(0, E, bob, unattributed_memory=2*GIB, promises=promises)) == \
        f"{others}{bobs}, {unseen} (2.0 GiB on GPU 0), " \
        "a reservation of PID 6 (app night-run, 1.0 GiB on GPU 0, not used yet)."
    larger = said(E, l4(0, E, bob, unattributed_memory=int(2.1*GIB)))
    assert larger == f"{others}{unseen} (2.1 GiB on GPU 0), {bobs}."
    assert " of each. Largest: " in said(E, l4(0, E, bob), l4(1, E, bob))


def test_the_order_of_causes_stays_while_only_small_digits_change():
    E = ResourceStatus.EXTERNAL_BUSY
    def at(first, second):
        rows = [OwnedProcess(pid, "external", size, "tool") for pid, size in ((11, first), (12, second))]
        return said(E, l4(0, E, *rows))
    assert at(2*GIB, 2*GIB + 1) == at(2*GIB + 1, 2*GIB)


def test_what_uses_most_is_named_whatever_it_is():
    "20.8 GiB that no process accounts for do not hide behind three processes of 50 MiB, nor does a reservation"
    E, large = ResourceStatus.EXTERNAL_BUSY, int(20.8*GIB)
    small = [OwnedProcess(pid, "external", 50*MIB, "tool") for pid in (11, 12, 13)]
    promise = Promise(6, "external", 3*GIB, 3*GIB, "night-run")
    hidden = l4(0, E, *small, unattributed_memory=large, promises=(promise,))
    for text in (said(E, hidden), explain_shortage([hidden], 9*GIB)):
        first, second = text.index("20.8 GiB"), text.index("a reservation of PID 6 (app night-run, 3.0 GiB")
        assert first < second < text.index("tool (PID 11") and "and 2 more" in text
    unified = replace(hidden, ram_memory=30*GIB)
    assert "Largest: programs in RAM" in said(E, unified)
    mine = (OwnedProcess(21, "app", GIB, "w"), Promise(22, "app", 9*GIB, 9*GIB))
    app = l4(0, ResourceStatus.APP_BUSY, mine[0], promises=mine[1:])
    assert said(app.status, app).index("a reservation of PID 22") < said(app.status, app).index("w (PID 21")


def test_the_sentences_for_too_little_gpu_memory():
    A, B, E = ResourceStatus.AVAILABLE, ResourceStatus.APP_BUSY, ResourceStatus.EXTERNAL_BUSY
    one, two = (OwnedProcess(i, "app", i*GIB, f"w{i}") for i in (1, 2))
    bob = OwnedProcess(9, "external", 2*GIB, "train.py", "bob")
    full = l4(0, E, bob, free=1)
    shared = l4(1, B, one, two, unattributed_memory=GIB, promises=(Promise(7, "app", 2*GIB, GIB),))
    assert explain_shortage([full, shared], 6*GIB) == \
        "The job needs 6.0 GiB. GPU 1 has 3.0 GiB free. In use or reserved there: w2 (PID 2, 2.0 GiB), " \
        "w1 (PID 1, 1.0 GiB), a reservation of PID 7 (1.0 GiB on GPU 1, not used yet) and 1 more (1.0 GiB)."
    assert explain_shortage([l4(0, A)], 6*GIB) == "The job needs 6.0 GiB. GPU 0 has 4.0 GiB free."
    assert explain_shortage([], 1) == ""


def test_the_sentences_for_ram():
    worker, bob = OwnedProcess(7, "app", 3*GIB, "worker"), OwnedProcess(9, "external", 2*GIB, "train.py", "bob")
    def ram(used, *processes): return classify_memory(HostMemory(10*GIB, used*GIB), processes, 90.0)
    assert ram(5).message == "RAM is available: 5.0 GiB of 10.0 GiB free."
    mine, theirs = ram(9, OwnedProcess(8, "app", 2*GIB, "child"), bob, worker), ram(9.5, worker, bob)
    assert mine.message == ("RAM is low: 1.0 GiB of 10.0 GiB free. "
                            "This app uses the most. Largest: worker (PID 7, 3.0 GiB), child (PID 8, 2.0 GiB).")
    assert theirs.message == ("RAM is low: 512 MiB of 10.0 GiB free. "
                              "Other programs use the most. Largest: train.py (PID 9, user bob, 2.0 GiB).")
    assert (mine.app_pids, mine.external_pids, theirs.app_pids, theirs.external_pids) == ([7, 8], [], [7], [9])
    assert mine.app_processes[0] == dict(
        pid=7, name="worker", username=None, memory_mb=3*1024, memory_percent=30.0,
        parent_pid=None, parent_worker_type=None)
    assert theirs.external_processes == [
        dict(pid=9, name="train.py", username="bob", memory_mb=2*1024, memory_percent=20.0)]
    assert (mine.threshold_percent, mine.resource_type) == (90.0, ResourceType.SYSTEM_MEMORY)
    assert mine.memory.shares == {"app": 5*GIB, "external": 4*GIB}
    small = ram(9.5, OwnedProcess(1, "external", GIB//10, "one"), OwnedProcess(2, "external", GIB//10 - 1, "less"))
    assert small.external_pids == [1] and small.memory.external_memory == 9.5*GIB   # from 1 % of the total on
    assert ram(9.5, OwnedProcess(2, "external", 1, "tiny")).external_pids == [2]    # the largest always
    unknown = ResourceConflict(
        ResourceType.SYSTEM_MEMORY, ResourceStatus.UNAVAILABLE,
        reason="2 hosts do not answer", memory=theirs.memory)
    assert unknown.message == "Cannot read RAM usage: 2 hosts do not answer."


def test_a_worker_says_what_it_knows():
    assert repr(WorkerState(7, "llm")) == "WorkerState(pid=7, worker_type='llm', status='idle')"
    worker = WorkerState(7, "llm", "job", config={"key": 1}, is_remote=True, last_used=5.0, child_pids=[8])
    assert repr(worker) == ("WorkerState(pid=7, worker_type='llm', job_id='job', config={'key': '<int, hidden>'}, "
                            "status='idle', child_pids=[8], is_remote=True)")


def test_an_answer_in_a_terminal_has_a_line_for_each_device():
    class Printer:
        def text(self, text): self.shown = text
    printer = Printer()
    quarter = GpuDevice(0, memory_total=2**30, memory_used=2**28, memory_free=3*2**28)
    free = DeviceStatus(quarter, ResourceStatus.AVAILABLE, external_memory=2**28)
    lost = DeviceStatus(GpuDevice(1, name="NVIDIA L4"), ResourceStatus.UNAVAILABLE, reason="the GPU is lost")
    conflict = ResourceConflict(ResourceType.GPU_MEMORY, ResourceStatus.AVAILABLE, devices=(free, lost))
    conflict._repr_pretty_(printer, False)
    assert printer.shown.splitlines() == [
        "gpu_memory: available. A GPU job can start now: GPU 0 (no name) has 768 MiB free.",
        "  GPU 0  no name  available: other programs 256 MiB, free 768 MiB",
        "  GPU 1  NVIDIA L4  unavailable: the GPU is lost",
    ]
