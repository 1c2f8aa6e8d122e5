"""Activations: against torch's own, the circle of filters, mirrored problems, cvxpy, networks that are read back."""

from __future__ import annotations

import math

import cvxpy as cp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.commands import answer, cli, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import convcvx
from convcvx.activations import ABSOLUTE, LINEAR, RELU, Abs, Activation
from convcvx.certificate import Certificate
from convcvx.errors import InputError
from convcvx.network.architecture import Architecture
from convcvx.network.certify import certify_on
from convcvx.network.export import export
from convcvx.network.two_layer import TwoLayerCNN, two_layer_cnn
from convcvx.oracles import (
    BranchAndBoundOracle,
    CylinderOracle,
    ExactOracle,
    FamilyOracle,
    LocalOracle,
    Oracle,
    PolynomialOracle,
    RemainderOracle,
    SampledOracle,
    SpectralOracle,
    Ternary,
    pick_oracle,
)
from convcvx.oracles.lengths import bound_by_lengths
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.problem import Problem
from convcvx.responses import Responses
from convcvx.responses.fused import Fused
from convcvx.stack.features import fit_link, stream_features
from convcvx.stack.network import StackedCNN
from convcvx.training.functional import patches_to_images
from convcvx.training.plan import build_problem

TEXTS = ("relu", "leaky-relu:0.3", "abs", "linear")
OTHERS = TEXTS[1:]
FUNCTIONS = {
    "relu": F.relu,
    "leaky-relu:0.3": lambda t: F.leaky_relu(t, 0.3),
    "abs": torch.abs,
    "linear": lambda t: t,
}
POOL = np.array([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plane(text: str, seed: int = 0, *, d: int = 2, pooling=POOL, **options) -> Problem:
    """Ten samples of three patches with d entries, not centred."""
    patches = patches_to_images(normal(10, 3, d, seed=seed) + 0.3)
    targets = normal(10, 2, seed=seed + 1)
    how = {"spec": PatchSpec((1, 1)), "pooling": pooling, "activation": text, "dtype": torch.float64}
    return build_problem(patches, targets, 0.02, **how, **options)


def circle(count: int = 4000) -> Tensor:
    angles = torch.linspace(0, 2 * math.pi, count + 1, dtype=torch.float64)[:-1]
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def heights(problem: Problem, filters: Tensor, dual_point: Tensor) -> Tensor:
    """g of filters."""
    return problem.responses.correlate(filters, dual_point).flatten(1).norm(dim=1)


def dense(text: str, patches: Tensor, filters: Tensor) -> Tensor:
    """(n, m, P) pooled responses of (n, K, d) patches, written out."""
    activated = FUNCTIONS[text](torch.einsum("nkd,md->nmk", patches, filters))
    return torch.einsum("pk,nmk->nmp", torch.from_numpy(POOL), activated)


# Words


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_written_is_read_back(text):
    activation = Activation.of(text.upper())
    assert Activation.of(str(activation)) == activation
    assert Activation.of_module(activation.module()) in (activation, None if text == "linear" else activation)
    t = normal(50)
    assert torch.equal(activation.module()(t.clone()), FUNCTIONS[text](t))


@pytest.mark.parametrize("text", ["gelu", "leaky-relu:0", "leaky-relu:1.5", "leaky-relu:nan", "leaky-relu:x", ""])
def test_other_words_are_refused_with_the_remedy(text):
    with pytest.raises(InputError, match="activation must be relu, abs, linear, quadratic or leaky-relu:SLOPE"):
        Activation.of(text)


# Responses


@pytest.mark.parametrize("text", OTHERS)
@pytest.mark.parametrize(("pool", "small"), [("2", True), ("2", False), ("3", True), ("none", True), ("max:2", False)])
def test_responses_and_their_adjoints_are_those_of_torch(text, pool, small):
    """In registers, by matrix products, of averages and of maxima; by torch's derivatives."""
    images, spec = normal(7, 2, 7, 7).float(), PatchSpec((2, 2), hidden_bias=True)
    embedding = PatchEmbedding.fit(images, spec)
    dtype = torch.float64 if small else torch.float32
    made = Responses(images, embedding, Pooling.of(pool), dtype=dtype, small=small, activation=Activation.of(text))
    assert isinstance(made.convolution, Fused) == (not small and (pool == "2" or text != "abs"))
    filters = normal(9, embedding.dim, seed=1).requires_grad_()
    kernels = filters @ embedding.basis
    maps = F.conv2d(images.double(), kernels[:, :-1].view(-1, 2, 2, 2), kernels[:, -1])
    pooled = Pooling.of(pool).module()(FUNCTIONS[text](maps)).flatten(2)
    dual_point, towards = normal(7, 3, seed=2), normal(*pooled.shape[1:], 3, seed=3)
    correlations = torch.einsum("imp,ic->mpc", pooled, dual_point)
    (slopes,) = torch.autograd.grad((correlations * towards).sum(), filters)
    found, climbed = made.ascent(filters.detach(), dual_point, towards)
    tolerance = 1e-12 if small else 1e-4
    assert torch.allclose(found, correlations, atol=tolerance)
    assert torch.allclose(climbed, slopes, atol=tolerance)


def test_negative_control_the_relu_differs():
    filters = circle(7)
    assert not torch.allclose(plane("relu").responses.matrix(filters), plane("abs").responses.matrix(filters))


# Proofs


def oracles(text: str) -> list[Oracle]:
    own = [SpectralOracle()] if text == "linear" else []
    return [ExactOracle(), BranchAndBoundOracle(1e-6), PolynomialOracle(), CylinderOracle(2, time_limit=1.0), *own]


@pytest.mark.parametrize("text", OTHERS)
def test_proved_bounds_lie_above_the_whole_circle_and_exact_ones_touch_it(text):
    problem = plane(text)
    dual_point = problem.dual_point(problem.constant_predictions())
    patches = normal(10, 3, 2) + 0.3
    values = torch.einsum("nmp,nc->mpc", dense(text, patches, circle()), dual_point).flatten(1).norm(dim=1)
    top = float(values.max())
    for oracle in oracles(text):
        found = oracle(problem, dual_point)
        assert found.scope == "global"
        assert found.upper_bound >= top, oracle.name
        if oracle.name in ("exact", "branch-and-bound", "spectral"):
            assert found.upper_bound <= float(found.values[0]) * (1 + 1e-5), oracle.name
            assert torch.allclose(found.values, heights(problem, found.filters, dual_point), rtol=1e-9)
    assert bound_by_lengths(problem, dual_point) >= top
    assert float(LocalOracle()(problem, dual_point).values.max()) >= 0.99 * top


@pytest.mark.parametrize("text", OTHERS)
def test_bounds_of_ranks_that_no_sweep_reaches_hold_for_random_filters(text):
    problem = plane(text, d=4)
    dual_point = problem.dual_point(problem.constant_predictions())
    values = heights(problem, F.normalize(normal(3000, 4, seed=5)), dual_point)
    best = LocalOracle()(problem, dual_point)
    top = max(float(values.max()), float(best.values.max()))
    for oracle in (RemainderOracle(2, BranchAndBoundOracle(1e-3)), PolynomialOracle(), PolynomialOracle(degree=1)):
        assert oracle(problem, dual_point).upper_bound >= top, oracle
    of_patterns = SampledOracle(gates=best.filters)(problem, dual_point)
    assert of_patterns.upper_bound >= float(best.values.max())


@settings(max_examples=15, deadline=None)
@given(st.floats(-1, 1), st.integers(0, 1000))
def test_no_filter_exceeds_the_exact_bound_at_any_slope_and_dual_point(slope, seed):
    problem = plane(Activation(slope), seed)
    dual_point = problem.in_domain(normal(10, 2, seed=seed + 2))
    top = float(heights(problem, circle(500), dual_point).max())
    found = ExactOracle()(problem, dual_point)
    assert top <= found.upper_bound <= float(heights(problem, found.filters, dual_point)[0]) * (1 + 1e-9)
    assert PolynomialOracle()(problem, dual_point).upper_bound >= top


@pytest.mark.parametrize("text", ["leaky-relu:0.3", "linear"])
def test_the_bound_of_maxima_holds_where_responses_may_be_negative(text):
    problem = build_problem(normal(8, 1, 4, 4), normal(8, 2, seed=1), 0.1, pooling="max:2", activation=text)
    dual_point = problem.dual_point(problem.constant_predictions())
    bound = PolynomialOracle()(problem, dual_point).upper_bound
    assert float(heights(problem, F.normalize(normal(4000, 9, seed=2)), dual_point).max()) <= bound


@pytest.mark.parametrize("text", OTHERS)
def test_a_scan_of_a_family_sees_both_signs(text):
    problem = plane(text)
    dual_point = problem.dual_point(problem.constant_predictions())
    ternary = F.normalize(torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0]).double()] * 2))
    top = float(heights(problem, ternary[ternary.norm(dim=1) > 0], dual_point).max())
    found = FamilyOracle(Ternary())(problem, dual_point)
    assert top <= found.upper_bound <= top * (1 + 1e-9)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_without_activation_the_spectral_bound_is_tight_at_any_rank(rank):
    problem = plane("linear", d=rank)
    dual_point = problem.dual_point(problem.constant_predictions())
    found = SpectralOracle()(problem, dual_point, n_filters=3)
    assert pick_oracle("auto", problem)[0] == "spectral"
    assert torch.allclose(heights(problem, found.filters, dual_point), found.values, rtol=1e-10)
    assert float(found.values[0]) <= found.upper_bound <= float(found.values[0]) * (1 + 1e-9)


