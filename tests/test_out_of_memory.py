"Out of memory: every text is recognised, no other is, and an explanation never raises"
import builtins
import concurrent.futures
import re
import subprocess
import time
import traceback
from dataclasses import replace

import pytest
from conftest import GIB, MIB
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cjm_fasthtml_resources import explain_out_of_memory
from cjm_fasthtml_resources.core.conflict import ResourceConflict
from cjm_fasthtml_resources.core.gpu import GpuDevice, GpuSnapshot
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.out_of_memory import (
    KNOWN,
    OutOfMemory,
    Scene,
    explain_found,
    find_cause,
    find_devices,
    find_out_of_memory,
    read_errors,
    read_figures,
    read_size,
    read_text,
    ways_out,
)
from cjm_fasthtml_resources.core.resources import DeviceStatus, OwnedProcess, Promise, ResourceStatus, ResourceType
from cjm_fasthtml_resources.core.workers import make_state
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess, load_scenario

TORCH = (
    "CUDA out of memory. Tried to allocate 8.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 3.29 GiB is "
    "free. Including non-PyTorch memory, this process has 136.51 GiB memory in use. Of the allocated memory 136.00 GiB "
    "is allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated. If reserved but unallocated memory "
    "is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation "
    "for Memory Management  (https://docs.pytorch.org/docs/stable/notes/cuda.html)")
LIMITED = (
    "CUDA out of memory. Tried to allocate 4.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 139.29 GiB is "
    "free. Including non-PyTorch memory, this process has 518.00 MiB memory in use. 1.40 GiB allowed; Of the allocated "
    "memory 0 bytes is allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated.")
IN_PIECES = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 23.65 GiB of which 1.00 GiB is "
    "free. Process 4200301 has 10.00 GiB memory in use. Including non-PyTorch memory, this process has 12.50 GiB "
    "memory in use. Of the allocated memory 8.00 GiB is allocated by PyTorch, with 24.00 MiB allocated in private "
    "pools (e.g., CUDA Graphs), and 3.50 GiB is reserved by PyTorch but unallocated.")
TORCH_1 = ("CUDA out of memory. Tried to allocate 4.16 GiB (GPU 0; 10.76 GiB total capacity; 2.82 GiB already "
           "allocated; 4.18 GiB free; 4.33 GiB reserved in total by PyTorch)")
ACCELERATOR = (
    "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/"
    "cuda-runtime-api/group__CUDART__TYPES.html for more information.\nCUDA kernel errors might be asynchronously "
    "reported at some other API call, so the stacktrace below might be incorrect.\nFor debugging consider passing "
    "CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n")
ONNX = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Mul node. "
    "Name:'Mul_8702' Status Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* "
    "onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*, bool, "
    "onnxruntime::WaitNotificationFn) Failed to allocate "
    "memory for requested buffer of size 2830172160")
TENSORFLOW = ("OOM when allocating tensor with shape[32,1024,64,64] and type float on /job:localhost/replica:0/task:0/"
              "device:{}:0 by allocator {} [Op:Conv2D]")
GGML = (
    "load_tensors: loading model tensors, this can take a while... (mmap = true)\n"
    "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9866.00 MiB on device 1: cudaMalloc failed: out of memory\n"
    "alloc_tensor_range: failed to allocate CUDA1 buffer of size 10345253120\n"
    "llama_model_load: error loading model: unable to allocate CUDA1 buffer\n")
VLLM_FREE = (
    "Free memory on device cuda:0 (7.34/15.49 GiB) on startup is less than desired GPU memory utilization (0.8, 12.39 "
    "GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.")
VLLM_CACHE = (
    "To serve at least one request with the models's max seq len (131072), (4.00 GiB KV cache is needed, which is "
    "larger than the available KV cache memory (0.65 GiB). Based on the available memory, the estimated maximum model "
    "length is 21440.")

