"`cjm-resources --host` against a real sshd on loopback: hosts that answer, refuse, hang or lack the command"
import asyncio
import contextlib
import getpass
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from servers import free_port, need_program, running, wait_until

from cjm_fasthtml_resources.core.ledger import Ledger
from cjm_fasthtml_resources.core.store import Store, find_ids, store_path
from cjm_fasthtml_resources.hosts.ssh import ask_hosts, combine_hosts

# What the account there runs, whatever it is asked for: the words of the client are in SSH_ORIGINAL_COMMAND
COMMANDS = {
    "good": "{program} --simulate shared ${{SSH_ORIGINAL_COMMAND#cjm-resources}}",
    "hangs": "exec sleep 100",
    "without": "PATH=/usr/bin:/bin; no-cjm-resources --json",
    "other": "echo 'Welcome to other!'; echo '{{\"schema_version\": 99, \"version\": \"9.9\"}}'",
    "chatty": "echo Welcome!; {program} --simulate idle --json",
    "shy": "true",
    "older": "{program} --simulate idle --json | sed 's/\"version\": \"[^\"]*\"/\"version\": \"0.0.9\"/'",
    "agent": "exec {program} --simulate pair mcp",
    "fails": "echo 'Traceback …' >&2; echo 'StoreError: the file is locked' >&2; exit 74",
}


def need_own_passwd() -> list[str]:
    "As root, sshd wants a user of its own: this gives it one in a namespace, and changes nothing on the machine"
    if os.geteuid(): return []
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True) if shutil.which("unshare") else None
    if tried is None or tried.returncode: pytest.skip("root may not use mount namespaces here, and sshd needs a user")
    return ["unshare", "--mount", "sh", "-ec", """
        mount --make-rprivate / ; cp /etc/passwd passwd
        grep -q ^sshd: passwd || echo 'sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin' >> passwd
        mkdir -p run/sshd; chmod 755 run run/sshd; mount --bind passwd /etc/passwd; mount --bind run /run
        exec "$@" """, "sh"]


class Sshd:
    "A server of this test's own, whose accounts are its keys, and the client's configuration for it"
    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder, self.port = folder, free_port()
        for name in ("host", *COMMANDS, "stranger"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder/name], check=True)
        program = f"{sys.executable} -m cjm_fasthtml_resources"
        path = os.pathsep.join(filter(None, sys.path))
        script = f"#!/bin/sh\nPYTHONPATH={path} CJM_RESOURCES_DIR={folder} exec {program} \"$@\"\n"
        (folder/"program").write_text(script)
        (folder/"program").chmod(0o700)
        self.allow()
        self.write_config()
        (folder/"sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/allowed\n"
            "MaxStartups 100\n"
            "UsePAM no\nStrictModes no\nPidFile none\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n")
        sshd = need_program("sshd", "openssh-server")
        if subprocess.run([sshd, "-t", "-f", os.devnull], capture_output=True).returncode == 127:
            pytest.skip("sshd lacks a library: apt-get install openssh-server")
        command = [*need_own_passwd(), sshd, "-D", "-e", "-f", str(folder/"sshd_config")]
        self.server = psutil.Process(stack.enter_context(running(command, folder)).pid)
        wait_until(self.listens, told=lambda: (folder/"log").read_text())

    def allow(self) -> None:
        "Each key runs its command, and nothing else"
        lines = []
        for name, line in COMMANDS.items():
            command = line.format(program=self.folder/"program").replace('"', '\\"')
            lines.append(f'restrict,command="{command}" {self.key(name)}')
        (self.folder/"allowed").write_text("\n".join(lines) + "\n")

    def key(self, name: str) -> str: return (self.folder/f"{name}.pub").read_text().strip()

    def sessions(self) -> list[psutil.Process]:
        "A process for each connection, or several, with the commands that they run"
        return self.server.children(recursive=True)

    def listens(self) -> bool:
        with socket.socket() as s: return s.connect_ex(("127.0.0.1", self.port)) == 0

    def write_config(self, silent_port: int = 1) -> None:
        "The client's own configuration, as a user writes it; `ssh` here reads no other"
        names = [*COMMANDS, "stranger", "changed", "unknown", "nobody", "mute", "kept"]
        known, host = self.folder/"known", (self.folder/"host.pub").read_text().split()[:2]
        known.write_text("\n".join(f"{name} {' '.join(host)}" for name in names if name not in ("changed", "unknown"))
                         + f"\nchanged {' '.join(self.key('stranger').split()[:2])}\n")
        ports, keys = dict(nobody=free_port(), mute=silent_port), dict.fromkeys(names, "stranger")
        keys |= {name: name for name in COMMANDS} | dict(kept="good")
        blocks = [f"Host {name}\n  HostName 127.0.0.1\n  HostKeyAlias {name}\n  User {getpass.getuser()}\n"
                  f"  Port {ports.get(name, self.port)}\n  IdentityFile {self.folder/keys[name]}\n"
                  f"  IdentitiesOnly yes\n  UserKnownHostsFile {known}\n  GlobalKnownHostsFile /dev/null\n"
                  for name in names]
        blocks[-1] += f"  ControlMaster auto\n  ControlPersist 2\n  ControlPath {self.folder}/%C\n"
        (self.folder/"config").write_text("\n".join(blocks))
        wrapper = self.folder/"bin"/"ssh"
        wrapper.parent.mkdir(exist_ok=True)
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh", path=os.defpath)} -F {self.folder}/config "$@"\n')
        wrapper.chmod(0o700)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    for program in ("ssh", "ssh-keygen"):
        if not shutil.which(program, path=os.defpath): pytest.skip(f"no {program}: apt-get install openssh-client")
    with contextlib.ExitStack() as stack: yield Sshd(tmp_path_factory.mktemp("sshd"), stack)


