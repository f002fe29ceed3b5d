"""Every system call on the state folder x what can happen to it: a program of its own, which needs Linux and strace

    walk_syscalls.py [--sample N] [--seed S] [--jobs N] [--fates F,F…] [--shared] [PROGRAM …]

A program opens the folder for the first time, reserves and releases, on one device or on several, waits until it is
granted, or registers a worker and changes it. strace shows which system calls it makes on the folder and the files in
it; then it runs once for each of them and each fate: killed at it (KILL), stopped at it (STOP), or the call fails
(ENOSPC, EMFILE, EIO, EACCES; with `+` from then on, as when the disk stays full). All the while a third process holds
a promise.

While it is stopped, look-ups do not wait for it. Where a call failed once, the program says so in words or does its
work all the same, and its second attempt succeeds. Afterwards a new program works at once; the third process has its
promise, and nobody else has any. With --shared, the folder is one that a group shares. With --sample, so many of all
of them. Prints what is wrong, and where; closes with
'N points, N wrong'.
"""
import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.store import StoreError
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

FATES = ["KILL", "STOP", "ENOSPC", "EMFILE", "EIO", "EACCES", "ENOSPC+", "EMFILE+", "EIO+"]
WRITES = ("openat", "mkdir", "write", "pwrite64", "ftruncate", "fallocate", "rename", "link", "linkat", "symlink")
READS = ("openat", "read", "pread64", "newfstatat", "statx", "fsync", "fdatasync", "unlink")
LASTING = {"ENOSPC+": WRITES, "EMFILE+": ("openat",), "EIO+": (*WRITES, *READS)}   # what can fail like this, by fate
TOTAL, KEPT = 24_000, 10_000   # MiB of the first device, and what the third process has of it
SMALL = 5_000                  # MiB, for which the others have room, too
GPUS = [TOTAL, 6_000, 6_000]
AT_ONCE = 2.0                  # seconds: what does not wait takes no longer, on a busy machine
STUCK_AFTER = 20.0
SILENT = "silent"
IN_WORDS = (StoreError, ResourceBusy, ResourceUnavailable)


class Point(NamedTuple):
    "A system call: the number of those with its name that a program made on the folder"
    program: str
    call: str
    number: int
    fate: str

    def __str__(self) -> str: return f"{self.program}, {self.fate} at {self.call} {self.number}"


# What children of this process do; it never uses the folder itself, so each of them is a new program

def manager() -> ResourceManager: return ResourceManager(app="walk")


def open_folder() -> None: manager().get_claims()


def reserve() -> None:
    mine = manager()
    with mine.reserve(4_000, timeout=0): mine.check_gpu_availability()


def wait() -> None:
    with manager().reserve(TOTAL - KEPT, timeout=10): pass


def reserve_two() -> None:
    with manager().reserve(SMALL, timeout=0, n=2): pass


def wait_for_three() -> None:
    with manager().reserve(SMALL, timeout=10, n=3): pass


def work() -> None:
    mine, me = manager(), os.getpid()
    mine.register_worker(me, "llm", "job", plugin_name="vllm")
    mine.update_worker_state(me, status="idle")
    mine.get_all_workers()
    mine.unregister_worker(me)


def job() -> None:
    "As a registered worker, so that it is shown with its job"
    mine, me = manager(), os.getpid()
    mine.register_worker(me, "llm", plugin_name="vllm")
    with mine.job("a job", 4_000, timeout=0): pass
    mine.unregister_worker(me)


PROGRAMS = dict(open=open_folder, reserve=reserve, wait=wait, work=work, job=job, reserve_two=reserve_two,
                wait_for_three=wait_for_three)
WAITING = ("wait", "wait_for_three")   # until another process releases what it has of the first device


def attempt(program: Callable[[], None]) -> str | None:
    "What it raises, or what Python prints since nobody could catch it"
    lost: list[str] = []
    sys.unraisablehook = lambda what: lost.append(f"{type(what.exc_value).__name__}: {what.exc_value}")
    try:
        program()
        if lost: return f"no words: in a finalizer, {lost[0]}"
    except Exception as error:
        if isinstance(error, IN_WORDS): return f"{type(error).__name__}: {error}"
        return "no words: " + "".join(traceback.format_exception_only(error)).strip()
    return None


