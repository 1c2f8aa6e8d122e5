"""The twin: the same network, width and objective, trained by torch's SGD or Adam.

    min  Σ_i s_i ℓ(f(x_i), y_i) + (β/2) (‖U‖² + ‖V‖²)

over filters U (m, r) and weights V (m, P, c) in the problem's own space, so that rank, whitening and hidden bias
mean the same to both, and of several subspaces each filter keeps to one; the output bias is not penalised. Learning
rates are tuned, seeds repeated, and what is reported is recomputed in float64 by the judge of the certificate. The
clock runs while the optimiser works only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from convcvx.activations import balanced_neurons
from convcvx.certificate import judged
from convcvx.errors import check_choice, check_count, check_positive
from convcvx.machine.watch import phase, tell
from convcvx.network.two_layer import TwoLayerCNN, network_state
from convcvx.problem import Problem
from convcvx.solution import Solution
from convcvx.terms.names import TWIN_BATCH

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups, rate: torch.optim.SGD(groups, lr=rate, momentum=0.9),
    "adam": lambda groups, rate: torch.optim.Adam(groups, lr=rate),
}
"""What makes an optimiser from groups of parameters and a learning rate."""
USUAL_RATE = {"sgd": 0.1, "adam": 3e-3}
"""Learning rate from which the tuning sets out, by optimiser: what is common for networks of this size."""
RATE_STEP = math.sqrt(10)
"""Ratio of neighbouring learning rates in the tuning: finer steps hardly change the objective reached."""
LARGEST_STEP = 6
"""Steps that the tuning may go from the usual rate, up or down."""
ALIVE = 1e-3
"""Part of the penalty that a neuron in use has, at least, as a share of the largest neuron's."""


