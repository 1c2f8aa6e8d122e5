"""The pages that help to choose name all there is to choose; `make docs` runs their code and follows their links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from convcvx.oracles.scope import Scope
from convcvx.oracles.table import ORACLES
from convcvx.solution import SHORT, Status
from convcvx.solvers.table import SOLVERS

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
