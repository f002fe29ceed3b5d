"""What parses, with anything that could stand there: a few hundred examples here

10,000 each with HYPOTHESIS_PROFILE=long.
"""
import contextlib
import json
import os
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cjm_fasthtml_resources.cli import parse_duration, parse_size
from cjm_fasthtml_resources.core import host
from cjm_fasthtml_resources.core import process as proc
from cjm_fasthtml_resources.core.devices import visible_devices
from cjm_fasthtml_resources.core.gpu import GpuDevice
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.resources import OwnedProcess, ResourceStatus, WorkerState
from cjm_fasthtml_resources.core.roster import WorkerRow
from cjm_fasthtml_resources.core.roster import to_row as to_stored_row
from cjm_fasthtml_resources.core.secrets import redact
from cjm_fasthtml_resources.simulate import ScenarioError, make_driver
from cjm_fasthtml_resources.ui.cards import process_table, to_html, to_row, worker_table

settings.register_profile("long", max_examples=10_000, deadline=None)
settings.register_profile("short", max_examples=300, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

texts = st.text(max_size=60)

gpus = [
    GpuDevice(0, "GPU-aa11"),
    GpuDevice(1, "GPU-aa22"),
    GpuDevice(2, "GPU-bb33", mig_mode=True),
    GpuDevice(0, "MIG-cc44", mig_parent=2),
]
devices = st.lists(st.sampled_from(gpus), unique=True, max_size=4)
names = st.sampled_from(["0", "1", "2", "-1", "GPU-aa", "GPU-aa11", "MIG-cc44", "2:0", "", " ", "0x1", "１"])
names_of_devices = texts | st.lists(names, max_size=5).map(",".join)

plain_values = st.none() | st.booleans() | st.integers() | st.floats() | texts
json_values = st.recursive(
    plain_values, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12)

limits = st.integers(-5, 5).map(str) | st.integers(0, 2**70).map(str) | texts
usages = st.integers(-5, 2**70).map(str) | texts
stats = st.sampled_from(["", "inactive_file 7\n", "x"]) | texts
groups = st.sampled_from(["0::/a/b\n", "5:memory:/a/b\n", "garbage"])

sections = st.sampled_from(["gpus", "machine", "workers", "faults", "description", "gpu"])
fields = st.sampled_from(["name", "memory_total_mb", "processes", "mig", "pid", "call", "error", "worker_type"])
entries = st.lists(st.dictionaries(fields, json_values, max_size=4), max_size=3)

secret_names = st.sampled_from(["api_key", "Token", "clientSecret", "db_password", "PASSWD", "hf_token"])
secrets = st.dictionaries(secret_names, st.text("abcdefghijk0123456789", min_size=12), max_size=5)


@given(devices, names_of_devices)
def test_cuda_visible_devices(found, value):
    visible, complaint = visible_devices(found, value)
    assert all(d in found and not d.mig_mode for d in visible) and len({id(d) for d in visible}) == len(visible)
    if not visible and any(not d.mig_mode for d in found): assert complaint


@given(st.one_of(texts, st.from_regex(r"\s*\d{1,6}(\.\d{0,3})?\s*[A-Za-z]{0,4}\s*", fullmatch=True)))
@pytest.mark.parametrize("parse", [parse_size, parse_duration])
def test_sizes_and_durations(parse, text):
    try: value = parse(text)
    except ValueError as error:
        assert any(words in str(error) for words in ("Examples: ", "too much", "needs a unit"))
        assert repr(text) in str(error) or len(text) > 60   # a longer one is shortened
    else: assert value >= 0 and value == value


@given(
    noise=st.binary(max_size=200),
    name=st.binary(max_size=40).filter(lambda b: b"\0" not in b),
    ppid=st.integers(0, 2**22),
    ticks=st.integers(0, 2**60),
)
def test_lines_of_proc_stat(noise, name, ppid, ticks):
    fields = [b"S", str(ppid).encode(), *[b"0"]*17, str(ticks).encode(), *[b"0"]*30]
    stat = host.parse_stat(b"42 (" + name + b") " + b" ".join(fields) + b"\n")
    assert (stat.name, stat.state) == (name.decode(errors="replace"), "S")
    assert (stat.ppid, stat.start_time) == (ppid, ticks/proc._TICKS)
    # these errors are what read_stat takes for a process that cannot be seen
    with contextlib.suppress(ValueError, IndexError): host.parse_stat(noise)


@given(limits, usages, stats, groups)
@settings(max_examples=150)
def test_files_of_control_groups(tmp_path_factory, limit, used, stat, own):
    root = tmp_path_factory.mktemp("cgroup")
    (root/"proc"/"self").mkdir(parents=True)
    (root/"proc"/"self"/"cgroup").write_text(own, encoding="utf-8")
    files = {
        "memory.max": limit,
        "memory.limit_in_bytes": limit,
        "memory.current": used,
        "memory.usage_in_bytes": used,
        "memory.stat": stat,
    }
    for place in (root/"a"/"b", root/"memory"/"a"/"b"):
        place.mkdir(parents=True)
        for file, text in files.items(): (place/file).write_text(text, encoding="utf-8")
    found = host.cgroup_memory(str(root), str(root/"proc"))
    if found: assert found.total == int(limit) >= 0 and found.used >= 0


@given(json_values | st.dictionaries(sections, json_values | entries))
def test_scenarios(scenario):
    try: driver = make_driver(scenario)
    except ScenarioError as error: assert str(error)
    else:
        with driver: assert ResourceManager(track_self=False).check_gpu_availability().status in ResourceStatus


class Tags(HTMLParser):
    "Which tags there are"
    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs): self.seen.add(tag)


@given(texts, texts, texts, texts)
def test_no_text_from_outside_becomes_markup(name, user, job, plugin):
    process = OwnedProcess(1, "external", 1, host.printable(name), user)
    worker = WorkerState(2, job or "x", job, plugin_name=plugin, status=job or "idle")
    html = to_html(process_table([(0, process)])) + to_html(worker_table([to_row(worker)]))
    tags = Tags()
    tags.feed(html)
    assert tags.seen <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "small"}
    assert all(c.isprintable() for c in html)


@given(secrets)
def test_secrets_are_never_shown(config):
    state = WorkerState(1, "llm", config={"deep": [{"er": config}], **config}, remote_resource=config)
    shown = repr(state) + state._repr_html_() + json.dumps(redact(state.config)) + to_stored_row(WorkerRow(state))
    assert not any(secret in shown for secret in config.values())
