#!/usr/bin/env python3
"""Check that everything in an environment has a licence that lets its users keep their own code closed.

    python tools/licences.py .venvs/user/bin/python

Asks pip-licenses, which has to be installed beside this Python. Prints a table, and fails for any other licence.
"""
import json
import re
import subprocess
import sys
from pathlib import Path

OWN = {"cjm-fasthtml-resources", "pip", "setuptools"}
# MPL 2.0 and LGPL bind changes to their own files alone
ALLOWED = re.compile(r"MIT|BSD|Apache|Python Software Foundation|PSF|ISC|MPL|Mozilla Public License|Unlicense|"
                     r"LGPL|Lesser General Public License|Zero-Clause|0BSD|CNRI-Python|Public Domain", re.I)


def read_licences(python: str) -> list[dict[str, str]]:
    "Return the name, version and licence of each package of an environment"
    command = [Path(sys.executable).with_name("pip-licenses"), "--python", python, "--format=json", "--from=mixed"]
    found: list[dict[str, str]] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [row for row in found if row["Name"].lower() not in OWN]


def refused(row: dict[str, str]) -> bool:
    "Return whether no licence, or one that is not allowed, is among those that a package names together"
    parts = re.split(r";|\bAND\b", row["License"])
    return not all(ALLOWED.search(part) for part in parts)


def main() -> int:
    rows = read_licences(sys.argv[1])
    wrong = [row for row in rows if refused(row)]
    for row in rows: print(f"{row['Name']:28} {row['Version']:14} {row['License'].splitlines()[0][:60]}")
    for row in wrong: print(f"{row['Name']}: {row['License'].splitlines()[0]!r} is not a licence that is allowed")
    print(f"\n{len(rows) - len(wrong)} passed, {len(wrong)} failed")
    return bool(wrong)


if __name__ == "__main__": sys.exit(main())
