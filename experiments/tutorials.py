"""What `certify` says of the networks of public tutorials: read, or refused and why.

    python experiments/tutorials.py

The networks are those of the tutorials, or a first block of them, layer by layer, in code of our own, with random
weights: whether a network is read does not depend on them. The images are the embedded digits, enlarged to what the
network takes. Writes experiments/results/tutorials.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convcvx
from convcvx.data.datasets import load
from convcvx.errors import InputError

RESULTS = Path(__file__).parent / "results"
N = 16
"""Images: enough to see whether outputs are those of the layers that were read."""
BETA = 0.05
"""Weight decay; any would do."""
SECONDS = 0.5
"""Time limit of a certificate: what is asked is whether there is one."""


@dataclass(frozen=True)
class Tutorial:
    """A network, the shape of what it takes, and the loss that the tutorial trains it with, as convcvx calls it."""

    source: str
    network: Callable[[], nn.Module]
    shape: tuple[int, ...] = (1, 28, 28)
    loss: str = "cross-entropy"
    outputs: int = 10


def perceptron(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Flatten, then linear layers with an activation between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, behind in pairwise(widths):
        layers += [nn.Linear(before, behind), activation()]
    return nn.Sequential(*layers[:-1])


class InForward(nn.Module):
    """Layers, and a forward that is a function of them and the images."""

    def __init__(self, forward: Callable[[InForward, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.steps = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, x)


def two_convolutions(net: InForward, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu(net.conv1(x)), 2)
    x = F.max_pool2d(F.relu(net.conv2(x)), 2)
    x = F.relu(net.fc1(torch.flatten(x, 1)))
    return net.fc3(F.relu(net.fc2(x)))


def torch_example(net: InForward, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu(net.conv2(F.relu(net.conv1(x)))), 2)
    x = F.relu(net.fc1(torch.flatten(net.dropout1(x), 1)))
    return F.log_softmax(net.fc2(net.dropout2(x)), dim=1)


def one_convolution(net: InForward, x: Tensor) -> Tensor:
    x = torch.relu(F.max_pool2d(net.conv1(x), 3))
    return F.log_softmax(net.fc(x.view(-1, 192)), dim=1)


def hidden_relu(net: InForward, x: Tensor) -> Tensor:
    return net.linear2(net.linear1(x).clamp(min=0))


def averaged(net: InForward, x: Tensor) -> Tensor:
    x = x.view(-1, 1, 28, 28)
    x = F.relu(net.conv3(F.relu(net.conv2(F.relu(net.conv1(x))))))
    return F.avg_pool2d(x, 4).view(-1, 10)


def residual(net: InForward, x: Tensor) -> Tensor:
    x = F.relu(net.conv1(x))
    return net.fc(F.adaptive_avg_pool2d(x + F.relu(net.conv2(x)), 1).flatten(1))


def convolutions(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def conv_block(before: int, behind: int) -> list[nn.Module]:
    return [nn.Conv2d(before, behind, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]


TUTORIALS = {
    "perceptron": Tutorial("Dive into Deep Learning, multilayer perceptrons", lambda: perceptron(784, 256, 10)),
    "perceptron with dropout": Tutorial(
        "TensorFlow, quickstart for beginners",
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10)),
    ),
    "perceptron of 500": Tutorial("yunjey/pytorch-tutorial, feedforward network", lambda: perceptron(784, 500, 10)),
    "clamp for the ReLU": Tutorial(
        "PyTorch, Learning PyTorch with Examples",
        lambda: InForward(hidden_relu, linear1=nn.Linear(784, 100), linear2=nn.Linear(100, 10)),
        (784,),
        "squared",
    ),
    "threes and sevens": Tutorial(
        "fast.ai book, chapter 4",
        lambda: nn.Sequential(nn.Linear(784, 30), nn.ReLU(), nn.Linear(30, 1)),
        (784,),
        "bce",
        1,
    ),
    "MLPClassifier": Tutorial("scikit-learn, its default as modules", lambda: perceptron(64, 100, 10), (1, 8, 8)),
    "encoder": Tutorial(
        "Lightning, autoencoder in 15 minutes", lambda: perceptron(784, 64, 3), loss="squared", outputs=3
    ),
    "one convolution, log-softmax": Tutorial(
        "a first CNN of one layer, as in many notebooks",
        lambda: InForward(one_convolution, conv1=nn.Conv2d(1, 3, 3), fc=nn.Linear(192, 10)),
    ),
    "one convolution, max pooling": Tutorial(
        "DataCamp, Introduction to Deep Learning in PyTorch, its first block",
        lambda: convolutions(*conv_block(1, 5), nn.Flatten(), nn.Linear(5 * 14 * 14, 10)),
    ),
    "BatchNorm and average pooling": Tutorial(
        "yunjey/pytorch-tutorial, one block of its CNN",
        lambda: convolutions(
            nn.Conv2d(1, 16, 5, padding=2),
            *(nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * 14 * 14, 10)),
        ),
    ),
    "leaky ReLU": Tutorial(
        "PyTorch, DCGAN's discriminator, its first layer",
        lambda: convolutions(
            nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64 * 16 * 16, 1)
        ),
        (3, 32, 32),
        "bce",
        1,
    ),
    "softmax regression": Tutorial("PyTorch, What is torch.nn really?", lambda: perceptron(784, 10)),
    "three convolutions": Tutorial(
        "PyTorch, What is torch.nn really?",
        lambda: InForward(
            averaged,
            conv1=nn.Conv2d(1, 16, 3, 2, 1),
            conv2=nn.Conv2d(16, 16, 3, 2, 1),
            conv3=nn.Conv2d(16, 10, 3, 2, 1),
        ),
    ),
    "quickstart": Tutorial("PyTorch, Quickstart", lambda: perceptron(784, 512, 512, 10)),
    "sixty-minute blitz": Tutorial(
        "PyTorch, Deep Learning with PyTorch: a 60 minute blitz",
        lambda: InForward(
            two_convolutions,
            conv1=nn.Conv2d(3, 6, 5),
            conv2=nn.Conv2d(6, 16, 5),
            fc1=nn.Linear(400, 120),
            fc2=nn.Linear(120, 84),
            fc3=nn.Linear(84, 10),
        ),
        (3, 32, 32),
    ),
    "MNIST example": Tutorial(
        "pytorch/examples, mnist",
        lambda: InForward(
            torch_example,
            conv1=nn.Conv2d(1, 32, 3),
            conv2=nn.Conv2d(32, 64, 3),
            dropout1=nn.Dropout(0.25),
            dropout2=nn.Dropout(0.5),
            fc1=nn.Linear(9216, 128),
            fc2=nn.Linear(128, 10),
        ),
    ),
    "convnet of Keras": Tutorial(
        "Keras, Simple MNIST convnet",
        lambda: convolutions(
            *(*conv_block(1, 32), *conv_block(32, 64), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * 49, 10)),
            nn.Softmax(dim=1),
        ),
    ),
    "probabilities": Tutorial(
        "Keras, basic classification, with its softmax as last layer",
        lambda: nn.Sequential(perceptron(784, 128, 10), nn.Softmax(dim=1)),
    ),
    "LeNet with sigmoids": Tutorial(
        "Dive into Deep Learning, LeNet",
        lambda: convolutions(
            *(nn.Conv2d(1, 6, 5, padding=2), nn.Sigmoid(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Sigmoid()),
            *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.Sigmoid(), nn.Linear(120, 84), nn.Sigmoid()),
            nn.Linear(84, 10),
        ),
    ),
    "sigmoids": Tutorial(
        "Nielsen, Neural Networks and Deep Learning, chapter 1",
        lambda: nn.Sequential(perceptron(784, 30, 10, activation=nn.Sigmoid), nn.Sigmoid()),
        loss="squared",
    ),
    "tanh": Tutorial(
        "PyTorch, scikit-learn and others: two moons or a plane of data, a hidden layer of tanh",
        lambda: perceptron(784, 4, 1, activation=nn.Tanh),
        loss="bce",
        outputs=1,
    ),
    "residual block": Tutorial(
        "Dive into Deep Learning, residual networks, one block",
        lambda: InForward(
            residual, conv1=nn.Conv2d(1, 8, 3, padding=1), conv2=nn.Conv2d(8, 8, 3, padding=1), fc=nn.Linear(8, 10)
        ),
    ),
    "even kernel, padded alike": Tutorial(
        "Keras layers retyped: a 2x2 kernel with padding 'same'",
        lambda: convolutions(
            *(nn.Conv2d(1, 4, 2, padding="same"), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(784, 10))
        ),
    ),
}


def data_for(tutorial: Tutorial) -> tuple[Tensor, Tensor]:
    """Digits as the network takes them, and targets of its kind."""
    train, _ = load("digits", None, N)
    images, classes = train.images[:], train.targets
    if tutorial.shape == (784,):
        images = F.interpolate(images, (28, 28)).flatten(1)
    elif tutorial.shape[1:] != (8, 8):
        images = F.interpolate(images, tutorial.shape[1:]).expand(-1, tutorial.shape[0], -1, -1).contiguous()
    if tutorial.outputs == 10:
        return images, classes
    return images, torch.stack([classes % (k + 2) == 0 for k in range(tutorial.outputs)], dim=1).double()


def said_of(tutorial: Tutorial) -> tuple[bool, str]:
    """Whether the network is certified, and the objective of the certificate, or the reason why not."""
    torch.manual_seed(0)
    images, targets = data_for(tutorial)
    network, options = tutorial.network().eval(), {"loss": tutorial.loss, "oracle": "local", "time_limit": SECONDS}
    try:
        certificate = convcvx.certify(network, images, targets, BETA, n_classes=tutorial.outputs, **options)
    except InputError as error:
        return False, str(error)
    return True, f"objective {certificate.primal:.4g}"


def report() -> str:
    said = {name: said_of(tutorial) for name, tutorial in TUTORIALS.items()}
    read = sum(done for done, _ in said.values())
    lines = [
        "# Networks of public tutorials",
        "",
        f"`python experiments/tutorials.py`: {read} of {len(said)} networks are read. Their layers are those of the "
        f"tutorials, their weights random, the images {N} embedded digits; certificates take "
        f"at most {SECONDS} s.",
        "",
        "| network | tutorial | loss | read | certified, or what is said |",
        "|---|---|---|---|---|",
    ]
    for name, (done, text) in said.items():
        tutorial = TUTORIALS[name]
        lines.append(f"| {name} | {tutorial.source} | {tutorial.loss} | {'yes' if done else 'no'} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    text = report()
    print(text)
    (RESULTS / "tutorials.md").write_text(text)
