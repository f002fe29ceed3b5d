"What a program can do to its own descriptors, home and boot, and what a reading that fails is taken for"
import errno
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cjm_fasthtml_resources.core import folder, leases
from cjm_fasthtml_resources.core.folder import StoreError, boot_id, home_folder
from cjm_fasthtml_resources.core.forks import no_fork
from cjm_fasthtml_resources.core.lockfile import in_gate
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.process import ProcessId, read_start
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

DAEMONISED = """import gc, os, sys
from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
    manager = ResourceManager(app="first")
    before = manager.reserve(1_000)
    os.closerange(3, 100)
    try: manager.reserve(1_000)
    except Exception as error: print(type(error).__name__, error)
    second = ResourceManager(app="second")
    held = second.reserve(20_000)
    del manager, before
    gc.collect()
    print("held", flush=True)
    sys.stdin.read()"""


def busy(total: int = 24_000) -> SimulatedDriver: return SimulatedDriver([SimulatedGpu(memory_total_mb=total)])


def test_an_old_manager_never_closes_the_lock_of_a_new_one_after_a_daemoniser_has_closed_all(tmp_path):
    env = {**os.environ, "CJM_RESOURCES_DIR": str(tmp_path/"state")}
    with subprocess.Popen([sys.executable, "-c", DAEMONISED], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as program:
        said = program.stdout.readline()
        assert said.startswith("StoreError") and "Create the ResourceManager after that" in said
        assert program.stdout.readline() == "held\n"
        asked = "from cjm_fasthtml_resources import ResourceManager\n" \
                "from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu\n" \
                "with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):\n" \
                "    ResourceManager(app='other').reserve(20_000, timeout=0)"
        other = subprocess.run([sys.executable, "-c", asked], env=env, capture_output=True, text=True)
        assert "ResourceBusy" in other.stderr
        program.stdin.close()


def test_a_boot_id_that_cannot_be_read_now_is_an_error_and_is_read_again(monkeypatch):
    class Unreadable:
        def read_text(self): raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    known = boot_id()
    boot_id.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(folder, "as_path", lambda path: Unreadable() if str(path) == folder._BOOT_ID else path)
        with pytest.raises(StoreError, match="out of file descriptors"): boot_id()
    assert boot_id() == known


@pytest.mark.parametrize("home", ["", ".", "ada"])
def test_a_home_that_is_relative_is_refused(monkeypatch, home):
    monkeypatch.setattr("pwd.getpwuid", lambda uid: SimpleNamespace(pw_dir=home))
    with pytest.raises(StoreError, match="not an absolute path: set CJM_RESOURCES_DIR"): home_folder()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EIO])
def test_marks_that_cannot_be_read_now_are_not_taken_for_missing(monkeypatch, tmp_path, number):
    def refused(path): raise OSError(number, os.strerror(number))

    path = tmp_path/"state"/"resources.lock"
    assert leases.hides_any(path, []) is False          # no folder, no mark
    monkeypatch.setattr(leases, "OpenFolder", refused)
    with pytest.raises(StoreError): leases.hides_any(path, [])
    with pytest.raises(StoreError): leases.is_used_elsewhere(path)


def test_a_signal_handler_that_interrupts_a_no_fork_block_gets_an_error_at_once(tmp_path):
    path = tmp_path/"resources.lock"
    with no_fork(), pytest.raises(StoreError, match="change it outside of that"): in_gate(path).__enter__()
    with in_gate(path): pass


@pytest.mark.parametrize("whose", ["a child's", "its own"])
def test_the_first_object_of_a_reservation_that_was_handed_over_still_releases_it(monkeypatch, tmp_path, whose):
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path/"state"))
    child = subprocess.Popen(["sleep", "60"])
    try:
        pid = child.pid if whose == "a child's" else os.getpid()
        with busy():
            manager = ResourceManager(app="a")
            held = manager.reserve(20_000)
            given = held.hand_over(ProcessId(pid, read_start(pid)))
            assert held.release() is True and manager.get_claims() == []
            assert given.release() is False
            manager.reserve(20_000, timeout=0).release()
    finally:
        child.kill()
        child.wait()


def test_ram_that_cannot_be_read_is_unavailable_in_words_wherever_it_is_shown(monkeypatch):
    from cjm_fasthtml_resources.core import memory
    from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
    from cjm_fasthtml_resources.core.resources import ResourceStatus
    from cjm_fasthtml_resources.core.samples import take_sample
    from cjm_fasthtml_resources.ui.panel import ResourcePanel

    def refused(): raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/proc/meminfo")

    monkeypatch.setattr(memory, "_read_figures", lambda path: {})     # as with /proc mounted with subset=pid
    monkeypatch.setattr("psutil.virtual_memory", refused)
    monkeypatch.setattr(memory, "simulated", None)
    manager = ResourceManager()
    found = manager.check_memory_availability()
    assert found.status is ResourceStatus.UNAVAILABLE and found.memory.room == 0
    assert found.message == "Cannot read RAM usage: the system does not report it here."
    assert "Cannot read RAM usage" in take_sample(manager).memory.message
    with pytest.raises((ResourceBusy, ResourceUnavailable, ValueError)): manager.reserve(memory_mb=1, timeout=0)
    panel = ResourcePanel(manager, interval=3600)
    panel._show(take_sample(manager))
    panel.close()


WITHOUT_DESCRIPTORS = """import os, sys
from cjm_fasthtml_resources import ResourceManager
from cjm_fasthtml_resources.core.folder import StoreError
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
USES = dict(reserve=lambda: manager.reserve(1_000, timeout=0).release(), claims=lambda: manager.get_claims(),
            job=lambda: manager.job("job-1", 1_000, timeout=0).__enter__().__exit__(None, None, None),
            register=lambda: manager.register_worker(os.getpid(), "llm"), workers=lambda: manager.get_all_workers())
with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
    manager, use, taken = ResourceManager(app="chat", track_self=False), USES[sys.argv[1]], []
    try:
        while True: taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError: pass
    try: use()
    except StoreError as error: said = str(error)
    for fd in taken: os.close(fd)
    print(said)
    use()"""


@pytest.mark.parametrize("use", ["reserve", "claims", "job", "register", "workers"])
def test_without_a_free_descriptor_each_call_says_so_also_where_it_imports(use, tmp_path):
    "And it works afterwards"
    env = {**os.environ, "CJM_RESOURCES_DIR": str(tmp_path/"state")}
    limits = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); "
    command = [sys.executable, "-c", f"{limits}exec(sys.argv.pop())", use, WITHOUT_DESCRIPTORS]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert "is out of file descriptors (ulimit -n)" in ended.stdout and ended.returncode == 0, ended.stderr
