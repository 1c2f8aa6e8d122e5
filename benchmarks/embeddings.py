"""Heads on frozen features: the convex one against logistic regression, multilayer perceptrons and CRONOS, in one run.

    python benchmarks/embeddings.py [--data-dir ../shared/data] [--runs mnist:random:512,docstrings:text:256,...]
        [--images 2000] [--time-limit SECONDS] [--jaxcld FOLDER]

A run is a data set, a kind of features and how many: `random`, one layer of random 6x6 convolutions, rectified and
averaged over 2x2 cells; `stack`, the last layer of a stack of ours, trained on other images of the set and averaged
over 4x4 cells; `text`, the first singular vectors of scikit-learn's TF-IDF matrix (latent semantic analysis) of the
docstrings of packages that convcvx needs, without these packages' names; the class is the package. (Weights of
torchvision's networks are a download, which the machine of these tables cannot make.) The features are standardised,
and the heads get nothing else. Weight decays are chosen on a fifth of the training rows, which no fit has seen: from
three on, and as long as the best is the first or last one tried the grid is widened. Each head is then trained on all
rows, and scored once on the test rows. CPU seconds are of that last training; memory is the peak of a process that does
nothing else. CRONOS is that of `jaxcld` (pip install --no-deps jaxcld, and jax), left out without it.
Each run writes its own section of benchmarks/results/embeddings.md.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np
import torch
from machine import machine, write_section
from torch import nn

import convcvx
from convcvx.data.datasets import load
from convcvx.training.progress import peak_memory_mb

RESULTS = Path(__file__).parent / "results" / "embeddings.md"
RATIOS = (0.3, 0.1, 0.03)
"""Weight decays of the convex head, as shares of beta_max."""
DECAYS = (1e-2, 1e-3, 1e-4)
"""Weight decays of the others."""
WIDENED = 4
"""Weight decays at most by which a grid whose best is at its edge is widened, each as far from the last one as that
from its neighbour."""
KINDS = {
    "random": "random convolutions",
    "stack": "a stack of ours, trained on other images",
    "text": "latent semantic analysis",
}
"""What the kinds of features are, in words."""
CELLS = {"random": 2, "stack": 4}
"""Cells on a side that features are averaged over, by their kind: each filter makes as many features as cells."""
HELD = 5
"""One in so many training images is held out to choose the weight decay."""
COMPONENTS = 16
"""Principal directions of the features that the convex head of low rank sees."""
NEURONS = 32
"""Hidden neurons of perceptrons, and activation patterns of CRONOS."""
STACK: dict[str, Any] = {"stages": 2, "kernel_size": 5, "tol": 1.0, "max_rounds": 0, "tune": 0.1, "seed": 0}
"""How the stack is trained whose last layer makes features."""
PACKAGES = ("numpy", "scipy", "sklearn", "torch", "sympy", "networkx", "numba", "cvxpy")
"""Classes of texts: where a docstring stands."""
WORDS = 20
"""Of a docstring at least: what is shorter says nothing of its package."""
Rows = np.ndarray
Scores = Callable[[Rows], np.ndarray]
"""Outputs (n, c) of a trained head for features (n, d)."""
Train = Callable[..., tuple[Scores, dict[str, Any]]]
"""Rows, classes and a weight decay to such outputs, and what else is to be told."""


def random_layer(m: int) -> nn.Module:
    convolution = nn.Conv2d(3, m, 6, bias=False)
    kernels = torch.randn(m, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    convolution.weight.data = kernels / kernels.flatten(1).norm(dim=1)[:, None, None, None]
    return nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(CELLS["random"]), nn.Flatten())


def trained_stack(images: torch.Tensor, targets: torch.Tensor, m: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", convcvx.errors.ConvergenceWarning)
        fit = convcvx.fit_stack(images, targets, **STACK, dictionary=m, pool=str(CELLS["stack"]))
    return fit.network.sequential()[:-1].eval()


def docstrings(package: str) -> list[str]:
    """Of functions and classes of a package, each once, without the names of packages; nothing is imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    root, found = Path(spec.origin).parent, set()
    for path in root.rglob("*.py"):
        if "test" not in str(path.relative_to(root)):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace")))
            kinds = (ast.FunctionDef, ast.ClassDef)
            found |= {ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)}
    names = re.compile("|".join((*PACKAGES, "scikit", "pytorch", r"\bnp\b", r"\bnx\b", r"\bcp\b")), re.IGNORECASE)
    return [names.sub(" ", text) for text in sorted(found) if len(text.split()) >= WORDS]


