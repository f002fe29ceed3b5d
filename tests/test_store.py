"The file that processes share: its place, its rows, and what is said when it cannot be used"
import errno
import json
import os
import pwd
import signal
import sqlite3
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import GONE, Server, warned
from lines import interrupted_at

from cjm_fasthtml_resources.core import asking, database, store
from cjm_fasthtml_resources.core import folder as places
from cjm_fasthtml_resources.core import process as proc
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.resources import ResourceStatus, WorkerState
from cjm_fasthtml_resources.core.roster import WorkerRow, from_row, to_row
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess


def raises(error):
    "A function that raises it, whatever it is called with"
    def fails(*args): raise error
    return fails


def test_the_files_are_the_users_for_one_run_of_the_machine_whatever_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("CJM_RESOURCES_DIR", raising=False)
    home = pwd.getpwuid(os.geteuid()).pw_dir
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    expected = Path(home)/".local/state/cjm-fasthtml-resources"/boot/"resources.sqlite"
    assert store.store_path() == expected
    assert store.Store(expected).lock_path == expected.with_name("resources.lock")
    # a service, `sudo -E` and a container have another environment, and share the same machine
    for name in ("HOME", "XDG_STATE_HOME", "USER", "HOSTNAME"): monkeypatch.setenv(name, str(tmp_path))
    assert store.store_path() == expected
    monkeypatch.delenv("HOME")
    assert store.store_path() == expected
    monkeypatch.setattr(proc, "_namespace", lambda *where: 4711)
    assert store.store_path() == expected
    monkeypatch.setattr(places, "boot_id", lambda: "another")
    assert store.store_path() == expected.parent.parent/"another"/"resources.sqlite"


