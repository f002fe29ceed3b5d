"What a notebook without a browser keeps of a panel, what a terminal shows of it, and that nothing of it is left over"
import gc
import importlib
import os
import subprocess
import sys

import pytest
from conftest import samplers, wait_until

from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor, share_monitor
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

pytest.importorskip("ipywidgets")

from cjm_fasthtml_resources.ui import seen  # noqa: E402
from cjm_fasthtml_resources.ui.panel import ResourcePanel, open_panels  # noqa: E402

SETUP = """import threading, time
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
from cjm_fasthtml_resources.ui.panel import ResourcePanel
gpus = [SimulatedGpu("NVIDIA L4", temperature=40)]
SimulatedDriver(gpus).start()
manager = ResourceManager(track_self=False)"""
SHOW = "ResourcePanel(manager, interval=0.2)"
WARM = "gpus[0].temperature = 77\ntime.sleep(1)"
TELL = "print([t.name for t in threading.enumerate()].count('resource-monitor'))"


@pytest.fixture
def manager():
    with SimulatedDriver([SimulatedGpu("NVIDIA L4")]): yield ResourceManager(track_self=False)
    for _, _, panel in list(open_panels): panel.close()
    wait_until(lambda: samplers() == 0)


@pytest.mark.parametrize("module, kind", [("panel", "ResourcePanel"), ("live_view", "LiveView")])
def test_a_widget_that_refuses_its_arguments_ends_without_a_word(manager, monkeypatch, module, kind):
    if module == "live_view": pytest.importorskip("anywidget", reason="the extra marimo is not installed")
    make, said = getattr(importlib.import_module(f"cjm_fasthtml_resources.ui.{module}"), kind), []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(ValueError, match="rows"): make(manager, rows=0)
    gc.collect()
    assert said == []


def test_a_notebook_that_is_run_without_cell_ids_keeps_the_last_sample_of_each_panel(tmp_path):
    "As papermill, nbconvert and `jupyter execute` do it"
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    v4 = nbformat.v4
    nb = v4.new_notebook(cells=[v4.new_code_cell(source) for source in (SETUP, SHOW, SHOW, WARM, TELL)])
    nbclient.NotebookClient(nb, timeout=120, resources=dict(metadata=dict(path=tmp_path))).execute()
    for cell in nb.cells[1:3]:                                        # two cells with one source are two panels
        kept = [output.data["text/html"] for output in cell.outputs if output.data.get("text/html")]
        assert len(kept) == 1 and "77 °C" in kept[0] and "40 °C" not in kept[0]
        assert "A static picture. Data from <time" in kept[0] and "<script" not in kept[0] and "http" not in kept[0]
        assert [output.data for output in cell.outputs if "application/vnd.jupyter.widget-view+json" in output.data]
    assert nb.cells[-1].outputs[0].text == "1\n"                      # and they share their sampler


def test_panels_of_one_manager_share_a_sampler_and_those_of_others_do_not(manager):
    panels = [ResourcePanel(manager, interval=interval) for interval in (5, 0.5, None)]
    assert len({id(panel.monitor) for panel in panels}) == 1 and samplers() == 1
    wait_until(lambda: {panel._every.value for panel in panels} == {0.5})     # each shows what holds
    panels[0]._every.value = 0.2
    wait_until(lambda: {panel._every.value for panel in panels} == {0.2})
    other, own = ResourcePanel(ResourceManager(track_self=False)), ResourceMonitor(manager)
    assert other.monitor is not panels[0].monitor and ResourcePanel(manager, monitor=own).monitor is own
    for panel in panels[1:]: panel.close()
    wait_until(lambda: not panels[0]._sample.stale and samplers() == 3)


def test_a_monitor_that_was_shared_goes_with_the_last_panel(manager):
    panel = ResourcePanel(manager, interval=7)
    panel.close()
    del panel
    wait_until(lambda: gc.collect() >= 0 and share_monitor(manager).interval == 1.0)   # once its thread has ended, too


