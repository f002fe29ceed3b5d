"""What the pages tell people to type, besides the cells that nbdev_test runs: each command is one, each extra exists,
each block of Python runs
"""
import ast
import builtins
import configparser
import doctest
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from fnmatch import fnmatch
from pathlib import Path

import click
import pytest
from conftest import GIB

import cjm_fasthtml_resources
from cjm_fasthtml_resources import _modidx
from cjm_fasthtml_resources.cli import main
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.recorded.file import add
from cjm_fasthtml_resources.recorded.rows import Place, Row
from cjm_fasthtml_resources.simulate import SimulatedDriver, SimulatedGpu

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT/"nbs"/"index.ipynb", *(ROOT/"nbs"/"tutorials").glob("*.ipynb")])


def text(path: Path) -> str:
    if path.suffix != ".ipynb": return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(path), re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    "What is typed in a shell, in blocks and within sentences, without comments and without what is set before it"
    lines = [line for block in blocks(path, "sh") for line in block.splitlines()]
    lines += re.findall(r"`((?:\w+=\S+ )?(?:cjm-resources|pip install) [^`]+)`", text(path))
    separator = r"(?:&&|;)(?=(?:[^']*'[^']*')*[^']*$)"  # not within quotes
    found = [shlex.split(part, comments=True) for line in lines for part in re.split(separator, line)]
    return [words[next(i for i, word in enumerate(words) if not re.match(r"\w+=", word)):] for words in found if words]


def check_command(words: list[str]) -> None:
    "Parse it as the command would; raises `click.UsageError`"
    context = main.make_context("cjm-resources", [w for w in words[1:] if w not in (">", "/dev/null")])
    if rest := [*getattr(context, "_protected_args", []), *context.args]:
        name, command, arguments = main.resolve_command(context, rest)
        if arguments: command.make_context(name, arguments, parent=context)  # else a sentence only names it


SYSTEMS = "echo", "groupadd", "groupdel", "rm", "usermod"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_what_is_typed_in_a_shell_is_a_command(path):
    settings = configparser.ConfigParser()
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    for words in commands(path):
        words = [word.removeprefix("$(command -v ").removesuffix(")") for word in words[words[0] == "sudo":]]
        first, *rest = words
        program = Path(first).name
        if program == "cjm-resources": check_command(words)
        elif program in ("pip", "python3", "python"):
            for extras in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
                known = [f"{extra}_requirements" in settings["DEFAULT"] for extra in extras.split(",")]
                assert all(known), (path.name, words)
            files = [word for word in rest if word.endswith(".py") and "/" in word]
            assert all((ROOT/file).is_file() for file in files), (path.name, words)
        # the first is run by test_cluster.py, the second is an agent, the third needs a container's engine
        else: assert program in ("dask", "claude", "docker", *SYSTEMS), (path.name, words)


def test_a_command_that_is_none_would_be_found():
    for wrong in (["--no-such"], ["wait", "--timeot", "1m"], ["wiat"], ["serve", "--port", "x"]):
        with pytest.raises(click.UsageError): check_command(["cjm-resources", *wrong])


LINES = [line for path in PAGES for block in blocks(path, "sh") for line in block.splitlines()]
TYPED = sorted({line.partition(" #")[0].strip() for line in LINES if re.match(r"(\w+=\S+ )?cjm-resources", line)})


