"""Certificates: sound for any network, blind to rescaling, sensitive to tampering, independent of the solvers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from helpers.problems import flat_problem, random_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

from convcvx import Certificate, certify
from convcvx.activations import Abs
from convcvx.budget import Budget
from convcvx.certificate import certify_parameters
from convcvx.errors import InputError, RunError
from convcvx.network.two_layer import TwoLayerCNN
from convcvx.oracles import ExactOracle
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.solution import Solution
from convcvx.solvers.rounds import consult, predicted
from convcvx.storage.reading import json_text
from convcvx.terms.scope import Scope
from convcvx.training.plan import build_problem, solve_problem
from convcvx.training.run import Run

BETA = 0.003
SHAPE = (1, 4, 5)
SPEC = PatchSpec((1, 2))  # two pixels: rank 2, where the exact oracle is cheap


def images(n: int = 24, shape=SHAPE) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


def classes(n: int = 24) -> Tensor:
    brightest = images(n).flatten(2).view(n, 4, 5).mean(dim=1).argmax(dim=1)
    return brightest.clamp(1, 3) - 1


def plain(m: int = 6, *, kernel=(1, 2), pool=None, bias=False, intercept=True, c: int = 3, seed: int = 0):
    """A plain torch network on SHAPE images, freshly initialised."""
    torch.manual_seed(seed)
    pool = pool or nn.AdaptiveAvgPool2d((2, 2))
    convolution = nn.Conv2d(1, m, kernel, bias=bias)
    features = pool(convolution(torch.zeros(1, *SHAPE))).numel()
    return nn.Sequential(convolution, nn.ReLU(), pool, nn.Flatten(), nn.Linear(features, c, bias=intercept))


def adam(network: nn.Module, loss: str, steps: int = 150) -> nn.Module:
    """Train by torch's Adam with coupled weight decay on all weights but the output bias."""
    decayed = [p for name, p in network.named_parameters() if name != "4.bias"]
    free = [p for name, p in network.named_parameters() if name == "4.bias"]
    optimizer = torch.optim.Adam([{"params": decayed, "weight_decay": BETA}, {"params": free}], lr=0.02)
    onehot = nn.functional.one_hot(classes()).float()
    for _ in range(steps):
        f = network(images())
        value = nn.functional.cross_entropy(f, onehot) if loss != "squared" else 0.5 * (f - onehot).square().sum() / 24
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return network


def objective(network: nn.Module, loss: str) -> float:
    """Mean loss plus weight decay, with the network's own weights: nothing balanced, nothing re-optimised."""
    with torch.no_grad():
        f, onehot = network(images()).double(), nn.functional.one_hot(classes()).double()
        value = nn.functional.cross_entropy(f, onehot) if loss != "squared" else 0.5 * (f - onehot).square().sum() / 24
        decay = sum(p.double().square().sum() for name, p in network.named_parameters() if name != "4.bias")
    return float(value + 0.5 * BETA * decay)


def check(network: nn.Module, **options) -> Certificate:
    return certify(network, images(), classes(), BETA, **options)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_an_adam_trained_network_is_worse_and_so_is_its_bound(loss):
    problem = build_problem(images(), classes(), BETA, spec=SPEC, pooling="2", loss=loss)
    solution = solve_problem(problem, Budget(tol=1e-5))
    ours = check(TwoLayerCNN.from_solution(solution, solution.embedding, solution.pooling, SHAPE), loss=loss)
    assert ours.scope == "global"
    assert ours.rel_gap <= 2e-5
    assert ours.primal == pytest.approx(solution.history[-1]["objective"], rel=1e-6)

    trained = adam(plain(), loss)
    theirs = check(trained, loss=loss)
    assert theirs.scope == "global"
    assert theirs.primal > ours.primal
    assert theirs.dual <= ours.dual
    assert theirs.rel_gap > 10 * ours.rel_gap
    # Balancing and the best intercept can only help, and training helped as well.
    assert theirs.primal <= objective(trained, loss) * (1 + 1e-6)
    assert theirs.primal < check(plain(), loss=loss).primal


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_no_bound_is_negative_as_no_loss_is(loss):
    """A network far out, whose objective rounding takes more off than there is."""
    problem = flat_problem(14, loss=loss)
    filters, weights, _ = random_parameters(problem, 5, scale=1e13)
    certificate = certify_parameters(problem, filters, weights)
    assert certificate.primal > 1e9
    assert 0 <= certificate.dual <= certificate.primal
    assert certificate.rel_gap <= 1


def test_rescaled_neurons_have_the_same_certificate():
    network = adam(plain(), "squared", 20)
    scaled = deepcopy(network)
    factors = torch.logspace(-3, 3, 6)
    with torch.no_grad():
        scaled[0].weight.mul_(factors[:, None, None, None])
        scaled[4].weight.div_(factors.repeat_interleave(4))
    a, b = check(network), check(scaled)
    assert b.primal == pytest.approx(a.primal, rel=1e-6)
    assert b.dual == pytest.approx(a.dual, rel=1e-6)
    assert objective(scaled, "squared") > 10 * a.primal


