"""What this machine's NVIDIA driver answers, as one JSON object that can be attached to an issue

Raw answers of NVML with their error codes, and how many bytes it writes for a list of processes. UUIDs and PIDs are
replaced by made-up ones, the same for the same device or process. Nothing is read of the machine's name, its users, or
the names and command lines of processes. cjm_fasthtml_resources/simulated/reports.py describes the fields, and makes
a simulated machine of it.
"""
import contextlib
import ctypes
import json
import os
import platform
import re
import struct
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

from cjm_fasthtml_resources import __version__
from cjm_fasthtml_resources.core.memory import read_machine
from cjm_fasthtml_resources.core.nvml_errors import in_words
from cjm_fasthtml_resources.core.process import driver_numbers, host_proc, in_pid_namespace, is_free
from cjm_fasthtml_resources.core.sysfs import listed_gpus
from cjm_fasthtml_resources.simulated.reports import REPORT_VERSION

VISIBLE = Path(__file__).with_name("visible.py")
LIMIT = 120   # seconds for the driver
ROOM, LARGEST, UNTOUCHED = 256, 64, 0xA5   # entries of an array, bytes for each, and what stands there before the call
FIRST_PID, HIGHEST_PID = 4_300_001, 2**22   # Linux gives no PID as high as the first

CALLS = {   # the C function → pynvml's, and what it takes beside the handle
    **{f"nvmlDeviceGet{name}": (f"nvmlDeviceGet{name}",) for name in (
        "Name", "UUID", "Brand", "Architecture", "CudaComputeCapability", "NumGpuCores", "MigMode",
        "MaxMigDeviceCount", "GpuInstanceId", "ComputeInstanceId", "AddressingMode", "VirtualizationMode",
        "PersistenceMode", "ComputeMode", "UtilizationRates", "PowerUsage", "EnforcedPowerLimit", "FanSpeed",
        "PerformanceState", "GspFirmwareMode")},
    "nvmlDeviceGetTemperature": ("nvmlDeviceGetTemperature", 0),      # NVML_TEMPERATURE_GPU
    "nvmlDeviceGetMaxClockInfo": ("nvmlDeviceGetMaxClockInfo", 1),    # NVML_CLOCK_SM
}
LISTS = {kind: [f"nvmlDeviceGet{kind}RunningProcesses{form}" for form in ("_v3", "_v2", "")]
         for kind in ("Compute", "Graphics", "MPSCompute")}
FORMS = {16: "<I4xQ", 24: "<I4xQII", 32: "<I4xQIIQ"}
OTHERS = ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetConfComputeMemSizeInfo",
          "nvmlDeviceGetRunningProcessDetailList", "nvmlDeviceGetProcessUtilization", "nvmlInitWithFlags")
UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class Aliases:
    "Made-up UUIDs and PIDs, the same for the same"
    def __init__(self):
        self.uuids, self.pids = {}, {}

    def uuid(self, text: str) -> str:
        def made(found) -> str:
            number = self.uuids.setdefault(found[0].lower().replace("-", ""), len(self.uuids))
            return f"51000000-0000-4000-8000-{number:012x}"
        replaced, count = UUID.subn(made, text)
        return replaced if count else f"UUID of another form, {self.uuids.setdefault(text, len(self.uuids))}"

    def digits(self, digits: str) -> str:
        return self.uuid("-".join([digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]]))

    def pid(self, pid: int) -> int:
        "PIDs that no process can have stay as they are"
        return self.pids.setdefault(pid, FIRST_PID + len(self.pids)) if 0 < pid <= HIGHEST_PID else pid


def plain(value):
    "An answer as JSON"
    if isinstance(value, ctypes.Structure): return {name: plain(getattr(value, name)) for name, *_ in value._fields_}
    if isinstance(value, bytes): return value.decode(errors="replace")
    if isinstance(value, (list, tuple)): return [plain(part) for part in value]
    return value if isinstance(value, (str, int, float, type(None))) else getattr(value, "value", type(value).__name__)


