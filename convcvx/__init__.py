"""convcvx: convolutional layers trained to the global optimum, with a certificate."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Threads that spin while they wait gain little alone and lose tenfold on a shared machine. OpenMP reads this when
# torch loads; whoever imports torch first, or sets the variable, decides for himself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from convcvx.certificate import Certificate
from convcvx.comparison import Comparison, compare
from convcvx.network.certify import certify
from convcvx.network.two_layer import TwoLayerCNN, TwoLayerCNN_Weights, two_layer_cnn
from convcvx.patches import PatchSpec
from convcvx.pooling import Pooling
from convcvx.solution import Solution
from convcvx.stack.fit import StackFit, fit_stack, load
from convcvx.training.entry import fit
from convcvx.training.fit import Fit
from convcvx.training.functional import beta_max, path, solve

if TYPE_CHECKING:
    from convcvx.estimator import (
        ConvexCNNClassifier,
        ConvexCNNClassifierCV,
        ConvexCNNRegressor,
        ConvexCNNRegressorCV,
    )

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "Comparison",
    "ConvexCNNClassifier",
    "ConvexCNNClassifierCV",
    "ConvexCNNRegressor",
    "ConvexCNNRegressorCV",
    "Fit",
    "PatchSpec",
    "Pooling",
    "Solution",
    "StackFit",
    "TwoLayerCNN",
    "TwoLayerCNN_Weights",
    "beta_max",
    "certify",
    "compare",
    "fit",
    "fit_stack",
    "load",
    "path",
    "solve",
    "two_layer_cnn",
]

ON_FIRST_USE = {
    "ConvexCNNClassifier": "convcvx.estimator",
    "ConvexCNNClassifierCV": "convcvx.estimator",
    "ConvexCNNRegressor": "convcvx.estimator",
    "ConvexCNNRegressorCV": "convcvx.estimator",
}
"""Names that others need not wait for: scikit-learn takes a second to import."""


def __getattr__(name: str) -> Any:
    if name in ON_FIRST_USE:
        return getattr(import_module(ON_FIRST_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
