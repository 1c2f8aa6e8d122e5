"""On a GPU: every pass, a training and a certificate agree with the CPU's. Skipped where torch sees no GPU.

Tolerances: float64 sums in another order, 1e-10 relative; float32 arithmetic, 1e-4.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.batches import agree, both_on_every_cone
from helpers.commands import Quiet
from helpers.problems import random_parameters
from helpers.rows import random_rows
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from convcvx.budget import Budget
from convcvx.certificate import certify_parameters
from convcvx.data.datasets import load
from convcvx.data.images import StreamedImages
from convcvx.network.two_layer import TwoLayerCNN
from convcvx.oracles import BranchAndBoundOracle
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.responses.gated import GatedResponses, sample_gates
from convcvx.responses.mirror import MirrorPairs
from convcvx.solution import Solution
from convcvx.solvers.dictionary.filters import dictionary
from convcvx.solvers.dictionary.path import fit_dictionary
from convcvx.solvers.slide.coordinates import balanced_gradients
from convcvx.solvers.slide.descent import descend
from convcvx.solvers.slide.joint import slide_lbfgs
from convcvx.stack.features import fit_link, stream_features
from convcvx.stack.jobs import stack_job
from convcvx.stack.options import StackConfig
from convcvx.stack.run import StackRun
from convcvx.training.plan import build_problem, solve_problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def problem(device: str, dtype: torch.dtype = torch.float64, loss: str = "squared", streamed: bool = False):
    train, _ = load("digits", limit=300)
    images = train.images
    if streamed:
        images = StreamedImages(train.images.permute(0, 2, 3, 1).numpy())
    embedding = PatchEmbedding.fit(train.images, PatchSpec(3, hidden_bias=True, whiten=0.1))
    return build_problem(
        images, train.targets, 2e-3, embedding=embedding, pooling=2, loss=loss, dtype=dtype, device=device
    )


def every_pass(p) -> list[torch.Tensor]:
    filters, weights, intercept = random_parameters(p, 5)
    targets = p.targets.to(p.responses.device, p.responses.dtype)

    def residual(predictions, where):
        return p.loss.gradient(predictions, targets[where])

    responses, batch = p.responses, torch.arange(0, 300, 7)
    predictions = responses.predict(filters, weights, intercept)
    dual_point = p.dual_point(predictions)
    return [
        predictions,
        *responses.gram(filters, p.targets),
        responses.correlate(filters, dual_point),
        *responses.ascent(filters, dual_point, weights),
        *responses.gradients(filters, weights, intercept, residual),
        responses.rows(batch.to(responses.device)).cpu(),
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("streamed", [False, True])
def test_every_pass_agrees_with_the_cpu(dtype, streamed):
    pairs = zip(every_pass(problem("cuda", dtype, streamed=streamed)), every_pass(problem("cpu")), strict=True)
    for ours, theirs in pairs:
        assert float((ours.double().cpu() - theirs).abs().max()) <= TOLERANCE[dtype] * float(theirs.abs().max())


@pytest.mark.parametrize("size", [3, 8])
def test_gated_features_agree_with_the_cpu(size):
    """Patches of the images' size are single ones, whose features are never formed."""
    train, _ = load("digits", limit=40)
    passes = []
    for device in ("cuda", "cpu"):
        p = build_problem(
            train.images, train.targets, spec=PatchSpec(size), pooling=1, dtype=torch.float64, device=device
        )
        random = torch.Generator().manual_seed(0)
        features = GatedResponses(p.responses, sample_gates(p.responses, 7, 0))
        weights = torch.randn(*features.shape, p.n_outputs, generator=random, dtype=torch.float64)
        dual_point = p.dual_point(p.constant_predictions())
        passes.append(
            [features.apply(weights), features.adjoint(dual_point), features.matrix(), *features.gram(p.targets)]
        )
    for ours, theirs in zip(*passes, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("solver", "oracle"),
    [
        ("frank-wolfe", "local"),
        ("closed-form", "local"),
        pytest.param("gated", "sampled", marks=pytest.mark.slow),
    ],
)
def test_the_other_solvers_run_on_the_gpu(solver, oracle):
    train, _ = load("digits", limit=150)  # more rows than are few, which only a CPU knows
    objectives = []
    for device in ("cuda", "cpu"):
        p = build_problem(train.images, train.targets, 1e-2, spec=PatchSpec(8), dtype=torch.float64, device=device)
        solution = solve_problem(p, Budget(tol=0.05, max_rounds=2), solver=solver, oracle=oracle, gates=10)
        objectives.append(solution.history[-1]["objective"])
    assert objectives[0] == pytest.approx(objectives[1], rel=1e-6)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
