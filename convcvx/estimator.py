"""scikit-learn estimators: `fit` trains to the global optimum and keeps the certificate.

Rows of X are plain data, or flattened images when `image_shape` is given.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from convcvx.budget import Budget, Deadline
from convcvx.errors import InputError, check_positive, is_count
from convcvx.network.two_layer import TwoLayerCNN
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.training.functional import patches_to_images, train
from convcvx.training.plan import beta_at, build_problem, find_beta_max, warn_short_of
from convcvx.units import Units

DTYPES = (np.float64, np.float32)
IMAGE_DEFAULTS: dict[str, Any] = {"kernel_size": None, "stride": 1, "padding": 0, "pool": None}
"""Parameters that mean nothing for plain data."""


class _ConvexCNN(BaseEstimator):
    """Parameters, training and outputs; a subclass says how it reads `y` and what it makes of the outputs."""

    _checks_of_y: dict[str, Any] = {}  # noqa: RUF012 - constant
    solution_: Any

    def __init__(
        self,
        *,
        beta: float | None = None,
        beta_ratio: float = 0.01,
        loss: str = "squared",
        image_shape: tuple[int, int, int] | None = None,
        kernel_size: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        pool: Any = None,
        hidden_bias: bool = False,
        rank: int | None = None,
        whiten: float | None = None,
        contrast: float | None = None,
        intercept: bool = True,
        solver: str = "auto",
        oracle: str = "auto",
        tol: float = 1e-2,
        max_filters: int | None = None,
        max_rounds: int = 100,
        time_limit: float | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.beta = beta
        self.beta_ratio = beta_ratio
        self.loss = loss
        self.image_shape = image_shape
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.pool = pool
        self.hidden_bias = hidden_bias
        self.rank = rank
        self.whiten = whiten
        self.contrast = contrast
        self.intercept = intercept
        self.solver = solver
        self.oracle = oracle
        self.tol = tol
        self.max_filters = max_filters
        self.max_rounds = max_rounds
        self.time_limit = time_limit
        self.random_state = random_state

    def _encode(self, y: np.ndarray) -> np.ndarray:  # `y` as the targets of a `Problem`
        raise NotImplementedError

    def fit(self, X: Any, y: Any) -> Any:
        """Train on X (n_samples, n_features) and y.

        Many fits at a time: joblib's own processes (loky, its default) start afresh. A process forked after a fit on
        several threads waits for ever, as it does with any torch: spawn it, or call torch.set_num_threads(1) first.

        Raises
        ------
        InputError
            A ValueError: for parameters out of range or that do not fit X.

        Warns
        -----
        ConvergenceWarning
            When the certified gap is above `tol`.
        """
        budget = Budget(self.tol, self.max_filters, self.max_rounds, self.time_limit)
        deadline = Deadline.after(self.time_limit)
        X, y = validate_data(self, X, y, dtype=DTYPES, **self._checks_of_y)
        targets = self._encode(y)
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max - 1)
        options = {"pooling": self.pool, "loss": self.loss, "intercept": self.intercept}
        images, spec = self._images(X), self._spec()
        units = Units.of(images, targets, self.loss, spec)
        images, targets = units.reduced("images", images), units.reduced("targets", targets)
        problem = build_problem(images, targets, spec=spec, **options).until(deadline)
        problem = problem.with_beta(self._choose_beta(problem, units, seed))
        solution, self.certificate_ = train(problem, units, budget, solver=self.solver, oracle=self.oracle, seed=seed)
        self.solution_ = solution
        self.beta_ = self.certificate_.beta
        self.filters_ = solution.filters.numpy()
        self.weights_ = solution.weights.numpy()
        self.intercept_ = solution.intercept.numpy()
        warn_short_of(self.certificate_, solution, self.tol)
        return self

    def to_network(self) -> TwoLayerCNN:
        """The fitted network as a torch module; it takes images (n, C, H, W), plain data as (n, n_features, 1, 1)."""
        check_is_fitted(self)
        shape = (self.n_features_in_, 1, 1) if self.image_shape is None else self._image_shape()
        solution = self.solution_
        bias = {"intercept": self.intercept}
        return TwoLayerCNN.from_solution(solution, solution.embedding, solution.pooling, shape, **bias)

    def _outputs(self, X: Any) -> np.ndarray:
        """f (n_samples, c) float64."""
        check_is_fitted(self)
        solution = self.solution_
        images = self._images(validate_data(self, X, dtype=DTYPES, reset=False))
        responses = Responses(images, solution.embedding, solution.pooling, dtype=torch.float64)
        return responses.predict(solution.filters, solution.weights, solution.intercept).numpy()

    def _images(self, X: np.ndarray) -> Tensor:
        """(n, C, H, W) images of checked rows."""
        rows = torch.from_numpy(np.require(X, requirements=["C", "W"]))  # torch warns of read-only arrays
        if self.image_shape is None:
            return patches_to_images(rows)
        shape = self._image_shape()
        if math.prod(shape) != X.shape[1]:
            raise InputError(f"image_shape={shape} needs X with {math.prod(shape)} columns; got {X.shape[1]}")
        if shape[2] in (1, 3, 4) and shape[0] > shape[2]:
            raise InputError(
                f"image_shape={shape} seems to be (height, width, channels): pass ({shape[2]}, {shape[0]}, {shape[1]}) "
                "and rows of images.transpose(0, 3, 1, 2); signals are (channels, 1, length)"
            )
        return rows.unflatten(1, shape)

    def _image_shape(self) -> tuple[int, int, int]:
        """`image_shape`, a sequence or an array, in whole numbers."""
        shape = self.image_shape
        sizes = tuple(shape) if isinstance(shape, Iterable) else ()
        if len(sizes) != 3 or not all(map(is_count, sizes)):
            raise InputError(f"image_shape must be (channels, height, width), whole numbers >= 1; got {shape!r}")
        return int(sizes[0]), int(sizes[1]), int(sizes[2])

    def _spec(self) -> PatchSpec:
        sizes: dict[str, Any] = {"kernel_size": 1}
        if self.image_shape is not None:
            kernel_size = 3 if self.kernel_size is None else self.kernel_size
            sizes = {"kernel_size": kernel_size, "stride": self.stride, "padding": self.padding}
        elif names := [k for k, value in IMAGE_DEFAULTS.items() if not np.array_equal(getattr(self, k), value)]:
            raise InputError(f"{', '.join(names)} needs images; pass image_shape=(channels, height, width)")
        options = {name: getattr(self, name) for name in ("hidden_bias", "contrast", "whiten", "rank")}
        return PatchSpec(**sizes, **options)

    def _choose_beta(self, problem: Problem, units: Units, seed: int) -> float:
        """β in `units`, those of `problem`."""
        if self.beta is not None:
            return units.reduced_beta(self.beta)
        ratio = check_positive("beta_ratio", self.beta_ratio)
        return beta_at(ratio, find_beta_max(problem, self.oracle, seed))


_PARAMETERS = """\
Parameters
----------
beta : float, optional
    Weight decay β. None takes β = `beta_ratio`·β_max from the data.
