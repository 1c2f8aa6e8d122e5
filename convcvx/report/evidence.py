"""What images show of a network: which classes it confuses, where it is most mistaken, how far real values are off."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from convcvx.data.datasets import Dataset
from convcvx.display.pictures import data_uri, image_shades
from convcvx.display.words import percent, short
from convcvx.errors import ConvcvxError, DataWarning, one_line
from convcvx.losses.table import get_loss
from convcvx.losses.targets import LABELLED, encode_targets
from convcvx.network.evaluate import confusion, predict
from convcvx.training.resolve import Data

LOOKED_AT = 10_000
"""Images that a report looks at, at most, evenly spread: shares of so many are right to half a per cent."""
MOST_MISTAKES = 24
"""Mistaken images shown, those with the largest loss."""
MOST_CLASSES = 20
"""Classes up to which the confusion matrix is a table; of more, a picture, and the table has the worst so many."""


@dataclass(frozen=True)
class Mistake:
    """An image that the network is wrong about."""

    image: str
    text: str


@dataclass(frozen=True)
class Evidence:
    """What the images of one set show.

    Attributes
    ----------
    dataset : Dataset
        Those looked at.
    of : str
        Which, in words.
    counts : Tensor (c, c) or None
        A row for a true class, a column for what it was taken for; None for targets that are no classes.
    classes : list of dict
        Of each class, the worst first where there are many: name, images, share that is right, taken for.
    labels : list of dict
        Of each label, for a loss of labels: name, images with it, share found, share of what was found that is right.
    mistakes : list of Mistake
    predictions : Tensor (n, c)
    """

    dataset: Dataset
    of: str
    predictions: Tensor
    counts: Tensor | None = None
    classes: list[dict[str, Any]] = field(default_factory=list)
    labels: list[dict[str, Any]] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [short(name) for name in self.dataset.classes]


def the_unseen(data: Data) -> tuple[Dataset, str]:
    """The set that tells most: the test set, else what was held out, else the training set; and its name."""
    train, test, validation = data
    for part, name in ((test, "test"), (validation, "validation")):
        if part is not None and len(part):
            return part, name
    return train, "training"


def look(network: nn.Module, data: Data, loss: str) -> Evidence:
    """What the images that `network` has not seen show of it."""
    whole, name = the_unseen(data)
    spread = torch.linspace(0, len(whole) - 1, min(len(whole), LOOKED_AT), dtype=torch.float64).round().long()
    dataset = whole if len(spread) == len(whole) else whole.part(spread)
    of = f"{len(dataset):,} {name} images" + ("" if dataset is whole else f" of {len(whole):,}, evenly spread")
    if isinstance(dataset.images, Tensor):
        dataset = replace(dataset, images=dataset.images.float())
    evidence = Evidence(dataset, of, predict(network, dataset.images))
    targets = encode_targets(dataset.targets, loss, evidence.predictions.shape[1])
    losses = get_loss(loss).value(evidence.predictions.double(), targets)
    if dataset.n_classes:
        return _of_classes(evidence, losses)
    if loss in LABELLED:
        return _of_labels(evidence, losses)
    shown = [
        Mistake(_picture(dataset, i), f"{_reals(dataset.targets[i])}, predicted {_reals(evidence.predictions[i])}")
        for i in losses.argsort(descending=True)[:MOST_MISTAKES].tolist()
    ]
    return replace(evidence, mistakes=shown)


def seen_or_why(network: nn.Module, load: Any, loss: str) -> tuple[Evidence | None, str]:
    """What the images that `load` gives show, or None and why there are none, of which it warns."""
    try:
        return look(network, load(), loss), ""
    except (ConvcvxError, OSError) as error:
        why = one_line(error)
        warnings.warn(f"the report leaves out what needs the images: {why}", DataWarning, stacklevel=3)
        return None, why


def _of_classes(evidence: Evidence, losses: Tensor) -> Evidence:
    dataset, names, taken = evidence.dataset, evidence.names, evidence.predictions.argmax(dim=1)
    counts = confusion(evidence.predictions, dataset.targets)
    found = [_of_class(counts[k], k, names) for k in range(len(counts)) if int(counts[k].sum())]
    if len(names) > MOST_CLASSES:
        found = sorted(found, key=lambda told: told["right"])[:MOST_CLASSES]
    wrong = (taken != dataset.targets).nonzero().flatten()
    worst = wrong[losses[wrong].argsort(descending=True)][:MOST_MISTAKES]
    mistakes = [
        Mistake(_picture(dataset, i), f"{names[int(dataset.targets[i])]}, taken for {names[int(taken[i])]}")
        for i in worst.tolist()
    ]
    return replace(evidence, counts=counts, classes=found, mistakes=mistakes)


def _of_class(row: Tensor, k: int, names: Sequence[str]) -> dict[str, Any]:
    total, others = int(row.sum()), row.clone()
    others[k] = 0
    most = int(others.argmax())
    taken = f"{names[most]} ({int(others[most]):,})" if int(others[most]) else "–"
    return {"name": names[k], "images": total, "right": int(row[k]) / total, "taken": taken}


def _of_labels(evidence: Evidence, losses: Tensor) -> Evidence:
    found, there = evidence.predictions > 0, evidence.dataset.targets > 0.5
    labels = [
        {
            "name": f"label {k}",
            "images": int(there[:, k].sum()),
            "found": percent(_share((found & there)[:, k], there[:, k])),
            "right": percent(_share((found & there)[:, k], found[:, k])),
        }
        for k in range(there.shape[1])
    ]
    worst = losses.argsort(descending=True)[:MOST_MISTAKES].tolist()
    mistakes = [
        Mistake(_picture(evidence.dataset, i), f"has {_members(there[i])}, found {_members(found[i])}")
        for i in worst
        if bool((found[i] != there[i]).any())
    ]
    return replace(evidence, labels=labels[:MOST_CLASSES], mistakes=mistakes)


def _share(part: Tensor, whole: Tensor) -> float | None:
    return int(part.sum()) / int(whole.sum()) if int(whole.sum()) else None


def _members(row: Tensor) -> str:
    return ", ".join(map(str, row.nonzero().flatten().tolist())) or "none"


def _reals(row: Tensor) -> str:
    shown = [f"{value:.3g}" for value in row.flatten()[:3].tolist()]
    return ", ".join(shown) + (", …" if row.numel() > len(shown) else "")


def _picture(dataset: Dataset, i: int) -> str:
    return data_uri(image_shades(dataset.images[i : i + 1][0]))