class Reader:
    "Asks NVML, one call after the other, and notes which one is under way"
    def __init__(self, nvml, aliases: Aliases):
        self.nvml, self.aliases, self.asking = nvml, aliases, None

    def ask(self, call: str, *args, name: str = "") -> dict:
        "The answer of a call, or its error code"
        self.asking = name or call
        function = getattr(self.nvml, call, None)
        if function is None: return dict(error="pynvml lacks it")
        try: return dict(value=plain(function(*args)))
        except self.nvml.NVMLError as error: return dict(error=error.value)
        except Exception as error: return dict(error=type(error).__name__)

    def memory(self, handle) -> dict:
        newer = getattr(self.nvml, "nvmlMemory_v2", None)
        found = {"nvmlDeviceGetMemoryInfo": self.ask("nvmlDeviceGetMemoryInfo", handle)}
        if newer is not None:
            found["nvmlDeviceGetMemoryInfo_v2"] = self.ask("nvmlDeviceGetMemoryInfo", handle, newer,
                                                           name="nvmlDeviceGetMemoryInfo_v2")
        return found

    def listed(self, handle, call: str) -> dict:
        "What a C function writes, into an array that was filled beforehand"
        self.asking = call
        try: function = getattr(self.nvml.nvmlLib, call)
        except AttributeError: return dict(error=13)   # function not found
        room = ROOM
        while True:
            array = (ctypes.c_ubyte*(room*LARGEST))(*[UNTOUCHED]*(room*LARGEST))
            count = ctypes.c_uint(room)
            error = function(handle, ctypes.byref(count), array)
            if error != 7 or not room < count.value <= HIGHEST_PID: break   # insufficient size
            room = 2*count.value
        written = bytes(array).rstrip(bytes([UNTOUCHED]))
        found = dict(error=error, count=count.value, bytes=len(written))
        if not error and 0 < count.value <= room: found |= self.entries(bytes(array), count.value, len(written))
        return found

    def entries(self, array: bytes, count: int, extent: int) -> dict:
        size = next((size for size in FORMS if extent <= size*count), None)
        if size is None: return {}
        rows = struct.iter_unpack(FORMS[size], array[:size*count])
        return dict(entry=size, entries=[[self.aliases.pid(pid), None if memory == 2**64 - 1 else memory, *rest]
                                         for pid, memory, *rest in rows])

    def device(self, handle, instances: bool = True) -> dict:
        answers = {name: self.ask(call, handle, *args, name=name) for name, (call, *args) in CALLS.items()}
        answers |= self.memory(handle)
        if isinstance(uuid := answers["nvmlDeviceGetUUID"].get("value"), str):
            answers["nvmlDeviceGetUUID"]["value"] = self.aliases.uuid(uuid)
        found = dict(answers=answers, lists={call: self.listed(handle, call) for calls in LISTS.values()
                                             for call in calls})
        return found | dict(instances=self.instances(handle, answers)) if instances else found

    def instances(self, handle, answers: dict) -> list[dict]:
        found = []
        for number in range(answers["nvmlDeviceGetMaxMigDeviceCount"].get("value") or 0):
            try: part = self.nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            except self.nvml.NVMLError: continue
            found.append(dict(index=number, **self.device(part, instances=False)))
        return found


def kernel_module(proc: str = "/proc/driver/nvidia/version", sys_folder: str = "/sys/module") -> str | None:
    "Which kernel module drives the GPUs: open, proprietary or nvgpu; `None` if that cannot be read"
    text, taint = "", ""
    with contextlib.suppress(OSError): text = Path(proc).read_text(errors="replace")
    if "Kernel Module" in text: return "open" if "Open Kernel Module" in text else "proprietary"
    with contextlib.suppress(OSError): taint = Path(sys_folder, "nvidia", "taint").read_text(errors="replace").strip()
    if taint: return "proprietary" if "P" in taint else "open"
    return "nvgpu" if Path(sys_folder, "nvgpu").exists() else None


def machine() -> dict:
    memory, release = read_machine(), platform.release()
    version = re.match(r"[\d.]*\d", release)
    return dict(system=platform.system(), kernel=version[0] if version else None, processor=platform.machine(),
                python=platform.python_version(), wsl="microsoft" in release.lower(), memory_total=memory.total,
                memory_available=memory.total - memory.used, pid_namespace=in_pid_namespace())


def missing(nvml) -> list[str]:
    "The C functions that the driver's library lacks"
    def lacks(name: str) -> bool:
        try: getattr(nvml.nvmlLib, name)
        except AttributeError: return True
        return False
    every = [*CALLS, *OTHERS, *(call for calls in LISTS.values() for call in calls)]
    return [name for name in every if lacks(name)]


