"""What real machines said of themselves, beneath the library: used, reserved, free and total add up in every view

In bytes: used + reserved + free is the total, what the owners use is what is used, and what is neither used nor
reserved for a program is free. What a view shows in GiB with one digit adds up within the rounding of its figures.
"""
import json
import re

import pytest
from click.testing import CliRunner
from conftest import MIB

from cjm_fasthtml_resources.cli import main
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.resources import ResourceStatus
from cjm_fasthtml_resources.core.samples import take_sample
from cjm_fasthtml_resources.simulate import make_driver
from cjm_fasthtml_resources.simulated import scenarios
from cjm_fasthtml_resources.simulated.scenarios import find_scenario, state_names
from cjm_fasthtml_resources.ui.cards import overview, to_html

STATES = state_names()
ROUNDING = 0.0501   # GiB, of a figure that is shown with one digit
GIB = 2**30


def test_the_data_says_where_it_is_from():
    folder = scenarios.files("cjm_fasthtml_resources.simulated")/"states"
    notice = (folder/"README.md").read_text(encoding="utf-8")
    for words in ("influxdata/telegraf", "InfluxData Inc.", "utkuozdemir/nvidia_gpu_exporter", "Utku Özdemir",
                  "Permission is hereby granted"): assert words in notice
    assert len(STATES) == 25
    for name in STATES:
        state = find_scenario(name)
        assert any(words in state["source"] for words in (
            "influxdata/telegraf (MIT)", "utkuozdemir/nvidia_gpu_exporter (MIT)", "Read off a machine"))
        assert not any("username" in process for process in state["machine"]["processes"])
        assert all(process["pid"] > 4_200_000 for process in state["machine"]["processes"])   # none of this machine


def test_a_name_that_is_none_names_those_that_are():
    result = CliRunner().invoke(main, ["--simulate", "h200"])
    assert result.exit_code == 2 and "h200-mig-load" in result.output.replace("\n", "")


def overstated(name):
    "A state in which less is in use than its graphics processes add up to, as on desktops and under Windows"
    state = find_scenario(name)
    for gpu in state["gpus"]: gpu["memory_used_mb"] = gpu["memory_used_mb"]//2
    return state


CASES = {name: find_scenario(name) for name in STATES} | {
    f"{name}, overstated": overstated(name) for name in STATES if name.startswith(("rtx-2080", "rtx-4080", "windows"))}
windows = CASES["windows-load, overstated"]
for number, process in enumerate(windows["gpus"][0]["processes"]): process["memory_mb"] = 200 + number


@pytest.fixture(params=CASES, scope="module")
def case(request):
    "A state: its name, its scenario, a sample of it, and the driver that goes on running"
    scenario = CASES[request.param]
    with make_driver(scenario) as driver:
        manager = ResourceManager(track_self=False)
        sample = take_sample(manager)
        yield request.param, scenario, sample, driver


def every(conflict): return (*conflict.devices, *getattr(conflict, "other_instances", ()))


def machine_of(scenario):
    "Bytes: what the machine's GPUs have, have free, and use"
    gpus = scenario["gpus"]
    total = sum(g["memory_total_mb"] for g in gpus)
    used = sum(max(g["memory_used_mb"], sum(p.get("memory_mb") or 0 for p in g.get("processes", [])
                                            if p.get("kind", "compute") == "compute")) for g in gpus)
    reserved = sum(g.get("memory_reserved_mb", 0) for g in gpus)
    return total*MIB, (total - used - reserved)*MIB, used*MIB


def over_pools(devices, figure): return sum({d.device.pool: figure(d) for d in devices}.values())


def test_the_library(case):
    _, scenario, sample, _ = case
    devices = every(sample.gpu)
    assert devices
    for d in devices:
        device, shares = d.device, d.shares
        assert device.memory_used + (device.memory_reserved or 0) + device.memory_free == device.memory_total
        assert sum(shares.values()) - shares["promised"] == device.memory_used
        assert d.room + d.promised() == device.memory_free
        assert sum(p.memory_used or 0 for p in d.processes) <= device.memory_used
        assert d.status in (ResourceStatus.AVAILABLE, ResourceStatus.EXTERNAL_BUSY)
    total, free, used = machine_of(scenario)
    assert over_pools(devices, lambda d: d.device.memory_total) <= total
    assert over_pools(devices, lambda d: d.room) <= free + 8*MIB
    assert over_pools(devices, lambda d: d.device.memory_used) <= used + 64*MIB


def test_the_processes_are_those_of_the_machine(case):
    _, scenario, sample, _ = case
    for d in every(sample.gpu):
        gpu = scenario["gpus"][d.device.index if d.device.mig_parent is None else d.device.mig_parent]
        parts = [part for part in gpu.get("mig") or [gpu]
                 if d.device.mig_parent is None or part["gpu_instance"] == d.device.gpu_instance]
        there = {p["pid"]: p.get("memory_mb") for part in parts for p in part.get("processes", [])}
        assert {p.pid for p in d.processes} == set(there)
        for p in d.processes:   # no more than the machine said
            assert (p.memory_used is None) == (there[p.pid] is None)
            assert (p.memory_used or 0) <= (there[p.pid] or 0)*MIB


