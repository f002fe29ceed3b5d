"""Walks the parameters of every public function with values that it cannot carry

Each call returns, or raises a `ValueError` or `TypeError` that names the argument.
"""
import asyncio
import collections
import inspect
import math

import click
import pytest

import cjm_fasthtml_resources
from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
from cjm_fasthtml_resources.core.gpu import read_gpus
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.core.reservations import Reservation
from cjm_fasthtml_resources.hosts.placing import check_need
from cjm_fasthtml_resources.recorded.history import RecordedHistory
from cjm_fasthtml_resources.recorded.recorder import Recorder
from cjm_fasthtml_resources.recorded.replay import replay
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu, make_driver
from cjm_fasthtml_resources.sizes import parse_duration, parse_size


class Failing:
    "None of its methods works"
    def __repr__(self, *args): raise RuntimeError("it fails")
    __str__ = __hash__ = __eq__ = __bool__ = __len__ = __iter__ = __index__ = __float__ = __fspath__ = __repr__
    __format__ = __repr__
    def __getattr__(self, name): raise RuntimeError("it has no attribute")


class FailingText(str):
    def __str__(self, *args): raise RuntimeError("it fails")
    __repr__ = __format__ = __len__ = __str__


class FailingNumber(int):
    def __repr__(self, *args): raise RuntimeError("it fails")
    __str__ = __format__ = __index__ = __int__ = __repr__


class FailingFloat(float):
    def __repr__(self, *args): raise RuntimeError("it fails")
    __str__ = __format__ = __repr__


class FailingMapping(collections.abc.Mapping):
    def __getitem__(self, key): raise RuntimeError("it fails")
    def __iter__(self): raise RuntimeError("it fails")
    def __len__(self): return 1


class FailingList(list):
    def __iter__(self): raise RuntimeError("it fails")


class TwoInSet(set):
    def __init__(self, a, b): super().__init__([a, b])


class TwoInFrozen(frozenset):
    def __new__(cls, a, b): return super().__new__(cls, [a, b])


class TwoInTuple(tuple):
    def __new__(cls, a, b): return super().__new__(cls, [a, b])


class OneInNamed(collections.namedtuple("Pair", "a b")):
    def __new__(cls, a): return super().__new__(cls, a, a)


class TwoInList(list):
    def __init__(self, a, b): super().__init__([a, b])


class OneInDict(dict):
    def __init__(self, key, value): super().__init__({key: value})


def nested(kind, times=50_000):
    "A value as deep as this"
    value = kind()
    for _ in range(times): value = {"a": value} if kind is dict else kind([value])
    return value


HUGE = 10**5000
OWN = [TwoInSet(1, 2), TwoInFrozen(1, 2), TwoInTuple(1, 2), OneInNamed(1), TwoInList(1, 2), OneInDict("a", 1)]
FAILING = [Failing(), FailingText("cuda"), FailingNumber(5), FailingFloat(5), FailingMapping(), FailingList([1])]
PLAIN = [None, True, 0, -1, HUGE, -HUGE, 1e300, math.inf, math.nan, 1j, "", "x", "9"*5000, "a\0", "\ud800", "\x1b[31m",
         "x"*10**6, b"\xff", object(), dict, len, {}, [], ()]
DEEP = [nested(list), nested(tuple), nested(dict)]
WITHIN = [*OWN, *FAILING, HUGE, "a\0", *DEEP]
HOSTILE = [*PLAIN, *OWN, *FAILING, *DEEP, [HUGE], [Failing()], {HUGE: 1}, {FailingText("x"): 1}, {(1,): Failing()},
           *({"a": value} for value in WITHIN), *({"model": value} for value in WITHIN)]
ANSWERS = (ResourceBusy, ResourceUnavailable, LookupError, PermissionError, TimeoutError)   # the argument was valid


class Registry:
    def get_plugin(self, plugin_id): return {"name": "llama"}
    def load_plugin_config(self, plugin_id): return {"model": "m", "device": "cuda"}


@pytest.fixture(scope="module", autouse=True)
def driver():
    with SimulatedDriver([SimulatedGpu(memory_total_mb=24576)]) as driver: yield driver


