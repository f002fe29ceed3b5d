"""`cjm-resources run` with real commands, on a simulated GPU that all processes share: exit codes, signals, standard
error, learned needs, and a second try after memory ran out"""
import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import COMMAND, DRIVER, GIB

from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.core.learned import JobRun, need_key
from cjm_fasthtml_resources.running.words import command_settings
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

TRAIN = DRIVER + """
import sys, time
size, seconds = float(sys.argv[1]), float(sys.argv[2])
lack = f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {size/1024:.2f} GiB. GPU 0 has a total capacity"
try:
    with driver.allocate(size):
        print("began", time.monotonic(), flush=True)
        time.sleep(seconds)
        print("ended", time.monotonic(), flush=True)
except MemoryError: sys.exit(lack)
"""

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24.00 GiB."


class Rig:
    "The command with a simulated GPU, and a training script"
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gpus = folder/"gpus"
        self.env = {**os.environ, "GPUS": str(self.gpus), "PYTHONUNBUFFERED": "1"}
        for name, code in (("command.py", COMMAND), ("train.py", TRAIN)): (folder/name).write_text(code)
        self.train = (sys.executable, str(folder/"train.py"))
        self.manager = ResourceManager(app="cjm-resources", track_self=False)

    def words(self, *args: str) -> list[str]: return [sys.executable, str(self.folder/"command.py"), "run", *args]

    def start(self, *args: str, **settings) -> subprocess.Popen:
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=self.env)
        return subprocess.Popen(self.words(*args), **{**pipes, **settings})

    def run(self, *args: str, **settings) -> subprocess.CompletedProcess:
        process = self.start(*args, **settings)
        out, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(args, process.returncode, out, errors)

    @contextlib.contextmanager
    def driver(self):
        with SimulatedDriver([SimulatedGpu("NVIDIA L4")], shared=self.gpus) as driver: yield driver

    def reserved(self) -> float:
        "MiB that are reserved on the GPU"
        with self.driver(): return sum(c.memory for c in self.manager.get_claims() if c.device)/2**20

    def claims(self) -> list:
        with self.driver(): return self.manager.get_claims()


@pytest.fixture
def rig(folder, tmp_path):
    return Rig(tmp_path)


def wait_until(condition, seconds: float = 30):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.02)
    return found


def shell(text: str) -> tuple[str, ...]: return "--", "sh", "-c", text


SMALL = ("--gpu-memory", "1GiB")


