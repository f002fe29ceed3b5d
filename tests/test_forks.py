"A fork while other threads are anywhere in the library; walk_forks.py has the long form"
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ipywidgets")
pytest.importorskip("fasthtml", reason="the extra web is not installed")
pytest.importorskip("prometheus_client", reason="the extra prometheus is not installed")

import walk_forks  # noqa: E402

import cjm_fasthtml_resources  # noqa: E402


@pytest.mark.parametrize("app", [None, "walk"], ids=["in memory", "with a file"])
@pytest.mark.parametrize("name", walk_forks.OPERATIONS)
def test_a_child_uses_everything_wherever_another_thread_of_its_parent_was(name, app, monkeypatch, tmp_path):
    "At a few lines of each operation; python tests/walk_forks.py is about all of them"
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path/"state"))
    tried, wrong = walk_forks.walk(name, app, sample=4, seed=1)
    assert tried and not wrong, "\n".join(wrong)


def run(script: str, *options: str) -> str:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", *options, "-c", script]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    return out.stdout + out.stderr


def test_a_hook_that_raises_is_logged_and_the_others_are_called_once():
    assert run("""
import os
from cjm_fasthtml_resources.core.forks import reset_in_child

class Counts:
    calls = 0
    def __hash__(self): raise TypeError       # it need not be hashable
    def __eq__(self, other): raise TypeError
    def after_fork(self): self.calls += 1

class Broken:
    def after_fork(self): raise KeyboardInterrupt

first, broken, last = reset_in_child(Counts()), reset_in_child(Broken()), reset_in_child(Counts())
reset_in_child(first)
gone = reset_in_child(Counts())
del gone
if os.fork() == 0:
    if os.fork() == 0: os._exit(10*first.calls + last.calls)
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
print(os.waitstatus_to_exitcode(os.wait()[1]), first.calls)
""").count("resetting Broken after a fork failed") == 2    # in the child and in its child


def test_a_grandchild_of_a_daemon_and_the_children_of_multiprocessing_use_everything():
    "As a daemon's double fork does, and each start method"
    assert run("""
import multiprocessing, os, sys, threading, time
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

def use():
    with SimulatedDriver([SimulatedGpu()]):
        heard = threading.Event()
        with ResourceMonitor(ResourceManager()).subscribe(lambda sample: heard.set()):
            return 0 if heard.wait(20) and ResourceManager().check_gpu_availability().devices else 1

def child(): sys.exit(use())

if __name__ == "__main__":
    found = [use()]
    for method in ("fork", "forkserver"):
        process = multiprocessing.get_context(method).Process(target=use if method == "forkserver" else child)
        process.start()
        process.join(30)
        found.append(process.exitcode)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: os._exit(use())
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
    found.append(os.waitstatus_to_exitcode(os.wait()[1]))
    print(found)
""".replace('("fork", "forkserver")', '("fork",)')) == "[0, 0, 0]\n"


def test_what_another_thread_was_importing_can_be_imported_in_the_child(tmp_path):
    "The first check of a server imports pynvml on a thread, and its workers are forked right then"
    (tmp_path/"pynvml.py").write_text("import time; time.sleep(0.5); from real_nvml import *; import real_nvml; "
                                      "libLoadLock = real_nvml.libLoadLock")
    out = run(f"""
import sys, os, threading, time, importlib.util
spec = importlib.util.find_spec("pynvml")
real = importlib.util.spec_from_file_location("real_nvml", spec.origin)
sys.modules["real_nvml"] = importlib.util.module_from_spec(real)
real.loader.exec_module(sys.modules["real_nvml"])
sys.path.insert(0, {str(tmp_path)!r})
from cjm_fasthtml_resources.core.gpu import read_gpus
threading.Thread(target=read_gpus, daemon=True).start()
while "pynvml" not in sys.modules: time.sleep(0.01)
if os.fork() == 0: os._exit(10 if read_gpus(10).late else 0)
print(os.waitstatus_to_exitcode(os.wait()[1]))
""")
    assert out == "0\n"


def test_a_fork_does_not_wait_for_a_thread_that_is_inside():
    assert run("""
import os, threading, time
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
from cjm_fasthtml_resources.ui.stream import Hub
with SimulatedDriver([SimulatedGpu()]) as driver:
    manager = ResourceManager()
    hub = Hub(ResourceMonitor(manager))
    def hold():
        with manager.workers.lock, manager.needs._lock, hub._lock, hub._drawing, hub.monitor._changed: time.sleep(5)
    threading.Thread(target=hold, daemon=True).start()
    driver.hang("nvmlDeviceGetTemperature")
    threading.Thread(target=manager.check_gpu_availability, daemon=True).start()
    time.sleep(0.2)
    began = time.monotonic()
    if os.fork() == 0:
        driver.recover()
        hub.publish(hub.monitor.take())
        os._exit(0 if manager.check_gpu_availability().devices else 1)
    print(time.monotonic() - began < 1, os.waitstatus_to_exitcode(os.wait()[1]), time.monotonic() - began < 4)
""") == "True 0 True\n"


