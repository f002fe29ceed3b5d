"A real PID namespace: the driver's numbers are the host's, and with the host's /proc the answer is exact"
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

NAMESPACE = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]


def namespaces_allowed() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not namespaces_allowed(), reason="making a PID namespace needs root")

SETUP = "mkdir -p {host} && mount --rbind /proc {host} && mount -t proc proc /proc && exec {python} -c '{code}'"
CODE = """
import os, subprocess, sys
from cjm_fasthtml_resources.core import process as proc
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

worker = subprocess.Popen(["sleep", "60"])
mount = {host!r}
numbers = [proc._numbers(mount, p) for p in os.listdir(mount) if p.isdigit()]   # of each process, in each namespace
outer = next(found[0] for found in numbers if found[1:] == [worker.pid])
manager = ResourceManager(track_self=False)
manager.register_worker(worker.pid, "llm", gpu_memory_mb=3000)
held = [SimulatedProcess(outer, 9000), SimulatedProcess({outsider}, 200), SimulatedProcess(worker.pid, 100)]
with SimulatedDriver([SimulatedGpu(processes=held)]):
    found = manager.check_gpu_availability()
print(proc.in_pid_namespace(), outer != worker.pid, found.status.value, found.app_pids == [worker.pid],
      found.estimated, found.devices[0].app_memory >> 20)
print(*[p.owner for p in found.devices[0].processes])
print(*[p.name for p in found.devices[0].processes if p.pid == {outsider}])
worker.kill()
"""


def inside(tmp_path, outsider: int, **env: str) -> list[str]:
    code = textwrap.dedent(CODE).format(host=str(tmp_path/"hostproc"), outsider=outsider).replace("'", '"')
    command = SETUP.format(host=tmp_path/"hostproc", python=sys.executable, code=code)
    result = subprocess.run([*NAMESPACE, "sh", "-c", command], env={**os.environ, **env},
                            capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_with_the_hosts_proc_the_answer_is_exact(tmp_path, spawn):
    outsider = spawn("input()").pid
    first, owners, name = inside(tmp_path, outsider, CJM_HOST_PROC=str(tmp_path/"hostproc"))
    assert first == "True True app_busy True False 9000"
    assert sorted(owners.split()) == ["app", "external", "external"]  # our worker's number is another process there
    assert "python" in name


def test_without_it_the_answer_is_an_estimate(tmp_path, spawn):
    first, owners, *_ = inside(tmp_path, spawn("input()").pid, CJM_HOST_PROC="/nowhere")
    assert first == "True True app_busy False True 3000"
    assert set(owners.split()) == {"unknown"}


LOCAL = """
import os, subprocess, sys
from cjm_fasthtml_resources.core import process as proc
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

proc.DRIVER_VERSION = {host!r} + "-version"
worker = subprocess.Popen(["sleep", "60"])
manager = ResourceManager()
manager.register_worker(worker.pid, "llm")
gpu = SimulatedGpu(memory_total_mb=24_000, memory_used_mb=12_000, processes=[SimulatedProcess(worker.pid, 9000)])
driver = SimulatedDriver([gpu])
with driver:
    proc.simulated = None
    found, held = manager.check_gpu_availability(), manager.reserve(10_000, pid=worker.pid)
    free = found.devices[0].room >> 20
    gpu.memory_used_mb, gpu.processes[0].memory_mb = 22_000, 19_000
    after = manager.check_gpu_availability().devices[0]
print(proc.in_pid_namespace(), found.app_pids == [worker.pid], found.estimated, found.devices[0].app_memory >> 20,
      free, after.room >> 20, [p.unused >> 20 for p in after.promises])
worker.kill()
"""


def test_the_open_kernel_module_tells_the_containers_own_numbers(tmp_path):
    "Also where the host's /proc is mounted: its numbers are others"
    version = tmp_path/"hostproc-version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build")
    code = textwrap.dedent(LOCAL).format(host=str(tmp_path/"hostproc")).replace("'", '"')
    command = SETUP.format(host=tmp_path/"hostproc", python=sys.executable, code=code)
    env = {**os.environ, "CJM_HOST_PROC": str(tmp_path/"hostproc")}
    found = subprocess.run([*NAMESPACE, "sh", "-c", command], env=env, capture_output=True, text=True, timeout=60)
    assert found.stdout == "True True False 9000 12000 2000 [0]\n", found.stdout + found.stderr
