"""README: its lines of Python run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import convcvx

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_lines_of_python_run_when_pasted(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(block.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    assert "scope global: a proof" in capsys.readouterr().out
    assert isinstance(names["again"], convcvx.Fit)
    assert names["again"].certificate == names["layer"].certificate
    assert names["layer"].metrics["train_accuracy"] > 0.97
