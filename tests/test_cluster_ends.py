"""What ends or hangs in a dask cluster, with real processes: each is answered in words within twice the timeout,
and the same object works again when the cause is gone. The table in nbs/tutorials/machines.ipynb has a row for each"""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("distributed", reason="the extra cluster is not installed")
import dask  # noqa: E402
from conftest import wait_until  # noqa: E402
from distributed import Client, LocalCluster  # noqa: E402
from distributed.security import Security  # noqa: E402
from hosts import SIM_HOST, Cluster  # noqa: E402

from cjm_fasthtml_resources.cluster import ClusterResources, current_reservation  # noqa: E402
from cjm_fasthtml_resources.core.conflict import ResourceUnavailable  # noqa: E402

TIMEOUT = 1.0


@contextlib.contextmanager
def within_limit() -> Iterator[None]:
    "Twice the timeout, and a bit for a machine that is busy"
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 2*TIMEOUT + 0.5


def reserved():
    from cjm_fasthtml_resources.cluster import current_reservation, host_name
    held = current_reservation()
    return host_name(), held.gpu_memory_mb


def use(seconds: float) -> tuple[float, float]:
    began = time.monotonic()
    time.sleep(seconds)
    return began, time.monotonic()


def at_once(runs) -> int: return max(sum(began <= at < end for began, end in runs) for at, _ in runs)


def answering(resources: ClusterResources, *hosts: str) -> bool:
    return [a.host for a in resources.check_hosts() if a.sample] == list(hosts)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "A cluster of two hosts, and a client that survives its scheduler"
    with contextlib.ExitStack() as stack:
        cluster = Cluster(tmp_path_factory.mktemp("cluster"), stack)
        cluster.add("ada", threads=8, nanny=True, options=("--resources", "disk=2"))
        cluster.add("bob", nanny=True)
        client = stack.enter_context(Client(scheduler_file=str(cluster.file)))
        client.wait_for_workers(2, timeout=90)
        yield cluster, client, stack.enter_context(ClusterResources(client, timeout=TIMEOUT))


def test_a_task_is_limited_as_with_dasks_own_submit(shared):
    _, client, resources = shared
    wait_until(lambda: answering(resources, "ada", "bob"), 30)
    for limits in (dict(workers="bob"), dict(workers=resources.pick_gpus().workers), dict(resources={"disk": 1})):
        host = resources.submit(reserved, gpu_memory_mb=100, **limits).result(timeout=30)[0]
        assert host == ("bob" if limits.get("workers") == "bob" else host)
        if "resources" in limits: assert host == "ada"
    with dask.annotate(resources={"disk": 1}):
        assert resources.submit(reserved, gpu_memory_mb=100).result(timeout=30) == ("ada", 100)
    with pytest.raises(ValueError, match="no worker or host of the cluster is called eve"):
        resources.submit(reserved, gpu_memory_mb=100, workers="eve")
    first, second = (resources.submit(use, 0.01, gpu_memory_mb=100, pure=True) for _ in range(2))
    assert first.key == second.key and first.result(timeout=30) == second.result(timeout=30)
    assert {host for host, _ in client.gather(resources.map(lambda n: reserved(), range(8), gpu_memory_mb=9_000))} \
        == {"ada", "bob"}


def test_tasks_of_a_graph_reserve_as_annotated(shared):
    _, client, resources = shared
    with resources.annotate(gpu_memory_mb=10_000):
        parts = [dask.delayed(use)(0.3) for _ in range(8)]
    assert at_once(dask.delayed(list)(parts).compute()) <= 4      # two GPUs with room for two each
    with pytest.raises(LookupError, match="no reservation"): dask.delayed(current_reservation)().compute()
    with resources.annotate(gpu_memory_mb=23_000, timeout=0.1):
        parts = [dask.delayed(use)(1) for _ in range(4)]
    with pytest.raises(RuntimeError, match="Gave up after 0.1 s"): dask.delayed(list)(parts).compute()


