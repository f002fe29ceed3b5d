#!/usr/bin/env python3
"""Run the tests that need a real GPU, and keep what they measure with card, driver and date in benchmarks/gpu.

    python tests/gpu/run.py      needs the extras dev and bench, and an NVIDIA driver
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
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


if __name__ == "__main__": sys.exit(main())