# `ssh` that leads to a simulated machine
PRETENDED_SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
exec sh -c "$3 --simulate idle"
"""


@pytest.mark.parametrize("line", TYPED)
def test_a_command_in_a_block_runs(line, tmp_path):
    "On a simulated idle machine where it names none; what goes on until Ctrl-C gets it"
    (tmp_path/"train.py").write_text("print('trained')")
    (tmp_path/"ssh").write_text(PRETENDED_SSH)
    (tmp_path/"ssh").chmod(0o700)
    is_whole = "--simulate" in line or "--host " in line
    command = line if is_whole else line.replace("cjm-resources", "cjm-resources --simulate idle", 1)
    command = command.replace("sleep 60", "sleep 0.1")
    endless = "--watch" in line or " serve" in line or line.endswith(" record")
    if " serve" in line: command += " --port 0"
    if " history " in line:   # which reads a record
        gpu = Place("GPU-1", 0, "NVIDIA L4", "available", GIB, 0, 0, 0, 0, 0, 0, 0, 40, 30.0)
        add(tmp_path/"state"/"history.sqlite3", [Row(time.time() - 60, 60.0, (gpu,))])
    if line.endswith(" record"): command += " --file history.sqlite3"   # what is simulated needs a file of its own
    if endless and "=" not in command.split()[0]: command = f"exec {command}"
    programs = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": programs, "CJM_RESOURCES_DIR": str(tmp_path/"state"), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(["sh", "-c", command], env=env, cwd=tmp_path, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        if endless:
            shown = process.stdout.readline()
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    if endless: out = shown + out
    silent = "/dev/null" in line or "sleep" in line or line.endswith(" mcp")   # which has nobody to talk to
    assert "Traceback" not in err and (out + err or silent), err
    if "train.py" in line and "shared" not in line: assert out.strip() == "trained" and process.returncode == 0
    elif " release " in line: assert "No reservation has the ID 1." in err   # test_share.py runs the lines together
    elif not endless and "exit" not in line and "shared" not in line: assert process.returncode == 0, err


def test_blocks_of_yaml_are_yaml():
    "Prometheus' own are run by test_metrics.py; a Pod mounts the host's /proc where it is looked for"
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    found = [yaml.safe_load(block) for path in PAGES for block in blocks(path, "yaml")]
    (pod,) = [x["spec"] for x in found if x.get("kind") == "Pod"]
    (volume,), ((mount,),) = pod["volumes"], [c["volumeMounts"] for c in pod["containers"]]
    assert (mount["mountPath"], mount["readOnly"], mount["name"]) == ("/host/proc", True, volume["name"])
    assert volume["hostPath"]["path"] == "/proc"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_blocks_of_python_that_are_shown_only_run(path, monkeypatch, tmp_path):
    monkeypatch.setenv("CJM_RESOURCES_DIR", str(tmp_path/"state"))
    monkeypatch.chdir(tmp_path)   # FastHTML() writes a key into the current folder
    shown = [block for block in blocks(path, "python") if ">>>" not in block]
    if not shown: return
    pytest.importorskip("fasthtml", reason="the extra web is not installed")
    from fasthtml.common import FastHTML

    from cjm_fasthtml_resources import ResourcePanel
    from cjm_fasthtml_resources.ui.web import resource_routes
    imported = {"FastHTML": FastHTML, "ResourceManager": ResourceManager, "ResourcePanel": ResourcePanel,
                "resource_routes": resource_routes}
    with SimulatedDriver([SimulatedGpu()]):
        for block in shown:
            names = {**imported, "manager": ResourceManager(), "app": FastHTML(secret_key="of a test")}
            monkeypatch.setattr("fasthtml.common.serve", lambda *args, **kwargs: None)
            exec(compile(block, path.name, "exec"), names)
    from cjm_fasthtml_resources.ui.panel import open_panels
    for _, _, panel in list(open_panels): panel.close()


def test_each_page_says_what_it_is_and_stands_in_the_sidebar():
    sidebar = (ROOT/"nbs"/"sidebar.yml").read_text(encoding="utf-8")
    for path in sorted((ROOT/"nbs").rglob("[!_.]*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        assert str(path.relative_to(ROOT/"nbs")) in sidebar, f"{path.name} is not in the sidebar"
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        complaint = f"{path.name} does not begin with a cell of a title and a sentence; nbdev drops what else is in it"
        assert re.fullmatch(r"# .+\n+> .+", first), complaint


def the_map() -> str:
    "What CONTRIBUTING.md says of the rooms: a diagram, and a table"
    whole = (ROOT/"CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.search(r"^## The map\n(.*?)^## ", whole, re.DOTALL | re.MULTILINE)[1]


def exported() -> dict[str, str]:
    "What each notebook that makes a module exports"
    notebooks = {path.relative_to(ROOT/"nbs").with_suffix("").as_posix(): json.loads(path.read_text(encoding="utf-8"))
                 for path in (ROOT/"nbs").rglob("[!_.]*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    cells = {name: ["".join(cell["source"]) for cell in found["cells"]] for name, found in notebooks.items()}
    return {name: "\n".join(cell for cell in found if cell.startswith("#| export")) for name, found in cells.items()
            if any(cell.startswith("#| default_exp") for cell in found)}


def test_the_map_names_every_room_and_no_other():
    first_cells = [line.split("|")[1] for line in the_map().splitlines() if line.startswith("| `")]
    named = re.findall(r"`([\w/*]+)`", " ".join(first_cells))
    rooms = list(exported())
    assert [room for room in rooms if not any(fnmatch(room, name) for name in named)] == []
    assert [name for name in named if not any(fnmatch(room, name) for room in rooms)] == []


def test_the_arrows_of_the_map_are_imports():
    names = dict(re.findall(r"(\w+)\[([\w/*]+)\]", the_map()))
    steps = [[re.findall(r"(\w+)(?:\[[^\]]*\])?", part) for part in line.split("-->")]
             for line in the_map().splitlines() if "-->" in line and not line.startswith("    read")]
    arrows = [(names[a], names[b]) for line in steps for sources, targets in zip(line, line[1:], strict=False)
              for a in sources for b in targets]
    assert len(arrows) > 40

    def imports(importer: str, imported: str) -> bool:
        package, _, module = f"cjm_fasthtml_resources.{imported}".replace("/", ".").rpartition(".")
        leaf = r"\w+" if module == "*" else module
        pattern = rf"from {re.escape(package)}(?:\.{leaf} import|\b import .*\b{leaf}\b)"
        return re.search(pattern, exported()[importer]) is not None

    assert [arrow for arrow in arrows if not imports(arrow[1], arrow[0])] == []


def test_each_test_that_watch_it_live_names_is_there():
    page = text(ROOT/"nbs"/"tutorials"/"live.ipynb")
    rows = re.findall(r"^\|.*\|([^|]*`tests/[^|]*)\|$", page, re.MULTILINE)
    assert len(rows) >= 8
    for row in rows:
        files = [ROOT/name for name in re.findall(r"`(tests/[\w/]+\.py)`", row)]
        tests = re.findall(r"`(test_\w+)…`", row)
        assert files and all(any(f"def {name}" in path.read_text() for path in files) for name in tests), row


@pytest.fixture
def site(tmp_path, monkeypatch):
    "tools/docs.py with an empty site, and what writes a file of it"
    monkeypatch.syspath_prepend(ROOT/"tools")
    import docs
    monkeypatch.setattr(docs, "SITE", tmp_path)

    def write(name: str, content: str) -> Path:
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(content, encoding="utf-8")
        return tmp_path/name

    return docs, write


@pytest.mark.parametrize("name, content, address", [
    ("a.html", '<script src="https://cdn.test/a.js"></script>', "https://cdn.test/a.js"),
    ("a.html", '<link rel="stylesheet" href="//cdn.test/a.css">', "//cdn.test/a.css"),
    ("a.html", '<img src="http://cdn.test/a.png">', "http://cdn.test/a.png"),
    ("a.html", '<style>@import "https://cdn.test/b.css";</style>', "https://cdn.test/b.css"),
    ("a.html", '<p style="background: url(https://cdn.test/b.png)">', "https://cdn.test/b.png"),
    ("a.html", '<script type="module">import m from "https://cdn.test/m.js"</script>', "https://cdn.test/m.js"),
    ("a.css", "@import url(https://fonts.test/css2?family=Lato);", "https://fonts.test/css2?family=Lato"),
    ("a.css", '@font-face { src: url("https://fonts.test/a.woff2") }', "https://fonts.test/a.woff2"),
    ("a.js", 'fetch("https://api.test/x")', "https://api.test/x")])
def test_a_page_that_fetches_from_another_site_is_found(site, name, content, address):
    docs, write = site
    path = write(name, content)
    pages = {path: docs.Page(path)} if path.suffix == ".html" else {}
    assert docs.fetched_from_elsewhere(pages) == {path: [address]}


def test_a_link_to_another_site_fetches_nothing(site):
    docs, write = site
    page = write("a.html", '<a href="https://other.test/">x</a><img src="a.png"><link rel="icon" href="a.svg">'
                           '<a href="#x" style="color: red"></a><script>const at = "https://other.test/";</script>')
    write("a.svg", '<svg xmlns="http://www.w3.org/2000/svg"></svg>')
    assert docs.fetched_from_elsewhere({page: docs.Page(page)}) == {}


def test_the_fonts_of_a_theme_are_not_fetched(site):
    docs, write = site
    write("site_libs/fuse/fuse.min.js", "")
    font = "@import url(https://fonts.test/css2?family=Lato:wght@300;400&display=swap);"
    theme = write("site_libs/themes/cosmo.min.css", font + "body{color:red}")
    docs.keep_inside()
    assert theme.read_text() == "body{color:red}"


def test_pictures_open_large_and_sentences_wrap(site):
    docs, write = site
    table = '<div class="cell-output cell-output-stdout">\n<pre><code>GPU  memory\n0    1 GiB</code></pre></div>'
    page = write("core/a.html", '<a href="https://published.test/ui/b.html">b</a><p><img src="../b.png" width="3"></p>'
                 '<a href="c.html"><img src="c.png"></a><img src="data:image/png;base64,x">' + table +
                 '<div class="cell-output cell-output-stdout"><pre><code>One GPU is free.</code></pre></div>')
    docs.finish(page, "https://published.test/")
    text = page.read_text()
    assert 'href="../ui/b.html"' in text
    assert '<a class="picture" href="../b.png"><img src="../b.png" width="3"></a>' in text
    assert text.count('class="picture"') == 1
    assert table in text and '<pre class="sentences"><code>One GPU is free.' in text


def test_a_frequent_question_leads_to_a_page(site):
    docs, write = site
    questions = json.loads((ROOT/"tools"/"site"/"questions.json").read_text(encoding="utf-8"))
    pages = {question["page"] for question in questions}
    assert {page for page in pages if not (ROOT/"nbs"/page).with_suffix(".ipynb").is_file()} == set()
    shown = sorted(pages)[1:]
    index = write("search.json", json.dumps([dict(href=f"{page}#x", title=page) for page in shown]))
    missing = docs.add_questions()
    assert missing and all(sorted(pages)[0] in line for line in missing)
    assert len(json.loads(index.read_text())) == len(questions) + len(shown)


def test_the_site_shows_the_version():
    import yaml
    settings = configparser.ConfigParser()
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    website = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))["website"]
    assert settings["DEFAULT"]["version"] in [entry["text"] for entry in website["navbar"]["right"]]
    assert (ROOT/"nbs"/"_quarto.yml").read_text() == (ROOT/"_quarto.yml").read_text()   # Quarto reads the one in nbs


def anchors(text: str) -> set[str]:
    "The anchors that GitHub gives the headings of a Markdown text, and those that the text sets itself"
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)
    found: list[str] = re.findall(r"""<a (?:id|name)=["']([^"']+)""", text)
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", text, re.M):
        name = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", name).replace(" ", "-")
        number = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in found)
        found.append(f"{name}-{number}" if number else name)
    return set(found)


