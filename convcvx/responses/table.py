"""The passes over images, as data: what is computed of some images, and how the results of all come of those.

A pass runs on any part of the images. What is per image goes in and comes out image by image, everything else is the
same for all parts; so the images may be shared out among processes, which `Responses.run` knows nothing of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from convcvx.responses.streams import BLOCK_BYTES, Stream, exhaust, sum_up

STRIPE = 512
"""Columns of the Gram matrix computed at a time: of each stripe only what lies on and above the diagonal."""

Combine = Literal["sum", "cat", "same"]
Residual = Callable[[Tensor, Tensor], Tensor]
"""(predictions (b, c), image indices (b,)) to the gradient of the objective in the predictions, (b, c).

It is called from several threads at once.
"""


@dataclass(frozen=True)
class Pass:
    """One pass over images.

    Attributes
    ----------
    chunk : callable
        (stream, *rows, *common) to a list of tensors: `stream` has some of the images, `rows` what belongs to each of
        these, and `common` is the same for all. A function of a module, by whose name other processes know it.
    combine : tuple of {"sum", "cat", "same"}
        How each result of all images comes of those of parts: their sum, one after the other, or any of them.
    exact : bool
        Whether sums have the same bits however many processes share the images. Else each process is done with all of
        its images before results are added, for results that are too large to have of many parts at once, or that are
        wanted too soon for that. Only such a pass runs over chosen images.
    several : bool
        Whether it runs over several streams side by side, to the same images or to features of them: the chunk is given
        a list of them then.
    """

    chunk: Callable[..., list[Tensor]]
    combine: tuple[Combine, ...]
    exact: bool = True
    several: bool = False

    def of(self, streams: Sequence[Stream], *arguments: Any) -> list[Tensor]:
        """Its results on these streams, of which there is one unless it runs over several."""
        return self.chunk(list(streams) if self.several else streams[0], *arguments)

    def select(self, results: Sequence[Tensor], *, summed: bool) -> list[Tensor]:
        """Of the results of a part those that are summed, or the others."""
        return [part for part, how in zip(results, self.combine, strict=True) if (how == "sum") == summed]


def _predict(stream: Stream, filters: Tensor, weights: Tensor, intercept: Tensor) -> list[Tensor]:
    """f (n, c)."""
    kernels, m = stream.kernels(filters), len(filters)
    matrix = weights.to(stream.device, stream.dtype).permute(2, 1, 0).flatten(1)  # (c, P·m)
    predictions = intercept.double().to(stream.device).expand(stream.n, -1).clone()

    def work(span: slice) -> None:
        for part in stream.chunks(m, span):
            pooled = stream.convolution(stream.seen(part), kernels).to(stream.dtype)
            predictions[part] += (matrix @ pooled.flatten(1).T).T

    if m:
        exhaust(stream.each(work, 0, stream.n))
    return [predictions.cpu()]


def _gram(stream: Stream, targets: Tensor, counts: Tensor, filters: Tensor, shift: Tensor | None) -> list[Tensor]:
    """Σ counts_i A_iᵀA_i, of which only what lies on and above the diagonal is right, and Σ counts_i A_iᵀY_i."""
    size = len(filters) * stream.n_cells + 1
    gram, moments = stream.zeros(size, size), stream.zeros(size, targets.shape[1])
    alike = bool((counts == 1).all())
    # Blocks of at least so many images keep the products, not their accumulation, the cost.
    for where, block in stream.blocks(filters, max(BLOCK_BYTES, 1024 * size * stream.dtype.itemsize)):
        design = torch.cat([block.flatten(1), block.new_ones(len(block), 1)], dim=1)
        if shift is not None:
            design[:, :-1] -= shift.to(design)
        weighed = design if alike else design * counts[where, None].to(design)
        for first in range(0, size, STRIPE):
            stripe = slice(first, first + STRIPE)
            gram[stripe, first:] += weighed[:, stripe].T @ design[:, first:]
        moments += weighed.T @ targets[where].to(design)
    return [gram.cpu(), moments.cpu()]


def _correlate(stream: Stream, dual_point: Tensor, filters: Tensor) -> list[Tensor]:
    """G (m, P, c)."""
    total = stream.zeros(dual_point.shape[1], len(filters) * stream.n_cells)
    for where, block in stream.blocks(filters):
        total += dual_point[where].to(block).T @ block.flatten(1)
    return [total.T.unflatten(0, (len(filters), stream.n_cells)).cpu()]


def _ascent(stream: Stream, dual_point: Tensor, filters: Tensor, directions: Tensor) -> list[Tensor]:
    """G (m, P, c), and the gradient (m, r) of Σ_j <directions_j (P, c), G_j>."""
    kernels, m = stream.kernels(filters), len(filters)
    towards = directions.to(stream.device, stream.dtype).permute(2, 1, 0).flatten(1)  # (c, P·m)
    dual_point = dual_point.to(stream.device, stream.dtype)

    def work(span: slice) -> tuple[Tensor, Tensor]:
        total, slope = stream.zeros(dual_point.shape[1], stream.n_cells * m), stream.zeros(*kernels.T.shape)
        for part in stream.chunks(m, span):
            pooled, pull_back = stream.convolution.vjp(stream.seen(part), kernels)
            total += dual_point[part].T @ pooled.to(stream.dtype).flatten(1)
            slope += pull_back((dual_point[part] @ towards).unflatten(1, (-1, m)))
        return total, slope

    total, slope = sum_up(stream.each(work, 0, stream.n))
    correlations = total.T.unflatten(0, (stream.n_cells, m)).transpose(0, 1).cpu()
    return [correlations, stream.pulled_back(slope, filters).cpu()]


def _slopes(stream: Stream, slopes: Tensor, filters: Tensor, weights: Tensor, intercept: Tensor) -> list[Tensor]:
    """Gradients of <slopes, predictions> in filters, weights and intercept."""
    slopes = slopes.to(stream.device)
    return gradients(stream, filters, weights, intercept, lambda _, images: slopes[images])


def gradients(stream: Stream, filters: Tensor, weights: Tensor, intercept: Tensor, residual: Residual) -> list[Tensor]:
    """Gradients in filters (m, r), weights (m, P, c) and intercept (c,) of a function of the predictions."""
    kernels, m = stream.kernels(filters), len(filters)
    matrix = weights.to(stream.device, stream.dtype).permute(2, 1, 0).flatten(1)  # (c, P·m)
    shift = intercept.to(stream.device, stream.dtype)
    images = torch.arange(stream.n, device=stream.device)

    def work(span: slice) -> tuple[Tensor, Tensor, Tensor]:
        kernel, weight, bias = stream.zeros(*kernels.T.shape), stream.zeros(*matrix.shape), stream.zeros(*shift.shape)
        for part in stream.chunks(m, span):
            pooled, pull_back = stream.convolution.vjp(stream.seen(part), kernels)
            pooled = pooled.to(stream.dtype).flatten(1)
            slopes = residual((matrix @ pooled.T).T + shift, images[part])
            weight += slopes.T @ pooled
            bias += slopes.sum(dim=0)
            kernel += pull_back((slopes @ matrix).unflatten(1, (-1, m)))
        return kernel, weight, bias

    kernel, weight, bias = sum_up(stream.each(work, 0, stream.n))
    return [stream.pulled_back(kernel, filters), weight.T.unflatten(0, (stream.n_cells, m)).transpose(0, 1), bias]


PREDICT = Pass(_predict, ("cat",))
GRAM = Pass(_gram, ("sum", "sum"))
CORRELATE = Pass(_correlate, ("sum",))
ASCENT = Pass(_ascent, ("sum", "sum"))
SLOPES = Pass(_slopes, ("sum", "sum", "sum"))
