"""Several labels a sample in the classifier, as scikit-learn has them: each column is a problem of two classes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.metrics import accuracy_score

import convcvx
from convcvx import ConvexCNNClassifier, ConvexCNNClassifierCV
from convcvx.errors import GridWarning, InputError

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(40, 2))
Y = np.stack([X[:, 0] > 0, X[:, 1] > 0, X.sum(axis=1) > 0], axis=1).astype(int)
OPTIONS = {"loss": "bce", "beta": 0.02, "tol": 0.05, "random_state": 0}


def test_labels_are_learnt_told_and_scored_as_scikit_learn_does():
    model = ConvexCNNClassifier(**OPTIONS).fit(X, Y)
    found = model.predict(X)
    assert found.shape == Y.shape
    assert model.score(X, Y) == accuracy_score(Y, found) > 0.8
    np.testing.assert_array_equal(found, model.predict_proba(X) > 0.5)
    np.testing.assert_array_equal(found, model.decision_function(X) > 0)
    assert model.classes_.tolist() == [0, 1, 2]
    solved = convcvx.solve(X, Y.astype(float), 0.02, loss="bce", tol=0.05)
    assert model.certificate_.primal == pytest.approx(solved.certificate.primal, rel=0.05)
    again = ConvexCNNClassifier(**OPTIONS).fit(X, csr_array(Y))
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    pair = ConvexCNNClassifier(**OPTIONS).fit(X, Y[:, :2])  # no two classes
    assert pair.decision_function(X).shape == pair.predict(X).shape == (40, 2)


def test_labels_along_a_path():
    options = {name: value for name, value in OPTIONS.items() if name != "beta"}
    with pytest.warns(GridWarning, match="of the 2"):  # of two one is always at an end
        model = ConvexCNNClassifierCV(**options, betas=[0.1, 0.05], cv=2).fit(X, Y)
    assert model.scores_.shape == (2, 2)
    assert model.score(X, Y) > 0.5


def test_labels_need_their_loss_and_zeros_and_ones():
    for y, options in ((Y, {}), (2 * Y, OPTIONS), (Y, OPTIONS | {"class_weight": "balanced"})):
        with pytest.raises(InputError, match=r"loss=.bce|loss=.squared|not real targets"):
            ConvexCNNClassifier(**options).fit(X, y)
    with pytest.warns(match="column-vector"):
        column = ConvexCNNClassifier(beta=0.1, tol=0.1, random_state=0).fit(X, Y[:, :1])
    assert column.predict(X).shape == (40,)