# Optima


def test_the_absolute_value_is_the_relu_on_patches_and_their_negatives():
    patches, targets = normal(24, 2), normal(24, 1, seed=1)
    both = torch.stack([patches, -patches], dim=1)
    ours = convcvx.solve(patches, targets, 0.05, activation="abs", tol=1e-7).certificate
    theirs = convcvx.solve(both, targets, 0.05, pooling=np.ones((1, 2)), tol=1e-7).certificate
    assert ours.primal == pytest.approx(theirs.primal, rel=1e-6)
    assert ours.scope == theirs.scope == "global"


def cells_optimum(patches: np.ndarray, targets: np.ndarray, beta: float, slope: float) -> float:
    """Of one output and one patch a sample, by the convex program over all activation cells of the plane."""
    middles = np.sort(np.concatenate([np.arctan2(patches[:, 1], patches[:, 0]) + q * math.pi / 2 for q in (1, 3)]))
    angles = np.concatenate([middles + 1e-4, middles - 1e-4])
    signs = np.unique(np.sign(patches @ np.stack([np.cos(angles), np.sin(angles)])).T, axis=0)
    prediction, penalty, constraints = 0, 0, []
    for sign in signs:
        gains = np.where(sign > 0, 1.0, slope)
        for output in (1, -1):
            u = cp.Variable(2)
            constraints.append((sign[:, None] * patches) @ u >= 0)
            prediction = prediction + output * ((gains[:, None] * patches) @ u)
            penalty = penalty + cp.norm(u)
    loss = cp.sum_squares(prediction - targets) / (2 * len(targets))
    return cp.Problem(cp.Minimize(loss + beta * penalty), constraints).solve(solver="CLARABEL")


