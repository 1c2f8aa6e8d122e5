"""A trained network as a file: ONNX, a program of torch, an estimator of scikit-learn; checked by running it."""

from __future__ import annotations

import copy
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convcvx.errors import InputError, RunError, check_choice
from convcvx.network.architecture import ContrastConv2d
from convcvx.pooling import Pooling
from convcvx.storage.reading import user_path

TOLERANCE = 1e-4
"""Largest difference between the scores of file and network, over the largest score: float32 sums in another order."""
CHECKED_IMAGES = 3
"""Random images whose scores by the file and by the network are compared, beside a grey and a black one: not 1 in all,
a number that torch takes for a constant of the file."""


@dataclass(frozen=True)
class Format:
    """How to write a network, given with images, to a path; and the scores of the images by the file alone.

    Attributes
    ----------
    packages : tuple of str
        What writing and running need besides torch.
    """

    packages: tuple[str, ...]
    write: Callable[[nn.Module, Tensor, str], None]
    run: Callable[[str, Tensor], Tensor]


def _batches() -> tuple[dict]:
    """That the number of images is free."""
    return ({0: torch.export.Dim("batch", min=1)},)


class CellMaxima(nn.Module):
    """`nn.AdaptiveMaxPool2d` in operations that ONNX has, cell by cell: it has none for cells of unequal size."""

    def __init__(self, size: Any) -> None:
        super().__init__()
        self.pooling = Pooling.of((size, size) if isinstance(size, int) else tuple(size))

    def forward(self, maps: Tensor) -> Tensor:
        """(n, m, H, W) to (n, m, rows, columns)."""
        ranges = self.pooling.ranges(maps.shape[2], maps.shape[3])
        assert ranges is not None
        cells = [[maps[:, :, a:b, c:d].amax(dim=(2, 3)) for c, d in ranges[1]] for a, b in ranges[0]]
        return torch.stack([torch.stack(row, dim=-1) for row in cells], dim=-2)


LEAST_EPSILON = 1e-6
"""Of a contrast in ONNX, well above what its optimiser takes for zero; larger than needed, it would let the squares of
bright images overflow."""


class UnitContrast(nn.Module):
    """A `ContrastConv2d` of images in a unit in which its epsilon is at least `LEAST_EPSILON`.

    The optimiser of ONNX takes an epsilon of 1e-8 or less for zero, and flat patches would become NaN. The unit is a
    power of two: nothing is rounded.
    """

    def __init__(self, convolution: ContrastConv2d) -> None:
        super().__init__()
        exponent = max(0, math.ceil(0.5 * math.log2(LEAST_EPSILON / convolution.contrast)))
        self.unit = math.ldexp(1.0, exponent)
        self.convolution = copy.deepcopy(convolution)
        self.convolution.contrast = math.ldexp(convolution.contrast, 2 * exponent)

    def forward(self, images: Tensor) -> Tensor:
        """(n, C, H, W) to (n, m, H', W')."""
        return self.convolution(self.unit * images)


def _for_onnx(network: nn.Module) -> nn.Module:
    """A copy of `network` with `CellMaxima` and `UnitContrast` for what ONNX does not take as it is."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.AdaptiveMaxPool2d):
                setattr(parent, name, CellMaxima(child.output_size))
            elif isinstance(child, ContrastConv2d):
                setattr(parent, name, UnitContrast(child))
    return network


def _checked_images(image_shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Images (n, *image_shape), flat ones among them, whose patches have no contrast to divide by."""
    images = torch.rand(CHECKED_IMAGES, *image_shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    grey = images.new_full((1, *image_shape), 0.5)
    return torch.cat([images, grey, torch.zeros_like(grey)])


def _write_onnx(network: nn.Module, images: Tensor, path: str) -> None:
    torch.onnx.export(
        _for_onnx(network),
        (images,),
        path,
        input_names=["images"],
        output_names=["scores"],
        dynamic_shapes=_batches(),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _run_onnx(path: str, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])


def _write_torch(network: nn.Module, images: Tensor, path: str) -> None:
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=_batches()), path)


def _run_torch(path: str, images: Tensor) -> Tensor:
    return torch.export.load(path).module()(images)


def _write_sklearn(network: nn.Module, images: Tensor, path: str) -> None:
    import joblib  # as scikit-learn itself keeps estimators

    from convcvx.network.frozen import frozen  # scikit-learn takes a second, which other formats need not wait for

    joblib.dump(frozen(network), path)


def _run_sklearn(path: str, images: Tensor) -> Tensor:
    import joblib

    return torch.from_numpy(joblib.load(path).scores(images.numpy()))


FORMATS = {
    "onnx": Format(("onnx", "onnxscript", "onnxruntime"), _write_onnx, _run_onnx),
    "torch": Format((), _write_torch, _run_torch),
    "sklearn": Format((), _write_sklearn, _run_sklearn),
}
"""What `--to` takes."""


def export(network: nn.Module, image_shape: tuple[int, int, int], path: str | Path, to: str) -> float:
    """Write `network` to one file for any number of images (n, *image_shape); it appears once it gives the same scores.

    Parameters
    ----------
    to : str
        "onnx" (an input "images", an output "scores"), "torch" (read by `torch.export.load`) or "sklearn" (read by
        `joblib.load` where convcvx is installed; see `convcvx.network.frozen`). The first two need convcvx no more.

    Returns
    -------
    float
        The largest difference between the scores of file and network, over the largest score.

    Raises
    ------
    InputError
        If packages are missing: `pip install 'convcvx[onnx]'` brings those of ONNX.
    RunError
        If the file cannot be written, or gives other scores.
    """
    form = FORMATS[check_choice("to", to, FORMATS)]
    if missing := [package for package in form.packages if find_spec(package) is None]:
        raise InputError(f"{to} needs {', '.join(missing)}: pip install 'convcvx[{to}]'")
    path = user_path(path)
    plain = copy.deepcopy(network).cpu().eval()
    images = _checked_images(image_shape, next(plain.parameters()).dtype)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{to}-") as scratch:
            written = str(Path(scratch) / path.name)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch's, about calls of its own
                form.write(plain, images, written)
                scores, found = plain(images), form.run(written, images)
            difference = float((found - scores).abs().max() / scores.abs().max().clamp_min(1e-30))
            if not difference <= TOLERANCE:  # nor if it is NaN
                raise RunError(f"{path} would give scores that differ by {difference:.1e}: nothing was written")
            os.replace(written, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    return difference
