"""Networks as tutorials write them: what is read is certified as the plain network it equals, the rest is refused."""

from __future__ import annotations

import copy
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.commands import NO_SEARCH, invoke, refused
from helpers.data import Bomb
from helpers.problems import NO_TIME
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import convcvx
from convcvx.data.datasets import Dataset, load
from convcvx.errors import InputError
from convcvx.network.certify import said_by
from convcvx.network.layers import read_network

IMAGES = torch.rand(24, 1, 6, 6, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(24) % 3
BETA = 0.05


def certified(network: nn.Module, **options):
    return convcvx.certify(network.eval(), IMAGES, CLASSES, BETA, **options, **NO_TIME)


def trained(network: nn.Module) -> nn.Module:
    """The network with statistics and scales that are not those it began with."""
    torch.manual_seed(1)
    network.train()
    for _ in range(3):
        network(torch.rand(8, 1, 6, 6))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return network.eval()


# Each is a tutorial's network of two layers, with its own way of writing it


class Functional(nn.Module):
    """As torch's own tutorials write a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 3)  # registered before the convolution
        self.conv1 = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.conv1(x)), 2)
        return self.fc(torch.flatten(x, 1))


class View(Functional):
    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(torch.relu(self.conv1(x)), 2)
        return self.fc(x.view(x.size(0), -1))


class Reshape(Functional):
    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.conv1(x).relu(), 2)
        return self.fc(x.reshape(x.shape[0], -1))


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).clamp(min=0).mean(dim=(2, 3)))


class Dropped(Mean):
    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(F.relu(self.conv(x)), 1)
        return self.head(F.dropout(x, 0.5, training=self.training).squeeze(-1).squeeze(-1))


class Largest(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(F.relu(self.conv1(x)), 2).flatten(1))


class LargestOfAll(Mean):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).amax(dim=(2, 3)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.pool, self.drop = nn.AdaptiveAvgPool2d((2, 2)), nn.Dropout(0.3)
        self.classifier = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.drop(self.pool(self.features(x)).flatten(1)))


class Perceptron(nn.Module):
    """As in torch's quickstart, with one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_relu_stack(self.flatten(x))


class Branching(nn.Module):
    """A forward that no graph can follow; its layers are registered as it takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool, self.fc = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 1:
            raise ValueError("grey images, please")
        return self.fc(self.pool(self.relu(self.conv(x))).flatten(1))


def plain(*middle: nn.Module, features: int, convolution: nn.Module | None = None, bias: bool = True) -> nn.Module:
    return nn.Sequential(convolution or nn.Conv2d(1, 4, 3), *middle, nn.Flatten(), nn.Linear(features, 3, bias=bias))


def negative(norm: nn.Module) -> nn.Module:
    nn.init.constant_(norm.weight, -1.0)
    return norm


GLOBAL = nn.AdaptiveAvgPool2d(1)
ACCEPTED = {
    "functional": Functional(),
    "view": View(),
    "reshape": Reshape(),
    "mean over the map": Mean(),
    "functional dropout": Dropped(),
    "blocks with BatchNorm and Dropout": Blocks(),
    "a forward with a branch": Branching(),
    "perceptron": Perceptron(),
    "perceptron with BatchNorm": nn.Sequential(
        nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 3)
    ),
    "BatchNorm and bias": plain(nn.BatchNorm2d(4), nn.ReLU(), GLOBAL, features=4),
    "BatchNorm behind the ReLU": plain(nn.ReLU(), nn.BatchNorm2d(4), nn.AvgPool2d(2), features=16),
    "BatchNorm behind the pooling": plain(nn.ReLU(), nn.AvgPool2d(2), nn.BatchNorm2d(4), features=16),
    "BatchNorm of features": nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3)
    ),
    "padding by name": plain(nn.ReLU(), GLOBAL, features=4, convolution=nn.Conv2d(1, 4, (3, 5), padding="same")),
    "no padding by name": plain(nn.ReLU(), GLOBAL, features=4, convolution=nn.Conv2d(1, 4, 3, padding="valid")),
    "dilation": plain(nn.ReLU(), GLOBAL, features=4, convolution=nn.Conv2d(1, 4, 2, dilation=(2, 3))),
    "dilation and padding by name": plain(
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AvgPool2d(3),
        features=16,
        convolution=nn.Conv2d(1, 4, 2, dilation=2, padding="same"),
    ),
    "max pooling": plain(nn.ReLU(), nn.MaxPool2d(2), features=16),
    "max pooling before the ReLU": plain(nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU(), features=16),
    "max pooling as a function": Largest(),
    "max over the map": LargestOfAll(),
    "identities": plain(nn.Identity(), nn.ReLU(), nn.Dropout2d(), GLOBAL, nn.Identity(), features=4),
}
REFUSED = {
    "LeNet": (
        nn.Sequential(
            *(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.ReLU()),
            nn.Linear(8, 3),
        ),
        "of more than two layers the last two",
    ),
    "padded max pooling": (plain(nn.ReLU(), nn.MaxPool2d(2, padding=1), features=36), "without padding"),
    "max pooling, then averages": (plain(nn.ReLU(), nn.MaxPool2d(2), GLOBAL, features=4), "to be the only one"),
    "max pooling of a negative BatchNorm": (
        plain(nn.ReLU(), negative(nn.BatchNorm2d(4)), nn.MaxPool2d(2), features=16),
        "makes a minimum of it",
    ),
    "softmax at the end": (
        nn.Sequential(Mean(), nn.Softmax(dim=1)),
        "without its last step, Softmax, with loss='cross-entropy'",
    ),
    "sigmoid at the end": (nn.Sequential(Mean(), nn.Sigmoid()), "without its last step, Sigmoid, with loss='bce'"),
    "log-softmax at the end": (nn.Sequential(Perceptron(), nn.LogSoftmax(dim=1)), "which loss='cross-entropy' alone"),
    "tanh": (plain(nn.Tanh(), GLOBAL, features=4), "of activations ReLU, LeakyReLU, the absolute value and the square"),
    "two activations": (plain(nn.LeakyReLU(), nn.ReLU(), GLOBAL, features=4), "network must be Conv2d → ReLU"),
    "a slope above one": (plain(nn.LeakyReLU(2.0), GLOBAL, features=4), "must lie between -1 and 1; got 2.0"),
    "linear alone": (
        nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
        "got Linear; one layer alone is a convex problem already",
    ),
    "layer norm": (plain(nn.LayerNorm([4, 4]), nn.ReLU(), GLOBAL, features=4), "cannot be folded"),
    "two convolutions": (
        plain(nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), GLOBAL, features=4),
        "of more than two layers the last two",
    ),
    "BatchNorm without a bias to take it": (
        plain(nn.ReLU(), nn.BatchNorm2d(4), GLOBAL, features=4, bias=False),
        "give the linear layer a bias",
    ),
    "BatchNorm of the batch": (
        plain(nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), GLOBAL, features=4),
        "depends on the batch",
    ),
    "an even kernel": (
        plain(nn.ReLU(), GLOBAL, features=4, convolution=nn.Conv2d(1, 4, 2, padding="same")),
        "take odd sizes",
    ),
    "groups": (
        nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), GLOBAL, nn.Flatten(), nn.Linear(4, 3)),
        "must have groups=1",
    ),
    "a perceptron on rows": (nn.Sequential(nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3)), "does not take images"),
    "other images": (nn.Sequential(nn.Flatten(), nn.Linear(30, 5), nn.ReLU(), nn.Linear(5, 3)), "takes 30 numbers"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_a_tutorial_writes_is_the_plain_network_it_equals(name):
    network = trained(copy.deepcopy(ACCEPTED[name]))
    layers = read_network(network, (1, 6, 6))
    same = copy.deepcopy(layers.network()).double()
    with torch.no_grad():
        torch.testing.assert_close(network(IMAGES).double(), same(IMAGES.double()), rtol=1e-4, atol=1e-5)
    ours, theirs = certified(network), certified(same)
    assert ours.primal == pytest.approx(theirs.primal, rel=1e-6)
    assert ours.rel_gap == pytest.approx(theirs.rel_gap, rel=1e-6)
    # Negative control: the outputs are looked at, whatever the graph says.
    bent = copy.deepcopy(network)
    bent.register_forward_hook(lambda _, __, outputs: outputs * 1.01)
    with pytest.raises(InputError, match="the network's outputs are not those"):
        certified(bent)


class LogSoftmax(Perceptron):
    """As torch's example for MNIST ends."""

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(super().forward(x), dim=1)


@pytest.mark.parametrize("made", [LogSoftmax, lambda: nn.Sequential(Perceptron(), nn.LogSoftmax(dim=-1))])
def test_logarithms_of_probabilities_have_the_cross_entropy_of_their_scores(made):
    torch.manual_seed(0)
    network = made().eval()
    torch.manual_seed(0)
    plain = Perceptron().eval()
    ours, theirs = (certified(each, loss="cross-entropy") for each in (network, plain))
    assert (ours.primal, ours.dual) == (theirs.primal, theirs.dual)
    wrong = nn.Sequential(plain, nn.LogSoftmax(dim=0))
    with pytest.raises(InputError, match="the network's outputs are not those"):
        certified(wrong, loss="cross-entropy")


def test_a_network_of_rows_is_one_of_images_of_one_pixel():
    torch.manual_seed(0)
    network, rows = nn.Sequential(nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3)).eval(), IMAGES.flatten(1)
    ours = convcvx.certify(network, rows, CLASSES, BETA, **NO_TIME)
    theirs = certified(nn.Sequential(nn.Flatten(), network))
    assert ours.primal == pytest.approx(theirs.primal, rel=1e-9)
    with pytest.raises(InputError, match="takes 36 numbers, the images have 35x1x1"):
        convcvx.certify(network, rows[:, 1:], CLASSES, BETA)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_says_why(name):
    network, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        certified(network)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["blocks with BatchNorm and Dropout", "functional dropout"])
