"""What a look at a cluster costs, for 1 to 64 simulated hosts that are all processes of this machine. Called by benchmarks/run.py"""
import contextlib, pickle, statistics, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"tests"))
from hosts import Cluster

from distributed import Client

from cjm_fasthtml_resources.cluster import ClusterResources

HOSTS = (1, 4, 16, 64)
RESULTS = Path(__file__).with_name("cluster.md")
ABOUT = ("Hosts with two simulated GPUs each, every one a process of this machine, over loopback; medians of 20. The hosts share this machine's cores, "
         "so the time for many is mostly theirs; client and scheduler are what a real cluster would have in one place.")


def table() -> list[str]:
    "A row for each number of hosts"
    lines = ["| hosts | a check | CPU of the client | CPU of the scheduler | bytes of an answer |", "|---:|---:|---:|---:|---:|"]
    for count in HOSTS:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            cluster = Cluster(Path(folder), stack)
            for n in range(count): cluster.add(f"host-{n:02}", gpus=2, threads=1)
            with Client(scheduler_file=f"{folder}/scheduler.json") as client:
                client.wait_for_workers(count, timeout=300)
                with ClusterResources(client, timeout=60) as resources:
                    answers = resources.check_hosts()
                    assert len(answers) == count and all(a.sample for a in answers), answers
                    spent = [(time.process_time(), client.run_on_scheduler(time.process_time))]
                    walls = []
                    for _ in range(20):
                        began = time.perf_counter()
                        resources.check_hosts()
                        walls.append(time.perf_counter() - began)
                    spent.append((time.process_time(), client.run_on_scheduler(time.process_time)))
                    mine, scheduler = ((after - before)/20 for before, after in zip(*spent))
                    lines.append(f"| {count} | {statistics.median(walls)*1e3:.0f} ms | {mine*1e3:.1f} ms | {scheduler*1e3:.1f} ms | {len(pickle.dumps(answers[0]))} |")
    return lines


if __name__ == "__main__": print(*table(), "", ABOUT, sep="\n")
