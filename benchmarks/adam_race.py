"""Adam and SGD against convcvx on the same network and objective: MNIST, objective against seconds.

    python benchmarks/adam_race.py run adam        # then sgd, convcvx; one process each, one after the other
    python benchmarks/adam_race.py report          # writes results/adam_race.md and .png
    python benchmarks/adam_race.py all --device cuda   # all of it on a GPU; writes results/adam_race-cuda.md and .png
    python benchmarks/adam_race.py sizes --sizes 1000,2000,10000   # writes results/adam_race-sizes.md

5x5 filters, 4x4 average pooling, squared loss, beta = 1e-3, no biases; rivals.py has the network, the rivals' plans and
the judge. Each point of a rival is a training of its own, with a cosine schedule of that length. All use one thread,
and CPU seconds count: other work may share the machine (on a GPU, seconds). Rivals are given the seconds of their
fastest epoch, convcvx those that it took. What was measured is kept in checkpoints/adam_race.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads that spin would count as work

import torch
from machine import machine
from matplotlib.figure import Figure
from rivals import BETA, KERNEL, POOL, WIDTH, Clock, Plan, Trained, frontier, load_mnist, objective, race, steady
from torch import Tensor

from convcvx.budget import Budget
from convcvx.patches import PatchSpec
from convcvx.solution import Solution
from convcvx.training.plan import build_problem, solve_problem

RIVALS = ("adam", "sgd")
SCHEDULES = (2, 4, 8, 16)
"""Epochs of the race on all images."""
SHORT = (4, 8, 16, 32)
"""Epochs of the races on fewer images."""
SEARCHED = "by successive halving over batches of 16 to 512, four rates, and schedules of"
"""How the rivals' plans were chosen."""
REPEATED = len(RIVALS) + 1
"""Trainings of convcvx in a race on fewer images, before, between and after the rivals': their median counts."""
COLOURS = {"adam": "tab:orange", "sgd": "tab:green", "convcvx": "black"}
RESULTS = Path(__file__).parent / "results"
FOLDER = Path("checkpoints/adam_race")

Point = dict[str, float]
"""A network of convcvx: seconds, objective, filters, and lower_bound once it looks at all images."""


def keep(name: str, found: object) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(found))


def measured_on() -> str:
    """The machine and commit of what is kept, not of the table that is written of it."""
    return json.loads((FOLDER / "machine.json").read_text())


def kept(name: str) -> list[Trained]:
    rows = json.loads((FOLDER / f"{name}.json").read_text())
    return [Trained(Plan(**row.pop("plan")), **row) for row in rows]


def raced(name: str, rival: str, images: Tensor, onehot: Tensor, epochs: Sequence[int]) -> None:
    """Race a rival, and keep what it came to under `name`, beside what is there."""
    done = kept(name)
    for trained in race(rival, images, onehot, epochs):
        done.append(trained)
        keep(name, [asdict(one) for one in done])
        print(trained.plan, f"{trained.seconds:.1f} s, objective {trained.objective:.5f}", flush=True)


def run(name: str, data_dir: str, device: str) -> None:
    """Train one competitor on all images."""
    keep("machine", machine(device))
    images, onehot = load_mnist(data_dir, device)
    if name == "convcvx":
        keep(name, convcvx(images, onehot, 2 * WIDTH, say=print))
        return
    keep(name, [])
    raced(name, name, images, onehot, SCHEDULES)


def convcvx(images: Tensor, onehot: Tensor, filters: int, say: Callable[[Point], None]) -> list[Point]:
    """From images to the network: every round is a point, the clock runs from before the patches are looked at."""
    points: list[Point] = []
    clock = Clock()
    problem = build_problem(
        images.cpu(),
        onehot.cpu(),
        BETA,
        spec=PatchSpec((KERNEL, KERNEL)),
        pooling=POOL,
        intercept=False,
        dtype=torch.float32,
        device=images.device.type,
    )

    def callback(solution: Solution) -> None:
        wall, cpu = clock.read()
        record = solution.history[-1]

        def judge() -> None:
            point = {"seconds": wall if images.device.type == "cuda" else cpu, "filters": len(solution.filters)}
            point["objective"] = objective(solution.filters.float(), solution.weights.float(), images, onehot)
            # What a round on a sample bounds is the optimum of that sample.
            points.append(point if "images" in record else {**point, "lower_bound": record["lower_bound"]})
            say(points[-1])

        if len(solution.filters):
            clock.pause(judge)

    solve_problem(problem, Budget(tol=2e-2, max_filters=filters, time_limit=2000), callback=callback)
    return points


def report(device: str) -> None:
    """The race on all images as a table and a picture."""
    rivals = {name: steady(kept(name)) for name in RIVALS if (FOLDER / f"{name}.json").exists()}
    ours: list[Point] = json.loads((FOLDER / "convcvx.json").read_text())
    lines = [
        "# Adam and SGD against convcvx",
        "",
        f"`python benchmarks/adam_race.py` on {measured_on()}; {unit(device)}, one thread. MNIST 60,000, 5x5 "
        f"filters, 4x4 cells, squared loss, beta {BETA}, no biases; rivals with {WIDTH} filters, {SEARCHED} "
        f"{', '.join(map(str, SCHEDULES))} epochs, all epochs as fast as the fastest.",
        "",
        f"| competitor | {unit(device)} | filters | objective | lower bound (estimate) |",
        "|---" * 5 + "|",
        *(
            f"| {one.plan} | {one.seconds:.3g} | {WIDTH} | {one.objective:.5f} | |"
            for name in rivals
            for one in rivals[name]
        ),
    ]
    for number, point in enumerate(ours, start=1):
        bound = f"{point['lower_bound']:.5f}" if "lower_bound" in point else ""
        row = f"{point['seconds']:.3g} | {point['filters']} | {point['objective']:.5f} | {bound}"
        lines.append(f"| convcvx, round {number} | {row} |")
    lines += ["", *ratios([one for name in rivals for one in rivals[name]], [ours], device)]
    result = RESULTS / ("adam_race" if device == "cpu" else "adam_race-cuda")
    result.with_suffix(".md").write_text("\n".join(lines) + "\n")
    draw(rivals, ours, device).savefig(result.with_suffix(".png"), dpi=120)
    print("\n".join(lines))


