"""Hosts of a dask cluster, each with simulated GPUs and processes of its own:
which answer, where tasks run, and what is left when something dies"""
import contextlib
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("distributed", reason="the extra cluster is not installed")
from conftest import wait_until  # noqa: E402
from distributed import Client  # noqa: E402
from hosts import Cluster  # noqa: E402

from cjm_fasthtml_resources.cluster import ClusterResources  # noqa: E402
from cjm_fasthtml_resources.core.conflict import ResourceBusy
from cjm_fasthtml_resources.core.manager import ResourceManager, ResourceStatus  # noqa: E402
from cjm_fasthtml_resources.core.resources import OwnedProcess  # noqa: E402
from cjm_fasthtml_resources.core.samples import take_sample  # noqa: E402
from cjm_fasthtml_resources.hosts.asking import HostAsker  # noqa: E402
from cjm_fasthtml_resources.hosts.combine import HostAnswer, combine, name_apart  # noqa: E402
from cjm_fasthtml_resources.hosts.scheduler import Round, Seat  # noqa: E402
from cjm_fasthtml_resources.hosts.worker import HostPlugin, Report  # noqa: E402
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu  # noqa: E402


@pytest.fixture
def cluster(tmp_path):
    with contextlib.ExitStack() as stack: yield Cluster(tmp_path, stack)


@contextlib.contextmanager
def connected(cluster: Cluster, workers: int, **options):
    with Client(scheduler_file=str(cluster.file)) as client:
        client.wait_for_workers(workers, timeout=90)
        with ClusterResources(client, **options) as resources: yield client, resources


def use(seconds: float, fail_once_in: str = "") -> tuple[str, int]:
    "Allocate 10,000 MiB on the device that was reserved; raises where there is no room after all"
    import sim_host

    from cjm_fasthtml_resources.cluster import current_reservation, host_name
    held = current_reservation()
    with sim_host.driver.allocate(10_000, held.index):
        time.sleep(seconds)
        if fail_once_in:
            path = Path(fail_once_in)
            if not path.exists():
                path.touch()
                raise RuntimeError("the first time")
        return host_name(), held.index


def named(first, actor, fifo_timeout): return first, actor, fifo_timeout


def left_over(resources: ClusterResources) -> list[str]:
    "What is still promised or in use anywhere"
    devices = [d for a in resources.check_hosts() if a.sample for d in a.sample.gpu.devices]
    return [f"{d.device.id} {d.promises} {d.device.memory_used}" for d in devices if d.promises or d.app_memory]


def nothing_is_left(resources: ClusterResources) -> None:
    end = time.monotonic() + 20
    while left_over(resources):
        assert time.monotonic() < end, left_over(resources)
        time.sleep(0.1)


def test_what_only_calculates_needs_no_dask():
    code = "import sys, cjm_fasthtml_resources.hosts.placing; print('distributed' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout == "False\n"


def test_tasks_go_where_there_is_room_and_none_takes_what_another_was_promised(cluster):
    cluster.add("ada", gpus=1, workers=2)
    cluster.add("bob", gpus=2)
    cluster.add("cpu", gpus=0)
    with connected(cluster, 4) as (client, resources):
        conflict = resources.check_gpu_availability()
        assert {d.device.id: d.status.value for d in conflict.devices} == {
            "ada:0": "available", "bob:0": "available", "bob:1": "available", "cpu:0": "unavailable"}
        assert conflict.status is ResourceStatus.AVAILABLE
        assert "libnvidia-ml was not found" in conflict.devices[-1].reason
        memory = resources.check_memory_availability()
        assert [note.partition(":")[0] for note in memory.notes] == ["ada", "bob", "cpu"]
        assert memory.memory.memory.total > 0
        assert resources.pick_gpus(2, 20_000).host == "bob"
        futures = [resources.submit(use, 0.6, gpu_memory_mb=10_000) for _ in range(12)]   # six fit at once
        ran = client.gather(futures)
        assert {"ada", "bob"} == {host for host, _ in ran} and len(set(ran)) == 3
        nothing_is_left(resources)
        future = resources.submit(use, 0, gpu_memory_mb=20_000, timeout=0)
        assert future.result(timeout=30)
        with pytest.raises(ValueError, match="gpu_memory_mb must be at most 24"):
            resources.submit(use, 0, gpu_memory_mb=30_000)
        choice = resources.pick_gpus(2)
        assert choice.env == {"CUDA_VISIBLE_DEVICES": ",".join(d.uuid for d in choice.devices)}
        assert len(set(choice.devices)) == 2
        three = client.submit(lambda: 3)
        future = resources.submit(named, 1, gpu_memory_mb=100, actor=2, fifo_timeout={"pure": three})
        assert future.result(timeout=30) == (1, 2, {"pure": 3})   # dask's own names, too
        with pytest.raises(TypeError, match="serialize|pickle"):
            resources.submit(named, 1, threading.Lock(), gpu_memory_mb=100)
        wait_until(lambda: resources.check_hosts() and not resources._sent.by_host())   # nor counted as on its way


