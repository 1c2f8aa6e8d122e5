"""The second moment of overlapping patches, from products of pixels: each of these serves every patch that it lies in.

An entry of it is Σ_i Σ_p (x_i[p+a] - m_a) (x_i[p+b] - m_b) over images i and positions p, for offsets a and b in a
patch and a point m. With the pixels y_i = x_i - z about an image z in their midst, and δ_p,a = z[p+a] - m_a it is

    Σ_p ( G[p+a, p+b] + s[p+a] δ_p,b + δ_p,a s[p+b] + n δ_p,a δ_p,b ),    G = Σ_i y_i y_iᵀ,    s = Σ_i y_i.

Only G takes a pass over the images, and of G only the blocks of two rows of pixels that share a patch: products of
matrices as wide as an image. No term is larger than pixels differ, so that nothing is lost to images far from zero.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from convcvx.data.images import Images
from convcvx.patches.spec import PatchSpec

WIDER = 2.0
"""So many products of pixels take the time of one product of patches: wide matrices are multiplied faster."""
CHUNK_BYTES = 32 << 20
"""Bytes of the pixels that are multiplied at once, in float64: of ordinary images as many as the caller allows."""
BLOCK_BYTES = 64 << 20
"""Bytes of the blocks of G at most."""
SEVERAL = 15
"""Images whose median, pixel by pixel, is in their midst."""


def suits(spec: PatchSpec, images: Images) -> bool:
    """Whether products of pixels are the quicker way: where patches overlap enough, and are pixels as they are."""
    channels, height, width = images.shape[1:]
    rows, columns = spec.output_size(height, width)
    tall, wide = spec.kernel_size
    pixels = tall * (height + 2 * spec.padding[0]) * (channels * (width + 2 * spec.padding[1])) ** 2
    patches = rows * columns * (channels * tall * wide) ** 2
    return spec.contrast is None and pixels <= WIDER * patches and 8 * pixels <= BLOCK_BYTES


def sum_over_patches(
    images: Images, spec: PatchSpec, about: Tensor, chunk: int, weights: Tensor | None = None
) -> Tensor:
    """(h + 1, h + 1) sum of row rowᵀ over all rows (patch - `about`, 1) of a `spec` without constant, in float64.

    Each image counts as often as its entry in `weights` (n,) says; at most `chunk` of them are in memory at once.
    """
    chunk = min(chunk, max(1, CHUNK_BYTES // (8 * math.prod(images.shape[1:]))))
    centre = images[:SEVERAL].cpu().double().median(dim=0, keepdim=True).values  # one image may be unlike all others
    sums, count, seen = torch.zeros_like(centre), 0.0, 0
    blocks = [torch.zeros((), dtype=torch.float64)] * spec.kernel_size[0]
    for part in images.split(chunk):
        pixels = part.cpu().double() - centre
        counted = pixels
        if weights is not None:
            each = weights[seen : seen + len(part)].double()
            counted, count = pixels * each[:, None, None, None], count + float(each.sum())
        else:
            count += len(part)
        seen += len(part)
        sums += counted.sum(dim=0, keepdim=True)
        one = _pixel_rows(spec, pixels)
        other = one if weights is None else _pixel_rows(spec, counted)
        for d in range(spec.kernel_size[0]):
            below = d * spec.dilation[0]
            blocks[d] = blocks[d] + one[: len(one) - below].transpose(1, 2) @ other[below:]
    apart, total = spec.columns(centre) - about[:, None], spec.columns(sums)
    size = len(about)
    moment = apart.new_empty(size + 1, size + 1)
    moment[:-1, :-1] = _of_positions(spec, blocks, images.shape[1])
    moment[:-1, :-1] += total @ apart.T + apart @ total.T + count * apart @ apart.T
    moment[-1, :-1] = moment[:-1, -1] = (total + count * apart).sum(dim=1)
    moment[-1, -1] = count * apart.shape[1]
    return moment


def _pixel_rows(spec: PatchSpec, pixels: Tensor) -> Tensor:
    """(H, b, C*W): the rows of padded images, each with those of all images and channels."""
    vertical, horizontal = spec.padding
    padded = F.pad(pixels, (horizontal, horizontal, vertical, vertical))
    return rearrange(padded, "b c h w -> h b (c w)").contiguous()


def _of_positions(spec: PatchSpec, blocks: list[Tensor], channels: int) -> Tensor:
    """(h, h) Σ_p G[p+a, p+b] of `blocks` of G: the d-th are those of a row of pixels and the row d entries below."""
    (tall, wide), (down, along), (step, stride) = spec.kernel_size, spec.dilation, spec.stride
    height, width = len(blocks[0]), blocks[0].shape[1] // channels
    first_rows = torch.arange(0, height - spec.span[0] + 1, step)
    pixels = torch.arange(0, width - spec.span[1] + 1, stride) + along * torch.arange(wide)[:, None]
    moment = blocks[0].new_empty(channels, tall, wide, channels, tall, wide)
    for upper in range(tall):
        for lower in range(upper, tall):
            block = blocks[lower - upper][first_rows + upper * down].sum(dim=0)
            block = rearrange(block, "(c w) (e v) -> c w e v", c=channels, e=channels)
            found = block[:, pixels[:, None], :, pixels[None]].sum(dim=2)  # (wide, wide, c, e) of the sum over columns
            moment[:, lower, :, :, upper] = rearrange(found, "a b c e -> e b c a")
            moment[:, upper, :, :, lower] = rearrange(found, "a b c e -> c a e b")
    return rearrange(moment, "c a b e i j -> (c a b) (e i j)")
