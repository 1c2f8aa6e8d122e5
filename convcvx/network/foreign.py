"""Networks that somebody else built, of which there is a state dict alone."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from convcvx.errors import InputError, RunError, one_line
from convcvx.network.architecture import Architecture
from convcvx.network.layers import folded
from convcvx.network.two_layer import TwoLayerCNN
from convcvx.pooling import Pooling
from convcvx.storage.reading import check_file

PICKLED = (".pt", ".pth", ".bin")
"""Files that `torch.save` writes, by custom."""
NESTED = ("state_dict", "model_state_dict", "model")
"""Names under which training scripts keep the state dict in a checkpoint."""
STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
"""Names of the tensors of a BatchNorm."""


def check_weights_file(path: Path) -> None:
    """Raise `RunError` for what is no file, before anything is read for its sake."""
    try:
        check_file(path)
    except OSError as error:
        raise RunError(
            f"cannot read weights from {path}: {one_line(error)}; name a .safetensors or .pt file, or a run folder"
        ) from None


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The state dict that `torch.save` wrote: tensors and containers of them are read, nothing is executed.

    Raises
    ------
    RunError
        For a file that holds anything else, or none that torch reads.
    """
    check_weights_file(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        # Of a whole network torch says how to have it executed, at length.
        why = "it holds something else than tensors" if isinstance(error, pickle.UnpicklingError) else one_line(error)
        raise RunError(f"cannot read weights from {path}: save network.state_dict(), not the network ({why})") from None
    for name in NESTED:
        if isinstance(held, dict) and isinstance(held.get(name), dict):
            held = held[name]
    if not isinstance(held, dict) or not all(isinstance(part, Tensor) for part in held.values()):
        raise RunError(f"{path} must hold a state dict, names and tensors; save network.state_dict()")
    return {str(name).removeprefix("module."): tensor for name, tensor in held.items()}  # DataParallel's prefix


def foreign_network(
    state: dict[str, Tensor],
    image_shape: tuple[int, int, int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    pool: str | None = None,
    activation: str = "relu",
) -> TwoLayerCNN:
    """A `TwoLayerCNN` from somebody else's state dict of a convolution and a linear layer, by any names.

    Or of two linear layers: then a sample is one patch, the whole image. A BatchNorm over the filters is folded into
    the first layer. `pool` None stands for the square grid that the size of the linear layer implies. What no state
    dict shows is in `assumed`.

    Raises
    ------
    RunError
        For a state dict of anything else: a tensor left out would be another network.
    InputError
        When weights and `pool` do not fit.
    """
    counted = "num_batches_tracked"  # by a BatchNorm, and used in training only
    unreal = [name for name, part in state.items() if not (part.is_floating_point() or name.endswith(counted))]
    if unreal:
        said = ", ".join(f"{name} in {state[name].dtype}" for name in unreal)
        raise RunError(f"weights must be real floating-point numbers; the file has {said}: save network.float()'s")
    if empty := [f"{name} {tuple(part.shape)}" for name, part in state.items() if not part.numel()]:
        raise RunError(f"weights must not be empty; the file has {', '.join(empty)}: save a network with filters left")
    state, norms = _without_norms(state)
    kernels = [name for name, tensor in state.items() if tensor.ndim == 4]
    linears = [name for name, tensor in state.items() if tensor.ndim == 2]
    if not kernels and len(linears) == 2 and state[linears[0]].shape[1] == math.prod(image_shape):
        kernels = [linears.pop(0)]
        state = state | {kernels[0]: state[kernels[0]].unflatten(1, image_shape)}
    named: dict[str, str] = {}
    if len(kernels) == len(linears) == 1:
        layers = {"0": kernels[0], "4": linears[0]}
        named = {f"{k}.weight": name for k, name in layers.items()}
        named |= {f"{k}.bias": name.removesuffix("weight") + "bias" for k, name in layers.items()}
        named = {own: name for own, name in named.items() if name in state}
    unknown = [f"{name} {tuple(tensor.shape)}" for name, tensor in state.items() if name not in named.values()]
    if unknown or not named:
        raise RunError(
            "the file must hold the state dict of Conv2d → ReLU → average or maximum pooling → Linear and "
            "nothing else; it has " + (", ".join(unknown) or "none of them")
        )
    state = {own: state[name] for own, name in named.items()}
    for norm in norms:
        state |= _folded(state, norm)
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
        dilation=dilation,
        activation=activation,
    )
    network = TwoLayerCNN(architecture)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"the weights do not fit pool {architecture.pool}: {' '.join(str(error).split())}") from None
    return network.eval()


def assumed(network: TwoLayerCNN, state: dict[str, Tensor]) -> str:
    """What `foreign_network` had to take for granted of a state dict, in words."""
    a = network.architecture
    pair = "{}x{}".format
    pooled = f"pooling {a.pool}" if Pooling.of(a.pool).maximum else f"average pooling {a.pool}"
    norm = "BatchNorm with epsilon 1e-5 before it, " if any("running_" in name for name in state) else ""
    lies = f"stride {pair(*a.stride)}, padding {pair(*a.padding)}, dilation {pair(*a.dilation)}"
    hidden = "ReLU" if a.activation == "relu" else f"activation {a.activation}"
    return f"{hidden}, {norm}{pooled}, {lies}, images in [0, 1]"


def _without_norms(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[nn.BatchNorm2d]]:
    """What is left of a state dict without the BatchNorms in it, and these, with the usual epsilon."""
    rest, norms = dict(state), []
    for name in state:
        if (found := re.fullmatch(r"(.*?)running_mean", name)) is None:
            continue
        tensors = {key: rest.pop(found[1] + key) for key in STATISTICS if found[1] + key in rest}
        norm = nn.BatchNorm2d(len(tensors["running_mean"]), affine="weight" in tensors).eval()
        try:
            norm.load_state_dict({"num_batches_tracked": torch.tensor(0)} | tensors)
        except RuntimeError as error:
            raise RunError(f"the BatchNorm {found[1]} of the file is not whole: {one_line(error)}") from None
        norms.append(norm)
    return rest, norms


def _folded(state: dict[str, Tensor], norm: nn.BatchNorm2d) -> dict[str, Tensor]:
    """Weight and bias of the first layer with a BatchNorm behind it."""
    weight = state["0.weight"]
    convolution = nn.Conv2d(weight.shape[1], len(weight), (weight.shape[2], weight.shape[3]), bias="0.bias" in state)
    convolution.load_state_dict({name[2:]: tensor for name, tensor in state.items() if name.startswith("0.")})
    together = folded(convolution, norm)
    assert together.bias is not None
    return {"0.weight": together.weight.to(weight.dtype), "0.bias": together.bias.to(weight.dtype)}
