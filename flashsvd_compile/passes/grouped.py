"""Projections of groups of features, each out of its own range of one rank-space tensor.

    h = linear(x, down).split(r, -1)
    y = cat([linear(h[0], up[0]), linear(h[1], up[1])], -1)

As a pair of factors, ``up`` is block-diagonal. Where its zeros make it dearer than the dense matrix, the groups are
multiplied out, on the weights' side and inside the graph: one small product a group.
"""

import torch
from torch.fx import Node

from ..ops.projection import Projection
from .affine import Affine, read_affine
from .factored import Factored
from .values import shape_of
from .views import Narrow, read_view
from .vocabulary import read
from .weights import Weight


def read_groups(node: Node) -> Factored | None:
    """``node`` as ``cat`` of projections out of consecutive ranges of one rank-space tensor."""
    call = read(node)
    result = shape_of(node)
    if call is None or call.op != "cat" or result is None or call.get("dim", 0) not in (-1, len(result) - 1):
        return None
    groups = [_group(part) for part in call["tensors"]]
    latent = None if None in groups or len(groups) < 2 else _whole(groups)
    inner = None if latent is None else read_affine(latent)
    if inner is None or latent is None:
        return None
    nodes = (*inner.nodes, *(n for group in groups if group for n in group[0].nodes), node)
    members = [group[0] for group in groups if group is not None]
    if len({group.bias is None for group in members}) > 1 or inner.bias is not None:
        return None
    if any(user not in nodes for n in nodes[:-1] for user in n.users):
        return None
    rank, features, ups = inner.weight.shape[0], int(result[-1]), [group.weight for group in members]
    bias = None if members[0].bias is None else Weight.call(torch.cat, tuple(group.bias for group in members))
    if rank > min(inner.weight.shape[1], features):
        return None
    if rank * (inner.weight.shape[1] + features) < inner.weight.shape[1] * features:
        pair = Projection(inner.weight, None, Weight.call(torch.block_diag, *ups), bias)
        return Factored(inner.source, pair, nodes, rank)
    starts = [group[1] for group in groups if group is not None]
    downs = [Weight.call("narrow", inner.weight, 0, at, up.shape[1]) for at, up in zip(starts, ups, strict=True)]
    dense = Weight.call(torch.cat, tuple(Weight.call("matmul", up, down) for up, down in zip(ups, downs, strict=True)))
    return Factored(inner.source, Projection(None, None, dense, bias), nodes, rank)


def _group(part: Node) -> tuple[Affine, int] | None:
    """One projection with the range's first column; its nodes include the views that take the range."""
    affine = read_affine(part)
    view = None if affine is None else read_view(affine.source)
    shape = None if view is None else shape_of(view.source)
    if affine is None or view is None or shape is None:
        return None
    for step in view.steps:
        if len(view.steps) == 1 and isinstance(step, Narrow) and step.dim == len(shape) - 1 and step.start.is_Integer:
            return affine._replace(source=view.source, nodes=(*reversed(view.nodes), *affine.nodes)), int(step.start)
    return None


def _whole(groups: list[tuple[Affine, int] | None]) -> Node | None:
    """The tensor whose columns the groups cover, in order."""
    found = [group for group in groups if group is not None]
    source, end = found[0][0].source, 0
    for affine, start in found:
        if affine.source is not source or start != end:
            return None
        end = start + affine.weight.shape[1]
    shape = shape_of(source)
    return source if shape is not None and shape[-1] == end else None
