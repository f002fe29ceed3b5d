#!/usr/bin/env python3
"""The crowd's races, of this library and of other queues for the GPUs of one machine, on the same simulated GPUs.

    python benchmarks/queues.py            make an environment with the others in .venvs/queues, and print the table
    python benchmarks/queues.py --save     and keep it in benchmarks/queues.md, which the comparison page shows
    python benchmarks/queues.py --only gq-local    this row alone, with what is installed here

Jobs are programs that use memory on GPUs of 24,000 MiB: one that wants more than there is fails, as with CUDA.
"""
import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import psutil
from queue_peers import PEERS, POLL, PROGRAMS, Job, Peer, Place, Queue

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("queues.md")
TOTAL_MB = 24_000
SIZES = (4_000, 8_000, 14_000, 20_000)*2   # MiB of the crowd's jobs
OTHER_MB = 16_000     # of a program on GPU 0 that has asked no queue
GAP = 0.2             # seconds from one submission to the next
SECONDS = 2           # that a job holds its memory
SMALL_MB, LARGE_MB = 9_000, 20_000
STREAM, EVERY, BEFORE = 16, 0.4, 4   # small jobs, seconds from one to the next, and how many are before the large one
PATIENCE = 40         # seconds for all of a crowd to end


def kill_all(folder: Path) -> None:
    "End each process that was started for this machine"
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("QUEUES_CARDS") == f"{folder}/cards": process.kill()


@contextlib.contextmanager
def machine(gpus: int) -> Iterator[Place]:
    "A machine of its own, with so many GPUs"
    with tempfile.TemporaryDirectory(prefix="queues", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder/"bin").mkdir()
        smi = folder/"bin"/"nvidia-smi"
        smi.write_text(f'#!/bin/sh\nexec {sys.executable} {PROGRAMS} nvidia-smi "$@"\n')
        smi.chmod(0o755)
        kept = {key: text for key, text in os.environ.items()
                if not key.startswith(("CUDA_", "XDG_", "CJM_", "GQ_", "TMUX"))}
        path = os.pathsep.join([str(smi.parent), str(Path(sys.executable).parent), kept["PATH"]])
        env = dict(kept, HOME=name, PATH=path, CJM_RESOURCES_DIR=f"{name}/shared", GQ_ALLOW_ROOT="1", SHELL="/bin/bash",
                   QUEUES_GPUS=str(gpus), QUEUES_MB=str(TOTAL_MB), QUEUES_CARDS=f"{name}/cards",
                   QUEUES_LOG=f"{name}/log")
        try: yield Place(folder, env)
        finally: kill_all(folder)


class Log:
    "What the jobs of a machine have told: when each started, had its memory, failed or ended"
    def __init__(self, place: Place) -> None: self.path = Path(place.env["QUEUES_LOG"])

    def read(self, what: str) -> dict[str, dict]:
        "The events of a kind, by the job's name"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {event["name"]: event for event in map(json.loads, lines) if event["what"] == what}

    def wait(self, name: str, *kinds: str, seconds: float = PATIENCE) -> dict | None:
        "The job's first event of these kinds; `None` if there is none within so many seconds"
        until = time.monotonic() + seconds
        while True:
            for kind in kinds:
                if event := self.read(kind).get(name): return event
            if time.monotonic() > until: return None
            time.sleep(0.02)


def crowd(peer: Peer, terminals: int = 1, other: bool = False) -> tuple[int, float | None]:
    "How many of the jobs failed, and the seconds until the last had ended; `None` if some have not"
    with machine(gpus=2) as place, contextlib.ExitStack() as opened:
        log = Log(place)
        if other:
            place.env["CUDA_VISIBLE_DEVICES"] = "0"
            place.start(*Job("other", OTHER_MB, 600).words)
            del place.env["CUDA_VISIBLE_DEVICES"]
            log.wait("other", "holds")
        count = terminals if peer.each_terminal else 1
        queues = [opened.enter_context(peer.opens(place, number)) for number in range(count)]
        began = time.monotonic()
        jobs = [Job(f"job-{number}", memory, SECONDS) for number, memory in enumerate(SIZES)]
        for number, job in enumerate(jobs):
            queues[number % count].submit(job)
            time.sleep(GAP)
        until = began + PATIENCE
        while time.monotonic() < until and len({**log.read("ends"), **log.read("fails")}) < len(jobs): time.sleep(0.05)
        done, failed = log.read("ends"), log.read("fails")
        last = max((event["at"] for event in [*done.values(), *failed.values()]), default=began)
        return len(failed), last - began if len(done) + len(failed) == len(jobs) else None