GPU_TEXTS = {   # text → what it tells
    TORCH: dict(framework="PyTorch", kind="gpu", wanted=8*GIB, device=0, used=int(136.51*GIB), free=int(3.29*GIB),
                unused=0, limit=None),
    LIMITED: dict(framework="PyTorch", wanted=4*GIB, limit=int(1.4*GIB), used=518*MIB, free=int(139.29*GIB)),
    IN_PIECES: dict(framework="PyTorch", wanted=2*GIB, device=1, used=int(12.5*GIB), unused=int(3.5*GIB)),
    TORCH_1: dict(framework="PyTorch", wanted=int(4.16*GIB), device=0, used=int(4.33*GIB), free=int(4.18*GIB)),
    "CUDA out of memory. Tried to allocate more than 1EB memory.": dict(framework="PyTorch", wanted=2**60),
    "the job failed: CUDA out of memory": dict(framework="PyTorch", kind="gpu", wanted=None),
    ACCELERATOR: dict(framework="PyTorch", kind=None, wanted=None, device=None),
    "cuda runtime error (2) : out of memory at /pytorch/aten/src/THC/generic/THCStorage.cu:58":
        dict(framework="PyTorch", kind=None),
    "Caught OutOfMemoryError in replica 0 on device 0.\nOriginal Traceback (most recent call last):\n  File \"a.py\", "
    f"line 1, in f\n    x.cuda()\ntorch.OutOfMemoryError: {TORCH}": dict(framework="PyTorch", wanted=8*GIB, device=0),
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": dict(framework="CUDA", kind="gpu"),
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED": dict(framework="CUDA", kind="gpu"),
    "Out of memory allocating 8,589,934,592 bytes (allocated so far: 146,028,888,064 bytes).":
        dict(framework="CuPy", kind="gpu", wanted=8*GIB, used=136*GIB, limit=None),
    "Out of memory allocating 8,589,934,592 bytes (allocated so far: 1,073,741,824 bytes, limit set to: 2,147,483,648 "
    "bytes).": dict(framework="CuPy", limit=2*GIB, used=GIB),
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8.00GiB with allocator GPU_0_bfc on device 0. "
    "[tf-allocator-allocation-error=''] [executable_name='jit_broadcast_in_dim']":
        dict(framework="JAX", kind="gpu", wanted=8*GIB, device=0),
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.\nBufferAssignment OOM Debugging.\n"
    "BufferAssignment stats:\n             parameter allocation:  372.76MiB": dict(framework="JAX", wanted=4770354232),
    "RESOURCE_EXHAUSTED: Out of memory allocating 85898814480 bytes.": dict(framework="JAX", kind=None,
                                                                            wanted=85898814480),
    "RESOURCE_EXHAUSTED: Failed to allocate request for 176.00MiB (184549376B) on device ordinal 3":
        dict(framework="JAX", kind="gpu", wanted=176*MIB, device=3),
    "INTERNAL: Failed to allocate 98697216 bytes for new constant": dict(framework="JAX", wanted=98697216),
    "Execution of replica 0 failed: Resource exhausted: Out of memory while trying to allocate 5520758552 bytes.":
        dict(framework="JAX", wanted=5520758552),
    TENSORFLOW.format("GPU", "GPU_0_bfc"): dict(framework="TensorFlow", kind="gpu", wanted=512*MIB, device=0),
    "{{function_node __wrapped__AddV2}} failed to allocate memory [Op:AddV2]": dict(framework="TensorFlow"),
    "Dst tensor is not initialized.": dict(framework="TensorFlow", kind="gpu"),
    ONNX: dict(framework="ONNX Runtime", kind=None, wanted=2830172160),
    "BFCArena Available memory of 1048576 is smaller than requested bytes of 4194304":
        dict(framework="ONNX Runtime", wanted=4*MIB, limit=MIB),
    "CUDA failure 2: out of memory ; GPU=1 ; hostname=ada ; file=/onnxruntime_src/cuda_allocator.cc ; line=47 ; "
    "expr=cudaMalloc((void**)&p, size);": dict(framework="ONNX Runtime", kind="gpu", device=1),
    GGML: dict(framework="llama.cpp", kind="gpu", device=1, wanted=10345253120),
    "llama_model_load: error loading model: unable to allocate CUDA0 buffer": dict(framework="llama.cpp", device=0),
    "llama runner process has terminated: cudaMalloc failed: out of memory": dict(framework="llama.cpp"),
    "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 144817.04 MiB on device 0: cudaMalloc failed: out of "
    "memory":
        dict(framework="llama.cpp", wanted=int(144817.04*MIB), device=0),
    "ggml_gallocr_reserve_n: failed to allocate CUDA4 buffer of size 150995968":
        dict(framework="llama.cpp", wanted=150995968, device=4),
    "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine.":
        dict(framework="vLLM", kind="gpu", setting="gpu_memory_utilization"),
    VLLM_FREE: dict(framework="vLLM", wanted=int(12.39*GIB), free=int(7.34*GIB), device=0),
    VLLM_CACHE: dict(framework="vLLM", wanted=4*GIB, limit=int(0.65*GIB)),
    "The model's max seq len (4096) is larger than the maximum number of tokens that can be stored in KV cache (3664).":
        dict(framework="vLLM"),
    "Not enough memory. Please try to increase --mem-fraction-static.": dict(framework="SGLang", kind="gpu"),
    "CUDA failed with error out of memory": dict(framework="CTranslate2", kind="gpu"),
    "Triton Error [CUDA]: out of memory": dict(framework="Triton", kind="gpu"),
    "Error out of memory at line 351 in file /home/developer/bitsandbytes/csrc/pythonInterface.c":
        dict(framework="bitsandbytes", kind="gpu"),
    "Some modules are dispatched on the CPU or the disk. Make sure you have enough GPU RAM to fit the quantized model.":
        dict(framework="bitsandbytes", kind="gpu"),
    "[<CUresult.CUDA_ERROR_OUT_OF_MEMORY: 2>] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY":
        dict(framework="Numba", kind="gpu"),
    "Call to cuMemHostAlloc results in CUDA_ERROR_OUT_OF_MEMORY": dict(framework="Numba", kind="ram"),
    "cuMemAlloc failed: out of memory": dict(framework="PyCUDA", kind="gpu"),
    "std::bad_alloc: out_of_memory: CUDA error (failed to allocate 2778950720 bytes) at: /rmm/mr/device/"
    "cuda_memory_resource.hpp": dict(framework="RAPIDS", kind="gpu", wanted=2778950720),
    "[resizingAllocator.cpp::allocate::78] Error Code 1: Cuda Runtime (out of memory)": dict(framework="TensorRT"),
    "Cuda failure 2 'out of memory'": dict(framework="NCCL"),
    "parallel_for failed: cudaErrorMemoryAllocation: out of memory": dict(framework="CUDA", kind=None),
    str(("<cudaError_t.cudaErrorMemoryAllocation: 2>", None)): dict(framework="CUDA", kind=None),
    "CUDA_ERROR_OUT_OF_MEMORY: out of memory": dict(framework="CUDA", kind=None),
}
RAM_TEXTS = {
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "2359296 bytes. Error code 12 (Cannot allocate memory)": dict(framework="PyTorch", wanted=2359296),
    "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes.":
        dict(framework="PyTorch", wanted=64),
    "unable to mmap 1024 bytes from file </torch_4200101_3>: Cannot allocate memory (12)": dict(framework="PyTorch"),
    "Unable to allocate 1.00 TiB for an array with shape (1, 137438953472) and data type float64":
        dict(framework="NumPy", wanted=2**40),
    TENSORFLOW.format("CPU", "cpu"): dict(framework="TensorFlow", wanted=512*MIB),
    "model requires more system memory (8.1 GiB) than is available (7.3 GiB)": dict(framework="Ollama",
                                                                                    wanted=int(8.1*GIB)),
    "Traceback (most recent call last):\n  File \"a.py\", line 1, in <module>\n    b'x'*10**13\nMemoryError":
        dict(framework="Python"),
    "terminate called after throwing an instance of 'std::bad_alloc'": dict(framework="C++"),
    "[Errno 12] Cannot allocate memory": dict(framework="Linux"),
}
OTHERS = [
    "", "Killed", "out of memory", "MemoryErrors happen", "the machine is out of memory, swap is full",
    "batch_size must be below 8, since larger ones run out of memory on the GPU",
    "use fewer layers to avoid CUDA out of memory errors", "catch torch.OutOfMemoryError yourself",
    "DataLoader worker (pid 4200101) is killed by signal: Killed.",
    "DataLoader worker (pid(s) 4200101) exited unexpectedly",
    "RuntimeError: DataLoader worker is killed by signal: Bus error. It is possible that dataloader's workers are out "
    "of shared memory.",
    "out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes may help.",
    "CUDA error: an illegal memory access was encountered", "CUDA error: device-side assert triggered",
    "CUDA driver error: invalid argument", "CUDNN_STATUS_NOT_SUPPORTED", "Triton Error [CUDA]: invalid argument",
    "429 RESOURCE_EXHAUSTED: Quota exceeded for aiplatform.googleapis.com",
    "<_InactiveRpcError of RPC that terminated with: status = StatusCode.RESOURCE_EXHAUSTED details = \"Received "
    "message larger than max (5308389 vs. 4194304)\">", "8 RESOURCE_EXHAUSTED: Received message larger than max",
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.",
    "Allocator (GPU_0_bfc) ran out of memory trying to allocate 3.37GiB with freed_by_count=0. The caller indicates "
    "that this is not a failure, but this may mean that there could be performance gains if more memory was available.",
    "java.lang.OutOfMemoryError: Java heap space", "FATAL ERROR: JavaScript heap out of memory",
    "ERROR:  out of memory\nDETAIL:  Failed on request of size 1024 in memory context", "out of shared memory",
    "HIP out of memory. Tried to allocate 2.00 GiB", "MPS backend out of memory (MPS allocated: 18.00 GB)",
    "context deadline exceeded", "OOMKilled", "[Errno 28] No space left on device", "database or disk is full",
    "ggml_cuda_host_malloc: failed to allocate 1900.00 MiB of pinned memory: invalid argument",
]