def of_texts(size: int, n_texts: int) -> dict[str, Rows]:
    """So many rows to train on and for the test, as many of each class; words are weighed by the former alone."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline

    random, each = np.random.default_rng(0), 2 * n_texts // len(PACKAGES)
    drawn = [random.permutation(np.array(docstrings(package), dtype=object))[:each] for package in PACKAGES]
    order = random.permutation(sum(map(len, drawn)))
    texts, y = np.concatenate(drawn)[order], np.repeat(np.arange(len(PACKAGES)), [len(own) for own in drawn])[order]
    words = make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=2), TruncatedSVD(size, random_state=0))
    x, x_test = words.fit_transform(texts[:n_texts]), words.transform(texts[n_texts:])
    return standardised(x, y[:n_texts], x_test, y[n_texts:])


def standardised(x: Rows, y: Rows, x_test: Rows, y_test: Rows) -> dict[str, Rows]:
    mean, spread = x.mean(axis=0), x.std(axis=0) + 1e-6
    return {"x": (x - mean) / spread, "y": y, "x_test": (x_test - mean) / spread, "y_test": y_test}


def features(name: str, kind: str, size: int, data_dir: str | None, n_images: int) -> dict[str, Rows]:
    """Standardised features and classes, for training and for the test."""
    if kind == "text":
        return of_texts(size, n_images)
    train, test = load(name, data_dir, 2 * n_images)
    images, others = (part.float() for part in train.images[:].split(n_images))
    m = size // CELLS[kind] ** 2
    if kind == "random":
        layer = random_layer(m)
        images, unseen = (part.expand(-1, 3, -1, -1) for part in (images, test.images[: 2 * n_images].float()))
    else:
        layer, unseen = trained_stack(others, train.targets[n_images:], m), test.images[: 2 * n_images].float()
    with torch.no_grad():
        x, x_test = (
            torch.cat([layer(part) for part in every.split(250)]).numpy().astype(np.float64)
            for every in (images, unseen)
        )
    return standardised(x, train.targets[:n_images].numpy(), x_test, test.targets[: 2 * n_images].numpy())


def convex(
    x: Rows, y: Rows, ratio: float, rank: int | None = None, time_limit: float | None = None
) -> tuple[Scores, dict[str, Any]]:
    fit = convcvx.fit(
        x[:, :, None, None].astype(np.float32),
        y,
        **{"kernel_size": 1, "rank": rank, "hidden_bias": True, "beta_ratio": ratio, "tol": 0.02},
        time_limit=time_limit,
    )
    certificate = fit.certificate

    def scores(rows: Rows) -> np.ndarray:
        with torch.no_grad():
            return fit.network(torch.as_tensor(rows[:, :, None, None], dtype=torch.float32)).numpy()

    proved = certificate.dual if certificate.scope == "global" else certificate.proved
    told = {"objective": certificate.primal, "bound": certificate.dual, "scope": str(certificate.scope)}
    return scores, told | {"proved": proved, "neurons": fit.solution.n_filters}


def convex_of_rank(x: Rows, y: Rows, ratio: float, **limits: Any) -> tuple[Scores, dict[str, Any]]:
    return convex(x, y, ratio, COMPONENTS, **limits)


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


METHODS: dict[str, tuple[Train, tuple[float, ...]]] = {
    "convcvx, all directions": (convex, RATIOS),
    f"convcvx, rank {COMPONENTS}": (convex_of_rank, RATIOS),
    "LogisticRegression": (logistic, DECAYS),
    f"MLPClassifier, {NEURONS} neurons": (perceptron, DECAYS),
    f"MLPRegressor, {NEURONS} neurons": (regressor, DECAYS),
    "CRONOS (jaxcld)": (cronos, DECAYS),
}


def accuracy(scores: np.ndarray, y: Rows) -> float:
    return float((scores.argmax(axis=1) == y).mean())


def chosen(train: Train, x: Rows, y: Rows, decays: tuple[float, ...]) -> tuple[float, dict[float, float]]:
    """The weight decay that is best on held-out rows, the largest of the best; and what was tried, with accuracies."""
    held = np.arange(len(x)) % HELD == 0
    found: dict[float, float] = {}
    wanted = list(decays)
    while wanted:
        for decay in wanted:
            found[decay] = accuracy(train(x[~held], y[~held], decay)[0](x[held]), y[held])
        tried = sorted(found, reverse=True)
        best = max(tried, key=lambda decay: found[decay])
        wanted = []
        if len(found) < len(decays) + WIDENED and best in (tried[0], tried[-1]):
            neighbour = tried[1] if best == tried[0] else tried[-2]
            further = best * best / neighbour
            wanted = [further] if decays is not RATIOS or further < 1 else []
    return best, found


def measured(name: str, data: dict[str, Rows], time_limit: float) -> dict[str, Any]:
    """One method: its weight decay chosen, then trained on all training rows; a convex head within the time limit."""
    train, decays = METHODS[name]
    if train in (convex, convex_of_rank):
        train = partial(train, time_limit=time_limit)
    x, y = data["x"], data["y"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best, found = chosen(train, x, y, decays)
        began = process_time()
        scores, told = train(x, y, best)
        seconds = process_time() - began
    return {
        "decay": best,
        "held_out": found[best],
        "edge": best in (min(found), max(found)),
        "test": accuracy(scores(data["x_test"]), data["y_test"]),
        "seconds": seconds,
        "memory": peak_memory_mb() or 0.0,
    } | told


HEAD = f"""# Heads on frozen features

