"""Data of any scale: what is proved of them is what is proved of the same data at scale one, and never more."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from helpers.commands import cli
from helpers.problems import flat_problem
from helpers.rows import charged
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import convcvx
from convcvx.errors import InputError
from convcvx.oracles import BranchAndBoundOracle, ChargedRows, CopositiveOracle, ExactOracle, SampledOracle
from convcvx.oracles._batched_cones import form_bounds
from convcvx.oracles._cone_bounds import form_bound
from convcvx.oracles._patch_rows import PatchRows, lengths
from convcvx.oracles._spheres import cell_sweep
from convcvx.oracles._sweeps import circle_sweep, lines
from convcvx.oracles.charged_rows import largest, raised
from convcvx.oracles.copositive import relax
from convcvx.oracles.relaxed import relaxed_point
from convcvx.oracles.table import ORACLES
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.training.plan import build_problem
from convcvx.units import Units

UP, DOWN = 498, -498
"""Exponents: about 1e±150."""
TINIEST, HUGEST = 2.0**DOWN, 2.0**UP


def data(seed: int = 0, n: int = 8, d: int = 2, c: int = 1) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=(n, d)), random.normal(size=(n, c))


def own_objective(solution, x: np.ndarray, y: np.ndarray, beta: float) -> float:
    """The squared loss' objective of data at scale one, K = 1."""
    responses = np.maximum(x @ solution.filters.numpy().T, 0)
    weights = solution.weights[:, 0].numpy()
    errors = responses @ weights + solution.intercept.numpy() - y
    return float((errors**2).sum(axis=1).mean() / 2 + beta * np.linalg.norm(weights, axis=1).sum())


@pytest.mark.parametrize("a", [DOWN, UP])
@pytest.mark.parametrize("b", [DOWN, UP])
def test_scaling_images_and_targets_scales_solution_and_certificate(a, b):
    x, y = data()
    beta = 0.3 * convcvx.beta_max(x, y)
    usual = convcvx.solve(x, y, beta, tol=1e-6)
    seen = []
    arrays = np.ldexp(x, a), np.ldexp(y, b)
    solution = convcvx.solve(*arrays, math.ldexp(beta, a + b), tol=1e-6, callback=seen.append)
    certificate = solution.certificate
    assert certificate.scope == "global"
    assert certificate.beta == math.ldexp(beta, a + b)
    for value, other in ((certificate.primal, usual.certificate.primal), (certificate.dual, usual.certificate.dual)):
        assert math.ldexp(value, -2 * b) == pytest.approx(other, rel=3e-6)
    assert math.ldexp(certificate.g_max, -a - b) == pytest.approx(usual.certificate.g_max, rel=1e-4)
    last = solution.history[-1]
    assert math.ldexp(last["objective"], -2 * b) == pytest.approx(usual.certificate.primal, rel=3e-6)
    assert seen[-1].history[-1] == last
    # the network is one for the data as they are
    network = replace(
        solution,
        weights=torch.ldexp(solution.weights, torch.tensor(float(a - b))),
        intercept=torch.ldexp(solution.intercept, torch.tensor(float(-b))),
    )
    assert own_objective(network, x, y, beta) == pytest.approx(math.ldexp(certificate.primal, -2 * b), rel=1e-9)
    # and a warm start as it is
    again = convcvx.solve(*arrays, math.ldexp(beta, a + b), tol=1e-6, start=solution)
    assert again.rounds <= solution.rounds
    assert again.certificate.dual <= certificate.primal * (1 + 1e-12)


