"""Every line of tutorials/programs.ipynb, run as it is printed: systemd's, cron's, Docker's and a shell's, with
stand-ins for Ollama and `docker` on a simulated GPU; and what it says of signals, exit codes and a container's PID 1"""
import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import COMMAND, DRIVER, GIB, ROOT, wait_until
from test_docs import blocks, text
from test_namespaces import PID_NAMESPACE, allows
from test_run import on_terminal

from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

PAGE = ROOT/"nbs"/"tutorials"/"programs.ipynb"
L4 = 24_564   # MiB
SMALL = 10_240   # room for one model
needs_pids = pytest.mark.skipif(not allows(PID_NAMESPACE), reason="making a PID namespace needs root")

# A server that has a model in memory from the first request on, or with keep_alive 0 only for the request
OLLAMA = DRIVER + """
import json, signal, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
loaded, model = [], threading.Lock()
class Api(BaseHTTPRequestHandler):
    def answer(self, code, text):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())
    def do_GET(self): self.answer(200, "models")
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with model:
            try: loaded.append(driver.allocate(5_500)); loaded[-1].__enter__()
            except MemoryError: return self.answer(500, "out of memory")
            time.sleep(0.5)
            if asked.get("keep_alive") == 0: loaded.pop().__exit__(None, None, None)
        self.answer(200, asked["prompt"])
    def log_message(self, *args): pass
def stop(number, frame):
    print("stopped", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
print("serving", os.environ.get("CUDA_VISIBLE_DEVICES"), server.server_port, flush=True)
server.serve_forever()
"""

# The container is a process of another parent, with the variables that are named alone; `docker run` waits for its end
DOCKER = """
import os, signal, sys
assert sys.argv[1:4] == ["run", "--rm", "--gpus"], sys.argv
given = {sys.argv[i + 1] for i, word in enumerate(sys.argv) if word == "-e"}
env = {k: v for k, v in os.environ.items() if k in given or k in ("GPUS", "PATH", "PYTHONPATH")}
end, ends = os.pipe()
told, tells = os.pipe()
os.set_inheritable(ends, True)
if os.fork() == 0:
    os.setsid()
    if (pid := os.fork()): os.write(tells, str(pid).encode())
    else: os.execvpe("ollama", ["ollama", "serve"], env)
    os._exit(0)
os.close(ends)
container = int(os.read(told, 99))
def stop(number, frame): os.kill(container, signal.SIGTERM)
for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, stop)
os.read(end, 1)
"""

