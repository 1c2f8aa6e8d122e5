"""The card of a network: what it is, what is proved of it, how it scores, what it takes. Made from what a run keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convcvx.display.words import SETS, of_optimum, told
from convcvx.losses.targets import LABELLED
from convcvx.network.preprocess import ImageTransform
from convcvx.terms.scope import Scope


def model_card(kind: str, network: Any, metrics: dict[str, Any], stages: list[dict[str, Any]], options: str) -> str:
    """A README.md with the metadata that Hugging Face reads.

    Parameters
    ----------
    kind : str
        The class that loads it: TwoLayerCNN or StackedCNN.
    network : TwoLayerCNN or StackedCNN
    metrics : dict
        What `--json` prints.
    stages : list of dict
        For each certificate, one of a stage, the metrics of its training.
    options : str
        Those that say what network was trained, where they are not the defaults, as flags.
    """
    meta = network.meta
    data = Path(str(meta.get("data", "data"))).name
    classes = [str(name) for name in meta.get("classes", [])]
    scores = {name: metrics.get(f"{name}_accuracy") for name in SETS}
    lines = [
        "---",
        *_metadata(data, classes, scores["test"]),
        "---",
        "",
        f"# {kind} for {data}",
        "",
        "A convolutional network trained by convcvx, which seeks the optimum of the objective, loss plus weight "
        "decay, as a convex program, and says how far from it the network is.",
        "",
        "## How far it is from the optimum",
        "",
        *(line for number, stage in enumerate(stages, 1) for line in _certified(stage, number, len(stages))),
        "",
        "Others may score better on test images: the certificate speaks of the objective on the training images.",
        "",
        "## Scores",
        "",
        "| images | accuracy |",
        "|---|---|",
        *(f"| {SETS[name].lower()} images | {score:.2%} |" for name, score in scores.items() if score is not None),
        *(f"| test images, {key[5:]} | {metrics[key]:.4g} |" for key in sorted(metrics) if _other_score(key)),
        "",
        "## Images and outputs",
        "",
        f"It takes {ImageTransform(network.image_shape).description}; `convcvx.network.ImageTransform` makes them from "
        "any image.",
        f"Its outputs are scores of the classes {', '.join(classes)}." if classes else _outputs(meta.get("loss")),
        "",
        "```python",
        f"from convcvx.network import ImageTransform, {kind}" if kind == "TwoLayerCNN" else _STACK_IMPORTS,
        "",
        f'network = {kind}.from_pretrained("this folder")',
        "scores = network(ImageTransform(network.image_shape)(image)[None])",
        "```",
        "",
        "## Training",
        "",
        f"Data {data}, loss {meta.get('loss')}, {_spent(metrics)}.",
        f"Options of the network: `{options or 'the defaults'}`.",
        "",
    ]
    return "\n".join(lines)


def _outputs(loss: Any) -> str:
    """What they are where there are no classes."""
    if loss == "cross-entropy":
        return "Its outputs are logits: their softmax are the probabilities of the classes."
    labels = "Its outputs are scores of labels: above 0, an image has the label."
    return labels if loss in LABELLED else "Its outputs are real values."


_STACK_IMPORTS = "from convcvx.network import ImageTransform\nfrom convcvx.stack.network import StackedCNN"


def _metadata(data: str, classes: list[str], accuracy: float | None) -> list[str]:
    """YAML; texts are written as JSON, which is YAML too."""
    task = "image-classification" if classes else "other"
    lines = ["library_name: convcvx", f"pipeline_tag: {task}", "tags: [convcvx, convex-optimization, certificate]"]
    if accuracy is None:
        return lines
    result = {
        "task": {"type": task},
        "dataset": {"name": data, "type": data, "split": "test"},
        "metrics": [{"type": "accuracy", "value": accuracy}],
    }
    return [*lines, f"model-index: {json.dumps([{'name': data, 'results': [result]}])}"]


def _certified(stage: dict[str, Any], number: int, count: int) -> list[str]:
    """What is known of the optimum, of a stage on the features it was given."""
    scope = Scope(stage["scope"])
    where = f"Stage {number}: the objective" if count > 1 else "The objective"
    bound = "the lower bound" if scope.proved else "the estimated lower bound"
    text = (
        f"{where} is {stage['primal']:.8g} at beta {stage['beta']:.6g}; {bound} is {stage['dual']:.8g}, a "
        f"relative gap of {stage['rel_gap']:.2e}. Scope **{scope}**: {stage.get('meaning', scope.meaning)}."
    )
    proved = stage.get("proved")
    if not scope.for_all and proved is not None:
        text += f" Proved for all networks of the problem, by {stage['proved_by']}: {proved:.8g}"
        text += f", a gap of {stage['proved_gap']:.2e}."
    further: dict[str, str | None] = {}
    if "optimum" in stage:
        further = {**told(stage), "optimum": of_optimum(stage)}
    return [f"- {line}" for line in (text, *(f"{name}: {said}" for name, said in further.items() if said))]


def _other_score(key: str) -> bool:
    return key.startswith("test_") and key != "test_accuracy"


def _spent(metrics: dict[str, Any]) -> str:
    return f"{metrics['seconds']:.0f} s, status {metrics['status']}"
