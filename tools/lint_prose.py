#!/usr/bin/env python3
"""Check the prose of the notebooks and of the Markdown files with proselint, which needs no network.

    python tools/lint_prose.py [FILE …]     closes with 'N passed, N failed': one for each file

It reads paragraphs, docstrings and comments, without code and addresses. `OFF` names the rules that are off.
"""
import sys
from collections.abc import Iterator
from pathlib import Path

from prose import ROOT, pieces, plain
from proselint.checks import __register__
from proselint.config import DEFAULT
from proselint.registry import CheckRegistry
from proselint.tools import LintFile

# Rules that are off, each with its reason
OFF = (
    "typography.symbols",                    # straight quotes, "..." and "60 x 12" are what people type
    "typography.diacritical_marks",          # "resume it" is a verb
    "dates_times",                           # "bytes from 512 on", "room for 72, however": sizes, and no dates
    "cliches.misc.garner",                   # "waits for free memory"
    "redundancy.misc.after_the_deadline",    # the same
    "typography.punctuation.hyperbole",      # "(?!" of a regular expression
)
MARKDOWN = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "tests/README.md")


def paragraphs(path: Path) -> Iterator[str]:
    "Yield the prose of a notebook or of a Markdown file"
    if path.suffix == ".ipynb": yield from (place.text for place in pieces(path))
    else: yield from plain(path.read_text(encoding="utf-8")).split("\n\n")


def complaints(name: str, texts: list[str]) -> Iterator[str]:
    "Yield what proselint objects to in a file, each with the words around it"
    lines = [" ".join(text.split()) for text in texts]
    # the first that fits a rule counts, so what is off stands first
    checks = {**dict.fromkeys(OFF, False), **{key: on for key, on in DEFAULT["checks"].items() if key not in OFF}}
    for result in LintFile(name, "\n¶\n".join(lines)).lint({**DEFAULT, "checks": checks}):
        line, column = result.pos[0]//2 + 1, result.pos[1]
        around = lines[line - 1][max(column - 41, 0):column + 40]
        yield f"{name}:{line}: {result.check_result.check_path}: {result.check_result.message} In: …{around}…"


def main() -> int:
    CheckRegistry().register_many(__register__)
    notebooks = [path for path in sorted((ROOT/"nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
    paths = [Path(name).resolve() for name in sys.argv[1:]] or [*notebooks, *(ROOT/name for name in MARKDOWN)]
    failed = 0
    for path in paths:
        found = list(complaints(str(path.relative_to(ROOT)), list(paragraphs(path))))
        failed += bool(found)
        for line in found: print(line)
    print(f"{len(paths) - failed} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
