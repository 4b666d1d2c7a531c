"""Calling operators past PyTorch's dispatcher, in compiled code where it has nothing to do but to look at the device.

The dispatcher makes values of its own of an operator's fifty arguments, and Python's of these again, and once more for
autograd: as much time as a replay takes (``benchmarks/NOTES.md``, "Host time").
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

import torch
from torch._C._functorch import maybe_current_level
from torch._ops import OpOverload

T = TypeVar("T")

_in_compiled_code: ContextVar[bool] = ContextVar("in_compiled_code", default=False)


def as_compiled_code(compiled: Callable[..., T]) -> Callable[..., T]:
    """The function, which Inductor has compiled, with its operators called directly where gradients are off.

    AOTAutograd turns them off for the code of a graph, whatever is done about gradients around it.
    """

    @wraps(compiled)
    def call(*arguments: Any) -> T:
        before = _in_compiled_code.get()
        try:
            _in_compiled_code.set(True)  # within: an exception may be raised by a signal at any time
            return compiled(*arguments)
        finally:
            _in_compiled_code.set(before)

    return call


def call_directly(operator: OpOverload, kernels: Mapping[str, Callable]) -> None:
    """Have compiled code call these for the operator, unless something wants to see the call or has part in it.

    Args:
        kernels: what computes it, by the type of its first argument's device.
    """
    dispatch = operator._op

    def call(*arguments: Any, **keywords: Any) -> Any:
        if _in_compiled_code.get() and not keywords and not torch.is_grad_enabled() and not _is_followed():
            kernel = kernels.get(arguments[0].device.type)
            if kernel is not None:
                return kernel(*arguments)
        return dispatch(*arguments, **keywords)

    operator._op = call  # what PyTorch replaces for the same reason, from 2.15 on and not by itself


def _is_followed() -> bool:
    """Whether there is a profiler, a mode or a transform of ``torch.func``."""
    profiled = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    transformed = maybe_current_level() is not None
    return profiled or transformed or torch._C._len_torch_dispatch_stack() > 0