def short(text): return re.sub(r"\W+", "-", text)[:50]


@pytest.mark.parametrize(("text", "told"), GPU_TEXTS.items(), ids=map(short, GPU_TEXTS))
def test_what_frameworks_raise_and_print_is_read(text, told):
    found = find_out_of_memory(text)
    assert {name: getattr(found, name) for name in told} == told
    assert find_out_of_memory(RuntimeError(text)) == found
    printed = f"step 17\n2026-11-26 10:00:00 ERROR {text}\nshutting down\n"
    assert find_out_of_memory(printed).framework == found.framework


@pytest.mark.parametrize(("text", "told"), RAM_TEXTS.items(), ids=map(short, RAM_TEXTS))
def test_ram_is_told_apart(text, told):
    found = find_out_of_memory(text)
    assert {name: getattr(found, name) for name in told} == told
    assert found.kind == "ram"


@pytest.mark.parametrize("text", OTHERS, ids=short)
def test_what_only_looks_alike_is_not_recognised(text):
    assert find_out_of_memory(text) is None
    assert find_out_of_memory(ValueError(text)) is None
    assert explain_out_of_memory(ValueError(text), manager=object()) is None


def test_every_row_has_a_text():
    told = {(read_text(text).framework, row.pattern) for text in [*GPU_TEXTS, *RAM_TEXTS] for row in KNOWN
            if re.search(row.pattern, text, re.MULTILINE)}
    assert {row.pattern for row in KNOWN} == {pattern for _, pattern in told}


