"What several tests need"
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
MIB, GIB = 2**20, 2**30
GONE = 2**22 + 1  # Linux gives no number as high as this

# how programs begin that share one simulated GPU, which the variable GPUS names, and the command among them
DRIVER = """
import os
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
driver = SimulatedDriver([SimulatedGpu("NVIDIA L4")], shared=os.environ["GPUS"])
driver.start()
"""

COMMAND = DRIVER + """
from cjm_fasthtml_resources.cli import main
main(prog_name="cjm-resources")
"""

settings.register_profile("any machine", deadline=None)   # a busy one takes longer
settings.load_profile("any machine")

# a shell's background job ignores Ctrl-C, and so would what the tests start: --watch would never end
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


def samplers() -> int:
    "How many monitors of this process take samples"
    return sum(t.name == "resource-monitor" for t in threading.enumerate())


def wait_until(condition, seconds=10.0):
    "Wait until a condition holds, or fail"
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def warned(caplog) -> list[str]:
    "The warnings since the last time"
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return found


class Server:
    "A plugin with child processes, whose answers the test sets"
    children = [GONE]
    def get_execution_mode(self): return "subprocess"
    def get_child_pids(self): return self.children
    def get_managed_resources(self): return {}
    def force_cleanup(self): pass


@pytest.fixture
def spawn():
    "Start processes that end with the test: spawn(code) gives a Popen, with pipes for stdin and stdout"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    started = []

    def start(code: str) -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, "-c", code], **pipes, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, 9)
        process.communicate()


@pytest.fixture
def command():
    "Run cjm-resources as a user does, in a process of its own"
    program = Path(sys.executable).with_name("cjm-resources")

    def run(*args: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run([program, *args], env={**os.environ, **env}, capture_output=True, text=True, timeout=60)
    return run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "Where this test's processes share what they promise"
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path/"state"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path/"state"


def newer_forms(call):
    "The calls without which the driver is asked by this one"
    if call == "nvmlDeviceGetMemoryInfo": return [f"{call}_v2"]
    if "Running" not in call or call.endswith("_v3"): return []
    name = call.removesuffix("_v2")
    return [f"{name}_v3"] if call.endswith("_v2") else [f"{name}_v3", f"{name}_v2"]
