"""What kernels that multiply are given."""

from typing import NamedTuple

from torch import Tensor


class Product(NamedTuple):
    """``out = x @ weight.T + bias``; which layouts it reads, each kernel says itself.

    Attributes:
        x: ``[rows, depth]``.
        weight: ``[columns, depth]``.
        bias: ``[columns]`` or ``None``.
        out: ``[rows, columns]``, in the dtype of ``x`` and apart from it; all of it is written.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    out: Tensor
