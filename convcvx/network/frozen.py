"""A trained network as a scikit-learn estimator: it predicts, and is not trained again."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

from convcvx.errors import InputError
from convcvx.losses.table import get_loss
from convcvx.network.evaluate import predict
from convcvx.terms.numbers import PLAIN


class Frozen(BaseEstimator):
    """A network behind scikit-learn's interface; takes rows (n_samples, n_features) or images (n_samples, C, H, W).

    Parameters
    ----------
    network : TwoLayerCNN or StackedCNN

    Attributes
    ----------
    n_features_in_ : int
        Pixels of an image.
    """

    def __init__(self, network: Any) -> None:
        self.network = network
        self.n_features_in_ = int(np.prod(network.image_shape))

    def fit(self, X: Any, y: Any = None) -> NoReturn:
        """Raise `InputError`."""
        raise InputError("a network of a finished run is not trained again: use convcvx.ConvexCNNClassifier or fit")

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def scores(self, X: Any) -> np.ndarray:
        """The network's outputs (n_samples, c), float32.

        Raises
        ------
        InputError
            For X of another number of features.
        """
        rows = np.asarray(X, np.float32)
        if rows.ndim < 2 or int(np.prod(rows.shape[1:])) != self.n_features_in_:
            shape = self.network.image_shape
            raise InputError(f"X must be rows of {self.n_features_in_} features or images {shape}; got {rows.shape}")
        return predict(self.network, torch.from_numpy(rows.reshape(-1, *self.network.image_shape))).numpy()


class FrozenClassifier(ClassifierMixin, Frozen):
    """One that tells classes, or labels (n_samples, c) of 0 and 1 where an image has several.

    Attributes
    ----------
    classes_ : ndarray (c,)
        Whole numbers if the names of all classes are that, written as Python writes them, else texts.
    """

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        names = network.meta["classes"]
        if not names and network.meta["loss"] == "cross-entropy":  # of targets that were probabilities
            names = range(predict(network, torch.zeros(1, *network.image_shape)).shape[1])
        whole = all(PLAIN.fullmatch(str(name)) for name in names)
        self.classes_ = np.array([int(name) for name in names]) if whole and names else np.array(names, str)

    def decision_function(self, X: Any) -> np.ndarray:
        """The outputs (n_samples, c); for two classes the second less the first, (n_samples,)."""
        scores = self.scores(X)
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> np.ndarray:
        """The class of each image (n_samples,), or its labels (n_samples, c)."""
        scores = self.scores(X)
        return self.classes_[scores.argmax(axis=1)] if len(self.classes_) else (scores > 0).astype(int)

    def predict_proba(self, X: Any) -> np.ndarray:
        """(n_samples, c): softmax of the outputs.

        Raises
        ------
        AttributeError
            For a network of another loss than cross-entropy.
        """
        if (loss := self.network.meta["loss"]) != "cross-entropy":
            raise AttributeError(f"predict_proba needs a network trained with loss cross-entropy; this one has {loss}")
        return softmax(self.scores(X).astype(np.float64), axis=1)


class FrozenRegressor(RegressorMixin, Frozen):
    """One that tells real values."""

    def predict(self, X: Any) -> np.ndarray:
        """(n_samples, c), or (n_samples,) of one output."""
        scores = self.scores(X)
        return scores[:, 0] if scores.shape[1] == 1 else scores


def frozen(network: Any) -> Frozen:
    """The estimator that fits what the network was trained on, as its `meta` says."""
    meta = {"classes": [], "loss": "squared"} | network.meta
    network.meta = meta
    real = not meta["classes"] and get_loss(meta["loss"]).takes_real
    return FrozenRegressor(network.eval()) if real else FrozenClassifier(network.eval())
