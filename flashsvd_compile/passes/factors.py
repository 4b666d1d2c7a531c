"""Reads projections: an affine map of the last dimension, and pairs of them that are one map of low rank.

    h = linear(x, down)                 Projection(down, down_bias, up, up_bias) of x
    y = linear(h, up, bias)

A basis that several projections share is computed once and stays: they are dense projections of ``h``, of its rank.
"""

from torch.fx import Node

from ..ops.projection import Projection
from ..report import RefusalReason
from .affine import Affine, read_affine
from .factored import Factored, Obstacle
from .grouped import read_groups
from .values import example_shape
from .views import peel_rows, with_rows
from .vocabulary import read
from .weights import Weight, is_transposition, is_weight


def read_projection(node: Node) -> Factored | None:
    """``node`` as a low-rank projection if it is one, else as a dense one, else ``None``."""
    pair = read_pair(node)
    if isinstance(pair, Factored):
        return pair
    affine = read_affine(node)
    if affine is None:
        return None
    shared = isinstance(pair, Obstacle) and pair.reason == RefusalReason.OTHER_USER
    rank = affine.weight.shape[1] if shared else None
    return Factored(affine.source, Projection(None, None, affine.weight, affine.bias), affine.nodes, rank)


def read_pair(node: Node) -> Factored | Obstacle | None:
    """``node`` as a low-rank projection; an obstacle when it is a pair of factors that must be left alone."""
    outer = read_affine(node)
    if outer is None:
        return read_groups(node)
    product = _product_of_weights(outer)
    if product is not None:
        return product
    found = _inner_affine(outer)
    if found is None:
        return None
    inner, between = found
    nodes = inner.nodes + between + outer.nodes
    obstacle = _obstacle(inner, outer, nodes)
    if obstacle is not None:
        return obstacle
    source = with_rows(inner.source, example_shape(outer.nodes[-1])[:-1])
    if source is None:
        return None
    peeled, peeled_nodes = source
    projection = Projection(inner.weight, inner.bias, outer.weight, outer.bias)
    return Factored(peeled, projection, peeled_nodes + nodes, inner.weight.shape[0])


def _inner_affine(outer: Affine) -> tuple[Affine, tuple[Node, ...]] | None:
    for source, views in peel_rows(outer.source):
        inner = read_affine(source, diagonal=True)
        if inner is not None:
            return inner, views[::-1]
    return None


def _obstacle(inner: Affine, outer: Affine, nodes: tuple[Node, ...]) -> Obstacle | None:
    rank, in_features = inner.weight.shape
    out_features = outer.weight.shape[0]
    if rank >= min(in_features, out_features):
        sentence = f"two linear layers {in_features} -> {rank} -> {out_features}: the middle is not a bottleneck"
        return Obstacle(RefusalReason.RANK_NOT_LOW, sentence)
    for node in nodes[:-1]:
        for user in node.users:
            if user not in nodes:
                sentence = f"the rank-space intermediate {node.name!r} is also used by {user.name!r}"
                return Obstacle(RefusalReason.OTHER_USER, sentence)
    return None


def _product_of_weights(outer: Affine) -> Factored | None:
    """``linear(x, up @ down)``."""
    node = outer.weight.target
    transposed = False
    if outer.weight.target == "t":
        node, transposed = outer.weight.arguments[0].target, True
    elif isinstance(node, Node) and is_transposition(node):
        call = read(node)
        assert call is not None
        node, transposed = call.input, True
    call = read(node)
    if call is None or call.op not in ("matmul", "linear") or not is_weight(node, 2) or call.get("bias") is not None:
        return None
    left = Weight.of(call.input)
    right = Weight.of(call["other"]) if call.op == "matmul" else Weight.of(call["weight"]).transposed
    up, down = (right.transposed, left.transposed) if transposed else (left, right)
    if down.shape[0] >= min(down.shape[1], up.shape[0]):
        return None
    return Factored(outer.source, Projection(down, None, up, outer.bias), outer.nodes, down.shape[0])
