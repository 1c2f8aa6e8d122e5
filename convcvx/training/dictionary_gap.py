"""What the start from a dictionary proves: a gap over networks on the filters of the dictionary.

The weights of a dictionary are optimal to a gap over its filters that its regression reports, in whatever arithmetic it
had. Here the gap is proved, from the network as it is exported and the images alone. One pass in float64 gives the
network's outputs, hence its objective, and the correlation of each filter of the family with a dual point. (The bound
on the rounding of a pass in float32 is some times β, at the β of accurate dictionaries: it proves nothing.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from convcvx.budget import OutOfTime, clock
from convcvx.certificate import Certificate, judged
from convcvx.machine.watch import phase
from convcvx.oracles.contradiction import check_proof
from convcvx.oracles.family import bound_over_family, reach
from convcvx.patches import PatchEmbedding
from convcvx.problem import Problem, relative_gap
from convcvx.responses.mirror import mirror
from convcvx.responses.passes import Responses
from convcvx.responses.streams import BLOCK_BYTES, Stream
from convcvx.responses.table import Pass
from convcvx.rounding import SAFE, UNIT
from convcvx.training.dictionary_start import drawn_filters
from convcvx.training.options import TrainConfig

SAME = 1e-4
"""Distance of unit filters below which one of the dictionary is the network's own, which float32 has rounded."""
BLOCK_IMAGES = 256
"""Images whose responses are multiplied at once, at least: fewer would leave cores idle."""
SHARE = 1.0
"""Share of the seconds of a training that the proof at its end may take: whoever waits for both waits twice as long."""
LEAST = 5.0
"""Seconds that it may take in any case: what is proved of small problems does not depend on the clock."""
TRIED = 64
"""One part in so many of the images tells how long a pass over all of them takes."""
LEAST_TRIED = 1024
"""But no fewer images: they are work for all cores. Where that is more than a quarter of them none are tried."""


@dataclass(frozen=True)
class FamilyProof:
    """What is proved of a network over a family of filters.

    Attributes
    ----------
    name : str
        Of the family, in words.
    size : int
        Its filters.
    gap : float
        By how much, as a share, a network over these may be better.
    outputs : Tensor (n, c) float64
        The network's own without the intercept, which came with the proof.
    """

    name: str
    size: int
    gap: float
    outputs: Tensor

    def beside(self, certificate: Certificate) -> Certificate:
        """`certificate` with this gap over the family."""
        return replace(certificate, family=self.name, family_size=self.size, family_gap=self.gap)


@dataclass(frozen=True)
class LeftOut:
    """Such a proof would have taken so many `seconds`, which is long beside the training."""

    seconds: float


class _TooLong(Exception):
    """A pass over all images would take so many seconds, more than is allowed."""


def with_dictionary_gap(
    certificate: Certificate,
    config: TrainConfig,
    problem: Problem,
    filters: Tensor,
    weights: Tensor,
    intercept: Tensor | None,
) -> Certificate:
    """`certificate` with what `family_proof` proves of its network, if there is time."""
    proof = family_proof(config, problem, filters, weights, intercept)
    return proof.beside(certificate) if isinstance(proof, FamilyProof) else certificate


