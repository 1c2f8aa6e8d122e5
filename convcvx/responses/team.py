"""Several processes, one solver: the images are shared out, and the passes over them run everywhere.

    torchrun --nproc-per-node 4 -m convcvx.cli train ...

Process 0, the leader, runs solver, oracle and certificate, unchanged; the others, the workers, hold a portion of the
images and wait for passes to make. A pass sends each worker its arguments, every process goes over its own portion,
and the leader puts the results together. There is one solver and one state: nothing can drift apart, and a worker
keeps nothing that a run needs to go on.

Sums over images (Gram matrix, correlations, gradients) are those of `portions`: the same to the last bit however many
processes there are, one included; and so is all that follows from them.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from convcvx.budget import Deadline
from convcvx.data.images import Images
from convcvx.errors import InputError, WorkerError
from convcvx.patches import Moments, PatchEmbedding, PatchSpec, provisional_mean
from convcvx.pooling import Pooling
from convcvx.responses.passes import Responses
from convcvx.responses.portions import Found, Nodes, Portion, add, images_of, portion, segments
from convcvx.responses.streams import sum_up
from convcvx.responses.table import SLOPES, Pass, Residual

TIMEOUT = timedelta(hours=1)
"""The longest pass, and the longest a worker waits for one. A process that dies is noticed at once."""
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that tell a process of its team; all of them, or there is none."""
GO_ON = "go on with --resume, with any number of processes"


class Team:
    """Processes that share the images, as the leader sees them; one alone by default.

        with Team.of_torchrun() as team:
            team.share_out(images, read, source)
            problem = build_problem(images, ..., embedding=team.fit(images, spec), responses=team.responses)

    In a worker, entering the context serves the leader until it is done, and ends the program.

    Attributes
    ----------
    rank, size : int
        This process's number and the number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._portion = Portion(self.rank, self.size)
        self._places: dict[int, tuple[str, int]] = {}
        self._keys = 0
        self._built: WeakValueDictionary[int, Responses] = WeakValueDictionary()
        self._busy = False

    @classmethod
    def of_torchrun(cls) -> Team:
        """The processes that `torchrun`, or a launcher that sets the like of its variables, started.

        This one alone where some of `LAUNCHED` are missing: a variable that is left over from other work starts
        nothing, and waits for nobody.
        """
        if any(name not in os.environ for name in LAUNCHED):
            return cls()
        rank, size = (_number(name) for name in LAUNCHED[:2])
        if not rank < size:
            raise InputError(f"RANK must be below WORLD_SIZE = {size}; got {rank}: unset both, or start with torchrun")
        return cls(rank, size)

    def __enter__(self) -> Team:
        if self.size == 1:
            return self
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        if not dist.is_torchelastic_launched():  # torchrun has started them all; nobody else may have
            print(
                f"convcvx: process {self.rank} of {self.size} waits for the others at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']}, as {', '.join(LAUNCHED)} say; unset them to work alone",
                file=sys.stderr,
                flush=True,
            )
        # Passes give their results on the CPU, and the order of a sum matters: NCCL would help with neither.
        dist.init_process_group("gloo", timeout=TIMEOUT)
        if self.rank > 0:
            _serve(self._portion)
        self._places = {rank: self._reach(rank, _receive, rank) for rank in self._workers}
        signal.signal(signal.SIGTERM, self._terminated)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.size > 1 and kind is not None:
            # torchrun's SIGTERM often comes while the error is still on its way to the user: one message is enough.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.size == 1 or self._busy:
            return  # in the middle of a pass workers listen to nothing but the end of this process
        for rank in self._workers:
            try:
                _send(None, rank)
            except RuntimeError:
                continue  # lost, as has been said
        dist.destroy_process_group()

    # -- what a training needs ------------------------------------------------------------------------

    def share_out(self, images: Images, read: Callable[[Any], Images], source: Any) -> None:
        """Give every process its portion of `images`, which a worker gets by `read(source)`.

        `read` is a function of a module. Of images on disk a worker touches its portion alone.
        """
        self._portion.keep(images)
        self._run("load", lambda rank: (read, source, len(images)))

    def fit(self, images: Images, spec: PatchSpec, weights: Tensor | None = None) -> PatchEmbedding:
        """`PatchEmbedding.fit` on the images that were shared out."""
        about, places = provisional_mean(images, spec), segments(len(images))

        def arguments(rank: int) -> tuple[Any, ...]:
            own = images_of(places, portion(len(places), rank, self.size))
            return spec, about, None if weights is None else weights[own]

        (moment,) = _added(self.collect("moment", arguments))
        count = len(images) if weights is None else weights.sum()
        return PatchEmbedding.of_moments(Moments.about(about, moment / count), images.shape[1], spec)

    def responses(
        self, images: Images, embedding: PatchEmbedding, pooling: Pooling | None = None, **options: Any
    ) -> Responses:
        """The `Responses` on the images that were shared out."""
        if len(segments(len(images))) == 1:
            return Responses(images, embedding, pooling, **options)
        return ShardedResponses(self, images, embedding, pooling, **options)

    # -- passes ---------------------------------------------------------------------------------------

    def build(self, responses: Responses) -> int:
        """Have every process make these responses on its portion; returns the key that passes name them by."""
        self._keys += 1
        keys = [*self._built, self._keys]  # those still in use: portions let go of all others
        options = responses.options | {"device": responses.device.type}
        self.collect("build", lambda _: (keys, responses.embedding, responses.pooling, options))
        self._built[self._keys] = responses
        return self._keys

    def collect(self, name: str, arguments: Callable[[int], tuple[Any, ...]]) -> list[Any]:
        """What `name` of `Portion` gives in each process, for the `arguments` of its rank."""
        return self._run(name, arguments, lambda: getattr(self._portion, name)(*arguments(0)))

    def run(self, key: int, n: int, wanted: Pass, rows: Sequence[Tensor], common: Sequence[Any]) -> list[Tensor]:
        """The results of a pass over the responses of `key`, which are on `n` images; as `Responses.run` gives them."""
        places = segments(n)

        def arguments(rank: int) -> tuple[Any, ...]:
            own = images_of(places, portion(len(places), rank, self.size))
            return key, wanted, [row[own].cpu() for row in rows], common

        found: list[Found] = self.collect("run", arguments)
        sums = iter(_added(found) if wanted.exact else _added_in_turn(found))
        others = zip(*(rest for _, parts in found for rest in parts), strict=True)
        return [
            next(sums) if how == "sum" else torch.cat(next(others)) if how == "cat" else next(others)[0]
            for how in wanted.combine
        ]

    def _run(
        self, name: str, arguments: Callable[[int], tuple[Any, ...]], own: Callable[[], Any] = lambda: None
    ) -> list[Any]:
        """Run a pass in all workers, and `own` here."""
        self._busy = True
        for rank in self._workers:
            self._reach(rank, _send, (name, arguments(rank)), rank)
        mine = own()
        answers = [self._reach(rank, _receive, rank) for rank in self._workers]
        self._busy = False
        for rank, (error, _) in zip(self._workers, answers, strict=True):
            if error is not None:
                raise WorkerError(f"worker {rank} of {self.size} failed: {error}")
        return [mine, *(result for _, result in answers)]

    @property
    def _workers(self) -> range:
        return range(1, self.size)

    def _reach(self, rank: int, exchange: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return exchange(*arguments)
        except RuntimeError:  # all that gloo raises
            raise WorkerError(f"worker {rank} of {self.size} was lost: {GO_ON}") from None

    def _terminated(self, *_: object) -> None:
        """On SIGTERM, which torchrun sends to all when one process is lost."""
        here = socket.gethostname()
        lost = [str(rank) for rank, (host, pid) in self._places.items() if host == here and not _alive(pid)]
        what = f"worker {', '.join(lost)} of {self.size} was lost" if lost else "stopped by SIGTERM"
        raise WorkerError(f"{what}: {GO_ON}")


class ShardedResponses(Responses):
    """`Responses` on all images whose passes run in all processes of a team, segment by segment.

    What is not overridden runs in the leader alone and is as right: single rows, samples of images
    (`to(images=...)`), mini-batches among them, and blocks of responses for solvers that want them one by one.
    """

    def __init__(
        self, team: Team, images: Images, embedding: PatchEmbedding, pooling: Pooling | None = None, **options: Any
    ) -> None:
        super().__init__(images, embedding, pooling, **options)
        self._team = team
        self._key = team.build(self)

    def to(self, *, images: Images | None = None, **changes: Any) -> Responses:
        """The same map in another arithmetic, sharded; or on other images, in this process."""
        plain = super().to(images=images, **changes)
        if images is not None:
            return plain
        sharded = ShardedResponses(self._team, plain.images, plain.embedding, plain.pooling, **plain.options)
        sharded.kept = plain.kept
        return sharded.until(self.deadline)

    def until(self, deadline: Deadline) -> Responses:
        """As in `Responses`; a pass that has begun is never left, lest the processes fall out of step."""
        other = super().until(deadline)
        other.__dict__["_built"] = self  # while it lives the team keeps the portions
        return other

    @property
    def n_processes(self) -> int:
        return self._team.size

    def run(self, wanted: Pass, rows: Sequence[Tensor], *common: Any) -> list[Tensor]:
        """As in `Responses`."""
        if self.n_processes == 1 and not wanted.exact:
            return super().run(wanted, rows, *common)
        self.deadline.check()
        return self._team.run(self._key, self.n, wanted, rows, common)

    def gradients(
        self, filters: Tensor, weights: Tensor, intercept: Tensor, residual: Residual
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in `Responses`; `residual` is called once, between a pass forwards and one back."""
        network = filters, weights, intercept
        predictions = self.predict(*network).to(self.device, self.dtype)
        slopes = residual(predictions, torch.arange(self.n, device=self.device))
        kernel, weight, bias = (part.to(self.device) for part in self.run(SLOPES, (slopes,), *network))
        return kernel, weight, bias


