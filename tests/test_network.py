"""The exported network: the convex model's predictions in every mode, plain torch, safetensors, ONNX."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers.data import Bomb
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from convcvx import TwoLayerCNN, TwoLayerCNN_Weights, two_layer_cnn
from convcvx.data.datasets import load
from convcvx.errors import InputError, RunError
from convcvx.network.architecture import Architecture
from convcvx.network.evaluate import HIDDEN_SIZE, accuracy, confusion, mean_loss, predict
from convcvx.network.foreign import assumed, foreign_network
from convcvx.network.two_layer import Weights, read_weights
from convcvx.patches import PatchEmbedding, PatchSpec
from convcvx.pooling import Pooling
from convcvx.responses.passes import Responses
from convcvx.solution import Solution
from convcvx.stack.network import Link, StackedCNN

SHAPE = (2, 9, 8)


def images(n: int = 20, seed: int = 0) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def random_solution(dim: int, n_cells: int, m: int = 5, c: int = 3) -> Solution:
    random = torch.Generator().manual_seed(1)
    filters = torch.randn(m, dim, generator=random, dtype=torch.float64)
    weights = torch.randn(m, n_cells, c, generator=random, dtype=torch.float64)
    intercept = torch.randn(c, generator=random, dtype=torch.float64)
    return Solution.empty(dim, n_cells, c).with_parameters(filters, weights, intercept)


def trained(spec: PatchSpec | None = None, pool="2"):
    """A random solution, the network exported from it, and the convex model's predictions on fresh images."""
    embedding, pooling = PatchEmbedding.fit(images(), spec or PatchSpec(3)), Pooling.of(pool)
    responses = Responses(images(seed=2), embedding, pooling, dtype=torch.float64)
    solution = random_solution(embedding.dim, responses.n_cells)
    network = TwoLayerCNN.from_solution(solution, embedding, pooling, SHAPE)
    return solution, network, responses.predict(solution.filters, solution.weights, solution.intercept)


def disagreement(network, expected: Tensor) -> float:
    with torch.no_grad():
        outputs = network(images(seed=2))
    assert outputs.shape == expected.shape
    return float((outputs - expected).abs().max() / expected.abs().max())


SPECS = [
    PatchSpec(3),
    PatchSpec((2, 3), stride=(2, 1), padding=(1, 0)),
    PatchSpec(3, hidden_bias=True),
    PatchSpec(3, rank=5),
    PatchSpec(3, padding=1, rank=5, hidden_bias=True),
    PatchSpec(3, whiten=0.1),
    PatchSpec(3, padding=1, whiten=0.1, rank=4, hidden_bias=True),
    PatchSpec(3, contrast=0.1),
    PatchSpec((3, 2), padding=1, stride=2, contrast=0.01, whiten=0.1, rank=7),
    PatchSpec(3, contrast=0.1, whiten=0.1, hidden_bias=True),
    PatchSpec(3, padding=1, whiten=0.1, hidden_bias=True, dilation=(1, 2)),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("pool", ["global", "2x3", "window:3,2", "none"])
def test_the_network_predicts_what_the_convex_model_does(spec, pool):
    _, network, expected = trained(spec, pool)
    assert disagreement(network, expected) < 1e-5


@pytest.mark.parametrize("index", [0, 4])
def test_negative_control_another_weight_disagrees(index):
    _, network, expected = trained()
    with torch.no_grad():
        network[index].weight.view(-1)[0] += 1e-2
    assert disagreement(network, expected) > 1e-5


def test_neurons_are_balanced_so_that_weight_decay_is_the_convex_penalty():
    solution, network, _ = trained()
    filters = network[0].weight.flatten(1).norm(dim=1)
    weights = network[4].weight.unflatten(1, (5, 4)).norm(dim=(0, 2))
    torch.testing.assert_close(filters, weights)
    penalty = solution.weights.flatten(1).norm(dim=1).sum()
    decay = 0.5 * (network[0].weight.square().sum() + network[4].weight.square().sum())
    assert decay.item() == pytest.approx(float(penalty), rel=1e-6)


def test_an_empty_solution_is_a_constant_network():
    embedding = PatchEmbedding.fit(images(), PatchSpec(3))
    solution = Solution.empty(embedding.dim, 4, 3)
    network = TwoLayerCNN.from_solution(solution, embedding, Pooling.of(2), SHAPE)
    assert disagreement(network, torch.ones(20, 3)) == 1
    assert network(images()).abs().max().item() == 0


def test_a_network_without_intercept_has_no_output_bias():
    solution, _, expected = trained()
    embedding = PatchEmbedding.fit(images(), PatchSpec(3))
    network = TwoLayerCNN.from_solution(solution, embedding, Pooling.of(2), SHAPE, intercept=False)
    assert network[4].bias is None
    assert disagreement(network, expected - solution.intercept) < 1e-5


def bright(n: int = 20, seed: int = 2) -> Tensor:
    """Images of little contrast far from zero."""
    return 0.9 + 0.001 * images(n, seed)


FAINT = PatchSpec(3, padding=1, contrast=1e-7, hidden_bias=True)


def faint_network() -> tuple[TwoLayerCNN, Tensor]:
    """A network of patches whose mean square is a million times their variance, and its exact scores of `bright`."""
    embedding, pooling = PatchEmbedding.fit(bright(), FAINT), Pooling.of(2)
    responses = Responses(bright().double(), embedding, pooling, dtype=torch.float64)
    solution = random_solution(embedding.dim, responses.n_cells)
    network = TwoLayerCNN.from_solution(solution, embedding, pooling, SHAPE)
    return network, responses.predict(solution.filters, solution.weights, solution.intercept)


@torch.no_grad()
def test_bright_flat_patches_keep_their_contrast():
    network, expected = faint_network()
    assert float((network(bright()) - expected).abs().max() / expected.abs().max()) < 1e-5
    link = Link(5, 2, 1)
    stack = StackedCNN([network, TwoLayerCNN(Architecture((2, 9, 8), 3, 3))], [link])
    exact = copy.deepcopy(stack).double()
    assert float((stack(bright()) - exact(bright().double())).abs().max() / stack(bright()).abs().max()) < 1e-5


def test_a_pooling_matrix_cannot_be_exported():
    embedding, pooling = PatchEmbedding.fit(images(), PatchSpec(3)), Pooling.of(np.ones((2, 42)))
    with pytest.raises(InputError, match="pool is a matrix, which torch has no layer for"):
        TwoLayerCNN.from_solution(random_solution(18, 2), embedding, pooling, SHAPE)


# Plain torch


@pytest.mark.parametrize("spec", [PatchSpec(3), PatchSpec(3, padding=1, whiten=0.1)], ids=str)
def test_the_state_dict_fits_the_plain_network_and_back(spec):
    _, network, expected = trained(spec)
    convolution = nn.Conv2d(2, 5, 3, padding=spec.padding, bias=spec.constant)
    plain = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3))
    plain.load_state_dict(network.state_dict(), strict=True)
    assert disagreement(plain, expected) < 1e-5
    fresh = TwoLayerCNN(network.architecture)
    assert disagreement(fresh, expected) > 1e-2
    fresh.load_state_dict(plain.state_dict(), strict=True)
    assert disagreement(fresh, expected) < 1e-5


