"The examples of the notebooks, against the installed package: no nbdev, no IPython, the module instead of the exported cells"
import ast, asyncio, importlib, inspect, json, re
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(path for path in (ROOT/"nbs").rglob("[!_.]*.ipynb") if path.stem != "showdoc")  # that one is about nbdev


def code_cells(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def is_example(source: str) -> bool:
    return not re.search(r"^#\|\s*(export|default_exp|echo: false)|nbdev|IPython", source, re.M)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT/"nbs").with_suffix("")))
def test_examples(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    cells = code_cells(path)
    target = next((found[1] for cell in cells if (found := re.search(r"#\|\s*default_exp (\S+)", cell))), None)
    names = dict(vars(importlib.import_module(f"cjm_fasthtml_resources.{target}"))) if target else {}
    names["__name__"] = "__main__"
    examples = [re.sub(r"^from nbdev.*\n?", "", cell, flags=re.M) for cell in cells]
    examples = [cell for cell in examples if is_example(cell) and cell.strip()]
    assert len(examples) >= 3
    for cell in examples:
        code = compile(cell, f"{path.name}: {cell[:60]!r}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)  # as in a notebook
        if code.co_flags & inspect.CO_COROUTINE: asyncio.run(eval(code, names))
        else: exec(code, names)


def test_every_rule_has_an_assertion():
    for path in NOTEBOOKS:
        asserted = sum(len(re.findall(r"\btest_eq\(|\btest_fail\(|^\s*assert |: assert ", cell, re.M)) for cell in code_cells(path) if is_example(cell))
        defined = sum(len(re.findall(r"^(?:def|class) [a-zA-Z]", cell, re.M)) for cell in code_cells(path) if "#| export" in cell)
        assert asserted >= defined, f"{path.name}: {asserted} assertions for {defined} public definitions"
