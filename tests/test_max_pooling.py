"""Maximum pooling: against torch's own modules, dense formulas, cvxpy, the whole circle of filters, planted optima."""

from __future__ import annotations

import math

import cvxpy as cp
import pytest
import torch
import torch.nn.functional as F
from helpers.commands import refused
from helpers.problems import digits_problem, g
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import convcvx
from convcvx.budget import Budget
from convcvx.certificate import certify_parameters
from convcvx.data.datasets import load
from convcvx.errors import InputError
from convcvx.network.export import export
from convcvx.network.two_layer import TwoLayerCNN, two_layer_cnn
from convcvx.oracles import ExactOracle, FamilyOracle, LocalOracle, PolynomialOracle, Ternary, get_oracle
from convcvx.oracles.table import ORACLES, Effort
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.problem import Problem
from convcvx.responses import Responses
from convcvx.responses.mirror import MirrorPairs
from convcvx.solvers import SOLVERS, sliding_frank_wolfe
from convcvx.solvers.master.table import solve_master
from convcvx.training.plan import Plan, build_problem, solve_problem

POOLS = ("max:global", "max:2", "max:3x4", "max:window:3,2", "max:window:2x3,1x2", "max:window:4,4")
"""The last has one window, which does not cover the map."""
PLANE = PatchSpec((1, 2))
AVERAGES_ONLY = "needs average pooling"