@contextlib.contextmanager
def held(peer: Peer) -> Iterator[tuple[Queue, Log, int]]:
    "A queue with a job that holds the one GPU and a job that waits for it; the log, and the PID of the first"
    with machine(gpus=1) as place, peer.opens(place, 0) as queue:
        log = Log(place)
        queue.submit(Job("holder", LARGE_MB, 600))
        found = log.wait("holder", "holds")
        if found is None: raise RuntimeError(f"{peer.name}: the first job did not start: {place.said()}")
        queue.submit(Job("next", LARGE_MB, 1))
        time.sleep(2)   # it is in the queue
        yield queue, log, found["pid"]


def seconds_since(began: float, event: dict) -> str:
    "The seconds from a moment until an event"
    seconds = event["at"] - began
    return f"{seconds:.1f} s" if seconds >= 0.1 else "< 0.1 s"


def after_the_job(peer: Peer) -> str:
    "When the next job starts after the one that holds the memory was killed"
    with held(peer) as (_, log, pid):
        began = time.monotonic()
        os.kill(pid, 9)
        found = log.wait("next", "starts", seconds=15)
        return seconds_since(began, found) if found else "not within 15 s"


def after_the_keeper(peer: Peer) -> str:
    "When the next job starts after the process was killed that keeps the place of the one that holds the memory"
    with held(peer) as (queue, log, pid):
        began = time.monotonic()
        os.kill(queue.keeper(pid), 9)
        if found := log.wait("next", "starts", seconds=3):
            failed = log.wait("next", "holds", "fails")["what"] == "fails"
            return seconds_since(began, found) + (", and fails" if failed else "")
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError): os.kill(pid, 9)   # its job still holds the memory
        found = log.wait("next", "starts", seconds=5)
        return f"{seconds_since(began, found)} after its job's end" if found else "not before it is started again"


def passed(log: Log) -> int:
    "How many of the stream's jobs that were submitted after the large one started before it"
    starts = log.read("starts")
    later = [starts.get(f"small-{number}") for number in range(BEFORE, STREAM)]
    return sum(one is not None and one["at"] < starts["large"]["at"] for one in later)


def large(peer: Peer) -> str:
    "When a request for both GPUs has its memory, in a stream of small ones, and how many later ones were before it"
    if peer.gpus < 2: return "not possible: one GPU a job"
    with machine(gpus=2) as place, peer.opens(place, 0) as queue:
        log, asked = Log(place), 0.0
        for number in range(STREAM):
            if number == BEFORE:
                asked = time.monotonic()
                queue.submit(Job("large", LARGE_MB, 1, gpus=2))
                time.sleep(EVERY)
            queue.submit(Job(f"small-{number}", SMALL_MB, 1))
            time.sleep(EVERY)
        found = log.wait("large", "holds", "fails")
        if found is None: return f"not within {PATIENCE} s after the stream"
        harm = f"; {len(log.read('fails'))} failed" if log.read("fails") else ""
        return f"{seconds_since(asked, found)}; {passed(log)} of {STREAM - BEFORE} later ones before it{harm}"


def lasted(seconds: float | None) -> str: return f"not within {PATIENCE} s" if seconds is None else f"{seconds:.1f} s"


