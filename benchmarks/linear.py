"""Test accuracy of a linear classifier on raw pixels: what a convolutional layer has to beat.

python benchmarks/linear.py --data cifar10 --limit 5000
"""

from __future__ import annotations

import argparse

import numpy as np
from sklearn.linear_model import RidgeClassifierCV

from convcvx.data.datasets import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    train, test = load(arguments.data, arguments.data_dir, arguments.limit)
    ridge = RidgeClassifierCV(alphas=np.logspace(0, 4, 9)).fit(train.images.flatten(1).numpy(), train.targets.numpy())
    score = ridge.score(test.images.flatten(1).numpy(), test.targets.numpy())
    print(f"ridge classifier on raw pixels, penalty {ridge.alpha_:g} by cross-validation: test accuracy {score:.4f}")


if __name__ == "__main__":
    main()
