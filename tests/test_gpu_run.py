"""The tests of a real GPU, on a simulated card with a simulated libcuda and nvidia-smi.

Where there is a card, they have to run at once.
"""
import json
import os
import subprocess
import sys

from conftest import ROOT

CONTEXT_MIB = 300  # what a context takes beside what is allocated

RIG = f'''
import contextlib, ctypes, json, os
from cjm_fasthtml_resources.core.gpu import GpuSnapshot
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

GpuSnapshot.simulated = False
seen = json.load(open({str(ROOT/"tests"/"cuda_visible.json")!r}))
uuid = seen["uuid"].split()[0]
card = SimulatedGpu("NVIDIA L4", memory_total_mb=20_000, uuid=uuid)
driver = SimulatedDriver([card], shared=os.environ["CARD"])
driver.start()
held = contextlib.ExitStack()

class Cuda:
    "What a real card's library answered for each value of CUDA_VISIBLE_DEVICES"
    def __getattr__(self, name): return lambda *args: 0
    def seen(self):
        value = os.environ.get("CUDA_VISIBLE_DEVICES")
        return next(case for case in seen["cases"] if case["value"] == value)
    def cuInit(self, flags): return self.seen()["cuInit"]
    def cuDeviceGetCount(self, count):
        count._obj.value = self.seen()["devices"]
        return 0
    def cuDeviceGetUuid_v2(self, digits, device):
        digits._obj[:] = bytes.fromhex(uuid[4:].replace("-", ""))
        return 0
    def cuMemFree_v2(self, address):
        held.close()
        return 0
    def cuMemAllocManaged(self, address, size, flags): return 801   # not supported
    def cuMemAlloc_v2(self, address, size):
        try: held.enter_context(driver.allocate(size.value/2**20 + {CONTEXT_MIB}))
        except MemoryError: return 2
        return 0

load = ctypes.CDLL

def load_simulated(name, *args, **kw): return Cuda() if name == "libcuda.so.1" else load(name, *args, **kw)

ctypes.CDLL = load_simulated
'''

NVIDIA_SMI = """#!/bin/sh
exec '{python}' -c "
import pynvml
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(0)
for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
    print(process.pid, process.usedGpuMemory//2**20, sep=', ')"
"""


def test_the_tests_of_a_real_gpu_pass_on_a_simulated_one(tmp_path):
    (tmp_path/"sitecustomize.py").write_text(RIG)
    smi = tmp_path/"nvidia-smi"
    smi.write_text(NVIDIA_SMI.format(python=sys.executable))
    smi.chmod(0o755)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "PATH": f"{tmp_path}:{os.environ['PATH']}",
           "CARD": str(tmp_path/"card"), "GPU_FIGURES": str(tmp_path/"figures.json")}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", ROOT/"tests"/"gpu"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "8 skipped" in done.stdout, done.stdout + done.stderr
    for why in ("have memory of their own", "no file tells which kernel module", "is divided by MIG",
                "does not support it", "no device files here", "does not tell a container its own numbers",
                "needs PyTorch"):
        assert why in done.stdout   # that is all that this card has not
    found = json.loads((tmp_path/"figures.json").read_text())
    assert (found["card"], found["exact"], found["jobs"]) == ("NVIDIA L4", True, 10)
    assert (found["allocated_mib"], found["device_grew_mib"]) == (2_200, 2_200 + 3*CONTEXT_MIB)
    assert found["seen_mib"] == {"child": 1_000 + CONTEXT_MIB, "grandchild": 700 + CONTEXT_MIB,
                                 "outsider": 500 + CONTEXT_MIB}
    assert found["total_mib"] == 20_000 and found["ratio"] > 1
    assert found["bytes_of_an_entry"]["nvmlDeviceGetComputeRunningProcesses_v3"] == 24
    assert found["bytes_of_an_entry"]["nvmlDeviceGetComputeRunningProcesses"] == 16
    assert 15_000 < found["most_used_mib"] <= 20_000   # the card was full, and no job ran out of memory
