"Several processes of one app: the same workers in each, and the command that waits"
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from cjm_fasthtml_resources.core import database, learned, lockfile
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.resources import ResourceStatus
from cjm_fasthtml_resources.core.store import StoreError, store_path
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

SERVER = """import json, sys
from cjm_fasthtml_resources.core.manager import ResourceManager
manager = ResourceManager(app="app")
for line in sys.stdin:
    name, args, kwargs = json.loads(line)
    result = getattr(manager, name)(*args, **kwargs)
    print(json.dumps(result, default=lambda state: vars(state)), flush=True)"""


class Server:
    "Another process of the app, which is told what to do"
    def __init__(self, process): self.process = process
    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.process.stdin.write(json.dumps([name, args, kwargs]) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        return call


@pytest.fixture
def server(folder, spawn): return Server(spawn(SERVER))


def on_disk():
    "What every file of the folder has"
    return b"".join(path.read_bytes() for path in sorted(store_path().parent.iterdir()))


def test_what_one_process_does_the_others_see(server, spawn):
    worker, mine = spawn("input()"), ResourceManager(app="app")
    config = {"model": "llama-3-8b", "api_key": "sk-1"}
    state = mine.register_worker(worker.pid, "llm", "job-1", "vllm", "vLLM", "llama-3-8b", config)
    seen = server.get_worker_by_pid(worker.pid)
    shown = dict(model="llama-3-8b", api_key="<str, 4 characters>")
    assert seen == dict(vars(state), config=shown, child_pids=[], waiting_jobs=[])
    assert server.get_worker_by_job("job-1")["pid"] == worker.pid
    written = on_disk()
    assert b"llama-3-8b" in written and b"sk-1" not in written
    server.update_worker_state(worker.pid, status="idle")
    assert (mine.get_worker_by_pid(worker.pid).status, mine.get_worker_by_job("job-1")) == ("idle", None)
    assert mine.get_worker_by_pid(worker.pid).config["api_key"] == "sk-1"  # who registered it keeps its secrets
    assert server.unregister_worker(worker.pid)["pid"] == worker.pid
    assert mine.get_all_workers() == [] == ResourceManager(app="other").get_all_workers()
    assert b"sk-1" not in on_disk()


def test_order_jobs_and_children_are_shared(server, spawn):
    first, second, third, mine = spawn("input()"), spawn("input()"), spawn("input()"), ResourceManager(app="app")

    class Plugin:
        def get_child_pids(self): return [third.pid]

    server.register_worker(second.pid, "llm", "job")
    mine.register_worker(first.pid, "llm", "job", plugin_instance=Plugin())  # takes the job from the other's worker
    assert [(w["pid"], w["job_id"]) for w in server.get_all_workers()] == [(second.pid, None), (first.pid, "job")]
    assert server.get_all_related_pids(first.pid) == [first.pid, third.pid]
    server.register_worker(second.pid, "llm")  # registered anew, it stands last
    assert [w.pid for w in mine.get_all_workers()] == [first.pid, second.pid]
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(third.pid, 5_000)])]):
        conflict = ResourceManager(app="app", track_self=False).check_gpu_availability()
        assert conflict.status is ResourceStatus.APP_BUSY and conflict.app_processes[0]["parent_pid"] == first.pid


def test_many_processes_register_at_once_and_none_is_lost(folder, spawn):
    servers, workers = [Server(spawn(SERVER)) for _ in range(4)], [spawn("input()") for _ in range(4)]
    mine = ResourceManager(app="app")

    def work(server, worker):
        for n in range(25):
            server.register_worker(worker.pid, f"type-{n}", f"job-{n}")
            server.update_worker_state(worker.pid, status="idle")

    threads = [threading.Thread(target=work, args=pair) for pair in zip(servers, workers, strict=True)]
    for t in threads: t.start()
    while any(t.is_alive() for t in threads):
        seen = mine.get_all_workers()
        assert len({w.pid for w in seen}) == len(seen) <= 4
    found = {w.pid: (w.worker_type, w.status, w.job_id) for w in mine.get_all_workers()}
    assert found == {w.pid: ("type-24", "idle", None) for w in workers}


def test_a_killed_process_leaves_no_half_registration_and_nothing_behind(folder, spawn):
    server, worker, mine = Server(spawn(SERVER)), spawn("input()"), ResourceManager(app="app")
    server.register_worker(worker.pid, "llm")
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    assert [w.pid for w in ResourceManager(app="app").get_all_workers()] == [worker.pid]  # it lives on, so it stays
    worker.kill()
    worker.wait()
    assert ResourceManager(app="app").get_all_workers() == [] == mine.get_all_workers()


def test_another_processes_worker_can_be_stopped(server, spawn):
    worker, mine = spawn("input()"), ResourceManager(app="app", track_self=False)
    server.register_worker(worker.pid, "llm")
    assert mine.stop_worker(worker.pid).worker_type == "llm"
    worker.wait()
    assert server.get_all_workers() == []


