#!/usr/bin/env python3
"""Make README.md from nbs/index.ipynb, and nbs/llms.txt (llmstxt.org), the site's contents for language models, from
all notebooks.

    python tools/readme.py           write them
    python tools/readme.py --check   only say whether they are up to date, closing with 'N passed, N failed'
"""
import argparse
import configparser
import re
import sys
from pathlib import Path

import yaml
from execnb.nbio import read_nb
from nbdev.processors import FilterDefaults, add_links, insert_warning

ROOT = Path(__file__).resolve().parent.parent
HEAD = "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook -->\n"


class ReadmeFilter(FilterDefaults):
    "nbdev's own processing, but for links to the API: on GitHub the reader is beside the notebooks"
    def base_procs(self): return [proc for proc in super().base_procs() if proc not in (add_links, insert_warning)]


def from_root(markdown: str) -> str:
    "Relative links and pictures as they are called from the root"
    return re.sub(r"(\]\()(?!https?:|#|mailto:)([^)]+\))", r"\1nbs/\2", markdown)


def output_text(output) -> str:
    "One output: Markdown as it is, anything else as an indented block"
    data = output.get("data", {})
    if "text/markdown" in data: return "".join(data["text/markdown"]).strip()
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return "\n".join("    " + line for line in text.rstrip().splitlines())


def cell_text(cell) -> str:
    "A cell as Markdown"
    if cell.cell_type == "markdown": return from_root(cell.source.strip())
    lines = cell.source.strip().splitlines()
    shown = not any(re.match(r"#\s*\|\s*(echo:\s*false|hide)", line) for line in lines)
    source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
    parts = [f"```python\n{source}\n```"] if source and shown else []
    return "\n\n".join([*parts, *filter(None, map(output_text, cell.outputs))])


def readme() -> str:
    "The whole file"
    nb = read_nb(ROOT/"nbs"/"index.ipynb")
    ReadmeFilter()(nb)
    title = nb.frontmatter_ if hasattr(nb, "frontmatter_") else {}
    head = [f"# {title['title']}", f"> {title['description']}"] if title else []
    cells = [cell_text(c) for c in nb.cells if c.cell_type != "raw"]
    text = "\n\n".join(filter(None, [*head, *cells]))
    text = text.replace("\n```\n\n```python\n", "\n\n")  # code cells that follow each other are one block
    return f"{HEAD}\n{text}\n"


def llms() -> str:
    "Each page of the sidebar with its title, its address and its sentence"
    settings = configparser.ConfigParser()
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    base = settings["DEFAULT"]["doc_host"] + settings["DEFAULT"]["doc_baseurl"]

    def heading(path: str) -> tuple[str, str]:
        found = re.match(r"# (.+)\n+> (.+)", read_nb(ROOT/"nbs"/path).cells[0].source)
        return found[1], found[2]

    def line(path: str) -> str:
        title, sentence = heading(path)
        return f"- [{title}]({base}/{path.removesuffix('.ipynb')}.html): {sentence}"

    contents = yaml.safe_load((ROOT/"nbs"/"sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    pages = [entry for entry in contents if isinstance(entry, str) and entry != "index.ipynb"]
    title, sentence = heading("index.ipynb")
    parts = [f"# {title}\n\n> {sentence}", "## First\n\n" + "\n".join(map(line, pages))]
    sections = [entry for entry in contents if isinstance(entry, dict)]
    parts += [f"## {entry['section']}\n\n" + "\n".join(map(line, entry["contents"])) for entry in sections]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    made = {ROOT/"README.md": readme(), ROOT/"nbs"/"llms.txt": llms()}
    if not parser.parse_args().check:
        for path, text in made.items(): path.write_text(text, encoding="utf-8")
        return 0
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale: print(f"{path.relative_to(ROOT)} is not what the notebooks make: run python tools/readme.py")
    print(f"{len(made) - len(stale)} passed, {len(stale)} failed")
    return bool(stale)


if __name__ == "__main__": sys.exit(main())
