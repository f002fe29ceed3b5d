"""The queues that queues.py compares: how each is started, asked, and killed

Each is installed from PyPI and called as its own help says. A memory need is passed on where it can be expressed.
"""
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PROGRAMS = Path(__file__).with_name("queue_programs.py")
LIBRARY = Path(__file__).with_name("queue_nvml.c")
POLL = "1"   # seconds, for those that look at the GPUs again and again; their own default is 5 and 10


@dataclass(frozen=True)
class Job:
    "A program that allocates so many MiB on each of its GPUs"
    name: str
    memory: int
    seconds: float
    gpus: int = 1

    @property
    def words(self) -> list[str]:
        return [sys.executable, str(PROGRAMS), "job", self.name, str(self.memory), str(self.seconds)]

    @property
    def line(self) -> str: return " ".join(self.words)


@dataclass(frozen=True)
class Place:
    "A folder that is a machine of its own: its GPUs, a home, and a `bin` with nvidia-smi"
    folder: Path
    env: dict[str, str]

    def start(self, *words: str, **more: Any) -> subprocess.Popen:
        "Start a program; what it prints is in `output`"
        with open(self.folder/"output", "ab") as out:
            return subprocess.Popen(words, **{"stdin": subprocess.DEVNULL, **more}, env=self.env, cwd=self.folder,
                                    stdout=out, stderr=out, start_new_session=True)

    def run(self, *words: str) -> None:
        "Run a program to its end"
        if code := self.start(*words).wait(60): raise RuntimeError(f"{words[0]} exits with {code}: {self.said()}")

    def wait_for(self, ready: Callable[[], bool], seconds: float = 20) -> None:
        until = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > until: raise RuntimeError(f"not ready after {seconds:g} s: {self.said()}")
            time.sleep(0.05)

    def said(self) -> str: return (self.folder/"output").read_text(errors="replace")[-2000:]


@dataclass(frozen=True)
class Queue:
    "A queue that runs: how to submit a job, and the process that keeps a job's place, by the job's PID"
    submit: Callable[[Job], Any]
    keeper: Callable[[int], int]


@dataclass(frozen=True)
class Peer:
    "A queue that is compared"
    name: str
    package: str                         # as PyPI has it
    needs: tuple[str, ...]               # commands
    opens: Callable[[Place, int], Any]   # a context manager: a machine, and the number of the terminal
    each_terminal: bool                  # whether each terminal has a queue of its own
    asked: str                           # what it can be asked for
    sees: str                            # how it knows which GPUs are free
    keeps: str                           # what has the queue
    gpus: int = 99                       # that one job can have

    def missing(self) -> list[str]:
        "The commands that it needs and that are not here"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return [name for name in self.needs if not shutil.which(name, path=path)]


def by_wrapper(place: Place, command: Callable[[Job], list[str]]) -> Queue:
    "A queue without a process of its own: each job is started by a command that waits"
    return Queue(lambda job: place.start(*command(job)), lambda pid: psutil.Process(pid).ppid())


@contextlib.contextmanager
def this(place: Place, terminal: int) -> Iterator[Queue]:
    def command(job: Job) -> list[str]:
        return [sys.executable, str(PROGRAMS), "cjm-resources", "run", "--gpu-memory", f"{job.memory}MiB",
                "--gpus", str(job.gpus), "--env-by-index", "--name", "job", "--", *job.words]
    yield by_wrapper(place, command)


@contextlib.contextmanager
def gpurun(place: Place, terminal: int) -> Iterator[Queue]:
    yield by_wrapper(place, lambda job: ["gpurun", "-g", str(job.gpus), *job.words])


@contextlib.contextmanager
def gpusched(place: Place, terminal: int) -> Iterator[Queue]:
    jobs = place.folder/f"jobs{terminal}.txt"
    jobs.touch()
    words = "gpusched", str(jobs), "--watch", "--poll", POLL, "--log-dir", str(place.folder/f"logs{terminal}")
    scheduler = place.start(*words)

    def submit(job: Job) -> None:
        with open(jobs, "a") as file: file.write(f"[vram={job.memory} gpus={job.gpus}] {job.line}\n")
    yield Queue(submit, lambda pid: scheduler.pid)


@contextlib.contextmanager
def simple(place: Place, terminal: int) -> Iterator[Queue]:
    gpus = ",".join(map(str, range(int(place.env["QUEUES_GPUS"]))))
    scheduler = place.start("simple_gpu_scheduler", "--gpus", gpus, stdin=subprocess.PIPE)
    lines = scheduler.stdin

    def submit(job: Job) -> None:
        lines.write(f"{job.line}\n".encode())
        lines.flush()
    yield Queue(submit, lambda pid: scheduler.pid)
    with contextlib.suppress(BrokenPipeError): lines.close()


@contextlib.contextmanager
def gq(place: Place, terminal: int) -> Iterator[Queue]:
    daemon = place.start(sys.executable, str(PROGRAMS), "gq-daemon")
    place.wait_for((place.folder/".local/run/gq/gq.sock").exists)
    yield Queue(lambda job: place.run("gq", "-g", str(job.gpus), *job.words), lambda pid: daemon.pid)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def gflow(place: Place, terminal: int) -> Iterator[Queue]:
    library = place.folder/"lib"
    library.mkdir()
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library/"libnvidia-ml.so.1", LIBRARY], check=True)
    place.env.update(LD_LIBRARY_PATH=str(library), TMUX_TMPDIR=str(library))
    # a login shell in tmux must find gcancel, by which a job tells its end
    (place.folder/".bash_profile").write_text(f'export PATH={place.env["PATH"]}\n')
    place.run("gflowd", "init", "--yes", "--port", str(free_port()), "--gpu-poll-interval-secs", POLL)
    daemon = place.start("gflowd")
    def is_up() -> bool: return not place.start("ginfo").wait(10)
    place.wait_for(is_up)

    def submit(job: Job) -> None:
        memory = ["--shared", "--gpu-memory", f"{job.memory}M"]
        place.run("gbatch", "--gpus", str(job.gpus), *memory, "--name", job.name, *job.words)
    yield Queue(submit, lambda pid: daemon.pid)


PEERS = (
    Peer("this", "cjm-fasthtml-resources", (), this, False, "memory, on one or more GPUs",
         "NVML, and the reservations of all programs", "no process: each `cjm-resources run` waits by itself"),
    Peer("gpusched", "gpusched", ("gpusched",), gpusched, True, "memory, on one or more GPUs",
         "`nvidia-smi`, and its own jobs", "a scheduler, which reads a file of lines"),
    Peer("gflow (runqd)", "runqd", ("gflowd", "tmux", "cc"), gflow, False,
         "memory, on one or more GPUs (`--shared --gpu-memory`)", "NVML's processes, and its own jobs",
         "a daemon, and tmux"),
    Peer("gq-local", "gq-local", ("gq",), gq, False, "whole GPUs", "NVML's processes, and its own jobs", "a daemon"),
    Peer("gpurun", "gpurun", ("gpurun",), gpurun, False, "whole GPUs",
         "a locked file for each; `nvidia-smi` only tells how many there are",
         "no process: each `gpurun` waits by itself"),
    Peer("simple-gpu-scheduler", "simple-gpu-scheduler", ("simple_gpu_scheduler",), simple, True, "one whole GPU",
         "its own jobs, on the GPUs that it is given", "a scheduler, which reads lines from its input", gpus=1))
