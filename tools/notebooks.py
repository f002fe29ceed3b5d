#!/usr/bin/env python3
"""Run every notebook: its examples are tests, and what they print must be what the notebook keeps.

    python tools/notebooks.py [NAME ...]            one line for each notebook, then 'N passed, N failed' over the cells
    python tools/notebooks.py --update [NAME ...]   the same, and keep what the cells print now
"""
import argparse
import copy
import os
import re
import sys
import tempfile
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import clean_nb

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"


def outputs(nb) -> list:
    "What each code cell prints, free of what differs from run to run"
    nb = copy.deepcopy(nb)
    clean_nb(nb)
    return [[dict(o) for o in cell.get("outputs", [])] for cell in nb.cells if cell.cell_type == "code"]


def steady(output) -> dict:
    "Take the time of day and the start of processes out of a panel's picture"
    data = output.get("data", {})
    for kind, lines in data.items():
        text = re.sub(r"(?<=Data from )<time .*?</time>", "<time>12:00:00</time>", "".join(lines))
        text = re.sub(r"(?<=Data from )\d.*", "12:00:00", text)
        data[kind] = re.sub(r"(?<=data-key=)(\d+)\.-?\d+(?:\.\d+)?(?=[ >])", r"\1.0", text).splitlines(keepends=True)
    return output


def skipped(source: str) -> bool:
    "Cells that are not run: the export call at the end of a notebook, and those marked so"
    return "nbdev_export(" in source or "#| eval: false" in source


def run(path: Path, update: bool) -> tuple[Path, int, list[str]]:
    "Run one notebook in a process of its own, with a queue of its own: what `run_cells` returns"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CJM_RESOURCES_DIR"] = folder   # reservations of other programs would change what is printed
        return run_cells(path, update)


def run_cells(path: Path, update: bool) -> tuple[Path, int, list[str]]:
    "How many cells of a notebook passed, and a text for each that did not"
    os.chdir(path.parent)
    os.environ["IN_TEST"] = "1"
    programs = Path(sys.executable).parent  # for cells that run the command
    os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"
    kept, nb, shell = outputs(read_nb(path)), read_nb(path), CaptureShell(path)
    passed, failures = 0, []
    for number, cell in enumerate(c for c in nb.cells if c.cell_type == "code"):
        if skipped(cell.source): continue
        cell.outputs = []
        shell.cell(cell)
        # a value that displays itself leaves an empty result
        cell.outputs = [steady(output) for output in cell.outputs if output.get("data") != {}]
        if shell.exc:
            trace = shell.prettytb(fname=path)
            failures.append(f"{path.relative_to(ROOT)}, code cell {number + 1}:\n{cell.source}\n{trace}")
            return path, passed, failures  # the cells after it build on it
        if not update and outputs(nb)[number] != kept[number]:
            failures.append(f"{path.relative_to(ROOT)}, code cell {number + 1} prints something else than is kept:\n"
                            f"{cell.source}\n  kept: {kept[number]}\n  now:  {outputs(nb)[number]}")
        else: passed += 1
    if update:
        clean_nb(nb)
        write_nb(nb, path)
    return path, passed, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks, such as core/gpu (default: all)")
    parser.add_argument("--update", action="store_true", help="keep what the cells print now")
    args = parser.parse_args()
    paths = [NBS/f"{name}.ipynb" for name in args.names] or sorted(NBS.rglob("[!_.]*.ipynb"))
    missing = [str(path.relative_to(ROOT)) for path in paths if not path.is_file()]
    if missing: parser.error(f"there is no {', '.join(missing)}")
    passed, failed = 0, 0
    with get_context("spawn").Pool(maxtasksperchild=1) as pool:
        for path, good, failures in pool.imap(partial(run, update=args.update), paths, chunksize=1):
            print(f"{path.relative_to(ROOT)}: {good} cells passed, {len(failures)} failed", *failures, sep="\n")
            passed, failed = passed + good, failed + len(failures)
    print(f"{passed} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
