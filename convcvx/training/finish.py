"""How a training on images ends: its network is exported and scored, then certified.

The network is of use before anything is proved of it, and a proof may take as long as the training: it is kept first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from convcvx.budget import LEAST
from convcvx.certificate import Certificate
from convcvx.data.datasets import Dataset
from convcvx.display.words import counted, percent
from convcvx.network.certify import certify_on, outputs_of_export, parameters_of
from convcvx.network.evaluate import accuracy, predict, real_scores
from convcvx.network.layers import read_network
from convcvx.network.two_layer import TwoLayerCNN
from convcvx.oracles.local import LocalOracle
from convcvx.responses.passes import Responses
from convcvx.solution import Round, Solution
from convcvx.solvers import SOLVERS
from convcvx.training.clock import Clock
from convcvx.training.dictionary_gap import FamilyProof, LeftOut, family_proof
from convcvx.training.fit import Fit, certificate_summary
from convcvx.training.optimise import Optimised, named_oracle
from convcvx.training.options import TrainConfig
from convcvx.training.origin import Origin
from convcvx.training.plan import Plan, status_of
from convcvx.training.progress import Report, peak_memory_mb
from convcvx.training.resolve import Data, image_shape


def finish(
    optimised: Optimised,
    config: TrainConfig,
    plan: Plan,
    data: Data,
    report: Report,
    clock: Clock,
    origin: Origin | None = None,
    keep: Callable[[TwoLayerCNN], None] | None = None,
) -> Fit:
    """Export the solution as a network, and score it; then certify it.

    `keep` is given the network in between, before what may take long.

    Raises
    ------
    InputError
        When the network's outputs are not those of the solution: float32 cannot hold it.
    """
    report.begin("outputs of the finished network")
    exported = _export(optimised, config, data)
    if keep is not None:
        keep(exported.network)
    report.begin(f"certificate of the finished network: {exported}")
    return _certified(optimised, exported, config, plan, data, clock, origin)


@dataclass(frozen=True, eq=False)
class _Export:
    """A trained network as it leaves, its outputs found to be those of the solution; nothing is proved of it yet.

    Attributes
    ----------
    network : TwoLayerCNN
    solution : Solution
        Of the targets as they were given.
    parameters : tuple
        Filters (m, r), weights (m, P, c) and intercept (c,) of the network as it is.
    outputs : Tensor (n, c) float64
        Its predictions without the intercept.
    said : Tensor (n, c), optional
        What it says of all images, where all were shown to it.
    scores : dict
        On test and validation images: accuracy, and R² of real targets.
    """

    network: TwoLayerCNN
    solution: Solution
    parameters: tuple[Tensor, Tensor, Tensor | None]
    outputs: Tensor
    said: Tensor | None
    scores: dict[str, float | None]

    def __str__(self) -> str:
        test = self.scores["test_accuracy"]
        filters = counted(self.solution.n_filters, "filter")
        return filters if test is None else f"{filters}, test accuracy {percent(test)}"


def _export(optimised: Optimised, config: TrainConfig, data: Data) -> _Export:
    """An ordinary network of the solution, scored on test and validation images."""
    problem, train = optimised.problem, data[0]
    solution = optimised.solution.shifted(problem.offset)
    responses = problem.responses
    space = responses.embedding, responses.pooling, image_shape(train)
    network = TwoLayerCNN.from_solution(solution, *space, intercept=config.intercept, activation=responses.activation)
    network.meta = {"data": config.data, "classes": list(train.classes), "loss": config.loss, "beta": problem.beta}
    network.meta |= {name: value for name in ("resize", "channels") if (value := getattr(config, name)) is not None}
    network.to(responses.device)  # where it is checked and scored
    own = parameters_of(read_network(network, image_shape(train)), responses.embedding)
    outputs, said = outputs_of_export(problem, network, *own)
    return _Export(network, solution, own, outputs, said, _scores(network, config, data, responses))


def _certified(
    optimised: Optimised,
    exported: _Export,
    config: TrainConfig,
    plan: Plan,
    data: Data,
    clock: Clock,
    origin: Origin | None,
) -> Fit:
    """The exported network with its certificate, and all that is known of it."""
    problem, solution, network, own = optimised.problem, exported.solution, exported.network, exported.parameters
    outputs, said = exported.outputs, exported.said
    proof = None
    if config.oracle != LocalOracle.name:  # which is asked for where nothing is to be proved
        halfway = problem.until(problem.deadline.share(0.5))
        seconds = clock.seconds if config.oracle == "auto" else None  # another oracle is asked for
        proof = family_proof(config, halfway, *own, outputs, training_seconds=seconds)
    if isinstance(proof, FamilyProof):
        outputs = proof.outputs
    if said is None:  # what it stands for, as it does on the images that it was asked on
        said = outputs + (0 if own[2] is None else own[2])
    certificate = certify_on(
        problem.until(problem.deadline.later(LEAST * (config.time_limit or 0.0))),
        network,
        oracle=named_oracle(config.oracle, config),
        tol=config.tol,
        seed=config.seed,
        dual_point=solution.dual_point,
        training=solution.history,
        rounds=_proving(solution.history, resumed=clock.earlier > 0) if SOLVERS[plan.solver].asks_oracle else (),
        outputs=outputs,
        said=said,
    )
    if isinstance(proof, FamilyProof):
        certificate = proof.beside(certificate)
    metrics = certificate_summary(certificate) | {
        "beta_max": optimised.beta_max,
        "n_filters": solution.n_filters,
        "train_accuracy": train_score(certificate, config, network, data[0], problem.responses),
        **exported.scores,
        "seconds": clock.seconds,
        "core_seconds": clock.core_seconds,
        "compiling_seconds": clock.compiling_seconds,
        "peak_memory_mb": peak_memory_mb(),
        "status": status_of(certificate, config.tol, solution.status),
        "solver": plan.solver,
        "rounds": solution.rounds,
        "patch_rank": certificate.patch_rank,
    }
    if isinstance(proof, LeftOut):
        metrics["family_seconds"] = proof.seconds
    return Fit(network, certificate, solution, config, metrics, origin)


def _scores(network: TwoLayerCNN, config: TrainConfig, data: Data, responses: Responses) -> dict[str, float | None]:
    parts = {"test": data[1], "validation": data[2]}
    scores: dict[str, float | None] = {
        f"{name}_accuracy": score(network, part, responses) for name, part in parts.items()
    }
    if not data[0].n_classes:
        for name, part in parts.items():
            if part is not None:
                outputs = predict(network, part.images, responses)
                found = real_scores(outputs, part.targets, config.loss, part.weights)
                scores |= {f"{name}_{what}": value for what, value in found.items()}
    return scores


def _proving(history: list[Round], *, resumed: bool) -> list[Round]:
    """The records that count as proofs: none that was read from a file.

    Of a resumed training that is the last one, which is taken again, if its bound is its own: no record before it has
    that, from which it may have been kept.
    """
    if not resumed:
        return history
    if not history:
        return []
    *others, last = history
    own = "proved_g" in last and all(record.get("proved_g") != last["proved_g"] for record in others)
    return [last] if own else []


def score(network: TwoLayerCNN, dataset: Dataset | None, responses: Responses | None = None) -> float | None:
    """Accuracy; None for no set, or real targets. `responses` as in `predict`."""
    if dataset is None or not dataset.n_classes:
        return None
    return accuracy(predict(network, dataset.images, responses), dataset.targets, dataset.weights)


def train_score(
    certificate: Certificate,
    config: TrainConfig,
    network: TwoLayerCNN,
    train: Dataset,
    responses: Responses | None = None,
) -> float | None:
    """Accuracy on the training images, which a pass tells only where the certificate's counts classes by weights."""
    known = train.n_classes and not config.class_weight
    return certificate.train_accuracy if known else score(network, train, responses)
