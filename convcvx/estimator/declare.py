"""The parameters of an estimator, made from options: in its signature for scikit-learn, in its docstring for people."""

from __future__ import annotations

from inspect import Parameter, Signature, cleandoc
from typing import Any

from convcvx.training.option import described
from convcvx.training.options import TrainConfig

PARAMETERS_OF_ITS_OWN = {
    "image_shape": (
        "(int, int, int)",
        "Channels, height and width of the images that rows of X are, flattened as by `images.reshape(n, -1)`.\n"
        "    None for 4-D X, images themselves, and for plain data, where a sample is one patch: its row.",
    ),
    "random_state": ("int, RandomState instance or None", "Seeds the search for filters."),
    "warm_start": ("bool", "Begin at the solution of the fit before."),
    "verbose": ("bool", "Print a line after every round, and show between them what goes on."),
    "betas": ("sequence of float", "The path; `n_betas` values from beta_max down to `ratio` times it if None."),
    "n_betas": ("int", "Length of the path."),
    "ratio": ("float", "Where the path ends, as a share of beta_max."),
    "cv": ("int, splitter or iterable", "As in scikit-learn."),
    "scoring": ("str or callable", "As in scikit-learn; None for the score of the estimator."),
}
"""Parameters that `fit` has not: their kinds, and what they are."""
ATTRIBUTES = """
Attributes
----------
solution_ : Solution
    Parameters, history and status.
certificate_ : Certificate
    Objective, lower bound, `rel_gap` and `scope`: whether the gap is a proof.
beta_ : float
    The β trained with.
filters_, weights_, intercept_ : ndarray (m, r), (m, P, c), (c,)
    u_j, V_j and b. Filters live in the space of `solution_.embedding`; plain rows have r = n_features (+1 for the
    hidden bias).
image_shape_ : (int, int, int) or None
    Channels, height and width of the images; None for plain data."""


def declare(estimator: type[Any], options: list[Parameter]) -> None:
    """Give an estimator class its parameters: scikit-learn reads them from the signature of `__init__`."""

    def __init__(self: Any, **given: Any) -> None:
        if unknown := given.keys() - {option.name for option in options}:
            raise TypeError(f"{estimator.__name__} got an unexpected keyword argument {min(unknown)!r}")
        for option in options:
            setattr(self, option.name, given.get(option.name, option.default))

    own = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    __init__.__signature__ = Signature([own, *options])  # type: ignore[attr-defined]
    estimator.__init__ = __init__
    estimator.__doc__ = cleandoc(estimator.__doc__ or "").replace("{parameters}", _documented(options))


def _documented(options: list[Parameter]) -> str:
    lines = ["Parameters", "----------", described(TrainConfig, options)]
    for option in options:
        if option.name in PARAMETERS_OF_ITS_OWN:
            lines += [
                f"{option.name} : {PARAMETERS_OF_ITS_OWN[option.name][0]}, default {option.default!r}",
                f"    {PARAMETERS_OF_ITS_OWN[option.name][1]}",
            ]
    return "\n".join([*lines, ATTRIBUTES])
