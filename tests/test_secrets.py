"""No secret is shown or written, wherever it stands

Tokens of each kind are planted in random structures and in each field of a worker; then everything that shows or
writes a worker is searched for them.
"""
import base64
import json
import logging
import os
import random
import re
import secrets
import string
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cjm_fasthtml_resources.core.learned import need_key
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.core.resources import WorkerState
from cjm_fasthtml_resources.core.roster import WorkerRow, from_row, to_row
from cjm_fasthtml_resources.core.samples import take_sample
from cjm_fasthtml_resources.core.secrets import (
    SECRETS,
    describe,
    redact,
    shown_config,
    shown_error,
    shown_text,
    small_letters,
)
from cjm_fasthtml_resources.core.validation import validate_resources_for_job
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu
from cjm_fasthtml_resources.ui.cards import overview, to_html
from cjm_fasthtml_resources.ui.export import to_json
from cjm_fasthtml_resources.ui.lines import Terminal, to_text
from cjm_fasthtml_resources.ui.terminal import status_view

LETTERS = string.ascii_letters + string.digits


def some(n, alphabet=LETTERS): return "".join(secrets.choice(alphabet) for _ in range(n))


def jwt():
    parts = [{"alg": "HS256", "typ": "JWT"}, {"sub": some(8)}]
    return ".".join([*(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts), some(43)])


def aws(prefix): return prefix + some(16, string.ascii_uppercase + "234567")


KINDS = {   # each makes a secret
    "openai": lambda: "sk-" + some(48),
    "openai project": lambda: "sk-proj-" + secrets.token_urlsafe(90),
    "anthropic": lambda: "sk-ant-api03-" + secrets.token_urlsafe(70),
    "openrouter": lambda: "sk-or-v1-" + secrets.token_hex(32),
    "github": lambda: "ghp_" + some(36),
    "github oauth": lambda: "gho_" + some(36),
    "github app": lambda: "ghs_" + some(36),
    "github fine": lambda: f"github_pat_{some(22)}_{some(59)}",
    "gitlab": lambda: "glpat-" + secrets.token_urlsafe(15),
    "hugging face": lambda: "hf_" + some(34, string.ascii_letters),
    "aws": lambda: aws("AKIA"),
    "aws session": lambda: aws("ASIA"),
    "google": lambda: "AIza" + secrets.token_urlsafe(26)[:35],
    "slack": lambda: f"xoxb-{some(12, string.digits)}-{some(12, string.digits)}-{some(24)}",
    "slack user": lambda: "xoxp-" + some(40),
    "npm": lambda: "npm_" + some(36),
    "pypi": lambda: "pypi-AgEIcHlwaS5vcmc" + secrets.token_urlsafe(60),
    "stripe": lambda: "sk_live_" + some(24),
    "stripe test": lambda: "rk_test_" + some(99),
    "groq": lambda: "gsk_" + some(52),
    "replicate": lambda: "r8_" + some(37),
    "nvidia": lambda: "nvapi-" + secrets.token_urlsafe(48),
    "jwt": jwt,
    "hex": lambda: secrets.token_hex(32),
    "base64": lambda: secrets.token_urlsafe(48),
}
WRITTEN = {   # how a password that looks like nothing is told
    "url": "postgres://ada:{}@db.example:5432/x",
    "no user": "redis://:{}@h",
    "token as user": "https://{}@github.com/x",
    "ssh": "ada:{}@10.0.0.1",
    "option": "--token={}",
    "option apart": "vllm serve --api-key {} --port 80",
    "env": "HF_TOKEN={}",
    "password": "--password {}",
    "query": "https://h/x?a=1&api_key={}&b=2",
    "bearer": "Authorization: Bearer {}",
    "basic": "Authorization: Basic {}",
    "header": "X-Api-Key: {}",
    "json": '{{"api_key": "{}"}}',
    "json in json": '{{\\"password\\": \\"{}\\"}}',
    "python": "{{'client_secret': '{}'}}",
    "azure": "AccountName=x;AccountKey={};Suffix=y",
    "cookie": "Cookie: id={}",
    "pem": "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----",
}


def password(): return "Zq" + some(9, string.ascii_lowercase) + "7"


kinds = st.sampled_from([*KINDS]).map(lambda kind: KINDS[kind]()).map(lambda key: (key, key))
def write(form): return (word := password(), form.format(word))