def test_the_network_trains_as_any_module_does():
    _, network, _ = trained(PatchSpec(3, contrast=0.1, hidden_bias=True))
    network.train()(images()).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


# Files


@pytest.fixture
def file(tmp_path):
    """A weights file with a contrast layer, biases and metadata."""
    _, network, _ = trained(PatchSpec(3, padding=(1, 0), contrast=0.1, whiten=0.1), "window:2,1")
    network.meta = {"accuracy": 0.9, "classes": ["a", "b", "c"]}
    path = tmp_path / "model.safetensors"
    path.write_bytes(network.to_bytes())
    return path, network


def test_files_describe_themselves(file):
    path, network = file
    for source in (path, str(path), path.parent, Weights(path)):
        loaded = two_layer_cnn(source)
        assert loaded.architecture == network.architecture
        assert loaded.meta == network.meta
        assert not loaded.training
        assert torch.equal(loaded(images()), network(images()))
    assert loaded.to_bytes() == path.read_bytes()


def test_weights_carry_transforms_as_torchvision_s_do(file):
    weights = Weights(file[0], {"data": "digits"})
    assert weights.architecture == file[1].architecture
    torch.testing.assert_close(weights.get_state_dict(), dict(file[1].state_dict()))
    prepare = weights.transforms()
    as_bytes = torch.randint(256, SHAPE, dtype=torch.uint8)
    torch.testing.assert_close(prepare(as_bytes), as_bytes / 255)
    assert prepare(images().double()).dtype == torch.float32
    with pytest.raises(InputError, match=r"images must be \(2, 9, 8\)"):
        prepare(torch.zeros(1, 9, 8))
    assert TwoLayerCNN_Weights.DEFAULT is TwoLayerCNN_Weights.DIGITS


def damaged(kind: str, good: bytes) -> bytes:
    return {
        "empty": b"",
        "truncated": good[:-10],
        "header only": good[:40],
        "noise": np.random.default_rng(0).bytes(500),
        "text": b"no weights here",
        "zip": b"PK\x03\x04" + bytes(100),
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "truncated", "header only", "noise", "text", "zip"])
def test_damaged_files_are_refused(file, kind):
    path, _ = file
    path.write_bytes(damaged(kind, path.read_bytes()))
    with pytest.raises(RunError, match=r"cannot read weights from .*model\.safetensors") as caught:
        two_layer_cnn(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path, "no-such-run"):
        with pytest.raises(RunError, match=r"cannot read weights from .*; name a .safetensors file or a run folder"):
            two_layer_cnn(path)