def test_the_output_bias_is_re_optimised_and_a_missing_one_is_not_added():
    network = adam(plain(), "squared", 20)
    moved = deepcopy(network)
    with torch.no_grad():
        moved[4].bias.add_(5.0)
    assert check(moved).primal == pytest.approx(check(network).primal)
    bare = plain(intercept=False)
    assert check(bare).intercept is False
    bare_plus = plain()
    bare_plus.load_state_dict(bare.state_dict() | {"4.bias": torch.zeros(3)})
    assert check(bare_plus).primal < check(bare).primal


@pytest.mark.parametrize("layer", [0, 4])
def test_a_tampered_weight_changes_the_primal(layer):
    network = adam(plain(), "squared", 20)
    before = check(network)
    with torch.no_grad():
        network[layer].weight.view(-1)[0] += 0.05
    after = check(network)
    assert abs(after.primal - before.primal) > 1e-5 * before.primal
    assert after.dual <= before.primal


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(1, 5),
    scale=st.sampled_from([0.0, 1e-4, 1.0, 30.0]),
    bias=st.booleans(),
    intercept=st.booleans(),
    loss=st.sampled_from(["squared", "cross-entropy"]),
    beta=st.sampled_from([1e-4, 0.01, 10.0]),
)
def test_no_network_beats_its_bound_or_any_other(seed, m, scale, bias, intercept, loss, beta):
    network = plain(m, kernel=(1, 1) if bias else (1, 2), bias=bias, intercept=intercept, seed=seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale)
    certificate = certify(network, images(), classes(), beta, loss=loss)
    assert certificate.scope == "global"
    assert certificate.dual <= certificate.primal
    assert certificate.rel_gap == pytest.approx((certificate.primal - certificate.dual) / certificate.primal)
    zero = deepcopy(network)
    nn.init.zeros_(zero[4].weight)
    assert certificate.dual <= certify(zero, images(), classes(), beta, loss=loss).primal * (1 + 1e-12)


def test_the_scope_is_told_in_words():
    heuristic = check(plain(kernel=(2, 2)))
    assert heuristic.scope == "heuristic"
    assert "scope heuristic: an estimate, not a proof" in str(heuristic)
    assert "lower bound (heuristic)" in str(heuristic)
    assert "an estimate, not a proof" in json.dumps(heuristic.to_dict())
    assert {"starts", "basins"} <= set(heuristic.search)
    proof = check(plain())
    assert "scope global: a proof" in str(proof)
    assert "heuristic" not in str(proof)
    assert Certificate.from_dict(json.loads(json.dumps(proof.to_dict()))) == proof


@pytest.mark.parametrize("loss", ["squared", pytest.param("cross-entropy", marks=pytest.mark.slow)])
def test_a_proved_bound_is_said_beside_an_estimate(loss):
    """Rank 4, by climbs; what branch and bound proves of the same network, to 1 %, is above it."""
    network = adam(plain(kernel=(2, 2)), loss, 60)
    estimate = check(network, loss=loss)
    assert estimate.scope == "heuristic"
    assert 0 < estimate.proved <= estimate.dual
    assert estimate.proved_gap == pytest.approx((estimate.primal - estimate.proved) / estimate.primal)
    assert f"proved for every network, by {estimate.proved_by}: lower bound" in str(estimate)
    assert "polynomials of degree 2" in estimate.proved_by
    own = check(network, loss=loss, oracle="polynomial")
    assert own.scope == "global"
    assert own.dual == own.proved == pytest.approx(estimate.proved, rel=1e-6)
    assert own.oracle == "polynomial"
    assert own.proved_by == estimate.proved_by
    assert own.proved_by.endswith(", at a dual point chosen for it")
    assert json.loads(json.dumps(own.to_dict()))["proved_by"] == own.proved_by
    assert Certificate.from_dict(json.loads(json.dumps(estimate.to_dict()))) == estimate


def test_where_the_bound_is_a_proof_it_is_the_one_that_is_proved():
    proof = check(plain())
    assert (proof.proved, proof.proved_gap, proof.proved_by) == (proof.dual, proof.rel_gap, proof.oracle)
    assert proof.beside == ""
    older = {name: value for name, value in proof.to_dict().items() if not name.startswith("proved")}
    assert Certificate.from_dict(older) == proof
    estimate = replace(proof, scope="heuristic", proved=None, proved_gap=None, proved_by=None)
    assert estimate.beside == ""
    assert estimate.with_bound_of(proof).scope == "global"


def test_the_better_of_two_proved_bounds_passes_to_the_other_network():
    one = replace(check(plain()), scope="heuristic", proved=0.1, proved_gap=0.5, proved_by="this")
    other = replace(one, dual=0.5 * one.dual, proved=0.2, proved_by="that")
    assert one.with_bound_of(other).dual == one.dual
    assert (one.with_bound_of(other).proved, one.with_bound_of(other).proved_by) == (0.2, "that")
    assert one.with_bound_of(other).proved_gap == pytest.approx(1 - 0.2 / one.primal)
    assert (other.with_bound_of(one).proved, other.with_bound_of(one).dual) == (0.2, one.dual)


def test_an_estimate_that_a_network_refutes_does_not_pass_to_it():
    estimate = replace(check(plain()), scope="heuristic", proved=0.0, search={})
    better = replace(estimate, primal=0.5 * estimate.dual, dual=0.1 * estimate.dual)
    assert better.with_bound_of(estimate).dual == better.dual
    assert estimate.with_bound_of(better).dual == better.dual  # nor is it kept by its own
    with pytest.raises(RunError, match="a fault of convcvx"):
        replace(estimate, proved=estimate.dual).with_bound_of(better)
    assert replace(better, primal=estimate.dual).with_bound_of(estimate).dual == estimate.dual  # control: it holds
    for scope in ("global", "heuristic"):
        none = replace(estimate, scope=scope, dual=math.nan, proved=math.nan)
        assert (estimate.with_bound_of(none).scope, estimate.with_bound_of(none).dual) == ("heuristic", estimate.dual)


