"Measure a check of a cluster of 1 to 64 simulated hosts, all processes of this machine. Called by benchmarks/run.py"
import contextlib
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"tests"))
from distributed import Client, Future
from hosts import Cluster

from cjm_fasthtml_resources.cluster import ClusterResources

HOSTS = (1, 4, 16, 64)
RESULTS = Path(__file__).with_name("cluster.md")
TASKS = 500
ABOUT = ("Hosts with two simulated GPUs each, every one a process of this machine, over loopback; medians of 20. "
         "The hosts share this machine's cores, so the time for many is mostly theirs; client and scheduler are "
         "what a real cluster would have in one place.")


def cpu_times(client: Client) -> tuple[float, float, float]:
    "Seconds of CPU that this process, the scheduler and all hosts have used"
    return (time.process_time(), client.run_on_scheduler(time.process_time),
            sum(client.run(time.process_time).values()))


def measure(client: Client, resources: ClusterResources, rounds: int = 20) -> list[float]:
    "Milliseconds of a check (median), and of CPU in the client, in the scheduler and on all hosts for each"
    before, walls = cpu_times(client), []
    for _ in range(rounds):
        began = time.perf_counter()
        resources.check_hosts()
        walls.append(time.perf_counter() - began)
    cpu = [(now - was)/rounds*1e3 for was, now in zip(before, cpu_times(client), strict=True)]
    return [statistics.median(walls)*1e3, *cpu]


def time_tasks(client: Client, submit: Callable[[int], Future]) -> tuple[float, float]:
    "Milliseconds until so many tasks are sent, and until all are done"
    began = time.perf_counter()
    futures = [submit(n) for n in range(TASKS)]
    sent = time.perf_counter()
    client.gather(futures)
    return (sent - began)*1e3, (time.perf_counter() - began)*1e3


def tasks() -> str:
    "How long tasks that do nothing take, beside dask's own submit"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        cluster = Cluster(Path(folder), stack)
        for host in ("ada", "bob"): cluster.add(host)
        client = stack.enter_context(Client(scheduler_file=str(cluster.file)))
        client.wait_for_workers(2, timeout=300)
        resources = stack.enter_context(ClusterResources(client, timeout=60))
        plain, own = list[tuple[float, float]](), list[tuple[float, float]]()
        for _ in range(5):   # in turn: other programs that use the machine slow both down
            plain.append(time_tasks(client, lambda n: client.submit(abs, n, pure=False)))
            own.append(time_tasks(client, lambda n: resources.submit(abs, n, gpu_memory_mb=10)))
        (sent, done), (own_sent, own_done) = ([min(column) for column in zip(*runs, strict=True)]
                                              for runs in (plain, own))
        return (f"{TASKS} tasks that do nothing are sent in {own_sent:.0f} ms and done after {own_done:.0f} ms, each "
                f"with its reservation; with dask's own `submit`, in {sent:.0f} ms and after {done:.0f} ms "
                f"({own_sent/sent:.1f} and {own_done/done:.1f} times). The best of five.")


def row(count: int) -> str:
    "The row for a number of hosts"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        cluster = Cluster(Path(folder), stack)
        for n in range(count): cluster.add(f"host-{n:02}", gpus=2, threads=1)
        client = stack.enter_context(Client(scheduler_file=str(cluster.file)))
        client.wait_for_workers(count, timeout=300)
        resources = stack.enter_context(ClusterResources(client, timeout=60))
        answers = resources.check_hosts()
        assert len(answers) == count and all(a.sample for a in answers), answers
        wall, mine, scheduler, hosts = measure(client, resources)
        return (f"| {count} | {wall:.0f} ms | {mine:.1f} ms | {scheduler:.1f} ms | {hosts:.0f} ms "
                f"| {len(pickle.dumps(answers[0]))} |")


def table() -> list[str]:
    "A row for each number of hosts"
    head = "| hosts | a check | CPU of the client | CPU of the scheduler | CPU of all hosts | bytes of an answer |"
    return [head, "|---:|---:|---:|---:|---:|---:|", *map(row, HOSTS), "", tasks()]


if __name__ == "__main__": print(*table(), "", ABOUT, sep="\n")
