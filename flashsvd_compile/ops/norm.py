"""Normalisation of queries or keys between their projection and their rotation, or of a region's input.

    rms      x / sqrt(mean(x ** 2) + eps) * weight + bias      Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4
    layer    the same of x - mean(x)                           Ba et al. 2016, arXiv:1607.06450, eq. 3 and 4

Means are over a head's own features, or over those of all heads of a position; an input is one head. They and
everything else are computed in float32 at least, and the result is rounded once.
"""

from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from ..errors import DtypeError, InvalidOptionError, ShapeError
from .ranges import ranges
from .workspace import rows_that_fit

NONE, RMS, LAYER = KINDS = ("none", "rms", "layer")
COPIES = 3
"""Widened copies of a block that :func:`apply` holds at once."""


class Norm(NamedTuple):
    """One norm.

    Attributes:
        centred: the mean is subtracted first, as a layer norm does.
        weight, bias: ``[1 or heads, head_dim]`` or ``None``.
        eps: added to the mean of squares.
        whole: means are over all heads' features instead of each head's own.
    """

    centred: bool
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    whole: bool

    def of_heads(self, heads: slice) -> "Norm":
        """The norm restricted to some heads; a whole one then needs to be told its :class:`Statistics`."""

        def of(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.shape[0] == 1 else tensor[heads]

        return self._replace(weight=of(self.weight), bias=of(self.bias))


class Statistics(NamedTuple):
    """What a norm knows of its input: ``[..., 1 or heads, 1]`` each.

    Attributes:
        mean: mean, or ``None`` where it is not subtracted.
        inverse: ``1 / sqrt(mean of squares + eps)``.
    """

    mean: Tensor | None
    inverse: Tensor

    def of_rows(self, rows: slice) -> "Statistics":
        """Those of some positions."""
        return Statistics(None if self.mean is None else self.mean[rows], self.inverse[rows])

    @classmethod
    def of_blocks(cls, blocks: list["Statistics"]) -> "Statistics":
        """Those of consecutive positions in one."""
        means = [block.mean for block in blocks if block.mean is not None]
        return cls(torch.cat(means) if means else None, torch.cat([block.inverse for block in blocks]))


def argument_names(role: str) -> tuple[str, ...]:
    """Names of the arguments that describe the norm of role ``"q"``, ``"k"`` or ``"x"``."""
    return tuple(f"{role}_norm{suffix}" for suffix in ("", "_weight", "_bias", "_eps", "_whole"))


def schema_of(role: str) -> str:
    """Schema fragment of one norm."""
    kind, weight, bias, eps, whole = argument_names(role)
    return f"str {kind}='{NONE}', Tensor? {weight}=None, Tensor? {bias}=None, float {eps}=0.0, bool {whole}=False"


ARGUMENTS_PER_NORM = len(argument_names(""))


def parse(role: str, arguments: tuple, heads: int, head_dim: int, dtype: torch.dtype) -> Norm | None:
    """Undo the schema's flattening and check that the norm fits ``heads`` heads of ``head_dim`` features.

    Args:
        role: ``"q"``, ``"k"`` or ``"x"``.
        arguments: kind (one of :data:`KINDS`), weight and bias (``[head_dim]``, ``[heads, head_dim]`` or
            ``[heads * head_dim]``, of ``dtype`` or float32), eps, and whether it is over all heads' features.
        heads, head_dim: sizes of what is normalised.
        dtype: dtype of what is normalised.

    Raises:
        InvalidOptionError: no such kind, a negative eps, or a weight without a norm.
        ShapeError, DtypeError: a weight or bias that does not fit.
    """
    kind, weight, bias, eps, whole = arguments
    name, weight_name, bias_name, eps_name, _ = argument_names(role)
    if kind not in KINDS:
        raise InvalidOptionError(name, kind, ", ".join(map(repr, KINDS)))
    if kind == NONE:
        if weight is not None or bias is not None:
            raise InvalidOptionError(name, kind, f"{RMS!r} or {LAYER!r} where there is a weight or bias")
        return None
    if not (isfinite(eps) and eps >= 0):
        raise InvalidOptionError(eps_name, eps, "a number not below 0")
    weight = _per_head(weight_name, weight, heads, head_dim, dtype)
    bias = _per_head(bias_name, bias, heads, head_dim, dtype)
    return Norm(kind == LAYER, weight, bias, eps, whole)


def _per_head(name: str, tensor: Tensor | None, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor | None:
    """``[1 or heads, head_dim]``."""
    if tensor is None:
        return None
    if tensor.dtype not in (dtype, torch.float32):
        raise DtypeError(name, tensor.dtype, dtype)
    if tensor.shape not in ((head_dim,), (heads, head_dim), (heads * head_dim,)):
        expected = f"({head_dim},), ({heads}, {head_dim}) or ({heads * head_dim},)"
        raise ShapeError(f"shape of {name}", tuple(tensor.shape), expected)
    return tensor.reshape(-1, head_dim)


def statistics(heads: Tensor, norm: Norm) -> Statistics:
    """Those of ``[..., heads, head_dim]``."""
    over = (-2, -1) if norm.whole else (-1,)
    wide = _widened(heads)
    mean = None
    if norm.centred:
        mean = wide.mean(over, keepdim=True)
        wide = wide - mean
    return Statistics(mean, torch.rsqrt(wide.square().mean(over, keepdim=True) + norm.eps))


def apply(heads: Tensor, norm: Norm | None, known: Statistics | None = None) -> Tensor:
    """The specification, for ``[..., heads, head_dim]``; without a norm the heads themselves."""
    if norm is None:
        return heads
    mean, inverse = statistics(heads, norm) if known is None else known
    wide = _widened(heads)
    if mean is not None:
        wide = wide - mean
    wide = wide * inverse
    if norm.weight is not None:
        wide = wide * norm.weight
    if norm.bias is not None:
        wide = wide + norm.bias
    return wide.to(heads.dtype)


def apply_(heads: Tensor, norm: Norm | None, scratch: int, known: Statistics | None = None) -> Tensor:
    """:func:`apply` for ``[items, len, heads, head_dim]``, in place.

    Args:
        heads: contiguous in its first two dimensions.
        norm: the norm, or ``None``.
        scratch: elements of the heads' dtype that may be allocated; one position at least.
        known: statistics of all ``items * len`` positions, if they are known.
    """
    if norm is None:
        return heads
    rows = heads.view(-1, *heads.shape[2:])
    step = positions_that_fit(scratch, rows)
    for block in ranges(len(rows), step):
        rows[block] = apply(rows[block], norm, None if known is None else known.of_rows(block))
    return heads


def of_rows(x: Tensor, norm: Norm | None) -> Tensor:
    """``x[..., features]`` normalised over its features, in one pass where the library has it; ``x`` without a norm."""
    if norm is None:
        return x
    weight, bias = (None if vector is None else vector.view(-1) for vector in (norm.weight, norm.bias))
    if all(vector is None or vector.dtype == x.dtype for vector in (weight, bias)):
        if norm.centred:
            return layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
        if bias is None:
            return rms_norm(x, x.shape[-1:], weight, norm.eps)
    return apply(x.unsqueeze(-2), norm).squeeze(-2)


def positions_that_fit(scratch: int, rows: Tensor) -> int:
    """Positions of ``[positions, heads, head_dim]`` that can be normalised within ``scratch`` elements."""
    widening = _wide(rows.dtype).itemsize // rows.dtype.itemsize
    return rows_that_fit(scratch, COPIES * widening * rows.shape[1] * rows.shape[2], len(rows))


def copies(dtype: torch.dtype) -> int:
    """Tensors of the heads' size, in their ``dtype``, that :func:`apply` holds, its input and its result included."""
    return 2 + COPIES * _wide(dtype).itemsize // dtype.itemsize


def _widened(heads: Tensor) -> Tensor:
    return heads.to(_wide(heads.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
