"""Estimators that choose β by cross-validation, along a path of warm starts: one problem a fold, not one a β."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from inspect import Parameter
from typing import Any, Self

import numpy as np
from sklearn.base import is_classifier
from sklearn.metrics import check_scoring
from sklearn.model_selection import check_cv
from sklearn.utils import _safe_indexing

from convcvx.budget import Deadline
from convcvx.errors import GridWarning, InputError
from convcvx.estimator.base import PARAMETERS, ConvexCNN
from convcvx.estimator.declare import declare
from convcvx.estimator.models import ConvexCNNClassifier, ConvexCNNRegressor
from convcvx.problem import Problem
from convcvx.terms.status import Status
from convcvx.training.functional import checked_betas, path_betas
from convcvx.training.optimise import named_oracle
from convcvx.training.options import TrainConfig
from convcvx.training.plan import warn_short_of
from convcvx.units import Units

INSTEAD_OF_BETA = [
    Parameter(name, Parameter.KEYWORD_ONLY, default=default)
    for name, default in (("betas", None), ("n_betas", 10), ("ratio", 1e-3), ("cv", 5), ("scoring", None))
]
PATH_PARAMETERS = INSTEAD_OF_BETA + [p for p in PARAMETERS if p.name not in ("beta", "beta_ratio", "warm_start")]


class _AlongPath(ConvexCNN):
    """`fit` of an estimator that tries many β; a subclass names the one for a single β."""

    _single_class: type[ConvexCNN]
    beta = beta_ratio = None
    warm_start = False

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Score every β of the path on the folds, then train along the path on all of X as far as the best one.

        `sample_weight` (n_samples,) says what each sample counts for, in training and in the scores.

        Raises
        ------
        InputError
            For parameters out of range or that do not fit X, and scores that are no numbers at any β.

        Warns
        -----
        ConvergenceWarning
            When the certified gap of the last fit is above `tol`.
        GridWarning
            When the best β is the first or the last of the path, unless it is the first and has no filter: then a
            larger one has none either. And when no β of the path leaves a filter on any fold.
        """
        problem, units, config = self._problem(X, y, sample_weight)
        self.betas_ = self._path(problem, units, config)
        scorer = check_scoring(self, self.scoring)
        folds = list(check_cv(self.cv, y, classifier=is_classifier(self)).split(X, y))
        scored = [self._fold_scores(X, y, sample_weight, fold, scorer) for fold in folds]
        self.scores_ = np.array([scores for scores, _ in scored])
        best = _best(self.scores_.mean(axis=0))
        for _ in self._along(self, problem, units, config, self.betas_[: best + 1]):
            pass
        warn_short_of(self.certificate_, self.solution_, self.tol)
        if self.solution_.n_filters or any(n_filters for _, n_filters in scored):
            self._warn_at_edge(best)
        else:
            self._warn_of_no_filter()
        return self

    def _warn_at_edge(self, best: int) -> None:
        """Warn when the β chosen is at an end of the path, beyond which a better one may lie."""
        last = len(self.betas_) - 1
        if last == 0 or 0 < best < last or not self.solution_.n_filters:  # a larger β leaves as many: none
            return
        low = best == last
        remedy = f"a ratio below {self.ratio:g}" if low and self.betas is None else "betas that go on beyond it"
        end, beyond = ("smallest", "smaller") if low else ("largest", "larger")
        warnings.warn(
            f"the best beta, {self.betas_[best]:.3g}, is the {end} of the {last + 1} from {self.betas_[0]:.3g} to "
            f"{self.betas_[-1]:.3g}: a {beyond} one may score better; pass {remedy}",
            GridWarning,
            stacklevel=3,
        )

    def _warn_of_no_filter(self) -> None:
        """Warn when every network that was trained is a constant, so that all scores are those of a constant."""
        tried = f"of the {len(self.betas_)} from {self.betas_[0]:.3g} to {self.betas_[-1]:.3g}"
        if self.betas is None:
            remedy = f"a ratio below {self.ratio:g}; where that changes nothing, no filter explains these targets"
        else:
            remedy = "smaller betas, or leave betas out: the path then begins where the first filter comes in"
        warnings.warn(
            f"no beta {tried} leaves a filter, so that the model is a constant; pass {remedy}",
            GridWarning,
            stacklevel=3,
        )

    def _path(self, problem: Problem, units: Units, config: TrainConfig) -> np.ndarray:
        if self.betas is None:
            return np.array(
                path_betas(problem, units, named_oracle(config.oracle, config), config.seed, self.n_betas, self.ratio)
            )
        return np.sort(checked_betas(self.betas))[::-1]

    def _fold_scores(
        self, X: Any, y: Any, sample_weight: Any, fold: tuple[np.ndarray, np.ndarray], scorer: Any
    ) -> tuple[list[float], int]:
        """The score at each β of the path on one fold, and the number of filters at the last, which has the most."""
        train, test = fold
        model = self._single()
        seen, unseen = ([_safe_indexing(part, rows) for part in (X, y)] for rows in (train, test))
        weights = {}
        if sample_weight is not None:
            seen.append(_safe_indexing(sample_weight, train))
            weights = {"sample_weight": _safe_indexing(sample_weight, test)}
        parts = model._problem(*seen)
        scores = [float(scorer(model, *unseen, **weights)) for _ in self._along(model, *parts, self.betas_)]
        return scores, model.solution_.n_filters

    def _single(self) -> ConvexCNN:
        """The estimator for one β with these parameters."""
        single: Any = self._single_class
        known = single._get_param_names()
        return single(**{name: value for name, value in self.get_params(deep=False).items() if name in known})

    @staticmethod
    def _along(
        model: ConvexCNN, problem: Problem, units: Units, config: TrainConfig, betas: np.ndarray
    ) -> Iterator[None]:
        """Fit `model` at one β after the other, each from the solution before."""
        start = None
        for beta in betas:
            at_beta = replace(config, beta=units.reduced_beta(float(beta)), beta_ratio=None)
            in_time = problem.until(Deadline.after(config.time_limit))
            solution, certificate = model._trained(in_time, units, at_beta, start)
            model._keep(solution, certificate)
            yield
            start = replace(solution, history=[], rounds=0, status=Status.RUNNING, certificate=None)


