"What the benchmarks share: the calls that a check is compared with, and how they are timed"
import contextlib
import os
import statistics
import time
from io import FileIO

import pynvml

HANDLES: dict[int, object] = {}  # of the driver that is loaded; clear it when another one is


def start_time(pid):
    "The cheapest way to read when a process started; psutil's create_time() takes about three times as long"
    file = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    try: return int(os.read(file, 4096).rpartition(b")")[2].split()[19])
    finally: os.close(file)


def bare_calls():
    "The NVML calls that a check makes, by pynvml alone, and one read of each process's start time"
    lists = (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses,
             pynvml.nvmlDeviceGetMPSComputeRunningProcesses)
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = HANDLES.setdefault(index, pynvml.nvmlDeviceGetHandleByIndex(index))
        with contextlib.suppress(pynvml.NVMLError): pynvml.nvmlDeviceGetMigMode(handle)
        for _ in range(2):  # before and after the lists
            pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        pynvml.nvmlDeviceGetUtilizationRates(handle)
        pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        pynvml.nvmlDeviceGetPowerUsage(handle)
        pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)
        for call in lists:
            for process in call(handle): start_time(process.pid)


def statm_once():
    "Read /proc/PID/statm of each process once, so that an interruption leaves no descriptor open"
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with FileIO(f"/proc/{name}/statm") as file: file.read()
            except OSError: pass   # noqa: SIM105  suppress() would cost a tenth of the reading


def pin():
    "Keep this process on one core"
    if hasattr(os, "sched_setaffinity"): os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def medians(*sides, rounds=40, warmup=5):
    "Median seconds of each side, measured in turns"
    times = [[] for _ in sides]
    for turn in range(rounds + warmup):
        for side, found in zip(sides, times, strict=True):
            began = time.perf_counter()
            side()
            if turn >= warmup: found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in times]