def unit(device: str) -> str:
    return "seconds" if device == "cuda" else "CPU seconds"


def reached(points: Sequence[Point], target: float) -> float:
    """The seconds until an objective is at most `target`; inf if none is."""
    return next((point["seconds"] for point in points if point["objective"] <= target), float("inf"))


def ratios(rivals: Sequence[Trained], ours: Sequence[list[Point]], device: str) -> list[str]:
    """When convcvx, the median of several trainings, is where the best plans of the rivals end."""
    lines = [
        f"| best rival of its {unit(device)} | objective | its {unit(device)} | convcvx there after | ratio |",
        "|---" * 5 + "|",
    ]
    for one in frontier(rivals):
        seconds = statistics.median(reached(points, one.objective) for points in ours)
        lines.append(
            f"| {one.plan} | {one.objective:.5f} | {one.seconds:.3g} | {seconds:.3g} | {seconds / one.seconds:.2f} |"
        )
    return lines


def sizes(data_dir: str, device: str, counts: Sequence[int]) -> None:
    """Races on the first images, for each number of them, at equal width: filters are at most those of the rivals."""
    keep("machine", machine(device))
    for count in counts:
        images, onehot = load_mnist(data_dir, device, count)
        ours = [convcvx(images, onehot, WIDTH, say=lambda _: None)]
        keep(f"size-{count}", [])
        for name in RIVALS:
            raced(f"size-{count}", name, images, onehot, SHORT)
            ours.append(convcvx(images, onehot, WIDTH, say=lambda _: None))
        keep(f"size-{count}-convcvx", ours)


def report_sizes(device: str) -> None:
    """The races on fewer images that are kept, as a table each."""
    counts = sorted(int(file.stem.split("-")[1]) for file in FOLDER.glob("size-*-convcvx.json"))
    lines = [
        "# Adam and SGD against convcvx on few images",
        "",
        f"`python benchmarks/adam_race.py sizes --sizes {','.join(map(str, counts))}` on {measured_on()}; "
        f"{unit(device)}, one thread. MNIST, 5x5 filters, 4x4 cells, squared loss, beta {BETA}, no biases, {WIDTH} "
        f"filters at most for all. Rivals: {SEARCHED} {', '.join(map(str, SHORT))} epochs, all as fast as the fastest; "
        "rows are those that no other beats in both time and objective. convcvx: the median of "
        f"{REPEATED} trainings, before, between and after the rivals'.",
    ]
    for count in counts:
        ours: list[list[Point]] = json.loads((FOLDER / f"size-{count}-convcvx.json").read_text())
        last = ours[0][-1]
        lines += ["", f"## {count:,} images", "", *ratios(steady(kept(f"size-{count}")), ours, device), ""]
        lines.append(
            f"convcvx ends after {statistics.median(points[-1]['seconds'] for points in ours):.3g} {unit(device)} with "
            f"{last['filters']} filters, objective {last['objective']:.5f}, lower bound (an estimate) "
            f"{last['lower_bound']:.5f}."
        )
    (RESULTS / "adam_race-sizes.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def draw(rivals: dict[str, list[Trained]], ours: Sequence[Point], device: str) -> Figure:
    """Objective against seconds, and the last lower bound."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    points = {name: [(one.seconds, one.objective) for one in trained] for name, trained in rivals.items()}
    points["convcvx"] = [(point["seconds"], point["objective"]) for point in ours]
    for name, where in points.items():
        line = "o-" if name == "convcvx" else "s:"
        axes.semilogx(*zip(*where, strict=True), line, color=COLOURS[name], ms=4, label=name)
    bounds = [point["lower_bound"] for point in ours if "lower_bound" in point]
    if bounds:
        axes.axhline(bounds[-1], color="grey", ls="--", label="lower bound (estimate)")
    lowest = min(value for where in points.values() for _, value in where)
    axes.set_ylim(0.97 * lowest, 1.2 * lowest)
    axes.set_xlabel(f"{unit(device)}, one thread" if device == "cpu" else "seconds")
    axes.set_ylabel("objective")
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report", "all", "sizes"))
    parser.add_argument("competitor", nargs="?", choices=(*RIVALS, "convcvx"))
    parser.add_argument("--data-dir", default="../shared/data")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=lambda text: [int(part) for part in text.split(",")], default=[1000, 2000])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = arguments.data_dir, arguments.device
    for name in (arguments.competitor,) if arguments.action == "run" else (*RIVALS, "convcvx"):
        if arguments.action in ("run", "all"):
            run(name, *where)
    if arguments.action == "all" or (arguments.action == "report" and (FOLDER / "convcvx.json").exists()):
        report(arguments.device)
    if arguments.action == "sizes":
        sizes(*where, arguments.sizes)
    if (
        arguments.device == "cpu"
        and arguments.action in ("report", "sizes")
        and any(FOLDER.glob("size-*-convcvx.json"))
    ):
        report_sizes(arguments.device)


if __name__ == "__main__":
    main()