def test_what_is_proved_within_tol_is_reached_though_the_search_was_cut_short():
    cut = replace(check(plain()), scope="heuristic", search={"stopped": "time_limit"}, rel_gap=0.01, proved_gap=0.04)
    assert cut.reaches(0.05)
    assert not cut.reaches(0.03)


def test_a_certificate_without_any_bound_says_so_when_it_is_read_again():
    none = replace(check(plain()), scope="heuristic", g_max=math.inf, search={"stopped": "time_limit"})
    assert none.meaning.startswith("no bound but zero")
    assert Certificate.from_dict(json.loads(json_text(none.to_dict()))).meaning == none.meaning


def test_a_better_proof_beside_an_estimate_passes_to_a_network_with_a_weaker_proof_of_its_own():
    proof = replace(check(plain()), dual=0.1)
    estimate = replace(proof, scope="heuristic", dual=0.3, oracle="local", proved=0.2, proved_gap=0.0, proved_by="that")
    for scope in ("global", "sampled", "family"):
        mine = replace(proof, scope=scope, family_gap=0.9 if scope == "family" else None, proved=0.1)
        best = mine.with_bound_of(estimate)
        assert (best.scope, best.dual, best.proved, best.oracle) == (scope, 0.2, 0.2, "that")
        assert best.rel_gap == best.proved_gap == pytest.approx(1 - 0.2 / proof.primal)
        assert best.family_gap == (best.rel_gap if scope == "family" else None)
        assert best.g_max == mine.g_max
        # Controls: an estimate raises no proof, nor does a weaker proof, or one that is no number.
        for weaker in (0.05, float("nan"), None):
            assert mine.with_bound_of(replace(estimate, proved=weaker)).dual == 0.1


def test_a_bound_of_another_pooling_is_refused():
    one = check(plain())
    assert one.pooling == "2x2"
    with pytest.raises(InputError, match="pooling is '2x2', not 'max:2x2'"):
        one.with_bound_of(replace(one, pooling="max:2x2"))
    older = replace(one, pooling=None)  # whose file does not say
    assert one.with_bound_of(older).dual == older.with_bound_of(one).dual == one.dual


def test_a_bound_of_another_problem_is_refused_whatever_the_difference():
    def certificate(padding=(0, 0), shift=0.0, weights=None, turn=0, dtype=torch.float64):
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)
        network = nn.Sequential(nn.Conv2d(1, 2, (1, 2), 2, padding, bias=False), nn.ReLU(), *head).to(dtype)
        data, targets = (images() + shift).to(dtype), classes().roll(turn)
        return certify(network, data, targets, 0.1, oracle="polynomial", sample_weight=weights)

    uneven = torch.arange(1.0, 1 + len(classes()))
    one, weighed = certificate(), certificate(weights=uneven)
    for other, name in [
        (certificate(padding=(1, 0)), "patches is '1x2, stride 2x2', not '1x2, stride 2x2, padding 1x0'"),
        (certificate(shift=1.0), "data is"),
        (certificate(turn=1), "data is"),
        (weighed, "data is"),
    ]:
        with pytest.raises(InputError, match=f"of another problem does not hold here: {name}"):
            one.with_bound_of(replace(other, patch_rank=one.patch_rank, dual=0.0, proved=0.0))
    # Controls: the same problem in other arithmetic, in another unit of weights, and in a file that says less.
    for mine, same in [
        (one, certificate(dtype=torch.float32)),
        (weighed, certificate(weights=3 * uneven)),
        (one, replace(one, patches=None, data=None)),
    ]:
        assert mine.with_bound_of(replace(same, dual=0.0, proved=0.0)) == mine


def own_problem(data: Tensor, spec: PatchSpec, **options):
    """Certificate of no network at all: what a problem is known by does not depend on one."""
    problem = build_problem(data, classes(len(data)), 0.1, spec=None if "embedding" in options else spec, **options)
    none = torch.zeros(0, problem.responses.dim), torch.zeros(0, problem.responses.n_cells, 3)
    return certify_parameters(problem, *none, oracle="polynomial")


def test_certificates_tell_pooling_matrices_shapes_spaces_and_strengths_apart():
    data, spec = images(), PatchSpec((1, 2))
    reshaped = data.reshape(len(data), 1, *reversed(data.shape[2:]))
    whitened = PatchSpec((2, 2), whiten=0.05, rank=2)
    nearly = (data + data.flip(-1)) / 2 + 1e-4 * data
    spaces = [PatchEmbedding.fit(nearly, whitened, flips=flips) for flips in (False, True)]
    cells = data.shape[2] * (data.shape[3] - 1)
    for one, other in [
        [own_problem(data, spec, pooling=torch.eye(cells)[k : k + 1]) for k in (0, 1)],
        [own_problem(part, spec, pooling="global") for part in (data, reshaped)],
        [own_problem(nearly, whitened, embedding=space) for space in spaces],
        [own_problem(data, PatchSpec((2, 2), contrast=contrast)) for contrast in (0.1, 0.1 + 4e-7)],
    ]:
        told = replace(other, patch_rank=one.patch_rank, filter_rank=one.filter_rank, dual=0.0, proved=0.0)
        with pytest.raises(InputError, match="of another problem does not hold here"):
            one.with_bound_of(told)
    # Control: the same space, fitted in other pieces, entries of whose Gram matrix would lie on a step of rounding.
    halfway = PatchSpec((2, 4), contrast=0.1, rank=7, hidden_bias=True)
    one, other = (own_problem(data, halfway, embedding=PatchEmbedding.fit(data, halfway, k)) for k in (24, 5))
    assert one.with_bound_of(replace(other, dual=0.0, proved=0.0)) == one