def figures(values: dict, prefix: str = "") -> dict[str, float]:
    """All positive numbers of a certificate by name, but those of a clock."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= figures(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and 0 < value < math.inf and name != "seconds":
            found[prefix + name] = float(value)
    return found


def units_of(one: dict[str, float], other: dict[str, float], a: int, b: int) -> dict[str, str]:
    """The unit of each figure, as it tells in `other`, of images times 2^a and targets times 2^b."""
    units = {"objective": 2 * b, "g": a + b, "slope": b - a, "pure number": 0}
    changes = {name: math.log2(other[name]) - math.log2(one[name]) for name in one.keys() & other.keys()}
    return {name: min(units, key=lambda unit: abs(units[unit] - changes[name])) for name in changes}


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")  # a few rounds will do
@pytest.mark.parametrize("oracle", [name for name in ORACLES if name != "family"])  # which takes filters of a family
def test_every_figure_of_a_certificate_has_its_unit_at_any_scale(oracle):
    """Between 2^±32 data are taken as they are, and arithmetic alone says which figures have units."""

    def figures_at(a: int, b: int) -> dict[str, float]:
        x, y = data(n=6, d=3)
        arrays = np.ldexp(x, a), np.ldexp(y, b), math.ldexp(0.05, a + b)
        options = {"oracle": oracle, "activation": "linear" if oracle == "spectral" else "relu"}
        return figures(convcvx.solve(*arrays, **options, tol=0.05, max_rounds=3).certificate.to_dict())

    usual = figures_at(0, 0)
    expected = units_of(usual, figures_at(4, 14), 4, 14)
    assert {"objective", "g", "slope", "pure number"} == set(expected.values())
    far = units_of(usual, figures_at(200, 90), 200, 90)
    both = expected.keys() & far.keys()  # some are told where the gap is below 1 % alone
    assert len(both) >= len(expected) - 4
    assert {name: far[name] for name in both} == {name: expected[name] for name in both}


@pytest.mark.parametrize("a", [DOWN, UP])
def test_scaling_images_scales_the_certificate_of_the_cross_entropy(a):
    x, _ = data()
    classes = np.arange(len(x)) % 3
    beta = 0.3 * convcvx.beta_max(x, classes, loss="cross-entropy")
    usual = convcvx.solve(x, classes, beta, loss="cross-entropy").certificate
    scaled = convcvx.solve(np.ldexp(x, a), classes, math.ldexp(beta, a), loss="cross-entropy").certificate
    assert scaled.scope == "global"
    assert scaled.primal == pytest.approx(usual.primal, rel=2e-4)
    assert scaled.dual == pytest.approx(usual.dual, rel=2e-4)


def test_beta_max_and_path_scale():
    x, y = data()
    top = convcvx.beta_max(np.ldexp(x, UP), np.ldexp(y, DOWN))
    assert top == pytest.approx(convcvx.beta_max(x, y), rel=1e-3)
    solutions = list(convcvx.path(np.ldexp(x, UP), np.ldexp(y, DOWN), n_betas=2, ratio=0.1))
    assert [s.certificate.beta for s in solutions] == pytest.approx([top, 0.1 * top])
    expected = convcvx.solve(x, y, solutions[1].certificate.beta).certificate
    assert math.ldexp(solutions[1].certificate.primal, -2 * DOWN) == pytest.approx(expected.primal, rel=1e-4)


def test_estimator_scales():
    x, y = data(n=20)
    usual = convcvx.ConvexCNNRegressor(random_state=0).fit(x, y[:, 0])
    model = convcvx.ConvexCNNRegressor(random_state=0).fit(np.ldexp(x, DOWN), np.ldexp(y[:, 0], UP))
    assert model.certificate_.scope == "global"
    assert math.ldexp(model.certificate_.primal, -2 * UP) == pytest.approx(usual.certificate_.primal, rel=2e-2)
    predictions = model.predict(np.ldexp(x, DOWN))
    np.testing.assert_allclose(np.ldexp(predictions, -UP), usual.predict(x), atol=0.1 * np.abs(y).max())


def test_certify_scales():
    x, y = data(c=2)
    network = nn.Sequential(
        nn.Conv2d(2, 3, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    ).double()
    images, targets = torch.from_numpy(x)[..., None, None], torch.from_numpy(y)
    usual = convcvx.certify(network, images, targets, 0.05)
    with torch.no_grad():
        network[4].weight.mul_(2.0 ** (UP - DOWN))
        network[4].bias.mul_(2.0**UP)
    before = network[4].weight.clone()
    scaled = convcvx.certify(network, images * TINIEST, targets * HUGEST, 0.05 * TINIEST * HUGEST)
    assert scaled.scope == usual.scope == "global"
    assert math.ldexp(scaled.primal, -2 * UP) == pytest.approx(usual.primal, rel=1e-12)
    assert math.ldexp(scaled.dual, -2 * UP) == pytest.approx(usual.dual, rel=1e-3)
    assert torch.equal(network[4].weight, before)


def test_ordinary_data_keep_their_units():
    x, y = torch.tensor([[-3e9]]), torch.tensor([[3e-10]])
    assert Units.of(x, y, "squared").ordinary
    assert Units.of(2 * x, y / 4, "squared") == Units(33, -33)
    assert Units.of(torch.tensor([[7]]), torch.tensor([0]), "squared").ordinary
    assert Units.of(x, 1e30 * y, "cross-entropy").ordinary


@pytest.mark.parametrize(
    ("sx", "sy", "sbeta", "message"),
    [
        (1.0, 1e-158, 1e-158, "targets must have a largest entry"),
        (1.0, 1e155, 1e155, "targets must have a largest entry"),
        (1e155, 1e140, 1e300, None),
        (1e-155, 1e-140, 1e-295, None),
        (1e-200, 1e-140, 1e-320, "beta must be of the size"),
        (1e200, 1e-140, 1e-300, "beta must be of the size"),
        (1e-200, 1e140, 1e-62, "weights would be"),
    ],
)
def test_what_float64_cannot_hold_is_refused_by_name(sx, sy, sbeta, message):
    x, y = data()
    if message is None:
        assert 0 < convcvx.solve(x * sx, y * sy, sbeta, tol=0.5).certificate.primal < math.inf
        return
    with pytest.raises(InputError, match=message):
        convcvx.solve(x * sx, y * sy, sbeta)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy", "bce", "squared-hinge", "huber"])
def test_a_beta_that_is_next_to_nothing_beside_the_images_is_refused_by_name(loss):
    x, _ = data(n=20, d=6)
    for scale, beta in ((1e155, 1.0), (1e100, 1.0), (1.0, 1e-155)):
        with pytest.raises(InputError, match=r"beta must be of the size .*: pass a share of convcvx\.beta_max"):
            convcvx.solve(x * scale, np.arange(20) % 3, beta, loss=loss)


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")  # losses of nothing leave no gap to close
def test_a_tiny_beta_ends_without_a_fault():
    x, y = np.random.default_rng(0).normal(size=(20, 4, 9)), np.arange(20) % 3
    certificate = convcvx.solve(x, y, 1e-30, loss="cross-entropy", time_limit=4.0).certificate
    assert 0 <= certificate.dual <= certificate.primal < math.inf


@pytest.mark.parametrize("beta", [1e-120, 1e-140])
def test_a_relaxation_that_overflows_keeps_the_best_point_before(beta):
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 4, 9)).transpose(0, 2, 1)[:, :, None].copy())
    problem = build_problem(images, torch.arange(20) % 3, beta, spec=PatchSpec((1, 1)), loss="cross-entropy")
    start = problem.dual_point(problem.constant_predictions())
    assert bool(relaxed_point(problem, start).isfinite().all())


def test_entries_that_scaling_would_round_are_refused():
    x, y = data()
    x[0, 0] = 1e-310
    assert convcvx.solve(x, y, 0.1).certificate.scope == "global"
    x[1, 1] = 1e250
    with pytest.raises(InputError, match="images must have entries within"):
        convcvx.solve(x, y, 0.1)


def test_extreme_images_beside_a_bias_or_an_epsilon_are_refused_by_name():
    x, y = data()
    for options in ({"hidden_bias": True}, {"whiten": 0.1}):
        with pytest.raises(InputError, match="images must have a largest entry"):
            convcvx.ConvexCNNRegressor(**options).fit(x * 1e100, y[:, 0])


def test_extreme_targets_of_a_problem_without_units_are_refused_by_name():
    with pytest.raises(InputError, match="targets must have a largest entry"):
        build_problem(torch.ones(2, 1, 1, 1), np.array([[0.0], [1e-158]]), spec=PatchSpec((1, 1)))


# -- the oracles --------------------------------------------------------------------------------------


def charged_rows(seed: int, n: int, d: int) -> ChargedRows:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(n, d))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return charged(rows, random.normal(size=(n, 2)), slack=1e-12)


def rigorous(charged: ChargedRows, name: str, target: float = 0.0):
    if name == "exact":
        return ExactOracle().maximise(charged)
    starts = np.zeros((0, charged.rows.shape[1]))
    if name == "copositive":
        return CopositiveOracle().maximise(charged, starts, target=target)
    return BranchAndBoundOracle(1e-3).maximise(charged, target=target)


@pytest.mark.parametrize("name", ["exact", "copositive", "branch-and-bound"])
@pytest.mark.parametrize("exponent", [-1000, -600, 900])
def test_scaling_charges_scales_the_bound_exactly(name, exponent):
    usual = charged_rows(0, 7, 3)
    scaled = replace(usual, charges=np.ldexp(usual.charges, exponent), slack=math.ldexp(usual.slack, exponent))
    one, other = rigorous(usual, name), rigorous(scaled, name)
    assert other.upper_bound == math.ldexp(one.upper_bound, exponent)
    assert torch.equal(other.filters, one.filters)
    # a target between the best value and the bound at the first cone ends both in the same way
    target = 1.5 * one.upper_bound
    one, other = rigorous(usual, name, target), rigorous(scaled, name, math.ldexp(target, exponent))
    assert other.upper_bound == math.ldexp(one.upper_bound, exponent)


@pytest.mark.parametrize("name", ["exact", "copositive", "branch-and-bound"])
def test_a_bound_that_underflows_is_not_zero(name):
    charged = charged_rows(0, 5, 3)
    tiny = replace(charged, charges=np.full_like(charged.charges, 5e-324), slack=0.0)
    assert rigorous(tiny, name).upper_bound > 0
    assert rigorous(replace(tiny, charges=np.zeros_like(tiny.charges)), name).upper_bound == 0


@pytest.mark.parametrize("name", ["exact", "copositive", "branch-and-bound"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("field", ["rows", "charges"])
def test_rows_and_charges_that_are_no_numbers_are_refused(name, bad, field):
    charged = charged_rows(0, 5, 3)
    getattr(charged, field)[2, 1] = bad
    with pytest.raises(InputError, match="found NaN or infinity"):
        rigorous(charged, name)


@pytest.mark.parametrize("name", ["exact", "copositive", "branch-and-bound"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_slack_that_is_no_number_proves_nothing(name, bad):
    assert rigorous(replace(charged_rows(0, 5, 3), slack=bad), name).upper_bound == math.inf


@pytest.mark.parametrize("oracle", [ExactOracle(), CopositiveOracle(), BranchAndBoundOracle(), SampledOracle(20)])
def test_dual_points_that_are_no_numbers_are_refused(oracle):
    problem = flat_problem()
    dual_point = problem.dual_point(problem.constant_predictions())
    dual_point[3, 1] = math.nan
    with pytest.raises(InputError, match="dual_point must be finite"):
        oracle(problem, dual_point)


def test_the_sampled_oracle_scales():
    problem = flat_problem(n_outputs=2)
    dual_point = problem.dual_point(problem.constant_predictions())
    one, other = (SampledOracle(20)(problem, z) for z in (dual_point, dual_point * 2.0**-1000))
    assert other.upper_bound == pytest.approx(one.upper_bound * 2.0**-1000, rel=1e-12)
    assert torch.equal(other.values, one.values * 2.0**-1000)


@pytest.mark.parametrize("oracle", [ExactOracle(), BranchAndBoundOracle(), CopositiveOracle()])
def test_what_a_dual_point_is_off_by_raises_the_bound(oracle, monkeypatch):
    problem = flat_problem()
    dual_point = problem.dual_point(problem.constant_predictions())
    before = oracle(problem, dual_point).upper_bound
    monkeypatch.setattr(Problem, "dual_error", lambda self, point: torch.full((len(point),), 1e-3, dtype=torch.float64))
    reach = PatchRows.of(problem.responses).reach
    assert oracle(problem, dual_point).upper_bound == pytest.approx(before + 1e-3 * reach.sum(), rel=1e-9)


@given(st.floats(0, 1e300), st.integers(-2200, 900))
def test_raised_bounds_are_never_below_the_product(bound, exponent):
    product = raised(bound, exponent)
    assert product == math.inf or Fraction(product) >= Fraction(bound) * Fraction(2) ** exponent
    assert (product == 0) == (bound == 0)


def test_no_bound_is_lost_to_nan():
    assert largest(1.0, math.nan) == largest(math.nan, 1.0) == math.inf
    assert largest(1.0, 3.0, 2.0) == 3.0
    along, across = np.array([1.0, math.nan]), np.zeros(2)
    beside, gram = np.eye(2), np.eye(2)
    assert form_bound(along, beside, across, gram) == math.inf
    parts = (torch.from_numpy(part)[None] for part in (along, beside, across, gram))
    assert form_bounds(*parts).item() == math.inf
    # the same where the pair of vertices is orthogonal, or the form alone is no number
    beside = np.array([[1.0, math.nan], [math.nan, 1.0]])
    assert form_bound(np.ones(2), beside, across, gram) == math.inf
    parts = (torch.from_numpy(part)[None] for part in (np.ones(2), beside, across, gram))
    assert form_bounds(*parts).item() == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sweeps_of_what_is_no_number_prove_nothing(bad):
    for d in (2, 3):
        charged = charged_rows(0, 5, d)
        charged.charges[2, 1] = bad
        arrays = charged.rows, charged.cells, charged.charges
        peaks = np.zeros((1, 1 + d))
        if d == 2:
            bound, _ = circle_sweep(*arrays, *lines(charged.rows), 1, 0.0, peaks)
        else:
            bound, _ = cell_sweep(*arrays, 0, 1, 0.0, peaks)
        assert bound == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e308, -math.inf])
def test_a_conic_solver_that_fails_leaves_the_bound_true(bad, monkeypatch):
    import clarabel

    solver = clarabel.DefaultSolver

    class Failing:
        def __init__(self, *arguments):
            self._answer = solver(*arguments).solve()

        def solve(self):
            answer = self._answer

            class Answer:
                x = [bad] * len(answer.x)
                z = [bad] * len(answer.z)

            return Answer

    random = np.random.default_rng(0)
    matrix, normals = random.normal(size=(2, 3)), random.normal(size=(4, 3))
    points = random.normal(size=(20_000, 3))
    points = points[(points @ normals.T >= 0).all(axis=1)]
    reached = (np.linalg.norm(points @ matrix.T, axis=1) / np.linalg.norm(points, axis=1)).max()
    monkeypatch.setattr(clarabel, "DefaultSolver", Failing)
    bound, direction = relax(matrix, normals)
    assert reached <= bound < math.inf
    assert np.isfinite(direction).all()


@pytest.mark.parametrize("seed", [54, 58])
def test_confident_networks_are_certified(seed):
    """Residuals of 1e-100, whose cubes underflow."""
    x = np.abs(np.random.default_rng(seed).normal(size=(6, 3))) + 0.5
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2, bias=False)
    ).double()
    nn.init.normal_(network[0].weight)
    with torch.no_grad():
        network[0].weight.abs_().mul_(10.0)
        network[4].weight[0], network[4].weight[1] = 0.0, 10.0
    targets = torch.tensor([[0.0, 1.0]]).double().expand(6, 2)
    certificate = convcvx.certify(network, torch.tensor(x).view(6, 3, 1, 1), targets, 1e-3, loss="cross-entropy")
    assert certificate.scope == "global"
    assert 0 <= certificate.dual <= certificate.primal


# -- the rows of a problem ----------------------------------------------------------------------------


def test_lengths_neither_over_nor_underflow():
    rows = torch.tensor(np.array([[3.0, 4.0], [3e-200, 4e-200], [3e200, 4e200], [0.0, 0.0], [0.0, 5e-324]]))
    np.testing.assert_allclose(lengths(rows), [5.0, 5e-200, 5e200, 0.0, 5e-324], rtol=1e-15)
    assert lengths(rows[:, :0]).tolist() == [0.0] * 5


def embedded(embedding: PatchEmbedding, patch: list[mpmath.mpf]) -> list[mpmath.mpf]:
    """B x of a raw patch, to the digits of mpmath."""
    spec = embedding.spec
    if spec.contrast is not None:
        mean = sum(patch) / len(patch)
        centred = [value - mean for value in patch]
        scale = mpmath.sqrt(sum(value**2 for value in centred) / len(patch) + mpmath.mpf(spec.contrast))
        patch = [value / scale for value in centred]
    row = [*patch, mpmath.mpf(1)] if spec.constant else patch
    return [sum(mpmath.mpf(b) * x for b, x in zip(basis, row, strict=True)) for basis in embedding.basis.tolist()]


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6, 1e8])
@pytest.mark.parametrize("options", [{"whiten": 1e-3}, {"contrast": 1e-6}, {"rank": 2}, {"hidden_bias": True}])
def test_slack_covers_what_rounding_changes(options, offset):
    """Patches far from zero: g of the gathered rows is off the exact one by no more than the slack."""
    random = np.random.default_rng(0)
    images = torch.from_numpy(offset + random.normal(size=(6, 3, 2, 1)))
    embedding = PatchEmbedding.fit(images, PatchSpec((1, 1), **options))
    responses = Responses(images, embedding, Pooling(), dtype=torch.float64)
    problem = Problem.build(responses, torch.from_numpy(random.normal(size=(6, 2))), 1.0)
    dual_point = problem.dual_point(problem.constant_predictions())
    charged = ChargedRows.build(problem, dual_point)
    with mpmath.workdps(60):
        for _ in range(5):
            u = [mpmath.mpf(v) for v in random.normal(size=embedding.dim)]
            norm = mpmath.sqrt(sum(v**2 for v in u))
            u = [v / norm for v in u]
            exact, gathered = [mpmath.mpf(0)] * 2, [mpmath.mpf(0)] * 2
            for image, z in zip(images, dual_point.tolist(), strict=True):
                patches = image[:, :, 0].T.tolist()
                rows = [embedded(embedding, [mpmath.mpf(v) for v in patch]) for patch in patches]
                response = sum(max(sum(a * b for a, b in zip(row, u, strict=True)), 0) for row in rows) / 2
                exact = [g + response * value for g, value in zip(exact, z, strict=True)]
            frame = charged.frame.tolist()
            v = [sum(mpmath.mpf(a) * b for a, b in zip(row, u, strict=True)) for row in frame]
            for row, charge in zip(charged.rows.tolist(), charged.charges.tolist(), strict=True):
                response = max(sum(a * b for a, b in zip(row, v, strict=True)), 0)
                gathered = [g + response * value for g, value in zip(gathered, charge, strict=True)]
            unit = mpmath.mpf(2) ** charged.exponent
            off = mpmath.sqrt(sum((one - unit * other) ** 2 for one, other in zip(exact, gathered, strict=True)))
            assert off <= unit * charged.slack
    assert charged.slack < 1e-10 or offset > 0


def test_reach_is_above_every_response():
    problem = flat_problem(n=10, n_patches=4, dim=3, pooling=np.random.default_rng(0).random((2, 4)))
    filters = torch.nn.functional.normalize(torch.randn(200, 3, dtype=torch.float64))
    sizes = problem.responses.matrix(filters).norm(dim=2).amax(dim=1)
    reach = PatchRows.of(problem.responses).reach
    assert (sizes.numpy() <= reach).all()
    # with one patch an image, the filter that is this patch reaches it
    problem = flat_problem(n=10, n_patches=1, dim=3)
    norms = problem.responses.rows(slice(0, 10))[:, 0].norm(dim=1)
    np.testing.assert_allclose(PatchRows.of(problem.responses).reach, norms, rtol=1e-8)


def test_rows_belong_to_their_responses():
    problem = flat_problem()
    rows = PatchRows.of(problem.responses)
    assert PatchRows.of(problem.with_beta(0.5).with_dtype(torch.float32).responses) is rows
    for images in (torch.arange(5), torch.arange(problem.n)):
        assert PatchRows.of(problem.sample(images).responses) is not rows
    assert PatchRows.of(replace(problem).responses) is rows


def test_images_changed_in_place_are_gathered_anew():
    memory = np.random.default_rng(0).normal(size=(10, 2, 1, 1))
    images, targets = torch.from_numpy(memory), torch.from_numpy(np.random.default_rng(1).normal(size=(10, 1)))
    network = nn.Sequential(
        nn.Conv2d(2, 3, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1)
    ).double()
    nn.init.zeros_(network[4].weight)
    embedding = PatchEmbedding.fit(images, PatchSpec((1, 1)))
    convcvx.certify(network, images, targets, 1.0, embedding=embedding)
    memory *= 100.0
    stale, fresh = (convcvx.certify(network, i, targets, 1.0, embedding=embedding) for i in (images, images.clone()))
    assert stale.g_max == fresh.g_max
    assert stale.dual == fresh.dual


@pytest.fixture
def gathered(monkeypatch) -> list[int]:
    """How many images each gathering of rows was of."""
    counts, gather = [], PatchRows._gather.__func__

    def counting(cls, responses):
        counts.append(responses.n)
        return gather(cls, responses)

    monkeypatch.setattr(PatchRows, "_gather", classmethod(counting))
    return counts


def test_a_training_gathers_its_rows_once(gathered, tmp_path):
    train = "train --data digits --limit 20 --stride 2 --pool 2 --rank 2 --beta-ratio 0.3 --tol 0.1 --out"
    cli(train, tmp_path / "run")
    assert gathered == [20]


def test_a_path_gathers_its_rows_once_and_keeps_its_own_data(gathered):
    x, y = data()
    betas = [0.1, 0.05, 0.02]
    expected = [convcvx.solve(x, y, beta).certificate.primal for beta in betas]
    gathered.clear()
    found = []
    for solution in convcvx.path(x, y, betas):
        found.append(solution.certificate.primal)
        x *= 2.0
    assert gathered == [len(x)]
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_path_keeps_its_own_pooling():
    """With rows of the pooling that was and predictions of the one that is, the proof would be of neither."""
    random = np.random.default_rng(0)
    x, y, pooling = random.normal(size=(10, 3, 2)), random.normal(size=(10, 1)), np.array([[1.0, 0.5, 0.25]])
    for solution in convcvx.path(x, y, [0.05, 0.05], pooling=pooling, tol=1e-4):
        assert solution.certificate.primal == pytest.approx(0.6512, abs=2e-4)
        assert solution.certificate.rel_gap <= 1e-4
        pooling *= 8.0