def test_what_a_task_holds_is_given_back_however_it_ends(cluster):
    cluster.add("ada", gpus=1, nanny=True)
    with connected(cluster, 1) as (client, resources):
        long = resources.submit(use, 60, gpu_memory_mb=20_000)
        end = time.monotonic() + 20
        while not resources.check_hosts()[0].sample.gpu.devices[0].promises:   # those that follow find it there
            assert time.monotonic() < end
        waits = resources.submit(use, 0, gpu_memory_mb=20_000)
        gives_up = resources.submit(use, 0, gpu_memory_mb=20_000, timeout=0.5)
        with pytest.raises(ResourceBusy, match="Gave up after 0.5 s"): gives_up.result(timeout=30)
        end = time.monotonic() + 20
        while (answer := resources.check_hosts()[0]).waiting != 20_000*2**20:   # its own turn comes
            assert time.monotonic() < end, answer.waiting
        waiting = resources.check_gpu_availability().waiting     # who waits, and where
        assert [(w.devices, w.memory, w.position) for w in waiting] == [(("ada:0",), 20_000*2**20, 1)]
        with pytest.raises(ResourceBusy, match="The job did not wait: timeout is 0"):
            resources.submit(use, 0, gpu_memory_mb=20_000, timeout=0).result(timeout=30)
        assert resources.check_hosts()[0].waiting == 20_000*2**20   # this one left nothing in the queue
        assert [p.memory for p in answer.sample.gpu.devices[0].promises] == [20_000*2**20]
        assert answer.sample.gpu.status is ResourceStatus.APP_BUSY
        assert [w.status for w in answer.sample.workers] == ["running"]
        waits.cancel()                    # it leaves the queue
        end = time.monotonic() + 10
        while resources.check_hosts()[0].waiting: assert time.monotonic() < end
        killed = client.run(os.getpid)    # the nanny starts another worker, which has the task again
        os.kill(next(iter(killed.values())), signal.SIGKILL)
        end = time.monotonic() + 60
        while True:
            pids = client.run(os.getpid, on_error="ignore") if client.nthreads() else {}
            pid = next(iter((pids or {}).values()), None)
            devices = [d for a in resources.check_hosts() if a.sample for d in a.sample.gpu.devices]
            holders = [p.pid for d in devices for p in d.promises]
            if pid and pid not in killed.values() and holders == [pid]: break
            assert time.monotonic() < end, (pid, holders, long, (cluster.folder/"ada-0.log").read_text()[-3000:])
            time.sleep(0.2)
        long.cancel()
        client.restart()                  # what runs cannot be interrupted; its process can
        nothing_is_left(resources)


def test_a_host_that_does_not_answer_holds_up_nobody(cluster):
    cluster.add("ada")
    cluster.add("bob", workers=2)
    with connected(cluster, 3, timeout=1.0) as (client, resources):
        assert all(a.sample for a in resources.check_hosts())
        for process in cluster.hosts["ada"]: process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        conflict = resources.check_gpu_availability()
        assert time.monotonic() - began < 2.5
        assert {d.device.id: (d.status.value, d.reason) for d in conflict.devices} == {
            "ada:0": ("unavailable", "it did not respond within 1 s"), "bob:0": ("available", None)}
        assert resources.submit(use, 0, gpu_memory_mb=10_000).result(timeout=20)[0] == "bob"
        cluster.hosts["bob"][0].send_signal(signal.SIGSTOP)   # at the second check another worker speaks for it
        for _ in range(2): conflict = resources.check_gpu_availability()
        assert conflict.devices[-1].status is ResourceStatus.AVAILABLE
        for process in cluster.hosts["ada"] + cluster.hosts["bob"]: process.send_signal(signal.SIGCONT)
        end = time.monotonic() + 30
        while resources.check_gpu_availability().devices[0].status is not ResourceStatus.AVAILABLE:
            assert time.monotonic() < end
        cluster.hosts["ada"][0].kill()
        end = time.monotonic() + 30
        while len(resources.check_hosts()) != 1: assert time.monotonic() < end


