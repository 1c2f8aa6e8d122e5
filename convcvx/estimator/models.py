"""The classifier and the regressor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets

from convcvx.errors import InputError
from convcvx.estimator.base import PARAMETERS, ConvexCNN, declare
from convcvx.losses.table import get_loss


class ConvexCNNClassifier(ClassifierMixin, ConvexCNN):
    """Two-layer convolutional ReLU network, trained to the global optimum with a certificate.

        min  (1/n) Σ_i ℓ(f(x_i), y_i) + β Σ_j ‖V_j‖_F    over ‖u_j‖ = 1, any number of filters j,
        f(x_i) = Σ_j Σ_p Σ_k w_pk (x_ik·u_j)_+ V_j[p,:] + b      (c outputs, one a class; the largest wins)

    which is weight decay β on the network's weights under a mean-reduced loss. The parameters are the options of
    `convcvx.fit`, but for `image_shape` and what scikit-learn has of its own. `predict_proba` needs
    loss="cross-entropy".

    {parameters}
    classes_ : ndarray (c,)
    n_features_in_ : int

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> options = {"image_shape": (1, 8, 8), "pool": 2, "beta_ratio": 0.05, "tol": 0.05}
    >>> model = ConvexCNNClassifier(**options, random_state=0).fit(X[:200] / 16, y[:200])
    >>> bool(model.score(X[:200] / 16, y[:200]) > 0.8), bool(model.certificate_.rel_gap < 0.05)
    (True, True)
    """

    classes_: np.ndarray

    def _encode(self, y: np.ndarray) -> np.ndarray:
        check_classification_targets(y)
        self.classes_, targets = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"y has one class, {self.classes_[0]!r}; training needs two or more")
        return targets

    def decision_function(self, X: Any) -> np.ndarray:
        """f (n_samples, c); for two classes f[:, 1] - f[:, 0], of shape (n_samples,)."""
        outputs = self._outputs(X)
        return outputs[:, 1] - outputs[:, 0] if len(self.classes_) == 2 else outputs

    def predict(self, X: Any) -> np.ndarray:
        """The class of each row, (n_samples,)."""
        outputs = self._outputs(X)
        return self.classes_[outputs.argmax(axis=1)]

    @property
    def predict_proba(self) -> Callable[[Any], np.ndarray]:
        """`predict_proba(X)`: softmax of the outputs, (n_samples, c); only with loss="cross-entropy"."""
        if self.loss != "cross-entropy":
            raise AttributeError(f'predict_proba needs loss="cross-entropy"; this estimator has loss={self.loss!r}')
        return lambda X: softmax(self._outputs(X), axis=1)


class ConvexCNNRegressor(RegressorMixin, MultiOutputMixin, ConvexCNN):
    """Two-layer convolutional ReLU network for real targets, trained to the global optimum with a certificate.

        min  (1/2n) Σ_i ‖f(x_i) - y_i‖² + β Σ_j ‖V_j‖_F    over ‖u_j‖ = 1, any number of filters j,
        f(x_i) = Σ_j Σ_p Σ_k w_pk (x_ik·u_j)_+ V_j[p,:] + b

    which is weight decay β on the network's weights under a mean-reduced loss. Scale the features.

    {parameters}
    n_features_in_ : int

    Examples
    --------
    >>> import numpy as np
    >>> x = np.linspace(-2, 2, 41)[:, None]
    >>> model = ConvexCNNRegressor(random_state=0).fit(x, abs(x[:, 0]))
    >>> bool(model.score(x, abs(x[:, 0])) > 0.99), len(model.filters_), model.certificate_.scope
    (True, 2, 'global')
    """

    _checks_of_y = {"multi_output": True, "y_numeric": True}  # noqa: RUF012 - constant

    def _encode(self, y: np.ndarray) -> np.ndarray:
        if not get_loss(self.loss).takes_real:
            raise InputError(f"loss must be 'squared' or 'huber' for regression; got {self.loss!r}")
        self._flat = y.ndim == 1
        return y.astype(np.float64)

    def predict(self, X: Any) -> np.ndarray:
        """f, shaped as `y` was: (n_samples,) or (n_samples, c)."""
        outputs = self._outputs(X)
        return outputs[:, 0] if self._flat else outputs


declare(ConvexCNNClassifier, PARAMETERS)
declare(ConvexCNNRegressor, [p for p in PARAMETERS if p.name != "class_weight"])
