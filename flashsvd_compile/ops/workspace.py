"""Reusable scratch memory of a streaming operator, and products written into it."""

from math import prod

import torch
from torch import Tensor

from ..errors import InvalidOptionError
from ..kernels.operands import Product, begin_alike, shares_memory
from ..kernels.product import multiplies_faster, multiplies_pair_faster, multiply, multiply_pair, takes
from ..options import Strategy
from .activation import activate_
from .projection import Projection, rank
from .ranges import ranges
from .residual import plus

ALIGNMENT = 16
"""Elements. Attention kernels read heads 16 bytes at a time; cuDNN gives wrong results for others without a word."""


class Workspace:
    """One allocation, handed out front to back; ``reset`` starts the next chunk.

    A single block keeps the allocator's peak equal to its size whatever the number of chunks.

    Args:
        elements: its size.
        aligned: how many tensors of a chunk may be taken ``aligned``, which skips some elements more.
    """

    def __init__(self, elements: int, like: Tensor, aligned: int = 0):
        self._memory = like.new_empty(elements + ALIGNMENT * aligned)
        self._used = 0

    @classmethod
    def over(cls, tensor: Tensor) -> "Workspace":
        """The memory of a contiguous tensor whose contents do not matter yet, such as part of a result."""
        workspace = cls(0, like=tensor)
        workspace._memory = tensor.view(-1)
        return workspace

    def mark(self) -> int:
        """The present fill, to :meth:`reset` to."""
        return self._used

    def left(self) -> int:
        """Elements not taken yet."""
        return self._memory.numel() - self._used

    def reset(self, mark: int = 0) -> None:
        """Free everything taken since ``mark``."""
        self._used = mark

    def aligned(self) -> "Workspace":
        """The workspace, what is taken next starting at a multiple of :data:`ALIGNMENT`."""
        self._used = -(-self._used // ALIGNMENT) * ALIGNMENT
        return self

    def take(self, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor of the given shape."""
        size = prod(shape)
        tensor = self._memory[self._used : self._used + size].view(shape)
        self._used += size
        return tensor

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor was taken from here."""
        offset = tensor.storage_offset() - self._memory.storage_offset()
        return shares_memory(tensor, self._memory) and 0 <= offset < self._memory.numel()


def affine_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``out = x @ weight.T + bias`` for ``x[rows, in]``, ``weight[out, in]``, ``out[rows, out]``."""
    product = Product(x, weight, bias, out)
    if multiplies_faster(product):
        return multiply(product)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def affines_into(*products: Product) -> None:
    """Each as by :func:`affine_into`; two in one launch where that is faster, as where one does not occupy the chip."""
    if len(products) == 2 and multiplies_pair_faster(*products):
        return multiply_pair(*products)
    for x, weight, bias, out in products:
        affine_into(out, x, weight, bias)


def affine_plus(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """``out = x @ weight.T + bias + residual``, the last like ``out``: in one launch if there is a kernel for that."""
    product = Product(x, weight, bias, out)
    if residual is not None and takes(product, residual):
        return multiply(product, residual=residual)
    return plus(affine_into(out, x, weight, bias), residual)


def activated_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``out = act(x @ weight.T + bias)``: in one launch if there is a kernel for that."""
    product = Product(x, weight, bias, out)
    if takes(product):
        return multiply(product, activation)
    return activate_(activation, affine_into(out, x, weight, bias))


def add_product(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``total += x @ weight.T``."""
    product = Product(x, weight, None, total)
    if multiplies_faster(product):
        return multiply(product, residual=total)
    return total.addmm_(x, weight.t())


def project_into(
    out: Tensor,
    x: Tensor,
    projection: Projection[Tensor],
    workspace: Workspace,
    residual: Tensor | None,
) -> Tensor:
    """``out = projection(x) + residual`` with the rank-space intermediate in the workspace."""
    if projection.down is None:
        return affine_plus(out, x, projection.up, projection.up_bias, residual)
    latent = workspace.take(x.shape[0], rank(projection))
    affine_into(latent, x, projection.down, projection.down_bias)
    return affine_plus(out, latent, projection.up, projection.up_bias, residual)


def lift_heads(
    latent: Tensor, projection: Projection[Tensor], first: int, count: int, dim: int, workspace: Workspace
) -> Tensor:
    """``[items, len, count, dim]``: some heads of a projection out of its rank space ``[items, len, rank]``."""
    features = slice(first * dim, (first + count) * dim)
    lifted = workspace.aligned().take(latent.shape[0], latent.shape[1], count, dim)
    bias = None if projection.up_bias is None else projection.up_bias[features]
    affine_into(lifted.view(-1, count * dim), latent.reshape(-1, latent.shape[-1]), projection.up[features], bias)
    return lifted


def rows_that_fit(workspace: int, per_row: int, rows: int) -> int:
    """Rows of a chunk: as many as fit the workspace, at least one, evenly cut so that no short rest remains."""
    if per_row == 0 or rows == 0:
        return max(1, rows)
    fitting = max(1, workspace // per_row)
    chunks = -(-rows // fitting)
    return -(-rows // chunks)


def project_rows(
    out: Tensor,
    x: Tensor,
    projection: Projection[Tensor],
    workspace: Workspace,
    residual: Tensor | None = None,
) -> None:
    """``out[rows, features] = projection(x) + residual`` within what is left of the workspace.

    ``out`` may be ``x`` itself; the residual is like ``out``, or ``None``.
    """
    mark, copied = workspace.mark(), _is_copied(out, x, projection)
    step = rows_that_fit(workspace.left(), elements_per_row(out, x, projection), out.shape[0])
    for rows in ranges(out.shape[0], step):
        workspace.reset(mark)
        source = workspace.take(*x[rows].shape).copy_(x[rows]) if copied else x[rows]
        project_into(out[rows], source, projection, workspace, None if residual is None else residual[rows])
    workspace.reset(mark)


def elements_per_row(out: Tensor, x: Tensor, projection: Projection[Tensor]) -> int:
    """What one row takes of :func:`project_rows`'s workspace."""
    return x.shape[1] if _is_copied(out, x, projection) else rank(projection)


def _is_copied(out: Tensor, x: Tensor, projection: Projection[Tensor]) -> bool:
    return projection.down is None and begin_alike(out, x)


def validate_execution(strategy: str, workspace_bytes: int) -> None:
    """Check how an operator is asked to run.

    Raises:
        InvalidOptionError: no such strategy, or no workspace at all.
    """
    valid = tuple(map(str, Strategy))
    if strategy not in valid:
        raise InvalidOptionError("strategy", strategy, ", ".join(map(repr, valid)))
    validate_workspace(workspace_bytes)


def rows_of(x: Tensor) -> Tensor:
    """``[rows, features]`` of a tensor of any leading dimensions: a view where its strides allow one."""
    return x.reshape(-1, x.shape[-1])


def validate_workspace(workspace_bytes: int) -> None:
    """Check an operator's bound of scratch memory.

    Raises:
        InvalidOptionError: no workspace at all.
    """
    if workspace_bytes < 1:
        raise InvalidOptionError("workspace_bytes", workspace_bytes, "a positive number of bytes")
