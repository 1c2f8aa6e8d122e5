"""Squares as the activation: against torch, nuclear norms by cvxpy, eigenvalues, the judge's exact g, and refusals."""

from __future__ import annotations

import cvxpy as cp
import judge
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import convcvx
from convcvx.activations import QUADRATIC, Activation, Square
from convcvx.baseline import Twin
from convcvx.certificate import Certificate, certify_parameters, judged
from convcvx.errors import InputError
from convcvx.network.certify import parameters_of
from convcvx.network.layers import read_network
from convcvx.oracles import (
    CylinderOracle,
    ExactOracle,
    FamilyOracle,
    PolynomialOracle,
    RemainderOracle,
    SpectralOracle,
    Ternary,
    pick_oracle,
)
from convcvx.oracles.forms import forms
from convcvx.oracles.lengths import bound_by_lengths
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.problem import Problem
from convcvx.responses import Responses
from convcvx.stack.features import fit_link, stream_features
from convcvx.stack.network import StackedCNN
from convcvx.training.functional import patches_to_images
from convcvx.training.plan import build_problem

POOL = np.array([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
IMAGES, CLASSES = torch.rand(12, 1, 5, 5, generator=torch.Generator().manual_seed(7)), torch.arange(12) % 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squares(d: int = 3, outputs: int = 1, pooling=None, seed: int = 0, beta: float = 0.05, **options) -> Problem:
    """Ten samples of three patches with d entries, not centred."""
    patches = patches_to_images(normal(10, 3, d, seed=seed) + 0.3)
    how = {"spec": PatchSpec((1, 1)), "pooling": pooling, "activation": "quadratic", "dtype": torch.float64}
    return build_problem(patches, normal(10, outputs, seed=seed + 1), beta, **how, **options)


def heights(problem: Problem, filters: Tensor, dual_point: Tensor) -> Tensor:
    """g of filters, from the patches alone."""
    rows = problem.responses.rows(slice(None)).double() @ problem.responses.embedding.basis.T
    pool = problem.responses.pooling.matrix(*problem.responses.map_size)
    pooled = torch.einsum("pk,nmk->nmp", pool, torch.einsum("nkd,md->nmk", rows, F.normalize(filters)).square())
    return torch.einsum("nmp,nc->mpc", pooled, dual_point).flatten(1).norm(dim=1)


@pytest.mark.parametrize(("pool", "small"), [("2", True), ("none", False)])
def test_responses_are_those_of_squared_kernels_and_slopes_those_of_torch(pool, small):
    images, spec = normal(7, 2, 7, 7), PatchSpec((2, 2), hidden_bias=True)
    embedding = PatchEmbedding.fit(images, spec)
    made = Responses(images, embedding, Pooling.of(pool), dtype=torch.float64, small=small, activation=QUADRATIC)
    filters = normal(9, embedding.dim, seed=1).requires_grad_()
    kernels = filters / filters.norm(dim=1, keepdim=True).sqrt() @ embedding.basis
    maps = F.conv2d(images, kernels[:, :-1].view(-1, 2, 2, 2), kernels[:, -1])
    pooled = Pooling.of(pool).module()(maps.square()).flatten(2)
    dual_point, towards = normal(7, 3, seed=2), normal(*pooled.shape[1:], 3, seed=3)
    correlations = torch.einsum("imp,ic->mpc", pooled, dual_point)
    (slopes,) = torch.autograd.grad((correlations * towards).sum(), filters)
    found, climbed = made.ascent(filters.detach(), dual_point, towards)
    assert torch.allclose(found, correlations, atol=1e-11)
    assert torch.allclose(climbed, slopes, atol=1e-11)
    assert torch.allclose(made.matrix(3 * filters.detach()), 3 * made.matrix(filters.detach()))  # of degree one
    assert torch.equal(made.matrix(torch.zeros(1, embedding.dim)), torch.zeros(7, 1, pooled.shape[2]).double())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.booleans(), st.sampled_from([1.0, 1e-6, 1e5]), st.integers(0, 10**6))
def test_no_filter_exceeds_what_is_proved(d, outputs, cells, scale, seed):
    """Bounds by eigenvalues, by polynomials of either degree and by lengths, at any dual point."""
    problem = squares(d, outputs, POOL if cells else None, seed)
    dual_point = problem.in_domain(scale * normal(10, outputs, seed=seed + 2))
    one = outputs == 1 and not cells
    filters = torch.cat([normal(300, d, seed=3), torch.linalg.eigh(forms(problem, dual_point)[0, 0]).eigenvectors.T])
    top = float(heights(problem, filters, dual_point).max())
    oracles = [PolynomialOracle(degree=2), PolynomialOracle(degree=1)] + ([SpectralOracle()] if one else [])
    for oracle in oracles:
        assert oracle(problem, dual_point).upper_bound >= top, oracle
    assert bound_by_lengths(problem, dual_point) >= top
    if one:
        found = SpectralOracle()(problem, dual_point, n_filters=2)
        assert found.upper_bound <= top * (1 + 1e-9)
        assert torch.allclose(heights(problem, found.filters, dual_point), found.values, rtol=1e-9, atol=1e-300)


def test_bounds_and_objectives_stand_before_the_exact_judge():
    problem = squares(3, 2, POOL, intercept=False)
    images = problem.responses.images
    theirs = judge.Problem(images.numpy(), problem.targets.numpy(), 0.05, intercept=False, pool=POOL, degree=2)
    dual_point = problem.residual(problem.constant_predictions())
    bound = PolynomialOracle()(problem, dual_point).upper_bound
    basis = problem.responses.embedding.basis
    points = (normal(20, 3, seed=5) @ basis).numpy()
    assert judge.exceeds(theirs, dual_point.numpy(), bound, points) is None
    assert judge.exceeds(theirs, dual_point.numpy(), 0.1 * bound, points) is not None  # negative control
    filters, weights = normal(4, 3, seed=6), normal(4, 2, 2, seed=7)
    network = judge.Network((QUADRATIC.kernels(filters) @ basis).numpy(), weights.numpy(), np.zeros(2))
    ours = certify_parameters(problem, filters, weights, oracle="polynomial")
    assert ours.primal == pytest.approx(float(theirs.objective(network)), rel=1e-12)
    for scale in (1.0, 1e-2, 1e-4):
        other = judge.Network(scale * network.filters, network.weights, network.bias)
        assert theirs.objective(other) >= ours.dual > 0


def test_a_scan_of_a_family_sees_both_signs():
    problem = squares(2, 2, POOL)
    dual_point = problem.dual_point(problem.constant_predictions())
    ternary = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0]).double()] * 2)
    top = float(heights(problem, ternary[ternary.norm(dim=1) > 0], dual_point).max())
    assert top <= FamilyOracle(Ternary())(problem, dual_point).upper_bound <= top * (1 + 1e-9)


