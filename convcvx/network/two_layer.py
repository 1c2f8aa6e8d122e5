"""The trained network as an ordinary torch module, built and loaded the way torchvision models are.

`TwoLayerCNN` is an `nn.Sequential` of convolution, activation, pooling, Flatten and Linear: without contrast
normalisation its state dict fits the plain `nn.Sequential` and back. Files are safetensors; nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import save
from torch import Tensor, fx, nn

from convcvx.activations import RELU, Activation, balanced_neurons
from convcvx.errors import InputError, RunError, one_line, shown
from convcvx.network.architecture import Architecture, ContrastConv2d
from convcvx.network.export import export
from convcvx.network.preprocess import ImageTransform
from convcvx.network.pretrained import find_pretrained
from convcvx.patches import PatchEmbedding
from convcvx.pooling import Pooling
from convcvx.solution import Solution
from convcvx.storage.places import MODEL
from convcvx.storage.reading import check_form, open_tensors, user_path


class TwoLayerCNN(nn.Sequential):
    """Conv2d, an activation, average or maximum pooling, Flatten, Linear: f(x) = Σ_j Σ_p φ_p(x; u_j) V_j[p,:] + b.

    Takes float images (n, C, H, W) with pixels in [0, 1], as `convcvx.data.datasets` gives them; returns (n, c).
    """

    def __init__(self, architecture: Architecture) -> None:
        a = architecture
        pooling = Pooling.of(a.pool)
        cells = pooling.output_size(*a.spec.output_size(*a.image_shape[1:]))
        common: dict[str, Any] = {"stride": a.stride, "padding": a.padding, "dilation": a.dilation}
        common["bias"] = a.hidden_bias
        convolution = (
            nn.Conv2d(a.image_shape[0], a.n_filters, a.kernel_size, **common)
            if a.contrast is None
            else ContrastConv2d(a.image_shape[0], a.n_filters, a.kernel_size, contrast=a.contrast, **common)
        )
        linear = nn.Linear(a.n_filters * cells[0] * cells[1], a.n_outputs, bias=a.intercept)
        super().__init__(convolution, Activation.of(a.activation).module(), pooling.module(), nn.Flatten(), linear)
        self.architecture = architecture
        self.meta: dict[str, Any] = {}

    def forward(self, images: Tensor) -> Tensor:
        """(n, C, H, W) to (n, c); raise `InputError` for images without a batch, of other channels or another dtype."""
        if not torch.jit.is_scripting():  # which knows no f-strings of shapes
            _check_images(images, self.architecture.image_shape[0], self[4].weight.dtype)  # type: ignore[arg-type]
        for layer in self:
            images = layer(images)
        return images

    @classmethod
    def of_shape(
        cls,
        embedding: PatchEmbedding,
        pooling: Pooling,
        image_shape: tuple[int, int, int],
        n_filters: int,
        n_outputs: int,
        *,
        intercept: bool = True,
        activation: Activation = RELU,
    ) -> TwoLayerCNN:
        """The untrained network whose kernels `embedding` and whose maps `activation` and `pooling` describe.

        Raises
        ------
        InputError
            For a pooling matrix, which no torch layer is.
        """
        spec = embedding.spec
        if pooling.weights is not None:
            raise InputError(
                "pool is a matrix, which torch has no layer for: fit with a grid such as 4 or 4x2, with "
                "window:SIZE,STRIDE or with none to get a network"
            )
        return cls(
            Architecture(
                image_shape,
                n_filters,
                n_outputs,
                spec.kernel_size,
                spec.stride,
                spec.padding,
                str(pooling),
                hidden_bias=spec.constant,
                intercept=intercept,
                contrast=spec.contrast,
                dilation=spec.dilation,
                activation=str(activation),
            )
        )

    @classmethod
    def from_solution(
        cls,
        solution: Solution,
        embedding: PatchEmbedding,
        pooling: Pooling,
        image_shape: tuple[int, int, int],
        *,
        intercept: bool = True,
        activation: Activation = RELU,
    ) -> TwoLayerCNN:
        """The network of a solution, its neurons balanced, as `balanced_neurons` has it.

        Of squares ‖u_j‖ is the square of the kernel's norm.

        A solution without filters becomes a network with one zero filter.
        """
        filters, weights = solution.filters, solution.weights
        if solution.n_filters == 0:
            filters, weights = (
                torch.zeros(1, embedding.dim).double(),
                weights.new_zeros(1, *weights.shape[1:]),
            )
        filters, weights = balanced_neurons(filters, weights)
        how: dict[str, Any] = {"intercept": intercept, "activation": activation}
        network = cls.of_shape(embedding, pooling, image_shape, len(filters), weights.shape[2], **how)
        kernels = activation.kernels(filters)
        state = network_state(embedding, kernels, weights, solution.intercept if intercept else None)
        network.load_state_dict(state)
        return network.eval()

    def same_problem(self, other: TwoLayerCNN) -> bool:
        """Whether both are networks of the same training problem: alike but for their width."""

        def problem(a: Architecture) -> Architecture:
            return replace(a, n_filters=0, pool=str(Pooling.of(a.pool)), activation=str(Activation.of(a.activation)))

        return problem(self.architecture) == problem(other.architecture)

    def to_bytes(self) -> bytes:
        """A self-describing safetensors file: weights, architecture and `meta`."""
        metadata = {"convcvx": json.dumps({"architecture": asdict(self.architecture), "meta": self.meta})}
        return save({name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}, metadata)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *, revision: str | None = None) -> TwoLayerCNN:
        """The network of a folder that `save_pretrained` wrote, or of a repository OWNER/NAME of Hugging Face.

        Raises
        ------
        InputError, RunError
            As `convcvx.network.pretrained.find_pretrained`, and for weights of another kind.
        """
        return two_layer_cnn(find_pretrained(name, revision))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images it takes."""
        return self.architecture.image_shape

    def export_onnx(self, path: str | Path) -> None:
        """Write one ONNX file for any number of images (needs `pip install 'convcvx[onnx]'`); see `export`."""
        export(self, self.image_shape, path, "onnx")


