"""The training problem: primal, dual and dual scaling. Solvers on a Gram matrix write them in its terms.

    min  (1/n) Σ_i ℓ(f(x_i), y_i) + β Σ_j ‖V_j‖_F,      f(x) = Σ_j Σ_p φ_p(x; u_j) V_j[p,:] + b,  ‖u_j‖ = 1
    max  -(1/n) Σ_i ℓ*(-n Z_i, y_i)   over Z with  max_{‖u‖≤1} g(u) ≤ β  (and Σ_i Z_i = 0 with an intercept)

where g(u) = ‖Σ_i φ(x_i; u) Z_iᵀ‖_F: the semi-infinite dual of Sahiner et al., ICLR 2021, with pooling and intercept
added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convcvx.budget import Deadline
from convcvx.errors import InputError, check_positive
from convcvx.losses import Loss, encode_targets, get_loss
from convcvx.responses import Responses

SAMPLE_BYTES = 1 << 30
"""Size of a sample's images in float32."""
SMALL = 3e5
"""Patch entries n·K·h up to which a pass costs more in calls than in arithmetic: threads and batches only add to it."""


@dataclass(frozen=True)
class Problem:
    """One training problem on fixed images.

    Attributes
    ----------
    responses : Responses
    targets : Tensor (n, c) float64
        One-hot classes or real values.
    beta : float
        Weight decay of torch for a mean-reduced loss.
    loss : Loss
    intercept : bool
        Whether the output bias b is trained (it is never penalised).
    """

    responses: Responses
    targets: Tensor
    beta: float
    loss: Loss
    intercept: bool = True

    @classmethod
    def build(
        cls,
        responses: Responses,
        targets: Tensor,
        beta: float,
        loss: str = "squared",
        intercept: bool = True,
        n_classes: int | None = None,
    ) -> Problem:
        """Check the parts and put them together; `targets` and `n_classes` as `encode_targets` reads them."""
        get_loss(loss)
        encoded = encode_targets(targets, loss, n_classes)
        if len(encoded) != responses.n:
            raise InputError(f"targets must have one row an image, {responses.n}; got {len(encoded)}")
        return cls(responses, encoded, check_positive("beta", beta), get_loss(loss), intercept)

    @property
    def n(self) -> int:
        return self.responses.n

    @property
    def n_outputs(self) -> int:
        """c."""
        return self.targets.shape[1]

    def with_beta(self, beta: float) -> Problem:
        return replace(self, beta=check_positive("beta", beta))

    @property
    def deadline(self) -> Deadline:
        """When work on it has to be over."""
        return self.responses.deadline

    def until(self, deadline: Deadline) -> Problem:
        """The same problem, to be worked on until `deadline` only; see `convcvx.budget`."""
        return replace(self, responses=self.responses.until(deadline))

    def with_dtype(self, dtype: torch.dtype) -> Problem:
        """The same problem with its passes in another arithmetic."""
        return replace(self, responses=self.responses.to(dtype=dtype))

    @property
    def is_small(self) -> bool:
        """Whether calls are what a pass over the images costs."""
        return self.n * self.responses.n_positions * self.responses.embedding.basis.shape[1] <= SMALL

    @property
    def largest_sample(self) -> int:
        """How many images a sample may have: it is held in memory, even of images that stay on disk."""
        return max(1, SAMPLE_BYTES // (4 * self.responses.images.shape[1:].numel()))

    def sample(self, images: Tensor) -> Problem:
        """The same problem on some of its images (indices)."""
        responses = self.responses.to(images=self.responses.images[images.to(self.responses.device)])
        return replace(self, responses=responses, targets=self.targets[images])

    def primal(self, predictions: Tensor, weights: Tensor) -> float:
        """(1/n) Σ ℓ(f_i, y_i) + β Σ_j ‖V_j‖_F for f = `predictions` (n, c) and V = `weights` (m, P, c)."""
        data_term = float(self.loss.value(predictions, self.targets).mean())
        return data_term + self.beta * float(weights.flatten(1).norm(dim=1).sum())

    def constant_predictions(self) -> Tensor:
        """(n, c): the best predictor without filters."""
        zero = torch.zeros_like(self.targets)
        return zero + self.loss.best_intercept(zero, self.targets) if self.intercept else zero

    def residual(self, predictions: Tensor) -> Tensor:
        """Z = -∇_f ℓ / n (n, c)."""
        return self.loss.gradient(predictions, self.targets) / -self.n

    def dual_point(self, predictions: Tensor) -> Tensor:
        """The residual Z at `predictions`, made to satisfy Σ_i Z_i = 0 exactly when there is an intercept.

        The intercept is re-optimised first; `in_domain` removes what rounding leaves.
        """
        if self.intercept:
            predictions = predictions + self.loss.best_intercept(predictions, self.targets)
        return self.in_domain(self.residual(predictions))

    def in_domain(self, dual: Tensor) -> Tensor:
        """A point near Z = `dual` (n, c) whose dual value is finite; only max g ≤ β is left to `dual`'s scaling.

        With an intercept its rows sum to zero, by a mean shift. Under the cross-entropy every y_i - n Z_i lies in the
        simplex, where a mixture with the class frequencies (whose own residual sums to zero) makes room for the shift.
        """
        if self.loss.name == "squared":
            return dual - dual.mean(dim=0) * self.intercept
        frequencies = self.targets.mean(dim=0)
        probabilities = (self.targets - self.n * dual).clamp_min(0)
        if self.intercept:  # a class that no target has any of drives its intercept to -infinity
            probabilities = probabilities * (frequencies > 0)
        mass = probabilities.sum(dim=1, keepdim=True)
        probabilities = torch.where(mass > 0, probabilities / mass.clamp_min(1e-300), frequencies)
        if not self.intercept:
            return (self.targets - probabilities) / self.n
        excess = (probabilities - self.targets).mean(dim=0)
        mixture = min(1.0, float((2 * excess.abs() / frequencies.clamp_min(1e-300)).max()))
        probabilities = (1 - mixture) * (probabilities - excess) + mixture * frequencies
        return (self.targets - probabilities) / self.n

    def dual(self, dual_point: Tensor, g_max: float) -> float:
        """The largest dual value over scalings s·Z with s·g_max ≤ β; a lower bound if g_max ≥ max_u g(u).

        Squared loss: s* = <Z, Y> / (n‖Z‖²), clipped. Cross-entropy: the dual is concave in s; 0 ≤ s ≤ 1 keeps
        y - s·n·Z in the simplex.
        """
        limit = self.beta / g_max if g_max > 0 else float("inf")
        if self.loss.name == "squared":
            square = self.n * float(dual_point.square().sum())
            if square == 0:
                return 0.0
            overlap = float((dual_point * self.targets).sum())
            scale = min(max(overlap / square, -limit), limit)
            return scale * overlap - 0.5 * scale**2 * square
        return max(self._dual_value(s * dual_point) for s in self._scales(dual_point, min(1.0, limit)))

    def _dual_value(self, dual_point: Tensor) -> float:
        return -float(self.loss.conjugate(-self.n * dual_point, self.targets).mean())

    def _scales(self, dual_point: Tensor, largest: float) -> list[float]:
        """Scalings in [0, largest] to try: the end points and, by bisection on the slope, the best inner one."""

        def slope(scale: float) -> float:
            q = (self.targets - scale * self.n * dual_point).clamp_min(1e-300)
            return float((self.n * dual_point * (q.log() + 1)).sum())

        low, high = 0.0, largest
        if slope(largest) >= 0:
            return [largest]
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if slope(middle) > 0 else (low, middle)
        return [low, largest]
