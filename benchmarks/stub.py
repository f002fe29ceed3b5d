"""Run a program's command over a driver that costs next to nothing: what is measured is the program.

    python benchmarks/stub.py GPUS PID,PID,… cjm-resources [ARGUMENT …]     or nvitop

It stands beneath pynvml, which both programs use, and imports nothing else. The processes are divided among the GPUs.
"""
import ctypes
import struct
import sys

import pynvml

MIB = 2**20
NUMBERS = {"nvmlDeviceGetTemperature": 41, "nvmlDeviceGetPowerUsage": 141_000,
           "nvmlDeviceGetEnforcedPowerLimit": 700_000, "nvmlDeviceGetPowerManagementLimit": 700_000,
           "nvmlDeviceGetFanSpeed": 30, "nvmlDeviceGetPerformanceState": 0,
           "nvmlDeviceGetPersistenceMode": 1, "nvmlDeviceGetComputeMode": 0, "nvmlDeviceGetDisplayActive": 0,
           "nvmlDeviceGetDisplayMode": 0, "nvmlSystemGetCudaDriverVersion_v2": 13_000, "nvmlDeviceGetBrand": 14,
           "nvmlDeviceGetClockInfo": 1980, "nvmlDeviceGetMaxClockInfo": 1980, "nvmlDeviceGetMaxMigDeviceCount": 0}


def number(value):
    "A call that writes a number through its last argument"
    def call(*args):
        args[-1]._obj.value = value
        return 0
    return call


class Driver:
    "GPUs with processes, as the C functions of NVML"
    def __init__(self, gpus: int, pids: list[int]) -> None:
        self.devices = [pynvml.struct_c_nvmlDevice_t() for _ in range(gpus)]
        each = len(pids)//gpus
        self.processes = [pids[place*each:(place + 1)*each] for place in range(gpus)]
        self.place = {ctypes.addressof(device): place for place, device in enumerate(self.devices)}

    def __getattr__(self, name: str):
        if not name.startswith("nvml"): raise AttributeError(name)
        return number(NUMBERS[name]) if name in NUMBERS else lambda *args: 3   # NVML_ERROR_NOT_SUPPORTED

    def at(self, handle) -> int: return self.place[ctypes.addressof(handle.contents)]
    def nvmlInitWithFlags(self, flags): return 0
    def nvmlInit_v2(self): return 0
    def nvmlShutdown(self): return 0
    def nvmlErrorString(self, code): return b"an error"
    def nvmlDeviceGetCount_v2(self, ref): return number(len(self.devices))(ref)

    def nvmlDeviceGetHandleByIndex_v2(self, index, ref):
        ref._obj.contents = self.devices[index.value]
        return 0

    def nvmlDeviceGetIndex(self, handle, ref): return number(self.at(handle))(ref)

    def nvmlDeviceGetUUID(self, handle, text, size):
        text.value = b"GPU-51000000-0000-4000-8000-%012d" % self.at(handle)
        return 0

    def nvmlDeviceGetName(self, handle, text, size):
        text.value = b"NVIDIA H100 80GB HBM3"
        return 0

    def nvmlSystemGetDriverVersion(self, text, size):
        text.value = b"580.105.08"
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle, ref):
        ref._obj.gpu, ref._obj.memory = 34, 12
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, ref):
        used, memory = 1000*MIB*len(self.processes[self.at(handle)]), ref._obj
        memory.total, memory.used, memory.free = 81_559*MIB, used, 81_559*MIB - used
        return 0

    nvmlDeviceGetMemoryInfo_v2 = nvmlDeviceGetMemoryInfo

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle, count, infos):
        pids = self.processes[self.at(handle)]
        room, count._obj.value = count._obj.value, len(pids)
        if room < len(pids): return 7   # NVML_ERROR_INSUFFICIENT_SIZE
        none = 2**32 - 1
        written = b"".join(struct.pack("<I4xQII", pid, 1000*MIB, none, none) for pid in pids)
        if written: ctypes.memmove(infos, written, len(written))
        return 0

    def nvmlDeviceGetGraphicsRunningProcesses_v3(self, handle, count, infos): return number(0)(count)
    def nvmlDeviceGetMPSComputeRunningProcesses_v3(self, handle, count, infos): return number(0)(count)


def main() -> None:
    gpus, pids, program, *arguments = sys.argv[1:]
    pynvml.nvmlLib = Driver(int(gpus), [int(pid) for pid in pids.split(",") if pid])
    sys.argv = [program, *arguments]
    if program == "nvitop":
        from nvitop.cli import main as run
    elif program == "cjm-resources":
        from cjm_fasthtml_resources.__main__ import run
    else: return   # only what both programs need
    sys.exit(run())


if __name__ == "__main__": main()