def raised(module, name, *bases, text=""):
    return type(name, bases or (RuntimeError,), {"__module__": module})(text)


@pytest.mark.parametrize(("error", "framework", "kind"), [
    (raised("torch", "OutOfMemoryError"), "PyTorch", "gpu"),
    (raised("torch.cuda", "OutOfMemoryError"), "PyTorch", "gpu"),
    (raised("cupy.cuda.memory", "OutOfMemoryError", MemoryError), "CuPy", "gpu"),
    (raised("cupy.cuda.memory", "OutOfMemoryError", MemoryError, text="Out of memory allocating 1,000 bytes"), "CuPy",
     "gpu"),
    (raised("app", "NoRoom", type(raised("torch", "OutOfMemoryError"))), "PyTorch", "gpu"),
    (raised("torch", "AcceleratorError", text=ACCELERATOR), "PyTorch", None),
    (MemoryError(), "Python", "ram"),
    (MemoryError("std::bad_alloc: out_of_memory: CUDA error at: cuda_memory_resource.hpp:69"), "RAPIDS", "gpu"),
    (raised("numpy._core._exceptions", "_ArrayMemoryError", MemoryError,
            text="Unable to allocate 1.00 TiB for an array with shape (1,) and data type float64"), "NumPy", "ram"),
    (OSError(12, "Cannot allocate memory"), "Linux", "ram"),
], ids=str)
def test_types_tell_what_a_text_does_not(error, framework, kind):
    found = find_out_of_memory(error)
    assert (found.framework, found.kind) == (framework, kind)


@pytest.mark.parametrize("error", [raised("java", "OutOfMemoryError"), raised("pool", "PoolFull", MemoryError),
                                   raised("app", "MemoryError", Exception)], ids=str)
def test_types_of_others_tell_nothing(error): assert find_out_of_memory(error) is None


def test_causes_contexts_and_groups_are_read():
    def chained(cause=None, context=None, hides=False):
        error = ValueError("the job failed")
        error.__cause__, error.__context__ = cause, context
        error.__suppress_context__ = hides
        return error

    oom = RuntimeError(TORCH)
    assert find_out_of_memory(chained(cause=oom)) == find_out_of_memory(oom)
    assert find_out_of_memory(chained(context=oom)) == find_out_of_memory(oom)
    assert find_out_of_memory(chained(chained(context=chained(oom)))) == find_out_of_memory(oom)
    assert find_out_of_memory(chained(context=oom, hides=True)) is None
    assert find_out_of_memory(chained(cause=KeyError(), context=oom)) is None   # as in a traceback
    backport = raised("exceptiongroup", "ExceptionGroup", text="2 errors")
    backport.exceptions = (ValueError("one"), chained(oom))
    assert find_out_of_memory(backport) == find_out_of_memory(oom)
    if hasattr(builtins, "ExceptionGroup"):   # from Python 3.11 on
        group = builtins.ExceptionGroup("two tasks", [KeyError("a"), chained(oom)])
        assert find_out_of_memory(chained(group)) == find_out_of_memory(oom)


def test_the_outermost_error_counts():
    error = RuntimeError("CUDA out of memory. Tried to allocate 1.00 GiB.")
    error.__cause__ = RuntimeError(TORCH)
    assert find_out_of_memory(error).wanted == GIB


