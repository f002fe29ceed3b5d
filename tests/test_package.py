"What a user installs: its names, what importing it costs them, and that the texts say what is so"
import dataclasses
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import cjm_fasthtml_resources

sys.path.insert(0, str(ROOT/"tools"))
import measures  # noqa: E402  (next to the tests, not among them)

FOUND = pkgutil.walk_packages(cjm_fasthtml_resources.__path__, "cjm_fasthtml_resources.")
MODULES = [module.name for module in FOUND if module.name.split(".")[-1] not in ("showdoc", "_modidx")]


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env},
                          capture_output=True, text=True, timeout=60)


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", MODULES)
def test_all_names_exist_and_are_documented(name):
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        thing = getattr(module, public)
        if callable(thing): assert (thing.__doc__ or "").strip(), f"{name}.{public} says nothing about itself"


def test_importing_the_manager_brings_no_user_interface_and_touches_no_driver():
    code = "import sys, cjm_fasthtml_resources.core.manager; print(*sorted(sys.modules))"
    loaded = set(python(code).stdout.split())
    assert not loaded & {"ipywidgets", "IPython", "fasthtml", "fastcore", "pynvml", "rich", "click"}
    assert "cjm_fasthtml_resources.core.process" in loaded


def test_the_package_imports_what_it_names_when_that_is_asked_for():
    code = ("import sys, cjm_fasthtml_resources as package\n"
            "print('cjm_fasthtml_resources.core.gpu' in sys.modules, {*package.__all__} <= {*dir(package)})\n"
            "print(package.core.manager.ResourceManager is package.ResourceManager, hasattr(package.core, 'nothing'))\n"
            "from cjm_fasthtml_resources import *\n"
            "print(read_gpus.__name__, ResourcePanel.__name__)")
    assert python(code).stdout.split() == ["False", "True", "True", "False", "read_gpus", "ResourcePanel"]


def test_the_command_searches_for_garbage_again_once_it_is_imported():
    code = ("import gc\nfrom cjm_fasthtml_resources import __main__, cli\n"
            "cli.main = lambda: print(gc.isenabled(), gc.get_freeze_count() > 10_000)\n__main__.main()")
    assert python(code).stdout.split() == ["True", "True"]


def test_type_hints_are_shipped():
    assert os.path.exists(os.path.join(os.path.dirname(cjm_fasthtml_resources.__file__), "py.typed"))


def test_readme_example_prints_what_the_readme_says():
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    code, printed = re.search(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)+)", text, re.S).groups()
    result = python(code)
    assert result.stdout.splitlines() == [line[4:] for line in printed.splitlines()], result.stderr