def test_a_network_in_training_is_told_to_evaluate(name):
    network = trained(copy.deepcopy(ACCEPTED[name])).train()
    with pytest.raises(InputError, match=r"call network\.eval\(\)"):
        convcvx.certify(network, IMAGES, CLASSES, BETA)


@pytest.mark.parametrize("power", [-200, 200])
def test_folded_networks_are_certified_on_images_of_any_size(power):
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Flatten()]
    network = trained(nn.Sequential(*layers, nn.Linear(16, 3))).double()
    far = copy.deepcopy(network)
    far[0].weight.data *= 2.0**-power
    here = convcvx.certify(network, IMAGES.double(), CLASSES, BETA, oracle="local")
    there = convcvx.certify(far, IMAGES.double() * 2.0**power, CLASSES, BETA * 2.0**power, oracle="local")
    assert there.primal == pytest.approx(here.primal, rel=1e-12)
    assert there.dual == pytest.approx(here.dual, rel=1e-6)
    far.register_forward_hook(lambda _, __, outputs: outputs * 1.01)
    with pytest.raises(InputError, match="the network's outputs"):
        convcvx.certify(far, IMAGES.double() * 2.0**power, CLASSES, BETA * 2.0**power, oracle="local")


# State dicts alone


FILES = {
    "BatchNorm": nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), GLOBAL, nn.Flatten(), nn.Linear(4, 10)
    ),
    "perceptron": nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10)),
    "perceptron with BatchNorm": nn.Sequential(
        nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 10)
    ),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("nested", [False, True])