def test_a_circle_and_a_long_chain_end():
    one, two = ValueError("1"), ValueError("2")
    one.__context__, two.__context__ = two, one
    assert list(read_errors(one)) == ["ValueError: 1", "ValueError: 2"]
    first = last = ValueError("0")
    for n in range(5000):
        last.__context__ = ValueError(str(n))
        last = last.__context__
    last.__context__ = first
    assert find_out_of_memory(first) is None
    assert len(list(read_errors(first))) <= 100


def fail(text): raise RuntimeError(text)


def test_an_error_of_another_process_is_read_and_is_not_this_processs():
    with concurrent.futures.ProcessPoolExecutor(1) as pool, pytest.raises(RuntimeError) as caught:
        pool.submit(fail, LIMITED.replace("1.40 GiB allowed; ", "")).result()
    assert find_out_of_memory(caught.value).wanted == 4*GIB
    printed = "".join(traceback.format_exception(caught.value))
    assert find_out_of_memory(RuntimeError(f"a task failed:\n{printed}")).wanted == 4*GIB
    with SimulatedDriver([SimulatedGpu(), SimulatedGpu(processes=[SimulatedProcess(4200301, 24000)])]):
        assert "Other processes use the rest" in explain_out_of_memory(RuntimeError(GGML))
        assert "Seen there now" in explain_out_of_memory(RuntimeError(f"RemoteTraceback:\n{GGML}"))


def test_a_command_that_failed_is_read_by_what_it_printed():
    error = subprocess.CalledProcessError(1, ["train"], stderr=f"step 1\ntorch.OutOfMemoryError: {TORCH}\n".encode())
    assert find_out_of_memory(error).wanted == 8*GIB
    assert find_out_of_memory(subprocess.CalledProcessError(1, ["train"], output=GGML)).framework == "llama.cpp"
    assert find_out_of_memory(subprocess.CalledProcessError(137, ["train"], stderr=b"\xff\xfe")) is None


class NoText(Exception):
    def __str__(self): raise ValueError("no")


class Strange(Exception):
    def __str__(self): return 7


class Deep(Exception):
    def __str__(self): return str(self)


class Properties(Exception):
    @property
    def exceptions(self): raise KeyError("no")
    @property
    def stderr(self): raise RuntimeError("no")
    @property
    def __cause__(self): raise OSError("no")


class Group(Exception):
    exceptions = [1, "two", None, NoText()]


@pytest.mark.parametrize("error", [NoText(), Strange(), Deep(), Properties("x"), Group("x")], ids=repr)
def test_hostile_errors_raise_nothing(error):
    assert find_out_of_memory(error) is None
    error.args = (TORCH,)
    explain_out_of_memory(error, manager=object())


def test_what_is_no_error_is_read_as_a_text():
    assert find_out_of_memory(("cudaErrorMemoryAllocation", None)).framework == "CUDA"
    assert find_out_of_memory(None) is None


def test_an_error_whose_cause_is_hostile_is_still_recognised():
    error = RuntimeError("failed")
    error.__cause__ = NoText()
    error.__cause__.__cause__ = RuntimeError(TORCH)
    assert find_out_of_memory(error).wanted == 8*GIB


@pytest.mark.parametrize("filling", [
    "x", "9", "9,", "\n", "CUDA out of memory ", "Out of memory allocating 9", "RMM failure at: ", "std::bad_alloc: ",
    "GPU_", "CUDA error: out of memory ", "unable to mmap 1 bytes from file ", "torch.", " ", "(", "9.9",
])
def test_a_text_of_megabytes_takes_no_time(filling):
    long = filling*(8*MIB//len(filling))
    began = time.perf_counter()
    for error in (long, RuntimeError(long), f"{long}\n{TORCH}\n", RuntimeError(f"{TORCH}\n{long}")):
        found = find_out_of_memory(error)
        assert found is None or found.framework
    assert time.perf_counter() - began < 4
    assert find_out_of_memory(f"{long}\n{TORCH}\n").wanted == 8*GIB
    assert find_out_of_memory(RuntimeError(f"{TORCH}\n{long}")) is not None


def test_the_last_error_of_a_log_counts():
    log = "".join(f"CUDA out of memory. Tried to allocate {n}.00 GiB.\nretrying\n" for n in (1, 2, 3))
    assert find_out_of_memory(log).wanted == 3*GIB


WORDS = st.sampled_from([
    *GPU_TEXTS, *RAM_TEXTS, *OTHERS, "\n", ": ", "GPU ", "9"*40, ",,,", "\ud800", "\x00", "device 999", "-1 GiB"])


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS | st.text(), max_size=5).map("".join))
@example("Tried to allocate 999999999999999999999999999999 EiB. CUDA out of memory. Tried to allocate")
@example("OOM when allocating tensor with shape[999999999,99999999999,9999999999] and type double")
def test_any_text_can_be_read(text):
    found = read_text(text)
    figures = read_figures(text)
    assert all(n is None or 0 <= n < 2**63 for n in figures.values())
    if found is None: return
    assert found.kind in ("gpu", "ram", None)
    assert isinstance(explain_found(found, scene_of(a_device(0))), str)


