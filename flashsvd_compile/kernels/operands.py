"""What kernels that multiply are given."""

from typing import NamedTuple

from torch import Tensor


class Product(NamedTuple):
    """``out = x @ weight.T + bias``; which layouts it reads, each kernel says itself.

    Attributes:
        x: ``[rows, depth]``; some kernels take shifted copies of it, ``[copies, rows, depth]``.
        weight: ``[columns, depth]``.
        bias: ``[columns]`` or ``None``.
        out: ``[rows, columns]``, in the dtype of ``x`` and apart from it; all of it is written.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    out: Tensor


def shares_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are views of one piece of memory. By storage: tensors without contents have no addresses."""
    return first.untyped_storage()._cdata == second.untyped_storage()._cdata


def begin_alike(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one dtype begin at one place in one piece of memory."""
    return shares_memory(first, second) and first.storage_offset() == second.storage_offset()


class RmsNorm(NamedTuple):
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over a row (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4).

    Attributes:
        weight: ``[features]``, or ``None`` for ones.
        eps: added to the mean of squares.
    """

    weight: Tensor | None
    eps: float


class Rotation(NamedTuple):
    """Rotary position embedding of a product's heads, halves ``(x1, x2)`` of which become
    ``(x1 cos1 - x2 sin1, x2 cos2 + x1 sin2)`` (Su et al. 2021, arXiv:2104.09864, eq. 34).

    Attributes:
        cos, sin: ``[positions, head_dim]``.
        first: position of the product's first row; row ``i`` is at position ``(first + i) % positions``.
    """

    cos: Tensor
    sin: Tensor
    first: int = 0
