#!/usr/bin/env python3
"""Run every test, in environments that it makes for itself; needs Python 3.10 or later and nothing else (3.11 for the
site).

    python3 tools/check.py
    python3 tools/check.py --wheel dist/NAME.whl      only what is tested of an installed wheel, of this one

In .venvs/dev are nbdev 2 and fastcore 1, which the notebooks are made with; in .venvs/clean is the built wheel with the
newest fastcore and no nbdev, as a user has it. Closes with 'N passed, N failed' over all steps.
"""
import contextlib
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT/".venvs"
BIN = "Scripts" if os.name == "nt" else "bin"
LIMIT = 2400   # seconds for one step: twice what the longest takes on two quiet cores
# a test that hangs fails with the stack of every thread, and the others go on
PYTEST = ("python", "-m", "pytest", "-q", "--timeout", "300", "--durations", "10")
RUNNING = set[subprocess.Popen]()   # the steps that have not ended
# half of the tests, by the time that they take. First those that keep one core busy and measure no time: every error at
# every call, every line, every state
HALF = [f"tests/test_{name}.py" for name in
        ("walks", "model", "degraded", "secrets", "docs", "validation", "blocks", "faults", "job_ends", "run",
         "gpu_run", "folder", "queue", "programs")]
MADE = ("nbs", "cjm_fasthtml_resources", "README.md")  # what the notebooks make, besides themselves

# lines of a step's output that show what failed: of pytest, benchmarks/run.py, tools/notebooks.py, ruff and codespell
COMPLAINT = re.compile(r"^(?:FAILED|ERROR) .*|^.* - MORE THAN .*|^\S+\.ipynb, code cell .*|^\S+:\d+:(?:\d+:)? .*", re.M)


class Step(NamedTuple):
    title: str
    passed: int
    failed: int
    failures: tuple[str, ...] = ()  # what it says of each


def environment(name: str, *requirements: str) -> Path:
    "A new virtual environment with the requirements; the folder of its programs"
    print(f"\n== making the environment {name}", flush=True)
    venv.EnvBuilder(with_pip=True, clear=True).create(VENVS/name)
    programs = VENVS/name/BIN
    install = [programs/"python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *requirements], cwd=ROOT, check=True)
    return programs


def kill(process: subprocess.Popen, number: int) -> None:
    "Send a signal to a step and what it has started; Windows knows the step alone"
    if os.name == "nt": process.kill()
    else:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, number)


def wait(process: subprocess.Popen) -> int:
    "Wait for a step, at most `LIMIT` seconds, and end what it leaves behind; its exit code"
    try: return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        print(f"\n== a step did not end within {LIMIT} s", flush=True)
        kill(process, signal.SIGABRT)   # pytest says where each of its threads is
        with contextlib.suppress(subprocess.TimeoutExpired): process.wait(10)
        return 1
    finally: kill(process, signal.SIGABRT if os.name == "nt" else signal.SIGKILL)


def run(title: str, programs: Path, *command: str, cwd: Path = ROOT, out: TextIO = sys.stdout) -> Step:
    "One step; it counts as one where it does not say how many passed and failed in it"
    print(f"\n== {title}: {' '.join(command)}", file=out, flush=True)
    places = (programs, os.environ.get("PATH", ""), VENVS/"debian"/"usr"/"sbin")
    env = {**os.environ, "PATH": os.pathsep.join(map(str, places))}
    process = subprocess.Popen([programs/command[0], *command[1:]], cwd=cwd, env=env, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               start_new_session=True)
    RUNNING.add(process)
    began = time.monotonic()
    lines = list[str]()
    def show() -> None:
        for line in process.stdout:
            print(line, end="", file=out, flush=True)
            lines.append(line)

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    code = wait(process)
    RUNNING.discard(process)
    reader.join(10)   # what a step leaves behind can hold its output open
    print(f"== {title}: {time.monotonic() - began:.0f} s", file=out, flush=True)
    output = "".join(lines)
    passed, failed = counted(output, "passed"), counted(output, "failed")
    if code: return Step(title, passed, failed or 1, tuple(COMPLAINT.findall(output)))
    return Step(title, passed if passed or failed else 1, failed)