def _best(scores: np.ndarray) -> int:
    """Where the largest of the mean scores is; what is no number, as R² of a single sample, is none."""
    known = np.isfinite(scores)
    if not known.any():
        raise InputError("scoring gave no number on the folds: pass another scoring or larger folds")
    return int(np.where(known, scores, -np.inf).argmax())


class ConvexCNNClassifierCV(_AlongPath, ConvexCNNClassifier):
    """`ConvexCNNClassifier` at the β with the best cross-validated score on a path, each fit started from the last.

    {parameters}
    betas_ : ndarray (n_betas,)
        The path, decreasing.
    scores_ : ndarray (n_folds, n_betas)

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> model = ConvexCNNClassifierCV(n_betas=3, ratio=0.01, cv=3, hidden_bias=True, random_state=0).fit(X - 3, y)
    >>> model.scores_.shape, bool(model.score(X - 3, y) > 0.9)
    ((3, 3), True)
    """

    _single_class = ConvexCNNClassifier


class ConvexCNNRegressorCV(_AlongPath, ConvexCNNRegressor):
    """`ConvexCNNRegressor` at the β with the best cross-validated score on a path, each fit started from the last.

    {parameters}
    betas_ : ndarray (n_betas,)
        The path, decreasing.
    scores_ : ndarray (n_folds, n_betas)

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).uniform(-2, 2, size=(40, 1))
    >>> model = ConvexCNNRegressorCV(n_betas=4, cv=3, random_state=0).fit(x, abs(x[:, 0]))
    >>> bool(model.score(x, abs(x[:, 0])) > 0.99)
    True
    """

    _single_class = ConvexCNNRegressor


declare(ConvexCNNClassifierCV, PATH_PARAMETERS)
declare(ConvexCNNRegressorCV, [p for p in PATH_PARAMETERS if p.name != "class_weight"])
