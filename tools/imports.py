"""The imports that the examples of an API page need where its module is installed, for tools/docs.py

In the notebook, examples use the names that its exported cells define and import; the site shows none of these cells.
"""
import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

PACKAGE = "cjm_fasthtml_resources"
FOLD = re.compile(r'^(#\| code-summary: "Imports of the examples) \(and all names in ([\w.]+)\)"\n', re.M)
SHOWN = 88   # characters in a line of code on the site
EVERY_MODULE = ("__name__", "__doc__", "__file__", "__all__", "__spec__", "__package__", "__builtins__")


def parse(source: str) -> ast.AST:
    "Parse a cell, which can have `await` outside a function"
    return compile(source, "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def names_used(sources: Iterable[str]) -> Iterator[str]:
    "Yield the names that these cells use and that no folded cell imports"
    used, imported = set[str](), set[str]()
    for source in sources:
        for node in ast.walk(parse(source)):
            if isinstance(node, ast.Name): used.add(node.id)
            elif isinstance(node, (ast.Import, ast.ImportFrom)) and "#| code-fold" in source:
                imported.update(name.asname or name.name.partition(".")[0] for name in node.names)
    yield from sorted(used - imported)


def origin(name: str, value: Any, own: str) -> str:
    "Return the module to import a name from: where it is defined, or the page's own"
    defined = getattr(value, "__module__", None) or own
    if defined.startswith("_") or "._" in defined: return own
    return defined if getattr(importlib.import_module(defined), name, None) is value else own


def written(module: str, names: Iterable[str]) -> str:
    "Return the import of these names from a module"
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= SHOWN: return line
    rows = textwrap.fill(", ".join(names), SHOWN, initial_indent="    ", subsequent_indent="    ")
    return f"from {module} import (\n{rows},\n)"


def own_imports(sources: Iterable[str], own: ModuleType) -> str:
    "Return the imports of the names that examples take from a module's exported cells"
    found: dict[str, list[str]] = {}
    lines = list[str]()
    for name in names_used(sources):
        if name not in vars(own) or name in EVERY_MODULE: continue
        value = vars(own)[name]
        if not inspect.ismodule(value): found.setdefault(origin(name, value, own.__name__), []).append(name)
        elif "." in value.__name__: found.setdefault(value.__name__.rpartition(".")[0], []).append(name)
        else: lines.append(f"import {name}" if value.__name__ == name else f"import {value.__name__} as {name}")
    return "".join(f"{line}\n" for line in [*lines, *(written(*item) for item in sorted(found.items()))])


def add_imports(notebook: dict[str, Any]) -> None:
    "Add to a processed notebook's folded imports the names that its examples take from its own module"
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    fold = next(((n, found) for n, source in enumerate(sources) if (found := FOLD.search(source))), None)
    if fold is None: return
    number, found = fold
    examples = [source for source in sources if not re.search(r"^(?:#\| echo: false|[%!])", source, re.M)]
    added = own_imports(examples, importlib.import_module(f"{PACKAGE}.{found[2]}"))
    before, after = sources[number][:found.start()], sources[number][found.end():].rstrip("\n")
    cells[number]["source"] = f'{before}{found[1]}"\n{after}\n{added}'
