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


def worth_of_a_digit(reference: Callable, arguments: tuple, exact: Tensor) -> float:
    """The relative error of a result that is exact, but of arguments whose last digits are rounded at random."""
    generator, half_an_ulp = torch.Generator().manual_seed(0), torch.finfo(arguments[0].dtype).eps / 2

    def rounded(a: object) -> object:
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        signs = torch.randint(2, a.shape, generator=generator).to(a.device) * 2 - 1
        return a * (1 + half_an_ulp * signs)

    wide = in_float64(arguments)
    return max(relative_error(reference(*map(rounded, wide)), exact) for _ in range(4))


def assert_within_error_rule(
    actual: Tensor, reference: Callable, arguments: tuple, *, ulps: float = 1, cancelling: bool = False
) -> None:
    """``actual`` may err 1.25 times as much as ``reference`` does in the arguments' dtype.

    A few numbers round luckily; so an error of ``ulps`` of the dtype's resolution passes whatever the reference's is.
    Where arguments are found at random and sums of them may be ``cancelling``, a unit is no less than what a last digit
    of the arguments is worth to the exact result.
    """
    exact = reference(*in_float64(arguments))
    assert actual.shape == exact.shape
    assert actual.dtype == arguments[0].dtype
    assert actual.is_contiguous()
    unit = torch.finfo(actual.dtype).eps
    unit = max(unit, worth_of_a_digit(reference, arguments, exact)) if cancelling else unit
    allowed = max(FACTOR * relative_error(reference(*arguments), exact), ulps * unit)
    error = relative_error(actual, exact)
    assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"
