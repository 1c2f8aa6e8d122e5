"""What processes tell each other, by the collectives of torch.distributed: messages, and sums of tensors.

Process 0 leads: it tells all the others at once, hears each of them, and gets the sums. Python objects go as bytes
through gloo; tensors that are summed go as they are, through NCCL where they lie on GPUs.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(hours=1)
"""The longest pass, and the longest a worker waits for one. A process that dies is noticed at once."""
PIECE = 1 << 24
"""Entries of a tensor that are summed at a time: what a collective needs besides stays small."""


class Agreed(Exception):
    """What ends in all processes something that they do together: `error`, or None where another one failed."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__(error)
        self.error = error


Form = tuple[tuple[int, ...], torch.dtype, str]
"""Shape, dtype and kind of device of a tensor."""


class Wire:
    """The connections of one process to the others; every method stands for the same call in all of them.

    Whatever fails because a process is gone is a RuntimeError: all that gloo raises.

    Attributes
    ----------
    rank, size : int
        This process's number and the number of processes.
    carried : int
        Bytes of all messages and sums that this process had a part in: what it tells all counts once for each of them,
        a sum once for each process that adds to it. In process 0 that is all there is.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.carried = rank, size, 0
        self._sums_on_gpus = False

    def open(self) -> None:
        """Meet the other processes."""
        self._sums_on_gpus = _have_gpus_of_their_own()
        backend = "cpu:gloo,cuda:nccl" if self._sums_on_gpus else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, **_meeting_point())

    def close(self) -> None:
        dist.destroy_process_group()

    def tell(self, message: Any) -> None:
        """From process 0 to all others, which `hear` it."""
        data = _bytes(message)
        dist.broadcast(torch.tensor(len(data)), 0)
        dist.broadcast(data, 0)
        self.carried += len(data) * (self.size - 1)

    def hear(self) -> Any:
        """What process 0 tells all."""
        size = torch.empty((), dtype=torch.int64)
        dist.broadcast(size, 0)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0)
        return _object(data)

    def send(self, message: Any, rank: int) -> None:
        """To one process, which `receive`s it."""
        data = _bytes(message)
        dist.send(torch.tensor(len(data)), rank)
        dist.send(data, rank)
        self.carried += len(data)

    def receive(self, rank: int) -> Any:
        """What the process of that `rank` sends."""
        size = torch.empty((), dtype=torch.int64)
        dist.recv(size, rank)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, rank)
        self.carried += len(data)
        return _object(data)

    def exchange(self, message: Any) -> list[Any]:
        """What each process says, to all: a few bytes."""
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, message)
        self.carried += len(_bytes(message)) * (self.size - 1)
        return everyone

    def go_on(self, work: Callable[[], bool]) -> bool:
        """Do some `work`, which says whether there was any to do; whether there was in any of the processes.

        Raises
        ------
        Agreed
            In all of them, if the work of one fails.
        """
        found, error = False, None
        try:
            found = work()
        except Exception as failed:
            error = failed
        counts = torch.tensor([int(found), int(error is not None)])
        dist.all_reduce(counts)
        self.carried += counts.nbytes * (self.size - 1)
        if counts[1]:
            raise Agreed(error)
        return bool(counts[0])

    def add_up(self, tensor: Tensor, rank: int = 0) -> Tensor:
        """The sum of the `tensor` of each process, in process `rank`; what comes back elsewhere is of no use."""
        whole = self._sent(tensor)
        for piece in whole.view(-1).split(PIECE):
            dist.reduce(piece, rank)
        self.carried += whole.nbytes * (self.size - 1)
        return whole

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of the `tensor` of each process, in all."""
        return self.show(self.add_up(tensor), 0)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The `tensor` of each process, of one shape, in all."""
        whole = self._sent(tensor)
        everyone = [torch.empty_like(whole) for _ in range(self.size)]
        dist.all_gather(everyone, whole)
        self.carried += whole.nbytes * self.size * (self.size - 1)
        return [part.to(tensor.device) for part in everyone]

    def show(self, tensor: Tensor, rank: int) -> Tensor:
        """The `tensor` of process `rank`, in all; those of others, of the same shape, are written over."""
        whole = self._sent(tensor)
        for piece in whole.view(-1).split(PIECE):
            dist.broadcast(piece, rank)
        self.carried += whole.nbytes * (self.size - 1)
        return whole.to(tensor.device)

    def _sent(self, tensor: Tensor) -> Tensor:
        """As collectives take it: on a GPU if it is there and has NCCL to itself."""
        return (tensor if self._sums_on_gpus or not tensor.is_cuda else tensor.cpu()).contiguous()


def forms_of(tensors: Sequence[Tensor]) -> list[Form]:
    return [(tuple(tensor.shape), tensor.dtype, tensor.device.type) for tensor in tensors]


def zeros_of(forms: Sequence[Form]) -> list[Tensor]:
    """What a process adds that has nothing to add."""
    return [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in forms]


def attempt() -> int:
    """How often torchrun has started these processes anew, in the place of others that were lost."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def on_this_machine(unknown: int) -> int:
    """How many of the processes run on this machine; `unknown` if the launcher does not say."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(count) if count.isdecimal() else unknown


def _meeting_point() -> dict[str, Any]:
    """Where processes find each other, if not where torch says.

    torchrun keeps one store for all attempts. torch 2.13 reads there what the lost processes wrote, and waits for them.
    """
    if not attempt():
        return {}
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    return {"store": dist.PrefixStore(f"attempt-{attempt()}", store), "rank": rank, "world_size": size}


class _Pickler(pickle.Pickler):
    """Sends of a tensor what it has itself: torch would send all that the memory has which it is a part of."""

    def reducer_override(self, found: Any) -> Any:
        if isinstance(found, Tensor) and found.nbytes < found.untyped_storage().nbytes():
            return found.clone(memory_format=torch.contiguous_format).__reduce_ex__(pickle.DEFAULT_PROTOCOL)
        return NotImplemented


def _bytes(message: Any) -> Tensor:
    stream = io.BytesIO()
    _Pickler(stream).dump(message)
    return torch.frombuffer(stream.getbuffer(), dtype=torch.uint8)


def _object(data: Tensor) -> Any:
    return pickle.loads(data.numpy().data)


def _have_gpus_of_their_own() -> bool:
    """Whether NCCL can add up what lies on GPUs: it needs one for each process."""
    own = on_this_machine(1) <= torch.cuda.device_count()
    return torch.cuda.is_available() and dist.is_nccl_available() and own
