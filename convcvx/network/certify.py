"""Certify a network, whoever trained it: read it layer by layer, check that it computes what its layers stand for.

Any Conv2d → ReLU → average or maximum pooling → Linear qualifies, with or without Dropout and BatchNorm in evaluation,
and any Linear → ReLU → Linear, with a LeakyReLU, the absolute value, a square or nothing in the place of the ReLU,
however its `forward` is written; see `layers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from convcvx.budget import NEVER, Deadline
from convcvx.certificate import Certificate, certify_parameters
from convcvx.data.arrays import as_tensor
from convcvx.data.given import held
from convcvx.data.images import Images, read_images
from convcvx.errors import InputError, check_positive, one_line
from convcvx.losses.shares import counted
from convcvx.machine.watch import watching
from convcvx.network.evaluate import OUTPUTS, outputs_of
from convcvx.network.layers import Layers, read_network
from convcvx.network.two_layer import TwoLayerCNN
from convcvx.oracles.base import Oracle
from convcvx.patches import PatchEmbedding
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.units import Units, times

FORWARD_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference between a network's outputs and those of its layers in float64, over the largest of the latter, by
the network's dtype: many times what rounding does, and little beside what a layer too many would."""

ROUNDINGS = 16
"""Relative roundings of the sum of all terms' moduli that an output may be off by, where the terms cancel: so many as
sums of a few hundred terms in any order have."""
COARSE = 1e-2
"""Share of the largest output beyond which float32 is too coarse for a network that was just trained, whatever its
terms: nobody could use the export, and none is made."""
LOOKED_AT = 1024
"""Images of three kinds, so many each, on which a network that was just made is compared with its layers."""