written = st.sampled_from([*WRITTEN.values()]).map(write)
planted = kinds | written   # the secret, and the text that it stands in


@dataclass
class Login:
    user: str
    word: object


@dataclass(frozen=True)
class Frozen: word: object


class Pair(NamedTuple):
    first: object
    second: object


class Open:
    def __init__(self, value): self.value, self.api_key = value, value
    def __repr__(self): return f"Open({self.value})"


class Slots:
    __slots__ = ("value",)
    def __init__(self, value): self.value = value
    def __str__(self): return str(self.value)


def holders(text):
    "Structures that hold a text, one within the other"
    itself = [text.encode(), bytearray(text.encode()), list(text), [*text.encode()], {text}, {text: 1},
              Login("ada", text), Frozen(text), Pair(1, text), Open(text), Slots(text), SimpleNamespace(a=text),
              Enum("E", {"A": text}).A, ValueError(text), type(text[:20], (), {}), lambda: text,
              json.dumps({"a": {"b": text}}), f"prefix {text} suffix"]
    wraps = [lambda v: [v], lambda v: (v,), lambda v: Login("ada", v), lambda v: {"x": v}, lambda v: Pair(0, v),
             lambda v: OrderedDict(deep=v), lambda v: MappingProxyType({"y": v}), Open, lambda v: {text: {"z": v}}]
    inner = st.just(text) | st.sampled_from(itself)
    return st.recursive(inner, lambda value: st.builds(lambda wrap, v: wrap(v), st.sampled_from(wraps), value),
                        max_leaves=4)


names = st.sampled_from(["model", "model_id", "model_path", "resource_id", "device", "x", "prompt", "api_key",
                         "token", "env", "args", "db"])
FIELDS = ["worker_type", "job_id", "plugin_id", "plugin_name", "loaded_plugin_resource", "status",
          "execution_mode", "container_id", "conda_env"]
REMOTE = ["provider", "region", "instance_id", "status", "ssh_host", "gpu_type"]


def absent(secret, shown):
    "Neither the secret nor a large part of it stands there, however it was escaped"
    for text in (shown, shown.replace("\\", "")):
        assert secret not in text, text[max(text.find(secret) - 100, 0):][:300]
        assert len(secret) < 24 or secret[8:] not in text and secret[:-8] not in text


def scraped(manager, sample) -> str:
    "What Prometheus gets, where the extra is installed"
    if not find_spec("prometheus_client"): return ""
    from cjm_fasthtml_resources.ui.metrics import ResourceCollector, exposition
    monitor = ResourceMonitor(manager)
    monitor.keep(sample)
    return exposition(ResourceCollector(monitor))[0].decode()


def everything(worker) -> str:
    "All that shows or writes a worker"
    with SimulatedDriver([SimulatedGpu()]):
        manager = ResourceManager(track_self=False)
        manager.workers.register(worker)
        sample = take_sample(manager)
        terminal = to_text(status_view(sample, Terminal(width=400), 20))
        return "\n".join([
            repr(worker), str(worker), f"{worker}", worker._repr_html_(), json.dumps(to_json(sample)),
            to_row(WorkerRow(worker)), to_html(overview(sample)), terminal, repr(sample),
            manager._repr_html_(), repr(worker.shown()), scraped(manager, sample)])


def some_configs(plant):
    "A secret, and configurations that hold it"
    return st.tuples(st.just(plant[0]), st.dictionaries(names, holders(plant[1]), min_size=1, max_size=3))


@given(planted.flatmap(some_configs))
@settings(max_examples=60)
def test_nothing_of_a_config_shows_it(case):
    secret, config = case
    worker = WorkerState(7, "llm", config=config)
    absent(secret, everything(worker))
    json.dumps(shown_config(config), allow_nan=False)      # it is JSON
    assert shown_config(shown_config(config)) == shown_config(config)
    assert from_row(to_row(WorkerRow(worker)), {7: worker}).state.config == worker.config


@given(planted, st.sampled_from(FIELDS), st.sampled_from(["{}", "llama with {}", "{} 2", "a, {}"]))
@settings(max_examples=80)
def test_nothing_of_a_field_shows_it(plant, field, form):
    secret, text = plant
    if field in ("job_id", "container_id") and re.fullmatch("[0-9a-f]{64}", secret): return   # these may be random
    fields = {"worker_type": "llm", field: form.format(text)}
    absent(secret, everything(WorkerState(7, **fields)))