def _added(found: Sequence[Found]) -> list[Tensor]:
    """The sums of all segments, pairwise."""
    total: Nodes = {}
    for nodes, _ in found:
        for place, terms in nodes.items():
            add(total, place, terms)
    (root,) = total.values()
    return root


def _added_in_turn(found: Sequence[Found]) -> list[Tensor]:
    """The sums of all processes, one after the other in the place of the first."""
    return sum_up(terms for nodes, _ in found for terms in nodes.values())


# -- messages -----------------------------------------------------------------------------------------


def _serve(held: Portion) -> NoReturn:
    """Make the passes that the leader asks for; a worker's whole life."""
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))  # the leader says when to stop, or is gone
    try:
        _send((socket.gethostname(), os.getpid()), 0)
        while (message := _receive(0)) is not None:
            name, arguments = message
            result, failure = None, None
            try:
                result = getattr(held, name)(*arguments)
            except Exception as error:  # the leader reports it
                failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
            _send((failure, result), 0)
    except RuntimeError:
        if not signals:  # else it is the leader who tells
            print(f"convcvx: error: process 0 of {held.size} was lost: {GO_ON}", file=sys.stderr)
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


def _number(name: str) -> int:
    """An environment variable that counts processes."""
    value = os.environ[name]
    if not value.isdecimal():
        raise InputError(f"{name} must be a whole number; got {value!r}: unset it, or start with torchrun")
    return int(value)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
