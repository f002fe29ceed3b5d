#!/usr/bin/env python3
"""Run the tests that need a real GPU, and keep what they measure with card, driver and date in benchmarks/gpu.

    python tests/gpu/run.py                 needs the extras dev and bench, and an NVIDIA driver
    python tests/gpu/run.py --report FILE   write what the driver answers, as JSON, for an issue; runs anywhere
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_tests() -> int:
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder)/"figures.json"
        pytest = [sys.executable, "-m", "pytest", "-q", "-rs", str(HERE)]
        code = subprocess.call(pytest, env={**os.environ, "GPU_FIGURES": str(kept)})
        if code or not kept.exists(): return code
        found = json.loads(kept.read_text(encoding="utf-8"))
        if len(found) <= 4: return print("nothing was measured") or 0
        name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{found['card']}-{found['driver']}-{found['date']}")
        target = HERE.parents[1]/"benchmarks"/"gpu"/f"{name}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(kept.read_text(encoding="utf-8"), encoding="utf-8")
        print(f"kept in {target.relative_to(HERE.parents[1])}")
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, nargs="?", const=Path("report.json"), metavar="FILE",
                        help="write what the driver answers to a JSON file (report.json), and run no tests")
    path = parser.parse_args().report
    if path is None: return run_tests()
    from report import write_report  # its own neighbour
    return write_report(path)


if __name__ == "__main__": sys.exit(main())
