"The history: a recorder that is killed, a full disk, a clock that jumps, hostile names, months in 64 MB"
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from click.testing import CliRunner
from conftest import GIB, wait_until

from cjm_fasthtml_resources import explain_out_of_memory
from cjm_fasthtml_resources.cli import main
from cjm_fasthtml_resources.core.folder import StoreError
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.recorded.changes import Change
from cjm_fasthtml_resources.recorded.file import (
    LEVELS,
    MINUTE,
    QUARTER,
    SECOND,
    add,
    alone,
    opened,
    read_changes,
    read_rows,
)
from cjm_fasthtml_resources.recorded.history import RecordedHistory
from cjm_fasthtml_resources.recorded.recorder import Recorder
from cjm_fasthtml_resources.recorded.rows import Place, Row, Share
from cjm_fasthtml_resources.simulate import (
    SimulatedDriver,
    SimulatedGpu,
    SimulatedHostProcess,
    SimulatedMachine,
    SimulatedProcess,
)

HOSTILE = "\x1b]0;owned\x07<script>alert(1)</script>\n\u202e"


def row_at(when: float, seconds: float = 1.0, processes: int = 1) -> Row:
    "A row of a GPU with so many processes, whose names do not compress well"
    shares = tuple(Share(1000 + n, n*7.31, "external", os.urandom(20).hex(), "ada", GIB, GIB) for n in range(processes))
    gpu = Place("GPU-1", 0, "NVIDIA L4", "available", 24*GIB, GIB, GIB, 0, GIB, 0, 0, 5, 40, 30.0, shares)
    return Row(when, seconds, (gpu,))


RECORDER = """
import sys, time
from pathlib import Path
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.recorded import recorder
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
recorder.FLUSH_SECONDS = 0.02
with SimulatedDriver([SimulatedGpu()]):
    with recorder.Recorder(ResourceMonitor(ResourceManager(), interval=0.1), Path(sys.argv[1])) as made:
        print(made.records, flush=True)
        time.sleep(60)
"""


