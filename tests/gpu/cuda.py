"""Hold GPU memory by the CUDA driver's own library, without PyTorch: cuda.py MIB [DEPTH] [SECONDS] [managed]

Prints "ready PID" when it has it, "out of memory" or "not supported", and holds it until its standard input ends. With
DEPTH a descendant so many generations down is the one that has it. Managed memory is written, so that it is on the GPU.
Needs libcuda.so.1, which comes with the driver.
"""
import ctypes
import os
import subprocess
import sys
import time


def check(code: int) -> None:
    if code == 2: raise MemoryError  # CUDA_ERROR_OUT_OF_MEMORY
    if code == 801: raise NotImplementedError  # CUDA_ERROR_NOT_SUPPORTED
    if code: raise OSError(f"CUDA error {code}")


def allocate(mib: int, managed: bool = False) -> int:
    "Take memory of the first device; its address"
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context, address = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    check(cuda.cuInit(0))
    check(cuda.cuDeviceGet(ctypes.byref(device), 0))
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    check(cuda.cuCtxSetCurrent(context))
    size = ctypes.c_size_t(mib*2**20)
    if not managed:
        check(cuda.cuMemAlloc_v2(ctypes.byref(address), size))
        return address.value or 0
    check(cuda.cuMemAllocManaged(ctypes.byref(address), size, 1))   # CU_MEM_ATTACH_GLOBAL
    check(cuda.cuMemsetD8_v2(address, 1, size))
    check(cuda.cuCtxSynchronize())
    return address.value or 0


def free(address: int) -> None:
    "Give memory back; the process keeps its context"
    check(ctypes.CDLL("libcuda.so.1").cuMemFree_v2(ctypes.c_uint64(address)))


def main(mib: int, depth: int = 0, seconds: float = 0, managed: bool = False) -> None:
    if depth:
        sys.exit(subprocess.call([sys.executable, __file__, str(mib), str(depth - 1), str(seconds)]))
    try: allocate(mib, managed)
    except (MemoryError, NotImplementedError) as error:
        print("out of memory" if isinstance(error, MemoryError) else "not supported", flush=True)
        sys.exit(2)
    print("ready", os.getpid(), flush=True)
    if seconds: time.sleep(seconds)
    else: sys.stdin.read()


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(int, sys.argv[2:3]), *map(float, sys.argv[3:4]), managed="managed" in sys.argv[4:])
