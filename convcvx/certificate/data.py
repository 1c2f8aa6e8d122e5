"""By what a certificate knows the problem again that it speaks of."""

from __future__ import annotations

import numpy as np
import torch

from convcvx.data.fingerprint import fingerprint, spread
from convcvx.patches.embedding import SAME_SPACE
from convcvx.problem import Problem

IMAGES = 512
"""Images that are looked at, evenly spread: to read more takes long where they stay on disk."""
PROBES = 8
"""Numbers by which a space of filters is known: another one would have to differ in none of them."""
Space = tuple[float, ...]
"""What `space_of` tells of a space."""


def data_of(problem: Problem) -> str:
    """A fingerprint of images, targets, what each image counts for, and a pooling matrix if there is one.

    The same in whatever arithmetic passes run, and on whatever device; of images as `IMAGES` says.
    """
    images, pooling = problem.responses.images, problem.responses.pooling
    looked_at = images[spread(len(images), IMAGES).to(images.device)].double()
    counts = (problem.shares.counts / problem.shares.total).float()  # whatever unit the weights were given in
    parts = [looked_at, problem.targets + problem.offset, counts]
    parts += [] if pooling.weights is None else [pooling.weights.double()]
    return fingerprint(parts, " ".join(str(tuple(part.shape)) for part in [images, *parts]))


def space_of(problem: Problem) -> Space | None:
    """Of the space that filters are restricted to, with its norm: a few entries of BᵀB in directions drawn once.

    As shares of the norm of BᵀB, which a rotation of the basis B (r, h) leaves alone, of one subspace after the other;
    None where filters are free.
    """
    embedding = problem.responses.embedding
    if embedding.spec.rank is None and embedding.spec.whiten is None:
        return None
    basis = embedding.basis.cpu().double()
    probes = np.random.RandomState(0).standard_normal((2, PROBES, basis.shape[1]))  # a stream that numpy keeps
    found: list[float] = []
    for part in basis.chunk(embedding.spec.subspaces):
        left, right = (torch.from_numpy(probe) @ part.T for probe in probes)
        found += ((left * right).sum(dim=1) / (part @ part.T).norm()).tolist()
    return tuple(found)


def same_space(mine: Space | None, others: Space | None) -> bool:
    """Whether two spaces are one to the rounding of another fit on the same images."""
    if mine is None or others is None:
        return True  # files of earlier versions do not say; whether filters are free, the patches tell
    return len(mine) == len(others) and bool(np.abs(np.subtract(mine, others)).max() <= SAME_SPACE)