def test_what_is_cut_is_an_estimate(case):
    name, scenario, sample, _ = case
    (d, *_), notes = every(sample.gpu), " ".join(sample.gpu.notes)
    figures = sum(p.get("memory_mb") or 0 for p in scenario["gpus"][0].get("processes", []))
    assert ("add up to more than is in use" in notes) == (figures > scenario["gpus"][0]["memory_used_mb"])
    if "overstated" in name or name.startswith("windows"): assert d.estimated and sample.gpu.estimated
    elif not name.endswith("idle"): assert not d.estimated, name   # 20 to 60 MiB for contexts are nobody's figure


def test_a_big_outsider_is_never_overlooked(case):
    "Where a process uses 45 % of a device, that device is busy"
    _, _, sample, _ = case
    for d in every(sample.gpu):
        biggest = max((p.memory_used or 0 for p in d.processes), default=0)
        if biggest >= 0.45*d.device.memory_total: assert d.status is ResourceStatus.EXTERNAL_BUSY


def test_json(case, tmp_path):
    _, scenario, sample, _ = case
    found = shown_by_command(scenario, tmp_path, "--json")
    answer = json.loads(found)["gpu"]
    for d in (*answer["devices"], *answer.get("other_instances", ())):
        owners = sum(d[f"{owner}_memory"] for owner in ("app", "external", "unattributed", "ram"))
        assert owners == d["memory_used"]
        assert d["memory_used"] + (d["memory_reserved"] or 0) + d["memory_free"] == d["memory_total"]
        assert d["room"] + sum(p["unused"] for p in d["promises"]) == d["memory_free"]
        assert sum(p["memory_used"] or 0 for p in d["processes"]) <= d["memory_used"]
    assert len(answer["devices"]) + len(answer.get("other_instances", ())) == len(every(sample.gpu))


def shown_by_command(scenario, tmp_path, *options):
    path = tmp_path/"state.json"
    path.write_text(json.dumps(scenario))
    result = CliRunner(env=dict(COLUMNS="200")).invoke(main, ["--simulate", str(path), *options, "--top", "40"])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command(case, tmp_path):
    _, scenario, sample, _ = case
    printed = shown_by_command(scenario, tmp_path)
    rows = {place: (float(used), float(total)) for place, used, total in
            re.findall(r"^GPU (\S+) .*?([\d.]+) of +([\d.]+) GiB", printed, re.M)}
    devices = {str(d.device.id): d.device for d in every(sample.gpu)}
    assert rows == {place: (round(d.memory_used/GIB, 1), round(d.memory_total/GIB, 1)) for place, d in devices.items()}
    for place, size, unit in re.findall(r"^GPU (\S+) +\d+ .*?([\d.]+) (GiB|MiB) ", printed, re.M):
        assert float(size)/(1 if unit == "GiB" else 1024) <= devices[place].memory_used/GIB + ROUNDING
    assert ("estimate" in printed) == sample.gpu.estimated


def test_the_cards_of_the_page(case):
    _, _, sample, _ = case
    html = to_html(overview(sample))
    shown = re.findall(r'aria-label="memory of GPU (\S+), GiB" aria-valuemax=([\d.]+) '
                       r"aria-valuenow=([\d.]+)>.*?<div class=key>(.*?)</div>", html)
    devices = {str(d.device.id): d for d in every(sample.gpu)}
    assert {place for place, *_ in shown} == set(devices)
    for place, total, taken, key in shown:
        d, reserved = devices[place].device, (devices[place].device.memory_reserved or 0)/GIB
        free, of, kept = re.search(r"free ([\d.]+) of ([\d.]+) GiB(?: \(driver:\s([\d.]+)\))?", key).groups()
        assert abs(float(kept or 0) - reserved) <= ROUNDING
        assert of == total == f"{d.memory_total/GIB:.1f}" and taken == f"{d.memory_used/GIB:.1f}"
        assert abs(float(taken) + float(free) + reserved - float(total)) <= 3*ROUNDING
        owners = [float(size)/(1 if unit == "GiB" else 1024) for size, unit in
                  re.findall(r"(?<!free )\b([\d.]+) (GiB|MiB)", key.replace(f"of {of} GiB", ""))]
        assert abs(sum(owners) - float(taken)) <= (len(owners) + 1)*ROUNDING


def test_the_metrics(case):
    metrics = pytest.importorskip("cjm_fasthtml_resources.ui.metrics", reason="the extra prometheus is not installed")
    _, _, sample, _ = case
    found = {}
    for metric in metrics.device_metrics(every(sample.gpu)):
        for s in metric.samples:
            row = found.setdefault(s.labels["gpu"], {"held": {}})
            if "owner" in s.labels: row["held"][s.labels["owner"]] = s.value
            else: row[s.name.removeprefix("cjm_resources_gpu_")] = s.value
    assert len(found) == len(every(sample.gpu))
    for row in found.values():
        used, promised = row["memory_used_bytes"], row["held"].pop("promised")
        assert sum(row["held"].values()) == used
        assert used + row.get("memory_reserved_bytes", 0) + row["memory_room_bytes"] + promised == \
            row["memory_total_bytes"]
