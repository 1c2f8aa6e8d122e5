"""What notebooks and terminals show of results and of work under way, and plots."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from helpers.commands import DIGITS
from rich.console import Console
from sklearn.datasets import load_digits

import convcvx
from convcvx.display.figures import confusion_figure
from convcvx.display.theme import IN_PAGE, png, svg
from convcvx.display.words import counted, percent_up
from convcvx.errors import InputError
from convcvx.training.fit import NOTEBOOK_FILTERS
from convcvx.training.progress import Progress

X = np.random.default_rng(0).normal(size=(12, 2))
Y = (X[:, 0] > abs(X[:, 1])).astype(int)


@pytest.fixture(scope="module")
def layer() -> convcvx.Fit:
    return convcvx.load(DIGITS)


@pytest.fixture(scope="module")
def walk() -> convcvx.training.path.SolutionPath:
    return convcvx.path(X, Y, betas=[0.1, 0.05], tol=0.1)


def shown(result: object) -> str:
    """Its HTML, which is well formed and has no colour of its own: a notebook is light or dark."""
    text = result._repr_html_()
    ElementTree.fromstring(text)
    assert "#" not in text
    return text


def test_a_fit_shows_its_certificate_its_scores_and_its_filters(layer):
    text, accuracy = shown(layer), 100 * layer.metrics["test_accuracy"]
    excess = percent_up(layer.certificate.primal / layer.certificate.dual - 1)
    for said in (f"At most {excess} above", "Estimate", f"{accuracy:.2f} %", "the gap is within tol"):
        assert said in text
    assert text.count("<img") == NOTEBOOK_FILTERS < layer.metrics["n_filters"]
    assert len(text) < 30_000


def test_a_path_shows_what_it_has_come_to_and_gives_the_solutions_of_solve(walk):
    with pytest.raises(InputError, match="no solution yet"):
        walk.plot()
    assert "0 solutions" in shown(walk)
    solutions = list(walk)
    assert [step["beta"] for step in walk.steps] == [0.1, 0.05]
    assert "2 solutions" in shown(walk)
    assert "0.05" in shown(walk)
    assert png(walk.plot())[:4] == b"\x89PNG"
    solution = solutions[-1]
    assert "Proof" in shown(solution)
    assert "Proof" in shown(solution.certificate)
    assert len(solution.plot().axes) == 2
    assert len(solution.certificate.plot().axes) == 1
    assert len(next(convcvx.path(X, Y, betas=[0.1], tol=0.1)).filters) == len(solutions[0].filters)


def test_a_prompt_shows_numbers_and_no_tensors(layer):
    steps = convcvx.path(X, Y, betas=[0.1, 0.05], tol=0.1)
    assert repr(steps) == "path, 0 solutions so far"
    solution = list(steps)[-1]
    assert repr(steps).count("\nbeta 0.") == 2
    assert repr(solution) == f"{counted(solution.n_filters, 'filter')}, status converged\n{solution.certificate}"
    begun = repr(replace(solution, certificate=None))
    assert re.search(r"\nround \d+: objective 0\.\d+, lower bound \(global\) 0\.\d+, relative gap ", begun)
    assert repr(replace(solution, certificate=None, history=[])).count("\n") == 0
    assert repr(layer) == str(layer)
    assert "tensor" not in repr([solution, layer, layer.solution])


def test_a_fit_plots_by_name_and_says_what_it_cannot(layer):
    digits = load_digits()
    for what in ("training", "filters", "bounds"):
        assert layer.plot(what)._repr_png_()[:4] == b"\x89PNG"
    confused = layer.plot("confusion", digits.images[:50] / 16, digits.target[:50])
    assert confused.axes[0].get_ylabel() == "true class"
    with pytest.raises(InputError, match="what must be one of"):
        layer.plot("weights")
    with pytest.raises(InputError, match="images"):
        layer.plot("confusion")
    with pytest.raises(InputError, match="no history"):
        convcvx.Solution.empty(2, 1, 1).plot()


def test_names_in_a_figure_are_no_formulas_and_its_colours_are_those_of_the_page():
    figure = confusion_figure(torch.tensor([[3, 1], [0, 2]]), ["$\\frac{", "<b>"])
    text = svg(figure, "one")
    assert "$\\frac{" in text
    assert "<b>" not in text
    assert "var(--ink)" in text
    assert not any(colour in text for colour in IN_PAGE)
    assert 'id="' not in text.replace('id="one-', "")  # no other figure of a page has such a name
    assert "://" not in text


def test_nothing_is_drawn_before_it_is_asked_for():
    probe = "import sys, convcvx; convcvx.Fit; print([m for m in ('matplotlib', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_how_long_a_phase_takes_by_its_name_and_a_pipe_nothing_of_it(terminal, capsys):
    shown = StringIO()
    console = Console(file=shown, force_terminal=terminal, markup=False, width=80)
    with Progress(console, 0.1) as progress:
        progress.begin("certificate and scores")
    assert ("certificate and scores, for" in shown.getvalue()) == terminal
    assert terminal or shown.getvalue() == "certificate and scores\n"
    assert capsys.readouterr().err == ""  # a line has been printed already
