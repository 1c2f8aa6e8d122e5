"""The SGD and Adam twin: our objective at equal weights, honest training, tuned rates, certified distance."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.problems import NO_TIME, digits_problem, flat_problem, random_parameters

from convcvx import certify
from convcvx.baseline import OPTIMIZERS, RATE_STEP, USUAL_RATE, Twin, train_twin, tune_rate
from convcvx.budget import Budget
from convcvx.errors import InputError
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.solution import Solution
from convcvx.training.plan import solve_problem

SPECS = [
    PatchSpec((3, 3)),
    PatchSpec((3, 2), (2, 1), (1, 0), hidden_bias=True),
    PatchSpec((3, 3), whiten=1e-2, rank=5),
    PatchSpec((3, 3), contrast=0.1),
]


def digits(spec: PatchSpec = SPECS[0], beta: float = 3e-3, loss: str = "squared", n: int = 200) -> Problem:
    return digits_problem(n, beta, spec=spec, pooling="2", loss=loss, n_classes=10)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
@pytest.mark.parametrize("spec", SPECS)
def test_at_equal_weights_the_twin_has_our_objective_and_our_outputs(spec, loss):
    problem = digits(spec, loss=loss)
    filters, weights, intercept = random_parameters(problem, 5, scale=0.1)
    predictions = problem.responses.predict(filters, weights, intercept)
    twin = Twin(problem, 5, start=Solution(filters, weights, intercept))
    images = problem.responses.images.float()
    torch.testing.assert_close(twin(images).double(), predictions, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twin.network()(images).double(), predictions, rtol=1e-4, atol=1e-5)
    as_trained = twin.objective(problem, balanced=False)
    assert as_trained == pytest.approx(problem.primal(predictions, weights), rel=1e-6)
    # The judge re-optimises the output bias: better than a random one, and no other objective than the certificate's.
    assert twin.objective(problem) < as_trained
    options = {"loss": loss, "embedding": problem.responses.embedding}
    certificate = certify(twin.network(), images, problem.targets, problem.beta, **options, **NO_TIME)
    assert twin.objective(problem) == pytest.approx(certificate.primal, rel=1e-6)


def test_an_unbalanced_neuron_costs_more_as_trained_but_not_before_the_judge():
    problem = digits()
    twin = Twin(problem, 6)
    judged, as_trained = twin.objective(problem), twin.objective(problem, balanced=False)
    with torch.no_grad():
        twin.filters.mul_(10)
        twin.weights.div_(10)
    assert twin.objective(problem) == pytest.approx(judged, rel=1e-6)
    assert twin.objective(problem, balanced=False) > 1.5 * as_trained


def test_the_gradient_that_the_optimiser_sees_is_that_of_the_objective():
    problem = digits(SPECS[1], beta=0.05, loss="cross-entropy", n=40)
    twin = Twin(problem, 3)
    rate = 1e-3
    optimizer = torch.optim.SGD(twin.parameter_groups(problem.beta), lr=rate)
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    problem.loss.value(twin(problem.responses.images.float()), problem.targets.float()).mean().backward()
    optimizer.step()
    for name in before:
        after = getattr(twin, name).detach().clone()
        moved = (before[name] - after) / rate
        j = int(moved.abs().argmax())
        slope = []
        for sign in (-1, 1):
            with torch.no_grad():
                getattr(twin, name).copy_(before[name])
                getattr(twin, name).view(-1)[j] += sign * 1e-3
            slope.append(twin.objective(problem, balanced=False))
        assert moved.view(-1)[j] == pytest.approx((slope[1] - slope[0]) / 2e-3, rel=2e-2)
        with torch.no_grad():
            getattr(twin, name).copy_(before[name])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_descends_and_stays_above_the_lower_bound(optimizer):
    problem = digits(beta=0.02)
    solution = solve_problem(problem, Budget(tol=1e-2))
    best, *others = tune_rate(problem, optimizer, 16, epochs=10)
    assert others
    assert best.history[-1]["objective"] < 0.8 * best.history[0]["objective"]
    assert solution.history[-1]["lower_bound"] < best.objective < best.objective_as_trained
    seconds = [record["seconds"] for record in best.history]
    assert seconds == sorted(seconds)
    assert best.seconds == seconds[-1] > 0
    assert best.objective == pytest.approx(best.history[-1]["objective"], rel=1e-5)


def test_the_tuned_rate_lies_between_worse_ones():
    problem = digits(n=100)
    trainings = tune_rate(problem, "sgd", 8, epochs=2)
    by_rate = {round(math.log(t.rate, RATE_STEP)): t.objective for t in trainings}
    best = min(by_rate, key=lambda k: by_rate[k])
    assert by_rate[best - 1] >= by_rate[best] <= by_rate[best + 1]
    assert trainings[0].objective == by_rate[best]


def test_equal_seeds_give_equal_twins_and_others_do_not():
    problem = flat_problem(30, beta=0.05)
    options = {"rate": 0.01, "epochs": 3}
    first, again, other = (train_twin(problem, "adam", 4, seed=seed, **options).objective for seed in (0, 0, 1))
    assert first == again != other


def test_a_diverging_rate_is_infinitely_bad_and_ends_early():
    problem = digits(n=100)
    result = train_twin(problem, "sgd", 8, rate=1e6, epochs=4)
    assert result.objective == math.inf
    assert len(result.history) < 5


def test_a_tuning_whose_usual_rates_all_diverge_goes_on_to_lower_ones(monkeypatch):
    monkeypatch.setitem(USUAL_RATE, "sgd", 100.0)
    trainings = tune_rate(digits(n=100), "sgd", 8, epochs=3, batch=8)
    diverged = [training.rate for training in trainings if training.objective == math.inf]
    assert {round(rate, 3) for rate in diverged} >= {316.228, 100.0, 31.623}
    assert trainings[0].objective < math.inf
    assert trainings[0].rate < min(diverged)


def test_fine_tuning_starts_at_the_solution_and_a_missing_intercept_is_not_trained():
    problem = flat_problem(24, beta=0.01, intercept=False)
    solution = solve_problem(problem, Budget(tol=1e-6))
    result = train_twin(problem, "sgd", 0, rate=1e-4, epochs=2, start=solution)
    optimum = solution.history[-1]["objective"]
    assert result.history[0]["objective"] == pytest.approx(optimum, rel=1e-6)
    assert result.objective >= optimum * (1 - 2e-6)
    assert float(result.twin.intercept.abs().max()) == 0
    assert result.twin.network().architecture.intercept is False


def test_bad_options_name_themselves():
    problem = flat_problem()
    with pytest.raises(InputError, match="optimizer must be one of sgd, adam"):
        train_twin(problem, "lbfgs", 4, rate=0.1, epochs=1)
    with pytest.raises(InputError, match="epochs"):
        tune_rate(problem, "adam", 4, epochs=0)
