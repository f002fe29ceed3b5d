"""What the command costs in a shell: one look beside `nvitop -1`, and a terminal that is kept up to date. Called by
benchmarks/run.py

The same driver is beneath both programs (stub.py), which costs next to nothing, and the same live processes.
"""
import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

STUB = Path(__file__).with_name("stub.py")
SIZES = {"one GPU with one process": (1, 1), "8 GPUs with 160 processes": (8, 160)}
LOOKS = {"look": ("cjm-resources",), "nvitop": ("nvitop", "-1"),
         "wait": ("cjm-resources", "wait", "--gpu-memory", "1GiB", "--", "true")}


@contextlib.contextmanager
def programs(gpus: int, count: int) -> Iterator[list[str]]:
    "The beginning of a command line of a program that sees so many GPUs and living processes"
    living = [subprocess.Popen(["sleep", "3600"]) for _ in range(count)]
    try: yield [sys.executable, str(STUB), str(gpus), ",".join(str(process.pid) for process in living)]
    finally:
        for process in living: process.kill()
        for process in living: process.wait()


def once(command: list[str], env: dict[str, str]) -> float:
    "Seconds of one run"
    began = time.perf_counter()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def least(gpus: int, count: int, rounds: int) -> dict[str, float]:
    "The least seconds of each program, in turns; noise only adds"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with programs(gpus, count) as begin:
        turns = [{name: once([*begin, *words], env) for name, words in LOOKS.items()} for _ in range(rounds + 1)][1:]
    return {name: min(turn[name] for turn in turns) for name in LOOKS}


def looks(rounds: int = 15) -> list[tuple[str, float, float, str]]:
    "What, its ratio, its bound and the measured times: one look, and `wait` with a command that ends at once"
    rows = []
    for size, (gpus, count) in SIZES.items():
        found = least(gpus, count, rounds)
        for name, what in (("look", "one look from the shell"), ("wait", "`wait -- true`")):
            detail = f"{found[name]*1e3:.0f} ms : {found['nvitop']*1e3:.0f} ms"
            rows.append((f"{what}, in looks of `nvitop -1`: {size}", found[name]/found["nvitop"], 1, detail))
    return rows


def live(gpus: int, count: int, seconds: float = 20) -> float:
    "The share of a core that a terminal of 120 × 40 takes at 1 Hz, in percent"
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    env["TERM"] = "xterm-256color"

    def drain():
        with contextlib.suppress(OSError):
            while os.read(ours, 65_536): pass

    with programs(gpus, count) as begin:
        watch = subprocess.Popen([*begin, "cjm-resources", "--watch", "--interval", "1"], env=env, stdin=theirs,
                                 stdout=theirs, stderr=theirs, start_new_session=True)
        threading.Thread(target=drain, daemon=True).start()
        try:
            time.sleep(4)   # its imports and the first looks are over
            process, began = psutil.Process(watch.pid), time.monotonic()
            before = sum(process.cpu_times()[:2])
            time.sleep(seconds)
            return 100*(sum(process.cpu_times()[:2]) - before)/(time.monotonic() - began)
        finally:
            watch.terminate()
            watch.wait()
            for fd in (theirs, ours): os.close(fd)
