"""One head over the features of all stages of a stack: again a convex problem, solved to a duality gap.

    min_{W, b}  Σ_i s_i ℓ(Σ_s A_si W_s + b, y_i) + β Σ_s Σ_j ‖W_sj‖_F

with A_s the pooled responses to the filters of stage s, all frozen and of unit norm. Stages that look at an image on
different scales know different things; a head of one stage alone makes no use of what the others know. β is chosen on
held-out images; filters that were trained, not drawn, have seen those too, which favours a small β.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from einops import rearrange
from torch import Tensor

from convcvx.network.two_layer import TwoLayerCNN
from convcvx.problem import Problem
from convcvx.solvers.dictionary.path import DictionaryFit, fit_dictionaries
from convcvx.stack.network import Link, StackedCNN


def fit_joint_heads(
    stages: Sequence[TwoLayerCNN],
    links: Sequence[Link],
    problems: Sequence[Problem],
    *,
    tune: float,
    versions: int,
    flips: bool,
    tol: float,
) -> tuple[StackedCNN, DictionaryFit]:
    """The stack whose heads are optimal together.

    Parameters
    ----------
    stages, links : sequences
        As of a `StackedCNN`; left as they are.
    problems : sequence of Problem
        That of each stage, on the features it was given.
    tune, versions, flips, tol
        As in `fit_dictionaries`; β is the one that held-out images prefer.

    Returns
    -------
    StackedCNN
        An ensemble: its scores, the mean over its heads, are the predictions of the fit.
    DictionaryFit
    """
    embedded = [
        problem.responses.activation.filters(problem.responses.embedding.filters(*_convolution(stage)))
        for stage, problem in zip(stages, problems, strict=True)
    ]
    norms = [filters.norm(dim=1, keepdim=True).clamp_min(1e-300) for filters in embedded]
    unit = [filters / norm for filters, norm in zip(embedded, norms, strict=True)]
    fit = fit_dictionaries(problems, unit, tune=tune, versions=versions, flips=flips, tol=tol)
    heads = [
        # The mean over the heads is to be the sum of their parts of the prediction.
        _with_head(stage, len(stages) * weights / norm[:, :, None], fit.intercept)
        for stage, norm, weights in zip(stages, norms, fit.weights, strict=True)
    ]
    return StackedCNN(heads, links, ensemble=True), fit


def _convolution(stage: TwoLayerCNN) -> tuple[Tensor, Tensor | None]:
    state = stage.state_dict()
    return state["0.weight"].cpu(), state["0.bias"].cpu() if "0.bias" in state else None


def _with_head(stage: TwoLayerCNN, weights: Tensor, intercept: Tensor) -> TwoLayerCNN:
    """A copy of `stage` with weights (m, P, c), and the intercept (c,) if it has one."""
    copied = copy.deepcopy(stage)
    state = copied.state_dict() | {"4.weight": rearrange(weights, "m p c -> c (m p)")}
    copied.load_state_dict(state | ({"4.bias": intercept} if "4.bias" in state else {}))
    return copied
