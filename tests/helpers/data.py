"""Data sets as users have them: arrays by the Keras convention, folders of images, and files that are traps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import DTypeLike
from PIL import Image

from convcvx.data.array_files import KEYS


def keras_arrays(
    n: int = 12,
    n_test: int = 6,
    shape: tuple[int, ...] = (5, 4),
    n_classes: int = 3,
    *,
    dtype: DTypeLike = np.uint8,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Noise of this shape, uint8 or of a float dtype in [0, 1], and classes in turn."""
    pixels = np.random.default_rng(seed).integers(256, size=(n + n_test, *shape))
    images = pixels.astype(np.uint8) if dtype == np.uint8 else (pixels / 255).astype(dtype)
    parts = images[:n], np.arange(n) % n_classes, images[n:], np.arange(n_test) % n_classes
    return dict(zip(KEYS, parts, strict=True))


def write_images(
    root: Path,
    mode: str = "L",
    sizes: Sequence[tuple[int, int]] = ((6, 5),),
    *,
    classes: Sequence[str] = ("cat", "dog"),
    counts: tuple[int, int] = (4, 2),
    ending: str = ".png",
) -> Path:
    """Noise in root/train/CLASS and root/test/CLASS, so many images of each class there, of these sizes in turn."""
    random = np.random.default_rng(0)
    for part, count in zip(("train", "test"), counts, strict=True):
        for name in classes:
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                width, height = sizes[i % len(sizes)]
                pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(root / part / name / f"{i}{ending}")
    return root


class Bomb:
    """Whoever unpickles it fails the test; no `except Exception` keeps that from being seen."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)
