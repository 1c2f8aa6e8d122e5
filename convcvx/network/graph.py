"""What a module does to its input, step by step, as a list of torch modules: read off its graph, or its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from convcvx.activations import USUAL_SLOPE, Abs, Square

SHAPES = {"flatten", "view", "reshape", "squeeze"}
"""Functions and methods that give what they get another shape: into which, the outputs show."""
MAPS = ({2, 3}, {-2, -1})
"""Axes over which the mean of a map (n, m, H, W) is global average pooling, and its maximum global maximum pooling."""


class Other(nn.Module):
    """A step that is no layer, by its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class Unread(Exception):
    """A graph that is no chain of steps."""


class _Tracer(fx.Tracer):
    """Takes layers whole, also those that are not torch's own but derive from them, such as `ContrastConv2d`."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or isinstance(m, nn.Conv2d | nn.Linear)


def steps_of(network: nn.Module) -> list[nn.Module] | None:
    """The steps of `network` in the order in which its `forward` takes them; None where it cannot be followed."""
    try:
        graph = _Tracer().trace(network)
    except Exception:  # `forward` is anybody's code, and tracing runs it
        return None
    try:
        return list(reversed(list(map(_named_step(network), _chain(graph)))))
    except Unread:
        return None


def layers_of(network: nn.Module) -> list[nn.Module]:
    """All layers, as they were registered: whoever takes these for the steps compares outputs."""
    return [module for module in network.modules() if not list(module.children())]


def name_of(step: nn.Module) -> str:
    return step.name if isinstance(step, Other) else type(step).__name__


def _chain(graph: fx.Graph) -> list[fx.Node]:
    """The nodes from the output back to the input, each of which takes the next one first, and no other of them."""
    output = next(node for node in graph.nodes if node.op == "output")
    node, chain = output.args[0], []
    while isinstance(node, fx.Node) and node.op != "placeholder":
        chain.append(node)
        taken = [*node.args, *node.kwargs.values()]
        if node.op == "get_attr" or not taken or not isinstance(taken[0], fx.Node):
            raise Unread
        if len(node.all_input_nodes) > 1 and _function(node) not in SHAPES:  # a shape may be computed from others
            raise Unread
        node = taken[0]
    if not isinstance(node, fx.Node):
        raise Unread
    return chain


def _function(node: fx.Node) -> str:
    """The name of a function or method."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _named_step(network: nn.Module) -> Callable[[fx.Node], nn.Module]:
    def step(node: fx.Node) -> nn.Module:
        if node.op == "call_module":
            return network.get_submodule(str(node.target))
        name, rest, named = _function(node), node.args[1:], dict(node.kwargs)
        if name == "mul" and rest == node.args[:1]:
            return Square()
        try:
            return _as_module(name, rest, named)
        except (TypeError, ValueError):  # other arguments than torch's own
            return Other(name)

    return step


def _as_module(name: str, rest: tuple[Any, ...], named: dict[str, Any]) -> nn.Module:
    """The module that does what a function of torch does, or a method of its tensors."""
    named.pop("inplace", None)
    made = MODULES[name](*rest, **named) if name in MODULES else None
    return Other(name) if made is None else made


def _flatten(*_: Any, **__: Any) -> nn.Module:
    """Whatever the shape is: the outputs show it."""
    return nn.Flatten()


def _clamp(min: Any = None, max: Any = None) -> nn.Module | None:
    return nn.ReLU() if min == 0 and max is None else None


def _power(exponent: Any) -> nn.Module | None:
    return Square() if exponent == 2 else None


def _leaky_relu(negative_slope: float = USUAL_SLOPE, inplace: bool = False) -> nn.Module:
    return nn.LeakyReLU(negative_slope)


def _dropout(p: float = 0.5, training: bool = True) -> nn.Module:
    """As the function is called: that of `torch.nn.functional` drops even in evaluation, unless it is told."""
    return nn.Dropout(p).train(training)


def _log_softmax(dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> nn.Module:
    """Of rows, which the outputs are; along another axis they would show it."""
    return nn.LogSoftmax(1 if dim is None else dim)


def _max_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> nn.Module:
    """As the function has its arguments, in another order than the module."""
    return nn.MaxPool2d(kernel_size, stride, padding, dilation, return_indices, ceil_mode)


def _global(pool: type[nn.Module]) -> Callable[..., nn.Module | None]:
    """Of a mean or a maximum over whole maps."""

    def module(dim: Any = (), keepdim: bool = False) -> nn.Module | None:
        axes = set(dim) if isinstance(dim, tuple | list) else {dim}
        return pool(1) if axes in MAPS else None

    return module


MODULES: dict[str, Callable[..., nn.Module | None]] = {
    **dict.fromkeys(SHAPES, _flatten),
    **dict.fromkeys(("relu", "relu_"), nn.ReLU),
    **dict.fromkeys(("clamp", "clamp_min"), _clamp),
    **dict.fromkeys(("leaky_relu", "leaky_relu_"), _leaky_relu),
    **dict.fromkeys(("abs", "abs_", "absolute"), Abs),
    **dict.fromkeys(("square", "square_"), Square),
    **dict.fromkeys(("pow", "pow_"), _power),
    **dict.fromkeys(("dropout", "dropout2d", "feature_dropout", "alpha_dropout"), _dropout),
    "log_softmax": _log_softmax,
    "avg_pool2d": nn.AvgPool2d,
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d,
    "max_pool2d": _max_pool,
    "adaptive_max_pool2d": nn.AdaptiveMaxPool2d,
    "amax": _global(nn.AdaptiveMaxPool2d),
    "mean": _global(nn.AdaptiveAvgPool2d),
}
"""By the name of a function or method: what makes its module of its further arguments; None where it is none."""
