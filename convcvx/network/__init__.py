"""Trained networks as torch modules, ours and those of others."""

from convcvx.network.architecture import ARCHITECTURE, Architecture, ContrastConv2d
from convcvx.network.preprocess import ImageTransform
from convcvx.network.two_layer import (
    TwoLayerCNN,
    TwoLayerCNN_Weights,
    Weights,
    network_state,
    read_weights,
    two_layer_cnn,
)

__all__ = [
    "ARCHITECTURE",
    "Architecture",
    "ContrastConv2d",
    "ImageTransform",
    "TwoLayerCNN",
    "TwoLayerCNN_Weights",
    "Weights",
    "network_state",
    "read_weights",
    "two_layer_cnn",
]
