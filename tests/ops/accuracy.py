"""The error rule: as close to float64 as the unfused model of the same dtype, up to a factor of 1.25."""

from collections.abc import Callable

import torch
from torch import Tensor

FACTOR = 1.25


def in_float64(arguments: tuple) -> tuple:
    """The arguments with every floating tensor widened, values and all else unchanged."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    return float((actual.double() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny))


def assert_within_error_rule(actual: Tensor, reference: Callable, arguments: tuple, *, ulps: float = 1) -> None:
    """``actual`` may err 1.25 times as much as ``reference`` does in the arguments' dtype.

    A few numbers round luckily; so an error of ``ulps`` of the dtype's resolution passes whatever the reference's is.
    """
    exact = reference(*in_float64(arguments))
    assert actual.shape == exact.shape
    assert actual.dtype == arguments[0].dtype
    assert actual.is_contiguous()
    allowed = max(FACTOR * relative_error(reference(*arguments), exact), ulps * torch.finfo(actual.dtype).eps)
    error = relative_error(actual, exact)
    assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"
