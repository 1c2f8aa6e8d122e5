"""An independent judge of networks, lower bounds and oracles, in exact arithmetic; it shares no code with convcvx.

    objective = Σ_i s_i ℓ(f(x_i), y_i) + β Σ_j ‖u_j‖ ‖V_j‖_F,    f(x) = Σ_j Σ_p Σ_k w_pk (x_k·u_j)_+ V_j[p,:] + b

Every float64 is a rational number, so responses, outputs, squared losses and g² are computed as rationals, without any
rounding; roots, logarithms and exponentials are taken by mpmath to `DIGITS` digits. What the judge computes is the
value itself at the precision of any comparison with a float64.

Floats are used for one thing only: to look for good networks (`polished`) and large g (`adversaries`). What they find
is then evaluated exactly, so a bad search makes the judge mild, never wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import mpmath
import numpy as np
from mpmath import mpf
from scipy.optimize import minimize

LOSSES = ("squared", "cross-entropy", "squared-hinge")
"""Those that the judge knows."""
DIGITS = 60
"""Decimal digits of roots, logarithms and exponentials, to be set by `mpmath.workdps`: float64 has 16."""
CERTAIN = mpf(10) ** (10 - DIGITS)
"""Relative distance beyond which two values of the judge differ for certain."""


@dataclass(frozen=True)
class Exact:
    """An array of rational numbers: Python integers times one common `unit`."""

    integers: np.ndarray
    unit: Fraction

    @classmethod
    def of(cls, floats: np.ndarray) -> Exact:
        """The very numbers that an array of finite floats stands for."""
        mantissas, exponents = np.frexp(np.asarray(floats, dtype=np.float64))
        exponents = np.where(mantissas == 0, 10_000, exponents)
        lowest = int(exponents.min(initial=10_000))
        integers = np.empty(mantissas.shape, dtype=object)
        integers[...] = np.ldexp(mantissas, 53).astype(np.int64).astype(object)
        shifts = np.where(mantissas == 0, 0, exponents - lowest).astype(object)
        return cls(integers * 2**shifts, Fraction(2) ** (lowest - 53))

    def __matmul__(self, other: Exact) -> Exact:
        return Exact(np.matmul(self.integers, other.integers), self.unit * other.unit)

    def __sub__(self, other: Exact) -> Exact:
        unit = Fraction(math.gcd(self.unit.numerator, other.unit.numerator), 1) / math.lcm(
            self.unit.denominator, other.unit.denominator
        )
        mine, others = int(self.unit / unit), int(other.unit / unit)
        return Exact(self.integers * mine - other.integers * others, unit)

    def __getitem__(self, where) -> Exact:
        return Exact(self.integers[where], self.unit)

    def rectified(self) -> Exact:
        return Exact(np.maximum(self.integers, 0), self.unit)

    def squared(self) -> Exact:
        return Exact(self.integers**2, self.unit**2)

    def reshape(self, *shape: int) -> Exact:
        return Exact(self.integers.reshape(shape), self.unit)

    def square(self) -> Fraction:
        """The sum of all squares."""
        return int((self.integers * self.integers).sum()) * self.unit**2

    def fractions(self) -> np.ndarray:
        """The numbers themselves, an object array of the same shape."""
        out = np.empty(self.integers.shape, dtype=object)
        for place, integer in np.ndenumerate(self.integers):
            out[place] = integer * self.unit
        return out


def real(number: Fraction | int) -> mpf:
    """A rational to `DIGITS` digits."""
    number = Fraction(number)
    return mpf(number.numerator) / mpf(number.denominator)


@dataclass(frozen=True)
class Network:
    """f(x) = Σ_j Σ_p φ_p(x; u_j) V_j[p,:] + b, as plain float64 arrays.

    Attributes
    ----------
    filters : (m, h)
        Flattened kernels of any norm; the hidden bias, if the problem has one, is the last entry.
    weights : (m, P, c)
    bias : (c,)
        Zero where the problem has no intercept.
    """

    filters: np.ndarray
    weights: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Problem:
    """Images, targets and weight decay.

    Attributes
    ----------
    images : (n, C, H, W)
    targets : (n, c)
        Real values, or rows proportional to probabilities under the cross-entropy, which are divided by their sums; or
        labels of 0 and 1 under the squared hinge.
    beta : float
    loss : {"squared", "cross-entropy", "squared-hinge"}
    intercept, hidden_bias : bool
    kernel, stride, padding : (int, int)
    pool : "none", ("grid", (rows, columns)), ("window", (size, stride)) or an array (P, K)
        Grids as `AdaptiveAvgPool2d` has them, square windows as `AvgPool2d`.
    weights : (n,), optional
        What each image counts for: s_i = w_i / Σ w, 1/n without them.
    degree : {1, 2}
        2 for networks of squares: (x·u)² in place of (x·u)_+, and ‖u_j‖² in place of ‖u_j‖.
    """

    images: np.ndarray
    targets: np.ndarray
    beta: float
    loss: str = "squared"
    intercept: bool = True
    hidden_bias: bool = False
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    pool: str | tuple | np.ndarray = ("grid", (1, 1))
    weights: np.ndarray | None = None
    degree: int = 1

    @property
    def n(self) -> int:
        return len(self.images)

    @property
    def n_outputs(self) -> int:
        return self.targets.shape[1]

    @cached_property
    def map_size(self) -> tuple[int, int]:
        rows, columns = (
            (size + 2 * padding - kernel) // stride + 1
            for size, padding, kernel, stride in zip(
                self.images.shape[2:], self.padding, self.kernel, self.stride, strict=True
            )
        )
        return rows, columns

    @cached_property
    def patches(self) -> np.ndarray:
        """(n, K, h) float64 patch rows, a constant 1 at their ends for the hidden bias; a copy, so nothing rounds."""
        (top, left), (height, width) = self.padding, self.kernel
        padded = np.pad(np.asarray(self.images, np.float64), ((0, 0), (0, 0), (top, top), (left, left)))
        rows = [
            padded[:, :, i : i + height, j : j + width].reshape(self.n, -1)
            for i in range(0, self.map_size[0] * self.stride[0], self.stride[0])
            for j in range(0, self.map_size[1] * self.stride[1], self.stride[1])
        ]
        patches = np.stack(rows, axis=1)
        ones = np.ones((*patches.shape[:2], 1))
        return np.concatenate([patches, ones], axis=2) if self.hidden_bias else patches

    @cached_property
    def pooling(self) -> Exact:
        """(P, K) weights w_pk."""
        rows, columns = self.map_size
        if isinstance(self.pool, np.ndarray):
            return Exact.of(self.pool)
        if self.pool == "none":
            return Exact.of(np.eye(rows * columns))
        kind, size = self.pool
        lines = [
            _grid(length, size[axis]) if kind == "grid" else _windows(length, *size)
            for axis, length in enumerate((rows, columns))
        ]
        cells = [(down, across) for down in lines[0] for across in lines[1]]
        common = math.lcm(*(len(down) * len(across) for down, across in cells))
        integers = np.zeros((len(cells), rows * columns), dtype=object)
        for cell, (down, across) in zip(integers, cells, strict=True):
            for i, j in itertools.product(down, across):
                cell[i * columns + j] = common // (len(down) * len(across))
        return Exact(integers, Fraction(1, common))

    @cached_property
    def truth(self) -> np.ndarray:
        """(n, c) targets as rationals; under the cross-entropy their rows sum to one exactly, hinges have ±1."""
        targets = Exact.of(self.targets).fractions()
        if self.loss == "squared-hinge":
            return 2 * targets - 1
        return targets if self.loss == "squared" else targets / targets.sum(axis=1, keepdims=True)

    @cached_property
    def shares(self) -> np.ndarray:
        """(n,) s_i as rationals: they add up to one exactly."""
        counts = Exact.of(np.ones(self.n) if self.weights is None else self.weights).fractions()
        return counts / counts.sum()

    def responses(self, filters: np.ndarray) -> Exact:
        """(n, m, P) pooled responses φ of filters (m, h)."""
        exact = Exact.of(self.patches)
        products = exact @ Exact.of(filters.T)
        active = products.rectified() if self.degree == 1 else products.squared()
        pooled = self.pooling @ active
        return Exact(pooled.integers.transpose(0, 2, 1), pooled.unit)

    def outputs(self, network: Network) -> np.ndarray:
        """(n, c) rationals, without the bias."""
        if len(network.filters) == 0:
            return np.full((self.n, self.n_outputs), Fraction(0), dtype=object)
        responses = self.responses(network.filters).reshape(self.n, -1)
        return (responses @ Exact.of(network.weights.reshape(-1, self.n_outputs))).fractions()

    def penalty(self, network: Network) -> mpf:
        """β Σ ‖u_j‖ ‖V_j‖: what weight decay costs once each neuron is balanced; β Σ ‖u_j‖² ‖V_j‖ of squares."""
        norms = [
            mpmath.sqrt(real(Exact.of(u).square() ** self.degree * Exact.of(v).square()))
            for u, v in zip(network.filters, network.weights, strict=True)
        ]
        return mpf(self.beta) * mpmath.fsum(norms)

    def objective(self, network: Network) -> mpf:
        """The objective at the network's own bias."""
        bias = Exact.of(network.bias).fractions()
        return self.mean_loss(self.outputs(network) + bias) + self.penalty(network)

    def best_objective(self, network: Network) -> mpf:
        """The least objective over biases, which are free; with no intercept, that without a bias."""
        outputs = self.outputs(network)
        if not self.intercept:
            loss = self.mean_loss(outputs)
        elif self.loss == "squared":
            loss = self.mean_loss(outputs + self.shares @ (self.truth - outputs))
        elif self.loss == "squared-hinge":
            loss = self.mean_loss(outputs + self.best_margins(outputs))
        else:
            counted = self.shares > 0
            loss = _least_cross_entropy(outputs[counted], self.truth[counted], self.shares[counted])
        return loss + self.penalty(network)

    def best_margins(self, outputs: np.ndarray) -> np.ndarray:
        """(c,) biases of the least squared hinge, exactly.

        With w = t - f the loss of an output is Σ s_i (w_i - b)² over the positives with w_i > b and the negatives with
        w_i < b: convex, and a parabola between neighbours among the w. Where it begins to rise, its least is near.
        """
        counted = self.shares > 0
        truth, shares = self.truth[counted], self.shares[counted]
        wanted = truth - outputs[counted]

        def best(w: np.ndarray, t: np.ndarray) -> Fraction:
            corners = sorted(set(w))
            falls = (shares @ (t * np.maximum(t * (w - b), 0)) for b in corners)
            place, fall = next((place, fall) for place, fall in enumerate(falls) if fall <= 0)
            if fall == 0:
                return corners[place]
            pulls = shares * ((w - (corners[place - 1] + corners[place]) / 2) * t > 0)
            return pulls @ w / pulls.sum()

        return np.array([best(w, t) for w, t in zip(wanted.T, truth.T, strict=True)], dtype=object)

    def mean_loss(self, outputs: np.ndarray) -> mpf:
        """Σ s_i ℓ of rational outputs (n, c)."""
        if self.loss == "squared-hinge":
            return real((self.shares @ np.maximum(1 - self.truth * outputs, 0) ** 2).sum())
        if self.loss == "squared":
            errors = outputs - self.truth
            return real((self.shares @ (errors * errors)).sum() / 2)
        losses = map(cross_entropy, outputs, self.truth)
        return mpmath.fsum(real(share) * loss for share, loss in zip(self.shares, losses, strict=True))

    def g_squared(self, u: np.ndarray, dual_point: np.ndarray) -> Fraction:
        """g(u)² / ‖u‖², or over ‖u‖⁴ of squares, for one filter (h,) and a dual point (n, c)."""
        if not u.any():
            return Fraction(0)
        responses = self.responses(u[None])[:, 0]
        correlation = Exact(responses.integers.T, responses.unit) @ Exact.of(dual_point)
        return correlation.square() / Exact.of(u).square() ** self.degree


