"""What all tests run with: the real data, and threads that suit a shared machine. What they call is in helpers/."""

from __future__ import annotations

import os
from pathlib import Path

# Waiting threads that spin starve the working ones on a shared machine; to be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

torch.set_num_threads(1)  # the problems here are too small for more

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: a must in CI, a skip elsewhere."""
    if not SHARED.is_dir():
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(f"CI needs the real data in {SHARED}")
        pytest.skip(f"no real data in {SHARED}")
    return SHARED