@pytest.mark.parametrize(("scale", "beta"), [(1e10, 0.01), (1.0, 1e-20)])
def test_numbers_that_overflow_where_a_dual_point_is_chosen_leave_the_bound_at_hand(scale, beta):
    torch.manual_seed(1)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), *head)
    digits = load_digits()
    data = torch.as_tensor(digits.images[:120, None] / 16 * scale, dtype=torch.float32)
    found = certify(network, data, torch.as_tensor(digits.target[:120]), beta)
    assert found.scope == "heuristic"
    assert 0 <= found.proved <= found.dual <= found.primal


def test_a_proof_beside_an_estimate_costs_a_share_of_the_training(monkeypatch):
    """Where a pass is reckoned to cost more, lengths have to do, and it is said; by hand there is no such limit."""
    problem = flat_problem(30, 2, 5)
    filters, weights, _ = random_parameters(problem, 3)
    monkeypatch.setattr("convcvx.oracles.beside.SPEED", 1.0)
    after = certify_parameters(problem, filters, weights, oracle="local", training=[{"seconds": 1.0, "rel_gap": 1.0}])
    assert "lengths of the patches" in after.proved_by
    assert "would take long" in after.proved_by
    by_hand = certify_parameters(problem, filters, weights, oracle="local")
    assert 0 < after.proved < by_hand.proved


def test_the_better_bound_counts_and_a_proof_before_an_estimate():
    own = replace(check(plain(seed=1)), scope="heuristic", proved=None)
    better = replace(own, dual=own.dual + 0.01, rel_gap=0.0, g_max=1.0)
    assert own.with_bound_of(better).dual == better.dual
    assert own.with_bound_of(better).rel_gap == pytest.approx((own.primal - better.dual) / own.primal)
    assert better.with_bound_of(own) == better
    proved = replace(better, dual=own.dual - 0.01, scope="global")
    assert better.with_bound_of(proved).scope == "global"
    assert better.with_bound_of(proved).dual == proved.dual
    assert proved.with_bound_of(better) == proved
    with pytest.raises(InputError, match="of another problem"):
        own.with_bound_of(replace(better, beta=2 * own.beta))


def test_a_local_search_never_reports_a_smaller_maximum_than_the_filters_at_hand():
    network = adam(plain(), "squared", 20)
    exact, local = check(network, oracle="exact"), check(network, oracle="local")
    assert local.scope == "heuristic"
    assert local.g_max <= exact.g_max * (1 + 1e-9)
    assert local.dual >= exact.dual * (1 - 1e-9)
    assert local.primal == exact.primal


def test_parameters_are_balanced_and_dead_neurons_dropped():
    problem = build_problem(images(), classes(), BETA, spec=SPEC, pooling="2")
    solution = solve_problem(problem, Budget(tol=1e-5))
    reference = certify_parameters(problem, solution.filters, solution.weights)
    filters = torch.cat([3 * solution.filters, torch.zeros(1, 2), torch.ones(1, 2)])
    weights = torch.cat([solution.weights / 3, torch.ones(1, 4, 3), torch.zeros(1, 4, 3)])
    certificate = certify_parameters(problem, filters, weights, oracle=ExactOracle())
    assert certificate.primal == pytest.approx(reference.primal, rel=1e-12)
    assert certificate.n_filters == reference.n_filters == solution.n_filters
    # The certificate is computed in float64, whatever the problem was solved in.
    single = certify_parameters(problem.with_dtype(torch.float32), solution.filters, solution.weights)
    assert single.primal == reference.primal


def test_whitened_models_are_certified_in_their_own_filter_space():
    """White patches and their mean have rank 2, as the patches have; a plain convolution bias makes it 3."""
    spec = PatchSpec((1, 2), whiten=0.1)
    solution = solve_problem(build_problem(images(), classes(), BETA, spec=spec, pooling="2"), Budget(tol=1e-5))
    network = TwoLayerCNN.from_solution(solution, solution.embedding, solution.pooling, SHAPE)
    own = check(network, embedding=solution.embedding)
    assert own.scope == "global"
    assert own.primal == pytest.approx(solution.history[-1]["objective"], rel=1e-6)
    assert check(network).patch_rank == 3
    with pytest.raises(InputError, match="outside the filter space"):
        check(plain(bias=True), embedding=solution.embedding)


