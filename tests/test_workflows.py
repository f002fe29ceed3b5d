"The workflows: they parse, they name every Python that is supported, and nothing is published that was not checked"
import json
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

sys.path.insert(0, str(ROOT/"tools"))

import licences  # noqa: E402  (next to the tests, not among them)

WORKFLOWS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
             for path in (ROOT/".github"/"workflows").glob("*.yml")}
SETTINGS = dict(re.findall(r"^(\w+) = (.*)$", (ROOT/"settings.ini").read_text(encoding="utf-8"), re.M))


def matrices(workflow):
    return {name: job["strategy"]["matrix"]["python"] for name, job in workflow["jobs"].items() if "strategy" in job}


def commands(job): return "\n".join(step.get("run", "") for step in job["steps"])


def needed(jobs, name):
    "A job, and all that has to succeed before"
    before = jobs[name].get("needs", [])
    before = [before] if isinstance(before, str) else before
    return {name}.union(*(needed(jobs, other) for other in before))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_each_step_does_something_and_has_a_time_limit_where_it_runs_programs(name):
    for job in WORKFLOWS[name]["jobs"].values():
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
        assert "timeout-minutes" in job or not commands(job).strip()


def test_both_workflows_run_on_every_python_that_is_supported():
    least = int(SETTINGS["min_python"].removeprefix("3."))
    supported = [f"3.{minor}" for minor in range(least, 15)]
    assert matrices(WORKFLOWS["ci"]) == {"check": supported}
    assert matrices(WORKFLOWS["release"]) == {"examples": supported}   # numbers would make 3.10 into 3.1


def test_what_is_published_was_tested_built_and_checked():
    jobs = WORKFLOWS["release"]["jobs"]
    publishing = [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})]
    assert sorted(publishing) == ["site", "wheel"]
    for name in publishing:
        before = "\n".join(commands(jobs[other]) for other in needed(jobs, name))
        for command in (".ci/run", "python -m build", "twine check --strict", "check-wheel-contents",
                        "pip-audit --strict", "tools/licences.py", "tools/check.py --wheel"):
            assert command in before, command


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_programs_of_this_folder_that_it_runs_are_there(name):
    text = "\n".join(commands(job) for job in WORKFLOWS[name]["jobs"].values())
    found = set(re.findall(r"(?:tools|\.ci)/[\w./]+", text))
    assert found and all((ROOT/path).exists() for path in found)


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## (\S+)", (ROOT/"CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1]
    assert newest == SETTINGS["version"]


@pytest.mark.parametrize(("licence", "wrong"), [
    ("MIT", False), ("BSD License", False), ("MPL-2.0 AND MIT", False), ("Apache-2.0 OR BSD-2-Clause", False),
    ("GPL-3.0-only", True), ("MIT; GNU General Public License v3 (GPLv3)", True), ("MIT AND AGPL-3.0", True),
    ("UNKNOWN", True), ("Other/Proprietary License", True)])
def test_licences_that_bind_the_users_own_code_are_refused(licence, wrong):
    assert licences.refused({"License": licence}) is wrong


def test_the_licences_of_an_environment_are_listed(monkeypatch, capsys):
    rows = [{"Name": name, "Version": "1.0", "License": text} for name, text in
            (("pip", "MIT"), ("cjm-fasthtml-resources", "UNKNOWN"), ("good", "MIT"), ("bad", "AGPL-3.0"))]
    done = subprocess.CompletedProcess([], 0, json.dumps(rows))
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: done)
    monkeypatch.setattr(sys, "argv", ["licences.py", "python"])
    assert licences.main() == 1
    shown = capsys.readouterr().out
    assert "bad: 'AGPL-3.0' is not a licence" in shown and shown.endswith("1 passed, 1 failed\n")
    assert "pip " not in shown and "UNKNOWN" not in shown