def _check_images(images: Tensor, channels: int, dtype: torch.dtype) -> None:
    if isinstance(images, fx.Proxy):  # whose forward is traced, as `certify` does
        return
    if not isinstance(images, Tensor):
        raise InputError(f"images must be a torch tensor; got {type(images).__name__}: pass torch.as_tensor(images)")
    if images.ndim != 4:
        remedy = "one image is images[None]" if images.ndim == 3 else "reshape them"
        raise InputError(f"images must be (n, channels, height, width); got {tuple(images.shape)}: {remedy}")
    if images.shape[1] != channels:
        raise InputError(f"images must have {channels} channels, as those of the training; got {tuple(images.shape)}")
    if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
        scale = " / 255" if images.dtype == torch.uint8 else ""
        raise InputError(
            f"images must have the network's dtype, {dtype}; got {images.dtype}: pass images.to({dtype}){scale}"
        )


def network_state(
    embedding: PatchEmbedding, kernels: Tensor, weights: Tensor, intercept: Tensor | None
) -> dict[str, Tensor]:
    """The state dict of a `TwoLayerCNN` with kernels (m, r) in the space, weights (m, P, c) and intercept (c,)."""
    weight, bias = embedding.kernels(kernels)
    state = {"0.weight": weight, "4.weight": rearrange(weights, "m p c -> c (m p)")}
    state |= {} if bias is None else {"0.bias": bias}
    return state | ({} if intercept is None else {"4.bias": intercept})


@dataclass(frozen=True)
class Weights:
    """A weights file with the transforms and metadata that belong to it, as torchvision has them."""

    path: Path
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture:
        return two_layer_cnn(self.path).architecture

    def transforms(self) -> ImageTransform:
        """What makes any image, of Pillow's or a tensor, one that the network takes."""
        return ImageTransform(self.architecture.image_shape)

    def get_state_dict(self) -> dict[str, Tensor]:
        return read_weights(self.path)[0]