@pytest.mark.parametrize("text", ["leaky-relu:0.3", "abs"])
def test_the_optimum_is_that_of_the_convex_program_over_all_cells(text):
    patches, targets = normal(8, 2, seed=3), normal(8, seed=4)
    solution = convcvx.solve(patches, targets[:, None], 0.03, activation=text, intercept=False, tol=1e-7)
    expected = cells_optimum(patches.numpy(), targets.numpy(), 0.03, Activation.of(text).slope)
    assert solution.certificate.primal == pytest.approx(expected, rel=1e-6)
    gated = convcvx.solve(
        patches, targets[:, None], 0.03, activation=text, intercept=False, solver="gated", oracle="exact", tol=1e-5
    )
    assert gated.certificate.primal == pytest.approx(expected, rel=1e-3)


def test_without_activation_the_optimum_is_that_of_nuclear_norm_regression():
    patches, targets = normal(12, 3, 4), normal(12, 2, seed=1)
    pooled = np.einsum("pk,nkd->npd", POOL, patches.numpy())
    matrices = [cp.Variable((4, 2)) for _ in POOL]
    prediction = sum(pooled[:, p] @ matrix for p, matrix in enumerate(matrices))
    loss = cp.sum_squares(prediction - targets.numpy()) / 24
    program = cp.Problem(cp.Minimize(loss + 0.05 * cp.normNuc(cp.hstack(matrices))))
    expected = program.solve(solver="CLARABEL")
    ours = convcvx.solve(patches, targets, 0.05, pooling=POOL, activation="linear", intercept=False, tol=1e-7)
    assert ours.certificate.primal == pytest.approx(expected, rel=1e-6)
    assert (ours.certificate.scope, ours.certificate.oracle) == ("global", "spectral")


def test_constant_patches_are_of_no_use_without_activation():
    assert convcvx.beta_max(np.ones((5, 2)), normal(5, 1), activation="linear") == 0
    assert convcvx.beta_max(normal(5, 2), normal(5, 1), activation="linear") > 1e-3


