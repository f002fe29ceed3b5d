"""The examples of the notebooks, against the installed package: no nbdev, no IPython, the module instead of the
exported cells
"""
import ast
import asyncio
import contextlib
import importlib
import inspect
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

# showdoc is about nbdev
NOTEBOOKS = sorted(path for path in (ROOT/"nbs").rglob("[!_.]*.ipynb") if path.stem != "showdoc")


def code_cells(path: Path) -> list[str]:
    return [source for source, _ in code_and_prints(path)]


def code_and_prints(path: Path) -> list[tuple[str, str]]:
    "Each code cell, and what the notebook keeps of what it printed"
    def printed(cell):
        return "".join(line for output in cell["outputs"] if output.get("name") == "stdout" for line in output["text"])
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [("".join(cell["source"]), printed(cell)) for cell in cells if cell["cell_type"] == "code"]


def is_example(source: str) -> bool:
    return not re.search(r"^#\|\s*(export|default_exp|echo: false)|^!|nbdev|IPython", source, re.M)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT/"nbs").with_suffix("")))
def test_examples(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    cells = code_and_prints(path)
    target = next((found[1] for cell, _ in cells if (found := re.search(r"#\|\s*default_exp (\S+)", cell))), None)
    names = dict(vars(importlib.import_module(f"cjm_fasthtml_resources.{target}"))) if target else {}
    names["__name__"] = "__main__"
    examples = [(re.sub(r"^from nbdev.*\n?", "", cell, flags=re.M), kept) for cell, kept in cells]
    examples = [(cell, kept) for cell, kept in examples if is_example(cell) and cell.strip()]
    assert len(examples) >= 3 or not target
    for cell, kept in examples:
        name = f"{path.name}: {cell[:60]!r}"
        code = compile(cell, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)  # as in a notebook
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            if code.co_flags & inspect.CO_COROUTINE: asyncio.run(eval(code, names))
            else: exec(code, names)
        assert printed.getvalue().strip() == kept.strip(), cell


def test_the_example_program_shows_what_it_says_and_leaves_nothing_running():
    out = subprocess.run([sys.executable, ROOT/"examples/one_gpu.py"], capture_output=True, text=True, timeout=60)
    assert (out.returncode, out.stderr) == (0, "")
    shown = out.stdout
    expected = (
        "Nobody is there: PROCEED", "began job-1", "A fourth: WAIT_FOR_JOB",
        "ended job-1", "began job-2", "ended job-2", "began job-3", "ended job-3",
        "WAIT_FOR_OTHER_WORKER", "Stopped: llama and then: PROCEED", "began job-4", "began job-5 at once",
        "0 workers, 0 promises; A GPU job can start now")
    places = [shown.index(text) for text in expected]
    assert places == sorted(places)
    started = set(map(int, re.findall(r"PID (\d+)", shown)))
    assert started and not any(psutil.pid_exists(pid) for pid in started)


def test_every_rule_has_an_assertion():
    assertion = r"\btest_eq\(|\btest_fail\(|^\s*assert |: assert "
    definition = r"^(?:def|class) [a-zA-Z]"
    for path in NOTEBOOKS:
        cells = code_cells(path)
        asserted = sum(len(re.findall(assertion, cell, re.M)) for cell in cells if is_example(cell))
        defined = sum(len(re.findall(definition, cell, re.M)) for cell in cells if "#| export" in cell)
        assert asserted >= defined, f"{path.name}: {asserted} assertions for {defined} public definitions"
