"The folder in which programs share what is promised: where it is, and whatever may happen to it and to its files"
import contextlib
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TOTAL, HELD = 24_000, 20_000   # MiB of the device, and what a holder has of it
AT_ONCE = 1.5                  # seconds: what does not wait takes no longer, on a busy machine

# A program that does what it is told: lines of JSON come in, an answer to each goes out
PROGRAM = """if True:
    import json, os, sys, time
    from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
    from cjm_fasthtml_resources.core.manager import ResourceManager
    from cjm_fasthtml_resources.core.store import Store, StoreError, store_path
    from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
    driver = SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]).start()
    manager, held = None, []

    def use(): return manager or ResourceManager(app="folder")

    def open():
        global manager
        manager = use()
        return len(manager.get_claims())

    def reserve(memory):
        held.append(use().reserve(memory, timeout=0))
        return "granted"

    def release(): return [one.release() for one in held] and (held.clear() or "released")
    def claims(): return [claim.memory//2**20 for claim in use().get_claims()]
    def chdir(folder): return os.chdir(folder)

    def look():
        took, mine = [], use()
        calls = mine.get_claims, mine.check_gpu_availability, mine.get_all_workers, mine.check_memory_availability
        for call in calls:
            began = time.monotonic()
            call()
            took.append(time.monotonic() - began)
        return max(took)

    def work(times=1):
        for _ in range(times):
            use().register_worker(os.getpid(), "llm", "job", plugin_name="vllm")
            use().update_worker_state(os.getpid(), status="idle")
        use().unregister_worker(os.getpid())

    def stand_in_transaction():
        with Store(store_path()).transaction() as db:
            print(json.dumps("in it"), flush=True)
            sys.stdin.readline()

    if __name__ == "__main__":
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            try: answer = globals()[name](*arguments)
            except (StoreError, ResourceBusy, ResourceUnavailable) as error:
                answer = dict(error=type(error).__name__, text=str(error))
            except BaseException as error: answer = dict(error="no words", text=f"{type(error).__name__}: {error}")
            print(json.dumps(answer), flush=True)
"""


