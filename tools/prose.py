#!/usr/bin/env python3
"""Count habits of writing in the notebooks' prose, docstrings and comments.

    python tools/prose.py [-v] [NOTEBOOK …]

Prints a row for each habit: how often it occurs, how often in 1,000 words, and its limit, a part of the rate that it
had before the prose was made plain. With -v it shows each place. Closes with 'N passed, N failed', one for each habit;
with notebooks named, the limits are shown only.
"""
import argparse
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Habit(NamedTuple):
    "A way of writing that makes a reader stop"
    name: str
    pattern: str      # of a regular expression
    before: float     # occurrences in 1,000 words, before the prose was made plain
    instead: str
    part: float = 1/3   # of that rate, which is the limit

    @property
    def limit(self) -> float: return self.before*self.part


OPENS = r"(?:(?<=^)|(?<=[.!:] ))"
WHAT = r"is|was|are|were|has|had|it|they|the|a|an|this|one|each|nobody|can|may|must|does|do|did|will|would|others"
WHO = r"is|was|has|had|may|does"
HABITS = (
    Habit("negation", r"(?i)\b(?:not|no|never|nobody|nothing|none|nor|without|cannot|\w+n't)\b", 27.07,
          "write what is or what happens"),
    Habit("what, without its noun", rf"(?i)(?<![?`\w])\bwhat (?=(?:{WHAT}|\w+s)\b)", 13.42,
          "the reservations, the snapshot"),
    Habit("who, without its noun", rf"(?i)(?<![,\w] )(?<!people )(?<!process )\bwho (?=(?:{WHO}|\w+s)\b)", 1.20,
          "a process that …, users who …"),
    Habit("a sentence that opens with a question word",
          OPENS + r"(?:What|Who|Whose|Where|Whether|Which)\b(?![^.]*\?)", 6.95, "the subject first"),
    Habit("hold", r"(?i)\b(?:hold|holds|held|holding)\b", 4.99, "uses, has reserved; keeps (a lock)"),
    Habit("say and tell", r"(?i)\b(?:says?|said|tells?|told|saying|telling)\b", 6.15,
          "reports, returns, shows, raises"),
    Habit("may", r"(?i)\bmay\b", 3.23, "can, might; is allowed to"),
    Habit("old words", r"(?i)\b(?:anew|meanwhile|beside|beneath|whom|shall|for ever|whence|lest)\b", 2.24,
          "again, until then, next to, under, indefinitely"),
    Habit("nobody, somebody", r"(?i)\b(?:nobody|somebody|anybody)\b", 3.19,
          "no process; another process, another user"),
    Habit("is no", r"(?i)\b(?:is|are|was|were) no \w+", 1.40, "is not a valid …"),
    Habit("in the way", r"(?i)\bin the way\b", 1.12, "uses the memory that the job needs"),
    Habit("inversion", OPENS + r"(?:In the way|Busy|Only then|Nor|So) (?:is|are|was|were|do|does|can)\b", 0.12,
          "subject, verb, object"),
    Habit("look, as a noun", r"(?i)\b(?:a|one|each|every|next|last|the|this|first) looks?\b", 0.36,
          "a check, a sample"),
)


class Place(NamedTuple):
    "A piece of prose and where it stands"
    where: str
    text: str


def comments(source: str) -> Iterator[str]:
    "Yield the comments and docstrings of a cell"
    try: tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, IndentationError, SyntaxError): return   # a cell with magics
    before = tokenize.NEWLINE
    for token in tokens:
        if token.type == tokenize.COMMENT and not re.match(r"#\||# (?:type|noqa|mypy|pragma)", token.string):
            yield token.string.lstrip("# ")
        elif token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.NL):
            yield token.string.strip("\"'rf")
        if token.type not in (tokenize.COMMENT, tokenize.NL) or before is tokenize.STRING: before = token.type


def plain(markdown: str) -> str:
    "Return Markdown without code, addresses and tables' rules"
    text = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.M | re.S)
    text = re.sub(r"`[^`]*`", "`x`", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.sub(r"^\|?[-|: ]+\|?$", "", text, flags=re.M)


def pieces(path: Path) -> Iterator[Place]:
    "Yield each paragraph, docstring and comment of a notebook"
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source, where = "".join(cell["source"]), str(path.relative_to(ROOT/"nbs").with_suffix(""))
        texts = [plain(source)] if cell["cell_type"] == "markdown" else [plain(text) for text in comments(source)]
        for text in texts:
            parts = re.split(r"\n\s*\n|\n(?=[-*|#>])", text)
            yield from (Place(where, " ".join(part.split())) for part in parts if part.strip())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-v", "--verbose", action="store_true", help="show each place")
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="such as core/gpu; all without it")
    options = parser.parse_args()
    paths = [ROOT/"nbs"/f"{name}.ipynb" for name in options.notebooks] or sorted((ROOT/"nbs").rglob("*.ipynb"))
    found = [place for path in paths for place in pieces(path)]
    words = sum(len(re.findall(r"[\w'’.-]+", place.text)) for place in found)
    failed = 0
    for habit in HABITS:
        hits = [(place, match) for place in found for match in re.finditer(habit.pattern, place.text)]
        rate = 1000*len(hits)/max(words, 1)
        failed += rate > habit.limit
        mark = "  TOO MANY" if rate > habit.limit else ""
        print(f"{habit.name:43} {len(hits):5}  {rate:6.2f} of {habit.limit:4.2f}{mark}   instead: {habit.instead}")
        for place, match in hits if options.verbose else []:
            begin, end = max(match.start() - 60, 0), match.end() + 60
            print(f"    {place.where}: …{place.text[begin:end]}…")
    print(f"\n{words:,} words. {len(HABITS) - failed} passed, {failed} failed")
    return bool(failed and not options.notebooks)


if __name__ == "__main__": sys.exit(main())