def family_proof(
    config: TrainConfig,
    problem: Problem,
    filters: Tensor,
    weights: Tensor,
    intercept: Tensor | None,
    outputs: Tensor | None = None,
    training_seconds: float | None = None,
) -> FamilyProof | LeftOut | None:
    """A network's gap over the family that a dictionary stands for; None if there is no time to prove it.

    It is left out if it would take longer than a training of so many seconds, where these are given.

    The family: the network's own filters and, unless the dictionary was to slide, those of the dictionary that the
    network does not use. With flips the objective is that on the images and their mirror images, and the family has the
    mirror image of each filter; of images that stay on disk it is that on the images as they are, and not small.

    Parameters
    ----------
    config : TrainConfig
        Of a training with a dictionary; of another nothing is proved.
    problem : Problem
    filters, weights, intercept : Tensor (m, r), (m, P, c), (c,)
        Those of the network as it is.
    outputs : Tensor (n, c), optional
        Its predictions without the intercept, in any arithmetic, where they are known: from these comes the dual point.
    training_seconds : float, optional
    """
    if config.dictionary is None or not bool(weights.any()):
        return None
    mirrored = config.flips and config.max_rounds == 0 and isinstance(problem.responses.images, Tensor)
    alive = filters.norm(dim=1) > 0  # float32 may have made 0 of a filter
    if mirrored:
        alive = alive.chunk(2)[0] & alive.chunk(2)[1]
        alive = torch.cat([alive, alive])
    if not bool(alive.any()):
        return None
    filters, weights = filters[alive], weights[alive]
    name = "filters of the dictionary"
    phase("gap over the filters of the dictionary")
    try:
        if outputs is None:
            outputs = problem.responses.predict(filters, weights, torch.zeros(problem.n_outputs))
        dual_point = problem.dual_point(outputs)
        if training_seconds is not None:
            # In all there are as many filters as in the dictionary, some of them unused.
            passes = max(1.0, config.dictionary / len(filters))
            _check_pace(problem, dual_point, filters, weights, passes, max(LEAST, SHARE * training_seconds))
        others = _unused(config, problem, normalize(filters))
        if mirrored:
            name += ", mirror images of images and filters included,"
            found = _mirrored_gap(problem, dual_point, filters, weights, intercept, others)
        else:
            found = _gap(problem, dual_point, filters, weights, intercept, others)
    except OutOfTime:
        return None
    except _TooLong as long:
        return LeftOut(*long.args)
    proof = FamilyProof(name, *found)
    return proof if math.isfinite(proof.gap) and bool(proof.outputs.isfinite().all()) else None


def _unused(config: TrainConfig, problem: Problem, used: Tensor) -> Tensor:
    """(q, r) filters of the dictionary as it stands that are not among those `used`."""
    if config.slide or (config.max_rounds == 0 and len(used) == config.dictionary):
        return used[:0]
    drawn = drawn_filters(config, problem)
    closest = torch.cat([torch.cdist(part, used).amin(dim=1) for part in drawn.split(1024)])
    return drawn[closest > SAME]


def _gap(
    problem: Problem, dual_point: Tensor, filters: Tensor, weights: Tensor, intercept: Tensor | None, others: Tensor
) -> tuple[int, float, Tensor]:
    """How many filters the network and `others` (q, r) are, by how much, as a share, a network over these may be
    better than this one: a proof; and its outputs."""
    exact = problem.with_dtype(torch.float64)
    family = torch.cat([filters, others])
    correlations, outputs = _surveyed(exact.responses, dual_point, family, weights)
    g_max = bound_over_family(exact, _largest(correlations), dual_point)
    return len(family), _proved(exact, dual_point, g_max, (filters, weights, intercept), outputs), outputs


def _mirrored_gap(
    problem: Problem, dual_point: Tensor, filters: Tensor, weights: Tensor, intercept: Tensor | None, others: Tensor
) -> tuple[int, float, Tensor]:
    """The same on the images and their mirror images, of filters whose second half are the mirror images of the first.

    The network is the symmetric one that the first half of its filters stands for, of which the export rounds the
    kernels of the second half again. On an image x with mirror image x' it gives Σ_j <φ(x; u_j) + φ(x'; u_j), V_j>, the
    same on x', so that objective, and dual value of a Z that is the same for both, are those of the images alone. For
    such a Z a filter and its mirror image have the same g: the norm of ½ Σ_i (φ(x_i; u) + φ(x'_i; u)) Z_i.

    The mirror image of a kernel lies in the space of filters to rounding. The filter nearest to it is meant, whose
    kernel is off by d with |d_j| <= `off` ‖b_j‖, and g by `off` times Σ_i ‖Z_i‖ Σ_pk w_pk Σ_j |x_j| ‖b_j‖.
    """
    half = torch.cat([part.chunk(2)[0] for part in (filters, others) if len(part)])
    own, first = filters.chunk(2)[0], weights.chunk(2)[0]
    exact = problem.with_dtype(torch.float64)
    both = exact.responses, exact.responses.mirrored()
    surveyed = [_surveyed(responses, dual_point, half, first) for responses in both]
    correlations, outputs = (sum(parts) for parts in zip(*surveyed, strict=True))
    g_max = bound_over_family(exact, _largest(correlations) / 2, dual_point)
    sizes, _ = reach(exact.responses)
    steepest = 2 * exact.responses.activation.degree - 1  # of (x·u)²/‖u‖ the slope is 2a·a + a² at most
    off = steepest * _mirroring_error(exact.responses.embedding, half)
    g_max += off * float(dual_point.norm(dim=1) @ sizes) * SAFE
    network = torch.cat([own, own]), torch.cat([first, first]), intercept
    return 2 * len(half), _proved(exact, dual_point, g_max, network, outputs), outputs