@given(planted, st.sampled_from(REMOTE))
@settings(max_examples=40)
def test_nothing_of_a_rented_machine_shows_it(plant, field):
    secret, text = plant
    if field == "instance_id" and re.fullmatch("[0-9a-f]{64}", secret): return
    rented = {field: text, "other": text, text: 1}
    absent(secret, everything(WorkerState(7, "llm", is_remote=True, remote_resource=rented)))


class Raising:
    "A plugin whose answers and errors hold a text"
    def __init__(self, text): self.text = self.name = text
    def get_execution_mode(self): raise RuntimeError(f"it failed: {self.text}")
    def get_child_pids(self): raise KeyError(self.text)
    def get_managed_resources(self): return {"conda_env": [self.text]}
    def get_remote_resource_info(self): return {"provider": Open(self.text), "ssh_host": self.text*400}
    def estimate_cost(self, hours): raise OSError(2, self.text)


class Registry:
    def __init__(self, plugin): self.plugin = plugin
    def get_plugin(self, plugin_id): return self.plugin
    def load_plugin_config(self, plugin_id):
        return {"model": self.plugin.text, "device": "cuda", "env": self.plugin.text}


def validations(manager, text):
    "What is said about jobs of a plugin"
    registry = Registry(Raising(text))
    for arguments in ({}, dict(worker_pid=7), dict(gpu_memory_mb=99_999), dict(worker_type=text)):
        result = validate_resources_for_job(manager, registry, text, **arguments)
        yield from (repr(result), result.message, str(result), result._repr_html_())
        try: result.raise_if_blocked()
        except RuntimeError as error: yield str(error)


def refusals(manager, text):
    "What is said about arguments that are wrong"
    for call in (lambda: manager.register_worker(text, "llm"), lambda: manager.register_worker(5, "llm", config=text),
                 lambda: manager.reserve(text), lambda: manager.reserve(100, text, timeout=0),
                 lambda: manager.register_worker(5, {text}), lambda: ResourceManager.from_config({text: 1}),
                 lambda: ResourceManager(track_self=text), lambda: manager.pick_gpus(text),
                 lambda: ResourceManager(text)):
        with pytest.raises((TypeError, ValueError)) as raised: call()
        yield str(raised.value)


@pytest.mark.parametrize("kind", [*KINDS, *WRITTEN])
def test_no_log_and_no_message_shows_it(kind, caplog):
    secret = KINDS[kind]() if kind in KINDS else password()
    text = WRITTEN.get(kind, "{}").format(secret)
    caplog.set_level(logging.DEBUG)
    with SimulatedDriver([SimulatedGpu(memory_total_mb=1000)]):
        manager = ResourceManager(track_self=False)
        manager.register_worker(5_000_007, text, plugin_name=text, loaded_plugin_resource=text,
                                plugin_instance=Raising(text))
        manager.update_worker_state(5_000_007, status="running", gpu_memory_mb=900)
        manager.estimate_total_cloud_cost()
        said = [*validations(manager, text), *refusals(manager, text)]
    assert len(said) > 20 and caplog.text
    absent(secret, "\n".join([*said, caplog.text]))


@pytest.mark.parametrize("kind", [*KINDS, *WRITTEN])
def test_no_file_has_it_and_its_own_process_keeps_it(kind, folder):
    secret = KINDS[kind]() if kind in KINDS else password()
    text = WRITTEN.get(kind, "{}").format(secret)
    config = {"model": text, "deep": {"er": [text]}, text: 1, "api_key": secret}
    with SimulatedDriver([SimulatedGpu()]):
        manager, other = ResourceManager(track_self=False, app="a"), ResourceManager(track_self=False, app="a")
        kept = manager.register_worker(os.getpid(), "llm", "job 1", plugin_name=text, loaded_plugin_resource=text,
                                       config=config, gpu_memory_mb=500, plugin_instance=Raising(text))
        manager.check_gpu_availability()     # learns what it needs
        manager.needs.raise_after_out_of_memory(need_key(text, text, config), 400*2**20)
        assert other.update_worker_state(os.getpid(), job_id="job 2").waiting_jobs == ("job 2",)
        found = manager.get_worker_by_job("job 2")
        assert (found.config, found.plugin_name) == (kept.config, text)
        assert manager.expected_gpu_memory_mb(text, text) == 500
        assert [w.config for w in other.get_all_workers()] == [shown_config(config)]
    for path in folder.rglob("*"):
        if path.is_file(): absent(secret, path.read_bytes().decode("latin-1"))


