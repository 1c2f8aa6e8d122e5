"""convcvx: convolutional layers trained to the global optimum, with a certificate."""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors, type checkers and the reference; `HOMES` says the same to Python
    from convcvx.certificate import Certificate as Certificate
    from convcvx.comparison import Comparison as Comparison
    from convcvx.comparison import compare as compare
    from convcvx.estimator import ConvexCNNClassifier as ConvexCNNClassifier
    from convcvx.estimator import ConvexCNNClassifierCV as ConvexCNNClassifierCV
    from convcvx.estimator import ConvexCNNRegressor as ConvexCNNRegressor
    from convcvx.estimator import ConvexCNNRegressorCV as ConvexCNNRegressorCV
    from convcvx.network.certify import certify as certify
    from convcvx.network.two_layer import TwoLayerCNN as TwoLayerCNN
    from convcvx.network.two_layer import TwoLayerCNN_Weights as TwoLayerCNN_Weights
    from convcvx.network.two_layer import two_layer_cnn as two_layer_cnn
    from convcvx.patches import PatchSpec as PatchSpec
    from convcvx.pooling import Pooling as Pooling
    from convcvx.solution import Solution as Solution
    from convcvx.stack.fit import StackFit as StackFit
    from convcvx.stack.fit import fit_stack as fit_stack
    from convcvx.stack.fit import load as load
    from convcvx.stack.network import StackedCNN as StackedCNN
    from convcvx.training.entry import fit as fit
    from convcvx.training.fit import Fit as Fit
    from convcvx.training.functional import beta_max as beta_max
    from convcvx.training.functional import path as path
    from convcvx.training.functional import solve as solve

__version__ = "0.1.0"

# Threads that spin while they wait gain little alone and lose tenfold on a shared machine. OpenMP reads this when
# torch loads; whoever imports torch first, or sets the variable, decides for himself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HOMES = {
    "Certificate": "certificate",
    "Comparison": "comparison",
    "ConvexCNNClassifier": "estimator",
    "ConvexCNNClassifierCV": "estimator",
    "ConvexCNNRegressor": "estimator",
    "ConvexCNNRegressorCV": "estimator",
    "Fit": "training.fit",
    "PatchSpec": "patches",
    "Pooling": "pooling",
    "Solution": "solution",
    "StackFit": "stack.fit",
    "StackedCNN": "stack.network",
    "TwoLayerCNN": "network.two_layer",
    "TwoLayerCNN_Weights": "network.two_layer",
    "beta_max": "training.functional",
    "certify": "network.certify",
    "compare": "comparison",
    "fit": "training.entry",
    "fit_stack": "stack.fit",
    "load": "stack.fit",
    "path": "training.functional",
    "solve": "training.functional",
    "two_layer_cnn": "network.two_layer",
}
"""Where each public name is defined; its module is imported on first use, as torch and numba take seconds."""

__all__ = list(HOMES)


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"convcvx.{HOMES[name]}"), name)
    if not name.startswith("_") and find_spec(f"convcvx.{name}"):
        return import_module(f"convcvx.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