@pytest.mark.parametrize(("script", "code"), [
    ("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("kill -INT $$", 130)])
def test_the_exit_code_is_the_commands(rig, script, code):
    assert rig.run(*SMALL, *shell(script)).returncode == code


@pytest.mark.parametrize(("args", "code", "said"), [
    (["--", "/no/such/program"], 127, "/no/such/program: No such file or directory"),
    (["--", "/etc"], 126, "/etc: Permission denied"),
    (["--gpu-memory", "400GiB", "true"], 2, "--gpu-memory: 400.0 GiB is more than the largest GPU has (24.0 GiB)"),
    (["--gpu-memory", "0", "true"], 2, "at least 1 MiB"),
    (["--ram", "900000GiB", "true"], 2, "--ram"),
    (["--app", "x y", "true"], 2, "Invalid app name"),
    (["--device", "7", "true"], 2, "device"),
    ([], 2, "Missing argument 'COMMAND...'"),
    (["--retrys", "1", "true"], 2, "No such option")])
def test_what_keeps_it_from_running(rig, args, code, said):
    found = rig.run(*args)
    assert (found.returncode, said in found.stderr.decode()) == (code, True), found.stderr
    assert rig.claims() == []


def test_no_room_is_75_and_no_file_is_74(rig):
    with rig.driver() as driver, driver.allocate(20_000):
        found = rig.run("--gpu-memory", "20GiB", "--timeout", "0", "true")
        unknown = rig.run("--timeout", "0", "true")
    assert found.returncode == 75 and b"The job needs 20.0 GiB" in found.stderr
    assert unknown.returncode == 75 and b"To ask for less, set --gpu-memory" in unknown.stderr
    assert b"gpu_memory_mb" not in unknown.stderr
    rig.env["CJM_RESOURCES_DIR"] = "/proc/nowhere"
    assert rig.run(*SMALL, "true").returncode == 74


def test_a_command_that_cannot_run_teaches_nothing(rig):
    rig.run(*SMALL, "--name", "train", "/no/such/program")
    found = subprocess.run([rig.words()[0], rig.words()[1], "needs", "--json"], env=rig.env, capture_output=True)
    assert json.loads(found.stdout)["needs"] == []


def test_input_output_and_environment_are_its_own(rig):
    script = "read line; echo $line $CUDA_VISIBLE_DEVICES $MINE"
    with rig.start(*SMALL, *shell(script), stdin=subprocess.PIPE, env={**rig.env, "MINE": "7"}) as process:
        out, _ = process.communicate(b"typed\n", timeout=60)
    assert out.startswith(b"typed GPU-") and out.endswith(b" 7\n")


def test_signals_that_python_ignores_end_a_command(rig):
    found = rig.run(*SMALL, *shell("grep SigIgn /proc/self/status; grep SigBlk /proc/self/status"))
    ignored, blocked = (int(line.split()[1], 16) for line in found.stdout.splitlines())
    assert not ignored >> (signal.SIGPIPE - 1) & 1 and blocked == 0


# standard error

def errors_of(rig, script: str, **settings) -> bytes: return rig.run(*SMALL, *shell(script), **settings).stderr


def test_standard_error_arrives_byte_by_byte(rig):
    assert errors_of(rig, r"printf '\377\000\033[1m50 %%\r100 %%' >&2") == b"\xff\x00\x1b[1m50 %\r100 %"
    everything = f"{sys.executable} -c 'import os; [os.write(2, bytes(range(256))*256) for _ in range(80)]'"
    assert errors_of(rig, everything) == bytes(range(256))*256*80


def test_each_piece_arrives_at_once(rig):
    with rig.start(*SMALL, *shell("printf a >&2; read x; printf b >&2"), stdin=subprocess.PIPE) as process:
        assert os.read(process.stderr.fileno(), 9) == b"a"
        assert process.communicate(b"\n", timeout=60)[1] == b"b"


def test_a_reader_that_goes_away_ends_what_writes(rig):
    "As without the command: `yes >&2 | head` ends"
    with rig.start(*SMALL, *shell("exec yes >&2")) as process:
        os.read(process.stderr.fileno(), 9)
        process.stderr.close()
        process.stderr = None
        assert process.wait(30) == 128 + signal.SIGPIPE


def test_standard_error_may_be_closed_or_full(rig):
    for place in ("2>&-", "2>/dev/full"):
        words = " ".join(rig.words(*SMALL, "--", "sh", "-c", "'echo lost >&2; echo out; exit 3'"))
        found = subprocess.run(f"{words} {place}", shell=True, env=rig.env, stdout=subprocess.PIPE, timeout=60)
        assert (found.returncode, found.stdout) == (3, b"out\n"), place


def test_a_process_that_goes_on_does_not_hold_it_up(rig):
    "A daemon that keeps standard error open can write there later, and nobody waits for it"
    began = time.monotonic()
    late = "(sleep 6; echo late >&2) & echo early >&2; exit 3"
    with rig.start(*SMALL, *shell(late), stdout=subprocess.DEVNULL) as process:
        assert process.wait(30) == 3 and time.monotonic() - began < 6
        assert rig.claims() == []
        assert process.stderr.read() == b"early\nlate\n"


def set_size(fd: int, lines: int, columns: int):
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


def on_terminal(words: list[str], env: dict[str, str], keys=()) -> tuple[int, bytes]:
    "Run on a terminal of 100 columns; type each of the keys once its text was written. Its status, and what it wrote"
    pid, fd = pty.fork()
    if pid == 0:
        set_size(0, 40, 100)   # here, so that no signal of this comes later
        os.execve(words[0], words, env)
    written, waiting = b"", list(keys)
    while True:
        try: written += os.read(fd, 65536)
        except OSError: break
        if waiting and waiting[0][0] in written:
            time.sleep(0.2)
            _, do = waiting.pop(0)
            do(fd) if callable(do) else os.write(fd, do)
    return os.waitpid(pid, 0)[1], written


def test_a_terminal_stays_one(rig):
    script = "test -t 2 && stty size <&2 >&2; printf '50 %%\\r100 %%\\n\\033[0m' >&2; exit 3"
    status, written = on_terminal(rig.words(*SMALL, *shell(f"sleep 0.5; {script}")), rig.env)
    assert os.waitstatus_to_exitcode(status) == 3
    assert written.endswith(b"40 100\r\n50 %\r100 %\r\n\x1b[0m")


def test_megabytes_on_a_terminal(rig):
    many = f"{sys.executable} -c 'import os; [os.write(2, b\"x\"*1024) for _ in range(4096)]'"
    status, written = on_terminal(rig.words(*SMALL, *shell(many)), rig.env)
    assert (status, written.count(b"x")) == (0, 2**22)


def test_a_new_size_reaches_the_command(rig):
    script = "trap 'stty size <&2 >&2; exit' WINCH; echo ready >&2; while :; do sleep 0.05; done"
    grow = (b"ready", lambda fd: set_size(fd, 50, 120))
    _, written = on_terminal(rig.words(*SMALL, *shell(script)), rig.env, [grow])
    assert b"50 120" in written


# signals

COUNTS = """
import signal, sys, time
seen = []
for name in sys.argv[1].split(): signal.signal(getattr(signal, name), lambda number, frame: seen.append(number))
print("ready", flush=True)
end = time.monotonic() + 30
while not seen and time.monotonic() < end: time.sleep(0.01)
time.sleep(0.8)
print(seen, flush=True)
"""


def counting(*names: str) -> tuple[str, ...]: return "--", sys.executable, "-c", COUNTS, " ".join(names)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"])
def test_a_signal_to_the_command_alone_is_passed_on_once(rig, name):
    number = getattr(signal, name)
    with rig.start(*SMALL, *counting(name)) as process:
        process.stdout.readline()
        process.send_signal(number)
        assert process.communicate(timeout=30)[0] == f"[{number:d}]\n".encode()
        assert process.returncode == 0


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_to_the_whole_group_arrives_once(rig, times):
    "As `timeout` sends it: to the one process and to its group"
    with rig.start(*SMALL, *counting("SIGTERM"), start_new_session=True) as process:
        process.stdout.readline()
        if times == 2: os.kill(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.communicate(timeout=30)[0] == b"[15]\n"


def test_two_different_signals_one_after_the_other(rig):
    with rig.start(*SMALL, *counting("SIGUSR1", "SIGTERM"), start_new_session=True) as process:
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGTERM)
        assert process.communicate(timeout=30)[0] == b"[10, 15]\n"


def test_ctrl_c_reaches_the_command_once(rig):
    status, written = on_terminal(rig.words(*SMALL, *counting("SIGINT")), rig.env, [(b"ready", b"\x03")])
    assert os.waitstatus_to_exitcode(status) == 0 and b"[2]" in written and b"Traceback" not in written


def test_ctrl_c_ends_a_shells_loop(rig):
    "A shell goes on with its script unless its program was ended by the signal"
    words = " ".join(rig.words(*SMALL, "--", "sh", "-c", "'echo ready; exec sleep 30'"))
    script = f"for i in 1 2 3; do {words}; done; echo not ended"
    status, written = on_terminal(["/bin/bash", "-c", script], rig.env, [(b"ready", b"\x03")])
    assert os.WTERMSIG(status) == signal.SIGINT
    assert written.count(b"ready") == 1 and b"not ended" not in written


def test_ctrl_z_suspends_both_and_fg_goes_on(rig):
    words = " ".join(rig.words(*SMALL, "--", "sh", "-c", "'echo ready; read line; echo got $line; exit 3'"))
    script = f"set -m; {words}; echo stopped $?; jobs; fg; echo ended $?"
    keys = [(b"ready", b"\x1a"), (b"stopped 148", b"go on\n")]
    _, written = on_terminal(["/bin/bash", "-c", script], rig.env, keys)
    assert b"Stopped" in written and b"got go on" in written and b"ended 3" in written


def state_of(pid: int) -> str: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_suspend_and_continue_sent_to_the_command_alone(rig):
    "In a group of its own, whose parent is another group's: an orphaned group ignores SIGTSTP"
    with rig.start(*SMALL, *shell("echo $$; sleep 1; exit 3"), preexec_fn=os.setpgrp) as process:
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGTSTP)
        wait_until(lambda: state_of(process.pid) == "T" and state_of(child) == "T")
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == 3


def test_what_was_ignored_stays_so(rig):
    words = " ".join(rig.words(*SMALL, "--", "sh", "-c", "'echo ready; sleep 1; exit 3'"))
    with subprocess.Popen(["sh", "-c", f"trap '' HUP; exec {words}"], env=rig.env, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 3


def test_a_command_that_was_told_to_end_is_not_tried_again(rig):
    script = f"trap 'echo \"{OUT_OF_MEMORY}\" >&2; exit 1' TERM; echo ready; while :; do sleep 0.05; done"
    with rig.start(*SMALL, "--retries", "3", *shell(script)) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 1
        assert b"trying again" not in process.stderr.read() and rig.claims() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_in_the_queue_nothing_stays_reserved(rig, number):
    with rig.driver() as driver, driver.allocate(20_000):
        with rig.start("--gpu-memory", "20GiB", *shell("echo ran")) as process:
            wait_until(rig_waits := lambda: len(rig.manager.get_claims()) == 1)
            process.send_signal(number)
            out, errors = process.communicate(timeout=30)
            assert (process.returncode, out, errors) == (-number, b"", b"")
        assert rig_waits() is False
    assert rig.run("--gpu-memory", "20GiB", "--timeout", "0", "true").returncode == 0


def test_a_killed_parent_leaves_the_command_with_its_reservation(rig):
    script = "echo $$; echo one >&2; sleep 3; echo two >&2; sleep 1"
    with rig.start("--gpu-memory", "20GiB", *shell(script)) as process:
        child = int(process.stdout.readline())
        wait_until(lambda: any(c.holder.pid == child for c in rig.claims()))
        process.kill()
        process.wait()
        assert rig.reserved() == 20*1024
        assert rig.run("--gpu-memory", "20GiB", "--timeout", "0", "true").returncode == 75
        assert process.stderr.read() == b"one\ntwo\n"     # it could write all the time
    wait_until(lambda: not os.path.exists(f"/proc/{child}"))
    assert rig.claims() == []


# learn, explain, try again

def spans(*outputs: bytes) -> list[tuple[float, float]]:
    found = [[float(line.split()[1]) for line in out.splitlines()] for out in outputs]
    return sorted((began, ended) for began, ended in found)


def test_two_take_turns(rig):
    both = [rig.start("--gpu-memory", "16GiB", *rig.train, "16000", "1") for _ in range(2)]
    (_, ended), (began, _) = spans(*(process.communicate(timeout=60)[0] for process in both))
    assert [process.returncode for process in both] == [0, 0] and began >= ended


def test_what_is_not_known_runs_alone_and_is_known_then(rig):
    reserved = []
    for _ in range(2):
        with rig.start(*rig.train, "6000", "3") as process:
            process.stdout.readline()
            reserved.append(rig.reserved())
            assert process.wait(30) == 0
    assert reserved == [int(0.9*24*1024), 6600]
    found = subprocess.run([*rig.words()[:2], "needs", "--json"], env=rig.env, capture_output=True).stdout
    (need,) = json.loads(found)["needs"]
    assert (need["app"], need["plugin"], need["samples"], need["jobs"]) == ("cjm-resources", "train.py", 2, 2)


def test_a_failed_command_is_not_learned_as_one_that_succeeded(rig):
    rig.run(*SMALL, "--name", "train", *shell("exit 3"))
    found = subprocess.run([*rig.words()[:2], "needs", "--json"], env=rig.env, capture_output=True).stdout
    assert json.loads(found)["needs"] == []


def test_scripts_of_one_name_and_other_arguments_have_needs_of_their_own(rig):
    other = rig.folder/"other"
    other.mkdir()
    waits = ("sh", "run.sh")
    for folder in (rig.folder, other): (folder/"run.sh").write_text("echo began; read line")
    for mb, words, folder in ((3000, waits, rig.folder), (5000, (*waits, "large"), rig.folder), (9000, waits, other)):
        settings = command_settings(words, str(folder))
        key = need_key("run.sh", config=settings, mark=rig.manager.needs.mark(settings))
        rig.manager.needs.record(JobRun(key, time.time(), 60, gpu_highest=mb*2**20))
    rig.manager.needs.write()
    for mb, words, folder in ((3000, waits, rig.folder), (5000, (*waits, "large"), rig.folder), (9000, waits, other),
                              (9000, (*waits, "new"), other), (9000, ("sh", f"{other}/run.sh"), rig.folder)):
        with rig.start(*words, cwd=folder, stdin=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"began\n"
            assert rig.reserved() == pytest.approx(1.1*mb, abs=1)
            process.communicate(b"\n", timeout=60)


def test_an_argument_that_is_bytes_and_no_text_is_one_like_any_other(rig):
    assert rig.run(*SMALL, "true", os.fsdecode(b"a\xff.bin")).returncode == 0


def test_memory_that_ran_out_is_explained_with_who_was_there(rig):
    with rig.driver() as driver, driver.allocate(14_000):
        found = rig.run("--gpu-memory", "8GiB", *rig.train, "12000", "1")
    said = found.stderr.decode()
    paragraph = said.splitlines()[-1]
    assert found.returncode == 1 and said.startswith("torch.OutOfMemoryError")
    assert paragraph.startswith("train.py: PyTorch asked for 11.7 GiB of GPU memory on GPU 0 (NVIDIA L4)")
    assert f"PID {os.getpid()}" in paragraph and "13.7 GiB" in paragraph
    assert "--gpu-memory" in paragraph and "reserve(" not in paragraph
    asked = rig.manager.expected_need("train.py").gpu_memory_mb
    assert asked == pytest.approx(1.25*12_000, abs=10)


def test_the_paragraph_begins_in_a_line_of_its_own(rig):
    said = errors_of(rig, f"printf '{OUT_OF_MEMORY}' >&2; exit 1").decode()
    assert said.startswith(f"{OUT_OF_MEMORY}\nsh: PyTorch asked for 2.0 GiB")


def test_a_second_try_gets_more_and_succeeds(rig):
    marker = rig.folder/"tried"
    once = f"test -f {marker} && exit 0; touch {marker}; echo '{OUT_OF_MEMORY}' >&2; exit 1"
    script = shell(f"echo $$ $CUDA_VISIBLE_DEVICES; {once}")
    found = rig.run("--gpu-memory", "8GiB", "--retries", "2", "--name", "train", *script)
    said = found.stderr.decode().splitlines()
    assert found.returncode == 0 and said[0] == OUT_OF_MEMORY
    assert said[2:] == ["train: trying again (1 of 2) with 10.0 GiB of GPU memory."]
    first, second = found.stdout.split(b"\n")[:2]
    assert first != second and first.split()[1] == second.split()[1]     # a fresh process on the same device
    assert rig.claims() == []


def test_the_second_try_waits_for_the_others(rig):
    "The first one takes more than it reserved, beside a job; the second one is alone"
    with rig.start("--gpu-memory", "14GiB", *rig.train, "14000", "4") as other:
        first = other.stdout.readline()
        found = rig.run("--gpu-memory", "9GiB", "--retries", "1", *rig.train, "12000", "0.5")
        (_, ended), (began, _) = spans(first + other.communicate(timeout=60)[0], found.stdout)
    assert (found.returncode, other.returncode) == (0, 0) and began >= ended
    assert b"train.py: trying again (1 of 1) with 14.6 GiB" in found.stderr


def test_every_try_fails(rig):
    found = rig.run("--gpu-memory", "20GiB", "--retries", "2", *shell(f"echo '{OUT_OF_MEMORY}' >&2; exit 9"))
    said = found.stderr.decode()
    assert found.returncode == 9 and said.count(OUT_OF_MEMORY) == 3
    assert [f"({n} of 2) with 21.6 GiB" in said for n in (1, 2)] == [True, True]    # no more than a job gets alone


@pytest.mark.parametrize("script", [
    "echo 'ValueError: no' >&2; exit 1", "echo 'MemoryError' >&2; exit 1",
    f"echo '{OUT_OF_MEMORY}' >&2; kill -9 $$", f"echo '{OUT_OF_MEMORY}' >&2; exit 0"])
def test_what_is_not_tried_again(rig, script):
    found = rig.run(*SMALL, "--retries", "2", *shell(f"echo began; {script}"))
    assert found.stdout == b"began\n" and b"trying again" not in found.stderr


def test_an_abort_after_the_error_is_tried_again(rig):
    "As of a C++ program, whose errors end in abort()"
    found = rig.run(*SMALL, "--retries", "1", *shell(f"echo '{OUT_OF_MEMORY}' >&2; kill -ABRT $$"))
    assert found.returncode == 128 + signal.SIGABRT and b"trying again (1 of 1)" in found.stderr


def test_no_memory_for_the_second_try(rig):
    "Then the exit code is that of the first one, which ran"
    took = f"{DRIVER}\nimport time\nwith driver.allocate(20_000): time.sleep(8)"
    start = f"{sys.executable} -c '{took}' >/dev/null 2>&1 & sleep 3; echo '{OUT_OF_MEMORY}' >&2; exit 5"
    found = rig.run("--gpu-memory", "8GiB", "--retries", "1", "--timeout", "0.5", *shell(start))
    assert found.returncode == 5 and b"sh: no further try. " in found.stderr


def test_idle_workers_of_the_app_make_room(rig):
    holder = f"{DRIVER}\nwith driver.allocate(15_000):\n    print(1, flush=True)\n    import sys; sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=rig.env)
    manager = ResourceManager(app="studio", track_self=False)
    marker = rig.folder/"tried"
    with subprocess.Popen([sys.executable, "-c", holder], **pipes) as worker, rig.driver():
        try:
            worker.stdout.readline()
            manager.register_worker(worker.pid, "llm", plugin_name="llama")
            script = f"test -f {marker} && exit 0; touch {marker}; echo '{OUT_OF_MEMORY}' >&2; exit 1"
            found = rig.run("--app", "studio", "--gpu-memory", "8GiB", "--retries", "1", *shell(script))
        finally: worker.kill()
    assert found.returncode == 0
    assert f"sh: The idle llm worker (PID {worker.pid}, llama) was stopped".encode() in found.stderr


def test_while_it_runs_it_is_shown_as_a_worker_of_its_app(rig):
    with rig.start("--gpu-memory", "8GiB", "--name", "nightly", *shell("echo $$; read x"), stdin=subprocess.PIPE) as p:
        child = int(p.stdout.readline())
        with rig.driver():
            worker = wait_until(lambda: rig.manager.get_worker_by_pid(child))
            assert (worker.worker_type, worker.plugin_name, worker.status) == ("command", "nightly", "running")
            (claim,) = rig.manager.get_claims()
            assert (claim.holder.pid, claim.memory) == (child, 8*GIB)
        p.communicate(b"\n", timeout=30)
    assert rig.manager.get_worker_by_pid(child) is None


@pytest.mark.parametrize("machine", ["idle", "pair", "two-cards", "container", "spark"])
def test_on_a_simulated_machine(command, folder, machine):
    simulated = ("--simulate", machine, "run", "--gpu-memory", "100MiB")
    found = command(*simulated, *shell("echo ran; sleep 0.3; exit 3"))
    assert (found.returncode, found.stdout, found.stderr) == (3, "ran\n", "")
    assert "No needs" in command("needs").stdout