def certify(
    network: nn.Module,
    images: Any,
    targets: Tensor | np.ndarray | None = None,
    beta: float | None = None,
    *,
    loss: str = "squared",
    oracle: str | Oracle = "auto",
    tol: float = 1e-4,
    embedding: PatchEmbedding | None = None,
    n_classes: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dual_point: Tensor | None = None,
    time_limit: float | None = None,
    sample_weight: Any = None,
    verbose: bool = False,
) -> Certificate:
    """Certify any two-layer convolutional network at weight decay `beta`, among those with the same activation.

    Parameters
    ----------
    network : nn.Module
        Conv2d → ReLU → average or maximum pooling (or none) → Flatten → Linear, or Linear → ReLU → Linear on flattened
        images; the activation may also be a LeakyReLU, `convcvx.activations.Abs` or `torch.abs`, the square, or none.
        Biases are used as they are there: one on the convolution counts as a regularised hidden bias, one on the linear
        layer as the free intercept. A BatchNorm is folded into the layer beside it, and weight decay is that of the
        folded weights.
    images : Tensor, ndarray or StreamedImages (n, C, H, W), (n, H, W) with one channel, or rows (n, d)
        Training images, as the network takes them. Without `targets` what holds both, as they are: a pair, a torch
        Dataset or DataLoader; or a data set of `convcvx.data.load`, or its name, whose classes a network that knows
        their names numbers.
    targets : Tensor or ndarray, optional
        (n,) classes or (n, c) real values.
    beta : float
        torch's `weight_decay` under a mean-reduced loss.
    loss : {"squared", "cross-entropy", "bce", "squared-hinge", "huber", "huber:DELTA"}
    oracle : {"auto", "spectral", "exact", "branch-and-bound", "copositive", "polynomial", "remainder", "cylinders",
        "sampled", "local"}
    tol : float
        Gap at which a rigorous oracle may stop refining its bound.
    embedding : PatchEmbedding, optional
        For models with whitening or a low-rank patch basis: in their space filters have their norm.
    dual_point : Tensor (n, c), optional
        Another dual point than the network's residual, tried where that leaves a gap above `tol` and the oracle is
        rigorous. It counts for what is proved of it here, whoever made it.
    sample_weight : array (n,), optional
        What each image counts for, as in `convcvx.solve`; `dual_point` has no rows for those of weight 0.
    time_limit : float, optional
        Seconds after which the bound is the one proved, or estimated, by then; `search` and `meaning` say so. Where an
        estimate leaves some of them, slower proofs for all networks take them: `proved`.
    verbose : bool
        Show what goes on, which may take minutes.

    Raises
    ------
    InputError
        For a network of another form, one that computes anything else than its layers in their order, or data that do
        not fit it.
    """
    deadline = Deadline.after(None if time_limit is None else check_positive("time_limit", time_limit))
    if beta is None:
        raise InputError("beta must be given: the weight decay at which the network is judged")
    if targets is None:
        known = network.meta.get("classes") if isinstance(network, TwoLayerCNN) else None
        images, targets, sample_weight = held(images, sample_weight, known or None)
    if not isinstance(network, nn.Module):
        got = type(network).__name__
        raise InputError(f"network must be a torch module, such as the .network of a fit; got {got}")
    if getattr(images, "ndim", 4) == 2 and not any(isinstance(module, nn.Conv2d) for module in network.modules()):
        network, images = _on_images(network), as_tensor("images", images)[:, :, None, None]
    read, classes, weights = counted(sample_weight, read_images(images), as_tensor("targets", targets))
    layers = read_network(network, read.shape[1:])
    if (channels := layers.convolution.in_channels) != read.shape[1]:
        raise InputError(
            f"images must have {channels} channels, as the network takes; got {tuple(read.shape)}: of (n, height, "
            "width, channels) pass images.permute(0, 3, 1, 2), or transpose(0, 3, 1, 2) of an array"
        )
    if not all(bool(part.isfinite().all()) for part in network.parameters()):
        raise InputError("the network's weights must be finite; found NaN or infinity")
    units = Units.of(read, classes, loss, embedding.spec if embedding else layers.spec, layers.activation)
    read, classes, beta = units.reduced("images", read), units.reduced("targets", classes), units.reduced_beta(beta)
    if not units.ordinary:
        network = _in_units(network, layers, read, units)
    dual_point = units.inverse.dual_point(dual_point)
    intercept, n_classes = layers.classifier.bias is not None, n_classes or layers.classifier.out_features
    with watching(verbose):
        if embedding is None:
            embedding = PatchEmbedding.fit(read, layers.spec)
        made = Responses(read, embedding, layers.pooling, device=device, activation=layers.activation)
        problem = Problem.build(made, classes, beta, loss, intercept, n_classes, weights).until(deadline)
        certificate = certify_on(problem, network, oracle=oracle, tol=tol, seed=seed, dual_point=dual_point)
    return units.certificate(certificate)


