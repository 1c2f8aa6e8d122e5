"""What a training on images ends with: the exported network, certified and scored."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from convcvx.activations import Activation
from convcvx.budget import LEAST
from convcvx.certificate import Certificate
from convcvx.data.datasets import Dataset
from convcvx.data.given import given_dataset
from convcvx.display.pictures import by_weight, data_uri, kernel_shades
from convcvx.display.words import claims, counted, rows, why_empty
from convcvx.errors import InputError, RunError, check_choice
from convcvx.network.certify import certify_on, outputs_of_export, parameters_of
from convcvx.network.evaluate import accuracy, confusion, predict, real_scores
from convcvx.network.layers import read_network
from convcvx.network.pretrained import save_pretrained
from convcvx.network.two_layer import TwoLayerCNN, two_layer_cnn
from convcvx.oracles.local import LocalOracle
from convcvx.pooling import Pooling
from convcvx.responses.passes import Responses
from convcvx.solution import Round, Solution
from convcvx.solvers import SOLVERS
from convcvx.terms.status import Status
from convcvx.training.card import model_card
from convcvx.training.clock import Clock
from convcvx.training.dictionary_gap import FamilyProof, LeftOut, family_proof
from convcvx.training.optimise import Optimised, named_oracle
from convcvx.training.options import TrainConfig
from convcvx.training.origin import Origin
from convcvx.training.plan import Plan, status_of
from convcvx.training.presets import in_flags
from convcvx.training.progress import peak_memory_mb
from convcvx.training.resolve import Data, image_shape
from convcvx.training.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

PLOTS = ("training", "filters", "bounds", "confusion")
"""What a fit plots."""
NOTEBOOK_FILTERS = 24
"""Filters that a notebook shows of a fit, in two lines."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A trained layer.

    Attributes
    ----------
    network : TwoLayerCNN
        An ordinary torch module: images (n, C, H, W) to (n, c).
    certificate : Certificate
        How far `network`, as it is, can be from the optimum, and with which scope.
    solution : Solution
        The same network in float64 and in the convex model's variables, its status, and how the solver got there.
    config : TrainConfig
        The options.
    metrics : dict
        What `convcvx train --json` prints: accuracies, seconds, status and more.
    origin : Origin, optional
        By what to know the data again.
    """

    network: TwoLayerCNN
    certificate: Certificate
    solution: Solution
    config: TrainConfig
    metrics: dict[str, Any]
    origin: Origin | None = None

    @property
    def history(self) -> list[Round]:
        """One record a round: objective, bound, gap, filters, seconds; see `Solution`."""
        return self.solution.history

    def to_frame(self) -> DataFrame:
        """The history as a pandas data frame; see `Solution.to_frame`."""
        return self.solution.to_frame()

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a run folder, as `convcvx train --out` does: `convcvx.load` and every command take it.

        Raises
        ------
        RunError
            Where a run is already, unless `overwrite`, or other files are.
        """
        run = Run.new(folder, overwrite=overwrite)
        self.write(run)
        return run.out

    def write(self, run: Run) -> None:
        """All of it, to a run that has not begun."""
        embedding = self.solution.embedding
        assert embedding is not None
        with run.held(), run.started(self.config, self.origin, resume=False):
            run.save_embedding(embedding)
            run.save_beta_max(self.metrics["beta_max"])
            if self.config.dictionary is not None:
                run.save_chosen_beta(self.certificate.beta)
            run.save_state(self.solution)
            self.write_result(run)

    def write_result(self, run: Run) -> None:
        """The network, its certificate and the metrics: with them `run` is finished."""
        run.save_result(self.network, self.certificate)
        run.save_metrics(self.metrics | {"out": str(run.out)})

    def _repr_html_(self) -> str:
        from convcvx.display.html import notebook  # Jinja: on use

        kernels = self.network.state_dict()["0.weight"]
        order = by_weight(kernels)[:NOTEBOOK_FILTERS]
        shades = kernel_shades(kernels[order])
        shown = ("train_accuracy", "validation_accuracy", "test_accuracy", "test_r2", "n_filters", "primal", "seconds")
        return notebook(
            title=f"Trained layer: {Status(self.metrics['status']).meaning}",
            claims=claims(asdict(self.certificate)),
            rows=rows({name: self.metrics.get(name) for name in shown}),
            pictures=[(data_uri(shades[k]), f"filter {index}") for k, index in enumerate(order.tolist())],
        )

    def plot(self, what: str = "training", images: Any = None, targets: Any = None) -> Figure:
        """A matplotlib figure.

        Parameters
        ----------
        what : {"training", "filters", "bounds", "confusion"}
            Objective and gap against time; the filters, heaviest first; objective and lower bounds on one line; which
            classes are taken for which.
        images, targets
            Of "confusion", as `convcvx.fit` takes them; some classes may be missing.

        Raises
        ------
        InputError
            For another name, or a confusion without images or of targets that are no classes.
        DataError
            For labels that the network does not know.
        """
        from convcvx.display.figures import confusion_figure, filters_figure  # matplotlib: on use

        check_choice("what", what, PLOTS)
        if what == "training":
            return replace(self.solution, certificate=self.certificate).plot()
        if what == "filters":
            return filters_figure(self.network.state_dict()["0.weight"])
        if what == "bounds":
            return self.certificate.plot()
        if images is None:
            raise InputError("a confusion is one on images: pass plot('confusion', images, targets)")
        known = self.network.meta.get("classes")
        given, *_ = given_dataset(images, targets, form=self.config.image_form, classes=known)
        if not given.n_classes:
            raise InputError(
                "targets must be classes for a confusion matrix; got real values: plot('training') instead"
            )
        return confusion_figure(confusion(predict(self.network, given.images), given.targets), given.classes)

    def save_pretrained(self, folder: str | os.PathLike[str], *, push_to: str | None = None) -> Path:
        """Write the network with a model card of its scores and certificate, for `TwoLayerCNN.from_pretrained`.

        Parameters
        ----------
        push_to : str, optional
            A repository OWNER/NAME of Hugging Face to upload both to (`pip install 'convcvx[hub]'`).

        Raises
        ------
        InputError, RunError
            Where something is missing, or the folder cannot be written.
        """
        flags = in_flags(self.config.chosen)
        card = model_card("TwoLayerCNN", self.network, self.metrics, [self.metrics], flags)
        return save_pretrained(folder, self.network.to_bytes(), card, push_to)

    def __str__(self) -> str:
        scores = {name: self.metrics.get(f"{name}_accuracy") for name in ("train", "validation", "test")}
        said = [f"{name} accuracy {score:.2%}" for name, score in scores.items() if score is not None]
        kept = counted(self.solution.n_filters, "filter") + why_empty(self.metrics)
        first = ", ".join([kept, f"status {self.metrics['status']}", *said])
        return f"{first}\n{self.certificate}"

    __repr__ = __str__  # a prompt would show every tensor


