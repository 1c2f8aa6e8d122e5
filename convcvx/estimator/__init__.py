"""scikit-learn estimators: `fit` trains to the global optimum and keeps the certificate."""

from convcvx.estimator.along_path import ConvexCNNClassifierCV, ConvexCNNRegressorCV
from convcvx.estimator.models import ConvexCNNClassifier, ConvexCNNRegressor

__all__ = ["ConvexCNNClassifier", "ConvexCNNClassifierCV", "ConvexCNNRegressor", "ConvexCNNRegressorCV"]