def test_three_clients_at_once(shared):
    cluster, _, resources = shared

    def many(out: list) -> None:
        with Client(scheduler_file=str(cluster.file), set_as_default=False) as client:
            own = ClusterResources(client, timeout=10)
            out += client.gather([own.submit(use, 0.2, gpu_memory_mb=10_000) for _ in range(4)])

    runs, threads = list[tuple[float, float]](), []
    for _ in range(3): threads.append(threading.Thread(target=many, args=[runs]))
    for thread in threads: thread.start()
    for thread in threads: thread.join(60)
    assert len(runs) == 12 and at_once(runs) <= 4
    wait_until(lambda: not any(d.promises for d in resources.check_gpu_availability().devices), 20)


def test_a_restart_of_the_workers(shared):
    _, client, resources = shared
    futures = [resources.submit(use, 60, gpu_memory_mb=20_000) for _ in range(3)]
    wait_until(lambda: sum(len(d.promises) for d in resources.check_gpu_availability().devices) == 2, 30)
    wait_until(lambda: resources.check_gpu_availability().waiting, 30)
    client.restart(timeout=60)
    wait_until(lambda: answering(resources, "ada", "bob"), 30)
    assert {future.status for future in futures} == {"cancelled"} and not resources._sent.by_host()
    wait_until(lambda: not any(d.promises for d in resources.check_gpu_availability().devices), 30)
    assert resources.submit(reserved, gpu_memory_mb=100, workers="bob").result(timeout=30) == ("bob", 100)


