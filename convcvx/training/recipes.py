"""Defaults that fit the data: options for training and stacking on images of which only shape and number are known.

Few images are trained to the optimum, with a small gap in the certificate. Many get a dictionary of k-means filters
with optimal weights: in minutes it is more accurate than filters trained for hours. No data set goes by its name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

FEW = 3e7
"""Patch entries n·K·h up to which filters are trained to a small gap: 30 core-seconds for 400 images of CIFAR-10, whose
patches have 2.4e7. Beyond, a dictionary is as accurate for less: 95 % on 1,000 images of MNIST, either way."""
OPTIMUM: dict[str, Any] = {
    "beta_ratio": 0.01,  # digits: 98 % of images held out, with 60 filters
    "tol": 0.05,  # digits: reached in five rounds, 15 core-seconds
}
"""What trainings to a small gap share."""

DICTIONARY: dict[str, Any] = {
    "whiten": True,
    "hidden_bias": True,
    "dictionary_source": "kmeans",
    "tune": 0.1,
    "max_rounds": 0,
    "tol": 1.0,  # any gap: β is chosen for accuracy, and no filter is trained
}
"""What dictionaries share."""
STROKES: dict[str, Any] = {"whiten_epsilon": 0.3, "flips": False}
"""Grey images: large patches, most of whose directions hold next to nothing, are whitened with care."""
TEXTURES: dict[str, Any] = {"contrast": True, "contrast_epsilon": 1e-2, "threshold": 0.25, "flips": True}
"""Colour images: lit differently from patch to patch, and as often from the left as from the right, where the mirror
image of a letter is none. With a threshold few filters answer to one patch."""
WORK = 6e12
"""Multiply-adds for responses and Gram matrix of a dictionary: all of MNIST then gets 472 filters, 99.25 % of the test
images right, and takes 485 core-seconds on busy cores, 60 % of them for the certificate and the scores."""
FEATURES = 8000
"""Filters times cells at most, pairs counted once: their Gram matrix is a quarter of a GB, and its factors take a few
seconds. More features than images do no harm: with 3,840 on 2,000 of MNIST the held-out loss still falls."""
FEWEST = 64
"""Filters of a dictionary at least, however long they take."""
MOST = 2000
"""Filters of a dictionary at most: k-means costs their square."""

LARGEST = 12
"""Pixels of a patch's side in grey images at most: with up to 150 entries responses stay in registers. With 14,
9,000 MNIST images took 92 core-seconds instead of 56, for no better a network."""
POSITIONS = 40
"""Patch positions along a side, about, at most: larger images are looked at in strides."""

CHANNELS = 48
"""Principal channels of the first stage's maps that the second sees, of a dictionary: on 8,000 images of CIFAR-10 they
take the second to 72 % from the 69 % of the first, and one head over both to 74 %."""
FEW_CHANNELS = 16
"""The same of filters that were trained, few as they are: the search for the second stage's costs their number."""
JOINT = 0.15
"""Share of `WORK` that the dictionary of each of two stages gets: a descent, and one head over both, cost as much."""
SLIDE: dict[str, Any] = {"slide": "0,3", "crops": "0,1"}
"""Epochs of descent on the filters of the second stage, and pixels that its features move by meanwhile: filters that
were only drawn left it behind the first."""