def dead(path: Path) -> list[str]:
    "The links of a Markdown file to files and anchors that are missing"
    content = re.sub(r"^(```|~~~).*?^\1|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(<?([^)\s>]+)", content)
    links += re.findall(r"^\[[^]]+\]: +(\S+)", content, re.M)
    links += re.findall(r"""\b(?:href|src|srcset)=["']([^"']+)""", content)
    missing = []
    for link in links:
        if re.match(r"[a-z]+:|//", link): continue
        name, _, anchor = link.partition("#")
        target = path.parent/name if name else path
        if not target.exists() or anchor and anchor not in anchors(text(target)): missing.append(link)
    return missing


MARKDOWN = [*ROOT.glob("*.md"), ROOT/"tests"/"README.md", *(ROOT/"benchmarks").glob("*.md")]


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_links_of_markdown_files_lead_somewhere(path):
    assert dead(path) == []


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path/"a.md"
    (tmp_path/"b.md").write_text("# One `call()` more\n## Same\n## Same\n```sh\n# no heading\n```\n")
    page.write_text("# Here\n[1](b.md) [2](b.md#one-call-more) [3](#here) [4](b.md#same-1)\n"
                    "[5](https://x.test/none) `[6](no)`\n[a](none.md) [b](#there) [c](b.md#no-heading)\n"
                    "[d](b.md#same-2) <img src='no.png'>\n\n[e]: gone.md\n")
    assert sorted(dead(page)) == ["#there", "b.md#no-heading", "b.md#same-2", "gone.md", "no.png", "none.md"]


