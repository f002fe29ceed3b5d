"The command as a user starts it: colours, exit codes, pipes, Ctrl-C, and what is really on this machine"
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PROGRAM = str(Path(sys.executable).with_name("cjm-resources"))

# prints its PID, and once it has its memory its child, which it waits for
PARENT = """if True:
    import subprocess, sys
    child = "x = bytearray(300 << 20); print(1, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", child])
    print(process.pid, flush=True)
    process.wait()"""


def on_terminal(*args: str, keys: bytes = b"", wait: float = 0, **env: str) -> tuple[int, str]:
    "Run the command on a terminal; after `wait` seconds type `keys`. Its exit code, and all that it wrote"
    pid, fd = pty.fork()
    settings = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", **env}
    if pid == 0: os.execve(PROGRAM, [PROGRAM, *args], settings)
    written = b""
    began = time.monotonic()
    os.set_blocking(fd, False)
    while True:
        try: written += os.read(fd, 65536) or b""
        except BlockingIOError: time.sleep(0.02)
        except OSError: break
        if keys and time.monotonic() - began > wait: keys = os.write(fd, keys) and b""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written.decode()


def test_the_package_is_the_command_too():
    run = [[PROGRAM], [sys.executable, "-m", "cjm_fasthtml_resources"]]
    done = [subprocess.run([*program, "--simulate", "lost", "--exit-code"], capture_output=True, text=True)
            for program in run]
    assert done[0].returncode == done[1].returncode == 10 and done[0].stdout == done[1].stdout

def test_this_machine(command, spawn):
    worker = spawn(PARENT)
    child = int(worker.stdout.readline())
    worker.stdout.readline()
    result = command("--json", "--app", str(worker.pid))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    row = next(p for p in found["memory"]["processes"] if p["pid"] == child)
    assert (row["owner"], row["parent_pid"], row["parent_worker_type"]) == ("app", worker.pid, "app")
    assert abs(row["memory_used"] - psutil.Process(child).memory_info().rss) < 20 << 20
    assert found["memory"]["app_memory"] > 300 << 20
    assert found["simulated"] is None
    shown = command("--app", str(worker.pid), COLUMNS="120").stdout
    assert str(child) in shown and "SIMULATED" not in shown


def test_colour_only_on_a_terminal(command):
    assert "\x1b" not in command("--simulate", "shared").stdout
    code, written = on_terminal("--simulate", "shared")
    assert code == 0 and "\x1b[31m" in written
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", on_terminal("--simulate", "shared", NO_COLOR="1")[1])


@pytest.mark.parametrize("args, code", [
    ("--simulate idle", 0),
    ("--simulate shared", 0),
    ("--simulate idle --exit-code", 0),
    ("--simulate pair --exit-code", 10),
    ("--simulate shared --exit-code --json", 11),
    ("--simulate nothing", 2),
    ("--app 0", 2),
    ("extra", 2),
    ("--interval 0", 2),
])
def test_exit_codes(command, args, code): assert command(*args.split()).returncode == code


def test_unavailable_is_12(command, tmp_path):
    path = tmp_path/"none.json"
    path.write_text(json.dumps(dict(faults=[dict(call="nvmlInitWithFlags", error=9)])))
    result = command("--simulate", str(path), "--exit-code")
    assert result.returncode == 12 and "the NVIDIA driver is not loaded" in result.stdout


def test_watch_refreshes_in_place_and_ends_cleanly():
    code, written = on_terminal("--simulate", "pair", "--watch", "--interval", "0.2", keys=b"q", wait=2.5)
    assert code == 0 and "Traceback" not in written and "Aborted" not in written
    assert written.count("SIMULATED") >= 2 and "\x1b[1;1H" in written      # it wrote over what was there
    watch = ("--simulate", "shared", "--watch", "--interval", "0.2", "--exit-code")
    assert on_terminal(*watch, keys=b"q", wait=2)[0] == 11