def test_dictionaries_of_squares_have_a_proved_gap():
    """Trained with flips, and exported: nothing of a training is lost for want of a proof."""
    options = {"dictionary": 6, "max_rounds": 0, "flips": True, "beta": 0.01, "tol": 1.0}
    found = convcvx.fit(IMAGES, CLASSES, kernel_size=3, activation="quadratic", **options).certificate
    assert 0 <= found.family_gap < 1


@pytest.mark.parametrize("beta", [0.3, 0.05, 0.01])
def test_the_optimum_is_that_of_nuclear_norm_regression_on_squares(beta):
    patches, targets = normal(20, 3, 4) + 0.2, normal(20, 1, seed=1)
    moments = torch.einsum("nki,nkj->nij", patches, patches).numpy() / 3
    matrix, shift = cp.Variable((4, 4), symmetric=True), cp.Variable()
    prediction = cp.hstack([cp.trace(moment @ matrix) for moment in moments]) + shift
    data = cp.sum_squares(prediction - targets[:, 0].numpy()) / 40
    expected = cp.Problem(cp.Minimize(data + beta * cp.normNuc(matrix))).solve(solver="CLARABEL")
    ours = convcvx.solve(patches, targets, beta, activation="quadratic", tol=1e-8).certificate
    assert (ours.scope, ours.oracle) == ("global", "spectral")
    assert ours.rel_gap <= 1e-8
    assert ours.primal == pytest.approx(expected, rel=1e-7)


def test_of_one_patch_in_one_dimension_the_optimum_is_known():
    """x = 1, y = 1: min ½ (v - 1)² + β v over v >= 0, without an intercept."""
    found = convcvx.solve(np.ones((1, 1)), np.ones((1, 1)), 0.25, activation="quadratic", intercept=False, tol=1e-10)
    assert found.certificate.primal == pytest.approx(0.25 - 0.25**2 / 2, rel=1e-10)
    assert found.certificate.dual <= 0.25 - 0.25**2 / 2


def test_two_classes_are_proved_and_more_are_estimated_with_a_proof_beside():
    patches = normal(15, 3, 4)
    two = convcvx.solve(patches, torch.arange(15) % 2, 0.02, activation="quadratic", tol=1e-6).certificate
    assert (two.scope, two.oracle) == ("global", "spectral")
    assert two.rel_gap <= 1e-6
    three = convcvx.solve(patches, torch.arange(15) % 3, 0.02, activation="quadratic", tol=1e-3).certificate
    assert three.scope == "heuristic"
    assert 0.5 * three.primal < three.proved <= three.primal