def test_the_closed_form_of_linear_networks_is_their_optimum():
    patches, targets = torch.linalg.qr(normal(15, 4))[0], normal(15, 2, seed=1)
    options = {"activation": "linear", "intercept": False, "tol": 1e-8}
    by_form = convcvx.solve(patches, targets, 0.005, solver="closed-form", **options)
    by_search = convcvx.solve(patches, targets, 0.005, solver="sliding-fw", **options)
    assert by_form.history[-1]["closed_form"]["linear_is"] == "optimum"
    assert by_form.certificate.rel_gap <= 1e-8
    assert by_form.certificate.primal == pytest.approx(by_search.certificate.primal, rel=1e-7)


def test_no_filter_comes_with_its_negative_where_that_says_the_same():
    filters = convcvx.solve(normal(20, 2), normal(20, 2, seed=1), 0.02, activation="abs", tol=1e-4).filters
    assert float((filters @ filters.T - torch.eye(len(filters))).abs().max()) < 1 - 1e-6


# Networks


class Functional(nn.Module):
    def __init__(self, network: TwoLayerCNN, function) -> None:
        super().__init__()
        self.convolution, self.pool, self.linear = network[0], network[2], network[4]
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(self.function(self.convolution(x))).flatten(1))


IMAGES, CLASSES = normal(12, 1, 5, 5).float(), torch.arange(12) % 3
FIT = {"kernel_size": (1, 2), "pool": 2, "beta": 0.05, "tol": 1.0, "oracle": "exact", "max_rounds": 1}
"""Of rank 2, where a proof is a matter of milliseconds."""


@pytest.mark.parametrize("text", OTHERS)
def test_networks_are_exported_read_back_and_certified(text, tmp_path):
    found = convcvx.fit(IMAGES, CLASSES, activation=text, **FIT, out=tmp_path / "run")
    network, own = found.network, found.certificate
    assert own.activation == text == network.architecture.activation
    assert f"with activation {text}" in own.meaning
    again = convcvx.load(tmp_path / "run")
    assert torch.equal(again.network(IMAGES), network(IMAGES))
    assert (again.solution.activation, again.certificate) == (Activation.of(text), own)
    written_out = nn.Sequential(*network)
    for other in (written_out, Functional(network, FUNCTIONS[text]).eval(), two_layer_cnn(tmp_path / "run")):
        theirs = convcvx.certify(other, IMAGES, CLASSES, 0.05, oracle="exact")
        assert theirs.activation == text
        assert theirs.primal == pytest.approx(own.primal, rel=1e-6)
    with pytest.raises(InputError, match="activation is"):
        own.with_bound_of(Certificate.from_dict(own.to_dict() | {"activation": "relu"}))


@pytest.mark.slow
@pytest.mark.parametrize("text", [*OTHERS, "quadratic"])
@pytest.mark.parametrize("to", ["torch", "onnx", "sklearn"])
def test_files_for_others_give_the_same_scores(text, to, tmp_path):
    network = TwoLayerCNN(Architecture((1, 5, 5), 3, 3, pool="2", activation=text))
    assert export(network, network.image_shape, tmp_path / "network", to) < 1e-5


def test_negative_control_a_network_with_another_activation_is_none_of_the_problem():
    network = TwoLayerCNN(Architecture((1, 5, 5), 3, 3, activation="abs"))
    problem = build_problem(IMAGES, CLASSES, 0.1, n_classes=3)
    with pytest.raises(InputError, match="the network's activation is abs, that of the problem relu"):
        certify_on(problem, network)


def test_features_of_a_stage_are_those_of_the_module():
    stage = TwoLayerCNN(Architecture((1, 5, 5), 4, 3, (2, 2), activation="leaky-relu:0.3")).eval()
    link = fit_link(stage, IMAGES, 2, 2)
    head = TwoLayerCNN(Architecture((2, 2, 2), 2, 3, (1, 1), activation="abs")).eval()
    stack = StackedCNN([stage, head], [link]).eval()
    assert torch.allclose(next(stream_features(stage, link, IMAGES)).float(), stack.features(IMAGES, 1), atol=1e-3)
    assert torch.allclose(stack.sequential()(IMAGES), stack(IMAGES))


def test_files_of_earlier_versions_mean_the_relu():
    written = {"image_shape": [1, 5, 5], "n_filters": 2, "n_outputs": 3}
    assert Activation.of(Architecture.from_dict(written).activation) == RELU
    assert Activation.of(None) == RELU
    assert {str(a) for a in (RELU, ABSOLUTE, LINEAR)} == {"relu", "abs", "linear"}


