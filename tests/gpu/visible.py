"""The devices that CUDA's own library shows a process: visible.py, with CUDA_VISIBLE_DEVICES set as it likes

Prints one JSON object: what cuInit answered, and the digits of each device's UUID, in CUDA's order. Needs libcuda.so.1,
which comes with the driver.
"""
import ctypes
import json


def digits_of(cuda, index: int) -> str:
    device, digits = ctypes.c_int(), (ctypes.c_ubyte*16)()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    try: read = cuda.cuDeviceGetUuid_v2   # of a MIG instance, if it is one
    except AttributeError: read = cuda.cuDeviceGetUuid
    read(ctypes.byref(digits), device)
    return bytes(digits).hex()


def enumerate_cuda() -> dict:
    try: cuda = ctypes.CDLL("libcuda.so.1")
    except OSError: return dict(reason="libcuda.so.1 cannot be loaded")
    error, count = cuda.cuInit(0), ctypes.c_int()
    if not error: cuda.cuDeviceGetCount(ctypes.byref(count))
    return dict(cuInit=error, devices=[digits_of(cuda, index) for index in range(count.value)])


if __name__ == "__main__": print(json.dumps(enumerate_cuda()))