def test_the_prose_linter_finds_and_forgives(monkeypatch):
    pytest.importorskip("proselint")
    monkeypatch.syspath_prepend(ROOT/"tools")
    import lint_prose
    lint_prose.CheckRegistry().register_many(lint_prose.__register__)
    texts = ["It waits.", "It is a very good thing.", "It said \"no\" ... resume it.", "bytes", "bytes", "In bytes"]
    found = list(lint_prose.complaints("a", texts))
    assert len(found) == 1 and found[0].startswith("a:2: weasel_words.very") and "very good thing" in found[0]


IMPORTS = re.compile(r"(?:from|import) (?:.|\n(?=[ )]|from |import ))*$")


def begins_with_use(cells: list[dict]) -> bool:
    "Whether a page shows what a reader would type, or what is printed, before it defines anything"
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            if "```" in source: return True
        elif re.search(r"^#\| *export", source, re.M):
            if re.search(r"^(?:@|class |(?:async )?def [a-z])", source, re.M): return False
        elif not re.match(r"#\| *(?:hide|default_exp)", source) and not IMPORTS.match(source): return True
    return False


API = sorted({path for path in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts} - {*PAGES})


@pytest.mark.parametrize("path", API, ids=lambda p: str(p.relative_to(ROOT/"nbs").with_suffix("")))
def test_a_page_of_the_api_begins_with_what_one_would_type(path):
    assert begins_with_use(json.loads(path.read_text(encoding="utf-8"))["cells"])


