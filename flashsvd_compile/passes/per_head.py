"""Projections with factors of their own for each head, whose result has a dimension of heads.

    h = einsum("bmd,hdr->bhmr", x, down)            y[:, head] = x @ down[head] @ up[head]
    y = einsum("bhmr,hrd->bhmd", h, up)

As two matrices they would be ``down`` of all heads and a block-diagonal ``up``, mostly zeros. Instead they are
multiplied out to one dense matrix, on the weights' side and inside the graph: one small product a head. The factors are
remembered for what can be computed in their rank space.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.fx import Node

from ..ops.projection import Projection
from .equation import Equation, read_equation
from .factored import Factored, HeadFactors
from .values import number_of, shape_of, tensor_of
from .views import Regroup, read_view
from .vocabulary import read
from .weights import Weight, is_weight

_ROWS = "bmd"
"""Dimensions of what regions project: batch, positions, features."""


class PerHead(NamedTuple):
    """A projection whose result has the heads as a dimension of their own.

    Attributes:
        factored: dense, rows head by head; its rank is that of one head.
        letters: the result's dimensions: ``b`` and ``m`` the rows, ``h`` the heads, ``d`` the features of a head.
    """

    factored: Factored
    letters: str


class _Stage(NamedTuple):
    """``result[..., h, out] = source[..., in] * weight[h, in, out]``."""

    source: Node
    source_letters: str
    weight: Weight
    letters: str
    bias: Weight | None
    nodes: tuple[Node, ...]


def read_per_head(node: Node) -> PerHead | None:
    """``node`` as a projection with separate factors, or one separate matrix, for each head."""
    outer = _stage(node)
    if outer is None:
        return None
    if outer.source_letters == _ROWS:
        return _dense(outer, _by_features(outer.weight), None, outer.nodes)
    inner = _stage(outer.source) if "h" in outer.source_letters else None
    if inner is None or inner.source_letters != _ROWS or inner.letters != outer.source_letters:
        return None
    if inner.bias is not None:
        return None
    if any(user not in outer.nodes for node in inner.nodes[-1:] for user in node.users):
        return None
    rank = inner.weight.shape[2]
    if rank > min(inner.weight.shape[1], outer.weight.shape[2]):
        return None
    factors = HeadFactors(inner.weight, outer.weight)
    found = _dense(outer._replace(source=inner.source), _product(*factors), rank, inner.nodes + outer.nodes)
    return found._replace(factored=found.factored._replace(of_heads=factors))


def multiply_together(projections: Sequence[Factored]) -> list[Factored]:
    """The projections, those with :class:`HeadFactors` of the same sizes as parts of one product of all their heads.

    One product is one launch, and one allocation; each of several may be given up to 1 MiB more than it asks for.
    """
    alike: dict[tuple, list[int]] = {}
    for index, projection in enumerate(projections):
        if projection.of_heads is not None:
            sizes = [(factor.shape[1:], factor.value.dtype) for factor in projection.of_heads]
            alike.setdefault(tuple(sizes), []).append(index)
    changed = list(projections)
    for indices in alike.values():
        if len(indices) > 1:
            parts = _stacked([projections[index] for index in indices])
            for index, part in zip(indices, parts, strict=True):
                changed[index] = part
    return changed


def _stacked(projections: Sequence[Factored]) -> list[Factored]:
    """The projections with weights that are parts of one product."""
    downs, ups = zip(*(projection.of_heads for projection in projections if projection.of_heads), strict=True)
    whole = _rows(_product(Weight.call(torch.cat, list(downs)), Weight.call(torch.cat, list(ups))))
    features = [projection.projection.up.shape[0] for projection in projections]
    starts = accumulate(features, initial=0)
    parts = [Weight.call("narrow", whole, 0, *part) for part in zip(starts, features, strict=False)]
    return [
        projection._replace(projection=projection.projection._replace(up=part))
        for projection, part in zip(projections, parts, strict=True)
    ]


def _product(down: Weight, up: Weight) -> Weight:
    """``[h, out, in]``; the other way round each head's product would have to be copied, transposed, to its rows."""
    return Weight.call("matmul", _by_features(up), _by_features(down))