def test_a_user_without_a_home_has_to_name_a_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("CJM_RESOURCES_DIR", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", raises(KeyError("no such user")))
    with pytest.raises(store.StoreError, match=rf"UID {os.geteuid()} .* set CJM_RESOURCES_DIR"): store.store_path()
    monkeypatch.setenv("CJM_RESOURCES_DIR", "/elsewhere")
    assert store.store_path() == Path("/elsewhere/resources.sqlite")
    monkeypatch.setenv("CJM_RESOURCES_DIR", "nearby")
    monkeypatch.chdir(tmp_path)
    assert store.store_path() == tmp_path/"nearby"/"resources.sqlite"
    monkeypatch.chdir("/")   # the same one, wherever the program goes
    assert store.store_path() == tmp_path/"nearby"/"resources.sqlite"


def test_a_row_has_no_secrets_and_takes_what_is_no_json():
    remote = {"provider": Path("/x"), "api_key": "sk-2"}
    config = {"path": Path("/m"), "api_key": "sk-1"}
    state = WorkerState(7, "llm", config=config, is_remote=True, remote_resource=remote)
    again, starts, *_ = from_row(to_row(WorkerRow(state, {8: None})))
    assert (again.config, again.remote_resource) == (
        {"path": "<PosixPath, hidden>", "api_key": "<str, 4 characters>"},
        {"provider": "<PosixPath, hidden>", "api_key": "<str, 4 characters>"})
    assert starts == {8: None}

    def config_of(known): return from_row(to_row(WorkerRow(state)), {known.pid: known}).state.config
    assert config_of(state) == state.config
    assert config_of(replace(state, start_time=1.0)) == again.config
    # it was changed by another process
    assert config_of(replace(state, config={"path": Path("/n"), "api_key": "sk-1"})) == again.config


def rows(manager):
    with manager.ledger.store.reading() as db: return db.execute("SELECT seq, pid, boot FROM workers").fetchall()


def test_nothing_is_written_when_a_manager_is_made_or_workers_are_looked_up(folder, spawn):
    registrar = spawn("from cjm_fasthtml_resources.core.manager import ResourceManager\n"
                      "ResourceManager(app='rows').register_worker(int(input()), 'llm')\n"
                      "print('done', flush=True); input()")
    worker, lives, mine = spawn("input()"), spawn("input()"), ResourceManager(app="rows")
    registrar.stdin.write(f"{worker.pid}\n")
    registrar.stdin.flush()
    assert registrar.stdout.readline() == "done\n"
    mine.register_worker(lives.pid, "llm")
    before = rows(mine)
    for process in (registrar, worker):
        process.kill()
        process.wait()
        other = ResourceManager(app="rows")
        found = [w.pid for w in other.get_all_workers()]
        assert found == ([lives.pid] if process is worker else [worker.pid, lives.pid])
        assert rows(mine) == before
    other.update_worker_state(lives.pid, job_id="j")
    assert [pid for _, pid, _ in rows(mine)] == [lives.pid]   # the next change deletes what is over
    assert [w.pid for w in mine.get_all_workers()] == [lives.pid]


def test_of_another_run_of_the_machine_nothing_lives_and_of_another_container_everything(folder, spawn):
    mine, lives = ResourceManager(app="rows"), spawn("input()").pid
    for pid in (os.getpid(), lives, GONE): mine.register_worker(pid, "llm", f"job-{pid}", gpu_memory_mb=5)
    with mine.ledger.store.transaction() as db:
        db.execute("UPDATE workers SET boot = 'before' WHERE pid = ?", [os.getpid()])
        db.execute("UPDATE workers SET space = 4711, by_pid = ? WHERE pid IN (?, ?)", [GONE, lives, GONE])
    other = ResourceManager(app="rows")
    assert [w.pid for w in other.get_all_workers()] == [lives, GONE]
    assert other.get_worker_by_job(f"job-{GONE}").pid == GONE and other.get_app_pids() == {lives, GONE}
    assert other.prune_dead_workers() == []
    # their numbers mean nothing here
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(GONE, 700)])]):
        assert ResourceManager(app="rows", track_self=False).check_gpu_availability().app_pids == []
    stranger = ResourceManager(app="rows", track_self=False)
    with pytest.raises(PermissionError, match="does not belong to this app"): stranger.stop_worker(lives)
    mine = other.register_worker(GONE, "speech")   # this container's own with that number
    assert other.get_worker_by_pid(GONE) is mine
    assert [pid for _, pid, _ in rows(other)] == [lives, GONE, GONE]
    other.unregister_worker(GONE)
    assert ResourceManager(app="rows").get_worker_by_pid(GONE).worker_type == "llm"


def test_a_reader_that_is_suspended_holds_up_one_change_and_no_reservation_for_long(folder, spawn):
    mine, path = ResourceManager(app="rows"), folder/"resources.sqlite"
    mine.register_worker(os.getpid(), "w")
    reader = spawn("import os, signal\n"
                   "from cjm_fasthtml_resources.core.store import Store, store_path\n"
                   "with Store(store_path()).reading() as db:\n"
                   "    read = lambda: db.execute('SELECT count(*) FROM workers').fetchone()[0]\n"
                   "    before = read(); print(flush=True); os.kill(os.getpid(), signal.SIGSTOP)\n"
                   "    print(before, read(), flush=True)\n"
                   "with Store(store_path()).reading() as db: print(read(), flush=True)")
    reader.stdout.readline()
    os.waitpid(reader.pid, os.WUNTRACED)   # until it is suspended
    inode, others, took = path.stat().st_ino, [spawn("input()") for _ in range(3)], []
    for other in others:
        began = time.monotonic()
        ResourceManager(app="rows").register_worker(other.pid, "w")
        took.append(time.monotonic() - began)
    assert took[0] < 5 and min(took[1:]) < 0.4 and path.stat().st_ino != inode
    assert len(mine.get_all_workers()) == 4
    with mine.reserve(memory_mb=1, timeout=0): pass
    reader.send_signal(signal.SIGCONT)
    assert [reader.stdout.readline() for _ in range(2)] == ["1 1\n", "4\n"]
    mine.register_worker(others[0].pid, "w")
    assert sorted(file.name for file in folder.glob("resources*")) == ["resources.lock", "resources.sqlite"]