def _grid(length: int, cells: int) -> list[range]:
    return [range(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)]


def _windows(length: int, size: int, stride: int) -> list[range]:
    return [range(start, start + size) for start in range(0, length - size + 1, stride)]


def cross_entropy(outputs: np.ndarray, target: np.ndarray) -> mpf:
    """Σ_k y_k log Σ_l exp(f_l - f_k): no term is negative, so none cancels, and a tiny loss keeps its digits."""
    terms = []
    for k in np.flatnonzero(target):
        others = mpmath.fsum(
            mpmath.exp(real(outputs[other] - outputs[k])) for other in range(len(outputs)) if other != k
        )
        terms.append(real(target[k]) * mpmath.log1p(others))
    return mpmath.fsum(terms)


def _least_cross_entropy(outputs: np.ndarray, targets: np.ndarray, shares: np.ndarray) -> mpf:
    """min over b of the mean cross-entropy of `outputs` + b, to about DIGITS digits.

    A class that no target has any of leaves the sum, its b being minus infinity; of the other classes the mean
    probability must be the frequency. Each b in turn is set by bisection, until Newton's method takes over; where that
    is lost, logits are divided by a large number first, and by less and less.
    """
    n = len(outputs)
    kept = [k for k in range(outputs.shape[1]) if any(targets[:, k])]
    if len(kept) == 1:
        return mpf(0)
    outputs, targets = outputs[:, kept], targets[:, kept]
    logits = mpmath.matrix([[real(f) for f in row] for row in outputs - outputs[:, :1]])
    weights = mpmath.matrix([[real(y) for y in row] for row in targets])
    classes, rows, share = range(len(kept)), range(n), [real(s) for s in shares]

    def state(b: mpmath.matrix, heat: int) -> tuple[mpf, list[list[mpf]]]:
        value, probabilities = mpf(0), []
        for i in rows:
            z = [(logits[i, k] + b[k]) / heat for k in classes]
            top = max(z)
            powers = [mpmath.exp(v - top) for v in z]
            total = mpmath.fsum(powers)
            probabilities.append([p / total for p in powers])
            for k in classes:
                if weights[i, k]:
                    others = mpmath.fsum(mpmath.exp(z[other] - z[k]) for other in classes if other != k)
                    value += share[i] * weights[i, k] * mpmath.log1p(others)
        return value, probabilities

    def newton(b: mpmath.matrix, heat: int) -> tuple[mpmath.matrix, mpf, mpf]:
        """Where Newton's method from b ends, the value and the largest slope there."""
        value, probabilities = state(b, heat)
        for _ in range(200):
            slope = mpmath.matrix(
                [mpmath.fsum(share[i] * (probabilities[i][k] - weights[i, k]) for i in rows) for k in classes]
            )
            hessian = mpmath.matrix(len(kept) - 1)  # b of the first class is held
            for k, other in itertools.product(classes[1:], classes[1:]):
                hessian[k - 1, other - 1] = mpmath.fsum(
                    share[i] * probabilities[i][k] * ((k == other) - probabilities[i][other]) for i in rows
                )
            try:
                step = mpmath.lu_solve(hessian, slope[1:])
            except ZeroDivisionError:
                break
            promised = mpmath.fsum(slope[k] * step[k - 1] for k in classes[1:]) / 2
            if abs(promised) <= value * CERTAIN / 1000:  # what rounding hides, no shorter step would gain
                break
            size = mpf(1)
            while size > mpf(10) ** -30:
                trial = b.copy()
                for k in classes[1:]:
                    trial[k] -= heat * size * step[k - 1]
                trial_value, trial_probabilities = state(trial, heat)
                if trial_value < value:
                    break
                size /= 4
            else:
                break
            gained, b, value, probabilities = value - trial_value, trial, trial_value, trial_probabilities
            if gained <= value * CERTAIN:
                break
        return b, value, max(abs(part) for part in slope)

    rough = (np.array(part.tolist(), dtype=float) for part in (logits, weights, shares))
    b = mpmath.matrix(_rough_bias(*rough))
    b, value, slope = newton(b, 1)
    if slope > mpf(10) ** -12:  # far from all curvature: cool down from where there is some
        heat = 2 ** max(1, math.ceil(math.log2(float(max(abs(v) for v in logits)))))
        while heat >= 1:
            b, cooled, _ = newton(b, heat)
            heat //= 2
        value = min(value, cooled)
    return value