def test_the_certificate_imports_no_solver():
    """The package itself does, so its `__init__` is kept out."""
    code = """
import sys, types
package = types.ModuleType("convcvx"); package.__path__ = ["convcvx"]; sys.modules["convcvx"] = package
import convcvx.certificate
found = [name for name in sys.modules if name.startswith("convcvx.") and "solve" in name or "training" in name]
found += [name for name in ("cvxpy", "scs", "clarabel") if name in sys.modules]
assert "convcvx.certificate" in sys.modules and not [n for n in found if n.startswith("convcvx") or "." not in n], found
import convcvx.solvers.master.table
assert "convcvx.solvers" in sys.modules  # negative control
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Networks of another form


def of(*middle, convolution=None, features=6):
    """Conv2d → `middle` → Flatten → Linear."""
    return nn.Sequential(convolution or nn.Conv2d(1, 6, (1, 2)), *middle, nn.Flatten(), nn.Linear(features, 3))


GLOBAL = nn.AdaptiveAvgPool2d(1)
FORM = "network must be Conv2d → ReLU → average or maximum pooling → Linear; got "
REFUSED = {
    "two poolings": (
        of(nn.ReLU(), nn.MaxPool2d(2, 1), GLOBAL),
        FORM + "Conv2d → ReLU → MaxPool2d → AdaptiveAvgPool2d → Linear",
    ),
    "order": (of(GLOBAL, nn.ReLU()), FORM + "Conv2d → AdaptiveAvgPool2d → ReLU → Linear"),
    "activation": (of(nn.GELU(), GLOBAL), FORM + "Conv2d → GELU → AdaptiveAvgPool2d → Linear"),
    "maximum before the absolute value": (
        of(nn.AdaptiveMaxPool2d(1), Abs()),
        FORM + "Conv2d → AdaptiveMaxPool2d → Abs",
    ),
    "three layers": (of(nn.ReLU(), GLOBAL, nn.Flatten(), nn.Linear(6, 6)), FORM),
    "two convolutions": (of(nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU(), GLOBAL), FORM),
    "normalisation": (of(nn.BatchNorm2d(6), nn.ReLU(), GLOBAL), "in training: call network.eval()"),
    "no linear layer": (nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), GLOBAL, nn.Flatten()), FORM),
    "padded pooling": (of(nn.ReLU(), nn.AvgPool2d(2, padding=1), features=54), FORM),
    "ceil mode": (of(nn.ReLU(), nn.AvgPool2d(3, ceil_mode=True), features=24), FORM),
    "sum pooling": (of(nn.ReLU(), nn.AvgPool2d(4, divisor_override=1)), FORM),
    "half a grid": (of(nn.ReLU(), nn.AdaptiveAvgPool2d((1, None)), features=24), FORM),
    "same padding": (of(nn.ReLU(), GLOBAL, convolution=nn.Conv2d(1, 6, 2, padding="same")), "pads one side more"),
    "reflection": (
        of(nn.ReLU(), GLOBAL, convolution=nn.Conv2d(1, 6, 3, padding=1, padding_mode="reflect")),
        "padding by zeros",
    ),
    "features": (of(nn.ReLU(), GLOBAL, features=7), "the linear layer takes 7 features but 6 filters pooled to 1"),
    "grid beyond the map": (of(nn.ReLU(), nn.AdaptiveAvgPool2d(5), features=150), "larger than the 4x4 map"),
    "kernel beyond the image": (of(nn.ReLU(), GLOBAL, convolution=nn.Conv2d(1, 6, 9)), "kernel_size 9x9 is larger"),
    "channels": (of(nn.ReLU(), GLOBAL, convolution=nn.Conv2d(3, 6, 2)), ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_networks_are_refused_by_name(case):
    network, message = REFUSED[case]
    with pytest.raises(InputError) as caught:
        check(network)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_grouped_convolutions_are_refused():
    network = of(nn.ReLU(), GLOBAL, convolution=nn.Conv2d(2, 6, 2, groups=2))
    with pytest.raises(InputError, match="groups=1"):
        certify(network, images(24, (2, 4, 5)), classes(), BETA)


@pytest.mark.parametrize(
    "network",
    [
        of(nn.ReLU(), GLOBAL),
        of(nn.ReLU(inplace=True), nn.AvgPool2d(2, 1), features=54),
        of(nn.ReLU(), features=96),
        of(nn.LeakyReLU(0.2), GLOBAL),
        of(Abs(), GLOBAL),
        of(GLOBAL),
    ],
)
def test_negative_control_plain_networks_are_accepted(network):
    assert check(network).dual <= check(network).primal


def test_a_network_that_computes_something_else_is_refused():
    """Its layers are registered in the right order and applied in another, which the graph shows or the outputs."""

    class PoolFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.relu, self.pool = nn.Conv2d(1, 6, (1, 2)), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
            self.linear = nn.Linear(24, 3)
            nn.init.normal_(self.convolution.weight[..., 0].data, std=3)
            self.convolution.weight.data[..., 1] = -self.convolution.weight.data[..., 0]  # edges: signs vary

        def forward(self, x):
            return self.linear(self.relu(self.pool(self.convolution(x))).flatten(1))

    class ReluFirst(PoolFirst):
        def forward(self, x):
            return self.linear(self.pool(self.relu(self.convolution(x))).flatten(1))

    torch.manual_seed(0)

    class Unseen(PoolFirst):
        def forward(self, x):
            return super().forward(x) if len(x) else x  # which no graph can follow

    with pytest.raises(InputError, match="got Conv2d → AdaptiveAvgPool2d → ReLU → Linear"):
        check(PoolFirst())
    with pytest.raises(InputError, match="outputs are not those of its Conv2d → ReLU"):
        check(Unseen())
    assert check(ReluFirst()).dual > 0


def test_what_is_no_module_is_refused_by_its_name():
    with pytest.raises(InputError, match=r"a torch module, such as the .network of a fit; got Certificate"):
        check(check(plain()))


class Altered(nn.Module):
    """A network whose outputs `alter` has changed."""

    def __init__(self, network: nn.Module, alter):
        super().__init__()
        self.network, self.alter = network, alter

    def forward(self, x):
        return self.alter(self.network(x))


ALTERED = {
    "images from the ninth on": lambda f: torch.cat([f[:8], f[8:] * 0 + 100]),
    "the last image": lambda f: torch.cat([f[:-1], f[-1:] + 0.1]),
    "one that is NaN": lambda f: torch.cat([f[:-1], f[-1:] * float("nan")]),
    "all, a little": lambda f: 1.001 * f,
    "all, by what an intercept far from zero would hide": lambda f: f + 1e-2 * (f - f.mean(dim=0)),
    "at random in training": lambda f: nn.functional.dropout(f, 0.5, training=True),
    "outputs left out": lambda f: f[:, :2],
}


@pytest.mark.parametrize("case", ALTERED)
def test_the_outputs_of_every_image_are_looked_at(case):
    network = plain()
    if "intercept" in case:
        network[4].bias.data += 100.0
    known = {"at random in training": "evaluation mode", "outputs left out": "got .* → getitem"}
    with pytest.raises(InputError, match=known.get(case, "the network's outputs")):
        check(Altered(network, ALTERED[case]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_negative_control_rounding_is_no_other_network(dtype):
    network = plain().to(dtype)
    network[4].bias.data += 100.0
    exact = check(deepcopy(network).double())
    assert check(Altered(network, lambda f: f)).primal == pytest.approx(exact.primal, rel=1e-9)


def test_a_certificate_names_the_filters_it_is_about():
    problem = build_problem(images(), classes(), BETA, spec=PatchSpec((2, 2), rank=2), pooling="2")
    certificate = certify_parameters(problem, *random_parameters(problem, 3)[:2])
    assert certificate.meaning == Scope.GLOBAL.meaning + "; among networks whose filters are of rank 2 of 4"
    assert check(plain()).meaning == Scope.GLOBAL.meaning
    assert Certificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate
    old = {k: v for k, v in certificate.to_dict().items() if not k.startswith("filter_")}
    assert Certificate.from_dict(old).meaning == Scope.GLOBAL.meaning


def test_a_convolution_bias_needs_the_hidden_bias():
    embedding = build_problem(images(), classes(), spec=SPEC).responses.embedding
    with pytest.raises(
        InputError, match=r"convolution bias but the problem has none: certify it beside a run .* with hidden_bias"
    ):
        check(plain(bias=True), embedding=embedding)
    assert check(plain(bias=True)).patch_rank == 3


@pytest.mark.parametrize("what", ["images", "filters", "weights"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_infinite_is_certified(what, value):
    """A neuron with NaN weights was once dropped as dead, and the rest certified."""
    network, pictures = plain(), images()
    target = {"images": pictures, "filters": network[0].weight.data, "weights": network[4].weight.data}[what]
    target.view(-1)[0] = value
    with pytest.raises(InputError, match="must be finite; found NaN or infinity"):
        certify(network, pictures, classes(), BETA)


def test_targets_and_beta_must_fit():
    with pytest.raises(InputError, match="targets must be classes below 3; got 7"):
        certify(plain(), images(), torch.full((24,), 7), BETA)
    with pytest.raises(InputError, match="the network has 3 outputs but the targets 2"):
        certify(plain(), images(), torch.rand(24, 2), BETA)
    with pytest.raises(InputError, match="targets must have one row an image, 24; got 3"):
        certify(plain(), images(), torch.tensor([0, 1, 2]), BETA)
    with pytest.raises(InputError, match="beta must be a positive float"):
        certify(plain(), images(), classes(), -1.0)


def test_pooling_by_a_matrix_is_certified_by_its_parameters():
    problem = build_problem(images(), classes(), BETA, spec=SPEC, pooling=torch.rand(2, 16))
    solution = solve_problem(problem, Budget(tol=1e-5))
    certificate = certify_parameters(problem, solution.filters, solution.weights)
    assert certificate.rel_gap <= 1.1e-5
    coarse = replace(problem, responses=build_problem(images(), classes(), spec=SPEC, pooling="2x1").responses)
    assert isinstance(problem.responses.pooling, Pooling)
    assert certify_parameters(coarse, solution.filters, solution.weights).primal != pytest.approx(certificate.primal)


def test_a_proof_above_the_objective_of_a_network_is_a_fault_and_no_certificate():
    """Halfway to the optimum a network's residual has a dual value above its objective, where it is not feasible."""

    class Wrong(ExactOracle):
        def __call__(self, problem, dual_point, **options):
            return replace(super().__call__(problem, dual_point, **options), upper_bound=problem.beta)

    problem = flat_problem(20, beta=0.005)
    solution = solve_problem(problem, Budget(tol=1e-5))
    halfway = solution.filters, 0.5 * solution.weights
    assert certify_parameters(problem, *halfway).rel_gap > 0.01
    with pytest.raises(RunError, match=r"the lower bound .* is above the objective .* a fault of convcvx"):
        certify_parameters(problem, *halfway, oracle=Wrong())
    # Nor do the rounds of a training take it for a gap of zero.
    with pytest.raises(RunError, match=r"the lower bound .* is above the objective"):
        consult(problem, Wrong(), *seen(problem, halfway), n_filters=1, tol=1e-3, seed=0)
    assert consult(problem, ExactOracle(), *seen(problem, halfway), n_filters=1, tol=1e-3, seed=0)[1]["rel_gap"] > 0.01


