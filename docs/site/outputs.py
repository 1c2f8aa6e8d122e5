"""What the code of a page prints, written into the page: who reads it on GitHub or in an editor sees it too.

    python -m docs.site.outputs docs/tutorials/*.md    # run the pages, and write anew what they print

A block of Python with `result="text"` is followed by a block of text with the title "prints". The site leaves that out,
as it shows what the code has printed just then, and fails where the two say different things (`differences`): words
of most lines have to be the same, numbers alike, for their digits go by the machine.
"""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stdout
from html import unescape
from io import StringIO
from itertools import groupby
from pathlib import Path

CODE = re.compile(r'^```python (?P<how>exec="1"[^\n]*)\n(?P<code>.*?)^```\n', re.DOTALL | re.MULTILINE)
"""A block that runs when the page is built."""
PRINTED = re.compile(r'\n```text title="prints"\n(.*?)^```\n', re.DOTALL | re.MULTILINE)
"""What one has printed, with the empty line before it."""
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?")
ALIKE = 2.0
"""Factor up to which two numbers count as alike: another machine may take another round, with other filters."""


def without(markdown: str) -> tuple[str, list[str]]:
    """A page without what its code has printed, and that."""
    return PRINTED.sub("", markdown), PRINTED.findall(markdown)


def written(markdown: str) -> str:
    """The page with what its code prints now."""
    page, _ = without(markdown)
    sessions: dict[str, dict[str, object]] = {}

    def ran(block: re.Match[str]) -> str:
        session = re.search(r'session="(\w+)"', block["how"])
        names = sessions.setdefault(session[1], {}) if session else {}
        out = StringIO()
        with redirect_stdout(out):
            exec(compile(block["code"], "page", "exec"), names)
        if 'result="text"' not in block["how"]:
            return block[0]
        return f'{block[0]}\n```text title="prints"\n{out.getvalue().rstrip()}\n```\n'

    return CODE.sub(ran, page)


def differences(printed: list[str], html: str) -> list[str]:
    """The lines that the built page does not show, of the blocks `printed` of which it does not show most.

    One line or another goes by the machine, too: how a training ended, or which proof said most.
    """
    text = re.sub(r"</?(?:p|div|pre|code)\b[^>]*>", "\n", html)  # which begin a line, as no other tag does
    shown: dict[str, list[list[str]]] = {}
    for line in _lines(unescape(re.sub(r"<[^>]+>", "", text))):
        shown.setdefault(_words(line), []).append(NUMBER.findall(line))
    missing = []
    for block in map(_lines, printed):
        lost = [line for line in block if not any(_alike(line, numbers) for numbers in shown.get(_words(line), []))]
        if 2 * len(lost) > len(block):
            missing += lost
    return missing


def _lines(text: str) -> list[str]:
    """Those that say something, and another thing than the one before."""
    return [line for line, _ in groupby(filter(None, (" ".join(line.split()) for line in text.splitlines())))]


def _words(line: str) -> str:
    return NUMBER.sub("#", line)


def _alike(line: str, numbers: list[str]) -> bool:
    return all(map(_alike_number, NUMBER.findall(line), numbers))


def _alike_number(one: str, other: str) -> bool:
    """Whether two numbers are alike: counts may differ by one, and those with an exponent are gaps, which end anywhere
    below the tolerance."""
    if "e" in one or "e" in other:
        return True
    low, high = sorted(abs(float(text.replace(",", ""))) for text in (one, other))
    return high <= ALIKE * low or ("." not in one + other and high - low <= 1)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(written(path.read_text("utf-8")), "utf-8")
        print(f"{path}: what it prints is written anew")