def test_no_pickle_is_ever_loaded(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"0.weight": Bomb()}, path)
    with pytest.raises(RunError, match="cannot read weights"):
        two_layer_cnn(path)
    with pytest.raises(pytest.fail.Exception, match="a pickle was loaded"):  # negative control
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)


GOOD = asdict(Architecture(SHAPE, 5, 3))


@pytest.mark.parametrize(
    "described",
    [
        {"architecture": {"bogus": 1}},
        {"architecture": [1]},
        {"architecture": {"image_shape": [2, 9, 8]}},
        {"architecture": GOOD | {"n_filters": -1}},
        {"architecture": GOOD | {"n_filters": 6}},
        {"architecture": GOOD | {"pool": "3"}},
    ],
    ids=str,
)
def test_files_that_describe_another_network_are_refused(tmp_path, described):
    path = tmp_path / "model.safetensors"
    save_file(TwoLayerCNN(Architecture(SHAPE, 5, 3)).state_dict(), path, {"convcvx": json.dumps(described)})
    with pytest.raises(RunError) as caught:
        two_layer_cnn(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"convcvx": "null"}, {"convcvx": "{}"}])
def test_foreign_files_need_their_architecture(tmp_path, metadata):
    path, network = tmp_path / "foreign.safetensors", TwoLayerCNN(Architecture(SHAPE, 5, 3))
    save_file(network.state_dict(), path, metadata)
    assert read_weights(path)[1:] == (None, {})
    with pytest.raises(InputError, match="does not describe its architecture"):
        two_layer_cnn(path)
    loaded = two_layer_cnn(path, image_shape=SHAPE, n_filters=5, n_outputs=3)
    assert torch.equal(loaded(images()), network(images()))
    with pytest.raises(RunError, match="do not fit the architecture"):
        two_layer_cnn(path, image_shape=SHAPE, n_filters=5, n_outputs=4)