def start_recorder(path: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", RECORDER, path], stdout=subprocess.PIPE, text=True)


def test_a_recorder_that_is_killed_leaves_a_good_file_and_the_next_one_takes_over(tmp_path):
    path = tmp_path/"history.sqlite3"
    for _ in range(3):
        with start_recorder(path) as process:
            assert process.stdout.readline() == "True\n"       # nothing of the killed one is in the way
            known = len(read_rows(path, SECOND))
            wait_until(lambda known=known: len(read_rows(path, SECOND)) > known)
            process.kill()
    with opened(path) as db: assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    began = [change for _, change in read_changes(path) if change.kind == "recording"]
    assert len(began) == 3 and not list(tmp_path.glob("*.damaged*"))


def test_a_recorder_that_is_suspended_is_not_written_beside(tmp_path):
    path = tmp_path/"history.sqlite3"
    with start_recorder(path) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        with alone(path) as free: assert not free
        process.kill()


def test_on_a_full_disk_nothing_is_lost_for_a_while_and_the_file_stays_good(tmp_path):
    path = tmp_path/"history.sqlite3"
    add(path, [row_at(1)])
    with opened(path) as db: pages = db.execute("PRAGMA page_count").fetchone()[0]
    monitor = ResourceMonitor(ResourceManager())
    with SimulatedDriver([SimulatedGpu()]):
        recorder = Recorder(monitor, path)
        with monitor.subscribe(recorder._hear): wait_until(lambda: monitor.latest)
    full = patch.dict(add.__globals__, LARGEST=4096*(16 + pages), _make_room=lambda db: None)
    with full, pytest.raises(StoreError, match="cannot be written: its disk is full"):
        add(path, [row_at(2 + n, processes=64) for n in range(50)])
    assert [row.time for row in read_rows(path, SECOND)] == [1]   # all or none
    recorder.flush()
    assert len(read_rows(path, SECOND)) == 2


def test_what_is_kept_stays_within_its_size_and_keeps_the_newest(tmp_path):
    path, limit = tmp_path/"history.sqlite3", 2_000_000
    with patch.dict(add.__globals__, LARGEST=limit):
        for batch in range(20):
            add(path, [row_at(1000*(20*batch + n), processes=60) for n in range(20)])
            assert path.stat().st_size <= limit
    for level in LEVELS:
        kept = read_rows(path, level)
        assert 20 < len(kept) < 400, level
    assert read_rows(path, SECOND)[-1].time == 399_000


def test_ninety_days_of_quarters_a_day_of_minutes_and_an_hour_of_seconds_are_kept(tmp_path):
    path, counts = tmp_path/"history.sqlite3", dict[int, int]()
    small = [level._replace(keeps=level.keeps//60) for level in LEVELS]
    with patch.dict(add.__globals__, LEVELS=small):
        for start in range(0, 400_000, 20_000): add(path, [row_at(start + n, 100) for n in range(0, 20_000, 100)])
    for level in LEVELS: counts[level.number] = len(read_rows(path, level))
    assert counts == {0: 60, 1: 24, 2: 144}
    assert read_rows(path, QUARTER)[-1].time >= 398_000 and read_rows(path, MINUTE)[-1].time >= 399_000


@pytest.mark.parametrize("jump", [-86_400, 86_400, 31_536_000])
def test_a_clock_that_jumps_deletes_nothing_and_is_told(tmp_path, jump):
    path, now = tmp_path/"history.sqlite3", 1_800_000_000
    add(path, [row_at(now + n) for n in range(300)])
    add(path, [row_at(now + jump + n) for n in range(300)])
    add(path, [row_at(now + 300 + n) for n in range(300)])       # it was set right
    assert len(read_rows(path, SECOND)) == 900
    history = RecordedHistory(path)
    assert history.at(now + 100).seconds == history.at(now + jump + 100).seconds == 1
    assert sum(row.seconds for row in read_rows(path, MINUTE)) <= 900


def test_hostile_names_stay_text(tmp_path):
    path = tmp_path/"history.sqlite3"
    gpu = SimulatedGpu()
    machine = SimulatedMachine(processes=[SimulatedHostProcess(4711, HOSTILE, HOSTILE)])
    with SimulatedDriver([gpu], machine):
        monitor = ResourceMonitor(ResourceManager(app="x" + "y"*50), interval=0.1)
        with Recorder(monitor, path):
            wait_until(lambda: monitor.latest)
            gpu.processes.append(SimulatedProcess(4711, 2000))
            number = monitor.latest.number
            wait_until(lambda: monitor.latest.number > number + 2)
    for arguments in (["--since", "10s"], ["--at", time.strftime("%Y-%m-%dT%H:%M:%S")], ["--json"], ["--csv"]):
        output = CliRunner().invoke(main, ["history", "--file", str(path), *arguments]).output
        assert not {"\x1b", "\x07", "\u202e"} & set(output), arguments
    assert "4711" in CliRunner().invoke(main, ["history", "--file", str(path), "--since", "10s"]).output


def test_a_reader_and_a_writer_do_not_stop_each_other(tmp_path):
    path = tmp_path/"history.sqlite3"
    with start_recorder(path) as process:
        process.stdout.readline()
        until = time.monotonic() + 2
        while time.monotonic() < until: RecordedHistory(path).between(time.time() - 10)
        process.kill()
    assert read_rows(path, SECOND)


def test_another_users_file_is_not_used(tmp_path):
    path = tmp_path/"history.sqlite3"
    add(path, [row_at(1)])
    path.chmod(0o666)
    with pytest.raises(StoreError, match="can be written by other users"): read_rows(path, SECOND)
    result = CliRunner().invoke(main, ["history", "--file", str(path)])
    assert result.exit_code == 74 and "can be written by other users" in result.output


def test_a_file_of_a_later_version_is_said_and_left(tmp_path):
    path = tmp_path/"history.sqlite3"
    add(path, [row_at(1)])
    with opened(path, "rw") as db: db.execute("PRAGMA user_version = 99")
    for use in (lambda: read_rows(path, SECOND), lambda: add(path, [row_at(2)])):
        with pytest.raises(StoreError, match="has version 99"): use()
    assert path.exists() and not list(tmp_path.glob("*.damaged*"))


def lacks_memory(**more) -> str:
    "The explanation of an error on a GPU that another program has filled"
    gpu = SimulatedGpu(memory_total_mb=24576, uuid="GPU-1", processes=[SimulatedProcess(4711, 24000)])
    with SimulatedDriver([gpu], SimulatedMachine(processes=[SimulatedHostProcess(4711, "train.py", "bob")])):
        found = explain_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 8.00 GiB."), **more)
    assert found is not None and "train.py" in found
    return found


def test_an_explanation_names_who_came_shortly_before_and_not_who_came_long_before(tmp_path):
    path, now = tmp_path/"history.sqlite3", time.time()
    came = Change("started", "GPU-1", 4711, f"{HOSTILE} (PID 4711, bob) started on GPU 0, 27.0 GiB.")
    add(path, [], [(now - 4000, came._replace(text="long ago")), (now - 60, came),
                   (now - 50, came._replace(place="GPU-2", text="elsewhere")),
                   (now - 40, came._replace(pid=os.getpid(), text="the job itself"))])
    text = lacks_memory(history=path)
    clock = time.strftime("%H:%M", time.localtime(now - 60))
    assert f"Shortly before: at {clock}" in text and "(PID 4711, bob) started on GPU 0, 27.0 GiB. To fix it" in text
    assert not {"\x1b", "\x07", "\u202e", "\n"} & set(text)
    assert not any(words in text for words in ("long ago", "elsewhere", "itself"))


def test_an_explanation_goes_without_a_history_that_cannot_be_read_now(tmp_path):
    path = tmp_path/"history.sqlite3"
    plain = lacks_memory()
    assert lacks_memory(history=path) == plain and not path.exists()
    add(path, [], [(time.time(), Change("started", "GPU-1", 4711, "train.py started."))])
    assert "Shortly before" in lacks_memory(history=path)
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")                              # a recorder in the middle of writing
    began = time.monotonic()
    assert lacks_memory(history=path) == plain
    assert time.monotonic() - began < 4                            # SQLite's own wait would be 5 s
    writer.execute("UPDATE changes SET text = x'ff', pid = 'x'")
    writer.execute("COMMIT")
    assert "Cannot read" not in lacks_memory(history=path)
    writer.execute("UPDATE changes SET time = 1e300")
    writer.close()
    assert lacks_memory(history=path) == plain
    path.write_bytes(b"damaged"*1000)
    assert lacks_memory(history=path) == plain
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"damaged"*1000


def test_where_there_is_no_history_an_explanation_does_not_import_it(tmp_path):
    code = ("import sys\nfrom cjm_fasthtml_resources.core.out_of_memory import history_file, read_lately\n"
            "assert read_lately() == ()\nassert not any('.recorded' in name for name in sys.modules)\n"
            "from cjm_fasthtml_resources.recorded.file import history_path\nassert history_file() == history_path()\n")
    env = dict(os.environ, CJM_RESOURCES_DIR=str(tmp_path))
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)