def test_a_change_that_cannot_be_written_has_not_happened(folder, spawn, monkeypatch):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    mine, worker = ResourceManager(app="app"), spawn("input()")
    other = sqlite3.connect(store_path())
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match="has been locked by another"): mine.register_worker(worker.pid, "llm", "job-1")
    other.rollback()
    assert mine.get_all_workers() == [] and mine.get_worker_by_job("job-1") is None
    assert mine.register_worker(worker.pid, "llm", "job-1") == mine.get_worker_by_job("job-1")


@pytest.mark.parametrize("suffix, said", [
    (".sqlite", "was removed while other programs use it"),
    (".lock", "was removed or replaced while this program uses it")])
def test_ram_is_answered_without_the_file_and_a_gpu_is_never_available(folder, suffix, said):
    mine = ResourceManager(app="app")
    os.remove(store_path().with_suffix(suffix))
    with SimulatedDriver([SimulatedGpu()]):
        conflict = mine.check_gpu_availability()
        assert conflict.status is ResourceStatus.UNAVAILABLE and said in conflict.reason
        memory = mine.check_memory_availability(100)
        assert memory.memory.memory.total and said in memory.notes[0]
    with pytest.raises(StoreError, match=said): mine.get_all_workers()
    with pytest.raises(StoreError, match="while other programs use it"): ResourceManager(app="late").get_all_workers()


def test_what_a_plugin_needs_is_kept_with_the_app(folder, spawn):
    worker = spawn("input()")
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(worker.pid, 9_800)])]):
        mine = ResourceManager(app="app")
        mine.register_worker(worker.pid, "transcription", plugin_name="whisper", loaded_plugin_resource="large-v3")
        mine.check_gpu_availability()
    mine.needs.write()   # as its thread does
    mine.ledger.store.close()
    assert ResourceManager(app="app").expected_gpu_memory_mb("whisper", "large-v3") == 9_800
    assert ResourceManager(app="other").expected_gpu_memory_mb("whisper", "large-v3") is None


