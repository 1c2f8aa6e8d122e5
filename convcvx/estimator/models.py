"""The classifier and the regressor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import issparse
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.utils import Tags, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target

from convcvx.errors import InputError
from convcvx.estimator.base import PARAMETERS, ConvexCNN
from convcvx.estimator.declare import declare
from convcvx.losses.table import get_loss
from convcvx.losses.targets import LABELLED


class ConvexCNNClassifier(ClassifierMixin, ConvexCNN):
    """Two-layer convolutional network, trained to the global optimum with a certificate.

        min  (1/n) Σ_i ℓ(f(x_i), y_i) + β Σ_j ‖V_j‖_F    over ‖u_j‖ = 1, any number of filters j,
        f(x_i) = Σ_j Σ_p Σ_k w_pk σ(x_ik·u_j) V_j[p,:] + b      (c outputs, one a class; the largest wins)

    which is weight decay β on the network's weights under a mean-reduced loss; σ is the `activation`, the ReLU by
    default. The parameters are the options of `convcvx.fit`, but for `image_shape` and what scikit-learn has of its
    own. `predict_proba` needs loss="cross-entropy". With loss="bce" or "squared-hinge" y may also be labels
    (n_samples, c) of 0 and 1, several a sample: `predict` and, with "bce", `predict_proba` have the same shape then,
    and `score` is the share of samples whose labels are all right.

    {parameters}
    classes_ : ndarray (c,)
        Of labels their columns, 0..c-1.
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

    _checks_of_y = {"multi_output": True}  # noqa: RUF012 - constant
    classes_: np.ndarray

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = tags.target_tags.multi_output = self.loss in LABELLED
        return tags

    def _encode(self, y: Any) -> np.ndarray:
        check_classification_targets(y)
        y = y.toarray() if issparse(y) else y
        self._labelled = y.ndim == 2 and y.shape[1] > 1
        if self._labelled:
            if type_of_target(y) != "multilabel-indicator" or self.loss not in LABELLED:
                losses = " or ".join(f'loss="{loss}"' for loss in LABELLED)
                kind = f"classes (n_samples,) or, with {losses}, labels (n_samples, c) of 0 and 1"
                raise InputError(f"y must be {kind}; got shape {y.shape} with loss={self.loss!r}")
            self.classes_ = np.arange(y.shape[1])
            return y.astype(np.float64)
        y = column_or_1d(y, warn=True)
        self.classes_, targets = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"y has one class, {self.classes_.tolist()[0]!r}; training needs two or more")
        return targets

    def decision_function(self, X: Any) -> np.ndarray:
        """f (n_samples, c); for two classes f[:, 1] - f[:, 0], of shape (n_samples,)."""
        outputs = self._outputs(X)
        two = len(self.classes_) == 2 and not self._labelled
        return outputs[:, 1] - outputs[:, 0] if two else outputs

    def predict(self, X: Any) -> np.ndarray:
        """The class of each row, (n_samples,); or its labels, (n_samples, c)."""
        outputs = self._outputs(X)
        if self._labelled:
            return (outputs > 0).astype(int)
        return self.classes_[outputs.argmax(axis=1)]

    @property
    def predict_proba(self) -> Callable[[Any], np.ndarray]:
        """`predict_proba(X)` (n_samples, c): softmax of the outputs, with loss="cross-entropy"; or how probable each
        label is, with loss="bce".
        """
        if self.__dict__.get("_labelled") and self.loss == "bce":
            return lambda X: expit(self._outputs(X))
        if self.loss != "cross-entropy":
            needed = "bce" if self.__dict__.get("_labelled") else "cross-entropy"
            raise AttributeError(f'predict_proba needs loss="{needed}"; this estimator has loss={self.loss!r}')
        return lambda X: softmax(self._outputs(X), axis=1)

    @property
    def predict_log_proba(self) -> Callable[[Any], np.ndarray]:
        """`predict_log_proba(X)` (n_samples, c): the logarithm of `predict_proba`, where that is there."""
        _ = self.predict_proba  # which says so where there are none
        if self.__dict__.get("_labelled"):
            return lambda X: log_expit(self._outputs(X))
        return lambda X: log_softmax(self._outputs(X), axis=1)


class ConvexCNNRegressor(RegressorMixin, MultiOutputMixin, ConvexCNN):
    """Two-layer convolutional network for real targets, trained to the global optimum with a certificate.

        min  (1/2n) Σ_i ‖f(x_i) - y_i‖² + β Σ_j ‖V_j‖_F    over ‖u_j‖ = 1, any number of filters j,
        f(x_i) = Σ_j Σ_p Σ_k w_pk σ(x_ik·u_j) V_j[p,:] + b

    which is weight decay β on the network's weights under a mean-reduced loss; σ is the `activation`, the ReLU by
    default. Scale the features.

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