@pytest.mark.parametrize("streamed", [False, True])
def test_training_on_the_gpu_is_certified_alike_on_both(loss, streamed):
    there = problem("cuda", torch.float32, loss, streamed)
    solution = solve_problem(there, Budget(tol=1e-2, max_rounds=3), oracle="local")
    assert solution.n_filters > 3
    primals = []
    for p in (there, problem("cpu", loss=loss)):
        found = certify_parameters(p, solution.filters, solution.weights, oracle="local")
        assert 0 < found.dual <= found.primal
        primals.append(found.primal)
    assert primals[0] == pytest.approx(primals[1], rel=1e-10)  # float64 on both, whatever the training used


@pytest.mark.parametrize("loss", ["squared", pytest.param("cross-entropy", marks=pytest.mark.slow)])
@pytest.mark.parametrize("beta_ratio", [pytest.param(None, marks=pytest.mark.slow), 0.01])
def test_the_optimum_over_a_dictionary_is_the_same_on_the_gpu(beta_ratio, loss):
    fits = []
    for p in (problem("cuda", loss=loss), problem("cpu", loss=loss)):
        filters = dictionary(p.responses, 40, seed=1)
        fits.append(fit_dictionary(p, filters, beta_ratio=beta_ratio, tune=0.2, tol=1e-6))
    ours, theirs = fits
    assert len(ours.path) == len(theirs.path)
    assert [ours.beta, ours.objective] == pytest.approx([theirs.beta, theirs.objective], rel=1e-8)
    assert torch.allclose(ours.weights[0], theirs.weights[0], atol=1e-5)
    assert torch.allclose(ours.intercept, theirs.intercept, atol=1e-5)


def test_full_gradients_slide_on_the_gpu_as_on_the_cpu():
    there, here = problem("cuda"), problem("cpu")
    start = solve_problem(here, Budget(tol=1e-2, max_rounds=1), oracle="local")
    ours, theirs = (slide_lbfgs(p, start, max_iter=5) for p in (there, here))
    assert torch.allclose(ours.filters, theirs.filters, atol=1e-6)
    assert not torch.allclose(ours.filters, start.filters, atol=1e-3)


@pytest.mark.parametrize("crops", [0, 1])
def test_a_descent_on_the_gpu_takes_the_steps_of_the_cpu(crops):
    there, here = problem("cuda"), problem("cpu")
    filters, weights, intercept = random_parameters(here, 6)
    start = Solution.empty(filters.shape[1], *weights.shape[1:]).with_parameters(filters, weights, intercept)
    ours, theirs = (descend(p, start, 0, 0.1, batch=10, crops=crops) for p in (there, here))
    assert torch.allclose(ours.filters, theirs.filters, atol=1e-8)
    assert not torch.allclose(ours.filters, start.filters, atol=1e-3)


