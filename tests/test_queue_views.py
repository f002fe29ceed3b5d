"""What a reservation and a waiting request say of themselves on the page, in the panel, in JSON and in the command"""
import json
import os

import pytest
from click.testing import CliRunner

from cjm_fasthtml_resources.cli import main
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.process import read_process
from cjm_fasthtml_resources.core.samples import take_sample
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, SimulatedProcess
from cjm_fasthtml_resources.ui.export import to_json
from cjm_fasthtml_resources.ui.view import View, render_reservations


@pytest.fixture
def queue(tmp_path, monkeypatch, spawn):
    "An app whose worker uses 11,000 of 16,000 MiB that it reserved, and two requests behind it; with its PID"
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24_000)]) as driver:
        worker = spawn("input()").pid
        chat = ResourceManager(app="chat", track_self=False)
        chat.register_worker(worker, "llm", "job-1", plugin_name="vllm")
        with chat.reserve(16_000, timeout=0, pid=worker) as held:
            driver.gpus[0].processes.append(SimulatedProcess(worker, 11_000))
            assert held.receipt.most_used
            requests = [chat.request(mb, pid=worker) for mb in (20_000, 2_000)]
            assert [request.poll() for request in requests] == [None, None]
            yield chat, worker
            for request in requests: request.withdraw()


def test_the_page_says_why_behind_whom_and_what_was_never_used(queue):
    chat, worker = queue
    page = render_reservations(take_sample(chat), View())
    assert page.count("<td class=who>vllm llm worker, job-1") == 3           # the reservation, and both requests
    for words in ("Reservation 1: At most 10.8 GiB of 15.6 GiB were used so far.",
                  "The holder can release 4.9 GiB with shrink().",
                  "Request 2: The job needs 19.5 GiB.", "kept for request 2, which is ahead in the queue"):
        assert words in page, page


def test_json_says_the_same_with_figures(queue):
    found = json.loads(json.dumps(to_json(take_sample(queue[0]))))["gpu"]
    [held] = found["devices"][0]["promises"]
    assert held["most_used"] >= 11_000*2**20 and held["hint"].startswith("At most 10.8 GiB of 15.6 GiB")
    assert [(r["id"], r["behind"], r["is_capped"]) for r in found["waiting"]] == [(2, None, False), (3, 2, False)]
    assert all(r["why"] for r in found["waiting"])


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_command_says_the_same_in_every_width(queue, width):
    out = CliRunner().invoke(main, ["--app", "chat"], env={"COLUMNS": str(width)}, prog_name="cjm-resources").output
    told = " ".join(out.split())
    assert "Reservation 1: At most 10.8 GiB of 15.6 GiB were used so far" in told, out
    assert "Request 2: The job needs 19.5 GiB." in told and max(map(len, out.splitlines())) <= width, out
    if width == 120: assert "vllm llm worker, job-1" in out


def test_a_holder_without_memory_is_named_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path))
    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager(app="chat", track_self=False)
        with manager.reserve(1_000, timeout=0):
            [promise] = manager.check_gpu_availability().devices[0].promises
    assert promise.name == read_process(os.getpid()).name and not promise.most_used
