"The file that processes share: its place, its rows, and what is said when it cannot be used"
import json
import os
import platform
import sqlite3
from dataclasses import replace
from pathlib import Path

import platformdirs
import pytest
from conftest import GONE, Server, warned

from cjm_fasthtml_resources.core import asking, store
from cjm_fasthtml_resources.core import process as proc
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.resources import ResourceStatus, WorkerState
from cjm_fasthtml_resources.core.roster import from_row, to_row
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess


def raises(error):
    "A function that raises it, whatever it is called with"
    def fails(*args): raise error
    return fails


def test_the_file_is_the_machines_and_in_a_container_the_containers(monkeypatch):
    monkeypatch.delenv("CJM_RESOURCES_DIR", raising=False)
    monkeypatch.setattr(platform, "node", lambda: "lab 7/ä.local")
    monkeypatch.setattr(proc, "_namespace", lambda *where: {("/proc", "self"): space}[where])
    space = proc._FIRST_PID_NAMESPACE
    folder = Path(platformdirs.user_state_dir("cjm-fasthtml-resources", appauthor=False))
    assert store.store_path() == folder/"lab_7_ä.local.sqlite"
    space = None
    assert store.store_path() == folder/"lab_7_ä.local.sqlite"
    space = 4711
    assert store.store_path() == folder/"lab_7_ä.local-4711.sqlite"
    monkeypatch.setattr(platform, "node", lambda: "")
    assert store.store_path() == folder/"localhost-4711.sqlite"
    monkeypatch.setenv("CJM_RESOURCES_DIR", "/elsewhere")
    assert store.store_path() == Path("/elsewhere/localhost-4711.sqlite")


def test_a_row_has_no_secrets_and_takes_what_is_no_json():
    remote = {"provider": Path("/x"), "api_key": "sk-2"}
    config = {"path": Path("/m"), "api_key": "sk-1"}
    state = WorkerState(7, "llm", config=config, is_remote=True, remote_resource=remote)
    again, starts = from_row(to_row(state, {8: None}))
    assert (again.config, again.remote_resource) == (
        {"path": "/m", "api_key": "***"}, {"provider": "/x", "api_key": "***"})
    assert starts == {8: None}

    def config_of(known): return from_row(to_row(state, {}), {known.pid: known})[0].config
    assert config_of(state) == state.config
    assert config_of(replace(state, start_time=1.0)) == again.config
    # it was changed by another process
    assert config_of(replace(state, config={"path": Path("/n"), "api_key": "sk-1"})) == again.config


def test_a_file_keeps_when_declared_children_started(folder):
    manager, plugin = ResourceManager(app="rows"), Server()
    plugin.children = [os.getpid(), GONE]
    manager.register_worker(7, "llm", plugin_instance=plugin)
    with manager.ledger.store.reading() as db: row, = manager.workers.roster.read(db)
    assert json.loads(row)[1] == [[os.getpid(), proc.read_start(os.getpid())], [GONE, None]]
    other = ResourceManager(app="rows")
    other.get_all_workers()
    assert other.workers.table.children == manager.workers.table.children


def test_a_worker_that_another_process_registers_anew_loses_its_plugin(folder):
    mine, other = ResourceManager(app="rows"), ResourceManager(app="rows")
    for pid in (GONE, GONE + 1): mine.register_worker(pid, "llm", plugin_instance=Server())
    other.update_worker_state(GONE, status="running")
    mine.get_all_workers()
    assert set(mine.workers.plugins) == {GONE, GONE + 1}   # a change is no registration
    other.unregister_worker(GONE)
    mine.get_all_workers()
    assert set(mine.workers.plugins) == {GONE + 1} and mine.workers.table.children == {GONE: {GONE + 1: None}}
    reads = []
    read = mine.workers.roster.read
    mine.workers.roster.read = lambda db: (reads.append(1), read(db))[1]
    for _ in range(3): mine.get_all_workers()
    assert not reads   # nothing has changed, so nothing is read again
    mine.unregister_worker(GONE + 1)
    assert mine.workers.table.children == {} and other.get_all_workers() == []


