"""Let spin look through the models of the promises and of the queue: a program of its own. It needs spin and a compiler

    check.py           every state of two processes on one device, a part of those of three on two, and every state of
                       three in the queue; half a minute
    check.py --long    every state of two on two, and as many of three on two as have room in 4 GiB; an hour

Each broken form of a model (its head names them) has to be found wrong, to show that spin can notice. Closes with
'N passed, N failed'.
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

MODEL, QUEUE = (Path(__file__).with_name(f"{name}.pml") for name in ("promises", "queue"))
BROKEN = ["UNKNOWN_ENDED", "DEGRADED_CONSUMED", "LOOK_FIRST", "NO_CHECK", "DROP_LATE"]
BROKEN_GROUPS = ["PART_OF_GROUP", "FIRST_OF_GROUP"]   # of two devices
BROKEN_QUEUE = ["NO_AGEING", "NO_BLOCKING", "PART_OF_BOTH"]
ALL = ["-DCOLLAPSE"]       # every state is kept
PART = ["-DBITSTATE"]      # a bit for each, so that some are taken for others and left out


class Verdict(NamedTuple):
    violated: str | None   # the assertion, `None` if all hold
    states: int
    complete: bool         # every state was looked at


def check(
    folder: Path, processes: int, devices: int, how: list[str], broken: str | None = None, *options: str,
    model: Path = MODEL,
) -> Verdict:
    "What spin finds; `options` are those of its verifier"
    flags = [f"-DPROCESSES={processes}", f"-DDEVICES={devices}", *([f"-D{broken}"] if broken else [])]
    call(folder, "spin", "-a", *flags, str(model))
    call(folder, os.environ.get("CC", "cc"), "-O2", "-w", "-DSAFETY", *how, "-DMEMLIM=8000", "-o", "pan", "pan.c")
    found = call(folder, "./pan", "-n", *options)
    if not (states := re.search(r"([\d.e+]+) states, stored", found)): raise RuntimeError(f"spin says\n{found}")
    violated = re.search(r"assertion violated +(.*) \(at depth", found)
    whole = how == ALL and "max search depth too small" not in found and not violated
    return Verdict(violated and violated[1], int(float(states[1])), whole)


def check_queue(folder: Path, processes: int, broken: str | None = None) -> Verdict:
    "What spin finds in the model of the queue: one GPU, and RAM"
    return check(folder, processes, 1, ALL, broken, "-m10000000", model=QUEUE)


def find_broken(folder: Path, broken: str) -> Verdict:
    "What spin finds in a form of the model in which something is wrong"
    if broken in BROKEN_QUEUE: return check_queue(folder, 3, broken)
    if broken in BROKEN_GROUPS: return check(folder, 2, 2, PART, broken, "-w23", "-m20000")
    return check(folder, 2, 1, ALL, broken, "-m1000000")


def call(folder: Path, *command: str) -> str:
    "What a program prints; RuntimeError if it fails"
    out = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if out.returncode: raise RuntimeError(f"{' '.join(command)} ended with {out.returncode}:\n{out.stdout}")
    return out.stdout


def main(is_long: bool) -> int:
    wholes = [(2, 1, ALL, "-m3000000"), *([(2, 2, ALL, "-m10000000")] if is_long else [])]
    runs = [*wholes, (3, 2, PART, *(("-w35", "-m100000") if is_long else ("-w23", "-m20000")))]
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        for processes, devices, how, *options in runs:
            found = check(Path(name), processes, devices, how, None, *options)
            bad = found.violated or how == ALL and not found.complete
            failed += bool(bad)
            part = "all of them" if found.complete else "a part of them"
            print(f"{processes} processes, {devices} devices: {found.states:,} states, {part}: "
                  f"{found.violated or 'what must hold, holds'}", flush=True)
        found = check_queue(Path(name), 3)
        failed += bool(found.violated or not found.complete)
        print(f"the queue: {found.states:,} states: {found.violated or 'what must hold, holds'}", flush=True)
        for broken in (*BROKEN, *BROKEN_GROUPS, *BROKEN_QUEUE):
            found = find_broken(Path(name), broken)
            failed += not found.violated
            print(f"{broken}: {f'found wrong, {found.violated}' if found.violated else 'NOT NOTICED'}", flush=True)
    print(f"{len(runs) + 1 + len(BROKEN) + len(BROKEN_GROUPS) + len(BROKEN_QUEUE) - failed} passed, {failed} failed")
    return int(bool(failed))


if __name__ == "__main__": sys.exit(main("--long" in sys.argv[1:]))
