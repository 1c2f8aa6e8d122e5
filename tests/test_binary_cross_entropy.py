"""The binary cross-entropy: against that of two classes, cvxpy and exact arithmetic, and in everything that trains."""

from __future__ import annotations

import json
import math

import mpmath
import numpy as np
import pytest
import torch
from helpers.commands import NO_SEARCH, invoke
from helpers.problems import NO_TIME
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score, r2_score

import convcvx
from convcvx.errors import InputError
from convcvx.losses.shares import Shares
from convcvx.losses.table import get_loss
from convcvx.network.evaluate import real_scores
from convcvx.patches import PatchSpec
from convcvx.training.functional import patches_to_images
from convcvx.training.plan import build_problem

BCE, TWO = get_loss("bce"), get_loss("cross-entropy")
LAYER = {"kernel_size": 3, "rank": 2, "pool": 2, "beta": 0.01, "tol": 1e-3}


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def labelled() -> tuple[np.ndarray, np.ndarray]:
    """Digits with three labels: odd, above four, round."""
    digits = load_digits()
    classes = digits.target[:120]
    labels = np.stack([classes % 2, classes > 4, np.isin(classes, (0, 6, 8, 9))], axis=1).astype(int)
    return (digits.images[:120] / 16).astype(np.float32), labels


@pytest.mark.parametrize("intercept", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_label_is_the_cross_entropy_of_two_classes_at_another_beta(intercept):
    """Two logits of opposite sign have, for the same difference, 1/√2 of the length."""
    x, y = draws(20, 2), (draws(20, seed=1) > 0).long()
    options = {"intercept": intercept, "tol": 1e-7}
    one = convcvx.solve(x, y[:, None].double(), 0.02, loss="bce", **options)
    two = convcvx.solve(x, y, 0.02 * math.sqrt(2), loss="cross-entropy", **options)
    assert one.weights.shape[2] == 1
    assert one.certificate.scope == two.certificate.scope == "global"
    assert one.certificate.primal == pytest.approx(two.certificate.primal, rel=1e-6)
    assert one.certificate.dual == pytest.approx(two.certificate.dual, rel=1e-6)
    other = convcvx.solve(x, y, 0.02, loss="cross-entropy", **options)
    assert one.certificate.primal != pytest.approx(other.certificate.primal, rel=1e-3)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_the_dual_value_is_below_the_exact_one_of_a_feasible_point(seed, weighted, intercept):
    """In 60 digits: a dual point is scaled, moved to where it is feasible, and has its value there."""
    n, c = 6 + seed % 5, 1 + seed % 3
    targets = (draws(n, c, seed=seed) > 0).double() if seed % 2 else draws(n, c, seed=seed).sigmoid()
    shares = Shares.of(torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.1 if weighted else None, n)
    predictions = 10 ** (seed % 4 - 1) * draws(n, c, seed=seed + 1)
    if intercept:
        predictions = predictions + BCE.best_intercept(predictions, targets, shares)
    residual = -shares.times(BCE.gradient(predictions, targets))
    point = BCE.in_domain(residual, targets, shares, intercept)
    with mpmath.workdps(60):
        counts = [mpmath.mpf(w) for w in shares.counts.tolist()]
        parts = [count / sum(counts) for count in counts for _ in range(c)]
        given, steps = ([mpmath.mpf(v) for v in values.flatten().tolist()] for values in (targets, point))
        best = mpmath.mpf(0)
        for scale in [mpmath.mpf(k) / 64 for k in range(65)]:
            value = mpmath.mpf(0)
            for share, y, step in zip(parts, given, steps, strict=True):
                q = min(max(y - scale * step / share, mpmath.mpf(0)), mpmath.mpf(1))
                value -= share * sum(p * mpmath.log(p) if p > 0 else 0 for p in (q, 1 - q))
            best = max(best, value)
        found = BCE.dual(point, targets, shares, 1.0, intercept)
        assert 0 <= found <= best * (1 + mpmath.mpf(10) ** -3)  # scalings between those of the grid
        assert found >= best * (1 - mpmath.mpf(10) ** -6)
    errors = BCE.dual_error(point, targets, shares, intercept)
    assert bool((errors <= 1e-13).all())
    if intercept:
        assert float(point.sum(dim=0).abs().max()) <= float(errors.sum()) * 4 + 1e-15


def test_a_label_that_no_image_has_costs_nothing():
    targets = torch.stack([torch.arange(8) % 2, torch.zeros(8), torch.ones(8)], dim=1).double()
    problem = build_problem(patches_to_images(draws(8, 2)), targets, 0.05, loss="bce", spec=PatchSpec((1, 1)))
    constant = problem.constant_predictions()
    assert problem.mean_loss(constant) == pytest.approx(math.log(2))
    point = problem.dual_point(constant)
    assert bool((point[:, 1:] == 0).all())
    assert problem.dual(point, 0.0) == pytest.approx(math.log(2), rel=1e-9)


@pytest.mark.parametrize("scale", [0.1, 30, 1000])
def test_the_best_intercept_is_best_for_each_label_from_any_start(scale):
    f, targets = scale * draws(40, 3), (draws(40, 3, seed=1) > 0.5).double()
    start = 10 * scale * draws(3, seed=2)
    shares = Shares.equal(40)
    shift = BCE.best_intercept(f, targets, shares, start)
    best = float(shares.mean(BCE.value(f + shift, targets)))
    assert best <= float(shares.mean(BCE.value(f + start, targets)))
    assert best <= float(shares.mean(BCE.value(f, targets)))
    for k in range(3):
        for step in (-1e-2 * scale, 1e-2 * scale):
            other = shift.clone()
            other[k] += step
            assert float(shares.mean(BCE.value(f + other, targets))) >= best * (1 - 1e-12)


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
@pytest.mark.parametrize(
    ("solver", "close"),
    [
        ("sliding-fw", 1e-4),
        *(pytest.param(*rest, marks=pytest.mark.slow) for rest in [("frank-wolfe", 1e-2), ("gated", 2e-2)]),
    ],
)
def test_solvers_reach_the_optimum(solver, close):
    x, labels = draws(16, 2, 2), (draws(16, 2, seed=3) > 0).double()
    found = convcvx.solve(x, labels, 0.02, loss="bce", solver=solver, tol=1e-4, max_rounds=30)
    best = convcvx.solve(x, labels, 0.02, loss="bce", tol=1e-6)
    assert best.certificate.dual <= found.certificate.primal <= best.certificate.primal * (1 + close)


def test_solvers_without_it_say_so():
    for solver in ("copositive", "closed-form"):
        with pytest.raises(InputError, match=r"needs loss .*got 'bce'"):
            convcvx.solve(draws(10, 2), (draws(10, 2, seed=1) > 0).double(), 0.05, loss="bce", solver=solver)


def test_labels_are_trained_certified_saved_and_scored(labelled, tmp_path):
    images, labels = labelled
    fit = convcvx.fit(images, labels, loss="bce", validation=0.25, **LAYER)
    assert fit.certificate.scope == "global"
    assert fit.certificate.rel_gap <= 1e-3
    assert fit.metrics["train_accuracy"] is None
    assert 0 < fit.metrics["validation_exact_match"] <= 1
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:40], "y_test": labels[:40]}
    np.savez(tmp_path / "set.npz", **arrays)
    flags = ["--kernel-size", "3", "--rank", "2", "--pool", "2", "--beta", "0.01", "--tol", "1e-3", "--loss", "bce"]
    done = invoke("train", "--data", tmp_path / "set.npz", *flags, "--out", tmp_path / "run", "--json")
    metrics = json.loads(done.stdout)
    plain = convcvx.fit(images, labels, loss="bce", **LAYER)
    assert metrics["primal"] == plain.certificate.primal
    outputs = convcvx.load(tmp_path / "run").network(torch.as_tensor(images[:40])[:, None]) > 0
    assert metrics["test_macro_f1"] == pytest.approx(f1_score(labels[:40], outputs.numpy(), average="macro"))
    assert "macro F1" in invoke("train", "--out", tmp_path / "run", "--resume").output
    again = json.loads(invoke("certify", tmp_path / "run", "--json", *NO_SEARCH).stdout)
    assert again["primal"] == pytest.approx(metrics["primal"], rel=1e-9)
    whole, known = torch.as_tensor(images)[:, None], {"embedding": plain.solution.embedding, **NO_TIME}
    by_hand = convcvx.certify(plain.network, whole, labels.astype(float), 0.01, loss="bce", **known)
    assert by_hand.primal == pytest.approx(metrics["primal"], rel=1e-6)


