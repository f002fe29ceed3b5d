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
import time
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cjm_fasthtml_resources.core.command import show_command
from cjm_fasthtml_resources.core.learned import need_key
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.monitor import ResourceMonitor
from cjm_fasthtml_resources.core.resources import WorkerState
from cjm_fasthtml_resources.core.roster import WorkerRow, from_row, to_row
from cjm_fasthtml_resources.core.samples import take_sample
from cjm_fasthtml_resources.core.secret_names import SECRET_PARTS, names_secret, small_letters
from cjm_fasthtml_resources.core.secrets import (
    SECRETS,
    describe,
    redact,
    shown_config,
    shown_error,
    shown_text,
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
    "variable": "DB_PASS={}",
    "yaml": "KEY: {}",
    "session": "SESSION_ID={}",
    "subscript": "os.environ['HF_TOKEN']='{}'",
    "three quotes": 'TOKEN="""a {}"""',
    "star": "password=*{}",
    "nested json": '{{"password": {{"value": "{}"}}}}',
    "percent": "token%3D{}",
    "code": """python -c "login('{}')" """,
    "chained": "a;mysql -p{}",
    "chained twice": "b &&mysql -p '{}'",
    "nested shells": """sh -c "sh -c 'mysql -p{}'" """,
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


# The table of notations: H is the secret, a password that looks like nothing

NAMED = [
    "DB_PASS={}", "KEY: {}", "SESSION_ID={}", "userPin: {}", "pw={}", "pass1={}", "otp={}", "CVV2={}", "cookie={}",
    "bearer={}", "auth: {}", "api key: {}", "API.KEY={}", "private key: {}", "pass-phrase: {}", "creds={}",
    "session id: {}", "the password is: {}", "export KEY={}", "$env:KEY={}"]
NOTATIONS = (   # of Python, a shell, JSON, YAML, URLs, HTML, XML, make
    "os.environ['HF_TOKEN']='{}'", 'os.environ["HF_TOKEN"] = "{}"', "config[ 'password' ] = '{}'",
    'TOKEN="""{} {}"""', "TOKEN=\'\'\'a 'b' {}\'\'\'", "token = rb'{} {}'", 'password: str = "{}"', "password != '{}'",
    '("password", "{}")', '["api_key", "{}"]', 'os.putenv("HF_TOKEN", "{}")', "SecretStr('a {}')", "f(key='{}')",
    'config["password"]["value"] = "{}"', "password.value = '{}'", "password -> {}",
    "password=*{}", "password=**{}**", "password=***{}", "password=[x]{}", "password=({}", "-e 'PASSWORD=a {}'",
    'PASS=abc"d {}"', """PASS="a"'b {}'""", "PASS=a\\ {}", "TOKEN=$(echo {})", "TOKEN=${X:-a {}}", "password=`a {}`",
    "['vllm', '--api-key', '{} x']", '"--token","{}"', "--token -{}", "--token 'a {}'", "-password {}",
    '{"password": {"value": "{}"}}', '{"password": {"value": "a}{}", "x": ["{}"]}}', '{"password": ["a", "{}"]}',
    '{\\"password\\": {\\"value\\": \\"a}{}\\"}}', '{"a":"{\\"pw\\":\\"{\\\\\\"v\\\\\\":\\\\\\"{}\\\\\\"}\\"}"}',
    '{"name": "DB_PASS", "value": "{}"}', 'password="x\\"{}"', "password:\n  value: {}", "password:\n  - {}",
    "password: |\n  {}", "password: >-\n  {}", "{'password' => '{}'}", "a=1&pw={}&b=2", "token%3D{}", "token%253D{}",
    "api_key%3A%20{}", "%22password%22%3A%22{}%22", "\\u0022password\\u0022: \\u0022{}\\u0022", "token\\u003d{}",
    "&quot;password&quot;: &quot;a {}&quot;", "password&#61;{}", '<add key="DB_PASS" value="{}"/>',
    "<password>a {}</password>", "token ?= {}", "token := '{}'")
COMMANDS = (
    "a;mysql -p{}", "&&mysql -p{}", """sh -c "sh -c 'mysql -p{}'" """, "mysql -p'a {}' -h x", "$(mysql -p{})",
    "`mysql -p{}`", "['mysql', '-p', '{} x']", "['mysql', '-p{} x']", "curl 'h?a=1&b=2; c' -u ada:{}", "{mysql -p{}}",
    "docker login -p {}", "sudo /usr/bin/mysql -u x -p{} db", "x=1;mysql \\\n -p{}", "curl --user=ada:{}",
    """python -c "login('ada', '{}')" """, """sh -c "python3 -u -c \\"f('{}')\\"" """, """node -e 'f("{}")' """,
    "python -c 'import os; os.environ[\"HF_TOKEN\"]=\"{}\"'")


@pytest.mark.parametrize("form", [*NAMED, *NOTATIONS, *COMMANDS])
def test_a_secret_is_found_in_each_notation(form):
    for text in (form, f"it failed: {form}", f"{form} and more", f"x\n{form}\ny", f"--tokens 5 tokenizer=x {form}"):
        for secret in ("hunter2", password()):
            shown = shown_text(text.replace("{}", secret))
            assert secret not in shown and shown_text(shown) == shown, shown
            assert secret not in show_command(["sh", "-c", text.replace("{}", secret)])
    assert shown_text(f"--max-tokens 512 {form}".replace("{}", "hunter2")).startswith("--max-tokens 512")


@pytest.mark.parametrize("option", ["-c", "-uc"])
def test_code_of_a_command_shows_no_text_that_can_be_a_secret(option):
    code = "import x; x.login('ada', 'hunter2', pw='hush'); x.load('a/model.pt', 'cuda')"
    shown = show_command(["/usr/bin/python3", option, code])
    assert "hunter2" not in shown and "hush" not in shown and "'a/model.pt', 'cuda'" in shown


SECRET_NAMES = [
    "pw", "userPw", "DB_PW", "userPin", "user_pin", "userPIN", "PIN", "pin2", "pass1", "dbPass", "DB_PASS", "PASS",
    "passWord", "passwd", "PaSsWoRd", "passphrase", "passPhrase", "pwd", "mnemonic", "otp", "totp", "OTP1", "cvv",
    "CVV2", "credential", "creds", "auth", "oauth2", "Authorization", "bearer", "Set-Cookie", "session",
    "SESSION_ID", "sessionId", "apikey", "api_key", "apiKey", "API_KEY", "api-key", "api.key", "APIKEY", "apikey2",
    "seed_phrase", "seedPhrase", "seed_words", "secret", "clientSecret", "HF_TOKEN", "accessToken", "access_tokens",
    "key", "KEY", "myKey", "MYKEY", "openaiKey", "sshkey", "userpass", "PGPASSWORD", "2fa", "2faCode",
    "securityCode", "api_key_value", "secret_key_frames", "X-Api-Key", "db.password", "auth_token2", "keyId",
    "API_KEY_2", "PHPSESSID"]
PLAIN_NAMES = [
    "max_tokens", "num_tokens", "maxTokens", "tokenizer", "tokenizer_mode", "tokenizerPath", "tokens_per_second",
    "tokenization", "keyboard", "monkey", "key_frames", "keyframes", "keyFrames", "keywords", "num_key_value_heads",
    "author", "authors", "pin_memory", "pinMemory", "bypass", "compass", "session_len", "sessions", "passes",
    "passed", "spin", "mapping", "PATH", "path", "spatial", "compat", "CUDA_VISIBLE_DEVICES", "model", "device",
    "seed", "beams", "turkey", "KeyError", "AuthenticationError", "credits", "passenger", "dispatch", "certain",
    "signal", "assign", "sigma"]


def test_one_rule_judges_names_in_configurations_and_in_texts():
    assert [name for name in SECRET_NAMES if not names_secret(name)] == []
    assert [name for name in PLAIN_NAMES if names_secret(name)] == []
    assert all(any(part in small_letters(name) for part in SECRET_PARTS) for name in SECRET_NAMES)
    for name in SECRET_NAMES:
        assert list(shown_config({name: "hush"}).values()) == ["<str, 4 characters>"], name
        assert "hush" not in shown_text(f"{name}=hush") + shown_text(f'{{"{name}": "hush"}}'), name
    for name in PLAIN_NAMES:
        assert shown_config({name: "hush"}) == {name: "hush"} and shown_text(f"{name}=hush") == f"{name}=hush"


KEPT = r"""
vllm serve meta-llama/Llama-3.1-8B --max-tokens 512 --tokenizer bert --num-key-value-heads 8
keyboard=us monkey=1 key_frames=3 {"key_frames": [1, 2]} keywords: a, Tokens: 512, tokens per second: 30.5
CUDA_VISIBLE_DEVICES=0,1 PATH=/usr/local/bin:/usr/bin HOME=/home/ada PYTHONPATH=. LD_LIBRARY_PATH=/usr/lib
the job of ada waits for GPU 0: 13.6 GiB free; train.py (PID 42, user bob, 27.0 GiB on GPU 0)
KeyError: 'model', ConnectionError: [Errno 111] Connection refused, AuthenticationError: no such user
File "/app/auth.py", line 12, in login; tests/test_secrets.py:45: error
Lost the connection: timed out after 5 s; the token is missing; no secret, the key of the matter
author: ada, pin_memory=True, num_workers=4, session_len=4096, Signature: f(x, y)
python train.py --seed 42 --lr 3e-4 seed=42 /models/whisper/large-v3-turbo-q5_0.bin
https://huggingface.co/meta-llama/Llama-3.1-8B?download=true
docker run -p 8080:80 vllm --port 80 -u ada; mysql -uroot -h db
GPU 0 (GPU-51000000-0000-4000-8000-000000000000): 13.6 GiB, RTX6000ADA, A100-SXM4-80GB, 20240501T123000Z
tokenizer('x') count_tokens("x") bypass("x"), PYTORCH_CUDA_ALLOC_CONF, TRANSCRIPTIONWORKER
python3 -c "import torch; torch.load('a/model.pt', 'cuda')"
TheBloke/Mixtral-8x7B-Instruct-v0.1-GGUF sha256:0a1b2c3d0a1b2c3d0a1b2c3d0a1b2c3d0a1b2c3d0a1b2c3d0a1b2c3d0a1b2c3d
""".strip().splitlines()


@pytest.mark.parametrize("text", KEPT)
def test_what_people_need_stays_readable(text): assert shown_text(text) == text


def test_capitals_and_digits_alone_can_be_a_secret():
    rng = random.Random(1)
    for letters in ("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", "0123456789ABCDEFGHJKMNPQRSTVWXYZ", "0123456789ABCDEF"):
        words = ["".join(rng.choice(letters) for _ in range(n)) for n in (20, 26, 32, 52) for _ in range(200)]
        assert sum(shown_text(word) == word for word in words) < 16   # of 800
    assert shown_text("JBSWY3DPEHPK3PXP JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP") == "*** ***"


HOSTILE = (
    "token", "token ", "token=", "key'", "key   ", '\\"', "\\", '"', "=", ":", "://:", "a:", "{", '{"password":', "%3D",
    "%", "eyJ", "eyJaaaa.", "authorization: ", "key\n", "sh -c '", "mysql -p", "&&mysql -pX", "mysql 'x", "KEY']",
    "key] ", "token='", "token=(", 'name="key" value=', "<key>", "'key=x ", "key=a'\"b ", "%25", "\\u003d",
    "python -c '", "python -a ", "Aa", "A2", "aA_", "key:=|", "phrase: a ", "Ab3Ab3Ab3Ab3Ab3x ")


@pytest.mark.parametrize("part", HOSTILE)
@pytest.mark.parametrize("end", ["", "@", "="])
def test_a_long_text_takes_time_in_proportion_to_its_length(part, end):
    def seconds(n):
        text = part*(n//len(part)) + end
        began = time.process_time()
        show_command(["python", "-c", text])
        shown_text.__wrapped__(text)
        return time.process_time() - began
    assert seconds(300_000) < 8   # half a second; a squared time is minutes