def test_what_no_thread_wrote_is_written_when_the_program_ends_and_not_by_a_child(folder):
    script = """
import os, sys
from unittest.mock import patch
from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.core.threads import NoThreadError
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess
manager = ResourceManager(app="app")
manager.register_worker(os.getpid(), "llm", plugin_name="llama")
with (SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(os.getpid(), 700)])]),
      patch("cjm_fasthtml_resources.core.needs.start_thread", side_effect=NoThreadError)):
    manager.check_gpu_availability()
assert manager.expected_gpu_memory_mb("llama") == 700
child = os.fork()
if child: os.waitpid(child, 0)
elif manager.needs._new: print("the child has it to write")
else: sys.exit()
print(ResourceManager(app="app").expected_gpu_memory_mb("llama"))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("None\n", "")
    assert ResourceManager(app="app").expected_gpu_memory_mb("llama") == 700


# The command

def simulated(tmp_path, *, gpus=1, total=24_000):
    path = tmp_path/"machine.json"
    path.write_text(json.dumps(dict(gpus=[dict(memory_total_mb=total) for _ in range(gpus)])))
    return ["--simulate", str(path)]


def test_wait_runs_the_command_on_that_gpu_and_passes_its_exit_code_on(command, folder, tmp_path):
    code = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], sys.argv[1:]); sys.exit(7)"
    job = [sys.executable, "-c", code, "--gpu-memory", "-x"]
    result = command(*simulated(tmp_path), "wait", "--gpu-memory", "8GiB", "--", *job)
    assert (result.returncode, result.stderr) == (7, ""), result
    assert result.stdout.startswith("GPU-") and result.stdout.endswith("['--gpu-memory', '-x']\n")
    result = command(*simulated(tmp_path), "wait", "--gpu-memory", "8GiB")
    assert result.returncode == 0 and result.stdout.startswith("CUDA_VISIBLE_DEVICES=GPU-")


@pytest.mark.parametrize("args, code, message", [
    (["--gpu-memory", "30GiB"], 2, "30.0 GiB is more than the largest GPU has (23.4 GiB)"),
    (["--gpu-memory", "8GiB", "--device", "3"], 2, "visible to this process"),
    (["--gpu-memory", "1MiB", "--app", "4 2"], 2, "Invalid app name"),
    (["--gpu-memory", "1MiB", "/no/such"], 127, "No such file"),
    (["--gpu-memory", "1MiB", "/"], 126, "ermission denied"),
    (["--gpu-memory", "8000"], 2, "'8000' needs a unit, such as 8000MiB"),
    (["--gpu-memory", "8"], 2, "'8' needs a unit, such as 8GiB"),
    (["--gpu-memory", "8GiB", "--timeot", "10m"], 2, "--timeout"),
    (["--gpu-memory", "8GiB", "--simulate", "idle"], 2, "--simulate belongs before wait"),
    (["--gpu-memory", "1MiB", "--timeout", "soon"], 2, "Examples: 90s")])
def test_what_is_wrong_is_said(command, folder, tmp_path, args, code, message):
    result = command(*simulated(tmp_path), "wait", *args)
    assert result.returncode == code and message in result.stderr and "Traceback" not in result.stderr


def test_the_promise_is_the_commands_and_ends_with_it(command, folder, tmp_path):
    machine = simulated(tmp_path)
    program = os.path.join(os.path.dirname(sys.executable), "cjm-resources")
    waiting = [program, *machine, "wait", "--app", "night", "--gpu-memory", "20000MiB", "--"]
    job = [sys.executable, "-c", "print('on it', flush=True); input()"]
    job = subprocess.Popen([*waiting, *job], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "on it\n"
    busy = command(*machine, "wait", "--gpu-memory", "8GiB", "--timeout", "0.2s")
    assert busy.returncode == 75 and f"a reservation of PID {job.pid}" in busy.stderr
    shown = command(*machine, "--app", "night", "--json", "--exit-code")
    promise, = json.loads(shown.stdout)["gpu"]["devices"][0]["promises"]
    assert (promise["pid"], promise["memory"], promise["app"], shown.returncode) == (job.pid, 20_000*2**20, "night", 10)
    assert str(job.pid) in command(*machine, "--app", "night").stdout
    job.send_signal(signal.SIGTERM)  # reaches the command itself
    assert job.wait() == -signal.SIGTERM
    assert command(*machine, "wait", "--gpu-memory", "20000MiB", "--timeout", "0").returncode == 0


def test_without_a_gpu_it_says_so_at_once(command, folder, tmp_path):
    result = command(*simulated(tmp_path, gpus=0), "wait", "--gpu-memory", "1MiB")
    assert result.returncode == 69 and "lists no GPU" in result.stderr


def test_a_file_that_cannot_be_used_is_named(command, folder, tmp_path):
    folder.mkdir(mode=0o700)
    (folder/"elsewhere").touch()
    store_path().symlink_to(folder/"elsewhere")
    for args in (["--app", "night"], ["wait", "--gpu-memory", "1MiB"]):
        result = command(*simulated(tmp_path), *args)
        assert result.returncode == 74 and f"{store_path()} is a symbolic link" in result.stderr, result


def test_a_bar_on_a_terminal_says_who_is_in_the_way(folder, tmp_path):
    from test_cli import on_terminal
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]), ResourceManager(app="day").reserve(20_000):
        code, written = on_terminal(*simulated(tmp_path), "wait", "--gpu-memory", "8GiB", "--timeout", "0.8")
    assert code == 75 and f"a reservation of PID {os.getpid()}" in written and "GiB free" in written


def test_workers_are_shown(command, folder, tmp_path, spawn):
    worker = spawn("input()")
    plugin = dict(plugin_name="whisper", loaded_plugin_resource="large-v3", config={"api_key": "sk-1"})
    ResourceManager(app="night").register_worker(worker.pid, "transcription", "job-7", **plugin)
    asked = [*simulated(tmp_path), "--app", "night"]
    shown, data = (command(*asked, *more, COLUMNS="120").stdout for more in ([], ["--json"]))
    for text in (str(worker.pid), "transcription", "running", "job-7", "whisper large-v3"): assert text in shown
    assert "sk-1" not in shown + data
    assert json.loads(data)["workers"][0]["job_id"] == "job-7"


def test_a_check_and_a_look_up_wait_for_no_writer_and_write_nothing(folder, monkeypatch, spawn):
    "Also when a plugin has to be asked again, and when a plugin used more than ever before"
    monkeypatch.setattr(lockfile, "BUSY_SECONDS", 2)
    monkeypatch.setattr(learned, "STEADY_SECONDS", 0)   # a running worker's memory is a need at once
    worker, mine = spawn("input()"), ResourceManager(app="app")
    plugin = SimpleNamespace(get_child_pids=lambda: [], get_execution_mode=lambda: str(time.monotonic()),
                             get_managed_resources=dict, force_cleanup=print)   # it always says something else
    mine.register_worker(worker.pid, "llm", "job-1", plugin_name="vllm", plugin_instance=plugin)
    mine.workers.plugins[worker.pid].asked -= 60
    before = (folder/"resources.sqlite").read_bytes()
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(worker.pid, 900)])]), \
            lockfile.in_gate(store_path().with_suffix(".lock")):
        began = time.monotonic()
        assert mine.check_gpu_availability().status is ResourceStatus.APP_BUSY
        assert mine.check_memory_availability().status and mine.get_claims() == []
        assert mine.get_worker_by_job("job-1") and mine.get_all_workers()
        assert ResourceManager(app="app").get_all_workers()
        assert mine.expected_gpu_memory_mb("vllm") == 900
        assert time.monotonic() - began < 1
        assert (folder/"resources.sqlite").read_bytes() == before