def certify_on(
    problem: Problem,
    network: nn.Module,
    *,
    oracle: str | Oracle = "auto",
    tol: float = 1e-4,
    seed: int = 0,
    dual_point: Tensor | None = None,
    training: Sequence[Mapping[str, Any]] | None = None,
    rounds: Sequence[Mapping[str, Any]] = (),
    outputs: Tensor | None = None,
    said: Tensor | None = None,
) -> Certificate:
    """As `certify`, on a `problem` that is there already: its images, embedding, pooling and β are believed.

    `training` is the history of a training that ends with this certificate: the local search of oracle "auto" or
    "local" then costs about a fifth of the training's own searches, and ends where the gap it shows is hopeless;
    `meaning` says so. Without it the search makes its full effort. `rounds` as in `certify_parameters`. `outputs`
    (n, c) are what `outputs_without_intercept` gives, and `said` what `said_by` the network, where that is known.
    """
    deadline, problem = problem.deadline, problem.until(NEVER)  # what is read and checked has to be
    embedding, activation = problem.responses.embedding, problem.responses.activation
    layers = read_network(network, problem.responses.images.shape[1:])
    if layers.log_softmax and problem.loss.name != "cross-entropy":
        raise InputError(
            f"the network ends with LogSoftmax, which loss='cross-entropy' alone takes; got {problem.loss.name!r}: "
            "pass that loss, or certify the network without its last step"
        )
    if layers.activation != activation:
        raise InputError(f"the network's activation is {layers.activation}, that of the problem {activation}")
    # Of a network whose weights are 0 outputs would not tell.
    for name in ("kernel_size", "stride", "padding", "dilation"):
        theirs, ours = getattr(layers.spec, name), getattr(embedding.spec, name)
        if theirs != ours:
            raise InputError(f"the network's {name} is {theirs}, that of the embedding {ours}; fit it to the network's")
    features = layers.convolution.out_channels * problem.responses.n_cells
    if layers.classifier.in_features != features:
        raise InputError(
            f"the linear layer takes {layers.classifier.in_features} features but {layers.convolution.out_channels} "
            f"filters pooled to {problem.responses.n_cells} cells give {features}; check pool, stride and padding"
        )
    if problem.n_outputs != layers.classifier.out_features:
        raise InputError(
            f"the network has {layers.classifier.out_features} outputs but the targets {problem.n_outputs}"
        )
    filters, weights, own = parameters_of(layers, embedding)
    if outputs is None:
        outputs = outputs_without_intercept(problem, filters, weights)
    shift = torch.zeros(problem.n_outputs) if own is None else own
    coarse = math.inf if said is None else COARSE
    said = said_by(network, problem) if said is None else said
    moduli = partial(outputs_without_intercept, problem, filters, weights.abs())
    _check_outputs(said, next(network.parameters()).dtype, layers, outputs, shift, moduli, coarse)
    options: dict[str, Any] = {"oracle": oracle, "tol": tol, "seed": seed, "dual_point": dual_point}
    certificate = certify_parameters(
        problem.until(deadline), filters, weights, own, training=training, rounds=rounds, outputs=outputs, **options
    )
    return replace(certificate, train_accuracy=problem.accuracy(said))  # with its own intercept, not the best one


def _on_images(network: nn.Module) -> nn.Module:
    """A network of rows (n, d) as one of images (n, d, 1, 1)."""
    both = nn.Sequential(nn.Flatten(), network)
    both.training = network.training  # of what is in it each part keeps its own
    return both


def outputs_without_intercept(problem: Problem, filters: Tensor, weights: Tensor) -> Tensor:
    """(n, c) predictions of filters (m, r) and weights (m, P, c), in the problem's own arithmetic, at any deadline."""
    return problem.until(NEVER).responses.predict(filters, weights, torch.zeros(problem.n_outputs))