def test_a_page_that_begins_with_a_definition_is_found():
    title = dict(cell_type="markdown", source="# core.a")
    hidden = dict(cell_type="code", source="#| hide\nimport a\na.b()")
    imports = dict(cell_type="code", source="from a import (\n    b,\n)\nimport c")
    made = dict(cell_type="code", source="#| export\ndef f(): pass")
    use, block = dict(cell_type="code", source="f()"), dict(cell_type="markdown", source="```py\nf()\n```")
    assert not begins_with_use([title, hidden, imports, made, use])
    assert begins_with_use([title, hidden, imports, use, made]) and begins_with_use([title, block, made])


# names that pages take as given, and their classes; others can be anything, unless they are called
GIVEN = {
    "after": "core.samples.Sample", "before": "core.samples.Sample", "claims": "list[core.claims.Claim]",
    "conflict": "core.conflict.ResourceConflict", "held": "core.reservations.Reservation",
    "history": "recorded.history.RecordedHistory", "ledger": "core.ledger.Ledger", "me": "core.process.ProcessId",
    "manager": "core.manager.ResourceManager", "monitor": "core.monitor.ResourceMonitor", "needs": "core.needs.Needs",
    "notes": "recorded.notes.Notes", "pid": "int", "promise": "core.resources.Promise",
    "request": "core.reservations.Request", "result": "core.validation.ValidationResult",
    "rows": "list[recorded.rows.Row]", "sample": "core.samples.Sample", "snapshot": "core.gpu.GpuSnapshot",
    "uses": "list[core.claims.DeviceUse]", "wakers": "core.waking.Wakers", "workers": "core.workers.Workers"}

MISUSE = ("arg-type", "attr-defined", "call-arg", "call-overload", "index", "misc", "name-defined", "operator",
          "unused-coroutine")   # mypy's codes


def defined() -> dict[str, list[str]]:
    "The modules that define a function or class of the library"
    found: dict[str, list[str]] = {}
    for names in _modidx.d["syms"].values():
        for module, _, name in (each.rpartition(".") for each in names):
            if module in _modidx.d["syms"]: found.setdefault(name, []).append(module)
    return found


