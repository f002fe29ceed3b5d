"`cjm-resources --watch` on real terminals: each size, the keys, the signals, and how the terminal is left"
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

PROGRAM = str(Path(sys.executable).with_name("cjm-resources"))
SHARED = ("--simulate", "shared", "--watch", "--interval", "0.2")
CLOCK = re.compile(r"\d\d:\d\d:\d\d$")
COLOUR = rb"\x1b\[[0-9;]+m"
# a cleared window; a line, cleared before and ended by a reset
DRAWN = re.compile(rb"\x1b\[2J|\x1b\[(\d+);1H\x1b\[K((?:[^\x1b]|" + COLOUR + rb")*)\x1b\[m")


class Terminal:
    "A terminal with the command on it, as the leader of its session; `screen` is what a person sees"
    def __init__(self, *args: str, columns: int = 80, lines: int = 24, stdin: int | None = None, **env: str) -> None:
        settings = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        settings |= {"TERM": "xterm-256color", **env}
        self.written, self.drawn = b"", 0
        self.fd, self.theirs = pty.openpty()
        self.resize(columns, lines)
        self.modes = termios.tcgetattr(self.theirs)
        self.process = subprocess.Popen(
            [PROGRAM, *args], stdin=self.theirs if stdin is None else stdin, stdout=self.theirs, stderr=self.theirs,
            env=settings, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(1, termios.TIOCSCTTY, 0))

    def resize(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        self.screen, self.cleared = [""]*lines, False
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self, seconds: float) -> None:
        "Take what is written within so many seconds"
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and select.select([self.fd], [], [], left)[0]:
            try: data = os.read(self.fd, 65_536)
            except OSError: return
            self.written += data
            self.draw()

    def draw(self) -> None:
        "Put what was written onto the screen; a line that was written in part is whole after another read"
        for found in DRAWN.finditer(self.written, self.drawn):
            self.drawn, number = found.end(), int(found[1] or 0)
            if not number: self.screen, self.cleared = [""]*self.lines, True
            elif number <= self.lines: self.screen[number - 1] = re.sub(COLOUR, b"", found[2]).decode(errors="replace")

    def until(self, *texts: str, seconds: float = 40) -> str:
        "Wait until all of these are on the screen, drawn for its size, and return it"
        end = time.monotonic() + seconds
        while not self.cleared or not all(text in self.text for text in texts):
            assert time.monotonic() < end and self.process.poll() is None, (texts, self.text, self.written[-300:])
            self.read(0.1)
        self.read(0.1)   # the rest of that drawing
        return self.text

    @property
    def text(self) -> str: return "\n".join(self.screen)

    def type(self, keys: bytes) -> None: os.write(self.fd, keys)

    def end(self, keys: bytes = b"", number: int | None = None) -> int:
        "End it, and return its exit code"
        if keys: self.type(keys)
        if number is not None: self.process.send_signal(number)
        end = time.monotonic() + 15
        while self.process.poll() is None and time.monotonic() < end: self.read(0.1)
        self.read(0.1)
        return self.process.wait(5)

    def __enter__(self) -> "Terminal": return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError): os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for fd in (self.fd, self.theirs): os.close(fd)

    def left_as_found(self) -> bool:
        "Whether the modes are what they were, and the screen, the cursor and the wrapping are back"
        same = termios.tcgetattr(self.theirs) == self.modes
        return same and all(back in self.written for back in (b"\x1b[?1049l", b"\x1b[?25h", b"\x1b[?7h"))


@pytest.mark.parametrize("columns, lines", [(60, 12), (80, 24), (100, 30), (120, 40)])
@pytest.mark.parametrize("preset, verdict", [
    ("shared", "No GPU is available"), ("eight-h100", "A new job would share a GPU with this app"),
    ("container", "No GPU is available")])
def test_the_answer_and_the_last_line_are_there_in_any_window(preset, verdict, columns, lines):
    with Terminal("--simulate", preset, "--watch", columns=columns, lines=lines) as terminal:
        terminal.until("q quit", "RAM is available", verdict)
        assert CLOCK.search(terminal.screen[0]) and terminal.screen[0].startswith("SIMULATED")
        assert terminal.screen[-1].startswith("q quit") and "GPU 0" in terminal.text
        assert max(map(len, terminal.screen)) <= columns
        terminal.resize(62, 12)   # made smaller
        terminal.until("q quit", verdict)
        assert terminal.screen[-1].startswith("q quit") and max(map(len, terminal.screen)) <= 62
        assert terminal.end(b"q") == 0 and terminal.left_as_found()


def test_load_temperature_and_power_at_80_columns():
    with Terminal(*SHARED) as terminal: assert re.search(r"99 % \d+ °C \d+ W", terminal.until("q quit", "train.py"))


def test_the_load_of_a_process(tmp_path):
    bob = dict(pid=4_200_301, name="train.py", username="bob", age=90_000, command="train.py --config a/long/one.yaml")
    gpu = dict(processes=[dict(pid=bob["pid"], memory_mb=5000, load=63)])
    (tmp_path/"busy.json").write_text(json.dumps(dict(gpus=[gpu], machine=dict(processes=[bob]))))
    watching = ("--simulate", str(tmp_path/"busy.json"), "--watch", "--interval", "0.2")
    for columns, parts in ((80, ["age", "load"]), (60, ["user"])):
        with Terminal(*watching, columns=columns) as terminal:
            terminal.until("q quit", "train.py")
            head = next(line for line in terminal.screen if line.startswith("where"))
            assert head.split()[-len(parts):] == parts and ("63 %" in terminal.text) == ("load" in parts)