def _by_features(weight: Weight) -> Weight:
    """From ``weight[h, in, out]`` to ``[h, out, in]``."""
    return Weight.call("transpose", weight, 1, 2)


def _rows(weight: Weight) -> Weight:
    """From ``weight[h, out, in]`` to ``[h * out, in]``."""
    return Weight.call("flatten", weight, 0, 1)


def _dense(outer: _Stage, weight: Weight, rank: int | None, nodes: tuple[Node, ...]) -> PerHead:
    """The dense projection by ``weight[h, out, in]``, as ``[h * out, in]``."""
    projection = Projection(None, None, _rows(weight), outer.bias)
    return PerHead(Factored(outer.source, projection, nodes, rank), outer.letters)


def _stage(node: Node) -> _Stage | None:
    call = read(node)
    if call is None:
        return None
    if call.op == "einsum":
        return _einsum(read_equation(call), node)
    if call.op == "matmul" and is_weight(call["other"], 3):
        return _matmul(call.input, call["other"], node)
    if call.op == "add" and number_of(call.get("alpha", 1)) == 1:
        return _biased(call.input, call["other"], node) or _biased(call["other"], call.input, node)
    return None


def _einsum(equation: Equation | None, node: Node) -> _Stage | None:
    """``'bmd,hdr->bhmr'`` and the like, renamed to rows b and m, heads h, contracted c and kept d."""
    if equation is None or not is_weight(equation.operands[1], 3):
        return None
    source, weight, result, operands = equation
    heads = [x for x in weight if x in result and (x in source or weight.index(x) == 0)]
    contracted = [x for x in weight if x in source and x not in result]
    kept = [x for x in weight if x in result and x not in source and x not in heads]
    rows = [x for x in result if x in source and x not in weight]
    if [len(x) for x in (heads, contracted, kept, rows)] != [1, 1, 1, 2]:
        return None
    names = {heads[0]: "h", contracted[0]: "c", kept[0]: "d", rows[0]: "b", rows[1]: "m"}
    if set(source) | set(weight) != set(names) or set(result) != {heads[0], kept[0], *rows}:
        return None
    order = tuple(weight.index(x) for x in (heads[0], contracted[0], kept[0]))
    value = Weight.of(operands[1])
    value = value if order == (0, 1, 2) else Weight.call("permute", value, order)
    source, result = ("".join(names[x] for x in letters) for letters in (source, result))
    return _Stage(operands[0], source.replace("c", "d"), value, result, None, (node,))


def _matmul(source: Node, weight: Node, node: Node) -> _Stage | None:
    """``[b, 1 or h, m, c] @ [h, c, d]``; the dimension of size 1 is peeled off."""
    shape, heads = shape_of(source), (shape_of(weight) or (None,))[0]
    if shape is None or len(shape) != 4:
        return None
    if shape[1] == heads:
        return _Stage(source, "bhmd", Weight.of(weight), "bhmd", None, (node,))
    view = read_view(source)
    if shape[1] != 1 or view is None or not all(isinstance(step, Regroup) for step in view.steps):
        return None
    if shape_of(view.source) != (shape[0], *shape[2:]):
        return None
    return _Stage(view.source, "bmd", Weight.of(weight), "bhmd", None, (*view.nodes, node))


def _biased(stage: object, bias: object, node: Node) -> _Stage | None:
    """A bias ``[h, 1, d]`` or ``[1, h, 1, d]`` added to ``[b, h, m, d]``."""
    inner = _stage(stage) if isinstance(stage, Node) and is_weight(bias) and len(stage.users) == 1 else None
    value = tensor_of(bias) if shape_of(stage) == shape_of(node) else None
    if inner is None or inner.letters != "bhmd" or inner.bias is not None or value is None:
        return None
    assert isinstance(bias, Node)
    heads, _, features = inner.weight.shape
    if value.shape[-3:] != (heads, 1, features) or value.numel() != heads * features:
        return None
    return inner._replace(bias=Weight.call("reshape", Weight.of(bias), (-1,)), nodes=(*inner.nodes, node))
