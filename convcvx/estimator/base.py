"""What the estimators share: their parameters, which are the options of `convcvx.fit`, training, and outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from inspect import Parameter
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from convcvx.activations import Activation
from convcvx.budget import Deadline, clock
from convcvx.certificate import Certificate
from convcvx.data.arrays import as_tensor
from convcvx.data.augment import shifted
from convcvx.data.checks import warn_of_lost_digits
from convcvx.data.datasets import Dataset
from convcvx.data.weights import read_weights, with_class_weight
from convcvx.errors import InputError, check_positive, is_count
from convcvx.machine.devices import pick_device
from convcvx.network.two_layer import TwoLayerCNN
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.solution import Solution
from convcvx.terms.status import Status
from convcvx.training.functional import patches_to_images, train
from convcvx.training.option import parameters
from convcvx.training.options import TrainConfig
from convcvx.training.plan import build_problem, warn_short_of
from convcvx.training.progress import reported
from convcvx.units import Units

DTYPES = (np.float64, np.float32)
"""Types that samples keep; others become the first."""
ON_IMAGES: dict[str, Any] = {
    **{"kernel_size": None, "stride": 1, "padding": 0, "dilation": 1, "pool": None},
    **{"flips": False, "shifts": 0},
}
"""Parameters that mean nothing for plain data, and their defaults."""
USUAL: dict[str, Any] = {"beta_ratio": 0.01, "tol": 1e-2, "device": "cpu", **ON_IMAGES}
"""Defaults of the estimators where they are not those of `fit`: scores hardly move beyond; arrays are on the CPU."""
NOT_HERE = ("limit", "validation", "seed")
"""Options of `fit` that scikit-learn has other means for."""
ESTIMATORS_ONLY = [
    Parameter(name, Parameter.KEYWORD_ONLY, default=default)
    for name, default in (("image_shape", None), ("random_state", None), ("warm_start", False), ("verbose", False))
]
PARAMETERS = [p for p in parameters(TrainConfig, **USUAL) if p.name not in NOT_HERE] + ESTIMATORS_ONLY


class ConvexCNN(TransformerMixin, BaseEstimator):
    """Parameters, training and outputs; a subclass says how it reads `y` and what it makes of the outputs."""

    _checks_of_y: dict[str, Any] = {}  # noqa: RUF012 - constant
    class_weight = None
    solution_: Solution
    certificate_: Certificate

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the parameters

    def _encode(self, y: np.ndarray) -> np.ndarray:  # `y` as the targets of a `Problem`
        raise NotImplementedError

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train on X, rows (n_samples, n_features) or images (n_samples, C, H, W), and y.

        `sample_weight` (n_samples,) says what each sample counts for: 2 is worth it twice, 0 leaves it out.

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
        problem, units, config = self._problem(X, y, sample_weight)
        self._keep(*self._trained(problem, units, config, self._start(problem)))
        warn_short_of(self.certificate_, self.solution_, self.tol)
        return self

    def _problem(self, X: Any, y: Any, sample_weight: Any = None) -> tuple[Problem, Units, TrainConfig]:
        """The training problem in units, to be solved by the deadline, its β still open but for what `config` says."""
        began = clock()
        self.image_shape_ = self._shape_of(X)
        X, y = validate_data(self, _as_rows(X), y, dtype=DTYPES, **self._checks_of_y)
        weights = None if sample_weight is None else read_weights(sample_weight, len(X))
        if weights is not None:
            X, y, weights = X[weights > 0], y[weights > 0], weights[weights > 0]
        targets = torch.as_tensor(self._encode(y))
        config = self._config()
        deadline = Deadline.after(config.budget.time_limit, spent=clock() - began)
        classes = [str(name) for name in self.__dict__.get("classes_", ())]
        weights = with_class_weight(weights, config.class_weight, targets, classes)
        data = Dataset(self._images(X), targets, (), "X", weights)
        if config.shifts:
            data = shifted(data, config.shifts)
        warn_of_lost_digits("X", data.images, as_tensor("X", X[:1]).dtype)
        spec = config.patch_spec()
        units = Units.of(data.images, data.targets, config.loss, spec, Activation.of(config.activation))
        problem = build_problem(
            units.reduced("images", data.images),
            units.reduced("targets", data.targets),
            spec=spec,
            pooling=self.pool,
            activation=config.activation,
            loss=config.loss,
            intercept=config.intercept,
            device=pick_device(config.device),
            flips=config.flips,
            sample_weight=data.weights,
        )
        if config.beta is not None:
            config = replace(config, beta=units.reduced_beta(config.beta), beta_ratio=None)
        return problem.until(deadline), units, config

    def _config(self) -> TrainConfig:
        """The parameters as options; `pool` stands apart, as it may be a matrix."""
        given = {p.name: getattr(self, p.name) for p in PARAMETERS if p not in ESTIMATORS_ONLY and p.name != "pool"}
        if self.image_shape_ is None:
            if names := [k for k, value in ON_IMAGES.items() if not np.array_equal(getattr(self, k), value)]:
                need = f"{' and '.join(names)} need{'s' if len(names) == 1 else ''}"
                raise InputError(f"{need} images; pass image_shape=(channels, height, width), or 4-D X")
            given["kernel_size"] = 1
        elif given["kernel_size"] is None:
            given["kernel_size"] = 3
        given["seed"] = check_random_state(self.random_state).randint(np.iinfo(np.int32).max - 1)
        for name in ("whiten", "contrast"):
            given[name] = given[name] or False
        if given["beta"] is None and given["beta_ratio"] is not None:
            check_positive("beta_ratio", given["beta_ratio"])
        elif given["beta"] is not None:
            given |= {"beta_ratio": None, "beta": check_positive("beta", given["beta"])}
        config = TrainConfig.of(given)
        config.check()
        return config

    def _trained(
        self, problem: Problem, units: Units, config: TrainConfig, start: Solution | None = None
    ) -> tuple[Solution, Certificate]:
        with reported(self.verbose, config.tol) as report:
            return train(problem, units, config, config.oracle, start, report=report)

    def _keep(self, solution: Solution, certificate: Certificate) -> None:
        self.solution_, self.certificate_ = solution, certificate
        self.beta_ = certificate.beta
        self.filters_ = solution.filters.numpy()
        self.weights_ = solution.weights.numpy()
        self.intercept_ = solution.intercept.numpy()

    def _start(self, problem: Problem) -> Solution | None:
        """With `warm_start` the solution of the fit before, its filters in the space of this `problem`."""
        before = self.__dict__.get("solution_") if self.warm_start else None
        if before is None or before.embedding is None:
            return None
        space = problem.responses.embedding
        if not before.embedding.same_space(space):
            kernels = space.filters(*before.embedding.kernels(before.activation.kernels(before.filters)))
            filters = before.activation.filters(kernels)
            before = before.with_parameters(filters, before.weights, before.intercept)
        return replace(before, history=[], rounds=0, status=Status.RUNNING, certificate=None, dual_point=None)

    def to_network(self) -> TwoLayerCNN:
        """The fitted network as a torch module; it takes images (n, C, H, W), plain data as (n, n_features, 1, 1)."""
        check_is_fitted(self)
        shape = self.image_shape_ or (self.n_features_in_, 1, 1)
        solution = self.solution_
        assert solution.embedding is not None
        assert solution.pooling is not None
        how: dict[str, Any] = {"intercept": self.intercept, "activation": solution.activation}
        return TwoLayerCNN.from_solution(solution, solution.embedding, solution.pooling, shape, **how)

    def transform(self, X: Any) -> np.ndarray:
        """The features that the linear head sees: pooled responses (n_samples, n_filters * cells), filter by filter.

        As images for another layer: `.reshape(n_samples, n_filters, rows, columns)` of the pooled map.
        """
        features = self._responses(X).matrix(self.solution_.filters)
        return features.flatten(1).double().cpu().numpy()

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """The names of what `transform` gives: filter and cell."""
        check_is_fitted(self)
        m, cells, _ = self.weights_.shape
        return np.array([f"filter{j}_cell{p}" for j in range(m) for p in range(cells)], dtype=object)

    def _outputs(self, X: Any) -> np.ndarray:
        """f (n_samples, c) float64."""
        responses, solution = self._responses(X), self.solution_
        return responses.predict(solution.filters, solution.weights, solution.intercept).numpy()

    def _responses(self, X: Any) -> Responses:
        """Of the fitted network to X, in float64."""
        check_is_fitted(self)
        if _dimensions(X) > 2 and (shape := self._shape_of(X)) != self.image_shape_:
            raise InputError(f"X must be images of shape {self.image_shape_}, as in fit; got {shape}")
        rows = validate_data(self, _as_rows(X), dtype=DTYPES, reset=False)
        solution = self.solution_
        assert solution.embedding is not None
        assert solution.pooling is not None
        how: dict[str, Any] = {"dtype": torch.float64, "activation": solution.activation}
        return Responses(self._images(rows), solution.embedding, solution.pooling, **how)

    def _images(self, rows: np.ndarray) -> Tensor:
        """(n, C, H, W) images of checked rows."""
        tensor = torch.from_numpy(np.require(rows, requirements=["C", "W"]))  # torch warns of read-only arrays
        if self.image_shape_ is None:
            return patches_to_images(tensor)
        if (needed := math.prod(self.image_shape_)) != rows.shape[1]:
            raise InputError(f"image_shape={self.image_shape_} needs X with {needed} columns; got {rows.shape[1]}")
        return tensor.unflatten(1, self.image_shape_)

    def _shape_of(self, X: Any) -> tuple[int, int, int] | None:
        """Channels, height and width of the images that X are; None for plain rows."""
        shape = None if self.image_shape is None else self._image_shape()
        if (ndim := _dimensions(X)) > 2:
            own = np.shape(X)[1:] if ndim == 4 else (1, *np.shape(X)[1:])
            if len(own) != 3 or shape not in (None, own):
                expected = "(n, d), (n, H, W) or (n, C, H, W)" if shape is None else f"rows or images {shape}"
                raise InputError(f"X must be {expected}; got shape {np.shape(X)}")
            return int(own[0]), int(own[1]), int(own[2])
        if shape is not None and shape[2] in (1, 3, 4) and shape[0] > shape[2]:
            raise InputError(
                f"image_shape={shape} seems to be (height, width, channels): pass ({shape[2]}, {shape[0]}, {shape[1]}) "
                "and rows of images.transpose(0, 3, 1, 2); signals are (channels, 1, length)"
            )
        return shape

    def _image_shape(self) -> tuple[int, int, int]:
        """`image_shape`, a sequence or an array, in whole numbers."""
        shape = self.image_shape
        sizes = tuple(shape) if isinstance(shape, Iterable) else ()
        if len(sizes) != 3 or not all(map(is_count, sizes)):
            raise InputError(f"image_shape must be (channels, height, width), whole numbers >= 1; got {shape!r}")
        return int(sizes[0]), int(sizes[1]), int(sizes[2])


def _as_rows(X: Any) -> Any:
    """Images as flattened rows; what is none as it is."""
    return np.asarray(X).reshape(len(X), -1) if _dimensions(X) > 2 else X


def _dimensions(X: Any) -> int:
    """Axes of X; 2 of what scikit-learn has yet to make an array of."""
    return np.ndim(X) if isinstance(X, list | tuple) else getattr(X, "ndim", 2)
