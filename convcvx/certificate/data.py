"""By what a certificate knows the data again that it speaks of."""

from __future__ import annotations

import torch

from convcvx.data.fingerprint import fingerprint, spread
from convcvx.problem import Problem

IMAGES = 512
"""Images that are looked at, evenly spread: to read more takes long where they stay on disk."""
SPACE_STEPS = 1000
"""Steps from 0 to the largest entry of the Gram matrix of a fitted basis, to which it is rounded: last bits differ from
machine to machine, and spaces that differ do so by far more."""


def data_of(problem: Problem) -> str:
    """A fingerprint of images, targets, what each image counts for, and the space that filters are restricted to.

    The same in whatever arithmetic passes run, and on whatever device; of images as `IMAGES` says.
    """
    embedding, images = problem.responses.embedding, problem.responses.images
    looked_at = images[spread(len(images), IMAGES).to(images.device)].double()
    counts = (problem.shares.counts / problem.shares.total).float()  # whatever unit the weights were given in
    parts = [looked_at, problem.targets + problem.offset, counts]
    if embedding.spec.rank is not None or embedding.spec.whiten is not None:
        gram = embedding.basis.T @ embedding.basis
        parts.append((gram * (SPACE_STEPS / gram.abs().max())).round().to(torch.int16))
    return fingerprint(parts)
