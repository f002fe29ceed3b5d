"The history: a recorder that is killed, a full disk, a clock that jumps, hostile names, months in 64 MB"
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from click.testing import CliRunner
from conftest import GIB, wait_until

from cjm_fasthtml_resources.cli import main
from cjm_fasthtml_resources.core.folder import StoreError
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
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