def as_module(module: str, shown: list[str], known: dict[str, list[str]]) -> str:
    "The Python on a page as a module that imports names of the library, and takes others as arguments"
    examples = [doctest.DocTestParser().get_examples(b) if ">>>" in b else [doctest.Example(b, "")] for b in shown]
    source = "".join(example.source for block in examples for example in block)
    nodes = list(ast.walk(ast.parse(source, module)))
    made = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    made |= {node.name for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.alias))}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)} | set(dir(builtins))
    free = {node.id for node in nodes if isinstance(node, ast.Name)} - made
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    lines, arguments = ["from typing import Any"], []
    for name in sorted(free):
        places = [module] if module in known.get(name, ()) else [] if name in GIVEN else known.get(name, [])
        given = re.sub(r"\b(core|recorded)\.", r"cjm_fasthtml_resources.\1.", GIVEN.get(name, "Any"))
        if name in cjm_fasthtml_resources.__all__: lines.append(f"from cjm_fasthtml_resources import {name}")
        elif len(places) == 1: lines.append(f"from {places[0]} import {name}")
        elif name in ("asyncio", "os", "subprocess", "threading", "time"): lines.append(f"import {name}")
        elif name in GIVEN or name not in called:
            lines += [f"import {place}" for place in re.findall(r"(cjm_[\w.]+)\.\w+", given)]
            arguments.append(f"{name}: {given}")
    return "\n".join([*lines, f"async def page({', '.join(arguments)}) -> None:", textwrap.indent(source, "    ")])


@pytest.fixture(scope="module")
def misuses(tmp_path_factory):
    "By page, what mypy says of the Python that it shows"
    pytest.importorskip("mypy", reason="mypy is not installed")
    shown = {str(path.relative_to(ROOT/"nbs").with_suffix("")): blocks(path, "python") for path in API}
    shown["wrong"] = [">>> manager.reserve(8_000, timeuot=5)\n>>> sums(3)\n>>> manager.resevre(8_000)\n",
                      ">>> format_bytes('8')\n>>> me = read_process(1)\n>>> me.nomen\n>>> list_names(['a'])\n'a'\n"]
    folder, known = tmp_path_factory.mktemp("pages"), defined()
    for name, texts in shown.items():
        if not texts: continue
        (folder/f"{name.replace('/', '__')}.py").write_text(
            as_module(f"cjm_fasthtml_resources.{name.replace('/', '.')}", texts, known), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "mypy", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    said = re.findall(r"^.*?([\w.]+)\.py:\d+: error: (.*?)  \[([\w-]+)\]$", done.stdout, re.M)
    found: dict[str, list[str]] = {name: [] for name, texts in shown.items() if texts}
    for name, text, code in said:
        if code in MISUSE: found[name.replace("__", "/")].append(text)
    return found


def test_the_python_on_a_page_of_the_api_suits_the_library(misuses):
    assert len(misuses) > 60
    assert {name: texts for name, texts in misuses.items() if texts and name != "wrong"} == {}


def test_python_that_does_not_suit_the_library_is_found(misuses):
    for name in ("timeuot", "sums", "resevre", "format_bytes", "nomen"):
        assert sum(name in text for text in misuses["wrong"]) == 1, (name, misuses["wrong"])
    assert len(misuses["wrong"]) == 5


def test_the_imports_of_a_page_have_the_names_that_its_examples_use(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/"tools")
    from imports import add_imports
    fold = '#| code-summary: "Imports of the examples (and all names in recorded.scenario)"\nimport os'
    shown = "#| echo: false\nshow_doc(to_scenario)"
    examples = "to_worker(1, os.name)\nsaved = Share, Path", shown, "await _gpu(saved)"
    notebook = dict(cells=[dict(cell_type="code", source=source) for source in (fold, *examples)])
    add_imports(notebook)
    names: dict = {}
    made = notebook["cells"][0]["source"]
    exec(made, names)
    assert {"os", "to_worker", "_gpu", "Share", "Path"} <= names.keys() and "to_scenario" not in names
    assert "from cjm_fasthtml_resources.recorded.rows import Share" in made and "all names" not in made
    assert [cell["source"] for cell in notebook["cells"][1:]] == list(examples)