@pytest.fixture(autouse=True)
def own_ssh(sshd, monkeypatch):
    monkeypatch.setenv("PATH", f"{sshd.folder}/bin{os.pathsep}{os.environ['PATH']}")


def find_ids_in(folder: Path) -> tuple[str, str | None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CJM_RESOURCES_DIR", str(folder))
        return find_ids()


def reasons(*hosts: str, timeout: float = 20) -> dict[str, str | None]:
    return {answer.host: answer.reason for answer in ask_hosts(hosts, timeout=timeout)}


def asking(sshd) -> set[str]:
    "The PIDs of each `ssh` that asks this server"
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(sshd.folder/"config") in path.read_bytes().decode(errors="replace"): found.add(path.parent.name)
    return found


def test_each_trouble_is_a_sentence(sshd):
    hosts = ("good", "without", "stranger", "changed", "unknown", "nobody", "other", "chatty", "shy", "fails", "older")
    answers = {answer.host: answer for answer in ask_hosts(hosts, timeout=60)}
    assert answers["good"].sample is not None, answers["good"].reason
    assert answers["good"].sample.status.value == "external_busy"
    assert answers["good"].sample.simulated and answers["chatty"].sample.status.value == "available"
    assert answers["older"].sample.gpu.notes[-1].startswith("That host runs cjm-resources 0.0.9, this machine")
    said = {host: answer.reason for host, answer in answers.items() if answer.sample is None}
    for host, words in dict(
            without="the command is missing there (",
            stranger="it refused the key: ", changed="its host key differs from the one that ssh knows",
            unknown="ssh does not know its host key yet", nobody="no ssh server listens there",
            other="cjm-resources 9.9 there writes JSON of version 99", shy="it printed nothing",
            fails="ended with exit code 74: StoreError: the file is locked").items():
        assert words in said.pop(host), (host, answers[host].reason)
    assert not said
    sample = combine_hosts(list(answers.values()))
    # the simulated GPUs have one UUID: they are one GPU, which three hosts report, and the worst answer counts
    assert sample.status.value == "external_busy" and len(sample.gpu.devices) == len(hosts) - 2


def test_one_that_hangs_holds_up_no_other(sshd):
    "One hangs before ssh has connected, one in its command; both take until the limit, and no longer"
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        sshd.write_config(mute.getsockname()[1])
        answers = ask_hosts(["hangs", "mute", "good"], timeout=6)
    assert time.monotonic() - began < 12
    hangs, silent, good = answers
    assert good.sample is not None, good.reason
    assert hangs.reason == "it did not respond within 6 s"
    assert "timed out" in silent.reason or "did not respond within 6 s" in silent.reason


def test_the_command_shows_table_json_and_exit_code(sshd):
    command = [sys.executable, "-m", "cjm_fasthtml_resources", "--host", "good", "--host", "nobody"]
    options = dict(capture_output=True, text=True, timeout=60)
    table = subprocess.run([*command, "--exit-code"], **options)
    assert table.returncode == 11, table.stderr
    for words in ("GPU good:0", "GPU nobody:0", "no answer", "bob@good", "nobody: it refused the connection"):
        assert words in table.stdout, table.stdout
    found = json.loads(subprocess.run([*command, "--json"], **options).stdout)
    assert [d["id"] for d in found["gpu"]["devices"]] == ["good:0", "nobody:0"]


def test_a_machine_under_two_names_counts_once(sshd):
    command = [sys.executable, "-m", "cjm_fasthtml_resources", "--host", "good", "--host", "kept", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout)
    assert [d["id"] for d in found["gpu"]["devices"]] == ["good:0"]
    assert "kept is good under another name: the same machine, which is shown once." in found["gpu"]["notes"]
    assert found["memory"]["machines"] == 1
    answers = ask_hosts(["good", "kept"], timeout=60)
    assert {(a.sample.machine, a.sample.queue) for a in answers} == {find_ids_in(sshd.folder)}


def test_who_watches_does_not_wait_for_a_host_that_hangs(sshd):
    command = [sys.executable, "-m", "cjm_fasthtml_resources", "--host", "good", "--host", "hangs",
               "--host-timeout", "10m", "--json", "--watch", "--interval", "0.1"]
    seen = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            while len(seen) < 2:
                good, hangs = json.loads(process.stdout.readline())["gpu"]["devices"]
                assert hangs["reason"] == "it has yet to answer"
                if good["status"] == "external_busy": seen.append(good)
        finally: os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_signal_ends_each_ssh_before_the_command(sshd, number, terminal):
    command = [sys.executable, "-m", "cjm_fasthtml_resources", "--host", "good", "--host", "hangs", "--host-timeout",
               "10m", "--watch", "--interval", "0.2"]
    screen, out = pty.openpty()
    with open(screen, "rb", buffering=0) as shown, \
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out if terminal else subprocess.PIPE,
                             start_new_session=True) as process:
        os.close(out)
        try:
            seen = b""
            while b"good:0" not in seen: seen += (shown if terminal else process.stdout).read(4096)
            assert asking(sshd)
            process.send_signal(number)
            assert process.wait(20) == -number
            assert not asking(sshd), "it is left behind"
        finally:
            with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)


