"""Networks that somebody else built: a module read layer by layer, or a bare state dict."""

from __future__ import annotations

import math

from torch import Tensor

from convcvx.errors import InputError, RunError
from convcvx.network.architecture import Architecture
from convcvx.network.two_layer import TwoLayerCNN

FOLD = "fold the BatchNorm into the convolution, and save that"
"""What to do about the statistics of a BatchNorm."""


def foreign_network(
    state: dict[str, Tensor],
    image_shape: tuple[int, int, int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    pool: str | None = None,
) -> TwoLayerCNN:
    """A `TwoLayerCNN` from somebody else's state dict of one convolution and one linear layer, by any names.

    `pool` None stands for the square grid that the size of the linear layer implies. What no state dict shows is in
    `assumed`.

    Raises
    ------
    RunError
        For a state dict of anything else: a tensor left out would be another network.
    InputError
        When weights and `pool` do not fit.
    """
    kernels = [name for name, tensor in state.items() if tensor.ndim == 4]
    linears = [name for name, tensor in state.items() if tensor.ndim == 2]
    named: dict[str, str] = {}
    if len(kernels) == len(linears) == 1:
        layers = {"0": kernels[0], "4": linears[0]}
        named = {f"{k}.weight": name for k, name in layers.items()}
        named |= {f"{k}.bias": name.removesuffix("weight") + "bias" for k, name in layers.items()}
        named = {own: name for own, name in named.items() if name in state}
    unknown = [f"{name} {tuple(tensor.shape)}" for name, tensor in state.items() if name not in named.values()]
    if unknown or not named:
        raise RunError(
            "the file must hold the state dict of Conv2d → ReLU → average pooling → Linear and nothing else; it has "
            + ", ".join(unknown)
            + (f": {FOLD}" if any("running_" in name for name in state) else "")
        )
    state = {own: state[name] for own, name in named.items()}
    weight, linear = state["0.weight"], state["4.weight"]
    cells = linear.shape[1] // len(weight)
    side = math.isqrt(cells)
    if pool is None and (side * side != cells or cells * len(weight) != linear.shape[1]):
        raise InputError(f"{linear.shape[1]} features of {len(weight)} filters are no square grid; pass pool")
    architecture = Architecture(
        image_shape,
        len(weight),
        len(linear),
        (weight.shape[2], weight.shape[3]),
        stride,
        padding,
        pool or str(side),
        hidden_bias="0.bias" in state,
        intercept="4.bias" in state,
    )
    network = TwoLayerCNN(architecture)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"the weights do not fit pool {architecture.pool}: {' '.join(str(error).split())}") from None
    return network.eval()


def assumed(network: TwoLayerCNN) -> str:
    """What `foreign_network` had to take for granted, in words."""
    a = network.architecture
    pair = "{}x{}".format
    return f"ReLU, average pooling {a.pool}, stride {pair(*a.stride)}, padding {pair(*a.padding)}, images in [0, 1]"