def test_somebody_elses_state_dict_is_read_with_the_activation_that_is_named(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 3, (1, 2)), Abs(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    torch.save(network.state_dict(), tmp_path / "other.pt")
    options = ["--limit", 20, "--activation", "abs", "--beta", 0.1, "--oracle", "exact", "--tol", 1, "--json"]
    assert answer(cli("certify", tmp_path / "other.pt", *options))["assumed"].startswith("activation abs")


# The command line, estimators, and what is refused


def test_the_command_line_trains_and_says_which_activation(tmp_path):
    options = ["--limit", 20, "--activation", "leaky-relu:0.2", "--beta", 0.1, "--tol", 1, "--max-rounds", 1]
    options += ["--kernel-size", "1x2", "--oracle", "exact"]
    told = answer(cli("train", *options, "--out", tmp_path / "run", "--json"))
    assert told["activation"] == "leaky-relu:0.2"
    assert "is leaky-relu:0.2; got abs" in refused("certify", tmp_path / "run", "--activation", "abs")
    assert "activation must be" in refused("train", "--activation", "gelu", "--out", tmp_path / "other")


def test_estimators_take_it():
    model = convcvx.ConvexCNNRegressor(activation="abs", beta_ratio=0.1, tol=0.5).fit(normal(20, 2), normal(20, seed=1))
    assert model.solution_.activation == ABSOLUTE
    outputs = model.to_network()(normal(20, 2)[..., None, None].float())
    assert np.allclose(outputs.detach().numpy()[:, 0], model.predict(normal(20, 2)), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"solver": "copositive"}, "needs the ReLU; got activation abs"),
        ({"solver": "closed-form"}, "needs activation relu or linear"),
        ({"oracle": "spectral"}, "needs activation linear, or quadratic with .*; got activation abs"),
    ],
)
def test_what_knows_the_relu_alone_refuses_by_name(options, said):
    with pytest.raises(InputError, match=said):
        convcvx.solve(normal(6, 2), normal(6, 1), 0.1, activation="abs", **options)


def test_maxima_of_another_activation_are_swept_nowhere():
    problem = build_problem(
        normal(6, 1, 3, 3), normal(6, 1), 0.1, spec=PatchSpec((1, 2)), pooling="max:1", activation="abs"
    )
    with pytest.raises(InputError, match="with activation abs"):
        pick_oracle("exact", problem)
    assert pick_oracle("auto", problem)[0] == "local"


def test_filters_that_differ_in_sign_are_two_under_maxima_without_activation():
    """max(-t) is not -max(t): column generation stalled at ten times the optimum."""
    images = normal(8, 1, 4, 4)
    flat = images.flatten(1)
    targets = (flat.amax(dim=1) + 2 * flat.amin(dim=1))[:, None]
    options = {"kernel_size": 1, "pool": "max:global", "activation": "linear", "beta": 0.003, "loss": "squared"}
    fit = convcvx.fit(images, targets, **options, solver="column-generation", tol=1e-4)
    maxima = torch.stack([flat.amax(dim=1), (-flat).amax(dim=1)], dim=1).numpy()
    weights, shift = cp.Variable((2, 1)), cp.Variable()
    data = cp.sum_squares(maxima @ weights + shift - targets.numpy()) / (2 * len(images))
    best = cp.Problem(cp.Minimize(data + 0.003 * cp.norm1(weights))).solve(solver=cp.CLARABEL)
    assert fit.certificate.primal == pytest.approx(best, rel=1e-3)
    assert fit.certificate.n_filters == 2


class Hidden(nn.Module):
    """Its ReLU depends on a size, so that no graph shows it; its outputs do not tell of it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(1, 2, 1), nn.Linear(2, 2)
        nn.init.constant_(self.convolution.bias, 5.0)

    def forward(self, images: Tensor) -> Tensor:
        responses = self.convolution(images)
        if responses.numel() > 0:
            responses = F.relu(responses)
        return self.linear(responses.flatten(1))


def test_a_forward_that_cannot_be_followed_is_not_taken_for_linear():
    with pytest.raises(InputError, match="a forward that cannot be followed: make the activation a layer"):
        convcvx.certify(Hidden().eval(), torch.rand(4, 1, 1, 1), torch.arange(4) % 2, 0.01)


def test_slopes_that_are_none_of_an_activation_are_refused_and_those_that_are_come_back():
    for slope in (-0.5, 1.5):
        with pytest.raises(InputError, match="slope"):
            Activation.of_module(nn.LeakyReLU(slope))
    for slope in (-1.0, 0.0, 0.3, 1.0):
        found = Activation.of_module(nn.LeakyReLU(slope))
        assert Activation.of(str(found)) == found
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.LeakyReLU(0.0), nn.Flatten(), nn.Linear(2, 2)).eval()
    assert convcvx.certify(network, torch.rand(4, 1, 1, 1), torch.arange(4) % 2, 0.1).activation == "relu"
