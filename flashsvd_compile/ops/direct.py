"""Calling operators past PyTorch's dispatcher, in compiled code where it has nothing to do but to look at the device.

The dispatcher makes values of its own of an operator's fifty arguments, and Python's of these again, and once more for
autograd: as much time as a replay takes (``benchmarks/NOTES.md``, "Host time").
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload

T = TypeVar("T")

_nothing_is_differentiated: ContextVar[bool] = ContextVar("nothing_is_differentiated", default=False)


def below_autograd(compiled: Callable[..., T]) -> Callable[..., T]:
    """The function without autograd, and with its operators called directly.

    Args:
        compiled: by Inductor, of a graph throughout which gradients are off.
    """

    @wraps(compiled)
    def call(*arguments: Any) -> T:
        token = _nothing_is_differentiated.set(True)
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return compiled(*arguments)
        finally:
            _nothing_is_differentiated.reset(token)

    return call


def call_directly(operator: OpOverload, kernels: Mapping[str, Callable]) -> None:
    """Have the operator call these within :func:`below_autograd`, unless a mode or the profiler wants to see its calls.

    Args:
        kernels: what computes it, by the type of its first argument's device.
    """
    dispatch = operator._op

    def call(*arguments: Any, **keywords: Any) -> Any:
        if _nothing_is_differentiated.get() and not keywords and not _is_followed():
            kernel = kernels.get(arguments[0].device.type)
            if kernel is not None:
                return kernel(*arguments)
        return dispatch(*arguments, **keywords)

    operator._op = call  # what PyTorch replaces for the same reason, from 2.15 on and not by itself


def _is_followed() -> bool:
    profiled = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    return profiled or torch._C._len_torch_dispatch_stack() > 0