@pytest.mark.parametrize("change", ["changing", "transaction"])
@pytest.mark.parametrize("who", ["parent", "other", "child"])
def test_a_fork_while_another_thread_changes_the_files_leaves_them_free(tmp_path, change, who):
    "A server's workers are forked at any moment, and live for days"
    assert run(f"""
import os, threading
os.environ["CJM_RESOURCES_DIR"] = {str(tmp_path/"state")!r}
from cjm_fasthtml_resources.core import database, lockfile
from cjm_fasthtml_resources.core.store import Store, StoreError, store_path
for module in (lockfile, database): module.BUSY_SECONDS = 1
mine, inside, go_on = Store(store_path()), threading.Event(), threading.Event()
mine.prepare()

def is_free(store):
    try:
        with store.reading(): pass
        with store.changing(): pass
        with store.transaction(): pass
    except StoreError as error: return str(error)
    return True

def hold():
    with mine.{change}():
        inside.set()
        go_on.wait()

thread = threading.Thread(target=hold)
thread.start()
inside.wait()
read, write = os.pipe()
if (child := os.fork()) == 0:
    os.read(read, 1)   # until the parent is ready
    if {who!r} == "child": print(is_free(mine), flush=True)
    os._exit(0)
go_on.set()
thread.join()
if {who!r} == "parent": print(is_free(mine), flush=True)
if {who!r} == "other": print(is_free(Store(store_path())), flush=True)
os.write(write, b"x")
os.waitpid(child, 0)
""") == "True\n"


def test_no_property_has_a_lock_of_its_own():
    "Until Python 3.12 a `cached_property` has one lock for all objects, which a fork's child finds taken for ever"
    sources = list(Path(cjm_fasthtml_resources.__file__).parent.rglob("*.py"))
    assert sources and not [str(path) for path in sources if "import cached_property" in path.read_text()]


@pytest.mark.parametrize("entered", [False, True])
def test_a_request_and_a_reservation_of_the_parent_are_nothing_in_the_child(tmp_path, monkeypatch, entered):
    "Two processes would count on one reservation; a child's watched process would end its parent's"
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path/"state"))
    out = run(f"""
import gc, os, subprocess, sys
from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.core.reservations import ReservationOver
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

def refused(call, *errors):
    try: call()
    except errors: return 1
    return 0

with SimulatedDriver([SimulatedGpu(memory_total_mb=24000)]):
    manager, sleeper = ResourceManager(app="a"), subprocess.Popen(["sleep", "30"])
    first = manager.reserve(20000, timeout=0)
    request, theirs = manager.request(20000), manager.request(2000, pid=sleeper.pid)
    if {entered}: request.poll()
    assert theirs.poll() is None if {entered} else theirs.poll()
    with manager.job("j", 1000, timeout=0) if not {entered} else first as job:
        if os.fork() == 0:
            held = job.reservation if not {entered} else job
            done = refused(request.poll, RuntimeError) + refused(lambda: held.hand_over(held.holder), ReservationOver)
            done += refused(held.keep_over_exec, ReservationOver) + (not held.renew(1) and not held.release())
            if not {entered}: done += refused(lambda: job.watch(sleeper.pid), ReservationOver) - 1
            del theirs
            gc.collect()
            sys.exit(done)
        print(os.waitstatus_to_exitcode(os.wait()[1]), len(manager.get_claims()))
    first.release()
    print(request.wait().gpu_memory_mb)
    sleeper.kill()
""")
    assert out.split() == ["4", "3", "20000.0"]


def test_only_the_child_of_a_fork_that_waited_in_vain_takes_the_database_for_damaged(tmp_path, monkeypatch):
    code = """
import os, threading, time
from cjm_fasthtml_resources.core import database, forks
from cjm_fasthtml_resources.core.manager import ResourceManager

def fork() -> str:
    "Fork, and say whether a new manager takes the database for damaged: in the child, and in the parent"
    if not (pid := os.fork()):
        ResourceManager(app="child", track_self=False).get_all_workers()
        os._exit(bool(database._poisoned))
    in_child = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    leave.set()
    ResourceManager(app="parent", track_self=False)
    return f"{in_child} {int(forks.waited_in_vain())} {len(database._poisoned)}"

ResourceManager(app="first", track_self=False).register_worker(os.getppid(), "llm")
inside, leave = threading.Event(), threading.Event()
print(fork())
leave.clear()
def stay():
    with forks.no_fork():
        inside.set()
        leave.wait()

threading.Thread(target=stay).start()
inside.wait()
print(fork())
"""
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (out.stdout.splitlines(), out.stderr) == (["0 0 0", "1 0 0"], "")
