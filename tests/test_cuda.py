"""On a GPU: every pass, a training and a certificate agree with the CPU's. Skipped where torch sees no GPU.

Tolerances: float64 sums in another order, 1e-10 relative; float32 arithmetic, 1e-4.
"""

from __future__ import annotations

import pytest
import torch

from convcvx.certificate import certify_parameters
from convcvx.data import load
from convcvx.images import StreamedImages
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.training import build_problem, solve_problem
from tests.conftest import random_parameters

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
    dual = p.dual_point(predictions)
    return [
        predictions,
        *responses.gram(filters, p.targets),
        responses.correlate(filters, dual),
        *responses.ascent(filters, dual, weights),
        *responses.gradients(filters, weights, intercept, residual),
        *responses.gradients(filters, weights, intercept, residual, batch),
        responses.rows(batch.to(responses.device)).cpu(),
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("streamed", [False, True])
def test_every_pass_agrees_with_the_cpu(dtype, streamed):
    pairs = zip(every_pass(problem("cuda", dtype, streamed=streamed)), every_pass(problem("cpu")), strict=True)
    for ours, theirs in pairs:
        assert ours.device.type == "cpu"
        assert float((ours.double() - theirs).abs().max()) <= TOLERANCE[dtype] * float(theirs.abs().max())


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
@pytest.mark.parametrize("streamed", [False, True])
def test_training_on_the_gpu_is_certified_alike_on_both(loss, streamed):
    there = problem("cuda", torch.float32, loss, streamed)
    solution = solve_problem(there, oracle="local", tol=1e-2, max_rounds=3)
    assert solution.n_filters > 3
    primals = []
    for p in (there, problem("cpu", loss=loss)):
        found = certify_parameters(p, solution.filters, solution.weights, oracle="local")
        assert 0 < found.dual <= found.primal
        primals.append(found.primal)
    assert primals[0] == pytest.approx(primals[1], rel=1e-10)  # float64 on both, whatever the training used
