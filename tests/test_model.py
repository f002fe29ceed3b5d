"The models of the promises and of the queue, looked through by spin"
import os
import shutil

import pytest
from model.check import ALL, BROKEN, BROKEN_GROUPS, BROKEN_QUEUE, PART, check, check_queue, find_broken

pytestmark = pytest.mark.skipif(
    not os.environ.get("CI") and not (shutil.which("spin") and shutil.which("cc")),
    reason="needs spin and a C compiler (Debian's packages spin and gcc)")


def test_two_processes_are_never_promised_more_than_a_device_has(tmp_path):
    found = check(tmp_path, 2, 1, ALL, None, "-m3000000")
    assert found.violated is None and found.complete and found.states > 100_000


def test_nor_are_three_on_two_devices_as_far_as_a_short_look_goes(tmp_path):
    found = check(tmp_path, 3, 2, PART, None, "-w23", "-m20000")
    assert found.violated is None and found.states > 1_000_000


def test_in_the_queue_nobody_waits_for_ever_and_neither_gpu_memory_nor_ram_is_promised_twice(tmp_path):
    "Priorities age: a request is passed by fewer that asked later, and take some of the same, than a step has places"
    found = check_queue(tmp_path, 3)
    assert found.violated is None and found.complete and found.states > 10_000


@pytest.mark.parametrize("broken", [*BROKEN, *BROKEN_GROUPS, *BROKEN_QUEUE])
def test_a_model_that_is_broken_is_found_wrong(tmp_path, broken):
    assert find_broken(tmp_path, broken).violated
