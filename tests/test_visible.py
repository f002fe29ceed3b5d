"What CUDA_VISIBLE_DEVICES means, against what CUDA on a real card made of it"
import json
from pathlib import Path

import pytest

from cjm_fasthtml_resources.core.devices import visible_devices
from cjm_fasthtml_resources.core.nvml import GpuDevice

SEEN = json.loads(Path(__file__).with_name("cuda_visible.json").read_text(encoding="utf-8"))
CARD = GpuDevice(0, SEEN["uuid"].split()[0])


@pytest.mark.parametrize("case", SEEN["cases"], ids=lambda case: repr(case["value"]))
def test_as_many_devices_are_visible_as_cuda_shows(case):
    visible, complaint = visible_devices([CARD], case["value"])
    assert len(visible) == case["devices"]
    assert visible or complaint
