"""convcvx: convolutional layers trained to the global optimum, with a certificate."""

import os
from typing import TYPE_CHECKING, Any

# Threads that spin while they wait gain little alone and lose tenfold on a shared machine. OpenMP reads this when
# torch loads; whoever imports torch first, or sets the variable, decides for himself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from convcvx.certificate import Certificate
from convcvx.network.certify import certify
from convcvx.network.two_layer import TwoLayerCNN, TwoLayerCNN_Weights, two_layer_cnn
from convcvx.patches import PatchSpec
from convcvx.pooling import Pooling
from convcvx.solution import Solution
from convcvx.training.functional import beta_max, path, solve

if TYPE_CHECKING:
    from convcvx.estimator import ConvexCNNClassifier, ConvexCNNRegressor

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "ConvexCNNClassifier",
    "ConvexCNNRegressor",
    "PatchSpec",
    "Pooling",
    "Solution",
    "TwoLayerCNN",
    "TwoLayerCNN_Weights",
    "beta_max",
    "certify",
    "path",
    "solve",
    "two_layer_cnn",
]


def __getattr__(name: str) -> Any:
    """The estimators on first use: the command line does not wait for scikit-learn."""
    if name in ("ConvexCNNClassifier", "ConvexCNNRegressor"):
        from convcvx import estimator

        return getattr(estimator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