@given(st.from_regex(r"\d[\d,]{0,30}(\.\d{1,9})?", fullmatch=True, alphabet="0123456789,."),
       st.sampled_from([None, "B", "bytes", "KiB", "MB", "GiB", "TiB", "PiB", "EB"]))
def test_any_size_can_be_read(number, unit):
    size = read_size(number, unit)
    assert size is None or 0 <= size < 2**63


# who was there

def a_process(pid, gib, owner="external", name="python", parent=None):
    return OwnedProcess(pid, owner, None if gib is None else int(gib*GIB), name, "ada", parent_pid=parent)


def a_device(index, *processes, total=48, unseen=0.0, **more):
    used = sum(p.memory_used or 0 for p in processes) + int(unseen*GIB)
    gpu = GpuDevice(index, f"GPU-{index}", "RTX 6000 Ada", total*GIB, used, total*GIB - used)
    return DeviceStatus(gpu, ResourceStatus.APP_BUSY, processes, unattributed_memory=int(unseen*GIB), **more)


def scene_of(*devices, before=None, pid=4200110, workers=(), environ=None):
    return Scene(conflict_of(*devices), None, before and conflict_of(*before), workers, pid, environ or {})


def conflict_of(*devices):
    snapshot = GpuSnapshot(tuple(d.device for d in devices))
    return ResourceConflict(ResourceType.GPU_MEMORY, ResourceStatus.APP_BUSY, devices=devices, snapshot=snapshot)


LACK = OutOfMemory("PyTorch", "gpu", wanted=8*GIB, device=0)
TRAIN, JOB = a_process(4200301, 30, name="train.py"), a_process(4200110, 14, "app")
FULL = a_device(0, TRAIN, JOB)


def test_others_are_named_as_the_cause_only_where_they_are():
    blamed = explain_found(LACK, scene_of(FULL))
    assert "Other processes use the rest: train.py (PID 4200301, user ada, 30.0 GiB)" in blamed
    assert "The failed process had 14.0 GiB. Without the other processes, the request would fit" in blamed
    alone = explain_found(LACK, scene_of(a_device(0, a_process(4200110, 43, "app"), a_process(4200301, 1))))
    assert "other programs are not the cause" in alone and "had 43.0 GiB of 48.0 GiB" in alone
    nearly = a_device(0, a_process(4200110, 44, "app"), a_process(4200301, 3.9))
    assert "which is nearly all" in explain_found(replace(LACK, wanted=GIB), scene_of(nearly))
    limited = explain_found(find_out_of_memory(LIMITED), scene_of(FULL))
    assert "its own limit" in limited and "train.py" not in limited
    whose = explain_found(LACK, scene_of(FULL, pid=None))   # a text does not tell which process printed it
    assert "Others" not in whose and "train.py" in whose
    unsure = explain_found(LACK, scene_of(replace(FULL, estimated=True), pid=4200999))
    assert "Others" not in unsure and "by estimate" in unsure


def test_what_the_process_had_is_taken_from_the_text_first():
    "The driver is read after the fact, when the process may have freed its memory"
    freed = a_device(0, a_process(4200301, 1))
    assert find_cause(replace(LACK, used=44*GIB), scene_of(freed), freed) == "itself"
    assert find_cause(LACK, scene_of(freed), freed) == "freed"


def test_what_was_free_at_that_moment_counts_more_than_what_is_free_now():
    enough = replace(LACK, free=20*GIB)
    assert find_cause(enough, scene_of(FULL), FULL) == "limit"
    assert "the process's own limit" in explain_found(enough, scene_of(FULL))
    assert find_cause(replace(LACK, free=GIB), scene_of(FULL), FULL) == "others"


def test_ram_is_told_of_beside_a_gpu_only_where_that_is_not_full():
    either = replace(LACK, kind=None)
    assert "RAM" not in explain_found(either, scene_of(FULL))
    assert "The text fits RAM, too" in explain_found(either, scene_of(a_device(0)))


def test_an_unread_figure_of_the_process_is_not_nothing():
    there = a_device(0, a_process(4200110, None, "app"), a_process(4200301, 44))
    assert find_cause(LACK, scene_of(there), there) == "unknown"
    broken = replace(FULL, device=replace(FULL.device, processes_whole=False))
    assert find_cause(LACK, scene_of(broken, pid=4200999), broken) == "unknown"


