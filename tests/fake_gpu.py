"""A GPU that is none: tensors that say "cuda" and compute on the CPU, and operations that refuse to mix the two.

It finds what a real GPU would refuse, on machines without one: an operation on tensors of two devices, a tensor handed
to numpy before it was brought back. It says nothing about speed, nor about the arithmetic of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from convcvx.network import evaluate
from convcvx.solvers.master import gram

BRIDGES = {"aten._to_copy.default", "aten.copy_.default"}
"""Operations from one device to the other."""
INDEXED = {"aten.index.Tensor", "aten.index_put_.default", "aten._index_put_impl_.default"}
"""Operations that take indices from the CPU as well."""


STAND_INS: dict[str, Any] = {
    "is_available": lambda: True,
    "get_device_name": lambda *_: "none",
    "_lazy_init": lambda: None,
}
"""What torch asks about a GPU."""


class There(Tensor):
    """A tensor on the GPU that is none; `here` is where its entries are."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=torch.device("meta")
        )
        made.here = here
        return made

    def __repr__(self) -> str:
        return f"There({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Makes tensors there that are asked for on "cuda"."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Renamed(TorchFunctionMode):
    """Lets "meta" stand for "cuda": a torch without CUDA gives no other device to tensors that are none of its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def rename(part: Any) -> Any:
            named = isinstance(part, str | torch.device) and part in ("cuda", torch.device("cuda"))
            return torch.device("meta") if named else part

        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is Tensor.tolist and isinstance(args[0], There):
            return args[0].here.tolist()
        args = tuple(map(rename, args))
        kwargs = {name: rename(part) for name, part in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor) and "device" in kwargs:  # made without a dispatch of its own
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, Tensor)]
    there = any(isinstance(part, There) for part in tensors)
    name = str(func)
    if there and name not in BRIDGES:
        compared = tensors[:1] if name in INDEXED else tensors
        if any(not isinstance(part, There) and part.dim() for part in compared):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda and cpu")
    device = kwargs.get("device")
    if device is not None:
        there = torch.device(device).type == "meta"
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)

    def bring(part: Any) -> Any:
        return part.here if isinstance(part, There) else part

    out = func(*tree_map(bring, args), **tree_map(bring, kwargs))
    if name == "aten.copy_.default":
        return args[0]
    if not there:
        return out
    out = tree_map(lambda part: There(part) if isinstance(part, Tensor) else part, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Let "cuda" be a device."""
    with ExitStack() as stack:
        for name, stand_in in STAND_INS.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", stand_in))
        for table in (gram.STRIPE, evaluate.HIDDEN_SIZE):
            stack.enter_context(mock.patch.dict(table, meta=table["cuda"]))
        stack.enter_context(_Mode())
        stack.enter_context(_Renamed())
        yield