def seen(problem, network) -> tuple[Solution, Tensor]:
    """The network with the best intercept, and its predictions."""
    solution = Solution(*network, torch.zeros(problem.n_outputs, dtype=torch.float64))
    solution = replace(solution, intercept=problem.best_intercept(predicted(problem, solution)))
    return solution, predicted(problem, solution)


def test_a_light_certificate_of_a_large_network_agrees_with_the_full_one(monkeypatch):
    problem = flat_problem(n=200, dim=6, beta=0.01)
    filters, weights, _ = random_parameters(problem, 40, scale=0.05)
    full = certify_parameters(problem, filters, weights, oracle="local")
    monkeypatch.setattr("convcvx.certificate.parameters.LARGE", 0)
    light = certify_parameters(problem.with_dtype(torch.float32), filters, weights, oracle="local")
    assert light.primal == pytest.approx(full.primal, rel=1e-5)
    assert light.dual <= light.primal
    assert 0.95 * full.g_max <= light.g_max <= full.g_max * (1 + 1e-4)
    assert light.scope == "heuristic"


# The best dual point of a run


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_the_best_bound_of_a_run_is_proved_anew(loss, tmp_path):
    """Frank-Wolfe's bounds rise and fall; the best one stays, and data and dual point are enough to prove it."""
    problem = flat_problem(20, beta=0.005, loss=loss)
    saved = []
    solution = solve_problem(problem, Budget(tol=1e-9, max_rounds=60), solver="frank-wolfe", callback=saved.append)
    bounds = [record["lower_bound"] for record in solution.history]
    assert bounds == sorted(bounds)
    late = next(s for s in reversed(saved) if s.history[-1]["lower_bound"] == s.history[-2]["lower_bound"])

    run = Run(tmp_path)
    run.save_state(late)
    late = run.load_state()
    alone = certify_parameters(problem, late.filters, late.weights)
    both = certify_parameters(problem, late.filters, late.weights, dual_point=late.dual_point)
    assert both.scope == "global"
    assert both.dual == pytest.approx(late.history[-1]["lower_bound"], rel=1e-9)
    assert both.dual > alone.dual
    assert both.primal == alone.primal


