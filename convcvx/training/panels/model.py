"""What network is trained, and to the optimum of which objective."""

from __future__ import annotations

from dataclasses import dataclass

from convcvx.terms.names import BALANCED, FAMILIES, LOSS_WORDS
from convcvx.training import meanings
from convcvx.training.option import MODEL, SIZE, option, size, size_text

DEFAULT_BETA_RATIO = 1e-3
"""Share of beta_max that a run without beta and beta_ratio trains at."""
EVERY = "all"
"""The word of `filters` for those of no family."""


@dataclass(frozen=True)
class ModelOptions:
    """The options of the panel "Model"."""

    kernel_size: str = option(
        "3", MODEL, "3, or 3x5 (rows x columns).", low=1, per_stage="", read=size_text, form=SIZE, means=size
    )
    stride: str = option("1", MODEL, "As in Conv2d.", low=1, per_stage="", read=size_text, form=SIZE, means=size)
    padding: str = option(
        "0", MODEL, "As in Conv2d, with zeros.", low=0, per_stage="", read=size_text, form=SIZE, means=size
    )
    dilation: str = option(
        "1",
        MODEL,
        "As in Conv2d: pixels from one entry of a patch to the next.",
        low=1,
        per_stage="",
        read=size_text,
        form=SIZE,
        means=size,
    )
    pool: str = option(
        "global",
        MODEL,
        "global; a grid: 4 or 4x2 (AdaptiveAvgPool2d); window:SIZE,STRIDE (AvgPool2d); none. With max: in front, "
        "max:4, the maximum over each cell instead of the average (AdaptiveMaxPool2d, MaxPool2d).",
        per_stage="",
        read=meanings.pool_text,
        form="a grid such as 4 or (4, 2), or a text such as global, window:3,2, max:4 or none",
        means=meanings.pooling,
    )
    activation: str = option(
        "relu",
        MODEL,
        "relu; leaky-relu:SLOPE with a slope between 0 and 1, as nn.LeakyReLU has it; abs, the absolute value; linear: "
        "no activation, only a convolution, pooled and weighed; quadratic: the square, whose penalty is "
        "beta * sum(norm(kernel)^2 * norm(weights)).",
        per_stage="",
        read=meanings.activation_text,
        form="relu, leaky-relu:SLOPE, abs, linear or quadratic",
        means=meanings.activation,
    )
    hidden_bias: bool = option(False, MODEL, "A regularised bias in each filter.")
    intercept: bool = option(True, MODEL, "An unpenalised bias in the output.", any_model=True)
    rank: int | None = option(
        None,
        MODEL,
        "Restrict filters to the first R principal directions of the patches.",
        low=1,
        per_stage="None for all directions.",
    )
    subspaces: int = option(
        1,
        MODEL,
        "With --rank R: each filter lies in the first R principal directions, or in the next R, and so on, of so many "
        "subspaces. A proof over all of them costs the sum of the proofs in each.",
        low=1,
        per_stage="",
    )
    filters: str = option(
        EVERY,
        MODEL,
        f"{EVERY}, or those of a family only: ternary, with entries -1, 0, 1 in the basis that --rank and --whiten "
        "choose, of rank 9 at most. Certificates then speak of networks over the family, and are proofs.",
        choices=(EVERY, *FAMILIES),
        per_stage="",
    )
    whiten: bool = option(False, MODEL, "ZCA-whiten the patches.", per_stage="", strength="whiten_epsilon")
    whiten_epsilon: float = option(
        0.1, MODEL, "Added to the eigenvalues of the patches' covariance.", low=1e-12, high=1e12, per_stage=""
    )
    contrast: bool = option(
        False, MODEL, "Normalise each patch to mean 0, variance 1.", per_stage="", strength="contrast_epsilon"
    )
    contrast_epsilon: float = option(
        1.5e-4,
        MODEL,
        "Added to the variance; by default 10 on the scale of 0..255.",
        low=1e-12,
        high=1e12,
        per_stage="",
    )
    beta: float | None = option(
        None, MODEL, "Weight decay: torch's weight_decay under a mean-reduced loss.", low=1e-30, high=1e30
    )
    beta_ratio: float | None = option(
        None,
        MODEL,
        "Weight decay as a share of beta_max, from which on no filter helps (none of a dictionary, if there is one). "
        f"[default: {DEFAULT_BETA_RATIO:g} without --beta]",
        low=1e-12,
        high=1e12,
        per_stage="",
    )
    class_weight: str | None = option(
        None,
        MODEL,
        f"What classes count for: {BALANCED}, all alike, or a weight by class, such as 3=2,8=0.5 [default: as often as "
        "they come]",
        read=meanings.class_weight_text,
        form=f"{BALANCED}, or a weight by class, such as 3=2,8=0.5",
        any_model=True,
    )
    loss: str = option("squared", MODEL, f"{LOSS_WORDS}.", any_model=True, means=meanings.loss)
