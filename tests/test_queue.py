"""`cjm-resources queue`, `release` and `cancel` with real processes of two apps that hold and wait on a simulated GPU:
what is shown of each, who ended it, holders that are killed, wrong IDs, and what belongs to another user"""
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import COMMAND, DRIVER, GIB, wait_until
from hypothesis import given
from hypothesis import strategies as st

from cjm_fasthtml_resources import ResourceBusy, ResourceManager
from cjm_fasthtml_resources.agents.foresee import foresee
from cjm_fasthtml_resources.commands.queue import read_queue
from cjm_fasthtml_resources.core.endings import end_claim
from cjm_fasthtml_resources.core.learned import JobRun, need_key
from cjm_fasthtml_resources.core.ledger import Ledger, Rows, from_bytes, to_bytes
from cjm_fasthtml_resources.core.outlook import expected_start
from cjm_fasthtml_resources.core.process import machine_time
from cjm_fasthtml_resources.core.receipts import new_receipt
from cjm_fasthtml_resources.core.reservations import ReservationOver
from cjm_fasthtml_resources.core.samples import take_sample
from cjm_fasthtml_resources.core.store import Store, StoreError, store_path
from cjm_fasthtml_resources.hosts.reading import from_json
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedMachine
from cjm_fasthtml_resources.ui.export import to_json
from cjm_fasthtml_resources.ui.lines import to_text
from cjm_fasthtml_resources.ui.terminal import promise_table
from cjm_fasthtml_resources.ui.view import View, render_reservations

HOLDER = DRIVER + """
import sys
from cjm_fasthtml_resources import ResourceBusy, ResourceManager
from cjm_fasthtml_resources.agents.foresee import foresee
from cjm_fasthtml_resources.commands.queue import read_queue
from cjm_fasthtml_resources.core.conflict import ResourceBusy
app, size, grace = sys.argv[1], float(sys.argv[2])*1024, float(sys.argv[3]) if sys.argv[3:] else None
def tell(*words): print(*words, flush=True)
try: held = ResourceManager(app=app, track_self=False).reserve(size, timeout=60, grace=grace)
except ResourceBusy as error:
    tell(type(error).__name__, error)
    sys.exit(3)
tell("has it")
kept = []
for line in sys.stdin:
    word, *numbers = line.split()
    try:
        if word == "use":
            kept.append(driver.allocate(float(numbers[0])*1024))
            kept[-1].__enter__()
            tell("uses it")
        if word == "shrink": held = held.shrink(float(numbers[0])*1024)
        if word == "shrink": tell("shrunk")
        if word == "receipt": tell("receipt", held.receipt.explain(int(held.gpu_memory_mb*2**20)))
        if word == "keep": held.keep_over_exec()
        if word == "release": tell(held.release(), held.ended_by)
    except (RuntimeError, ValueError) as error: tell(type(error).__name__, error)
"""


class Rig:
    "The command, and processes that hold or wait"
    def __init__(self, folder: Path) -> None:
        self.env = {**os.environ, "GPUS": str(folder/"gpus"), "PYTHONUNBUFFERED": "1", "COLUMNS": "140"}
        self.words = {}
        for name, code in (("command", COMMAND), ("holder", HOLDER)):
            (folder/f"{name}.py").write_text(code)
            self.words[name] = [sys.executable, str(folder/f"{name}.py")]
        self.started = []

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess:
        words = [*self.words["command"], *map(str, args)]
        return subprocess.run(words, env={**self.env, **env}, capture_output=True, text=True, timeout=60)

    def rows(self, *args: str) -> list[dict]:
        found = self.run("queue", "--json", *args)
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout)["queue"]

    def start(self, app: str, gib: float, *grace: float) -> subprocess.Popen:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        words = [*self.words["holder"], app, *map(str, (gib, *grace))]
        self.started.append(subprocess.Popen(words, env=self.env, **pipes))
        return self.started[-1]

    def hold(self, app: str, gib: float, *grace: float) -> subprocess.Popen:
        process = self.start(app, gib, *grace)
        assert process.stdout.readline() == "has it\n"
        return process

    def wait(self, app: str, gib: float) -> tuple[subprocess.Popen, dict]:
        "Start a process that has to wait; the process and its row"
        process = self.start(app, gib)
        found = wait_until_any(lambda: [row for row in self.rows() if row["pid"] == process.pid])
        assert found[0]["state"] == "waiting"
        return process, found[0]


