"""No cursor outlives its line: one that a traceback keeps has its statement open, and so the file locked, even after
its connection is closed"""
import ast
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cjm_fasthtml_resources
from cjm_fasthtml_resources.core import roster
from cjm_fasthtml_resources.core.manager import ResourceManager

PACKAGE = Path(cjm_fasthtml_resources.__file__).parent
WHOLE = ("fetchone", "fetchall", "rowcount", "lastrowid")   # what ends a statement, or tells of one that ended


def left_open(source: str) -> Iterator[int]:
    "The lines with a call of `execute` whose cursor is kept, passed on or iterated over"
    tree = ast.parse(source)
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != "execute": continue
        parent = above[node]
        if isinstance(parent, ast.Expr) or isinstance(parent, ast.Attribute) and parent.attr in WHOLE: continue
        yield node.lineno


@pytest.mark.parametrize("line, found", [
    ("db.execute('BEGIN')", []), ("x = db.execute('SELECT 1').fetchone()", []), ("x = db.execute('SELECT 1')", [1]),
    ("[r for r in db.execute('SELECT 1')]", [1]), ("list(db.execute('SELECT 1'))", [1])])
def test_it_finds_what_is_left_open(line, found): assert [*left_open(line)] == found


def test_no_cursor_of_the_package_outlives_its_line():
    found = [f"{path.relative_to(PACKAGE)}:{line}" for path in sorted(PACKAGE.rglob("*.py"))
             for line in left_open(path.read_text())]
    assert found == []


def test_who_cleans_up_after_an_interruption_finds_the_file_unlocked(tmp_path, monkeypatch):
    "As the end of a job does while the error is on its way: its traceback has all frames"
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    manager, other = (ResourceManager(app="chat", track_self=False) for _ in range(2))
    manager.register_worker(os.getpid(), "llm")

    def interrupted(*rows: object) -> None: raise KeyboardInterrupt
    with monkeypatch.context() as patched:
        patched.setattr(roster, "_divide", interrupted)
        try: other.get_all_workers()
        except KeyboardInterrupt:
            patched.undo()
            began = time.monotonic()
            manager.update_worker_state(os.getpid(), status="running", job_id="job-1")
            assert time.monotonic() - began < 5
        else: pytest.fail("it was not interrupted")
    assert manager.get_worker_by_pid(os.getpid()).job_id == "job-1"