@dataclass(frozen=True)
class Side:
    """Patches and pooling cells along one side of an image, in pixels; `maps` counts the positions."""

    kernel: int
    stride: int
    padding: int
    cells: int
    maps: int

    @classmethod
    def of(cls, length: int, kernel: int, padding: int = 0, cells: int = 4) -> Side:
        """Patches of about `kernel` pixels: larger with a stride, so that they overlap, and so that the last one ends
        where the image does, as mirrored patches must."""
        stride = -(-length // POSITIONS)
        kernel = max(1, min(length, kernel + stride - 1))
        padding = min(padding, kernel - 1)
        kernel += (length + 2 * padding - kernel) % stride
        maps = (length + 2 * padding - kernel) // stride + 1
        return cls(kernel, stride, padding, min(cells, maps), maps)


@dataclass(frozen=True)
class Grid:
    """Patches and pooling cells of images of one shape."""

    channels: int
    sides: tuple[Side, Side]

    @property
    def options(self) -> dict[str, Any]:
        pool = self._pair("cells")
        return {
            "kernel_size": self._pair("kernel"),
            "stride": self._pair("stride"),
            "padding": self._pair("padding"),
            "pool": "global" if pool == "1" else pool,
        }

    def _pair(self, name: str) -> str:
        rows, columns = (getattr(side, name) for side in self.sides)
        return f"{rows}" if rows == columns else f"{rows}x{columns}"

    @property
    def patch_size(self) -> int:
        return self.channels * math.prod(side.kernel for side in self.sides)

    @property
    def positions(self) -> int:
        return math.prod(side.maps for side in self.sides)

    @property
    def cells(self) -> int:
        return math.prod(side.cells for side in self.sides)


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
        As in `TrainConfig`: under another loss than the squared one filters are searched for, as the weights of large
        dictionaries take longer there.
    classes : bool
        Whether the targets are classes, not real values.
    """
    small = _small_patches(image_shape)
    if loss != "squared" or n_images * small.positions * small.patch_size <= FEW:
        # A vector has no other threshold than the hidden bias; patches of images find theirs in what surrounds them.
        return {**OPTIMUM, **small.options, "hidden_bias": small.positions == 1}
    grid = _large_patches(image_shape)
    # A real value may be of the light, or of the left side; what a thing is called, of neither.
    textures = classes and grid.channels > 1 and grid.positions > 1
    filters = _filters(grid, n_images, flips=textures)
    return {**DICTIONARY, **(TEXTURES if textures else STROKES), **grid.options, "dictionary": filters}


def _small_patches(image_shape: tuple[int, int, int]) -> Grid:
    """Patches for the search for filters, and perhaps a proof, both of which cost more with each pixel."""
    channels, *sides = image_shape
    rows, columns = (Side.of(side, 3, padding=1) if side < 16 else Side.of(side, 5) for side in sides)
    return Grid(channels, (rows, columns))


def _large_patches(image_shape: tuple[int, int, int]) -> Grid:
    """Patches for dictionaries."""
    channels, *sides = image_shape
    if channels == 1:
        # Strokes are told apart by what half of an image shows; padding has them seen whole at its edges.
        rows, columns = (Side.of(side, min(side // 2, LARGEST), padding=min(side // 7, LARGEST // 3)) for side in sides)
    else:
        rows, columns = (Side.of(side, 5, cells=3) for side in sides)
    return Grid(channels, (rows, columns))


def _filters(grid: Grid, n_images: int, flips: bool, work: float = WORK) -> int:
    """The most filters m, an even number, with n·K·h·m + n·(m·P)² within `work`; flips halve the latter."""
    copies = 2 if flips else 1
    gram = n_images * grid.cells**2 / copies
    responses = n_images * grid.positions * (grid.patch_size + 1)
    most = (math.sqrt(responses**2 + 4 * gram * work) - responses) / (2 * gram)
    return 2 * round(max(FEWEST, min(most, MOST, copies * FEATURES / grid.cells)) / 2)


def stack_recipe(
    image_shape: tuple[int, int, int], n_images: int, loss: str = "squared", classes: bool = True
) -> tuple[dict[str, Any], str, str, str]:
    """What two stages of `StackConfig.of` need for images of this kind: options, channels, downsample and heads.

    Parameters are those of `recipe`.
    """
    options = recipe(image_shape, n_images, loss, classes)
    drawn = "dictionary" in options
    first = _large_patches(image_shape) if drawn else _small_patches(image_shape)
    downsample = 2 if min(side.maps for side in first.sides) >= 8 else 1
    rows, columns = (Side.of(side.maps // downsample, 3, padding=1, cells=side.cells) for side in first.sides)
    channels = CHANNELS if drawn else FEW_CHANNELS
    second = Grid(channels, (rows, columns))
    options |= {name: f"{value},{second.options[name]}" for name, value in first.options.items()}
    if not drawn:
        return options, str(channels), str(downsample), "last"
    flips = options["flips"] and first.sides[1].maps % downsample == 0
    filters = [_filters(grid, n_images, flips, JOINT * WORK) for grid in (first, second)]
    contrast = "yes,no" if options.get("contrast") else "no"  # normalised patches make features of like sizes
    options |= SLIDE | {"flips": flips, "contrast": contrast, "dictionary": "{},{}".format(*filters)}
    return options, str(channels), str(downsample), "joint"