def test_memory_of_no_visible_process_and_reservations_are_named():
    held = a_device(0, a_process(4200110, 4, "app"), unseen=40,
                    promises=(Promise(4200400, "external", 3*GIB, 3*GIB, "night-run"),))
    said = explain_found(LACK, scene_of(held))
    assert "processes that are not visible from here (40.0 GiB)" in said
    assert said.index("40.0 GiB") < said.index("PID 4200400")


def test_three_are_named_and_the_rest_counted():
    crowd = a_device(0, *(a_process(4200300 + n, 5) for n in range(9)))
    assert "and 6 more" in explain_found(LACK, scene_of(crowd))


def test_workers_are_named_with_type_and_job():
    child = replace(a_process(4200103, 30, "app", parent=4200102), worker_type="llm", job_id="job-7")
    worker = replace(make_state(4200102, "llm"), job_id="job-7", status="running")
    busy = scene_of(a_device(0, child, JOB), workers=(worker,))
    assert "python of your llm worker (PID 4200103, running job-7, 30.0 GiB)" in explain_found(LACK, busy)
    assert "Other processes of this app use the rest" in explain_found(LACK, busy)
    assert "stop_worker" not in explain_found(LACK, busy)
    idle = replace(worker, job_id=None, status="idle", start_time=1.0)
    assert "stop_worker(4200102) frees 30.0 GiB" in explain_found(LACK, replace(busy, workers=(idle,)))
    assert "30.0 GiB, idle)" in explain_found(LACK, replace(busy, workers=(idle,)))
    unlisted = replace(child, worker_type=None, job_id=None, parent_worker_type="llm")
    assert "python of your llm worker (PID" in explain_found(LACK, scene_of(a_device(0, unlisted, JOB)))
    me = replace(idle, pid=4200110)
    assert "stop_worker" not in explain_found(LACK, replace(busy, workers=(me,)))


def test_secrets_of_a_worker_are_not_told():
    worker = replace(make_state(4200102, "sk-proj-a8Fz93kLq02mXv7TbYw6RnE5cJ1uHd4G"), job_id="job-7")
    said = explain_found(LACK, scene_of(a_device(0, a_process(4200102, 44, "app")), workers=(worker,)))
    assert "sk-proj" not in said


def test_growth_is_told_for_processes_that_can_be_compared():
    early = a_device(0, a_process(4200301, 10, name="train.py"), a_process(4200110, 1, "app"))
    said = explain_found(LACK, scene_of(FULL, before=[early]))
    assert "train.py (PID 4200301, user ada, 30.0 GiB) uses 20.0 GiB more" in said
    assert "PID 4200110" not in said
    assert "is new" in explain_found(LACK, scene_of(FULL, before=[a_device(0)]))
    assert "is new" in explain_found(LACK, scene_of(FULL, before=[a_device(0, replace(TRAIN, name="other"))]))
    hidden = replace(early, device=replace(early.device, processes_whole=False))
    partly = replace(FULL, device=replace(FULL.device, processes_whole=False))
    assert "Since" not in explain_found(LACK, scene_of(partly, before=[early]))
    for before in ([hidden], [a_device(1)], [FULL], None):
        assert "Since" not in explain_found(LACK, scene_of(FULL, before=before))
    unseen = a_device(0, unseen=44)
    assert "44.0 GiB more are in use by processes that are not" in explain_found(LACK, scene_of(unseen, before=[early]))


@pytest.mark.parametrize(("environ", "place", "ids"), [
    ({}, 0, [0]), ({}, 1, [1]), ({}, 2, []), ({}, None, [1, 0]), ({"CUDA_VISIBLE_DEVICES": "1"}, 0, [1]),
    ({"CUDA_VISIBLE_DEVICES": "GPU-1"}, 0, [1]), ({"CUDA_VISIBLE_DEVICES": "1"}, 1, []),
    ({"CUDA_VISIBLE_DEVICES": ""}, 0, []),
])
def test_a_place_is_counted_as_cuda_does(environ, place, ids):
    scene = scene_of(a_device(0), a_device(1, TRAIN), environ=environ)
    assert [d.device.id for d in find_devices(replace(LACK, device=place), scene)] == ids
    assert isinstance(explain_found(replace(LACK, device=place), scene), str)


