#!/usr/bin/env python3
"""Make the pictures of the documentation, from simulated machines: the same everywhere.

    python tools/pictures.py           write them to nbs/images
    python tools/pictures.py --check   only say whether those there are up to date, closing with 'N passed, N failed'
"""
import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from cjm_fasthtml_resources.core.gpu import read_gpus
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.core.samples import Sample, take_sample
from cjm_fasthtml_resources.simulate import load_scenario
from cjm_fasthtml_resources.ui.lines import Line, Terminal, to_text
from cjm_fasthtml_resources.ui.screen import Window, compose
from cjm_fasthtml_resources.ui.terminal import status_view

IMAGES = Path(__file__).resolve().parent.parent/"nbs"/"images"
DARK = TerminalTheme(
    (22, 27, 34), (230, 237, 243),
    [(72, 79, 88), (255, 123, 114), (86, 211, 100), (227, 179, 65),
     (121, 192, 255), (210, 168, 255), (86, 212, 221), (177, 186, 196)],
    [(125, 133, 144), (255, 161, 152), (126, 231, 135), (242, 204, 96),
     (165, 214, 255), (226, 197, 255), (179, 240, 255), (240, 246, 252)])
LIGHT = TerminalTheme(
    (255, 255, 255), (31, 35, 40),
    [(36, 41, 47), (180, 20, 32), (17, 99, 41), (125, 78, 0), (9, 105, 218), (130, 80, 223), (27, 124, 131),
     (110, 119, 129)],
    [(87, 96, 106), (164, 14, 38), (26, 127, 55), (99, 60, 1), (33, 139, 255), (163, 117, 243), (49, 146, 170),
     (140, 149, 159)])
TIME = 1_788_000_000   # of the figures: the same each time
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


def look(preset: str, loads: bool = False) -> Sample:
    "A simulated machine, at a time that is always the same"
    with load_scenario(preset) as driver:
        manager = ResourceManager(track_self=False)
        for worker in driver.workers: manager.register_worker(**worker)
        sample = take_sample(manager, read_gpus(loads=loads))
    gpu = replace(sample.gpu, snapshot=replace(sample.gpu.snapshot, time=TIME))
    return replace(sample, gpu=gpu, workers=(), simulated=driver.description)


def once(terminal: Terminal) -> list[Line]: return status_view(look("pair"), terminal, top=5)


def watched(terminal: Terminal) -> list[Line]:
    os.environ["TZ"] = "UTC"
    time.tzset()
    return compose(look("pair", loads=True), terminal, Window()).lines


def picture(name: str, title: str, show: Callable[[Terminal], list[Line]], theme: TerminalTheme, width: int,
            height: int = 24) -> str:
    "A terminal as SVG"
    lines = show(Terminal(width, height, styled=True, colour=True))
    painted = to_text(lines, Terminal(styled=True, colour=True))
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=width, file=nowhere, force_terminal=True, color_system="truecolor",
                          legacy_windows=False)
        console.print(Text.from_ansi(painted), no_wrap=True)
        return console.export_svg(title=title, theme=theme, code_format=FRAME.replace("TITLE", title),
                                  unique_id=f"cjm-{name}")


PICTURES = {"status.svg": partial(picture, "pair", "cjm-resources --simulate pair", once, DARK, 104)}
for columns, rows in ((60, 12), (80, 24), (120, 30)):
    for theme_name, colours in (("dark", DARK), ("light", LIGHT)):
        PICTURES[f"watch-{columns}-{theme_name}.svg"] = partial(
            picture, f"watch-{columns}-{theme_name}", "cjm-resources --simulate pair --watch", watched, colours,
            columns, rows)


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
