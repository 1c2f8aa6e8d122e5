"""Networks, bounds and oracles before an independent judge (`judge.py`) that computes in exact arithmetic.

No certificate may claim a bound above the exact objective of any network known for its problem, and no oracle a
maximum below an exact g. Nothing is allowed in favour of a bound: not even the last bit of a float64.

Each family runs a few seeds by default and all of them under `-m slow`, which then have judged 1,000 certificates and
more; each test prints what it has judged.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import judge
import numpy as np
import pytest
import torch
from judge import Network
from mpmath import mpf
from torch import nn

import convcvx
from convcvx.certificate import Certificate, certify_parameters
from convcvx.errors import InputError
from convcvx.oracles import BranchAndBoundOracle, CopositiveOracle, ExactOracle, get_oracle
from convcvx.patches import PatchSpec
from convcvx.training import build_problem

pytestmark = pytest.mark.filterwarnings("ignore::convcvx.errors.ConvergenceWarning")

RIGOROUS = ("auto", "exact", "branch-and-bound", "copositive")
SCOPE_OF = {"exact": "global", "branch-and-bound": "global", "copositive": "global", "sampled": "sampled", "local": "heuristic"}
SHARE = 1e-12
"""Relative rounding granted to `primal`: thousands of float64 operations on terms that do not cancel."""
CONDITIONED = 2.0**-46
"""128 roundings granted to each output, a share of the sum of moduli behind it: its slope carries them into the loss."""


# --- From the judge's problems to convcvx ------------------------------------------------------------------------------


def built(problem: judge.Problem) -> convcvx.problem.Problem:
    """The same problem in convcvx."""
    pool = problem.pool
    if isinstance(pool, tuple):
        sizes = "x".join(map(str, pool[1])) if pool[0] == "grid" else f"window:{pool[1][0]},{pool[1][1]}"
        pool = sizes
    spec = PatchSpec(problem.kernel, problem.stride, problem.padding, problem.hidden_bias)
    return build_problem(
        torch.as_tensor(problem.images),
        torch.as_tensor(problem.targets),
        problem.beta,
        spec=spec,
        pooling=pool,
        loss=problem.loss,
        intercept=problem.intercept,
    )


def module(problem: judge.Problem, network: Network) -> nn.Sequential:
    """The same network as a torch module, in float64."""
    m, cells, c = network.weights.shape
    channels = problem.images.shape[1]
    pools = {"grid": lambda size: nn.AdaptiveAvgPool2d(size), "window": lambda size: nn.AvgPool2d(*size)}
    pool = nn.Identity() if problem.pool == "none" else pools[problem.pool[0]](problem.pool[1])
    convolution = nn.Conv2d(channels, m, problem.kernel, problem.stride, problem.padding, bias=problem.hidden_bias)
    linear = nn.Linear(m * cells, c, bias=problem.intercept)
    made = nn.Sequential(convolution, nn.ReLU(), pool, nn.Flatten(), linear).double()
    size = channels * math.prod(problem.kernel)
    with torch.no_grad():
        convolution.weight.copy_(torch.as_tensor(network.filters[:, :size]).reshape(convolution.weight.shape))
        if problem.hidden_bias:
            convolution.bias.copy_(torch.as_tensor(network.filters[:, size]))
        linear.weight.copy_(torch.as_tensor(network.weights.transpose(2, 0, 1).reshape(c, -1)))
        if problem.intercept:
            linear.bias.copy_(torch.as_tensor(network.bias))
    return made


def network_of(problem: judge.Problem, made: nn.Sequential) -> Network:
    """The numbers in a torch module."""
    state = {name: tensor.detach().double().numpy() for name, tensor in made.state_dict().items()}
    filters, linear = state["0.weight"].reshape(len(state["0.weight"]), -1), state["4.weight"]
    if problem.hidden_bias:
        filters = np.concatenate([filters, state["0.bias"][:, None]], axis=1)
    weights = linear.reshape(len(linear), len(filters), -1).transpose(1, 2, 0)
    return Network(filters, weights, state.get("4.bias", np.zeros(len(linear))))


# --- The trial ----------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """One problem: the networks known for it, the certificates to be judged, and what is wrong with them."""

    problem: judge.Problem
    name: str
    known: mpf | None = None
    """The optimum, where a formula gives it."""
    networks: list[Network] = field(default_factory=list)
    objectives: list[tuple[mpf, mpf]] = field(default_factory=list)
    """Of each network: at its own bias, and at the best one."""
    claims: list[tuple[str, int, Certificate]] = field(default_factory=list)
    """Oracle, network and certificate."""
    faults: list[str] = field(default_factory=list)
    refusable: bool = False
    """Whether a typed error is a fair answer: for data at the edge of float64."""
    refused: int = 0

    def __post_init__(self) -> None:
        self.add(nothing(self.problem))

    def add(self, network: Network) -> int:
        """Make a network known; returns its number."""
        self.networks.append(network)
        self.objectives.append((self.problem.objective(network), self.problem.best_objective(network)))
        return len(self.networks) - 1

    @property
    def ceiling(self) -> mpf:
        """What no lower bound may exceed."""
        values = [least for _, least in self.objectives]
        return min(values if self.known is None else [*values, self.known])

    def attempt(self, what: str, work: Callable):
        """What `work` returns; an exception is a fault, but a typed one where a refusal is fair."""
        try:
            return work()
        except Exception as error:
            if isinstance(error, InputError) and self.refusable:
                self.refused += 1
            else:
                self.faults.append(f"{self.name}: {what} raised {type(error).__name__}: {error}"[:300])
            return None

    def certify(self, number: int, oracle: str = "exact", tol: float = 1e-4, single: bool = False) -> Certificate | None:
        """Have a known network certified: as a torch module where it can be one, else by its parameters."""
        network, problem = self.networks[number], self.problem

        def work() -> Certificate:
            targets = torch.as_tensor(problem.targets)
            if len(network.filters) and not isinstance(problem.pool, np.ndarray):
                made, images = module(problem, network), torch.as_tensor(problem.images)
                if single:
                    made, images = made.float(), images.float()
                return convcvx.certify(made, images, targets, problem.beta, loss=problem.loss, oracle=oracle, tol=tol)
            filters, weights = torch.as_tensor(network.filters), torch.as_tensor(network.weights)
            return certify_parameters(built(problem), filters, weights, oracle=oracle, tol=tol)

        certificate = self.attempt(f"certify with {oracle}", work)
        if certificate is not None:
            self.claims.append((oracle, number, certificate))
        return certificate

    def solve(self, oracle: str = "auto", tol: float = 1e-4, max_rounds: int = 8, **options) -> int | None:
        """Have the problem solved (1x1 patches); the solution and its certificate are judged, its polish made known."""
        problem = self.problem
        patches = problem.images[..., 0].transpose(0, 2, 1)
        pooling = np.array(problem.pooling.fractions(), dtype=float)

        def work():
            return convcvx.solve(
                patches,
                problem.targets,
                problem.beta,
                pooling=pooling,
                loss=problem.loss,
                intercept=problem.intercept,
                oracle=oracle,
                tol=tol,
                max_rounds=max_rounds,
                **options,
            )

        solution = self.attempt(f"solve with {oracle}", work)
        if solution is None:
            return None
        number = self.add(Network(*(a.numpy() for a in (solution.filters, solution.weights, solution.intercept))))
        self.claims.append((oracle, number, solution.certificate))
        return number

    def polish(self, number: int) -> int:
        return self.add(judge.polished(self.problem, self.networks[number]))

    def verdict(self) -> list[str]:
        """All that is false in the claims."""
        for oracle, number, certificate in self.claims:
            where = f"{self.name}, {oracle}, network {number}"
            self.faults += [f"{where}: {fault}" for fault in self.false(oracle, number, certificate)]
        return self.faults

    def false(self, oracle: str, number: int, certificate: Certificate) -> Iterator[str]:
        """What is false in one certificate."""
        own, least = self.objectives[number]
        primal, dual, gap = certificate.primal, certificate.dual, certificate.rel_gap
        if not (math.isfinite(primal) and math.isfinite(dual) and math.isfinite(gap)):
            yield f"not finite: {primal}, {dual}, {gap}"
            return
        slack = SHARE * own + self.noise(number)
        if not mpf(primal) <= own + slack:
            yield f"primal {primal!r} above the objective {show(own)}"
        if not mpf(primal) >= least - slack:
            yield f"primal {primal!r} below the least objective {show(least)} over biases"
        if abs(gap - (primal - dual) / max(primal, 1e-300)) > 1e-14:
            yield f"rel_gap {gap!r} is not (primal - dual) / primal of {primal!r} and {dual!r}"
        if certificate.scope != SCOPE_OF.get(oracle, certificate.scope) or (
            oracle == "auto" and certificate.scope == "sampled"
        ):
            yield f"scope {certificate.scope}"
        if certificate.scope == "global":
            if not mpf(dual) <= self.ceiling * (1 + judge.CERTAIN):
                above = mpf(dual) / self.ceiling - 1 if self.ceiling > 0 else mpf("inf")
                yield f"bound {dual!r} above the objective {show(self.ceiling)}, by {show(above)} of it"
            if not dual >= 0:
                yield f"bound {dual!r} below zero"
            if not gap >= 0:
                yield f"rel_gap {gap!r} negative under a proof"
        if certificate.scope == "sampled" and not mpf(dual) <= own * (1 + judge.CERTAIN):
            yield f"sampled bound {dual!r} above the network's own objective {show(own)}"

    def noise(self, number: int) -> mpf:
        """What float64 outputs may change in the loss: their slopes times the roundings of the terms they sum.

        Slopes and targets are taken about the mean, as the free intercept allows.
        """
        problem, network = self.problem, self.networks[number]
        if len(network.filters) == 0:
            return mpf(0)
        lengths = np.linalg.norm(problem.patches, axis=2)
        reach = np.array(problem.pooling.fractions(), dtype=float) @ lengths.T  # (P, n)
        sizes = np.linalg.norm(network.filters, axis=1)
        terms = np.einsum("pn,m,mpc->n", reach, sizes, np.abs(network.weights))
        if problem.loss == "squared":
            outputs = problem.outputs(network)
            errors = outputs - problem.truth
            errors = errors - errors.sum(axis=0) / problem.n if problem.intercept else errors
            slopes = np.abs(errors.astype(float)).sum(axis=1)
        else:
            losses = [float(judge._cross_entropy(f, y)) for f, y in zip(problem.outputs(network), problem.truth, strict=True)]
            slopes = np.minimum(2.0, 2 * np.array(losses))
        return mpf(CONDITIONED * float((slopes * terms).mean()))


def show(value: mpf) -> str:
    return judge.mpmath.nstr(value, 18)


def nothing(problem: judge.Problem) -> Network:
    """The network without filters."""
    h, cells = problem.patches.shape[2], len(problem.pooling.integers)
    return Network(np.zeros((0, h)), np.zeros((0, cells, problem.n_outputs)), np.zeros(problem.n_outputs))


def random_network(problem: judge.Problem, random: np.random.Generator, m: int, scale: float = 1.0) -> Network:
    h, cells, c = problem.patches.shape[2], len(problem.pooling.integers), problem.n_outputs
    return Network(
        random.standard_normal((m, h)),
        scale * random.standard_normal((m, cells, c)),
        random.standard_normal(c) * problem.intercept,
    )


def constant_residual(problem: judge.Problem) -> np.ndarray:
    """Z (n, c) at the best constant predictor."""
    y = problem.truth.astype(float)
    start = y.mean(axis=0) if problem.intercept else 0.0 if problem.loss == "squared" else 1 / problem.n_outputs
    return (y - start) / problem.n


def g_of(problem: judge.Problem, dual_point: np.ndarray, u: np.ndarray) -> float:
    return math.sqrt(problem.g_squared(u, dual_point))


def at_ratio(problem: judge.Problem, ratio: float) -> judge.Problem:
    """β a share of the largest g found at the best constant."""
    residual = constant_residual(problem)
    top = g_of(problem, residual, judge.adversaries(problem, residual, starts=50)[0])
    return replace(problem, beta=float(ratio * top) if top > 1e-9 else 0.1)


def random_targets(random: np.random.Generator, n: int, c: int, kind: str) -> np.ndarray:
    """Classes (two at least), probabilities in eighths or any, or real values."""
    if kind == "classes":
        return np.eye(c)[random.permutation(np.arange(n) % c)]
    if kind == "eighths":
        return random.multinomial(8, np.ones(c) / c, size=n) / 8
    return random.dirichlet(np.ones(c), size=n) if kind == "soft" else random.standard_normal((n, c))


def random_problem(seed: int, **given) -> judge.Problem:
    """Ranks 1 to 4, 1 to 12 images, 1 to 6 patches, 1 to 5 outputs, every pooling, both losses."""
    random = np.random.default_rng(seed)
    loss = given.pop("loss", None) or random.choice(["squared", "cross-entropy"])
    hidden_bias = given.pop("hidden_bias", bool(random.random() < 0.25))
    rank = given.pop("rank", int(random.choice([1, 2, 2, 3, 4])))
    n_patches = int(random.integers(1, {1: 7, 2: 7, 3: 4, 4: 3}[rank]))
    most = {1: 12, 2: 12, 3: 24 // n_patches, 4: 10 // n_patches}[rank]
    n = int(random.integers(2, min(12, most) + 1))
    c = int(random.integers(1 if loss == "squared" else 2, 6))
    real = random.choice(["classes", "real"] if c > 1 else ["real"])
    kind = real if loss == "squared" else random.choice(["classes", "classes", "eighths", "soft"])
    if kind == "classes" and min(n, c) < 2:
        kind = "real" if loss == "squared" else "eighths"
    channels = rank - hidden_bias
    if channels == 0:
        channels, hidden_bias = 1, False
    pools = [("grid", (1, 1)), "none", ("grid", (min(2, n_patches), 1)), ("window", (1, 1))]
    shape = (n, channels, n_patches, 1)
    kernel, stride, padding = (1, 1), (1, 1), (0, 0)
    if rank == 4 and not hidden_bias and given.get("pool") is None and random.random() < 0.5:
        shape, kernel, stride, padding = (min(n, 3), 1, 3, 2), (2, 2), (2, 1), (1, 0)
        pools, n = [("grid", (1, 1)), ("grid", (2, 1)), ("window", (1, 1)), "none"], shape[0]
    problem = judge.Problem(
        random.standard_normal(shape),
        random_targets(random, n, c, kind),
        1.0,
        str(loss),
        bool(random.random() < 0.7),
        hidden_bias,
        kernel,
        stride,
        padding,
        pools[random.integers(len(pools))],
    )
    problem = replace(problem, **given)
    return at_ratio(problem, 2 * 10 ** random.uniform(-3, 0))


def oracle_for(seed: int, problem: judge.Problem) -> tuple[str, float]:
    """Every rigorous oracle in turn, at a tolerance that it reaches in a moment."""
    rank = problem.patches.shape[2]
    oracle = RIGOROUS[seed % 4]
    return oracle, 1e-4 if rank < 3 else 0.05


# --- Families: each makes one trial of a seed --------------------------------------------------------------------------


def random_networks(seed: int) -> Trial:
    """Random networks in float64 and float32, and what a descent makes of them."""
    problem = random_problem(seed)
    if seed % 3 == 0:  # numbers that float32 has as well
        problem = replace(problem, images=problem.images.astype(np.float32).astype(float))
    trial, random = Trial(problem, f"random {seed}"), np.random.default_rng(seed)
    network = random_network(problem, random, int(random.integers(1, 6)), 10 ** random.uniform(-2, 1))
    if seed % 3 == 0:
        network = Network(*(a.astype(np.float32).astype(float) for a in (network.filters, network.weights, network.bias)))
    oracle, tol = oracle_for(seed, problem)
    number = trial.add(network)
    trial.certify(number, oracle, tol, single=seed % 3 == 0)
    trial.certify(trial.polish(number), oracle, tol)
    trial.certify(trial.polish(trial.add(random_network(problem, random, 6))), "exact", tol)
    trial.certify(0, oracle, tol)
    return trial


def trained_networks(seed: int) -> Trial:
    """Networks in the midst of Adam and SGD with weight decay."""
    problem = random_problem(1_000 + seed)
    trial, random = Trial(problem, f"trained {seed}"), np.random.default_rng(seed)
    made = module(problem, random_network(problem, random, 5, 0.5))
    images, targets = torch.as_tensor(problem.images), torch.as_tensor(problem.targets)
    kind = (torch.optim.Adam, torch.optim.SGD)[seed % 2]
    decayed = [p for name, p in made.named_parameters() if name != "4.bias"]
    groups = [{"params": decayed, "weight_decay": problem.beta}]
    if problem.intercept:
        groups.append({"params": [made[4].bias], "weight_decay": 0.0})
    optimizer = kind(groups, lr=0.02)
    oracle, tol = oracle_for(seed, problem)
    for _ in range(3):
        for _ in range(15):
            outputs = made(images)
            loss = (
                0.5 * (outputs - targets).square().sum() / problem.n
                if problem.loss == "squared"
                else nn.functional.cross_entropy(outputs, targets)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        number = trial.add(network_of(problem, made))
        trial.certify(number, oracle, tol)
    trial.certify(trial.polish(number), oracle, tol)
    return trial


def solved_problems(seed: int) -> Trial:
    """What `solve` returns, polished until the gap is rounding."""
    problem = random_problem(2_000 + seed, kernel=(1, 1), stride=(1, 1), padding=(0, 0), hidden_bias=False, pool=("grid", (1, 1)))
    trial = Trial(problem, f"solved {seed}")
    oracle, tol = oracle_for(seed, problem)
    number = trial.solve(oracle, max(tol, 1e-3))
    if number is not None:
        best = trial.polish(number)
        trial.certify(best, "exact", 1e-9)
        trial.certify(best, oracle, tol)
    return trial


def tampered_networks(seed: int) -> Trial:
    """A good network in other parameters, and others of its neurons."""
    problem = random_problem(3_000 + seed)
    trial, random = Trial(problem, f"tampered {seed}"), np.random.default_rng(seed)
    best = trial.polish(trial.add(random_network(problem, random, 6)))
    oracle, tol = oracle_for(seed, problem)
    trial.certify(best, oracle, tol)
    if len(trial.networks[best].filters):
        for how in judge.TAMPERS:
            if how != "another bias" or problem.intercept:
                trial.certify(trial.add(judge.tampered(trial.networks[best], how, seed)), oracle, tol)
    return trial


def confident_networks(seed: int) -> Trial:
    """Cross-entropy at logits of up to thousands, with biases that must be moved as far."""
    random = np.random.default_rng(seed)
    problem = random_problem(4_000 + seed, loss="cross-entropy", rank=int(random.choice([1, 2, 3])))
    trial = Trial(problem, f"confident {seed}")
    size = 10 ** random.uniform(0.5, 3)
    network = random_network(problem, random, int(random.integers(1, 5)), size)
    shift = np.round(size * random.standard_normal(problem.n_outputs)) * problem.intercept
    oracle, tol = oracle_for(seed, problem)
    trial.certify(trial.add(replace(network, bias=shift)), oracle, tol)
    # As right as it is confident: one neuron an image points at its target.
    problem = replace(problem, images=np.abs(problem.images) + 0.5, beta=1e-3 * problem.beta)
    sure = Trial(problem, f"confident and right {seed}")
    filters = np.abs(random.standard_normal((3, problem.patches.shape[2])))
    weights = size * np.abs(random.standard_normal((3, len(problem.pooling.integers), 1))) * problem.targets[0]
    sure.certify(sure.add(Network(filters, weights, shift)), oracle, tol)
    sure.faults += trial.verdict()
    sure.others = len(trial.claims)
    return sure


def one_class_networks(seed: int) -> Trial:
    """Cross-entropy with all targets of one class, and a network that is sure of it (no intercept, tiny residuals)."""
    random = np.random.default_rng(seed)
    rank = 1 + seed % 3
    images = np.abs(random.standard_normal((6, rank, 1, 1))) + 0.5
    targets = np.eye(2)[np.ones(6, int)]
    problem = judge.Problem(images, targets, 1e-3, "cross-entropy", intercept=False)
    trial = Trial(problem, f"one class {seed}", refusable=True)
    filters = 10 * np.abs(random.standard_normal((4, rank)))
    weights = np.stack([np.zeros((4, 1)), np.full((4, 1), 10.0 ** random.uniform(0, 1.2))], axis=2)
    trial.certify(trial.add(Network(filters, weights, np.zeros(2))), RIGOROUS[seed % 4], 1e-3)
    return trial


def offset_targets(seed: int) -> Trial:
    """Squared loss, integer targets plus 1 to 1e12: a free intercept takes the offset, and no bound moves."""
    random = np.random.default_rng(seed)
    problem = random_problem(5_000 + seed, loss="squared", rank=1 + seed % 3, intercept=True)
    small = random.integers(0, 8, size=problem.targets.shape).astype(float)
    problem = at_ratio(replace(problem, targets=small), 10 ** random.uniform(-2, 0.3))
    near = Trial(problem, "near")
    best = near.networks[near.polish(near.add(random_network(problem, random, 5)))]
    offset = float(round(10 ** random.uniform(0, 12)))
    shifted = replace(problem, targets=small + offset)
    trial = Trial(shifted, f"offset {seed} of {offset:.0e}")
    oracle, tol = oracle_for(seed, problem)
    trial.certify(trial.add(replace(best, bias=best.bias + offset)), oracle, tol)
    trial.certify(0, oracle, tol)
    return trial


def small_decay(seed: int) -> Trial:
    """β from 1e-12 to 1e-1 of β_max: objectives next to nothing, and bounds that must be smaller still."""
    random = np.random.default_rng(seed)
    problem = random_problem(6_000 + seed, rank=1 + seed % 2)
    problem = at_ratio(problem, 10 ** random.uniform(-12, -1))
    trial = Trial(problem, f"small decay {seed}")
    best = trial.polish(trial.add(random_network(problem, random, 6)))
    oracle, tol = oracle_for(seed, problem)
    trial.certify(best, oracle, tol)
    trial.certify(0, "exact", tol)
    return trial


def scaled_data(seed: int) -> Trial:
    """Features times 2^k, real targets times 2^l: the same problem, and the same network scaled along, exactly."""
    random = np.random.default_rng(seed)
    problem = random_problem(7_000 + seed, loss="squared", rank=1 + seed % 3, hidden_bias=False)
    near = Trial(problem, "near")
    best = near.networks[near.polish(near.add(random_network(problem, random, 5)))]
    reach = (30, 120, 250, 600)[seed // 4 % 4]
    k, l = (int(v) for v in random.integers(-reach, reach + 1, size=2))
    l = max(min(l, 480), -480)  # beyond, squares of targets are no float64 numbers
    x, y = 2.0**k, 2.0**l
    beta = math.ldexp(problem.beta, k + l)
    if not 1e-290 < beta < 1e290:
        k = -k
        x, beta = 2.0**k, math.ldexp(problem.beta, k + l)
    scaled = replace(problem, images=problem.images * x, targets=problem.targets * y, beta=beta)
    trial = Trial(scaled, f"scaled {seed} by 2^{k}, 2^{l}", refusable=reach >= 250)
    oracle, tol = oracle_for(seed, problem)
    weights = np.ldexp(best.weights, l - k)
    if np.isfinite(weights).all():
        trial.certify(trial.add(Network(best.filters, weights, best.bias * y)), oracle, tol)
    trial.certify(0, oracle, tol)
    return trial


def odd_rows(random: np.random.Generator, count: int, rank: int) -> np.ndarray:
    """Rows (count, rank): duplicates, opposites, zeros, near multiples of one another, tiny and huge ones, integers."""
    rows = random.integers(-3, 4, size=(count, rank)).astype(float)
    for k in range(count):
        other, kind = rows[random.integers(count)], random.integers(7)
        if kind == 0:
            rows[k] = other
        elif kind == 1:
            rows[k] = -other
        elif kind == 2:
            rows[k] = 0.0
        elif kind == 3:
            rows[k] = other + 1e-9 * random.standard_normal(rank)
        elif kind == 4:
            rows[k] = other * 2.0 ** random.integers(-40, 41)
        elif kind == 5:
            rows[k] = random.standard_normal(rank)
    return rows


def odd_data(seed: int) -> Trial:
    """Problems whose patches are duplicates, opposites, zeros, nearly parallel, tiny and huge."""
    random = np.random.default_rng(seed)
    rank, n_patches = 1 + seed % 3, int(random.integers(1, 3))
    n = int(random.integers(3, 9 if rank < 3 else 6))
    rows = odd_rows(random, n * n_patches, rank).reshape(n, n_patches, rank)
    loss, c = ("squared", "cross-entropy")[seed // 3 % 2], int(random.integers(2, 4))
    targets = random_targets(random, n, c, "classes")
    pool = ("grid", (1, 1)) if seed % 2 else "none"
    images = rows.transpose(0, 2, 1)[..., None]
    problem = judge.Problem(images, targets, 1.0, loss, intercept=bool(seed // 2 % 2), pool=pool)
    problem = at_ratio(problem, 10 ** random.uniform(-2, 0.2))
    trial = Trial(problem, f"odd rows {seed}")
    oracle, tol = oracle_for(seed, problem)
    network = random_network(problem, random, 4)
    trial.certify(trial.add(network), oracle, tol)
    trial.certify(trial.polish(1), oracle, tol)
    trial.certify(0, oracle, tol)
    return trial


def estimates(seed: int) -> Trial:
    """Oracles that prove less: their certificates never say that they prove it all."""
    problem = random_problem(8_000 + seed)
    trial, random = Trial(problem, f"estimates {seed}"), np.random.default_rng(seed)
    number = trial.add(random_network(problem, random, 4))
    for which in (number, trial.polish(number)):
        trial.certify(which, ("sampled", "local")[seed % 2])
    return trial


FAMILIES: dict[str, tuple[Callable[[int], Trial], int, int]] = {
    "random networks": (random_networks, 7, 60),
    "trained networks": (trained_networks, 4, 40),
    "solved problems": (solved_problems, 4, 40),
    "tampered networks": (tampered_networks, 3, 30),
    "confident networks": (confident_networks, 8, 60),
    "one class": (one_class_networks, 6, 60),
    "offset targets": (offset_targets, 8, 60),
    "small decay": (small_decay, 6, 60),
    "scaled data": (scaled_data, 8, 64),
    "odd rows": (odd_data, 6, 40),
    "estimates": (estimates, 2, 16),
}
"""Family: how a trial is made of a seed, how many seeds by default, and how many in all."""


def seeds(quick: int, total: int) -> list:
    """The first ones quick, the rest slow, in one test each."""
    parts = [range(quick), range(quick, total)]
    return [parts[0], pytest.param(parts[1], marks=pytest.mark.slow)]


def families() -> list:
    made = []
    for name, (_, quick, total) in FAMILIES.items():
        made.append(pytest.param(name, range(quick), id=name))
        made.append(pytest.param(name, range(quick, total), id=f"{name}, more", marks=pytest.mark.slow))
    return made


@pytest.mark.parametrize(("family", "seeds"), families())
def test_no_certificate_claims_more_than_is_true(family: str, seeds: range, capsys) -> None:
    faults, certificates, proofs, refused, tight = [], 0, 0, 0, 0
    for seed in seeds:
        trial = FAMILIES[family][0](seed)
        faults += trial.verdict()
        certificates += len(trial.claims) + getattr(trial, "others", 0)
        proofs += sum(certificate.scope == "global" for _, _, certificate in trial.claims)
        tight += sum(certificate.rel_gap < 1e-2 for _, _, certificate in trial.claims)
        refused += trial.refused
    with capsys.disabled():
        print(f"\njudged {family}: {certificates} certificates, {proofs} proofs, {tight} within 1 %, {refused} refused, "
              f"{len(faults)} faults")
    assert not faults, "\n".join(faults)
