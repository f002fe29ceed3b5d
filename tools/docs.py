#!/usr/bin/env python3
"""Build the documentation site into _docs without Quarto, and check every link inside it.

    python tools/docs.py     closes with 'N passed, N failed': one for each page

nbdev processes the notebooks, smalldocs makes pages of them, and `finish` adds this site's own search, links from
pictures to their files, and marks at printed sentences. A page or style sheet that fetches something from another
site fails. With Quarto installed, nbdev_docs makes a site of the same files, without what is added here.
"""
import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from imports import add_imports

ROOT = Path(__file__).resolve().parent.parent
PROC, SITE = ROOT/"_proc", ROOT/"_docs"
OWN = ROOT/"tools"/"site"


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


def import_names() -> None:
    "Import all names that a page's examples use: they then run as they are printed"
    for path in PROC.rglob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        add_imports(notebook)
        path.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")


def render() -> None:
    "The pages, in _docs"
    smalldocs = Path(sys.executable).with_name("smalldocs")
    subprocess.run([smalldocs, "render"], cwd=PROC, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(PROC/"_docs", SITE)
    for name in ("llms.txt", "dashboards/grafana.json"):  # what _quarto.yml calls resources
        (SITE/name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT/"nbs"/name, SITE/name)


def keep_inside() -> None:
    "Replace the search of smalldocs by this site's own, and remove the fonts that its themes fetch"
    shutil.rmtree(SITE/"site_libs"/"fuse")
    shutil.copy(OWN/"search.js", SITE/"site_libs")
    for path in (SITE/"site_libs"/"themes").glob("*.css"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"@import\s*url\([^)]*\);", "", text), encoding="utf-8")


def add_questions() -> list[str]:
    "Add frequent questions to the search, each with the page that answers it; return those whose page is missing"
    questions = json.loads((OWN/"questions.json").read_text(encoding="utf-8"))
    entries = json.loads((SITE/"search.json").read_text(encoding="utf-8"))
    titles = {entry["href"].partition("#")[0]: entry["title"] for entry in entries}
    rows = [dict(href=q["page"], title=q["question"], section=titles.get(q["page"]), text=q["answer"], asked=True)
            for q in questions]
    (SITE/"search.json").write_text(json.dumps(rows + entries, ensure_ascii=False), encoding="utf-8")
    return [f"the search's question {q['question']!r} leads to {q['page']}, which is not a page"
            for q in questions if q["page"] not in titles]


def mark_sentences(match: re.Match) -> str:
    "Mark printed text that has no columns, so that a phone wraps its lines"
    columns = re.search(r"\S {2,}\S|^ {2,}\S|[│█▏▕─]", html.unescape(re.sub(r"<[^>]+>", "", match[2])), re.M)
    return match[0] if columns else f'{match[1]}<pre class="sentences">{match[2]}</pre>'


def link_picture(match: re.Match) -> str:
    "Link a picture to its file, unless it is a link already"
    return match[0] if match[1] else f'<a class="picture" href="{match[2]}">{match[0]}</a>'


def unlink_word(match: re.Match) -> str:
    "Leave out nbdev's link of a plain word to another page: `reserve` is also the name of a method, and of others'"
    return match[0] if match[1].startswith("#") else f"<code>{match[2]}</code>"


def finish(page: Path, published: str) -> None:
    "Adapt a page: links to symbols lead to the page in this folder, pictures open large, the search is this site's own"
    text = page.read_text(encoding="utf-8")
    up = os.path.relpath(SITE, page.parent)
    text = text.replace(f'href="{published}', f'href="{up}/').replace("/fuse/fuse.min.js", "/search.js")
    text = re.sub(r'(<a [^>]*>\s*)?<img [^>]*?src="(?!data:)([^"]+)"[^>]*>', link_picture, text)
    text = re.sub(r'(<div class="cell-output cell-output-stdout">\s*)<pre>(.*?)</pre>', mark_sentences, text,
                  flags=re.S)
    text = re.sub(r'<a href="([^"]*#([a-z]+))"><code>\2</code></a>', unlink_word, text)
    text = re.sub(r"(?<=\s)–(?=[a-z])", "--", text)   # an option, where smalldocs takes its hyphens for a dash
    page.write_text(text, encoding="utf-8")


# what a style sheet, a script or a picture fetches from another site by itself
FETCHES = re.compile(r"""(?:@import\s*|url\(|\bfrom\s*|\bimport\s*\(?|\bfetch\()\s*["']?((?:https?:)?//[^"')\s]+)""")


class Page(HTMLParser):
    "The links of a page, the places in it that can be linked to, and the addresses that it fetches by itself"
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        # Markdown that nothing renders: what nbdev made of a symbol in a comment, and a link around a symbol's
        self.raw: list[str] = []
        self.fetched: list[str] = []
        self.inside = ""          # the tag whose text is read
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs) -> None:
        found = dict(attrs)
        self.links += [found[key] for key in ("href", "src") if found.get(key)]
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        self.inside = tag
        if tag == "a" or found.get("rel") in ("canonical", "alternate"): return
        keys = ("src", "srcset", "href", "data", "poster")
        self.fetched += [found[key] for key in keys if re.match(r"(https?:)?//", found.get(key) or "")]
        self.fetched += FETCHES.findall(found.get("style") or "")

    def handle_data(self, data) -> None:
        if self.inside in ("script", "style"): self.fetched += FETCHES.findall(data)
        self.raw += re.findall(r"\[[^\]]*\]\(http[^)]*\)|\]\([^)\s]*\.ipynb[^)]*\)", data)


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


def fetched_from_elsewhere(pages: dict[Path, Page]) -> dict[Path, list[str]]:
    "Addresses outside the site that a browser would fetch with a page, style sheet, script or picture"
    found = {path: page.fetched for path, page in pages.items()}
    for path in (path for kind in ("css", "js", "svg") for path in SITE.rglob(f"*.{kind}")):
        found[path] = FETCHES.findall(path.read_text(encoding="utf-8"))
    return {path: addresses for path, addresses in found.items() if addresses}


def main() -> int:
    os.chdir(ROOT)
    published = process()
    import_names()
    render()
    keep_inside()
    paths = sorted(SITE.rglob("*.html"))
    for path in paths: finish(path, published)
    pages = {path: Page(path) for path in paths}
    dead = {path: found for path in paths if (found := dead_links(path, pages))}
    for path, links in dead.items(): print(f"{path.relative_to(SITE)}: dead links {sorted(set(links))}")
    outside = fetched_from_elsewhere(pages)
    for path, links in outside.items():
        print(f"{path.relative_to(SITE)} fetches from another site: {sorted(set(links))}")
    expected = {path.relative_to(ROOT/"nbs").with_suffix(".html") for path in (ROOT/"nbs").rglob("[!_.]*.ipynb")}
    missing = expected - {path.relative_to(SITE) for path in paths}
    for path in sorted(missing): print(f"{path} was not made")
    unanswered = add_questions()
    for line in unanswered: print(line)
    failed = len(unanswered) + len(dead.keys() | outside.keys()) + len(missing)
    print(f"{len(paths) - len(dead.keys() | outside.keys())} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