class Squared(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(1, 3, 2), nn.Linear(3, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.function(self.convolution(x)).mean((2, 3)))


def test_networks_are_exported_read_back_and_certified_however_they_square(tmp_path):
    options = {"kernel_size": 2, "pool": "global", "beta": 0.01, "tol": 1e-5, "hidden_bias": True}
    found = convcvx.fit(IMAGES, CLASSES, activation="quadratic", **options, out=tmp_path / "run")
    own, network = found.certificate, found.network
    assert (own.scope, own.activation, network.architecture.activation) == ("global", "quadratic", "quadratic")
    assert own.rel_gap <= 1e-5
    assert isinstance(network[1], Square)
    kernels = network[0].weight.flatten(1).square().sum(dim=1) + network[0].bias.square()
    assert torch.allclose(kernels, network[4].weight.norm(dim=0), rtol=1e-4)  # balanced: ‖k‖² = ‖V‖
    assert torch.equal(convcvx.load(tmp_path / "run").network(IMAGES), network(IMAGES))
    for function in (torch.square, lambda t: t**2, lambda t: t * t, lambda t: torch.pow(t, 2)):
        module = Squared(function).eval()
        theirs = convcvx.certify(module, IMAGES, CLASSES, 0.01)
        layers = read_network(module, IMAGES.shape[1:])
        filters, weights, _ = parameters_of(layers, PatchEmbedding.fit(IMAGES, layers.spec))
        decay = (filters.norm(dim=1) * weights.flatten(1).norm(dim=1)).sum().detach()
        outputs = nn.functional.one_hot(CLASSES) - module(IMAGES).detach().double()
        error = (outputs - outputs.mean(dim=0)).square().sum() / 24
        assert theirs.activation == "quadratic"
        assert theirs.primal == pytest.approx(float(error + 0.01 * decay), rel=1e-5)
        assert theirs.dual <= own.primal
    with pytest.raises(InputError, match="activation is"):
        own.with_bound_of(Certificate.from_dict(own.to_dict() | {"activation": "abs"}))


def test_the_twin_has_the_objective_that_is_proved():
    problem = squares(3)
    twin = Twin(problem, 4, seed=1)
    filters, weights, _ = judged(problem, twin.filters.detach().double(), twin.weights.detach().double())
    outputs = twin.network()(problem.responses.images.float()).detach().double()
    predictions = problem.responses.predict(filters, weights, twin.intercept.detach().double())
    assert torch.allclose(outputs, predictions, atol=1e-5)


def test_features_of_a_stage_are_those_of_the_module():
    networks = convcvx.fit(IMAGES, CLASSES, activation="quadratic", kernel_size=2, beta=0.01, tol=1.0, max_rounds=1)
    stage = networks.network
    link = fit_link(stage, IMAGES, 2, 2)
    head = convcvx.network.two_layer_cnn(image_shape=(2, 2, 2), n_filters=2, n_outputs=2, kernel_size=(1, 1)).eval()
    stack = StackedCNN([stage, head], [link]).eval()
    assert torch.allclose(next(stream_features(stage, link, IMAGES)).float(), stack.features(IMAGES, 1), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"oracle": "exact"}, "oracle exact needs an activation of degree 1; got activation quadratic"),
        ({"oracle": "sampled"}, "an activation of degree 1"),
        ({"solver": "gated"}, "an activation of degree 1"),
        ({"oracle": ExactOracle()}, "an activation of degree 1"),
        ({"oracle": CylinderOracle()}, "an activation of degree 1"),
        ({"oracle": RemainderOracle()}, "an activation of degree 1"),
        ({"solver": "copositive"}, "needs the ReLU; got activation quadratic"),
        ({"solver": "closed-form"}, "needs activation relu or linear"),
        ({"oracle": "spectral"}, "needs activation linear, or quadratic with pool global and one output or two"),
        ({"pooling": "max:global"}, "activation quadratic must come with average pooling"),
    ],
)
def test_what_knows_no_squares_refuses_by_name(options, said):
    with pytest.raises(InputError, match=said):
        convcvx.solve(normal(6, 4), normal(6, 3), 0.1, activation="quadratic", **options)


def test_extreme_images_are_refused_as_their_fourth_powers_would_overflow():
    with pytest.raises(InputError, match="with activation quadratic, which squares responses"):
        convcvx.solve(1e30 * normal(6, 2), normal(6, 1), 0.1, activation="quadratic")


def test_no_other_activation_of_degree_two_is_made():
    with pytest.raises(InputError, match="must be quadratic"):
        Activation(0.5, 2)
    assert pick_oracle("auto", squares(2, 3))[0] == "local"
