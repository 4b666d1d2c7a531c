"""The activations a region may contain: names, reference and in-place form."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InvalidOptionError
from ..kernels import gating


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "relu_squared": lambda x: functional.relu(x).square(),
    "quick_gelu": _quick_gelu,
}
"""Reference of each activation, elementwise, any floating dtype."""


def _quick_gelu_(x: Tensor) -> None:
    """``x * sigmoid(1.702 x)`` as ``silu(1.702 x) / 1.702``: no second tensor of the size of ``x``. In float16, where
    ``1.702 x`` overflows, a sixteenth of one.
    """
    if x.dtype == torch.float16:
        for part in x.chunk(16):
            part.mul_((1.702 * part).sigmoid_())
    else:
        torch.ops.aten.silu.out(x.mul_(1.702), out=x).div_(1.702)


_IN_PLACE: dict[str, Callable[[Tensor], object]] = {
    "gelu": lambda x: torch.ops.aten.gelu.out(x, out=x),
    "gelu_tanh": lambda x: torch.ops.aten.gelu.out(x, approximate="tanh", out=x),
    "relu": lambda x: x.relu_(),
    "silu": lambda x: torch.ops.aten.silu.out(x, out=x),
    "relu_squared": lambda x: x.relu_().square_(),
    "quick_gelu": _quick_gelu_,
}


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The reference of a named activation.

    Raises:
        InvalidOptionError: no such activation.
    """
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise InvalidOptionError("activation", name, ", ".join(ACTIVATIONS)) from None


def activate_(name: str, x: Tensor) -> Tensor:
    """Apply an activation in place and return ``x``."""
    _IN_PLACE[name](x)
    return x


def gate_(name: str, gate: Tensor, hidden: Tensor) -> Tensor:
    """``act(gate) * hidden`` over ``gate``; contiguous tensors of one shape."""
    if gate.is_cuda and gate.dtype.itemsize <= 4:
        return gating.gate_(name, gate, hidden)
    return activate_(name, gate).mul_(hidden)
