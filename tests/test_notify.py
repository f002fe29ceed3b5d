"cjm-resources wait --notify: what is told, that nothing of it costs the reservation, and that no address is shown"
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time

import pytest

PROGRAM = [sys.executable, "-c", "from cjm_fasthtml_resources.cli import main; main()"]
SECRET = "sEcReT-token"

FAKE = """
import os, time, logging
class Apprise:
    def __init__(self): self.added = []
    def add(self, address):
        logging.getLogger("apprise").warning("Unparseable %s", address)  # codespell:ignore unparseable
        self.added.append(address)
        return address.startswith(("told://", "hang://", "fail://", "refuse://"))
    def notify(self, title, body):
        for address in self.added:
            logging.getLogger("apprise").warning("Failed to send to %s", address)
            if address.startswith("hang://"): time.sleep(60)
            if address.startswith("fail://"): raise RuntimeError(address)
            if address.startswith("refuse://"): return False
        with open(os.environ["TOLD"], "a") as file: file.write(f"{title}|{body}\\n")
        return True
"""


@pytest.fixture
def wait(folder, tmp_path):
    "Run the command with a stand-in for Apprise; gives its result, what was told, and the seconds that it took"
    (tmp_path/"apprise.py").write_text(FAKE)
    told = tmp_path/"told"

    def run(*args, preset="pair", within=None, **env):
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        program = PROGRAM if within is None else [
            sys.executable, "-c", "import cjm_fasthtml_resources.running.notify as n\n"
            f"n.Notifier.__init__.__defaults__ = (*n.Notifier.__init__.__defaults__[:-1], {within})\n"
            "from cjm_fasthtml_resources.cli import main; main()"]
        began = time.monotonic()
        out = subprocess.run([*program, "--simulate", preset, "wait", "--gpu-memory", *args], text=True, timeout=60,
                             capture_output=True, env={**os.environ, "PYTHONPATH": path, "TOLD": str(told), **env})
        assert SECRET not in out.stdout + out.stderr
        lines = told.read_text().splitlines() if told.exists() else []
        told.unlink(missing_ok=True)
        return out, lines, time.monotonic() - began
    return run


def test_a_grant_is_told_before_the_command_runs_without_its_arguments(wait):
    script = f"cat $TOLD; echo {SECRET} >/dev/null"
    out, told, _ = wait("2GiB", "--notify", f"told://{SECRET}", "--", "sh", "-c", script)
    (title, text), = (line.split("|") for line in told)
    assert out.returncode == 0 and out.stdout == f"{title}|{text}\n"
    assert title.endswith(": granted") and text == "2.0 GiB on GPU 0, reserved for sh."


def test_the_end_without_a_grant_is_told(wait):
    out, told, _ = wait("40GiB", "--timeout", "0", "--notify", f"told://{SECRET}", preset="shared")
    assert out.returncode == 75 and len(told) == 1 and ": not granted|" in told[0] and "timeout is 0." in told[0]


def test_an_argument_that_is_wrong_is_told_nobody(wait):
    out, told, _ = wait("400000GiB", "--notify", f"told://{SECRET}")
    assert out.returncode == 2 and told == []


def test_several_addresses_stand_in_a_variable(wait):
    out, told, _ = wait("1GiB", CJM_RESOURCES_NOTIFY=f"told://{SECRET} told://b")
    assert out.returncode == 0 and len(told) == 1 and "The reservation has ended." in told[0]


@pytest.mark.parametrize("service", ["fail", "refuse", "hang"])
def test_a_service_that_fails_changes_neither_the_exit_code_nor_the_reservation(wait, service):
    look = (f"{sys.executable} -c 'from cjm_fasthtml_resources.core.manager import ResourceManager as M; "
            "print(len(M(app=\"cjm-resources\").get_claims()))'; exit 3")
    out, told, seconds = wait("2GiB", "--notify", f"{service}://{SECRET}", "--", "sh", "-c", look, within=1.0)
    assert (out.returncode, out.stdout, told) == (3, "1\n", [])
    assert "--notify: " in out.stderr and seconds < 20
    out, _, _ = wait("40GiB", "--timeout", "0", "--notify", f"{service}://{SECRET}", preset="shared", within=1.0)
    assert out.returncode == 75


def test_an_address_that_is_none_is_refused_before_the_waiting_and_not_shown(wait):
    out, _, seconds = wait("40GiB", "--notify", f"what://{SECRET}", preset="shared")
    assert out.returncode == 2 and "--notify" in out.stderr and "Apprise does not know the address" in out.stderr
    assert seconds < 10


def test_without_the_extra_the_command_says_so_in_words(folder):
    code = "import sys; sys.modules['apprise'] = None\nfrom cjm_fasthtml_resources.cli import main; main()"
    command = [sys.executable, "-c", code, "wait", "--gpu-memory", "1GiB", "--notify", f"ntfy://{SECRET}"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert out.returncode == 69 and "pip install 'cjm-fasthtml-resources[notify]'" in out.stderr
    assert SECRET not in out.stderr


@pytest.mark.skipif(importlib.util.find_spec("apprise") is None, reason="the extra notify is not installed")
def test_apprise_itself_sends_the_message_and_shows_no_address(folder):
    messages = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args): pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"json://user:{SECRET}@127.0.0.1:{server.server_port}/"
    command = [*PROGRAM, "--simulate", "pair", "wait", "--gpu-memory", "2GiB"]
    try:
        for url in (address, "json://127.0.0.1:1/" + SECRET, "slack://" + SECRET):
            out = subprocess.run([*command, "--notify", url], capture_output=True, text=True, timeout=60)
            assert SECRET not in out.stdout + out.stderr
            assert out.returncode == (2 if url.startswith("slack") else 0)
    finally: server.shutdown()
    (message,) = messages
    assert message["title"].endswith(": granted") and message["message"].startswith("2.0 GiB on GPU 0")
