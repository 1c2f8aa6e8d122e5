"""The jobs behind the command line: train a network into a run folder, certify one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from convcvx.activations import Activation
from convcvx.budget import NEVER, Deadline
from convcvx.certificate import Certificate
from convcvx.data.datasets import Dataset
from convcvx.errors import InputError, RunError
from convcvx.network.architecture import Architecture
from convcvx.network.certify import certify, parameters_of
from convcvx.network.foreign import PICKLED, assumed, foreign_network, read_pickled
from convcvx.network.layers import read_network
from convcvx.network.two_layer import TwoLayerCNN, read_weights, two_layer_cnn
from convcvx.patches import PatchEmbedding
from convcvx.pooling import Pooling
from convcvx.problem import Problem
from convcvx.responses.team import Team
from convcvx.solvers import SOLVERS
from convcvx.terms.status import Status
from convcvx.training.clock import Clock
from convcvx.training.dictionary_gap import with_dictionary_gap
from convcvx.training.finish import finish, score, train_score
from convcvx.training.fit import Fit, certificate_summary
from convcvx.training.journal import Checkpoint
from convcvx.training.optimise import named_oracle, optimise
from convcvx.training.options import TrainConfig
from convcvx.training.origin import Origin
from convcvx.training.plan import Plan, status_of
from convcvx.training.presets import in_flags
from convcvx.training.progress import Report, peak_memory_mb
from convcvx.training.resolve import (
    Data,
    check_beta,
    fitted_embedding,
    image_shape,
    load_data,
    pick_device,
    problem_over,
    training_images,
    training_problem,
    training_weights,
)
from convcvx.training.run import Run


def train_into(
    run: Run,
    config: TrainConfig,
    report: Report,
    team: Team | None = None,
    *,
    resume: bool = False,
    data: Data | None = None,
    origin: Origin | None = None,
    clock: Clock | None = None,
) -> Fit:
    """Train as `config` says, checkpointing every round into `run`.

    The processes of `team` share the images. `data` stand in for those that `config` names, and come from `origin`.
    Nothing is written before data and options have been found good; what only training shows to be bad leaves the
    folder as it was. No other process can work in the folder meanwhile. The time counts from `clock`, or from now.
    """
    clock, team = clock or Clock.now(), team or Team()
    with run.held():
        config.check()
        source = run.located(config) if resume else config
        if data is None:
            data = load_data(source)
            origin = Origin.of(source, data)
        if resume and origin is not None:
            run.check_data(origin)
        if resume:
            check_beta(run, config)
        team.share_out(data[0].images, training_images, source)
        checkpoint = run.checkpoint if resume else Checkpoint()
        clock = replace(clock, earlier=checkpoint.seconds)
        problem, plan = prepare(config, data[0], checkpoint, team, spent=clock.seconds)
        with run.started(config, origin, resume=resume):
            run.save_embedding(problem.responses.embedding)
            if checkpoint.solution is not None:
                run.follow(checkpoint.solution)
            alone = "" if team.size == 1 else f", {team.size} processes"
            report.begin(f"training on {config.data} into {run.place}{alone}\n{plan}")
            optimised = optimise(problem, plan.applied(config), report, run, checkpoint, began=clock.began)
        if checkpoint.solution is not None:
            if not SOLVERS[plan.solver].resumes:
                report.begin(f"solver {plan.solver} goes on from no checkpoint: all of it was solved again")
            elif optimised.solution.rounds == checkpoint.solution.rounds:
                report.begin(f"no round was added: {_why_none(optimised.solution.status, config)}")
        # A run that was finished before keeps network and certificate together until both are new.
        keep = None if run.finished else run.save_network
        try:
            fit = finish(optimised, config, plan, data, report, clock, origin, keep)
        except InputError as error:
            raise RunError(f"{error}; what was trained is kept in {run.folder / 'state.safetensors'}") from None
        fit.write_result(run)
        return replace(fit, metrics=fit.metrics | {"out": str(run.out)})


def _why_none(status: Status, config: TrainConfig) -> str:
    """Why a training that goes on ended with `status` where it began."""
    if status == Status.CONVERGED:
        return f"the gap was within {in_flags({'tol': config.tol})}; lower it to train further"
    if (limit := getattr(config, status, None)) is not None:  # what ends a training is called as its option is
        return f"the budget {in_flags({status: limit})} is used up; raise it to train further"
    return status.meaning


def train_in_memory(
    config: TrainConfig, data: Data, report: Report, origin: Origin | None = None, clock: Clock | None = None
) -> Fit:
    """The same, without a folder."""
    clock = clock or Clock.now()
    config.check()
    problem, plan = prepare(config, data[0], spent=clock.seconds)
    report.begin(f"training on {config.data}\n{plan}")
    optimised = optimise(problem, plan.applied(config), report, began=clock.began)
    return finish(optimised, config, plan, data, report, clock, origin)


def prepare(
    config: TrainConfig,
    train: Dataset,
    checkpoint: Checkpoint = Checkpoint(),
    team: Team | None = None,
    *,
    spent: float = 0.0,
) -> tuple[Problem, Plan]:
    """The training problem, its β still open and `spent` seconds of its time gone, and how it is solved."""
    deadline = Deadline.after(config.time_limit, spent=spent)
    problem = training_problem(config, train, checkpoint.embedding, team)
    return problem.until(deadline), Plan.of(problem, *config.search)


def certify_job(
    path: Path,
    config: TrainConfig,
    *,
    embedding: PatchEmbedding | None,
    given: set[str],
    like: Run | None = None,
    data: Data | None = None,
    dual_point: Tensor | None = None,
    stored: Certificate | None = None,
    deadline: Deadline = NEVER,
) -> dict[str, Any]:
    """Certify the network at `path` on the training data of `config`; returns what `--json` prints.

    The network of the run `like` is certified as well: the better of the two lower bounds counts. `data` stand in for
    those that `config` names. `embedding` is what a run has stored, and is fitted anew; None for a network without a
    run. `dual_point` as in `certify`; one for another number of images is of no use. What a `stored` certificate of the
    same problem says is given beside. The search for a bound ends by
    `deadline`; the `time_limit` of `config` is that of the training.
    """
    clock = Clock.now()
    train, test, _ = data or load_data(config)
    network, unseen = _load_network(path, config, train, given)
    rival = None if like is None else two_layer_cnn(like.model_file)
    known = network.meta.get("classes") or (rival and rival.meta.get("classes")) or None
    train, test = train.numbered_by(known), None if test is None else test.numbered_by(known)
    beta = config.beta
    if beta is None:
        raise InputError("beta is not known for this network; pass --beta, or --like RUN")
    if dual_point is not None and len(dual_point) != len(train.images):
        dual_point = None
    if embedding is not None:
        embedding = fitted_embedding(config, train.images, embedding, weights=training_weights(config, train))
    own = deadline if rival is None and config.dictionary is None else deadline.share(0.5)  # a second proof follows
    certificate = _certify(network, train, config, beta, embedding, dual_point, own)
    if rival is not None:
        if not network.same_problem(rival):
            raise InputError(f"the network in {path} is of another architecture than that of --like; certify it alone")
        certificate = certificate.with_bound_of(_certify(rival, train, config, beta, embedding, deadline=deadline))
    elif embedding is not None and config.dictionary is not None:
        problem = problem_over(embedding, config, train).with_beta(beta)
        own_parameters = parameters_of(read_network(network, network.image_shape), embedding)
        certificate = with_dictionary_gap(certificate, config, problem.until(deadline), *own_parameters)
    return (
        certificate_summary(certificate)
        | _beside(certificate, stored)
        | {
            "n_filters": certificate.n_filters,
            "train_accuracy": train_score(certificate, config, network, train),
            "test_accuracy": score(network, test),
            "seconds": clock.seconds,
            "compiling_seconds": clock.compiling_seconds,
            "peak_memory_mb": peak_memory_mb(),
            "status": status_of(certificate, config.tol),
            "assumed": unseen,
        }
    )


def _beside(certificate: Certificate, stored: Certificate | None) -> dict[str, Any]:
    """What is told of the certificate that was stored, if that is of the same problem."""
    if stored is None:
        return {}
    try:
        certificate.check_same_problem(stored)
    except InputError:
        return {}
    return {"stored": {name: getattr(stored, name) for name in ("dual", "rel_gap", "scope")}}


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
        oracle=named_oracle(config.oracle, config),
        tol=config.tol,
        embedding=embedding,
        n_classes=train.n_classes or None,
        seed=config.seed,
        device=pick_device(config.device),
        dual_point=dual_point,
        time_limit=deadline.limit,
        sample_weight=training_weights(config, train),
    )


def _load_network(path: Path, config: TrainConfig, train: Dataset, given: set[str]) -> tuple[TwoLayerCNN, str | None]:
    """The network of a file, and in words what the file leaves open."""
    if path.suffix in PICKLED:
        state, architecture = read_pickled(path), None
    else:
        state, architecture, _ = read_weights(path)
    if architecture is None:
        pool = config.pool if "pool" in given else None
        spec = config.patch_spec()
        how: dict[str, Any] = {name: getattr(spec, name) for name in ("stride", "padding", "dilation")}
        network = foreign_network(state, image_shape(train), pool=pool, activation=config.activation, **how)
        return network, assumed(network, state)
    if architecture.image_shape != image_shape(train):
        raise RunError(
            f"the network in {path} takes images {architecture.image_shape}, the data have {image_shape(train)}"
        )
    _check_given(path, architecture, config, given)
    return two_layer_cnn(path), None


def _check_given(path: Path, architecture: Architecture, config: TrainConfig, given: set[str]) -> None:
    """Raise `InputError` for an option that was `given` and is not what the file of the network says."""
    asked, own = config.patch_spec(), architecture.spec
    pairs: dict[str, tuple[Any, Any]] = {
        **{name: (getattr(asked, name), getattr(own, name)) for name in ("stride", "padding", "dilation")},
        "pool": (Pooling.of(config.pool), Pooling.of(architecture.pool)),
        "activation": (Activation.of(config.activation), Activation.of(architecture.activation)),
    }
    for name, (ours, theirs) in pairs.items():
        if name in given and ours != theirs:
            raise InputError(f"{name} of the network in {path} is {theirs}; got {ours}: leave --{name} out")
