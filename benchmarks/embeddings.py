"""Heads on frozen features: the convex one against logistic regression, multilayer perceptrons and CRONOS, in one run.

    python benchmarks/embeddings.py [--data-dir ../shared/data] [--set mnist] [--features 512] [--images 3000]
        [--jaxcld FOLDER]

No pretrained weights are used: the features are those of one layer of random 6x6 convolutions, rectified and averaged
over 2x2 cells, standardised; the heads get nothing else. Weight decays are chosen on a fifth of the training images,
which no fit has seen; with it each head is trained on all of them, and scored once on the test images. CPU seconds are
of the last training alone, without those of the choice; memory is the peak of the process, one for each method. CRONOS
is that of `jaxcld` (pip install --no-deps jaxcld, and jax), left out without it. Writes
benchmarks/results/embeddings.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from machine import machine

import convcvx
from convcvx.data.datasets import load
from convcvx.training.progress import peak_memory_mb

RESULTS = Path(__file__).parent / "results" / "embeddings.md"
RATIOS = (0.3, 0.1, 0.03)
"""Weight decays of the convex head, as shares of beta_max."""
DECAYS = (1e-4, 1e-3, 1e-2)
"""Weight decays of the others."""
HELD = 5
"""One in so many training images is held out to choose the weight decay."""
COMPONENTS = 16
"""Principal directions of the features that the convex head of low rank sees."""
NEURONS = 32
"""Hidden neurons of perceptrons, and activation patterns of CRONOS."""
TIME_LIMIT = 20.0
"""Seconds of a training of the convex head, its certificate included."""

Rows = np.ndarray
Scores = Callable[[Rows], np.ndarray]
"""Outputs (n, c) of a trained head for features (n, d)."""


def features(name: str, data_dir: str | None, n_images: int, size: int) -> tuple[Rows, Rows, Rows, Rows]:
    """Standardised features and classes, for training and for the test."""
    kernels = torch.randn(size // 4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    kernels = kernels / kernels.flatten(1).norm(dim=1)[:, None, None, None]

    def of(images: torch.Tensor) -> Rows:
        parts = [
            F.adaptive_avg_pool2d(F.relu(F.conv2d(part.float().expand(-1, 3, -1, -1), kernels)), 2).flatten(1)
            for part in images.split(500)
        ]
        return torch.cat(parts).numpy().astype(np.float64)

    train, test = load(name, data_dir, n_images)
    x, x_test = of(train.images[:]), of(test.images[: 2 * n_images])
    mean, spread = x.mean(axis=0), x.std(axis=0) + 1e-6
    standard = [(part - mean) / spread for part in (x, x_test)]
    return standard[0], train.targets.numpy(), standard[1], test.targets[: 2 * n_images].numpy()


def convex(x: Rows, y: Rows, ratio: float, rank: int | None = None) -> tuple[Scores, dict[str, Any]]:
    fit = convcvx.fit(
        x[:, :, None, None].astype(np.float32),
        y,
        **{"kernel_size": 1, "rank": rank, "hidden_bias": True, "beta_ratio": ratio, "tol": 0.02},
        time_limit=TIME_LIMIT,
    )
    certificate = fit.certificate

    def scores(rows: Rows) -> np.ndarray:
        with torch.no_grad():
            return fit.network(torch.as_tensor(rows[:, :, None, None], dtype=torch.float32)).numpy()

    proved = certificate.dual if certificate.scope == "global" else certificate.proved
    told = {"objective": certificate.primal, "bound": certificate.dual, "scope": str(certificate.scope)}
    return scores, told | {"proved": proved, "neurons": fit.solution.n_filters}


def convex_of_rank(x: Rows, y: Rows, ratio: float) -> tuple[Scores, dict[str, Any]]:
    return convex(x, y, ratio, COMPONENTS)


def logistic(x: Rows, y: Rows, decay: float) -> tuple[Scores, dict[str, Any]]:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / (decay * len(x)), max_iter=500).fit(x, y)
    return model.decision_function, {}


def perceptron(x: Rows, y: Rows, decay: float) -> tuple[Scores, dict[str, Any]]:
    from sklearn.neural_network import MLPClassifier

    model = MLPClassifier(hidden_layer_sizes=(NEURONS,), alpha=decay, max_iter=200, random_state=0).fit(x, y)
    return model.predict_log_proba, {"neurons": NEURONS}


def regressor(x: Rows, y: Rows, decay: float) -> tuple[Scores, dict[str, Any]]:
    from sklearn.neural_network import MLPRegressor

    model = MLPRegressor(hidden_layer_sizes=(NEURONS,), alpha=decay, max_iter=200, random_state=0).fit(
        x, np.eye(y.max() + 1)[y]
    )
    return model.predict, {"neurons": NEURONS}


def cronos(x: Rows, y: Rows, decay: float) -> tuple[Scores, dict[str, Any]]:
    import jax
    from jaxcld.models.cvx_relu_mlp import CVX_ReLU_MLP
    from jaxcld.optimizers.admm import admm

    model = CVX_ReLU_MLP(
        jax.numpy.asarray(x), jax.numpy.asarray(y), int(y.max()) + 1, NEURONS, decay, 0.1, jax.random.PRNGKey(0)
    )
    model.init_model()
    steps = {"rank": 20, "beta": decay, "gamma_ratio": 1, "admm_iters": 40, "pcg_iters": 16, "check_opt": False}
    admm(model, steps)
    weights = model.theta1, model.theta2
    return lambda rows: np.asarray(model.stacked_predict(jax.numpy.asarray(rows), *weights)), {}


METHODS: dict[str, tuple[Callable[..., tuple[Scores, dict[str, Any]]], tuple[float, ...]]] = {
    "convcvx, all directions": (convex, RATIOS),
    f"convcvx, rank {COMPONENTS}": (convex_of_rank, RATIOS),
    "LogisticRegression": (logistic, DECAYS),
    f"MLPClassifier, {NEURONS} neurons": (perceptron, DECAYS),
    f"MLPRegressor, {NEURONS} neurons": (regressor, DECAYS),
    "CRONOS (jaxcld)": (cronos, DECAYS),
}


def accuracy(scores: np.ndarray, y: Rows) -> float:
    return float((scores.argmax(axis=1) == y).mean())


def measured(name: str, data: tuple[Rows, Rows, Rows, Rows]) -> dict[str, Any]:
    """One method: its weight decay chosen, then trained on all training images."""
    train, decays = METHODS[name]
    x, y, x_test, y_test = data
    held = np.arange(len(x)) % HELD == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {decay: accuracy(train(x[~held], y[~held], decay)[0](x[held]), y[held]) for decay in decays}
        best = max(found, key=lambda decay: found[decay])
        began = process_time()
        scores, told = train(x, y, best)
        seconds = process_time() - began
    return {
        "decay": best,
        "held_out": found[best],
        "test": accuracy(scores(x_test), y_test),
        "seconds": seconds,
        "memory": peak_memory_mb() or 0.0,
    } | told


def table(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        "# Heads on frozen features",
        "",
        f"`python benchmarks/embeddings.py --set {options.set} --features {options.features} --images "
        f"{options.images}`: features of random convolutions; rows of {options.set}; "
        f"{machine()}. Objectives are those of each method's own problem; the convex one's is ½‖f - y‖² with weight "
        "decay, bounded below by the certificate of its row, and a proof where it says so.",
        "",
        "| head | weight decay | held-out | test | neurons | objective | lower bound | CPU s | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        if "missing" in row:
            lines.append(f"| {name} | left out: {row['missing']} | | | | | | | |")
            continue
        bound = f"{row['bound']:.5f} ({row['scope']})" if "bound" in row else "none"
        if row.get("proved") is not None and row["scope"] != "global":
            bound += f", proved {row['proved']:.5f}"
        objective = f"{row['objective']:.5f}" if "objective" in row else ""
        lines.append(
            f"| {name} | {row['decay']:g} | {row['held_out']:.2%} | {row['test']:.2%} | {row.get('neurons', '')} | "
            f"{objective} | {bound} | {row['seconds']:.1f} | {row['memory']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--set", default="mnist")
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--jaxcld", help="a folder that holds jaxcld and jax, where they are not installed")
    parser.add_argument("--method", choices=METHODS, help="measure one method and print JSON")
    options = parser.parse_args()
    if options.method:
        sys.path += [options.jaxcld] if options.jaxcld else []
        data = features(options.set, options.data_dir, options.images, options.features)
        try:
            print(json.dumps(measured(options.method, data)))
        except ImportError as error:
            print(json.dumps({"missing": str(error)}))
        return
    found = {}
    for name in METHODS:
        command = [sys.executable, *sys.argv, "--method", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], flush=True)
    text = table(found, options)
    print(text)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