def test_a_panel_without_a_view_ends_its_sampler_and_begins_again_with_one(manager):
    panel = ResourcePanel(manager, interval=0.1)
    for _ in range(3):
        panel.set_state(dict(_view_count=1))                          # as a front end does
        wait_until(lambda: samplers() == 1)
        panel.set_state(dict(_view_count=0))
        wait_until(lambda: samplers() == 0)
    number = panel._sample.number
    panel.set_state(dict(_view_count=1))
    wait_until(lambda: panel._sample.number > number + 1 and not panel._sample.stale)


def test_a_page_that_is_loaded_again_counts_its_views_from_nothing(manager):
    panel = ResourcePanel(manager, interval=0.1)
    panel.set_state(dict(_view_count=1))
    assert panel.get_state()["_view_count"] == 0                      # what the new page is told
    assert samplers() == 1                                            # it will show it
    panel.set_state(dict(_view_count=1))
    panel.set_state(dict(_view_count=0))                              # its cell is deleted
    wait_until(lambda: samplers() == 0)
    assert panel.get_state(drop_defaults=True) and samplers() == 0    # what is embedded in a page is no front end


def test_a_panel_that_is_made_and_never_shown_ends_its_sampler(manager, monkeypatch):
    "As one in a module that is loaded again"
    monkeypatch.setattr(seen, "_EXPECT", 0.5)
    panel = ResourcePanel(manager, interval=0.1)
    assert samplers() == 1
    wait_until(lambda: samplers() == 0)
    assert panel._sample.number > 1 and not panel._closed


HOLDER = """
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.ui.panel import ResourcePanel
from held_manager import manager
panel = ResourcePanel(manager, interval=0.1)
"""
OWN = HOLDER.replace("from held_manager import manager", "manager = ResourceManager(track_self=False)")


def load_again(module):
    importlib.reload(module)


def import_anew(module):
    del sys.modules[module.__name__]
    importlib.import_module(module.__name__)


@pytest.mark.parametrize("again", [load_again, import_anew])
@pytest.mark.parametrize("text", [OWN, HOLDER], ids=["its own manager", "another module's manager"])
def test_a_panel_of_a_module_that_is_loaded_again_ends_its_sampler(text, again, manager, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "held_manager", type(sys)("held_manager"))
    sys.modules["held_manager"].manager = manager
    (tmp_path/"holds_a_panel.py").write_text(text)
    module = importlib.import_module("holds_a_panel")
    module.panel.set_state(dict(_view_count=1))                       # as a front end does
    old, thread = module.panel, module.panel.monitor._thread
    again(module)
    new = sys.modules.pop("holds_a_panel").panel
    assert new is not old and samplers() == (1 if text is HOLDER else 2)
    assert (new.monitor is old.monitor) == (text is HOLDER)
    new.set_state(dict(_view_count=1))                                # its cell is run again,
    old.set_state(dict(_view_count=0))                                # and shows the new one
    del old, module
    gc.collect()
    wait_until(lambda: samplers() == 1)
    assert thread.is_alive() == (text is HOLDER)
    number = new._sample.number
    wait_until(lambda: new._sample.number > number + 2 and not new._sample.stale)
    new.set_state(dict(_view_count=0))
    wait_until(lambda: samplers() == 0 and not thread.is_alive())


EDITED = """
%load_ext autoreload
%autoreload 2
import os, pathlib, threading, time
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
driver = SimulatedDriver([SimulatedGpu()]).start()
import holds_a_panel
old = holds_a_panel.panel
_ = old.set_state(dict(_view_count=1))
file, later = pathlib.Path(holds_a_panel.__file__), time.time() + 10
_ = file.write_text(file.read_text().replace("interval=0.1", "interval=0.2"))
os.utime(file, (later, later))
print("loaded again:", holds_a_panel.panel is not old, holds_a_panel.panel.monitor.interval)
_ = holds_a_panel.panel.set_state(dict(_view_count=1)), old.set_state(dict(_view_count=0))
thread = old.monitor._thread
if thread: thread.join(10)
print("ended:", old.monitor.running, "goes on:", holds_a_panel.panel.monitor.running)
"""