def test_a_file_that_cannot_be_read_is_named_in_every_answer(folder, caplog, monkeypatch):
    manager, plugin = ResourceManager(app="broken"), Server()
    manager.register_worker(os.getpid(), "llm", plugin_name="a", plugin_instance=plugin)
    path = store.store_path()
    monkeypatch.setattr(manager.workers.roster, "raise_peaks", raises(store.StoreError("/a is full")))
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(os.getpid(), 700)])]):
        assert manager.check_gpu_availability().status is ResourceStatus.APP_BUSY
        assert warned(caplog) == ["what plugins need was not kept: /a is full"]
        assert manager.check_memory_availability().notes == ()
        monkeypatch.setattr(asking, "REFRESH_AFTER", -1)
        plugin.children = [GONE + 1]
        monkeypatch.setattr(manager.workers.roster, "write", raises(store.StoreError("/a is read-only")))
        found = manager.check_gpu_availability()   # what its plugin says now cannot be kept
        assert found.reason == "what is promised cannot be read: /a is read-only"
        assert found.snapshot.devices and found.threshold_percent == 45.0 and found.devices == ()
        assert manager.check_memory_availability().notes == (
            "The app's workers are those of an earlier moment: /a is read-only",)
        path.rename(f"{path}.away")
        gone = (f"{path} was removed or replaced while this program uses it; "
                "end the programs that use it, and start them again")
        assert manager.check_gpu_availability().reason == f"what is promised cannot be read: {gone}"
        # in memory, it needs no file
        assert ResourceManager().check_gpu_availability().status is ResourceStatus.APP_BUSY


def test_a_damaged_file_is_made_anew_in_a_folder_of_its_own(tmp_path, caplog):
    path = tmp_path/"deep"/"er"/"apps.sqlite"
    first = store.Store(path)
    with first.transaction() as db: db.execute("INSERT INTO apps VALUES ('a', 1)")
    assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    first.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff"*len(data[4096:])
    path.write_bytes(data)
    second = store.Store(path)
    with second.reading() as db: assert db.execute("SELECT count(*) FROM apps").fetchone() == (0,)
    message, = warned(caplog)
    assert message.startswith(f"{path} was damaged (") and "(None)" not in message
    assert message.endswith(f") and set aside as {path}.damaged-1") and Path(f"{path}.damaged-1").exists()
    second.close()


def test_a_damaged_file_is_set_aside_with_what_belongs_to_it(tmp_path):
    path, suffixes = tmp_path/"apps.sqlite", ("", "-wal", "-shm")
    for number in (1, 2):
        for suffix in suffixes: Path(f"{path}{suffix}").write_text(f"{number}{suffix}")
        aside = f"{path}.damaged-{number}"
        assert store._set_aside(path) == Path(aside)
        for suffix in suffixes: assert Path(f"{aside}{suffix}").read_text() == f"{number}{suffix}"
    assert not path.exists()


def test_what_is_damage():
    assert store._is_damaged(sqlite3.DatabaseError("malformed"))
    assert not store._is_damaged(sqlite3.OperationalError("locked"))
    assert not store._is_damaged(sqlite3.InterfaceError("x"))


@pytest.mark.parametrize("path, error, said", [
    (None, "interrupted", "the store in memory cannot be used: interrupted"),
    (Path("/a"), "database is locked", "/a is locked by another process for 30 s now; is that one stopped?"),
    (Path("/a"), "database or disk is full", "/a cannot be written, its disk is full"),
    (Path("/a"), "attempt to write a readonly database", "/a cannot be written, it or its disk is read-only"),
    (Path("/a"), "unable to open database file", "/a cannot be opened; may its folder be written?"),
], ids=["interrupted", "locked", "full", "read-only", "not opened"])
def test_what_is_wrong_with_a_file_is_said_in_words(path, error, said):
    assert store.explain_error(path, sqlite3.OperationalError(error)) == said