class Child:
    "A process that begins when it is told, and says what it found"
    def __init__(self, folder: Path, act: Callable[["Child"], Any]) -> None:
        (self.told, self.tell), (self.found, self.say) = os.pipe(), os.pipe()
        if (pid := os.fork()) == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)   # PR_SET_PDEATHSIG: it ends with its parent
            try:
                os.environ["CJM_RESOURCES_DIR"] = str(folder)
                self.listen()
                with SimulatedDriver([SimulatedGpu(memory_total_mb=total) for total in GPUS]): self.answer(act(self))
            except BaseException: traceback.print_exc()
            finally: os._exit(0)
        self.pid, self.is_over = pid, False
        os.close(self.told)
        os.close(self.say)

    def listen(self) -> None:
        "In the child: wait until it is told"
        if not os.read(self.told, 1): os._exit(1)

    def answer(self, what: Any) -> None: os.write(self.say, json.dumps(what).encode() + b"\n")

    def go(self) -> None:
        with contextlib.suppress(BrokenPipeError): os.write(self.tell, b"x")

    def result(self, seconds: float = STUCK_AFTER) -> Any:
        "What it says; `None` if it ends before that, `SILENT` if it goes on without a word"
        if not select.select([self.found], [], [], seconds)[0]: return SILENT
        said = os.read(self.found, 10_000)
        return json.loads(said.splitlines()[0]) if said else None

    def result_or_stop(self) -> Any:
        "What it says, `SILENT` also when it is stopped; strace stops it for a moment at each system call"
        until, result, stops = time.monotonic() + STUCK_AFTER, SILENT, 0
        while result is SILENT and time.monotonic() < until and stops < 10:
            result, stops = self.result(0.01), stops + 1 if is_stopped(self) else 0
        return result

    def end(self) -> None:
        if self.is_over: return
        self.is_over = True
        with contextlib.suppress(ProcessLookupError): os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.tell)
        os.close(self.found)


def ask(folder: Path, act: Callable[[Child], Any], seconds: float = STUCK_AFTER) -> Any:
    "What a new program says"
    child = Child(folder, act)
    child.go()
    try: return child.result(seconds)
    finally: child.end()


def victim(program: str, lasting: bool) -> Callable[[Child], Any]:
    def act(child: Child) -> list[str | None]:
        first = attempt(PROGRAMS[program])
        return [first, None if first is None or lasting or program in WAITING else attempt(PROGRAMS[program])]
    return act


def keep(child: Child) -> Any:
    "Hold a promise until it is told otherwise"
    held = manager().reserve(KEPT, timeout=5)
    child.answer("held")
    child.listen()
    return held.release()


def block(child: Child) -> Any:
    "Hold the rest until somebody waits for it, or the victim has ended"
    mine = manager()
    held = mine.reserve(TOTAL - KEPT, timeout=5)
    child.answer("held")
    until = time.monotonic() + 10
    while not any(c.device is None for c in mine.get_claims()) and time.monotonic() < until:
        if select.select([child.told], [], [], 0.01)[0]: break
    held.release()
    return "released"


