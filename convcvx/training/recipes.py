"""Defaults that fit the data: the options for training and stacking on images of which nothing else is known.

Few images are trained to the optimum, with a small gap in the certificate. Many get a dictionary of k-means filters with
optimal weights, which is as accurate in minutes as training the filters is in hours. Nothing here goes by the name of a
data set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

FEW = 2000
"""Images up to which a training to a small gap takes seconds; with more, accuracy grows faster with a dictionary."""
FEW_OPTIONS: dict[str, Any] = {"beta_ratio": 0.01, "tol": 3e-2}
"""Weight decay at which few images are told apart without being learnt by heart, and a gap that is reached there."""

DICTIONARY: dict[str, Any] = {
    "whiten": True,
    "hidden_bias": True,
    "dictionary_source": "kmeans",
    "tune": 0.1,
    "max_rounds": 0,
    "tol": 1.0,  # any gap: β is chosen for accuracy, and filters were not trained
}
"""What dictionaries share."""
STROKES: dict[str, Any] = {"whiten_epsilon": 0.3}
"""Of grey images: black and white already, so that contrast is not normalised, and smooth, so that noise is not raised."""
TEXTURES: dict[str, Any] = {"contrast": True, "contrast_epsilon": 1e-2, "threshold": 0.25}
"""Of colour images: light varies over them; a threshold lets a filter answer to few patches."""

WORK = 6e12
"""Multiply-adds that responses and Gram matrix of a dictionary may cost: minutes on two cores."""
FEWEST, MOST = 64, 6000
"""Filters of a dictionary at least, however long that takes, and at most."""
POSITIONS = 40
"""Patch positions along a side, about, at most: larger images are seen in strides."""


@dataclass(frozen=True)
class Geometry:
    """Patches and pooling cells along one side of an image, in pixels; `maps` is the number of positions."""

    kernel: int
    stride: int
    padding: int
    cells: int
    maps: int

    @classmethod
    def of(cls, length: int, kernel: int, padding: int, cells: int) -> Geometry:
        """Patches of about `kernel` pixels that fit `length`: with strides larger ones, so that none are left out."""
        stride = -(-length // POSITIONS)
        kernel = min(length, max(1, kernel) + 2 * (stride - 1))
        padding = min(padding, kernel - 1)
        kernel += (length + 2 * padding - kernel) % stride  # the last patch ends where the image does: flips ask for it
        maps = (length + 2 * padding - kernel) // stride + 1
        return cls(kernel, stride, padding, min(cells, maps), maps)


@dataclass(frozen=True)
class Grid:
    """The `Geometry` of rows and of columns."""

    rows: Geometry
    columns: Geometry

    @property
    def options(self) -> dict[str, Any]:
        def pair(name: str) -> str:
            sides = getattr(self.rows, name), getattr(self.columns, name)
            return "x".join(map(str, sides if sides[0] != sides[1] else sides[:1]))

        pool = pair("cells")
        return {
            "kernel_size": pair("kernel"),
            "stride": pair("stride"),
            "padding": pair("padding"),
            "pool": "global" if pool == "1" else pool,
        }

    @property
    def patch_pixels(self) -> int:
        return self.rows.kernel * self.columns.kernel

    @property
    def positions(self) -> int:
        return self.rows.maps * self.columns.maps

    @property
    def cells(self) -> int:
        return self.rows.cells * self.columns.cells


def recipe(
    image_shape: tuple[int, int, int], n_images: int, loss: str = "squared", classes: bool = True
) -> dict[str, Any]:
    """Options of `TrainConfig` that fit images of this kind, whatever they show.

    Parameters
    ----------
    image_shape : (int, int, int)
        Channels, height and width in pixels; a vector is an image of one pixel.
    n_images : int
        Images to train on.
    loss : str
        As in `TrainConfig`: dictionaries need the squared loss.
    classes : bool
        Whether the targets are classes, not real values.
    """
    if n_images <= FEW or loss != "squared":
        return _optimum(image_shape)
    return _dictionary(image_shape, n_images, classes)


def _optimum(image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Training to a small gap. Small patches: the search for filters, and a proof, cost more with each pixel."""
    _, *sides = image_shape
    sizes = [(3, 1) if side < 16 else (5, 0) for side in sides]
    grid = Grid(*(Geometry.of(side, *size, 4) for side, size in zip(sides, sizes, strict=True)))
    return {**FEW_OPTIONS, **grid.options, "hidden_bias": grid.patch_pixels == 1}  # a vector has no other threshold


def _dictionary(image_shape: tuple[int, int, int], n_images: int, classes: bool) -> dict[str, Any]:
    channels, *sides = image_shape
    if channels == 1:
        # Strokes are told apart by what half the image shows, and by where it shows it.
        grid = Grid(*(Geometry.of(side, min(side, POSITIONS) // 2, side // 6, 4) for side in sides))
    else:
        grid = Grid(*(Geometry.of(side, 5, 0, 3) for side in sides))
    # The mirror image of a letter or a number is none; nor has it the same real value.
    flips = channels > 1 and classes
    kind = STROKES if channels == 1 else TEXTURES
    filters = _filters(n_images, channels, grid, flips)
    return {**DICTIONARY, **kind, **grid.options, "flips": flips, "dictionary": filters}


def _filters(n_images: int, channels: int, grid: Grid, flips: bool) -> int:
    """The most filters whose cost is `WORK`: n K h m for the responses, n (m P)² for the Gram matrix, half with flips."""
    gram = n_images * grid.cells**2 / (2 if flips else 1)
    responses = n_images * grid.positions * (channels * grid.patch_pixels + 1)
    most = (math.sqrt(responses**2 + 4 * gram * WORK) - responses) / (2 * gram)
    return 2 * (round(min(max(most, FEWEST), MOST, n_images)) // 2)


def stack_recipe(
    image_shape: tuple[int, int, int], n_images: int, loss: str = "squared", classes: bool = True
) -> tuple[dict[str, Any], str, str, str]:
    """(options, channels, downsample, heads) of `StackConfig.of` for two stages; parameters as for `recipe`."""
    first = recipe(image_shape, n_images, loss, classes)
    return first | {"validation": 0.1}, "32", "2", "last"