def test_scores_are_those_of_scikit_learn():
    outputs, labels, weights = draws(50, 4), (draws(50, 4, seed=1) > 0).double(), draws(50, seed=2).abs()
    found = real_scores(outputs, labels, "bce", weights)
    right = ((outputs > 0) == (labels > 0.5)).all(dim=1).double()
    assert found["exact_match"] == pytest.approx(float(weights @ right / weights.sum()))
    f1 = f1_score(labels.numpy(), (outputs > 0).numpy(), average="macro", sample_weight=weights.numpy())
    assert found["macro_f1"] == pytest.approx(f1)
    found = real_scores(outputs, draws(50, 4, seed=3), "squared", weights)
    r2 = r2_score(draws(50, 4, seed=3), outputs, sample_weight=weights, multioutput="variance_weighted")
    assert found["r2"] == pytest.approx(r2)
    for constant in (1.0, 0.1, 7.7):  # whose variance is 0, or rounding
        same = torch.full((50, 4), constant).double()
        same[0] = 5.0
        assert "r2" not in real_scores(outputs, same, "squared", weights * (torch.arange(50) > 0))
        assert "r2" in real_scores(outputs, same, "squared", weights)


def test_labels_beside_0_and_1_are_refused(labelled, tmp_path):
    images, labels = labelled
    with pytest.raises(InputError, match=r"labels from 0 to 1, with loss='bce'"):
        convcvx.fit(images, 2.0 * labels, loss="bce", **LAYER)
    with pytest.raises(ValueError, match=r"integer classes or \(n, c\) floats"):
        convcvx.fit(images, 2 * labels, loss="bce", **LAYER)
