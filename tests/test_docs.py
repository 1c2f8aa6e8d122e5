"""The pages that help to choose name all there is to choose; `make docs` runs their code and follows their links.

What their code has printed stands in them: here, how that is told from what it prints now.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from convcvx.oracles.table import ORACLES
from convcvx.solvers.table import SOLVERS
from convcvx.terms.scope import Scope
from convcvx.terms.status import SHORT, Status

DOCS = Path(__file__).parents[1] / "docs"
SHORT_OF_TOL = [status for status in Status if status.exit_code == SHORT and status is not Status.RUNNING]


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("choose.md", list(SOLVERS)),
        ("choose.md", list(ORACLES)),
        ("choose.md", list(Scope)),
        ("certificates.md", list(Scope)),
        ("gap.md", SHORT_OF_TOL),
    ],
)
def test_a_table_has_a_cell_for_each(page, names):
    rows = [line for line in (DOCS / page).read_text("utf-8").splitlines() if line.startswith("| ")]
    told = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    assert len(names) > 2
    assert {str(name) for name in names} <= told


PAGE = """
```python exec="1" source="above" result="text" session="one"
found = 3
print(f"{found} filters, gap {1e-3:.0e}")
```

```python exec="1" session="one"
assert found == 3
```

Text.
"""


@pytest.fixture
def outputs(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "site")
    return importlib.import_module("outputs")


def test_what_a_page_prints_is_written_into_it(outputs):
    page = outputs.written(PAGE)
    assert page.replace('\n```text title="prints"\n3 filters, gap 1e-03\n```\n', "") == PAGE
    assert outputs.written(page) == page
    assert outputs.without(page) == (PAGE, ["3 filters, gap 1e-03\n"])


@pytest.mark.parametrize(
    ("now", "same"),
    [
        ("3 filters, gap 1e-03", True),
        ("5 filters, gap 9e-02", True),
        ("50 filters, gap 1e-03", False),
        ("3 atoms, gap 1e-03", False),
        ("2 filters, gap 1e-03", True),
        ("", False),
    ],
)
def test_a_page_that_prints_something_else_is_told_of(outputs, now, same):
    differences = outputs.differences(["3 filters, gap 1e-03\n"], f"<p>Text</p><pre><span>{now}</span>\n</pre>")
    assert differences == ([] if same else ["3 filters, gap 1e-03"])


@pytest.mark.parametrize(("now", "told"), [("a 1\nb 2\nd 3", 0), ("a 1\nd 2\nd 3", 2), ("a 1\nb 9\nd 3", 2)])
def test_one_line_in_three_may_go_by_the_machine(outputs, now, told):
    assert len(outputs.differences(["a 1\nb 2\nc 3\n"], f"<pre>{now}</pre>")) == told


def test_a_fraction_is_no_count(outputs):
    assert outputs.differences(["accuracy 0.97\n"], "<pre>accuracy 0.1</pre>") == ["accuracy 0.97"]
    assert not outputs.differences(["accuracy 0.97\n"], "<pre>accuracy 0.91</pre>")


def test_any_line_can_be_told_of(outputs):
    for line in ("{'accuracy': 0.93}", "run #3 of 5", "{} 7"):
        assert outputs.differences([f"{line}\n"], "<pre>x</pre>") == [line]


def test_every_page_has_what_its_code_prints(outputs):
    pages = {path: path.read_text("utf-8") for path in DOCS.rglob("*.md")}
    shown = {path: text.count('result="text"') for path, text in pages.items()}
    assert sum(shown.values()) > 10
    assert {path: len(outputs.without(text)[1]) for path, text in pages.items()} == shown
