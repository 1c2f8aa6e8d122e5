"""Several processes, one solver: the images are shared out, and the passes over them run everywhere.

    torchrun --nproc-per-node 4 -m convcvx.cli train ...

Process 0, the leader, runs solver, oracle and certificate, unchanged; the others, the workers, hold a share of the
images and wait for passes to make. A pass sends each worker its arguments, every process goes over its own share,
and the leader gets the sum of the results (Gram matrix, correlations, gradients) or their rows (predictions). There
is one solver and one state: nothing can drift apart, whatever the machines, the clocks and the rounding, and a
worker keeps nothing that a run needs to go on.

A worker answers before a sum is taken: one that is lost is known by its rank, and no sum waits for it.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from convcvx.errors import InputError, WorkerError
from convcvx.images import Images
from convcvx.patches import PatchEmbedding, PatchSpec, second_moment
from convcvx.pooling import Pooling
from convcvx.responses import Residual, Responses

TIMEOUT = timedelta(hours=1)
"""The longest pass, and the longest a worker waits for one. A process that dies is noticed at once."""
GO_ON = "go on with --resume, with any number of processes"


def share(n: int, rank: int, size: int) -> slice:
    """The images of process `rank`: consecutive ones, as many as the others have, give or take one."""
    return slice(rank * n // size, (rank + 1) * n // size)


class Team:
    """The processes that `torchrun` started, as the leader sees them; one alone anywhere else.

        with Team() as team:
            team.share_out(images, read, source)
            problem = build_problem(images, ..., embedding=team.fit(images, spec), responses=team.responses)

    In a worker, entering the context serves the leader until it is done, and ends the program.

    Attributes
    ----------
    rank, size : int
        This process's number and the number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._share = _Share(self.rank, self.size)
        self._built = 0
        self._terminated = False

    def __enter__(self) -> Team:
        if self.size == 1:
            return self
        # Messages travel by gloo, sums by NCCL where there are GPUs.
        gpus = torch.cuda.device_count()
        if gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % gpus)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)
        if self.rank > 0:
            _serve(self._share)
        # torchrun sends SIGTERM when it misses a worker: the next pass tells which.
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_terminated", True))
        return self

    def __exit__(self, *_: object) -> None:
        if self.size == 1:
            return
        for rank in self._workers:
            try:
                _send(None, rank)
            except RuntimeError:
                continue  # lost, as has been said
        dist.destroy_process_group()

    @property
    def _workers(self) -> range:
        return range(1, self.size)

    # -- what a training needs ------------------------------------------------------------------------

    def share_out(self, images: Images, read: Callable[[Any], Images], source: Any) -> None:
        """Give every process its share of `images`, which a worker gets by `read(source)`.

        `read` is a function of a module. Of images on disk a worker touches its share alone.
        """
        if self.size == 1:
            return
        if len(images) < self.size:
            raise InputError(f"{self.size} processes cannot share {len(images)} images: start fewer")
        self._share.keep(images)
        self._run("load", lambda rank: (read, source, len(images)), lambda: None)

    def fit(self, images: Images, spec: PatchSpec) -> PatchEmbedding:
        """`PatchEmbedding.fit` on the images that were shared out."""
        if self.size == 1:
            return PatchEmbedding.fit(images, spec)
        (moment,) = self.sum("moment", lambda rank: (spec,))
        return PatchEmbedding.of_moment(moment / len(images), images.shape[1], spec)

    def responses(
        self, images: Images, embedding: PatchEmbedding, pooling: Pooling | None = None, **options: Any
    ) -> Responses:
        """The `Responses` on the images that were shared out."""
        if self.size == 1:
            return Responses(images, embedding, pooling, **options)
        return ShardedResponses(self, images, embedding, pooling, **options)

    # -- passes ---------------------------------------------------------------------------------------

    def build(self, responses: Responses) -> int:
        """Have every process make these responses on its share; returns the key that passes name them by."""
        self._built += 1
        options = {"dtype": responses.dtype, "device": responses.device.type, "chunk_bytes": responses.chunk_bytes}
        self.collect("build", lambda rank: (self._built, responses.embedding, responses.pooling, options))
        return self._built

    def collect(self, name: str, arguments: Callable[[int], tuple[Any, ...]]) -> list[Any]:
        """What the pass `name` of `_Share` gives in each process, for the `arguments` of its rank."""
        mine, others = self._run(name, arguments, lambda: getattr(self._share, name)(*arguments(0)))
        return [mine, *others]

    def sum(self, name: str, arguments: Callable[[int], tuple[Any, ...]]) -> tuple[Tensor, ...]:
        """The same summed over the processes, for a pass that gives tensors of one shape everywhere."""
        mine, _ = self._run(name, arguments, lambda: getattr(self._share, name)(*arguments(0)), summed=True)
        try:
            for rank in self._workers:
                _send("sum", rank)
            return _reduce(mine)
        except RuntimeError:
            raise WorkerError(f"a worker was lost in the middle of a sum: {GO_ON}") from None

    def _run(
        self, name: str, arguments: Callable[[int], tuple[Any, ...]], own: Callable[[], Any], summed: bool = False
    ) -> tuple[Any, list[Any]]:
        """Run a pass in all processes, `own` in this one."""
        for rank in self._workers:
            self._reach(rank, _send, (name, summed, arguments(rank)), rank)
        try:
            mine = own()
        finally:  # whatever happens here, the workers are left waiting for the next message
            answers = [self._reach(rank, _receive, rank) for rank in self._workers]
        for rank, (error, _) in zip(self._workers, answers, strict=True):
            if error is not None:
                raise WorkerError(f"worker {rank} of {self.size} failed: {error}")
        if self._terminated:
            raise WorkerError(f"stopped by SIGTERM: {GO_ON}")
        return mine, [result for _, result in answers]

    def _reach(self, rank: int, exchange: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return exchange(*arguments)
        except RuntimeError:  # all that gloo raises
            raise WorkerError(f"worker {rank} of {self.size} was lost: {GO_ON}") from None


class ShardedResponses(Responses):
    """`Responses` on all images whose passes run in all processes of a team.

    What is not overridden runs in the leader alone and is as right: single rows, samples of a few thousand images
    (`to(images=...)`), and blocks of responses, for solvers that want them one by one.
    """

    def __init__(
        self, team: Team, images: Images, embedding: PatchEmbedding, pooling: Pooling | None = None, **options: Any
    ) -> None:
        super().__init__(images, embedding, pooling, **options)
        self._team = team
        self._key = team.build(self)

    def to(self, *, images: Images | None = None, **changes: Any) -> Responses:
        """The same map in another dtype, sharded; or on other images, in this process."""
        plain = super().to(images=images, **changes)
        if images is not None:
            return plain
        options = {"dtype": plain.dtype, "device": plain.device, "chunk_bytes": plain.chunk_bytes}
        return ShardedResponses(self._team, plain.images, plain.embedding, plain.pooling, **options)

    def predict(self, filters: Tensor, weights: Tensor, intercept: Tensor) -> Tensor:
        """As in `Responses`."""
        return torch.cat(self._team.collect("predict", lambda rank: (self._key, None, filters, weights, intercept)))

    def gram(self, filters: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Responses`."""
        gram, moments = self._team.sum("gram", lambda rank: (self._key, filters, self._rows(targets, rank)))
        return gram.div_(self.n), moments.div_(self.n)

    def correlate(self, filters: Tensor, dual: Tensor) -> Tensor:
        """As in `Responses`."""
        return self._team.sum("correlate", lambda rank: (self._key, filters, self._rows(dual, rank)))[0]

    def ascent(self, filters: Tensor, dual: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Responses`."""
        correlations, gradient = self._team.sum(
            "ascent", lambda rank: (self._key, filters, self._rows(dual, rank), directions)
        )
        return correlations, gradient

    def gradients(
        self,
        filters: Tensor,
        weights: Tensor,
        intercept: Tensor,
        residual: Residual,
        images: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in `Responses`; `residual` is called once, in the leader, between a pass forwards and one back."""
        order = torch.arange(self.n) if images is None else images.cpu()
        parts = [self._part(images, rank) for rank in range(self._team.size)]  # (rows of `order`, images of the share)
        network = filters, weights, intercept
        predictions = torch.empty(len(order), len(intercept), dtype=torch.float64)
        outputs = self._team.collect("predict", lambda rank: (self._key, parts[rank][1], *network))
        for (rows, _), output in zip(parts, outputs, strict=True):
            predictions[rows] = output
        slopes = residual(predictions.to(self.device, self.dtype), order.to(self.device)).cpu()
        kernel, weight, shift = self._team.sum(
            "gradients", lambda rank: (self._key, parts[rank][1], slopes[parts[rank][0]], *network)
        )
        return kernel, weight, shift

    def _rows(self, tensor: Tensor, rank: int) -> Tensor:
        """The rows of an (n, c) tensor that belong to the images of `rank`."""
        return tensor[share(self.n, rank, self._team.size)].cpu()

    def _part(self, images: Tensor | None, rank: int) -> tuple[slice | Tensor, Tensor | None]:
        """Which of `images` belong to `rank`, and their numbers in its share; None stands for all."""
        own = share(self.n, rank, self._team.size)
        if images is None:
            return own, None
        order = images.cpu()
        rows = ((order >= own.start) & (order < own.stop)).nonzero()[:, 0]
        return rows, order[rows] - own.start


class _Share:
    """One process's share of the images, and the passes over it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._images: Images = torch.empty(0)
        self._responses: dict[int, Responses] = {}

    def load(self, read: Callable[[Any], Images], source: Any, n: int) -> None:
        images = read(source)
        if len(images) != n:
            raise InputError(f"it found {len(images)} images, process 0 {n}: give all machines the same data")
        self.keep(images)
        if isinstance(self._images, Tensor):
            self._images = self._images.clone()  # and lets go of the rest

    def keep(self, images: Images) -> None:
        own = share(len(images), self.rank, self.size)
        self._images = images.narrow(0, own.start, own.stop - own.start)

    def moment(self, spec: PatchSpec) -> tuple[Tensor, ...]:
        return (second_moment(self._images, spec) * len(self._images),)

    def build(self, key: int, embedding: PatchEmbedding, pooling: Pooling, options: dict[str, Any]) -> None:
        self._images = self._images.to(options["device"])
        self._responses[key] = Responses(self._images, embedding, pooling, **options)

    def predict(self, key: int, images: Tensor | None, *network: Tensor) -> Tensor:
        if images is not None and len(images) == 0:
            return torch.zeros(0, len(network[-1]), dtype=torch.float64)
        return self._on(key, images).predict(*network)

    def gram(self, key: int, filters: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        gram, moments = self._responses[key].gram(filters, targets)
        return gram.mul_(len(targets)), moments.mul_(len(targets))

    def correlate(self, key: int, filters: Tensor, dual: Tensor) -> tuple[Tensor, ...]:
        return (self._responses[key].correlate(filters, dual),)

    def ascent(self, key: int, filters: Tensor, dual: Tensor, directions: Tensor) -> tuple[Tensor, ...]:
        return self._responses[key].ascent(filters, dual, directions)

    def gradients(
        self, key: int, images: Tensor | None, slopes: Tensor, filters: Tensor, weights: Tensor, intercept: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of <slopes (b, c), predictions on `images`>."""
        if len(slopes) == 0:
            return tuple(torch.zeros(part.shape, dtype=torch.float64) for part in (filters, weights, intercept))
        responses = self._on(key, images)
        slopes = slopes.to(responses.device)
        return responses.gradients(filters, weights, intercept, lambda _, where: slopes[where])

    def _on(self, key: int, images: Tensor | None) -> Responses:
        responses = self._responses[key]
        return responses if images is None else responses.to(images=responses.images[images.to(responses.device)])


# -- messages -----------------------------------------------------------------------------------------


def _serve(share: _Share) -> NoReturn:
    """Make the passes that the leader asks for; a worker's whole life."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the leader says when to stop, or is gone
    try:
        while (message := _receive(0)) is not None:
            name, summed, arguments = message
            result: Any = None
            error = None
            try:
                result = getattr(share, name)(*arguments)
            except Exception as caught:  # the leader reports it
                error = f"{type(caught).__name__}: {' '.join(str(caught).split())}"
            _send((error, None if summed else result), 0)
            if summed and error is None:
                if _receive(0) is None:
                    break
                _reduce(result)
    except RuntimeError:
        print(f"convcvx: worker {share.rank}: process 0 is gone: {GO_ON}", file=sys.stderr)
        sys.exit(1)
    dist.destroy_process_group()
    sys.exit(0)


def _send(message: Any, rank: int) -> None:
    data = torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
    dist.send(torch.tensor(len(data)), rank)
    dist.send(data, rank)


def _receive(rank: int) -> Any:
    size = torch.empty((), dtype=torch.int64)
    dist.recv(size, rank)
    data = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(data, rank)
    return pickle.loads(data.numpy().tobytes())


def _reduce(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Sums over all processes, in the leader."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    summed = [tensor.contiguous().to(device) for tensor in tensors]
    for tensor in summed:
        dist.reduce(tensor, 0)
    return tuple(tensor.cpu() for tensor in summed)
