"""What is published: the weights, the version, what the command line and Python find."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

import convcvx
from convcvx import TwoLayerCNN_Weights, two_layer_cnn

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_weights_in_the_package_are_those_of_the_reference_run():
    shipped, run = TwoLayerCNN_Weights.DIGITS.path, ROOT / "checkpoints" / "digits" / "model.safetensors"
    assert shipped.is_relative_to(Path(convcvx.__file__).parent)
    assert shipped.read_bytes() == run.read_bytes()
    images = torch.from_numpy(load_digits().images)[:, None] / 16
    with torch.no_grad():
        found = two_layer_cnn(weights="DIGITS")(images.float()).argmax(dim=1)
    assert (found.numpy() == load_digits().target).mean() > 0.97


def test_files_that_are_no_code_are_named_as_package_data():
    """`make test-wheel` builds the wheel and uses it; this is the quick half."""
    package = ROOT / "convcvx"
    known = [
        file for pattern in PROJECT["tool"]["setuptools"]["package-data"]["convcvx"] for file in package.glob(pattern)
    ]
    others = [f for f in package.rglob("*") if f.is_file() and f.suffix != ".py" and f.parent.name != "__pycache__"]
    assert sorted(known) == sorted(others)


def test_the_version_is_told():
    done = subprocess.run([sys.executable, "-m", "convcvx", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"convcvx {convcvx.__version__}\n"


def test_lower_bounds_become_constraints():
    done = subprocess.run([sys.executable, ROOT / ".ci" / "lowest.py"], capture_output=True, text=True, check=True)
    lowest = dict(line.split("==") for line in done.stdout.split())
    for requirement in PROJECT["project"]["dependencies"]:
        name, bound = re.split(">=", requirement.split(",")[0])
        if name not in ("torch", "torchvision"):
            assert lowest[name] == bound
    pinned = (ROOT / "constraints.txt").read_text().split()
    assert {f"torch=={lowest['torch']}", f"torchvision=={lowest['torchvision']}"} <= set(pinned)


def test_every_public_name_is_found_and_importing_convcvx_waits_for_nothing():
    probe = "import sys, convcvx; print([m for m in ('torch', 'numba', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    control = subprocess.run([sys.executable, "-c", "import convcvx.problem;" + probe], capture_output=True, text=True)
    assert control.stdout.strip() == "['torch', 'numba', 'scipy']"
    for name in convcvx.__all__:
        assert getattr(convcvx, name).__name__ == name
    (block,) = re.findall(r"if TYPE_CHECKING.*\n((?: .*\n)+)", (ROOT / "convcvx" / "__init__.py").read_text())
    assert {
        name: module for module, name in re.findall(r"from convcvx\.(\S+) import \w+ as (\w+)", block)
    } == convcvx.HOMES
    assert convcvx.data.load is convcvx.data.datasets.load
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        convcvx.nothing  # noqa: B018


def test_the_version_is_the_same_wherever_it_stands():
    assert f"\nversion: {convcvx.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## {convcvx.__version__}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_every_requirement_has_a_tested_version():
    tested = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().split()}
    extras = PROJECT["project"]["optional-dependencies"]
    required = [*PROJECT["project"]["dependencies"], *chain(*extras.values())]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in required} - {"convcvx"}
    assert {"torch", "mkdocs-material", "onnx"} <= names <= tested
