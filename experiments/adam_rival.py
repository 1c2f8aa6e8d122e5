"""Train a run's network with torch's Adam instead, for `convcvx certify FILE --like RUN`.

    python experiments/adam_rival.py checkpoints/mnist --epochs 5 --out adam.safetensors

Same data, kernel, pooling, loss, width and weight decay as the run; each learning rate is tried and the lowest
training objective kept. Prints the objective of each.
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import save_file

from convcvx.evaluate import mean_loss, predict
from convcvx.job import image_shape, load_data, with_run_settings
from convcvx.losses import encode_targets, get_loss
from convcvx.network import TwoLayerCNN, two_layer_cnn
from convcvx.runs import Run


def objective(network: TwoLayerCNN, images: torch.Tensor, targets: torch.Tensor, beta: float, loss: str) -> float:
    """Mean loss plus β/2 times the squared weights, the intercept unpenalised."""
    decay = sum(float(p.detach().square().sum()) for name, p in network.named_parameters() if name != "4.bias")
    return mean_loss(predict(network, images), targets, loss) + 0.5 * beta * decay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--out", required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2])
    arguments = parser.parse_args()

    run = Run.open(arguments.run)
    config = with_run_settings(run)
    train, test, _ = load_data(config)
    architecture = two_layer_cnn(run.folder).architecture
    assert architecture.image_shape == image_shape(train)
    encoded, loss = encode_targets(train.targets, config.loss, train.n_classes or None).float(), get_loss(config.loss)
    best = float("inf")
    for rate in arguments.rates:
        torch.manual_seed(config.seed)
        network = TwoLayerCNN(architecture)
        penalised = [p for name, p in network.named_parameters() if name != "4.bias"]
        optimizer = torch.optim.Adam(network.parameters(), lr=rate)
        steps = arguments.epochs * -(-len(train) // arguments.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(arguments.epochs):
            for batch in torch.randperm(len(train)).split(arguments.batch):
                optimizer.zero_grad()
                outputs = network(train.images[batch])
                decay = torch.stack([p.square().sum() for p in penalised]).sum()
                (loss.value(outputs, encoded[batch]).mean() + 0.5 * config.beta * decay).backward()
                optimizer.step()
                schedule.step()
        value = objective(network, train.images, train.targets, config.beta, config.loss)
        score = float((predict(network, test.images).argmax(dim=1) == test.targets).double().mean())
        print(f"rate {rate:g}: objective {value:.6f}, test accuracy {score:.4f}")
        if value < best:
            best = value
            save_file(network.state_dict(), arguments.out)


if __name__ == "__main__":
    main()
