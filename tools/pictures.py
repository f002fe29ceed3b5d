#!/usr/bin/env python3
"""Make the pictures of the documentation, from simulated machines: the same everywhere.

    python tools/pictures.py           write them to nbs/images
    python tools/pictures.py --check   only say whether those there are up to date, closing with 'N passed, N failed'
"""
import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme

from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.samples import take_sample
from cjm_fasthtml_resources.simulate import load_scenario
from cjm_fasthtml_resources.ui.terminal import status_view

IMAGES = Path(__file__).resolve().parent.parent/"nbs"/"images"
THEME = TerminalTheme(
    (22, 27, 34), (230, 237, 243),
    [(72, 79, 88), (255, 123, 114), (86, 211, 100), (227, 179, 65),
     (121, 192, 255), (210, 168, 255), (86, 212, 221), (177, 186, 196)],
    [(125, 133, 144), (255, 161, 152), (126, 231, 135), (242, 204, 96),
     (165, 214, 255), (226, 197, 255), (179, 240, 255), (240, 246, 252)])
# rich's own frame fetches a font from a server; this one takes what the reader has
FRAME = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" \
role="img" aria-label="TITLE">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, \
"DejaVu Sans Mono", monospace; font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-family: ui-sans-serif, system-ui, sans-serif; font-size: 18px; font-weight: bold; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />\
</clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def terminal(preset: str, title: str, width: int) -> str:
    "A terminal that shows a simulated machine, as SVG"
    with load_scenario(preset) as driver:
        manager = ResourceManager(track_self=False)
        for worker in driver.workers: manager.register_worker(**worker)
        answer = replace(take_sample(manager), workers=(), simulated=driver.description)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=width, file=nowhere, force_terminal=True, color_system="truecolor",
                          legacy_windows=False)
        console.print(status_view(answer, console, top=5))
        return console.export_svg(title=title, theme=THEME, code_format=FRAME.replace("TITLE", title),
                                  unique_id=f"cjm-{preset}")


PICTURES = {"status.svg": lambda: terminal("pair", "cjm-resources --simulate pair", 104)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = 0
    IMAGES.mkdir(exist_ok=True)
    for name, make in PICTURES.items():
        path, svg = IMAGES/name, make()
        if check and (not path.exists() or path.read_text(encoding="utf-8") != svg):
            print(f"{path.name} is out of date: run python tools/pictures.py")
            stale += 1
        elif not check: path.write_text(svg, encoding="utf-8")
    print(f"{len(PICTURES) - stale} passed, {stale} failed")
    return bool(stale)


if __name__ == "__main__": sys.exit(main())