class Counting(ExactOracle):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def answer(self, *asked):
        self.calls += 1
        return super().answer(*asked)


@pytest.mark.parametrize("solver", ["sliding-fw", "frank-wolfe"])
@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_a_proof_that_a_training_ended_with_is_not_made_again(loss, solver):
    problem, oracle = flat_problem(20, beta=0.005, loss=loss), Counting()
    solution = solve_problem(problem, Budget(tol=0.02, max_rounds=60), solver=solver, oracle=oracle)
    history, tol = solution.history, 1.01 * solution.history[-1]["rel_gap"]
    best = next(record for record in history if record["lower_bound"] == history[-1]["lower_bound"])
    # what a round says of g holds at the dual point that the solution has, also where bounds fell since
    assert history[-1]["proved_g"] == pytest.approx(ExactOracle()(problem, solution.dual_point).g_max, rel=1e-9)
    network = solution.filters, solution.weights, solution.intercept

    def asked(rounds, tol, **options):
        oracle.calls, options = 0, {"dual_point": solution.dual_point} | options
        certificate = certify_parameters(problem, *network, oracle=oracle, tol=tol, rounds=rounds, **options)
        return certificate, oracle.calls

    kept, calls = asked(history, tol)
    assert (calls, kept.scope, kept.search["proved_in_round"]) == (0, "global", best["round"])
    assert kept.dual == pytest.approx(history[-1]["lower_bound"], rel=1e-9)
    assert kept.rel_gap <= tol
    anew, calls = asked((), tol)
    assert calls > 0
    assert kept.primal == anew.primal
    assert kept.optimum["slope_low"] <= anew.optimum["slope"] <= kept.optimum["slope_high"]
    unproved = {**history[-1], "scope": "heuristic"}
    without = {name: value for name, value in history[-1].items() if name != "proved_g"}
    for rounds, other, options in (
        (history, 1e-6, {}),
        ([unproved], tol, {}),
        ([without], tol, {}),
        (history, tol, {"dual_point": None}),
    ):
        assert asked(rounds, other, **options)[1] > 0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["squared", "cross-entropy"]), st.booleans(), st.floats(-4, 4))
def test_no_dual_point_raises_the_bound_above_the_optimum(seed, loss, intercept, scale):
    problem = flat_problem(9, n_patches=2, beta=0.02, loss=loss, intercept=intercept)
    if (loss, intercept) not in OPTIMA:
        OPTIMA[loss, intercept] = solve_problem(problem, Budget(tol=1e-6)).history[-1]["objective"]
    optimum = OPTIMA[loss, intercept]
    random = torch.Generator().manual_seed(seed)
    point = 10**scale * torch.randn(problem.targets.shape, generator=random, dtype=torch.float64)
    filters, weights, _ = random_parameters(problem, 3, seed)
    alone = certify_parameters(problem, filters, weights)
    helped = certify_parameters(problem, filters, weights, dual_point=point)
    assert alone.dual <= helped.dual <= optimum * (1 + 1e-12)
    assert helped.rel_gap == pytest.approx(1 - helped.dual / helped.primal)