def row(peer: Peer) -> str:
    "The row of a queue's figures"
    if missing := peer.missing(): return line(peer.name, f"not run: no {', '.join(missing)} here", *[""]*7)
    one, beside = crowd(peer), crowd(peer, other=True)
    two = crowd(peer, terminals=2) if peer.each_terminal else one   # else it is one queue for both
    failed = [f"{found[0]} of {len(SIZES)}" for found in (one, two, beside)]
    return line(peer.name, *failed, lasted(one[1]), lasted(beside[1]), after_the_job(peer), after_the_keeper(peer),
                large(peer))


def line(*cells: str) -> str: return f"| {' | '.join(cells)} |"


ABOUT_EACH = ["| queue | a job asks for | it looks at | what keeps the queue |", "|---|---|---|---|",
              *(line(peer.name, peer.asked, peer.sees, peer.keeps) for peer in PEERS)]
HEAD = [
    "| queue | jobs that failed | from two terminals | beside another program | all ended after "
    "| all ended, beside it | `kill -9` of a job: the next starts after | `kill -9` of what keeps its place "
    "| a large request in a stream of small ones |",
    "|---|---:|---:|---:|---:|---:|---|---|---|"]
NOTES = (
    "Two queues ran at a time, each on a machine of its own. Two terminals share one queue, but gpusched and "
    "simple-gpu-scheduler have one for each. What keeps a job's place is its wrapper, or the scheduler or daemon of "
    "all; by what they document, gq's daemon starts again with the next `gq` command, gflow's with `gflowd start` or "
    "by systemd, and both then know their jobs, as gpusched does by its journal. gpusched's documentation says that "
    "small jobs can starve a large one, which a person has to prevent; gflow's priorities and its reservations of "
    "GPUs for a time were not tried. gpurun's locks are for groups of one size: jobs with `-g 2` and with `-g 1` in "
    "one session can have the same GPU.")


def about() -> str:
    versions = ", ".join(f"{peer.package} {version(peer.package)}" for peer in PEERS if not peer.missing())
    return (
        f"{len(SIZES)} jobs of {min(SIZES):,} to {max(SIZES):,} MiB on two simulated GPUs of {TOTAL_MB:,} MiB, one "
        f"each {GAP:g} s; each holds its memory for {SECONDS:g} s and then ends, and fails at once if it is not there "
        f"when it allocates. The other program holds {OTHER_MB:,} MiB on GPU 0 and has asked no queue. The large "
        f"request is for {LARGE_MB:,} MiB on both GPUs, after {BEFORE} of {STREAM} small ones ({SMALL_MB:,} MiB, "
        f"one each {EVERY:g} s). A figure is one run's. {NOTES} gpusched and gflow look at the GPUs every {POLL} s "
        f"here (by default every 5 and 10 s). {datetime.date.today()}, {platform.machine()} with {os.cpu_count()} "
        f"cores, Python {platform.python_version()}, {versions}.")


def in_environment(arguments: list[str]) -> int:
    "The same in an environment of its own, which has the peers"
    path = ROOT/".venvs"/"queues"
    venv.EnvBuilder(with_pip=True, clear=True).create(path)
    python = path/"bin"/"python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"{ROOT}[queues]"], check=True)
    return subprocess.call([python, __file__, "--here", *arguments])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the table in benchmarks/queues.md")
    parser.add_argument("--here", action="store_true", help="with what is installed here, with the extra `queues`")
    parser.add_argument("--only", choices=[peer.name for peer in PEERS], help="only this row, with what is installed")
    args = parser.parse_args()
    if not args.here and not args.only: return in_environment(["--save"] if args.save else [])
    lines = [*ABOUT_EACH, "", *HEAD]
    print(*lines, sep="\n", flush=True)
    with ThreadPoolExecutor(2) as two_at_a_time:   # they sleep most of the time
        for found in two_at_a_time.map(row, [peer for peer in PEERS if args.only in (None, peer.name)]):
            lines.append(found)
            print(found, flush=True)
    lines += ["", about()]
    print(*lines[-2:], sep="\n")
    if args.save: RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__": sys.exit(main())
