"""What a two-layer network is made of: the record stored with its weights, and the one layer that torch lacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from convcvx.patches import PatchSpec
from convcvx.storage.reading import form_fault


class ContrastConv2d(nn.Conv2d):
    """A convolution of contrast-normalised patches: each patch x acts as (x - mean) / sqrt(variance + contrast)."""

    def __init__(self, *args: Any, contrast: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.contrast = contrast

    def forward(self, images: Tensor) -> Tensor:
        """(n, C, H, W) to (n, m, H', W').

        Patches are taken one by one, as `PatchSpec.columns` takes them: a difference of two convolutions would lose the
        contrast of a bright, flat patch to rounding.
        """
        windows = spec_of(self).windows(images)
        patches = (windows - windows[:1, :1, :1]).flatten(0, 2)
        patches = patches - patches.mean(dim=0)
        patches = patches * (patches.square().mean(dim=0) + self.contrast).rsqrt()
        response = (self.weight.flatten(1) @ patches.flatten(1)).unflatten(1, patches.shape[1:]).transpose(0, 1)
        return response if self.bias is None else response + self.bias[:, None, None]


def spec_of(convolution: nn.Conv2d) -> PatchSpec:
    """Which patches a convolution sees, its padding in numbers."""
    size, stride, padding, dilation = (
        (int(pair[0]), int(pair[1]))
        for pair in (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
    )
    contrast = convolution.contrast if isinstance(convolution, ContrastConv2d) else None
    return PatchSpec(size, stride, padding, convolution.bias is not None, contrast, dilation=dilation)


@dataclass(frozen=True)
class Architecture:
    """What a `TwoLayerCNN` is made of; stored with its weights.

    Attributes
    ----------
    image_shape : (int, int, int)
        Channels, height, width.
    n_filters, n_outputs : int
    kernel_size, stride, padding, dilation : (int, int)
    pool : str
        As `Pooling.of` reads it.
    hidden_bias, intercept : bool
        Whether the convolution and the linear layer have a bias.
    contrast : float or None
        Local contrast normalisation.
    activation : str
        As `Activation.of` reads it; files of earlier versions say nothing of it, and mean relu.
    """

    image_shape: tuple[int, int, int]
    n_filters: int
    n_outputs: int
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    pool: str = "global"
    hidden_bias: bool = False
    intercept: bool = True
    contrast: float | None = None
    dilation: tuple[int, int] = (1, 1)
    activation: str = "relu"

    @property
    def spec(self) -> PatchSpec:
        """Which patches the convolution sees."""
        place = self.kernel_size, self.stride, self.padding
        return PatchSpec(*place, self.hidden_bias, self.contrast, dilation=self.dilation)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """Read what JSON made of `asdict`; raise `TypeError` for what it did not make."""
        if fault := form_fault(values, ARCHITECTURE):
            raise TypeError(fault)
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


ARCHITECTURE = {
    "image_shape": [int, int, int],
    "n_filters": int,
    "n_outputs": int,
    **{f"{name}?": [int, int] for name in ("kernel_size", "stride", "padding", "dilation")},
    "pool?": str,
    **{f"{name}?": bool for name in ("hidden_bias", "intercept")},
    "contrast?": (float, None),
    "activation?": str,
}
"""Form of an `Architecture` in JSON."""