class TwoLayerCNN_Weights(Enum):
    """Weights that ship with the package, each with its `meta` and `transforms`: those of `checkpoints/digits`.

    Examples
    --------
    >>> from PIL import Image
    >>> weights = TwoLayerCNN_Weights.DIGITS
    >>> network, transforms = two_layer_cnn(weights), weights.transforms()
    >>> network(transforms(Image.new("L", (40, 40)))[None]).shape, weights.meta["categories"][:3]
    (torch.Size([1, 10]), ['0', '1', '2'])
    """

    DIGITS = Weights(Path(__file__).parents[1] / "weights" / "digits.safetensors", {"data": "digits"})
    DEFAULT = DIGITS

    @property
    def path(self) -> Path:
        return self.value.path

    @property
    def meta(self) -> dict[str, Any]:
        """What the file says of its training, and, as torchvision calls them, `categories` and `num_params`."""
        state, _, stored = read_weights(self.path)
        classes = stored.get("classes", [])
        counted = {"categories": classes, "num_params": sum(tensor.numel() for tensor in state.values())}
        return stored | counted | self.value.meta

    @property
    def architecture(self) -> Architecture:
        return self.value.architecture

    def transforms(self) -> ImageTransform:
        return self.value.transforms()

    def get_state_dict(self) -> dict[str, Tensor]:
        return self.value.get_state_dict()


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], Architecture | None, dict[str, Any]]:
    """State dict, architecture (None for a file that convcvx did not write) and metadata of a safetensors file."""
    try:
        state, described = open_tensors(Path(path))
    except RunError as error:
        said = str(error).removeprefix(f"cannot read {path}: ")
        raise RunError(f"cannot read weights from {path}: {said}; name a .safetensors file or a run folder") from None
    if isinstance(described, dict) and "stages" in described:
        raise RunError(
            f"{path} is a stack of networks: load it with convcvx.stack.network.stacked_cnn, or name one of its "
            "folders stage-1, stage-2, ..."
        )
    for name, tensor in state.items():
        if tensor.ndim and not tensor.is_floating_point():
            raise RunError(f"{path} must hold real weights; {name} is {tensor.dtype}: save it as float32")
    if not isinstance(described, dict) or "architecture" not in described:
        return state, None, {}
    meta = check_form(described.get("meta", {}), {"classes?": [(str, int)]}, Path(path))
    try:
        architecture = Architecture.from_dict(described["architecture"])
        with torch.device("meta"):  # takes no memory, however large the described network is
            expected = {name: tensor.shape for name, tensor in TwoLayerCNN(architecture).state_dict().items()}
    except (AttributeError, InputError, OverflowError, RuntimeError, TypeError, ZeroDivisionError) as error:
        what = f"describes an architecture that this version does not know: {one_line(error)}"
        raise RunError(f"{path} {what}") from None
    if expected != {name: tensor.shape for name, tensor in state.items()}:
        raise RunError(f"the weights in {path} do not fit the architecture that it describes")
    return state, architecture, meta


def two_layer_cnn(
    weights: Weights | TwoLayerCNN_Weights | str | Path | None = None, **architecture: Any
) -> TwoLayerCNN:
    """Build a `TwoLayerCNN`, from weights or, untrained, from the fields of `Architecture`.

    Parameters
    ----------
    weights : Weights, str or path, optional
        `TwoLayerCNN_Weights.DIGITS`, "DIGITS", a run folder or a .safetensors file.
    **architecture
        Fields of `Architecture`: without weights, or of a file that does not tell its own.

    Raises
    ------
    InputError
        For fields that are missing, unknown, or given beside weights that tell theirs.
    RunError
        For weights that cannot be read, or do not fit.

    Examples
    --------
    >>> two_layer_cnn(image_shape=(1, 8, 8), n_filters=4, n_outputs=10)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    if weights is None:
        return TwoLayerCNN(_architecture(architecture))
    if isinstance(weights, str) and weights in TwoLayerCNN_Weights.__members__:
        weights = TwoLayerCNN_Weights[weights]
    path = weights.path if isinstance(weights, Weights | TwoLayerCNN_Weights) else user_path(weights)
    path = path / MODEL if path.is_dir() else path
    state, stored, meta = read_weights(path)
    if stored is None:
        if not architecture:
            raise InputError(f"{path} does not describe its architecture; pass the fields of Architecture as well")
        stored = _architecture(architecture)
    elif architecture:
        raise InputError(f"{path} describes its architecture: leave out {', '.join(architecture)}")
    try:
        network = TwoLayerCNN(stored)
        network.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(f"the weights in {path} do not fit the architecture: {' '.join(str(error).split())}") from None
    network.meta = meta
    return network.eval()


def _architecture(given: dict[str, Any]) -> Architecture:
    """That of the fields that are `given` by name; raise `InputError` where some are missing or unknown."""
    known = {field.name: field.default is MISSING for field in fields(Architecture)}
    if missing := [name for name, needed in known.items() if needed and name not in given]:
        raise InputError(f"{', '.join(missing)} must be given for a network: pass them, or weights")
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"unknown field {shown(unknown[0])}; those of Architecture are {', '.join(known)}")
    return Architecture(**given)
