"""Networks on the nine data sets of an SDP relaxation, what is proved of them, and that relaxation beside.

    python experiments/nine_data_sets.py DIR

The paper: Prakhya, Birdal, Yurtsever, *Convex formulations for training two-layer ReLU neural networks*, ICLR 2025
(arXiv 2410.22311). DIR is a clone of its repository, KarthikPrakhya/SDPNN-IW on GitHub: rows and splits are those in
its `data` folder. Nothing in a file is executed: see `ArraysOnly`. Writes experiments/results/nine_data_sets.md.

**The objective** there, in its `loss_functions/regularized_l2_loss.py`, for rows X (n, d), targets Y (n, c) and any
number of neurons, without an output bias; a hidden bias is a column of ones in X:

    F(U, V) = ½ ‖(X U)_+ V - Y‖_F² + γ/2 (‖U‖_F² + ‖V‖_F²),      γ = 0.1 and 0.01.

**The same here.** Each row is an image of one patch, so that (1/n) Σ_i ½ ‖f_i - y_i‖² is the loss, and γ = nβ:

    F(U, V) = n [(1/n) Σ_i ½ ‖f_i - y_i‖² + β/2 (‖U‖² + ‖V‖²)],      β = γ/n,

which is n times the objective of `convcvx.solve`, whose lower bound times n is one on F.

**The relaxation** there has the second moments of α = (Xu)_+, (-Xu)_+ = α - Xu, u and v, summed over neurons, as the
unknown. Those of (α, u, v) say the rest. With A, B, C and D those of (α, α), (α, u), (α, v) and (u, u) it is

    min ½ ‖C - Y‖_F² + γ/2 (tr D + tr of those of (v, v))   over positive semidefinite matrices of order n + d + c,
    A >= 0,   A - B Xᵀ >= 0 with a diagonal of zeros,   A - B Xᵀ - X Bᵀ + X D Xᵀ >= 0,

a lower bound on F: the moments of a network are one such matrix. What a solver says of it is not proved.
"""

from __future__ import annotations

import argparse
import csv
import math
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from time import process_time
from typing import Any

import cvxpy as cp
import numpy as np

import convcvx
from convcvx.errors import ConvergenceWarning, DataError

RESULT = Path(__file__).parent / "results" / "nine_data_sets.md"
DECAYS = (0.1, 0.01)
"""γ of the paper."""
SEARCHED_RANK = 4
"""Rank of the rows up to which branch and bound is asked for the proof; beyond it the dual value is an estimate, and
what is proved a bound from polynomials."""
LARGEST_ORDER = 70
"""Order of the relaxation up to which it is solved: half a minute of a core; the cost grows with the sixth power."""
Rows = tuple[np.ndarray, np.ndarray]


class ArraysOnly(pickle.Unpickler):
    """Reads dictionaries, lists, texts and arrays of numbers; nothing else is imported or run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) in (("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer")):
            return numbers_of
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and arrays of numbers are all that is read")


def numbers_of(buffer: Any, dtype: np.dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    """An array as pickles have them; numpy makes no objects out of a buffer."""
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return ArraysOnly(file).load()
    except Exception as error:  # whatever a broken or hostile file leads to
        raise DataError(f"{path} is not read: {error}; give a clone of the paper's repository") from error


def one_hot(labels: np.ndarray) -> np.ndarray:
    return (labels[:, None] == np.unique(labels)).astype(float)


def components(path: Path) -> Rows:
    """Principal components and a label a line, all of them moved and scaled alike, as the paper's code does."""
    table = np.loadtxt(path, delimiter=",", skiprows=1)
    x = table[:, :-1]
    return (x - x.mean()) / x.std(), one_hot(table[:, -1])


def possum(path: Path) -> Rows:
    """Total length from the other measurements, of animals whose age and foot are known; texts as one-hot columns."""
    with path.open(newline="") as file:
        animals = [animal for animal in csv.DictReader(file) if not {"", "NA"} & set(animal.values())]
    columns = {name: np.array([animal[name] for animal in animals]) for name in animals[0]}
    texts = [one_hot(columns.pop(name)) for name in ("Pop", "sex")]
    y = columns.pop("totlngth").astype(float)[:, None]
    numbers = [values.astype(float) for name, values in columns.items() if name != "case"]
    return np.column_stack([*numbers, *texts]), y


def data_sets(folder: Path, trials: int) -> Iterator[tuple[str, Rows]]:
    """Training rows by name, of what there is in `folder`."""
    if (path := folder / "randomized_datasets_n_25_d_2_c_5_num_datasets_100.pkl").exists():
        for number, data in enumerate(read_pickle(path)[:trials]):
            yield f"random {number}", (data["X"], data["Y"])
    if (path := folder / "spiral_dataset.pkl").exists():
        data = read_pickle(path)
        yield "spiral", (data["X"], one_hot(data["Y"]))
    for name in ("iris", "bank_notes", "pima_indians", "ionosphere"):
        if (path := folder / f"{name}.pkl").exists():
            data = read_pickle(path)["train_dataset"]
            yield name.replace("_", " "), (data["X"], data["Y"].astype(float))
    if (path := folder / "possum.csv").exists():
        yield "possum", possum(path)
    for name in ("mnist", "cifar10"):
        if (path := folder / f"{name}_train_downsampled_pca.csv").exists():
            yield name, components(path)


