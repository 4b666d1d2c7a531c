"""Few rows, as decoding has them: what the kernels that a GPU has for them (``kernels/gemv.py``) compute of a call."""

import sympy
import torch
from torch.fx import Node

from .. import ops
from ..kernels.gemv import MAX_ON_HOPPER, has_odd_rows
from ..kernels.target import speaks_gluon
from ..planner import is_bound_by_launches
from .region import chip_of, is_on_gpu, rows_of
from .values import hints_of, tensor_of


def has_few_rows(x: Node) -> bool:
    """Whether projections of a tensor take the time of their launches, by the sizes that it was traced with."""
    return is_bound_by_launches(sympy.sympify(rows_of(x)).xreplace(hints_of(x)))


def has_kernel(node: Node, x: Node) -> bool:
    """Whether there is a kernel for an operator's call, if the rows of its input ``x`` are few.

    They are of half precision, or one row, and the factors' own rows are contiguous.
    """
    given = [value for name, value in node.kwargs.items() if name.endswith(("_down", "_up"))]
    factors = [tensor_of(value) for value in given if isinstance(value, Node)]
    contiguous = all(factor is not None and factor.stride(-1) == 1 for factor in factors)
    rows = tensor_of(x)
    return is_on_gpu(x) and contiguous and rows is not None and (rows.element_size() == 2 or rows_of(x) == 1)


def has_kernel_with_norm(node: Node, x: Node) -> bool:
    """Whether that kernel takes a root mean square norm of ``x``, too.

    All that reads ``x`` is low-rank. Several rows are of bfloat16, and the factors' rows begin at 16-byte boundaries.
    """
    if node.target not in (ops.mlp, ops.linear, ops.packed_linear) or not has_kernel(node, x):
        return False
    roles = [name.removesuffix("_up") for name, value in node.kwargs.items() if name.endswith("_up") and value]
    given = [node.kwargs.get(f"{role}_down") for role in roles if role != "out"]
    first = [tensor_of(factor) for factor in given if isinstance(factor, Node)]
    if len(first) < len(given):
        return False
    rows, chip, value = rows_of(x), chip_of(x), tensor_of(x)
    if rows == 1:
        return True
    if not rows.is_number or rows > MAX_ON_HOPPER or chip is None or not speaks_gluon(chip):
        return False
    in_range = value is not None and value.dtype == torch.bfloat16
    return in_range and not has_odd_rows([factor for factor in first if factor is not None])