@pytest.mark.parametrize(("page", "table"), [("costs", "results"), ("compare", "queues")])
def test_a_page_shows_the_figures_as_they_were_saved(page, table):
    saved = (ROOT/"benchmarks"/f"{table}.md").read_text(encoding="utf-8").strip()
    cells = json.loads((ROOT/f"nbs/tutorials/{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = [output["data"].get("text/markdown", "") for cell in cells for output in cell.get("outputs", [])]
    assert saved in ["".join(text).strip().replace("**missed:** ", "") for text in shown]   # besides the marks


def test_the_readme_is_short():
    assert len((ROOT/"README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_readme_commands_are_those_that_run():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT/"README.md", ROOT/".ci"/"run")]
    assert all("python3 tools/check.py" in text for text in texts)


def test_notebooks_are_nbformat_4_5_with_cell_ids():
    for path in (ROOT/"nbs").rglob("[!_.]*.ipynb"):
        nb = json.loads(path.read_text(encoding="utf-8"))
        assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5) and all(cell["id"] for cell in nb["cells"]), path


def test_what_is_handed_out_cannot_be_changed():
    found = [value for name in MODULES for value in vars(importlib.import_module(name)).values()
             if dataclasses.is_dataclass(value) and isinstance(value, type) and value.__module__ == name]
    assert {"GpuDevice", "WorkerState", "ResourceConflict", "Claim", "Sample"} <= {value.__name__ for value in found}
    public = [value for value in found if not value.__name__.startswith("_")]
    changeable = {value.__name__ for value in public if not value.__dataclass_params__.frozen}
    # what a test sets on a simulated machine
    assert changeable == {"SimulatedProcess", "SimulatedGpu", "SimulatedHostProcess", "SimulatedMachine", "Fault",
                          "Habits"}


def test_no_notebook_keeps_a_warning():
    "What went to standard error is about the machine on which it ran, with its paths"
    outputs = [(path.name, output) for path in measures.find_notebooks(ROOT) for cell in code_cells(path)
               for output in cell["outputs"]]
    assert not [(name, output["text"]) for name, output in outputs if output.get("name") == "stderr"]


CHECKS = measures.measure(ROOT, Path(cjm_fasthtml_resources.__file__).parent)


@pytest.mark.parametrize("name", CHECKS)
def test_it_can_be_read(name):
    "Cells, lines and modules keep to the limits of tools/measures.py, which prints all of this at once"
    assert not CHECKS[name], "\n".join(CHECKS[name])


def exported(source: str) -> measures.Cell: return measures.Cell("nb#1", source, ("export",))


def test_a_long_cell_is_found():
    assert list(measures.check_length(exported("a = 1\n"*60))) == []
    assert list(measures.check_length(exported("a = 1\n"*61))) == ["nb#1: 61 lines, at most 60"]
    assert list(measures.check_length(measures.Cell("nb#1", "a = 1\n"*61))) == []  # of an example the site shows all


def class_of(methods: int, lines: int, name: str = "Front") -> str:
    "A class with so many methods of so many lines each, besides signature and docstring"
    method = "    def do(self):\n        'Do it'\n" + "        a = 1\n"*lines
    return f"class {name}:\n{method*methods}"


def test_a_class_may_be_longer_if_it_is_a_list_of_short_methods():
    assert list(measures.check_length(exported(class_of(20, 2)))) == []
    assert list(measures.check_length(exported(class_of(6, 11)))) == [
        "nb#1: Front.do has a body of 11 lines, at most 10"]*6
    assert list(measures.check_length(exported(class_of(13, 10)))) == []
    assert list(measures.check_length(exported(class_of(20, 7)))) == ["nb#1: 181 lines, at most 170"]
    assert list(measures.check_length(exported(class_of(20, 2, "_Front")))) == ["nb#1: 81 lines, at most 60"]
    assert list(measures.check_length(exported(class_of(1, 4, "ResourceManager")))) == [
        "nb#1: ResourceManager.do has 4 statements, at most 3"]


def test_long_cells_on_the_whole_are_found():
    cells = [exported("a = 1\n"*length) for length in (2, 13, 40)]
    assert list(measures.check_median("nb", cells, 12)) == [
        "nb: the median of its exported cells is 13 lines, at most 12"]
    assert list(measures.check_median("nb", cells[:2], 12)) == []


@pytest.mark.parametrize(("directives", "shown"), [
    ((), True), (("eval: false",), True), (("exports",), True), (("export",), False), (("hide",), False),
    (("echo: false",), False), (("include: false",), False)])
def test_a_line_that_would_wrap_on_the_site_is_found(directives, shown):
    wide, fits = (measures.Cell("nb#1", "a = 1\n" + "x"*length, directives) for length in (89, 88))
    assert list(measures.check_shown(fits)) == []
    assert list(measures.check_shown(wide)) == ["nb#1: 1 lines over 88 characters, the longest 89"]*shown


def test_a_private_name_of_another_module_is_found():
    own = "class A:\n    def __init__(self): self._x = 1\n    def see(self, other): return other._x"
    other = "from .a import _helper\ndef _other(thing): return thing._x, thing._asdict(), thing.__dict__"
    assert list(measures.check_privacy({"a": own, "b": "def _helper(): pass"})) == []
    assert list(measures.check_privacy({"a": own, "b": "def _helper(): pass", "c": other})) == [
        "c:1: _helper is private to b", "c:2: _x is private to a"]
    assert list(measures.check_privacy({"a": own, "c": "import x\ndef see(y): return x._x, y.x._x"})) == [
        "c:2: _x is private to a"]


def test_a_long_line_of_a_file_is_found(tmp_path):
    (tmp_path/"a.py").write_text("#" + "é"*119 + "\n" + "#"*121 + "\n", encoding="utf-8")
    assert list(measures.check_lines(tmp_path/"a.py", tmp_path)) == ["a.py:2: 121 characters, at most 120"]


def test_cells_are_read_as_nbdev_does(tmp_path):
    cells = [{"cell_type": "code", "id": "1", "source": ["#| export\n", "a = 1\n", "\n", "b = 2"], "outputs": []},
             {"cell_type": "markdown", "id": "2", "source": ["# b"]},
             {"cell_type": "code", "id": "3", "source": ["#| hide\n", "a"], "outputs": []}]
    path = tmp_path/"nb.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    first, second = measures.read_cells(path, tmp_path)
    assert (first.place, first.length, first.exported, first.shown) == ("nb.ipynb#1", 3, True, False)
    assert (second.source, second.exported, second.shown) == ("a", False, False)


@pytest.mark.parametrize(("module", "lacks", "extra"), [
    ("ui.web", "starlette", "web"), ("ui.metrics", "prometheus_client", "prometheus"),
    ("ui.live_view", "anywidget", "marimo"), ("cluster", "dask", "cluster"),
    ("cluster", "distributed", "cluster"), ("agents.server", "mcp", "mcp")])
def test_a_module_of_an_extra_says_how_that_is_installed(module, lacks, extra):
    code = f"import sys\nsys.modules[{lacks!r}] = None\nimport cjm_fasthtml_resources.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    last = done.stderr.splitlines()[-1]
    assert last == f"ModuleNotFoundError: {lacks} is not installed: pip install 'cjm-fasthtml-resources[{extra}]'"
    assert "During handling" not in done.stderr