class Twin(nn.Module):
    """A `TwoLayerCNN` with its parameters in the problem's variables, ready for any torch optimiser.

    Parameters
    ----------
    problem : Problem
    n_filters : int
    start : Solution, optional
        Begin at this solution, balanced, instead of torch's default initialisation.
    seed : int

    Attributes
    ----------
    filters, weights, intercept : Parameter (m, r), (m, P, c), (c,) float32
        Without an intercept the last one stays zero and is not trained.
    """

    _own: Tensor | None

    def __init__(self, problem: Problem, n_filters: int, *, start: Solution | None = None, seed: int = 0) -> None:
        super().__init__()
        responses, c = problem.responses, problem.n_outputs
        random = torch.Generator().manual_seed(seed)
        self._embedding, self._activation, self._offset = responses.embedding, responses.activation, problem.offset
        subspaces = self._embedding.spec.subspaces
        if start is None:
            filters = _uniform((n_filters, responses.dim), responses.dim // subspaces, random)
            if subspaces > 1:  # each has as many filters as the others, or one more
                turns = torch.eye(subspaces, dtype=torch.float64)[torch.arange(n_filters) % subspaces]
                filters *= turns.repeat_interleave(responses.dim // subspaces, dim=1)
            weights = _uniform((n_filters, responses.n_cells, c), n_filters * responses.n_cells, random)
            intercept = torch.zeros(c)
        else:
            filters, weights = balanced_neurons(start.filters, start.weights)
            intercept = start.intercept
        self.filters, self.weights = nn.Parameter(filters.float()), nn.Parameter(weights.float())
        self.intercept = nn.Parameter(intercept.float(), requires_grad=problem.intercept)
        self.register_buffer("_own", self._embedding.mask(filters).float() if subspaces > 1 else None)
        channels, height, width = responses.images.shape[1:]
        shape = channels, height, width
        network = TwoLayerCNN.of_shape(
            self._embedding,
            responses.pooling,
            shape,
            len(filters),
            c,
            intercept=problem.intercept,
            activation=responses.activation,
        )
        self._network = [network]  # the list hides it from `parameters()`: its weights are computed from those above
        self.to(responses.device)

    def _state(self) -> dict[str, Tensor]:
        intercept = self.intercept if self._network[0].architecture.intercept else None
        filters = self.filters if self._own is None else self.filters * self._own  # which has no slope out of it
        return network_state(self._embedding, self._activation.kernels(filters), self.weights, intercept)

    def forward(self, images: Tensor) -> Tensor:
        """(n, C, H, W) to (n, c)."""
        return functional_call(self._network[0], self._state(), (images,))

    def network(self) -> TwoLayerCNN:
        """The trained network as an ordinary torch module."""
        state = {name: value.detach() for name, value in self._state().items()}
        if "4.bias" in state:
            state["4.bias"] = state["4.bias"] + self._offset
        self._network[0].load_state_dict(state)
        return self._network[0].eval()

    def parameter_groups(self, beta: float) -> list[dict[str, Any]]:
        """For the optimiser: torch's coupled weight decay is the gradient of (β/2)‖·‖²."""
        free = [self.intercept] if self.intercept.requires_grad else []
        return [{"params": [self.filters, self.weights], "weight_decay": beta}, {"params": free}]

    @torch.no_grad()
    def objective(self, problem: Problem, *, balanced: bool = True) -> float:
        """The training objective in the arithmetic of `problem`; infinite once a parameter is not finite.

        `balanced` measures it as certificates do, which favours the twin: each neuron balanced, ‖u‖ = ‖V‖, and the
        output bias re-optimised. Otherwise as it stands, which is what the optimiser sees.
        """
        filters, weights, intercept = self._trained
        if not all(bool(part.isfinite().all()) for part in (filters, weights, intercept)):
            return math.inf
        if balanced:
            return problem.primal(*self.judged(problem))
        predictions = problem.responses.predict(filters, weights, intercept)
        decay = float(filters.square().sum() + weights.square().sum())
        return problem.mean_loss(predictions) + 0.5 * problem.beta * decay

    def judged(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Predictions (n, c) and weights (m, P, c) as certificates measure them."""
        filters, weights, intercept = self._trained
        _, weights, predictions = judged(problem, filters, weights, intercept + problem.offset)
        return predictions, weights

    @property
    def _trained(self) -> tuple[Tensor, Tensor, Tensor]:
        filters, weights, intercept = (p.detach().cpu().double() for p in (self.filters, self.weights, self.intercept))
        return filters, weights, intercept

    @property
    def filters_used(self) -> int:
        """Neurons whose ‖u‖‖V‖ is at least `ALIVE` times the largest."""
        sizes = (self.filters.norm(dim=1) * self.weights.flatten(1).norm(dim=1)).detach()
        return int((sizes >= ALIVE * sizes.max()).sum())


def _uniform(shape: tuple[int, ...], fan_in: int, random: torch.Generator) -> Tensor:
    """torch's default initialisation of a layer with `fan_in` inputs."""
    return (torch.rand(shape, generator=random) * 2 - 1) / math.sqrt(fan_in)


@dataclass
class Training:
    """One training of a twin.

    Attributes
    ----------
    rate, seed : float, int
    objective : float
        At the end, judged in float64, balanced and with the best output bias; infinite if the training diverged.
    objective_as_trained : float
        The same without these two favours.
    seconds, core_seconds : float
        Wall time and processor time of the optimiser, evaluations left out.
    history : list of dict
        One record an epoch: epoch, seconds, core_seconds, objective (balanced, in the problem's arithmetic).
    """

    twin: Twin
    rate: float
    seed: int
    objective: float = math.inf
    objective_as_trained: float = math.inf
    seconds: float = 0.0
    core_seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def train_twin(
    problem: Problem,
    optimizer: str,
    n_filters: int,
    *,
    rate: float,
    epochs: int,
    batch: int = TWIN_BATCH,
    start: Solution | None = None,
    seed: int = 0,
) -> Training:
    """Train a twin of `n_filters` neurons on `problem`: mini-batches, learning rate `rate` falling as a cosine.

    Parameters
    ----------
    optimizer : {"sgd", "adam"}
        SGD has momentum 0.9.
    start : Solution, optional
        Fine-tune this solution; `n_filters` is then its own.
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    check_positive("rate", rate)
    twin = Twin(problem, n_filters, start=start, seed=seed)
    result = Training(twin, rate, seed)
    steps = _steps(twin, problem, optimizer, rate, epochs, batch, seed)
    next(steps)
    for epoch in range(epochs + 1):
        objective = twin.objective(problem)
        if not math.isfinite(objective):
            return result
        clock = {"seconds": result.seconds, "core_seconds": result.core_seconds}
        result.history.append({"epoch": epoch, "objective": objective} | clock)
        if epoch == epochs:
            break
        wall, cores = perf_counter(), process_time()
        next(steps)
        result.seconds += perf_counter() - wall
        result.core_seconds += process_time() - cores
    phase("objective of the twin")
    precise = problem.with_dtype(torch.float64)
    result.objective = twin.objective(precise)
    result.objective_as_trained = twin.objective(precise, balanced=False)
    return result


def _steps(
    twin: Twin, problem: Problem, optimizer: str, rate: float, epochs: int, batch: int, seed: int
) -> Iterator[None]:
    """Train; yields once warmed up, and after each epoch."""
    images, loss = problem.responses.images, problem.loss
    targets = problem.targets.to(images.device, torch.float32)
    descent = OPTIMIZERS[optimizer](twin.parameter_groups(problem.beta), rate)
    n_steps = epochs * math.ceil(problem.n / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(descent, n_steps)
    random = torch.Generator().manual_seed(seed)
    loss.value(twin(images[:batch].float()), targets[:batch]).mean().backward()
    yield
    for _ in range(epochs):
        for chosen in torch.randperm(problem.n, generator=random).to(images.device).split(batch):
            descent.zero_grad()
            values = loss.value(twin(images[chosen].float()), targets[chosen])
            problem.shares.estimate(chosen).mean(values).backward()
            descent.step()
            schedule.step()
            tell(f"{optimizer} at rate {rate:.3g}, seed {seed}", schedule.last_epoch, n_steps)
        yield


def tune_rate(
    problem: Problem,
    optimizer: str,
    n_filters: int,
    *,
    epochs: int,
    batch: int = TWIN_BATCH,
    start: Solution | None = None,
    seed: int = 0,
) -> list[Training]:
    """A training at every learning rate tried, best first; the best rate lies between worse ones.

    A walk over a grid of ratio √10 from the usual rate, as far as `LARGEST_STEP` steps.
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    check_count("epochs", epochs)
    tried: dict[int, Training] = {}
    wanted = [0, -1, 1]
    while wanted:
        for k in wanted:
            rate = USUAL_RATE[optimizer] * RATE_STEP**k
            tried[k] = train_twin(
                problem, optimizer, n_filters, rate=rate, epochs=epochs, batch=batch, start=start, seed=seed
            )
        best = min(tried, key=lambda k: (tried[k].objective, k))  # the lowest rate, where all have diverged
        wanted = [k for k in (best - 1, best + 1) if k not in tried and abs(k) <= LARGEST_STEP]
    return sorted(tried.values(), key=lambda training: training.objective)