@contextlib.contextmanager
def app_of(resources: ClusterResources) -> Iterator[str]:
    "The address of a web app that shows the cluster"
    import uvicorn
    from fasthtml.core import FastHTML
    from servers import free_port

    from cjm_fasthtml_resources.ui.web import ResourceCard, resource_routes
    app = FastHTML(secret_key="of a test", default_hdrs=False)
    resource_routes(app, resources, metrics="/metrics", interval=0.2)

    @app.get("/card")
    def card(): return ResourceCard(resources)

    @app.get("/other")
    def other(): return "other"

    server = uvicorn.Server(uvicorn.Config(app, port=(port := free_port()), log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, 20)
    try: yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


def test_a_scheduler_that_hangs(shared):
    for module in ("fasthtml", "httpx", "uvicorn"): pytest.importorskip(module)
    pytest.importorskip("prometheus_client")
    import httpx
    cluster, client, resources = shared
    wait_until(lambda: answering(resources, "ada", "bob"), 30)
    with app_of(resources) as url, httpx.Client(timeout=30) as visitor:
        assert "ada:0" in visitor.get(f"{url}/resources").text
        cluster.scheduler.send_signal(signal.SIGSTOP)
        try:
            with within_limit(): conflict = resources.check_gpu_availability()
            assert {d.device.id for d in conflict.devices} == {"ada:0", "bob:0"}
            assert "did not respond within 1.5 s" in conflict.message
            with within_limit(), pytest.raises(ResourceUnavailable, match="the scheduler tcp://.* did not respond"):
                resources.submit(reserved, gpu_memory_mb=100)
            with within_limit(): assert "did not respond within" in visitor.get(f"{url}/resources").text
            with within_limit(): assert "cjm_resources_status" in visitor.get(f"{url}/metrics").text
            visitors = [threading.Thread(target=visitor.get, args=[f"{url}/card"])
                        for _ in range(60)]      # more than the app has threads for
            for each in visitors: each.start()
            took = []
            for _ in range(20):
                began = time.monotonic()
                assert visitor.get(f"{url}/other").text == "other"
                took.append(time.monotonic() - began)
                time.sleep(0.05)
            for each in visitors: each.join()
            assert sorted(took)[len(took)//2] < 0.05 and max(took) < TIMEOUT, took   # the machine is busy, too
            with within_limit(): ClusterResources(client, timeout=TIMEOUT)   # it can come back
        finally: cluster.scheduler.send_signal(signal.SIGCONT)
        wait_until(lambda: answering(resources, "ada", "bob"), 30)
        assert "did not respond within" not in visitor.get(f"{url}/resources").text
    assert resources.submit(reserved, gpu_memory_mb=100).result(timeout=30)[1] == 100


def test_a_scheduler_that_is_killed_and_comes_back(shared):
    cluster, client, resources = shared
    lost = resources.submit(use, 60, gpu_memory_mb=100)
    port = cluster.kill()
    wait_until(lambda: client.status == "connecting", 20)
    with within_limit(): conflict = resources.check_gpu_availability()
    assert "tries to connect again" in conflict.message
    with within_limit(), pytest.raises(ResourceUnavailable, match="tries to connect again"):
        resources.submit(reserved, gpu_memory_mb=100)
    cluster.start_scheduler(port)
    cluster.add("ada")
    wait_until(lambda: answering(resources, "ada"), 60)
    assert resources.submit(reserved, gpu_memory_mb=100).result(timeout=30) == ("ada", 100)
    assert client.run_on_scheduler(lambda dask_scheduler: sorted(
        name for name in (*dask_scheduler.plugins, *dask_scheduler.worker_plugins) if name.startswith("cjm"))) \
        == ["cjm-resources-cluster", "cjm-resources-rehoming"]
    assert lost.status == "cancelled"
    wait_until(lambda: resources.check_hosts() and not resources._sent.by_host())


def test_a_client_that_is_closed(shared):
    cluster, _, _ = shared
    with Client(scheduler_file=str(cluster.file), set_as_default=False) as client:
        resources = ClusterResources(client, timeout=TIMEOUT)
    with within_limit(): assert "the client is closed" in resources.check_gpu_availability().message
    with within_limit(), pytest.raises(ResourceUnavailable, match="the client is closed; make a new Client"):
        resources.submit(reserved, gpu_memory_mb=100)
    resources.close()
    with pytest.raises(ValueError, match="client is closed"): ClusterResources(client)


def test_a_client_that_is_asynchronous(shared):
    import asyncio
    cluster, _, _ = shared

    async def make():
        async with Client(scheduler_file=str(cluster.file), asynchronous=True, set_as_default=False) as client:
            with pytest.raises(TypeError, match="client is asynchronous"): ClusterResources(client)
    asyncio.run(make())


def tls(folder) -> tuple[tuple[str, ...], Security | None]:
    "What dask's commands and its client need for TLS; nothing where there is no openssl"
    if not (openssl := shutil.which("openssl")): return (), None
    key, cert = str(folder/"key.pem"), str(folder/"cert.pem")
    subprocess.run([openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert,
                    "-days", "2", "-subj", "/CN=localhost"], check=True, capture_output=True, timeout=60)
    return (("--tls-ca-file", cert, "--tls-cert", cert, "--tls-key", key, "--protocol", "tls"),
            Security(tls_ca_file=cert, tls_client_cert=cert, tls_client_key=key, require_encryption=True))


def test_equal_names_and_equal_gpus_in_a_cluster_with_tls(tmp_path):
    "Two machines with one name are two hosts; two containers with one GPU share its memory"
    with contextlib.ExitStack() as stack:
        options, security = tls(tmp_path)
        cluster = Cluster(tmp_path, stack, options)
        for boot in ("first", "second"): cluster.add("gpu", folder=f"of-{boot}", SIM_BOOT=boot, SIM_MACHINE=boot)
        for box in ("box-1", "box-2"): cluster.add(box, SIM_MACHINE="machine")
        client = stack.enter_context(Client(scheduler_file=str(cluster.file), security=security))
        client.wait_for_workers(4, timeout=90)
        assert client.scheduler.address.startswith("tls://" if security else "tcp://")
        resources = ClusterResources(client, timeout=10)
        wait_until(lambda: all(a.sample for a in resources.check_hosts()), 30)
        names = [a.host for a in resources.check_hosts()]
        assert len(names) == 4 and [n.rpartition("-")[0] for n in names] == ["box", "box", "gpu", "gpu"]
        conflict = resources.check_gpu_availability()
        assert [d.device.id for d in conflict.devices] == ["box-1:0", *(f"{name}:0" for name in names[2:])]
        assert any("GPU 0 is also box-2:0: one GPU" in note for note in conflict.notes), conflict.notes
        future = resources.submit(use, 60, gpu_memory_mb=20_000, workers="box-2")
        wait_until(lambda: resources.check_gpu_availability().devices[0].promises, 30)
        assert [d.promised() for d in resources.check_gpu_availability().devices] == [20_000*2**20, 0, 0]
        host = resources.submit(reserved, gpu_memory_mb=10_000).result(timeout=30)[0]
        assert host == "gpu"       # the pool of the boxes has no room
        future.cancel()
        for process in (p for each in cluster.hosts.values() for p in each): process.kill()   # it is asleep


def test_an_adaptive_cluster_starts_from_nothing(tmp_path, monkeypatch):
    (tmp_path/"sim_host.py").write_text(SIM_HOST)
    (tmp_path/"gpus").mkdir(mode=0o700)
    tmp_path.chmod(0o700)
    env = dict(CJM_RESOURCES_DIR=str(tmp_path), CJM_RESOURCES_HOST="ada", SIM_GPUS="1",
               PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    for name, value in env.items(): monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(tmp_path))
    with LocalCluster(n_workers=0, threads_per_worker=2, processes=True, dashboard_address=None,
                      preload=["sim_host"]) as cluster, Client(cluster) as client:
        cluster.adapt(minimum=0, maximum=1, interval="100ms", wait_count=100)
        resources = ClusterResources(client, timeout=10)
        assert "the cluster has no workers" in resources.check_gpu_availability().message
        assert resources.submit(reserved, gpu_memory_mb=1_000).result(timeout=60) == ("ada", 1_000)
        assert [d.device.id for d in resources.check_gpu_availability().devices] == ["ada:0"]


def test_workers_that_share_a_process(tmp_path, monkeypatch):
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    monkeypatch.setenv("CJM_RESOURCES_HOST", "ada")
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster, \
            Client(cluster) as client:
        resources = ClusterResources(client, timeout=10)
        assert [w.pid for w in resources.take_sample().workers] == [os.getpid()]
        cluster.scale(1)
        wait_until(lambda: len(resources.check_hosts()[0].workers) == 1, 30)
        assert [w.pid for w in resources.take_sample().workers] == [os.getpid()]


def noted(seconds: float) -> tuple[int, float, float]:
    "The reservation of a task, and when it ran"
    began = time.monotonic()
    time.sleep(seconds)
    return current_reservation().id, began, time.monotonic()


def raises(): raise RuntimeError(current_reservation().id, time.monotonic())


def leaves_memory_behind():
    import sim_host
    held = sim_host.driver.allocate(1_000, current_reservation().index)
    held.__enter__()
    sim_host.left = held      # until the worker ends
    return current_reservation().id


@pytest.fixture
def one_worker(tmp_path):
    "A host with one GPU and a worker with one thread, and the manager of another app there"
    with contextlib.ExitStack() as stack:
        cluster = Cluster(tmp_path, stack)
        cluster.add("ada", threads=1)
        client = stack.enter_context(Client(scheduler_file=str(cluster.file), set_as_default=False))
        client.wait_for_workers(1, timeout=90)
        yield cluster, client, stack.enter_context(ClusterResources(client, timeout=10))


OTHER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import sim_host
from cjm_fasthtml_resources.core.manager import ResourceManager
manager = ResourceManager(app="other")
print("ready", flush=True)
input()
with manager.reserve(20_000, timeout=30) as held:
    print(time.monotonic(), flush=True)
    time.sleep(0.5)
    print(time.monotonic(), flush=True)
"""


@contextlib.contextmanager
def other_app(cluster: Cluster) -> Iterator[Callable[[], tuple[float, float]]]:
    "Another app on the host; a call has it ask for memory, and returns when it had that"
    env = {**os.environ, "CJM_RESOURCES_DIR": str(cluster.folder/"ada"), "CJM_RESOURCES_HOST": "ada", "SIM_GPUS": "1"}
    with subprocess.Popen([sys.executable, "-c", OTHER, str(cluster.folder)], env=env, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == "ready\n"

            def ask() -> tuple[float, float]:
                begins, ends = map(float, process.communicate("\n", timeout=60)[0].split())
                return begins, ends
            yield ask
        finally: process.kill()


def promised(resources: ClusterResources) -> int:
    return sum(d.promised() for d in resources.check_gpu_availability().devices)


def test_tasks_that_follow_one_another_share_a_reservation(one_worker):
    _, client, resources = one_worker
    runs = client.gather([resources.submit(noted, 0.001, gpu_memory_mb=20_000) for _ in range(100)])
    assert at_once([(began, end) for _, began, end in runs]) == 1
    assert len({id for id, _, _ in runs}) < 20, "each has asked by itself"
    wait_until(lambda: not promised(resources), 5)      # nothing is kept for a task that does not come
    ids = client.gather([resources.submit(lambda n: current_reservation().id, n, gpu_memory_mb=10_000 + n%2)
                         for n in range(10)])
    assert len(set(ids)) > 1, "another need is another reservation"


def test_tasks_begin_in_the_order_in_which_they_were_submitted(one_worker):
    _, client, resources = one_worker
    runs = client.gather([resources.submit(noted, 0.001, gpu_memory_mb=20_000) for _ in range(60)])
    began = [began for _, began, _ in runs]
    assert began == sorted(began)


def test_another_app_gets_its_turn_while_tasks_follow_one_another(one_worker):
    cluster, client, resources = one_worker
    with other_app(cluster) as ask:
        futures = [resources.submit(noted, 0.02, gpu_memory_mb=20_000) for _ in range(60)]
        wait_until(lambda: futures[10].status == "finished", 30)
        begins, ends = ask()
    runs = [(began, end) for _, began, end in client.gather(futures)]
    before, after = [r for r in runs if r[1] <= begins], [r for r in runs if r[0] >= ends]
    assert before and after and len(before) + len(after) == len(runs), "a task ran beside the other app"
    assert len(after) > 20, "it had to wait for nearly all tasks"
    wait_until(lambda: not promised(resources), 5)


def test_what_a_task_leaves_behind_is_not_promised_to_the_next(one_worker):
    _, client, resources = one_worker
    first, *others = client.gather([resources.submit(leaves_memory_behind, gpu_memory_mb=10_000),
                                    *(resources.submit(noted, 0.001, gpu_memory_mb=10_000) for _ in range(20))])
    assert first not in {id for id, _, _ in others}
    assert len({id for id, _, _ in others}) < 20
    wait_until(lambda: not promised(resources), 5)


def test_a_task_that_raises_hands_nothing_on(one_worker):
    _, client, resources = one_worker
    futures = [resources.submit(raises if n%2 else noted, *([] if n%2 else [0.001]), gpu_memory_mb=20_000)
               for n in range(40)]
    failed = [future.exception(timeout=60).args for future in futures[1::2]]
    runs = client.gather(futures[::2])
    assert len({id for id, _ in failed}) == 20
    assert not [run for run in runs for id, at in failed if run[0] == id and run[1] > at]
    wait_until(lambda: not promised(resources), 5)


def test_a_worker_that_is_killed_while_tasks_follow_one_another(one_worker):
    cluster, client, resources = one_worker
    with other_app(cluster) as ask:
        futures = [resources.submit(noted, 0.02, gpu_memory_mb=20_000) for _ in range(100)]
        wait_until(lambda: futures[10].status == "finished", 30)
        cluster.hosts["ada"][0].kill()
        ask()
    cluster.add("ada", threads=1)
    assert len(client.gather(futures)) == 100
    wait_until(lambda: not promised(resources), 10)
