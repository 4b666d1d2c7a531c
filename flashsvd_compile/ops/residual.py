"""The residual that an operator adds to its result: a model's stream is then one tensor, no sum yet to take."""

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor

from ..errors import DtypeError, ShapeError


def plus_residual(position: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Let an implementation add the argument at ``position``, a tensor like its result or ``None``, in place.

    The decorated implementation ignores that argument, and its result is its own.
    """

    def decorate(implementation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(implementation)
        def call(*arguments) -> Tensor:
            return plus(implementation(*arguments), arguments[position])

        return call

    return decorate


def plus(result: Tensor, residual: Tensor | None) -> Tensor:
    """``result += residual``, unless that is ``None``."""
    return result if residual is None else result.add_(residual)


def joined(implementation: Callable[[Tensor | None], Tensor], residual: Tensor | None) -> Tensor:
    """The result of an implementation that adds a contiguous residual itself; any other is added behind it."""
    if residual is None or residual.is_contiguous():
        return implementation(residual)
    return plus(implementation(None), residual)


def validate_residual(residual: Tensor | None, x: Tensor, shape: Sequence[int | torch.SymInt]) -> None:
    """Check that a residual has the result's ``shape`` and the dtype of the input ``x``.

    Raises:
        ShapeError, DtypeError: it has not.
    """
    if residual is None:
        return
    if residual.dtype != x.dtype:
        raise DtypeError("residual", residual.dtype, x.dtype)
    if tuple(residual.shape) != tuple(shape):
        raise ShapeError("shape of residual", tuple(residual.shape), tuple(shape))