def test_a_panel_of_a_module_that_ipython_loads_again_after_an_edit_ends_its_sampler(tmp_path):
    pytest.importorskip("IPython")
    (tmp_path/"holds_a_panel.py").write_text(OWN)
    environment = {**os.environ, "HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path/"ipython")}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"   # of the same second and size, a cache would hide the edit
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", os.getcwd())])
    command = [sys.executable, "-m", "IPython", "--simple-prompt", "--no-banner"]
    out = subprocess.run(command, input=EDITED, capture_output=True, text=True, timeout=120, env=environment)
    said = out.stdout + out.stderr
    assert "loaded again: True 0.2" in said and "ended: False goes on: True" in said and "Traceback" not in said, said


RELOADED = """
import atexit, importlib, threading, time
atexit.register(lambda: print("left at the end:", settle(0)))   # runs last
def samplers(): return [t for t in threading.enumerate() if t.name == "resource-monitor"]
def settle(count):
    end = time.monotonic() + 10
    while len(samplers()) != count and time.monotonic() < end: time.sleep(0.01)
    return len(samplers())
import cjm_fasthtml_resources.ui.panel as panels, cjm_fasthtml_resources.core.monitor as monitors
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
SimulatedDriver([SimulatedGpu()]).start()
manager = ResourceManager(track_self=False)
old = panels.ResourcePanel(manager, interval=0.1)
old.set_state(dict(_view_count=1))
for modules in ORDER: importlib.reload(modules)
new = panels.ResourcePanel(manager, interval=0.1)
new.set_state(dict(_view_count=1))
print("one for both:", settle(1), len(panels.open_panels))
old.set_state(dict(_view_count=0))
number = new._sample.number
while new._sample.number < number + 3: time.sleep(0.01)
print("one is shown:", settle(1))
new.set_state(dict(_view_count=0))
print("none is:", settle(0))
old.set_state(dict(_view_count=1))
new.set_state(dict(_view_count=1))
print("both again:", settle(1))
"""


@pytest.mark.parametrize("order", ["(monitors, panels)", "(panels, monitors)", "(panels,)", "(monitors,)"])
def test_the_library_itself_loaded_again_keeps_one_sampler_for_a_manager(order):
    command = [sys.executable, "-c", RELOADED.replace("ORDER", order)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = "one for both: 1 2", "one is shown: 1", "none is: 0", "both again: 1", "left at the end: 0"
    assert (out.stdout.splitlines(), out.stderr) == (list(said), "")


SHELL = """
from cjm_fasthtml_resources.simulate import load_scenario
from cjm_fasthtml_resources import ResourceManager, ResourcePanel
driver = load_scenario("pair").start()
manager = ResourceManager(track_self=False)
manager.check_gpu_availability()
panel = ResourcePanel(manager); panel
"""


SHELLS = {"python": ["-i", "-q"], "ipython": ["-m", "IPython", "--simple-prompt", "--no-banner"]}


@pytest.mark.parametrize("options", SHELLS.values(), ids=SHELLS)
def test_in_a_terminal_a_check_and_a_panel_are_texts(options, tmp_path):
    if "IPython" in options: pytest.importorskip("IPython")
    environment = {**os.environ, "HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path)}
    out = subprocess.run([sys.executable, *options], input=SHELL, capture_output=True, text=True, timeout=120,
                         env=environment)
    assert "gpu_memory: available. A GPU job can start now: " in out.stdout, out.stdout + out.stderr
    assert "GPU 1  NVIDIA RTX 6000" in out.stdout and "train.py" in out.stdout and "Data from 2" in out.stdout
    assert "<div" not in out.stdout and "DeviceStatus(" not in out.stdout and "Traceback" not in out.stdout + out.stderr
