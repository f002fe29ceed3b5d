"""Programs on the simulated GPUs of queues.py

    python benchmarks/queue_programs.py job NAME MB SECONDS    use GPU memory, on the GPUs of CUDA_VISIBLE_DEVICES
    python benchmarks/queue_programs.py nvidia-smi …           what such a machine's nvidia-smi prints
    python benchmarks/queue_programs.py cjm-resources …        this library's command
    python benchmarks/queue_programs.py gq-daemon              the daemon of gq-local

QUEUES_GPUS is how many GPUs there are, QUEUES_MB the memory of each, and QUEUES_CARDS the folder in which programs see
what the others have allocated. A job adds lines to the file QUEUES_LOG.
"""
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

LOADING = 0.3   # seconds from a job's start until it allocates: imports, and reading the weights


def simulated() -> Any:
    "The driver of the simulated GPUs"
    from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
    gpus = [SimulatedGpu("NVIDIA L4", memory_total_mb=int(os.environ["QUEUES_MB"]))
            for _ in range(int(os.environ["QUEUES_GPUS"]))]
    return SimulatedDriver(gpus, shared=os.environ["QUEUES_CARDS"])


def tell(name: str, what: str) -> None:
    "Add a line to the log"
    line = json.dumps(dict(name=name, what=what, at=time.monotonic(), pid=os.getpid()))
    file = os.open(os.environ["QUEUES_LOG"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def job(name: str, memory: str, seconds: str) -> int:
    "Allocate so many MiB on each GPU, and hold them for so long; 1 if they are not there"
    tell(name, "starts")
    gpus = [int(number) for number in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
    time.sleep(LOADING)
    driver = simulated()
    with contextlib.ExitStack() as held:
        try:
            for gpu in gpus: held.enter_context(driver.allocate(int(memory), gpu))
        except MemoryError as error:
            tell(name, "fails")
            print(error, file=sys.stderr)
            return 1
        tell(name, "holds")
        time.sleep(float(seconds))
    tell(name, "ends")
    return 0


def gpu_fields() -> Iterator[dict[str, Any]]:
    "What nvidia-smi tells of each GPU, by the names of its queries"
    import pynvml
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        yield {"index": index, "uuid": pynvml.nvmlDeviceGetUUID(handle), "gpu_name": pynvml.nvmlDeviceGetName(handle),
               "memory.total": memory.total >> 20, "memory.used": memory.used >> 20,
               "utilization.gpu": pynvml.nvmlDeviceGetUtilizationRates(handle).gpu}


def process_fields() -> Iterator[dict[str, Any]]:
    "What it tells of each process that computes"
    import pynvml
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            yield {"gpu_uuid": pynvml.nvmlDeviceGetUUID(handle), "pid": process.pid,
                   "used_memory": process.usedGpuMemory >> 20}


def nvidia_smi(asked: str, form: str) -> int:
    "The two queries that queues make, as `--format=csv,noheader,nounits` prints them"
    import pynvml
    what, _, fields = asked.partition("=")
    assert form in ("--format=csv,noheader", "--format=csv,noheader,nounits"), form
    with simulated():
        pynvml.nvmlInit()
        for row in {"--query-gpu": gpu_fields, "--query-compute-apps": process_fields}[what]():
            print(", ".join(str(row[field]) for field in fields.split(",")))
    return 0


def this(*arguments: str) -> int:
    from cjm_fasthtml_resources.cli import main
    sys.argv = ["cjm-resources", *arguments]
    with simulated(): main()
    return 0


def gq_daemon() -> int:
    from gq.daemon import main
    with simulated(): return main([])


PROGRAMS = {"job": job, "nvidia-smi": nvidia_smi, "cjm-resources": this, "gq-daemon": gq_daemon}

if __name__ == "__main__": sys.exit(PROGRAMS[sys.argv[1]](*sys.argv[2:]))
