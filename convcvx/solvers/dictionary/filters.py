"""Dictionaries: thousands of filters chosen from the patches alone, before anything is trained.

With many filters the choice matters less than their number: patches drawn at random come close to what any learning
of features gives (Coates and Ng 2011). A dictionary is to be used on contrast-normalised, whitened patches, with a
threshold α: the filter (w, -α) / √(1 + α²) for a unit w responds to patches whose projection on w exceeds α.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from convcvx.errors import InputError, check_choice, check_count, check_positive
from convcvx.machine.watch import watched
from convcvx.responses.mirror import mirror
from convcvx.responses.passes import Responses
from convcvx.terms.names import DICTIONARY_SOURCES

PATCHES_PER_FILTER = 30
"""Patches that k-means clusters, a filter."""
KMEANS_STEPS = 10
"""Steps of Lloyd's algorithm, each with all the drawn patches: filters need good centres, not those it would end at."""
KMEANS_PART = 8192
"""Points whose products with all centres are in memory at once."""
PATCHES_PER_IMAGE = 8
"""Patches drawn from one image."""


def dictionary(
    responses: Responses,
    n_filters: int,
    *,
    source: str = "patches",
    threshold: float = 0.0,
    flips: bool = False,
    seed: int = 0,
) -> Tensor:
    """Filters from the patches of some images.

    Parameters
    ----------
    responses : Responses
    n_filters : int
    source : {"patches", "kmeans"}
    threshold : float
        α ≥ 0; a positive one needs the hidden bias.
    flips : bool
        Make the second half of the filters the mirror images of the first.
    seed : int

    Returns
    -------
    Tensor (n_filters, r) float64
        Of unit norm.

    Raises
    ------
    InputError
        For images without contrast, an odd number of filters with `flips`, a threshold without hidden bias.
    """
    biased = responses.embedding.spec.hidden_bias
    check_dictionary(n_filters, source=source, threshold=threshold, flips=flips, hidden_bias=biased)
    drawn = n_filters // 2 if flips else n_filters
    random = torch.Generator().manual_seed(seed)
    if source == "patches":
        directions = draw_patches(responses, drawn, random)
    else:
        points = draw_patches(responses, PATCHES_PER_FILTER * drawn, random)
        directions = kmeans(responses, points, drawn, random)
    directions = normalize(directions)
    filters = torch.cat([directions, directions.new_full((drawn, 1), -threshold)], dim=1) if biased else directions
    filters = normalize(filters)
    return torch.cat([filters, mirror(responses.embedding, filters)]) if flips else filters


def check_dictionary(n_filters: int, *, source: str, threshold: float, flips: bool, hidden_bias: bool) -> None:
    """Raise `InputError` for what no dictionary can have."""
    check_choice("dictionary_source", source, DICTIONARY_SOURCES)
    check_positive("threshold", threshold, zero=True)
    check_count("dictionary", n_filters)
    if threshold and not hidden_bias:
        raise InputError(f"threshold {threshold:g} needs the hidden bias; pass --hidden-bias, or threshold 0")
    if flips and n_filters % 2:
        raise InputError(f"dictionary must have an even number of filters with flips; got {n_filters}")


def draw_patches(responses: Responses, count: int, random: torch.Generator) -> Tensor:
    """(count, r) random patches with some contrast, in the space of the filters, the hidden bias's coordinate left out.

    A few of each of as many random images as that takes, with replacement if these have too few.
    """
    embedding = responses.embedding
    basis = embedding.basis[: embedding.dim - embedding.spec.hidden_bias].to(responses.dtype)
    found: list[Tensor] = []
    images = torch.randperm(responses.n, generator=random)[: -(-count // PATCHES_PER_IMAGE)]
    share = -(-count // len(images))
    for part in images.split(64):
        norms = responses.patch_norms(part, basis)
        # Uniform among the patches that are not next to zero: those give no direction.
        chances = (norms > 0.1 * norms.amax()).double()
        alive = chances.sum(dim=1) > 0
        if bool(alive.any()):
            too_few = bool((chances[alive].sum(dim=1) < share).any())
            picks = torch.multinomial(chances[alive], share, replacement=too_few, generator=random)
            found.append(responses.patches(part[alive], picks).flatten(0, 1).cpu() @ basis.T)
    if not found:
        raise InputError("a dictionary needs patches that are not zero; all of these images' are")
    patches = torch.cat(found).double()
    order = torch.arange(count) % len(patches)
    return patches[torch.randperm(len(patches), generator=random)[order]]


def kmeans(responses: Responses, points: Tensor, count: int, random: torch.Generator) -> Tensor:
    """(count, d) unit centres of the directions of `points` (n, d): spherical k-means (Coates and Ng 2012, sec. 2).

    A point counts for the centre with the largest inner product, weighted by its own length; a centre without
    points starts again from one of them. The processes of `responses` look for the
    centres of points, part by part; sums of points are those of one process.
    """
    points = points.float()
    parts = points.split(KMEANS_PART)
    centres = normalize(points[torch.randperm(len(points), generator=random)[:count]])
    for _ in watched("k-means", range(KMEANS_STEPS), KMEANS_STEPS):
        sums = torch.zeros_like(centres)
        for part, closest in zip(parts, responses.apply(_closest, parts, centres), strict=True):
            sums.index_add_(0, closest, part)
        empty = (sums == 0).all(dim=1)
        sums[empty] = points[torch.randint(len(points), (int(empty.sum()),), generator=random)]
        centres = normalize(sums)
    return centres.double()


def _closest(points: Tensor, centres: Tensor) -> Tensor:
    """(n,): the centre with the largest inner product with each of the points (n, d)."""
    return (points @ centres.T).argmax(dim=1)