Weight decays are chosen on held-out rows, of a grid that is widened where its best is at its edge; `edge`
marks one that still is after {WIDENED} more. Objectives are those of the convex head's own problem,
½‖f - y‖² with weight decay; its bound is the certificate's, and a proof where it says so. No pretrained
network is among the features: their weights could not be downloaded here."""


def section(run: str, found: dict[str, dict[str, Any]], data: dict[str, Rows], time_limit: float) -> str:
    name, kind, _ = run.split(":")
    command = f"python benchmarks/embeddings.py --runs {run} --images {len(data['x'])} --time-limit {time_limit:g}"
    lines = [
        f"## {name}, {data['x'].shape[1]} features of {KINDS[kind]}",
        "",
        f"`{command}` on {machine()}.",
        f"{len(data['x']):,} rows to train on, {len(data['x_test']):,} test rows.",
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
        cells = [
            name,
            f"{row['decay']:.3g}{' (edge)' * row['edge']}",
            f"{row['held_out']:.2%}",
            f"{row['test']:.2%}",
            str(row.get("neurons", "")),
            objective,
            bound,
            f"{row['seconds']:.1f}",
            f"{row['memory']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--runs", default="mnist:random:512,cifar10:random:512,mnist:stack:512,mnist:random:4096")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds of a training of the convex head")
    parser.add_argument("--jaxcld", help="a folder that holds jaxcld and jax, where they are not installed")
    parser.add_argument("--method", choices=METHODS, help="measure one method on --rows and print JSON")
    parser.add_argument("--rows", help="a file with features and classes")
    options = parser.parse_args()
    if options.method:
        sys.path += [options.jaxcld] if options.jaxcld else []
        try:
            print(json.dumps(measured(options.method, dict(np.load(options.rows)), options.time_limit)))
        except ImportError as error:
            print(json.dumps({"missing": str(error)}))
        return
    for run in options.runs.split(","):
        name, kind, size = run.split(":")
        data = features(name, kind, int(size), options.data_dir, options.images)
        found = {}
        with TemporaryDirectory() as folder:
            rows = str(Path(folder) / "rows.npz")
            np.savez(rows, **data)
            for method in METHODS:
                command = [sys.executable, *sys.argv, "--method", method, "--rows", rows]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[method] = json.loads(done.stdout.splitlines()[-1])
                print(run, method, found[method], flush=True)
        write_section(RESULTS, HEAD, run, section(run, found, data, options.time_limit))


if __name__ == "__main__":
    main()
