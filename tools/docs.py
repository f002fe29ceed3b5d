#!/usr/bin/env python3
"""Build the documentation site into _docs without Quarto, and check every link inside it.

    python tools/docs.py     closes with 'N passed, N failed': one for each page

nbdev processes the notebooks, smalldocs makes pages of them. Who has Quarto may run nbdev_docs on the same files.
"""
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
PROC, SITE = ROOT/"_proc", ROOT/"_docs"


def process() -> str:
    "nbdev's own steps up to where it would call Quarto; the address of the published site"
    import nbdev.doclinks
    from nbdev.config import get_config
    from nbdev.quarto import nbdev_sidebar, proc_nbs, refresh_quarto_yml
    refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    nbdev_sidebar.__wrapped__()
    proc_nbs(force=True, n_workers=0)
    cfg = get_config()
    return f"{cfg.doc_host.rstrip('/')}/{cfg.doc_baseurl.strip('/')}/"


def render() -> None:
    "The pages, in _docs"
    smalldocs = Path(sys.executable).with_name("smalldocs")
    subprocess.run([smalldocs, "render"], cwd=PROC, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(PROC/"_docs", SITE)
    for name in ("llms.txt", "dashboards/grafana.json"):  # what _quarto.yml calls resources
        (SITE/name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT/"nbs"/name, SITE/name)


def make_relative(page: Path, published: str) -> None:
    "nbdev links symbols to the published site; here they lead to the page beside"
    text = page.read_text(encoding="utf-8")
    up = os.path.relpath(SITE, page.parent)
    page.write_text(text.replace(f'href="{published}', f'href="{up}/'), encoding="utf-8")


class Page(HTMLParser):
    "What a page links to, and what in it can be linked to"
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.raw: list[str] = []  # Markdown that nbdev made of a symbol in a comment, where nothing renders it
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs) -> None:
        found = dict(attrs)
        self.links += [found[key] for key in ("href", "src") if found.get(key)]
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}

    def handle_data(self, data) -> None:
        self.raw += re.findall(r"\[[^\]]*\]\(http[^)]*\)", data)


def dead_links(path: Path, pages: dict[Path, Page]) -> list[str]:
    "Links inside the site that lead nowhere, or are shown as Markdown"
    dead = list(pages[path].raw)
    for link in pages[path].links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc: continue
        target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
        anchored = target not in pages or unquote(parts.fragment) in pages[target].anchors
        if not target.is_file() or not anchored: dead.append(link)
    return dead


def main() -> int:
    os.chdir(ROOT)
    published = process()
    render()
    paths = sorted(SITE.rglob("*.html"))
    for path in paths: make_relative(path, published)
    pages = {path: Page(path) for path in paths}
    dead = {path: found for path in paths if (found := dead_links(path, pages))}
    for path, links in dead.items(): print(f"{path.relative_to(SITE)}: dead links {sorted(set(links))}")
    expected = {path.relative_to(ROOT/"nbs").with_suffix(".html") for path in (ROOT/"nbs").rglob("[!_.]*.ipynb")}
    missing = expected - {path.relative_to(SITE) for path in paths}
    for path in sorted(missing): print(f"{path} was not made")
    failed = len(dead) + len(missing)
    print(f"{len(paths) - len(dead)} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
