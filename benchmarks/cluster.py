"Measure a check of a cluster of 1 to 64 simulated hosts, all processes of this machine. Called by benchmarks/run.py"
import contextlib
import pickle
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"tests"))
from distributed import Client
from hosts import Cluster

from cjm_fasthtml_resources.cluster import ClusterResources

HOSTS = (1, 4, 16, 64)
RESULTS = Path(__file__).with_name("cluster.md")
ABOUT = ("Hosts with two simulated GPUs each, every one a process of this machine, over loopback; medians of 20. "
         "The hosts share this machine's cores, so the time for many is mostly theirs; client and scheduler are "
         "what a real cluster would have in one place.")


def cpu_times(client: Client) -> tuple[float, float]:
    "Seconds of CPU that this process and the scheduler have used"
    return time.process_time(), client.run_on_scheduler(time.process_time)


def measure(client: Client, resources: ClusterResources, rounds: int = 20) -> tuple[float, float, float]:
    "Milliseconds of a check (median), and of CPU in the client and in the scheduler for each"
    before, walls = cpu_times(client), []
    for _ in range(rounds):
        began = time.perf_counter()
        resources.check_hosts()
        walls.append(time.perf_counter() - began)
    mine, scheduler = ((now - was)/rounds*1e3 for was, now in zip(before, cpu_times(client), strict=True))
    return statistics.median(walls)*1e3, mine, scheduler


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
        wall, mine, scheduler = measure(client, resources)
        return f"| {count} | {wall:.0f} ms | {mine:.1f} ms | {scheduler:.1f} ms | {len(pickle.dumps(answers[0]))} |"


def table() -> list[str]:
    "A row for each number of hosts"
    head = "| hosts | a check | CPU of the client | CPU of the scheduler | bytes of an answer |"
    return [head, "|---:|---:|---:|---:|---:|", *map(row, HOSTS)]


if __name__ == "__main__": print(*table(), "", ABOUT, sep="\n")
