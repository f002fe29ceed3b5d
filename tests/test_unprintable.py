"""No control character from outside reaches a terminal, a message, a page or a metrics label

Each name that another program, user, driver or host chooses is hostile; every output is searched.
"""
import logging
import re

import pytest

import cjm_fasthtml_resources as library
from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
from cjm_fasthtml_resources.core.copies import text_of
from cjm_fasthtml_resources.core.freeing import RoomMade
from cjm_fasthtml_resources.core.gpu import read_gpus
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.memory import read_memory
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.core.nvml import GpuDevice
from cjm_fasthtml_resources.core.out_of_memory import explain_out_of_memory
from cjm_fasthtml_resources.core.process import ProcessInfo
from cjm_fasthtml_resources.core.store import StoreError
from cjm_fasthtml_resources.simulate import (
    SimulatedDriver,
    SimulatedGpu,
    SimulatedHostProcess,
    SimulatedMachine,
    SimulatedProcess,
)

ODD = "\x1b[2J\r\n\x07\x9b\N{RIGHT-TO-LEFT OVERRIDE}\N{LEFT-TO-RIGHT ISOLATE}\x7f"
OUTSIDE, WORKER, GONE = 4_200_301, 4_200_101, 4_200_102
ERROR = f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity {ODD}"


def name(text: str) -> str: return f"{text}{ODD}x"


def raw(text: str) -> set[str]:
    "The control characters of a text, except ends of lines and the terminal's own colours"
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    return {c for c in plain if not c.isprintable() and c != "\n"}


@pytest.fixture
def machine():
    "A machine on which every name is hostile"
    gpus = [SimulatedGpu(name=name("L4"), memory_total_mb=24576,
                         processes=[SimulatedProcess(OUTSIDE, 9000), SimulatedProcess(WORKER, 4000),
                                    SimulatedProcess(GONE, 3000)]),
            SimulatedGpu(name=name("A2"), memory_total_mb=16384, processes=[SimulatedProcess(OUTSIDE, 14000)])]
    people = [SimulatedHostProcess(OUTSIDE, name("train.py"), username=name("bob"), memory_mb=9000,
                                   container=name("web"), command=f"python {name('train.py')}"),
              SimulatedHostProcess(WORKER, name("serve"), username=name("ada"), memory_mb=5000),
              SimulatedHostProcess(GONE, name("idle"), username=name("ada"), memory_mb=5000)]
    host = SimulatedMachine(memory_total_mb=32768, memory_used_mb=30000, processes=people)
    with SimulatedDriver(gpus, host) as driver: yield driver


@pytest.fixture
def manager(machine, folder):
    manager = ResourceManager(track_self=False)
    texts = dict(plugin_id=name("id"), plugin_name=name("llama"), loaded_plugin_resource=name("7B"))
    manager.register_worker(WORKER, name("llm"), name("job"), config={"model": name("m"), name("key"): 1}, **texts)
    manager.register_worker(GONE, name("asr"), **texts)
    return manager


class Registry:
    def get_plugin(self, plugin_id): return {"name": name("llama")}
    def load_plugin_config(self, plugin_id): return {"model": name("m"), "device": "cuda"}


def messages(manager) -> dict[str, str]:
    "What the library says about a machine, by the call"
    gpus, memory = manager.check_gpu_availability(), manager.check_memory_availability(10)
    result = library.validate_resources_for_job(manager, Registry(), name("p"), gpu_memory_mb=11000)
    found = dict(gpus=repr(gpus), memory=repr(memory), validation=result.message,
                 options=" ".join(map(str, result.options)), workers=" ".join(map(repr, manager.get_all_workers())),
                 explained=explain_out_of_memory(ERROR, manager, pid=WORKER) or "", snapshot=repr(read_gpus()),
                 ram=repr(read_memory()))
    for call, given in (("reserve", (23_000,)), ("pick_gpus", (2, 23_000)), ("wait_for_gpu", (23_000,)),
                        ("free_gpu", (23_500,)), ("make_room", (23_500,))):
        timeout = {} if call in ("pick_gpus", "free_gpu", "make_room") else dict(timeout=0)
        try: getattr(manager, call)(*given, **timeout)
        except (ResourceBusy, ResourceUnavailable, ValueError, OSError) as error:
            found[call] = f"{error} {getattr(error, 'suggested_action', '')}"
    return found