def images(n: int = 9, shape: tuple[int, int, int] = (1, 6, 7), seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(pool: str, n: int = 9, seed: int = 0, *, spec: PatchSpec = PLANE, steps: int = 0, **options) -> Problem:
    """Of Gaussian images; with `steps` their pixels are on a grid so coarse that many responses are equal."""
    pixels = images(n, seed=seed)
    pixels = (pixels * steps).round() / steps if steps else pixels
    return build_problem(pixels, torch.arange(n) % 3, 0.02, spec=spec, pooling=pool, **options)


def some_dual_point(made: Problem, seed: int = 0) -> Tensor:
    return made.in_domain(torch.randn(made.targets.shape, generator=torch.Generator().manual_seed(seed)).double() / 9)


def circle(count: int = 4000) -> Tensor:
    angles = torch.linspace(0, 2 * math.pi, count + 1, dtype=torch.float64)[:-1]
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def dense(made: Problem, filters: Tensor) -> Tensor:
    """Φ (n, m, P) by the formula, one cell after the other."""
    responses = made.responses
    rows = responses.rows(slice(0, responses.n)) @ responses.embedding.basis.T
    active = (rows @ filters.T).relu()
    cells = responses.pooling.cells(*responses.map_size)
    return torch.stack([active[:, cell > 0].amax(dim=1) for cell in cells], dim=2)


# The specification


@pytest.mark.parametrize(
    ("text", "written"),
    [("max:4", "max:4x4"), ("max:global", "max:global"), ("MAX:4x2", "max:4x2"), ("max:window:3,2", "max:window:3,2")],
)
def test_what_is_written_is_read_again(text, written):
    pooling = Pooling.of(text)
    assert (str(pooling), pooling.maximum) == (written, True)
    assert Pooling.of(written) == pooling
    assert pooling.average == Pooling.of(written.removeprefix("max:"))


@pytest.mark.parametrize("text", ["max:none", "max:", "max", "max:max:2", "max:0", "max:window:0,1", "maximum:2"])
def test_other_words_are_refused(text):
    with pytest.raises(InputError, match="pool m"):
        Pooling.of(text)


def test_two_numbers_are_a_grid_in_a_list_too():
    assert Pooling.of([4, 2]) == Pooling.of((4, 2)) == Pooling.of("4x2")
    assert Pooling.of([[0.5, 0.5], [0, 1]]).kind == "matrix"


def test_a_maximum_is_no_matrix():
    with pytest.raises(InputError, match="average pooling is needed; got pool max:2x2"):
        Pooling.of("max:2").matrix(4, 4)


@pytest.mark.parametrize("pool", POOLS)
def test_cells_are_those_of_torch(pool):
    """A single position that responds is seen by the cells that it lies in."""
    pooling = Pooling.of(pool)
    seen = pooling.module()(torch.eye(6 * 7).view(42, 1, 6, 7)).flatten(1)
    assert torch.equal(pooling.cells(6, 7), seen.T.double())


# Responses and their adjoints


@pytest.mark.parametrize("small", [True, False])  # by patches, and in registers
@pytest.mark.parametrize("pool", POOLS)
def test_responses_and_slopes_are_those_of_the_formula_and_of_autograd(pool, small):
    made = problem(pool, spec=PatchSpec(2, hidden_bias=True))
    made = build_problem(
        made.responses.images,
        torch.arange(9) % 3,
        spec=PatchSpec(2, hidden_bias=True),
        pooling=pool,
        responses=lambda *parts, **options: Responses(*parts, **options, small=small),
    )
    random = torch.Generator().manual_seed(1)
    filters = torch.randn(5, made.responses.dim, generator=random, dtype=torch.float64).requires_grad_()
    directions = torch.randn(5, made.responses.n_cells, 3, generator=random, dtype=torch.float64)
    expected = dense(made, filters)
    assert torch.allclose(made.responses.matrix(filters.detach()), expected, atol=1e-12)
    point = some_dual_point(made)
    correlations = torch.einsum("nmp,nc->mpc", expected, point)
    (slopes,) = torch.autograd.grad((correlations * directions).sum(), filters)
    found, pulled = made.responses.ascent(filters.detach(), point, directions)
    assert torch.allclose(found, correlations, atol=1e-12)
    assert torch.allclose(pulled, slopes, atol=1e-12)


@pytest.mark.parametrize("small", [True, False])
def test_of_equal_responses_one_alone_gets_the_slope(small):
    flat = torch.ones(3, 1, 4, 4, dtype=torch.float64)
    spec = PatchSpec(2)
    made = Responses(flat, PatchEmbedding.fit(images(3, (1, 4, 4)), spec), Pooling.of("max:global"), small=small)
    filters, ones = torch.ones(1, made.dim).double(), torch.ones(3, 1).double()
    _, slopes = made.ascent(filters, ones, torch.ones(1, 1, 1).double())
    assert torch.allclose(slopes, 3 * made.embedding.basis.sum(dim=1)[None])


def test_streamed_parts_give_what_all_images_do():
    made = problem("max:3x4", n=9, spec=PatchSpec(2))
    filters = torch.randn(3, made.responses.dim).double()
    whole = made.responses.matrix(filters)
    parts = [made.sample(part).responses.matrix(filters) for part in torch.arange(9).split(4)]
    assert torch.equal(torch.cat(parts), whole)
    narrow = Responses(made.responses.images, made.responses.embedding, made.responses.pooling, chunk_bytes=1)
    assert torch.allclose(narrow.matrix(filters), whole)


def test_mirrored_networks_are_those_of_mirrored_images():
    pixels = images(6, (1, 6, 6))
    made = build_problem(pixels, torch.arange(6) % 3, spec=PatchSpec(3), pooling="max:2", flips=True)
    pairs = MirrorPairs(made.responses)
    filters = pairs.filters(torch.randn(2, made.responses.dim).double())
    seen = made.responses.matrix(filters)
    mirrored = made.responses.to(images=pixels.flip(3)).matrix(filters)
    assert torch.allclose(mirrored[:, :2], pairs.unfold(seen[:, 2:], dim=1)[:, 2:], atol=1e-12)


# Optima and certificates


def test_weights_over_given_filters_are_those_of_cvxpy():
    made = problem("max:2", n=8, spec=PatchSpec(2))
    filters = F.normalize(torch.randn(6, made.responses.dim, generator=torch.Generator().manual_seed(0)).double())
    ours = solve_master(made, filters, tol=1e-9)
    features, cells = dense(made, filters).flatten(1).numpy(), made.responses.n_cells
    weights, intercept = cp.Variable((6 * cells, 3)), cp.Variable(3)
    fitted = features @ weights + cp.reshape(intercept, (1, 3), order="C")
    loss = cp.sum_squares(fitted - made.targets.numpy()) / 16
    sizes = sum(cp.norm(weights[j * cells : (j + 1) * cells], "fro") for j in range(6))
    best = cp.Problem(cp.Minimize(loss + made.beta * sizes)).solve(solver=cp.CLARABEL)
    predictions = made.responses.predict(filters, ours.weights, ours.intercept)
    assert made.primal(predictions, ours.weights) == pytest.approx(best, rel=1e-6)


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(POOLS), st.integers(3, 12), st.integers(0, 99), st.sampled_from([0, 0, 1, 3]))
def test_no_filter_of_the_whole_circle_is_above_a_proof(pool, n, seed, steps):
    made = problem(pool, n, seed, steps=steps)
    point = some_dual_point(made, seed)
    exact = ExactOracle()(made, point, n_filters=3)
    heights = g(made, circle(), point)
    assert float(heights.max()) <= exact.upper_bound
    assert exact.upper_bound <= float(g(made, exact.filters, point).max()) * (1 + 1e-6) + 1e-9
    assert exact.upper_bound <= float(heights.max()) * 1.01 + 1e-9
    for degree in (1, 2):
        assert float(heights.max()) <= PolynomialOracle(degree=degree)(made, point).upper_bound