def test_an_interruption_of_such_a_change_leaves_the_old_tables_or_the_new_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "_READER_SECONDS", 0.0)
    one, number, found = store.Store(tmp_path/"state"/"resources.sqlite"), 0, set()
    one.prepare()
    def change(name):
        with one.transaction() as db: db.execute("INSERT INTO apps VALUES (?, 1)", [name])
    def apps():
        with one.reading() as db: return [name for name, in db.execute("SELECT app FROM apps ORDER BY app")]
    is_over = False
    while not is_over:
        before, reader = apps(), sqlite3.connect(one.path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM apps").fetchall()   # and then it is suspended
        is_over = not interrupted_at(number, ("core/database.py",), partial(change, f"{number:04}"))
        after = apps()
        found.add(after == before)
        assert after in (before, [*before, f"{number:04}"]), number
        change(f"{number:04}+")
        reader.close()
        assert apps() == [*after, f"{number:04}+"], number
        left = sorted(file.name for file in one.path.parent.iterdir())
        assert left == ["resources.lock", "resources.sqlite"], number
        number += 1
    assert found == {True, False} and number > 60


def test_a_secret_that_another_process_changed_is_seen_as_changed_and_never_written(folder):
    mine, other = ResourceManager(app="rows"), ResourceManager(app="rows")
    mine.register_worker(GONE, "llm", config={"model": "m", "api_key": "sk-mine"})
    other.update_worker_state(GONE, status="running")    # it does not know the key, and does not lose it
    assert mine.get_worker_by_pid(GONE).config["api_key"] == "sk-mine"
    other.update_worker_state(GONE, config={"model": "m", "api_key": "sk-theirs"})
    assert mine.get_worker_by_pid(GONE).config == {"model": "m", "api_key": "<str, 9 characters>"}
    mine.update_worker_state(GONE, status="idle")
    assert other.get_worker_by_pid(GONE).config["api_key"] == "sk-theirs"
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"sk-" not in written


def test_a_file_keeps_when_declared_children_started(folder):
    manager, plugin = ResourceManager(app="rows"), Server()
    plugin.children = [os.getpid(), GONE]
    manager.register_worker(5_000_007, "llm", plugin_instance=plugin)
    with manager.ledger.store.reading() as db: (row,), _, _ = manager.workers.roster.read(db)
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
    monkeypatch.setattr(manager.workers.roster, "add", raises(store.StoreError("/a is full")))
    with SimulatedDriver([SimulatedGpu(processes=[SimulatedProcess(os.getpid(), 700)])]):
        assert manager.check_gpu_availability().status is ResourceStatus.APP_BUSY
        manager.needs._writer.join()
        assert warned(caplog) == ["keeping the needs of plugins failed: /a is full"]
        assert manager.check_memory_availability().notes == ()
        monkeypatch.setattr(asking, "REFRESH_AFTER", -1)
        plugin.children = [GONE + 1]
        monkeypatch.setattr(manager.workers.roster, "write", raises(store.StoreError("/a is read-only")))
        found = manager.check_gpu_availability()   # what its plugin says now cannot be kept
        assert found.reason == "cannot read the reservations: /a is read-only"
        assert found.snapshot.devices and found.threshold_percent == 45.0 and found.devices == ()
        assert manager.check_memory_availability().notes == (
            "The list of workers can be out of date: /a is read-only",
            "Reading the reservations failed, so no memory counts as free")
        path.rename(f"{path}.away")
        gone = f"{path} was removed while other programs use it. End them; the file is then re-created"
        assert manager.check_gpu_availability().reason == f"cannot read the reservations: {gone}"
        Path(f"{path}.away").rename(path)
        assert manager.check_gpu_availability().reason == "cannot read the reservations: /a is read-only"
        path.with_suffix(".lock").rename(f"{path}.lock-away")
        gone = (f"{path} was removed or replaced while this program uses it; "
                "end the programs that use it, and start them again")
        assert manager.check_gpu_availability().reason == f"cannot read the reservations: {gone}"
        # in memory, it needs no file
        assert ResourceManager().check_gpu_availability().status is ResourceStatus.APP_BUSY


def test_a_damaged_file_is_made_anew_in_a_folder_of_its_own(tmp_path, caplog):
    path = tmp_path/"deep"/"er"/"apps.sqlite"
    first = store.Store(path)
    with first.transaction() as db: db.execute("INSERT INTO apps VALUES ('a', 1)")
    assert [p.stat().st_mode & 0o777 for p in (path.parent, path, first.lock_path)] == [0o700, 0o600, 0o600]
    first.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff"*len(data[4096:])
    path.write_bytes(data)
    second = store.Store(path)
    with second.reading() as db: assert db.execute("SELECT count(*) FROM apps").fetchone() == (0,)
    assert path.read_bytes() == data and warned(caplog) == []   # a reading writes nothing
    with second.transaction() as db: assert db.execute("SELECT count(*) FROM apps").fetchone() == (0,)
    message, = warned(caplog)
    assert message.startswith(f"{path} was damaged (") and "(None)" not in message
    assert message.endswith(f") and set aside as {path}.damaged-1")
    assert Path(f"{path}.damaged-1").read_bytes() == data and path.stat().st_mode & 0o777 == 0o600
    with second.reading() as db: assert db.execute("SELECT count(*) FROM apps").fetchone() == (0,)
    second.close()


def test_a_damaged_file_is_set_aside_with_what_belongs_to_it(tmp_path):
    path, suffixes = tmp_path/"apps.sqlite", ("", "-journal")
    for number in (1, 2):
        for suffix in suffixes: Path(f"{path}{suffix}").write_text(f"{number}{suffix}")
        aside = f"{path}.damaged-{number}"
        assert database._set_aside(path) == Path(aside)
        for suffix in suffixes: assert Path(f"{aside}{suffix}").read_text() == f"{number}{suffix}"
    assert list(tmp_path.glob("apps.sqlite*")) == list(tmp_path.glob("apps.sqlite.damaged-*"))


def test_what_is_damage():
    assert database.is_damage(sqlite3.DatabaseError("malformed"))
    assert database.is_damage(sqlite3.OperationalError("no such table: world"))   # a file that another program made
    assert not database.is_damage(sqlite3.OperationalError("locked"))
    assert not database.is_damage(sqlite3.InterfaceError("x"))
    assert not database.is_damage(OSError("no such table"))


@pytest.mark.parametrize("path, error, said", [
    (None, "interrupted", "the store in memory cannot be used: interrupted"),
    (Path("/a"), "database is locked",
     "/a has been locked by another process for 30 s. It might be suspended (Ctrl-Z)"),
    (Path("/a"), "database or disk is full", "/a cannot be written: its disk is full"),
    (Path("/a"), "attempt to write a readonly database", "/a cannot be written: it or its disk is read-only"),
    (Path("/a"), "unable to open database file", "/a cannot be opened. Check that its folder is writable"),
], ids=["interrupted", "locked", "full", "read-only", "not opened"])
def test_what_is_wrong_with_a_file_is_said_in_words(path, error, said):
    assert store.explain_error(path, sqlite3.OperationalError(error)) == said


@pytest.mark.parametrize("number, said", [
    (errno.ENOSPC, "cannot be written: its disk is full"),
    (errno.EROFS, "cannot be written: it or its disk is read-only"),
    (errno.EACCES, "cannot be opened. Check that its folder is writable"),
    (errno.EMFILE, "cannot be opened: this process is out of file descriptors (ulimit -n)"),
], ids=["full", "read-only", "not allowed", "no descriptor"])
@pytest.mark.parametrize("path", [Path("/a"), Path("/busy/fully locked readonly/a")], ids=["a", "a telling name"])
def test_what_the_system_says_of_a_file_is_said_in_words_whatever_its_name(path, number, said):
    assert store.explain_error(path, OSError(number, os.strerror(number), str(path))) == f"{path} {said}"