def test_watch_as_json_gives_a_line_each_time():
    watch = [PROGRAM, "--simulate", "idle", "--watch", "--json", "--interval", "0.1"]
    process = subprocess.Popen(watch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = [json.loads(process.stdout.readline()) for _ in range(3)]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (-signal.SIGINT, "") and lines[0]["time"] < lines[2]["time"]


def test_ctrl_c_ends_the_page_quietly_as_soon_as_its_address_is_shown():
    pytest.importorskip("fasthtml")
    serve = [PROGRAM, "--simulate", "idle", "serve", "--port", "0"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for _ in range(4):
        with subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
            shown = process.stdout.readline()
            process.send_signal(signal.SIGINT)
            written, errors = process.communicate(timeout=20)
            assert shown.startswith("http://127.0.0.1:")
            assert (written, errors, process.returncode) == ("", "", -signal.SIGINT)


def test_ctrl_c_ends_a_wait_as_by_the_signal_and_leaves_the_queue(command, folder, tmp_path):
    from cjm_fasthtml_resources.core.manager import ResourceManager
    from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
    path = tmp_path/"machine.json"
    path.write_text(json.dumps(dict(gpus=[dict(memory_total_mb=24_000)])))
    wait = [PROGRAM, "--simulate", str(path), "wait", "--gpu-memory", "8GiB", "--", "true"]
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
        manager = ResourceManager(app="day")
        with manager.reserve(20_000), subprocess.Popen(wait, stderr=subprocess.PIPE, text=True) as process:
            end = time.monotonic() + 20
            while len(manager.get_claims()) < 2 and time.monotonic() < end: time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == -signal.SIGINT and "Traceback" not in process.stderr.read()
            assert len(manager.get_claims()) == 1


@pytest.mark.parametrize("args, message", [
    (["wiat", "--gpu-memory", "8GiB"], "Did you mean 'wait'?"),
    (["wait", "--timeot", "10m"], "--timeout"),
    (["run", "--retires", "1", "true"], "--retries"),
    (["wait", "--simulate", "idle"], "--simulate belongs before wait: cjm-resources --simulate … wait …"),
    (["needs", "--watch"], "--watch belongs before needs"),
    (["--gpu-memory", "8GiB", "wait"], "--gpu-memory belongs after wait or run"),
    (["--port", "1", "serve"], "--port belongs after serve"),
    (["--simulate", "shared", "wait", "--gpu-memory", "80GiB"], "80.0 GiB is more than the largest GPU has (47.4 GiB)"),
])
def test_an_option_that_is_wrong_is_answered_with_what_was_meant(command, args, message):
    result = command(*args)
    assert result.returncode == 2 and message in result.stderr, result.stderr


@pytest.mark.parametrize("name", ["", "wait", "run", "needs", "serve"])
def test_the_help_has_examples(command, name):
    shown = command(*filter(None, [name]), "--help").stdout
    below = shown.partition("Examples:")[2]
    examples = re.findall(r"^ +((?:\w+=\S+ )?cjm-resources .*?)(?:   .*)?$", below, re.MULTILINE)
    assert len(examples) >= 2 and (name or "--watch") in shown
    from test_docs import check_command
    for example in examples: check_command([w for w in example.split() if w.partition("=")[0] != "CJM_RESOURCES_TOKEN"])


@pytest.mark.parametrize("typed, found", [
    ("cjm-resources wa", "wait"), ("cjm-resources --simulate two", "two-cards"),
    ("cjm-resources wait --gpu", "--gpu-memory"),
    ("cjm-resources --simulate h200-mig-l", "h200-mig-load")])
def test_the_shell_completes(command, typed, found):
    words = typed.split()
    result = command(_CJM_RESOURCES_COMPLETE="bash_complete", COMP_WORDS=typed, COMP_CWORD=str(len(words) - 1))
    assert f"plain,{found}" in result.stdout.splitlines()
    assert "complete -o nosort" in command(_CJM_RESOURCES_COMPLETE="bash_source").stdout or sys.platform == "darwin"


def test_a_look_imports_what_it_needs():
    code = ("import sys; from cjm_fasthtml_resources.cli import main\n"
            "try: main(sys.argv[1:], prog_name='cjm-resources')\n"
            "except SystemExit: pass\n"
            "print(*sorted(name for name in sys.modules if '.' not in name or 'commands' in name or 'ui.' in name))")
    def loaded(*args): return set(subprocess.run([sys.executable, "-c", code, *args], capture_output=True,
                                                 text=True, check=True).stdout.splitlines()[-1].split())
    heavy = {"rich", "asyncio", "tqdm", "psutil", "fastcore", "ipywidgets", "uvicorn", "pandas", "curses"}
    assert not loaded() & (heavy | {"cjm_fasthtml_resources.commands.watch", "cjm_fasthtml_resources.commands.wait"})
    assert not loaded("--json") & {"cjm_fasthtml_resources.ui.terminal"}
    waited = loaded("--simulate", "idle", "wait", "--gpu-memory", "1GiB")
    assert not waited & (heavy | {"cjm_fasthtml_resources.ui.terminal", "cjm_fasthtml_resources.commands.serve"})


def test_a_reader_that_goes_away_is_no_traceback():
    pipe = f"{PROGRAM} --simulate eight-h100 --top 100 | head -1"
    process = subprocess.run(pipe, shell=True, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in process.stderr


# a program that ends as the command does, after it has done something
ENDING = """if True:
    import atexit, sys, threading, time
    from cjm_fasthtml_resources import __main__, cli
    {}
    __main__.run()"""


@pytest.mark.parametrize(("before", "printed", "code"), [
    ("cli.main = lambda: sys.exit(10)", "", 10),
    ("cli.main = lambda: sys.exit(None)", "", 0),
    ("cli.main = lambda: sys.exit('a message')", "", 1),
    ("atexit.register(print, 'given back'); cli.main = lambda: sys.exit(10)", "given back\n", 10),
    ("cli.main = lambda: sys.exit(bool(sys.stdout.write('written')))", "written", 1),
    ("cli.main = lambda: sys.exit(threading.Timer(0.1, print, ['waited for']).start())", "waited for\n", 0)])
def test_what_a_normal_end_does_is_done_by_a_quick_one(before, printed, code):
    done = subprocess.run([sys.executable, "-c", ENDING.format(before)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == (printed, code), done.stderr
    assert done.stderr == ("a message\n" if "message" in before else "")


def test_the_command_ends_without_taking_python_apart():
    "What `sys` has is freed last when Python takes itself apart"
    late = ("import os\n    class Late:\n        def __del__(self, write=os.write): write(1, b'apart')\n"
            "    sys.late = Late()\n    cli.main = sys.exit")
    done = [subprocess.run([sys.executable, "-c", ENDING.format(late).replace("run()", how)], capture_output=True,
                           text=True, timeout=60).stdout for how in ("run()", "main()")]
    assert done == ["", "apart"]


def test_what_observes_the_command_has_the_last_word():
    profile = [sys.executable, "-m", "cProfile", "-m", "cjm_fasthtml_resources", "--simulate", "lost"]
    assert "function calls" in subprocess.run(profile, capture_output=True, text=True, timeout=60).stdout


def test_a_stream_that_cannot_be_written_at_the_end_is_said_by_python():
    code = ENDING.format("cli.main = lambda: sys.exit(bool(sys.stdout.write('lost')))")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
                              env={**os.environ, "PYTHONUNBUFFERED": ""})
    assert done.returncode == 120 and "No space left" in done.stderr


@pytest.mark.parametrize("args", [[], ["--json"], ["--watch", "--json"]], ids=["text", "json", "watch"])
def test_a_full_disk_is_said_in_words(args):
    show = [PROGRAM, "--simulate", "idle", *args]
    with open("/dev/full", "w") as full:
        result = subprocess.run(show, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    said = "Error: the output could not be written: No space left on device\n"
    assert (result.returncode, result.stderr) == (1, said)


def test_a_terminal_without_unicode(command):
    result = command("--simulate", "shared", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert result.returncode == 0 and "#" in result.stdout and result.stdout.isascii()


@pytest.mark.parametrize("text", [
    "",
    "[",
    "[]",
    '{"gpus": [{"memory_total_mb": "many"}]}',
    '{"workers": [{"pid": -1, "worker_type": "llm"}]}',
    '{"workers": [{"pid": 1, "worker_type": "llm", "x": 2}]}',
    "\x00\xff",
], ids=["empty", "half", "a list", "a word for a number", "a bad PID", "an unknown field", "no text"])
def test_a_scenario_that_cannot_be_read_says_why(command, tmp_path, text):
    path = tmp_path/"mine.json"
    path.write_text(text, encoding="latin-1")
    result = command("--simulate", str(path))
    assert result.returncode == 2 and "--simulate" in result.stderr and "Traceback" not in result.stderr
