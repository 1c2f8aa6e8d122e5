"""A network read as convolution, activation, pooling and linear layer, whatever else it is written with.

What does nothing once a network is trained is left out (Dropout, Identity), what is linear folded into its neighbours
(BatchNorm), a linear layer on whole images read as a convolution with one position. Maximum pooling may stand before an
activation that does not change the order of numbers. Outputs stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from convcvx.activations import LINEAR, RELU, Activation
from convcvx.errors import InputError
from convcvx.network.architecture import ContrastConv2d, spec_of
from convcvx.network.graph import layers_of, name_of, steps_of
from convcvx.patches import PatchSpec
from convcvx.pooling import Pooling

WANTED = "network must be Conv2d → ReLU → average or maximum pooling → Linear"
"""How messages about other networks begin."""
SILENT = nn.Flatten, nn.Identity
"""Steps that messages do not name."""
MAXIMA = (
    ("MaxPool2d", "AdaptiveMaxPool2d"),
    "maximum pooling is to be the only one, without padding, dilation or ceil_mode, beside the ReLU",
)
REMEDIES: list[tuple[tuple[str, ...], str]] = [
    (
        ("PReLU", "ELU", "GELU", "SiLU", "Tanh", "Sigmoid", "prelu", "elu", "gelu", "silu", "tanh", "sigmoid"),
        "of activations ReLU, LeakyReLU, the absolute value and the square have a bound, one of them at a time",
    ),
    (("LayerNorm", "GroupNorm", "InstanceNorm2d"), "what divides by the statistics of an image cannot be folded"),
]
"""Steps that there is no way around, and what to say of them."""
LOSS_OF_LAST_STEP = {"Softmax": "cross-entropy", "softmax": "cross-entropy", "Sigmoid": "bce", "sigmoid": "bce"}
"""Last steps that turn scores into probabilities, and the loss that takes the scores."""


@dataclass(frozen=True)
class Layers:
    """The parts of a two-layer network."""

    convolution: nn.Conv2d
    activation: Activation
    pooling: Pooling
    classifier: nn.Linear
    log_softmax: bool = False
    """Whether the outputs are made logarithms of probabilities, which the cross-entropy does not see."""

    @property
    def spec(self) -> PatchSpec:
        return spec_of(self.convolution)

    def network(self) -> nn.Sequential:
        """These layers, one after the other."""
        hidden = self.activation.module(), self.pooling.module()
        return nn.Sequential(self.convolution, *hidden, nn.Flatten(), self.classifier)

    def __str__(self) -> str:
        return f"Conv2d → {name_of(self.activation.module())} → pooling → Linear"


def read_network(network: nn.Module, image_shape: Sequence[int]) -> Layers:
    """The layers of a network that takes images of this shape (channels, height, width).

    They are the network's own modules where nothing had to be folded, and float64 ones where something was. Whether
    they compute what the network does is for the caller to see.

    Raises
    ------
    InputError
        For any other form of network, naming its steps, what stands in the way, and what to do.
    """
    followed = steps_of(network)
    steps = layers_of(network) if followed is None else followed
    if any(step.training for step in steps if isinstance(step, _BatchNorm | _DropoutNd)):
        raise InputError(f"network must be in evaluation mode; got {_names(steps)} in training: call network.eval()")
    rest = [step for step in steps if not isinstance(step, (*SILENT, _DropoutNd))]
    if log_softmax := bool(rest) and isinstance(rest[-1], nn.LogSoftmax):
        rest = rest[:-1]
    if not rest or not isinstance(rest[0], nn.Conv2d | nn.Linear):
        raise _refusal(steps)
    convolution = _numeric(rest.pop(0), image_shape)
    if rest and isinstance(rest[0], _BatchNorm):
        convolution = folded(convolution, rest.pop(0))
    pooling = Pooling("none")
    pooled = False
    if rest and (first := _read_pooling(rest[0])) is not None and first.maximum:
        pooling, pooled, rest = first, True, rest[1:]
    activation, rest = _activation(rest)
    if pooled and activation.slope < 0:  # the largest is not the one that is largest behind it
        raise _refusal(steps)
    scales: list[_BatchNorm] = []
    while rest and not isinstance(rest[0], nn.Linear):
        step = rest.pop(0)
        if isinstance(step, _BatchNorm):
            scales.append(step)
        elif (found := _read_pooling(step)) is not None and not pooled:
            pooling, pooled = found, True
            if found.maximum and any(scale.weight is not None and bool((scale.weight < 0).any()) for scale in scales):
                raise InputError("a BatchNorm with negative weights before maximum pooling makes a minimum of it")
        else:
            raise _refusal(steps)
    if len(rest) != 1 or not isinstance(rest[0], nn.Linear):
        raise _refusal(steps)
    if activation == LINEAR and followed is None:  # there may be one in `forward`, and outputs need not tell
        raise InputError(
            f"{WANTED}; got {_names(steps)}, and a forward that cannot be followed: make the activation a layer, such "
            "as nn.ReLU, or let forward be one chain of steps"
        )
    classifier: nn.Linear = rest[0]
    for scale in reversed(scales):
        classifier = _scaled_inputs(classifier, *_scale_and_shift(scale, None), convolution.out_channels)
    return Layers(convolution, activation, pooling, classifier, log_softmax)


def _activation(steps: list[nn.Module]) -> tuple[Activation, list[nn.Module]]:
    """The activation that `steps` begin with, several ReLUs being one, and the other steps; that of none is linear."""
    found = Activation.of_module(steps[0]) if steps else None
    if found is None:
        return LINEAR, steps
    if found == RELU:
        return RELU, list(dropwhile(lambda step: Activation.of_module(step) == RELU, steps))
    return found, steps[1:]


def _names(steps: Sequence[nn.Module]) -> str:
    return " → ".join(name_of(step) for step in steps if not isinstance(step, SILENT))


def _refusal(steps: Sequence[nn.Module]) -> InputError:
    *names, last = [name_of(step) for step in steps] or [""]
    if last not in LOSS_OF_LAST_STEP:
        names.append(last)
    layers = sum(isinstance(step, nn.Conv2d | nn.Linear) for step in steps)
    known = REMEDIES if layers > 2 else [MAXIMA, *REMEDIES]
    remedies = [text for found, text in known if any(name in found for name in names)]
    if (loss := LOSS_OF_LAST_STEP.get(last)) is not None:
        remedies.append(f"certify the network without its last step, {last}, with loss={loss!r}")
    if layers == 1:
        remedies.append(
            "one layer alone is a convex problem already, such as LogisticRegression of scikit-learn solves"
        )
    if layers > 2:
        remedies.append("of more than two layers the last two can be certified, on the features that the others give")
    return InputError("; ".join([f"{WANTED}; got {_names(steps)}", *remedies]))


def _numeric(first: nn.Module, image_shape: Sequence[int]) -> nn.Conv2d:
    """A convolution with numbers for its padding; of a linear layer the one that has its kernels at one position."""
    if isinstance(first, nn.Linear):
        channels, height, width = image_shape
        if first.in_features != channels * height * width:
            raise InputError(
                f"the first linear layer takes {first.in_features} numbers, the images have {channels}x{height}x{width}"
            )
        kernels = first.weight.detach().unflatten(1, (channels, height, width))
        return _convolution(kernels, first.bias)
    assert isinstance(first, nn.Conv2d)
    if first.groups != 1 or first.padding_mode != "zeros":
        raise InputError(
            f"the convolution must have groups=1 and padding by zeros; got groups={first.groups}, "
            f"padding_mode={first.padding_mode!r}: its patches are others"
        )
    if not isinstance(first.padding, str):
        return first
    reach = [step * (size - 1) for step, size in zip(first.dilation, first.kernel_size, strict=True)]
    padding = [0, 0] if first.padding == "valid" else reach
    if any(total % 2 for total in padding):
        raise InputError(f"padding='same' of a kernel {first.kernel_size} pads one side more: take odd sizes")
    options = {"stride": first.stride, "dilation": first.dilation, "padding": (padding[0] // 2, padding[1] // 2)}
    return _convolution(first.weight.detach(), first.bias, **options)


def _convolution(weight: Tensor, bias: Tensor | None, **options: Any) -> nn.Conv2d:
    m, channels, *size = weight.shape
    made = nn.Conv2d(channels, m, (size[0], size[1]), bias=bias is not None, **options)
    return _with(made, weight, bias)


def _with(module: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """`module` with these parameters."""
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return module


def _scale_and_shift(norm: nn.Module, n_channels: int | None) -> tuple[Tensor, Tensor]:
    """a and b, float64, of the a x + b that a BatchNorm is in evaluation."""
    assert isinstance(norm, _BatchNorm)
    if norm.running_mean is None or norm.running_var is None:
        raise InputError("a BatchNorm without running statistics depends on the batch: track them, or leave it out")
    if n_channels not in (None, norm.num_features):
        raise InputError(f"the BatchNorm has {norm.num_features} channels, the layer before it {n_channels}")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.weight is not None:
        scale, shift = scale * norm.weight.detach().double(), shift * norm.weight.detach().double()
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def folded(convolution: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """The convolution, in float64, that is this one with a BatchNorm in evaluation behind it."""
    scale, shift = _scale_and_shift(norm, convolution.out_channels)
    if isinstance(convolution, ContrastConv2d):
        raise InputError("a BatchNorm after contrast normalisation is not folded: leave it out")
    weight = convolution.weight.detach().double() * scale[:, None, None, None]
    bias = shift if convolution.bias is None else convolution.bias.detach().double() * scale + shift
    options = {name: getattr(convolution, name) for name in ("stride", "padding", "dilation")}
    return _convolution(weight, bias, **options)


def _scaled_inputs(classifier: nn.Linear, scale: Tensor, shift: Tensor, n_channels: int) -> nn.Linear:
    """The linear layer behind x ↦ scale x + shift, of channels or of single features; averages of either are alike, and
    maxima where the scale is not negative."""
    if classifier.bias is None:
        raise InputError("a BatchNorm behind the activation shifts the output: give the linear layer a bias")
    if len(scale) not in (n_channels, classifier.in_features) or classifier.in_features % len(scale):
        raise InputError(f"the BatchNorm has {len(scale)} channels, the layer before it {n_channels}")
    each = classifier.in_features // len(scale)
    scale, shift = scale.repeat_interleave(each), shift.repeat_interleave(each)
    weight = classifier.weight.detach().double()
    made = nn.Linear(classifier.in_features, classifier.out_features)
    return _with(made, weight * scale, classifier.bias.detach().double() + weight @ shift)


def _read_pooling(pool: nn.Module) -> Pooling | None:
    def pair(value: Any) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else tuple(value)

    if isinstance(pool, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d) and None not in pair(pool.output_size):
        maximum = isinstance(pool, nn.AdaptiveMaxPool2d)
        return Pooling("grid", pair(pool.output_size), maximum=maximum)
    if isinstance(pool, nn.MaxPool2d):
        plain = pair(pool.padding) == (0, 0) and pair(pool.dilation) == (1, 1)
        if not plain or pool.ceil_mode or pool.return_indices:
            return None
        return Pooling("window", pair(pool.kernel_size), pair(pool.stride), maximum=True)
    if (
        isinstance(pool, nn.AvgPool2d)
        and pair(pool.padding) == (0, 0)
        and not pool.ceil_mode
        and pool.divisor_override is None
    ):
        return Pooling("window", pair(pool.kernel_size), pair(pool.stride))
    return None