def test_where_the_order_is_not_certain_both_are_named():
    slow, fast = a_device(0, TRAIN), a_device(1)
    slow = replace(slow, device=replace(slow.device, name="A", cuda_cores=None))
    fast = replace(fast, device=replace(fast.device, name="B", cuda_cores=None))
    scene = scene_of(slow, fast)
    assert [d.device.id for d in find_devices(LACK, scene)] == [0, 1]
    assert "GPU 0 (A) or GPU 1 (B)" in explain_found(LACK, scene)
    certain = replace(scene, environ={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert [d.device.id for d in find_devices(LACK, certain)] == [0]


@pytest.mark.parametrize(("told", "helps"), [
    (dict(limit=9*GIB, used=2*GIB, setting="set_limit"), "raise set_limit"),
    (dict(limit=9*GIB, used=2*GIB), "raise that limit"),
    (dict(unused=9*GIB), "expandable_segments:True"), (dict(wanted=2**60), "check the shapes"),
    (dict(used=44*GIB), "smaller batch"), (dict(), "reserve(22528)"), (dict(wanted=None, used=None), "reserve"),
])
def test_what_helps_follows_from_the_cause(told, helps):
    assert helps in " ".join(ways_out(replace(LACK, **told), scene_of(FULL), [FULL]))


def test_another_device_is_named_only_with_room():
    assert "GPU 1" in ways_out(LACK, scene_of(FULL, a_device(1)), [FULL])[0]
    assert "GPU 1" not in " ".join(ways_out(LACK, scene_of(FULL, a_device(1, total=16)), [FULL]))
    reserved = a_device(1, promises=(Promise(4200400, "app", 47*GIB, 47*GIB),))
    assert "GPU 1" not in " ".join(ways_out(LACK, scene_of(FULL, reserved), [FULL]))


def test_without_a_driver_the_reason_is_told():
    with SimulatedDriver([]):
        assert "Cannot read who used the GPU" in explain_out_of_memory(TORCH)
    with SimulatedDriver([SimulatedGpu()]) as driver:
        driver.fail("nvmlDeviceGetMemoryInfo", 999)
        driver.fail("nvmlDeviceGetMemoryInfo_v2", 999)
        assert "Cannot read who used the GPU" in explain_out_of_memory(TORCH)


def test_a_driver_that_hangs_does_not_keep_the_error():
    with SimulatedDriver([SimulatedGpu()]) as driver:
        driver.hang("nvmlDeviceGetCount_v2")
        began = time.monotonic()
        said = explain_out_of_memory(TORCH, ResourceManager(gpu_timeout=0.2))
        assert "did not respond" in said and time.monotonic() - began < 5
        driver.recover()


@pytest.mark.parametrize("text", [TORCH, "MemoryError", ACCELERATOR])
def test_a_manager_that_fails_costs_only_the_names(text):
    class Broken:
        def check_gpu_availability(self): raise RuntimeError("no")
    said = explain_out_of_memory(text, Broken())
    assert "Cannot read who used the memory: RuntimeError" in said


def test_ram_is_explained_as_ram():
    with load_scenario("shared"):
        said = explain_out_of_memory(MemoryError("Unable to allocate 1.00 TiB for an array with shape (1,)"))
        assert said.startswith("NumPy asked for 1024.0 GiB of RAM") and "than this machine has (128.0 GiB" in said
        assert "GPU" not in said


def test_the_environment_of_the_job_decides_which_gpu_it_is():
    with load_scenario("pair"):
        manager = ResourceManager()
        uuid = manager.check_gpu_availability().devices[1].device.uuid
        assert "GPU 1 (" in explain_out_of_memory(TORCH, manager, env={"CUDA_VISIBLE_DEVICES": uuid})
        assert "GPU 0 (" in explain_out_of_memory(TORCH, manager)


OWNERS = st.sampled_from(["app", "external", "unknown"])
DEVICES = st.builds(
    lambda n, sizes, unseen, estimated: a_device(
        n, *(a_process(4200100 + k, size, owner) for k, (size, owner) in enumerate(sizes)), unseen=unseen,
        estimated=estimated),
    st.integers(0, 3), st.lists(st.tuples(st.none() | st.floats(0, 60), OWNERS), max_size=5), st.floats(0, 60),
    st.booleans())
SIZES = st.none() | st.integers(0, 2**63 - 1) | st.integers(0, 60*GIB)


@settings(max_examples=300, deadline=None)
@given(st.builds(OutOfMemory, st.just("CUDA"), st.sampled_from(["gpu", "ram", None]), SIZES,
                 st.none() | st.integers(0, 9), SIZES, SIZES, SIZES, SIZES, st.none() | st.just("that")),
       st.lists(DEVICES, max_size=4, unique_by=lambda d: d.device.id),
       st.none() | st.lists(DEVICES, max_size=4, unique_by=lambda d: d.device.id),
       st.none() | st.integers(4200100, 4200104))
def test_anything_can_be_explained(found, devices, before, pid):
    scene = scene_of(*devices, before=before, pid=pid)
    said = explain_found(found, scene)
    assert said and "None" not in said
    if "Other processes use the rest" in said or "Other processes of this app" in said:
        there = find_devices(found, scene)[0].device
        assert pid is not None and (found.wanted or 0) <= there.capacity
        assert there.memory_free < (found.wanted or GIB) or found.free is not None