CURL = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[2], sys.argv[sys.argv.index("-d") + 1].encode()).read().decode())
"""

WHISPER = DRIVER + """
import sys, time
with driver.allocate(5_500): time.sleep(0.5)
print("heard", sys.argv[1])
"""

TRAIN = """
import os, sys
print("trained on", os.environ["CUDA_VISIBLE_DEVICES"], *sys.argv[1:])
"""


def sized(code: str, size: int) -> str:
    "A program with a GPU of so many MiB"
    return code.replace('SimulatedGpu("NVIDIA L4")', f'SimulatedGpu("NVIDIA L4", memory_total_mb={size})')


class Shell:
    "A shell in a folder, with stand-ins before the real programs, and a simulated GPU"
    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.bin, self.gpus, self.size = folder, folder/"bin", folder/"gpus", size
        self.bin.mkdir()
        self.state = os.environ["CJM_RESOURCES_DIR"]
        programs = {"cjm-resources": COMMAND, "ollama": OLLAMA, "docker": DOCKER, "curl": CURL}
        for name, code in programs.items(): self.add(name, code)
        for name, code in (("transcribe.py", WHISPER), ("train.py", TRAIN)):
            (folder/name).write_text(sized(code, size))
        for name in ("train.sh", "job.sh"):
            (folder/name).write_text("#!/bin/sh\nexec python train.py by a script\n")
            (folder/name).chmod(0o755)
        self.env = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "GPUS": str(self.gpus),
                    "PYTHONUNBUFFERED": "1"}
        self.env.pop("CUDA_VISIBLE_DEVICES", None)
        (self.bin/"python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (self.bin/"python").chmod(0o755)
        self.started: list[subprocess.Popen] = []

    def add(self, name: str, code: str) -> None:
        "Add a program, which needs no variable to find the library, the GPU and the queue"
        (self.bin/f"{name}.code").write_text(sized(code, self.size))
        given = {"GPUS": self.gpus, "PYTHONPATH": ROOT, "PYTHONUNBUFFERED": 1, "CJM_RESOURCES_DIR": self.state}
        words = " ".join(f"{variable}={shlex.quote(str(value))}" for variable, value in given.items())
        (self.bin/name).write_text(f'#!/bin/sh\n{words} exec {sys.executable} {self.bin/name}.code "$@"\n')
        (self.bin/name).chmod(0o755)

    def start(self, line: str | list[str], **settings) -> subprocess.Popen:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        words = ["sh", "-c", f"exec {line}"] if isinstance(line, str) else line
        given = {**pipes, "env": self.env, "cwd": self.folder, "start_new_session": True, **settings}
        self.started.append(subprocess.Popen(words, **given))
        return self.started[-1]

    def run(self, line: str | list[str], **settings) -> subprocess.CompletedProcess:
        process = self.start(["bash", "-c", line] if isinstance(line, str) else line, **settings)
        out, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(line, process.returncode, out, errors)

    def end(self) -> None:
        for process in self.started:
            process.terminate()   # so that `docker run` ends its container
            with contextlib.suppress(subprocess.TimeoutExpired): process.wait(3)
            with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(OSError, AttributeError): pipe.close()

    @contextlib.contextmanager
    def driver(self) -> Iterator[SimulatedDriver]:
        gpu = SimulatedGpu("NVIDIA L4", memory_total_mb=self.size)
        with SimulatedDriver([gpu], shared=self.gpus) as driver: yield driver

    def claims(self) -> list:
        with self.driver(): return ResourceManager(app="test").get_claims()

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        "The GPU is in use by another program"
        with self.driver() as driver, driver.allocate(20_000): yield


@pytest.fixture(params=[L4], ids=["L4"])
def shell(folder, tmp_path, request):
    made = Shell(tmp_path, request.param)
    yield made
    made.end()


def printed(language: str, word: str = "") -> str:
    "The block on the page with that word"
    found, = [block for block in blocks(PAGE, language) if word in block]
    return found.strip()


def test_no_line_is_left_out():
    languages = ("ini", "dockerfile", "yaml", "crontab", "bash")
    assert [len(blocks(PAGE, language)) for language in languages] == [1, 1, 1, 1, 6]


# systemd

def exec_start(shell: Shell) -> str:
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str
    unit.read_string(printed("ini"))
    return re.sub(r"/\S+/bin/", f"{shell.bin}/", unit["Service"]["ExecStart"])


def test_systemds_main_process_is_the_program(shell):
    process = shell.start(exec_start(shell))
    assert process.stdout.readline().startswith("serving GPU-")
    assert "ollama" in Path(f"/proc/{process.pid}/cmdline").read_text()
    assert [(c.holder.pid, c.memory) for c in shell.claims()] == [(process.pid, 12*GIB)]
    os.killpg(process.pid, signal.SIGTERM)   # systemd tells all of the unit's processes
    assert (process.communicate(timeout=30)[0], process.returncode) == ("stopped\n", 0)
    assert shell.claims() == []


def test_systemd_ends_the_waiting(shell):
    with shell.full():
        process = shell.start(exec_start(shell))
        wait_until(lambda: shell.claims(), 30)
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM and shell.claims() == []


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_understands_the_unit(shell):
    unit = shell.folder/"ollama.service"
    unit.write_text(re.sub(r"ExecStart=.*", f"ExecStart={exec_start(shell)}", printed("ini")))
    found = shell.run(["systemd-analyze", "verify", "--man=no", str(unit)])
    assert "ollama.service" not in found.stderr, found.stderr


# Docker

def test_docker_run(shell):
    process = shell.start(printed("bash", "docker run"))
    assert process.stdout.readline().startswith("serving GPU-")
    assert [c.memory for c in shell.claims()] == [12*GIB]
    process.terminate()
    assert (process.communicate(timeout=30)[0], process.returncode) == ("stopped\n", 0)
    assert shell.claims() == []


def test_what_a_container_uses_counts_next_to_its_reservation(shell):
    process = shell.start(printed("bash", "docker run"))
    port = process.stdout.readline().split()[2]
    asked = json.dumps({"model": "m", "prompt": "hello"})
    assert shell.run(["curl", "-s", f"http://localhost:{port}/api/generate", "-d", asked]).stdout == "hello\n"
    with shell.driver():
        device, = ResourceManager(app="other").check_gpu_availability().devices
        assert 0 < device.room <= device.device.memory_total - 12*GIB - 5_500*2**20


def first_process(shell: Shell, words: list[str]) -> tuple[subprocess.Popen, int]:
    "Start a container; `unshare`, and the container's first process by its number outside"
    process = shell.start([*PID_NAMESPACE, *words])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: children.read_text().split(), 30)
    return process, int(children.read_text())


def entrypoint(name: str) -> list[str]:
    found = dict(re.findall(r"^(ENTRYPOINT|CMD) (.*)$", printed("dockerfile"), re.M))
    words = [*json.loads(found["ENTRYPOINT"]), *json.loads(found["CMD"])]
    assert words[1] == "run"
    return [words[0], name, *words[2:]]


@needs_pids
@pytest.mark.parametrize("name", ["run", "wait"])
def test_a_containers_first_process_ends_when_it_is_told_to(shell, name):
    process, first = first_process(shell, entrypoint(name))
    assert process.stdout.readline().startswith("serving GPU-")
    assert [c.memory for c in shell.claims()] == [12*GIB]
    os.kill(first, signal.SIGTERM)   # as `docker stop` does
    assert (process.communicate(timeout=30)[0], process.returncode) == ("stopped\n", 0)
    assert shell.claims() == []


@needs_pids
@pytest.mark.parametrize("name", ["run", "wait"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_containers_first_process_ends_while_it_waits(shell, name, number):
    with shell.full():
        process, first = first_process(shell, entrypoint(name))
        wait_until(lambda: shell.claims(), 30)
        assert [claim.device for claim in shell.claims()] == [None]   # it waits
        os.kill(first, number)
        code = process.wait(30)
        assert (code, process.stdout.read(), shell.claims()) == (128 + number, "", []), process.stderr.read()


ORPHANS = "for i in 1 2 3; do sh -c 'sleep 0.1 & echo $!' ; done; sleep 2.5; "
ORPHANS += "cat /proc/[0-9]*/stat | grep -c ') Z'; exit 5"


@needs_pids
@pytest.mark.parametrize("name", ["run", "wait"])
def test_a_containers_first_process_leaves_no_zombies_and_has_the_commands_code(shell, name):
    process, _ = first_process(shell, [*entrypoint(name)[:-2], "sh", "-c", ORPHANS])
    assert process.communicate(timeout=30)[0].split()[3:] == ["0"] and process.returncode == 5


@needs_pids
@pytest.mark.parametrize("name", ["run", "wait"])
@pytest.mark.parametrize(("words", "code"), [
    (["/no/such/program"], 127), (["/etc"], 126), (["sh", "-c", "kill -9 $$"], 137)])
def test_a_containers_first_process_says_what_became_of_the_command(shell, name, words, code):
    process, _ = first_process(shell, [*entrypoint(name)[:-2], *words])
    assert process.wait(30) == code


@needs_pids
@pytest.mark.parametrize("name", ["run", "wait"])
def test_ctrl_c_reaches_the_command_in_a_container_once(shell, name):
    count = "import signal, sys, time; seen = []; signal.signal(signal.SIGINT, lambda *a: seen.append(1)); "
    count += "print('ready', flush=True); time.sleep(1.2); print(len(seen), 'seen'); sys.exit(6)"
    words = [shutil.which("unshare"), *PID_NAMESPACE[1:], str(shell.bin/"cjm-resources"), name]
    status, written = on_terminal([*words, "--gpu-memory", "1GiB", "--", sys.executable, "-c", count], shell.env,
                                  [(b"ready", b"\x03")])
    assert b"1 seen" in written and os.waitstatus_to_exitcode(status) in (6, -signal.SIGINT), written   # unshare's


def test_compose_has_all_that_the_queue_needs():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    service = yaml.safe_load(printed("yaml"))["services"]["ollama"]
    assert service["volumes"] == ["/srv/gpu:/srv/gpu"] and service["environment"] == {"CJM_RESOURCES_DIR": "/srv/gpu"}
    assert service["group_add"] == ["1005"] and service["build"] == "." and "entrypoint" not in service


# Take turns

def together(shell: Shell, *lines: str) -> list[subprocess.CompletedProcess]:
    found: list[subprocess.CompletedProcess] = []
    threads = [threading.Thread(target=lambda line=line: found.append(shell.run(line))) for line in lines]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return found


@pytest.fixture
def ollama(shell):
    process = shell.start("ollama serve")
    return process.stdout.readline().split()[2]


one_model = pytest.mark.parametrize("shell", [SMALL], indirect=True, ids=["room for one"])


@one_model
def test_requests_take_turns_and_no_server_is_stopped(shell, ollama):
    request, transcribe = printed("bash", "transcribe.py").replace(":11434", f":{ollama}").splitlines()
    found = together(shell, request, transcribe, request, transcribe)
    assert sorted(one.stdout for one in found) == ["Why is the sky blue?\n"]*2 + ["heard talk.wav\n"]*2, found
    assert shell.started[0].poll() is None and shell.claims() == []


@one_model
def test_without_taking_turns_one_of_them_fails(shell, ollama):
    request, transcribe = (line.partition(" -- ")[2] for line in printed("bash", "transcribe.py").splitlines())
    with shell.driver() as driver, driver.allocate(5_500):
        assert shell.run(request.replace(":11434", f":{ollama}")).returncode == 1
        assert shell.run(transcribe).returncode == 1


@one_model
def test_a_door_for_clients_that_cannot_be_changed(shell, ollama):
    start = "bind = h.HTTPServer.server_bind\n"   # it says which port it has
    start += "h.HTTPServer.server_bind = lambda self: (bind(self), print(self.server_port, flush=True))\n"
    door = f"{start}runpy.run_path({str(ROOT/'examples'/'ollama_door.py')!r}, run_name='__main__')\n"
    (shell.folder/"examples").mkdir()
    (shell.folder/"examples/ollama_door.py").write_text(
        f"{sized(DRIVER, SMALL)}import runpy, http.server as h\n{door}")
    door = shell.start(printed("bash", "ollama_door.py"),
                       env={**shell.env, "OLLAMA": f"http://127.0.0.1:{ollama}", "PORT": "0"})
    port = int(door.stdout.readline())
    request, transcribe = printed("bash", "transcribe.py").splitlines()
    request = request.partition(" -- ")[2].replace(":11434", f":{port}").replace(', "keep_alive": 0', "")
    found = together(shell, request, transcribe, request, transcribe)
    assert sorted(one.stdout for one in found) == ["Why is the sky blue?\n"]*2 + ["heard talk.wav\n"]*2, found
    tags = "import urllib.request as u, sys; print(u.urlopen(sys.argv[1]).read().decode())"
    assert shell.run([sys.executable, "-c", tags, f"http://127.0.0.1:{port}/api/tags"]).stdout == "models\n"
    assert shell.claims() == []


# cron

def test_cron(shell):
    "With the few variables that cron sets, no terminal and no input"
    path, line = printed("crontab").splitlines()
    *when, command = line.split(None, 5)
    assert len(when) == 5 and path.startswith("PATH=/")
    env = {"PATH": f"{shell.bin}:/usr/bin:/bin", "HOME": str(shell.folder), "LOGNAME": "ada", "SHELL": "/bin/sh"}
    found = shell.run(["/bin/sh", "-c", command], env=env, stdin=subprocess.DEVNULL)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert re.match(r"trained on GPU-\S+ by a script\n", (shell.folder/"train.log").read_text())
    with shell.full():
        found = shell.run(["/bin/sh", "-c", command.replace("4h", "0s")], env=env, stdin=subprocess.DEVNULL)
    assert found.returncode == os.EX_TEMPFAIL and "16.0 GiB" in (shell.folder/"train.log").read_text()


# Without Slurm

ROWS = re.findall(r"^\| `s\w+.*?\| `(cjm-resources [^`]+)`", text(PAGE), re.M)


@pytest.mark.parametrize("line", ROWS)
def test_a_row_for_slurm(shell, line):
    if "cancel" in line:
        with shell.full():
            process = shell.start("cjm-resources run --gpu-memory 20GiB -- true")
            wait_until(lambda: shell.claims(), 30)
            assert shell.run(line.replace("17", str(shell.claims()[0].id))).returncode == 0
            assert process.wait(30) == os.EX_TEMPFAIL
    elif "--gpus 2" in line: assert "--gpus must be at most 1" in shell.run(line).stderr   # there is one
    else:
        found = shell.run(line, stdin=subprocess.DEVNULL)
        assert found.returncode == 0, found.stderr
        if "train.py" in line: assert found.stdout.startswith("trained on GPU-")


def test_a_job_in_the_background_goes_on_without_its_shell(shell):
    with shell.full():
        shell.run(f"{printed('bash', 'nohup')} sleep 0.1")
        wait_until(lambda: shell.claims(), 30)
    wait_until(lambda: "trained" in (shell.folder/"train.log").read_text(), 30)


# A shell prompt

def test_a_shell_that_has_a_gpu(shell):
    typed = "echo on $CUDA_VISIBLE_DEVICES; cjm-resources queue --json; exit 4\n"
    process = shell.start(printed("bash", "-- bash"))
    out, _ = process.communicate(typed, timeout=60)
    device, queue = out.splitlines()
    row, = json.loads(queue)["queue"]
    assert device.startswith("on GPU-") and (row["state"], row["memory"]) == ("held", 8*GIB)
    assert process.returncode == 4 and shell.claims() == []


def test_a_loop_trains_one_after_the_other(shell):
    found = shell.run(printed("bash", "for lr"))
    assert [line.split()[-1] for line in found.stdout.splitlines()] == ["1e-3", "1e-4", "1e-5"]


@pytest.mark.parametrize("name", ["run", "wait"])
@pytest.mark.parametrize("waits", [False, True], ids=["while it runs", "while it waits"])
def test_ctrl_c_ends_the_loop(shell, name, waits):
    loop = printed("bash", "for lr").replace("cjm-resources run", f"cjm-resources {name}")
    loop = loop.replace("python train.py --lr", "sh -c 'echo runs; exec sleep 30'")
    if waits: loop = f"{loop.replace('8GiB', '20GiB')}"
    script = f"echo begins; {loop}; echo goes on"
    def interrupt(fd: int) -> None:
        if waits: wait_until(shell.claims, 30)
        os.write(fd, b"\x03")

    keys = [(b"begins" if waits else b"runs", interrupt)]
    with shell.full() if waits else contextlib.nullcontext():
        status, written = on_terminal([shutil.which("bash"), "-c", script], shell.env, keys)
    assert os.WTERMSIG(status) == signal.SIGINT and b"goes on" not in written, written
    assert written.count(b"runs") == (not waits) and shell.claims() == []


@pytest.mark.parametrize("name", ["run", "wait"])
def test_no_memory_goes_to_a_request_that_is_suspended(shell, name):
    words = f"cjm-resources {name} --gpu-memory 20GiB --"
    with shell.full():
        asleep = shell.start(f"{words} echo late", preexec_fn=os.setpgrp, start_new_session=False)
        wait_until(lambda: len(shell.claims()) == 1, 30)
        asleep.send_signal(signal.SIGTSTP)
        wait_until(lambda: Path(f"/proc/{asleep.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    began = time.monotonic()
    assert shell.run(f"{words} echo early").stdout == "early\n" and time.monotonic() - began < 30
    assert asleep.poll() is None
    asleep.send_signal(signal.SIGCONT)
    assert asleep.communicate(timeout=30)[0] == "late\n"
