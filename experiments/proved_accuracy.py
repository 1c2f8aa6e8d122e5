"""Which network of a proved small gap recognises most digits, and what does the proof cost? Chooses `mnist-proof`.

    python experiments/proved_accuracy.py --data-dir DIR

Each case is trained by branch and bound on the first MNIST images and scored on the last 10,000 training images, which
no training sees; the test images are left alone. Cases on the command line, options of `convcvx.fit` as TOML has them,
are run instead: "kernel_size=7 stride=2 rank=3 pool=6 beta_ratio=0.01". A row a case is added to
experiments/results/proved_accuracy.md, so that a long sweep can be made in parts.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

import convcvx
from convcvx.data.datasets import load
from convcvx.network.evaluate import accuracy, predict

OUT = Path(__file__).parent / "results" / "proved_accuracy.md"
HELD_OUT = 10_000
"""Training images for scoring: an accuracy is known to a quarter of a per cent."""
CASES = [
    "kernel_size=7 stride=2 rank=3 pool=4 beta_ratio=0.01",
    "kernel_size=7 stride=2 rank=3 pool=6 beta_ratio=0.01",
    "kernel_size=7 stride=2 rank=3 pool=6 contrast=true beta_ratio=0.01",
    "kernel_size=5 stride=2 rank=3 pool=6 contrast=true beta_ratio=0.01",
    "kernel_size=5 stride=2 rank=3 pool=6 whiten=true beta_ratio=0.01",
    "kernel_size=7 stride=2 rank=4 pool=4 beta_ratio=0.01",
]
"""What matters, one thing changed at a time."""
INTRODUCTION = """# Accuracy of networks with a proved gap

`python experiments/proved_accuracy.py`: MNIST, squared loss, oracle branch-and-bound; accuracy on 10,000 training
images held out. A gap is a proof where the scope is global; core-seconds are those of training and proof together.

| options | images | filters | held-out accuracy | gap | scope | core-seconds | status |
|---|---|---|---|---|---|---|---|
"""


def row(case: str, n: int, tol: float, time_limit: float, data_dir: str | None) -> str:
    """Train one case on the first `n` images."""
    train, _ = load("mnist", data_dir)
    options = {"tol": tol, "time_limit": time_limit, "oracle": "branch-and-bound"}
    options |= tomllib.loads("\n".join(case.split()))
    fit = convcvx.fit(train.images[:n], train.targets[:n], preset="plain", **options)
    scored = accuracy(predict(fit.network, train.images[-HELD_OUT:]), train.targets[-HELD_OUT:])
    certificate, metrics = fit.certificate, fit.metrics
    return (
        f"| {case} | {n:,} | {certificate.n_filters} | {scored:.2%} | {certificate.rel_gap:.2%} | "
        f"{certificate.scope} | {metrics['core_seconds']:.0f} | {metrics['status'].replace('_', ' ')} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="OPTIONS")
    parser.add_argument("--data-dir")
    parser.add_argument("--images", type=int, default=3000, help="to train on")
    parser.add_argument("--tol", type=float, default=0.01)
    parser.add_argument("--time-limit", type=float, default=900.0)
    arguments = parser.parse_args()
    if not OUT.exists():
        OUT.write_text(INTRODUCTION)
    for case in arguments.cases:
        line = row(case, arguments.images, arguments.tol, arguments.time_limit, arguments.data_dir)
        print(line, flush=True)
        with OUT.open("a") as table:
            table.write(line + "\n")


if __name__ == "__main__":
    main()
