#!/usr/bin/env python3
"""Run every test, in environments that it makes for itself; needs Python 3.10 or later and nothing else (3.11 for the site).

    python3 tools/check.py

In .venvs/dev are nbdev 2 and fastcore 1, which the notebooks are made with; in .venvs/clean is the built wheel with the
newest fastcore and no nbdev, as a user has it. Closes with 'N passed, N failed' over all steps.
"""
import hashlib, os, re, shutil, subprocess, sys, tempfile, venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT/".venvs"
MADE = ("nbs", "cjm_fasthtml_resources", "README.md")  # what the notebooks make, besides themselves


class Step(NamedTuple):
    title: str
    passed: int
    failed: int
    failures: tuple[str, ...] = ()  # what it says of each


def environment(name: str, *requirements: str) -> Path:
    "A new virtual environment with the requirements; the folder of its programs"
    path = VENVS/name
    print(f"\n== making the environment {name}", flush=True)
    venv.EnvBuilder(with_pip=True, clear=True).create(path)
    programs = path/("Scripts" if os.name == "nt" else "bin")
    subprocess.run([programs/"python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements], cwd=ROOT, check=True)
    return programs


def run(title: str, programs: Path, *command: str, cwd: Path = ROOT) -> Step:
    "One step; it counts as one where it does not say how many passed and failed in it"
    print(f"\n== {title}: {' '.join(command)}", flush=True)
    env = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"}
    process = subprocess.Popen([programs/command[0], *command[1:]], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    output = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        output += line
    passed, failed = (sum(map(int, re.findall(rf"(\d+) {word}", output.rstrip().rpartition("\n")[2]))) for word in ("passed", "failed"))
    if process.wait(): return Step(title, passed, failed or 1, tuple(re.findall(r"^(?:FAILED|ERROR) .*|^.* - MORE THAN .*|^\S+\.ipynb, code cell .*", output, re.MULTILINE)))
    return Step(title, passed if passed or failed else 1, failed)


def contents() -> dict[str, str]:
    "A fingerprint of every file that is made from the notebooks"
    files = [path for name in MADE for path in ([ROOT/name] if (ROOT/name).is_file() else (ROOT/name).rglob("*"))]
    return {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file() and "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts}


def unchanged(before: dict[str, str]) -> Step:
    "Whether cleaning, exporting and building left every file as it was: none is unclean, and none differs from its notebook"
    after = contents()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in changed: print(f"{name} was not as its notebook makes it: run nbdev_export, nbdev_clean and tools/readme.py, and commit")
    return Step("made anew", int(not changed), len(changed), tuple(changed))


def provide(package: str, *programs: str) -> None:
    "What the tests use of the system's packages; where that cannot be, the tests say what is missing"
    if any(map(shutil.which, programs)): return
    if not shutil.which("apt-get") or os.geteuid() != 0: return print(f"no {package}, so what needs it is not tested: apt-get install {package} (as root)", flush=True)
    print(f"\n== installing {package}", flush=True)
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", package]):
        subprocess.run(command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def development() -> list[Step]:
    "The notebooks, the modules, the README and the site"
    provide("chromium", "chromium", "chromium-browser", "google-chrome")
    provide("prometheus", "prometheus")
    programs = environment("dev", "-e", ".[dev,web,prometheus,cluster,browser]")
    before = contents()
    # what makes the pages needs Python 3.11; with 3.10 all else is tested
    site = [run("site", programs, "python", "tools/docs.py")] if sys.version_info >= (3, 11) else []
    return [
        *site,
        run("export the modules", programs, "nbdev_export"), run("clean the notebooks", programs, "nbdev_clean"),
        run("README", programs, "python", "tools/readme.py", "--check"), run("pictures", programs, "python", "tools/pictures.py", "--check"),
        run("types", programs, "mypy"), run("notebooks", programs, "python", "tools/notebooks.py"),
        run("nbdev's own tests", programs, "nbdev_test", "--n_workers", "2"), run("tests", programs, "python", "-m", "pytest", "-q", "tests", "--ignore=tests/browser"),
        run("in a browser", programs, "python", "-m", "pytest", "-q", "tests/browser"),
        run("the saved figures", programs, "python", "benchmarks/run.py", "--short"),
        unchanged(before)]


def as_installed() -> list[Step]:
    "The wheel, where there is neither nbdev nor this folder's package"
    dev = VENVS/"dev"/("Scripts" if os.name == "nt" else "bin")
    with tempfile.TemporaryDirectory() as tmp:
        built = run("build", dev, "python", "-m", "build", "--outdir", tmp)
        wheel = next(Path(tmp).glob("*.whl"))
        programs = environment("clean", f"{wheel}[web,prometheus,cluster]", "fastcore>=2", "pytest>=8", "hypothesis>=6.100", "jsonschema>=4.20", "httpx>=0.27")
        where = run("installed, not from this folder", programs, "python", "-I", "-c",
                    "import cjm_fasthtml_resources as c, fastcore, sys; assert c.__file__.startswith(sys.prefix), c.__file__; assert fastcore.__version__ >= '2'; "
                    "import importlib.util as u; assert u.find_spec('nbdev') is None; print(c.__file__, 'with fastcore', fastcore.__version__)", cwd=Path(tmp))
        for name in ("tests", "nbs", "benchmarks", "examples", "README.md", ".ci", "settings.ini", "tools"):  # not the package: what is tested is what is installed
            (shutil.copytree if (ROOT/name).is_dir() else shutil.copy)(ROOT/name, Path(tmp)/name)
        return [built, where, run("tests against the wheel", programs, "python", "-P" if sys.version_info >= (3, 11) else "-s", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "--ignore=tests/browser", cwd=Path(tmp))]


def main() -> int:
    steps = [*development(), *as_installed()]
    for step in steps:
        if step.failed: print(f"\n== failed: {step.title}", *step.failures, sep="\n")
    passed, failed = (sum(getattr(step, word) for step in steps) for word in ("passed", "failed"))
    print(f"\n{passed} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
