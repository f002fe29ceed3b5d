"The short form of the soak; tests/README says how to run the long one"
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fasthtml", reason="the extra web is not installed")
pytest.importorskip("ipywidgets")


def test_nothing_grows_and_every_promise_is_accounted_for(tmp_path):
    seconds = os.environ.get("SOAK_SECONDS", "20")
    soak = [sys.executable, Path(__file__).with_name("soak.py"), seconds, str(tmp_path)]
    out = subprocess.run(soak, capture_output=True, text=True, timeout=float(seconds) + 120)
    found = json.loads(out.stdout)
    assert (found["bad"], out.returncode, out.stderr) == ([], 0, "")
    assert min(found[name] for name in ("workers", "grants", "faults", "events", "checks")) >= 10
