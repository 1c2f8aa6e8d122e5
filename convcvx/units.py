"""Units in which extreme data are of size one: powers of two, so that nothing is rounded on the way in or out.

Images x = 2^a x' and, under the squared loss, targets y = 2^b y' make a problem whose optimum is that of x' and y' in
other units: weights V = 2^(b-a) V', intercept and dual point 2^b times theirs, g and β 2^(a+b), objective and bounds
2^2b. What is solved and certified is x' and y', whose squares float64 holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from convcvx.activations import RELU, Activation
from convcvx.data.arrays import as_tensor
from convcvx.data.images import Images, StreamedImages
from convcvx.errors import InputError, check_positive
from convcvx.oracles.base import VALUES_OF_G
from convcvx.patches import PatchSpec
from convcvx.rounding import SMALLEST_NORMAL
from convcvx.solution import Round, Solution

if TYPE_CHECKING:
    from convcvx.certificate import Certificate

ORDINARY = 32
"""Data with a largest entry between 2^-32 and 2^32 are taken as they are: fourth powers, entries of a Gram matrix
squared, are then within 2^±128, about what the float32 of the large passes holds, and far inside float64."""
FIXED = 200
"""Images that have their scale, beside a bias or an epsilon, may go up and down to 2^±200, where fourth powers end."""
LARGEST = 500
"""Targets may go up and down to 2^±500: the objective, which has their square, is a float64 then."""

SMALLEST_BETA = 2.0**-300
"""β in units from which on: weights may become as large as 1/β, and the losses have their squares. It is 1e-60 times
the beta_max of the faintest images that have their scale."""


@dataclass(frozen=True)
class Units:
    """Images are given in 2^images, targets in 2^targets.

    `reduced` brings data into units, the other methods bring results out of them, and those of `inverse` in.

    Attributes
    ----------
    images, targets : int
        a and b above: 0 for ordinary data.
    """

    images: int = 0
    targets: int = 0

    @classmethod
    def of(
        cls,
        images: Images,
        targets: Any,
        loss: str,
        spec: PatchSpec = PatchSpec((1, 1)),
        activation: Activation = RELU,
    ) -> Units:
        """The units of these data; NaN and infinity are left to whoever checks the data.

        Raises
        ------
        InputError
            For data that no units help: targets whose square is no float64, or extreme images that have their scale.
        """
        a = 0 if isinstance(images, StreamedImages) or not len(images) else _exponent(images)  # streams are in [0, 1]
        real = as_tensor("targets", targets)
        b = _exponent(real) if loss == "squared" and real.is_floating_point() and real.numel() else 0
        if abs(b) > LARGEST:
            raise InputError(
                f"targets must have a largest entry between 2^-{LARGEST} and 2^{LARGEST}, as the loss has their "
                f"square; got {float(real.abs().max()):.3g}: divide them by it"
            )
        if spec.constant or spec.contrast is not None:
            if abs(a) > FIXED:
                raise InputError(
                    f"images must have a largest entry between 2^-{FIXED} and 2^{FIXED} with hidden_bias, whiten or "
                    f"contrast; got {float(images[:].abs().max()):.3g}: divide them by it"
                )
            a = 0
        if activation.degree > 1 and a:
            raise InputError(
                f"images must have a largest entry between 2^-{ORDINARY} and 2^{ORDINARY} with activation "
                f"{activation}, which squares responses; got {float(images[:].abs().max()):.3g}: divide them by it"
            )
        return cls(a, b)

    @property
    def ordinary(self) -> bool:
        return self == Units()

    @property
    def inverse(self) -> Units:
        return Units(-self.images, -self.targets)

    def reduced(self, name: str, data: Any) -> Any:
        """`data` ("images" or "targets") in units.

        Raises
        ------
        InputError
            When the smallest entries are so far below the largest that they would be rounded.
        """
        exponent = getattr(self, name)
        if exponent == 0:
            return data
        data = torch.as_tensor(data).double().cpu()
        scaled = times(data, -exponent)
        if not torch.equal(times(scaled, exponent), data):
            raise InputError(
                f"{name} must have entries within 2^±1000 of the largest, {float(data.abs().max()):.3g}; set smaller "
                "ones to zero"
            )
        return scaled

    def reduced_beta(self, beta: float) -> float:
        """`beta` in units.

        Raises
        ------
        InputError
            When it is out of all proportion to images times targets.
        """
        exponent = self.images + self.targets
        if isinstance(beta, int | float) and beta == 0 and beta is not False:
            raise InputError(
                "beta must be a positive float; got 0.0: if that is a share of beta_max, no filter tells anything of "
                "the targets (constant images or targets), and any beta will do"
            )
        beta = check_positive("beta", beta)
        scaled = float(times(torch.tensor(beta, dtype=torch.float64), -exponent))
        if not (beta >= SMALLEST_NORMAL and SMALLEST_BETA <= scaled < math.inf):
            raise InputError(
                f"beta must be of the size of images times targets, about 2^{exponent} here, within what a float64 "
                f"holds; got {beta:.3g}: pass a share of convcvx.beta_max of these data"
            )
        return scaled

    def of_g(self, value: float) -> float:
        """A g or β.

        Raises
        ------
        InputError
            When float64 does not hold it; so in all that follows.
        """
        return self._held("beta or g", value, self.images + self.targets)

    def solution(self, solution: Solution) -> Solution:
        """Parameters, history and dual point; a certificate is turned by `certificate`."""
        if self.ordinary:
            return solution
        weights = times(solution.weights, self.targets - self.images)
        if weights.numel() and float(solution.weights.abs().max()) > 0:
            self._check("weights", float(weights.abs().max()))
        return replace(
            solution,
            weights=weights,
            intercept=times(solution.intercept, self.targets),
            dual_point=self.dual_point(solution.dual_point),
            history=[self._record(record) for record in solution.history],
            certificate=None if solution.certificate is None else self.certificate(solution.certificate),
        )

    def _record(self, record: Round) -> Round:
        ordinary: Round = {
            **record,
            "objective": self._held("objective", record["objective"], 2 * self.targets),
            "lower_bound": self._lowered(record["lower_bound"]),
            "g_max": self.of_g(record["g_max"]),
        }
        if "proved_g" in record:
            ordinary["proved_g"] = self.of_g(record["proved_g"])
        return ordinary

    def certificate(self, certificate: Certificate) -> Certificate:
        if self.ordinary:
            return certificate
        search, optimum = dict(certificate.search), certificate.optimum
        if optimum is not None:
            slopes = {name: optimum[name] for name in ("slope", "slope_low", "slope_high")}
            shift = self.targets - self.images
            optimum = optimum | {name: self._held("slope", value, shift) for name, value in slopes.items()}
        search |= {name: self.of_g(search[name]) for name in VALUES_OF_G if name in search}
        return replace(
            certificate,
            primal=self._held("objective", certificate.primal, 2 * self.targets),
            dual=self._lowered(certificate.dual),
            beta=self.of_g(certificate.beta),
            g_max=self.of_g(certificate.g_max),
            proved=None if certificate.proved is None else self._lowered(certificate.proved),
            search=search,
            optimum=optimum,
            data=f"{certificate.data} x 2^{self.images}, 2^{self.targets}",
        )

    def dual_point(self, dual_point: Tensor | None) -> Tensor | None:
        """Z."""
        if dual_point is None or not self.targets:
            return dual_point
        return times(dual_point.double(), self.targets)

    def _lowered(self, bound: float) -> float:
        """A lower bound: what float64 cannot hold becomes 0, never more than it was."""
        scaled = float(times(torch.tensor(bound, dtype=torch.float64), 2 * self.targets))
        return scaled if SMALLEST_NORMAL <= abs(scaled) < math.inf else 0.0

    def _held(self, name: str, value: float, exponent: int) -> float:
        scaled = float(times(torch.tensor(value, dtype=torch.float64), exponent))
        if 0 < abs(value) < math.inf:
            self._check(name, scaled)
        return scaled

    def _check(self, name: str, value: float) -> None:
        if not SMALLEST_NORMAL <= abs(value) < math.inf:
            raise InputError(
                f"{name} would be {value:.3g}, which float64 does not hold, with images of about 2^{self.images} and "
                f"targets of about 2^{self.targets}; divide them by their largest entry"
            )


def _exponent(data: Tensor) -> int:
    """k for data with a largest entry of about 2^k, beyond `ORDINARY`; else 0."""
    low, high = data.detach().aminmax()
    largest = max(abs(float(low)), abs(float(high)))
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    return exponent if abs(exponent) > ORDINARY else 0


def times(data: Tensor, exponent: int) -> Tensor:
    """`data` (float64, on the CPU) times 2^exponent."""
    with np.errstate(over="ignore", under="ignore"):
        return torch.as_tensor(np.ldexp(data.numpy(), exponent))
