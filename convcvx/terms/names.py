"""What options take by name; the tables behind the names say what each stands for, and `tests/test_config.py` that they
agree. A command line refuses a name that is none before it imports them.
"""

from __future__ import annotations

SOLVERS = ("sliding-fw", "column-generation", "frank-wolfe", "copositive", "gated", "closed-form")
"""The keys of `convcvx.solvers.SOLVERS`."""
ORACLES = (
    "spectral",
    "exact",
    "branch-and-bound",
    "copositive",
    "family",
    "polynomial",
    "remainder",
    "cylinders",
    "sampled",
    "local",
)
"""The keys of `convcvx.oracles.ORACLES`."""
FAMILIES = ("ternary",)
"""The keys of `convcvx.oracles.FAMILIES`."""
DICTIONARY_SOURCES = ("patches", "kmeans")
"""Where the filters of a dictionary come from: patches drawn at random, or the centres of their clusters."""
BALANCED = "balanced"
"""The class weights by which all classes count alike."""
N_GATES = 100
"""Activation patterns that are sampled where nobody says how many."""
OPTIMIZERS = ("sgd", "adam")
"""The keys of `convcvx.baseline.OPTIMIZERS`: by what a twin is trained."""
EXPORTS = {"onnx": ".onnx", "torch": ".pt2", "sklearn": ".joblib"}
"""The keys of `convcvx.network.export.FORMATS`, and how such files end."""
TWIN_BATCH = 64
"""Images in a step of the optimiser of a twin where nobody says how many: what is common."""
LOSS_WORDS = (
    "squared, cross-entropy, bce or squared-hinge (classes, or several labels an image), huber:DELTA (1 by default)"
)
"""What the options say of losses."""
