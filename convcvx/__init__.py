"""convcvx: convolutional layers trained to the global optimum, with a certificate."""

from convcvx.certificate import Certificate, certify
from convcvx.network import TwoLayerCNN, TwoLayerCNN_Weights, two_layer_cnn
from convcvx.patches import PatchSpec
from convcvx.pooling import Pooling
from convcvx.solution import Solution
from convcvx.training import beta_max, path, solve

__version__ = "0.1.0"

__all__ = [
    "Certificate",
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