def complaint(call, name: str, words: tuple[str, ...]) -> str | None:
    "What is wrong with how a call takes a hostile argument"
    try:
        answer = call()
        if inspect.iscoroutine(answer): asyncio.run(answer)
    except ANSWERS: return None
    except (TypeError, ValueError) as error:
        text = str(error)
        if not any(word in text for word in (name, *words)): return f"does not name {name}: {text[:200]}"
        if len(text) > 1000 or not text.isprintable() or "digits) for" in text: return f"says {text[:200]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt): raise
        return f"raises {type(error).__name__}: {str(error)[:200]}"


def complaints(function, call, *, words=(), but=(), **usual) -> list[str]:
    "What is wrong with each parameter of a function; `usual` are the arguments of a valid call"
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("self", *but) or parameter.kind is parameter.VAR_KEYWORD: continue
        for value in HOSTILE:
            if value is None and parameter.default is None: continue
            problem = complaint(lambda: call(**usual | {name: value}), name, words)   # noqa: B023
            if problem: found.append(f"{name}, a {type(value).__name__}: {problem}")
    return found


def new_manager() -> ResourceManager:
    manager = ResourceManager(track_self=False)
    manager.register_worker(5_000_001, "llm", "job", config={"model": "m"})
    return manager


def asked(method: str, given: dict):
    "Call a manager's method, and look at what it keeps"
    manager = new_manager()
    answer = getattr(manager, method)(**given)
    if method == "reserve_async":
        async def wait(): return await answer
        answer = asyncio.run(wait())
    if method == "request": answer.poll()
    if method == "job":
        with answer: pass
    if method in ("register_worker", "update_worker_state"):
        repr(manager.get_all_workers()), manager.check_gpu_availability()
        for worker in manager.get_all_workers(): worker._repr_html_()
    return answer


REQUEST = dict(gpu_memory_mb=10.0, timeout=0)
USUAL = dict(answer=dict(id=1, unload=False), get_all_related_pids=dict(parent_pid=7),
             get_worker_by_job=dict(job_id="j"),
             get_workers_by_type=dict(worker_type="llm"), has_worker_type=dict(worker_type="llm"), make_room=dict(mb=1),
             free_gpu=dict(mb=1), expected_need=dict(plugin_name="p"), expected_gpu_memory_mb=dict(plugin_name="p"),
             register_worker=dict(pid=5_000_002, worker_type="llm"), job=REQUEST | dict(job_id="j"), from_config={},
             **dict.fromkeys(("request", "reserve", "reserve_async", "wait_for_gpu", "wait_for_gpu_async"), REQUEST),
             **dict.fromkeys(("get_worker_by_pid", "refresh_worker", "stop_worker", "unregister_worker",
                              "update_worker_state"), dict(pid=5_000_001)))
METHODS = [name for name, member in inspect.getmembers(ResourceManager, callable)
           if not name.startswith("_") and name != "follow_questions"   # which needs an app's name
           and set(inspect.signature(member).parameters) - {"self"}]


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_a_manager(method):
    usual = USUAL.get(method, {}) | (dict(snapshot=read_gpus()) if method == "judge" else {})
    assert not complaints(getattr(ResourceManager, method), lambda **given: asked(method, given), **usual)


def held(method):
    def call(**given):
        with new_manager().reserve(100, timeout=0) as reservation: getattr(reservation, method)(**given)
    return call