class Program:
    "A program that does what it is told"
    def __init__(self, *before: str, **env: str | None) -> None:
        there = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
        self.process = subprocess.Popen([*before, sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=there)

    def begin(self, name: str, *arguments: Any) -> None:
        self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        return json.loads(line) if line else f"it ended: {self.process.stderr.read()}"

    def do(self, name: str, *arguments: Any) -> Any:
        self.begin(name, *arguments)
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def program() -> Iterator[Callable[..., Program]]:
    "Start programs that end with the test"
    started: list[Program] = []

    def start(*before: str, **env: str | None) -> Program:
        started.append(Program(*before, **env))
        return started[-1]

    yield start
    for one in started: one.end()


def refused(answer: Any, folder: Path) -> bool:
    "Whether it is a no: somebody has the memory, or the file cannot be used, which is said with its name"
    if not isinstance(answer, dict) or answer["error"] == "no words": return False
    return answer["error"] != "StoreError" or str(folder) in answer["text"]


# What may happen to the files

def of_kind(folder: Path, kind: str) -> list[Path]:
    "The database, the lock file, or all that is there but the counts of events, which promise nothing"
    files = [path for path in folder.iterdir() if path.suffix != ".events"]
    return [path for path in files if kind == "all" or kind in path.name.rpartition(".")[2]]


def each(kind: str, act: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    "Something that is done to each file of a kind; the second path is a copy from before anything was promised"
    def harm(folder: Path, copy: Path) -> None:
        for path in of_kind(folder, kind): act(path, copy/path.name)
    return harm


def remove(path: Path, copy: Path) -> None: path.unlink()
def empty(path: Path, copy: Path) -> None: os.truncate(path, 0)
def halve(path: Path, copy: Path) -> None: os.truncate(path, path.stat().st_size//2)
def garble(path: Path, copy: Path) -> None:
    with path.open("r+b") as file: file.write(b"\xff"*min(path.stat().st_size, 6_000))


def put_new(path: Path, copy: Path) -> None:
    "An empty one is put into its place"
    (new := path.with_name("new")).touch(0o600)
    new.rename(path)


def put_back(path: Path, copy: Path) -> None:
    "A backup from before is put into its place"
    shutil.copy2(copy, new := path.with_name("new"))
    new.rename(path)


def write_back(path: Path, copy: Path) -> None:
    "A backup from before is written into it"
    path.write_bytes(copy.read_bytes())


def remove_folder(folder: Path, copy: Path) -> None: shutil.rmtree(folder)
def move_folder(folder: Path, copy: Path) -> None: folder.rename(folder.with_name("elsewhere"))


def exchange_folder(folder: Path, copy: Path) -> None:
    shutil.copytree(folder, new := folder.with_name("new"))
    new.chmod(0o700)
    folder.rename(folder.with_name("elsewhere"))
    new.rename(folder)


HARMS: dict[str, Callable[[Path, Path], None]] = {
    f"{act.__name__} {kind}": each(kind, act) for kind in ("sqlite", "lock", "all")
    for act in (remove, empty, halve, garble, put_new, put_back, write_back)}
HARMS |= {act.__name__: act for act in (remove_folder, move_folder, exchange_folder)}


def backed_up(folder: Path, tmp_path: Path, start: Callable[..., Program]) -> Path:
    "A copy of the folder from before anything was promised"
    first = start()
    assert first.do("work") is None
    first.end()
    return Path(shutil.copytree(folder, tmp_path/"copy"))


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_whatever_happens_to_the_files_nothing_is_promised_twice(folder, tmp_path, program, harm):
    copy = backed_up(folder, tmp_path, program)
    holder, early, new = program(), program(), program()
    assert holder.do("reserve", HELD) == "granted"
    assert early.do("reserve", 1_000) == "granted"
    harm(folder, copy)
    for who, what in ((new, "a new program"), (early, "one that was there before"), (holder, "the holder itself")):
        answer = who.do("reserve", HELD)
        assert answer != "granted", f"{what} is promised the same memory"
        assert refused(answer, folder), f"{what} is told {answer}"
    for who in (early, holder):
        answer = who.do("release")
        assert answer == "released" or refused(answer, folder), f"a release ends with {answer}"
    for who in (holder, early, new): who.end()
    late = program()
    assert late.do("reserve", TOTAL) == "granted", "when all have ended, a new program cannot begin anew"
    assert late.do("release") == "released"


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_when_nobody_holds_anything_the_files_are_made_anew(folder, tmp_path, program, harm):
    copy = backed_up(folder, tmp_path, program)
    early, new = program(), program()
    assert early.do("open") == 0
    harm(folder, copy)
    answer = early.do("reserve", HELD)   # it has the file open as it were, and may say so
    assert answer == "granted" or refused(answer, folder)
    if answer == "granted": assert refused(new.do("reserve", HELD), folder)
    early.end()
    assert new.do("reserve", HELD) == "granted"
    assert new.do("work") is None


STRACE = shutil.which("strace")
needs_strace = pytest.mark.skipif(not STRACE and not os.environ.get("CI"),
                                  reason="needs strace (Debian's package strace)")
ATTACH = ["-f", "-qq", "-e", "trace=%file,%desc"]


@needs_strace
@pytest.mark.parametrize("number", range(1, 7))
def test_a_journal_that_is_deleted_after_a_crash_gives_no_second_yes(folder, tmp_path, program, number):
    backed_up(folder, tmp_path, program)
    holder = program()
    assert holder.do("reserve", HELD) == "granted"
    database, = of_kind(folder, "sqlite")
    killed = program(STRACE, *ATTACH, "-o", "/dev/null", "-P", str(database),
                     "-e", f"inject=pwrite64:signal=KILL:when={number}")
    killed.begin("work", 3)
    assert "it ended" in str(killed.answer())
    for path in folder.glob("*-journal"): path.unlink()
    new = program()
    assert refused(new.do("reserve", HELD), folder)
    assert holder.do("release") == "released"
    holder.end()
    new.end()
    late = program()
    assert late.do("reserve", TOTAL) == "granted" and late.do("work") is None


# Nothing is given by those who cannot lock

@needs_strace
@pytest.mark.parametrize("error", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_a_file_system_without_locks_is_refused_in_words(folder, tmp_path, program, error):
    backed_up(folder, tmp_path, program)
    names = [word for path in (folder, *folder.iterdir(), folder.parent) for word in ("-P", str(path))]
    for fresh in (False, True):
        if fresh: shutil.rmtree(folder)
        one = program(STRACE, *ATTACH, "-o", "/dev/null", *names, "-e", f"inject=fcntl,flock:error={error}")
        answer = one.do("reserve", 1_000)
        assert isinstance(answer, dict) and answer["error"] == "StoreError", answer
        assert str(folder) in answer["text"] and "lock" in answer["text"] and "CJM_RESOURCES_DIR" in answer["text"]


# Look-ups wait for nobody, and write nothing

def test_a_look_up_does_not_wait_for_a_writer_that_is_stopped(folder, program):
    writer, early, new = program(), program(), program()
    assert early.do("work") is None
    assert early.do("reserve", 1_000) == "granted" and early.do("open") == 1
    assert writer.do("stand_in_transaction") == "in it"
    writer.process.send_signal(19)   # SIGSTOP
    for who in (early, new):
        began = time.monotonic()
        took = who.do("look")
        assert isinstance(took, float) and took < AT_ONCE, f"a look-up: {took}"
        assert time.monotonic() - began < 2*AT_ONCE, f"opening it took {time.monotonic() - began:.1f} s"
        assert who.do("claims") == [1_000]
    began = time.monotonic()
    assert early.do("release") == "released" and time.monotonic() - began < AT_ONCE
    assert new.do("claims") == []   # a release does not wait either
    writer.process.send_signal(18)


WRITES = ("write", "pwrite", "writev", "unlink", "rename", "mkdir", "rmdir", "ftruncate", "truncate", "fallocate",
          "link", "symlink", "chmod", "fchmod", "utime", "fsync", "fdatasync")


@needs_strace
def test_a_look_up_writes_nothing(folder, tmp_path, program):
    backed_up(folder, tmp_path, program)
    holder = program()
    assert holder.do("reserve", 1_000) == "granted"
    names = [word for path in (folder, *folder.iterdir()) for word in ("-P", str(path))]
    one = program(STRACE, *ATTACH, "-o", str(log := tmp_path/"log"), *names, "-P", "/before", "-P", "/after")
    assert one.do("open") == 1 and isinstance(one.do("look"), float)
    assert one.do("chdir", "/before")["text"].startswith("FileNotFoundError")
    for _ in range(3): assert isinstance(one.do("look"), float)
    assert one.do("chdir", "/after")["text"].startswith("FileNotFoundError")
    holder.end()   # and when there is something to tidy up
    assert one.do("claims") == []
    one.end()
    before, _, rest = log.read_text().partition("/before")
    looks, _, after = rest.partition("/after")
    writes = re.compile(rf"\b({'|'.join(WRITES)})\w*\(|O_CREAT|O_TRUNC")
    for part in (looks, after): assert [line for line in part.splitlines() if writes.search(line)] == []
    assert "fcntl" in looks or "openat" in looks   # it was seen at all


# One place for all programs of a user

def test_a_relative_folder_is_resolved_once(tmp_path, program):
    for name in ("a", "b"): (tmp_path/name).mkdir()
    one, other = (program(CJM_RESOURCES_DIR="state") for _ in range(2))
    assert one.do("chdir", str(tmp_path/"a")) is None
    assert one.do("reserve", HELD) == "granted"
    assert one.do("chdir", str(tmp_path/"b")) is None
    assert one.do("claims") == [HELD]   # of a new manager in the same process
    assert not (tmp_path/"b"/"state").exists()
    assert other.do("chdir", str(tmp_path/"a")) is None
    assert refused(other.do("reserve", HELD), Path("state"))


def can_unshare() -> bool:
    command = ["unshare", "-m", "--uts", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


needs_namespaces = pytest.mark.skipif(not can_unshare(), reason="needs root: to make mount namespaces")


@pytest.fixture
def at_home(program, tmp_path) -> Callable[..., Program]:
    "Start programs that share in the user's home, where a folder of this test lies above the real one for them alone"
    real = Path(pwd.getpwuid(os.geteuid()).pw_dir)/".local/state"
    real.mkdir(parents=True, exist_ok=True)
    (tmp_path/"home").mkdir(mode=0o700)

    def start(*shell: str, **env: str | None) -> Program:
        lines = ["set -e", f"mount --bind {tmp_path/'home'} {real}", *shell, 'exec "$@"']
        return program("unshare", "-m", "--uts", "--propagation", "private", "sh", "-c", "; ".join(lines), "sh",
                       **{"CJM_RESOURCES_DIR": None, **env})
    return start


LOGINS: dict[str, dict[str, str | None]] = {
    "cron": dict(HOME=None, USER=None, LOGNAME=None, SHELL="/bin/sh"),
    "another HOME": dict(HOME="/nowhere"),
    "HOME is /": dict(HOME="/"),
    "XDG folders": {f"XDG_{name}": "/nowhere" for name in ("STATE_HOME", "DATA_HOME", "CACHE_HOME", "RUNTIME_DIR")},
    "TMPDIR": dict(TMPDIR="/nowhere"),
    "sudo": dict(USER="somebody", LOGNAME="somebody", SUDO_USER="somebody"),
}


@needs_namespaces
def test_all_programs_of_a_user_meet_at_one_place(at_home, tmp_path):
    holder = at_home()
    assert holder.do("reserve", HELD) == "granted"
    for name, env in LOGINS.items(): assert at_home(**env).do("claims") == [HELD], name
    assert at_home("hostname elsewhere").do("claims") == [HELD], "another host name"
    assert refused(at_home(HOME=None).do("reserve", HELD), tmp_path)


@needs_namespaces
def test_programs_whose_temporary_folders_are_private_meet(at_home):
    there = [sys.prefix, sys.base_prefix, os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)]
    hidden = [place for place in ("/tmp", "/var/tmp", "/dev/shm", "/run/user") if os.path.isdir(place)
              and not any(path.startswith(place + "/") for path in there)]
    private = [f"mount -t tmpfs none {place}" for place in hidden]
    holder, other = at_home(*private), at_home()
    assert holder.do("reserve", HELD) == "granted"
    assert other.do("claims") == [HELD] and at_home(*private).do("claims") == [HELD]


# No home, no entry

WITHOUT_ENTRY = """if True:
    import contextlib, io, os, sys, tempfile
    from cjm_fasthtml_resources.cli import main
    from cjm_fasthtml_resources.core.manager import ResourceManager
    from cjm_fasthtml_resources.core.store import StoreError
    from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
    def use(**options):
        manager = ResourceManager(**options)
        manager.check_gpu_availability()
        manager.check_memory_availability()
        with manager.reserve(100, timeout=0): pass
        manager.register_worker(os.getpid(), "llm")
    def command():
        try: main(["--json"])
        except SystemExit as end: return end.code
    with SimulatedDriver([SimulatedGpu()]):
        os.environ["CJM_RESOURCES_DIR"] = sys.argv[1] + "/warm"
        use(app="a")
        with contextlib.redirect_stdout(io.StringIO()): command()   # all that is imported late
        os.mkdir(sys.argv[1] + "/theirs", 0o700)
        os.chown(sys.argv[1] + "/theirs", 54321, 54321)
        for name in ("CJM_RESOURCES_DIR", "HOME"): os.environ.pop(name, None)
        if sys.argv[2:]: os.environ["HOME"] = sys.argv[2]
        os.setgroups([])
        os.setgid(54321)
        os.setuid(54321)
        use()                                                       # in memory, it needs no file
        with contextlib.redirect_stdout(io.StringIO()) as shown: code = command()
        print("command", code, "memory" in shown.getvalue())
        try: use(app="a")
        except StoreError as error: print(error)
        os.environ["CJM_RESOURCES_DIR"] = sys.argv[1] + "/theirs/state"
        use(app="a")
        print("works", flush=True)"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: to become another user")
@pytest.mark.parametrize("home", [[], ["/"], ["/nowhere"]], ids=["no HOME", "HOME is /", "HOME is not there"])
def test_a_user_without_an_entry_is_told_what_to_set(home):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        out = subprocess.run([sys.executable, "-c", WITHOUT_ENTRY, folder, *home], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    command, said, works = out.stdout.splitlines()
    assert command.split()[0] == "command" and command.split()[2] == "True" and works == "works"
    assert "54321" in said and "CJM_RESOURCES_DIR" in said
    assert out.stderr == f"Cannot read the reservations: {said}\n"


@needs_namespaces
def test_the_plain_command_needs_no_home_and_makes_no_file(tmp_path):
    real = Path(pwd.getpwuid(os.geteuid()).pw_dir)/".local/state"
    real.mkdir(parents=True, exist_ok=True)
    (tmp_path/"home").mkdir()
    env = {name: value for name, value in os.environ.items() if name not in ("HOME", "CJM_RESOURCES_DIR")}
    program = Path(sys.executable).with_name("cjm-resources")
    script = f'mount --bind -o ro {tmp_path/"home"} {real}; exec "$@"'
    out = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", program, "--simulate", "shared"], env=env,
                         capture_output=True, text=True)
    assert out.returncode in (0, 1) and "Traceback" not in out.stderr and "GPU" in out.stdout, out.stderr
    assert list((tmp_path/"home").iterdir()) == []


# A program that opens it, forks and ends, as gunicorn --preload and daemons do

DAEMON = """if True:
    import os, sys
    from cjm_fasthtml_resources.core.manager import ResourceManager
    from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
    holds, forks = sys.argv[1] == "holds", int(sys.argv[2])
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
        manager = ResourceManager(app="folder")
        manager.get_claims()
        manager.register_worker(os.getpid(), "server")
        if holds: parents = manager.reserve(10_000, timeout=0)
        for _ in range(forks):
            if os.fork(): os._exit(0)
            os.setsid()
        manager.check_gpu_availability()
        print("began", flush=True)
        sys.stdin.readline()
        held = manager.reserve(20_000, timeout=0)
        print("held", [claim.memory >> 20 for claim in manager.get_claims()], flush=True)
        sys.stdin.readline()
        print("released", held.release(), flush=True)"""


@pytest.mark.parametrize("holds", ["holds", "holds not"])
@pytest.mark.parametrize("forks", [1, 2])
def test_what_a_daemon_reserves_is_its_own_and_seen_by_all(folder, program, holds, forks):
    daemon = subprocess.Popen([sys.executable, "-c", DAEMON, holds, str(forks)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    try:
        assert daemon.stdout.readline() == "began\n"
        passing, other = program(), program()
        assert passing.do("claims") == []   # what the parent held is over, although its child lives
        passing.end()
        daemon.stdin.write("\n")
        daemon.stdin.flush()
        assert daemon.stdout.readline() == "held [20000]\n"
        assert other.do("claims") == [20_000] and refused(other.do("reserve", HELD), folder)
        daemon.stdin.write("\n")
        daemon.stdin.flush()
        assert daemon.stdout.readline() == "released True\n"
        assert other.do("reserve", HELD) == "granted"
    finally:
        daemon.kill()
        daemon.communicate()


def test_what_a_holder_started_does_not_hold_for_it(folder, program):
    "A child program inherits no lease, also if it is given all descriptors"
    code = """if True:
        import os, subprocess, sys
        from cjm_fasthtml_resources.core.manager import ResourceManager
        from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
        with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
            held = ResourceManager(app="folder").reserve(20_000, timeout=0)
            nothing = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            child = subprocess.Popen(["sleep", "600"], close_fds=False, **nothing)
            print(child.pid, flush=True)
            os.kill(os.getpid(), 9)"""
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try: assert program().do("reserve", HELD) == "granted"
    finally:
        with contextlib.suppress(ProcessLookupError): os.kill(int(out.stdout), 9)
