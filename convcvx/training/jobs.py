"""The jobs behind the command line: train a network into a run folder, certify one."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from torch import Tensor

from convcvx.budget import LEAST, NEVER, Deadline
from convcvx.certificate import Certificate
from convcvx.data.datasets import Dataset
from convcvx.errors import InputError, RunError
from convcvx.network.certify import certify, certify_on
from convcvx.network.evaluate import accuracy, mean_loss, predict
from convcvx.network.foreign import assumed, foreign_network
from convcvx.network.two_layer import TwoLayerCNN, read_weights, two_layer_cnn
from convcvx.oracles import Oracle, SampledOracle
from convcvx.patches import PatchEmbedding
from convcvx.problem import Problem
from convcvx.responses.team import Team
from convcvx.solution import Solution
from convcvx.training.dictionary_start import start_from_dictionary
from convcvx.training.options import TrainConfig
from convcvx.training.origin import Origin
from convcvx.training.plan import TRAINING, Plan, find_beta_max, solve_problem
from convcvx.training.progress import Report, peak_memory_mb
from convcvx.training.resolve import (
    Data,
    fitted_embedding,
    image_shape,
    load_data,
    pick_device,
    run_beta,
    training_images,
    training_problem,
)
from convcvx.training.run import Run


def train_job(
    config: TrainConfig,
    run: Run,
    report: Report,
    team: Team | None = None,
    *,
    resume: bool = False,
    data: Data | None = None,
    origin: Origin | None = None,
) -> dict[str, Any]:
    """Train as `config` says, checkpointing every round into `run`; returns what `--json` prints.

    The processes of `team` share the images. `data` stand in for those that `config` names, and come from `origin`.
    Nothing is written before data and options have been found good; what only training shows to be bad leaves the
    folder as it was. No other process can work in the folder meanwhile.
    """
    with run.held():
        return _train(config, run, report, team or Team(), resume, data, origin)


def _train(
    config: TrainConfig,
    run: Run,
    report: Report,
    team: Team,
    resume: bool,
    data: Data | None,
    origin: Origin | None,
) -> dict[str, Any]:
    began, cores = perf_counter(), process_time()
    config.check()
    source = run.located(config) if resume else config
    if data is None:
        data = load_data(source)
        origin = Origin.of(source, data)
    if resume and origin is not None:
        run.check_data(origin)
    train, test, validation = data
    team.share_out(train.images, training_images, source)
    problem = training_problem(config, train, run.load_embedding() if resume else None, team)
    plan = Plan.of(problem, config.solver, config.oracle)
    checkpoint = run.load_state() if resume else None
    resumed = checkpoint is not None
    earlier = checkpoint.history[-1]["seconds"] if checkpoint and checkpoint.history else 0.0
    deadline = Deadline.after(config.time_limit, spent=earlier + perf_counter() - began)
    problem = problem.until(deadline)
    with run.started(config, origin, resume=resume):
        run.save_embedding(problem.responses.embedding)
        if checkpoint is not None:
            run.follow(checkpoint)
        alone = "" if team.size == 1 else f", {team.size} processes"
        report.begin(f"training on {config.data} into {run.place}{alone}\n{plan}")
        problem, solution = _solve(config, problem, plan, checkpoint, run, report, began)
    responses = problem.responses
    network = TwoLayerCNN.from_solution(
        solution.shifted(problem.offset),
        responses.embedding,
        responses.pooling,
        image_shape(train),
        intercept=config.intercept,
    )
    network.meta = {
        "data": config.data,
        "classes": list(train.classes),
        "loss": config.loss,
        "beta": problem.beta,
    }
    network.to(responses.device)  # where it is checked and scored
    try:
        certificate = certify_on(
            problem.until(deadline.later(LEAST * (config.time_limit or 0.0))),
            network,
            oracle=_named_oracle(config.oracle, config),
            tol=config.tol,
            seed=config.seed,
            dual_point=solution.dual_point,
            training=solution.history,
        )
    except InputError as error:
        raise RunError(f"{error}; what was trained is kept in {run.folder / 'state.safetensors'}") from None
    run.save_result(network, certificate)
    metrics = certificate_summary(certificate) | {
        "beta_max": run.beta_max,
        "n_filters": solution.n_filters,
        "train_accuracy": certificate.train_accuracy if train.n_classes else None,
        "test_accuracy": _score(network, test),
        "validation_accuracy": _score(network, validation) if validation else None,
        "seconds": earlier + perf_counter() - began,
        "core_seconds": None if resumed else process_time() - cores,
        "peak_memory_mb": peak_memory_mb(),
        "status": _status(solution, certificate, config.tol),
        "solver": plan.solver,
        "rounds": solution.rounds,
        "patch_rank": certificate.patch_rank,
        "out": str(run.out),
    }
    if not train.n_classes:
        metrics["test_loss"] = mean_loss(predict(network, test.images), test.targets, config.loss)
    run.save_metrics(metrics)
    return metrics


def _solve(
    config: TrainConfig,
    problem: Problem,
    plan: Plan,
    checkpoint: Solution | None,
    run: Run,
    report: Report,
    began: float,
) -> tuple[Problem, Solution]:
    """The problem with its β, and its solution, checkpointed into `run`."""
    if config.dictionary is not None and checkpoint is None:
        in_time = problem.until(problem.deadline.share(TRAINING))
        checkpoint = start_from_dictionary(config, in_time, run, report, began)
    if run.beta_max is None:
        run.save_beta_max(find_beta_max(problem, _named_oracle(plan.oracle, config), config.seed))
    problem = problem.with_beta(run_beta(run, config))

    def after_round(solution: Solution) -> None:
        run.save_state(solution)
        report(solution, problem.beta)

    if config.dictionary is not None and checkpoint is not None and config.max_rounds == 0:
        return problem, checkpoint  # the dictionary alone, without the solver's passes over all images
    return problem, solve_problem(
        problem,
        config.budget,
        solver=plan.solver,
        oracle=plan.oracle,
        gates=config.gates,
        seed=config.seed,
        start=checkpoint,
        callback=after_round,
    )


def certify_job(
    path: Path,
    config: TrainConfig,
    *,
    embedding: PatchEmbedding | None,
    given: set[str],
    like: Run | None = None,
    data: Data | None = None,
    dual_point: Tensor | None = None,
    deadline: Deadline = NEVER,
) -> dict[str, Any]:
    """Certify the network at `path` on the training data of `config`; returns what `--json` prints.

    The network of the run `like` is certified as well: the better of the two lower bounds counts. `data` stand in for
    those that `config` names. `embedding` is what a run has stored, and is fitted anew; None for a network without a
    run. `dual_point` as in `certify`; one for another number of images is of no use. The search for a bound ends by
    `deadline`; the `time_limit` of `config` is that of the training.
    """
    began = perf_counter()
    train, test, _ = data or load_data(config)
    network, unseen = _load_network(path, config, train, given)
    beta = config.beta
    if beta is None:
        raise InputError("beta is not known for this network; pass --beta, or --like RUN")
    if dual_point is not None and len(dual_point) != len(train.images):
        dual_point = None
    if embedding is not None:
        embedding = fitted_embedding(config, train.images, embedding)
    own = deadline if like is None else deadline.share(0.5)
    certificate = _certify(network, train, config, beta, embedding, dual_point, own)
    if like is not None:
        rival = two_layer_cnn(like.model_file)
        if not network.same_problem(rival):
            raise InputError(f"the network in {path} is of another architecture than {like.folder}; certify it alone")
        certificate = certificate.with_bound_of(_certify(rival, train, config, beta, embedding, deadline=deadline))
    return certificate_summary(certificate) | {
        "n_filters": certificate.n_filters,
        "train_accuracy": _score(network, train),
        "test_accuracy": _score(network, test),
        "seconds": perf_counter() - began,
        "peak_memory_mb": peak_memory_mb(),
        "status": "converged" if certificate.rel_gap <= config.tol else "gap_above_tol",
        "assumed": unseen,
    }


def _certify(
    network: TwoLayerCNN,
    train: Dataset,
    config: TrainConfig,
    beta: float,
    embedding: PatchEmbedding | None,
    dual_point: Tensor | None = None,
    deadline: Deadline = NEVER,
) -> Certificate:
    return certify(
        network,
        train.images,
        train.targets,
        beta,
        loss=config.loss,
        oracle=_named_oracle(config.oracle, config),
        tol=config.tol,
        embedding=embedding,
        n_classes=train.n_classes or None,
        seed=config.seed,
        device=pick_device(config.device),
        dual_point=dual_point,
        time_limit=deadline.limit,
    )


def _named_oracle(name: str, config: TrainConfig) -> str | Oracle:
    """The oracle called `name`, with the gates of `config` where those matter."""
    return SampledOracle(config.gates) if name == "sampled" else name


def _load_network(path: Path, config: TrainConfig, train: Dataset, given: set[str]) -> tuple[TwoLayerCNN, str | None]:
    """The network of a file, and in words what the file leaves open."""
    state, architecture, _ = read_weights(path)
    if architecture is None:
        pool = config.pool if "pool" in given else None
        spec = config.patch_spec()
        network = foreign_network(state, image_shape(train), stride=spec.stride, padding=spec.padding, pool=pool)
        return network, assumed(network)
    if architecture.image_shape != image_shape(train):
        raise RunError(
            f"the network in {path} takes images {architecture.image_shape}, the data have {image_shape(train)}"
        )
    return two_layer_cnn(path), None


def certificate_summary(certificate: Certificate) -> dict[str, Any]:
    """The certificate's part of the printed JSON."""
    names = ("primal", "dual", "rel_gap", "scope", "meaning", "beta", "loss", "oracle")
    values = certificate.to_dict()
    return {name: values[name] for name in names}


def _score(network: TwoLayerCNN, dataset: Dataset) -> float | None:
    return accuracy(predict(network, dataset.images), dataset.targets) if dataset.n_classes else None


def _status(solution: Solution, certificate: Certificate, tol: float) -> str:
    guessed = certificate.scope == "heuristic" and certificate.search.get("stopped") == "time_limit"
    if certificate.rel_gap <= tol and not guessed:
        return "converged"
    return "gap_above_tol" if solution.status == "converged" else solution.status
