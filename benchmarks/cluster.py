"Measure a check of a cluster of 1 to 64 simulated hosts, all processes of this machine. Called by benchmarks/run.py"
import contextlib
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"tests"))
from distributed import Client, Future
from hosts import Cluster

from cjm_fasthtml_resources.cluster import ClusterResources
from cjm_fasthtml_resources.core.ram import NAMED
from cjm_fasthtml_resources.hosts.asking import HostAsker
from cjm_fasthtml_resources.hosts.scheduler import Question, Round, ask_round
from cjm_fasthtml_resources.hosts.worker import HostPlugin

HOSTS = (1, 4, 16, 64)
ANSWERS = 1280   # in each measurement, so that the garbage collector runs as often for few hosts as for many
TIMES = 3        # that each is measured; the least counts
COLD = 100       # checks at most with empty caches, because the copying takes time
OTHERS = b"\0"*2**26   # bytes that fill the CPU's caches
RESULTS = Path(__file__).with_name("cluster.md")
TASKS = 500
ABOUT = ("Hosts with two simulated GPUs each, every one a process of this machine, over loopback; medians, the best of "
         f"{TIMES} runs with {ANSWERS} answers each. Further processes sleep here, so each host names {NAMED} of other "
         "programs, as a real one does. The hosts share this machine's cores, so the time for many is mostly theirs; "
         "client and scheduler are what a real cluster would have in one place.")
WORK = ("The CPU of the client, taken apart: the same answers were kept, and read again when the hosts had ended. "
        "The first two columns are without Python's garbage collector. It looks through all of the client's objects, "
        "most of them dask's, which `gc.freeze()` after the imports spares it; answers of few hosts are gone before it "
        "has to. Other processes empty the CPU's caches, as 64 MiB do here that are copied before each check. The rest "
        "is dask's connection, and the hosts' processes on the same cores.")


def cpu_times(client: Client) -> tuple[float, float, float]:
    "Seconds of CPU that this process, the scheduler and all hosts have used"
    return (time.process_time(), client.run_on_scheduler(time.process_time),
            sum(client.run(time.process_time).values()))


def measure(client: Client, resources: ClusterResources, rounds: int) -> list[float]:
    "Milliseconds of a check (median), and of CPU in the client, in the scheduler and on all hosts for each"
    before, walls = cpu_times(client), []
    for _ in range(rounds):
        began = time.perf_counter()
        resources.check_hosts()
        walls.append(time.perf_counter() - began)
    cpu = [(now - was)/rounds*1e3 for was, now in zip(before, cpu_times(client), strict=True)]
    return [statistics.median(walls)*1e3, *cpu]


def keep_answers(client: Client, resources: ClusterResources) -> Round:
    "What the scheduler passes on in one round"
    return client.run_on_scheduler(ask_round, Question(HostPlugin("cluster", {}), resources.timeout))


def work_on(found: Round, collector: str = "on", is_cold: bool = False) -> float:
    "Milliseconds of CPU that the kept answers take the client"
    asker, spent = HostAsker(SimpleNamespace(id="client"), HostPlugin("cluster", {})), 0.0
    rounds = min(4*ANSWERS//len(found.told), COLD if is_cold else ANSWERS)
    asker.take(found)   # from now on it knows the hosts
    gc.collect()        # each measurement begins alike
    if collector == "off": gc.disable()
    if collector == "frozen": gc.freeze()
    try:
        for _ in range(rounds):
            if is_cold: bytearray(OTHERS)
            began = time.thread_time()
            answers = asker.take(found).answers   # kept until the next ones are there, as `ClusterResources` keeps them
            spent += time.thread_time() - began
    finally:
        gc.enable()
        gc.unfreeze()
    assert all(a.sample for a in answers), answers
    return spent/rounds*1e3


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


def sleepers(stack: contextlib.ExitStack) -> None:
    "Start as many processes of other programs as a host names"
    for _ in range(NAMED):
        process = stack.enter_context(subprocess.Popen(["sleep", "1h"]))
        stack.callback(process.kill)


def rows(count: int) -> tuple[str, str]:
    "The rows of both tables for a number of hosts"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sleepers(stack)
        cluster = Cluster(Path(folder), stack)
        for n in range(count): cluster.add(f"host-{n:02}", gpus=2, threads=1)
        client = stack.enter_context(Client(scheduler_file=str(cluster.file)))
        client.wait_for_workers(count, timeout=300)
        resources = stack.enter_context(ClusterResources(client, timeout=60))
        answers, found = resources.check_hosts(), keep_answers(client, resources)
        assert len(answers) == count and all(a.sample for a in answers), answers
        runs = [measure(client, resources, ANSWERS//count) for _ in range(TIMES)]
        wall, mine, scheduler, hosts = map(min, zip(*runs, strict=True))
    size = len(found.told[answers[0].workers[0]])
    least, *work = (min(work_on(found, **how) for _ in range(TIMES))
                    for how in (dict(collector="off"), dict(collector="frozen"), dict(), dict(is_cold=True)))
    parts = " | ".join(f"{cpu:.2f} ms" for cpu in (least, least/count, *work, mine))
    return (f"| {count} | {wall:.0f} ms | {mine:.1f} ms | {scheduler:.1f} ms | {hosts:.0f} ms | {size} |",
            f"| {count} | {parts} |")


def table() -> list[str]:
    "Both tables, with a row for each number of hosts"
    heads = ("| hosts | a check | CPU of the client | CPU of the scheduler | CPU of all hosts | bytes of an answer |",
             "| hosts | CPU for the kept answers | for each host | with the collector, after `gc.freeze()` "
             "| with the collector | and with empty caches | beside the hosts' processes |")
    checks, work = ([head, f"|{'---:|'*head.count(' | ')}---:|", *found]
                    for head, found in zip(heads, zip(*map(rows, HOSTS), strict=True), strict=True))
    return [*checks, "", WORK, "", *work, "", tasks()]


if __name__ == "__main__": print(*table(), "", ABOUT, sep="\n")