# What is shown all the same


def test_people_see_what_helps_them():
    config = {"model": "meta-llama/Llama-3.1-8B", "device": "cuda:0", "language": "en", "beams": 5, "dtype": "float16",
              "max_tokens": 512, "stream": True, "stop": None, "quantization": "AWQ", "generation": {"top_k": 0.5}}
    assert shown_config(config) == config == redact(config)
    worker = WorkerState(
        7, "llm", "8d1f2b6e-6c0f-4c7e-9d57-0a1b2c3d4e5f", "llm_vllm", "vLLM 0.9", "Qwen/Qwen2.5-7B-Instruct-AWQ",
        config, "running", "subprocess", [9], "4f5e6d7c8b9a"*5 + "4f5e", "py311", True,
        {"region": "eu-west-1", "gpu_count": 2})
    assert worker.shown() == worker
    for text in ("transcribe-0f3a9c1d2e4b5a6f7081920a1b2c3d4e", "a job of ada", "wörk"):
        assert shown_text(text, True) == text


def test_the_rest_is_described():
    config = {"api_key": "sk-" + "x"*48, "prompt": "Good morning", "pin": 1234, "layers": [1, 2], "raw": b"abc"}
    assert shown_config(config) == {
        "api_key": "<str, 51 characters>", "prompt": "<str, 12 characters>", "pin": "<int, hidden>",
        "layers": [1, 2], "raw": "<bytes, 3 bytes>"}
    assert (describe(Open("x")), describe(10**30)) == ("<Open, hidden>", "<int, 100 bits>")


def test_the_same_config_is_shown_in_the_same_way_in_each_process():
    worker = WorkerState(7, "llm", config={"a b": 1, "c d": 2, "model": "m", "x": {"y": {1, 2}}})
    once, again = (from_row(to_row(WorkerRow(worker))).state for _ in range(2))   # each row has a seal of its own
    assert once == again == worker.shown()
    assert from_row(to_row(WorkerRow(worker)), {7: worker}).state == worker


@given(st.text(max_size=300))
def test_no_text_is_too_odd(text):
    assert isinstance(shown_text(text), str) and isinstance(shown_error(ValueError(text)), str)


@given(planted, st.sampled_from(["{}", "llama with {}", "{} 2", "a, {}", "{0} {0}"]))
def test_what_is_shown_is_shown_in_the_same_way_again(plant, form):
    shown = shown_text(form.format(plant[1]))
    assert shown_text(shown) == shown
    shown = shown_config({"a": plant[1], plant[1]: [plant[0]], "model": plant[1], plant[0]: plant[1], "token": plant})
    assert shown_config(shown) == shown


def test_random_words_are_known_for_such():
    rng = random.Random(1)
    def word(n, more): return "".join(rng.choice(LETTERS + more) for _ in range(n))
    words = [word(n, more) for more in ("", "-_", "+/") for n in (32, 40, 64) for _ in range(500)]
    assert sum(shown_text(w) == w for w in words) < 20     # of 4500


def anywhere(pattern: str):
    "Texts that a pattern matches; what it only looks at, before or behind them, is left out"
    flags, rest = re.match(r"(\(\?[is]\))?(.*)", pattern, re.DOTALL).groups()
    return st.from_regex((flags or "") + re.sub(r"\(\?<?[!=](?:[^()\\]|\\.|\[[^]]*\])*\)", "", rest))


@pytest.mark.parametrize("place", range(len(SECRETS)))
@given(st.data())
def test_a_pattern_matches_no_text_without_one_of_its_parts(place, data):
    parts, pattern, _ = SECRETS[place]
    small = small_letters(data.draw(anywhere(pattern)))
    assert any(part in small for part in parts), small


def test_a_letter_that_a_pattern_takes_for_another_one_is_that_one():
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    taken = {letter: re.findall(letter, every, re.IGNORECASE) for letter in string.ascii_lowercase}
    assert len(taken["k"]) > 2 and len(taken["i"]) > 2
    assert all(small_letters(char) == letter for letter, chars in taken.items() for char in chars)