def test_negative_control_the_bound_of_averages_does_not_hold_for_maxima():
    """Nor does a sum over the rows: with charges of either sign it may be below."""
    made = problem("max:global", 12)
    averages = build_problem(made.responses.images, torch.arange(12) % 3, 0.02, spec=PLANE, pooling="global")
    point = some_dual_point(made)
    highest = float(g(made, circle(), point).max())
    assert highest > PolynomialOracle()(averages, point).upper_bound
    assert highest > ExactOracle()(averages, point).upper_bound


def test_local_search_finds_what_is_highest():
    made = problem("max:2", 20, 3)
    point = some_dual_point(made)
    found = LocalOracle(thorough=True)(made, point)
    assert found.scope == "heuristic"
    assert float(found.values[0]) == pytest.approx(ExactOracle()(made, point).upper_bound, rel=1e-6)


def test_on_a_line_and_on_nothing_both_ends_are_looked_at():
    line = images(5, (1, 1, 4))
    made = build_problem(line, torch.arange(5) % 3, 0.02, spec=PatchSpec((1, 1)), pooling="max:global")
    point = some_dual_point(made)
    ends = g(made, torch.tensor([[1.0], [-1.0]]).double(), point)
    assert ExactOracle()(made, point).upper_bound == pytest.approx(float(ends.max()), rel=1e-9)
    nothing = made.responses.to(images=torch.zeros_like(line))
    assert 0 <= ExactOracle()(Problem.build(nothing, torch.arange(5) % 3, 0.02), point).upper_bound < 1e-12


def test_a_planted_network_is_the_proved_optimum():
    """Of one filter u = argmax g with β = g(u), V along G(u) and y = f + nZ the residual is Z, which is feasible."""
    made = problem("max:2", 12, intercept=False)
    point = some_dual_point(made)
    found = ExactOracle()(made, point).filters[:1]
    correlations = made.responses.correlate(found, point)
    beta = float(correlations.norm())
    weights = 0.7 * correlations / beta
    outputs = made.responses.predict(found, weights, torch.zeros(3))
    planted = Problem.build(made.responses, outputs + 12 * point, beta, "squared", intercept=False)
    optimum = planted.primal(outputs, weights)
    own = certify_parameters(planted, found, weights, None)
    assert (own.scope, own.oracle) == ("global", "exact")
    assert own.dual <= optimum <= own.primal * (1 + 1e-12)
    assert own.rel_gap < 1e-6
    solution = solve_problem(planted, Budget(tol=1e-4))
    trained = certify_parameters(planted, solution.filters, solution.weights, None)
    assert trained.dual <= optimum <= trained.primal
    assert trained.rel_gap < 1e-3
    worse = certify_parameters(planted, found.flip(1), weights, None)  # negative control
    assert worse.rel_gap > 1e-2


def test_ternary_filters_are_all_looked_at_though_opposite_ones_say_nothing_of_each_other():
    made = problem("max:2", 8, spec=PatchSpec(2))
    point = some_dual_point(made)
    words = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0]).double()] * made.responses.dim)
    words = F.normalize(words[words.any(dim=1)])
    found = FamilyOracle(Ternary())(made, point)
    assert found.upper_bound == pytest.approx(float(g(made, words, point).max()), rel=1e-9)


def test_an_estimate_says_so_and_has_a_proof_beside_it():
    made = digits_problem(30, 0.02, spec=PatchSpec(3, stride=2), pooling="max:2")
    plan = Plan.of(made)
    assert (plan.solver, plan.oracle) == ("sliding-fw", "local")
    assert "a maximum" in plan.reasons[1]
    solution = sliding_frank_wolfe(made, LocalOracle(), Budget(tol=1e-2, max_rounds=6))
    told = certify_parameters(made, solution.filters, solution.weights, solution.intercept)
    assert told.scope == "heuristic"
    assert 0 < told.proved < told.dual
    assert "polynomials" in told.proved_by


@pytest.mark.parametrize("name", ["exact", "branch-and-bound", "copositive", "remainder", "cylinders", "sampled"])
def test_oracles_made_for_sums_refuse(name):
    with pytest.raises(InputError, match=AVERAGES_ONLY) as caught:
        get_oracle(name, problem("max:2", spec=PatchSpec(2)))
    assert "oracle " + name in str(caught.value)
    blank = problem("max:2", spec=PatchSpec(2))
    oracle, point = ORACLES[name].make(Effort(thorough=True)), some_dual_point(blank)
    with pytest.raises(InputError, match="average pooling"):  # whoever makes it himself
        oracle(blank, point)


@pytest.mark.parametrize("name", ["gated", "copositive", "closed-form"])
def test_solvers_made_for_sums_refuse(name):
    with pytest.raises(InputError, match=f"solver {name} {AVERAGES_ONLY}; got pool max:2x2"):
        SOLVERS[name](problem("max:2", spec=PatchSpec(2)), LocalOracle(), Budget())


# Networks, and the public roads


