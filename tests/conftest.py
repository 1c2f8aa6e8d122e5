"""What all tests run with: the real data, and threads that suit a shared machine. What they call is in helpers/."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

# Waiting threads that spin starve the working ones on a shared machine; to be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# NumPy's and SciPy's BLAS have threads of their own, which wait by spinning: with two workers on two cores every step
# of the judge's descents, on vectors of some tens of numbers, took milliseconds in place of microseconds.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# As hypothesis itself has it in CI: examples are alike whenever they run, and untimed, as a first one may import or
# compile, and machines are shared.
settings.register_profile(
    "repeatable", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # the problems here are too small for more

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Let the second of two processes compile the searches over cones and for cells before its tests.

    Where nothing is on disk yet, as in CI, both would else compile the same at the same time: the first files of both
    begin with the exact oracle.
    """
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw1":
        from helpers.rows import random_rows

        from convcvx.arrangements.cells import cells
        from convcvx.oracles import BranchAndBoundOracle

        rows = random_rows(8, 4)
        BranchAndBoundOracle(0.1).maximise(rows)
        next(cells(rows.rows))


@pytest.fixture(autouse=True)
def repeatable() -> None:
    """Draw alike whenever a test runs: an estimator without a random_state draws from numpy's global numbers."""
    np.random.seed(0)  # noqa: NPY002 (what scikit-learn draws from)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: a must in CI, a skip elsewhere."""
    if not SHARED.is_dir():
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(f"CI needs the real data in {SHARED}")
        pytest.skip(f"no real data in {SHARED}")
    return SHARED


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Count what a test has judged, killed or fuzzed: the sums over all processes are printed at the end."""
    return lambda what, number: record_property("counted", (what, number))


def pytest_terminal_summary(terminalreporter) -> None:
    sums: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":  # one a test, when it has counted everything
                for what, number in (value for name, value in report.user_properties if name == "counted"):
                    sums[what] += number
    if sums:
        terminalreporter.section("counted, none of them with a fault where tests pass")
        for what, number in sums.items():
            terminalreporter.write_line(f"{number:,} {what}")