def counted(output: str, word: str) -> int:
    "The number before a word in the last line of a step's output"
    return sum(map(int, re.findall(rf"(\d+) {word}", output.rstrip().rpartition("\n")[2])))


def contents() -> dict[str, str]:
    "A fingerprint of every file that is made from the notebooks"
    places = [ROOT/name for name in MADE]
    files = [path for place in places for path in ([place] if place.is_file() else place.rglob("*"))]
    ignored = {"__pycache__", ".ipynb_checkpoints", ".ruff_cache"}   # of tools, not of the notebooks
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files if path.is_file() and not ignored & set(path.parts)}


def unchanged(before: dict[str, str]) -> Step:
    "Whether cleaning, exporting and building left every file as it was: clean, and as its notebook makes it"
    after = contents()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in changed:
        print(f"{name} is not as its notebook makes it: run nbdev_export, nbdev_clean, tools/readme.py, and commit")
    return Step("made anew", int(not changed), len(changed), tuple(changed))


def provide(package: str, *programs: str) -> None:
    "What the tests use of the system's packages; where that cannot be, the tests say what is missing"
    if any(map(shutil.which, programs)): return
    if not shutil.which("apt-get") or os.geteuid() != 0:
        print(f"no {package}, so what needs it is not tested: apt-get install {package} (as root)", flush=True)
        return
    print(f"\n== installing {package}", flush=True)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", package]):
        subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def unpack(package: str, *programs: str) -> None:
    "A program of a Debian package in .venvs/debian, without being root; installed, it would be started as a service"
    folder = VENVS/"debian"
    if any(map(shutil.which, programs)) or any((folder/"usr"/"sbin"/name).exists() for name in programs): return
    folder.mkdir(parents=True, exist_ok=True)
    quiet = dict(cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if shutil.which("apt-get") and os.geteuid() == 0: subprocess.run(["apt-get", "update", "-qq"], **quiet)
    if shutil.which("apt-get"): subprocess.run(["apt-get", "download", "-qq", package], **quiet)
    found = list(folder.glob(f"{package}_*.deb"))
    for path in found: subprocess.run(["dpkg-deb", "--extract", path, folder], check=True)
    if not found: print(f"no {package}, so what needs it is not tested: apt-get install {package}", flush=True)


def static_checks(programs: Path) -> list[Step]:
    "The checks that read files and run none: Python first, then style sheets and scripts, then words"
    biome = ["biome", "ci", "--colors=off"] if (programs/"biome").exists() else []   # a wheel for Linux on x86_64 alone
    return [
        run("lint", programs, "ruff", "check", "--output-format", "concise"),
        *([run("style sheets and script", programs, *biome)] if biome else []),
        run("types", programs, "mypy"),
        run("spelling", programs, "codespell"),
        *([run("prose", programs, "python", "tools/lint_prose.py")] if sys.platform == "linux" else []),
        run("habits of writing", programs, "python", "tools/prose.py"),
    ]


def beside(steps: Callable[[], list[Step]], title: str, *pytest: str) -> list[Step]:
    "Run steps, and tests at the same time, whose output is shown after that of the steps"
    with ThreadPoolExecutor() as pool, io.StringIO() as told:
        other = pool.submit(run, title, VENVS/"dev"/BIN, *PYTEST, *pytest, out=told)
        try: done = [*steps(), other.result()]
        finally:   # after Ctrl-C, all of them end
            for process in [*RUNNING]: kill(process, signal.SIGABRT if os.name == "nt" else signal.SIGKILL)
        print(told.getvalue(), flush=True)
    return done


def tests() -> list[Step]:
    "The tests under pytest that need neither a browser nor the notebooks, whose cells run once more against the wheel"
    apart = ("tests/browser", "tests/test_examples.py", *HALF)
    return [run("tests", VENVS/"dev"/BIN, *PYTEST, "tests", *(f"--ignore={path}" for path in apart))]


def development() -> list[Step]:
    "The notebooks, the modules, the README and the site"
    provide("chromium", "chromium", "chromium-browser", "google-chrome")
    provide("prometheus", "prometheus")
    unpack("nginx", "nginx", "/usr/sbin/nginx")
    unpack("openssh-server", "sshd", "/usr/sbin/sshd")
    provide("strace", "strace")
    provide("spin", "spin")
    provide("gcc", "cc", "gcc")   # spin writes a program in C
    programs = environment("dev", "-e", ".[dev,web,prometheus,cluster,browser,servers,notify,mcp]")
    before = contents()
    # what makes the pages needs Python 3.11; with 3.10 all else is tested
    site = [run("site", programs, "python", "tools/docs.py")] if sys.version_info >= (3, 11) else []
    return [
        *site,
        run("export the modules", programs, "nbdev_export"),
        run("clean the notebooks", programs, "nbdev_clean"),
        run("README", programs, "python", "tools/readme.py", "--check"),
        run("pictures", programs, "python", "tools/pictures.py", "--check"),
        *static_checks(programs),
        run("notebooks", programs, "python", "tools/notebooks.py"),
        run("nbdev's own tests", programs, "nbdev_test", "--n_workers", "2"),
        *beside(tests, "the other half of the tests", *HALF),
        run("the saved figures", programs, "python", "benchmarks/run.py", "--short"),
        unchanged(before)]


INSTALLED = """import importlib.util, sys
import fastcore, cjm_fasthtml_resources as installed
assert installed.__file__.startswith(sys.prefix), installed.__file__
assert fastcore.__version__ >= '2' and importlib.util.find_spec('nbdev') is None
print(installed.__file__, 'with fastcore', fastcore.__version__)"""


# what can differ where it is installed: every notebook's examples, what comes along as data, commands, pages, metrics
OF_A_WHEEL = ("app", "arguments", "cli", "cluster", "examples", "job_app", "live", "metrics", "package", "pickle",
              "prefix", "report", "settings", "states")


def build(folder: Path) -> tuple[Step, Path]:
    "Build the wheel in a folder"
    step = run("build", VENVS/"dev"/BIN, "python", "-m", "build", "--outdir", str(folder))
    return step, next(folder.glob("*.whl"))


def as_installed(given: Path | None = None) -> list[Step]:
    "A wheel, this one or one that is built, where there is neither nbdev nor this folder's package"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built, wheel = (None, given.resolve()) if given else build(folder)
        programs = environment("clean", f"{wheel}[web,prometheus,cluster,mcp,marimo]", "fastcore>=2", "pytest>=8",
                               "pytest-timeout>=2.3", "hypothesis>=6.100", "jsonschema>=4.20", "httpx>=0.27")
        where = run("installed, not from this folder", programs, "python", "-I", "-c", INSTALLED, cwd=folder)
        # not the package: what is tested is what is installed
        for copied in ("tests", "nbs", "benchmarks", "examples", "README.md", "CONTRIBUTING.md", ".ci", "settings.ini",
                       "tools"):
            (shutil.copytree if (ROOT/copied).is_dir() else shutil.copy)(ROOT/copied, folder/copied)
        isolated = "-P" if sys.version_info >= (3, 11) else "-s"
        tests = run("tests against the wheel", programs, "python", isolated, *PYTEST[1:],
                    "-p", "no:cacheprovider", *(f"tests/test_{name}.py" for name in OF_A_WHEEL), cwd=folder)
        return [*([built] if built else []), where, tests]


def main() -> int:
    wheel = Path(sys.argv[2]) if sys.argv[1:2] == ["--wheel"] else None
    steps = as_installed(wheel) if wheel else [*development(), *beside(as_installed, "in a browser", "tests/browser")]
    for step in steps:
        if step.failed: print(f"\n== failed: {step.title}", *step.failures, sep="\n")
    passed, failed = (sum(getattr(step, word) for step in steps) for word in ("passed", "failed"))
    print(f"\n{passed} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