def read_driver(report: dict, reader: Reader, asleep: dict[int, bool]) -> None:
    "Add what the driver says, as it is said"
    nvml, driver = reader.nvml, report["driver"]
    began = time.monotonic()
    try: nvml.nvmlInit()
    except nvml.NVMLError as error:
        driver["init"] = dict(error=error.value, seconds=round(time.monotonic() - began, 3))
        report["reason"] = in_words(error)
        return
    driver["init"] = dict(error=0, seconds=round(time.monotonic() - began, 3))
    for key, call in dict(version="nvmlSystemGetDriverVersion", nvml="nvmlSystemGetNVMLVersion",
                          cuda="nvmlSystemGetCudaDriverVersion_v2").items():
        driver[key] = reader.ask(call).get("value")
    report["missing"] = missing(nvml)
    count = reader.ask("nvmlDeviceGetCount")
    if "error" in count: report["reason"] = f"nvmlDeviceGetCount answered {count['error']}"
    elif not count["value"]: report["reason"] = "the driver has no GPU"
    for index in range(count.get("value") or 0):
        handle, found = None, dict(index=index, asleep=asleep.get(index, False))
        try: handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError as error: found["error"] = error.value
        report["devices"].append(found)
        if handle is not None: found |= reader.device(handle)
    reader.asking = None
    with contextlib.suppress(nvml.NVMLError): nvml.nvmlShutdown()


def read_what_it_says(report: dict, reader: Reader, asleep: dict[int, bool]) -> None:
    "The same, with a word for an answer that nobody expected; what was read until then stays"
    try: read_driver(report, reader, asleep)
    except Exception as error: report["reason"] = f"{reader.asking} could not be read: {type(error).__name__}"


def cuda_order(aliases: Aliases, count: int) -> list[dict]:
    "What CUDA's library shows, for some values of the variables"
    found = []
    for value in (None, "0", *(("1,0", ",".join(map(str, range(count)))) if count > 1 else ())):
        for order in (None, "PCI_BUS_ID"):
            given = dict(CUDA_VISIBLE_DEVICES=value, CUDA_DEVICE_ORDER=order)
            env = {name: text for name, text in os.environ.items() if name not in given}
            env |= {name: text for name, text in given.items() if text is not None}
            try: shown = json.loads(subprocess.run([sys.executable, VISIBLE], env=env, capture_output=True, text=True,
                                                   timeout=60).stdout)
            except (OSError, ValueError, subprocess.TimeoutExpired): shown = dict(reason="it gave no answer")
            if "devices" in shown: shown["devices"] = [aliases.digits(digits) for digits in shown["devices"]]
            found.append(given | shown)
            if "reason" in shown: return found
    return found


def make_report(limit: float = LIMIT) -> dict:
    "All of it; a driver that does not answer in time costs what comes after the call that hangs"
    asleep = {index: gpu.suspended for index, gpu in enumerate(listed_gpus())}   # before anything wakes them
    report = dict(schema_version=REPORT_VERSION, made_by=f"cjm-fasthtml-resources {__version__}",
                  date=time.strftime("%Y-%m-%d"), reason=None, machine=machine(), driver={}, missing=[], devices=[],
                  cuda=[], processes_here=[])
    report["driver"] |= dict(module=kernel_module(), numbers=driver_numbers(host_proc()))
    try: pynvml = import_module("pynvml")
    except ImportError as error: return report | dict(reason=in_words(error))
    report["driver"]["old_pynvml"] = not hasattr(pynvml, "nvmlMemory_v2")
    reader = Reader(pynvml, Aliases())
    thread = threading.Thread(target=read_what_it_says, args=(report, reader, asleep), daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        asked = reader.asking or "nvmlInit"
        return json.loads(json.dumps(report)) | dict(
            reason=f"the driver did not answer {asked} within {limit:g} s")
    report["processes_here"] = [made for pid, made in reader.aliases.pids.items() if not is_free(pid)]
    if report["devices"]: report["cuda"] = cuda_order(reader.aliases, len(report["devices"]))
    return report


def write_report(path: Path) -> int:
    "Write the report to a file, and say what it has; return the exit code"
    report = make_report()
    try: path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error: return print(f"the report could not be written: {error}", file=sys.stderr) or 1
    names = [d.get("answers", {}).get("nvmlDeviceGetName", {}).get("value") or "a GPU without a name"
             for d in report["devices"]]
    print(f"{path}: {', '.join(names) or 'no GPU'}" + (f" ({report['reason']})" if report["reason"] else ""))
    print("It has no names of hosts, users or processes; UUIDs and PIDs in it are made up. "
          f"To see what the library makes of it: cjm-resources --simulate {path}")
    return 0
