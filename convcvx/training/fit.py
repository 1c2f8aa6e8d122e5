"""A trained layer, as `convcvx.fit` gives it: network, certificate, solution, scores; on disk a run folder."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from convcvx.activations import Activation
from convcvx.certificate import Certificate
from convcvx.data.given import given_dataset
from convcvx.display.pictures import by_weight, data_uri, kernel_shades
from convcvx.display.words import claims, counted, rows, why_empty
from convcvx.errors import InputError, RunError, check_choice
from convcvx.network.evaluate import confusion, predict
from convcvx.network.pretrained import save_pretrained
from convcvx.network.two_layer import TwoLayerCNN, two_layer_cnn
from convcvx.pooling import Pooling
from convcvx.solution import Round, Solution
from convcvx.terms.status import Status
from convcvx.training.card import model_card
from convcvx.training.options import TrainConfig
from convcvx.training.origin import Origin
from convcvx.training.presets import in_flags
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