def test_keys_sort_fold_and_scroll():
    with Terminal("--simulate", "eight-h100", "--watch", "--interval", "0.3", lines=20) as terminal:
        terminal.until("s sort: memory")
        terminal.type(b"s")
        terminal.until("s sort: GPU")
        terminal.type(b"u")
        terminal.until("u processes", "on GPU")
        terminal.type(b"u")
        terminal.until("u users")
        terminal.type(b"\x1b[B\x1b[B")
        last = re.search(r" 3-(\d+) of", terminal.until(" 3-"))[1]
        assert not any(line.startswith("GPU 0") for line in terminal.screen)
        terminal.type(b"\x1b[6~")
        terminal.until(f" {int(last) + 1}-")   # a page further
        terminal.type(b"a")
        terminal.until("a processes")
        terminal.type(b"a")
        terminal.type(b"\x1b[H")
        terminal.until("more below")
        assert terminal.end(b"q") == 0


def test_q_gives_the_status_and_ctrl_c_ends_as_by_the_signal():
    with Terminal(*SHARED, "--exit-code") as terminal:
        terminal.until("q quit")
        assert terminal.end(b"q") == 11 and terminal.left_as_found()
    with Terminal(*SHARED, "--exit-code") as terminal:
        terminal.until("q quit")
        assert terminal.end(b"\x03") == -signal.SIGINT and terminal.left_as_found()
        assert b"Traceback" not in terminal.written and b"Aborted" not in terminal.written


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_a_signal_leaves_the_terminal_as_it_was(number):
    with Terminal(*SHARED) as terminal:
        terminal.until("q quit")
        assert terminal.end(number=number) == -number and terminal.left_as_found()


def test_suspended_and_resumed():
    with Terminal(*SHARED) as terminal:
        terminal.until("q quit")
        terminal.process.send_signal(signal.SIGTSTP)
        end = time.monotonic() + 10
        while not terminal.left_as_found() and time.monotonic() < end: terminal.read(0.1)
        stat = Path(f"/proc/{terminal.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        # the only process of an orphaned group is not stopped by it; it goes on at once
        if stat == "T": assert terminal.left_as_found()
        terminal.screen = [""]*terminal.lines
        terminal.process.send_signal(signal.SIGCONT)
        terminal.until("q quit", "RAM is available")
        assert terminal.end(b"q") == 0 and terminal.left_as_found()


def test_stopped_and_resumed_while_the_shell_has_changed_the_modes():
    with Terminal(*SHARED) as terminal:
        terminal.until("q quit")
        terminal.process.send_signal(signal.SIGSTOP)
        termios.tcsetattr(terminal.theirs, termios.TCSANOW, terminal.modes)
        terminal.screen = [""]*terminal.lines
        terminal.process.send_signal(signal.SIGCONT)
        terminal.until("q quit", "RAM is available")
        assert not termios.tcgetattr(terminal.theirs)[3] & termios.ICANON
        assert terminal.end(b"q") == 0 and terminal.left_as_found()


def test_an_error_leaves_the_terminal_as_it_was(tmp_path):
    (tmp_path/"sitecustomize.py").write_text(
        "import cjm_fasthtml_resources.ui.screen as screen\n"
        "real, count = screen.compose, [0]\n"
        "def compose(*args, **kw):\n"
        "    count[0] += 1\n"
        "    if count[0] > 3: raise ZeroDivisionError('drawn too often')\n"
        "    return real(*args, **kw)\n"
        "screen.compose = compose\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with Terminal(*SHARED, PYTHONPATH=path) as terminal:
        assert terminal.end() == 1 and terminal.left_as_found()
        assert b"drawn too often" in terminal.written


def test_a_driver_that_hangs_is_seen_and_holds_up_no_key(tmp_path):
    scenario = tmp_path/"slow.json"
    scenario.write_text('{"gpus": [{}], "faults": [{"call": "nvmlDeviceGetUtilizationRates", "delay": 4, "after": 2}]}')
    watch = ("--simulate", str(scenario), "--watch", "--interval", "0.2", "--driver-timeout", "30s")
    with Terminal(*watch) as terminal:
        terminal.until("q quit")
        terminal.until("OLD FIGURES: no new data for")
        began = time.monotonic()
        assert terminal.end(b"q") == 0 and time.monotonic() - began < 3


def test_without_a_keyboard_it_says_how_it_ends():
    with open(os.devnull) as nothing, Terminal(*SHARED, stdin=nothing.fileno()) as terminal:
        terminal.until("Ctrl-C ends")
        assert "q quit" not in terminal.text
        assert terminal.end(number=signal.SIGINT) == -signal.SIGINT and b"\x1b[?1049l" in terminal.written


def test_a_terminal_that_goes_away_ends_it():
    terminal = Terminal(*SHARED)
    terminal.until("q quit")
    os.close(terminal.theirs)
    os.close(terminal.fd)
    assert terminal.process.wait(15) == -signal.SIGHUP


def test_only_what_changed_is_drawn():
    with Terminal(*SHARED) as terminal:
        terminal.until("q quit", "RAM is available")
        before = len(terminal.written)
        terminal.read(1.0)
        assert len(terminal.written) - before < 1500 and terminal.written.count(b"\x1b[2J") == 1


def test_in_a_pipe_one_check_follows_the_other():
    with subprocess.Popen([PROGRAM, *SHARED], stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(60)]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT
    assert sum(line.startswith("SIMULATED") for line in lines) >= 2 and "\x1b" not in "".join(lines)
