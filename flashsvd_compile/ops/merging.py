"""Factors of an attention region multiplied on a GPU when they are used, where both cost more than their product.

Weights of keys and of values come to lie one behind the other, or do already, so that one product of a chunk's rows
gives both: two products of a few thousand rows take a fifth longer (768 features, H200).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.small_products import Small, multiply_together, supported
from . import projection as proj
from .attention_region import Attention
from .projection import Projection
from .replay import lies_behind
from .workspace import ALIGNMENT


class KeysAndValues(NamedTuple):
    """Projections to keys and to values, and to both side by side where that is one product."""

    k: Projection[Tensor]
    v: Projection[Tensor]
    both: Projection[Tensor] | None = None


def for_queries(attn: Attention, room: int) -> tuple[Projection[Tensor], KeysAndValues | None]:
    """The projection of queries to use, and those of keys and values where all three come in one launch.

    Args:
        room: elements that the queries' product may take beside the others.
    """
    fits = proj.out_features(attn.q) * proj.in_features(attn.q) <= room
    at_once = fits and proj.costs_more_than_dense(attn.q) and _come_side_by_side(attn)
    if not (at_once and supported(*map(_operands, (attn.q, attn.k, attn.v)))):
        return proj.merge_if_cheaper(attn.q), None
    queries, of_queries = _stacked([attn.q])
    both, of_both = _stacked([attn.k, attn.v])
    multiply_together(*of_queries, *of_both)
    return queries, _apart(both, attn)


def for_keys_and_values(attn: Attention) -> KeysAndValues:
    """The projections of keys and values to use."""
    if not _come_side_by_side(attn):
        return KeysAndValues(proj.merge_if_cheaper(attn.k), proj.merge_if_cheaper(attn.v))
    both, products = _stacked([attn.k, attn.v])
    if supported(*map(_operands, (attn.k, attn.v))):
        multiply_together(*products)
    else:
        for up, down, bias, weight, copy in products:
            torch.mm(up, down.t(), out=weight)
            if bias is not None and copy is not None:
                copy.copy_(bias)
    return _apart(both, attn)


def side_by_side(attn: Attention) -> Projection[Tensor] | None:
    """Dense projections of keys and of values as one, where one weight lies behind the other in memory."""
    k, v = attn.k, attn.v
    if k.down is not None or v.down is not None or not _are_aligned(attn) or not lies_behind(k.up, v.up):
        return None
    weight = k.up.as_strided((len(k.up) + len(v.up), k.up.shape[1]), k.up.stride())
    if k.up_bias is None and v.up_bias is None:
        return Projection(None, None, weight, None)
    bias = weight.new_zeros(len(weight))  # copied piece by piece: a recording cannot hold a list of tensors
    for projection, part in zip((k, v), bias.split((len(k.up), len(v.up))), strict=True):
        if projection.up_bias is not None:
            part.copy_(projection.up_bias)
    return Projection(None, None, weight, bias)


def _come_side_by_side(attn: Attention) -> bool:
    """Whether both keys and values are multiplied out, and heads of both are aligned side by side."""
    return _are_aligned(attn) and proj.costs_more_than_dense(attn.k) and proj.costs_more_than_dense(attn.v)


def _are_aligned(attn: Attention) -> bool:
    return all(proj.out_features(projection) % ALIGNMENT == 0 for projection in (attn.k, attn.v))


def _operands(projection: Projection[Tensor]) -> tuple[Tensor, Tensor]:
    """Whose product is the dense weight."""
    assert projection.down is not None
    return projection.up, projection.down.t()


def _stacked(projections: Sequence[Projection[Tensor]]) -> tuple[Projection[Tensor], list[Small]]:
    """A dense projection of one input to the features of all of these, and what its weight and bias are to hold."""
    like, widths = projections[0].up, [proj.out_features(projection) for projection in projections]
    weight = like.new_empty(sum(widths), proj.in_features(projections[0]))
    biases, bias = [proj.dense_bias(projection) for projection in projections], None
    if any(each is not None for each in biases):
        some_are_none = any(each is None for each in biases)
        bias = like.new_zeros(len(weight)) if some_are_none else like.new_empty(len(weight))
    copies = [None] * len(widths) if bias is None else bias.split(widths)
    products = [
        Small(*_operands(projection), given, out, copy)
        for projection, given, out, copy in zip(projections, biases, weight.split(widths), copies, strict=True)
    ]
    return Projection(None, None, weight, bias), products


def _apart(both: Projection[Tensor], attn: Attention) -> KeysAndValues:
    """The parts of a projection to keys and values."""
    width = proj.out_features(attn.k)

    def some(features: slice) -> Projection[Tensor]:
        return both._replace(up=both.up[features], up_bias=None if both.up_bias is None else both.up_bias[features])

    return KeysAndValues(some(slice(width)), some(slice(width, None)), both)
