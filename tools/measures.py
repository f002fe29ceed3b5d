#!/usr/bin/env python3
"""Measure whether the library can be read: its notebooks' cells, its lines, and what its modules know of each other.

    python tools/measures.py     prints each notebook's cells, then what is over a limit, then 'N passed, N failed'

tests/test_package.py runs the same checks. The limits are explained in CONTRIBUTING.md.
"""
import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CELL = 60  # lines of an exported cell
CLASS, BODY = 170, 10  # lines of a cell that is a public class, if no method's body has more lines than this
STATEMENTS = {"ResourceManager": 3}  # of each method: the class only passes on
MEDIAN, NOTEBOOK_MEDIAN = 12, 20  # lines of an exported cell, over all notebooks and in each
LINE, SHOWN_LINE = 120, 88  # characters: of a file, and of a cell that the site shows

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Cell(NamedTuple):
    "A code cell of a notebook"
    place: str  # the notebook, and the cell's id
    source: str  # without nbdev's directives
    directives: tuple[str, ...] = ()  # such as `export`

    @property
    def exported(self) -> bool: return any(re.match(r"exports?\b|exporti\b", line) for line in self.directives)

    @property
    def shown(self) -> bool:
        "Whether its code stands on the site"
        hidden = r"export\b|exporti\b|hide\b|default_exp\b|echo:\s*false|include:\s*false"
        return not any(re.match(hidden, line) for line in self.directives)

    @property
    def length(self) -> int: return len(self.source.splitlines())


def read_cells(path: Path, root: Path) -> list[Cell]:
    "Return the code cells of a notebook"
    name = path.relative_to(root).as_posix()
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code": continue
        lines = "".join(cell["source"]).splitlines()
        directives = tuple(line[2:].strip() for line in lines if line.startswith("#|"))
        source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
        found.append(Cell(f"{name}#{cell['id']}", source, directives))
    return found


def find_notebooks(root: Path) -> list[Path]:
    "Return every notebook of the site"
    return [path for path in sorted((root/"nbs").rglob("[!_.]*.ipynb")) if ".ipynb_checkpoints" not in path.parts]


def body_of(node: Function) -> list[ast.stmt]:
    "Return the statements of a function, without its docstring"
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def body_length(node: Function) -> int:
    "Return the lines of a function without signature and docstring"
    body = body_of(node)
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def only_class(source: str) -> ast.ClassDef | None:
    "Return the public class that a cell consists of; `None` for any other cell"
    nodes = ast.parse(source).body
    alone = len(nodes) == 1 and isinstance(nodes[0], ast.ClassDef) and not nodes[0].name.startswith("_")
    return nodes[0] if alone else None


def check_length(cell: Cell) -> Iterator[str]:
    "Complain about an exported cell that is too long, and about a class that is more than a list of short methods"
    if not cell.exported: return
    listed = only_class(cell.source) if cell.length > CELL or any(name in cell.source for name in STATEMENTS) else None
    limit = CLASS if listed else CELL
    if cell.length > limit: yield f"{cell.place}: {cell.length} lines, at most {limit}"
    if not listed: return
    for method in listed.body:
        if not isinstance(method, Function): continue
        name, lines = f"{listed.name}.{method.name}", body_length(method)
        if cell.length > CELL and lines > BODY:
            yield f"{cell.place}: {name} has a body of {lines} lines, at most {BODY}"
        count = sum(isinstance(part, ast.stmt) for found in body_of(method) for part in ast.walk(found))
        allowed = STATEMENTS.get(listed.name)
        if allowed and method.name != "__init__" and count > allowed:
            yield f"{cell.place}: {name} has {count} statements, at most {allowed}"


def check_median(name: str, cells: Iterable[Cell], limit: int) -> Iterator[str]:
    "Complain if the exported cells are long on the whole"
    lengths = [cell.length for cell in cells if cell.exported]
    if lengths and median(lengths) > limit:
        yield f"{name}: the median of its exported cells is {median(lengths):g} lines, at most {limit}"


def check_shown(cell: Cell) -> Iterator[str]:
    "Complain about a line that would wrap on the site"
    wide = [line for line in cell.source.splitlines() if len(line) > SHOWN_LINE]
    if cell.shown and wide:
        yield f"{cell.place}: {len(wide)} lines over {SHOWN_LINE} characters, the longest {max(map(len, wide))}"