def _rough_bias(logits: np.ndarray, targets: np.ndarray, shares: np.ndarray) -> list[float]:
    """Each class in turn gets the b at which its mean probability is its frequency, by bisection in float64."""
    frequencies, b = shares @ targets, np.zeros(logits.shape[1])
    reach = 2 * np.abs(logits).max() + 80
    for _ in range(60):
        before = b.copy()
        for k in range(len(b)):
            rest = np.delete(logits + b, k, axis=1)
            top = rest.max(axis=1)
            against = top + np.log(np.exp(rest - top[:, None]).sum(axis=1)) - logits[:, k]
            low, high = -2 * reach, 2 * reach
            while high - low > 1e-10 * reach:  # Newton's method does the rest in few steps
                middle = 0.5 * (low + high)
                mean = shares @ (1 / (1 + np.exp(np.clip(against - middle, -700, 700))))
                low, high = (middle, high) if mean < frequencies[k] else (low, middle)
            b[k] = 0.5 * (low + high)
        b -= b[0]
        if np.abs(b - before).max() < 1e-6:
            break
    return b.tolist()


# --- Searches in floats, whose findings are evaluated exactly ---------------------------------------------------------


def polished(problem: Problem, network: Network, steps: int = 400) -> Network:
    """A network of no higher objective, by quasi-Newton descent in all parameters, for data of ordinary scale.

    At the optimum of its own width its excess is of second order in the rounding of the slopes, far below it.
    """
    c, m, share = problem.n_outputs, len(network.filters), problem.shares.astype(float)[:, None]
    if m == 0:
        return network
    patches = problem.patches
    pool = np.array(problem.pooling.fractions(), dtype=float)
    truth = np.array(problem.truth, dtype=float)
    n, h, cells = problem.n, patches.shape[2], len(pool)
    norms = [np.linalg.norm(a.reshape(m, -1), axis=1) for a in (network.filters, network.weights)]
    ratio = np.sqrt(np.divide(norms[1], norms[0], out=np.zeros(m), where=norms[0] > 0))
    inverse = np.divide(1.0, ratio, out=np.zeros(m), where=ratio > 0)
    start = [network.filters * ratio[:, None], network.weights * inverse[:, None, None], network.bias]

    def unpack(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        u, v, b = np.split(flat, [m * h, m * h + m * cells * c])
        return u.reshape(m, h), v.reshape(m, cells, c), b * problem.intercept

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        u, v, b = unpack(flat)
        raw = patches @ u.T  # (n, K, m)
        responses = (pool @ np.maximum(raw, 0)).reshape(n, -1)  # (n, P m)
        heads = v.transpose(1, 0, 2).reshape(-1, c)
        f = responses @ heads + b
        if problem.loss == "squared":
            loss, slope = 0.5 * (share * (f - truth) ** 2).sum(), share * (f - truth)
        elif problem.loss == "squared-hinge":
            short = np.maximum(1 - truth * f, 0)
            loss, slope = (share * short**2).sum(), -2 * share * truth * short
        else:
            top = f.max(axis=1, keepdims=True)
            total = np.exp(f - top).sum(axis=1, keepdims=True)
            loss = (share * (top + np.log(total) - f) * truth).sum()
            slope = share * (np.exp(f - top) / total - truth)
        back = (pool.T @ (slope @ heads.T).reshape(n, cells, m)) * (raw > 0)
        slopes = [
            back.reshape(-1, m).T @ patches.reshape(-1, h) + problem.beta * u,
            (responses.T @ slope).reshape(cells, m, c).transpose(1, 0, 2) + problem.beta * v,
            slope.sum(axis=0) * problem.intercept,
        ]
        decay = 0.5 * problem.beta * ((u**2).sum() + (v**2).sum())
        return loss + decay, np.concatenate([part.ravel() for part in slopes])

    flat = np.concatenate([part.ravel() for part in start])
    options = {"maxiter": steps, "maxfun": 2 * steps, "ftol": 0.0, "gtol": 0.0, "maxcor": 30}
    with np.errstate(all="ignore"):
        found = minimize(value, flat, jac=True, method="L-BFGS-B", options=options).x
        found = _newton(lambda at: value(at)[1], found)
    if not np.isfinite(found).all():
        return network
    u, v, b = unpack(found)
    size = np.linalg.norm(u, axis=1) * np.linalg.norm(v.reshape(m, -1), axis=1)
    alive = size > 1e-12 * size.max(initial=0.0)
    better = Network(u[alive], v[alive], b)
    return better if problem.best_objective(better) < problem.best_objective(network) else network


def _newton(slope: Callable[[np.ndarray], np.ndarray], point: np.ndarray, steps: int = 4) -> np.ndarray:
    """Newton steps, differences in place of second derivatives, as long as they shorten the slope."""
    for _ in range(steps):
        here, shifts = slope(point), 1e-5 * np.eye(len(point))
        hessian = np.array([slope(point + shift) - slope(point - shift) for shift in shifts]) / 2e-5
        if not np.isfinite(hessian).all():
            break
        trial = point - np.linalg.pinv(hessian + hessian.T, rcond=1e-9, hermitian=True) @ (2 * here)
        if not np.linalg.norm(slope(trial)) < 0.5 * np.linalg.norm(here):
            break
        point = trial
    return point


def adversaries(problem: Problem, dual_point: np.ndarray, seed: int = 0, starts: int = 200) -> np.ndarray:
    """(q, h) unit filters with large g, best first as floats see it: rows, vertices of the arrangement, climbs."""
    random = np.random.default_rng(seed)
    rows = problem.patches.reshape(-1, problem.patches.shape[2])
    pool = np.array(problem.pooling.fractions(), dtype=float)
    charges = np.einsum("pk,nc->nkpc", pool, dual_point).reshape(len(rows), -1)
    # Rows and charges as shares of the largest: only the direction of the slope is used.
    rows, charges = (a / max(np.abs(a).max(), 1e-300) for a in (rows, charges))
    rows, charges = rows[(rows != 0).any(axis=1)], charges[(rows != 0).any(axis=1)]
    if len(rows) == 0:
        return np.eye(rows.shape[1])
    first = random.standard_normal((starts, rows.shape[1]))
    points = _unit(np.concatenate([first, rows, -rows, *_vertices(rows, random)]))

    def g(u: np.ndarray) -> np.ndarray:
        return np.linalg.norm(np.maximum(u @ rows.T, 0) @ charges, axis=1)

    visited, values = points, g(points)
    for _ in range(30):  # on a cell the ascent is power iteration; where it leaves the cell, a shorter step may stay
        heights = points @ rows.T
        slope = _unit(((np.maximum(heights, 0) @ charges @ charges.T) * (heights > 0)) @ rows)
        moved = np.stack([slope, _unit(points + 0.1 * slope), _unit(points + 1e-3 * slope)])
        reached = np.stack([g(u) for u in moved])
        pick, places = reached.argmax(axis=0), np.arange(len(points))
        better = reached[pick, places] > values
        if not better.any():
            break
        points = np.where(better[:, None], moved[pick, places], points)
        values = np.where(better, reached[pick, places], values)
    found = np.concatenate([visited, points])
    return found[np.argsort(-g(found), kind="stable")]


def _unit(points: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    return np.divide(points, norms, out=np.zeros_like(points), where=norms > 0)


def _vertices(rows: np.ndarray, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Directions orthogonal to all but one dimension of rows, both signs and a little to their sides."""
    d = rows.shape[1]
    if d == 1:
        return
    for _ in range(min(60, math.comb(len(rows), min(d - 1, len(rows))))):
        chosen = rows[random.choice(len(rows), size=min(d - 1, len(rows)), replace=False)]
        normal = np.linalg.svd(chosen, full_matrices=True)[2][-1]
        nearby = normal + 10.0 ** random.uniform(-12, -2) * random.standard_normal((2, d))
        yield np.concatenate([normal[None], -normal[None], nearby, -nearby])


def exceeds(problem: Problem, dual_point: np.ndarray, bound: float, points: np.ndarray) -> np.ndarray | None:
    """The first of `points` at which g is above `bound`, exactly; None if there is none."""
    if math.isnan(bound):
        return points[0]
    if math.isinf(bound):
        return None
    limit = Fraction(bound) ** 2 if bound >= 0 else Fraction(-1)
    return next((u for u in points if problem.g_squared(u, dual_point) > limit), None)


def largest_on_circle(problem: Problem, dual_point: np.ndarray) -> mpf:
    """max g over filters of rank 1 or 2 to 30 digits, arc by arc of the arrangement: on each one quadratic form."""
    rows, charges = _charged(problem, dual_point)
    if not rows:
        return mpf(0)
    if len(rows[0]) == 1:
        return max(_value(rows, charges, [mpf(sign)]) for sign in (1, -1))
    borders = [(sign * -y, sign * x) for x, y in rows for sign in (1, -1)]
    borders.sort(key=lambda b: mpmath.atan2(real(b[1]), real(b[0])))
    distinct = [
        b for k, b in enumerate(borders) if k == 0 or _turn(borders[k - 1], b) != 0 or _dot(borders[k - 1], b) < 0
    ]
    best = mpf(0)
    for first, second in zip(distinct, distinct[1:] + distinct[:1], strict=True):
        u = [real(v) for v in first]
        best = max(best, _value(rows, charges, u))
        if len(distinct) == 2:  # half circles: all rows are parallel
            middle = (real(-first[1]), real(first[0]))
        else:
            lengths = [mpmath.sqrt(real(_dot(b, b))) for b in (first, second)]
            middle = tuple(real(a) / lengths[0] + real(b) / lengths[1] for a, b in zip(first, second, strict=True))
        best = max(best, _peak(rows, charges, first, second, middle))
    return best


def _peak(rows: list, charges: list, first: tuple, second: tuple, middle: tuple) -> mpf:
    """The largest stationary value of g on the open arc from `first` to `second`, zero if none."""
    active = [k for k, x in enumerate(rows) if real(x[0]) * middle[0] + real(x[1]) * middle[1] > 0]
    if not active:
        return mpf(0)
    m = [[sum(rows[k][a] * charges[k][j] for k in active) for a in (0, 1)] for j in range(len(charges[0]))]
    a, b, d = (sum(r[i] * r[j] for r in m) for i, j in ((0, 0), (0, 1), (1, 1)))
    root = mpmath.sqrt(real((a - d) ** 2 + 4 * b * b))
    top = (real(a + d) + root) / 2
    # The eigenvector, from whichever row of the shifted form is the longer.
    u = (real(b), top - real(a)) if abs(top - real(a)) > abs(top - real(d)) else (top - real(d), real(b))
    if u == (0, 0):
        return mpmath.sqrt(top)  # a circle: every direction
    for sign in (1, -1):
        v = [sign * c for c in u]
        after = real(first[0]) * v[1] - real(first[1]) * v[0]
        before = v[0] * real(second[1]) - v[1] * real(second[0])
        inside = v[0] * middle[0] + v[1] * middle[1] > 0
        if inside and after > 0 and before > 0:
            return mpmath.sqrt(top)
    return mpf(0)


def _charged(problem: Problem, dual_point: np.ndarray) -> tuple[list, list]:
    """Rows that are not zero, as rationals, and their charges w_pk Z_i in the slots of their cells."""
    patches, pool = Exact.of(problem.patches).fractions(), problem.pooling.fractions()
    exact = Exact.of(dual_point).fractions()
    rows, charges = [], []
    for i, k in itertools.product(range(problem.n), range(patches.shape[1])):
        if any(patches[i, k]):
            rows.append(tuple(patches[i, k]))
            charges.append([pool[p, k] * exact[i, j] for p in range(len(pool)) for j in range(exact.shape[1])])
    return rows, charges


def _value(rows: list, charges: list, u: list) -> mpf:
    """g(u) / ‖u‖."""
    total = [mpf(0)] * len(charges[0])
    for x, s in zip(rows, charges, strict=True):
        height = mpmath.fsum(real(a) * b for a, b in zip(x, u, strict=True))
        if height > 0:
            total = [t + height * real(v) for t, v in zip(total, s, strict=True)]
    return mpmath.sqrt(mpmath.fsum(t * t for t in total) / mpmath.fsum(v * v for v in u))


def _turn(a: tuple, b: tuple) -> Fraction:
    return a[0] * b[1] - a[1] * b[0]


def _dot(a: tuple, b: tuple) -> Fraction:
    return a[0] * b[0] + a[1] * b[1]


# --- Optima known in closed form --------------------------------------------------------------------------------------


def optimum_of_one_sample(problem: Problem) -> mpf:
    """n = 1, one patch, no intercept.

    Squared: u = x/‖x‖ and ½‖y‖² - ½(‖x‖‖y‖ - β)₊²/‖x‖². Cross-entropy of one class among c: V = z·s·(e_y - 1/c) with
    s = √(c/(c-1)), ‖V‖ = z/‖x‖·(c-1)/c·s the cost of a margin z, at which the softmax of the others is that over ‖x‖·β.
    """
    length = mpmath.sqrt(real(Exact.of(problem.patches).square()))
    beta = mpf(problem.beta)
    if problem.loss == "squared":
        size = mpmath.sqrt(real(Exact.of(problem.targets).square()))
        return size**2 / 2 - max(length * size - beta, 0) ** 2 / (2 * length**2)
    c = problem.n_outputs
    share = beta * mpmath.sqrt(mpf(c) / (c - 1)) * (c - 1) / (length * c)  # of the other classes, together
    if share >= mpf(c - 1) / c:
        return mpmath.log(c)
    margin = mpmath.log((1 - share) * (c - 1) / share)
    return mpmath.log1p((c - 1) * mpmath.exp(-margin)) + share * margin


def optimum_on_a_line(problem: Problem) -> mpf:
    """One number a sample, squared loss, no intercept: u = 1 and u = -1 never meet, each a group of its own.

    ½ mean ‖y‖² - ½ Σ over both signs of (‖A‖ - β)₊²/B,   A = mean of x y,   B = mean of x², over the sign's samples.
    """
    x, y = Exact.of(problem.patches[:, 0, 0]).fractions(), problem.truth
    value = real((y * y).sum() / (2 * problem.n))
    for side in (x > 0, x < 0):
        if side.any():
            a = (x[side, None] * y[side]).sum(axis=0) / Fraction(problem.n)
            b = (x[side] * x[side]).sum() / Fraction(problem.n)
            excess = max(mpmath.sqrt(real((a * a).sum())) - mpf(problem.beta), 0)
            value -= excess**2 / (2 * real(b))
    return value


def optimum_of_orthogonal_samples(problem: Problem) -> mpf:
    """XXᵀ = s²I, one-hot targets, squared loss, no intercept: the targets' singular values √n_k, soft-thresholded."""
    n, scale = problem.n, mpmath.sqrt(real(Exact.of(problem.patches[0]).square()))
    threshold = n * mpf(problem.beta) / scale
    sizes = [mpmath.sqrt(int(count)) for count in problem.targets.sum(axis=0)]
    return mpmath.fsum(s**2 if s <= threshold else 2 * threshold * s - threshold**2 for s in sizes) / (2 * n)


def optimum_of_opposite_samples(problem: Problem) -> mpf:
    """Two samples x and -x of the first two classes, cross-entropy: two problems of one sample, at 2β each.

    An intercept rids them of all other classes; between the two it is zero, by symmetry.
    """
    targets = problem.targets[:1, :2] if problem.intercept else problem.targets[:1]
    return optimum_of_one_sample(replace(problem, images=problem.images[:1], targets=targets, beta=2 * problem.beta))


KNOWN: dict[str, Callable[[Problem], mpf]] = {
    "one sample": optimum_of_one_sample,
    "opposite samples": optimum_of_opposite_samples,
    "on a line": optimum_on_a_line,
    "orthogonal samples": optimum_of_orthogonal_samples,
}
"""Families of problems whose optimum is a formula."""


def tampered(network: Network, how: str, seed: int = 0) -> Network:
    """The same function in other parameters, or another function of the same neurons."""
    random = np.random.default_rng(seed)
    u, v = network.filters, network.weights
    m = len(u)
    if how == "rescaled":  # by powers of two: the same function exactly, unbalanced
        factors = 2.0 ** random.integers(-20, 21, size=m)
        return replace(network, filters=u * factors[:, None], weights=v / factors[:, None, None])
    if how == "duplicated":
        return replace(network, filters=np.concatenate([u, u]), weights=np.concatenate([0.25 * v, 0.75 * v]))
    if how == "with dead neurons":
        zero, other = np.zeros_like(u), random.standard_normal(u.shape)
        return replace(network, filters=np.concatenate([zero, u, other]), weights=np.concatenate([v, v, 0 * v]))
    if how == "permuted":
        order = random.permutation(m)
        return replace(network, filters=u[order], weights=v[order])
    if how == "perturbed":
        return replace(network, filters=u + 1e-3 * random.standard_normal(u.shape), weights=v * 1.001)
    assert how == "another bias", how
    return replace(network, bias=network.bias + random.standard_normal(network.bias.shape))


TAMPERS = ("rescaled", "duplicated", "with dead neurons", "permuted", "perturbed", "another bias")
