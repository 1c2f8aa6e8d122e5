"""convcvx: convolutional layers trained to the global optimum, with a certificate."""

import os

# Threads that spin while they wait gain little alone and lose tenfold on a shared machine. OpenMP reads this when
# torch loads; whoever imports torch first, or sets the variable, decides for himself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from convcvx.certificate import Certificate, certify
from convcvx.estimator import ConvexCNNClassifier, ConvexCNNRegressor
from convcvx.network import TwoLayerCNN, TwoLayerCNN_Weights, two_layer_cnn
from convcvx.patches import PatchSpec
from convcvx.pooling import Pooling
from convcvx.solution import Solution
from convcvx.training import beta_max, path, solve

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