def outputs_of_export(
    problem: Problem, network: nn.Module, filters: Tensor, weights: Tensor, intercept: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The same of a network that was just made of these parameters, and what it says, (n, c) with the intercept.

    Of many images the network itself is asked on some only, and the second is None: that saves a pass that is longer
    than ours, as its layers need not be found out. But its arithmetic may be too coarse for the images, so these are
    the brightest, the ones with the largest outputs, and as many others.

    Raises
    ------
    InputError
        When it says something else on one of these.
    """
    outputs, n, responses = outputs_without_intercept(problem, filters, weights), problem.n, problem.responses
    size = min(LOOKED_AT, problem.largest_sample // 4)
    if n < 4 * size or responses.n_processes > 1 or not isinstance(responses.images, Tensor):
        return outputs, said_by(network, problem)
    brightness = torch.cat([part.flatten(1).abs().amax(dim=1) for part in responses.images.split(4 * LOOKED_AT)])
    largest = [values.cpu().topk(size).indices for values in (brightness, outputs.abs().amax(dim=1))]
    where = torch.cat([*largest, torch.arange(0, n, n // size)]).unique()
    some = replace(problem, responses=responses.at(where))
    images = some.responses.images
    said = _said(images, lambda: outputs_of(network, images))
    moduli = partial(outputs_without_intercept, some, filters, weights.abs())
    own = torch.zeros(problem.n_outputs) if intercept is None else intercept
    layers = read_network(network, images.shape[1:])
    _check_outputs(said, next(network.parameters()).dtype, layers, outputs[where], own, moduli, COARSE)
    return outputs, None


def parameters_of(layers: Layers, embedding: PatchEmbedding) -> tuple[Tensor, Tensor, Tensor | None]:
    """Filters (m, r), weights (m, P, c) and, if there is one, the intercept (c,) of a network as it is.

    Filters as `Activation.filters` makes them of kernels.
    """
    bias, intercept = layers.convolution.bias, layers.classifier.bias
    filters = embedding.filters(layers.convolution.weight.detach().cpu(), None if bias is None else bias.detach().cpu())
    filters = layers.activation.filters(filters)
    weights = rearrange(layers.classifier.weight.detach().cpu().double(), "c (m p) -> m p c", m=len(filters))
    return filters, weights, None if intercept is None else intercept.detach().cpu()


def _in_units(network: nn.Module, layers: Layers, images: Images, units: Units) -> nn.Module:
    """Its layers, in float64, for images and targets in `units`, once its outputs are found to be theirs."""
    plain = deepcopy(layers.network()).double()
    classifier = plain[-1]
    assert isinstance(classifier, nn.Linear)
    bias = None if classifier.bias is None else classifier.bias.detach().clone()
    shift = torch.zeros(classifier.out_features, dtype=torch.float64) if bias is None else bias
    said = _said(images, lambda: outputs_of(deepcopy(network).double(), images))
    _check_outputs(said, torch.float64, layers, outputs_of(plain, images) - shift, shift)
    with torch.no_grad():
        classifier.weight.copy_(times(classifier.weight.cpu(), units.images - units.targets))
        if bias is not None:
            classifier.bias.copy_(times(bias.cpu(), -units.targets))
    return plain


def said_by(network: nn.Module, problem: Problem) -> Tensor:
    """(n, c) float64: what the network itself gives for the images of `problem`, in its own arithmetic, in any time.

    Raises
    ------
    InputError
        For images that it does not take.
    """
    responses = problem.until(NEVER).responses
    return _said(responses.images, lambda: responses.run(OUTPUTS, (), network)[0])


@torch.no_grad()
def _said(images: Images, compute: Callable[[], Tensor]) -> Tensor:
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # ten bits would hide what is looked for
            return compute().double()
    except RuntimeError as error:
        raise InputError(f"the network does not take images {tuple(images.shape)}: {one_line(error)}") from None


def _check_outputs(
    outputs: Tensor,
    dtype: torch.dtype,
    layers: Layers,
    without_bias: Tensor,
    bias: Tensor,
    moduli: Callable[[], Tensor] | None = None,
    coarse: float = math.inf,
) -> None:
    """Raise `InputError` unless a network computes what its `layers`, read in order, stand for: on every image.

    Its `outputs` (n, c) in `dtype` are to be `without_bias` (n, c), to which the `bias` (c,) of the linear layer comes.
    `moduli` (n, c) are what the latter would be if no weights cancelled: rounding goes by these where they do, up to
    the share `coarse` of the largest output.
    """
    expected = without_bias + bias
    # An intercept far from zero is rounded once, and says nothing about the layers before it.
    rounding = 8 * torch.finfo(dtype).eps * float(bias.abs().max())
    tolerance = FORWARD_TOLERANCE.get(dtype, FORWARD_TOLERANCE[torch.float32])
    allowed = tolerance * float(without_bias.abs().max()) + rounding
    if outputs.shape != expected.shape:
        raise InputError(f"the network's outputs must be {tuple(expected.shape)}; got {tuple(outputs.shape)}")
    if layers.log_softmax:
        expected = expected.log_softmax(dim=1)
    difference = float((outputs - expected).abs().max())
    if difference > allowed and moduli is not None:
        cancelled = ROUNDINGS * torch.finfo(dtype).eps * float(moduli().abs().max())
        allowed = max(allowed, min(allowed + cancelled, coarse * float(without_bias.abs().max())))
    if not difference <= allowed < math.inf:  # nor is NaN anything that layers stand for
        raise InputError(
            f"the network's outputs are not those of its {layers} applied in this order: they differ by "
            f"{difference:.1e}, more than rounding, {allowed:.1e}; certify a plain nn.Sequential "
            "of them, or network.double() if its arithmetic is too coarse for these images"
        )
