"""Share the points of a walk out to several processes, for the walks that are programs of their own

    share_out(jobs)               start this program so many times more, each with its part; print what they find
    is_mine(point, part, parts)   whether a point is in the part of this process

Each of them finds all points itself and takes those whose checksum is its own: a point that is found by chance, as
when threads take turns, is in the part of one process all the same.
"""
import argparse
import json
import selectors
import subprocess
import sys
import zlib
from collections.abc import Iterator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=2, help="so many processes at once")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--parts", type=int, help=argparse.SUPPRESS)


def is_mine(point: object, part: int, parts: int) -> bool:
    "Whether a point is in this part"
    return zlib.crc32(repr(point).encode()) % parts == part


def report(unit: str, count: int, wrong: list[str], seconds: float) -> None:
    "Tell the process that shares out what was found in a unit of the walk"
    print(json.dumps([unit, count, wrong, round(seconds, 1)]), flush=True)


def share_out(jobs: int) -> int:
    "Print what all parts find, as they find it, and 'N points, N wrong'; the exit code"
    command = [sys.executable, *sys.argv, "--parts", str(jobs), "--part"]
    running = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(jobs)]
    points = failed = 0
    for line in read_lines(running):
        unit, count, wrong, seconds = json.loads(line)
        print(f"{unit}: {count} points in {seconds:g} s, {len(wrong)} wrong", flush=True)
        points, failed = points + count, failed + len(wrong)
        for what in wrong: print(f"{unit.split('/')[1]}: {what}", flush=True)
    for process in running:
        if process.wait():
            failed += 1
            print(f"a walk ended with {process.returncode}", flush=True)
    print(f"{points} points, {failed} wrong")
    return int(bool(failed))


def read_lines(running: list[subprocess.Popen]) -> Iterator[str]:
    "The lines that some programs print, as they come"
    with selectors.DefaultSelector() as ready:
        for process in running: ready.register(process.stdout, selectors.EVENT_READ)
        while ready.get_map():
            for key, _ in ready.select():
                if line := key.fileobj.readline(): yield line
                else: ready.unregister(key.fileobj)