def solved(rows: Rows, gamma: float, **options: Any) -> convcvx.Solution:
    """The same objective divided by n."""
    x, y = rows
    return convcvx.solve(x, y, gamma / len(x), intercept=False, **options)


def relaxation(rows: Rows, gamma: float) -> float | None:
    """Optimum of the paper's relaxation, as far as Clarabel is right; None where it is too large or Clarabel fails."""
    x, y = rows
    (n, d), c = x.shape, y.shape[1]
    if n + d + c > LARGEST_ORDER:
        return None
    moments = cp.Variable((n + d + c, n + d + c), PSD=True)
    a, b, predictions, squares = moments[:n, :n], moments[:n, n : n + d], moments[:n, n + d :], moments[n:, n:]
    across = a - b @ x.T
    negative = across - x @ b.T + x @ squares[:d, :d] @ x.T
    above, below = np.triu_indices(n, 1), np.tril_indices(n, -1)
    entries = a[above], across[above], across[below], negative[above]  # each once: an interior point needs an interior
    value = 0.5 * cp.sum_squares(predictions - y) + 0.5 * gamma * cp.trace(squares)
    program = cp.Problem(cp.Minimize(value), [cp.diag(across) == 0, *(entry >= 0 for entry in entries)])
    try:
        program.solve(solver=cp.CLARABEL)
    except cp.SolverError:
        return None
    return float(program.value) if program.status in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE) else None


def line(name: str, rows: Rows, gamma: float, time_limit: float) -> str:
    """A row of the table: values of F, which are n times those of a certificate."""
    n, rank, began = len(rows[0]), int(np.linalg.matrix_rank(rows[0])), process_time()
    oracle = "exact" if rank <= 2 else "branch-and-bound" if rank <= SEARCHED_RANK else "auto"
    solution = solved(rows, gamma, oracle=oracle, time_limit=time_limit)
    seconds, found = process_time() - began, solution.certificate
    proved = found.proved or 0.0  # no loss is below zero
    estimate = "" if found.scope.proved else f"{n * found.dual:.4f}"
    relaxed = relaxation(rows, gamma)
    beside = "" if relaxed is None else f"{relaxed:.4g}"
    return (
        f"| {name} | {n} | {rows[0].shape[1]} | {rank} | {rows[1].shape[1]} | {gamma:g} | {gamma / n:.3g} "
        f"| {n * found.primal:.4f} | {math.floor(n * proved * 1e4) / 1e4:.4f} "  # no more than was proved
        f"| {math.ceil(1e4 * (1 - proved / found.primal)) / 100:.2f} % | {found.proved_by} "
        f"| {estimate} | {solution.n_filters} | {seconds:.0f} | {beside} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, metavar="DIR", help="clone of the paper's repository")
    parser.add_argument("--time-limit", type=float, default=60, help="seconds for each optimum")
    parser.add_argument("--trials", type=int, default=3, help="random data sets out of 100")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)  # the table has the gaps
    try:
        found = list(data_sets(options.clone / "data", options.trials))
    except (LookupError, TypeError, ValueError) as error:
        parser.error(f"{options.clone / 'data'} is not as the paper's repository has it: {error!r}")
    if not found:
        parser.error(f"{options.clone / 'data'} holds none of the data sets; give a clone of the paper's repository")
    lines = [
        "# Nine data sets of an SDP relaxation: networks, and what is proved of them",
        "",
        f"`python experiments/nine_data_sets.py DIR --time-limit {options.time_limit:g} --trials {options.trials}`: "
        "F = ½‖(XU)_+V - Y‖² + γ/2 (‖U‖² + ‖V‖²) is the objective of Prakhya, Birdal and Yurtsever (ICLR 2025, arXiv "
        "2410.22311) on the training rows of their repository, and n times that of `convcvx.solve` at β = γ/n. No "
        "network of any width is below the proved bound; the estimated one is what a local search suggests where the "
        f"rank is above {SEARCHED_RANK}. Relaxation: the optimum of theirs, solved anew with Clarabel up to order "
        f"{LARGEST_ORDER}; if Clarabel is right no network is below it, and what it lacks to the proved bound it is "
        "loose by. Data sets that DIR lacks are left out.",
        "",
        "| data | n | d | rank | c | γ | β | F | proved bound | its gap | proved by | estimated bound | filters "
        "| CPU s | relaxation |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in found:
        for gamma in DECAYS:
            lines.append(line(name, rows, gamma, options.time_limit))
            print(lines[-1], flush=True)
            RESULT.write_text("\n".join(lines) + "\n")  # what was had by then


if __name__ == "__main__":
    main()