def test_messages(manager):
    said = messages(manager)
    assert "L4" in said["gpus"] and "train.py" in said["memory"] and "asr" in said["options"]
    assert "L4" in said["explained"] and len(said) >= 12
    assert {call: raw(text) for call, text in said.items()} == dict.fromkeys(said, set())


def test_pages_panels_and_metrics(manager):
    pytest.importorskip("fasthtml", reason="the extra web is not installed")
    pytest.importorskip("prometheus_client", reason="the extra prometheus is not installed")
    from cjm_fasthtml_resources.ui.metrics import ResourceCollector, exposition
    from cjm_fasthtml_resources.ui.panel import ResourcePanel
    from cjm_fasthtml_resources.ui.view import View, render, render_tables
    from cjm_fasthtml_resources.ui.web import ResourceCard, to_html
    monitor = ResourceMonitor(manager)
    sample = monitor.take()
    view = View(totals=True, details=True)
    shown = dict(render(sample, view=view) | render_tables(sample, view)) | {
        "card": to_html(ResourceCard(manager)), "metrics": exposition(ResourceCollector(monitor, True))[0].decode(),
        "gpus": sample.gpu._repr_html_(), "memory": sample.memory._repr_html_(),
        "validation": library.validate_resources_for_job(manager, Registry(), "p", gpu_memory_mb=23000)._repr_html_(),
        "workers": "".join(worker._repr_html_() for worker in manager.get_all_workers())}
    panel = ResourcePanel(manager)
    shown["panel"] = repr(panel)
    panel.close()
    assert "L4" in shown["card"] and "L4" in shown["metrics"]
    assert {part: raw(str(text)) for part, text in shown.items()} == dict.fromkeys(shown, set())


@pytest.mark.parametrize("args", [[], ["--by", "user"], ["--json"], ["queue"], ["history"], ["needs"],
                                  ["needs", "--forget", name("llama")], ["history", "--file", name("a")],
                                  ["report", "--file", name("a")], ["share", name("/a"), "--group", name("g")],
                                  ["wait", "--gpu-memory", "24000MiB", "--timeout", "0"],
                                  ["run", "--gpu-memory", "24GiB", "--timeout", "0", "--name", name("a"), name("b")]])
def test_the_command(machine, folder, args, capsys, monkeypatch):
    from cjm_fasthtml_resources import cli
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(SystemExit): cli.main(args, color=True)
    said = capsys.readouterr()
    assert said.out + said.err and not raw(said.out + said.err), ascii(said)


def test_log_lines(caplog):
    from cjm_fasthtml_resources.core.logs import Log
    with caplog.at_level(logging.DEBUG):
        Log("x").warning("%s failed: %s %d", name("a"), OSError(name("b")), 5)
        Log("x").warning(name("c"))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and lines[0].endswith("5") and not raw("".join(lines))


def test_loggers_are_of_the_kind_that_writes_no_control_character():
    from pathlib import Path
    found = [path.name for path in Path(library.__file__).parent.rglob("*.py")
             if "_log = logging.getLogger" in path.read_text(encoding="utf-8")]
    assert not found


def test_objects_of_names_from_outside():
    device = GpuDevice(0, name("GPU-"), name("L4"), reason=name("lost"), notes=(name("odd"),), host=name("host"))
    texts = [device.uuid, device.name, device.reason, *device.notes, device.host,
             *vars(ProcessInfo(5, 1.0, name("a"), name("bob"), container=name("web"))).values(),
             RoomMade((name("Stopped"),)).steps[0], *map(str, (ResourceBusy(name("a")), ResourceUnavailable(name("a")),
                                                               StoreError(name("/a"))))]
    assert not raw("".join(text_of(text) for text in texts))
