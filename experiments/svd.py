"""The soft-thresholded SVD on whitened patch features of MNIST and CIFAR-10, against SGD on the same objective.

    python experiments/svd.py --data-dir DIR

1,000 images, described by the pooled responses of 400 random patches (1,600 features): fewer images than features,
so that whitening makes XXᵀ ∝ I and the closed form is the proved optimum (Sahiner et al. 2021). SGD trains
the same two-layer network on the same features at a tuned rate; its excess over the optimum is therefore known. The
negative control leaves the features unwhitened: there the closed form is no bound. Writes
experiments/results/svd.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from convcvx.baseline import tune_rate
from convcvx.data.datasets import load
from convcvx.network.evaluate import accuracy, predict
from convcvx.network.two_layer import TwoLayerCNN
from convcvx.oracles import LocalOracle
from convcvx.patches import PatchSpec
from convcvx.problem import Problem
from convcvx.responses.passes import Responses
from convcvx.solvers.closed_form import analyse, closed_form, whitened
from convcvx.solvers.dictionary.filters import dictionary
from convcvx.training.functional import patches_to_images
from convcvx.training.plan import build_problem

RESULT = Path(__file__).parent / "results" / "svd.md"
N, N_TEST, PATCHES = 1000, 5000, 400
NEURONS, EPOCHS = 50, 100
RATIOS = (0.3, 0.1, 0.03)
"""β as shares of the one from which on the optimum is zero."""


def features(name: str, data_dir: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, y) to train on and (x, y) to test on; x (n, 4·PATCHES) are of mean square one."""
    train, test = load(name, data_dir, N)
    spec = PatchSpec((6, 6), contrast=0.01, whiten=0.1)
    responses = build_problem(train.images, train.targets, spec=spec, pooling="2").responses
    filters = dictionary(responses, PATCHES)
    x = responses.matrix(filters).flatten(1).double()
    other = Responses(test.images[:N_TEST], responses.embedding, responses.pooling, dtype=responses.dtype)
    scale = x.square().mean().sqrt()
    return x / scale, train.targets, other.matrix(filters).flatten(1).double() / scale, test.targets[:N_TEST]


def score(network: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    return accuracy(predict(network, patches_to_images(x).float()), y)


def rows(name: str, plain: Problem, x_test: Tensor, y_test: Tensor) -> list[str]:
    """A line of the table for each β."""
    began = perf_counter()
    problem = whitened(plain)
    whitening = perf_counter() - began
    largest = _beta_max(problem)
    lines = []
    for ratio in RATIOS:
        problem = problem.with_beta(ratio * largest)
        began = perf_counter()
        solution = closed_form(problem, LocalOracle())
        seconds = whitening + perf_counter() - began
        record = solution.history[-1]
        responses = problem.responses
        shape = (x_test.shape[1], 1, 1)
        network = TwoLayerCNN.from_solution(solution, responses.embedding, responses.pooling, shape, intercept=False)
        tried = tune_rate(problem, "sgd", NEURONS, epochs=EPOCHS)
        best = tried[0]
        lines.append(
            f"| {name} | {ratio:g} | {record['closed_form']['linear_is']} | {record['objective']:.6f} | "
            f"{record['rel_gap']:.0e} | {solution.n_filters} | {score(network, x_test, y_test):.2%} | {seconds:.1f} | "
            f"{best.objective:.6f} | {best.objective / record['lower_bound'] - 1:.2%} | "
            f"{score(best.twin.network(), x_test, y_test):.2%} | {best.seconds:.1f} | {best.rate:.2g} of {len(tried)} |"
        )
        print(lines[-1], flush=True)
    return lines


def _beta_max(problem: Problem) -> float:
    """From here on the closed form is zero: σ_max(X) σ_max(Y) / n."""
    responses = problem.responses
    x = responses.rows(slice(0, problem.n))[:, 0] @ responses.embedding.basis.T
    return float(torch.linalg.svdvals(x)[0] * torch.linalg.svdvals(problem.targets)[0]) / problem.n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    data_dir = parser.parse_args().data_dir
    lines = [
        "# Soft-thresholded SVD against SGD",
        "",
        f"`python experiments/svd.py`: {N:,} images, {4 * PATCHES:,} pooled patch features, whitened (XXᵀ ∝ I), "
        f"squared loss, no intercept; tested on {N_TEST:,}. SGD: {NEURONS} neurons, {EPOCHS} epochs of batch 64, "
        "cosine, the best of the rates tried; its seconds are those of one training.",
        "",
        "| data | β / β_max | closed form is | objective | gap | neurons | test | seconds | SGD objective | excess | "
        "test | seconds | rate |",
        "|---" * 13 + "|",
    ]
    notes = []
    for name in ("mnist", "cifar10"):
        x, y, x_test, y_test = features(name, data_dir)
        plain = build_problem(patches_to_images(x), y, 1.0, spec=PatchSpec((1, 1)), intercept=False, n_classes=10)
        lines += rows(name, plain, x_test, y_test)
        form = analyse(plain.with_beta(0.1), LocalOracle())
        notes.append(
            f"Negative control, {name} without whitening: isotropic {form.isotropic}, spike-free {form.spike_free}; "
            f"the closed form is {form.linear_is}."
        )
        RESULT.write_text("\n".join([*lines, "", *notes]) + "\n")
    print("\n".join(notes))


if __name__ == "__main__":
    main()