def test_a_foreign_state_dict_becomes_a_network():
    plain = nn.Sequential(nn.Conv2d(2, 5, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    head = nn.Linear(20, 3, bias=False)
    state = {"features.0." + k: v for k, v in plain[0].state_dict().items()} | {"head.weight": head.weight.detach()}
    network = foreign_network(state, SHAPE, stride=(2, 2))
    with torch.no_grad():
        torch.testing.assert_close(network(images()), head(plain(images())))
    with pytest.raises(RunError, match="the file must hold the state dict of Conv2d"):
        foreign_network({"weight": torch.zeros(3, 3)}, SHAPE)
    with pytest.raises(InputError, match="no square grid; pass pool"):
        foreign_network(state | {"head.weight": torch.zeros(3, 15)}, SHAPE)


EXTRA = {
    "half a batch normalisation": (
        {"1.running_mean": torch.ones(5)},
        "is not whole",
    ),
    "another linear layer": (nn.Linear(3, 3).state_dict(prefix="head2."), r"it has .*head2.weight \(3, 3\)"),
    "a scale": ({"scale": torch.ones(5)}, r"it has scale \(5,\)"),
    "a bias by another name": ({"conv_b": torch.ones(5)}, r"it has conv_b \(5,\)"),
}


@pytest.mark.parametrize("kind", EXTRA)
def test_no_tensor_of_a_foreign_state_dict_is_left_out(kind):
    state = {"conv.weight": torch.randn(5, 2, 3, 3), "head.weight": torch.randn(3, 20), "head.bias": torch.randn(3)}
    network = foreign_network(state, SHAPE)
    assert torch.equal(network[4].bias, state["head.bias"])
    assert assumed(network, state) == "ReLU, average pooling 2, stride 1x1, padding 0x0, dilation 1x1, images in [0, 1]"
    for unreal in (torch.complex64, torch.int8, torch.bool):
        with pytest.raises(RunError, match=rf"real floating-point numbers; the file has conv.weight in {unreal}"):
            foreign_network(state | {"conv.weight": state["conv.weight"].to(unreal)}, SHAPE)
    extra, message = EXTRA[kind]
    with pytest.raises(RunError, match=message):
        foreign_network(state | extra, SHAPE)


# Builders


def test_images_that_do_not_fit_are_refused_with_the_remedy():
    network = two_layer_cnn(image_shape=SHAPE, n_filters=3, n_outputs=2)
    batch = images(4)
    with pytest.raises(InputError, match=r"got torch.float64: pass images.to\(torch.float32\)$"):
        network(batch.double())
    with pytest.raises(InputError, match=r"pass images.to\(torch.float32\) / 255"):
        network((255 * batch).to(torch.uint8))
    with pytest.raises(InputError, match=r"got \(2, 9, 8\): one image is images\[None\]"):
        network(batch[0])
    with pytest.raises(InputError, match=r"must have 2 channels, as those of the training; got \(4, 1, 9, 8\)"):
        network(batch[:, :1])
    with pytest.raises(InputError, match=r"got ndarray: pass torch.as_tensor"):
        network(batch.numpy())
    assert copy.deepcopy(network).double()(batch.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert network(batch.bfloat16()).dtype == torch.bfloat16


def test_a_stack_is_no_two_layer_network(tmp_path):
    network = TwoLayerCNN(Architecture(SHAPE, 5, 3))
    (tmp_path / "model.safetensors").write_bytes(StackedCNN([network], []).to_bytes())
    with pytest.raises(RunError, match="is a stack of networks: load it with"):
        two_layer_cnn(tmp_path)


def test_networks_are_built_from_their_architecture():
    network = two_layer_cnn(image_shape=(1, 8, 8), n_filters=4, n_outputs=10)
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert [type(layer) for layer in network] == [nn.Conv2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    with pytest.raises(InputError, match="kernel_size 3x3 is larger"):
        two_layer_cnn(image_shape=(1, 2, 2), n_filters=4, n_outputs=10)
    with pytest.raises(InputError, match="pool 9x9 is larger"):
        two_layer_cnn(image_shape=(1, 8, 8), n_filters=4, n_outputs=10, pool="9")
    with pytest.raises(
        InputError, match="image_shape, n_filters, n_outputs must be given for a network: pass them, or"
    ):
        two_layer_cnn()
    with pytest.raises(InputError, match="unknown field 'filters'; those of Architecture are image_shape, n_filters,"):
        two_layer_cnn(image_shape=(1, 8, 8), n_filters=4, n_outputs=10, filters=4)
    with pytest.raises(InputError, match=r"digits.safetensors describes its architecture: leave out n_outputs, pool"):
        two_layer_cnn("DIGITS", n_outputs=99, pool="2")


def test_the_header_is_plain_json(file):
    with safe_open(str(file[0]), "pt") as opened:
        described = json.loads(opened.metadata()["convcvx"])
    assert described["architecture"]["kernel_size"] == [3, 3]
    assert described["architecture"]["pool"] == "window:2,1"
    assert described["meta"]["classes"] == ["a", "b", "c"]


# ONNX


@pytest.mark.slow
@torch.no_grad()
def test_onnx_files_keep_the_contrast_of_bright_flat_patches(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    network, expected = faint_network()
    network.export_onnx(tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (scores,) = session.run(["scores"], {"images": bright().numpy()})
    np.testing.assert_allclose(scores, expected, atol=1e-5 * float(expected.abs().max()))


# Evaluation


@pytest.mark.parametrize("size", [1, 9000, 1 << 30])
def test_predict_batches_and_restores_the_mode(size, monkeypatch):
    monkeypatch.setitem(HIDDEN_SIZE, "cpu", size)
    _, network, expected = trained()
    network.train()[2].eval()
    torch.testing.assert_close(predict(network, images(seed=2)), expected.float(), rtol=1e-4, atol=1e-4)
    assert [layer.training for layer in network] == [True, True, False, True, True]
    assert network.training


class Constant(nn.Module):
    """Its one parameter is a number, on any device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        assert x.device == self.scale.device
        return torch.zeros(len(x), 3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parameters_may_be_numbers_and_devices_any(device):
    assert predict(Constant(device), images()).shape == (20, 3)


def test_scores_of_known_predictions():
    predictions = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 1.0, 0.5], [1.0, 0.0, 0.0]])
    targets = torch.tensor([0, 1, 2, 0])
    assert accuracy(predictions, targets) == 0.75
    assert confusion(predictions, targets).tolist() == [[2, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert mean_loss(predictions, targets, "squared") == pytest.approx((0.5 + 2.0 + 0.5 * 1.25 + 0) / 4)
    entropy = nn.functional.cross_entropy(predictions.double(), targets)
    assert mean_loss(predictions, targets, "cross-entropy") == pytest.approx(float(entropy))
    assert mean_loss(predictions[:1], targets[:1], "squared") == 0.5  # one class alone


def test_the_shipped_weights_work():
    weights = TwoLayerCNN_Weights.DIGITS
    network = two_layer_cnn(weights="DIGITS")
    _, test = load("digits")
    scores = network(weights.transforms()(test.images))
    assert float((scores.argmax(dim=1) == test.targets).double().mean()) > 0.97
    assert set(weights.get_state_dict()) == set(network.state_dict())
    assert network.meta["data"] == "digits"
    with pytest.raises(InputError, match="these have 2"):
        weights.transforms()(torch.zeros(1, 2, 9, 9))