@pytest.mark.parametrize("pool", POOLS)
def test_the_exported_network_has_the_objective_of_the_solution(pool, tmp_path):
    made = problem(pool, n=12, spec=PatchSpec(2, hidden_bias=True))
    solution = sliding_frank_wolfe(made, LocalOracle(), Budget(tol=1e-2, max_rounds=2, max_filters=4))
    responses = made.responses
    network = TwoLayerCNN.from_solution(solution, responses.embedding, responses.pooling, (1, 6, 7)).double()
    outputs = network(responses.images).detach()
    decay = (
        sum(float(part.detach().square().sum()) for name, part in network.named_parameters() if name != "4.bias") / 2
    )
    assert made.mean_loss(outputs) + made.beta * decay == pytest.approx(
        made.primal(outputs, solution.weights), rel=1e-6
    )
    assert torch.allclose(
        outputs, made.responses.predict(solution.filters, solution.weights, solution.intercept), atol=1e-5
    )
    kind = nn.MaxPool2d if "window" in pool else nn.AdaptiveMaxPool2d
    plain = nn.Sequential(
        nn.Conv2d(1, solution.n_filters, 2), nn.ReLU(), kind(*_sizes(network[2])), nn.Flatten(), nn.Linear(1, 1)
    )
    plain[4] = nn.Linear(network[4].in_features, 3)
    plain = plain.double()
    plain.load_state_dict(network.state_dict())
    assert torch.equal(plain(responses.images), network(responses.images))
    (tmp_path / "model.safetensors").write_bytes(network.float().to_bytes())
    assert two_layer_cnn(tmp_path / "model.safetensors").architecture == network.architecture


def _sizes(module: nn.Module) -> tuple:
    return (module.kernel_size, module.stride) if isinstance(module, nn.MaxPool2d) else (module.output_size,)


def test_maxima_before_and_behind_the_relu_have_the_same_certificate():
    pixels, targets = images(12).float(), torch.arange(12) % 3
    torch.manual_seed(0)
    convolution, linear = nn.Conv2d(1, 3, (1, 2)), nn.Linear(3 * 9, 3)
    behind, before = (
        nn.Sequential(convolution, *middle, nn.Flatten(), linear)
        for middle in ((nn.ReLU(), nn.MaxPool2d(2)), (nn.MaxPool2d(2), nn.ReLU()))
    )
    told = [convcvx.certify(network, pixels, targets, 0.05, oracle="polynomial") for network in (behind, before)]
    assert told[0].primal == told[1].primal
    assert told[0].scope == "global"
    averaged = nn.Sequential(convolution, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), linear)  # negative control
    assert convcvx.certify(averaged, pixels, targets, 0.05, oracle="polynomial").primal != told[0].primal
    scaled = nn.Sequential(convolution, nn.ReLU(), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Flatten(), linear).eval()
    nn.init.uniform_(scaled[2].weight, 0.5, 2)
    nn.init.normal_(scaled[2].bias)
    assert convcvx.certify(scaled, pixels, targets, 0.05, oracle="polynomial").primal > 0


@pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")
def test_fit_saves_and_resumes_to_the_same_bits(tmp_path):
    train, _ = load("digits", limit=40)
    options = {"kernel_size": 3, "stride": 2, "pool": "max:2", "beta_ratio": 0.1, "tol": 1e-6, "max_filters": 12}
    whole = convcvx.fit(train.images, train.targets, max_rounds=4, **options)
    first = convcvx.fit(train.images, train.targets, max_rounds=2, **options)
    first.save(tmp_path / "run")
    assert convcvx.load(tmp_path / "run").network.architecture.pool == "max:2x2"
    again = solve_problem(
        build_problem(train.images, train.targets, whole.certificate.beta, spec=PatchSpec(3, 2), pooling="max:2"),
        Budget(tol=1e-6, max_filters=12, max_rounds=4),
        start=first.solution,
    )
    assert torch.equal(again.filters, whole.solution.filters)
    assert torch.equal(again.weights, whole.solution.weights)


def test_the_command_line_refuses_what_needs_averages():
    for flags in (("--solver", "gated"), ("--oracle", "branch-and-bound")):
        assert AVERAGES_ONLY in refused("train", "--data", "digits", "--limit", 40, "--pool", "max:2", *flags)
    assert "pool max: takes" in refused("train", "--data", "digits", "--pool", "max:none")


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["max:global", "max:2", "max:4x3", "max:window:3,2"])
def test_exports_give_the_same_scores(pool, tmp_path):
    """Also a grid whose cells overlap: it is a maximum over each."""
    torch.manual_seed(0)
    network = two_layer_cnn(image_shape=(1, 8, 8), n_filters=4, n_outputs=10, pool=pool)
    for to, suffix in (("torch", "pt2"), ("onnx", "onnx")):
        assert export(network, (1, 8, 8), tmp_path / f"network.{suffix}", to) < 1e-4