def finish(
    optimised: Optimised, config: TrainConfig, plan: Plan, data: Data, clock: Clock, origin: Origin | None = None
) -> Fit:
    """Export the solution as a network, certify that, and score it on all sets.

    Raises
    ------
    InputError
        When the network's outputs are not those of the solution: float32 cannot hold it.
    """
    problem, solution, train = optimised.problem, optimised.solution, data[0]
    solution = solution.shifted(problem.offset)
    responses = problem.responses
    space = responses.embedding, responses.pooling, image_shape(train)
    network = TwoLayerCNN.from_solution(solution, *space, intercept=config.intercept, activation=responses.activation)
    network.meta = {"data": config.data, "classes": list(train.classes), "loss": config.loss, "beta": problem.beta}
    network.meta |= {name: value for name in ("resize", "channels") if (value := getattr(config, name)) is not None}
    network.to(responses.device)  # where it is checked and scored
    own = parameters_of(read_network(network, image_shape(train)), responses.embedding)
    outputs, said = outputs_of_export(problem, network, *own)
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
        "train_accuracy": train_score(certificate, config, network, train, responses),
        "test_accuracy": score(network, data[1], responses),
        "validation_accuracy": score(network, data[2], responses),
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
    if not train.n_classes:
        for name, part in (("test", data[1]), ("validation", data[2])):
            if part is not None:
                outputs = predict(network, part.images, responses)
                scores = real_scores(outputs, part.targets, config.loss, part.weights)
                metrics |= {f"{name}_{score}": value for score, value in scores.items()}
    return Fit(network, certificate, solution, config, metrics, origin)


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


def load_fit(run: Run) -> Fit:
    """A finished run as a `Fit`; its certificate is the one that was saved: `convcvx.certify` proves it anew."""
    metrics, solution, embedding = run.metrics, run.load_state(), run.load_embedding()
    if solution is None or embedding is None:
        raise RunError(f"{run.folder} has lost its checkpoint: train it again")
    network = two_layer_cnn(run.folder)
    from_network = network.state_dict().get("4.bias", torch.zeros(len(solution.intercept)))
    if not torch.equal(solution.intercept.float(), from_network):  # targets far from zero were centred
        solution = solution.shifted(from_network.double() - solution.intercept)
    config = run.config
    pooling, activation = Pooling.of(config.pool), Activation.of(config.activation)
    solution = replace(solution, embedding=embedding, pooling=pooling, activation=activation)
    return Fit(network, run.certificate, solution, config, metrics, run.origin)


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


def certificate_summary(certificate: Certificate) -> dict[str, Any]:
    """The certificate's part of the printed JSON."""
    names = (
        "primal",
        "dual",
        "rel_gap",
        "scope",
        "meaning",
        "beta",
        "loss",
        "activation",
        "oracle",
        "family",
        "family_size",
        "family_gap",
        "optimum",
    )
    values = certificate.to_dict()
    return {name: values[name] for name in (*names, "proved", "proved_gap", "proved_by")}