def wait_until_any(find):
    found = []
    wait_until(lambda: found.extend(find()) or found, 30)
    return found


def ask(process: subprocess.Popen, *words: object) -> str:
    process.stdin.write(" ".join(map(str, words)) + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.fixture
def rig(folder, tmp_path):
    made = Rig(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


def test_who_has_what_and_who_waits_behind_whom(rig):
    holder = rig.hold("speech", 16)
    assert ask(holder, "use", 11) == "uses it"
    first, _ = rig.wait("train", 20)
    second, _ = rig.wait("train", 21)
    held, large, larger = rig.rows()
    assert (held["state"], held["app"], held["pid"], held["devices"]) == ("held", "speech", holder.pid, [0])
    assert (held["memory"], held["used"]) == (16*GIB, 11*GIB) and 0 <= held["seconds"] < 60
    assert "The holder can release 5.0 GiB" in held["why"]
    assert (large["pid"], large["behind"], larger["pid"], larger["behind"]) == (
        first.pid, None, second.pid, large["id"])
    assert "The job needs 20.0 GiB" in large["why"] and 0 <= large["seconds"] < 60
    assert [row["pid"] for row in rig.rows("--app", "train")] == [first.pid, second.pid]
    text = rig.run("queue").stdout
    assert re.search(rf"{held['id']} +0 +16.0 GiB +11.0 GiB +held .*speech", text), text
    assert f"waits behind {large['id']}" in text and f"{held['id']}: At most 11.0 GiB of 16.0 GiB" in text


def test_who_started_to_look_before_the_first_reservation_sees_it(rig, tmp_path):
    "A recorder and a live view: neither of them has an app"
    kept, pipes = tmp_path/"history.sqlite3", dict(stdout=subprocess.PIPE, text=True, env=rig.env)
    recorder = subprocess.Popen([*rig.words["command"], "record", "--interval", "0.1", "--file", kept], **pipes)
    live = subprocess.Popen([*rig.words["command"], "--watch", "--interval", "0.2"], **pipes)
    rig.started += [recorder, live]
    assert recorder.stdout.readline() and live.stdout.readline()
    holder = rig.hold("speech", 16)
    second, _ = rig.wait("chat", 16)
    for line in live.stdout:
        if "waits, no. 1" in line: break
    time.sleep(2)   # on a busy machine, too, the recorder has taken a sample of it
    assert ask(holder, "release") and second.stdout.readline() == "has it\n"
    time.sleep(2)
    recorder.send_signal(signal.SIGINT)
    assert recorder.wait(20) == -signal.SIGINT
    changes = json.loads(rig.run("history", "--json", "--file", kept).stdout)["changes"]
    told = [(change["kind"], change["pid"]) for change in changes]
    for expected in [("reserved", holder.pid), ("requested", second.pid), ("released", holder.pid),
                     ("reserved", second.pid)]: assert expected in told


def test_a_small_one_waits_for_the_memory_that_a_large_one_asked_for_first(rig):
    rig.hold("speech", 10)
    _, large = rig.wait("train", 20)
    _, small = rig.wait("speech", 2)
    assert small["behind"] == large["id"] and f"kept for request {large['id']}" in small["why"]


def test_a_killed_holder_is_gone_and_the_next_has_it(rig):
    holder = rig.hold("speech", 16)
    waiting, _ = rig.wait("train", 20)
    holder.kill()
    holder.wait()
    assert waiting.stdout.readline() == "has it\n"
    assert [(row["pid"], row["state"]) for row in rig.rows()] == [(waiting.pid, "held")]


def test_release_gives_the_memory_to_the_next_and_tells_the_holder(rig):
    holder = rig.hold("speech", 16)
    waiting, _ = rig.wait("train", 20)
    released = rig.run("release", rig.rows()[0]["id"])
    assert released.returncode == 0 and f"16.0 GiB of GPU memory for PID {holder.pid}, app speech" in released.stdout
    assert waiting.stdout.readline() == "has it\n" and holder.poll() is None
    said = ask(holder, "keep")
    assert said.startswith("ReservationOver") and re.search(r"it was released by \w+ \(PID \d+\)", said), said
    assert re.fullmatch(r"False \w+ \(PID \d+\)", ask(holder, "release"))
    assert "had ended it" in holder.communicate()[1]   # the log
    assert rig.run("release", rig.rows()[0]["id"] + 100).returncode == 2


def test_cancel_ends_the_waiting_and_no_other(rig):
    holder = rig.hold("speech", 16)
    waiting, row = rig.wait("train", 20)
    _, other = rig.wait("train", 21)
    wrong = rig.run("release", row["id"])
    assert wrong.returncode == 2 and "cancel it" in wrong.stderr
    assert "release it" in rig.run("cancel", rig.rows()[0]["id"]).stderr
    assert rig.run("cancel", row["id"]).returncode == 0
    assert re.fullmatch(r"RequestCancelled .* cancelled by \w+ \(PID \d+\)\.\n", waiting.stdout.readline())
    assert waiting.wait(30) == 3
    assert [row["pid"] for row in rig.rows()] == [holder.pid, other["pid"]]


@pytest.mark.parametrize("name", ["wait", "run"])
def test_a_command_that_is_cancelled_ends_with_75(rig, name):
    rig.hold("speech", 16)
    words = [*rig.words["command"], name, "--gpu-memory", "20GiB", "--", "true"]
    process = subprocess.Popen(words, env=rig.env, stderr=subprocess.PIPE, text=True)
    row = wait_until_any(lambda: [row for row in rig.rows() if row["pid"] == process.pid])[0]
    assert rig.run("cancel", row["id"]).returncode == 0
    assert "cancelled by" in process.communicate(timeout=30)[1] and process.returncode == os.EX_TEMPFAIL


def name_of(pid: int) -> str: return Path(f"/proc/{pid}/comm").read_text().strip()


@pytest.mark.parametrize("name", ["wait", "run"])
def test_a_command_goes_on_when_its_memory_is_released(rig, name):
    "It is not stopped; `run`, which gives the memory back in the end, says who did it before"
    words = [*rig.words["command"], name, "--gpu-memory", "16GiB", "--", "sh", "-c", "read line; exit 5"]
    process = subprocess.Popen(words, env=rig.env, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    row = wait_until_any(lambda: [row for row in rig.rows() if row["state"] == "held"])[0]
    wait_until(lambda: name_of(rig.rows()[0]["pid"]) == "sh")
    assert rig.run("release", row["id"]).returncode == 0 and rig.rows() == []
    assert rig.hold("speech", 20).poll() is None   # the memory is free
    said = process.communicate("\n", timeout=30)[1]
    assert process.returncode == 5 and ("had ended it" in said) == (name == "run"), said


def test_a_reservation_that_is_not_used_within_its_grace_goes_to_the_next_and_its_holder_is_told(rig):
    idle = rig.hold("speech", 16, 2)
    waiting, _ = rig.wait("train", 20)
    assert "Not used yet: the reservation ends after 2 s" in rig.rows()[0]["why"]
    assert waiting.stdout.readline() == "has it\n" and idle.poll() is None
    assert "it was released by the queue (not used within 2 s)" in ask(idle, "keep")
    assert ask(idle, "release") == "False the queue (not used within 2 s)"
    assert "the queue (not used within 2 s) had ended it" in idle.communicate()[1]   # the log


def test_a_reservation_that_is_used_at_the_last_moment_or_has_no_grace_stays(rig):
    used, idle = rig.hold("speech", 4, 2), rig.hold("speech", 8)
    waiting, _ = rig.wait("train", 20)
    assert ask(used, "use", 1) == "uses it"
    started = time.monotonic()
    wait_until(lambda: time.monotonic() - started > 3 and len(rig.rows()) == 3, 30)
    assert waiting.poll() is None and [ask(holder, "release") for holder in (used, idle)] == ["True None"]*2


@pytest.mark.parametrize("name", ["wait", "run"])
def test_a_command_with_a_grace_that_uses_nothing_goes_on_without(rig, name):
    words = [*rig.words["command"], name, "--gpu-memory", "16GiB", "--grace", "1s", "--", "sh", "-c", "read line"]
    process = subprocess.Popen(words, env=rig.env, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until_any(lambda: [row for row in rig.rows() if row["state"] == "held"])
    assert rig.hold("speech", 20).poll() is None
    said = process.communicate("\n", timeout=30)[1]
    assert process.returncode == 0 and ("not used within 1 s" in said) == (name == "run"), said


@given(st.lists(st.tuples(st.floats(0.1, 40), st.sampled_from(["idle"]*6 + ["unknown", "used"])), max_size=40))
def test_only_readings_without_doubt_and_without_gaps_let_a_grace_run_out(readings):
    receipt, now, seen = new_receipt(60), 1_000.0, []
    for step, kind in readings:
        now += step
        receipt = receipt.seen(0, kind == "used", now, kind == "idle")
        seen.append((now, kind))
        if receipt.grace is None or not receipt.grace.is_over: continue
        times = [at for at, _ in seen if at >= receipt.grace.since]
        assert {kind for at, kind in seen if at in times} == {"idle"} and "used" not in dict(seen).values()
        assert times[-1] - times[0] >= 60 and all(b - a <= 30 for a, b in itertools.pairwise(times))


@given(st.lists(st.floats(0.1, 20), min_size=10))
def test_a_grace_that_is_looked_at_runs_out_in_its_time(steps):
    receipt, times = new_receipt(60), [1_000.0, *itertools.accumulate(steps, initial=1_000.0)]
    for now in times:
        receipt = receipt.seen(0, False, now, True)
        assert receipt.grace.is_over == (now - 1_000 >= 60)


def test_a_suspended_request_says_so(rig):
    rig.hold("speech", 16)
    waiting, row = rig.wait("train", 20)
    waiting.send_signal(signal.SIGSTOP)
    assert "suspended" in rig.rows()[1]["why"]
    assert rig.run("cancel", row["id"]).returncode == 0
    waiting.send_signal(signal.SIGCONT)
    assert waiting.stdout.readline().startswith("RequestCancelled")


def test_shrink_and_the_receipt(rig):
    holder = rig.hold("speech", 16)
    ask(holder, "use", 11)
    assert ask(holder, "receipt") == ("receipt At most 11.0 GiB of 16.0 GiB were used so far. "
                                      "The holder can release 5.0 GiB with shrink().")
    waiting, _ = rig.wait("train", 12)
    assert "at least 11264" in ask(holder, "shrink", 10) and "at most 16384" in ask(holder, "shrink", 17)
    assert ask(holder, "shrink", 11) == "shrunk"
    assert waiting.stdout.readline() == "has it\n"
    held, _ = rig.rows()
    assert (held["memory"], held["asked"], held["why"]) == (11*GIB, 16*GIB, "")


def test_shrink_leaves_the_ram_as_it_is(folder):
    with SimulatedDriver([SimulatedGpu("NVIDIA L4")]) as driver:
        manager = ResourceManager(app="train")
        with manager.reserve(16*1024, memory_mb=100, timeout=0) as held, driver.allocate(11*1024):
            assert held.shrink().gpu_memory_mb == 11*1024
            assert sorted(c.memory >> 20 for c in manager.get_claims()) == [100, 11*1024]


def test_a_group_is_released_as_one_and_shrinks_on_each_device(folder):
    with SimulatedDriver([SimulatedGpu("NVIDIA L4", uuid=f"GPU-{n}") for n in "ab"]) as driver:
        manager = ResourceManager(app="train")
        with manager.reserve(16*1024, n=2, timeout=0) as held, driver.allocate(11*1024, gpu=1):
            assert held.receipt.most_used == 11*GIB and held.receipt.unused_since is None
            with pytest.raises(ValueError, match="at least 11264"): held.shrink(10*1024)
            assert held.shrink(12*1024).gpu_memory_mb == 12*1024
            first, second = manager.get_claims()
            assert {first.memory, second.memory} == {12*GIB} and first.lease == second.lease
            end_claim(manager.ledger, second.id)
            assert manager.get_claims() == [] and held.ended_by
            with pytest.raises(ReservationOver, match="released by"): held.shrink(11*1024)


def test_wrong_ids_and_apps(rig):
    rig.hold("speech", 16)
    for name in ("release", "cancel"):
        assert [rig.run(name, given).returncode for given in ("99", "0", "x")] == [2, 2, 2]
    for args in (("queue", "--app", "nosuch"), ("--app", "nosuch")):
        found = rig.run(*args)
        assert found.returncode == 2
        assert "no app called 'nosuch'" in found.stderr and "Known apps: speech" in found.stderr
    assert rig.run("--app", "speech").returncode == 0


def write_user(change) -> None:
    "Change the receipts in the file, as if somebody else had asked"
    with Store(store_path()).changing() as draft:
        rows = from_bytes(draft.data)
        draft.data = to_bytes(rows._replace(claims=tuple(map(change, rows.claims))))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may end anybody's")
def test_what_is_another_users_stays(rig):
    holder = rig.hold("speech", 16)
    write_user(lambda c: replace(c, receipt=c.receipt._replace(user=os.geteuid() + 1)))
    found = rig.run("release", rig.rows()[0]["id"])
    assert found.returncode == os.EX_NOPERM and "only" in found.stderr
    assert [row["pid"] for row in rig.rows()] == [holder.pid]


def test_root_ends_anybodys_and_a_row_without_a_receipt_is_the_holders(rig):
    holder = rig.hold("speech", 16)
    write_user(lambda c: replace(c, receipt=None))
    row, = rig.rows()
    assert (row["seconds"], row["most_used"], row["pid"]) == (None, None, holder.pid)   # not known, and not refused
    if os.geteuid() == 0: write_user(lambda c: replace(c, receipt=None, space=1))
    assert rig.run("release", row["id"]).returncode == 0 and rig.rows() == []


def test_a_file_that_cannot_be_used_is_74(rig):
    assert rig.run("queue").stdout == "There are no reservations and no waiting requests.\n"
    (store_path().parent).mkdir(exist_ok=True, parents=True)
    os.chmod(store_path().parent, 0o777)
    for args in (("queue",), ("release", "1"), ("cancel", "1")):
        assert rig.run(*args).returncode == os.EX_IOERR, args


def test_a_program_without_receipts_leaves_them_where_they_are(rig, monkeypatch):
    holder = rig.hold("speech", 16)
    rows = Ledger(Store(store_path())).rows()
    from cjm_fasthtml_resources.core import ledger as ledgers
    monkeypatch.setattr(ledgers, "is_receipt", lambda text: False)
    seen = from_bytes(to_bytes(rows))
    assert seen.claims[0].receipt is None and len(seen.claims[0].allowed) == 2
    again = to_bytes(Rows(seen.claims, *rows[1:]))
    monkeypatch.undo()
    assert from_bytes(again) == rows and rows.claims[0].receipt.asked == 16*GIB
    assert holder.poll() is None


@contextlib.contextmanager
def train_of_known_length(rig):
    "A train.py that holds 16 GiB during the block, and that took 10 and 30 minutes before"
    for seconds in (600.0, 1800.0):
        needs = ResourceManager(app="train", track_self=False).needs
        needs.record(JobRun(need_key("train.py"), time.time(), seconds))
        needs.write()
    script = "echo ready; read line"
    words = ["run", "--app", "train", "--name", "train.py", "--gpu-memory", "16GiB", "--", "sh", "-c", script]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([*rig.words["command"], *words], env=rig.env, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        yield
        process.communicate("\n", timeout=30)


def test_a_request_knows_when_it_is_expected_to_start(rig):
    "By how long the holder's command took before; behind a request of unknown length it is not known"
    with train_of_known_length(rig):
        rig.wait("train", 20)
        rig.wait("speech", 20)
        _, first, second = rig.rows()
        least, most = first["starts"]
        assert 400 < least <= 600 and 1600 < most <= 1800 and second["starts"] is None
        text = " ".join(rig.run("queue").stdout.split())
        assert re.search(r"Expected start: in \d+ to \d+ minutes", text) and "Expected start: unknown." in text


def test_what_waits_says_for_how_many_gpus_and_when_it_starts(folder):
    "In Python, in JSON there and back, on the page, in the panel and in the terminal"
    with SimulatedDriver([SimulatedGpu("NVIDIA L4", memory_total_mb=24*1024) for _ in range(2)]):
        manager = ResourceManager(app="train")
        with manager.reserve(20*1024, 0, duration=180), manager.reserve(20*1024, 1, duration=300):
            both, behind = manager.request(8*1024, n=2), manager.request(20*1024, device=0)
            assert both.poll() is None and behind.poll() is None
            sample = take_sample(manager)
            again = from_json(json.loads(json.dumps(to_json(sample))))
            for waiting in (sample.gpu.waiting, again.gpu.waiting):
                first, second = waiting
                assert (first.count, second.count, second.starts) == (2, 1, None)
                assert first.starts[0] == 0 and 290 < first.starts[1] <= 300
            assert expected_start(both) and expected_start(behind) is None
            table = " ".join(to_text(promise_table((), 200, sample.gpu.waiting)).split())
            for shown in (render_reservations(sample, View()), table):
                assert "8.0 GiB x 2" in shown and "Expected start: in up to 5 minutes" in shown
                assert f"It is behind request {first.id}." in shown
                assert "Expected start: unknown." in shown
            for request in (both, behind): request.withdraw()


def test_what_one_user_may_have_of_ram_counts_too(rig):
    "A request over the cap waits, says so and holds up no other app; one that never is under it is refused"
    (store_path().parent).mkdir(mode=0o700, parents=True, exist_ok=True)
    file = store_path().with_name("settings.toml")
    file.write_text('max_share = 0.5\nper = "app"')
    file.chmod(0o600)
    machine = SimulatedMachine(memory_total_mb=64*1024, memory_used_mb=1024)
    with SimulatedDriver([SimulatedGpu("NVIDIA L4", memory_total_mb=24*1024)], machine=machine):
        manager, other = ResourceManager(app="train"), ResourceManager(app="speech")
        with manager.reserve(memory_mb=30*1024, timeout=0):
            text = "train has 30.0 GiB of at most 32.0 GiB that one app is allowed to reserve of RAM"
            for ask in (dict(memory_mb=3*1024), dict(gpu_memory_mb=1024, memory_mb=3*1024)):
                with pytest.raises(ResourceBusy, match=text): manager.reserve(**ask, timeout=0)
                assert re.search(text, foresee(manager, **dict(gpu_memory_mb=None) | ask).why)
            waits = manager.request(memory_mb=3*1024)
            assert waits.poll() is None
            assert re.search(text, read_queue(manager, manager.ledger)[-1].why)
            assert re.search(text, manager.check_gpu_availability().waiting[0].why)
            with other.reserve(1024, memory_mb=20*1024, timeout=0): pass
            with manager.reserve(memory_mb=2*1024, timeout=0): pass
        for call in (manager.reserve, partial(foresee, manager, None)):
            with pytest.raises(ValueError, match="one app is allowed to reserve here: 32.0 GiB"):
                call(memory_mb=33*1024)
        wait_until(waits.poll, 10)
        waits.withdraw()


def test_what_one_user_may_have_counts_for_jobs_previews_and_the_queue(rig):
    "A job whose need is not known asks for that much, and what waits for it says so everywhere"
    (store_path().parent).mkdir(mode=0o700, parents=True, exist_ok=True)
    file = store_path().with_name("settings.toml")
    file.write_text("max_share = 0.5")
    file.chmod(0o600)
    with SimulatedDriver([SimulatedGpu("NVIDIA L4", memory_total_mb=24*1024)]) as driver:
        manager, capacity = ResourceManager(app="train"), driver.gpus[0].memory_total_mb*2**20
        with manager.job("unknown") as job:
            assert 0.4*capacity < job.reservation.gpu_memory_mb*2**20 <= capacity/2
            text = "of at most .* that one user is allowed to reserve on GPU 0"
            with pytest.raises(ResourceBusy, match=text): manager.reserve(2*1024, timeout=0)
            assert re.search(f"The request would wait. .*{text}", foresee(manager, 2*1024).why)
            request = manager.request(2*1024)
            assert request.poll() is None
            assert re.search(text, read_queue(manager, manager.ledger)[1].why)
            sample = take_sample(manager)
            row = to_json(sample)["gpu"]["waiting"][0]
            for told in (sample.gpu.waiting[0].why, row["why"], render_reservations(sample, View()),
                         to_text(promise_table((), 200, sample.gpu.waiting))): assert re.search(text, told)
            assert from_json(json.loads(json.dumps(to_json(sample)))).gpu.waiting[0].why == row["why"]
        with pytest.raises(ValueError, match="more than one user is allowed to reserve here"): manager.reserve(13*1024)
        with pytest.raises(ValueError, match="A whole GPU is more"): manager.reserve("all")
        wait_until(request.poll, 10)
        request.withdraw()
        file.chmod(0o666)
        with pytest.raises(StoreError, match="another user than root"): manager.reserve(1, timeout=0)


def test_a_short_request_passes_a_large_one_only_where_it_ends_before_that_one_can_start(folder):
    "Declared time against the shortest job of the holder's kind; `queue` says so, and it cannot be prolonged"
    with SimulatedDriver([SimulatedGpu("NVIDIA L4", memory_total_mb=24*1024)]):
        manager = ResourceManager(app="train", track_self=False)
        for seconds in (600.0, 900.0):
            manager.needs.record(JobRun(need_key("train.py"), time.time(), seconds))
        with manager.job("job-1", 16*1024, plugin="train.py"):
            large, small = manager.request(20*1024), partial(manager.request, 4*1024)
            assert large.poll() is None
            for waits in (small(), small(ttl=60), small(duration=460)):
                assert waits.poll() is None
                waits.withdraw()
            passes = small(duration=60)
            assert passes.poll()
            held = next(c for c in manager.ledger.claims() if c.lease == passes.lease)
            row = next(row for row in read_queue(manager, manager.ledger) if row.id == held.id)
            number = next(c.id for c in manager.ledger.claims() if c.lease == large.lease)
            assert row.why == f"Started ahead of request {number}, because it ends before that request can start."
            assert 59 < held.expires - machine_time() <= 60
            with pytest.raises(ValueError, match=f"at most .* not 90: request {number} was passed"):
                manager.ledger.renew(held.lease, 90)
            assert manager.ledger.renew(held.lease, 30)   # sooner is no harm
            passes.withdraw()
        wait_until(large.poll, 10)
        large.withdraw()


def test_where_a_holder_is_not_known_a_short_request_waits(folder):
    with SimulatedDriver([SimulatedGpu("NVIDIA L4", memory_total_mb=24*1024)]):
        manager = ResourceManager(app="train", track_self=False)
        with manager.reserve(16*1024):
            large, small = manager.request(20*1024), manager.request(4*1024, duration=1)
            assert large.poll() is None and small.poll() is None
            for request in (small, large): request.withdraw()


def test_a_command_that_says_how_long_it_takes_passes_and_its_reservation_ends(rig):
    with train_of_known_length(rig):
        rig.wait("train", 20)
        for name in ("wait", "run"):
            short = [name, "--gpu-memory", "4GiB", "--timeout", "0", "--", "true"]
            assert rig.run(*short).returncode == os.EX_TEMPFAIL
            assert rig.run(name, "--for", "5m", *short[1:]).returncode == 0
            assert rig.run(name, "--for", "8m", *short[1:]).returncode == os.EX_TEMPFAIL
        done = rig.run("wait", "--for", "1s", "--gpu-memory", "4GiB", "--timeout", "0", "--", "sleep", "1.5")
        assert done.returncode == 0 and len(rig.rows()) == 2