OPTIMA: dict[tuple[str, bool], float] = {}


def test_a_heuristic_bound_neither_stays_nor_takes_a_dual_point():
    problem = flat_problem(20, beta=0.005)

    def modest(problem, dual_point, **options):
        """Right every time, and not claiming to be."""
        return replace(ExactOracle()(problem, dual_point, **options), scope="heuristic", upper_bound=float("inf"))

    solution = solve_problem(problem, Budget(max_rounds=20, tol=1e-9), solver="frank-wolfe", oracle=modest)
    bounds = [record["lower_bound"] for record in solution.history]
    assert bounds != sorted(bounds)
    assert solution.dual_point is None

    filters, weights = solution.filters, solution.weights
    best = solve_problem(problem, Budget(tol=1e-6), oracle="exact").dual_point
    plain = certify_parameters(problem, filters, weights, oracle="local")
    assert plain.scope == "heuristic"
    assert certify_parameters(problem, filters, weights, oracle="local", dual_point=best).dual == plain.dual
    assert certify_parameters(problem, filters, weights, oracle="exact", dual_point=best).dual > plain.dual


def test_a_dual_point_that_is_none_is_refused():
    problem = flat_problem(9)
    filters, weights, _ = random_parameters(problem, 3)
    for point in (torch.zeros(9), torch.full((9, 3), float("nan"))):
        with pytest.raises(InputError, match="dual_point must be finite and of shape"):
            certify_parameters(problem, filters, weights, dual_point=point)


def test_a_proof_goes_on_where_a_longer_dual_point_is_feasible():
    """The optimum at a smaller β leaves g below this one: then s > 1 is the best scaling, and needs g_max, not β."""
    problem = flat_problem(20, dim=3, beta=0.02)
    other = solve_problem(problem.with_beta(0.016), Budget(tol=1e-7), oracle="exact")
    exact = certify_parameters(problem, other.filters, other.weights, oracle="exact", tol=1e-3)
    bounded = certify_parameters(problem, other.filters, other.weights, oracle="branch-and-bound", tol=1e-3)
    assert exact.g_max < 0.9 * problem.beta
    assert bounded.scope == "global"
    assert bounded.dual == pytest.approx(exact.dual, rel=1e-3)
    point = problem.dual_point(problem.responses.predict(other.filters, other.weights, other.intercept))
    assert problem.dual(point, problem.beta) < 0.99 * exact.dual  # what the first proof, of s = 1, is good for


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"kernel_size": (1, 4)}])
def test_an_embedding_of_other_patches_is_refused_whatever_the_weights(options):
    network = nn.Sequential(
        nn.Conv2d(1, 1, 2, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 1)
    )
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    random = torch.Generator().manual_seed(0)
    x, y = torch.rand(6, 1, 4, 4, generator=random), torch.rand(6, 1, generator=random)
    embedding = PatchEmbedding.fit(x, PatchSpec(**{"kernel_size": 2} | options))
    with pytest.raises(InputError, match=f"the network's {next(iter(options))} is"):
        certify(network, x, y, 1e-3, embedding=embedding)


def test_a_proof_above_a_network_is_handed_on_by_nobody():
    problem = flat_problem(9)
    filters, weights, _ = random_parameters(problem, 3)
    own = certify_parameters(problem, filters, weights)
    above = replace(own, primal=3 * own.primal, dual=2 * own.primal, rel_gap=1 / 3)
    with pytest.raises(RunError, match="is above the objective"):
        own.with_bound_of(above)
    assert own.with_bound_of(replace(above, scope="heuristic", proved=None)).primal == own.primal


def test_the_better_of_two_proofs_is_kept_whichever_way_they_are_asked():
    problem = flat_problem(9)
    filters, weights, _ = random_parameters(problem, 3)
    own = certify_parameters(problem, filters, weights)
    lower = replace(own, dual=0.4 * own.primal, rel_gap=0.6)
    beside = {"proved": 0.5 * own.primal, "proved_gap": 0.5, "proved_by": "polynomial"}
    estimate = replace(own, dual=0.8 * own.primal, rel_gap=0.2, scope="heuristic", **beside)
    for one, other in ((lower, estimate), (estimate, lower)):
        both = one.with_bound_of(other)
        assert (both.scope, both.dual, both.proved) == ("global", beside["proved"], beside["proved"])
        assert both.oracle == "polynomial"


@pytest.mark.parametrize("seed", range(4))
def test_no_estimate_stands_before_a_proof_that_says_more(seed):
    """Of an untrained network, where a search of the time that it deserves sees less than polynomials prove."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 10))
    data = load_digits()
    images, targets = torch.from_numpy(data.images[:240]).float() / 16, data.target[:240]
    certificate = certify(network, images, targets, beta=0.01, tol=0.5)
    assert certificate.proved is not None
    assert certificate.scope == "heuristic"
    assert certificate.dual >= certificate.proved > 0
    assert certificate.rel_gap <= certificate.proved_gap