def test_a_file_that_torch_saved_is_certified_as_the_network_is(name, nested, tmp_path):
    torch.manual_seed(0)
    network = copy.deepcopy(FILES[name]).train()
    network(torch.rand(16, 1, 8, 8))
    network.eval()
    state, path = network.state_dict(), tmp_path / "network.pt"
    torch.save({"model_state_dict": state, "epoch": 3} if nested else state, path)
    done = invoke("certify", path, "--data", "digits", "--limit", "60", "--beta", "0.1", "--json", *NO_SEARCH)
    found = json.loads(done.stdout)
    train, _ = load("digits", limit=60)
    by_hand = convcvx.certify(network, train.images, train.targets, 0.1, n_classes=10, **NO_TIME)
    assert found["primal"] == pytest.approx(by_hand.primal, rel=1e-5)
    assert ("BatchNorm" in found["assumed"]) == ("BatchNorm" in name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"0.weight": Bomb()}, "save network.state_dict(), not the network (it holds something else than tensors)"),
        ([torch.ones(3)], "must hold a state dict"),
        ({"a": 1}, "must hold a state dict"),
        ({"a.weight": torch.ones(3, 3)}, "must hold the state dict of Conv2d"),
        (
            {"a.weight": torch.ones(0, 1, 3, 3), "b.weight": torch.ones(10, 0)},
            "weights must not be empty; the file has a.weight (0, 1, 3, 3), b.weight (10, 0): save a network with",
        ),
        (b"nothing", "save network.state_dict"),
    ],
)
def test_files_that_hold_anything_else_are_refused_and_nothing_runs(content, message, tmp_path):
    path = tmp_path / "network.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert message in refused("certify", path, "--data", "digits", "--beta", "0.1")


@pytest.mark.slow
def test_networks_of_tutorials_are_read_or_refused_with_a_remedy(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "experiments")
    tutorials = importlib.import_module("tutorials")
    assert len(tutorials.TUTORIALS) >= 20
    said = {name: tutorials.said_of(tutorial) for name, tutorial in tutorials.TUTORIALS.items()}
    assert sum(done for done, _ in said.values()) >= 10
    remedies = "of more than two layers|convex problem already|have a bound|has a bound|without its last step|take odd"
    for name, (done, text) in said.items():
        assert done or re.search(remedies, text), f"{name}: {text}"


