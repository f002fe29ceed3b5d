"""A folder that a group shares: several users and containers in one queue, tried as root with the kernel's own means

The crowd runs for 20 s; `SHARE_SECONDS=60 pytest tests/test_share.py` makes it longer."""
import contextlib
import itertools
import json
import os
import random
import re
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import cjm_fasthtml_resources
from cjm_fasthtml_resources.core.process import pid_namespace

ROOT = Path(cjm_fasthtml_resources.__file__).parents[1]
SECONDS = float(os.environ.get("SHARE_SECONDS", "20"))
GROUP, TOTAL = 54_300, 24_000   # the group's number, which needs no entry; MiB of the device
ALICE, BOB, CLEO, DORA = 54_321, 54_322, 54_323, 54_324   # Dora is not in the group


def allows() -> bool:
    if os.geteuid() or not shutil.which("unshare") or not shutil.which("setpriv"): return False
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "true"]
    return subprocess.run(command, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not allows(), reason="needs root, unshare and setpriv: to be several users")


class Place(NamedTuple):
    "Where a program runs"
    name: str
    user: int
    container: bool = False    # with PIDs of its own, and the folder at another path
    rootless: bool = False     # a container of a user who is not root, as Podman starts it
    member: bool = True


HOSTS = [Place("alice", ALICE), Place("bob", BOB), Place("cleo", CLEO)]
CONTAINERS = [Place("container of bob", BOB, container=True), Place("container of root", 0, container=True)]
ROOTLESS = Place("rootless container of cleo", CLEO, container=True, rootless=True)