def _mirroring_error(embedding: PatchEmbedding, filters: Tensor) -> float:
    """`off` above: of the unit filters nearest to the mirror images of `filters`, per unit of these."""
    units = normalize(filters)
    mirrored = normalize(mirror(embedding, units))
    exact = embedding.spec.mirrored(embedding.kernels(units)[0]).flatten(1)
    taps = exact.shape[1]
    columns = embedding.basis.norm(dim=0)
    off = (mirrored @ embedding.basis)[:, :taps] - exact
    bias = (mirrored - units) @ embedding.basis[:, taps:]
    rounding = 4 * (len(columns) + len(embedding.basis)) * UNIT
    moved = torch.cat([off, bias], dim=1).abs()
    # An entry that no filter has is 0 in a mirror image too.
    return float(torch.where(moved > 0, moved / columns, moved).max()) * SAFE + rounding


def _surveyed(
    responses: Responses, dual_point: Tensor, family: Tensor, weights: Tensor, where: Tensor | None = None
) -> list[Tensor]:
    """G (q, P, c) of the unit filters along `family` (q, r), and outputs (n, c) of the first, which have `weights`.

    On the images `where` (b,) alone if that is given, to which the `dual_point` (b, c) belongs.
    """
    norms = family.norm(dim=1, keepdim=True)
    wanted = SURVEY if where is None else SURVEY_OF_SOME
    return responses.run(wanted, (dual_point,), family / norms, weights * norms[: len(weights), None], where=where)


def _check_pace(
    problem: Problem, dual_point: Tensor, filters: Tensor, weights: Tensor, passes: float, allowed: float
) -> None:
    """Raise `_TooLong` if so many `passes` of `_surveyed` in float64 take longer than `allowed`, by a few images."""
    responses, n = problem.with_dtype(torch.float64).responses, problem.n
    size = min(max(LEAST_TRIED, n // TRIED), problem.largest_sample)
    if 4 * size > n:
        return
    where = torch.arange(0, n, n // size)
    for part in (where[:1], where):  # what is done once, by the first, does not count
        began = clock()
        _surveyed(responses, dual_point[part], filters, weights, part)
        seconds = passes * (clock() - began) * n / len(part)
    if not seconds <= allowed:
        raise _TooLong(seconds)


def _largest(correlations: Tensor) -> float:
    return float(correlations.flatten(1).norm(dim=1).max())


def _proved(
    exact: Problem,
    dual_point: Tensor,
    g_max: float,
    network: tuple[Tensor, Tensor, Tensor | None],
    outputs: Tensor,
) -> float:
    """The relative gap of a network with these float64 `outputs`, and a bound on g over the family."""
    _, weights, predictions = judged(exact, *network, outputs)
    primal, dual = exact.primal(predictions, weights), exact.dual(dual_point, g_max)
    check_proof(exact, dual, primal, predictions, weights)
    return relative_gap(primal, dual - exact.primal_error(predictions, weights))


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
    return [rearrange(total, "c (m p) -> m p c", p=stream.n_cells).cpu(), outputs.cpu()]


SURVEY = Pass(_survey, ("sum", "cat"))
SURVEY_OF_SOME = replace(SURVEY, exact=False)