def test_a_descent_among_symmetric_networks_goes_on_where_it_was_on_either_device():
    train, _ = load("digits", limit=200)
    embedding = PatchEmbedding.fit(train.images, PatchSpec(3), flips=True)
    there, here = (
        build_problem(train.images, train.targets, 2e-3, embedding=embedding, pooling=2, device=device)
        for device in ("cuda", "cpu")
    )
    start = fit_dictionary(here, dictionary(here.responses, 20, flips=True), beta_ratio=0.01, flips=True).solution
    pairs = [MirrorPairs(p.responses) for p in (there, here)]
    states = []

    def keep(state, text):
        states.append(save_safetensors(state))  # as a run folder does

    whole = descend(here, start, 0, 3, batch=20, pairs=pairs[1])
    ours = descend(there, start, 0, 3, batch=20, pairs=pairs[0], after_epoch=keep)
    resumed = descend(here, start, 0, 3, batch=20, pairs=pairs[1], state=load_safetensors(states[0]))
    # Adam makes steps of rounding along directions that no image shows: the networks part ways, their values do not.
    values = [balanced_gradients(here, (s.filters, s.weights, s.intercept))[0] for s in (whole, ours, resumed)]
    assert values[1:] == pytest.approx([values[0], values[0]], rel=0.05)


def test_a_stack_is_trained_on_the_gpu(tmp_path):
    results = []
    for device in ("cuda", "cpu"):
        options = {
            "data": "digits",
            "limit": 400,
            "validation": 0.2,
            "padding": "1",
            "pool": "2",
            "dictionary": 40,
            "max_rounds": 0,
            "tune": 0.2,
            "slide": "2,2",
            "device": device,
        }
        config = StackConfig.of(2, options, channels="6", heads="joint")
        results.append(stack_job(config, StackRun(tmp_path / device), Quiet()))
    for ours, theirs in zip(results[0]["stages"], results[1]["stages"], strict=True):
        assert ours["validation_accuracy"] == pytest.approx(theirs["validation_accuracy"], abs=0.05)
        assert ours["primal"] == pytest.approx(theirs["primal"], rel=0.05)
    assert results[0]["test_accuracy"] == pytest.approx(results[1]["test_accuracy"], abs=0.05)


def test_features_of_a_stage_are_the_same_on_the_gpu():
    p = problem("cpu")
    solution = solve_problem(p, Budget(tol=1e-2, max_rounds=2), oracle="local")
    images = p.responses.images.float()
    stage = TwoLayerCNN.from_solution(solution, p.responses.embedding, p.responses.pooling, images.shape[1:])
    links = [fit_link(stage, images, 4, 2, device) for device in ("cuda", "cpu")]
    ours, theirs = (
        torch.cat(list(stream_features(stage, links[1], images, device))).float() for device in ("cuda", "cpu")
    )
    assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3)
    weights = [link.state_dict()["1.weight"] for link in links]
    assert torch.allclose(*weights, rtol=1e-2, atol=1e-2)


def test_cones_are_bounded_on_the_gpu_as_on_the_cpu():
    """Entry lists alike, and bounds but for the single precision of the compiled search, which only raises them."""
    charged = random_rows(3000, 3, 10, 2)
    weight = np.linalg.norm(charged.charges, axis=1).sum()
    agree(both_on_every_cone(charged, 4, "cuda"), weight)


def test_branch_and_bound_on_the_gpu_proves_the_same():
    there, here = problem("cuda"), problem("cpu")
    dual_point = here.dual_point(here.constant_predictions())
    results = [
        oracle(p, dual_point, n_filters=2)
        for oracle, p in (
            (BranchAndBoundOracle(1e-2, max_cones=3000), there),
            (BranchAndBoundOracle(1e-2, max_cones=3000, device="cuda"), here),
            (BranchAndBoundOracle(1e-2, max_cones=3000), here),
        )
    ]
    best = max(float(result.values[0]) for result in results)
    for result in results:
        assert result.scope == "global"
        assert best <= result.upper_bound


@pytest.mark.parametrize("d", [2, 3, 4])
def test_branch_and_bound_on_the_gpu_is_as_tight(d):
    charged = random_rows(2000, d, 3, 2)
    exact = BranchAndBoundOracle(1e-2).maximise(charged)
    result = BranchAndBoundOracle(1e-2, device="cuda").maximise(charged)
    assert result.stats["stopped"] == "bound"
    best = max(float(exact.values[0]), float(result.values[0]))
    assert best <= result.upper_bound <= float(result.values[0]) * 1.01 * (1 + 1e-9)
