"""Kernels and images as small pictures, and as the PNG files that a page holds inside."""

from __future__ import annotations

import base64
from io import BytesIO

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

LARGEST_SIDE = 96
"""Pixels of a picture in a page, at most: larger images are averaged down, so that pages of many stay small."""
MARKED = torch.tensor([255.0, 140.0, 26.0]) / 255
"""The colour, red, green and blue, of where a filter fires: orange, seen on light and dark pixels alike."""


def by_weight(kernels: Tensor) -> Tensor:
    """Indices of kernels (m, ...), the longest first."""
    return kernels.detach().flatten(1).norm(dim=1).argsort(descending=True)


def kernel_shades(kernels: Tensor) -> Tensor:
    """Kernels (m, C, h, w) as pictures in [0, 1]: 0 is mid grey, each is scaled by its own largest entry.

    (m, 3, h, w) of three channels; else (m, 1, h, w) of the mean over them.
    """
    kernels = kernels.detach().float()
    kernels = kernels if kernels.shape[1] == 3 else kernels.mean(dim=1, keepdim=True)
    return 0.5 + 0.5 * kernels / kernels.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)


def image_shades(image: Tensor) -> Tensor:
    """An image (C, H, W) as a picture in [0, 1], (3, H, W) or (1, H, W), of `LARGEST_SIDE` at most.

    Pixels outside [0, 1] are scaled into it.
    """
    image = image.detach().float()
    image = image if image.shape[0] == 3 else image.mean(dim=0, keepdim=True)
    if (largest := max(image.shape[1:])) > LARGEST_SIDE:
        size = [max(1, round(side * LARGEST_SIDE / largest)) for side in image.shape[1:]]
        image = F.interpolate(image[None], size=size, mode="area")[0]
    low, high = min(float(image.min()), 0.0), max(float(image.max()), 1.0)
    return (image - low) / (high - low)


def marked(picture: Tensor, heat: Tensor) -> Tensor:
    """A picture (C, H, W) in grey with `heat` (h, w) >= 0 over it, in a colour: (3, H, W)."""
    grey = picture.mean(dim=0, keepdim=True).expand(3, -1, -1) * 0.85 + 0.075
    heat = F.interpolate(heat.float()[None, None], size=picture.shape[1:], mode="nearest-exact")[0]
    strength = 0.85 * heat / heat.max().clamp_min(1e-12)
    return grey * (1 - strength) + MARKED[:, None, None] * strength


def data_uri(picture: Tensor) -> str:
    """A picture (3, H, W) or (1, H, W) in [0, 1] as the address of a PNG file that is its own content."""
    pixels = (rearrange(picture, "c h w -> h w c") * 255).round().clamp(0, 255).byte().numpy()
    buffer = BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
