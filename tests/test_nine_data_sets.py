"""The data sets of a paper: pickles are read without running anything, and the objective is that of its formula."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from types import ModuleType

import cvxpy as cp
import numpy as np
import pytest

from convcvx.errors import DataError

GAMMA = 0.1


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "experiments")
    import nine_data_sets

    return nine_data_sets


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(8, 2)), rng.normal(size=(8, 2))


def formula(x: np.ndarray, y: np.ndarray, u: np.ndarray, v: np.ndarray) -> float:
    """½ ‖(X U)_+ V - Y‖² + γ/2 (‖U‖² + ‖V‖²), neuron by neuron."""
    predictions = sum(np.outer(np.maximum(x @ u[:, j], 0), v[j]) for j in range(u.shape[1]))
    return 0.5 * ((predictions - y) ** 2).sum() + 0.5 * GAMMA * ((u**2).sum() + (v**2).sum())


def test_n_times_the_objective_is_the_formula_and_no_network_is_below_n_times_the_bound(script, rows):
    x, y = rows
    solution = script.solved(rows, GAMMA, oracle="exact")
    certificate, v = solution.certificate, solution.weights[:, 0].numpy()
    lengths = np.linalg.norm(v, axis=1) ** 0.5
    u = solution.filters.numpy().T * lengths  # ‖u‖ = ‖v‖, as the penalty likes it best
    v = v / lengths[:, None]
    assert certificate.scope == "global"
    assert formula(x, y, u, v) == pytest.approx(len(x) * certificate.primal, rel=1e-9)
    assert formula(x, y, 1.01 * u, v) > len(x) * certificate.primal
    rng = np.random.default_rng(1)
    for scale in (0.01, 0.1, 0.3):
        other = formula(x, y, u + scale * rng.normal(size=u.shape), v + scale * rng.normal(size=v.shape))
        assert len(x) * certificate.dual <= other


def all_moments(x: np.ndarray, y: np.ndarray) -> float:
    """The relaxation as the paper has it: moments of ((Xu)_+, (-Xu)_+, u, v), of order 2n + d + c."""
    (n, d), c = x.shape, y.shape[1]
    moments = cp.Variable((2 * n + d + c, 2 * n + d + c), PSD=True)
    relation = np.hstack([-np.eye(n), np.eye(n), x, np.zeros((n, c))])
    value = 0.5 * cp.sum_squares(moments[:n, 2 * n + d :] - y) + 0.5 * GAMMA * cp.trace(moments[2 * n :, 2 * n :])
    constraints = [moments[: 2 * n, : 2 * n] >= 0, cp.diag(moments[:n, n : 2 * n]) == 0, relation @ moments == 0]
    return cp.Problem(cp.Minimize(value), constraints).solve(solver=cp.CLARABEL)


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
def test_the_relaxation_is_that_of_the_paper_and_below_the_optimum(script, rows):
    relaxed = script.relaxation(rows, GAMMA)
    optimum = len(rows[0]) * script.solved(rows, GAMMA, oracle="exact").certificate.primal
    assert relaxed == pytest.approx(all_moments(*rows), rel=1e-3)
    assert 0.5 * optimum < relaxed <= optimum * (1 + 1e-6)
    assert script.relaxation((np.ones((80, 2)), np.ones((80, 1))), GAMMA) is None


def test_pickled_arrays_are_read_as_pickle_itself_reads_them(script, rows, tmp_path):
    path = tmp_path / "iris.pkl"
    path.write_bytes(pickle.dumps({"X": rows[0], "Y": np.arange(8), "name": "iris"}, protocol=5))
    read = script.read_pickle(path)
    assert np.array_equal(read["X"], rows[0])
    assert np.array_equal(read["Y"], np.arange(8))


class Hostile:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("function", [os.mkdir, eval, np.load, np.ndarray])
def test_a_pickle_that_asks_for_anything_else_is_refused_and_not_run(script, function, tmp_path):
    made, path = tmp_path / "made", tmp_path / "iris.pkl"
    argument = f"__import__('os').mkdir({str(made)!r})" if function is eval else str(made)
    path.write_bytes(pickle.dumps({"X": Hostile(function, argument)}))
    with pytest.raises(DataError, match=rf"iris\.pkl is not read: it asks for .*{function.__name__}"):
        script.read_pickle(path)
    assert not made.exists()
    if function in (os.mkdir, eval):  # which `pickle` itself would have run
        pickle.loads(path.read_bytes())
        assert made.exists()


def test_a_truncated_pickle_or_a_folder_without_data_is_refused_in_a_line(script, tmp_path, monkeypatch, capsys):
    whole = pickle.dumps({"X": np.zeros(9)}, protocol=5)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(sys, "argv", ["nine_data_sets.py", str(tmp_path)])
    for name in ("none.pkl", "spiral_dataset.pkl"):
        (tmp_path / "data" / name).write_bytes(whole[:-20])
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert ended.value.code == 2
        assert "paper's repository" in capsys.readouterr().err


def test_measurements_of_possums_become_numbers_and_columns_of_zeros_and_ones(script, tmp_path):
    path = tmp_path / "possum.csv"
    path.write_text(
        "case,site,Pop,sex,age,hdlngth,totlngth\n1,1,Vic,m,8,94.1,89\n2,1,other,f,6,92.5,91.5\n3,2,Vic,f,NA,91,90\n"
    )
    x, y = script.possum(path)
    assert np.array_equal(y, [[89], [91.5]])
    assert np.array_equal(x, [[1, 8, 94.1, 1, 0, 0, 1], [1, 6, 92.5, 0, 1, 1, 0]])


def test_components_are_moved_and_scaled_alike(script, tmp_path):
    path = tmp_path / "mnist.csv"
    path.write_text("PC1,PC2,label\n1,3,7\n5,7,2\n")
    x, y = script.components(path)
    assert np.allclose(x, (np.array([[1, 3], [5, 7]]) - 4) / 5**0.5)
    assert np.array_equal(y, [[0, 1], [1, 0]])
