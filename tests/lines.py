"""Do something at a line that the package runs, for tests that walk all of them

    points = lines_of(call)              every line that the call runs: where, and the how-manieth time
    with Lines(point, act): call()       the same once more, with `act()` just before that line
    with held_at(call, point) as held:   the same on a thread, which stays there as long as the block lasts

A point is told apart by who called the line: `settle` is another matter when a release called it than when a check did.
"""
import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import cjm_fasthtml_resources

PACKAGE = str(Path(cjm_fasthtml_resources.__file__).parent)
Point = tuple[tuple[str, int], ...]  # the functions of the package that run, the innermost first: file and line
Turn = tuple[Point, int]  # and the how-manieth time


def point_of(frame: FrameType | None, within: tuple[str, ...] = (PACKAGE,)) -> Point:
    "Where a frame is, with those in the package that called it"
    found = []
    while frame:
        if frame.f_code.co_filename.startswith(within): found.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def describe(point: Point) -> str:
    "A point in words: `store.py:12 < ledger.py:80`"
    return " < ".join(f"{Path(file).name}:{line}" for file, line in point)


class Lines:
    """In a `with` block, count how often the package runs each line on this thread, told apart by who called it; and
    call `act` just before one of them runs"""
    def __init__(
        self,
        at: Turn | None = None,                      # `None`: only count
        act: Callable[[], Any] = lambda: None,
        within: tuple[str, ...] = (PACKAGE,),        # whose lines: folders and files
        threads: bool = False,                       # also those of threads that are started in the block
    ) -> None:
        self.counts: Counter[Point] = Counter()
        self.at, self.act, self.within, self.threads, self.reached = at, act, within, threads, False

    def __enter__(self) -> "Lines":
        if self.threads: threading.settrace(self._call)
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(None)
        if self.threads: threading.settrace(None)  # type: ignore[arg-type]

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self.within) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and not self.reached:
            if self.at is None: self.counts[point_of(frame, self.within)] += 1
            elif self.at[0][:1] == ((frame.f_code.co_filename, frame.f_lineno),):
                self._count(point_of(frame, self.within), self.at)
        return self._line

    def _count(self, point: Point, at: Turn) -> None:
        if point != at[0]: return
        self.counts[point] += 1
        if self.counts[point] == at[1]:
            self.reached = True
            self.act()


def lines_of(call: Callable[[], Any], turns: int = 1, **options: Any) -> list[Turn]:
    "Every line that a call runs, for its first turns; `options` are those of `Lines`"
    with Lines(**options) as lines: call()
    return [(point, turn) for point, count in dict(lines.counts).items() for turn in range(1, min(count, turns) + 1)]


@contextlib.contextmanager
def held_at(call: Callable[[], Any], at: Turn, **options: Any) -> Iterator[bool]:
    "Call on a thread that is held at a line for the block; False if it does not come there. What it raises is raised"
    moved, go_on, errors = threading.Event(), threading.Event(), list[BaseException]()

    def hold() -> None:
        moved.set()
        assert go_on.wait(60)

    lines = Lines(at, hold, **options)

    def run() -> None:
        try:
            with lines: call()
        except BaseException as error: errors.append(error)
        finally: moved.set()

    thread = threading.Thread(target=run, name="held", daemon=True)
    thread.start()
    try:
        assert moved.wait(60), "the call neither ends nor comes to the line"
        yield lines.reached
    finally:
        go_on.set()
        thread.join(60)
    assert not thread.is_alive(), "the call does not end"
    if errors: raise errors[0]


def interrupted_at(number: int, files: tuple[str, ...], call: Callable[[], Any]) -> bool:
    "Call, with a KeyboardInterrupt just before this line of those that run in these files; False if it has fewer"
    left = number

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(files): return None
        if event == "line":
            left -= 1
            if left == -1: raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try: call()
    except KeyboardInterrupt: pass
    finally: sys.settrace(None)
    return left < 0