def test_retries_and_stealing_do_not_break_the_accounting(cluster, tmp_path):
    "All are sent as if one host had all the room; stolen ones reserve where they run, and none runs out of memory"
    cluster.add("ada", gpus=1, threads=1)
    cluster.add("bob", gpus=1, threads=1)
    cluster.add("cpu", gpus=0, threads=4)
    with connected(cluster, 3) as (client, resources):
        asked, futures = resources.ask(), []
        assert asked.answers[0].host == "ada"
        for n in range(16):
            resources._last = time.monotonic() + 60, replace(asked, answers=asked.answers[:1])   # it knows one host
            once = str(tmp_path/f"task-{n}") if n % 4 == 0 else ""
            futures.append(resources.submit(use, 0.2, once, gpu_memory_mb=10_000, retries=1))
        ran = client.gather(futures)
        assert len(ran) == 16 and {host for host, _ in ran} <= {"ada", "bob"}
        nothing_is_left(resources)


def test_the_panel_and_the_page_show_a_cluster(cluster):
    pytest.importorskip("fasthtml", reason="the extra web is not installed")
    from fasthtml.core import FastHTML
    from starlette.testclient import TestClient

    from cjm_fasthtml_resources.ui.panel import ResourcePanel
    from cjm_fasthtml_resources.ui.web import resource_routes
    cluster.add("ada")
    cluster.add("bob", gpus=2)
    with connected(cluster, 2) as (client, resources):
        panel = ResourcePanel(resources)
        shown = " ".join(str(getattr(w, "value", "")) for w in panel._boxes) + str(panel._slots)
        panel.close()
        app = FastHTML(secret_key="of a test", default_hdrs=False)
        resource_routes(app, resources)
        page = TestClient(app).get("/resources").text
        for text in ("GPU ada:0", "GPU bob:0", "GPU bob:1", "dask@ada"): assert text in page, text
        assert re.search("ada:0", shown)
        needs_a_manager = "controls=True needs a ResourceManager"
        with pytest.raises(ValueError, match=needs_a_manager): ResourcePanel(resources, controls=True)
        with pytest.raises(ValueError, match=needs_a_manager):
            resource_routes(app, resources, controls=True, guard=lambda req: None)


def round_of(hosts: int) -> Round:
    "What the scheduler passes on from so many hosts, each with two GPUs and 51 processes in RAM"
    with SimulatedDriver([SimulatedGpu(), SimulatedGpu()]): sample = take_sample(ResourceManager())
    processes = tuple(OwnedProcess(n, "external" if n else "app", 2**20*n, f"p{n}", "bob") for n in range(51))
    memory = replace(sample.memory, memory=replace(sample.memory.memory, processes=processes))

    def report(n: int) -> Report:
        devices = tuple(replace(d, device=replace(d.device, uuid=f"GPU-{n}-{d.device.index}"))
                        for d in sample.gpu.devices)
        own = replace(sample, gpu=replace(sample.gpu, devices=devices), memory=memory)
        return Report(f"host-{n:02}", f"id-{n}", own)

    told = {f"tcp://{n}": pickle.dumps(report(n)) for n in range(hosts)}
    return Round("s1", {address: Seat(address, {}) for address in told}, told, ())


def count_calls(hosts: int) -> int:
    "Calls of functions, those in C too, that the answers of so many hosts take the client: reading and combining them"
    asker, found, calls = HostAsker(SimpleNamespace(id="me"), HostPlugin("cluster", {})), round_of(hosts), []
    asker.take(found)   # from now on it knows the hosts
    sys.setprofile(lambda frame, event, arg: calls.append(event) if event in ("call", "c_call") else None)
    try: combined = combine(asker.take(found).answers)
    finally: sys.setprofile(None)
    assert len(combined.gpu.devices) == 2*hosts and len(combined.memory.memory.processes) == hosts + 50
    return len(calls)


def test_the_clients_work_grows_in_proportion_to_the_hosts():
    four, few, many = (count_calls(hosts) for hosts in (4, 16, 64))
    assert many <= 4.2*few
    assert (many - few)/48 <= 1.05*(few - four)/12   # a further host costs the same, however many there are
    assert many <= 10*64*51   # and a process that a host names costs the client at most ten calls


def test_names_of_hosts_are_compared_a_few_times_each():
    compared = []

    class Name(str):
        def __eq__(self, other): return compared.append(1) or str.__eq__(self, other)
        def __lt__(self, other): return compared.append(1) or str.__lt__(self, other)
        __hash__ = str.__hash__

    names = [Name(f"host-{n:02}") for n in range(64)]
    assert [a.host for a in name_apart([HostAnswer(name, ()) for name in names])] == names
    assert len(compared) <= 4*64
