"""What the texts of options stand for. Those who know need torch, and are asked only where a text is to be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convcvx.training.option import size_text

if TYPE_CHECKING:
    from convcvx.activations import Activation
    from convcvx.pooling import Pooling


def pooling(text: str) -> Pooling:
    """What a text of `pool` stands for."""
    from convcvx.pooling import Pooling

    return Pooling.of(text)


def pool_text(value: Any) -> Any:
    """4 as "4", (4, 2) as "4x2", a `Pooling` as it is written."""
    if isinstance(value, str):
        return value
    from convcvx.pooling import Pooling

    return str(value) if isinstance(value, Pooling) else size_text(value)


def activation(text: str) -> Activation:
    """What a text of `activation` stands for."""
    from convcvx.activations import Activation

    return Activation.of(text)


def activation_text(value: Any) -> Any:
    """An `Activation` as it is written, and None, which is the ReLU."""
    if isinstance(value, str):
        return value
    from convcvx.activations import Activation

    return str(Activation.of(value)) if value is None or isinstance(value, Activation) else value


def class_weight_text(value: Any) -> Any:
    """Class weights as runs keep them, of a text or a dict."""
    from convcvx.data.weights import class_weight_text

    return class_weight_text(value)


def loss(text: str) -> str:
    """The name of the loss that a text of `loss` stands for."""
    from convcvx.losses.table import get_loss

    return get_loss(text).name