beta_ratio : float
    Share of β_max, the β from which on the optimal network has no filters. Without effect when `beta` is given.
    With the local oracle β_max is the largest value found.
loss : {"squared", "cross-entropy"}
    ½‖f - y‖², one-hot y if classes, or softmax cross-entropy (classifier only; `predict_proba` needs it).
image_shape : (int, int, int), optional
    Channels, height, width of the images that the rows of X are, flattened in this order: `images.reshape(n, -1)`.
    None is plain data: one patch a sample, the row itself.
kernel_size : int or (int, int), optional
    3 by default. This and the next three need `image_shape`.
stride, padding : int or (int, int)
    As in `torch.nn.Conv2d`.
pool : optional
    Average pooling: None for global, 4, "4x2" or (4, 2) for a grid, "window:SIZE,STRIDE", "none", or a (P, K) array.
hidden_bias : bool
    Give each filter a bias, regularised with it. Worth having for plain data that are not centred.
rank : int, optional
    Restrict filters to this many principal directions of the patches; up to 2, the hidden bias counted, `oracle`
    "auto" proves its certificates.
whiten, contrast : float, optional
    ZCA whitening and local contrast normalisation of the patches, with this epsilon.
intercept : bool
    Train an unpenalised output bias b.
solver, oracle : str
    As in `convcvx.solve`.
tol : float
    Relative gap (primal - dual) / primal to reach.
max_filters, max_rounds, time_limit : int, int, float; optional
    Budgets; the time in seconds, that of the certificate included.
random_state : int, RandomState instance or None
    Seeds the search for filters.

Attributes
----------
solution_ : Solution
    Parameters, history and status.
certificate_ : Certificate
    Objective, lower bound, `rel_gap` and `scope`: whether the gap is a proof.
beta_ : float
    The β trained with.
filters_, weights_, intercept_ : ndarray (m, r), (m, P, c), (c,)
    u_j, V_j and b. Filters live in the space of `solution_.embedding`; plain rows have r = n_features (+1 for the
    hidden bias)."""


class ConvexCNNClassifier(ClassifierMixin, _ConvexCNN):
    """Two-layer convolutional ReLU network, trained to the global optimum with a certificate.

        min  (1/n) Σ_i ℓ(f(x_i), y_i) + β Σ_j ‖V_j‖_F    over ‖u_j‖ = 1, any number of filters j,
        f(x_i) = Σ_j Σ_p Σ_k w_pk (x_ik·u_j)_+ V_j[p,:] + b      (c outputs, one a class; the largest wins)

    which is weight decay β on the network's weights under a mean-reduced loss. Scale the features.

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


class ConvexCNNRegressor(RegressorMixin, MultiOutputMixin, _ConvexCNN):
    """Two-layer convolutional ReLU network for real targets, trained to the global optimum with a certificate.

        min  (1/2n) Σ_i ‖f(x_i) - y_i‖² + β Σ_j ‖V_j‖_F    over ‖u_j‖ = 1, any number of filters j,
        f(x_i) = Σ_j Σ_p Σ_k w_pk (x_ik·u_j)_+ V_j[p,:] + b

    which is weight decay β on the network's weights under a mean-reduced loss. Scale the features.

    {parameters}
    n_features_in_ : int

    Examples
    --------
    >>> x = np.linspace(-2, 2, 41)[:, None]
    >>> model = ConvexCNNRegressor(random_state=0).fit(x, abs(x[:, 0]))
    >>> bool(model.score(x, abs(x[:, 0])) > 0.99), len(model.filters_), model.certificate_.scope
    (True, 2, 'global')
    """

    _checks_of_y = {"multi_output": True, "y_numeric": True}  # noqa: RUF012 - constant

    def _encode(self, y: np.ndarray) -> np.ndarray:
        if self.loss != "squared":
            raise InputError(f"loss must be 'squared' for regression; got {self.loss!r}")
        self._flat = y.ndim == 1
        return y.astype(np.float64)

    def predict(self, X: Any) -> np.ndarray:
        """f, shaped as `y` was: (n_samples,) or (n_samples, c)."""
        outputs = self._outputs(X)
        return outputs[:, 0] if self._flat else outputs


for _cls in (ConvexCNNClassifier, ConvexCNNRegressor):
    _cls.__doc__ = inspect.cleandoc(_cls.__doc__ or "").replace("{parameters}", _PARAMETERS)
