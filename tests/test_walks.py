"The walks in their short form: a part of all lines and system calls, the same each time; README.md has the long one"
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SEED = os.environ.get("WALK_SEED", "0")


def walk(name: str, *options: str) -> None:
    program = [sys.executable, Path(__file__).with_name(name), "--seed", SEED, *options]
    out = subprocess.run(program, capture_output=True, text=True, timeout=900)
    assert out.returncode == 0, out.stdout + out.stderr
    assert int(out.stdout.splitlines()[-1].split()[0]) >= 60, out.stdout


def test_an_interruption_at_any_line_leaves_nothing_behind():
    walk("walk_interruptions.py", "--sample", "20")


@pytest.mark.parametrize("error", ["SystemExit", "GeneratorExit"])
def test_nor_does_another_that_ends_a_program_or_a_generator(error):
    walk("walk_interruptions.py", "--sample", "15", "--error", error, "with_block", "handed_over", "wait_for_gpu")


@pytest.mark.skipif(not shutil.which("strace") and not os.environ.get("CI"),
                    reason="needs strace (Debian's package strace)")
def test_whatever_happens_at_any_system_call_the_next_program_works():
    walk("walk_syscalls.py", "--sample", "120")