def test_weights_that_cancel_are_rounded_and_not_another_network(monkeypatch):
    """Of two like filters with weights of 1e4 and 1 - 1e4 float32 loses more than a part in ten thousand."""
    images, targets = load("digits", limit=40)[0].images, load("digits", limit=40)[0].targets
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 10))
    with torch.no_grad():
        network[0].weight[1] = network[0].weight[0]
        network[0].bias[1] = network[0].bias[0] = 0.3
        network[4].weight[:, 0] = 1e4 * torch.rand(10)
        network[4].weight[:, 1] = 1 - network[4].weight[:, 0]
        network[4].bias.zero_()
    with torch.no_grad():
        single, double = network(images.float()).double(), copy.deepcopy(network).double()(images.double())
    assert (single - double).abs().max() > 1e-4 * double.abs().max()
    assert convcvx.certify(network, images, targets, beta=1e-3, oracle="local").primal > 0

    monkeypatch.setattr("convcvx.network.certify.said_by", lambda *given: said_by(*given) + 0.5)
    with pytest.raises(InputError, match="outputs are not those"):  # the control: more than rounding
        convcvx.certify(network, images, targets, beta=1e-3, oracle="local")


@pytest.mark.parametrize("name", ["nowhere.pt", "nowhere.safetensors", "nowhere"])
def test_a_file_of_weights_that_is_not_there_is_told_before_the_data_are_looked_for(name):
    told = refused(f"certify {name} --data no-such-data --beta 0.1")
    assert f"cannot read weights from {name}: there is no such file; name a .safetensors or .pt file, or a run" in told


def test_the_training_accuracy_is_that_of_the_network_as_it_is():
    """The objective is judged at the best intercept, with which this network, which calls all images 0, does well."""
    torch.manual_seed(0)
    images, targets = torch.rand(40, 1, 4, 4), torch.arange(40) % 2
    images[targets == 1] += 1.0
    network = nn.Sequential(nn.Conv2d(1, 1, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0)
        network[-1].weight[:] = torch.tensor([[-1.0], [1.0]])
        network[-1].bias[:] = torch.tensor([100.0, 0.0])
    certificate = convcvx.certify(network, images, targets, 0.01, oracle="local", tol=1.0)
    assert certificate.train_accuracy == 0.5
    with torch.no_grad():
        network[-1].bias[:] = torch.tensor([4.9, -4.9])  # between the two classes
    better = convcvx.certify(network, images, targets, 0.01, oracle="local", tol=1.0)
    assert better.train_accuracy == float((network(images).argmax(dim=1) == targets).double().mean()) > 0.9
    assert better.primal == pytest.approx(certificate.primal)  # which knows the best intercept alone


@pytest.mark.filterwarnings("ignore:images are uint8")  # the network here takes 0 to 255
@pytest.mark.parametrize("classes", [[1, 2], [0, 2]])
def test_classes_that_the_images_lack_keep_their_outputs(classes):
    """Held with the images or apart, for networks of rows as well, and pixels of bytes as the network takes them."""
    images = (255 * torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))).to(torch.uint8)
    targets = torch.tensor(classes)[torch.arange(12) % 2]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    perceptron = nn.Sequential(nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 3))
    for made, data in ((network, images), (perceptron, images.flatten(1).float())):
        apart = convcvx.certify(made, data, targets, 0.05, tol=1.0)
        for held in ((data, targets), TensorDataset(data, targets), DataLoader(TensorDataset(data, targets), 5)):
            together = convcvx.certify(made, held, beta=0.05, tol=1.0)
            assert (together.primal, together.dual) == (apart.primal, apart.dual)
            assert together.train_accuracy == apart.train_accuracy


def test_whatever_holds_images_and_targets_may_stand_for_both():
    images, targets = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    apart = convcvx.certify(network, images, targets, 0.05, tol=1.0)
    data = TensorDataset(images, targets)
    for held in ((images, targets), data, DataLoader(data, batch_size=5), Dataset(images, targets, ("a", "b"), "made")):
        together = convcvx.certify(network, held, beta=0.05, tol=1.0)
        assert (together.primal, together.dual) == (apart.primal, apart.dual)
    real = torch.stack([targets + 0.5, targets - 0.5], dim=1)
    apart = convcvx.certify(network, images, real, 0.05, tol=1.0)
    assert convcvx.certify(network, (images, real), beta=0.05, tol=1.0).primal == apart.primal
    with pytest.raises(InputError, match="targets must be given"):
        convcvx.certify(network, images, beta=0.05)
    with pytest.raises(InputError, match="beta must be given"):
        convcvx.certify(network, images, targets)
