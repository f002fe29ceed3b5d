"A real PID namespace: the driver's numbers are the host's, and with the host's /proc the answer is exact"
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cjm_fasthtml_resources.core.process import read_process

NAMESPACE = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]


def namespaces_allowed() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not namespaces_allowed(), reason="making a PID namespace needs root")

# This machine's own driver is hidden
SETUP = ("mkdir -p {host} && mount --rbind /proc {host} && mount -t tmpfs none {host}/driver && "
         "mount -t proc proc /proc && exec {python} -c '{code}'")
CODE = """
import os, subprocess, sys
from cjm_fasthtml_resources.core import process as proc
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

proc.DRIVER_VERSION = proc.DRIVER_MODULE = "/nowhere"
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


# One number that is the app's worker in here and, on the host, a process of somebody else: whose is it?
SAME_NUMBER = """
import os, subprocess, sys, time
from cjm_fasthtml_resources.core import process as proc
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess

mount = {host!r}
proc.DRIVER_VERSION, proc.DRIVER_MODULE = mount + "-version", mount + "-module"
there = [int(name) for name in os.listdir(mount) if name.isdigit()] if os.path.isdir(mount) else [2]
workers = []
while len(workers) < 200:   # until the number of one is that of a process of the host, or is not, as is asked for
    workers.append(subprocess.Popen(["sleep", "60"]))
    if (workers[-1].pid in there) == {both}: break
worker = workers[-1]
assert (worker.pid in there) == {both}, (worker.pid, there)
manager = ResourceManager(track_self=False)
manager.register_worker(worker.pid, "llm")
gpu = SimulatedGpu(memory_total_mb=24_000, memory_used_mb=20_000, processes=[SimulatedProcess(worker.pid, 20_000)])
with SimulatedDriver([gpu]):
    proc.simulated = None
    found = manager.check_gpu_availability()
    held = manager.reserve(2_000, pid=worker.pid)
    gpu.memory_used_mb, gpu.processes[0].memory_mb = 22_000, 22_000
    after = manager.check_gpu_availability().devices[0]
print(found.status.value, found.estimated, found.devices[0].processes[0].owner, found.devices[0].app_memory >> 20,
      after.promises[0].unused >> 20)
for process in workers: process.kill()
"""
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build"
PROPRIETARY = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Sep 23"
OURS, THEIRS, UNKNOWN = (
    "app_busy False app 20000 0", "external_busy False external 0 2000", "external_busy True unknown 0 2000")


def whose(tmp_path, both: bool, mounted: bool, version: str = "", taint: str = "", release: str = "") -> str:
    host = tmp_path/"hostproc"
    if version: Path(f"{host}-version").write_text(version)
    Path(f"{host}-module").mkdir()
    for name, text in dict(taint=taint, version=release).items():
        if text: (Path(f"{host}-module")/name).write_text(text)
    code = textwrap.dedent(SAME_NUMBER).format(host=str(host), both=both).replace("'", '"')
    command = SETUP.format(host=host, python=sys.executable, code=code)
    env = {**os.environ, "CJM_HOST_PROC": str(host) if mounted else "/nowhere"}
    found = subprocess.run([*NAMESPACE, "sh", "-c", command], env=env, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


@pytest.mark.parametrize("kind, mounted, expected", [
    (dict(version=OPEN.format("580.159.04")), False, OURS),
    (dict(version=OPEN.format("580.159.04")), True, OURS),
    (dict(version=OPEN.format("565.57.01")), False, OURS),
    (dict(version=OPEN.format("560.35.03")), False, UNKNOWN),       # its numbers are ours, and the memory another's
    (dict(version=OPEN.format("560.35.03")), True, UNKNOWN),
    (dict(version=OPEN.format("535.54.03")), False, UNKNOWN),
    (dict(version=OPEN.format("535.54.03")), True, THEIRS),
    (dict(version=PROPRIETARY.format("580.95.05")), False, UNKNOWN),
    (dict(version=PROPRIETARY.format("580.95.05")), True, THEIRS),
    (dict(release="580.95.05\n", taint="POE\n"), True, THEIRS),     # the version's file is not passed in
    (dict(release="580.95.05\n", taint="OE\n"), False, OURS),
    (dict(), False, UNKNOWN),                                       # and nothing else tells
    (dict(), True, UNKNOWN)])
def test_a_number_that_exists_on_both_sides_is_the_apps_only_if_the_driver_says_so(tmp_path, kind, mounted, expected):
    assert whose(tmp_path, both=True, mounted=mounted, **kind) == expected


@pytest.mark.parametrize("mounted, expected", [(True, OURS), (False, UNKNOWN)])
def test_a_number_that_exists_in_here_only_is_ours(tmp_path, mounted, expected):
    "Without the host's /proc there is no other side"
    assert whose(tmp_path, both=False, mounted=mounted) == expected


def test_the_proc_of_a_container_is_not_taken_for_the_hosts(tmp_path):
    "As where a container in a container mounts the outer one's /proc"
    outer = tmp_path/"outer"
    code = ("import os; from cjm_fasthtml_resources.core import process as p; "
            "p.DRIVER_VERSION = p.DRIVER_MODULE = str(); "
            "print(p.in_pid_namespace(), p.host_proc(), p.driver_pid_reader([os.getpid()]))")
    inner = f"mount -t proc proc /proc && exec {sys.executable} -c '{code}'"
    command = (f"mkdir {outer} && mount -t proc proc {outer} && sleep 20 & sleep 0.2; "
               f"exec {' '.join(NAMESPACE)} sh -c \"{inner}\"")
    found = subprocess.run([*NAMESPACE, "sh", "-c", command], env={**os.environ, "CJM_HOST_PROC": str(outer)},
                           capture_output=True, text=True, timeout=60)
    assert found.stdout == "True None None\n", found.stdout + found.stderr


@pytest.mark.skipif(not os.access("/sys/fs/cgroup/pids", os.W_OK), reason="no cgroup v1 hierarchy that can be written")
def test_a_process_in_a_real_control_group_says_in_which_container(spawn):
    "Also from inside a cgroup namespace, where its path begins with /.."
    name = "3f2a9c41d07e" + "5b"*26
    group, own = (Path("/sys/fs/cgroup/pids/docker")/container for container in (name, "cd"*32))
    for folder in (group, own): folder.mkdir(parents=True)
    child = spawn("input()")
    try:
        (group/"cgroup.procs").write_text(str(child.pid))
        assert read_process(child.pid).container == name[:12]
        code = ("from cjm_fasthtml_resources.core.containers import read_container as r; "
                f"print(r({child.pid}), r('self'))")
        for namespace in ("", "unshare --cgroup"):
            enter = f"echo $$ > {own}/cgroup.procs && exec {namespace} {sys.executable} -c \"{code}\""
            inside = subprocess.run(["sh", "-c", enter], capture_output=True, text=True, timeout=60)
            assert inside.stdout == f"{name[:12]} None\n", inside.stdout + inside.stderr
    finally:
        child.kill()
        child.wait()
        for folder in (group, own, group.parent): folder.rmdir()
