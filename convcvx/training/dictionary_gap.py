"""What the start from a dictionary proves: a gap over networks on the filters of the dictionary.

The weights of a dictionary are optimal to a gap over its filters that its regression reports, in whatever arithmetic it
had. Here the gap is proved, from the network as it is exported and the images alone. One pass in float64 gives the
network's outputs, hence its objective, and the correlation of each filter of the family with a dual point. (The bound
on the rounding of a pass in float32 is some times β, at the β of accurate dictionaries: it proves nothing.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convcvx.budget import OutOfTime
from convcvx.certificate import Certificate, judged
from convcvx.oracles.family import bound_over_family
from convcvx.problem import Problem, relative_gap
from convcvx.responses.streams import BLOCK_BYTES, Stream
from convcvx.responses.table import Pass
from convcvx.training.dictionary_start import drawn_filters
from convcvx.training.options import TrainConfig

SAME = 1e-9
"""Distance of unit filters below which one of the dictionary is the network's own."""
BLOCK_IMAGES = 256
"""Images whose responses are multiplied at once, at least: fewer would leave cores idle."""


def with_dictionary_gap(
    certificate: Certificate,
    config: TrainConfig,
    problem: Problem,
    solution_filters: Tensor,
    filters: Tensor,
    weights: Tensor,
    intercept: Tensor | None,
) -> Certificate:
    """`certificate` with the network's gap over the family that a dictionary stands for, if there is time to prove it.

    The family: the network's own filters and, unless the dictionary was to slide, those of the dictionary that the
    network does not use. With flips too the images are those of the training, without their mirror images.

    Parameters
    ----------
    certificate : Certificate
    config : TrainConfig
        Of a training with a dictionary; of another nothing changes.
    problem : Problem
    solution_filters : Tensor (m, r)
        The filters in float64, by which those of the dictionary are known.
    filters, weights, intercept : Tensor (m, r), (m, P, c), (c,)
        The same in the network, perhaps rounded.
    """
    if config.dictionary is None or not len(solution_filters):
        return certificate
    try:
        family = torch.cat([filters, _unused(config, problem, solution_filters)])
        gap = _gap(problem, family, filters, weights, intercept)
    except OutOfTime:
        return certificate
    return replace(certificate, family_size=len(family), family_gap=gap)


def _unused(config: TrainConfig, problem: Problem, used: Tensor) -> Tensor:
    """(q, r) filters of the dictionary as it stands that are not among those `used`."""
    if config.slide or (config.max_rounds == 0 and len(used) == config.dictionary):
        return used[:0]
    drawn = drawn_filters(config, problem)
    closest = torch.cat([torch.cdist(part, used).amin(dim=1) for part in drawn.split(1024)])
    return drawn[closest > SAME]


def _gap(problem: Problem, family: Tensor, filters: Tensor, weights: Tensor, intercept: Tensor | None) -> float:
    """By how much, as a share, a network over the `family` may be better than one on its first `filters`: a proof."""
    rough = problem.responses.predict(filters, weights, torch.zeros(problem.n_outputs))
    dual_point = problem.dual_point(rough)
    exact = problem.with_dtype(torch.float64)
    norms = family.norm(dim=1, keepdim=True)
    correlations, outputs = exact.responses.run(
        SURVEY, (dual_point,), family / norms, weights * norms[: len(filters), None]
    )
    _, balanced, predictions = judged(exact, filters, weights, intercept, outputs)
    primal = exact.primal(predictions, balanced)
    g_max = bound_over_family(exact, float(correlations.flatten(1).norm(dim=1).max()), dual_point)
    return relative_gap(primal, exact.dual(dual_point, g_max) - exact.primal_error(predictions, balanced))


def _survey(stream: Stream, dual_point: Tensor, filters: Tensor, weights: Tensor) -> list[Tensor]:
    """G (m, P, c) of all `filters`, and the outputs (n, c) of those that have `weights`, which are the first."""
    matrix = weights.to(stream.device, stream.dtype).flatten(0, 1)
    total = stream.zeros(dual_point.shape[1], len(filters) * stream.n_cells)
    outputs = stream.zeros(stream.n, matrix.shape[1])
    size = len(filters) * stream.n_cells * stream.dtype.itemsize
    for where, block in stream.blocks(filters, max(BLOCK_BYTES, BLOCK_IMAGES * size)):
        flat = block.flatten(1)
        total += dual_point[where].to(flat).T @ flat
        outputs[where] = flat[:, : len(matrix)] @ matrix
    return [total.T.unflatten(0, (len(filters), stream.n_cells)).cpu(), outputs.cpu()]


SURVEY = Pass(_survey, ("sum", "cat"))
