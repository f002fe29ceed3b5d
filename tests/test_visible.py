"""What CUDA_VISIBLE_DEVICES means: against what CUDA on a real card made of it, and on machines with several devices
against a second reading, which knows the meaning of each single entry and the rules that join them
"""
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest

from cjm_fasthtml_resources.core.devices import see_devices, visible_devices
from cjm_fasthtml_resources.core.nvml import GpuDevice

SEEN = json.loads(Path(__file__).with_name("cuda_visible.json").read_text(encoding="utf-8"))
CARD = GpuDevice(0, SEEN["uuid"].split()[0])


@pytest.mark.parametrize("case", SEEN["cases"], ids=lambda case: repr(case["value"]))
def test_as_many_devices_are_visible_as_cuda_shows(case):
    visible, complaint = visible_devices([CARD], case["value"])
    assert len(visible) == case["devices"]
    assert visible or complaint


A, B = "GPU-a1111111-1111-1111-1111-111111111111", "GPU-b2222222-2222-2222-2222-222222222222"
M, N = "MIG-c3333333-3333-3333-3333-333333333333", "MIG-d4444444-4444-4444-4444-444444444444"
LEGACY = f"MIG-{A}/2/0"


@dataclass
class Machine:
    "Devices, and what CUDA finds under each entry of the alphabet: read as a number, and read as a UUID"
    devices: list[GpuDevice]
    as_number: dict[str, tuple]
    as_uuid: dict[str, tuple]
    alphabet: list[str]
    environ: dict[str, str] = field(default_factory=dict)
    unset: tuple = ()          # what is visible without the variable
    fullest: int | None = None   # the GPU that one number means where the order is not known


WHOLE = ["0", " +1x", "7", A, "GPU-a1", B, M, LEGACY, "x", ""]
BY_UUID = {A: (0,), "GPU-a1": (0,), B: (1,)}
EQUAL = [GpuDevice(0, A, "NVIDIA L4"), GpuDevice(1, B, "NVIDIA L4")]
KNOWN = [GpuDevice(0, A, "NVIDIA GeForce GTX 1660 SUPER", cuda_cores=1408, max_clock=2145),
         GpuDevice(1, B, "NVIDIA GeForce RTX 3090", cuda_cores=10496, max_clock=2100)]
UNKNOWN = [GpuDevice(0, A, "One", memory_free=5), GpuDevice(1, B, "Other", memory_free=9)]
DIVIDED = [GpuDevice(0, A, "NVIDIA A100", mig_mode=True),
           GpuDevice(0, M, "1g", mig_parent=0, gpu_instance=1, compute_instance=0),
           GpuDevice(1, N, "2g", mig_parent=0, gpu_instance=2, compute_instance=0),
           GpuDevice(1, B, "NVIDIA A100")]
PARTS = ("0:0", "0:1")
MACHINES = {
    "equal": Machine(EQUAL, {"0": (0,), " +1x": (1,)}, BY_UUID, WHOLE, unset=(0, 1)),
    "different": Machine(KNOWN, {"0": (1,), " +1x": (0,)}, BY_UUID, WHOLE, unset=(1, 0)),
    "different, by address": Machine(KNOWN, {"0": (0,), " +1x": (1,)}, BY_UUID, WHOLE,
                                     {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, unset=(0, 1)),
    "unknown": Machine(UNKNOWN, {"0": (0,), " +1x": (1,)}, BY_UUID, WHOLE, unset=(0, 1), fullest=0),
    "divided": Machine(DIVIDED, {"0": PARTS, "1": (1,)},
                       {A: PARTS, B: (1,), M: PARTS[:1], "MIG-d": PARTS[1:], LEGACY: PARTS[1:]},
                       ["0", "1", "7", A, B, M, "MIG-d", LEGACY, "x", ""], unset=PARTS[:1]),
}


def entries(machine: Machine, value: str) -> Iterator[tuple]:
    "What each entry means, up to the first that means nothing: the first one decides what all of them are"
    meaning = machine.as_uuid if value[:4] in ("GPU-", "MIG-") else machine.as_number
    for entry in value.split(","):
        if entry not in meaning: return
        yield meaning[entry]


def second_reading(machine: Machine, value: str) -> list:
    named = [device for found in entries(machine, value) for device in found]
    if len(set(named)) < len(named): return []                    # named twice: none is visible
    is_number = value[:4] not in ("GPU-", "MIG-")
    if machine.fullest is not None and is_number and len(named) == 1: return [machine.fullest]
    instances = [device for device in named if isinstance(device, str)]
    return instances[:1] or named                                 # one instance, and no whole GPU beside it


def values(alphabet: list[str]) -> Iterator[str]:
    for length in range(1, 5): yield from (",".join(entries) for entries in product(alphabet, repeat=length))


@pytest.mark.parametrize("name", MACHINES)
def test_every_short_value_means_what_a_second_reading_makes_of_it(name):
    machine = MACHINES[name]
    assert [d.id for d in see_devices(machine.devices, machine.environ).visible] == list(machine.unset)
    read = 0
    for value in values(machine.alphabet):
        seen = see_devices(machine.devices, {**machine.environ, "CUDA_VISIBLE_DEVICES": value})
        found = [d.id for d in seen.visible]
        assert found == second_reading(machine, value), value
        assert found or seen.complaint, value
        named = {device for meant in entries(machine, value) for device in meant}
        allowed = {d.id for d in (*seen.visible, *seen.others)}
        assert allowed == (named if found else set()) or machine.fullest is not None, value
        read += 1
    assert read == 11_110


@pytest.mark.parametrize("value, doubted", [("0", True), ("1", True), ("0,1", False), ("1,0", False), (A, False),
                                            ("0,7,1", True), ("7", False), ("0,0", False)])
def test_a_number_that_can_mean_another_gpu_is_said_to(value, doubted):
    seen = see_devices(UNKNOWN, {"CUDA_VISIBLE_DEVICES": value})
    assert ("can mean GPU 0 (One) or GPU 1 (Other)" in (seen.complaint or "")) == doubted
    for order in ("PCI_BUS_ID", "FASTEST_FIRST", "", "pci_bus_id"):
        seen = see_devices(KNOWN, {"CUDA_VISIBLE_DEVICES": value, "CUDA_DEVICE_ORDER": order})
        assert ("can mean" in (seen.complaint or "")) == (doubted and order == "pci_bus_id")