class Machine:
    "A folder for programs, and the folder that the group shares, as `cjm-resources share` makes it"
    def __init__(self, folder: Path) -> None:
        self.folder, self.queue, self.elsewhere, self.keep = (folder, *(folder/n for n in ("queue", "mnt", "python")))
        for path in (self.elsewhere, self.keep): path.mkdir()
        folder.chmod(0o755)
        self.logs = folder/"logs"
        self.logs.mkdir()
        self.logs.chmod(0o777)
        share = ("from cjm_fasthtml_resources.commands.share import Group, make_folder; from pathlib import Path; "
                 f"make_folder(Path({str(self.queue)!r}), Group('gpu', {GROUP}))")
        subprocess.run([sys.executable, "-c", share], check=True)

    def _shows_python(self) -> list[str]:
        "Let other users read Python and the library where they lie in a folder that is closed to them, as /root"
        places = {str(Path(place).resolve()) for place in (sys.prefix, sys.base_prefix, ROOT)}
        closed = {place: [str(above) for above in Path(place).parents if not above.stat().st_mode & 0o001]
                  for place in places}
        hidden = sorted(place for place, above in closed.items() if above)
        kept = {place: self.keep/str(number) for number, place in enumerate(hidden)}
        tops = sorted({closed[place][-1] for place in hidden})
        return [*(f"mkdir -p {kept[place]}; mount --bind {place} {kept[place]}" for place in hidden),
                *(f"mount -t tmpfs -o mode=755 none {top}" for top in tops),
                *(f"mkdir -p {place}; mount --bind {kept[place]} {place}" for place in hidden)]

    def start(self, place: Place, code: str, *arguments: str, shell: tuple[str, ...] = (),
              **env: str | None) -> subprocess.Popen[str]:
        "Start Python code there"
        lines = ["set -e", *self._shows_python(), *shell, "umask 077"]
        if place.container: lines.append(f"mount --bind {self.queue} {self.elsewhere}")
        groups = f"--groups {GROUP}" if place.member else "--clear-groups"
        become = f"setpriv --reuid {place.user} --regid {place.user} {groups}"
        if not place.user: become += " --bounding-set -all --inh-caps -all"
        if place.rootless: become += " unshare --user --map-root-user --pid --fork --kill-child"
        namespaces = ["unshare", "--mount", "--propagation", "private"]
        if place.container: namespaces += ["--pid", "--fork", "--kill-child", "--mount-proc"]
        path = self.elsewhere if place.container else self.queue
        given = {**os.environ, "CJM_RESOURCES_DIR": str(path), "HOME": "/", **env}
        return subprocess.Popen([*namespaces, "sh", "-c", "; ".join([*lines, f'exec {become} "$@"']), "sh",
                                 sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
                                env={name: value for name, value in given.items() if value is not None})


@pytest.fixture
def machine() -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder: yield Machine(Path(folder))


# A program that does what it is told

PROGRAM = """if True:
    import json, os, subprocess, sys
    from dataclasses import asdict
    from cjm_fasthtml_resources import ResourceBusy, ResourceManager
    from cjm_fasthtml_resources.core.endings import end_claim
    from cjm_fasthtml_resources.core.ledger import HandOver
    from cjm_fasthtml_resources.core.process import this_process
    from cjm_fasthtml_resources.core.store import StoreError
    from cjm_fasthtml_resources.core.questions import read_answers
    from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess
    driver = SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]).start()
    app, held = sys.argv[1], []

    def use(): return ResourceManager(app=app)
    def reserve(memory, **given):
        held.append(use().reserve(memory, timeout=0, **given))
        return "granted"
    def release(): return [one.release() for one in held]
    def claims(): return [c.memory//2**20 for c in use().get_claims()]
    def promises(): return [[p.owner, p.app, p.memory//2**20, p.pid > 0, p.username, p.container is not None]
                            for d in use().check_gpu_availability().devices for p in d.promises]
    def sentence(): return use().check_gpu_availability().message
    def work(): return use().register_worker(os.getpid(), "llm", "job") and None
    def workers(): return len(use().get_all_workers())
    def load():
        "Have an idle worker with a model of 18,000 MiB"
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        worker = subprocess.Popen(["sleep", "60"], **quiet).pid
        use().register_worker(worker, "llm", loaded_plugin_resource="llama")
        driver.gpus[0].processes.append(SimulatedProcess(worker, 18_000))
    def fill(mb): driver.gpus[0].memory_used_mb = mb
    def pid(): return os.getpid()
    def show(pid, mb): driver.gpus[0].processes.append(SimulatedProcess(pid, mb))
    def ask(mb):
        held.append(use().request(mb, ask_idle=True))
        return "waits" if held[-1].poll() is None else "granted"
    def questions(): return [[q.id, q.app, q.user] for q in use().get_questions()]
    def decide(id, is_yes): return use().answer(id, is_yes)
    def answers(): return [[a.app, a.user, a.is_yes] for a in read_answers(use().ledger.store)]
    def end():
        "Release the first reservation by its ID, as `cjm-resources release` does"
        return end_claim(use().ledger, use().get_claims()[0].id).app
    def attack():
        "Try all that the library has to end or take a reservation, with what the ledger tells about others'"
        mine = use()
        ledger, me = mine.ledger, this_process()
        for claim in mine.get_claims():
            over = HandOver(me, {})
            for act in (lambda n: ledger.withdraw(n), lambda n: ledger.give_back(n, for_other=True),
                        lambda n: ledger.renew(n, 0.001), lambda n: ledger.change(n, expires=0.0),
                        lambda n: ledger.change(n, holder=me), lambda n: ledger.end_later(n),
                        lambda n: ledger.keep_over_exec(n), lambda n: ledger.leases.drop(n),
                        lambda n: ledger.change(n, lambda rows: over.change(rows, n))):
                if act(claim.lease): return f"it did something to {claim}"
        ledger.settle(lambda: [])
        return "nothing was done"

    for line in sys.stdin:
        name, given, named = json.loads(line)
        try: answer = globals()[name](*given, **named)
        except (StoreError, ResourceBusy) as error: answer = f"{type(error).__name__}: {error}"
        except BaseException as error: answer = f"no words: {type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)
"""


class Program:
    def __init__(self, process: subprocess.Popen[str]) -> None: self.process = process

    def do(self, name: str, *arguments: Any, **named: Any) -> Any:
        self.process.stdin.write(json.dumps([name, arguments, named]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else f"it ended: {self.process.stderr.read()}"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def program(machine: Machine) -> Iterator[Callable[..., Program]]:
    started: list[Program] = []

    def start(place: Place, app: str = "app", **given: Any) -> Program:
        started.append(Program(machine.start(place, PROGRAM, app, **given)))
        return started[-1]

    yield start
    for one in started: one.end()


def can_be_rootless(machine: Machine) -> bool:
    with machine.start(ROOTLESS, "print(1)") as process: return process.communicate()[0] == "1\n"


@pytest.mark.parametrize("place", [*HOSTS[1:], *CONTAINERS, ROOTLESS], ids=lambda place: place.name)
def test_what_one_has_reserved_is_external_for_all_others_and_stays_its_own(machine, program, place):
    if place.rootless and not can_be_rootless(machine): pytest.skip("this kernel gives users no namespaces")
    holder, other = program(HOSTS[0], "speech"), program(place, "llm")
    assert holder.do("reserve", 20_000) == "granted"
    user = None if place.rootless else f"UID {ALICE}"   # a rootless container knows no number of another user
    (*promise, name, container), = other.do("promises")
    assert promise == ["external", "speech", 20_000, not place.container]   # no number of elsewhere
    assert name in (user, f"UID {ALICE}") and container == (place.container and pid_namespace() is not None)
    assert "ResourceBusy" in other.do("reserve", 5_000)
    assert other.do("attack") == "nothing was done"
    assert holder.do("claims") == other.do("claims") == [20_000]
    assert other.do("reserve", 4_000) == "granted" and holder.do("attack").startswith("nothing")
    assert sorted(holder.do("claims")) == [4_000, 20_000]
    assert holder.do("release") == [True] and other.do("claims") == [4_000]
    assert other.do("release") == [True]
    assert holder.do("reserve", TOTAL - 1_000) == "granted"
    holder.end()                      # however it ends
    assert other.do("reserve", TOTAL - 1_000) == "granted"


@pytest.mark.parametrize("place", [HOSTS[0], CONTAINERS[1]], ids=lambda place: place.name)
def test_a_reservation_names_its_user_and_its_container(program, place):
    holder, other = program(CONTAINERS[0], "whisper"), program(place, "llm")
    assert holder.do("reserve", 20_000) == "granted"
    assert other.do("promises") == [["external", "whisper", 20_000, False, f"UID {BOB}", True]]
    name, user = re.escape(os.uname().nodename), f"UID {BOB}"
    assert re.search(rf"a process in container {name} \(app whisper, user {user}", other.do("sentence"))


OLLAMA, WHISPER = 12*1024, 8*1024   # MiB, as in the Compose file of the tutorial


def test_a_model_counts_once_for_a_program_that_shares_its_pids(program):
    ollama, whisper = program(HOSTS[0], "ollama"), program(HOSTS[1], "whisper")
    assert ollama.do("reserve", OLLAMA) == "granted"
    whisper.do("show", ollama.do("pid"), OLLAMA)              # the model is loaded
    assert whisper.do("reserve", WHISPER) == "granted"
    assert "ResourceBusy" in whisper.do("reserve", WHISPER)   # 28 GiB


@pytest.mark.parametrize("place", [HOSTS[1], CONTAINERS[1]], ids=lambda place: place.name)
def test_a_model_counts_twice_for_a_program_with_other_pids_until_its_reservation_ends(program, place):
    ollama, whisper = program(CONTAINERS[0], "ollama"), program(place, "whisper")
    assert ollama.do("reserve", OLLAMA) == "granted"
    whisper.do("fill", OLLAMA)                                # the model is loaded
    assert "ResourceBusy" in whisper.do("reserve", WHISPER)   # 12 + 12 + 8 GiB
    whisper.do("fill", 0)                                     # it is unloaded
    assert whisper.do("reserve", WHISPER) == "granted"
    assert whisper.do("release") == [True]
    whisper.do("fill", OLLAMA)                                # it is loaded again
    assert ollama.do("release") == [True]
    assert whisper.do("reserve", WHISPER) == "granted"


def test_a_reservation_for_another_process_is_nobody_elses_to_end(machine, program):
    hides = ("mount -t proc -o hidepid=2 proc /proc",)
    asker, other, contained = program(HOSTS[0]), program(HOSTS[1]), program(CONTAINERS[0])
    blind = program(HOSTS[2], shell=hides)   # sees no process of another user
    sleeper = subprocess.Popen(["sleep", "600"])
    try:
        assert asker.do("reserve", 20_000, pid=sleeper.pid) == "granted"
        asker.end()
        for who in (other, contained, blind):
            assert who.do("attack") == "nothing was done" and who.do("claims") == [20_000]
            assert "ResourceBusy" in who.do("reserve", 5_000)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert blind.do("reserve", 20_000) == "granted"


def test_workers_stay_with_their_user_and_its_containers(program):
    "Also where two users have chosen the same name for an app"
    alice, bob, contained, root = map(program, (HOSTS[0], HOSTS[1], CONTAINERS[0], CONTAINERS[1]))
    assert alice.do("work") is None
    assert [who.do("workers") for who in (alice, bob, contained, root)] == [1, 0, 0, 0]
    assert contained.do("work") is None   # it is bob's
    assert [who.do("workers") for who in (alice, bob, contained, root)] == [1, 1, 1, 0]


def test_a_release_by_id_leaves_the_folder_usable_for_all(program):
    alice, bob = program(HOSTS[0]), program(HOSTS[1])
    assert alice.do("reserve", 20_000) == "granted" and alice.do("end") == "app"
    assert bob.do("reserve", 20_000) == "granted" and bob.do("end") == "app" and alice.do("claims") == []


@pytest.mark.parametrize("place", [HOSTS[1], CONTAINERS[0], CONTAINERS[1]], ids=lambda place: place.name)
def test_who_waits_asks_another_user_and_only_the_one_who_is_asked_can_agree(program, place):
    alice, cleo, asker = program(HOSTS[0]), program(HOSTS[2]), program(place)
    assert alice.do("load") is None and asker.do("fill", 18_000) is None and cleo.do("fill", 18_000) is None
    assert alice.do("questions") == [] and asker.do("ask", 10_000) == "waits"
    [[id, app, user]] = alice.do("questions")
    assert app == "app" and (f"UID {BOB}" in user or "root" in user)
    assert cleo.do("questions") == asker.do("questions") == []      # they have nothing to unload
    for other in (cleo, asker): assert f"Request {id} has no question for app" in other.do("decide", id, True)
    assert alice.do("questions") == [[id, app, user]] and asker.do("answers") == []
    assert alice.do("decide", id, False) == f"Request {id} got the answer no."
    assert asker.do("answers") == [["app", ALICE, False]] and alice.do("questions") == []
    asker.end()
    again = program(place)
    assert again.do("fill", 18_000) is None and again.do("ask", 10_000) == "waits"
    assert len(alice.do("questions")) == 1      # another request may ask
    again.end()
    assert alice.do("questions") == []          # it went with the program that asked


def test_files_are_for_the_group_and_for_nobody_else_whatever_the_umask(machine, program):
    for path in machine.queue.iterdir(): path.unlink()   # so that a member makes them
    for place in (HOSTS[0], CONTAINERS[0]):
        one = program(place)
        assert one.do("work") is None and one.do("reserve", 100) == "granted" and one.do("release") == [True]
    shared = [path for path in machine.queue.iterdir() if path.is_file()]
    assert {path.name for path in shared} >= {"resources.lock", "app.events"}
    for path in shared:
        found = path.stat()
        assert (found.st_gid, found.st_mode & 0o777) == (GROUP, 0o660), path
    own = machine.queue/f"user-{ALICE}"
    assert (own.stat().st_uid, own.stat().st_mode & 0o777) == (ALICE, 0o700)


# What is wrong is said in words

def said(machine: Machine, place: Place, **given: Any) -> str:
    one = Program(machine.start(place, PROGRAM, "app", **given))
    try: return str(one.do("reserve", 100))
    finally: one.end()


BECOMES = """if True:
    import os, sys
    from cjm_fasthtml_resources import ResourceManager
    from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
        ResourceManager(app="kept").reserve(20_000, timeout=0).keep_over_exec()
        os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""
CLOSES_ALL = "import os; os.closerange(3, 4096); print('it is another program now', flush=True); input()"
TRIES = """if True:
    from cjm_fasthtml_resources import ResourceBusy, ResourceManager
    from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
        try:
            with ResourceManager(app="next").reserve(20_000, timeout=0): print("given")
        except ResourceBusy as busy: print(busy)
"""


def test_a_container_sees_the_end_of_a_program_that_a_process_became_and_no_end_before(machine):
    "The container cannot see its PID, and nobody else looks meanwhile"
    def tries() -> str: return machine.start(CONTAINERS[0], TRIES).communicate(timeout=60)[0]
    holder = machine.start(HOSTS[0], BECOMES, CLOSES_ALL)
    assert holder.stdout.readline() == "it is another program now\n"
    assert "a reservation of a process in another container" in tries()   # though it has closed the locked file
    holder.communicate("\n", timeout=60)
    end = time.monotonic() + 10
    while (said := tries()) != "given\n" and time.monotonic() < end: time.sleep(0.05)
    assert said == "given\n"


def test_who_is_not_in_the_group_is_told_what_to_ask_for(machine):
    text = said(machine, Place("dora", DORA, member=False))
    assert text.startswith("StoreError") and f"UID {DORA} is not in it" in text
    assert f"sudo usermod -aG {GROUP} NAME" in text and f"--group-add {GROUP}" in text
    contained = said(machine, Place("container of dora", DORA, container=True, member=False))
    assert f"--group-add {GROUP}" in contained, contained


HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "open to all": (lambda queue: queue.chmod(0o2777), "sudo chmod o-rwx"),
    "readable by all": (lambda queue: queue.chmod(0o2775), "sudo chmod o-rwx"),
    "of a stranger": (lambda queue: os.chown(queue, DORA, GROUP), "sudo chown root"),
    "without setgid": (lambda queue: queue.chmod(0o770), "sudo cjm-resources share"),
    "not for the group": (lambda queue: queue.chmod(0o2720), "sudo chmod 2770"),
    "a link": (lambda queue: (queue.rename(queue.with_name("real")), queue.symlink_to(queue.with_name("real"))),
               "symbolic link"),
    "a file for all": (lambda queue: (queue/"resources.lock").chmod(0o666), "chmod o-rwx"),
    "a file for its owner": (lambda queue: (queue/"resources.lock").chmod(0o600), "chmod g+rw"),
    "a file of another group": (lambda queue: os.chown(queue/"resources.lock", DORA, DORA),
                                "does not belong to the group"),
    "a link in place of a file": (lambda queue: ((queue/"resources.lock").unlink(),
                                                 (queue/"resources.lock").symlink_to("/etc/passwd")), "symbolic link"),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_folder_that_is_not_safe_is_refused_in_words(machine, name):
    harm, words = HARMS[name]
    harm(machine.queue)
    text = said(machine, HOSTS[0])
    assert text.startswith("StoreError") and words in text and str(machine.queue) in text, text


def test_a_folder_that_is_mounted_read_only_is_refused_in_words(machine):
    shell = (f"mount --bind {machine.queue} {machine.queue}", f"mount -o remount,bind,ro {machine.queue}")
    assert "read-only" in said(machine, HOSTS[0], shell=shell)


@pytest.mark.parametrize("name", ["lock", "all", "folder"])
def test_files_that_are_deleted_by_hand_give_no_second_yes(machine, program, name):
    holder, early = program(HOSTS[0]), program(CONTAINERS[0])
    assert holder.do("reserve", 20_000) == "granted" and early.do("claims") == [20_000]
    if name == "folder":
        shutil.rmtree(machine.queue)
        machine.queue.mkdir()
        os.chown(machine.queue, 0, GROUP)
        machine.queue.chmod(0o2770)
    else:
        for path in machine.queue.glob("*.lock" if name == "lock" else "resources*"): path.unlink()
    late = [program(HOSTS[1])] if name == "folder" else [program(HOSTS[1]), program(CONTAINERS[1]), early]
    for who in late: assert "StoreError" in (answer := who.do("reserve", 5_000)), answer
    holder.end()
    for who in late: who.end()
    if name != "folder": assert program(HOSTS[2]).do("reserve", TOTAL) == "granted"


# The machine's settings

def test_the_machines_settings_name_the_folder(machine, program):
    shutil.copytree("/etc", machine.folder/"etc", symlinks=True, ignore=shutil.ignore_patterns("*.d", "ssl"))
    settings = machine.folder/"etc/cjm-resources.toml"
    settings.write_text(f'folder = "{machine.queue}"\n')
    settings.chmod(0o644)
    shell = (f"mount --bind {machine.folder/'etc'} /etc",)
    one, other = (program(place, shell=shell, CJM_RESOURCES_DIR=None) for place in HOSTS[:2])
    assert one.do("reserve", 20_000) == "granted" and other.do("claims") == [20_000]
    assert program(HOSTS[2]).do("claims") == [20_000]   # with the environment's variable
    settings.chmod(0o666)
    assert "another user than root" in said(machine, HOSTS[2], shell=shell, CJM_RESOURCES_DIR=None)
    settings.chmod(0o644)
    settings.write_text('folder = "/not/there"\n')
    assert "share /not/there" in said(machine, HOSTS[2], shell=shell, CJM_RESOURCES_DIR=None)


# A cap

def test_a_user_who_has_its_share_waits_and_holds_nobody_up(machine, program):
    "With a file of root's; one of a member's is refused, and says so"
    file = machine.queue/"settings.toml"
    file.write_text("max_share = 0.5")
    file.chmod(0o640)
    os.chown(file, 0, GROUP)
    alice, again, bob, contained = map(program, (HOSTS[0], HOSTS[0], HOSTS[1], CONTAINERS[0]))
    assert alice.do("reserve", 8_000) == "granted"
    assert re.search(rf"UID {ALICE} has 7.8 GiB of at most 11.7 GiB that one user is allowed to reserve on GPU 0",
                     again.do("reserve", 5_000))
    assert "is more than one user is allowed to reserve here: 11.7 GiB" in again.do("reserve", 13_000)
    assert bob.do("reserve", 10_000) == "granted" and again.do("reserve", 4_000) == "granted"
    assert f"UID {BOB} has" in contained.do("reserve", 2_001)   # the same user
    assert contained.do("reserve", 2_000) == "granted"
    os.chown(file, BOB, GROUP)
    assert "settings.toml is refused, because another user than root" in alice.do("reserve", 1)
    file.unlink()
    assert [one.do("release") for one in (alice, bob)] == [[True]]*2 and again.do("reserve", 13_000) == "granted"


# The command

def test_root_makes_the_folder_and_others_get_the_lines(machine):
    command = [sys.executable, "-m", "cjm_fasthtml_resources", "share", str(place := machine.folder/"gpu"), "--group"]
    group = subprocess.run([*command, "daemon"], capture_output=True, text=True)
    assert group.returncode == 0 and f"-v {place}:{place}" in group.stdout, group.stderr
    assert (place.stat().st_uid, place.stat().st_mode & 0o7777) == (0, 0o2770)
    (place/"resources.lock").chmod(0o600)
    assert subprocess.run([*command, "daemon"], capture_output=True).returncode == 0
    assert (place/"resources.lock").stat().st_mode & 0o777 == 0o660
    capped = subprocess.run([*command, "daemon", "--max-share", "50%"], capture_output=True, text=True)
    assert "One user can reserve at most 50% of each GPU" in capped.stdout, capped.stderr
    assert subprocess.run([*command, "daemon"], capture_output=True).returncode == 0
    assert (place/"settings.toml").stat().st_mode & 0o777 == 0o640
    (place/"other").touch()
    refused = subprocess.run([*command, "daemon"], capture_output=True, text=True)
    assert refused.returncode == 2 and "other files" in refused.stderr


def test_a_command_without_the_right_says_what_to_ask_for(machine):
    dora = Place("dora", DORA, member=False)
    with machine.start(dora, RUNS) as looks: out, errors = looks.communicate(timeout=60)
    assert looks.returncode == 0 and "RAM" in out
    assert errors.startswith("Cannot read the reservations") and "sudo usermod" in errors
    with machine.start(dora, RUNS, "--simulate", "idle", "wait", "--gpu-memory", "1GiB") as waits:
        _, errors = waits.communicate(timeout=60)
    assert waits.returncode == os.EX_IOERR and "sudo usermod" in errors


@pytest.mark.parametrize("place", [HOSTS[1], CONTAINERS[0]], ids=lambda place: place.name)
def test_the_page_leads_two_newcomers_through_the_queue(machine, place):
    "The lines of the tutorial, as they are printed: alice's on the host, bob's there or in a container"
    page = json.loads((ROOT/"nbs"/"tutorials"/"together.ipynb").read_text())
    texts = ["".join(cell["source"]) for cell in page["cells"]]
    section = next(text for text in texts if text.startswith("## Try it in three terminals"))
    hold, wait, look, release = (shlex.split(line)[1:] for line in re.findall(r"```sh\n(.*)\n```", section))
    with machine.start(HOSTS[0], RUNS, *hold) as alice:
        def shown(who: Place) -> str:
            with machine.start(who, RUNS, *look) as queue: return " ".join(queue.communicate(timeout=60)[0].split())
        until = time.monotonic() + 30
        while "speech" not in shown(HOSTS[0]) and time.monotonic() < until: pass
        with machine.start(place, RUNS, *wait) as bob:
            while "waits" not in shown(HOSTS[0]) and time.monotonic() < until: pass
            for who in (HOSTS[0], place):
                assert re.search(r"2: The job needs 14.0 GiB. .* Expected start: in up to [0-9]+ seconds", shown(who))
            with machine.start(place, RUNS, *release) as refused: refused.communicate(timeout=60)
            assert refused.returncode == os.EX_NOPERM
            with machine.start(HOSTS[0], RUNS, *release) as released: said, _ = released.communicate(timeout=60)
            assert said.startswith("Released 1: 14.0 GiB"), said
            assert bob.communicate(timeout=60)[0] == "It is my turn.\n"
        alice.kill()


RUNS = "import sys; from cjm_fasthtml_resources.cli import main; main(sys.argv[1:], 'cjm-resources')"


def test_a_command_in_one_container_waits_for_that_in_another(machine):
    "Programs that do not know this library take part, as Ollama in one container and Whisper in another"
    def serve(place: Place, app: str, timeout: str = "30s") -> subprocess.Popen[str]:
        line = ["--simulate", "idle", "run", "--gpu-memory", "16GiB", "--timeout", timeout, "--app", app]
        return machine.start(place, RUNS, *line, "--", "sh", "-c", "echo serving; read line")

    ollama, whisper = serve(CONTAINERS[0], "ollama"), serve(CONTAINERS[1], "whisper")
    with ollama, whisper:
        first, second = (ollama, whisper) if select.select([ollama.stdout, whisper.stdout], [], [], 30)[0] == [
            ollama.stdout] else (whisper, ollama)
        assert first.stdout.readline() == "serving\n"
        with serve(HOSTS[0], "speech", "0s") as refused: assert refused.wait(30) == os.EX_TEMPFAIL
        assert not select.select([second.stdout], [], [], 0.5)[0]
        first.communicate("\n", timeout=30)
        assert second.communicate("\n", timeout=30)[0] == "serving\n"
        assert (first.returncode, second.returncode) == (0, 0)


# The crowd

MEMBER = """if True:
    import random, sys, time
    from cjm_fasthtml_resources import ResourceManager
    from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
    log, name, until = open(sys.argv[1], "w", buffering=1), sys.argv[2], float(sys.argv[3])
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]):
        manager = ResourceManager(app=name)
        while (asked := time.monotonic()) < until:
            memory = random.choice([2_000, 6_000, 11_000, 13_000, 20_000])
            with manager.reserve(memory, timeout=30):
                print("granted", memory, asked, time.monotonic(), file=log)
                time.sleep(random.uniform(0, 0.05))
                print("released", time.monotonic(), file=log)
"""


class Held(NamedTuple):
    memory: int
    asked: float
    since: float
    until: float


def read_log(path: Path, killed: float) -> list[Held]:
    "What a member has held: for less time than it really did, so that nothing seems to overlap that did not"
    found: list[Held] = []
    words = [line.split() for line in path.read_text().splitlines()]
    for line, after in itertools.zip_longest(words, words[1:]):
        if line[0] != "granted" or len(line) != 4: continue
        memory, asked, since = int(line[1]), float(line[2]), float(line[3])
        until = float(after[1]) if after and after[0] == "released" and len(after) == 2 else killed
        found.append(Held(memory, asked, since, until))
    return found


def most_at_once(held: list[Held]) -> int:
    changes = sorted([(h.since, h.memory) for h in held] + [(h.until, -h.memory) for h in held if h.until > h.since])
    return max(itertools.accumulate(change for _, change in changes), default=0)


def test_a_crowd_of_users_and_containers_shares_one_device(machine):
    places = [*HOSTS, *CONTAINERS, *([ROOTLESS] if can_be_rootless(machine) else [])]
    until, count = time.monotonic() + SECONDS, itertools.count()
    logs: dict[Path, tuple[Place, float]] = {}

    def start(place: Place) -> tuple[subprocess.Popen[str], Path]:
        path = machine.logs/str(next(count))
        path.touch()
        path.chmod(0o666)
        return machine.start(place, MEMBER, str(path), place.name.replace(" ", "-"), str(until)), path

    running = {place: start(place) for place in places}
    while time.monotonic() < until - 2:
        time.sleep(random.uniform(0.3, 1.0))
        place = random.choice(places)
        process, path = running.pop(place)
        logs[path] = place, time.monotonic()
        process.kill()
        process.communicate()
        running[place] = start(place)
    for place, (process, path) in running.items():
        _, errors = process.communicate(timeout=60)
        logs[path] = place, time.monotonic()
        assert process.returncode == 0, f"{place.name}: {errors}"
    held = {path: read_log(path, killed) for path, (_, killed) in logs.items()}
    assert TOTAL/2 < (most := most_at_once([h for found in held.values() for h in found])) <= TOTAL, most
    for place in places:
        mine = [h for path, found in held.items() if logs[path][0] == place for h in found]
        print(f"{place.name}: {len(mine)} times, {max(h.since - h.asked for h in mine):.1f} s at most")
        assert len(mine) >= SECONDS/2, f"{place.name} was granted {len(mine)} times"
        assert max(h.since - h.asked for h in mine) < 10, f"{place.name} waited too long"
    with contextlib.closing(machine.start(HOSTS[0], PROGRAM, "late").stdin): pass
    assert said(machine, HOSTS[0]) == "granted"   # and nothing is left
