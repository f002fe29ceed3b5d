"What a user installs: its names, what importing it costs them, and that the texts say what is so"
import dataclasses, importlib, json, os, pkgutil, re, subprocess, sys

import pytest
from conftest import ROOT

import cjm_fasthtml_resources

MODULES = [m.name for m in pkgutil.walk_packages(cjm_fasthtml_resources.__path__, "cjm_fasthtml_resources.") if m.name.split(".")[-1] not in ("showdoc", "_modidx")]


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=60)


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
    assert "cjm_fasthtml_resources.core.host" in loaded


def test_type_hints_are_shipped():
    assert os.path.exists(os.path.join(os.path.dirname(cjm_fasthtml_resources.__file__), "py.typed"))


def test_readme_example_prints_what_the_readme_says():
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    code, printed = re.search(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)+)", text, re.S).groups()
    result = python(code)
    assert result.stdout.splitlines() == [line[4:] for line in printed.splitlines()], result.stderr


def test_readme_quotes_the_benchmark_as_it_was_saved():
    assert (ROOT/"benchmarks"/"results.md").read_text(encoding="utf-8").strip() in (ROOT/"README.md").read_text(encoding="utf-8")


def test_readme_commands_are_those_that_run():
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    assert "python3 tools/check.py" in text and "python3 tools/check.py" in (ROOT/".ci"/"run").read_text(encoding="utf-8")


def test_notebooks_are_nbformat_4_5_with_cell_ids():
    for path in (ROOT/"nbs").rglob("[!_.]*.ipynb"):
        nb = json.loads(path.read_text(encoding="utf-8"))
        assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5) and all(cell["id"] for cell in nb["cells"]), path


@pytest.mark.parametrize("name", ["core.gpu", "core.host", "core.manager", "core.validation", "core.reservations", "core.monitor", "core.plugins", "cluster"])
def test_what_is_handed_out_cannot_be_changed(name):
    if name == "cluster": pytest.importorskip("distributed", reason="the extra cluster is not installed")
    module = importlib.import_module(f"cjm_fasthtml_resources.{name}")
    found = [x for x in vars(module).values() if isinstance(x, type) and dataclasses.is_dataclass(x) and x.__module__ == module.__name__ and not x.__name__.startswith("_")]
    assert found or name == "core.plugins"
    assert [x.__name__ for x in found if not x.__dataclass_params__.frozen] == []


def test_no_notebook_keeps_a_warning():
    "What went to standard error is about the machine on which it ran, with its paths"
    kept = [(path.name, output["text"]) for path in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] for output in cell.get("outputs", []) if output.get("name") == "stderr"]
    assert not kept