def check_lines(path: Path, root: Path) -> Iterator[str]:
    "Complain about the long lines of a file"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if len(line) > LINE and not line.startswith("__all__ = ["):  # nbdev wraps that one itself
            yield f"{path.relative_to(root)}:{number}: {len(line)} characters, at most {LINE}"


def is_private(name: str) -> bool:
    "Return whether a name is a module's or class's own, as `_name` is and `__init__` is not"
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_names(tree: ast.Module) -> set[str]:
    "Return the private names that a module defines: functions, classes, variables, attributes"
    found = {node.name for node in ast.walk(tree) if isinstance(node, (Function, ast.ClassDef))}
    found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
              and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls")}
    return set(filter(is_private, found))


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Return each private name that a module imports or takes from an object, with its line; not from a module that
    a plain `import` names, such as `os._exit`, for the package's own are imported with `from`"""
    imports = [node.names for node in ast.walk(tree) if isinstance(node, ast.Import)]
    libraries = {name.asname or name.name for names in imports for name in names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if ast.unparse(node.value) not in libraries: yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                if is_private(name.name): yield node.lineno, name.name


def check_privacy(sources: dict[str, str]) -> Iterator[str]:
    "Complain about modules, given by name, that use what another one defines for itself"
    trees = {name: ast.parse(text) for name, text in sources.items()}
    own = {name: private_names(tree) for name, tree in trees.items()}
    for name, tree in trees.items():
        for line, used in sorted(set(private_uses(tree))):
            others = sorted(other for other, names in own.items() if used in names and other != name)
            if others and used not in own[name]: yield f"{name}:{line}: {used} is private to {', '.join(others)}"


def find_files(root: Path, package: Path) -> list[Path]:
    "Return the files whose lines are measured: modules, tests, programs, style sheets and scripts"
    found = [path for kind in ("*.py", "*.css", "*.js") for path in package.rglob(kind) if path.name != "_modidx.py"]
    for folder in ("tests", "tools", "benchmarks", "examples"): found += (root/folder).rglob("*.py")
    return sorted(path for path in found if "__pycache__" not in path.parts)


def measure(root: Path = ROOT, package: Path = ROOT/"cjm_fasthtml_resources") -> dict[str, list[str]]:
    "Return what each check complains about; nothing if all is well"
    cells = {path.relative_to(root).as_posix(): read_cells(path, root) for path in find_notebooks(root)}
    every = [cell for found in cells.values() for cell in found]
    checks = {name: [*(said for cell in found for said in check_length(cell)),
                     *check_median(name, found, NOTEBOOK_MEDIAN),
                     *(said for cell in found for said in check_shown(cell))]
              for name, found in cells.items()}
    files = find_files(root, package)
    modules = {path.relative_to(package).as_posix(): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    return checks | {
        "all notebooks": list(check_median("all notebooks", every, MEDIAN)),
        "private names": list(check_privacy(modules)),
        "long lines": [said for path in files for said in check_lines(path, root if root in path.parents else package)]}


def table(root: Path = ROOT) -> list[str]:
    "Return a line for each notebook: its exported cells, their median and longest, and its other cells"
    notebooks = {path.relative_to(root/"nbs").with_suffix("").as_posix(): read_cells(path, root)
                 for path in find_notebooks(root)}
    notebooks["all"] = [cell for cells in notebooks.values() for cell in cells]
    lines = [f"{'notebook':24} {'exported':>8} {'median':>8} {'longest':>8} {'others':>8}"]
    for name, cells in notebooks.items():
        lengths = [cell.length for cell in cells if cell.exported]
        if not lengths: continue
        others = len(cells) - len(lengths)
        lines.append(f"{name:24} {len(lengths):8} {median(lengths):8g} {max(lengths):8} {others:8}")
    return lines


def main() -> int:
    print(*table(), sep="\n")
    checks = measure()
    for said in checks.values():
        if said: print("", *said, sep="\n")
    failed = sum(bool(said) for said in checks.values())
    print(f"\n{len(checks) - failed} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