def use(kept: int) -> Callable[[Child], Any]:
    "A new program: everything works at once, and so much is kept"
    def act(child: Child) -> list[str]:
        wrong, mine, began = [], manager(), time.monotonic()
        if (found := [c.memory//2**20 for c in mine.get_claims()]) != [kept][:bool(kept)]:
            wrong.append(f"what is promised or waits is {found}")
        with mine.reserve(TOTAL - kept, timeout=0): pass
        if kept:
            try:
                mine.reserve(TOTAL - kept + 1, timeout=0)
                wrong.append("the promise of the living holder is given a second time")
            except ResourceBusy: pass
        if mine.get_all_workers(): wrong.append("a worker of a process that has ended stays")
        work()
        if (took := time.monotonic() - began) > AT_ONCE: wrong.append(f"it took {took:.1f} s")
        return wrong
    return lambda child: tried(lambda: act(child))


def timed(what: str, wrong: list[str], call: Callable[[], Any]) -> Any:
    began = time.monotonic()
    try: return call()
    finally:
        if (took := time.monotonic() - began) > AT_ONCE: wrong.append(f"it took {took:.1f} s {what}")


def look(child: Child) -> list[str]:
    "What a look-up says while another process is stopped"
    def act() -> list[str]:
        wrong: list[str] = []
        mine = timed("to open it", wrong, manager)
        claims = timed("for the claims", wrong, mine.get_claims)
        if KEPT not in [c.memory//2**20 for c in claims]: wrong.append("a look-up misses the promise")
        room = timed("to check", wrong, mine.check_gpu_availability).devices[0].room//2**20
        if room > TOTAL - KEPT: wrong.append(f"a check finds {room} MiB of room")
        timed("for the workers", wrong, mine.get_all_workers)
        return wrong
    return [f"while it is stopped: {what}" for what in tried(act)]


def tried(act: Callable[[], list[str]]) -> list[str]:
    try: return act()
    except Exception as error: return [f"a new program: {type(error).__name__}: {error}"]


# strace

def is_stopped(child: Child) -> bool:
    try: return Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError: return False


def attach(child: Child, log: Path, paths: list[Path], *options: str) -> subprocess.Popen:
    "strace on a child, from now on"
    names = [word for path in paths for word in ("-P", str(path))]
    command = ["strace", "-f", "-o", str(log), "-e", "trace=%file,%desc", *names, *options, "-p", str(child.pid)]
    tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = tracer.stderr.readline()
    while said and "attached" not in said: said = tracer.stderr.readline()
    if not said: raise RuntimeError("strace cannot attach to a child of this process; is ptrace allowed?")
    return tracer


def names_in(log: str, folder: Path) -> set[str]:
    "The files of the folder that a log names"
    return {name for name in re.findall(rf"[<\"]{re.escape(str(folder))}/([^\">/]+)", log)}


class Walk:
    "A folder with a third process that holds a promise"
    def __init__(self, top: Path) -> None:
        self.top, self.number, self.keeper, self.names = top, 0, None, set[str]()
        self.folder = top/"state-0"

    def start_anew(self, kept: bool) -> None:
        self.stop()
        self.number += 1
        self.folder = self.top/f"state-{self.number}"
        if os.environ.get("WALK_SHARED"):
            self.folder.mkdir()
            self.folder.chmod(0o2770)
        if not kept: return
        self.keeper = Child(self.folder, keep)
        self.keeper.go()
        if self.keeper.result() != "held": raise RuntimeError("the third process is promised nothing")

    def stop(self) -> list[str]:
        "End the third process; what it says of its release"
        keeper, self.keeper = self.keeper, None
        if keeper is None: return []
        keeper.go()
        released = keeper.result()
        keeper.end()
        return [] if released is True else [f"the release of the living holder is {released}"]

    def run(self, program: str, lasting: bool, *options: str) -> tuple[str, Any, list[str]]:
        "The log of one run, what the program says, and what is wrong meanwhile"
        log, wrong, blocker = self.top/"log", [], None
        if program in WAITING:
            blocker = Child(self.folder, block)
            blocker.go()
            if blocker.result() != "held": return "", None, ["what is free is not promised to another process"]
        child = Child(self.folder, victim(program, lasting))
        paths = [self.folder, *(self.folder/name for name in sorted(self.names))]
        tracer = attach(child, log, [] if "-y" in options else paths, *options)
        child.go()
        may_stop = "signal=STOP" in "".join(options)
        result, until = child.result_or_stop() if may_stop else child.result(), time.monotonic() + STUCK_AFTER
        while result is SILENT and may_stop and not is_stopped(child) and time.monotonic() < until:
            result = child.result_or_stop()   # it was stopped by a slow strace, and goes on
        if result is SILENT and may_stop and is_stopped(child):
            found = ask(self.folder, look, 100)
            wrong += found if isinstance(found, list) else ["a look-up waits for a process that is stopped"]
            until = time.monotonic() + STUCK_AFTER
            while result is SILENT and time.monotonic() < until:   # a slow strace can look like the stop before it
                os.kill(child.pid, signal.SIGCONT)
                result = child.result_or_stop()
        if result is SILENT: wrong.append(f"it says nothing for {STUCK_AFTER:g} s")
        child.end()
        tracer.wait()
        tracer.stderr.close()
        if blocker:
            blocker.go()
            if blocker.result() != "released": wrong.append("the process that it waited for could not release")
            blocker.end()
        return log.read_text(errors="replace"), result, wrong

    def find_points(self, program: str) -> list[Point]:
        "Each system call that a program makes on the folder, with each fate"
        self.start_anew(program != "open")
        log, _, _ = self.run(program, False, "-y")
        self.names |= names_in(log, self.folder)
        if program == "open": self.start_anew(False)
        log, result, wrong = self.run(program, False)
        if wrong or result != [None, None]: raise RuntimeError(f"{program} does not work: {result} {wrong}")
        counts = Counter(re.findall(r"^\d+ +(\w+)\(", log, re.M))
        return [Point(program, call, number, fate) for call, count in counts.items() for number in range(1, count + 1)
                for fate in FATES if call in LASTING.get(fate, call) and (program, fate) != ("open", "STOP")]

    def try_point(self, point: Point) -> tuple[bool, list[str]]:
        "Whether the system call was made, and what is wrong"
        lasting = point.fate.endswith("+")
        if point.program == "open": self.start_anew(False)
        elif self.keeper is None: self.start_anew(True)
        way = "signal" if point.fate in ("KILL", "STOP") else "error"
        inject = f"inject={point.call}:{way}={point.fate.rstrip('+')}:when={point.number}{'+' if lasting else ''}"
        log, result, wrong = self.run(point.program, lasting, "-e", inject)
        if isinstance(result, list):
            first, second = result
            if first and first.startswith("no words"): wrong.append(f"it raises {first}")
            if second: wrong.append(f"a second attempt: {second}")
        elif result is None and point.fate != "KILL": wrong.append("it ends without a word")
        found = ask(self.folder, use(KEPT if point.program != "open" else 0))
        wrong += found if isinstance(found, list) else [f"a new program says nothing for {STUCK_AFTER:g} s"]
        if wrong: wrong += self.stop()
        return "(INJECTED)" in log or "SIGKILL" in log or "SIGSTOP" in log, wrong


def walk(points: list[Point], names: set[str]) -> None:
    "Try points, one after the other; print what was found as JSON, a line for each"
    with tempfile.TemporaryDirectory(prefix="walk-") as top:
        mine = Walk(Path(top).resolve())
        mine.names = names
        for point in points:
            reached, wrong = mine.try_point(point)
            print(json.dumps([str(point), reached, wrong]), flush=True)
        if wrong := mine.stop(): print(json.dumps(["in the end", True, wrong]), flush=True)


def find_all(programs: list[str]) -> tuple[list[Point], set[str]]:
    with tempfile.TemporaryDirectory(prefix="walk-") as top:
        first = Walk(Path(top).resolve())
        points = [point for program in programs for point in first.find_points(program)]
        first.stop()
    return points, first.names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("programs", nargs="*", default=list(PROGRAMS))
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fates", default=",".join(FATES))
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--walk", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if asked.shared: os.environ["WALK_SHARED"] = "1"   # also for the processes that walk
    if not shutil.which("strace"): sys.exit("no strace: apt-get install strace (as root)")
    if asked.walk:
        points, names = json.loads(Path(asked.walk).read_text())
        walk([Point(*point) for point in points], set(names))
        return 0
    points, names = find_all(asked.programs)
    points = [point for point in points if point.fate in asked.fates.split(",")]
    if asked.sample is not None and asked.sample < len(points):
        points = random.Random(asked.seed).sample(points, asked.sample)
    return share_out(points, sorted(names), asked.jobs)


def collect(process: subprocess.Popen) -> tuple[int, int, int]:
    "Print what a walk finds wrong; how many points it tried, how many it reached, how many were wrong"
    tried = reached = failed = 0
    for line in process.stdout:
        point, was_reached, wrong = json.loads(line)
        tried, reached, failed = tried + 1, reached + was_reached, failed + len(wrong)
        for what in wrong: print(f"{point}: {what}", flush=True)
    if process.wait():
        failed += 1
        print(f"a walk ended with {process.returncode}", flush=True)
    return tried, reached, failed


def share_out(points: list[Point], names: list[str], jobs: int) -> int:
    "Walk in several processes, and print what they find"
    with tempfile.TemporaryDirectory(prefix="walk-") as top, ThreadPoolExecutor(jobs) as readers:
        running = []
        for job in range(jobs):
            (part := Path(top)/f"{job}.json").write_text(json.dumps([points[job::jobs], names]))
            command = [sys.executable, __file__, "--walk", part]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        # all pipes at once: a walk whose pipe is full would wait for the one before it
        tried, reached, failed = map(sum, zip(*readers.map(collect, running), strict=True))
    print(f"{tried} points, {reached} of them reached, {failed} wrong")
    return int(bool(failed) or not reached)


if __name__ == "__main__": sys.exit(main())