FUNCTIONS = dict(
    validate=(cjm_fasthtml_resources.validate_resources_for_job, dict(plugin_id="p")),
    explain=(cjm_fasthtml_resources.explain_out_of_memory, dict(error="x")), read_gpus=(read_gpus, {}),
    manager=(ResourceManager, {}), sizes=(parse_size, {}), durations=(parse_duration, {}), simulate=(make_driver, {}),
    gpu=(SimulatedGpu, {}), cluster=(check_need, dict(gpu_memory_mb=5, timeout=1)),
    replay=(replay, dict(rows=[], threshold=5)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function, usual = FUNCTIONS[name]
    if name == "validate": usual = usual | dict(resource_manager=new_manager(), plugin_registry=Registry())
    words = dict(sizes=("a valid size", "too large for a size"), simulate=("a scenario", "the scenario"),
                 durations=("a valid duration", "too large for a duration")).get(name, ())
    assert not complaints(function, function, words=words, **usual)


@pytest.mark.parametrize("method", ["shrink", "renew"])
def test_methods_of_a_reservation(method):
    assert not complaints(getattr(Reservation, method), held(method))
    assert not complaints(Reservation.hand_over, held("hand_over"), but=("base", "spent", "uses", "until_released"))


def test_monitors_and_records(tmp_path):
    manager = new_manager()
    monitor = ResourceMonitor(manager)
    assert not complaints(ResourceMonitor.__init__, ResourceMonitor, manager=manager)
    assert not complaints(ResourceMonitor.keep, monitor.keep)
    assert not complaints(ResourceMonitor.subscribe, lambda callback: monitor.subscribe(callback).close())
    assert not complaints(Recorder.__init__, Recorder, monitor=monitor)
    history = RecordedHistory(tmp_path/"history.sqlite")
    for method, usual in dict(at={}, between=dict(since=5), changes=dict(since=5),
                              figures=dict(since=5, until=6, width=1)).items():
        function = getattr(history, method)
        assert not complaints(function, function, **usual)


def test_pages():
    fasthtml = pytest.importorskip("fasthtml.core")
    from cjm_fasthtml_resources.ui.live_view import LiveView
    from cjm_fasthtml_resources.ui.panel import ResourcePanel
    from cjm_fasthtml_resources.ui.view import View
    from cjm_fasthtml_resources.ui.web import ResourceCard, make_app, resource_routes
    manager, app = new_manager(), fasthtml.FastHTML(secret_key="x")
    for function, usual in ((resource_routes, dict(app=app, manager=manager)), (make_app, dict(manager=manager)),
                            (ResourceCard, dict(manager=manager)), (View, {})):
        assert not complaints(function, function, **usual)
    for panel in (LiveView, ResourcePanel):
        def call(**given): panel(**given).close()   # noqa: B023
        assert not complaints(panel.__init__, call, manager=manager)


# The command

WORDS = ["9"*5000, "-" + "9"*5000, "0." + "9"*5000, "9"*5000 + "GiB", "9"*5000 + "d", "9"*5000 + "%", "a=" + "9"*5000,
         "1e999", "nan", "\N{SUPERSCRIPT TWO}", "\N{FULLWIDTH DIGIT ONE}"*5000, "\x1b[31mx",
         "\N{RIGHT-TO-LEFT OVERRIDE}x", "a\nb", "\udc80"]
REST = dict(run=["--gpu-memory", "1MiB", "--", "true"], wait=["--gpu-memory", "1MiB", "--timeout", "0"],
            share=["/no/folder", "--group", "root"], cancel=["1"], release=["1"], record=["--unit"],
            serve=["--host", "192.0.2.1"], answer=["1", "no"])


def commands() -> list[tuple[str, str]]:
    "Each command with each of its options and arguments that takes a value"
    from cjm_fasthtml_resources.cli import main
    context = click.Context(main)
    names = set(main.list_commands(context)) - {"mcp"}
    found = {"": main} | {name: main.get_command(context, name) for name in sorted(names)}
    slow = ("hosts", "command")   # tested with programs of their own
    return [(name, parameter.opts[0]) for name, command in found.items() for parameter in command.params
            if not getattr(parameter, "is_flag", False) and parameter.name not in slow]


@pytest.mark.parametrize("command, option", commands())
def test_the_command(command, option, folder, capsys, tmp_path, monkeypatch):
    from cjm_fasthtml_resources.cli import main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for word in WORDS:
        rest = list(REST.get(command, []))
        if option in rest: del rest[rest.index(option):rest.index(option) + 2]
        given = [f"{option}={word}", *rest] if option.startswith("-") else ["--", word]
        before = [] if option == "--simulate" else ["--simulate", "idle"]
        with pytest.raises(SystemExit) as raised: main([*before, *([command] if command else []), *given])
        said = capsys.readouterr()
        text = said.out + said.err
        assert raised.value.code != 1 and "Traceback" not in text and "digits) for" not in text, (word, text)
        assert text.replace("\n", "").isprintable(), ascii(text)
        assert raised.value.code == 0 or "Error: " in text, (word, text)