def runs(session: psutil.Process, name: str) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess): return session.name() == name
    return False


@pytest.mark.parametrize("host", ["good", "mute", "suspended", "hangs"])
def test_each_ssh_of_a_command_that_is_killed_ends_within_twice_the_limit(sshd, host):
    """Of a host that answers, one that is silent before ssh has connected, one that is suspended afterwards.
    Where only the command there hangs, ssh ends with that"""
    with socket.create_server(("127.0.0.1", 0)) as mute, contextlib.ExitStack() as stack:
        sshd.write_config(mute.getsockname()[1])
        command = [sys.executable, "-m", "cjm_fasthtml_resources", "--host", host.replace("suspended", "hangs"),
                   "--host-timeout", "3s", "--json", "--watch", "--interval", "0.1"]
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True))
        stack.callback(process.kill)
        wait_until(lambda: asking(sshd))
        if host in ("suspended", "hangs"): wait_until(lambda: any(runs(p, "sleep") for p in sshd.sessions()))
        sessions = sshd.sessions() if host == "suspended" else []
        for session in sessions:
            session.suspend()
            stack.callback(session.kill)
        process.kill()
        process.wait()
        began = time.monotonic()
        if host == "hangs":
            for session in sshd.sessions():
                if runs(session, "sleep"): session.kill()
        wait_until(lambda: not asking(sshd), told=lambda: f"{asking(sshd)} still run")
        assert time.monotonic() - began < 2*3 + 2


def test_a_connection_that_ssh_keeps_holds_up_nothing(sshd):
    "With ControlPersist the first ssh leaves a process behind, which has its standard error"
    began = time.monotonic()
    for _ in range(2): assert reasons("kept")["kept"] is None
    assert time.monotonic() - began < 19, "it was waited for until the limit"


def test_options_of_the_check_are_passed_on(sshd):
    found = subprocess.run([sys.executable, "-m", "cjm_fasthtml_resources", "--host", "good", "--threshold", "99",
                            "--json"], capture_output=True, text=True, timeout=60)
    assert json.loads(found.stdout)["gpu"]["threshold_percent"] == 99, found.stderr


def test_a_host_that_comes_back_is_asked_as_before(sshd):
    allowed = (sshd.folder/"allowed").read_text()
    (sshd.folder/"allowed").write_text("")
    assert "refused the key" in reasons("good")["good"]
    (sshd.folder/"allowed").write_text(allowed)
    assert reasons("good")["good"] is None


def test_nothing_is_left_running(sshd):
    assert reasons("hangs", timeout=1)["hangs"] == "it did not respond within 1 s"
    wait_until(lambda: not asking(sshd), told=lambda: f"{asking(sshd)} still run")
    threads = threading.active_count()
    reasons("good")
    assert threading.active_count() == threads


def test_an_agent_asks_another_machine(sshd, monkeypatch):
    "The server is started by ssh; when the connection is lost, it ends with what it has reserved"
    mcp = pytest.importorskip("mcp", reason="no mcp: pip install '.[mcp]'")
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(sshd.folder))

    def claims() -> int: return len(Ledger(Store(store_path())).claims())

    async def run():
        command = ["-c", f"echo $$ > {sshd.folder}/connection; exec ssh agent cjm-resources mcp"]
        parameters = mcp.StdioServerParameters(command="sh", args=command, env={"PATH": os.environ["PATH"]})
        with contextlib.suppress(Exception):   # the connection is lost
            async with mcp.Client(mcp.stdio_client(parameters)) as client:
                held = await client.call_tool("reserve", dict(gpu_memory_mb=4000, ttl=600))
                found.append((held.is_error, claims()))
                os.kill(int((sshd.folder/"connection").read_text()), signal.SIGKILL)
                await asyncio.to_thread(wait_until, lambda: not claims())
    found = []
    asyncio.run(run())
    assert found == [(False, 1)]
    wait_until(lambda: not claims())
